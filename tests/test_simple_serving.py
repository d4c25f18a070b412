"""deploy/simple_serving, started for real: agreement with predict.py, load, bad requests, its OpenAPI description, its end."""

import asyncio
import contextlib
import http.client
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import load
import numpy as np
import pytest
from conftest import ROOT, assert_answers_agree, assert_user_error, read_lines, server_python, write_lines

PYTHON = server_python("simple-serving")
SERVER, CLIENT = ROOT / "deploy/simple_serving/server.py", ROOT / "deploy/simple_serving/client.py"
CODE = "__import__('os').system('touch pwned')"


def start(folder, log, *more):
    """Start server.py on a free port; returns (process, port)."""
    command = [PYTHON, SERVER, "--export_dir", folder, "--port", 0, *more]
    process = subprocess.Popen(list(map(str, command)), stderr=open(log, "w"), cwd=log.parent)
    while '"listening"' not in log.read_text(encoding="utf-8"):
        assert process.poll() is None, log.read_text(encoding="utf-8")
        time.sleep(0.05)
    entry = next(entry for entry in map(json.loads, read_lines(log)) if entry["message"] == "listening")
    return process, int(entry["url"].rsplit(":", 1)[1])


def stop(process):
    process.terminate()
    assert process.wait(60) == 0


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return tmp_path_factory.mktemp("server") / "log"


@pytest.fixture(scope="module")
def server(exported, log):
    """(process, port) of one server for most tests."""
    process, port = start(exported, log)
    yield process, port
    stop(process)


def post(port, body, path="/predict", headers=()):
    """(status, answer as JSON, headers) of one request; body: bytes, or something to be sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST" if body else "GET", path, body or None, {"Content-Type": "application/json", **dict(headers)})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, json.loads(content) if b"json" in answer.headers["Content-Type"].encode() else content, answer.headers


def client(port, *more, stdin=None):
    command = [PYTHON, CLIENT, "--url", f"http://127.0.0.1:{port}", *more]
    return subprocess.run(list(map(str, command)), capture_output=True, encoding="utf-8", input=stdin, timeout=300)


def test_client_agrees_with_predict(server, predicted, tmp_path):
    texts, expected = predicted
    write_lines(tmp_path / "texts", texts)
    process = client(server[1], "--data_file", tmp_path / "texts", "--top_k", 3, "--output_format", "jsonl")
    assert process.returncode == 0, process.stderr
    rows = [json.loads(line) for line in process.stdout.split("\n")[:-1]]
    assert [row["text"] for row in rows] == texts
    assert_answers_agree([[(top["label"], top["confidence"]) for top in row["top_k"]] for row in rows], expected)
    assert all((row["label"], row["confidence"]) == tuple(row["top_k"][0].values()) for row in rows)
    blocks = client(server[1], texts[0], texts[1]).stdout.split("-" * 29 + "\n")
    assert [block.split("\n")[0] for block in blocks[:-1]] == [f"data: {text}" for text in texts[:2]]


def test_the_earlier_form(server, predicted):
    texts, expected = predicted[0][:40], predicted[1][:40]
    status, answer, _ = post(server[1], {"data": {"text": texts}, "parameters": {"max_seq_len": 128, "batch_size": 1}},
                             "/taskflow/cls")
    assert status == 200 and [item["text"] for item in answer["result"]] == texts
    assert_answers_agree([[(top["label"], top["score"]) for top in item["predictions"]] for item in answer["result"]], expected)
    assert post(server[1], {"data": {"text": texts[0]}}, "/taskflow/cls")[1]["result"] == answer["result"][:1]


def memory(process):
    """Resident memory of a process in MiB."""
    with open(f"/proc/{process.pid}/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS"))


def test_64_clients_for_a_minute_and_the_memory(server, predicted):
    """Every answer is right; after 50,000 requests the memory is within 2 % of that after 5,000."""
    process, port = server
    requests, expected = [load.encode(text, 3) for text in predicted[0]], predicted[1]
    answers, figures, began = [], {}, time.monotonic()

    def work():
        for number in itertools.count():
            if number >= 50000 and time.monotonic() - began >= 60:
                return
            yield number % 1000, requests[number % 1000]

    def on_answer(key, status, body, seconds):
        answers.append(key)
        if len(answers) in (5000, 50000):
            figures[len(answers)] = memory(process)
        assert status == 200, (status, body)
        if len(answers) <= 1000:
            top = [[(item["label"], item["confidence"]) for item in json.loads(body)["result"][0]["top_k"]]]
            assert_answers_agree(top, expected[key:key + 1])
        assert json.loads(body)["result"][0]["label"] == expected[key]["label"]

    refused = asyncio.run(load.drive(port, 64, work(), on_answer))
    assert refused == 0 and len(answers) >= 50000
    assert figures[50000] == pytest.approx(figures[5000], rel=0.02)
    metrics = post(port, b"", "/metrics")[1].decode()
    assert "serving_queue_texts 0.0" in metrics and 'serving_request_seconds_count{path="/predict"}' in metrics


@pytest.mark.parametrize("body, status, field", [
    ({"data": {"text": []}}, 422, "data.text"), ({"data": {}}, 422, "data.text"), ({}, 422, "data"), (b"[]", 422, ""),
    ({"data": {"text": "a"}}, 422, "data.text"), ({"data": {"text": ["a", 3]}}, 422, "data.text.1"),
    ({"data": {"text": [None]}}, 422, "data.text.0"), ({"data": {"text": ["a", " \u3000"]}}, 422, "data.text.1"),
    ({"data": {"text": ["a"] * 257}}, 422, "data.text"), ({"data": {"text": ["a" * 10001]}}, 422, "data.text.0"),
    ({"data": {"texts": ["a"]}}, 422, "data.texts"),
    ({"data": {"text": ["a"]}, "parameters": {"topk": 1}}, 422, "parameters.topk"),
    ({"data": {"text": ["a"]}, "parameters": {"top_k": 0}}, 422, "parameters.top_k"),
    ({"data": {"text": ["a"]}, "parameters": {"top_k": 12}}, 422, "parameters.top_k"),
    ({"data": {"text": ["a"]}, "parameters": {"top_k": "3"}}, 422, "parameters.top_k"),
    ({"data": {"text": ["a"]}, "parameters": {"top_k": True}}, 422, "parameters.top_k"),
    ({"data": {"text": ["\ud800"]}}, 422, "data.text.0"), (b'{"data": {"text": ["\xff"]}}', 400, ""), (b"{", 422, ""),
    (CODE.encode(), 422, ""), (b"[" * 100000, 400, ""), (b" " * (1 << 20) + b"{}", 413, ""),
    (b" " * (15 << 20), 413, ""), ('{"data": {"text": ["a"]}}'.encode("utf-16-le"), 400, "")])
def test_bad_requests(server, body, status, field):
    got, answer, _ = post(server[1], body)
    assert got == status and field in [problem["field"] for problem in answer["errors"]], answer
    assert "Traceback" not in str(answer) and ".py" not in str(answer)
    good = post(server[1], {"data": {"text": [CODE]}})
    assert good[0] == 200 and len(good[1]["result"]) == 1
    assert not (ROOT / "pwned").exists()


def batch_figures(port):
    """(texts, batches) of a server since its start."""
    metrics = post(port, b"", "/metrics")[1].decode()
    return [float(metrics.split(f"\nserving_batch_size_{name} ")[1].split("\n")[0]) for name in ("sum", "count")]


def test_requests_at_once_share_batches(server):
    """The texts are long: the model takes much longer over one than the clients and the server's front over its request."""
    statuses, before, request = [], batch_figures(server[1]), load.encode("头疼怎么办" * 2000)
    asyncio.run(load.drive(server[1], 64, iter([(0, request)] * 512), lambda _, status, *rest: statuses.append(status)))
    texts, batches = np.subtract(batch_figures(server[1]), before)
    assert texts == 512 and statuses == [200] * 512
    assert texts / batches > 2  # texts of several requests in a batch


def test_silent_connections_are_closed(server):
    with socket.create_connection(("127.0.0.1", server[1]), 30) as silent, \
            socket.create_connection(("127.0.0.1", server[1]), 30) as slow:
        slow.sendall(b"POST /predict HTTP/1.1\r\nHost: test\r\n")
        assert silent.recv(100) == slow.recv(100) == b""


def test_a_large_head_is_refused(server):
    for part in (b"X: " + b"a" * (1 << 20), b"X: a\r\n" * (1 << 18)):
        with socket.create_connection(("127.0.0.1", server[1]), timeout=5) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n" + part)
                assert connection.recv(1000).startswith(b"HTTP/1.1 400 ")
                assert connection.recv(1000) == b""  # the server has not waited for the rest


def test_a_body_that_ends_early_is_not_answered(server, log):
    with socket.create_connection(("127.0.0.1", server[1])) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n"
                           b'X-Request-ID: early\r\n\r\n{"data": {"text": ["a"]}}')
    while "early" not in log.read_text(encoding="utf-8"):
        time.sleep(0.05)
    [entry] = [entry for entry in map(json.loads, read_lines(log)) if entry.get("request_id") == "early"]
    assert entry["status"] == 400


def test_the_earlier_form_names_fields_and_the_content_type(server):
    answer = post(server[1], {"data": {"text": [1, ""]}}, "/taskflow/cls")[1]
    assert [problem["field"] for problem in answer["errors"]] == ["data.text.0", "data.text.1"]
    assert [problem["field"] for problem in post(server[1], {"data": {"text": 1}}, "/taskflow/cls")[1]["errors"]] == ["data.text"]
    status, answer, _ = post(server[1], {"data": {"text": ["a"]}}, headers=[("Content-Type", "text/plain")])
    assert status == 422 and answer["errors"][0]["field"] == "Content-Type"
    assert post(server[1], {"data": {"text": ["a"]}}, "/predict/")[0] == 404


def test_chunked_bodies_are_limited_too(server):
    connection = http.client.HTTPConnection("127.0.0.1", server[1])
    connection.request("POST", "/predict", iter([b" " * 65536] * 40), {"Transfer-Encoding": "chunked"}, encode_chunked=True)
    assert connection.getresponse().status == 413


def test_it_keeps_its_openapi_description(server):
    """schemathesis makes requests from the description, sound and unsound ones, and checks every answer against it."""
    tool = PYTHON.parent / "schemathesis"
    process = subprocess.run(
        [tool, "run", f"http://127.0.0.1:{server[1]}/openapi.json", "--max-examples", "60", "--seed", "1", "--no-color"],
        capture_output=True, encoding="utf-8", timeout=600)
    assert process.returncode == 0, process.stdout[-6000:]
    page = post(server[1], b"", "/docs")[1].decode()
    assert "swagger-ui" in page and "https://" not in page  # works without internet


def test_logs_are_json_without_texts(server, log):
    post(server[1], {"data": {"text": ["不该出现在日志里的文本"]}}, headers=[("X-Request-ID", "my-id-1")])
    entries = [json.loads(line) for line in read_lines(log)]
    mine = [entry for entry in entries if entry.get("request_id") == "my-id-1"]
    assert len(mine) == 1 and mine[0]["status"] == 200 and mine[0]["path"] == "/predict" and mine[0]["ms"] > 0
    assert "不该出现" not in log.read_text(encoding="utf-8")


@pytest.mark.parametrize("number, keep_alive", [(signal.SIGTERM, True), (signal.SIGTERM, False), (signal.SIGHUP, True)])
def test_the_end_under_load_loses_nothing(exported, predicted, tmp_path, number, keep_alive):
    process, port = start(exported, tmp_path / "log")
    outcomes, requests = [], [load.encode(text) for text in predicted[0]]

    def work():
        for place in itertools.count():
            if place == 3000:
                process.send_signal(number)
            yield place % 1000, requests[place % 1000]

    def on_answer(key, status, body, seconds):
        outcomes.append(status)
        assert status is not None, f"request {len(outcomes)} lost"
        assert json.loads(body)["result"][0]["label"] == predicted[1][key]["label"]

    refused = asyncio.run(load.drive(port, 64, work(), on_answer, keep_alive))
    assert process.wait(60) == 0
    assert len(outcomes) > 2900 and set(outcomes) == {200} and refused == 64
    assert [json.loads(line)["message"] for line in read_lines(tmp_path / "log")].count(
        "shutting down: answering what was accepted") == 1


def test_token(exported, predicted, tmp_path):
    (tmp_path / "token").write_text("0123456789abcdef\n")
    process, port = start(exported, tmp_path / "log", "--token_file", tmp_path / "token")
    try:
        body = {"data": {"text": predicted[0][:1]}}
        for path in ("/predict", "/taskflow/cls"):
            for headers in ((), [("Authorization", "Bearer 0123456789abcdeg")], [("Authorization", "0123456789abcdef")]):
                assert post(port, body, path, headers)[0] == 401
        assert post(port, b" " * (15 << 20))[0] == 401
        assert post(port, b"", "/metrics")[0] == 401 and post(port, b"", "/health/ready")[0] == 200
        assert post(port, body, headers=[("Authorization", "Bearer 0123456789abcdef")])[0] == 200
        assert "securitySchemes" in post(port, b"", "/openapi.json")[1]["components"]
        assert client(port, "头疼怎么办", "--token_file", tmp_path / "token").returncode == 0
        assert_user_error(client(port, "头疼怎么办"), f"http://127.0.0.1:{port}: refused with status 401", "token")
    finally:
        stop(process)


def test_a_full_queue_refuses(exported, predicted, tmp_path):
    process, port = start(exported, tmp_path / "log", "--max_queue", 256, "--num_threads", 1)
    try:
        request, outcomes = load.encode_body("/predict", {"data": {"text": predicted[0][:250]}}), []
        asyncio.run(load.drive(port, 8, iter([(0, request)] * 8), lambda key, status, body, _: outcomes.append((status, body))))
        assert {status for status, _ in outcomes} == {200, 503}
        for status, answer in outcomes:
            if status == 200:
                labels = [item["label"] for item in json.loads(answer)["result"]]
                assert labels == [item["label"] for item in predicted[1][:250]]
            else:
                assert "too many texts" in json.loads(answer)["errors"][0]["message"]
    finally:
        stop(process)


def test_int8(exported, predicted, tmp_path):
    process, port = start(exported, tmp_path / "log", "--use_quantize", "--calibration_file", ROOT / "data/dev.txt",
                          "--allow_accuracy_drop")
    try:
        answers = post(port, {"data": {"text": predicted[0][:256]}})[1]["result"]
        right = [answer["label"] == expected["label"] for answer, expected in zip(answers, predicted[1])]
        assert np.mean(right) >= 0.98
    finally:
        stop(process)


def test_a_failing_model_is_a_neutral_error(exported, predicted, tmp_path):
    export = shutil.copytree(exported, tmp_path / "export")
    tokenizer = json.loads((export / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"]["疼"] = 10**6  # beyond the model's embedding
    (export / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    process, port = start(export, tmp_path / "log")
    try:
        status, answer, headers = post(port, {"data": {"text": ["头疼"]}}, headers=[("X-Request-ID", "failing")])
        assert status == 500 and answer == {"errors": [{"field": "", "message": "internal error, see the server's log"}]}
        assert headers["X-Request-ID"] == "failing"
        assert post(port, {"data": {"text": predicted[0][:1]}})[1]["result"][0]["label"] == predicted[1][0]["label"]
    finally:
        stop(process)
    failures = [entry for entry in map(json.loads, read_lines(tmp_path / "log")) if entry["message"] == "request failing failed"]
    assert len(failures) == 1 and "Traceback" in failures[0]["traceback"] and "头疼" not in failures[0]["traceback"]


@pytest.mark.parametrize("answer, message", [(b"\0\x12garbage\r\n", "what answers there is no HTTP"), (b"", "no answer (Remote")])
def test_the_client_says_that_it_is_another_kind_of_server(answer, message):
    with socket.create_server(("127.0.0.1", 0)) as other, ThreadPoolExecutor(1) as pool:
        port = other.getsockname()[1]
        asked = pool.submit(client, port, "头疼怎么办")
        with other.accept()[0] as connection:
            connection.recv(10000)
            connection.sendall(answer)
        assert_user_error(asked.result(), f"http://127.0.0.1:{port}: {message}")


def test_refusals_at_the_start(server, exported, tmp_path):
    (tmp_path / "short").write_text("short\n")
    for options, parts in (
            (["--export_dir", tmp_path], ["deploy.json is missing"]),
            (["--export_dir", exported, "--port", server[1]], [f"127.0.0.1:{server[1]}: cannot listen there", "--port"]),
            (["--export_dir", exported, "--host", "192.0.2.1"], ["192.0.2.1:8189: cannot listen there"]),
            (["--export_dir", exported, "--token_file", tmp_path / "none"], ["none: cannot be read"]),
            (["--export_dir", exported, "--token_file", tmp_path / "short"], ["short: holds no token"]),
            (["--export_dir", "/none"], ["/none: no such folder or model"]),
            (["--export_dir", exported, "--host", ""], ["--host: empty"]),
            (["--export_dir", exported, "--batch_size", 2000], ["--batch_size 2000: expected 1 to 1024"]),
            (["--export_dir", exported, "--calibration_file", "dev.txt"], ["--calibration_file", "expected --use_quantize"]),
            (["--export_dir", exported, "--device", "gpu"], ["--device gpu", "expected --device cpu"])):
        process = subprocess.run(list(map(str, [PYTHON, SERVER, *options])), capture_output=True, encoding="utf-8", timeout=60)
        assert_user_error(process, *parts)
    assert_user_error(client(1, "头疼怎么办"), "http://127.0.0.1:1: no answer")
    assert_user_error(client(server[1], "头疼怎么办", "--top_k", 50), "refused with status 422", "parameters.top_k")
    assert not os.path.exists(tmp_path / "pwned")

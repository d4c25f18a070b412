"""deploy/simple_serving, started for real: agreement with predict.py, load, bad requests, its OpenAPI description, its end."""

import asyncio
import contextlib
import html
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import load
import predict
from helpers import (
    ROOT,
    THRESHOLD,
    assert_answers_agree,
    assert_user_error,
    read_lines,
    run_all,
    run_here,
    server_python,
    write_lines,
)

PYTHON = server_python("simple-serving")
SERVER, CLIENT = ROOT / "deploy/simple_serving/server.py", ROOT / "deploy/simple_serving/client.py"
CODE = "__import__('os').system('touch pwned')"


def start(folder, log, *more):
    """Start server.py on a free port; returns (process, port)."""
    command = [PYTHON, SERVER, "--export_dir", folder, "--port", 0, *more]
    process = subprocess.Popen(list(map(str, command)), stderr=open(log, "w"), cwd=log.parent,
                               preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))  # nohup has it ignored
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


@pytest.fixture(scope="module", autouse=True)
def silent(server):
    """Two connections that say nothing, or not all, from the start of the tests on."""
    with contextlib.ExitStack() as stack:
        connections = [stack.enter_context(socket.create_connection(("127.0.0.1", server[1]), 60)) for _ in range(2)]
        connections[1].sendall(b"POST /predict HTTP/1.1\r\nHost: test\r\n")
        yield connections


@pytest.fixture(scope="module")
def guarded(exported, tmp_path_factory):
    """(port, file with its token) of a server with a token, INT8 and narrow limits."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "token").write_text("0123456789abcdef\n")
    process, port = start(exported, folder / "log", "--token_file", folder / "token", "--use_quantize", "--calibration_file",
                          ROOT / "data/dev.txt", "--allow_accuracy_drop", "--max_texts", 8, "--max_text_length", 40)
    yield port, folder / "token"
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


def test_windows_of_long_texts(windowed, tmp_path):
    _, export, (texts, expected) = windowed
    process, port = start(export, tmp_path / "log", "--batch_size", 8)
    try:
        write_lines(tmp_path / "texts", texts)
        answer = client(port, "--data_file", tmp_path / "texts", "--top_k", 3, "--output_format", "jsonl")
        rows = [json.loads(line) for line in answer.stdout.split("\n")[:-1]]
        assert_answers_agree([[(top["label"], top["confidence"]) for top in row["top_k"]] for row in rows], expected)
    finally:
        stop(process)


def test_below_the_threshold_is_undecided(server, predicted):
    texts, expected = predicted[0][:100], predicted[1][:100]
    for threshold, value in ((0.5, 0.5), ("auto", THRESHOLD), (0, 0)):
        status, answer, _ = post(server[1], {"data": {"text": texts}, "parameters": {"threshold": threshold, "top_k": 2}})
        assert status == 200
        for item, right in zip(answer["result"], expected):
            is_near = abs(right["probability"] - value) < 1e-4
            assert is_near or item["label"] == (right["label"] if right["probability"] >= value else "undecided")
            assert [top["label"] for top in item["top_k"]] == [top["label"] for top in right["top_k"][:2]]
    unsure = next(right["text"] for right in expected if right["probability"] < 0.6)
    assert "label: undecided (" in client(server[1], "--threshold", "auto", unsure).stdout


def test_unknown_texts_are_told_as_by_predict(telling, server, predicted, tmp_path):
    texts = predicted[0][:60]
    write_lines(tmp_path / "texts.txt", texts)
    words = ["--params_path", telling / "checkpoint", "--dataset_dir", tmp_path, "--data_file", "texts.txt", "--device", "cpu",
             "--output_format", "jsonl", "--output_file", tmp_path / "out"]
    assert run_here(predict.main, *words).returncode == 0
    expected = [json.loads(line) for line in read_lines(tmp_path / "out")]
    least = sorted(row["known"] for row in expected)[30]
    process, port = start(telling / "export", tmp_path / "log")
    try:
        request = {"data": {"text": texts}, "parameters": {"least_known": least}}
        status, answer, _ = post(port, request)
        assert status == 200 and len(answer["result"]) == 60
        for item, right in zip(answer["result"], expected):
            assert item["known"] == pytest.approx(right["known"], abs=1e-4)
            is_near = abs(right["known"] - least) < 1e-5
            assert is_near or item["label"] == (right["label"] if right["known"] > least else "undecided")
        assert {"undecided"} < {item["label"] for item in answer["result"]}
        block = client(port, "--least_known", 1, texts[0]).stdout.split("\n")
        assert block[1].startswith("label: undecided (") and block[2].startswith("known: 0.")
        assert "known" in post(port, b"", "/openapi.json")[1]["components"]["schemas"]["KnownAnswer"]["properties"]
    finally:
        stop(process)
    status, answer, _ = post(server[1], request)  # of a model that was trained without
    assert status == 409 and answer["errors"][0]["field"] == "parameters.least_known"
    assert "known" not in post(server[1], {"data": {"text": texts[:1]}})[1]["result"][0]


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


def test_64_clients_and_the_memory(server, predicted):
    """Every answer is right; after 12,000 requests the memory is within 2 % of that after 3,000: none keeps 500 bytes."""
    process, port = server
    requests, expected = [load.encode(text, 3) for text in predicted[0]], predicted[1]
    answers, figures = [], {}
    work = ((number % 1000, requests[number % 1000]) for number in range(12000))

    def on_answer(key, status, body, seconds):
        answers.append(key)
        if len(answers) in (3000, 12000):
            figures[len(answers)] = memory(process)
        assert status == 200, (status, body)
        if len(answers) <= 1000:
            top = [[(item["label"], item["confidence"]) for item in json.loads(body)["result"][0]["top_k"]]]
            assert_answers_agree(top, expected[key:key + 1])
        assert json.loads(body)["result"][0]["label"] == expected[key]["label"]

    refused = asyncio.run(load.drive(port, 64, work, on_answer))
    assert refused == 0 and len(answers) == 12000
    assert figures[12000] == pytest.approx(figures[3000], rel=0.02)
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
    ({"data": {"text": ["\ud800"]}}, 422, "data.text.0"), ({"data": {"text": ["\x1c", "a\0b"]}}, 422, "data.text.1"),
    ({"data": {"text": ["a\tb", "\x1c"]}}, 422, "data.text.1"), (b'{"data": {"text": ["\xff"]}}', 400, ""), (b"{", 422, ""),
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
    asyncio.run(load.drive(server[1], 32, iter([(0, request)] * 128), lambda _, status, *rest: statuses.append(status)))
    texts, batches = np.subtract(batch_figures(server[1]), before)
    assert texts == 128 and statuses == [200] * 128
    assert texts / batches > 2  # texts of several requests in a batch


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
    assert wait_for_entry(log, "early")["status"] == 499


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


def test_it_keeps_its_openapi_description(guarded):
    """schemathesis makes requests from the description, sound and unsound ones, and checks every answer against it."""
    tool = PYTHON.parent / "schemathesis"
    process = subprocess.run(
        [tool, "run", f"http://127.0.0.1:{guarded[0]}/openapi.json", "-H", "Authorization: Bearer 0123456789abcdef",
         "--max-examples", "40", "--seed", "1", "--no-color"], capture_output=True, encoding="utf-8", timeout=600)
    assert process.returncode == 0, process.stdout[-6000:]
    page = post(guarded[0], b"", "/docs")[1].decode()
    assert "swagger-ui" in page and "https://" not in page  # works without internet


def wait_for_entry(log, request_id):
    """The one entry of the log on a request; it comes after the answer."""
    found = []
    while not found:
        time.sleep(0.02)
        found = [entry for entry in map(json.loads, read_lines(log)) if entry.get("request_id") == request_id]
    [entry] = found
    return entry


def test_logs_are_json_without_texts(server, log):
    post(server[1], {"data": {"text": ["不该出现在日志里的文本"]}}, headers=[("X-Request-ID", "my-id-1")])
    entry = wait_for_entry(log, "my-id-1")
    assert entry["status"] == 200 and entry["path"] == "/predict" and entry["ms"] > 0
    assert "不该出现" not in log.read_text(encoding="utf-8")


@pytest.mark.parametrize("number, keep_alive", [(signal.SIGTERM, True), (signal.SIGHUP, False)])
def test_the_end_under_load_loses_nothing(exported, predicted, tmp_path, number, keep_alive):
    process, port = start(exported, tmp_path / "log")
    outcomes, requests = [], [load.encode(text) for text in predicted[0]]

    def work():
        for place in range(20_000):  # some ten seconds, where the server should not end
            if place == 1000:
                process.send_signal(number)
            yield place % 1000, requests[place % 1000]

    def on_answer(key, status, body, seconds):
        outcomes.append(status)
        assert status is not None, f"request {len(outcomes)} lost"
        assert json.loads(body)["result"][0]["label"] == predicted[1][key]["label"]

    refused = asyncio.run(load.drive(port, 64, work(), on_answer, keep_alive))
    assert process.wait(60) == 0
    assert len(outcomes) > 900 and set(outcomes) == {200} and refused == 64
    assert [json.loads(line)["message"] for line in read_lines(tmp_path / "log")].count(
        "shutting down: answering what was accepted") == 1


def test_everything_but_health_and_docs_needs_the_token(guarded):
    port, token = guarded
    body, right = {"data": {"text": ["头疼怎么办"]}}, [("Authorization", "Bearer 0123456789abcdef")]
    for path in ("/predict", "/taskflow/cls", "/no/such/route", "/static-offline-docs"):
        for headers in ((), [("Authorization", "Bearer 0123456789abcdeg")], [("Authorization", "0123456789abcdef")]):
            assert post(port, body, path, headers)[0] == 401
    assert post(port, b"", "/metrics")[0] == post(port, b"", "/no/such/route")[0] == post(port, b" " * (15 << 20))[0] == 401
    assert post(port, body, headers=right)[0] == post(port, b"", "/metrics", right)[0] == 200
    assert post(port, body, "/no/such/route", right)[0] == post(port, b"", "/no/such/route", right)[0] == 404
    assert post(port, b"", "/health/live")[0] == post(port, b"", "/health/ready")[0] == 200
    assert "securitySchemes" in post(port, b"", "/openapi.json")[1]["components"]
    page = post(port, b"", "/docs")[1].decode()
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(loaded) >= 3 and all(post(port, b"", path)[0] == 200 for path in loaded)
    with_token, without = run_all(PYTHON, CLIENT, ["--url", f"http://127.0.0.1:{port}", "头疼怎么办", "--token_file", token],
                                  ["--url", f"http://127.0.0.1:{port}", "头疼怎么办"])
    assert with_token.returncode == 0
    assert_user_error(without, f"http://127.0.0.1:{port}: refused with status 401", "token")


def test_the_page_needs_no_token_and_loads_from_this_server_only(guarded):
    """tests/deploy/test_serving_page.py opens it in a browser."""
    status, page, headers = post(guarded[0], b"", "/")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    assert json.loads(html.unescape(re.search(rb'data-settings="(.*?)"', page)[1].decode())) == {
        "parameters": {"top_k": 3}, "max_texts": 8, "needs_token": True}
    files = {path: post(guarded[0], b"", f"/{path}") for path in re.findall('(?:src|href)="([^":]+)"', page.decode())}
    assert set(files) == {"page.css", "page.js", "docs"}
    for path, media_type in (("page.css", "text/css"), ("page.js", "text/javascript")):
        assert files[path][0] == 200 and files[path][2]["Content-Type"] == f"{media_type}; charset=utf-8"
        assert b"http" not in files[path][1]  # no address
    for _, _, given in [(status, page, headers), files["page.css"], files["page.js"]]:
        policy = given["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "http" not in policy
        assert "frame-ancestors 'none'" in policy and given["X-Content-Type-Options"] == "nosniff"


def test_int8(guarded, predicted):
    right = [("Authorization", "Bearer 0123456789abcdef")]
    pairs = [(text, expected["label"]) for text, expected in zip(*predicted) if len(text) <= 40][:256]
    labels = [result["label"] for start in range(0, 256, 8) for result in post(
        guarded[0], {"data": {"text": [text for text, _ in pairs[start:start + 8]]}}, headers=right)[1]["result"]]
    assert np.mean([label == expected for label, (_, expected) in zip(labels, pairs)]) >= 0.98 and len(labels) == 256


def test_a_client_that_asks_for_http_2_is_answered(server):
    """Java's does so in each request."""
    body, upgrade = {"data": {"text": ["头疼"]}}, [("Connection", "Upgrade, HTTP2-Settings"), ("Upgrade", "h2c")]
    assert post(server[1], body, headers=upgrade)[:2] == post(server[1], body)[:2]


def test_requests_of_clients_that_have_gone_are_dropped(exported, tmp_path):
    process, port = start(exported, tmp_path / "log", "--num_threads", 1)
    try:
        request = load.encode_body("/predict", {"data": {"text": ["疼" * 70] * 250}})
        for count in (1, 1, 1, 1, 2, 3):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(request * count)
        assert post(port, {"data": {"text": ["头疼"]}})[0] == 200
        assert batch_figures(port)[0] < 4 * 250
    finally:
        stop(process)
    entries = [json.loads(line) for line in read_lines(tmp_path / "log")]
    assert {entry["level"] for entry in entries} == {"INFO"} and [entry.get("status") for entry in entries].count(499) >= 4


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
    refused = {
        "deploy.json is missing": ["--export_dir", tmp_path],
        f"--port {server[1]}: cannot listen on 127.0.0.1 (Address already": ["--export_dir", exported, "--port", server[1]],
        "--port 8189: cannot listen on 192.0.2.1": ["--export_dir", exported, "--host", "192.0.2.1"],
        "--port 70000: cannot listen on 127.0.0.1": ["--export_dir", exported, "--port", 70000],
        "none: No such file": ["--export_dir", exported, "--token_file", tmp_path / "none"],
        "short: holds no token": ["--export_dir", exported, "--token_file", tmp_path / "short"],
        "/none: no such folder or model": ["--export_dir", "/none"],
        "--host: empty": ["--export_dir", exported, "--host", ""],
        "--max_queue 2: expected at least --max_texts, 256": ["--export_dir", exported, "--max_queue", 2],
        "fp32 is not compared with fp32, expected --use_quantize": ["--export_dir", exported, "--calibration_file", "dev.txt"],
        "--device gpu: this onnxruntime is a CPU build, expected --device cpu": ["--export_dir", exported, "--device", "gpu"]}
    for message, process in zip(refused, run_all(PYTHON, SERVER, *refused.values())):
        assert_user_error(process, message)
    process = subprocess.run([PYTHON, SERVER, "--export_dir", tmp_path], capture_output=True, encoding="utf-8", timeout=60)
    assert_user_error(process, "deploy.json is missing")


def test_refusals_of_the_client(server):
    url = ["--url", f"127.0.0.1:{server[1]}/"]  # http:// is added
    nobody, many, blank, neither, not_utf8, lines = run_all(
        PYTHON, CLIENT, ["头疼", "--url", "http://127.0.0.1:1"], ["头疼", "--top_k", 50, *url], ["好", " ", *url], url,
        [*url, os.fsdecode(b"\xff")], (["--data_file", "-", *url], "好\n\n"))
    assert_user_error(nobody, "http://127.0.0.1:1: no answer")
    assert_user_error(many, "refused with status 422", "parameters.top_k")
    assert_user_error(blank, "text 2: empty or blank, expected a text")
    assert_user_error(neither, "expected either texts or --data_file")
    assert_user_error(not_utf8, "text 1: a lone surrogate (invalid UTF-8)")
    assert_user_error(lines, "standard input:2: empty line")


def test_a_missing_package_is_named():
    code = "import runpy, sys; sys.modules['uvicorn'] = None; sys.argv.pop(0); runpy.run_path(sys.argv[0], {}, '__main__')"
    process = subprocess.run([PYTHON, "-c", code, SERVER], capture_output=True, encoding="utf-8", timeout=60)
    assert_user_error(process, "the package uvicorn is missing, expected `pip install -r deploy/simple_serving/requirements.txt`")


def test_silent_connections_are_closed(silent):
    """The server does so after 10 seconds, which the tests before have taken."""
    assert [connection.recv(100) for connection in silent] == [b"", b""]

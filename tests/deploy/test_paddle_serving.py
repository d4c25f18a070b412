"""deploy/paddle_serving: the real server in a network namespace of its own, both clients, refusals, starts that fail."""

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import build_model
import http_gateway
import numpy as np
import pytest
import request_check
import service as script
import settings

from helpers import (
    ROOT,
    THRESHOLD,
    assert_answers_agree,
    assert_known_agrees,
    assert_user_error,
    needs_paddle_2,
    read_lines,
    run_all,
    run_here,
    server_python,
    write_lines,
)
from textcls.common.errors import UserError

pytestmark = needs_paddle_2
SERVING = ROOT / "deploy/paddle_serving"
LABELS = read_lines(ROOT / "data/label.txt")
TEXTS = ["头疼怎么办", "拔牙多少钱"]
INTERNALS = ("Traceback", "ClassName", "FunctionName", ".py", "Error(", "Exception", "numpy", "site-packages")
PATH = "/seq_cls/prediction"

# Sends what the clients would not send. In: a list of requests; out: a list of their answers. Bytes are latin-1 text.
SENDER = """
import http.client, json, sys
from concurrent.futures import ThreadPoolExecutor
from rpc_client import METHOD, import_messages
messages = import_messages()
import grpc
channel = grpc.insecure_channel("127.0.0.1:18090")

def by_rpc(key=(), value=(), tensors=(), raw=None):
    request = messages.Request(key=key, value=value)
    for name, content in tensors:
        request.tensors.add(name=name, elem_type=13, byte_data=content.encode("latin-1"))
    serialized = raw.encode("latin-1") if raw is not None else request.SerializeToString()
    try:
        answer = channel.unary_unary(METHOD, None, messages.Response.FromString)(serialized, timeout=60)
    except grpc.RpcError as error:
        return {"status": error.code().name, "err_msg": error.details()}
    return {"err_no": answer.err_no, "err_msg": answer.err_msg, "key": list(answer.key), "value": list(answer.value)}

def by_http(body, method="POST", path="/seq_cls/prediction", headers={}):
    connection = http.client.HTTPConnection("127.0.0.1", 9878, timeout=60)
    connection.request(method, path, body.encode("latin-1"), headers)
    answer = connection.getresponse()
    return {"status": answer.status, **json.loads(answer.read())}

with ThreadPoolExecutor(8) as pool:
    kinds = {"rpc": by_rpc, "http": by_http}
    print(json.dumps(list(pool.map(lambda request: kinds[request.pop("by")](**request), json.load(sys.stdin)))))
"""

# Has eight large requests answered at once and says when the server has them all; then prints status and size of each answer.
HURRIED = """
import http.client, json, sys, time
from rpc_client import METHOD, import_messages
messages = import_messages()
import grpc
text = json.dumps(["疼" * 60] * 400)
method = grpc.insecure_channel("127.0.0.1:18090").unary_unary(
    METHOD, messages.Request.SerializeToString, messages.Response.FromString)
calls = [method.future(messages.Request(key=["sentence"], value=[text])) for _ in range(4)]
connections = [http.client.HTTPConnection("127.0.0.1", 9878, timeout=60) for _ in range(4)]
for connection in connections:
    connection.request("POST", "/seq_cls/prediction", json.dumps({"key": ["sentence"], "value": [text]}))
time.sleep(0.1)
assert not any(call.done() for call in calls[2:]), "too fast to test anything"
print("all sent", flush=True)
answers = [connection.getresponse() for connection in connections]
found = [(str(answer.status), json.loads(answer.read())["value"][0]) for answer in answers]
found += [(call.code().name, call.result().value[0]) for call in calls]
print(json.dumps([(status, len(json.loads(labels))) for status, labels in found]))
"""


@pytest.fixture(scope="module")
def inside():
    """The words that run a command in a network namespace of its own: the usual ports are free there."""
    server_python("paddle-serving")
    name = f"seq-cls-{os.getpid()}"
    inside, reason = ["ip", "netns", "exec", name], None
    try:
        for command in (["ip", "netns", "add", name], ["ip", "-n", name, "link", "set", "lo", "up"], [*inside, "true"]):
            process = subprocess.run(command, encoding="utf-8", errors="replace", capture_output=True)
            if process.returncode:
                reason = process.stderr.strip()
                break
        if reason is None:
            yield inside
    except FileNotFoundError:
        reason = "the command ip is missing (Debian: iproute2)"
    finally:
        if shutil.which("ip"):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
    if reason:
        message = f"no network namespace for the server: {reason}"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)


def run_inside(inside, *command, cwd=ROOT, stdin=None):
    """Run `python command...` with the server's Python in the namespace."""
    return subprocess.run([*inside, server_python("paddle-serving"), *map(str, command)], cwd=cwd, encoding="utf-8",
                          errors="replace", input=stdin, capture_output=True, timeout=120)


@pytest.fixture(scope="module")
def served(exported, tmp_path_factory):
    """A folder with config.yml as it is in the repository and the model that build_model.py makes."""
    folder = tmp_path_factory.mktemp("served")
    shutil.copy(SERVING / "config.yml", folder)
    process = run_inside([], SERVING / "build_model.py", "--export_dir", exported, "--output_dir", folder / "serving_server")
    assert process.returncode == 0 and "11 labels, at most 64 tokens per text" in process.stdout, process.stderr
    return folder


def start(inside, folder, *more):
    """Start service.py on a folder of `served`; waits until it is ready. Returns the process, leader of its own group."""
    with open(folder / "output", "w") as output:
        process = subprocess.Popen([*inside, server_python("paddle-serving"), SERVING / "service.py", "--config",
                                    folder / "config.yml", "--log_dir", folder / "log", *map(str, more)], stdout=output,
                                   stderr=output, cwd=folder, start_new_session=True)
    for _ in range(600):
        written = (folder / "output").read_text()
        if "Ready: " in written or process.poll() is not None:
            break
        time.sleep(0.1)
    if "Ready: " not in written:
        stop(process, signal.SIGKILL)
    assert "Ready: " in written, written
    return process


def stop(process, number):
    """Send a signal to the server and wait for its end; nothing of its process group is left. Returns the exit code."""
    try:
        process.send_signal(number)
        return process.wait(30)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


@pytest.fixture(scope="module")
def service(inside, served):
    """The service of most tests; the last one of them ends it."""
    process = start(inside, served)
    yield process
    if process.poll() is None:
        stop(process, signal.SIGTERM)


@pytest.fixture
def send(inside, service):
    """Function that sends requests for SENDER, eight at a time; returns the answers."""
    def send(requests):
        process = run_inside(inside, "-c", SENDER, cwd=SERVING, stdin=json.dumps(requests))
        assert process.returncode == 0, process.stderr
        return json.loads(process.stdout)
    return send


def by_http(key, value, **more):
    return {"by": "http", "body": json.dumps({"key": key, "value": value, **more})}


def pairs(answer, top_k=True):
    """Per text the list of (label, confidence) of an answer."""
    assert answer["err_no"] == 0 and answer["err_msg"] == "", answer
    assert answer["key"] == ["label", "confidence"]
    labels, confidences = map(json.loads, answer["value"])
    assert len(labels) == len(confidences)
    return [list(zip(*pair)) if top_k else [pair] for pair in zip(labels, confidences)]


@pytest.mark.parametrize("client", ["rpc_client.py", "http_client.py"])
def test_clients_say_what_predict_says(inside, service, predicted, tmp_path, client):
    texts, expected = predicted
    write_lines(tmp_path / "data.txt", texts)
    process = run_inside(inside, SERVING / client, "--data_file", tmp_path / "data.txt", "--top_k", 3)
    assert process.returncode == 0 and process.stderr == "", process.stderr
    blocks = [block.split("\n") for block in process.stdout.split("\n" + "-" * 29 + "\n")[:-1]]
    assert [data for data, _, _ in blocks] == [f"data: {text}" for text in texts]
    answers = [list(zip(label[len("label: "):].split(", "), map(float, confidence[len("confidence: "):].split(", "))))
               for _, label, confidence in blocks]
    assert_answers_agree(answers, expected)


def test_windows_of_long_texts_and_how_known_they_are(inside, telling_windows, tmp_path):
    export, texts, expected = telling_windows
    shutil.copy(SERVING / "config.yml", tmp_path)
    process = run_inside([], SERVING / "build_model.py", "--export_dir", export, "--output_dir", tmp_path / "serving_server")
    assert process.returncode == 0, process.stderr
    server = start(inside, tmp_path, "--rpc_port", 18091, "--http_port", 9879, "--batch_size", 8)
    try:
        write_lines(tmp_path / "data.txt", texts)
        least = sorted(right["known"] for right in expected)[len(expected) // 2]
        words = ["--data_file", tmp_path / "data.txt", "--output_format", "jsonl"]
        answers = [run_inside(inside, SERVING / "http_client.py", "--url", f"http://127.0.0.1:9879{PATH}", *words, "--top_k", 3),
                   run_inside(inside, SERVING / "rpc_client.py", "--url", "127.0.0.1:18091", *words, "--least_known", least)]
        assert [answer.returncode for answer in answers] == [0, 0], answers[0].stderr + answers[1].stderr
        whole, bounded = ([json.loads(line) for line in answer.stdout.split("\n")[:-1]] for answer in answers)
        assert_answers_agree([[(top["label"], top["confidence"]) for top in row["top_k"]] for row in whole], expected)
        assert_known_agrees(bounded, expected, least)
        np.testing.assert_allclose([row["known"] for row in whole], [row["known"] for row in bounded], atol=1e-5)
    finally:
        stop(server, signal.SIGTERM)


def test_a_thousand_texts_in_one_request_agree_with_predict(send, predicted):
    texts, expected = predicted
    nested, rpc, plain = send([by_http(["sentence", "top_k"], [texts, 3]),
                               {"by": "rpc", "key": ["top_k", "sentence"], "value": ["3", json.dumps(texts)]},
                               by_http(["sentence"], [json.dumps(texts)])])
    assert nested["status"] == 200
    for answer in (nested, rpc):
        assert_answers_agree(pairs(answer), expected)
        assert all(len(labels) == 3 for labels in pairs(answer))
    assert_answers_agree(pairs(plain, top_k=False), expected)  # no top_k: lists of the best alone


def test_below_the_threshold_is_undecided(inside, send, predicted):
    texts, expected = predicted[0][:100], predicted[1][:100]
    answers = send([by_http(["sentence", "threshold"], [texts, 0.5]), by_http(["sentence", "threshold"], [texts, "auto"]),
                    {"by": "rpc", "key": ["sentence", "threshold", "top_k"], "value": [json.dumps(texts), "auto", "2"]}])
    for answer, value in zip(answers, (0.5, THRESHOLD, THRESHOLD)):
        assert answer["err_no"] == 0, answer
        for top, right in zip(pairs(answer, top_k=answer is answers[2]), expected):
            label, confidence = top[0]
            assert abs(confidence - value) < 1e-4 or label == (right["label"] if confidence >= value else "undecided")
    [refused] = send([by_http(["sentence", "least_known"], [texts, 0.5])])
    assert refused["err_no"] == 51 and "least_known 0.5: this model does not tell unknown texts" in refused["err_msg"]
    unsure = next(right["text"] for right in expected if right["probability"] < 0.6)
    assert "label: undecided\n" in run_inside(inside, SERVING / "http_client.py", "--threshold", "auto", unsure).stdout


def test_requests_that_are_in_work_at_once_get_their_own_answers(send, predicted):
    """The service joins them to batches."""
    texts, expected = predicted
    requests, wanted = [], []
    for start_at in range(0, 300, 3):
        size, top_k = start_at % 4 + 1, start_at % 3 + 1
        part = texts[start_at:start_at + size]
        wanted.append(expected[start_at:start_at + size])
        value = [json.dumps(part), str(top_k)]
        requests.append({"by": "rpc", "key": ["sentence", "top_k"], "value": value} if start_at % 2 else
                        by_http(["sentence", "top_k"], value))
        if start_at % 5 == 0:
            requests.append(by_http(["sentence"], [[""]]))
            wanted.append(None)
    for answer, right in zip(send(requests), wanted):
        if right is None:
            assert answer["err_msg"] == "sentence[0]: empty or blank, expected a text"
        else:
            assert_answers_agree(pairs(answer), right)


def test_plain_texts_and_lists(send):
    """What is a JSON list is a list of texts, everything else one text."""
    values = [TEXTS[0], [TEXTS[0]], json.dumps([TEXTS[0]]), " " + json.dumps([TEXTS[0]]) + "\n"]
    answers = send([by_http(["sentence"], [value]) for value in values])
    assert all(answer["value"] == answers[0]["value"] for answer in answers) and len(pairs(answers[0], False)) == 1
    odd = ["[PAD]", "[1] 头疼", "['a', 'b']", '"头疼"', "[" * 5000, '{"a": 1}', "__import__('os').system('touch pwned')", "null"]
    for answer, listed in zip(send([{"by": "rpc", "key": ["sentence"], "value": [text]} for text in odd]),
                              send([by_http(["sentence"], [[text]]) for text in odd])):
        assert answer["value"] == listed["value"] and len(pairs(answer, False)) == 1

FORMS = "a text or a list of texts"
BAD = [  # key, value of a request (by HTTP as they are, by gRPC as JSON text), part of the message
    (["sentence"], [[]], "sentence: an empty list, expected at least one text"),
    (["sentence"], [[5]], "sentence[0]: a number, expected a text"),
    (["sentence"], [["a", None]], "sentence[1]: null, expected a text"),
    (["sentence"], [["a", ["b"]]], "sentence[1]: a list, expected a text"),
    (["sentence"], [[{"text": "a"}]], "sentence[0]: an object, expected a text"),
    (["sentence"], [["a", True]], "sentence[1]: true or false, expected a text"),
    (["sentence"], [["a", " \u3000\n"]], "sentence[1]: empty or blank"),
    (["sentence"], [["a\tb", "\x1c"]], "sentence[1]: empty or blank"),
    (["sentence"], [""], "sentence: empty or blank"),
    (["sentence"], [["a\0b"]], "sentence[0]: a NUL character"),
    (["sentence"], [["\ud800"]], "sentence[0]: a lone surrogate"),
    (["sentence"], [["a"] * 1025], "sentence: 1025 texts, expected at most 1024"),
    (["sentence"], [["a", "长" * 20001]], "sentence[1]: 20001 characters, expected at most 20000"),
    (["sentence"], ["长" * 20001], "sentence: 20001 characters, expected at most 20000"),
    (["sentence"], ["[" + "9" * 1000000 + "]"], "sentence[0]: a number, expected a text"),
    ([], [], "key: sentence is missing"),
    (["top_k"], ["1"], "key: sentence is missing"),
    (["sentence", "top_k"], ["a"], "value: 1 values for 2 keys"),
    (["sentence"], ["a", "b"], "value: 2 values for 1 keys"),
    (["sentence", "sentence"], ["a", "b"], "key: sentence is there more than once"),
    (["sentence", "pipeline.profile"], ["a", "1"], 'key: "pipeline.profile" is unknown'),
    (["sentence", "文本" * 50], ["a", "1"], f'key: "{"文本" * 20}..." is unknown'),
    (["sentence", "top_k"], ["a", "0"], 'top_k: "0", expected a whole number, 1 to 11'),
    (["sentence", "top_k"], ["a", "12"], 'top_k: "12", expected a whole number, 1 to 11'),
    (["sentence", "top_k"], ["a", "９"], 'top_k: "９", expected a whole number'),
    (["sentence", "threshold"], ["a", "1.5"], 'threshold: "1.5", expected a number, 0 to 1, or auto'),
    (["sentence", "threshold"], ["a", "nan"], 'threshold: "nan", expected a number, 0 to 1, or auto'),
    (["sentence", "least_known"], ["a", "1.5"], 'least_known: "1.5", expected a number, 0 to 1'),
    (["sentence", "least_known"], ["a", "auto"], 'least_known: "auto", expected a number, 0 to 1'),
    (["sentence", "top_k"], ["a", "__import__('os').system('touch pwned')"], "top_k: \"__import__"),
]
BAD_HTTP = [  # body, status, part of the message
    ("", 400, "request body: not JSON"),
    ("{", 400, "request body: not JSON"),
    ("[" * 100000, 400, "request body: not JSON"),
    ("__import__('os').system('touch pwned')", 400, "request body: not JSON"),
    ('{"key":["sentence"],"value":["\xff\xfe"]}', 400, "request body: invalid UTF-8 at byte 31"),
    ("5", 400, "request body: a number, expected an object"),
    ("{}", 400, "key: missing, expected a list"),
    ('{"key":["sentence"]}', 400, "value: missing, expected a list"),
    ('{"key":"sentence","value":["a"]}', 400, "key: a text, expected a list"),
    ('{"key":["sentence"],"value":"a"}', 400, "value: a text, expected a list"),
    ('{"key":[5],"value":["a"]}', 400, "key[0]: a number, expected a text"),
    ('{"key":["sentence"],"value":[5.5]}', 400, f"value[0]: a number, expected {FORMS}"),
    ('{"key":["sentence"],"value":[5]}', 400, f"value[0]: a number, expected {FORMS}"),
    ('{"key":["sentence"],"value":["a"],"name":"other"}', 400, "name: not of this service, expected seq_cls"),
    ('{"key":["sentence"],"value":["a"],"tensors":0}', 400, "tensors: not accepted"),
    ('{"key":["sentence"],"value":[null]}', 400, f"value[0]: null, expected {FORMS}"),
    ('{"key":["sentence"],"value":[{"a":1}]}', 400, f"value[0]: an object, expected {FORMS}"),
    ('{"key":["sentence"],"value":["\\ud800"]}', 400, "value[0]: a lone surrogate"),
    ('{"key":["\\ud800"],"value":["a"]}', 400, "key[0]: a lone surrogate"),
    ('{"sentence":["a"]}', 400, 'request body: "sentence" is unknown, expected key and value'),
    ('{"\\ud800":["a"]}', 400, 'request body: "?" is unknown'),
    ('{"key":["sentence"],"value":["a"],"logid":"x"}', 400, "logid: expected a whole number"),
    ('{"key":[],"value":[],"tensors":[{"name":"sentence"}]}', 400, "tensors: not accepted"),
]


def test_bad_requests_are_refused_by_name_and_do_no_harm(send, served, predicted):
    texts, expected = predicted
    pickled = "\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(127) + "\n" \
        "cposix\nsystem\n(S'touch pwned'\ntR."  # np.load(allow_pickle=True) would run it
    requests = [by_http(key, value) for key, value, _ in BAD]
    requests += [{"by": "rpc", "key": key, "value": [one if isinstance(one, str) else json.dumps(one) for one in value]}
                 for key, value, _ in BAD]
    requests += [{"by": "http", "body": body} for body, _, _ in BAD_HTTP]
    requests += [{"by": "rpc", "tensors": [["sentence", pickled]]},
                 {"by": "rpc", "key": ["sentence"], "value": ["a"], "tensors": [["x", pickled]]},
                 {"by": "rpc", "raw": "\x0a\x08sentence\x12\x02\xff\xfe"},  # value: not UTF-8
                 {"by": "rpc", "raw": "\x22\x05other"},  # name
                 {"by": "rpc", "key": ["sentence"], "value": ["a" * 9000000]},
                 {"by": "http", "body": "a" * 9000000},
                 {"by": "http", "body": "", "method": "GET"},
                 {"by": "http", "body": "", "method": "PUT"},
                 {"by": "http", "body": "{}", "path": "/other"},
                 {"by": "http", "body": "", "headers": {"Content-Length": "-1"}},
                 {"by": "http", "body": "", "headers": {"Content-Length": "2", "content-length": "0"}},
                 {"by": "http", "body": "", "headers": {"Content-Length": "2", "Transfer-Encoding": "chunked"}}]
    answers = send(requests)
    for answer, (_, _, message) in zip(answers, BAD):
        assert message in answer["err_msg"] and (answer["status"], answer["err_no"]) == (400, 51), answer
    for answer, (_, _, message) in zip(answers[len(BAD):], BAD):
        assert message in answer["err_msg"] and answer["err_no"] == 51, answer
    for answer, (_, status, message) in zip(answers[2 * len(BAD):], BAD_HTTP):
        assert message in answer["err_msg"] and (answer["status"], answer["err_no"]) == (status, 51), answer
    (tensors, both, not_utf8, name, large_rpc, large_http, get, put, other, negative, twice,
     chunked) = answers[2 * len(BAD) + len(BAD_HTTP):]
    for answer in (tensors, both):
        assert (answer["err_no"], answer["err_msg"][:22]) == (51, "tensors: not accepted,")
    assert not_utf8["err_no"] == 51 and "request: damaged, or invalid UTF-8 in key or value" in not_utf8["err_msg"]
    assert (name["err_no"], name["err_msg"]) == (51, "name: not of this service, expected seq_cls")
    assert large_rpc["status"] == "RESOURCE_EXHAUSTED"
    assert large_http["status"] == 413 and large_http["err_msg"] == "request body: 9000000 bytes, expected at most 8388608"
    assert get["status"] == put["status"] == 501 and get["err_msg"] == f"request: not understood, expected POST {PATH}"
    assert other["status"] == 404 and negative["status"] == 411
    assert twice["status"] == chunked["status"] == 400 and twice["err_msg"].startswith("Content-Length: given twice or beside")
    for answer in answers:
        assert not any(word in answer["err_msg"] for word in INTERNALS), answer
        assert len(answer["err_msg"]) < 200 and not answer.get("key")
    assert not (ROOT / "pwned").exists() and not (served / "pwned").exists()  # where sender and server run
    [answer] = send([by_http(["sentence", "top_k"], [texts, 3])])  # and answers right as before
    assert_answers_agree(pairs(answer), expected)


def test_logs_hold_no_texts(send, served):
    secret = "绝密 secret words"
    good, bad = send([by_http(["sentence"], [[secret]]), by_http(["sentence"], [[secret, ""]])])
    assert good["err_no"] == 0 and bad["err_no"] == 51
    logs = [path for path in (served / "log").rglob("*") if path.is_file()] + [served / "output"]
    assert {"pipeline.log", "pipeline.log.wf", "start.log"} <= {path.name for path in logs}
    assert not any("secret" in path.read_text(encoding="utf-8") for path in logs)
    assert {path.name for path in served.iterdir()} == {"config.yml", "log", "output", "serving_server"}


def listening(inside):
    """{port: set of addresses} of the namespace."""
    lines = subprocess.run([*inside, "cat", "/proc/net/tcp", "/proc/net/tcp6"], encoding="utf-8", capture_output=True).stdout
    found = {}
    for address, port in re.findall(r"^ *\d+: (\w+):(\w+) \w+:\w+ 0A ", lines, re.MULTILINE):
        found.setdefault(int(port, 16), set()).add(address)
    return found


def test_only_this_machine_is_listened_to(inside, service):
    found = listening(inside)
    assert set(found) == {18090, 9878}
    assert all(address.endswith("0100007F") for address in found[18090] | found[9878])  # 127.0.0.1, also as an IPv6 address


def readme_commands():
    """The commands of the README that use the running service, in the folder deploy/paddle_serving."""
    text = (SERVING / "README.md").read_text(encoding="utf-8")
    lines = "".join(re.findall(r"^```shell\n(.*?)^```", text, re.DOTALL | re.MULTILINE)).replace("\\\n", " ").split("\n")
    return [line for line in lines if line.startswith(("curl ", "python rpc_client.py", "python http_client.py"))]


@pytest.mark.parametrize("command", readme_commands())
def test_readme_command(inside, service, command):
    if not shutil.which(command.split()[0]) and command.startswith("curl "):
        pytest.skip("the command curl is missing")
    python = f"{shlex.quote(str(server_python('paddle-serving')))} "
    process = subprocess.run([*inside, "sh", "-c", re.sub("^python ", python, command)], cwd=SERVING, encoding="utf-8",
                             capture_output=True, timeout=60)
    assert process.returncode == 0, process.stderr
    assert "label" in process.stdout and any(label in process.stdout for label in LABELS)


@pytest.mark.parametrize("client", ["rpc_client.py", "http_client.py"])
def test_clients_say_what_is_wrong(inside, service, tmp_path, client):
    url = "127.0.0.1:1" if client == "rpc_client.py" else f"http://127.0.0.1:1{PATH}"
    refused = [
        (["头疼", " "], ["text 2: empty or blank"]),
        (["头疼", "--top_k", 12], ['top_k: "12", expected a whole number, 1 to 11']),
        (["--batch_size", 2000, *["a"] * 1025], ["sentence: 1025 texts, expected at most 1024"]),
        (["头疼", "--url", url], [f"{url}: no answer", "refused"]),
        (["头疼", "--data_file", "data.txt"], ["expected either texts or --data_file"]),
        (["--data_file", tmp_path / "none"], ["none: file not found"])]
    lines = [line for line, _ in refused] + [["头疼", "--output_format", "jsonl", "--top_k", 2]]
    *processes, right = run_all(server_python("paddle-serving"), SERVING / client, *lines, inside=inside)
    for process, (_, parts) in zip(processes, refused):
        assert_user_error(process, *parts)
    row = json.loads(right.stdout)
    assert row["text"] == "头疼" and row["label"] == row["top_k"][0]["label"] and len(row["top_k"]) == 2, right.stderr


def test_the_gateway_bounds_connections_time_and_bodies(monkeypatch):
    """Slow, silent and large ones, each against its own limit; the gateway itself, with an answer that is known."""
    monkeypatch.setattr(http_gateway, "BODY_SECONDS", 0.3)
    limits = request_check.Limits(2, 10, max_bytes=100, max_connections=4, labels=["a"] * 11, threshold="none",
                                  tells_unknown=False)
    gateway = http_gateway.start_gateway(("127.0.0.1", 0), PATH, lambda *request: (200, {"err_no": 0}), limits, 1)
    start, body = f"POST {PATH} HTTP/1.1\r\n", '{"key": ["sentence"], "value": ["a"]}'
    good = f"{start}Content-Length: {len(body)}\r\n\r\n{body}".encode()

    def connect():
        return contextlib.closing(socket.create_connection(gateway.server_address, timeout=20))

    with connect() as lasting:
        for head, more, status, message in [
                ("Content-Length: 50", b"", 408, "not there within 0.3 seconds, expected 50 bytes"),
                ("Content-Length: 1000000000000", b" " * 10**6, 413, "1000000000000 bytes, expected at most 100"),
                ("Transfer-Encoding: chunked", b"", 411, "expected the bytes of the request body")]:
            with connect() as connection:
                connection.sendall(f"{start}{head}\r\n\r\n".encode())
                answer = connection.recv(10000).decode()
                assert answer.startswith(f"HTTP/1.1 {status} ") and message in answer
                connection.sendall(more)  # no reset, with which the answer could be lost
        while gateway.connections > 1:
            time.sleep(0.01)
        with contextlib.ExitStack() as silent:
            for _ in range(3):
                silent.enter_context(connect())
            with connect() as connection:
                connection.sendall(good)
                answer = connection.recv(10000)
                assert answer.startswith(b"HTTP/1.1 503 ") and b'"err_no": 53, "err_msg": "too many connections' in answer
            lasting.sendall(good)
            assert lasting.recv(10000).startswith(b"HTTP/1.1 200 ")
            for _ in range(http_gateway.MOST_REFUSING):
                last = silent.enter_context(connect())
            last = silent.enter_context(connect())
            assert last.recv(100) == b"" and gateway.connections == 4 + http_gateway.MOST_REFUSING
    gateway.drain(1)


def test_host_ports_and_limits_can_be_chosen_and_ctrl_c_ends_it(inside, served, tmp_path):
    for name in ("config.yml", "serving_server"):
        os.symlink(served / name, tmp_path / name)
    process = start(inside, tmp_path, "--host", "0.0.0.0", "--rpc_port", 18190, "--http_port", 9978, "--max_texts", 2)
    try:
        found = listening(inside)
        assert all(set(address) == {"0"} for address in found[18190] | found[9978])
        url = ["--url", f"http://127.0.0.1:9978{PATH}"]
        assert run_inside(inside, SERVING / "http_client.py", *url, *TEXTS).stdout.count("label: ") == 2
        assert_user_error(run_inside(inside, SERVING / "http_client.py", *url, "a", "b", "c"), "3 texts, expected at most 2")
        taken = run_inside(inside, SERVING / "service.py", "--config", served / "config.yml", "--log_dir", tmp_path / "log",
                           "--http_port", 9978, "--rpc_port", 18191)
        assert_user_error(taken, "http_port 9978: cannot listen on 127.0.0.1 (Address already in use)")
    finally:
        code = stop(process, signal.SIGINT)
    assert code == 130 and not {18190, 9978} & set(listening(inside))


def serve_wrongly(inside, folder):
    """Start service.py on a folder that it refuses."""
    return run_inside(inside, SERVING / "service.py", "--config", folder / "config.yml", "--log_dir", folder / "log")


def serve_here(folder):
    """The same in this process, for what is refused before Paddle Serving is imported."""
    return run_here(script.main, "--config", folder / "config.yml", "--log_dir", folder / "log")


@pytest.mark.parametrize("old, new, message", [
    ("rpc_port: 18090", "rpc_port: -1", "rpc_port is -1, expected 1 or more"),
    ("rpc_port: 18090", "rpc_port: 70000", "rpc_port 70000: cannot listen on 127.0.0.1"),
    ("rpc_port: 18090", "rpc_port: 9878", "rpc_port and http_port are both 9878"),
    ("worker_num: 16", "worker_num: many", "worker_num is 'many', expected a whole number"),
    ("worker_num: 16", "worker_num: 0", "worker_num is 0, expected 1 or more"),
    ("batch_size: 16", "is_thread_op: False", "op: seq_cls: is_thread_op is unknown here"),
    ("model_config: serving_server", "model_config: none", "none: serving_server_conf.prototxt is missing"),
    ("op:", "op", "not YAML"),
    ('host: "127.0.0.1"', 'host: "192.0.2.1"', "cannot listen on 192.0.2.1"),
    ("seq_cls:", "other:", "op: other is unknown here, expected seq_cls")])
def test_wrong_settings_are_refused(served, tmp_path, old, new, message):
    text = (served / "config.yml").read_text(encoding="utf-8")
    assert old in text
    (tmp_path / "config.yml").write_text(text.replace(old, new), encoding="utf-8")
    os.symlink(served / "serving_server", tmp_path / "serving_server")
    assert_user_error(serve_here(tmp_path), message)


@pytest.mark.parametrize("device_type, devices, message", [
    (1, "0", "device_type is 1, and this Paddle is a CPU build"), (0, "0", "devices is '0' with device_type 0")])
def test_wrong_devices_are_refused(device_type, devices, message):
    local = {"device_type": device_type, "devices": devices}
    with pytest.raises(UserError, match=message):
        settings.check_device({"op": {settings.NAME: {"local_service_conf": local}}})


@pytest.fixture
def copy(served, tmp_path):
    """A copy of the folder of `served`, for other ports."""
    folder = shutil.copytree(served, tmp_path / "copy", ignore=shutil.ignore_patterns("log", "output"))
    text = (folder / "config.yml").read_text(encoding="utf-8")
    (folder / "config.yml").write_text(text.replace(" 18090", " 18091").replace(" 9878", " 9879"), encoding="utf-8")
    return folder


def change_deploy(folder, **changes):
    path = folder / "serving_server/deploy.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("name, content, message", [
    ("model.pdmodel", b"damaged", "model.pdmodel: damaged or of another model"),
    ("model.pdiparams", None, "model.pdiparams: file not found"),
    ("label.txt", b"a\nb\n", "label.txt: 2 labels, expected the 11"),
    ("tokenizer.json", b"{", "tokenizer.json: cannot be read"),
    ("deploy.json", None, "deploy.json is missing")])
def test_damaged_models_are_refused(copy, name, content, message):
    os.remove(copy / "serving_server" / name)
    if content is not None:
        (copy / "serving_server" / name).write_bytes(content)
    assert_user_error(serve_here(copy), message)


def test_settings_that_paddle_serving_refuses(inside, copy):
    (copy / "serving_server/serving_server_conf.prototxt").write_bytes(b"feed_var {")
    assert_user_error(serve_wrongly(inside, copy), "Paddle Serving cannot start")


def test_a_model_that_paddle_refuses_kills_nothing_else(inside, copy):
    """Paddle Serving itself would kill the process group here, and with it these tests."""
    params = (copy / "serving_server/model.pdiparams").read_bytes()[:5000]
    (copy / "serving_server/model.pdiparams").write_bytes(params)
    hashes = json.loads((copy / "serving_server/deploy.json").read_text())["sha256"]
    change_deploy(copy, sha256={**hashes, "model.pdiparams": hashlib.sha256(params).hexdigest()})
    assert_user_error(serve_wrongly(inside, copy), "Paddle Serving cannot start", "start.log")


def test_a_model_of_other_labels_is_refused(inside, copy):
    change_deploy(copy, num_labels=10)
    write_lines(copy / "serving_server/label.txt", LABELS[:10])
    assert_user_error(serve_wrongly(inside, copy), "serving_server: the model cannot label a text")


def test_build_model(exported, telling, served, tmp_path):
    settings = (served / "serving_server/serving_server_conf.prototxt").read_text()
    assert re.findall(r'(\w+)_var {\n  name: "(\w+)"', settings) == [("feed", "input_ids"), ("feed", "token_type_ids"),
                                                                     ("fetch", "logits")]
    assert re.findall(r"shape: (.*)", settings) == ["-1", "-1", "-1", "-1", "-1", "11"]
    assert {path.name for path in (served / "serving_server").iterdir()} == {
        "model.pdmodel", "model.pdiparams", "serving_server_conf.prototxt", "tokenizer.json", "label.txt", "deploy.json"}

    def build(source, output):
        return run_here(build_model.main, "--export_dir", source, "--output_dir", output)

    older = shutil.copytree(telling / "export", tmp_path / "older")  # its graph gives no features
    deploy = json.loads((older / "deploy.json").read_text())
    (older / "deploy.json").write_text(json.dumps({name: value for name, value in deploy.items() if name != "output_names"}))
    for source, name, outputs in ((telling / "export", "new", ["logits", "features"]), (older, "old", ["logits"])):
        assert build(source, tmp_path / name).returncode == 0
        settings = (tmp_path / name / "serving_server_conf.prototxt").read_text()
        assert re.findall(r'fetch_var {\n  name: "(\w+)"', settings) == outputs
        tells = len(outputs) > 1
        assert (tmp_path / name / "known.npz").exists() == tells == ("known" in json.loads(
            (tmp_path / name / "deploy.json").read_text()))
    assert_user_error(build(tmp_path, tmp_path / "out"), "deploy.json is missing")
    assert_user_error(build(exported, exported), "is the exported folder, expected another one")
    assert_user_error(build(exported, served / "config.yml"), "config.yml: is no folder")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/label.txt").write_text("mine")
    assert_user_error(build(exported, tmp_path / "mine"), "mine: holds files and no serving_server_conf.prototxt")
    assert (tmp_path / "mine/label.txt").read_text() == "mine" and len(os.listdir(tmp_path / "mine")) == 1
    copy = shutil.copytree(exported, tmp_path / "copy")
    os.remove(copy / "float32.pdiparams")
    assert_user_error(build(copy, tmp_path / "out"), "float32.pdiparams: file not found")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name, message", [("service.py", "expected an environment of its own (README.md, section 1)"),
                                           ("rpc_client.py", "paddle_serving_server is missing, expected the environment of")])
def test_missing_packages_are_named(served, tmp_path, name, message):
    """In this environment, which has no Paddle Serving."""
    code = "import runpy, sys; sys.modules['paddle'] = None; sys.argv.pop(0); runpy.run_path(sys.argv[0], {}, '__main__')"
    options = ["--config", served / "config.yml", "--log_dir", tmp_path] if name == "service.py" else ["头疼"]
    process = subprocess.run([sys.executable, "-c", code, name, *options], cwd=SERVING, capture_output=True, encoding="utf-8")
    assert_user_error(process, message)


def test_sigterm_answers_what_is_in_work(inside, service):
    """The end of the service of the tests before."""
    sender = subprocess.Popen([*inside, server_python("paddle-serving"), "-c", HURRIED], cwd=SERVING, stdout=subprocess.PIPE,
                              encoding="utf-8")
    assert sender.stdout.readline() == "all sent\n"
    assert stop(service, signal.SIGTERM) == 143
    assert json.loads(sender.communicate(timeout=60)[0]) == [["200", 400]] * 4 + [["OK", 400]] * 4

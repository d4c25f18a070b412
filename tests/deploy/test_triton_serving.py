"""deploy/triton_serving: the real server and its clients: agreement with predict.py, bad requests, batching, INT8, fp16."""

import contextlib
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
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from helpers import (
    ROOT,
    THRESHOLD,
    assert_answers_agree,
    assert_known_agrees,
    assert_user_error,
    load_script,
    read_lines,
    run_all,
    run_here,
    server_python,
    set_long_text,
    write_lines,
)
from textcls.common.known import add_nearness, split_known
from textcls.data.tokens import model_inputs
from textcls.retrieval.encoder import open_encoder
from textcls.runtime.exported import read_export
from textcls.runtime.predictor import Predictor
from textcls.runtime.quantize import SCHEMES

build_repository = load_script("deploy/triton_serving", "build_repository")
PYTHON = server_python("triton")
TRITON = ROOT / "deploy/triton_serving"
LABELS = read_lines(ROOT / "data/label.txt")
CODE = "__import__('os').system('touch pwned')"
INFER = "/v2/models/seqcls/infer"
INTERNALS = ("Traceback", ".py", "numpy", "site-packages", "pb_utils")

# Sends by gRPC what the client would not send. In: a list of [datatype, shape, texts in latin-1, parameters, name of the input].
SENDER = """
import json, sys
from tritonclient.grpc import InferenceServerClient, InferInput, service_pb2
from tritonclient.utils import InferenceServerException, serialize_byte_tensor
import numpy as np
server, answers = InferenceServerClient(sys.argv[1]), []
for datatype, shape, texts, parameters, name in json.load(sys.stdin):
    tensor = InferInput(name, shape, datatype)
    raw = serialize_byte_tensor(np.array([text.encode("latin-1") for text in texts], dtype=np.object_))
    tensor._raw_content = raw.item() if raw.size else b""
    try:
        answer = server.infer("seqcls", [tensor], parameters=parameters, client_timeout=60)
        answers.append(["OK", [[label.decode() for label in row] for row in answer.as_numpy("label")]])
    except InferenceServerException as error:
        answers.append([error.status(), error.message()])
json.dump(answers, sys.stdout)
"""


def script(name, *words, stdin=None, cwd=ROOT):
    """Run a script of deploy/triton_serving in its own environment."""
    command = [PYTHON, TRITON / name, *words]
    return subprocess.run(list(map(str, command)), capture_output=True, encoding="utf-8", input=stdin, cwd=cwd, timeout=300)


def build(export, repository, *more):
    """Run build_repository.py in this process."""
    process = run_here(build_repository.main, "--export_dir", export, "--model_repository", repository, *more)
    assert process.returncode == 0, process.stderr
    return repository


def free_ports():
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        return [listening.getsockname()[1] for listening in sockets]


class Server:
    """A running start_server.py and its three ports."""

    def __init__(self, repository, folder, *more):
        self.folder, self.log = folder, folder / "log"
        self.http, self.grpc, self.metrics = free_ports()
        command = [PYTHON, TRITON / "start_server.py", "--model_repository", repository, "--http_port", self.http,
                   "--grpc_port", self.grpc, "--metrics_port", self.metrics, *more]
        self.process = subprocess.Popen(list(map(str, command)), cwd=folder, stderr=open(self.log, "w"),
                                        env={**os.environ, "TMPDIR": str(folder)},
                                        # a test run in the background may have it ignored
                                        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

    def request(self, path, body=None, headers=(), port=None):
        """(status, body as str) of one HTTP request. body: bytes, or something to be sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", port or self.http, timeout=60)
        body = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request("GET" if body is None else "POST", path, body, dict(headers))
        answer = connection.getresponse()
        content = answer.read().decode()
        connection.close()
        return answer.status, content

    def is_ready(self):
        with contextlib.suppress(ConnectionError):
            return self.request("/v2/health/ready")[0] == 200
        return False

    def client(self, kind, *words, stdin=None):
        url = f"127.0.0.1:{self.grpc}" if kind == "grpc" else f"http://127.0.0.1:{self.http}"
        return script(f"seqcls_{kind}_client.py", "--url", url, *words, stdin=stdin)

    def infer(self, texts, **parameters):
        """Lists of (label, confidence) of a request that must succeed, one list per text."""
        status, answer = self.request(INFER, body(texts, **parameters))
        assert status == 200, answer
        data, width = {item["name"]: item["data"] for item in json.loads(answer)["outputs"]}, parameters.get("top_k", 1)
        pairs = list(zip(data["label"], data["confidence"]))
        return [pairs[start:start + width] for start in range(0, len(pairs), width)]

    def counts(self):
        """Model name -> (requests, executions) since the start."""
        found = json.loads(self.request("/v2/models/stats")[1])["model_stats"]
        return {model["name"]: (model["inference_count"], model["execution_count"]) for model in found}


def stop(process):
    """End a start_server.py by SIGTERM and return its exit code; should that not help, kill it and the server's group."""
    process.terminate()
    try:
        return process.wait(60)
    finally:
        if process.poll() is None:
            for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                os.killpg(int(child), signal.SIGKILL)
            process.kill()


def shared_memory(names):
    """The shared memory that is there of the servers whose folders of backends have these names."""
    return [path for name in names for path in Path("/dev/shm").glob(f"{name}*")]


def backends(folder):
    """Names of the folders of backends that a server has made."""
    return [path.name for path in folder.glob("triton-backends-*")]


@contextlib.contextmanager
def serving(repository, folder, *more, end=signal.SIGTERM):
    """A Server that answers; in the end it is stopped by a signal and must leave nothing behind."""
    folder.mkdir(exist_ok=True)
    server = Server(repository, folder, *more)
    try:
        while not server.is_ready():
            assert server.process.poll() is None, server.log.read_text(errors="replace")
            time.sleep(0.1)
        made = backends(folder)
        assert len(made) == 1 and shared_memory(made)
        yield server
        server.process.send_signal(end)
        assert server.process.wait(60) == 0
    finally:
        if server.process.poll() is None:
            stop(server.process)
    assert os.listdir(folder) == ["log"]  # no backends, no file that a request has made
    assert not shared_memory(made) and not server.is_ready()


@pytest.fixture(scope="module")
def repository(exported, tmp_path_factory):
    folder = tmp_path_factory.mktemp("triton") / "models"
    process = script("build_repository.py", "--export_dir", exported, "--model_repository", folder, "--instance_count", 2)
    assert process.returncode == 0 and "Model repository saved in" in process.stderr, process.stderr
    return folder


@pytest.fixture(scope="module")
def server(repository, encoder_export, tmp_path_factory):
    """A classifier, and beside it a sentence encoder."""
    encoder = build(encoder_export, tmp_path_factory.mktemp("encoder") / "models", "--instance_count", 1)
    with serving(repository, tmp_path_factory.mktemp("server"), "--", f"--model-repository={encoder}") as server:
        yield server
    assert "Traceback" not in server.log.read_text(errors="replace")


def body(texts, datatype="BYTES", shape=None, name="INPUT", **parameters):
    tensor = {"name": name, "datatype": datatype, "shape": shape or [len(texts), 1], "data": texts}
    return {"inputs": [tensor], "parameters": parameters}


@pytest.mark.parametrize("kind", ["grpc", "http"])
def test_clients_agree_with_predict(server, predicted, kind, tmp_path):
    texts, expected = predicted
    write_lines(tmp_path / "texts", texts)
    process = server.client(kind, "--data_file", tmp_path / "texts", "--top_k", 3, "--output_format", "jsonl")
    assert process.returncode == 0, process.stderr
    rows = [json.loads(line) for line in process.stdout.split("\n")[:-1]]
    assert [row["text"] for row in rows] == texts
    assert_answers_agree([[(top["label"], top["confidence"]) for top in row["top_k"]] for row in rows], expected)
    assert all((row["label"], row["confidence"]) == tuple(row["top_k"][0].values()) for row in rows)


@pytest.mark.parametrize("kind", ["grpc", "http"])
def test_blocks_of_the_clients(server, kind):
    [[(label, confidence)], [(other, _)]] = server.infer(["头疼怎么办", CODE])
    blocks = server.client(kind, "头疼怎么办", CODE).stdout.split("-" * 29 + "\n")
    assert blocks[0] == f"text: 头疼怎么办\nlabel: {label}\nconfidence: {confidence:.6f}\n"
    assert blocks[1].startswith(f"text: {CODE}\nlabel: {other}\n") and blocks[2:] == [""]
    best = server.infer(["头疼怎么办"], top_k=2)[0]
    process = server.client(kind, "--data_file", "-", "--top_k", 2, stdin="头疼怎么办\n")
    assert process.stdout.split("\n")[1:3] == [f"label: {best[0][0]}, {best[1][0]}",
                                               f"confidence: {best[0][1]:.6f}, {best[1][1]:.6f}"]


@pytest.mark.parametrize("kind", ["grpc", "http"])
def test_clients_report_refusals(server, kind, tmp_path):
    write_lines(tmp_path / "texts", [f"第{number}条" for number in range(70)])
    scheme = "http://" if kind == "grpc" else ""  # the wrong way round, which the clients put right
    url = ["--url", f"{scheme}127.0.0.1:{server.grpc if kind == 'grpc' else server.http}"]
    foreign = f"{scheme}127.0.0.1:{server.http if kind == 'grpc' else server.grpc}"  # something else listens there
    refused = [
        ([*url, "--top_k", 12, "头疼"], ["parameter top_k: is 12, expected a whole number, 1 to 11"]),
        ([*url, " "], ["text 1: empty or blank, expected a text"]),
        ([*url, "--data_file", tmp_path / "texts", "--batch_size", 65], ["texts 1 to 65: ", "<= 64"]),
        ([*url, "--data_file", tmp_path / "none"], ["none: file not found"]),
        (([*url, "--data_file", "-"], "好\n\n"), ["standard input:2: empty line"]),
        ([*url, os.fsdecode(b"\xff")], ["text 1: a lone surrogate (invalid UTF-8)"]),
        (url, ["expected either texts or --data_file"]),
        (["--url", f"{scheme}127.0.0.1:{free_ports()[0]}", "头疼"], ["no answer", "refused", "the address of a running server"]),
        (["--url", foreign, "头疼"], ["no answer" if kind == "grpc" else "what answers there is no HTTP"])]
    processes = run_all(PYTHON, TRITON / f"seqcls_{kind}_client.py", *(line for line, _ in refused))
    for process, (_, parts) in zip(processes, refused):
        assert_user_error(process, *parts)

BAD_JSON = [  # (request, status, part of the message)
    (body([1], "INT64"), 400, "'INPUT' data-type is 'INT64', but model 'seqcls' expects 'BYTES'"),
    (body([1.5], "FP32"), 400, "'INPUT' data-type is 'FP32'"),
    (body([1]), 500, "JSON non-string"),
    (body([["好"]], shape=[1]), 400, "unexpected shape for input 'INPUT'"),
    (body(["好", "好"], shape=[1, 2]), 400, "unexpected shape for input 'INPUT'"),
    (body(["好", "好"], shape=[3, 1]), 400, "'INPUT'"),
    (body([], shape=[0, 1]), 400, "'INPUT'"),
    (body(["好"], name="TEXT"), 400, "unexpected inference input 'TEXT'"),
    ({"inputs": []}, 400, "missing required input(s) ['INPUT']"),
    ({}, 500, "inputs"),
    (b"{", 500, "failed to parse the request JSON"),
    (b"\xff" * 100, 500, "failed to parse the request JSON"),
    (body(["好"] * 65), 400, "batch-size must be <= 64 for 'seqcls'"),
    (body(["好", "\u3000 \t"]), 400, "INPUT row 1: empty or blank, expected a text"),
    (body(["好", ""]), 400, "INPUT row 1: empty or blank"),
    (body(["a\tb", "\x1c"]), 400, "INPUT row 1: empty or blank"),
    (body(["好", "a\0b"]), 400, "INPUT row 1: a NUL character, expected a text"),
    (body(["好", "长" * 10001]), 400, "INPUT row 1: 10001 characters, expected at most 10000"),
    (json.dumps(body(["好", "@"])).encode().replace(b"@", b"\xe5\xa5"), 400, "INPUT row 1: invalid UTF-8 at byte 1"),
    (json.dumps(body(["@"])).encode().replace(b"@", b"\\ud800"), 500, "surrogate pair"),
    *((body(["好"], top_k=wrong), 400, f"parameter top_k: is {json.dumps(wrong)}, expected a whole number, 1 to 11")
      for wrong in (0, 12, -1, 2.5, True, "3", CODE)),
    (body(["好"], top_k=[3]), 400, "top_k"),
    (body(["好"], top_k=None), 400, "top_k")]


def test_below_the_threshold_is_undecided(server, predicted):
    texts, expected = predicted[0][:64], predicted[1][:64]
    for threshold, value in ((0.5, 0.5), ("0.5", 0.5), ("auto", THRESHOLD)):
        for [(label, confidence)], right in zip(server.infer(texts, threshold=threshold), expected):
            assert abs(confidence - value) < 1e-4 or label == (right["label"] if confidence >= value else "undecided")
    unsure = next(right["text"] for right in expected if right["probability"] < 0.6)
    for kind in ("http", "grpc"):
        assert "label: undecided\n" in server.client(kind, "--threshold", "auto", unsure).stdout
    for wrong in ("nan", 2, -0.5, True, "x"):
        for name, end in (("threshold", ', or "auto"'), ("least_known", "")):
            status, answer = server.request(INFER, body(["好"], **{name: wrong}))
            message = f"parameter {name}: is {json.dumps(wrong)}, expected a number, 0 to 1{end}"
            assert status == 400 and json.loads(answer)["error"].endswith(message), answer
    status, answer = server.request(INFER, body(["好"], least_known="0.5"))
    assert status == 400 and "parameter least_known: this model does not tell unknown texts, expected 0" in answer


def assert_answers_right(server, predicted):
    texts, expected = predicted
    assert_answers_agree(server.infer(texts[:40], top_k=3), expected[:40])


def test_bad_requests_by_http(server, predicted):
    for request, status, part in BAD_JSON:
        answer = server.request(INFER, request)
        assert answer[0] == status and part in json.loads(answer[1])["error"], (request, answer)
        assert not [word for word in INTERNALS if word in answer[1]], answer
    # tensors after the JSON, as tritonclient sends them: sizes that are not those of the bytes
    raw = json.dumps({"inputs": [{"name": "INPUT", "datatype": "BYTES", "shape": [1, 1], "parameters": {"binary_data_size": 7}}]})
    for content in (b"\xff\xff\xff\x7f\xe5\xa5\xbd", b"\x00\x00\x00\x00\xe5\xa5\xbd", b"\x03\x00\x00\x00\xe5\xa5"):
        status, answer = server.request(INFER, raw.encode() + content, {"Inference-Header-Content-Length": str(len(raw))})
        assert status == 400 and "error" in json.loads(answer), answer
    assert server.request("/v2/models/none/infer", body(["好"]))[0] == 404
    assert_answers_right(server, predicted)
    assert server.process.poll() is None


def test_bodies_that_need_a_large_stack_do_not_end_the_server(server, predicted):
    assert server.request(INFER, body(["长" * 4000000]))[0] == 400
    assert server.request(INFER, b"[" * 300000)[0] == 500
    [[(label, _)]] = server.infer(predicted[0][:1])
    assert label == predicted[1][0]["label"]


def test_bad_requests_in_a_batch_harm_neither_the_server_nor_the_others(server, predicted):
    texts, expected = predicted
    ids = {"name": "input_ids", "datatype": "INT64", "shape": [1, 8], "data": [1, 99999999, 2, 0, 0, 0, 0, 0]}
    outside = json.dumps({"inputs": [ids, {**ids, "name": "token_type_ids", "data": [0] * 8}]}).encode()
    not_utf8 = json.dumps({**body(["好"]), "parameters": {"x": "?"}}).encode().replace(b"?", b"\xff")

    def work(number):
        if number % 4 == 0:
            return server.request("/v2/models/seqcls_model/infer", outside)
        if number % 4 == 1:
            return server.request(INFER, not_utf8)
        assert_answers_agree(server.infer(texts[number:number + 1], top_k=3), expected[number:number + 1])

    with ThreadPoolExecutor(16) as pool:
        refusals = set(filter(None, pool.map(work, range(400))))
    assert {(status, json.loads(answer)["error"]) for status, answer in refusals} == {
        (500, "the model could not be run, see the server's log"),
        (400, "in ensemble 'seqcls', parameters: not UTF-8 or not JSON, expected top_k, threshold and least_known at most")}
    assert server.process.poll() is None


def test_bad_requests_by_grpc(server, predicted):
    requests = [
        (("INT64", [1, 1], ["abcd"], {}, "INPUT"), "INVALID_ARGUMENT", "expects 'BYTES'"),
        (("BYTES", [1, 1], ["\xff\xfe"], {}, "INPUT"), "INVALID_ARGUMENT", "INPUT row 0: invalid UTF-8 at byte 1"),
        (("BYTES", [2, 1], ["a", "\xe5\xa5"], {}, "INPUT"), "INVALID_ARGUMENT", "INPUT row 1: invalid UTF-8 at byte 1"),
        (("BYTES", [0, 1], [], {}, "INPUT"), "INVALID_ARGUMENT", "'INPUT'"),
        (("BYTES", [65, 1], ["a"] * 65, {}, "INPUT"), "INVALID_ARGUMENT", "batch-size must be <= 64"),
        (("BYTES", [2, 1], ["a"], {}, "INPUT"), "INVALID_ARGUMENT", "'INPUT'"),
        (("BYTES", [1, 1], ["a" * 10001], {}, "INPUT"), "INVALID_ARGUMENT", "INPUT row 0: 10001 characters"),
        (("BYTES", [1, 1], ["a"], {}, "TEXT"), "INVALID_ARGUMENT", "TEXT"),
        (("BYTES", [1, 1], ["a"], {"top_k": 99}, "INPUT"), "INVALID_ARGUMENT", "parameter top_k: is 99"),
        (("BYTES", [1, 1], ["a"], {"top_k": "3"}, "INPUT"), "INVALID_ARGUMENT", 'parameter top_k: is "3"')]
    right = ("BYTES", [2, 1], ["a", CODE], {"top_k": 2}, "INPUT")
    sent = [request for item, *_ in requests for request in (item, right)]
    process = subprocess.run([PYTHON, "-c", SENDER, f"127.0.0.1:{server.grpc}"], input=json.dumps(sent), capture_output=True,
                             encoding="utf-8", timeout=120)
    assert process.returncode == 0, process.stderr
    answers = json.loads(process.stdout)
    for (request, status, part), (found, message) in zip(requests, answers[::2]):
        assert found == f"StatusCode.{status}" and part in message, (request, found, message)
        assert not [word for word in INTERNALS if word in message], message
    labels = [[label for label, _ in top] for top in server.infer(["a", CODE], top_k=2)]
    assert answers[1::2] == [["OK", labels]] * len(requests)
    assert_answers_right(server, predicted)


def test_16_clients_at_once_share_batches(server, predicted):
    """Requests of several sizes and top_k, every tenth a bad one: all get their own answers, and the model runs them together."""
    texts, expected = predicted
    before = server.counts()

    def work(number):
        start, top_k = number * 2 % 998, number % 3 + 1
        if number % 10 == 0:
            return server.request(INFER, body([texts[start], ""]))
        size = number % 2 + 1
        assert_answers_agree(server.infer(texts[start:start + size], top_k=top_k), expected[start:start + size])

    with ThreadPoolExecutor(16) as pool:
        refusals = list(filter(None, pool.map(work, range(800))))
    assert len(refusals) == 80
    assert all(status == 400 and "INPUT row 1: empty or blank" in answer for status, answer in refusals)
    after = server.counts()
    texts_run, executions = (after["seqcls_model"][index] - before["seqcls_model"][index] for index in (0, 1))
    assert texts_run == sum(number % 2 + 1 for number in range(800) if number % 10)
    assert executions < 720  # fewer than the requests that reach the model


def test_windows_of_long_texts_and_how_known_they_are(telling_windows, encoder_export, tmp_path):
    """A classifier and, beside it, an encoder that read long texts in windows: the tokenizer asks the model."""
    export, texts, expected = telling_windows
    repository = build(export, tmp_path / "models", "--instance_count", 1, "--max_batch_size", 16)
    copy = shutil.copytree(encoder_export, tmp_path / "copy")
    set_long_text(copy / "deploy.json", mode="window", window_vote="unit_mean", window_stride=10)
    encoders = build(copy, tmp_path / "encoders", "--instance_count", 1, "--max_batch_size", 16)
    with serving(repository, tmp_path / "server", "--", f"--model-repository={encoders}") as server:
        write_lines(tmp_path / "texts", texts)
        words = ["--data_file", tmp_path / "texts", "--batch_size", 16]
        least = sorted(right["known"] for right in expected)[len(expected) // 2]
        whole = server.client("http", *words, "--top_k", 3)
        bounded = server.client("grpc", *words, "--least_known", least, "--output_format", "jsonl")
        assert (whole.returncode, bounded.returncode) == (0, 0), whole.stderr + bounded.stderr
        found = re.findall("^label: (.*)\nconfidence: (.*)\nknown: (.*)\n", whole.stdout, re.MULTILINE)
        assert_answers_agree([list(zip(labels.split(", "), map(float, confidences.split(", "))))
                              for labels, confidences, _ in found], expected)
        rows = [json.loads(line) for line in bounded.stdout.split("\n")[:-1]]
        assert_known_agrees(rows, expected, least)
        np.testing.assert_allclose([float(known) for *_, known in found], [row["known"] for row in rows], atol=1e-5)
        status, answer = server.request("/v2/models/encoder/infer", body(texts[:4]))
        [embedding] = json.loads(answer)["outputs"]
        vectors = open_encoder(copy).encode(texts[:4])
        np.testing.assert_allclose(np.reshape(embedding["data"], vectors.shape), vectors, atol=1e-4)
        assert server.request(INFER, body(["好", " "]))[0] == 400


def test_the_encoder_gives_the_vectors_of_its_export(server, encoder_export, predicted):
    texts = predicted[0][:64]
    status, answer = server.request("/v2/models/encoder/infer", body(texts))
    [embedding] = json.loads(answer)["outputs"]
    expected = open_encoder(encoder_export).encode(texts)
    assert (status, embedding["name"], embedding["shape"]) == (200, "embedding", list(expected.shape))
    np.testing.assert_allclose(np.reshape(embedding["data"], expected.shape), expected, atol=1e-4)
    status, answer = server.request("/v2/models/encoder/infer", body(["好", " "]))
    assert status == 400 and "INPUT row 1: empty or blank, expected a text" in answer


def test_health_metadata_and_metrics(server):
    assert server.request("/v2/health/live")[0] == server.request("/v2/models/seqcls/ready")[0] == 200
    metadata = json.loads(server.request("/v2/models/seqcls")[1])
    assert [(item["name"], item["datatype"], item["shape"]) for item in metadata["inputs"]] == [("INPUT", "BYTES", [-1, 1])]
    assert {item["name"]: item["datatype"] for item in metadata["outputs"]} == {"label": "BYTES", "confidence": "FP32"}
    status, metrics = server.request("/metrics", port=server.metrics)
    assert status == 200 and 'nv_inference_request_success{model="seqcls",version="1"}' in metrics


def test_configs_come_from_the_export(repository):
    configs = {path.parent.name: path.read_text(encoding="utf-8") for path in repository.glob("*/config.pbtxt")}
    assert sorted(configs) == ["seqcls", "seqcls_model", "seqcls_postprocess", "tokenizer"]
    for name in ("tokenizer", "seqcls_model", "seqcls_postprocess"):
        assert "dynamic_batching {" in configs[name] and "model_warmup {" in configs[name]
    assert '{ name: "logits", data_type: TYPE_FP32, dims: [ 11 ] }' in configs["seqcls_model"]
    assert '{ name: "token_type_ids", data_type: TYPE_INT64, dims: [ -1 ] }' in configs["seqcls_model"]
    assert "instance_group [ { count: 2, kind: KIND_CPU } ]" in configs["seqcls_model"]
    assert 'key: "max_seq_length", value: { string_value: "64" }' in configs["tokenizer"]
    assert (repository / "seqcls/1").is_dir()
    assert read_lines(repository / "seqcls_postprocess/1/label.txt") == LABELS


@pytest.mark.parametrize("dtype, words", [("fp32", []), ("fp16", ["--device", "gpu", "--use_fp16"])])
def test_the_nearness_is_appended_to_the_model_in_32_bit_floats(telling, tmp_path, dtype, words):
    export = read_export(telling / "export")
    models, convert = build(telling / "export", tmp_path / "models", *words), SCHEMES[dtype].convert
    own, before = (onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]) for model in (
        (models / "seqcls_model/1/model.onnx").read_bytes(), convert(export.onnx_path) if convert else export.onnx_path))
    inputs = model_inputs(np.random.default_rng(0).integers(5, 200, (7, 12)), ["input_ids", "token_type_ids"])
    [answers], (logits, features) = own.run(None, inputs), before.run(None, inputs)
    expected = add_nearness(logits, features, export.centres)
    np.testing.assert_allclose(answers, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(*(split_known(both, export.centres)[1] for both in (answers, expected)), atol=1e-5)
    assert own.get_outputs()[0].name == "answers" and answers.shape == (7, 12)
    assert '{ name: "answers", data_type: TYPE_FP32, dims: [ 12 ] }' in (models / "seqcls_model/config.pbtxt").read_text()


def test_int8_ended_by_ctrl_c(telling, predicted, tmp_path):
    """Also of a model that tells unknown texts, whose ONNX model is changed after the conversion."""
    exported = telling / "export"
    export = shutil.copytree(exported, tmp_path / "export", ignore=shutil.ignore_patterns("*.int8-*"))
    process = script("build_repository.py", "--export_dir", export / "float32", "--model_repository", tmp_path / "models",
                     "--use_quantize", "--calibration_file", ROOT / "data/dev.txt")
    assert process.returncode == 0 and "% of the labels as with fp32" in process.stderr, process.stderr
    fp32, size = os.path.getsize(exported / "float32.onnx"), os.path.getsize(tmp_path / "models/seqcls_model/1/model.onnx")
    assert 0.1 * fp32 < size < 0.4 * fp32
    pairs = sorted(zip(*predicted), key=lambda pair: len(pair[0]))  # INT8 takes the range of values of a whole batch
    with serving(tmp_path / "models", tmp_path / "server", end=signal.SIGINT) as server:
        batches = [[text for text, _ in pairs[start:start + 50]] for start in range(0, 1000, 50)]
        answers = [answer for batch in batches for answer in server.infer(batch)]
        outputs = json.loads(server.request(INFER, body(batches[5], least_known=1))[1])["outputs"]
    content = {output["name"]: output["data"] for output in outputs}
    known = Predictor(exported).answer(batches[5])[1]
    assert np.abs(np.array(content["known"]) - known).max() < 0.05 and set(content["label"]) == {"undecided"}
    same = [answer[0][0] == right["label"] for answer, (_, right) in zip(answers, pairs)]
    assert len(same) == 1000 and sum(same) >= 990


def test_fp16_wants_a_gpu_and_says_so(exported, predicted, tmp_path):
    """On this machine the server ends and names the cause. On the CPU, the repository's model gives the same labels."""
    models = build(exported, tmp_path / "models", "--device", "gpu", "--device_id", 1, "--use_fp16")
    config = (models / "seqcls_model/config.pbtxt").read_text()
    assert "count: 1, kind: KIND_GPU, gpus: [ 1 ]" in config and "intra_op_thread_count" not in config
    assert '{ name: "logits", data_type: TYPE_FP32, dims: [ 11 ] }' in config
    ports = [word for option, port in zip(("http", "grpc", "metrics"), free_ports()) for word in (f"--{option}_port", port)]
    process = script("start_server.py", "--model_repository", models, *ports)
    assert process.returncode != 0 and "Traceback" not in process.stderr
    assert "instance group seqcls_model_0 of model seqcls_model" in process.stderr and "GPU" in process.stderr
    fp32, size = os.path.getsize(exported / "float32.onnx"), os.path.getsize(models / "seqcls_model/1/model.onnx")
    assert 0.4 * fp32 < size < 0.55 * fp32
    export = shutil.copytree(exported, tmp_path / "export")
    shutil.copy(models / "seqcls_model/1/model.onnx", export / "float32.onnx")
    labels, _ = Predictor(export)(predicted[0])
    assert sum(label == right["label"] for [label], right in zip(labels, predicted[1])) >= 990


def test_a_repository_is_replaced_but_nothing_else(exported, repository, tmp_path):
    models = shutil.copytree(repository, tmp_path / "models")
    (models / "seqcls/2").mkdir()
    build(exported, models, "--max_batch_size", 8, "--max_text_length", 50, "--max_queue_delay", 500, "--max_queue_size", 7)
    assert sorted(os.listdir(models)) == ["repository.json", "seqcls", "seqcls_model", "seqcls_postprocess", "tokenizer"]
    assert sorted(os.listdir(models / "seqcls")) == ["1", "config.pbtxt"]
    assert os.listdir(tmp_path) == ["models"]
    config = (models / "tokenizer/config.pbtxt").read_text()
    for part in ("max_batch_size: 8\n", 'value: { string_value: "50" }', "delay_microseconds: 500\n", "max_queue_size: 7 "):
        assert part in config
    assert json.loads((models / "repository.json").read_text(encoding="utf-8"))["labels"] == LABELS
    before = (models / "repository.json").read_bytes()

    def refuse(export, repository, *more):
        return run_here(build_repository.main, "--export_dir", export, "--model_repository", repository, *more)

    assert_user_error(refuse(tmp_path / "none/x", models), "none/x: no such folder or model")
    (tmp_path / "broken").mkdir()
    assert_user_error(refuse(tmp_path / "broken", models), "deploy.json is missing")
    assert_user_error(refuse(exported, models, "--use_fp16"), "--use_fp16: a CPU is not faster with it")
    assert_user_error(refuse(exported, models, "--device", "gpu", "--use_quantize"), "--use_quantize: INT8 is for the CPU")
    assert_user_error(refuse(exported, models, "--calibration_file", "dev.txt"), "expected --use_quantize with them")
    assert_user_error(refuse(exported, models, "--max_batch_size", 0), "expected a whole number of 1 or more")
    assert_user_error(refuse(exported, models, "--use_quantize", "--calibration_file", tmp_path / "no.txt"),
                      "no.txt: cannot be read")
    assert (models / "repository.json").read_bytes() == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("precious")
    assert_user_error(refuse(exported, foreign), "foreign: holds mine.txt, expected a new folder")
    (models / "own_model").mkdir()
    assert_user_error(refuse(exported, models), "models: holds own_model, expected a new folder")
    (models / "own_model").rename(tmp_path / "own_model")
    (models / "repository.json").rename(tmp_path / "repository.json")
    assert_user_error(refuse(exported, models), "models: has no repository.json, expected a new folder")
    assert_user_error(refuse(exported, foreign / "mine.txt"), "mine.txt: is no folder")
    assert (foreign / "mine.txt").read_text() == "precious" and os.listdir(foreign) == ["mine.txt"]
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".part")]


def test_wrong_starts(server, repository, tmp_path):
    ports = free_ports()
    options = ["--model_repository", repository, "--http_port", ports[0], "--grpc_port", ports[1], "--metrics_port"]
    refused = {
        f"--metrics_port {server.metrics}: cannot listen on 127.0.0.1 (Address already in use)": [*options, server.metrics],
        "expected three different ports": [*options, ports[0]],
        "expected a whole number of 1 or more": [*options, 0],
        "--metrics_port 70000: cannot listen on 127.0.0.1": [*options, 70000],
        "cannot listen on 203.0.113.1": [*options, ports[2], "--host", "203.0.113.1"],
        "--host ::1: no IPv4 address": [*options, ports[2], "--host", "::1"],
        "--host : no IPv4 address": [*options, ports[2], "--host", ""],
        "no repository.json there": ["--model_repository", tmp_path]}
    for message, process in zip(refused, run_all(PYTHON, TRITON / "start_server.py", *refused.values())):
        assert_user_error(process, message)
    broken = shutil.copytree(repository, tmp_path / "broken")
    (broken / "seqcls_model/1/model.onnx").write_bytes(b"damaged")
    process = script("start_server.py", "--model_repository", broken, *options[2:], ports[2])
    assert process.returncode == 1 and "failed to load 'seqcls_model'" in process.stderr


def test_missing_packages_are_named(exported, tmp_path):
    code = "import runpy, sys; sys.modules[sys.argv[1]] = None; del sys.argv[:2]; runpy.run_path(sys.argv[0], {}, '__main__')"
    for package, name, options in (("onnxruntime", "build_repository.py", ["--export_dir", exported]),
                                   ("tritonclient.grpc", "seqcls_grpc_client.py", ["头疼"])):
        process = subprocess.run([PYTHON, "-c", code, package, name, *options], cwd=TRITON, capture_output=True, encoding="utf-8")
        assert_user_error(process, f"the package {package} is missing, expected `pip install -r deploy/triton_serving/req")


def test_an_interrupted_start_leaves_nothing(repository, tmp_path):
    server = Server(repository, tmp_path)
    while not shared_memory(backends(tmp_path)):  # the Python backends are starting
        assert server.process.poll() is None, server.log.read_text(errors="replace")
        time.sleep(0.05)
    made = backends(tmp_path)
    assert stop(server.process) in (0, 1, 143)
    assert os.listdir(tmp_path) == ["log"] and not shared_memory(made)

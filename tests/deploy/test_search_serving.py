"""deploy/simple_serving with an encoder and its index: answers, a changing index under load, a broken one, bad requests."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest
from test_simple_serving import CLIENT, CODE, SERVER, client, post, start, stop

import load
import soak
from helpers import ROOT, assert_user_error, read_lines, run, run_all, server_python, write_lines
from textcls.retrieval.changes import add_texts, remove_label
from textcls.retrieval.encoder import open_encoder
from textcls.retrieval.index import open_index
from textcls.retrieval.predictor import SearchPredictor
from textcls.retrieval.writing import changing, write_header

PYTHON = server_python("simple-serving")
NEW = "今天天气怎么样"  # a text of a label that is added


@pytest.fixture(scope="module")
def encoder(encoder_export):
    return open_encoder(encoder_export, num_threads=1)


@pytest.fixture(scope="module")
def export(search_export, tmp_path_factory):
    """An exported encoder with an index in it, to be changed."""
    return shutil.copytree(search_export, tmp_path_factory.mktemp("search") / "export")


@pytest.fixture(scope="module")
def server(export):
    """(port, log) of a server."""
    log = export.parent / "log"
    process, port = start(export, log, "--index_dir", export / "index", "--max_texts", 100, "--max_text_length", 100)
    yield port, log
    stop(process)


@pytest.fixture()
def texts():
    return [line.split("\t")[0] for line in read_lines(ROOT / "data/dev.txt")][:100]


def change(folder, **entries):
    """Put other entries into index.json, as a change of the index does."""
    with changing(folder):
        write_header(folder, {**open_index(folder).header, **entries})


def test_answers_are_those_of_the_predictor(server, export, texts, tmp_path):
    write_lines(tmp_path / "texts", texts)
    process = client(server[0], "--data_file", tmp_path / "texts", "--top_k", 3, "--num_nearest", 2, "--output_format", "jsonl")
    assert process.returncode == 0, process.stderr
    answers = [json.loads(line) for line in process.stdout.split("\n")[:-1]]
    assert [answer["text"] for answer in answers] == texts
    for answer, right in zip(answers, SearchPredictor(export, export / "index", num_threads=1).answer(texts, 3, 2)):
        for found, wanted in zip([answer, *answer["top_k"]], [right[:3], *right.top_k]):
            assert found["label"] == wanted[0]
            assert (found["confidence"], found["similarity"]) == pytest.approx(wanted[1:], abs=1e-4)
        assert len(answer["top_k"]) == 3 and len(answer["nearest"]) == 2
        assert [(near["text"], near["label"]) for near in answer["nearest"]] == [near[:2] for near in right.nearest]
    for item, answer in zip(post(server[0], {"data": {"text": texts}}, "/taskflow/cls")[1]["result"], answers):
        assert item["predictions"] == [{"label": answer["label"], "score": pytest.approx(answer["confidence"], abs=1e-4)}]


def test_all_labels_at_most_and_blocks_of_the_client(server, texts):
    [answer] = post(server[0], {"data": {"text": texts[:1]}, "parameters": {"top_k": 50, "num_nearest": 1}})[1]["result"]
    assert {top["label"] for top in answer["top_k"]} == set(read_lines(ROOT / "data/label.txt"))
    [near], block = answer["nearest"], client(server[0], texts[0], "--num_nearest", 1).stdout.split("\n")
    assert block[:4] == [f"data: {texts[0]}", f"label: {answer['label']} ({answer['confidence']:.6f})",
                         f"similarity: {answer['similarity']:.6f}",
                         f"near: {near['text']} ({near['label']}, {near['similarity']:.6f})"]


def test_below_the_threshold_is_undecided(server, export, texts):
    def ask(threshold):
        return post(server[0], {"data": {"text": texts}, "parameters": {"threshold": threshold}})

    confidences = [answer["confidence"] for answer in ask(0)[1]["result"]]
    middle = sorted(confidences)[50]
    for answer, best in zip(ask(middle)[1]["result"], ask(0)[1]["result"]):
        assert answer["label"] == ("undecided" if best["confidence"] < middle else best["label"])
        assert answer["top_k"] == best["top_k"]
    status, refused, _ = ask("auto")
    assert status == 409 and refused["errors"][0]["field"] == "parameters.threshold" and "the index holds none" in str(refused)
    change(export / "index", threshold={"precision": 0.9, "value": middle})
    assert ask("auto")[1] == ask(middle)[1]
    assert client(server[0], texts[confidences.index(min(confidences))], "--threshold", "auto").stdout.split("\n")[1].startswith(
        "label: undecided (")
    change(export / "index", threshold=None)


def test_changes_under_load_lose_no_request(server, export, encoder, texts):
    """While 16 clients ask, a label comes and goes: no request fails, and each change holds when /health/ready has answered."""
    port, ended, statuses = server[0], threading.Event(), []

    def work():
        while not ended.is_set():
            yield None, load.encode(texts[len(statuses) % len(texts)])

    clients = threading.Thread(target=lambda: asyncio.run(load.drive(
        port, 16, work(), lambda key, status, *rest: statuses.append(status))))
    clients.start()
    try:
        for number in range(10):
            add_texts(export / "index", f"天气{number}", [NEW], encoder.encode([NEW]))
            assert post(port, b"", "/health/ready")[1]["index_labels"] == 12
            answer = post(port, {"data": {"text": [NEW]}, "parameters": {"num_nearest": 1}})[1]["result"][0]
            assert answer["nearest"] == [{"text": NEW, "label": f"天气{number}", "similarity": pytest.approx(1, abs=1e-4)}]
            remove_label(export / "index", f"天气{number}")
            assert post(port, b"", "/health/ready")[1]["index_labels"] == 11
            answer = post(port, {"data": {"text": [NEW]}, "parameters": {"num_nearest": 1}})[1]["result"][0]
            assert not answer["nearest"][0]["label"].startswith("天气")
    finally:
        ended.set()
        clients.join()
    assert len(statuses) > 100 and set(statuses) == {200}


def test_a_broken_index_leaves_the_old_one(server, export, texts):
    port, log = server
    marker, before = export / "index/index.json", post(port, {"data": {"text": texts}})[1]
    header, time = marker.read_text(encoding="utf-8"), post(port, b"", "/health/ready")[1]["index_time"]
    assert time == pytest.approx(marker.stat().st_mtime, abs=0.001)
    segment = next((export / "index").glob("segment-*/vectors.npy"))
    vectors = segment.read_bytes()

    def replace(content):  # not in place: the server has the old file in its memory
        (export / "part").write_bytes(content)
        (export / "part").replace(segment)

    for broken in ("{", json.dumps({**json.loads(header), "encoder_id": "0" * 16}), header):
        if broken == header:
            replace(vectors[:-1])
        marker.unlink()
        marker.write_text(broken, encoding="utf-8")
        assert post(port, {"data": {"text": texts}})[1] == before
        assert post(port, b"", "/health/ready")[1] == {"status": "ready", "index_labels": 11, "index_time": time}
        replace(vectors)
    problems = [entry["message"] for entry in map(json.loads, read_lines(log)) if entry["level"] == "ERROR"]
    assert len(problems) == 3 and all("the old one goes on" in message for message in problems)
    for message, part in zip(problems, ("not JSON", "made with the encoder 0000", "vectors.npy")):
        assert part in message
    change(export / "index")
    assert post(port, b"", "/health/ready")[1]["index_time"] > time
    metrics = post(port, b"", "/metrics")[1].decode()
    assert "serving_index_labels 11.0" in metrics and "serving_index_time " in metrics


def find_workers(process):
    """The process ids of a server's workers."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_workers_share_a_port_and_a_dead_one_is_started_again(search_export, encoder, texts, tmp_path):
    export = shutil.copytree(search_export, tmp_path / "export")
    process, port = start(export, tmp_path / "log", "--index_dir", export / "index", "--workers", 2)

    def ask_nearest():
        """The label of the nearest text for each of 40 new connections, which the system shares out."""
        request = {"data": {"text": [NEW]}, "parameters": {"num_nearest": 1}}
        return {post(port, request)[1]["result"][0]["nearest"][0]["label"] for _ in range(40)}

    try:
        before = ask_nearest()
        add_texts(export / "index", "天气", [NEW], encoder.encode([NEW]))
        assert before != {"天气"} and ask_nearest() == {"天气"}
        killed, other = find_workers(process)
        os.kill(killed, signal.SIGKILL)
        assert ask_nearest() == {"天气"}  # what the dead one would have got waits for the new one
        assert other in find_workers(process) and len(find_workers(process)) == 2
        assert "serving_texts_total 120.0" in post(port, b"", "/metrics")[1].decode()  # of both, and of the dead one
        workers = find_workers(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0 and not any(Path(f"/proc/{worker}").exists() for worker in workers)
    finally:
        process.kill()
    entries = [json.loads(line) for line in read_lines(tmp_path / "log")]
    assert [entry["workers"] for entry in entries if entry["message"] == "listening"] == [2]
    assert sum("Index reloaded" in entry["message"] for entry in entries) == 2
    assert [entry["message"] for entry in entries if entry["level"] == "ERROR"] == [
        f"a worker (process {killed}) has ended with code 137 and is started again"]


def test_bad_requests(server):
    for parameters, field in (
            ({"top_k": 51}, "top_k"), ({"num_nearest": 21}, "num_nearest"), ({"num_nearest": -1}, "num_nearest"),
            ({"threshold": 1.5}, "threshold"), ({"threshold": CODE}, "threshold"), ({"threshold": True}, "threshold"),
            ({"neighbours": 3}, "neighbours")):
        status, answer, _ = post(server[0], {"data": {"text": ["好"]}, "parameters": parameters})
        assert status == 422 and [problem["field"] for problem in answer["errors"]] == [f"parameters.{field}"], answer
    assert post(server[0], {"data": {"text": [" "]}})[1]["errors"][0]["field"] == "data.text.0"


def test_it_keeps_its_openapi_description(server):
    process = subprocess.run([PYTHON.parent / "schemathesis", "run", f"http://127.0.0.1:{server[0]}/openapi.json",
                              "--max-examples", "5", "--seed", "1", "--no-color"], capture_output=True, encoding="utf-8",
                             timeout=600)
    assert process.returncode == 0, process.stdout[-6000:]


def test_refusals(server, export, exported, tmp_path):
    foreign = shutil.copytree(export, tmp_path / "foreign")
    change(foreign / "index", encoder_id="0" * 16)
    refused = {
        "no index here (index.json is missing)": ["--export_dir", export, "--index_dir", tmp_path],
        "made with the encoder 0000000000000000, this one is": ["--export_dir", foreign],
        "is a classifier, which searches nothing": ["--export_dir", exported, "--index_dir", export / "index"],
        "is a sentence encoder, which has no accuracy": ["--export_dir", export, "--use_quantize", "--allow_accuracy_drop"],
        "--device gpu: this onnxruntime is a CPU build": ["--export_dir", export, "--device", "gpu"],
        f"--port {server[0]}: cannot listen on 127.0.0.1": ["--export_dir", export, "--port", server[0], "--workers", 2]}
    for message, process in zip(refused, run_all(PYTHON, SERVER, *refused.values())):
        assert_user_error(process, message)
    [wrong] = run_all(PYTHON, CLIENT, ["好", "--threshold", "2"])
    assert_user_error(wrong, "--threshold: '2': expected a number, 0 to 1, or auto")
    process = run("deploy/predictor/infer.py", "--model_path_prefix", export, "--dataset_dir", ROOT / "data")
    assert_user_error(process, "retrieval_based/predict.py")
    process = run("deploy/paddle_serving/build_model.py", "--export_dir", export, "--output_dir", tmp_path / "model")
    assert_user_error(process, "deploy.json: the output of this model is 'embedding', expected a classifier")
    assert not (tmp_path / "model").exists()


def test_a_soak_compares_every_answer(search_export):
    """benchmarks/soak.py: every kind of client, two workers, a changing index."""
    process = run("benchmarks/soak.py", "--export_dir", search_export, "--texts", ROOT / "data/data.txt", "--workers", 2,
                  "--swap_seconds", 1, "--minutes", os.environ.get("SOAK_MINUTES", "0.33"))
    assert process.returncode == 0, process.stdout + process.stderr
    assert "wrong 0, lost 0, " in process.stdout and "after the warm-up; most " in process.stdout
    assert set(re.findall(r"\d+ x ([a-z ]+),", process.stdout)) == {*soak.ACTIONS, "swap"}, process.stdout


@pytest.mark.parametrize("changes", [{"label": "b"}, {"top_k": [{"label": "a", "confidence": 0.61}]},
                                     {"label": "b", "top_k": [{"label": "b", "confidence": 0.3}]},
                                     {"label": "c", "top_k": [{"label": "c", "confidence": 0.6}]}])
def test_a_soak_notices_wrong_answers(changes):
    right, answer = {"a": 0.6, "b": 0.3}, {"label": "a", "top_k": [{"label": "a", "confidence": 0.60004}]}
    assert soak.is_right(answer, right) and not soak.is_right({**answer, **changes}, right)

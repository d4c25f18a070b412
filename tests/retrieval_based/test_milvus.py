"""retrieval_based/milvus_index.py and run_system.py: Milvus Lite, its server with a token, versions, a kill, refusals."""

import json
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from helpers import ROOT, assert_user_error, read_lines, run_all, server_python, write_lines
from textcls.retrieval.changes import remove_label
from textcls.retrieval.encoder import open_encoder
from textcls.retrieval.index import open_index
from textcls.retrieval.rows import rows_of_texts
from textcls.retrieval.writing import memory_index, new_header, write_index

PYTHON = server_python("milvus")
QUERY = ["--model_dir", "encoder", "--top_k", 3, "--num_threads", 1]
CODE = "__import__('os').system('touch pwned')"
LIMIT = 5 * 2**20  # bytes that the server below takes in one message
SERVER = f"""if True:  # Milvus Lite's own server, which knows no tokens, behind a check of the token
    import base64, sys, threading
    from concurrent.futures import ThreadPoolExecutor
    import grpc
    from milvus_lite.adapter.grpc.servicer import MilvusServicer
    from milvus_lite.db import MilvusLite
    from pymilvus.grpc_gen import milvus_pb2_grpc

    def refuse(request, context):
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "auth check failure")

    class Check(grpc.ServerInterceptor):
        def intercept_service(self, proceed, details):
            token = base64.b64encode(b"root:secret").decode()
            known = ("authorization", token) in [tuple(item) for item in details.invocation_metadata]
            return proceed(details) if known else grpc.unary_unary_rpc_method_handler(refuse)

    server = grpc.server(ThreadPoolExecutor(8), interceptors=[Check()],
                         options=[("grpc.max_receive_message_length", {LIMIT})])
    milvus_pb2_grpc.add_MilvusServiceServicer_to_server(MilvusServicer(MilvusLite(sys.argv[1])), server)
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    threading.Event().wait()"""

INTERRUPTED = """if True:  # Ctrl-C after the server has taken the alias, before its answer is there
    import runpy, sys
    from textcls.retrieval import milvus

    def interrupted(*arguments, switch=milvus.switch):
        switch(*arguments)
        raise KeyboardInterrupt

    milvus.switch = interrupted
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")"""


def milvus(name, *lines, cwd):
    """Run a script of retrieval_based/ once per command line (a list of words), in one process of Milvus's environment."""
    return run_all(PYTHON, ROOT / f"retrieval_based/{name}.py", *lines, cwd=cwd)


def succeed(name, *lines, cwd):
    """As `milvus`; returns the lines that each run printed."""
    processes = milvus(name, *lines, cwd=cwd)
    for process in processes:
        assert process.returncode == 0, process.stderr
    return [process.stdout.splitlines() for process in processes]


def nearest(output):
    """Of JSON lines, the text, label and similarity of each text's neighbours."""
    return [[(hit["text"], hit["label"], hit["similarity"]) for hit in json.loads(line)["nearest"]] for line in output]


@pytest.fixture(scope="module")
def work(encoder_export, tmp_path_factory):
    """A folder with encoder/, index/ of 600 training texts, less those of a removed label, and texts.txt."""
    folder = tmp_path_factory.mktemp("milvus")
    shutil.copytree(encoder_export, folder / "encoder")
    encoder = open_encoder(folder / "encoder", num_threads=1)
    labels = read_lines(ROOT / "data/label.txt")
    rows = [line.split("\t") for line in read_lines(ROOT / "data/train.txt")][:600] + [[CODE, labels[0]]]
    texts = [text for text, _ in rows]
    header = new_header(encoder.encoder_id, encoder.dimension, "texts", [(label, []) for label in labels], "float16")
    write_index(folder / "index", memory_index(header, rows_of_texts(
        encoder.encode(texts), [labels.index(label) for _, label in rows], texts)))
    remove_label(folder / "index", labels[3])
    write_lines(folder / "texts.txt", [line.split("\t")[0] for line in read_lines(ROOT / "data/dev.txt")][:120] + [CODE])
    return folder


@pytest.fixture(scope="module")
def exact(work):
    """Of each line of texts.txt the 3 nearest rows of the index, by a plain matrix product: as of `nearest`."""
    index, encoder = open_index(work / "index"), open_encoder(work / "encoder", num_threads=1)
    rows = np.flatnonzero(index.row_labels >= 0)
    vectors = index.take(rows)
    similarities = encoder.encode(read_lines(work / "texts.txt")) @ (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).T
    return [[(index.text(rows[column]), index.labels[index.row_labels[rows[column]]], row[column])
             for column in np.argsort(-row, kind="stable")[:3]] for row in similarities]


@pytest.fixture(scope="module")
def server(work):
    """The address of a server that wants the token root:secret, of the database server.db."""
    process = subprocess.Popen([str(PYTHON), "-c", SERVER, "server.db"], cwd=work, stdout=subprocess.PIPE, encoding="utf-8")
    yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    process.kill()
    process.wait()


def assert_same_neighbours(output, exact):
    for found, wanted in zip(nearest(output), exact):
        assert [hit[2] for hit in found] == pytest.approx([hit[2] for hit in wanted], abs=1e-5)
        if wanted[0][2] - wanted[1][2] > 1e-5:  # no tie
            assert found[0][:2] == wanted[0][:2]
    assert len(output) == len(exact)


def test_milvus_lite_finds_what_exact_search_finds_and_the_old_version_answers_after_a_kill(work, exact):
    lines, = succeed("milvus_index", ["insert", "--index_dir", "index"], cwd=work)
    count = sum(open_index(work / "index").row_labels >= 0)
    assert f": {count} rows of 48 dimensions, FLAT" in lines[0] and lines[1].endswith("exact search: 1.0000")
    text = read_lines(work / "texts.txt")[0]
    queries = [[*QUERY, "--data_file", "texts.txt", "--output_format", "jsonl"], [*QUERY, "--texts", text, "--top_k", 1]]
    output, short = succeed("run_system", *queries, cwd=work)
    assert_same_neighbours(output, exact)
    assert nearest(output)[-1][0] == (CODE, exact[-1][0][1], pytest.approx(1, abs=1e-3)) and not (work / "pwned").exists()
    neighbour, label, similarity = nearest(output)[0][0]
    assert short == [f"{text} {label} {similarity:.4f} {neighbour}"]

    def collections():  # a folder without this file is none yet: Milvus Lite passes over it
        return [path.parent.name for path in work.glob("milvus.db/collections/*/schema.json")]

    old, = collections()
    process = subprocess.Popen([str(PYTHON), str(ROOT / "retrieval_based/milvus_index.py")], cwd=work)
    while len(collections()) == 1:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert succeed("run_system", queries[0], cwd=work) == [output]
    assert subprocess.run([str(PYTHON), "-c", INTERRUPTED, ROOT / "retrieval_based/milvus_index.py"], cwd=work).returncode == 130
    assert succeed("run_system", queries[0], cwd=work) == [output] and len(collections()) > 1
    lines, = succeed("milvus_index", [], cwd=work)  # without a word it inserts
    assert old in lines[2] and len(collections()) == 1


def test_the_prefix_of_an_index_goes_before_the_texts_that_milvus_is_asked_about(work, tmp_path):
    index = shutil.copytree(work / "index", tmp_path / "index")
    header = {**open_index(index).header, "prefixes": {"query": "查询：", "text": ""}}
    (index / "index.json").write_text(json.dumps(header), encoding="utf-8")
    address = ["--milvus_uri", tmp_path / "prefix.db"]
    succeed("milvus_index", ["insert", "--index_dir", index, *address], cwd=work)
    ask = [*QUERY, "--texts", CODE, "--output_format", "jsonl", "--top_k", 1, *address]
    output, same, refused = milvus("run_system", ask, [*ask, "--query_prefix", "查询："], [*ask, "--query_prefix", "问："],
                                   cwd=work)
    opened, encoder = open_index(index), open_encoder(work / "encoder", num_threads=1)
    rows = np.flatnonzero(opened.row_labels >= 0)
    expected = (opened.take(rows) @ encoder.encode(["查询：" + CODE])[0]).max()
    assert nearest(output.stdout.splitlines())[0][0][2] == pytest.approx(expected, abs=1e-3) and same.stdout == output.stdout
    assert_user_error(refused, "--query_prefix '问：': --collection text_classes was made with '查询：', expected that")
    refused, = milvus("milvus_index", ["insert", "--index_dir", index, *address, "--query_prefix", "问："], cwd=work)
    assert_user_error(refused, "--query_prefix '问：'")


def test_a_server_with_a_token_answers_while_versions_are_switched(work, exact, server, monkeypatch):
    monkeypatch.setenv("MILVUS_TOKEN", "root:secret")
    address = ["--milvus_uri", server, "--collection", "live"]
    inserting = ["insert", "--index_dir", "index", "--keep", 1, *address]
    first, = succeed("milvus_index", inserting, cwd=work)
    with ThreadPoolExecutor() as pool:
        query = [*QUERY, "--data_file", "texts.txt", "--output_format", "jsonl", *address]
        readers = [pool.submit(succeed, "run_system", query, query, cwd=work) for _ in range(2)]
        second, _, versions, dropped = succeed("milvus_index", inserting, ["switch", *address], ["list", *address],
                                               ["drop", *address], cwd=work)
        for reader in readers:
            for output in reader.result():
                assert_same_neighbours(output, exact)
    first, second = [lines[0].split()[2].strip(":") for lines in (first, second)]
    assert [line.split("\t")[:2] for line in versions] == [[first, "current"], [second, "complete"]]
    assert dropped == ["dropped: nothing"]  # the other is the younger one
    (work / "token").write_text("root:wrong\n")
    *refused, locked, all_dropped = milvus(
        "milvus_index", ["list", *address, "--milvus_token_file", "token"], ["list", *address, "--milvus_token", "root:wrong"],
        ["list", "--milvus_uri", "server.db"], ["drop", "--all", *address], cwd=work)
    for process in refused:
        assert_user_error(process, f"{server}: the server refuses the token")
    assert_user_error(locked, "server.db: another process has this database open")
    assert all_dropped.stdout == f"dropped: {first} {second}\n"


def test_a_file_of_vectors_larger_than_a_message_and_the_words_of_labels(work, server, monkeypatch):
    monkeypatch.setenv("MILVUS_TOKEN", "root:secret")
    vectors = np.random.default_rng(0).standard_normal((3072, 512)).astype(np.float32)
    assert vectors.nbytes > LIMIT
    rows = [(f"标签{row // 3}", f"词{row}" if row % 3 else f"标签{row // 3}") for row in range(len(vectors))]
    rows[4] = ("标签1", "长" * 30000)  # more than Milvus can hold
    lines = [f"{label}=={word}" for label, word in rows if word != label]
    write_lines(work / "label.txt", lines)
    write_lines(work / "short.txt", lines[:-1])
    asked = [0, 3, 4, 3001]
    np.save(work / "vectors.npy", vectors)
    np.save(work / "queries.npy", vectors[asked])
    options = ["--milvus_uri", server, "--collection", "words"]
    inserted, found, refused = milvus(
        "milvus_index", ["--vector_path", "vectors.npy", "--corpus_file", "label.txt", *options],
        ["search", "--vector_path", "queries.npy", "--top_k", 1, *options],
        ["--vector_path", "vectors.npy", "--corpus_file", "short.txt", *options], cwd=work)
    assert ": 3072 rows of 512 dimensions" in inserted.stdout and "search: 1.0000" in inserted.stdout
    cut = {4: "长" * 21845}
    words = ["" if text == label else f" {cut.get(row, text)}" for row, (label, text) in enumerate(rows)]
    assert found.stdout.splitlines() == [f"{number} {rows[row][0]} 1.0000{words[row]}" for number, row in enumerate(asked)]
    assert_user_error(refused, "vectors.npy: 3072 rows, but short.txt has 3071")


def test_refusals(work):
    deploy = json.loads((shutil.copytree(work / "encoder", work / "other") / "deploy.json").read_text())
    (work / "other/deploy.json").write_text(json.dumps({**deploy, "encoder_id": "0123456789abcdef"}))
    (work / "old.db").write_text("SQLite format 3")
    for name, values in (("short", np.ones((2, 7), np.float32)), ("zero", np.zeros((2, 48), np.float32)),
                         ("objects", np.array([{}], object))):
        np.save(work / f"{name}.npy", values)
    here = ["--milvus_uri", "refusals.db"]
    succeed("milvus_index", ["insert", "--index_dir", "index", *here], cwd=work)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        cases = {
            "http://127.0.0.1:1: no Milvus answers there": ["list", "--milvus_uri", "http://127.0.0.1:1"],
            "no answer within 1 s": ["list", "--milvus_uri", f"http://127.0.0.1:{silent.getsockname()[1]}", "--timeout", 1],
            "localhost:19530: expected http://host:19530": ["list", "--milvus_uri", "localhost:19530"],
            "none.db: no such database of Milvus Lite": ["list", "--milvus_uri", "none.db"],
            "old.db: is a file, as Milvus Lite 2 wrote": ["insert", "--index_dir", "index", "--milvus_uri", "old.db"],
            "nowhere: no index here": ["insert", "--index_dir", "nowhere", *here],
            "zero.npy: row 0 has no direction": ["search", "--vector_path", "zero.npy", *here],
            "objects.npy: cannot be read": ["search", "--vector_path", "objects.npy", *here],
            "its vectors have 48 dimensions, the queries 7": ["search", "--vector_path", "short.npy", *here],
            "--collection none: not in this Milvus, expected one of ['text_classes']": ["list", "--collection", "none", *here],
            "--collection a;b: expected up to 200 letters": ["list", "--collection", "a;b", *here],
            "no older version that is complete": ["switch", *here]}
        processes = milvus("milvus_index", *cases.values(), cwd=work)
    other = {"the queries of 0123456789abcdef": ["--model_dir", "other", "--texts", "头疼", *here],
             "text 1: empty or blank": ["--model_dir", "encoder", "--texts", " ", *here]}
    processes += milvus("run_system", *other.values(), cwd=work)
    for process, message in zip(processes, [*cases, *other]):
        assert_user_error(process, message)
        assert len(process.stderr.splitlines()) == 1, process.stderr
    assert not (work / "none.db").exists()

"""deploy/spark: answers of all rows on one machine and on a cluster on loopback, bad rows, a killed driver and worker."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import time

import pytest

from helpers import ROOT, THRESHOLD, assert_user_error, load_script, read_lines, run_all, server_python
from textcls.common.probabilities import top_labels
from textcls.runtime.predictor import Predictor

if shutil.which("java") is None:
    pytest.skip("there is no java on the path, expected Java 17 or later (Spark 3.5: 8, 11 or 17)", allow_module_level=True)
PYTHON = server_python("spark-3.5" if os.environ.get("SPARK") == "3.5" else "spark")
SCRIPT = ROOT / "deploy/spark/spark_infer.py"
LEAST_KNOWN = 0.95
BAD = {None: "null", "": "empty or blank", " \t": "empty or blank", "a\0b": "a NUL character", "长" * 1001: "1001 characters"}
# that of an activated environment, everything on loopback, and no web pages
ENVIRONMENT = {**os.environ, "PATH": f"{PYTHON.parent}{os.pathsep}{os.environ['PATH']}", "SPARK_LOCAL_IP": "127.0.0.1",
               "SPARK_LOCAL_HOSTNAME": "127.0.0.1", "OMP_NUM_THREADS": "1",
               "PYSPARK_SUBMIT_ARGS": "--master local[2] --conf spark.ui.enabled=false --conf spark.ui.showConsoleProgress=false "
                                      "pyspark-shell"}


@pytest.fixture(scope="module")
def texts():
    return [line.split("\t")[0] for name in ("dev", "train") for line in read_lines(ROOT / f"data/{name}.txt")][:300]


@pytest.fixture(scope="module")
def right(exported, texts):
    """What infer.py says of the texts: {text: [(label, probability)] of the three best}."""
    predictor = Predictor(exported, num_threads=1)
    return dict(zip(texts, top_labels(predictor.probabilities(texts), predictor.labels, 3)))


@pytest.fixture(scope="module")
def table(texts, tmp_path_factory):
    """A table of the texts and of bad rows in JSON lines."""
    path = tmp_path_factory.mktemp("table") / "table.json"
    rows = [{"id": number, "text": text, "day": f"d{number % 2}"} for number, text in enumerate([*texts, *BAD])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_json(folder):
    """The rows that Spark wrote as JSON lines, by id."""
    rows = [json.loads(line) for path in sorted(folder.rglob("part-*.json")) for line in read_lines(path)]
    by_id = {row["id"]: row for row in rows}
    assert len(by_id) == len(rows)
    return by_id


def assert_right(rows, right, prefix="", threshold=0.0, bad=BAD, exact=True):
    """All texts have the answers of the predictor and the bad rows their errors."""
    assert sorted(map(int, rows)) == list(range(len(right) + len(bad)))
    for number, row in rows.items():
        if int(number) >= len(right):
            assert list(bad.values())[int(number) - len(right)] in row[f"{prefix}error"] and f"{prefix}label" not in row
            continue
        top = right[row["text"]]
        best = (row[f"{prefix}label"], row[f"{prefix}probability"])
        if exact:
            assert best[0] == (top[0][0] if round(top[0][1], 6) >= threshold else "undecided")
            assert [entry["label"] for entry in row[f"{prefix}top_k"]] == [label for label, _ in top][:len(row[f"{prefix}top_k"])]
        assert best[1] == pytest.approx(top[0][1], abs=2e-6 if exact else 0.1)


@pytest.fixture(scope="module")
def many(exported, telling, search_export, table, tmp_path_factory):
    """{name of a run: (its folder, finished process)} of many command lines in one process, where Spark starts once."""
    folder = tmp_path_factory.mktemp("spark")
    wrong = shutil.copytree(exported, folder / "wrong")
    (wrong / "label.txt").write_text("\n".join(f"L{number}" for number in range(11)) + "\n", encoding="utf-8")
    (folder / "in.txt").write_bytes("头疼怎么办\n".encode() + b"\xc4\xe3\xba\xc3\n\n")
    with open(folder / "in.csv", "w", encoding="gb18030", errors="surrogateescape", newline="") as file:
        csv.writer(file).writerows([["i.d", "text"], ["0", ' a "头"\n疼, d '], ["1", ""], ["2", "\udcff\udcff"]])
    whole = ["--input", table, "--format", "json", "--id_column", "id", "--max_text_length", 1000]
    lines = {
        "parquet": [*whole, "--top_k", 3, "--threshold", THRESHOLD, "--partition_by", "day", "--partitions", 3, "--window", 50],
        "json": ["--input", folder / "parquet", "--column_prefix", "b_", "--output_format", "json", "--max_text_length", 1000],
        "int8": [*whole, "--output_format", "json", "--use_quantize", "--parts", 2],
        "again": [*whole, "--output_format", "json", "--use_quantize", "--parts", 2],
        "text": ["--input", folder / "in.txt", "--format", "text", "--output_format", "json"],
        "csv": ["--input", folder / "in.csv", "--format", "csv", "--output_format", "csv", "--id_column", "i.d",
                "--column_prefix", "n.",
                "--option", "encoding=GB18030"],
        "search": [*whole, "--output_format", "json", "--index_dir", search_export / "index", "--top_k", 2],
        "known": [*whole, "--output_format", "json", "--least_known", LEAST_KNOWN],
        "unknown": [*whole, "--least_known", LEAST_KNOWN],
        "there": [*whole], "column": [*whole, "--text_column", "txt"], "kind": [*whole, "--text_column", "id"],
        "taken": ["--input", folder / "parquet"], "missing": ["--input", folder / "nothing"],
        "other": [*whole, "--output_format", "json", "--parts", 2], "zip": ["--write_archive", folder / "wrong.zip"],
        "archive": [*whole, "--archive", folder / "wrong.zip"]}
    models = {"known": telling / "export", "search": search_export, "zip": wrong}
    outputs = {"again": "int8", "there": "parquet", "other": "int8"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        processes = run_all(PYTHON, SCRIPT, *(
            [*line, "--model_path_prefix", models.get(name, exported), "--output", folder / outputs.get(name, name)]
            for name, line in lines.items()))
    return {name: (folder / outputs.get(name, name), process) for name, process in zip(lines, processes)}


def test_all_rows_have_the_answers_of_infer_and_bad_rows_their_errors(many, right):
    for name in ("parquet", "json"):
        assert many[name][1].returncode == 0, many[name][1].stderr
    assert {path.name for path in many["parquet"][0].iterdir()} >= {"_SUCCESS", "day=d0", "day=d1"}
    rows = read_json(many["json"][0])
    assert_right(rows, right, threshold=THRESHOLD)
    assert_right(rows, right, "b_")
    assert "undecided" in {row.get("label") for row in rows.values()} and {row["day"] for row in rows.values()} == {"d0", "d1"}
    assert {len(row["top_k"]) for row in rows.values() if "top_k" in row} == {3}


def test_parts_of_int8_are_skipped_when_they_are_there(many, right):
    folder, process = many["int8"]
    assert process.returncode == many["again"][1].returncode == 0, process.stderr
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == [
        "_SUCCESS", "_parts.json", "part=0", "part=1"]
    rows = read_json(folder)
    assert_right(rows, right, exact=False)
    assert sum(row["label"] == right[row["text"]][0][0] for row in rows.values() if "label" in row) > 0.95 * len(right)
    assert_user_error(many["other"][1], "the parts that are there were made with", "'int8'", "'fp32'")


def test_lines_and_csv_keep_what_is_in_them(many):
    assert many["text"][1].returncode == many["csv"][1].returncode == 0, many["text"][1].stderr + many["csv"][1].stderr
    [path] = many["text"][0].glob("part-*.json")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]]
    assert [row.get("error") for row in rows] == [None, "not a string (invalid UTF-8), expected a text",
                                                  "empty or blank, expected a text"]
    [path] = many["csv"][0].glob("part-*.csv")
    with open(path, encoding="utf-8", newline="") as file:
        first, second, third = csv.DictReader(file)
    assert first["text"] == ' a "头"\n疼, d ' and json.loads(first["n.top_k"])[0]["label"] == first["n.label"]
    assert second["n.error"] == "null, expected a text" and not second["n.label"]
    assert third["n.error"] == "U+FFFD (not in the file's encoding), expected a text" and third["i.d"] == "2"


def test_an_index_answers_as_its_predictor_does(many, search_export, texts):
    from textcls.retrieval.predictor import SearchPredictor

    folder, process = many["search"]
    assert process.returncode == 0, process.stderr
    predictor = SearchPredictor(str(search_export), str(search_export / "index"), num_threads=1)
    answers, rows = predictor.answer(texts, 2), read_json(folder)
    assert_right(rows, {text: [top[:2] for top in answer.top_k] for text, answer in zip(texts, answers)})
    found = [rows[number]["known"] for number in range(len(texts))]
    assert found == pytest.approx([answer.known for answer in answers], abs=2e-6)


def test_texts_of_no_label_are_told(many, telling, texts):
    folder, process = many["known"]
    assert process.returncode == 0, process.stderr
    known = Predictor(telling / "export", num_threads=1).answer(texts)[1]
    rows = [read_json(folder)[number] for number in range(len(texts))]
    assert [row["known"] for row in rows] == pytest.approx(known, abs=2e-6)
    assert [row["label"] == "undecided" for row in rows] == [round(value, 6) < LEAST_KNOWN for value in known]
    assert 0 < sum(value < LEAST_KNOWN for value in known) < len(texts)


def test_refusals(many):
    for name, parts in {"there": ["is there already"], "column": ["no column 'txt' (did you mean 'text'?)", "--text_column"],
                        "kind": ["column 'id' holds bigint, expected strings"], "missing": ["nothing"],
                        "taken": ["has a column 'error'", "--column_prefix"],
                        "unknown": ["least_known", "this model does not tell unknown texts"],
                        "archive": ["the archive of the model has the SHA-256", "--write_archive"]}.items():
        assert_user_error(many[name][1], *parts)
        assert len(many[name][1].stderr.strip().split("\n")) == 1
    assert not many["archive"][0].exists()


def test_a_function_for_sql(exported, right, tmp_path):
    first = next(iter(right))
    (tmp_path / "texts.json").write_text("".join(json.dumps({"id": id, "text": text}) + "\n" for id, text in enumerate(
        [first, None])), encoding="utf-8")
    code = f"""if True:
        from pyspark.sql import SparkSession
        from spark_model import register_udf
        spark = SparkSession.builder.getOrCreate()
        register_udf(spark, "classify", "{exported}", top_k=2)
        spark.read.schema("id int, text string").json("{tmp_path}/texts.json").createOrReplaceTempView("texts")
        for id, answer in spark.sql("SELECT id, classify(text) FROM texts ORDER BY id").collect():
            print(id, answer.label, answer.probability, answer.top_k and len(answer.top_k), answer.error)"""
    process = subprocess.run([PYTHON, "-c", code], capture_output=True, encoding="utf-8", timeout=120, cwd=SCRIPT.parent,
                             env={**ENVIRONMENT, "PYSPARK_PYTHON": str(PYTHON), "PYTHONIOENCODING": "utf-8"})
    assert process.returncode == 0, process.stderr
    (label, probability), *_ = right[first]
    assert process.stdout == f"0 {label} {probability} 2 None\n1 None None None null, expected a text\n"


@pytest.mark.parametrize("text, reason", [
    ("Traceback (most recent call last):\n  File\ntextcls.common.errors.UserError: host: lacks the package x\n\n\tat java",
     "host: lacks the package x"),
    ("An exception\n  File\nModuleNotFoundError: No module named 'pyarrow'\n", "ModuleNotFoundError: No module named 'pyarrow'"),
    ("An error occurred while calling o4.save.\n: org.apache.spark.SparkException: Job aborted due to stage failure: (TID 0) "
     "java.io.IOException: Cannot run program \"x\": error=2\nCaused by: java.io.IOException: Cannot run program \"x\": error=2",
     'Cannot run program "x": error=2'),
    ("[PATH_NOT_FOUND] Path does not exist: file:/x.", "[PATH_NOT_FOUND] Path does not exist: file:/x")])
def test_errors_of_spark_become_a_line(text, reason):
    found = load_script("deploy/spark", "spark_infer").reason_of(RuntimeError(text))
    assert found.startswith(reason) and "\n" not in found


def command(exported, table, output, *more, start=(PYTHON,)):
    return list(map(str, [*start, SCRIPT, "--model_path_prefix", exported, "--input", table, "--format", "json", "--id_column",
                          "id", "--max_text_length", 1000, "--output", output, "--output_format", "json", *more]))


def wait_for(ready, process, seconds=120):
    """Wait until ready() is true. AssertionError where the process ends first."""
    end = time.monotonic() + seconds
    while not ready():
        assert process.poll() is None and time.monotonic() < end, process.stderr.read() if process.stderr else process.args
        time.sleep(0.05)


def test_a_killed_driver_goes_on_where_it_was(exported, table, right, tmp_path):
    output = tmp_path / "output"
    line = command(exported, table, output, "--parts", 4)
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(line, env=ENVIRONMENT, stdout=log, stderr=log, start_new_session=True)
        wait_for((output / "part=0").exists, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = [path for path in output.glob("part=*")]
    assert 1 <= len(done) < 4 and not (output / "_SUCCESS").exists()
    assert all((path / "_SUCCESS").exists() for path in done)
    times = {path: path.stat().st_mtime_ns for path in done}
    process = subprocess.run(line, env=ENVIRONMENT, capture_output=True, encoding="utf-8", timeout=120)
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("is there, skipped") == len(done) and (output / "_SUCCESS").exists()
    assert times == {path: path.stat().st_mtime_ns for path in done}
    assert_right(read_json(output), right)


@pytest.fixture
def cluster(tmp_path):
    """(address, processes of two workers) of a cluster on loopback."""
    processes, start = [], [PYTHON.parent / "spark-class"]

    def spark(*words):
        log = open(tmp_path / f"log{len(processes)}", "w+")
        environment = {**ENVIRONMENT, "SPARK_DAEMON_MEMORY": "256m", "SPARK_WORKER_DIR": str(tmp_path / f"work{len(processes)}")}
        processes.append(subprocess.Popen([*start, *words], env=environment, stdout=log, stderr=log, start_new_session=True))
        return lambda: (tmp_path / log.name).read_text()

    def find(log, pattern):
        wait_for(lambda: re.search(pattern, log()), processes[-1])
        return re.search(pattern, log())[1]

    try:
        name = "org.apache.spark.deploy.{0}.{1}".format
        address = find(spark(name("master", "Master"), "--host", "127.0.0.1", "--port", "0", "--webui-port", "0"),
                       r"(spark://127\.0\.0\.1:\d+)")
        logs = [spark(name("worker", "Worker"), "--host", "127.0.0.1", "--webui-port", "0", "-c", "1", "-m", "600m", address)
                for _ in range(2)]
        for log in logs:
            find(log, "(Successfully registered)")
        yield address, processes[1:]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in processes:
            process.wait(30)


def test_a_worker_killed_in_the_middle_loses_and_doubles_nothing(cluster, exported, table, right, tmp_path):
    address, workers = cluster
    output, unfinished = tmp_path / "output", tmp_path / "_output.unfinished"
    submit = [PYTHON.parent / "spark-submit", "--master", address, "--executor-memory", "500m",
              "--conf", "spark.ui.enabled=false", "--conf", f"spark.pyspark.python={PYTHON}"]
    with open(tmp_path / "log", "w+") as log:
        process = subprocess.Popen(command(exported, table, output, "--partitions", 20, start=submit), stdout=log, stderr=log,
                                   env=ENVIRONMENT)
        wait_for(lambda: any(unfinished.glob("_temporary/0/task_*")), process)
        assert not output.exists()
        os.killpg(workers[0].pid, signal.SIGKILL)  # with its executor
        process.wait(120)
        log.seek(0)
        assert process.returncode == 0, log.read()
    assert_right(read_json(output), right)
    assert "305 rows, 5 of them with an error" in (tmp_path / "log").read_text()

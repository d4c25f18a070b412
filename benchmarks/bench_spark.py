"""Measure deploy/spark against deploy/predictor/infer.py on the same rows and cores, and one executor against two.

    python benchmarks/bench_spark.py --kuake_dir KUAKE_QIC --vocab vocab.txt
    python benchmarks/bench_spark.py --kuake_dir KUAKE_QIC --vocab vocab.txt --shape tiny --rows 10000000 --settings local

The model has random weights; the rows are KUAKE-QIC's texts again and again in an order drawn by a fixed seed, with an id, in a
Parquet file. Times are those of whole processes, the start of Python, Java and Spark included. Memory is that of the largest
Python process. Needs the environment .venv-spark (deploy/spark/README.md).
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from measuring import CORES, ROOT, SHAPES, TINY, add_kuake_options, kuake_job, make_model, print_setting, start, work
from predictor_part import export

SHAPES["tiny"] = TINY
SPARK = {"local": f"local[{CORES}]", "1 executor": "local-cluster[1,1,1024]", "2 executors": "local-cluster[2,1,1024]"}
SETTINGS = ["infer.py", *SPARK]
BLOCK = 100_000  # rows that are written at a time
PACKAGE = "import pyspark, os; print(os.path.dirname(pyspark.__file__))"


def write_input(path, texts, rows):
    """Write a Parquet file of id and text."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    generator, names = random.Random(1), ["id", "text"]
    with ParquetWriter(path, pyarrow.schema([("id", pyarrow.int64()), ("text", pyarrow.string())])) as writer:
        for first in range(0, rows, BLOCK):
            ids = range(first, min(first + BLOCK, rows))
            writer.write_batch(pyarrow.record_batch([pyarrow.array(ids), generator.choices(texts, k=len(ids))], names=names))


def peak_of(pid):
    """Peak memory of the largest Python process below a process, in MB: a dict that grows until its "stop" is set."""
    found = {"peak": 0.0, "stop": False}

    def watch():
        while not found["stop"]:
            below = {pid}
            stats = sorted(int(name) for name in os.listdir("/proc") if name.isdecimal())
            for child in stats:  # a child has nearly always the greater number
                try:
                    with open(f"/proc/{child}/status", encoding="utf-8") as file:
                        status = dict(line.split(":", 1) for line in file)
                except (OSError, ValueError):
                    continue
                if child in below or int(status["PPid"]) in below:
                    below.add(child)
                    if status["Name"].strip().startswith("python") and "VmHWM" in status:
                        found["peak"] = max(found["peak"], int(status["VmHWM"].split()[0]) / 1024)
            time.sleep(1)

    threading.Thread(target=watch, daemon=True).start()
    return found


def measure(setting, args, folder):
    """Label all rows. Returns (seconds, MB)."""
    output = folder / "answers"
    shutil.rmtree(output, ignore_errors=True)
    common = ["--model_path_prefix", folder / "export", "--text_column", "text"]
    env = dict(os.environ, SPARK_LOCAL_IP="127.0.0.1", SPARK_LOCAL_HOSTNAME="127.0.0.1")
    if setting == "infer.py":
        output.mkdir()
        command = [sys.executable, "deploy/predictor/infer.py", *common, "--dataset_dir", folder, "--data_file", "rows.parquet",
                   "--output_file", output / "answers.parquet", "--output_format", "parquet"]
    else:
        env["SPARK_HOME"] = subprocess.check_output([args.spark_python, "-c", PACKAGE], text=True).strip()
        env["PYSPARK_SUBMIT_ARGS"] = f"--master {SPARK[setting]} --conf spark.ui.enabled=false pyspark-shell"
        command = [args.spark_python, "deploy/spark/spark_infer.py", *common, "--input", folder / "rows.parquet", "--output",
                   output, "--partitions", str(4 * CORES)]
    begun = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True)
    memory = peak_of(process.pid)
    said = process.communicate()[1]
    seconds, memory["stop"] = time.perf_counter() - begun, True
    if process.returncode:
        sys.exit(f"{said[-3000:]}\n{setting}: failed with code {process.returncode}")
    return seconds, memory["peak"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add_kuake_options(parser)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--shape", default="nano", choices=list(SHAPES))
    parser.add_argument("--settings", nargs="+", default=SETTINGS, choices=SETTINGS)
    parser.add_argument("--repeats", type=int, default=1, help="rounds of all settings; the best of each counts")
    parser.add_argument("--spark_python", default=f"{ROOT}/.venv-spark/bin/python")
    args = parser.parse_args()
    job = kuake_job(parser, args)
    with tempfile.TemporaryDirectory() as folder:
        work(make_model, {**job, "folder": folder, "shape": args.shape})
        work(export, {**job, "folder": folder})
        write_input(Path(folder) / "rows.parquet", job["texts"] + job["dev"], args.rows)
        found = {setting: [] for setting in args.settings}
        for _ in range(args.repeats):
            for setting, measured in found.items():
                measured.append(measure(setting, args, Path(folder)))
                print(f"{setting}: {measured[-1][0]:.1f} s", file=sys.stderr, flush=True)
    print_setting([sys.executable])
    print(f"{args.rows} rows, {args.shape}     seconds     rows/s     MB of a Python process")
    for setting, measured in found.items():
        seconds, memory = map(min, zip(*measured))
        print(f"{setting:24}{seconds:9.1f}{args.rows / seconds:11.0f}{memory:11.0f}")


if __name__ == "__main__":
    start(main)

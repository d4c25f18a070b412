"""Measure what data/table.py and analysis/evaluate.py take for files of many rows: seconds, those of the CPU, memory at its peak.

    python benchmarks/bench_large_files.py --kuake_dir KUAKE_QIC --vocab vocab.txt --rows 1000000 10000000
    python benchmarks/bench_large_files.py --kuake_dir KUAKE_QIC --vocab vocab.txt --rows 1000000 --root ../earlier

The rows are KUAKE-QIC's training rows again and again, each with its number behind the text, so that no text comes twice.
table.py reads them from a CSV and a Parquet file; evaluate.py has them as train.txt, every tenth of them as dev.txt, and a small
model of random weights. Each command is a process of its own.
"""

import argparse
import csv
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import ROOT, SHAPES, TINY, add_kuake_options, kuake_job, make_model, print_setting, start, work

SHAPES["tiny"] = TINY
FORMS = ("csv", "parquet", "evaluate")


def numbered_rows(job, step=1):
    """Yield [text, label] of every step-th row."""
    texts, labels = job["texts"], [job["labels"][label_id] for label_id in job["label_ids"]]
    for number in range(0, job["rows"], step):
        yield [f"{texts[number % len(texts)]} {number}", labels[number % len(texts)]]


def write_input(job):
    """Write the files that a command reads. Worker."""
    folder = Path(job["folder"])
    if job["form"] == "parquet":
        from textcls.data.parquet import new_parquet

        with new_parquet(str(folder / "table.parquet"), {"text": str, "label": str}) as output:
            output.writerows(numbered_rows(job))
    elif job["form"] == "csv":
        with open(folder / "table.csv", "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([["text", "label"]])
            csv.writer(file).writerows(numbered_rows(job))
    else:
        for name, step in (("train.txt", 1), ("dev.txt", 10)):
            with open(folder / name, "w", encoding="utf-8", newline="\n") as file:
                file.writelines(f"{text}\t{label}\n" for text, label in numbered_rows(job, step))
        with open(folder / "label.txt", "w", encoding="utf-8") as file:
            file.writelines(f"{label}\n" for label in job["labels"])


def run_command(job):
    """Run a command as a user would. Worker."""
    if job["form"] == "evaluate":
        words = ["analysis/evaluate.py", "--device", "cpu", "--dataset_dir", job["folder"], "--params_path", job["model"],
                 "--bad_case_file", f"{job['folder']}/bad_case.txt"]
    else:
        words = ["data/table.py", "--table_file", f"{job['folder']}/table.{job['form']}", "--save_dir", f"{job['folder']}/out"]
    begin = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=job["root"], env={**os.environ, "PYTHONPATH": job["root"]}, check=True)
    seconds, usage = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_kuake_options(parser)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--root", default=str(ROOT), help="folder of the version of this project that is measured")
    args = parser.parse_args()
    job = {**kuake_job(parser, args), "root": str(Path(args.root).resolve()), "shape": "tiny"}
    print_setting([sys.executable])
    print("\nrows\tinput\tseconds\tCPU seconds\tpeak MB")
    for rows in args.rows:
        for form in args.forms:
            with tempfile.TemporaryDirectory(prefix="large-files-") as folder:
                job.update(rows=rows, form=form, folder=folder, model=f"{folder}/model")
                work(write_input, job)
                if form == "evaluate":
                    Path(job["model"]).mkdir()
                    work(make_model, {**job, "folder": job["model"]})
                found = work(run_command, job)
                print(f"{rows}\t{form}\t{found['seconds']:.0f}\t{found['cpu_seconds']:.0f}\t{found['peak_gb'] * 1000:.0f}",
                      flush=True)


if __name__ == "__main__":
    start(main)

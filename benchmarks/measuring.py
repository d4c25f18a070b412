"""What the benchmarks share: workers in processes of their own that take turns, the setting, shapes, models, data.

A worker is a function of one dictionary, its job, that returns a dictionary of figures or None; both travel as JSON. A script
ends in start(main), and `work` or a `Turns` gives its workers, or those of a module beside it, a new process each. Importing
this file takes the standard library alone, since workers also run in the environments of PyTorch and of the servers.
"""

import argparse
import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Optional

ROOT = Path(__file__).resolve().parent.parent
CORES = len(os.sched_getaffinity(0))
FILES = ("train.txt", "dev.txt", "label.txt")
SHAPES = {
    "nano": {"num_hidden_layers": 4, "hidden_size": 312, "num_attention_heads": 12, "intermediate_size": 1248},
    "medium": {"num_hidden_layers": 6, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}}
TINY = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
SIZES = {"vocab_size": 40000, "max_position_embeddings": 2048, "type_vocab_size": 4}  # dropout is 0.1 unless given
BATCH, MAX_LENGTH, SEED, WARM_UP = 32, 128, 1, 3

Job = dict[str, Any]
Worker = Callable[[Job], Optional[Job]]


def start(main: Callable[[], None]) -> None:
    """Run the script's main, or in a process that `work` has started the worker that it names."""
    if sys.argv[1:2] != ["worker"]:
        return main()
    module, name, path = sys.argv[2:]
    job = read_json(path)
    result = getattr(importlib.import_module(module), name)(job) or {}
    if os.environ.get("PADDLE_TRAINER_ID", "0") == "0":
        usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        result["peak_gb"] = max(usage.ru_maxrss for usage in usages) * 1024 / 1e9
        write_json(job["result"], result)


def work(worker: Worker, job: Job, **changes: Any) -> Job:
    """Run a worker on a job with changes in a new process, without the user's thread settings. Returns its figures, with the peak
    memory of the process or one that it has run (peak_gb), and the cores that other processes took meanwhile (foreign_cores),
    without those of a server that it asks (its result server_seconds).

    Of the job: folder holds the worker's files; python is another interpreter; ranks is the number of processes.
    """
    job = {**job, **changes, "result": os.path.join(job["folder"], "result.json")}
    path, ranks, name = os.path.join(job["folder"], "job.json"), job.get("ranks", 1), worker.__name__
    write_json(path, job)
    command = [job.get("python", sys.executable)]
    if ranks > 1:
        command += f"-m paddle.distributed.launch --nproc_per_node {ranks} --backend gloo --log_dir log".split()
    script = os.path.abspath(sys.argv[0])
    env = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "MKL_DEBUG_CPU_TYPE")}
    begin, foreign = time.perf_counter(), foreign_seconds()
    done = subprocess.run([*command, script, "worker", worker.__module__, name, path], env=env, text=True, cwd=job["folder"],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace")
    if done.returncode:
        sys.exit(f"{done.stdout[-5000:]}\n{os.path.basename(script)}: the worker {name} failed with code {done.returncode}")
    result = read_json(job["result"])
    others = foreign_seconds() - foreign - result.pop("server_seconds", 0)
    result["foreign_cores"] = max(0, others) / (time.perf_counter() - begin)
    words = [job[key] for key in ("shape", "variant", "exported") if key in job]
    print(name, *words, f"{ranks} process(es):", *(f"{key} {value:.4g}" for key, value in result.items() if key != "ops"),
          file=sys.stderr, flush=True)
    return result


def foreign_seconds() -> float:
    """CPU seconds that this machine has spent on everything but finished workers."""
    with open("/proc/stat", encoding="utf-8") as file:
        user, nice, system, _, _, *rest = map(int, file.readline().split()[1:9])  # without idle and iowait
    times = os.times()
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK") - times.children_user - times.children_system


class Turns:
    """Measurements whose variants take turns (A B C A B C ...), and how much other processes disturbed them."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.foreign_cores: list[float] = []  # of the quietest repeat of the most disturbed variant, for each measurement

    def rounds(self, worker: Worker, job: Job, *variants: Job) -> list[list[Job]]:
        """Run a worker on variants of a job: for each repeat the figures of each variant.

        variants: changes of the job; "worker" there is another worker, and {} are the figures where "python" is None.
        """
        found = [[{} if changes.get("python", "") is None else
                  work(changes.get("worker", worker), job, **{key: value for key, value in changes.items() if key != "worker"})
                  for changes in variants] for _ in range(self.repeats)]
        self.foreign_cores.append(max(min(figures.get("foreign_cores", 0) for figures in repeats) for repeats in zip(*found)))
        return found

    def best(self, worker: Worker, job: Job, *variants: Job) -> list[Job]:
        """As `rounds`, but for each variant the smallest of each figure."""
        return [{key: min(figures[key] for figures in repeats) for key in repeats[0]}
                for repeats in zip(*self.rounds(worker, job, *variants))]

    def quiet_note(self) -> str:
        most = max(self.foreign_cores, default=0)
        quiet = "quiet enough" if most <= 0.1 else "DISTURBED, the ratios must not be quoted"
        return f"other processes took {most:.2f} cores in the quietest repeats: {quiet}"


def print_setting(pythons: Iterable[str]) -> None:
    """Print the command, the machine, and the versions of what the Pythons have."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        cpu = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "unknown CPU")
    print(f"\ncommand   {' '.join(sys.argv)}\nmachine   {cpu}, {CORES} cores")
    for python in pythons:
        freeze = subprocess.run([python, "-m", "pip", "freeze"], stdout=subprocess.PIPE, text=True).stdout
        names = ("paddlepaddle", "paddlenlp", "torch==", "transformers", "accelerate", "tokenizers", "numpy", "onnxruntime")
        print("versions ", *(line for line in freeze.splitlines() if line.startswith(names)))


def read_json(path: str) -> Any:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def write_json(path: str, content: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, default=str)


def read_rows(path: str) -> list[list[str]]:
    """The columns of each line of a data file."""
    with open(path, encoding="utf-8", newline="\n") as file:
        return [line.rstrip("\r\n").split("\t") for line in file]


def add_kuake_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kuake_dir", default=os.environ.get("KUAKE_QIC_DIR"), help="default: KUAKE_QIC_DIR")
    parser.add_argument("--vocab", default=os.environ.get("ERNIE_VOCAB", f"{ROOT}/data/vocab.txt"), help="ERNIE_VOCAB")


def kuake_job(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Job:
    """KUAKE-QIC for jobs: labels, the training texts and their label ids, the dev texts; and vocab."""
    paths = [os.path.join(args.kuake_dir or "KUAKE_QIC_DIR", name) for name in FILES]
    for path in [*paths, args.vocab]:
        if not os.path.isfile(path):
            parser.error(f"{path}: not found, expected KUAKE-QIC's folder as --kuake_dir or KUAKE_QIC_DIR ("
                         f"{', '.join(FILES)}), and a vocab.txt as --vocab or ERNIE_VOCAB")
    train, dev, labels = map(read_rows, paths)
    ids = {name: number for number, (name, *_) in enumerate(labels)}
    return {"labels": list(ids), "texts": [row[0] for row in train], "label_ids": [ids[row[1]] for row in train],
            "dev": [row[0] for row in dev], "vocab": os.path.abspath(args.vocab)}


def make_model(job: Job) -> None:
    """Write config.json, vocab.txt and seeded random weights into job["folder"]. Worker; job["head"] is PaddleNLP's class."""
    from textcls.models.paddle_setup import paddle

    from paddlenlp import transformers
    paddle.set_device("cpu")
    paddle.seed(SEED)
    getattr(transformers, job.get("head", "ErnieForSequenceClassification"))(transformers.ErnieConfig(
        task_type_vocab_size=3, use_task_id=True, id2label=dict(enumerate(job["labels"])),
        initializer_range=0.1,  # five times the usual: else nearly all texts get the same class
        **SHAPES[job["shape"]], **SIZES)).save_pretrained(job["folder"])
    shutil.copyfile(job["vocab"], os.path.join(job["folder"], "vocab.txt"))


def make_random(folder: Path, shape: str) -> None:
    """Make a model folder of one of SHAPES without weights, so that they are random, with the vocabulary of data/."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**read_json(ROOT / "data/config.json"), **SHAPES[shape], "vocab_size": SIZES["vocab_size"]}
    write_json(folder / "config.json", config)
    shutil.copyfile(ROOT / "data/vocab.txt", folder / "vocab.txt")

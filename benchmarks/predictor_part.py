"""The part `predictor` of bench.py: deploy/predictor against ONNX Runtime itself and the earlier application's way."""

import os
import subprocess
import sys
import time

from measuring import BATCH, CORES, MAX_LENGTH, ROOT, WARM_UP, work


def export(job):
    """Export job["folder"] with --onnx into its folder job["exported"]."""
    output = os.path.join(job["folder"], job.get("exported", "export"))
    command = [sys.executable, "export_model.py", "--params_path", job["folder"], "--output_path", output]
    subprocess.run([*command, "--onnx"], cwd=ROOT, check=True)


def export_half(job):
    """Export job["folder"] pruned to the width 1/2, its weights not trained: only their number matters here."""
    from textcls.export.deployment import write_deployment
    from textcls.models.checkpoints import load_checkpoint
    from textcls.models.device import select_device
    from textcls.training.compression import narrowed
    select_device("cpu")
    checkpoint, folder = load_checkpoint(job["folder"]), os.path.join(job["folder"], "half")
    os.mkdir(folder)
    model = narrowed(checkpoint.model, 0.5)
    model.eval()
    write_deployment(checkpoint._replace(model=model), folder, "pruned_model", with_onnx=True)


def load_predictor(job):
    """The Predictor of the exported folder, or of the one that job["exported"] names; with job["dtype"] in that scheme, with
    job["threads"] on so many threads."""
    from textcls.runtime.predictor import Predictor
    folder = os.path.join(job["folder"], job.get("exported", "export"))
    return Predictor(folder, dtype=job.get("dtype", "fp32"), num_threads=job.get("threads"))


def serving(job):
    """ms per text of job["dev"] by deploy/predictor."""
    predictor = load_predictor(job)
    predictor(job["dev"][:WARM_UP * BATCH])
    start = time.perf_counter()
    predictor(job["dev"])
    return {"ms": (time.perf_counter() - start) * 1000 / len(job["dev"])}


def ready_made(job):
    """ms per text of ONNX Runtime alone, on batches by length that have been made before."""
    import numpy as np
    import onnxruntime

    import utils
    rows = load_predictor(job).tokenize(job["dev"])
    batches = [utils.pad_batch([rows[index] for index in indices], 0)
               for indices in utils.sorted_batches([len(row) for row in rows], BATCH)]
    return {"ms": run_batches(onnxruntime, os.path.join(job["folder"], "export", "float32.onnx"),
                              [{"input_ids": batch, "token_type_ids": np.zeros_like(batch)} for batch in batches])}


def earlier(job):
    """ms per text of the earlier application's way, tokenization included, on every job["stride"]-th batch."""
    import numpy as np
    import onnxruntime

    import textcls.models.paddle_setup  # noqa: F401  else Paddle may crash

    import paddle2onnx
    from paddlenlp.transformers import ErnieTokenizer
    prefix = os.path.join(job["folder"], "export", "float32")
    paddle2onnx.export(f"{prefix}.pdmodel", f"{prefix}.pdiparams", f"{job['folder']}/earlier.onnx", opset_version=13)
    tokenizer = ErnieTokenizer.from_pretrained(job["folder"])
    start = time.perf_counter()
    rows = tokenizer(job["dev"], max_length=MAX_LENGTH, truncation=True, padding=True)  # to the longest of all
    tokenized = (time.perf_counter() - start) * 1000 / len(job["dev"])
    feeds = [{name: np.array(rows[name][first:first + BATCH]) for name in ("input_ids", "token_type_ids")}
             for first in range(0, len(job["dev"]), BATCH * job["stride"])]
    return {"ms": tokenized + run_batches(onnxruntime, f"{job['folder']}/earlier.onnx", feeds)}


def run_batches(onnxruntime, path, feeds):
    """ms per text of an ONNX model by ONNX Runtime with a thread per core."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = CORES
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for feed in feeds[:WARM_UP]:
        session.run(None, feed)
    start = time.perf_counter()
    for feed in feeds:
        session.run(None, feed)
    return (time.perf_counter() - start) * 1000 / sum(len(feed["input_ids"]) for feed in feeds)


def cold_start(job):
    """Seconds from the start of this process to the first label, and whether Paddle is in its memory then."""
    load_predictor(job)(job["dev"][:1])
    with open("/proc/uptime", encoding="utf-8") as uptime, open("/proc/self/stat", encoding="utf-8") as stat:
        started = int(stat.read().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
        seconds = float(uptime.read().split()[0]) - started
    with open("/proc/self/maps", encoding="utf-8") as maps:
        return {"seconds": seconds, "paddle": int("libpaddle" in maps.read())}


def measure_predictor(turns, report, job):
    """deploy/predictor and the others on one shape."""
    shape = job["shape"]
    stride = 6 if shape == "medium" else 1  # padded to the longest, Medium is slow
    work(export, job)
    work(export_half, job)
    own, ready, old, half, one, int8, cold = turns.best(
        serving, job, {}, {"worker": ready_made}, {"worker": earlier, "stride": stride}, {"exported": "half"},
        {"threads": 1}, {"threads": 1, "dtype": "int8"}, {"worker": cold_start})
    report.ratios += [
        [f"{shape}: ONNX Runtime alone, ready-made batches", ready["ms"], own["ms"], 0.9],
        [f"{shape}: the earlier application's way", old["ms"], own["ms"], 8 if shape == "nano" else 6],
        [f"{shape}: INT8 against fp32, one thread", one["ms"], int8["ms"], 1.7],
        [f"{shape}: pruned to 1/2 against unpruned", own["ms"], half["ms"], 1.5]]
    report.notes.append(f"{shape}: cold start to the first label {cold['seconds']:.2f} s, "
                        f"{'WITH' if cold['paddle'] else 'no'} Paddle in memory")

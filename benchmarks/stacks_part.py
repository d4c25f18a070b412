"""The part `stacks` of bench.py: this suite in this environment and in another one, which has the other Paddle."""

import os

from core_part import agreement, evaluation, training
from measuring import work
from predictor_part import export, serving


def measure_stacks(turns, report, job, other_python):
    """Training, evaluation and deploy/predictor of one shape in both; each predictor runs what its own environment exported."""
    shape, job = job["shape"], {**job, "variant": "suite"}
    own, other = {"exported": "export"}, {"exported": "export-other", "python": os.path.abspath(other_python)}
    for environment in (own, other):
        work(export, job, **environment)
    for what, worker, changes in (("training", training, {}), ("training in two processes", training, {"ranks": 2}),
                                  ("evaluation", evaluation, {}), ("deploy/predictor", serving, {}),
                                  ("deploy/predictor, one thread, INT8", serving, {"threads": 1, "dtype": "int8"})):
        best = turns.best(worker, job, {**own, **changes}, {**other, **changes})
        report.stacks.append([f"{shape}: {what}", *(figures["ms"] for figures in best)])
    equal, difference, *_ = agreement(job, "export", "export-other")
    report.notes.append(f"{shape}: {equal} of {len(job['dev'])} predictions equal, logits differ by up to {difference:.1e}")

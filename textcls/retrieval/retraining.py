"""Parts of `index.py retrain`: the data files with the changes of an index, the scripts that it starts, figures on dev texts.

leave_out.py trains by the same parts.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from textcls.common.errors import Problems, UserError
from textcls.common.log import NESTED
from textcls.common.outputs import complete_file
from textcls.data.files import read_label_words, read_labelled
from textcls.retrieval.encoder import TextEncoder, for_queries
from textcls.retrieval.index import SearchIndex, label_word
from textcls.retrieval.nearest import TYPES
from textcls.retrieval.pending import Change, DataFiles, Pending, Row, name_rows, names_to_come, write_data_files
from textcls.retrieval.search import chunks, label_probabilities

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("label.txt", "train.txt", "dev.txt")
OWN_OPTIONS = ("--model_name_or_path", "--init_from_ckpt", "--data_dir", "--train_set_file", "--similar_text_pair_file",
               "--similar_text_pair", "--corpus_file", "--output_dir", "--save_dir")  # of train.py, which its callers give it
AS_IT_WAS = (", and the index is as it was; the data files hold what was added, and the same command with another --output_dir "
             "goes on")  # where retrain fails


def read_data_files(folder: str, pending: Pending) -> DataFiles:
    """Read label.txt, train.txt and dev.txt. UserError with all problems."""
    problems = Problems()
    label_path, *paths = (os.path.join(folder, name) for name in NAMES)
    words = read_label_words(label_path, problems)
    labels = [] if problems.count else [*words, *names_to_come(pending, words)]
    train, dev = (read_labelled(path, labels, problems, label_path) for path in paths)
    problems.report()
    return DataFiles({label: [word for word in own if word != label_word(label)] for label, own in words.items()},
                     name_rows(train, labels), name_rows(dev, labels))


def replace_data_files(folder: str, data: DataFiles, old: DataFiles, changes: list[Change], output_dir: str) -> None:
    """Write data in place of old, the files of a folder, after output_dir/before/ has these and output_dir/changes.txt says what
    is changed: lines `<change><tab><label><tab><text>`."""
    before = os.path.join(output_dir, "before")
    os.makedirs(before)
    for name in NAMES:
        shutil.copyfile(os.path.join(folder, name), os.path.join(before, name))
    with complete_file(os.path.join(output_dir, "changes.txt"), newline="\n") as file:
        file.writelines("\t".join(change) + "\n" for change in changes)
    write_data_files(folder, data, old)


def check_train_options(words: list[str], caller: str) -> None:
    """UserError where options of train.py are among those that its caller gives it."""
    if own := [word for word in words if word.partition("=")[0] in OWN_OPTIONS]:
        raise UserError(f"--train_options {own[0]}: {caller} gives train.py its data, encoder and output folder itself, expected "
                        "other options of it")


def run_retrieval_script(script: str, *options: object, where: str = "") -> None:
    """Run a script of retrieval_based/, its messages among those of this process. UserError where it fails.

    where: what the message says of where the work stands then.
    """
    command = [sys.executable, str(ROOT / "retrieval_based" / script), *map(str, options)]
    code = subprocess.run(command, env={**os.environ, NESTED: "1"}).returncode
    if code:
        raise UserError(f"retrieval_based/{script} ended with code {code}, expected 0: its message is above{where}")


def build_options(header: dict) -> list[object]:
    """The options of build_index.py by which an index is made anew of the same kind. header: its index.json."""
    options = ["--corpus", header["corpus"], "--dtype", header["dtype"], "--query_prefix", header["prefixes"]["query"],
               "--text_prefix", header["prefixes"]["text"]]
    if header["known"] and "unknown_share" in header["known"]:  # else of an earlier edition
        options += ["--unknown_share", header["known"]["unknown_share"]]
    if header["head"] and "new_label_cost" in header["head"]:
        options += ["--new_label_cost", header["head"]["new_label_cost"]]
    for name in TYPES:
        if header[name]:
            options += [f"--{name}", "on", f"--{name}_m", header[name]["connectivity"], f"--{name}_ef", header[name]["expansion"]]
    return options


def find_right(index: SearchIndex, encoder: TextEncoder, rows: list[Row]) -> np.ndarray:
    """Tell of each labelled text whether an index answers it rightly: bool [num_rows]."""
    texts = [text for text, _ in rows]
    vectors = for_queries(encoder, index.header).encode(texts)
    guesses = np.concatenate([label_probabilities(index, vectors[chunk], texts[chunk]).argmax(axis=1)
                              for chunk in chunks(index, len(texts))])
    return np.array([index.labels[guess] == label for guess, (_, label) in zip(guesses, rows)])


def compare(before: np.ndarray, after: np.ndarray, is_changed: np.ndarray) -> str:
    """A table of accuracies. All: bool [num_rows], is_changed: whether index.py has added texts to the row's label."""
    groups = [("all", np.ones(len(before), bool))]
    if is_changed.any() and not is_changed.all():
        groups += [("of labels that texts were added to", is_changed), ("of the others", ~is_changed)]
    lines = [f"{'accuracy on dev.txt':44}{'texts':>8}{'before':>12}{'after':>12}"]
    for name, rows in groups:
        shares = [f"{100 * right[rows].mean():.2f} %" for right in (before, after)]
        lines.append(f"{name:44}{rows.sum():8}{shares[0]:>12}{shares[1]:>12}")
    return "\n".join(lines)

"""Answers of a long run in whole parts beside its output, so that a run that was interrupted goes on behind the last of them.

    output.txt.parts/run.json      what the answers depend on: input, model, options
    output.txt.parts/part-00000    the rows of a chunk of texts, one JSON value per line
    output.txt.parts/SHA256SUMS    the parts that are whole, in their order, as sha256sum writes it
"""

import argparse
import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from textcls.common.digests import content_id, file_id, sha256
from textcls.common.errors import UserError
from textcls.common.log import get_logger
from textcls.common.outputs import complete_file, lock_folder, named_in_errors
from textcls.data.files import read_json

RUN, SUMS = "run.json", "SHA256SUMS"
CONVERTED = re.compile(r".+\.[a-z]+[0-9]+-v[0-9]+-[0-9a-f]{12}\.onnx")  # of converted_path in textcls/runtime/converted.py
# options that say where something is, which its content tells better, or how far the work has got
PLACES = ("dataset_dir", "data_file", "label_file", "output_file", "params_path", "model_path_prefix", "index_dir", "resume")


def parts_folder(output_file: str) -> str:
    """Return the folder of the parts of an output."""
    return f"{output_file}.parts"


def describe_run(args: argparse.Namespace, path: str, models: Sequence[str]) -> dict[str, Any]:
    """Return what the answers depend on, as JSON. path: of the texts; models: folders, or names of models that are no folders."""
    options = {name: value for name, value in sorted(vars(args).items()) if name not in PLACES}
    return {"input": f"{os.path.getsize(path)} bytes, SHA-256 {file_id(path)}", "model": " ".join(map(hash_files, models)),
            "options": options}


def hash_files(folder: str) -> str:
    """Return 16 digits that tell the files in a folder from others; what is no folder stands for itself. Hidden files do not
    count, nor do converted models, which come of the others and are written by any run that wants one.
    """
    if not os.path.isdir(folder):
        return folder
    names = [name for name in sorted(os.listdir(folder))
             if name[0] != "." and not CONVERTED.fullmatch(name) and os.path.isfile(os.path.join(folder, name))]
    lines = "".join(f"{sha256(os.path.join(folder, name))}  {name}\n" for name in names)
    return content_id(lines.encode("utf-8", "surrogateescape"))


@contextlib.contextmanager
def open_parts(output_file: str, run: dict[str, Any]) -> Iterator["Parts"]:
    """Open the Parts of an output, which no other run may have open."""
    folder = parts_folder(output_file)
    handle = lock_folder(folder, "--output_file")
    try:
        yield Parts(folder, run)
    finally:
        if handle is not None:
            os.close(handle)


class Parts:
    """The parts of one run. folder: of `parts_folder`; run: of `describe_run`. UserError where it holds those of another run.

    count: how many are whole; those after the first that is not are made anew.
    """

    def __init__(self, folder: str, run: dict[str, Any]):
        self.folder = folder
        if os.path.exists(self.path(RUN)):
            check_run(folder, read_json(self.path(RUN)), run)
        elif [name for name in os.listdir(folder) if name[0] != "."]:
            raise UserError(f"--resume: {folder} holds no {RUN}, expected the folder of an earlier run, or none")
        else:
            with complete_file(self.path(RUN)) as output:
                json.dump(run, output, ensure_ascii=False, indent=1)
        for name in os.listdir(folder):
            if name.endswith(".part"):  # left by a process that was killed
                os.remove(self.path(name))
        sums = self.whole_parts()
        self.count = len(sums)
        with complete_file(self.path(SUMS)) as output:
            output.writelines(sums)

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def whole_parts(self) -> list[str]:
        """Return the lines of SUMS as far as the parts are what they say."""
        sums: list[str] = []
        if not os.path.exists(self.path(SUMS)):
            return sums
        with open(self.path(SUMS), encoding="utf-8", errors="replace") as file:
            for line in file:
                path = self.path(part_name(len(sums)))
                if not os.path.isfile(path) or line != sum_line(path):
                    get_logger().warning(f"--resume: {path} is missing or not whole: it and those after it are made anew.")
                    break
                sums.append(line)
        return sums

    def add(self, rows: Iterable[Any]) -> None:
        """Write the rows of the next chunk as a part."""
        path = self.path(part_name(self.count))
        with complete_file(path, newline="\n") as output:
            output.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with named_in_errors(self.path(SUMS)), open(self.path(SUMS), "a", encoding="utf-8") as sums:
            sums.write(sum_line(path))
        self.count += 1

    def rows(self) -> Iterator[Any]:
        """Yield the rows of all parts."""
        for number in range(self.count):
            with open(self.path(part_name(number)), encoding="utf-8", newline="\n") as file:
                yield from map(json.loads, file)

    def remove(self) -> None:
        """Remove the folder, when its rows are in the output."""
        shutil.rmtree(self.folder)


def part_name(number: int) -> str:
    return f"part-{number:05}"


def sum_line(path: str) -> str:
    """Return the line of SUMS for a part."""
    return f"{sha256(path)}  {os.path.basename(path)}\n"


def check_run(folder: str, earlier: dict[str, Any], run: dict[str, Any]) -> None:
    """Raise UserError where the parts in a folder are those of a run with another input, model or options."""
    wanted = "expected what it had, or that folder removed to begin anew"
    for name in ("input", "model"):
        before, now = earlier.get(name), run[name]
        if before != now:
            raise UserError(f"--resume: {folder} is of a run with another {name} ({before}; now {now}), {wanted}")
    options = earlier.get("options")
    options = options if isinstance(options, dict) else {}
    for name in sorted({*options, *run["options"]}):
        before, now = options.get(name), run["options"].get(name)
        if before != now:
            raise UserError(f"--resume: {folder} is of a run with --{name} {before}, now {now}, {wanted}")

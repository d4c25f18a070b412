"""What the scripts share and needs no Paddle: process set-up, errors, the data contract, outputs, batching.

Import this module before `paddle`: importing it prepares the process (see `prepare_process`). What needs Paddle stands in
modeling.py; this module stays free of it, so that tools which only read data, and deployments, can use it.
"""

import argparse
import array
import contextlib
import ctypes
import difflib
import errno
import json
import os
import shutil
import signal
import sys
import tempfile

import numpy as np

MAX_REPORTED = 20  # problems printed in full; the rest are only counted
DATA_FILES = ("train.txt", "dev.txt", "test.txt", "label.txt", "data.txt")  # no script may overwrite these
TOKENIZE_CHUNK = 8192  # texts handed to the Rust tokenizer at once: bounds memory, keeps both cores busy


# ---------------------------------------------------------------- process set-up


def prepare_process():
    """Set what Paddle 2.6.2 needs before its first import; values that the user has set are left alone.

    - zlib: libpaddle.so exports its own zlib symbols; where Python's zlib is a shared extension, decompression then
      crashes (segfault in inflateReset2). Loading the system library first cures it. Linux only.
    - OMP_NUM_THREADS: Paddle sets 1 unless it is set. All usable cores, shared out between the ranks of this machine.
    - MKL_DEBUG_CPU_TYPE: the bundled MKL takes its slowest path on AMD CPUs; 5 selects AVX2, 7 AVX-512.
    All three can go when Paddle no longer bundles zlib and MKL 2019.
    """
    if "paddle" in sys.modules:
        return  # too late to change anything
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError):
            ctypes.CDLL("libz.so.1", mode=ctypes.RTLD_GLOBAL)
    ranks = int(os.environ.get("PADDLE_LOCAL_SIZE", 1))
    if "OMP_NUM_THREADS" not in (_launcher_environ() if "PADDLE_LOCAL_SIZE" in os.environ else os.environ):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        os.environ["OMP_NUM_THREADS"] = str(max(1, cores // ranks))
    with contextlib.suppress(OSError):
        with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
            cpu = cpuinfo.read(4096)
        if "AuthenticAMD" in cpu and "avx2" in cpu:
            os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "7" if "avx512bw" in cpu else "5")


def _launcher_environ():
    """Environment that `paddle.distributed.launch` was started with: its own import of Paddle sets OMP_NUM_THREADS=1
    for the ranks, which must not be mistaken for the user's choice."""
    try:
        with open(f"/proc/{os.getppid()}/environ", "rb") as environ:
            return {entry.split(b"=", 1)[0].decode("utf-8", "replace") for entry in environ.read().split(b"\0")}
    except OSError:
        return os.environ


prepare_process()


def is_main_rank():
    """True in a single process and in rank 0 of `paddle.distributed.launch`."""
    return os.environ.get("PADDLE_TRAINER_ID", "0") == "0"


# ---------------------------------------------------------------- errors


class UserError(Exception):
    """Something the user can mend. Printed without a traceback; the exit code is 2."""


def run_script(main):
    """Run a script's main(): UserError is printed and ends the process with code 2, Ctrl-C with 130.

    SIGTERM ends it as an exception would, so that unfinished files are removed.
    """
    exit_on_sigterm()
    try:
        main()
    except UserError as error:
        if is_main_rank():
            print(error, file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        os._exit(1)  # the reader of our output has gone; anything more to write would fail again
    except MemoryError as error:
        print(f"out of memory ({error}), expected a smaller model, fewer texts at once or more memory", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # disk full, no permission, a folder in place of a file
        full = error.errno == errno.ENOSPC  # of a copy it is the second file that cannot be written
        place = full and error.filename2 or error.filename or "writing failed"
        print(f"{place}: {error.strerror or error}, expected a file that can be read or written and free space", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
    if int(os.environ.get("PADDLE_TRAINERS_NUM", 1)) > 1:
        # Paddle 2.6.2 with gloo now and then crashes while a rank that has done its work shuts down: skip that part
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def exit_on_sigterm():
    """Let SIGTERM, and SIGHUP unless nohup has it ignored, end the process as an exception would.

    To be called once more after importing Paddle, which takes SIGTERM over.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # Windows has none
        signal.signal(signal.SIGHUP, lambda *_: sys.exit(129))


def check_output(output, inputs):
    """UserError where an output file could not be written: it is a folder, in a folder that may not be written to, or is one
    of the files that are read.

    inputs: files, and folders all of whose files count.
    """
    if not output or os.path.isdir(output):
        raise UserError(f"{output or 'the output file'}: is a folder or without a name, expected the name of a file")
    folder = os.path.dirname(os.path.abspath(output))
    while not os.path.exists(folder):  # folders are made where they are missing
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{output}: cannot be written in {folder}, expected a folder with write permission")
    output, written = os.path.realpath(output), output
    for path in map(os.path.realpath, inputs):
        if output == path or (os.path.isfile(output) and os.path.dirname(output) == path):
            raise UserError(f"{written}: is an input of this run, expected another name for the output")


def check_outputs(outputs, inputs, dataset_dir):
    """As `check_output` for several output files, which may not be each other nor one of the data files in dataset_dir."""
    inputs = inputs + [os.path.join(dataset_dir, name) for name in DATA_FILES]
    for position, output in enumerate(outputs):
        check_output(output, inputs)
        if os.path.realpath(output) in map(os.path.realpath, outputs[:position]):
            raise UserError(f"{output}: named for two outputs, expected different files")


def check_output_folder(path, option):
    """UserError where the output folder that an option names could not be made: the name is empty or that of a file."""
    if not path or (os.path.exists(path) and not os.path.isdir(path)):
        raise UserError(f"{option} {path}: is no folder, expected the name of one, new or old")


def add_model_options(parser):
    """Add the options of the scripts that run a trained model on the files of a data folder."""
    parser.add_argument("--device", help="cpu, gpu, gpu:N, xpu or npu; None: the GPU if there is one, else the CPU")
    parser.add_argument("--dataset_dir", default="./data", help="folder of the data files")
    parser.add_argument("--params_path", default="./checkpoint/", help="checkpoint made by train.py")
    parser.add_argument("--max_seq_length", type=int, help="longest text in tokens; None: as in training")
    parser.add_argument("--batch_size", type=positive_int, default=32, help="texts per batch")
    parser.add_argument("--label_file", default="label.txt", help="labels in dataset_dir; must agree with the checkpoint")


def find_label_file(args):
    """Path of the label.txt to compare with the checkpoint's labels; only the default name may be missing."""
    path = os.path.join(args.dataset_dir, args.label_file)
    if args.label_file != "label.txt" and not os.path.isfile(path):
        raise UserError(f"{path}: file not found (--label_file), expected the labels of the checkpoint, one per line")
    return path


def positive_int(text):
    """Type of options that count something."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of 1 or more")
    return int(text)


def seed_number(text):
    """Type of --seed: what NumPy's generators take."""
    if not text.strip().isdecimal() or not int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, 0 to {2**32 - 1}")
    return int(text)


class Problems:
    """Collects what is wrong in the user's files, so that all of it is reported at once."""

    def __init__(self):
        self.lines, self.count, self.warnings = [], 0, []

    def add(self, path, line, wrong, expected):
        """Note `path:line: wrong, expected ...`; line is 1-based, or None for the file as a whole."""
        self.count += 1
        if self.count <= MAX_REPORTED:
            self.lines.append(f"{path}:{line}: {wrong}, expected {expected}" if line else
                              f"{path}: {wrong}, expected {expected}")

    def warn(self, path, line, wrong, expected):
        """Note something that is reported but does not stop the run."""
        self.warnings.append(f"warning: {path}:{line}: {wrong}, expected {expected}" if line else
                             f"warning: {path}: {wrong}, expected {expected}")

    def report(self):
        """Print the warnings; raise UserError if there were errors."""
        if self.warnings and is_main_rank():
            more = len(self.warnings) - MAX_REPORTED
            shown = self.warnings[:MAX_REPORTED] + ([f"... and {more} more warnings"] if more > 0 else [])
            print("\n".join(shown), file=sys.stderr)
        self.warnings = []
        if self.count:
            total = f"{self.count} problem{'s' if self.count > 1 else ''} found"
            if self.count > MAX_REPORTED:
                total += f", the first {MAX_REPORTED} are shown"
            raise UserError("\n".join(self.lines + [total + "."]))


# ---------------------------------------------------------------- the data contract


def read_lines(path, problems, stream=None):
    """Yield (line number from 1, text) for each sound line of a UTF-8 file; a BOM and CRLF are accepted.

    Only LF ends a line. Missing and empty files, invalid UTF-8 and NUL are added to `problems` (such lines are not
    yielded). `stream`: a binary stream to read instead of opening `path`, which then only names it in messages.
    """
    try:
        lines = stream if stream is not None else open(path, "rb")
    except FileNotFoundError:
        return problems.add(path, None, "file not found", "a UTF-8 text file")
    except OSError as error:
        return problems.add(path, None, f"cannot be read ({error.strerror})", "a UTF-8 text file")
    found = False
    with lines:
        for number, line in enumerate(lines, 1):
            if number == 1:
                if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                    return problems.add(path, 1, "the file is UTF-16", "UTF-8 (save it again as UTF-8)")
                line = line[3:] if line.startswith(b"\xef\xbb\xbf") else line
                if not line:
                    break  # nothing but a BOM
            found = True
            line = line[:-1] if line.endswith(b"\n") else line
            line = line[:-1] if line.endswith(b"\r") else line
            if b"\0" in line:
                problems.add(path, number, "NUL character", "text without control bytes")
                continue
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                hint = " (convert it: iconv -f GB18030 -t UTF-8)" if _decodes(line, "gb18030") else ""
                problems.add(path, number, f"invalid UTF-8 at byte {error.start + 1}", f"UTF-8 text{hint}")
    if not found:
        problems.add(path, None, "file is empty", "at least one line")


def _decodes(line, encoding):
    with contextlib.suppress(UnicodeDecodeError):
        line.decode(encoding)
        return True
    return False


def read_labels(path, problems=None):
    """Read label.txt: one label per line, line order = class id.

    Returns the list of labels. Empty, duplicate, padded and tabbed labels are problems; without a `problems` to collect
    them in, they raise UserError here.
    """
    own = problems is None
    problems = Problems() if own else problems
    before, seen = problems.count, {}
    for number, label in read_lines(path, problems):
        if not label.strip():
            problems.add(path, number, "empty label", "one label per line")
        elif "\ufeff" in label or "\u200b" in label:
            problems.add(path, number, f"label {label!r} has an invisible character", "visible characters only")
        elif label in seen:
            problems.add(path, number, f"label {label!r} again (first in line {seen[label]})", "each label once")
        elif label != label.strip() or "\t" in label:
            problems.add(path, number, f"label {label!r} has a tab or blanks around it", f"{label.strip()!r}")
        seen.setdefault(label, number)
    if problems.count == before and len(seen) < 2:
        problems.add(path, None, "only one label", "at least two labels")
    if own:
        problems.report()
    return list(seen)


def read_labelled(path, labels, problems, label_path="label.txt"):
    """Read a `<text>\\t<label>` file.

    Returns (texts: list of str, label_ids: int64 [num_texts]); unsound rows are added to `problems` and left out.
    labels: names in the order of their ids; empty where label.txt itself is wrong: then no label counts as unknown.
    """
    label2id = {label: index for index, label in enumerate(labels)}
    texts, label_ids = [], array.array("q")
    for number, line in read_lines(path, problems):
        text, tab, label = line.partition("\t")
        if not tab:
            wrong = "empty line" if not line.strip() else f"no tab in {_shorten(line)!r}"
            problems.add(path, number, wrong, "<text><tab><label>")
        elif "\t" in label:
            problems.add(path, number, f"{label.count(chr(9)) + 1} tabs", "exactly one tab: <text><tab><label>")
        elif not text.strip():
            problems.add(path, number, "empty text", "<text><tab><label>")
        elif label not in label2id and (labels or not label.strip()):
            close = difflib.get_close_matches(label, labels, 1, 0.5) if problems.count < MAX_REPORTED else []
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            wrong = f"label {_shorten(label)!r} is not in {label_path}{hint}" if label.strip() else "empty label"
            problems.add(path, number, wrong, f"one of its {len(labels)} labels" if labels else "<text><tab><label>")
        else:
            texts.append(text)
            label_ids.append(label2id.get(label, 0))
    return texts, np.frombuffer(label_ids, dtype=np.int64) if label_ids else np.zeros(0, np.int64)


def read_texts(path, problems, stream=None):
    """Yield the texts of an unlabelled file (one per line); empty lines and lines with a tab are problems."""
    for number, text in read_lines(path, problems, stream):
        if not text.strip():
            problems.add(path, number, "empty line", "one text per line")
        elif "\t" in text:
            problems.add(path, number, "a tab", "one text per line, without a label")
        else:
            yield text


def compare_labels(trained, listed, path, folder):
    """UserError naming the first difference between a checkpoint's labels and those of a label.txt."""
    expected = f"the labels that {folder} was trained with, in the same order"
    for number, (label, other) in enumerate(zip(trained, listed), 1):
        if label != other:
            raise UserError(f"{path}:{number}: label {other!r} where the checkpoint has {label!r}, expected {expected}")
    if len(trained) != len(listed):
        raise UserError(f"{path}: {len(listed)} labels where the checkpoint has {len(trained)}, expected {expected}")


def check_splits(train_path, dev_path, train, dev, labels, problems):
    """Add the warnings that need whole files: a class without training rows, a text in both train and dev.

    train, dev: (texts, label_ids) as `read_labelled` returns them.
    """
    counts = np.bincount(train[1], minlength=len(labels)) if len(train[1]) else np.zeros(len(labels), int)
    for label, count in zip(labels, counts):
        if count == 0:
            problems.warn(train_path, None, f"class {label!r} has no training rows", "at least one row per class")
    dev_lines = {}
    for number, text in enumerate(dev[0], 1):
        dev_lines.setdefault(text, number)
    for number, text in enumerate(train[0], 1):
        if text in dev_lines:
            problems.warn(train_path, number, f"text {_shorten(text)!r} is also in {dev_path}:{dev_lines[text]}",
                          "different texts in train and dev")


def _shorten(text, length=40):
    return text if len(text) <= length else text[:length] + "..."


def read_json(path):
    """Read a JSON object (UTF-8, a BOM is accepted); UserError where the file is missing or not one."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file)
    except FileNotFoundError:
        raise UserError(f"{path}: file not found, expected a JSON file") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg}), expected a JSON object") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}), expected a JSON object") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON {type(content).__name__}, expected an object")
    return content


# ---------------------------------------------------------------- outputs


def is_stream(path):
    """True for a pipe or device, which can be neither replaced nor read twice."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


@contextlib.contextmanager
def complete_file(path, mode="w", **kwargs):
    """Open a temporary file beside `path` for writing; it gets its final name only when the block ends well."""
    path = os.path.realpath(path)  # a link stays, and what it leads to is written
    if is_stream(path):
        with open(path, mode, encoding=None if "b" in mode else "utf-8", **kwargs) as output:
            yield output
        return
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=f".{os.path.basename(path)}.", suffix=".part", dir=os.path.dirname(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}), expected a writable folder") from None
    try:
        with open(handle, mode, encoding=None if "b" in mode else "utf-8", **kwargs) as output:
            yield output
        os.chmod(part, 0o666 & ~_umask())  # mkstemp makes files private
        os.replace(part, path)
    except BaseException:  # Ctrl-C and SIGTERM too, which are no Exception
        with contextlib.suppress(OSError):
            os.remove(part)
        raise


@contextlib.contextmanager
def complete_folder(path, marker):
    """Make a temporary folder; when the block ends well its files move into `path`, the file `marker` last.

    The old marker is removed first: a folder that holds its marker is complete, whenever the process may be killed.
    """
    if not path:
        raise UserError("the name of the output folder is empty, expected a name")
    path = os.path.abspath(path)
    is_new = not os.path.isdir(path)
    try:
        os.makedirs(path, exist_ok=True)
        staging = tempfile.mkdtemp(prefix=".staging-", dir=path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}), expected a writable folder") from None
    try:
        yield staging
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(path, marker))
        for name in sorted(os.listdir(staging), key=lambda name: (name == marker, name)):
            os.replace(os.path.join(staging, name), os.path.join(path, name))
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if is_new:
            with contextlib.suppress(OSError):
                os.rmdir(path)  # stays where it holds the result


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ---------------------------------------------------------------- tokenization and batching


class TokenizedTexts:
    """Token ids of many texts, kept flat: 4 bytes a token, where a list of lists takes 40.

    ids: int32 [num_tokens]; offsets: int64 [num_texts + 1]; labels: int64 [num_texts] or None.
    """

    def __init__(self, ids, offsets, labels=None):
        self.ids, self.offsets, self.labels = ids, offsets, labels
        self.lengths = np.diff(offsets)  # int64 [num_texts], special tokens included

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        """{"input_ids": int32 [length], "labels": int64 scalar (where there are labels)}"""
        item = {"input_ids": self.ids[self.offsets[index]:self.offsets[index + 1]]}
        if self.labels is not None:
            item["labels"] = self.labels[index]
        return item

    def select(self, indices):
        """The texts with these indices, in this order. indices: int [num_selected]. Returns TokenizedTexts."""
        lengths = self.lengths[indices]
        ids = [self.ids[self.offsets[index]:self.offsets[index + 1]] for index in indices]
        return TokenizedTexts(np.concatenate(ids) if ids else self.ids[:0], np.concatenate([[0], np.cumsum(lengths)]),
                              None if self.labels is None else self.labels[indices])

    def longest_first(self):
        """The same texts by falling length, so that batches in this order are of like length. Returns TokenizedTexts."""
        return self.select(np.argsort(-self.lengths, kind="stable"))


def fast_tokenizer(tokenizer, max_seq_length, saved=None):
    """The `tokenizers` twin of a PaddleNLP BERT or ERNIE tokenizer, cutting at max_seq_length; None for other kinds.

    saved: a tokenizer.json that this function's result was saved as; it spares the two seconds of building.
    """
    if type(tokenizer).__name__ not in ("BertTokenizer", "ErnieTokenizer"):
        return None
    if saved is not None and os.path.isfile(saved):
        from tokenizers import Tokenizer

        try:
            fast = Tokenizer.from_file(saved)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{saved}: cannot be read ({error}), expected the file that train.py wrote") from None
        if any(fast.token_to_id(token) != index for token, index in tokenizer.get_vocab().items()):
            raise UserError(f"{saved}: its vocabulary is not that of vocab.txt, expected the two files that train.py wrote")
    else:
        from wordpiece import build_fast_tokenizer

        try:
            fast = build_fast_tokenizer(tokenizer)
        except ValueError as error:
            print(f"warning: tokenizing with PaddleNLP's slower tokenizer: {error}", file=sys.stderr)
            return None
    fast.enable_truncation(max_seq_length)
    return fast


def make_encoder(tokenizer, fast, max_seq_length):
    """Return a function: list of str -> list of lists of token ids, special tokens included, cut to max_seq_length.

    fast: as `fast_tokenizer` returns it; with None PaddleNLP's own tokenizer does the work.
    """
    if fast is not None:
        return lambda texts: [encoding.ids for encoding in fast.encode_batch_fast(texts)]
    return lambda texts: [tokenizer(text, max_length=max_seq_length, truncation=True)["input_ids"] for text in texts]


def tokenize(texts, encode, labels=None, description="Tokenizing"):
    """Tokenize a list of str with an encoder of `make_encoder`; returns TokenizedTexts."""
    from tqdm import tqdm

    ids, lengths = array.array("i"), array.array("q", [0])
    with tqdm(total=len(texts), desc=description, unit=" texts", delay=2, leave=False) as progress:
        for start in range(0, len(texts), TOKENIZE_CHUNK):
            chunk = texts[start:start + TOKENIZE_CHUNK]
            for encoded in encode(chunk):
                ids.extend(encoded)
                lengths.append(len(encoded))
            progress.update(len(chunk))
    return TokenizedTexts(np.frombuffer(ids, np.int32), np.cumsum(np.frombuffer(lengths, np.int64)), labels)


def pad_batch(rows, pad_id):
    """Pad a list of id sequences to the longest of them: int64 [len(rows), longest]."""
    batch = np.full((len(rows), max(map(len, rows))), pad_id, dtype=np.int64)
    for index, row in enumerate(rows):
        batch[index, :len(row)] = row
    return batch


def sorted_batches(lengths, batch_size):
    """Indices of the texts in batches of like length, longest first (so that too large a batch fails at once)."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [order[start:start + batch_size] for start in range(0, len(order), batch_size)]


def softmax(logits):
    """float32 [num_texts, num_classes] -> probabilities of the same shape, rows sum to 1."""
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponents / exponents.sum(axis=1, keepdims=True)

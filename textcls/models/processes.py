"""What several processes tell each other, on one host or several: that they do the same work, when all are ready, files, weights.

They meet in the key-value store that Paddle's processes have in any case, where one may wait for another as long as it takes;
gloo, the library that sums gradients, ends a run in which nobody has come to a sum for 30 seconds (Paddle 2.6.2, 3.3.1).
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Optional

import numpy as np

from textcls.common.digests import sha256
from textcls.common.errors import UserError, count_ranks
from textcls.common.hosts import choose_interface, package_versions, rank_hosts

if TYPE_CHECKING:
    from paddle.nn import Layer

CHUNK = 1 << 24  # bytes that are sent at once: 1.3 s at 100 Mbit/s
# options that may differ between hosts: they say where something is, and its content is compared, or where results go
PLACES = {"output_dir", "save_dir", "logging_dir", "run_name", "local_rank", "model_name_or_path",
          "init_from_ckpt", "params_dir", "params_path", "data_dir", "dataset_dir", "train_set_file", "similar_text_pair_file",
          "similar_text_pair", "corpus_file", "label_file", "output_file", "bad_case_file", "report_dir", "verbose"}


def this_rank() -> int:
    """Return this process's number, 0 in a single one."""
    return int(os.environ.get("PADDLE_TRAINER_ID", 0))


def is_on_first_host() -> bool:
    """Tell whether this process runs on the host of the first one."""
    hosts = rank_hosts()
    return not hosts or hosts[this_rank()] == hosts[0]


def begin_processes(options: Mapping[str, object]) -> None:
    """Connect the processes of a script that is no training, and compare their options. options: {name: value}. UserError."""
    if count_ranks() > 1:
        from textcls.models.paddle_setup import paddle

        choose_interface()
        paddle.distributed.init_parallel_env()
        compare_options(options)


def compare_options(options: Mapping[str, object]) -> None:
    """UserError where the processes have different packages or options. options: {name: value}."""
    record = {f"the version of {name}": version for name, version in package_versions().items()}
    record.update({f"--{name}": str(value) for name, value in options.items() if name not in PLACES})
    compare_records("options", record)


def compare_records(name: str, record: Mapping[str, str]) -> None:
    """UserError where a process has another value than the first. name: of the comparison, once a run; record: {what: value}."""
    if count_ranks() == 1:
        return
    hosts = rank_hosts()
    first, *others = [json.loads(text) for text in exchange(name, json.dumps(record))]
    for rank, other in enumerate(others, 1):
        for what in sorted({*first, *other}):
            values = [str(each.get(what, "none")) for each in (first, other)]
            if values[0] != values[1]:
                raise UserError(f"{what} is {values[0]} on {hosts[0]} (rank 0) and {values[1]} on {hosts[rank]} (rank {rank}), "
                                "expected the same on all hosts")


def exchange(name: str, text: str) -> list[str]:
    """Give all processes a text of each, in the order of their ranks, however late one comes. name: once a run."""
    from textcls.models.paddle_setup import paddle

    store, ranks = paddle.base.core.create_or_get_global_tcp_store(), range(count_ranks())
    try:
        store.set(f"textcls/{name}/{this_rank()}", text)
        texts = [store.get(f"textcls/{name}/{rank}").decode() for rank in ranks]
        store.set(f"textcls/{name}/read/{this_rank()}", "read")
        for rank in ranks if this_rank() == 0 else ():  # it holds the store, and may end now
            store.get(f"textcls/{name}/read/{rank}")
    except ValueError as error:  # so Paddle says that the first process is gone
        raise RuntimeError(f"TCPStore: {error}") from None
    return texts


def wait_for_all(name: str) -> None:
    """Wait until all processes have come here, however late. name: once a run."""
    if count_ranks() > 1:
        exchange(name, "here")


def digest(*arrays: Optional[np.ndarray]) -> str:
    """Return 16 hexadecimal digits that tell arrays from others."""
    found = hashlib.sha256()
    for array in arrays:
        found.update(repr(None if array is None else (array.shape, str(array.dtype))).encode())
        found.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]


def send_weights(model: "Layer") -> None:
    """Give all processes the weights that the first one has."""
    from textcls.models.paddle_setup import paddle

    for value in model.state_dict().values():
        paddle.distributed.broadcast(value, 0)


def send_number(number: int, source: int) -> int:
    """Return the number that one process gives, `source`."""
    from textcls.models.paddle_setup import paddle

    tensor = paddle.to_tensor([number], dtype="int64")
    paddle.distributed.broadcast(tensor, source)
    return int(tensor)


def send_file(path: str, source: int, copy: Optional[str]) -> None:
    """Copy a file of one process, `source`, to the path `copy` of others; where it is None this one writes nothing."""
    from textcls.models.paddle_setup import paddle

    is_source = this_rank() == source
    size = send_number(os.path.getsize(path) if is_source else 0, source)
    with contextlib.ExitStack() as stack:
        input = stack.enter_context(open(path, "rb")) if is_source else None
        output = stack.enter_context(open(copy, "wb")) if copy else None
        for start in range(0, size, CHUNK):
            count = min(CHUNK, size - start)
            part = paddle.to_tensor(np.frombuffer(input.read(count), np.uint8) if input else np.zeros(count, np.uint8))
            paddle.distributed.broadcast(part, source)
            if output:
                output.write(part.numpy().tobytes())


def collect_files(paths: Sequence[str]) -> None:
    """Bring the file of each process to the host of the first one, where it is not yet. paths: of each; its folder is there."""
    hosts = rank_hosts()
    for rank, path in enumerate(paths):
        if hosts[rank] != hosts[0]:
            send_file(path, rank, path if this_rank() == 0 else None)


def find_folder(name: str, folder: str, copy: str) -> str:
    """Return where this process finds the files of the first process's folder: in `folder`, or, where this host has others there
    or none, in `copy`, which is made anew. All processes have to call it.

    name: of the exchange, once a run. folder, copy: may have different names on each host. Subfolders are left out.
    """
    hosts = rank_hosts()
    if len(set(hosts)) < 2:
        return folder
    sums = [json.loads(text) for text in exchange(name, json.dumps(file_sums(folder)))]
    is_missing = [own != sums[0] for own in sums]
    is_writer = is_missing[this_rank()] and hosts.index(hosts[this_rank()]) == this_rank()  # one process of each host
    if is_writer:
        shutil.rmtree(copy, ignore_errors=True)
        os.makedirs(copy)
    for file in sums[0] if any(is_missing) else ():
        send_file(os.path.join(folder, file), 0, os.path.join(copy, file) if is_writer else None)
    wait_for_all(f"{name} is there")
    return copy if is_missing[this_rank()] else folder


def file_sums(folder: str) -> dict[str, str]:
    """Return {name: SHA-256} of the files in a folder; {} where there is none."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    paths = {name: os.path.join(folder, name) for name in names}
    return {name: sha256(path) for name, path in paths.items() if os.path.isfile(path)}


def gather_rows(own: np.ndarray, count: int) -> np.ndarray:
    """Put rows together of which each process has those whose number is its own modulo the number of processes.

    own: [num_own_rows, ...]; count: of all rows. Returns [count, ...], in all processes.
    """
    from textcls.models.paddle_setup import paddle

    parts: list[np.ndarray] = []
    paddle.distributed.all_gather_object(parts, own)
    rows = np.empty((count, *own.shape[1:]), own.dtype)
    for rank, part in enumerate(parts):
        rows[rank::len(parts)] = part
    return rows

"""Several hosts: two network namespaces with a cable between them train together, and end together, whatever happens."""

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import predict
import train
import two_hosts
from helpers import (
    ROOT,
    assert_same_weights,
    assert_user_error,
    load_script,
    read_lines,
    run,
    run_here,
    train_options,
    write_lines,
)
from textcls import launch

MASTER = two_hosts.MASTER
evaluate = load_script("analysis", "evaluate")


@pytest.fixture(scope="module")
def hosts():
    """The names of two network namespaces, 10.78.0.1 and 10.78.0.2, joined by a cable."""
    if two_hosts.why_not():
        pytest.skip(two_hosts.why_not())
    with two_hosts.two_hosts() as names:
        yield names


def start(host, rank, log_dir, *words, **environment):
    """Start a host's launcher. words: its own options, then the script's command line."""
    return two_hosts.start_launcher(host, rank, log_dir, *words, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", **environment)


def finish(process):
    """Wait for a launcher; returns what `run` returns."""
    stdout, stderr = process.communicate(timeout=120)
    sys.stderr.write(stderr)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def start_both(hosts, folder, *lines):
    """Start the launchers of both hosts, whose working folders stand for disks of their own. lines: of words, one for each."""
    return [start(host, rank, folder / f"log{rank}", *lines[rank]) for rank, host in enumerate(hosts)]


def start_paddle(hosts, folder, *lines):
    """Do as `start_both` by Paddle's own launcher, which does not say by which interface gloo finds the other host."""
    command = [sys.executable, "-m", "paddle.distributed.launch", "--master", MASTER, "--nnodes", 2, "--nproc_per_node", 1]
    environment = {name: value for name, value in os.environ.items() if "VISIBLE_DEVICES" not in name}
    for rank, (host, address, words) in enumerate(zip(hosts, two_hosts.ADDRESSES, lines)):
        words = [*command, "--rank", rank, "--host", address, "--log_dir", folder / f"log{rank}", *words]
        yield subprocess.Popen(["ip", "netns", "exec", host, *map(str, words)], cwd=ROOT, encoding="utf-8", errors="replace",
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**environment, "OMP_NUM_THREADS": "1"})


def options(model, data, output, **changes):
    """A training whose best epoch is the first, not the last: its learning rate is far too high."""
    return train_options(model, data, output, **{"metric_for_best_model": "loss", "per_device_train_batch_size": 32,
                                                 "learning_rate": "1e-2", "lr_scheduler_type": "constant",
                                                 "early_stopping_patience": 0, "save_total_limit": None, **changes})


@pytest.fixture(scope="module")
def trained(hosts, tiny_model, tiny_data, tmp_path_factory):
    """What two hosts have trained together: the folder with host0/, host1/; and the finished launchers."""
    folder = tmp_path_factory.mktemp("hosts")
    both = start_both(hosts, folder, *(options(tiny_model, tiny_data, folder / f"host{rank}") for rank in range(2)))
    return folder, [finish(process) for process in both]


def test_two_hosts_train_what_two_processes_of_one_train(trained, tiny_model, tiny_data, tmp_path):
    folder, both = trained
    assert [process.returncode for process in both] == [0, 0]
    assert [process.stderr.count("Model saved in") for process in both] == [1, 0]
    assert "best model" not in both[1].stderr and not list(folder.glob("host1/*"))  # and it had it: the accuracy is of all rows
    results = json.loads((folder / "host0/all_results.json").read_text())
    losses = [entry["eval_loss"] for entry in json.loads((folder / "host0/trainer_state.json").read_text())["log_history"]
              if "eval_loss" in entry]
    assert results["eval_loss"] == pytest.approx(losses[0]) and losses[0] < losses[1] - 1e-3
    process = run("--nproc_per_node", 2, "--log_dir", tmp_path / "log", *options(tiny_model, tiny_data, tmp_path / "out"),
                  module=["textcls.launch"])
    assert process.returncode == 0 and process.stderr.count("Model saved in") == 1, process.stderr
    assert_same_weights(folder / "host0", tmp_path / "out")


def test_a_killed_process_ends_all_and_the_training_goes_on_exactly(trained, hosts, tiny_model, tiny_data, tmp_path):
    lines = [options(tiny_model, tiny_data, tmp_path / f"host{rank}") for rank in range(2)]
    both = start_both(hosts, tmp_path, *lines)
    deadline = time.time() + 60
    while not (tmp_path / "host0/checkpoint-4").exists():
        assert time.time() < deadline and both[1].poll() is None
        time.sleep(0.01)
    [rank] = two_hosts.ip("netns", "pids", hosts[1]).stdout.split()[1:]  # the launcher has come first
    os.kill(int(rank), signal.SIGKILL)
    for process in map(finish, both):
        assert process.returncode == 3
        assert re.search(r"^10\.78\.0\.2: process 1 was killed by signal 9, see \S+workerlog\.0 there\. All processes are ended; "
                         r"--resume_from_checkpoint goes on from the last checkpoint", process.stderr.splitlines()[-1])
        assert not re.search("Traceback|gloo", process.stderr)
    shutil.copytree(tmp_path / "host0", tmp_path / "alone")
    both = start_both(hosts, tmp_path, *([*line, "--resume_from_checkpoint", tmp_path / "host0"] for line in lines))
    assert [process.returncode for process in map(finish, both)] == [0, 0]
    assert_same_weights(tmp_path / "host0", trained[0] / "host0")
    alone = [*options(tiny_model, tiny_data, tmp_path / "alone", per_device_train_batch_size=64)[1:], "--resume_from_checkpoint"]
    process = run_here(train.main, *alone, tmp_path / "alone")
    assert process.returncode == 0 and "of a run with another number of processes" in process.stderr
    assert json.loads((tmp_path / "alone/trainer_state.json").read_text())["global_step"] == 8


def test_other_data_or_options_on_one_host(hosts, tiny_model, tiny_data, tmp_path):
    data = shutil.copytree(tiny_data, tmp_path / "data")
    write_lines(data / "train.txt", read_lines(data / "train.txt")[:-1])
    lines = [options(tiny_model, folder, tmp_path / "out") for folder in (tiny_data, data)]
    for process in map(finish, start_both(hosts, tmp_path, *lines)):
        assert_user_error(process, "the training data, or the vocabulary for it, is 220 texts, SHA-256 ",
                          " on 10.78.0.1 (rank 0) and 219 texts", "on 10.78.0.2 (rank 1), expected the same on all hosts")
    lines = [options(tiny_model, tiny_data, tmp_path / "out", learning_rate=rate) for rate in ("1e-3", "2e-3")]
    for process in map(finish, list(start_paddle(hosts, tmp_path, *lines))):
        said = process.stdout + process.stderr
        assert "--learning_rate is 0.001 on 10.78.0.1 (rank 0) and 0.002 on 10.78.0.2 (rank 1), expected" in said
        assert process.returncode == 2 and "Traceback" not in said
    (data / "train.txt").unlink()
    lines = [options(tiny_model, folder, tmp_path / "out") for folder in (tiny_data, data)]
    for process in map(finish, start_both(hosts, tmp_path, *lines)):
        assert_user_error(process, "train.txt: file not found, expected a UTF-8 text file")
    assert not (tmp_path / "out/config.json").exists()


def test_two_hosts_share_the_rows_of_predictions_and_evaluations(hosts, checkpoint, tiny_data, tmp_path):
    texts = [f"{line[:4]} {number}" for number, line in enumerate(read_lines(ROOT / "data/train.txt") * 8)]  # two chunks
    write_lines(tmp_path / "many.txt", texts)
    words = ["--params_path", checkpoint, "--device", "cpu", "--batch_size", 256, "--dataset_dir"]
    lines = [["predict.py", *words, tmp_path, "--data_file", "many.txt", "--output_file", tmp_path / f"out{rank}.txt"]
             for rank in range(2)]
    assert [process.returncode for process in map(finish, start_both(hosts, tmp_path, *lines))] == [0, 0]
    assert run_here(predict.main, *lines[0][1:-1], tmp_path / "one.txt").returncode == 0
    one, two = read_lines(tmp_path / "one.txt"), read_lines(tmp_path / "out0.txt")
    assert [line.split("\t")[0] for line in two[1:]] == texts and len(texts) > 8192
    assert sum(a != b for a, b in zip(one, two)) <= 2  # the last bit of a tie may differ
    lines = [["analysis/evaluate.py", *words, tiny_data, "--bad_case_file", tmp_path / f"bad{rank}.txt"] for rank in range(2)]
    assert [process.returncode for process in map(finish, start_both(hosts, tmp_path, *lines))] == [0, 0]
    assert run_here(evaluate.main, *lines[0][1:-1], tmp_path / "bad.txt").returncode == 0
    assert read_lines(tmp_path / "bad.txt") == read_lines(tmp_path / "bad0.txt")
    assert sorted(os.listdir(tmp_path)) == ["bad.txt", "bad0.txt", "log0", "log1", "many.txt", "one.txt", "out0.txt"]


def test_a_host_that_does_not_come_or_does_not_fit(hosts, tmp_path):
    def both(script, **environment):
        """The finished launchers of train.py on the first host, and of a script on the other."""
        launchers = [start(hosts[0], 0, tmp_path, "--timeout", 20, "train.py")]
        return list(map(finish, [*launchers, start(hosts[1], 1, tmp_path, script, **environment)]))

    alone = [finish(start(host, rank, tmp_path, "--timeout", 1, "train.py")) for rank, host in enumerate(hosts)]
    assert_user_error(alone[0], f"--rank 1 of 2 hosts has not come to {MASTER} for 1 seconds, expected the same command there")
    assert_user_error(alone[1], f"--master {MASTER}: nobody has answered for 1 seconds (Connection refused), expected the same")
    packages = tmp_path / "paddlenlp-9.9.dist-info"
    packages.mkdir()
    (packages / "METADATA").write_text("Metadata-Version: 2.1\nName: paddlenlp\nVersion: 9.9\n")
    for process in both("train.py", PYTHONPATH=f"{tmp_path}:{ROOT}"):
        assert_user_error(process, "paddlenlp is ", "on 10.78.0.1 and 9.9 on 10.78.0.2 (--rank 1), expected the same version")
    for process in both("predict.py"):
        assert_user_error(process, "script: is train.py on 10.78.0.1 and predict.py on 10.78.0.2 (--rank 1), expected the same")
    assert_user_error(finish(start(hosts[1], 0, tmp_path, "train.py")), f"{MASTER}: cannot be listened on", "--rank 0")


def test_strangers_and_hosts_that_are_started_anew_while_others_are_missing(monkeypatch):
    def come(said):
        """A connection to the first host, at which something was said."""
        connection = socket.create_connection(address)
        connection.sendall(said.encode() + b"\n")
        return connection

    def hello(node):
        return {"nnodes": 3, "node": node, "address": "127.0.0.1", "processes": 1, "versions": {}, "script": "train.py"}

    server = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setattr(launch, "listen", lambda *_: server)
    address = server.getsockname()
    args, hosts = argparse.Namespace(nnodes=3, timeout=20, master="127.0.0.1"), []
    with ThreadPoolExecutor(1) as pool:
        gathered = pool.submit(launch.gather, args, hello(0), *address, hosts)
        for said in ("5", "{}", "GET / HTTP/1.0", json.dumps({**hello(1), "versions": []})):
            assert come(said).recv(1) == b""
        come(json.dumps(hello(1))).close()
        open_ones = [come(json.dumps(hello(node))) for node in (1, 2)]
        gathered.result(timeout=20)
    assert [host.node for host in hosts] == [1, 2] and len(open_ones) == 2


def test_what_a_launcher_refuses_at_once(tmp_path):
    for words, message in {
            "--nnodes 2 train.py": "--nnodes: several hosts have to meet, expected --master address:port",
            "--nnodes 2 --master 127.0.1.1:6170 train.py": "--master 127.0.1.1:6170: is 127.0.1.1 here (see /etc/hosts)",
            "--nnodes 2 --master 10.0.0.1 train.py": "--master 10.0.0.1: expected address:port, such as 10.0.0.1:6170",
            "--nnodes 2 --master 10.0.0.1:6170 --rank 2 train.py": "--rank 2: out of range, expected 0 to 1 (--nnodes 2)",
            "--nnodes 2 --master 10.0.0.1:6170 --host 192.0.2.7 train.py": "--host 192.0.2.7: no network interface has this",
            "trian.py": "trian.py: no such file, expected a script such as train.py"}.items():
        process = run("--log_dir", tmp_path / "log", *words.split(), module=["textcls.launch"])
        assert process.returncode == 2 and message in process.stderr and "Traceback" not in process.stderr
    assert not os.listdir(tmp_path)

"""Two hosts on one machine: network namespaces with a cable between them. Linux, as root. The tests use this, too."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from measuring import ROOT

CABLE = "cable"  # the interface of each host
ADDRESSES = ("10.78.0.1", "10.78.0.2")
MASTER = f"{ADDRESSES[0]}:6170"


def ip(*words: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
    """Run the command ip."""
    return subprocess.run(["ip", *words], check=check, capture_output=True, encoding="utf-8")


def why_not() -> str:
    """Say why this machine cannot have two hosts; "" where it can."""
    if not shutil.which("ip"):
        return "network namespaces need Linux and the command ip (iproute2)"
    name = f"textcls{os.getpid()}-try"
    error = ip("netns", "add", name, check=False).stderr
    ip("netns", "delete", name, check=False)
    return f"network namespaces need root: {error.strip()}" if error else ""


@contextlib.contextmanager
def two_hosts() -> Iterator[list[str]]:
    """Make two network namespaces, of ADDRESSES; gives their names."""
    names = [f"textcls{os.getpid()}-{number}" for number in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", CABLE, "netns", names[0], "type", "veth", "peer", "name", CABLE, "netns", names[1])
        for name, address in zip(names, ADDRESSES):
            ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
            for device in ("lo", CABLE):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name, check=False)


def limit_rate(host: str, megabits: int) -> None:
    """Let what a host sends have so many million bits per second."""
    burst = max(256 * 1024, megabits * 10**6 // 8 // 100)  # bytes: what may be sent between two ticks of the kernel's clock
    subprocess.run(["tc", "-n", host, "qdisc", "replace", "dev", CABLE, "root", "tbf", "rate", f"{megabits}mbit",
                    "burst", f"{burst}b", "latency", "100ms"], check=True)


def sent_bytes(host: str) -> int:
    """Return how many bytes a host has sent to the other one."""
    [link] = json.loads(ip("-n", host, "-s", "-j", "link", "show", CABLE).stdout)
    return int(link["stats64"]["tx"]["bytes"])


def start_launcher(host: str, rank: int, log_dir: Any, *words: Any, **environment: str) -> "subprocess.Popen[str]":
    """Start textcls.launch on one of the two hosts. words: more of its options, then the script's command line."""
    command = [sys.executable, "-m", "textcls.launch", "--master", MASTER, "--nnodes", 2, "--rank", rank, "--log_dir", log_dir,
               *words]
    return subprocess.Popen(["ip", "netns", "exec", host, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, encoding="utf-8", errors="replace", env={**os.environ, **environment})

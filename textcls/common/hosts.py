"""What several hosts that train together have to know of themselves, before Paddle: addresses, interfaces, versions."""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import socket
import struct
from pathlib import Path
from typing import Optional

from textcls.common.errors import UserError

ADDRESS_OF_INTERFACE = 0x8915  # SIOCGIFADDR, Linux
PACKAGES = ("paddlepaddle", "paddlepaddle-gpu", "paddlenlp", "numpy")  # whose versions have to be the same on all hosts


def own_address(master: str, port: int) -> str:
    """Return the IPv4 address by which this host reaches another one; nothing is sent. OSError where it cannot."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((master, port))
        return probe.getsockname()[0]


def find_interface(address: str) -> Optional[str]:
    """Return the name of the network interface that has an IPv4 address, such as eth0; None where none has, and outside Linux."""
    try:
        import fcntl
    except ImportError:
        return None  # Windows
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(probe.fileno(), ADDRESS_OF_INTERFACE, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def rank_hosts() -> list[str]:
    """Return the address of each process's host, in the order of their ranks; [] in a single process."""
    endpoints = os.environ.get("PADDLE_TRAINER_ENDPOINTS", "")
    return [endpoint.rpartition(":")[0] for endpoint in endpoints.split(",") if endpoint]


def choose_interface() -> None:
    """Let gloo use the interface of the address that the launcher has given this process, where there are several hosts: else it
    publishes what this host's name resolves to, often 127.0.1.1, which no other host can reach (Paddle 2.6.2, 3.3.1).

    UserError where the address is one that other hosts cannot reach, or no interface has it.
    """
    hosts = rank_hosts()
    if len(set(hosts)) < 2 or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    address = os.environ.get("PADDLE_CURRENT_ENDPOINT", "").rpartition(":")[0]
    if address.startswith("127."):
        raise UserError(f"this host calls itself {address}, which no other host can reach, expected --host with its address in "
                        "the common network")
    interface = find_interface(address)
    if interface is None:
        raise UserError(f"--host {address}: no network interface has this address, expected one of this host's (ip address), or "
                        "GLOO_SOCKET_IFNAME=name of the interface")
    os.environ["GLOO_SOCKET_IFNAME"] = interface


def package_versions() -> dict[str, str]:
    """Return {name: version} of what has to be the same on all hosts: Python (3.11), this suite, Paddle and others."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).resolve().parent.parent.rglob("*.py")):
        code.update(path.read_bytes())
    versions = {"Python": ".".join(platform.python_version_tuple()[:2]),
                "textcls": f"code with the SHA-256 {code.hexdigest()[:16]}"}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions

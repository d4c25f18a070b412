"""Start a script in several processes on the CPUs of one host or of several hosts, and end all of them when one fails.

    python -m textcls.launch --nproc_per_node 2 train.py ... --device cpu                     # one host
    python -m textcls.launch --master 10.0.0.1:6170 --nnodes 2 --rank 0 train.py ... --device cpu   # on the host 10.0.0.1
    python -m textcls.launch --master 10.0.0.1:6170 --nnodes 2 --rank 1 train.py ... --device cpu   # on the other one

The launchers of the hosts meet at --master, compare versions, and stay connected: whichever host has no more to say, or says
that one of its processes has failed, the others end theirs, with one line that says why. It is for what
`python -m paddle.distributed.launch` (2.6.2, 3.3.1) does not do on CPUs: it waits for ever for a host that does not come, fails
where CUDA_VISIBLE_DEVICES is set, and gives a host the address of its name, often 127.0.1.1.

Writes  log_dir/workerlog.N: what process N of this host logs; that of the first one is also shown.
"""

import argparse
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn, Optional

from textcls.common.errors import CONNECTION_LOST, LOST, UserError, run_script
from textcls.common.hosts import find_interface, own_address, package_versions
from textcls.common.options import LAUNCHER, make_parser, positive_int

ALIVE, SILENT = 5, 20  # seconds: how often a host says that it is there, and after how many it is gone (gloo waits for 30)
WAIT = 0.2  # seconds between two looks at processes and hosts
GRACE = 5  # seconds that a process has to end by itself
LOST_CODES = (LOST, -signal.SIGABRT)  # of a process that has lost the others: said by run_script, or by gloo in C++
NOISE = (CONNECTION_LOST, "terminate called after throwing an instance of 'gloo::", "  what():  [/paddle/third_party/gloo")
GO_ON = "--resume_from_checkpoint goes on from the last checkpoint of a training"


class Stop(NamedTuple):
    """Why all processes have to end: what is said, and the exit code."""

    reason: str
    code: int
    is_lost: bool = False  # only that the others are gone


class Host:
    """The connection to another host's launcher: JSON objects, one a line, both ways. node: the host's --rank."""

    def __init__(self, connection: socket.socket):
        self.connection, self.node, self.address = connection, -1, connection.getpeername()[0]
        self.hello: dict[str, Any] = {}  # what it has said first
        self.unread, self.heard, self.is_done = b"", time.monotonic(), False
        connection.settimeout(SILENT)

    def send(self, **message: Any) -> None:
        """Say something; a host that is gone is found out by `read`."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def read(self, seconds: float) -> list[dict[str, Any]]:
        """Return what has come, after `seconds` at most. ConnectionError where the host has closed the connection."""
        if not select.select([self.connection], [], [], seconds)[0]:
            return []
        part = self.connection.recv(1 << 16)
        if not part:
            raise ConnectionError("closed")
        self.heard = time.monotonic()
        *lines, self.unread = (self.unread + part).split(b"\n")
        return [json.loads(line) for line in lines]

    def is_gone(self) -> bool:
        """Tell whether a host that has nothing to say yet has closed the connection."""
        try:
            return bool(self.read(0))
        except (OSError, ValueError):
            return True

    def __str__(self) -> str:
        return f"{self.address} (--rank {self.node})"


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--master", help="address and port at which the hosts meet: those of the host with --rank 0; the port "
                                         "after it is used, too")
    parser.add_argument("--nnodes", type=positive_int, default=1, help="number of hosts")
    parser.add_argument("--rank", type=int, default=0, help="this host's number, 0 up to, not including, --nnodes")
    parser.add_argument("--host", help="this host's address in the network of --master; default: by which it reaches --master")
    parser.add_argument("--nproc_per_node", type=positive_int, default=1, help="processes on this host")
    parser.add_argument("--log_dir", default="log", help="folder of the logs of this host's processes")
    parser.add_argument("--timeout", type=positive_int, default=300, help="seconds to wait for the other hosts at the start")
    parser.add_argument("script", help="script to run, such as train.py")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="its options")
    args = parser.parse_args()
    if not 0 <= args.rank < args.nnodes:
        parser.error(f"--rank {args.rank}: out of range, expected 0 to {args.nnodes - 1} (--nnodes {args.nnodes})")
    if args.nnodes > 1 and not args.master:
        parser.error("--nnodes: several hosts have to meet, expected --master address:port, the same on all hosts")
    if not os.path.isfile(args.script):
        parser.error(f"{args.script}: no such file, expected a script such as train.py")
    return args


def find_addresses(args: argparse.Namespace) -> tuple[str, int]:
    """Return --master as (IPv4 address, port); set args.host and GLOO_SOCKET_IFNAME. UserError where others cannot use them."""
    if args.nnodes == 1:
        args.host = "127.0.0.1"
        os.environ.setdefault("GLOO_SOCKET_IFNAME", find_interface(args.host) or "")
        return args.host, 0
    name, _, port = args.master.rpartition(":")
    if not name or not port.isdecimal() or not 0 < int(port) < 65535:
        raise UserError(f"--master {args.master}: expected address:port, such as 10.0.0.1:6170")
    try:
        master = socket.gethostbyname(name)
        args.host = args.host or own_address(master, int(port))
    except OSError as error:
        raise UserError(f"--master {args.master}: cannot be reached ({error.strerror or error}), expected the address of the "
                        "host with --rank 0, in a network that this host is in") from None
    for option, address in ((f"--master {args.master}", master), (f"--host {args.host}", args.host)):
        if address.startswith("127."):
            raise UserError(f"{option}: is {address} here (see /etc/hosts), which no other host can reach, expected the address "
                            "in the common network")
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        interface = find_interface(args.host)
        if interface is None:
            raise UserError(f"--host {args.host}: no network interface has this address, expected one of this host's (ip "
                            "address), or GLOO_SOCKET_IFNAME=name of the interface")
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    return master, int(port)


def meet(args: argparse.Namespace, master: str, port: int) -> tuple[list[Host], dict[str, Any]]:
    """Connect the launchers of all hosts, the first one with each other. UserError where one does not come, or does not fit.

    Returns the connections, and the plan: {"hosts": [[address, number of processes], ...], "port": of Paddle's store}.
    """
    hello = {"nnodes": args.nnodes, "node": args.rank, "address": args.host, "processes": args.nproc_per_node,
             "versions": package_versions(), "script": os.path.basename(args.script)}
    if args.rank:
        return join(args, hello, master, port)
    hosts: list[Host] = []
    try:
        if args.nnodes > 1:
            gather(args, hello, master, port, hosts)
        hosts.sort(key=lambda host: host.node)
        plan = {"hosts": [[args.host, args.nproc_per_node]] + [[host.address, host.hello["processes"]] for host in hosts],
                "port": free_port(master, port + 1 if port else 0)}
    except UserError as error:
        for host in hosts:
            host.send(stop=str(error), code=2)
        raise
    for host in hosts:
        host.send(plan=plan)
    return hosts, plan


def free_port(address: str, port: int) -> int:
    """Return a port that can be listened on: `port`, or for 0 any. UserError where it is taken."""
    with listen(address, port) as listener:
        return listener.getsockname()[1]


def listen(address: str, port: int) -> socket.socket:
    """Listen at an address and port of this host. UserError where that cannot be."""
    try:
        return socket.create_server((address, port))
    except OSError as error:
        raise UserError(f"{address}:{port}: cannot be listened on ({error.strerror}), expected as --master an address of this "
                        "host, the one with --rank 0, and a port that is free, as is the one after it") from None


def gather(args: argparse.Namespace, hello: dict[str, Any], master: str, port: int, hosts: list[Host]) -> None:
    """Wait until all other hosts have come; they are added to `hosts`. UserError where one does not come, or does not fit."""
    end = time.monotonic() + args.timeout
    with listen(master, port) as listener:
        while len(hosts) < args.nnodes - 1:
            listener.settimeout(max(0.01, end - time.monotonic()))
            try:
                host = Host(listener.accept()[0])
            except socket.timeout:
                missing = sorted({*range(1, args.nnodes)} - {host.node for host in hosts if not host.is_gone()})
                raise UserError(f"--rank {', '.join(map(str, missing))} of {args.nnodes} hosts has not come to {args.master} for "
                                f"{args.timeout} seconds, expected the same command there with its --rank, and no firewall "
                                "between") from None
            with contextlib.suppress(OSError, ValueError):
                host.hello = next(iter(host.read(SILENT)), {})
            if not is_hello(host.hello, hello):
                host.connection.close()
                continue
            host.node, host.address = host.hello["node"], host.hello["address"]
            hosts.append(host)
            hosts[:] = [host for host in hosts if not host.is_gone()]  # it may have been started anew
            check_hello(hello, host, [host.node for host in hosts])


def is_hello(message: Any, own: dict[str, Any]) -> bool:
    """Tell what a launcher says first from what anything else does that has come to this port. own: what this launcher says."""
    return isinstance(message, dict) and all(type(message.get(name)) is type(value) for name, value in own.items())


def check_hello(own: dict[str, Any], host: Host, nodes: Sequence[int]) -> None:
    """UserError where a host that has come does not fit. nodes: the numbers of all that have come."""
    if nodes.count(host.node) > 1 or host.node == 0:
        raise UserError(f"{host.address}: has come with --rank {host.node}, which another host has, expected a --rank of its own "
                        "for each host")
    for name, option in (("nnodes", "--nnodes"), ("script", "script")):
        if host.hello[name] != own[name]:
            raise UserError(f"{option}: is {own[name]} on {own['address']} and {host.hello[name]} on {host}, expected the same")
    theirs = host.hello["versions"]
    for name in sorted({*own["versions"], *theirs}):
        if own["versions"].get(name) != theirs.get(name):
            raise UserError(f"{name} is {own['versions'].get(name, 'missing')} on {own['address']} and "
                            f"{theirs.get(name, 'missing')} on {host}, expected the same version on all hosts")


def join(args: argparse.Namespace, hello: dict[str, Any], master: str, port: int) -> tuple[list[Host], dict[str, Any]]:
    """Come to the first host and wait for its plan. Returns what `meet` does. UserError where there is none."""
    end, connection = time.monotonic() + args.timeout, None
    while connection is None:
        try:
            connection = socket.create_connection((master, port), max(0.01, min(SILENT, end - time.monotonic())), (args.host, 0))
        except OSError as error:
            if time.monotonic() >= end:
                reason = error.strerror or error
                raise UserError(f"--master {args.master}: nobody has answered for {args.timeout} seconds ({reason}), expected "
                                "the same command with --rank 0 there, and no firewall between") from None
            time.sleep(min(0.5, max(0, end - time.monotonic())))
    host = Host(connection)
    host.node = 0
    host.send(**hello)
    with contextlib.suppress(OSError, ValueError):
        while time.monotonic() < end + args.timeout:  # the first host may have begun to wait later
            for message in host.read(1):
                if "stop" in message:
                    raise UserError(message["stop"])
                return [host], message["plan"]
    raise UserError(f"--master {args.master}: does not answer as the launcher of the first host, expected the same command there "
                    "with --rank 0")


def rank_environment(args: argparse.Namespace, master: str, plan: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Yield of each process of this host what Paddle 2.6.2 and 3.3.1 read in its environment."""
    counts = [count for _, count in plan["hosts"]]
    first, ranks = sum(counts[:args.rank]), sum(counts)
    # one for each process; under gloo nobody listens there
    endpoints = [f"{address}:{plan['port'] + 1 + index}" for address, count in plan["hosts"] for index in range(count)]
    for local in range(args.nproc_per_node):
        yield {"PADDLE_TRAINER_ID": str(first + local), "PADDLE_GLOBAL_RANK": str(first + local),
               "PADDLE_TRAINERS_NUM": str(ranks), "PADDLE_GLOBAL_SIZE": str(ranks), "PADDLE_MASTER": f"{master}:{plan['port']}",
               "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints), "PADDLE_CURRENT_ENDPOINT": endpoints[first + local],
               "PADDLE_DISTRI_BACKEND": "gloo", "PADDLE_NNODES": str(args.nnodes), "PADDLE_LOCAL_RANK": str(local),
               "PADDLE_RANK_IN_NODE": str(local), "PADDLE_LOCAL_SIZE": str(args.nproc_per_node), LAUNCHER: "textcls.launch"}


class Processes:
    """The processes of this host. environments: what each has in its environment beside this process's."""

    def __init__(self, args: argparse.Namespace, environments: Sequence[dict[str, str]]):
        os.makedirs(args.log_dir, exist_ok=True)
        self.host, self.first = args.host, int(environments[0]["PADDLE_TRAINER_ID"])
        self.logs = [os.path.join(args.log_dir, f"workerlog.{local}") for local in range(len(environments))]
        self.running = []
        for local, environment in enumerate(environments):
            with open(self.logs[local], "wb") as log:
                output = None if environment["PADDLE_TRAINER_ID"] == "0" else log
                self.running.append(subprocess.Popen([sys.executable, args.script, *args.options], stdin=subprocess.DEVNULL,
                                                     stdout=output, stderr=log, env={**os.environ, **environment}))
        self.shown = open(self.logs[0], encoding="utf-8", errors="replace", newline="")

    def show(self) -> None:
        """Show what the first process has logged since, without what gloo says of a host that is gone."""
        for line in self.shown:
            if not line.startswith(NOISE):
                sys.stderr.write(line)
        sys.stderr.flush()

    def is_done(self) -> bool:
        """Tell whether all have ended well."""
        return all(process.poll() == 0 for process in self.running)

    def failure(self) -> Optional[Stop]:
        """Return what is known of a process that has failed, else None. One that has lost the others is not to blame."""
        codes = [(process.poll(), local) for local, process in enumerate(self.running)]
        failed = sorted((code in LOST_CODES, local, code) for code, local in codes if code)
        if not failed:
            return None
        is_lost, local, code = failed[0]
        process, place = f"{self.host}: process {self.first + local}", f"see {self.logs[local]} there"
        if is_lost:
            return Stop(f"{process} has lost the others, {place}", LOST, True)
        if code < 0:
            return Stop(f"{process} was killed by signal {-code}, {place}", LOST)
        return Stop(f"{process} ended with exit code {code}{f': {self.last_words(local)}' if code == 2 else f', {place}'}", code)

    def last_words(self, local: int) -> str:
        """Return what a process has said when it ended: what stands below the last line of its log."""
        words: list[str] = []
        with open(self.logs[local], encoding="utf-8", errors="replace") as log:
            for line in log:
                words = [] if line.startswith("[") else [*words, line]
        return "".join(words).strip()

    def end(self, grace: float) -> None:
        """End those that still run; after `grace` seconds by a signal, in the end by force."""
        for number, seconds in ((None, grace), (signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
            for process in self.running:
                if number is not None and process.poll() is None:
                    process.send_signal(number)
            end = time.monotonic() + seconds
            while time.monotonic() < end and any(process.poll() is None for process in self.running):
                time.sleep(0.05)
            if number is None:
                self.show()


def watch(processes: Processes, hosts: list[Host], is_first: bool) -> Optional[Stop]:
    """Wait for the end of all processes of all hosts. Returns None where they have ended well."""
    said = lost = 0.0  # when this host has last said that it is there, and when a process of it has lost the others
    is_done = False
    while True:
        processes.show()
        now = time.monotonic()
        failure = processes.failure()
        if failure is not None and failure.is_lost and hosts:
            lost = lost or now
            if now - lost < SILENT:
                failure = None  # another host will say why
        stop = failure or hear(hosts)
        if stop is not None:
            return stop
        if now - said > ALIVE:
            said = now
            tell(hosts, alive=True)
        if not is_done and processes.is_done() and (not is_first or all(host.is_done for host in hosts)):
            is_done = True  # the first host says so when all are
            tell(hosts, done=True)
        if is_done and (is_first or hosts[0].is_done):
            processes.show()
            return None
        if not hosts:
            time.sleep(WAIT)


def tell(hosts: list[Host], **message: Any) -> None:
    """Say something to all other hosts that this one is connected to."""
    for host in hosts:
        host.send(**message)


def hear(hosts: list[Host]) -> Optional[Stop]:
    """Read what the other hosts have said, for WAIT seconds at most; one that is gone, or has failed, is a reason to stop."""
    for host in hosts:
        try:
            for message in host.read(WAIT / len(hosts)):
                if "stop" in message:
                    return Stop(str(message["stop"]), int(message["code"]))
                host.is_done = host.is_done or "done" in message
        except (OSError, ValueError):
            if not host.is_done:
                return Stop(f"{host}: its launcher has ended without a word", LOST)
        if not host.is_done and time.monotonic() - host.heard > SILENT:
            return Stop(f"{host}: has not been heard of for {SILENT} seconds", LOST)
    return None


def end_all(processes: Processes, hosts: list[Host], stop: Stop) -> NoReturn:
    """Tell the other hosts why, end the processes of this one, say why once, and exit."""
    tell(hosts, stop=stop.reason, code=stop.code)
    processes.end(grace=1 if stop.code == 2 else 0)
    if processes.running[0].poll() != 2:  # else it has said so itself
        print(stop.reason if stop.code == 2 else f"{stop.reason}. All processes are ended; {GO_ON}", file=sys.stderr)
    sys.exit(stop.code)


def main() -> None:
    args = parse_arguments()
    master, port = find_addresses(args)
    hosts, plan = meet(args, master, port)
    processes = Processes(args, list(rank_environment(args, master, plan)))
    try:
        stop = watch(processes, hosts, args.rank == 0)
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, SIGTERM
        tell(hosts, stop=f"{args.host}: the launcher was interrupted", code=LOST)
        processes.end(grace=0)
        raise
    if stop is not None:
        end_all(processes, hosts, stop)


if __name__ == "__main__":
    run_script(main)

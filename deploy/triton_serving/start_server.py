"""Serve a model repository with Triton on a CPU, without a container: the server of the PyPI package nvidia-pytriton.

    python start_server.py
    python start_server.py --model_repository models --host 0.0.0.0 --http_port 8000 --grpc_port 8001 --metrics_port 8002
    python start_server.py -- --log-verbose=1

Reads   model_repository, made by build_repository.py.
Serves  HTTP, gRPC and metrics until SIGTERM or Ctrl-C; then the server answers what has come, for --exit_seconds at most, and
        this script ends with its code. The server's log goes to standard error.
"""

import contextlib
import ctypes
import glob
import importlib.util
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from argparse import Namespace

from textcls.common.errors import UserError, run_script
from textcls.common.options import make_parser, positive_int
from textcls.runtime.listening import listen

HERE = os.path.dirname(os.path.abspath(__file__))
PR_SET_PDEATHSIG = 1  # of prctl(2)
STACK_BYTES = 1 << 30  # of each of the server's threads, address space only
PACKAGES = ("pytriton", "onnxruntime", "tokenizers", "numpy")


def parse_arguments() -> Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--model_repository", default=os.path.join(HERE, "models"), help="folder that build_repository.py made")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all of the machine")
    parser.add_argument("--http_port", type=positive_int, default=8000)
    parser.add_argument("--grpc_port", type=positive_int, default=8001)
    parser.add_argument("--metrics_port", type=positive_int, default=8002)
    parser.add_argument("--exit_seconds", type=positive_int, default=30, help="requests may take so long at the end")
    parser.add_argument("server_options", nargs="*", help="after --: further options of tritonserver")
    args = parser.parse_args()
    if len({args.http_port, args.grpc_port, args.metrics_port}) < 3:
        parser.error("--http_port, --grpc_port, --metrics_port: expected three different ports")
    return args


def check_repository(path: str) -> None:
    """Raise UserError where a folder is no repository that build_repository.py made."""
    if not os.path.isfile(os.path.join(path, "repository.json")):
        raise UserError(f"--model_repository {path}: no repository.json there, expected a folder that build_repository.py made")


def find_address(args: Namespace) -> str:
    """Find the IPv4 address of --host, all that the HTTP part listens on. UserError, also where a port is taken there."""
    try:
        address = socket.gethostbyname(args.host or "no name")  # the empty name would be all of the machine
    except (OSError, UnicodeError):
        raise UserError(f"--host {args.host}: no IPv4 address, expected one of this machine, or 0.0.0.0 for all") from None
    for option in ("http_port", "grpc_port", "metrics_port"):
        listen(address, getattr(args, option), f"--{option}").close()
    return address


def find_packages() -> str:
    """Find the folder of the package pytriton. UserError where one of PACKAGES is missing."""
    specs = {name: importlib.util.find_spec(name) for name in PACKAGES}
    missing = [name.replace("pytriton", "nvidia-pytriton") for name, spec in specs.items() if spec is None]
    if missing:
        raise UserError(f"packages are missing ({', '.join(missing)}), expected an environment made by `pip install -r "
                        "deploy/triton_serving/requirements.txt`")
    return specs["pytriton"].submodule_search_locations[0]


def make_backends(folder: str, server: str, environment: dict[str, str]) -> None:
    """Put the Python backend and the stand-in for the ONNX Runtime backend into `folder`. server: pytriton/tritonserver."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = os.path.join(server, "python_backend_stubs", version, "triton_python_backend_stub")
    if not os.path.isfile(stub):
        raise UserError(f"Python {version}: nvidia-pytriton has no part for it, expected Python 3.9-3.12")
    for name in ("python", "onnxruntime"):
        shutil.copytree(os.path.join(server, "backends", "python"), os.path.join(folder, name))
        shutil.copy(stub, os.path.join(folder, name))
        os.chmod(os.path.join(folder, name, os.path.basename(stub)), 0o755)
    shutil.copy(os.path.join(HERE, "onnxruntime_backend.py"), os.path.join(folder, "onnxruntime", "model.py"))
    # called without arguments it only complains of that: enough to see that its libraries are there
    probe = subprocess.run([os.path.join(folder, "python", os.path.basename(stub))], env=environment, capture_output=True)
    if probe.returncode == 127:
        raise UserError(f"Python {version} cannot be loaded by the server ({probe.stderr.decode(errors='replace').strip()}), "
                        f"expected its shared library (Debian: apt-get install libpython{version}; a Python of your own: "
                        "configure --enable-shared)")


def server_command(args: Namespace, address: str, server: str, backends: str) -> list[str]:
    """Make the command line; the Python backend's shared memory is named after the folder `backends`, so that it can be found."""
    return [os.path.join(server, "bin", "tritonserver"), f"--model-repository={os.path.abspath(args.model_repository)}",
            f"--backend-directory={backends}", f"--http-address={address}", f"--http-port={args.http_port}",
            f"--grpc-address={address}", f"--grpc-port={args.grpc_port}", f"--metrics-address={address}",
            f"--metrics-port={args.metrics_port}", "--allow-gpu-metrics=false", "--reuse-http-port=false",
            f"--backend-config=python,shm-region-prefix-name={os.path.basename(backends)}",
            f"--exit-timeout-secs={args.exit_seconds}", *args.server_options]


def wait_for_end(process: "subprocess.Popen[bytes]", address: tuple[str, int]) -> int:
    """Wait until the server ends. Returns its exit code; 1 where it crashed before it listened on its HTTP address.

    Triton 2.51.0 now and then ends by SIGSEGV after a model that cannot be loaded, where it should end with code 1.
    """
    while process.poll() is None:
        with contextlib.suppress(OSError):
            socket.create_connection(address, timeout=1).close()
            return process.wait()
        time.sleep(0.1)
    if process.returncode != -signal.SIGSEGV:
        return process.returncode
    print("the server could not start and crashed as it ended, expected what its log says above to be mended", file=sys.stderr)
    return 1


def run_server(command: list[str], environment: dict[str, str], address: tuple[str, int]) -> int:
    """Run the server until it ends by itself or by SIGTERM or SIGINT, which it gets from here. Returns its exit code.

    address: (host, port) of its HTTP interface.
    """
    process, early, libc = None, [], ctypes.CDLL(None)

    def forward(number, frame):
        number = signal.SIGTERM if number == signal.SIGHUP else number  # which the server does not know
        early.append(number) if process is None else process.send_signal(number)

    def prepare():
        """In the new process: room for the stack, and SIGTERM where this script is killed."""
        resource.setrlimit(resource.RLIMIT_STACK, (stack, most))
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, forward)
    # Triton 2.51.0 keeps HTTP bodies and nested JSON on its stack: with the usual 8 MiB, a body of 8 MB or 200,000 brackets
    # end it by SIGSEGV. To go when a later server does not.
    _, most = resource.getrlimit(resource.RLIMIT_STACK)
    stack = STACK_BYTES if most == resource.RLIM_INFINITY else min(STACK_BYTES, most)
    # a session of its own: Ctrl-C would reach it twice, and the second one ends it at once
    process = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=prepare)
    for number in early:
        process.send_signal(number)
    code = wait_for_end(process, address)
    with contextlib.suppress(ProcessLookupError):  # where the server has crashed its Python backends are left
        os.killpg(process.pid, signal.SIGKILL)
    return code


def main():
    args = parse_arguments()
    package = find_packages()
    check_repository(args.model_repository)
    address = find_address(args)
    server, site = os.path.join(package, "tritonserver"), os.path.dirname(package)
    libraries = [sysconfig.get_config_var("LIBDIR"), os.path.join(site, "nvidia_pytriton.libs"),
                 os.environ.get("LD_LIBRARY_PATH")]
    # the server's Python starts without PYTHONPATH and the like, as the environment of the first python3 in PATH
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, libraries)),
                   "PATH": f"{os.path.dirname(sys.executable)}:{os.environ.get('PATH', '')}"}
    with tempfile.TemporaryDirectory(prefix="triton-backends-") as backends:
        make_backends(backends, server, environment)
        code = run_server(server_command(args, address, server, backends), environment, (address, args.http_port))
        for left in glob.glob(f"/dev/shm/{os.path.basename(backends)}*"):  # by a server that crashed or ended while starting
            os.remove(left)
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    run_script(main)

"""Where the servers of deploy/ listen, and the limits that they share. Needs the standard library only."""

import socket

from textcls.common.errors import UserError

BACKLOG = 2048  # connections that the system holds until they are taken
HEAD_SECONDS, BODY_SECONDS, IDLE_SECONDS = 10, 30, 65  # for a request's head and its body; between requests of a connection
DISCARDED_BYTES = 1 << 24  # of a refused body, at most: a client that is still sending would see a reset and not the answer
MAX_TEXT_LENGTH = 10000  # characters of a text, unless an option says otherwise


def listen(host: str, port: int, option: str, is_shared: bool = False) -> socket.socket:
    """Make a listening socket. option: what names the port in messages. is_shared: other sockets may have the same address.
    UserError where there can be none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG, reuse_port=is_shared)
    except (OSError, UnicodeError, OverflowError) as error:  # UnicodeError: no name of a host; the last: no number of a port
        reason = str(getattr(error, "strerror", error)).split(" (")[0]
        address = "" if host == "127.0.0.1" else ", and an address of this machine as host"
        raise UserError(f"{option} {port}: cannot listen on {host} ({reason}), expected a free port{address}") from None


def listen_together(host: str, port: int, option: str, count: int) -> list[socket.socket]:
    """Make listening sockets of one address, between which the system shares new connections out. UserError as `listen`."""
    if not hasattr(socket, "SO_REUSEPORT"):
        raise UserError("--workers: this system cannot share a port between processes, expected Linux, or --workers 1")
    with listen(host, port, option) as alone:  # refuses a port in use, even by sockets that would share it
        port = alone.getsockname()[1]
    return [listen(host, port, option, is_shared=True) for _ in range(count)]


def url_host(host: str) -> str:
    """Return a host as it stands in addresses: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host

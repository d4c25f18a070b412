"""Where the three servers listen. Needs the standard library only."""

import socket

from textcls.common.errors import UserError

BACKLOG = 2048  # connections that the system holds until they are taken


def listen(host: str, port: int, option: str) -> socket.socket:
    """Make a listening socket. option: what names the port in messages. UserError where there can be none."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=BACKLOG)
    except (OSError, UnicodeError, OverflowError) as error:  # UnicodeError: no name of a host; the last: no number of a port
        reason = str(getattr(error, "strerror", error)).split(" (")[0]
        raise UserError(f"{option} {port}: cannot listen on {host} ({reason}), expected a free port, and an address of this "
                        "machine as host") from None


def url_host(host: str) -> str:
    """Return a host as it stands in addresses: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host

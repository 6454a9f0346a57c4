"""Who may change what Nexus does: requests by this server's own name and from its own pages; a page elsewhere must not get
there. Events are taken from everywhere."""

from __future__ import annotations

import re
import socket
from collections.abc import Set
from ipaddress import ip_address

from pipeline.errors import NexusError

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:\[\]]+)(?::([0-9]{1,5}))?").fullmatch


def require_own(host: str, origin: str | None, names: Set[str], port: int) -> None:
    """Raises NexusError where the Host header names another server or port, or a page of another origin asks."""
    if origin is not None and origin.partition("://")[2].lower() != host.lower():
        raise NexusError("foreign_origin", f"a page of {origin} may not ask for this", status=403)
    found = _HOST(host.lower())
    if found is None or int(found[2] or port) != port or not _is_own(found[1].strip("[]"), names):
        takes = f"one of {', '.join(sorted(names))}, or an address of this machine, at port {port}"
        raise NexusError("foreign_host", f"Host is {host}; it takes {takes}", status=403)


def _is_own(name: str, names: Set[str]) -> bool:
    return name in {own.lower() for own in names} or _is_bindable(name)


def _is_bindable(name: str) -> bool:
    """An address of this machine, as only those can be bound: a server on 0.0.0.0 is reached by any of them."""
    try:
        address = ip_address(name)
        if address.is_unspecified or address.is_multicast:
            return False
        with socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.bind((name, 0))
    except (ValueError, OSError):
        return False
    return True

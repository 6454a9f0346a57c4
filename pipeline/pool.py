"""Connections to the store: redis-py's own, without what costs more than the store does.

Python keeps a socket's timeout by asking the kernel, before each send and each read, whether it may: two system calls more per
command, and two more waits for the interpreter. Here the kernel keeps it. redis-py counts each turn of a connection for its
metrics and asks the system whether it is still good; here only one that nobody has used for a while is asked: a store that has
ended and come back since takes longer than that.
"""

from __future__ import annotations

import socket
import struct
import time
from typing import TYPE_CHECKING, Any

import hiredis
import redis

TRUSTED_S = 0.02  # after its last use a connection is taken for good
_TIMEVAL = struct.Struct("@ll")

if TYPE_CHECKING:
    _Base = redis.Connection
else:
    _Base = object


class Packer:
    """Packs commands as redis-py does, but for a walk over every word in Python, which costs more than all the rest."""

    def pack(self, name: str, *words: str | bytes | int | float) -> list[bytes]:
        return [hiredis.pack_command((*name.split(), *words))]  # type: ignore[arg-type]  # its stub knows tuples of one


class _Socket(socket.socket):
    """Blocks, up to the kernel's timeout."""

    @classmethod
    def of(cls, made: socket.socket, timeout_s: float) -> _Socket:
        """The same connection; `made` is not to be used any more."""
        ours = cls(made.family, made.type, made.proto, made.detach())
        ours.settimeout(None)
        limit = _TIMEVAL.pack(int(timeout_s), int(timeout_s % 1 * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, limit)
        return ours

    def recv_into(self, *args: Any) -> int:
        try:
            return super().recv_into(*args)
        except BlockingIOError as error:
            raise TimeoutError("timed out") from error

    def sendall(self, *args: Any) -> None:
        try:
            super().sendall(*args)
        except BlockingIOError as error:
            raise TimeoutError("timed out") from error


class _Waits(_Base):
    """The part of a connection that is ours."""

    def _connect(self) -> socket.socket:
        made = super()._connect()
        return _Socket.of(made, self.socket_timeout) if self.socket_timeout else made


class _Tcp(_Waits, redis.Connection):
    pass


class _Unix(_Waits, redis.UnixDomainSocketConnection):
    pass


class Pool(redis.ConnectionPool):
    """Connections for whoever wants one. One over TLS stays as redis-py makes it."""

    def __init__(self, connection_class: type = redis.Connection, **options: Any) -> None:
        ours: dict[type, type] = {redis.Connection: _Tcp, redis.UnixDomainSocketConnection: _Unix}
        super().__init__(ours.get(connection_class, connection_class), command_packer=Packer(), **options)

    def get_connection(self, command_name: Any = None, *keys: Any, **options: Any) -> Any:
        connection: Any
        with self._lock:
            try:
                connection = self._available_connections.pop()
            except IndexError:
                connection = self.make_connection()
            self._in_use_connections.add(connection)
        try:
            if not connection.is_connected:
                connection.connect()
            elif time.monotonic() - connection.used_at > TRUSTED_S and spoke(connection):
                connection.disconnect()
                connection.connect()
        except BaseException:
            self.release(connection)
            raise
        return connection

    def release(self, connection: Any) -> None:
        connection.used_at = time.monotonic()
        with self._lock:
            self._in_use_connections.discard(connection)
            self._available_connections.append(connection)


def spoke(connection: Any) -> bool:
    """The store has said something, or has closed it."""
    try:
        return bool(connection.can_read())
    except (redis.ConnectionError, redis.TimeoutError, OSError):
        return True

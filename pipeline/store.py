"""The connection to the store: one client, the Lua scripts by name, and foreign errors translated at this boundary."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from pipeline.errors import Fenced, StoreFull, StoreRefused, StoreUnavailable, StoreWrongType
from pipeline.keys import HEAD
from pipeline.pool import Pool, spoke

Word = str | bytes | int | float
Command = Sequence[Word]
T = TypeVar("T")

_LUA = Path(__file__).parent / "lua"
_TIMEOUT_S = 5.0
_PATIENCE_S = 1.0  # with an answer, then it is waited for: that ends with an error
_HASHES_AT_ONCE, _FIELDS_AT_ONCE = 10, 500  # in one call of find.lua, which nothing else may interrupt
_FEW = 1_000  # look-ups that are done in one call, whatever their hashes
_ERRORS = (redis.RedisError, redis.exceptions.RedisClusterException)  # the second is none of the first
_AWAY = (redis.exceptions.ReadOnlyError, redis.exceptions.ClusterError)
_AWAY_WORDS = ("LATE", "BUSY", "NOREPLICAS")  # answers of a store that is there, but not just now
_UNANSWERED = (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError)
_IN_PIPELINE = " of pipeline caused error: "  # the client puts the command before it, whatever that says
_NOT_BEGUN = (redis.exceptions.BusyLoadingError, redis.exceptions.AuthenticationError)


class Call:
    """A script or a command under way, without what the client does around each command for its metrics: that costs more than the call."""

    def __init__(self, client: Any, cluster: bool, words: Command, anew: Command) -> None:
        """`anew` is sent where the store has forgotten the script. A Cluster's client sends it all when the result is asked for."""
        self._client, self._words, self._anew = client, words, anew
        self._connection: Any = None
        self._began = time.monotonic()
        if not cluster:
            self._connection = client.connection_pool.get_connection()
            self._send(words)

    def _send(self, words: Command) -> None:
        try:
            self._connection.send_command(*words)
        except BaseException:
            self.close()
            raise

    def ready(self) -> bool:
        """Whether result() has no need to wait, or has to see why there is no answer."""
        late = time.monotonic() - self._began > _PATIENCE_S
        return late or self._connection is None or spoke(self._connection)

    def result(self) -> Any:
        """Waits for the answer. Raises StoreError."""
        try:
            try:
                return self._answer(self._words)
            except redis.exceptions.NoScriptError:
                if self._connection is not None:
                    self._send(self._anew)
                return self._answer(self._anew)
        except _ERRORS as error:
            raise translate(error) from error
        finally:
            self._release()

    def _answer(self, words: Command) -> Any:
        return (
            self._connection.read_response() if self._connection is not None else self._client.execute_command(*words)
        )

    def close(self) -> None:
        """Give up an answer that nobody waits for any more."""
        if self._connection is not None:
            self._connection.disconnect()  # or the next to have this connection would read it
            self._release()

    def _release(self) -> None:
        if self._connection is not None:
            self._client.connection_pool.release(self._connection)
            self._connection = None


class Store:
    """A Valkey or Redis server, embedded server or Cluster.

    Nothing is retried in here: a write whose answer is lost, or late, may have happened, and only the caller knows what to do then.
    Raises StoreUnavailable (away, loading, read-only), StoreFull (memory limit, disk), StoreRefused (a wrong script or
    key) and Fenced (the lease is lost).
    """

    def __init__(self, url: str, cluster: bool = False) -> None:
        options: dict[str, Any] = {
            "protocol": 2,
            "socket_timeout": _TIMEOUT_S,
            "socket_connect_timeout": 2.0,
            "retry": Retry(NoBackoff(), 0),
            "decode_responses": False,
        }
        self.cluster = cluster
        self._url, self._options = url, options
        self._clock_lead: int | None = None  # of the store's clock over this process's monotonic one, ms
        self._client: Any = None
        if not cluster:
            self._client = redis.Redis.from_pool(Pool.from_url(url, **options))
        self._sources = {path.stem: _script(path) for path in _LUA.glob("[!_]*.lua")}
        self._shas = {name: hashlib.sha1(text.encode()).hexdigest() for name, text in self._sources.items()}

    def saw_time(self, store_ms: int) -> None:
        """The store's clock has just said this, epoch ms."""
        self._clock_lead = store_ms - time.monotonic_ns() // 1_000_000

    def deadline(self, patience_ms: int) -> int:
        """A moment ahead by the store's own clock, epoch ms; 0 as long as that clock is not known."""
        lead = self._clock_lead
        return 0 if lead is None else time.monotonic_ns() // 1_000_000 + lead + patience_ms

    @property
    def client(self) -> Any:
        """The redis-py client; a Cluster client is made at first use, since making it asks the cluster."""
        if self._client is None:
            self._client = redis.RedisCluster.from_url(self._url, **self._options)
        return self._client

    def call(self, *words: Word) -> Any:
        """One command, its raw answer."""
        try:
            return self.client.execute_command(*words)
        except _ERRORS as error:
            raise translate(error) from error

    def lean(self, *words: Word) -> Any:
        """The same without what the client does around each command; the answer is as the protocol has it."""
        return self._send(words, words).result()

    def info(self, *sections: str) -> dict[str, str]:
        """Sections of INFO, of the node that holds Nexus's keys where there are several; a store that is loading answers too."""
        try:
            where = {"target_nodes": self.client.get_node_from_key(HEAD)} if self.cluster else {}
            told = self.client.execute_command("INFO", *sections, **where)
        except _ERRORS as error:
            raise translate(error) from error
        return {str(name): str(value) for name, value in told.items()}

    def many(self, commands: Iterable[Command], atomic: bool = False) -> list[Any]:
        """Several commands in one round trip, and in one step if `atomic`; the first error is raised."""
        try:
            pipe = self.client.pipeline(transaction=atomic)
            for command in commands:
                pipe.execute_command(*command)
            answers: list[Any] = pipe.execute()
            return answers
        except _ERRORS as error:
            raise translate(error) from error

    def run(self, script: str, keys: Sequence[str], args: Sequence[Word]) -> Any:
        """A script of pipeline/lua by its name, loaded anew when the store has forgotten it."""
        return self.begin(script, keys, args).result()

    def begin(self, script: str, keys: Sequence[str], args: Sequence[Word]) -> Call:
        """run() in two parts: the script is on its way, the answer is waited for later. A call whose result is not asked for
        has to be closed."""
        words = (len(keys), *keys, *args)
        return self._send(("EVALSHA", self._shas[script], *words), ("EVAL", self._sources[script], *words))

    def _send(self, words: Command, anew: Command) -> Call:
        try:
            return Call(self.client, self.cluster, words, anew)
        except _ERRORS as error:  # not all of it has left, so it is not carried out
            raise translate(error, sent=False) from error

    def find(self, hashes: Sequence[str], fields: Sequence[str]) -> list[bytes | None]:
        """For each field its value in the first of the hashes that has it, None where none does."""
        if len(hashes) * len(fields) <= _FEW:
            few: list[bytes | None] = self.run("find", hashes, fields)
            return few
        found: list[bytes | None] = [None] * len(fields)
        for keys in _pieces(hashes, _HASHES_AT_ONCE):
            absent = [i for i, value in enumerate(found) if value is None]
            for some in _pieces(absent, _FIELDS_AT_ONCE):
                for i, value in zip(some, self.run("find", keys, [fields[i] for i in some]), strict=True):
                    found[i] = value
        return found

    def close(self) -> None:
        if self._client is not None:
            self._client.close()


def as_hash(flat: Any) -> Mapping[bytes, bytes]:
    """A HGETALL's answer, in whichever shape the client gives it."""
    return flat if isinstance(flat, dict) else dict(zip(flat[::2], flat[1::2], strict=True))


def _pieces(items: Sequence[T], most: int) -> Iterator[Sequence[T]]:
    return (items[at : at + most] for at in range(0, len(items), most))


def _script(path: Path) -> str:
    """A script's text; a line `-- include NAME` stands for the shared part lua/NAME.lua."""
    return re.sub(
        r"^-- include (\w+)$", lambda found: (_LUA / f"{found[1]}.lua").read_text(), path.read_text(), flags=re.M
    )


def translate(error: Exception, sent: bool = True) -> Exception:
    """The project's error for a client library's one; of a request that was `sent` it may be open whether it was carried out."""
    text = str(error).rpartition(_IN_PIPELINE)[2]
    if "FENCED" in text:
        return Fenced(
            "the lease has another epoch by now: another instance holds it, or this one has fenced off an unanswered commit"
        )
    if isinstance(error, redis.exceptions.OutOfMemoryError) or "OOM" in text or "MISCONF" in text:
        return StoreFull(f"the store takes no more writes: {text}")
    if isinstance(error, redis.exceptions.MovedError):
        return StoreRefused("the store is a node of a Cluster: set REDIS_CLUSTER=true")
    refused = isinstance(error, redis.exceptions.ResponseError) and not isinstance(error, _AWAY)
    if refused and not text.startswith(_AWAY_WORDS):
        kind = StoreWrongType if "WRONGTYPE" in text else StoreRefused
        return kind(f"the store refuses what was asked: {text}")
    return StoreUnavailable(f"the store does not answer: {text}", lost=sent and _broke(error))


def _broke(error: BaseException | None) -> bool:
    """Whether an established connection broke, or stayed silent for too long. A Cluster's client tells instead that it found no node
    afterwards."""
    if isinstance(error, _UNANSWERED) and not isinstance(error, _NOT_BEGUN):
        return "connecting to" not in str(error)
    return isinstance(error, redis.exceptions.RedisClusterException) and _broke(error.__context__)

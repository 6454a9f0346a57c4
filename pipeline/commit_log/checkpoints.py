"""Checkpoints: where each stream stands, its account, and the one step in which effects and checkpoint move
together."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from pipeline import keys
from pipeline.commit_log.frames import Head, Position
from pipeline.errors import OutcomeUnknown, StoreUnavailable
from pipeline.store import Call, Command, Store, as_hash

JOURNAL_LENGTH = 20_000  # commits remembered per stream: hours at one a second, days when quiet
_JOURNAL = struct.Struct("<QQ")
_SIZE = struct.Struct("<I")
_MOST_WORDS = 6_000  # a multiple of 2: fields stay with their values
_TELL_EVERY_MS = 10_000
_told: dict[str, tuple[int, int]] = {}  # stream -> when (epoch ms) dead letters were told of, and how many came since
log = logging.getLogger(__name__)
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


@dataclass(slots=True)
class DeadLetter:
    """An event that a stream could not process; `body` is its stored JSON. Times in epoch ms."""

    id: str
    stream: str
    place: int
    reason: str
    attempts: int
    first_at: int
    last_at: int
    source: str
    received_at: int
    body: bytes


@dataclass(slots=True)
class Progress:
    """How far a stream came since its last commit: the new position, events processed, and the dead."""

    stream: str
    position: Position
    processed: int = 0
    dead: list[DeadLetter] = field(default_factory=list)


@dataclass(slots=True)
class Account:
    """A stream's account in an audit. `accepted` is what was accepted for it, `pending` is counted from positions."""

    accepted: int
    processed: int
    dead: int
    pending: int
    at: int
    position: Position

    @property
    def unexplained(self) -> int:
        return self.accepted - self.processed - self.dead - self.pending


@dataclass(slots=True)
class Audit:
    """One consistent look at the log's head, the lease, and every stream's account; `at` by the store's own clock."""

    at: int
    head: Head
    epoch: int
    holder: str
    lease_expires: int
    accounts: dict[str, Account]

    @property
    def owned(self) -> bool:
        """Some instance holds the lease."""
        return self.epoch > 0 and self.lease_expires > self.at

    @property
    def unexplained(self) -> int:
        return sum(abs(account.unexplained) for account in self.accounts.values())


def commit(store: Store, epoch: int, commands: Iterable[Command]) -> None:
    """Run the commands as one atomic step. Raises Fenced (nothing was written) or StoreError (it may have been)."""
    begin(store, epoch, pack(commands)).result()


def write(store: Store, commands: Iterable[Command]) -> None:
    """The same for what any instance may write, whoever holds the lease: people's orders, statistics. Like a commit it passes
    where the store is over its memory limit, which refuses such commands by themselves. Raises StoreError."""
    try:
        store.run("write", (keys.OWNER,), (pack(commands),))
    except StoreUnavailable as error:
        if error.lost:
            raise OutcomeUnknown(f"{error.message}; whether it was done is not known: look, or ask again") from error
        raise


def begin(store: Store, epoch: int, packed: bytes) -> Call:
    """commit() in two parts: it is on its way, and its result() raises what commit() does."""
    return store.begin("commit", (keys.OWNER,), (epoch, packed))


def pack(commands: Iterable[Command]) -> bytes:
    """Commands as one word, behind which others may be put: the store takes longer to take thousands of words in than to carry
    them out. Each is the number of its words, then the words, each behind its length. An HSETNX may be of many fields."""
    parts: list[bytes] = []
    add, size = parts.append, _SIZE.pack
    for command in commands:
        for some in (command,) if len(command) <= _MOST_WORDS else _pieces(command):
            add(size(len(some)))
            for word in some:
                if type(word) is not bytes:
                    if not isinstance(word, (str, int, float)):
                        raise TypeError(f"a word is bytes, text or a number, not {type(word).__name__}")
                    word = str(word).encode()
                add(size(len(word)))
                add(word)
    return b"".join(parts)


def _pieces(command: Command) -> list[Command]:
    """A command of more words than a script can hand on at once (its stack takes 8,000) as several: HSET, HDEL, ZADD, LPUSH ...
    all take a key and then as many as one likes."""
    return [(*command[:2], *command[at : at + _MOST_WORDS]) for at in range(2, len(command), _MOST_WORDS)]


def tell_of_dead(progress: Progress, now: int) -> None:
    """Once they are committed: a line for the first dead letters of a stream, then one every ten seconds at most, since a client can
    make thousands."""
    if not progress.dead:
        return
    at, untold = _told.get(progress.stream, (0, 0))
    untold += len(progress.dead)
    if now - at >= _TELL_EVERY_MS or now < at:
        extra = {"stream": progress.stream, "events": untold, "reason": progress.dead[0].reason}
        log.warning("events are dead letters", extra=extra)
        at, untold = now, 0
    _told[progress.stream] = at, untold


def advance(progress: Progress, now: int) -> list[Command]:
    """The commands that move a stream's checkpoint and account."""
    key, at = keys.CHECKPOINT + progress.stream, progress.position
    # The journal has every commit, also of canaries, which count nowhere: receipts say when they were made.
    commands: list[Command] = [
        ("HSET", key, "segment", at.segment, "offset", at.offset, "index", at.index, "ordinal", at.ordinal, "at", now),
        ("LPUSH", keys.JOURNAL + progress.stream, _JOURNAL.pack(at.ordinal, now)),
        ("LTRIM", keys.JOURNAL + progress.stream, 0, JOURNAL_LENGTH - 1),
    ]
    if progress.processed:
        commands.append(("HINCRBY", key, "processed", progress.processed))
    if progress.dead:
        commands.append(("HINCRBY", key, "dead", len(progress.dead)))
        for letter in progress.dead:
            commands += bury(letter)
    return commands


def bury(letter: DeadLetter) -> list[Command]:
    """The commands that keep a dead letter."""
    kept = {
        "id": letter.id,
        "stream": letter.stream,
        "place": letter.place,
        "reason": letter.reason,
        "attempts": letter.attempts,
        "first_at": letter.first_at,
        "last_at": letter.last_at,
        "source": letter.source,
        "received_at": letter.received_at,
        "body": letter.body.decode(errors="replace"),
    }
    return [
        ("HSET", keys.DEAD + letter.stream, letter.id, _encode(kept)),
        ("ZADD", keys.DEAD_ORDER + letter.stream, letter.last_at, letter.id),
    ]


def reasons(store: Store, stream: str, places: Sequence[int]) -> dict[int, str]:
    """Which events, by place, are a stream's dead letters, and why."""
    ids = [f"{stream}-{place}" for place in places]
    rows = store.call("HMGET", keys.DEAD + stream, *ids) if ids else []
    return {place: _decode(raw)["reason"] for place, raw in zip(places, rows, strict=True) if raw is not None}


def read(store: Store, streams: Sequence[str]) -> dict[str, Position]:
    """The committed positions of streams."""
    rows = store.many([("HMGET", keys.CHECKPOINT + s, "segment", "offset", "index", "ordinal") for s in streams])
    return {s: Position(*[int(v) for v in row]) if row[0] else Position() for s, row in zip(streams, rows, strict=True)}


def audit(store: Store) -> Audit:
    """Every stream's account, from the counters themselves, in one consistent read."""
    answer = store.run("audit", (keys.HEAD, keys.LOG, keys.CHECKPOINT, keys.OWNER), keys.STREAMS)
    now = int(answer[2])
    store.saw_time(now)
    head = Head.unpack(answer[0])
    owner = _pairs(answer[1])
    accounts = {}
    for stream, row in zip(keys.STREAMS, answer[3:], strict=True):
        processed, dead, at, pending, segment, offset, index, ordinal = (int(v) for v in row)
        accepted = head.accepted + (head.bridge_only if stream == "bridge" else 0)
        accounts[stream] = Account(accepted, processed, dead, pending, at, Position(segment, offset, index, ordinal))
    return Audit(now, head, int(owner.get("epoch", 0)), owner.get("holder", ""), int(owner.get("expires", 0)), accounts)


def _pairs(flat: Any) -> dict[str, str]:
    return {key.decode(): value.decode() for key, value in as_hash(flat).items()}

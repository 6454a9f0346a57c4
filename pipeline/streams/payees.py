"""Payees: whom the payments went to, so that a fraud report counts for the payee of the payment that it is about, and only once."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import msgspec

from pipeline import keys
from pipeline.store import Command, Store
from pipeline.streams.stream import Batch

_DAY_MS = 86_400_000
_PER_COMMAND = 500
NOT_YET = -1


class Paid(msgspec.Struct, array_like=True, gc=False, frozen=True):
    """A payment: its payee, its ordinal in the log, and that of the first report that called it a fraud.

    The ordinals let a backfill, which finds what the stream has kept since, tell what was known where it reads."""

    merchant: str
    ordinal: int
    reported: int = NOT_YET

    def latest(self) -> int:
        """Where the log last told something of it."""
        return max(self.ordinal, self.reported)


_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(Paid).decode
Made = tuple[int, str, Paid]  # index in the batch, transaction, and what is to be kept of it


class Payees:
    """What is kept of payments until retention lets go of them: a report may come as late. `over` says whose word stands where the
    store has another: the stream's, not a backfill's, which comes behind it."""

    def __init__(self, store: Store, retention_ms: int, over: bool) -> None:
        self._store, self._retention_ms, self._over = store, retention_ms, over
        self._kept: dict[
            str, dict[str, Paid]
        ] = {}  # key, of a day of arrival -> transaction -> what is not written yet
        self._writing: dict[str, dict[str, Paid]] = {}

    def take_over(self, before: Payees) -> None:
        """Go on where another one stands."""
        self._kept, self._writing = before._kept, before._writing

    def clear(self) -> None:
        self._kept, self._writing = {}, {}

    def before(self, batch: Batch, reports: Iterable[int]) -> dict[str, Paid]:
        """The payments from before the batch that its reports are about."""
        asked = {t for i in reports if (t := transaction_of(batch.data(i))) is not None}
        found: dict[str, Paid] = {}
        for paid in (*self._kept.values(), *self._writing.values()):
            for transaction in asked:  # few, of many that are kept
                if (one := paid.get(transaction)) is not None:
                    found[transaction] = max(found.get(transaction, one), one, key=Paid.latest)
        if wanted := sorted(asked.difference(found)):
            today = batch.arrivals[-1] // _DAY_MS
            days = range(today + 1, today - self._retention_ms // _DAY_MS - 2, -1)
            stored = self._store.find([f"{keys.PAID}{day}" for day in days], wanted)
            found |= {t: _read(raw) for t, raw in zip(wanted, stored, strict=True) if raw is not None}
        return found

    def payments(self, batch: Batch, indexes: Iterable[int], lost: Collection[int]) -> list[Made]:
        """The payments of a batch, without those that were not counted."""
        made = []
        for index in indexes:
            data = batch.data(index)
            transaction, merchant = transaction_of(data), merchant_of(data)
            if transaction is not None and merchant is not None and index not in lost:
                made.append((index, transaction, Paid(merchant, batch.first_ordinal + index)))
        return made

    def join(
        self, batch: Batch, reports: Iterable[int], before: Mapping[str, Paid], payments: Sequence[Made]
    ) -> tuple[dict[int, str | None], list[Made]]:
        """By index whom the reports count for, None where nobody; and the payments that are reported by that."""
        known, upcoming = dict(before), deque(payments)
        owners: dict[int, str | None] = {}
        reported = []
        for index in reports:
            while upcoming and upcoming[0][0] < index:
                _, transaction, paid = upcoming.popleft()
                known[transaction] = paid
            owners[index], now_reported = join(known, batch.data(index), batch.first_ordinal + index)
            reported += [(index, transaction, paid) for transaction, paid in now_reported]
        return owners, reported

    def keep(self, batch: Batch, made: Iterable[Made]) -> None:
        """Keep what was made of a batch, to be written with the next checkpoint."""
        for index, transaction, paid in made:
            day = batch.arrivals[index] // _DAY_MS
            self._kept.setdefault(f"{keys.PAID}{day}", {})[transaction] = paid

    def cut(self) -> Iterator[Command]:
        """What keeps them, to be written with the checkpoint; written() once it was."""
        self._writing, self._kept = self._kept, {}
        return self._commands()

    def _commands(self) -> Iterator[Command]:
        for key, pairs in self._writing.items():
            plain = "HSET" if self._over else "HSETNX"
            for command, some in (
                (plain, [(t, paid) for t, paid in pairs.items() if paid.reported == NOT_YET]),
                ("HSET", [(t, paid) for t, paid in pairs.items() if paid.reported != NOT_YET]),
            ):
                items = iter(some)
                while part := list(islice(items, _PER_COMMAND)):
                    yield (command, key, *[word for t, paid in part for word in (t, _pack(paid))])
            yield ("PEXPIRE", key, self._retention_ms + 2 * _DAY_MS)

    def written(self) -> None:
        self._writing = {}


def join(known: dict[str, Paid], report: Mapping[str, Any], ordinal: int) -> tuple[str | None, list[tuple[str, Paid]]]:
    """Whom a report counts for, by the payments `known` so far, and which of these it is the first to call a fraud."""
    transaction = transaction_of(report)
    paid = known.get(transaction) if transaction is not None else None
    if transaction is None or paid is None or paid.ordinal >= ordinal:
        return None, []
    if report.get("is_fraud") != 1:
        return paid.merchant, []
    if paid.reported not in (NOT_YET, ordinal):
        return None, []  # reported before
    known[transaction] = Paid(paid.merchant, paid.ordinal, ordinal)
    return paid.merchant, [(transaction, known[transaction])]


def merchant_of(data: Mapping[str, Any]) -> str | None:
    """The payee of a payment, None where none is named."""
    value = data.get("merchant_id")
    if type(value) is int:
        value = str(value)
    return value if type(value) is str and 1 <= len(value) <= 128 else None


def transaction_of(data: Mapping[str, Any]) -> str | None:
    """The transaction of a payment or a report, None where none is named."""
    value = data.get("transaction_id")
    return str(value) if type(value) in (str, int) else None


def _read(raw: bytes) -> Paid:
    try:
        return _unpack(raw)
    except msgspec.DecodeError:
        return Paid(raw.decode(), 0)  # an earlier version kept the payee alone

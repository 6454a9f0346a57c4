"""Reads recorded events from CSV or NDJSON, plain or gzip: each row becomes an event with an id of its own, or a reason why
it cannot."""

import argparse
import csv
import gzip
import hashlib
import heapq
import io
import math
import re
import string
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, tzinfo
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec

# A longer number loses digits as a float, and is rather somebody's id.
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,14})(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,2})?")
TRUTH = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}

Convert = Callable[[str], Any]


class UsageError(Exception):
    """The options do not fit the file."""


class Event(NamedTuple):
    row: int  # the first record of the file is 1, a header not counted
    at: int | None  # event time, epoch ms
    body: bytes
    label: "Event | None" = None  # the fraud_report that follows it later
    is_label: bool = False


class Unmappable(NamedTuple):
    row: int
    reason: str
    content: str


Item = Event | Unmappable


def open_bytes(path: Path) -> IO[bytes]:
    """The file's content, unpacked where it is gzip."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return io.BufferedReader(gzip.GzipFile(path, "rb")) if packed else path.open("rb")


def identify(path: Path) -> tuple[str, int]:
    """The content's SHA-256, of which event ids are made, and its number of lines, for the progress bar."""
    digest, lines = hashlib.sha256(), 0
    with open_bytes(path) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            lines += chunk.count(b"\n")
    return digest.hexdigest(), lines


def guess_format(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".ndjson", ".jsonl")):
        return "ndjson"
    if name.endswith((".csv", ".tsv", ".txt")):
        return "csv"
    raise UsageError(f"cannot tell the format of {path.name}: add --format csv or --format ndjson")


def read_csv(path: Path, args: argparse.Namespace, prefix: str) -> Iterator[Item]:
    # A byte that is not UTF-8 spoils its own row only: it becomes a surrogate, which does not encode.
    with open_bytes(path) as raw, io.TextIOWrapper(raw, "utf-8-sig", "surrogateescape", newline="") as text:
        lines = csv.reader(text, delimiter=args.delimiter, skipinitialspace=True)
        header = next(lines, None)
        if not header:
            raise UsageError(f"{path} has no header line")
        mapping, row = CsvMapping(header, args, prefix), 0
        while True:
            try:
                cells = next(lines)
            except StopIteration:
                return
            except csv.Error as error:
                row += 1
                if row >= args.start_row:
                    yield Unmappable(row, str(error), "")
                continue
            if cells:
                row += 1
                if row >= args.start_row:
                    yield mapping(row, cells)


class _Known(msgspec.Struct):
    event_id: Any = msgspec.UNSET
    timestamp: Any = None


def read_ndjson(path: Path, args: argparse.Namespace, prefix: str) -> Iterator[Item]:
    """Each line is an event already, flat or nested: passed on as it stands, with an event_id where it has none."""
    decode, row = msgspec.json.Decoder(_Known).decode, 0
    with open_bytes(path) as file:
        for raw in file:
            line = raw.strip().removeprefix(b"\xef\xbb\xbf")
            row += bool(line)
            if not line or row < args.start_row:
                continue
            try:
                line.decode()
                known = decode(line)
                if known.event_id is msgspec.UNSET or known.event_id is None:
                    line = msgspec.json.encode({"event_id": f"{prefix}-{row}"} | _without_id(line))
                yield Event(row, _event_time(known.timestamp), line)
            except (ValueError, RecursionError) as error:
                yield Unmappable(row, f"not an event: {error}", line.decode(errors="replace"))


def _without_id(line: bytes) -> dict[str, msgspec.Raw]:
    event = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
    event.pop("event_id", None)
    return event


def _event_time(value: Any) -> int | None:
    """An event's own timestamp in epoch ms, for pacing alone: whether it is a good one is Nexus's to say."""
    try:
        return int(value) if isinstance(value, int | float) else _epoch_ms(datetime.fromisoformat(value), UTC)
    except (TypeError, ValueError, OverflowError):
        return None


class CsvMapping:
    """Turns the cells of a row into an event, as the options say. Empty cells are left out."""

    def __init__(self, header: list[str], args: argparse.Namespace, prefix: str) -> None:
        self._header, self._prefix, self._type, self._user = header, prefix, args.event_type, args.user_template
        self._delay, self._zeros = args.label_delay, args.label_zeros
        self._encode = msgspec.json.Encoder().encode
        fields: list[tuple[str, str | None, Convert]] = [
            ("event_type", args.event_type_column, str),
            ("user_id", args.user_column, str),
            ("session_id", args.session_column, str),
            ("timestamp", args.time_column, time_parser(args.time_format, args.time_zone)),
            ("location.lat", args.lat_column, number),
            ("location.lng", args.lng_column, number),
            *args.map,
        ]
        self._fields: list[tuple[list[str], str, int, Convert]] = []  # the objects on the way, the name, column, type
        for target, column, convert in fields:
            if column is not None:
                *parents, leaf = target.split(".")
                self._fields.append((parents, leaf, self._column(column), convert))
        mapped = sorted(target for target, column, _ in fields if column is not None)
        for one, other in product(mapped, repeat=2):
            if other.startswith(f"{one}."):
                raise UsageError(
                    f"--map fills both {one} and {other}, which is within it: give one of them another name"
                )
        if self._user is not None:
            self._check_template(self._user)
        self._label = None if args.label_column is None else self._column(args.label_column)

    def __call__(self, row: int, cells: list[str]) -> Item:
        header = self._header
        column: int | None = None
        try:
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} cells under {len(header)} column names")
            event: dict[str, Any] = {"event_id": f"{self._prefix}-{row}", "event_type": self._type}
            for parents, name, column, convert in self._fields:
                if cell := cells[column]:
                    target = event
                    for parent in parents:
                        target = target.setdefault(parent, {})
                    target[name] = convert(cell)
            column = None  # from here on an error is the row's, not a column's
            if self._user is not None:
                event["user_id"] = self._user.format_map(dict(zip(header, cells, strict=True), row=row))
            for required in ("event_type", "user_id"):
                if not event.get(required):
                    raise ValueError(f"no {required}: its cell is empty")
            label = None if self._label is None else self._late_label(row, event, cells[self._label])
            return Event(row, event.get("timestamp"), self._encode(event), label)
        except (ValueError, OverflowError) as error:
            where = "" if column is None else f"column {header[column]!r}: "
            reason = "not UTF-8" if isinstance(error, UnicodeError) else f"{where}{error}"
            return Unmappable(row, reason, ",".join(cells).encode(errors="replace").decode())

    def _late_label(self, row: int, event: dict[str, Any], cell: str) -> Event | None:
        if not cell or not (truth(cell) or self._zeros):
            return None
        if "timestamp" not in event or "transaction_id" not in event.get("data", {}):
            raise ValueError("a labelled row needs a time and a transaction_id")
        at = event["timestamp"] + self._delay
        report = {
            "event_id": f"{event['event_id']}-label",
            "event_type": "fraud_report",
            "user_id": event["user_id"],
            "timestamp": at,
            "data": {"transaction_id": event["data"]["transaction_id"], "is_fraud": int(truth(cell))},
        }
        return Event(row, at, self._encode(report), is_label=True)

    def _check_template(self, template: str) -> None:
        try:
            for _, name, _, _ in string.Formatter().parse(template):
                if name not in (None, "row"):
                    self._column(str(name))
            template.format_map({**dict.fromkeys(self._header, ""), "row": 1})
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            takes = "it takes names of columns and row in braces, such as rider_{row}; a brace itself is written twice"
            raise UsageError(f"--user-template {template!r}: {error}; {takes}") from None

    def _column(self, name: str) -> int:
        if name not in self._header:
            raise UsageError(f"no column {name!r}; the file has: {', '.join(self._header)}")
        return self._header.index(name)


def guess(text: str) -> Any:
    """A number where the text is one as JSON writes it, else the text."""
    if not NUMBER.fullmatch(text):
        return text
    return int(text) if text.lstrip("-").isdigit() else float(text)


def number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not a finite number")
    return value


def truth(text: str) -> bool:
    try:
        return TRUTH[text.lower()]
    except KeyError:
        raise ValueError(f"{text!r} is neither true nor false") from None


TYPES: dict[str, Convert] = {"str": str, "int": int, "float": number, "bool": truth}


def time_parser(pattern: str, zone: tzinfo) -> Callable[[str], int]:
    """From a cell to epoch ms. `pattern`: iso, s, ms (since the epoch) or one of strptime's.

    Local times follow RFC 5545: the hour that comes twice in autumn is its first, and one that spring skips counts by
    the offset before the change. A time with an offset of its own keeps it.
    """

    def parse(text: str) -> int:
        if pattern in ("s", "ms"):
            return round(number(text) * (1000 if pattern == "s" else 1))
        return _epoch_ms(datetime.fromisoformat(text) if pattern == "iso" else datetime.strptime(text, pattern), zone)

    return lru_cache(4096)(parse)  # rows in time order often share a second or a minute


def _epoch_ms(moment: datetime, zone: tzinfo) -> int:
    return round((moment if moment.tzinfo else moment.replace(tzinfo=zone)).timestamp() * 1000)


def with_labels(items: Iterator[Item]) -> Iterator[Item]:
    """Puts each late label where its own time comes. Holds the labels that lie within one delay, nothing else."""
    pending: list[tuple[int, int, Event]] = []
    for item in items:
        if isinstance(item, Event):
            while pending and item.at is not None and pending[0][0] <= item.at:
                yield heapq.heappop(pending)[2]
            if item.label is not None and item.label.at is not None:
                heapq.heappush(pending, (item.label.at, item.row, item.label))
        yield item
    while pending:
        yield heapq.heappop(pending)[2]

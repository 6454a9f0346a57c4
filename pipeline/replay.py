"""Replays recorded events from a CSV or NDJSON file into a running Nexus: `python -m pipeline.replay FILE`.

Every row becomes one event whose id is made of the file's content and the row's number, so running it again doubles
nothing. Every row is accounted for: accepted, duplicate, rejected by Nexus, or unmappable, the last two with a reason.
"""

import argparse
import csv
import gzip
import hashlib
import heapq
import io
import math
import re
import signal
import string
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, tzinfo
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

from pipeline.post import Outbox, Pace, Poster, Refused, Rejection, Unanswered

SHOWN = 20  # problems printed one by one; further ones are counted, and all of them go to --rejects
TARGET = re.compile(r"(event_id|app_version|device_type|data(?:\.[^.:=]+)+)(?::(str|int|float|bool))?=(.+)")
# A longer number loses digits as a float, and is rather somebody's id.
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,14})(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,2})?")
TRUTH = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
UNITS = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}

EPILOG = "Exit code: 0 when Nexus has every row, 1 when it has not, 2 when the options do not fit."

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
        for _, name, _, _ in string.Formatter().parse(self._user or ""):
            if name not in (None, "row"):
                self._column(str(name))
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


class Replay:
    """Sends a file's items and keeps the account of its rows."""

    def __init__(self, poster: Poster, batch: int, bar: Any, rejects: IO[bytes] | None = None) -> None:
        self._bar, self._rejects = bar, rejects
        self.outbox = Outbox[Event](poster, batch, self._rejected, self._answered)
        self.rows = self.labels = self.unmappable = 0
        self._next_row, self._problems = 1, 0

    def run(self, items: Iterator[Item], pace: Pace | None = None, sleep: Callable[[float], None] = time.sleep) -> None:
        """Send all of them. Raises Unanswered and Refused; the account stands as of that moment."""
        for item in items:
            if isinstance(item, Unmappable):
                self.unmappable += 1
                self._problem(item.row, f"unmappable: {item.reason}", item.content)
                self._bar.update()
            else:
                if pace is not None and item.at is not None and pace.moves_on(item.at):
                    self.outbox.flush()
                    while (left := pace.due_in()) > 0:
                        sleep(min(left, 0.5))
                        self.outbox.settle(0)
                self.outbox.add(item.body, item)
            if isinstance(item, Event) and item.is_label:
                self.labels += 1
            else:
                self.rows, self._next_row = self.rows + 1, item.row + 1
        self.outbox.flush()
        self.outbox.settle(None)

    @property
    def left(self) -> int:
        """Events without an answer."""
        return self.rows + self.labels - self.unmappable - self.outbox.answered

    @property
    def resume_row(self) -> int:
        """The first row without an answer."""
        return min((event.row for event in self.outbox.waiting if not event.is_label), default=self._next_row)

    @property
    def complete(self) -> bool:
        return not (self.left or self.unmappable or self.outbox.rejected)

    def account(self) -> str:
        box = self.outbox
        read = f"{self.rows:,} rows" + (f" + {self.labels:,} late labels" if self.labels else "")
        return (
            f"read {read} = accepted {box.accepted:,} + duplicates {box.duplicates:,} + rejected {box.rejected:,}"
            f" + unmappable {self.unmappable:,}" + (f" + not answered {self.left:,}" if self.left else "")
        )

    def _answered(self, events: list[Event]) -> None:
        self._bar.update(sum(not event.is_label for event in events))

    def _rejected(self, event: Event, verdict: Rejection) -> None:
        self._problem(event.row, f"rejected: {verdict.field or verdict.code}: {verdict.message}", event.body.decode())

    def _problem(self, row: int, reason: str, content: str) -> None:
        if self._rejects is not None:
            self._rejects.write(msgspec.json.encode({"row": row, "reason": reason, "content": content}) + b"\n")
        self._problems += 1
        if self._problems <= SHOWN:
            self._bar.write(f"row {row}: {reason}", file=sys.stderr)
        elif self._problems == SHOWN + 1:
            self._bar.write("further rows of this kind are only counted; --rejects FILE lists all", file=sys.stderr)


def _target(text: str) -> tuple[str, str, Convert]:
    if not (match := TARGET.fullmatch(text)):
        raise ValueError
    target, kind, column = match.groups()
    return target, column, TYPES[kind] if kind else str if target.endswith("_id") else guess


def _speed(text: str) -> float | None:
    if text == "max":
        return None
    if number(text) <= 0:
        raise ValueError
    return float(text)


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (OSError, ZoneInfoNotFoundError):
        raise argparse.ArgumentTypeError(f"no time zone {name!r}; such as America/New_York") from None


def _duration_ms(text: str) -> int:
    return round(number(text[:-1]) * UNITS[text[-1:]]) if text[-1:] in UNITS else round(number(text) * 1000)


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m pipeline.replay", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="CSV with a header line, or NDJSON with one event a line; .gz too")
    add("--url", default="http://localhost:4000", help="where Nexus listens")
    add("--source", default="replay", help="the name the events are counted under")
    add("--speed", type=_speed, metavar="X", help="times the recorded pace (60: an hour a minute), or max (default)")
    add("--batch", type=_positive, default=500, help="events in a request")
    add("--in-flight", type=_positive, default=4, help="requests under way at once")
    add("--give-up-after", type=float, metavar="S", help="seconds without an answer; by default it never gives up")
    add("--start-row", type=_positive, default=1, metavar="N", help="the first row to send")
    add("--limit", type=_positive, metavar="N", help="at most so many rows")
    add("--rejects", type=Path, metavar="FILE", help="write rows that were not taken, with reasons, as NDJSON")
    add("--format", choices=("csv", "ndjson"), help="guessed from the name")
    add("--id-prefix", help="what event ids begin with, before the row number; by default the content's SHA-256")
    rows = parser.add_argument_group("how a CSV row becomes an event").add_argument
    rows("--delimiter", default=",")
    rows("--event-type", metavar="TYPE")
    rows("--event-type-column", metavar="C")
    rows("--user-column", metavar="C")
    rows("--user-template", metavar="T", help="such as rider_{name}, with column names and {row}")
    rows("--session-column", metavar="C")
    rows("--time-column", metavar="C", help="without one an event's time is that of its arrival")
    rows("--time-format", default="iso", help="iso (default), s or ms since the epoch, or as strptime takes it")
    rows("--time-zone", type=_zone, default=UTC, help="of times without an offset (default UTC)")
    rows("--lat-column", metavar="C")
    rows("--lng-column", metavar="C")
    rows("--map", type=_target, action="append", default=[], metavar="FIELD[:TYPE]=C",
         help="FIELD: data.NAME, event_id, app_version, device_type; TYPE: str, int, float, bool; without it numbers"
         " stay numbers, but a FIELD that ends in _id is text")  # fmt: skip
    rows("--label-column", metavar="C", help="0/1: send a fraud_report for the row's data.transaction_id, later")
    rows("--label-delay", type=_duration_ms, default="7d", help="how much later, such as 7d, 12h, 30m (default 7d)")
    rows("--label-zeros", action="store_true", help="send reports of 0 too")
    args = parser.parse_args(argv)
    try:
        args.format = args.format or guess_format(args.file)
    except UsageError as error:
        parser.error(str(error))
    if args.format == "csv":
        if (args.event_type is None) == (args.event_type_column is None):
            parser.error("a CSV needs --event-type or --event-type-column, one of them")
        if (args.user_column is None) == (args.user_template is None):
            parser.error("a CSV needs --user-column or --user-template, one of them")
        if (args.lat_column is None) != (args.lng_column is None):
            parser.error("--lat-column and --lng-column belong together")
        if args.label_column and not (args.time_column and "data.transaction_id" in [each[0] for each in args.map]):
            parser.error("--label-column needs --time-column and --map data.transaction_id=C")
    return args


def replay(args: argparse.Namespace) -> bool:
    """Send the file; true when Nexus has every row of it."""
    identity, lines = identify(args.file)
    read = read_csv if args.format == "csv" else read_ndjson
    items = with_labels(islice(read(args.file, args, args.id_prefix or identity[:32]), args.limit))
    left_to_read = max(0, lines - (args.format == "csv") - args.start_row + 1)
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(total=min(left_to_read, args.limit or left_to_read), unit=" rows", unit_scale=True, disable=None)
        )
        rejects = stack.enter_context(args.rejects.open("wb")) if args.rejects else None
        poster = stack.enter_context(
            Poster(
                args.url,
                args.source,
                in_flight=args.in_flight,
                give_up_after=args.give_up_after,
                on_change=lambda text: bar.write(text, file=sys.stderr),
            )
        )
        run = Replay(poster, args.batch, bar, rejects)
        trouble = ""
        try:
            run.run(items, Pace(args.speed) if args.speed else None)
        except KeyboardInterrupt:
            trouble = "interrupted"
        except (Unanswered, Refused) as error:
            trouble = str(error)
        if trouble:
            run.outbox.abandon()
    if trouble:
        print(f"{trouble}. To go on, run the same command again: rows that Nexus has are not doubled.", file=sys.stderr)
        if not args.label_column:  # the labels of earlier rows would be left out
            print(f"Or add --start-row {run.resume_row} to begin at the first row without an answer.", file=sys.stderr)
    print(run.account())
    return run.complete and not trouble


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C
    try:
        return 0 if replay(args) else 1
    except (UsageError, OSError) as error:
        print(f"replay: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""Replays recorded events from a CSV or NDJSON file into a running Nexus: `python -m pipeline.tools.replay FILE`.

Every row becomes one event whose id is made of the file's content and the row's number, so running it again doubles
nothing. Every row is accounted for: accepted, duplicate, rejected by Nexus, or unmappable, the last two with a reason.
"""

import argparse
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import UTC
from itertools import islice
from pathlib import Path
from typing import IO, Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

from pipeline.errors import SettingError
from pipeline.settings import load
from pipeline.tools.post import Outbox, Pace, Poster, Refused, Rejection, Unanswered
from pipeline.tools.recorded import (
    TYPES,
    Convert,
    Event,
    Item,
    Unmappable,
    UsageError,
    guess,
    guess_format,
    identify,
    number,
    read_csv,
    read_ndjson,
    with_labels,
)

SHOWN = 20  # problems printed one by one; further ones are counted, and all of them go to --rejects
TARGET = re.compile(r"(event_id|app_version|device_type|data(?:\.[^.:=]+)+)(?::(str|int|float|bool))?=(.+)")
UNITS = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}

EPILOG = "Exit code: 0 when Nexus has every row, 1 when it has not, 2 when the options do not fit."


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
    parser = argparse.ArgumentParser("python -m pipeline.tools.replay", description=__doc__, epilog=EPILOG)
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="CSV with a header line, or NDJSON with one event a line; .gz too")
    add("--url", help="where Nexus listens; default as the settings say")
    add("--source", default="replay", help="the name the events are counted under")
    add("--speed", type=_speed, metavar="X", help="times the recorded pace (60: an hour a minute), or max (default)")
    add("--batch", type=_positive, default=500, help="events in a request")
    add(
        "--in-flight",
        type=_positive,
        default=4,
        help="requests under way at once; 1 keeps the recorded order in the log",
    )
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
    url = args.url or load().nexus_url
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
                url,
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
    except (UsageError, SettingError, OSError) as error:
        print(f"replay: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

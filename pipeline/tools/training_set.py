"""Point-in-time training sets: joins labels with features as of each label's time, and writes one Parquet file.

    python -m pipeline.tools.training_set --labels labels.csv --features acceptance_rate,payments_1h --out set.parquet

The labels are a CSV file with the columns `user_id` and `timestamp` (RFC 3339 or epoch ms), and any others, which are kept;
`merchant_id` or `zone` where features of those are asked for. A feature counts the events up to the label's time, whenever they
arrived; with --known-only those alone that had arrived by then. It reads the log of the store directly, which needs no running
Nexus and costs one pass for many labels, where routes would cost a query for each.
"""

from __future__ import annotations

import argparse
import csv
import sys
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from pipeline import settings
from pipeline.catalogue import FEATURES
from pipeline.commit_log.frames import REDRIVE, Position
from pipeline.definitions import Entity as Kind
from pipeline.definitions import Feature, Malformed, check
from pipeline.errors import BadRequest, NexusError, Unprocessable
from pipeline.events import CANARY_TYPE, Stored, rfc3339
from pipeline.features.families import plan
from pipeline.features.foreign import read_moment
from pipeline.features.offline import stored_since
from pipeline.features.reading import Values
from pipeline.features.tiles import Entity
from pipeline.log import Log
from pipeline.store import Store
from pipeline.streams.fold import PAYMENT, REPORT
from pipeline.streams.payees import Paid, join, merchant_of, transaction_of
from pipeline.streams.stream import Batch
from pipeline.windows import Windows

LABELS_PER_PASS = 20_000  # each has its tiles in memory while the log is read
COLUMN: Mapping[Kind, str] = {"user": "user_id", "merchant": "merchant_id", "zone": "zone"}
_FEATURES_BIT = 1


class Label:
    """One row: its moment (epoch ms), and the tiles of each entity it names."""

    __slots__ = ("at", "entities", "row", "seen")

    def __init__(self, row: dict[str, str], at: int) -> None:
        self.row, self.at = row, at
        self.entities: dict[Kind, Entity] = {}
        self.seen: set[Kind] = set()


class TrainingSet:
    """Folds the stored events into labels. `known_only` leaves out what arrived after a label's time."""

    def __init__(self, log: Log, features: Sequence[Feature], known_only: bool = False) -> None:
        families = plan(features)
        self._log, self._known_only = log, known_only
        self._windows: dict[Kind, Windows] = {
            kind: Windows(features, families, kind) for kind in COLUMN if any(f.entity == kind for f in features)
        }
        # An event that any definition cannot take is a dead letter, and counts in none.
        self._judges = {kind: Windows(FEATURES, kind=kind) for kind in COLUMN}
        zones = [some["zone"].event_types for some in (self._judges, self._windows) if "zone" in some]
        self._zone_types = frozenset().union(*zones) if "zone" in self._windows else frozenset()
        self.features = tuple(features)

    def join(self, labels: Sequence[Label], bar: Any = None) -> Iterator[Values]:
        """The features of each label, in the order given; None for an entity without any event. One pass over the log."""
        index: dict[Kind, dict[str, list[Label]]] = {kind: {} for kind in self._windows}
        for label in sorted(labels, key=lambda label: label.at):
            for kind, windows in self._windows.items():
                label.entities[kind] = windows.new()
                index[kind].setdefault(label.row[COLUMN[kind]], []).append(label)
        self._read(index, bar)
        for label in labels:
            found: Values = {}
            for kind, windows in self._windows.items():
                values = windows.values(label.entities[kind], label.at)
                found |= values if kind in label.seen else dict.fromkeys(values)
            yield found

    def _read(self, index: dict[Kind, dict[str, list[Label]]], bar: Any) -> None:
        paid: dict[str, Paid] = {}  # the payments so far: a fraud report counts for the merchant of its payment
        position = Position(segment=self._log.head().first_segment)
        while frames := self._log.read(position):
            for frame in frames:
                if (
                    frame.to & _FEATURES_BIT and not frame.to & REDRIVE
                ):  # what was sent again stands in its own place too
                    self._take(Batch([frame]), index, paid)
                if bar is not None:
                    bar.update(len(frame.records))
            position = frames[-1].after()

    def _take(self, batch: Batch, index: dict[Kind, dict[str, list[Label]]], paid: dict[str, Paid]) -> None:
        for i, event in enumerate(batch.events):
            if event is None or event.event_type == CANARY_TYPE:
                continue
            joins = "merchant" in index and event.event_type in (PAYMENT, REPORT)
            owners: dict[Kind, str | None] = {"user": event.user_id}
            if event.event_type in self._zone_types:
                owners["zone"] = batch.zones[i]
            if not joins and not any((owner or "") in index.get(kind, ()) for kind, owner in owners.items()):
                continue
            data = batch.data(i)
            if not self._sound(event, data, batch.ts[i]):
                continue
            if joins and event.event_type == PAYMENT:
                owners["merchant"], transaction = merchant_of(data), transaction_of(data)
                if transaction is not None and owners["merchant"] is not None:
                    paid[transaction] = Paid(owners["merchant"], batch.first_ordinal + i)
            elif joins:
                owners["merchant"], _ = join(paid, data, batch.first_ordinal + i)
            for kind, labelled in index.items():
                if found := labelled.get(owners.get(kind) or ""):
                    self._count(kind, batch, i, found)

    def _sound(self, event: Stored, data: Mapping[str, Any], ts: int) -> bool:
        """Whether the stream counted it."""
        try:
            for judge in self._judges.values():
                judge.extract(event, data, ts)
        except Malformed:
            return False
        return True

    def _count(self, kind: Kind, batch: Batch, i: int, labels: list[Label]) -> None:
        """One event, in every label of its entity from its own time on."""
        windows, event, ts = self._windows[kind], batch.events[i], batch.ts[i]
        assert event is not None
        try:
            deltas = windows.extract(event, batch.data(i), ts)
        except Malformed:
            return
        for label in labels[bisect_left(labels, ts, key=lambda label: label.at) :]:
            past = ts <= label.at - windows.horizon_ms  # no window has it, but the entity is known by it
            if past and kind in label.seen:
                break  # nor has one of those that follow, which know the entity as well
            if not self._known_only or batch.arrivals[i] <= label.at:
                label.seen.add(kind)
                if not past:
                    windows.add(label.entities[kind], ts, deltas, label.at)


def read_labels(path: Path, kinds: Sequence[Kind], names: Sequence[str] = ()) -> list[Label]:
    """The rows of a CSV file, which may have no column named like a feature. Raises Unprocessable with the line and the remedy."""
    labels: list[Label] = []
    # What is no UTF-8 comes through as surrogates, so that it is found in its row.
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            header = list(reader.fieldnames or [])
            "".join(header).encode()
            _check_header(path, header, ["timestamp", *(COLUMN[kind] for kind in kinds)], names)
            for row in reader:
                if None in row or None in row.values():  # DictReader's way to say that it is too long, or too short
                    raise BadRequest("wrong_length", f"it takes {len(header)} fields, as many as the first line")
                "".join(row.values()).encode()
                labels.append(Label(row, read_moment("timestamp", row["timestamp"])))
        except (BadRequest, UnicodeEncodeError, csv.Error) as error:
            text = error.message if isinstance(error, BadRequest) else f"it takes CSV in UTF-8: {error}"
            raise Unprocessable("invalid_label", f"{path}, line {reader.reader.line_num}: {text}") from error
    return labels


def _check_header(path: Path, header: Sequence[str], needed: Sequence[str], names: Sequence[str]) -> None:
    if absent := [name for name in needed if name not in header]:
        raise Unprocessable("no_column", f"{path} has no column {', '.join(absent)}; its first line names the columns")
    if taken := [name for name in names if name in header]:
        raise Unprocessable(
            "taken_column", f"{path} has a column {', '.join(taken)}, like the feature; give it another name"
        )
    if twice := [name for name in dict.fromkeys(header) if header.count(name) > 1]:
        raise Unprocessable("column_twice", f"{path} has the column {', '.join(twice)} more than once")


def chosen(names: Sequence[str], features: Sequence[Feature] = FEATURES) -> list[Feature]:
    """The definitions with these names, and those that their ratios need, last. Raises Unprocessable."""
    check(features)
    if not names:
        raise Unprocessable("no_feature", "--features names none; it takes names, comma separated")
    by_name = {feature.name: feature for feature in features}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise Unprocessable(
            "unknown_feature", f"no feature {', '.join(unknown)}; there are {', '.join(sorted(by_name))}"
        )
    parts = [part for name in names for part in by_name[name].of or () if part not in names]
    return [by_name[name] for name in dict.fromkeys([*names, *parts])]


def table_of(labels: Sequence[Label], values: Sequence[Values], names: Sequence[str]) -> pa.Table:
    """Labels and features side by side; the labels' columns as they are, the features as numbers."""
    columns: dict[str, Any] = {name: [label.row[name] for label in labels] for name in labels[0].row} if labels else {}
    for name in names:
        columns[name] = pa.array([row[name] for row in values], pa.float64())
    return pa.table(columns)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.tools.training_set", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--labels", type=Path, required=True, help="CSV with user_id, timestamp and any other columns")
    parser.add_argument("--features", required=True, help="names, comma separated")
    parser.add_argument("--out", type=Path, required=True, help="the Parquet file to write")
    parser.add_argument(
        "--known-only", action="store_true", help="leave out events that arrived after the label's time"
    )
    given = parser.parse_args()
    try:
        names = [name for name in given.features.split(",") if name]
        features = chosen(names)
        kinds = list(dict.fromkeys(feature.entity for feature in features))
        labels = read_labels(given.labels, kinds, names)
        environment = settings.load()
        log = Log(Store(environment.store_url, environment.redis_cluster))
        maker = TrainingSet(log, features, given.known_only)
        passes = range(0, len(labels), LABELS_PER_PASS)
        values: list[Values] = []
        with tqdm(total=log.head().ordinal * len(passes), unit=" events", disable=None) as bar:
            for at in passes:
                values += maker.join(labels[at : at + LABELS_PER_PASS], bar)
        pq.write_table(table_of(labels, values, names), given.out)
        since, reach_ms = stored_since(log) or 0, 1000 * max(feature.window_s for feature in features)
        partial = sum(label.at - reach_ms < since for label in labels)
    except (NexusError, OSError) as error:
        print(f"training set: {error}", file=sys.stderr)
        return 1
    print(f"{len(labels)} labels, {len(names)} features: {given.out}")
    if partial:
        print(
            f"{partial} labels have windows that begin before {rfc3339(since)}: what arrived before is no longer stored"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

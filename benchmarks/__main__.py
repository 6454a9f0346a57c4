"""`python -m benchmarks`: runs the topics, prints the table, writes it to benchmarks/results/ as Markdown and JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

from benchmarks import machine
from benchmarks.harness import Options
from benchmarks.table import Row, as_json, markdown, missing

HERE = Path(__file__).parent
# First the topics whose figures others refer to.
FIRST = ("cores", "endtoend", "ingest", "freshness", "reads", "isolation", "dashboard", "growth", "retained")


def topics() -> list[str]:
    """The names of all topics, in the order in which they run."""
    found = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    return sorted(found, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--only", action="append", choices=topics(), help="this topic alone; may be given repeatedly")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="short and rough: about 3 minutes")
    length.add_argument("--full", action="store_true", help="with 10 million retained events: over an hour")
    parser.add_argument("--data", type=Path, default=Path("/tmp"), help="folder for the data of the measured systems")
    parser.add_argument(
        "--recorded", type=Path, default=Options.recorded, help="folder of the recorded demand and payments"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the table")
    given = parser.parse_args()
    options = Options(quick=given.quick, full=given.full, data=given.data, recorded=given.recorded)
    began = time.monotonic()
    about = machine.describe() | {"length": "quick" if given.quick else "full" if given.full else "default"}
    print(machine.markdown(about), flush=True)
    texts, results, failed = [machine.markdown(about)], {}, False
    for name in given.only or topics():
        module = importlib.import_module(f"benchmarks.bench_{name}")
        print(f"measuring: {module.TITLE}", file=sys.stderr, flush=True)
        rows: list[Row]
        try:
            rows = module.run(options)
        except Exception as error:  # noqa: BLE001  the other topics still count; the table and the exit code say it
            traceback.print_exc()
            failed = True
            rows = [missing(module.TITLE, "", f"failed: {type(error).__name__}: {error}")]
        results[name] = rows
        texts.append(markdown(module.TITLE, rows))
        print(texts[-1], flush=True)
    about["seconds"] = round(time.monotonic() - began)
    write(given.out, about, "\n".join(texts), as_json(results))
    return 1 if failed else 0


def write(folder: Path, about: dict[str, object], text: str, results: Mapping[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{about['date']}-{about['commit']}"
    (folder / f"{name}.md").write_text(text)
    (folder / f"{name}.json").write_text(json.dumps({"about": about, "topics": results}, indent=1) + "\n")
    print(f"written: {folder / name}.md and .json", file=sys.stderr)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (KeyboardInterrupt, subprocess.CalledProcessError) as error:
        sys.exit(f"benchmarks: {error!r}")

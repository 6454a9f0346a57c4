"""The command line of the chaos suite: exit code 0 where nothing is lost, doubled or unexplained, else 1."""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from pathlib import Path

from chaos.run import run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m chaos", description="Load Nexus while its processes are killed.")
    parser.add_argument("--kills", type=int, default=20, help="kill -9, at least 4; and an eighth as many stops")
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--minutes", type=float, default=2.0, help="about how long the faults take")
    parser.add_argument("--seed", type=int, default=None, help="repeats the order of faults and events")
    parser.add_argument("--keep", action="store_true", help="keep the run's data and logs, and say where")
    chosen = parser.parse_args()
    seed = random.randrange(10**6) if chosen.seed is None else chosen.seed
    folder = Path(tempfile.mkdtemp(prefix="nexus-chaos-"))
    print(f"chaos: seed {seed}, {chosen.kills} kills, {chosen.events} events, in {folder}", flush=True)
    result = run(folder, seed, chosen.kills, chosen.events, chosen.minutes * 60, past_lease=chosen.minutes >= 2)
    print(result.text(), flush=True)
    if result.mismatches or chosen.keep:
        print(f"chaos: data and logs are in {folder}")
    else:
        shutil.rmtree(folder)
    return 1 if result.mismatches else 0


if __name__ == "__main__":
    sys.exit(main())

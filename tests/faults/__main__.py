"""`python -m tests.faults --profile ci|slow|full --json FILE`: the bar of docs/reliability.md, and its table."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch

from tests.faults.bar import BAR, PROFILES, measure
from tests.faults.table import render


def main(arguments: list[str] | None = None) -> int:
    """Run the points; 0 when all held."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--profile", choices=PROFILES, default="ci")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--points", type=int, nargs="*", help="numbers of points; all unless given")
    parser.add_argument("--update", action="store_true", help="keep the points that the file has and these are not")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = {}
    if chosen.update and chosen.json is not None and chosen.json.exists():
        rows = {row["number"]: row for row in json.loads(chosen.json.read_text())["points"]}
    for point in BAR:
        if chosen.points and point.number not in chosen.points:
            continue
        row = rows[point.number] = measure(point, chosen.profile)
        state = "passed" if row["passed"] else "FAILED"
        print(f"{point.number:2} {state} {row['held']}/{row['tried']} in {row['seconds']} s: {point.name}", flush=True)
        for failure in row["failures"]:
            print(f"   {failure}", flush=True)
        if chosen.json is not None:
            result = {
                "profile": chosen.profile,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "cores": os.cpu_count(),
                "points": [rows[n] for n in sorted(rows)],
            }
            chosen.json.write_text(json.dumps(result, indent=2) + "\n")
    print("\n" + render([rows[n] for n in sorted(rows)]))
    return 0 if all(row["passed"] for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

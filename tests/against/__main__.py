"""This checkout against another commit, by default the one before the redesign, on this machine, one after the other.

    python -m tests.against                      # digests, bytes, collectives, calls: all layouts, 1 to 4 ranks
    python -m tests.against --only "zero3 llama" --ranks 2,3
    python -m tests.against bench --rounds 3     # `bench step` of both in turn: our time and peak memory

No figure is kept: both versions run here, and are compared with each other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BASE = "e03e19f"
TIME, PEAK = "ours_optimizer_seconds", "ours_peak_optimizer_bytes"


@contextlib.contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """The files of a commit in a folder of their own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "base"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(path), commit], check=True, capture_output=True)
        try:
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], check=True, capture_output=True)


def python(root: Path, *command: str) -> str:
    """The standard output of a Python process that imports muon_dist from `root`."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([sys.executable, *command], cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{root}: {' '.join(command)} failed\n{done.stderr[-4000:]}")
    return done.stdout


def compare(base: Path, ranks: str, only: str) -> int:
    """Print a row per case and number of ranks; the number of rows whose digests differ."""
    probe = str(ROOT / "tests" / "against" / "probe.py")
    before, after = (json.loads(python(root, probe, ranks, only).splitlines()[-1]) for root in (base, ROOT))
    different = 0
    print("| case | ranks | weights | momentum | bytes | collectives | calls |\n|---|---|---|---|---|---|---|")
    for case, worlds in before.items():
        for world, old in worlds.items():
            new = after[case][world]
            same = {k: [o[k] for o in old] == [n[k] for n in new] for k in ("weight", "momentum")}
            different += not all(same.values())
            cells = ["same" if ok else "**different**" for ok in same.values()]
            for key in ("bytes", "collectives", "calls"):
                was, now = sum(o[key] for o in old), sum(n[key] for n in new)
                cells.append(f"{was}" if was == now else f"{was} -> {now}")
            print(f"| {case} | {world} | {' | '.join(cells)} |")
    print(f"{different} rows differ")
    return different


def bench(base: Path, rounds: int, arguments: list[str]) -> int:
    """`bench step` of both versions in turn; the number of cases in which ours became slower than .97 or larger."""
    seconds: dict[str, list[tuple[float, float]]] = {}
    peaks: dict[str, list[tuple[float, float]]] = {}
    for i in range(rounds):
        pair: list[dict[str, Any]] = []
        order = (base, ROOT) if i % 2 == 0 else (ROOT, base)
        for root in order:
            with tempfile.TemporaryDirectory() as folder:
                python(root, "-m", "muon_dist.cli", "bench", "step", "--output", folder, *arguments)
                rows = json.loads((Path(folder) / "step.json").read_text())["rows"]
            pair.append({f"{row['case']} {row['peer']}": row for row in rows if not row["skipped"]})
        old, new = pair if i % 2 == 0 else reversed(pair)
        for case in old:
            seconds.setdefault(case, []).append((old[case][TIME], new[case][TIME]))
            peaks.setdefault(case, []).append((old[case][PEAK] / 1e6, new[case][PEAK] / 1e6))
    worse = 0
    print("| case | time: base / this (lowest to highest) | peak, MB: base -> this |\n|---|---|---|")
    for case, pairs in seconds.items():
        ratios = sorted(a / b for a, b in pairs)
        was, now = (statistics.median(p[i] for p in peaks[case]) for i in (0, 1))
        middle = statistics.median(ratios)
        worse += middle < 0.97 or now > was * 1.01
        print(f"| {case} | {middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) | {was:.1f} -> {now:.1f} |")
    print(f"{worse} cases became slower or larger")
    return worse


def main() -> int:
    """Exit status 1 where a guard does not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.against", description=__doc__)
    parser.add_argument("what", nargs="?", choices=("digests", "bench"), default="digests")
    parser.add_argument("--base", default=BASE, help="the commit to compare with")
    parser.add_argument("--ranks", default="1,2,3,4")
    parser.add_argument("--only", default="", help="a part of the names of the cases")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="of `bench step`")
    given = parser.parse_args()
    with worktree(given.base) as base:
        if given.what == "bench":
            return int(bench(base, given.rounds, given.rest) > 0)
        return int(compare(base, given.ranks, given.only) > 0)


if __name__ == "__main__":
    sys.exit(main())

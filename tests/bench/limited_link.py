"""What bytes cost: `muon-dist bench step` between two hosts whose link is limited.

    python -m tests.bench.limited_link --link 1gbit --link 200mbit --only ZeRO-3 --output results/bench

Each host is a network namespace with one rank; tc limits its link in both directions. Rows are added to
OUTPUT/step.json and step.md. Needs root, or unprivileged user namespaces.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tests.namespaces import hosts, why_not


def bench(link: str, arguments: list[str], output: Path, timeout: float) -> None:
    """Run the command on two hosts and wait for both. RuntimeError when a rank fails."""
    command = [sys.executable, "-m", "muon_dist.cli", "bench", "step", "--append", "--link", link]
    with hosts(2, rate=link) as machines:
        ranks = {"WORLD_SIZE": "2", "MASTER_ADDR": machines[0].address, "MASTER_PORT": "29400", "LOCAL_RANK": "0"}
        processes = [
            host.popen([*command, *arguments, "--output", output], env=host.environment(RANK=str(rank), **ranks))
            for rank, host in enumerate(machines)
        ]
        try:
            codes = [process.wait(timeout=timeout) for process in processes]
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"the ranks were not done after {timeout:.0f} s over {link}") from error
        if any(codes):
            raise RuntimeError(f"over {link} the ranks ended with {codes}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", action="append", required=True, help="a rate in tc's words, such as 200mbit")
    parser.add_argument("--output", type=Path, default=Path("bench"))
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for a link")
    options, arguments = parser.parse_known_args()
    if missing := why_not():
        sys.exit(missing)
    for link in options.link:
        bench(link, arguments, options.output.resolve(), options.timeout)


if __name__ == "__main__":
    main()

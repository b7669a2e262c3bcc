"""What each test costs, and what it leaves changed in its process: `pytest -p tests.watch_process --watch FILE`.

FILE gets one line of JSON for each test: seconds, CPU seconds of the process, and of its kept ranks and of children
that have ended; calls that kept ranks ran and calls that forked their own; and what the test left changed
(`kept_ranks.changed`). Sums by file of tests are printed at the end.
"""

from __future__ import annotations

import json
import os
import resource
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from muon_dist.bench import ranks
from tests import distributed
from tests.kept_ranks import KeptRanks, changed, state_of_process


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--watch", type=Path, default=Path("watched.jsonl"), help="the file of tests.watch_process")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Watch(config.getoption("--watch")))


def cpu_seconds(pid: int) -> float:
    """Of a process that runs, in user and in system mode."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Watch:
    """Writes a line after each test and a table at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.calls = {"kept": 0, "forked": 0}
        self.sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for owner, name, key in ((KeptRanks, "run", "kept"), (ranks, "run_ranks", "forked")):
            setattr(owner, name, self._counted(getattr(owner, name), key))

    def _counted(self, function, key: str):
        def counted(*args, **options):
            self.calls[key] += 1
            return function(*args, **options)

        return counted

    def _now(self) -> dict[str, float]:
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        ranks_so_far = sum(cpu_seconds(process.pid) for process, _ in distributed._kept._members)
        return {
            "s": time.perf_counter(),
            "cpu": time.process_time(),
            "children": ended.ru_utime + ended.ru_stime + ranks_so_far,
            **self.calls,
        }

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        state, before = state_of_process(), self._now()
        result = yield
        spent = {key: round(value - before[key], 3) for key, value in self._now().items()}
        left = changed(state, state_of_process())
        name = str(item.path.relative_to(item.config.rootpath))
        with self.path.open("a") as file:
            file.write(json.dumps({"test": item.nodeid, **spent, "left": left[:20]}) + "\n")
        for key, value in spent.items():
            self.sums[name][key] += value
        self.sums[name]["left"] += bool(left)
        return result

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for name, sums in sorted(self.sums.items(), key=lambda pair: -pair[1]["s"]):
            terminalreporter.write_line(" ".join(f"{key} {value:.1f}" for key, value in sums.items()) + f"  {name}")

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench.limited_link import bench
from tests.namespaces import why_not


@pytest.mark.slow  # two processes that each import DeepSpeed: 40 s
@pytest.mark.namespaces
@pytest.mark.deepspeed
def test_rows_of_a_limited_link_are_added(tmp_path: Path) -> None:
    """Two hosts, one rank each, over 20 Mbit/s: the tiny model's step takes what its bytes take at least."""
    if missing := why_not():
        pytest.skip(missing)
    (tmp_path / "step.json").write_text(
        json.dumps({"rows": [{"case": "other", "model": "tiny", "ranks": 2, "link": "loopback", "peer": "x",
                              "ns_dtype": "fp32", "skipped": "before", "rounds": 1}]}),
        encoding="utf-8",
    )  # fmt: skip
    bench("20mbit", ["--profile", "ci", "--only", "ZeRO-3"], tmp_path, timeout=120.0)
    rows = json.loads((tmp_path / "step.json").read_text(encoding="utf-8"))["rows"]
    assert [(r["case"], r["link"]) for r in rows] == [("other", "loopback"), ("ZeRO-3", "20mbit")]
    assert rows[1]["peer_step_seconds"] > 0.8 * rows[1]["peer_bytes_received"] / (20e6 / 8)
    assert rows[1]["ratio_whole_step"] > 1

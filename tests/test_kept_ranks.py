"""Ranks that are kept between calls are as good as new, or they are replaced."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import muon_dist.ownership
from muon_dist.routing import announce, route
from tests import distributed, kept_ranks
from tests.conftest import LONGEST, ROOT
from tests.distributed import RankFailure, run_ranks


def process() -> int:
    return os.getpid()


def sees() -> tuple[str | None, float, str, int]:
    """(a variable, a random number, the folder, ranks that add up in this call's own process group)."""
    one = torch.ones(1)
    dist.all_reduce(one)
    return os.environ.get("MUON_DIST_TEST_SEES"), float(torch.rand(())), os.getcwd(), int(one)


def patches() -> int:
    muon_dist.ownership.digest = None
    return os.getpid()


def announces() -> int:
    announce(route(torch.nn.Linear(3, 2)))
    return os.getpid()


def uses_a_mesh() -> int:
    mesh = init_device_mesh("cpu", (2,))
    tensor = distribute_tensor(torch.arange(4.0), mesh, [Shard(0)])
    assert (tensor + 1).full_tensor().tolist() == [1, 2, 3, 4]
    return os.getpid()


held = []


def holds_a_mesh() -> int:
    held.append(init_device_mesh("cpu", (2,)))
    return os.getpid()


def sets_dtype() -> int:
    torch.set_default_dtype(torch.float64)
    return os.getpid()


def fails_on_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank 1 has failed")
    dist.barrier()


def dies() -> None:
    os._exit(3)


def is_patched() -> bool:
    return muon_dist.ownership.digest is None


def test_ranks_are_kept_and_begin_as_after_a_fork() -> None:
    before = run_ranks(process, 2)
    os.environ["MUON_DIST_TEST_SEES"] = "yes"
    try:
        torch.manual_seed(7)
        found = run_ranks(sees, 2)
        torch.manual_seed(7)
        assert found == [("yes", float(torch.rand(())), os.getcwd(), 2)] * 2
    finally:
        del os.environ["MUON_DIST_TEST_SEES"]
    assert run_ranks(sees, 2)[0][0] is None
    assert run_ranks(process, 2) == before != run_ranks(process, 2, fresh=True)


@pytest.mark.parametrize("change", [patches, sets_dtype])
def test_a_changed_rank_is_replaced_and_its_function_forks_from_then_on(change) -> None:
    before = run_ranks(change, 2)
    assert not any(run_ranks(is_patched, 2)) and run_ranks(process, 2) != before
    kept = run_ranks(process, 2)
    assert run_ranks(change, 2) != kept and run_ranks(process, 2) == kept


def test_failures_and_deaths_are_reported_and_leave_good_ranks() -> None:
    with pytest.raises(RankFailure, match=r"--- rank 1\n[^-]*ValueError: rank 1 has failed"):
        run_ranks(fails_on_one, 2)
    with pytest.raises(RankFailure, match=r"rank 0 died without a result \(exit 3\)"):
        run_ranks(dies, 2)
    assert run_ranks(sees, 2)[0][3] == 2


def hangs_once(folder: str) -> int:
    mark = Path(folder) / str(dist.get_rank())
    if not mark.exists():
        mark.touch()
        time.sleep(60)
    return dist.get_rank()


def test_what_hangs_on_kept_ranks_runs_again_on_fresh_ones(tmp_path: Path) -> None:
    patience, distributed.KEPT_PATIENCE = distributed.KEPT_PATIENCE, 1.0
    try:
        with pytest.warns(UserWarning, match="hangs_once hung on kept ranks"):
            assert run_ranks(hangs_once, 2, str(tmp_path)) == [0, 1]
    finally:
        distributed.KEPT_PATIENCE = patience


def test_ranks_are_forked_anew_when_this_process_was_changed() -> None:
    before = run_ranks(process, 2)
    original = muon_dist.ownership.digest
    muon_dist.ownership.digest = None
    try:
        assert run_ranks(is_patched, 2) == [True, True]
    finally:
        muon_dist.ownership.digest = original
    assert run_ranks(is_patched, 2) == [False, False]
    kept = run_ranks(process, 2)
    assert run_ranks(process, 2) == kept != before


def test_what_a_test_announced_is_forgotten() -> None:
    kept = run_ranks(announces, 2)
    announces()
    assert run_ranks(announces, 2) == kept
    kept_ranks.forget()
    assert run_ranks(announces, 2) == kept


def test_device_meshes_are_forgotten_with_the_caches_of_dtensor() -> None:
    kept = run_ranks(uses_a_mesh, 2)
    assert run_ranks(uses_a_mesh, 2) == kept
    assert run_ranks(holds_a_mesh, 2) == kept != run_ranks(process, 2)


def test_fixtures_that_patch_and_deepspeed_fork_their_own() -> None:
    kept = run_ranks(process, 2)
    for fixtures, markers in (({"monkeypatch"}, ()), ((), {"deepspeed"})):
        distributed.begin_test(fixtures, markers)
        assert run_ranks(process, 2) != kept
    distributed.begin_test((), ())
    assert run_ranks(process, 2) == kept


def test_the_longest_files_are_there() -> None:
    assert [name for name in LONGEST if not (ROOT / "tests" / name).is_file()] == []

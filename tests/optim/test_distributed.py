"""Sharded over forked gloo ranks: movement exact, arithmetic against the single-process reference."""

from __future__ import annotations

import copy
import time
import warnings

import pytest
import torch
import torch.distributed as dist

from muon_dist.errors import CheckpointError, PlanMismatchError
from muon_dist.exchange.schedule import bucket_elements, bytes_sent, make_buckets
from muon_dist.layout import Layout, MatrixLayout, cut_parameter, fragments_of_run
from muon_dist.optim import Binding, Muon
from tests.distributed import PATIENCE, RankFailure, run_ranks
from tests.optim.test_muon import (
    CUTS,
    SHAPES,
    Reference,
    assert_close,
    gradients,
    make_groups,
    make_parameters,
)

MATRICES = 5 + 4 + 4 + 3


def train_replicated(policy: str, bucket_mb: float, steps: int) -> tuple[dict, int, int]:
    """As under DDP: every rank has the same parameters and the same (already averaged) gradients."""
    parameters = make_parameters()
    optimizer = Muon(make_groups(parameters), lr=0.02, owner_policy=policy, bucket_mb=bucket_mb)
    for step in range(steps):
        for name, g in gradients(step).items():
            parameters[name].grad = g
        optimizer.step()
    momentum = sum(s["momentum_buffer"].numel() for s in optimizer.state.values() if "momentum_buffer" in s)
    return {n: p.detach() for n, p in parameters.items()}, momentum, optimizer.orthogonalized


def expected_after(steps: int) -> Reference:
    reference = Reference(lr=0.02, weight_decay=0.1)
    for step in range(steps):
        reference.step(gradients(step))
    return reference


@pytest.mark.each_choice
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("policy", ["balanced", "round_robin", "local"])
def test_replicated_equals_reference_and_ranks_are_identical(world, policy):
    results = run_ranks(train_replicated, world, policy, 0.02 if world == 3 else 256.0, 20)
    reference = expected_after(20)
    for parameters, _, _ in results:
        assert_close(parameters, reference.parameters, 1e-6)
        assert all(torch.equal(parameters[n], results[0][0][n]) for n in SHAPES)
    assert sum(calls for _, _, calls in results) == 20 * MATRICES
    total = sum(p.numel() for p in results[0][0].values())
    assert sum(momentum for _, momentum, _ in results) == total


def test_momentum_is_a_share_of_the_whole():
    """Elements of momentum per rank at N = 1, 2, 4: the largest share is close to P / N for equal matrices."""

    def held() -> int:
        parameters = {f"w{i}": torch.nn.Parameter(torch.randn(32, 32)) for i in range(8)}
        optimizer = Muon([{"params": list(parameters.values())}])
        for p in parameters.values():
            p.grad = torch.ones_like(p)
        optimizer.step()
        return sum(s["momentum_buffer"].numel() for s in optimizer.state.values() if s)

    for world in (1, 2, 4):
        assert run_ranks(held, world) == [8 * 32 * 32 // world] * world


def flat_binding(parameters: dict[str, torch.nn.Parameter], rank: int, world: int, whole_numbers: bool) -> tuple:
    """All parameters end to end in one flat tensor, cut into `world` runs at odd places, one of them empty."""
    names = list(parameters)
    flat = torch.cat([parameters[n].detach().reshape(-1) for n in names])
    if whole_numbers:
        flat = torch.arange(flat.numel(), dtype=torch.float32)
    cuts = [flat.numel() * r // world + (7 * r) % 5 for r in range(world)] + [flat.numel()]
    if world > 2:
        cuts[2] = cuts[1]  # rank 1 holds nothing
    layouts = []
    at = 0
    for name in names:
        for m in cut_parameter(name, SHAPES[name], **CUTS.get(name, {})):
            fragments = []
            for r in range(world):
                low, high = max(cuts[r] - at, 0), min(cuts[r + 1] - at, parameters[name].numel())
                if low < high:
                    fragments += fragments_of_run(m, r, low, high - low, 0, low + at - cuts[r])
            layouts.append(MatrixLayout(m, tuple(fragments)))
        at += parameters[name].numel()
    shard = torch.nn.Parameter(flat[cuts[rank] : cuts[rank + 1]].clone())
    layout = Layout("flat", world, tuple(layouts), complete_gradients=True)
    return layout, shard, cuts


def make_flat(bucket_mb: float, wire_dtype: torch.dtype | None = None, whole_numbers: bool = False) -> tuple:
    rank, world = dist.get_rank(), dist.get_world_size()
    parameters = make_parameters()
    optimizer = Muon(make_groups(parameters), lr=0.02, bucket_mb=bucket_mb, wire_dtype=wire_dtype)
    layout, shard, cuts = flat_binding(parameters, rank, world, whole_numbers)
    optimizer.param_groups[0]["params"] = [shard]
    optimizer.bind(Binding(layout, (shard,), dist.group.WORLD, torch.device("cpu")), {0: 0})
    return optimizer, shard, cuts


def train_flat(bucket_mb: float, steps: int) -> tuple:
    rank = dist.get_rank()
    optimizer, shard, cuts = make_flat(bucket_mb)
    for step in range(steps):
        whole = torch.cat([g.reshape(-1) for g in gradients(step).values()])
        shard.grad = whole[cuts[rank] : cuts[rank + 1]].clone()
        optimizer.step()
    runtime = optimizer.runtime
    every = list(range(len(optimizer.plan.layout.matrices)))
    buckets = make_buckets(optimizer.plan, every, bucket_elements(int(bucket_mb * 2**20)))
    predicted = bytes_sent(optimizer.plan, buckets, rank, 4, 4) * steps
    assert optimizer.state[shard]["momentum_buffer"].shape == shard.shape
    return shard.detach(), runtime.transport.bytes_sent, predicted, optimizer.orthogonalized


@pytest.mark.each_choice
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("bucket_mb", [0.01, 256.0])
def test_flat_shards_equal_reference(world, bucket_mb):
    results = run_ranks(train_flat, world, bucket_mb, 20)
    flat = torch.cat([shard for shard, *_ in results])
    reference = expected_after(20)
    found, at = {}, 0
    for name, p in reference.parameters.items():
        found[name] = flat[at : at + p.numel()].view(p.shape)
        at += p.numel()
    assert_close(found, reference.parameters, 1e-6)
    assert sum(calls for *_, calls in results) == 20 * MATRICES
    for _, measured, predicted, _ in results:
        assert measured == predicted


def gather_whole_numbers() -> list[tuple[str, torch.Tensor]]:
    """What the owners see: with whole-number momentum, any misplaced element shows."""
    optimizer, shard, _ = make_flat(0.01, whole_numbers=True)
    seen = []
    optimizer.runtime.observer = lambda m, momentum, update: seen.append((m.name, momentum.clone()))
    optimizer.param_groups[0]["nesterov"] = False
    optimizer.param_groups[0]["momentum"] = 0.0
    shard.grad = shard.detach().clone()
    optimizer.step()
    return seen


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_gathered_matrices_are_exact(world):
    seen = dict(item for rank in run_ranks(gather_whole_numbers, world) for item in rank)
    total = sum(torch.Size(s).numel() for s in SHAPES.values())
    flat, at = torch.arange(total, dtype=torch.float32), 0
    for name, shape in SHAPES.items():
        size = torch.Size(shape).numel()
        whole = flat[at : at + size]
        for m in cut_parameter(name, shape, **CUTS.get(name, {})):
            assert torch.equal(
                seen[m.name], whole.as_strided((m.rows, m.cols), (m.block.stride, 1), at + m.block.start)
            ), m.name
        at += size
    assert len(seen) == MATRICES


def bf16_wire() -> torch.Tensor:
    optimizer, shard, cuts = make_flat(256.0, torch.bfloat16)
    rank = dist.get_rank()
    whole = torch.cat([g.reshape(-1) for g in gradients(0).values()])
    shard.grad = whole[cuts[rank] : cuts[rank + 1]].clone()
    optimizer.step()
    assert optimizer.state[shard]["momentum_buffer"].dtype == torch.float32
    return shard.detach()


def test_bf16_wire_is_close_and_not_equal():
    flat = torch.cat(run_ranks(bf16_wire, 2))
    exact = torch.cat([p.reshape(-1) for p in expected_after(1).parameters.values()])
    start = torch.cat([p.detach().reshape(-1) for p in make_parameters().values()]) * (1 - 0.02 * 0.1)
    update, truth = flat - start, exact - start
    cosine = torch.nn.functional.cosine_similarity(update, truth, dim=0)
    assert 0.9999 < cosine < 1 - 1e-9


def missing_gradient(missing: dict[int, list[str]]) -> dict[str, torch.Tensor]:
    parameters = make_parameters()
    optimizer = Muon(make_groups(parameters), lr=0.02)
    for step in range(3):
        for name, g in gradients(step).items():
            parameters[name].grad = None if name in missing.get(dist.get_rank(), []) else g
        optimizer.step()
    return {n: p.detach() for n, p in parameters.items()}


def test_gradient_missing_on_all_ranks_is_no_update_and_no_hang():
    started = time.monotonic()
    results = run_ranks(missing_gradient, 3, {r: ["tall", "experts"] for r in range(3)})
    start = make_parameters()
    reference = Reference(lr=0.02, weight_decay=0.1)
    for step in range(3):
        reference.step({n: g for n, g in gradients(step).items() if n not in ("tall", "experts")})
    for parameters in results:
        assert torch.equal(parameters["tall"], start["tall"])
        assert_close(parameters, reference.parameters, 1e-6)
    assert time.monotonic() - started < PATIENCE / 2, "nobody has waited for a time-out"


def test_gradient_missing_on_one_rank_counts_as_zero_there():
    """If the rank that lacks it owns the matrix, the update is that of a zero gradient; ranks stay identical."""
    for rank in range(2):
        results = run_ranks(missing_gradient, 2, {rank: ["square"]})
        assert all(torch.equal(results[0][n], results[1][n]) for n in SHAPES)
        with_gradient = expected_after(3).parameters["square"]
        zero = Reference(lr=0.02, weight_decay=0.1)
        for _ in range(3):
            zero.step({"square": torch.zeros(64, 64)})
        found = results[0]["square"]
        assert min((found - p).norm() for p in (with_gradient, zero.parameters["square"])) < 1e-4


def mismatched(change: str) -> None:
    odd = dist.get_rank() == 1
    parameters = make_parameters()
    options = {"lr": 0.02}
    if odd and change == "bucket_mb":
        options["bucket_mb"] = 1.0
    if odd and change == "ns_steps":
        options["ns_steps"] = 4
    if odd and change == "policy":
        options["owner_policy"] = "round_robin"
    if odd and change == "wire":
        options["wire_dtype"] = torch.bfloat16
    if odd and change == "missing":
        del parameters["heads"]
    if odd and change == "shape":
        parameters["wide"] = torch.nn.Parameter(torch.randn(32, 64))
    if odd and change == "order":
        parameters = dict(reversed(parameters.items()))
    groups = make_groups(parameters, **({"ns_schedule": "cans"} if odd and change == "schedule" else {}))
    if odd and change == "cut":
        groups[0]["cuts"][list(parameters).index("heads")] = {"heads": 2}
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    Muon(groups, **options).step()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("bucket_mb", "bucket_mb in bytes"),
        ("ns_steps", "Newton-Schulz"),
        ("schedule", "Newton-Schulz"),
        ("policy", "owner policy"),
        ("wire", "wire_dtype"),
        ("missing", "number of matrices"),
        ("shape", "wide: shape"),
        ("order", "shape"),
        ("cut", "number of matrices"),
    ],
)
def test_plan_mismatch_names_the_field_before_anything_moves(change, field):
    started = time.monotonic()
    with pytest.raises(RankFailure, match=f"(?s)PlanMismatchError.*{field}.*rank 0: .*rank 1: "):
        run_ranks(mismatched, 2, change)
    assert time.monotonic() - started < PATIENCE / 2, "nobody has waited for a time-out"


def save_and_resume(cut: int) -> tuple[dict, dict, bool]:
    """Full state gathered on rank 0, sent to all, loaded by fresh optimizers, against an uninterrupted run."""
    parameters = make_parameters()
    optimizer = Muon(make_groups(parameters), lr=0.02)

    def run(parameters: dict, optimizer: Muon, steps: range) -> None:
        for step in steps:
            for name, g in gradients(step).items():
                parameters[name].grad = g
            optimizer.step()

    run(parameters, optimizer, range(cut))
    saved = [copy.deepcopy(optimizer.full_state_dict())]
    assert bool(saved[0]) == (dist.get_rank() == 0)
    dist.broadcast_object_list(saved, 0)
    own = copy.deepcopy(optimizer.state_dict())
    from_full = {n: torch.nn.Parameter(p.detach().clone()) for n, p in parameters.items()}
    from_own = {n: torch.nn.Parameter(p.detach().clone()) for n, p in parameters.items()}
    a, b = Muon(make_groups(from_full), lr=0.02), Muon(make_groups(from_own), lr=0.02)
    a.load_state_dict(saved[0])
    b.load_state_dict(own)
    for ps, o in ((parameters, optimizer), (from_full, a), (from_own, b)):
        run(ps, o, range(cut, cut + 3))
    same = all(torch.equal(parameters[n], q[n]) for q in (from_full, from_own) for n in SHAPES)
    return saved[0], {n: p.detach() for n, p in parameters.items()}, same


@pytest.mark.parametrize("world", [1, 2, 3])
def test_full_state_resumes_exactly_and_moves_to_one_process(world):
    results = run_ranks(save_and_resume, world, 3)
    assert all(same for *_, same in results)
    saved, final, _ = results[0]
    parameters = {n: torch.nn.Parameter(p) for n, p in expected_after(3).parameters.items()}
    single = Muon(make_groups(parameters), lr=0.02)
    single.load_state_dict(saved)
    for step in range(3, 6):
        for name, g in gradients(step).items():
            parameters[name].grad = g
        single.step()
    assert_close(parameters, final, 1e-5)


def load_rank_zeros_part() -> None:
    parameters = make_parameters()
    optimizer = Muon(make_groups(parameters), lr=0.02)
    for name, g in gradients(0).items():
        parameters[name].grad = g
    optimizer.step()
    saved = [optimizer.state_dict()]
    dist.broadcast_object_list(saved, 0)
    fresh = Muon(make_groups(parameters), lr=0.02)
    fresh.load_state_dict(saved[0])
    if dist.get_rank() == 0:
        fresh.step()
        return
    with pytest.raises(CheckpointError, match=r"rank 1 owns.*full_state_dict|saved by another rank"):
        fresh.step()
    raise CheckpointError("as expected")


def test_another_ranks_part_is_refused():
    """A stock Trainer saves rank 0's state_dict only: resuming must not silently restart the others' momentum."""
    with pytest.raises(RankFailure, match="as expected"):
        run_ranks(load_rank_zeros_part, 2, timeout=10)


def test_no_process_group_means_no_collective():
    def alone() -> int:
        parameters = make_parameters()
        optimizer = Muon(make_groups(parameters), lr=0.02, process_group=None)
        if dist.get_rank() == 0:  # the other rank never steps: a collective would hang
            for name, g in gradients(0).items():
                parameters[name].grad = g
            optimizer.step()
        return optimizer.orthogonalized

    assert run_ranks(alone, 2, timeout=20) == [MATRICES, 0]


def test_plan_mismatch_error_type():
    assert PlanMismatchError.exit_code == 6


# ---- a rank's own state dict, saved by others


def said_of_partial_state(layout: str) -> list[str]:
    """The warnings of three calls of `state_dict()`, and of `full_state_dict()`, after a step."""
    if layout == "flat":
        optimizer, shard, _ = make_flat(256.0)
        shard.grad = torch.ones_like(shard)
    else:
        parameters = make_parameters()
        group = None if layout == "alone" else "default"
        optimizer = Muon(make_groups(parameters), lr=0.02, process_group=group)
        for name, g in gradients(0).items():
            parameters[name].grad = g
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.state_dict()  # before the plan there is no momentum to miss
        optimizer.step()
        if layout == "replicated":
            optimizer.full_state_dict()
        for _ in range(3):
            optimizer.state_dict()
    return [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]


def test_a_partial_state_dict_says_once_what_it_lacks():
    """Lightning, `accelerator.save_state` and DCP take it for the whole state under DDP."""
    for rank, said in enumerate(run_ranks(said_of_partial_state, 2, "replicated")):
        (text,) = said
        assert f"the part of rank {rank}: it lacks the momentum of " in text and "full_state_dict()" in text


@pytest.mark.parametrize("layout", ["flat", "alone"])
def test_a_state_dict_that_lacks_nothing_says_nothing(layout):
    assert run_ranks(said_of_partial_state, 2, layout) == [[], []]


def test_one_process_has_all_of_its_state():
    assert run_ranks(said_of_partial_state, 1, "replicated") == [[]]

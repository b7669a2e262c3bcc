"""The step as a pipeline: where it stands, what overlaps, what it keeps alive, what travels."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist

from muon_dist.bench.memory import peak_bytes
from muon_dist.layout import (
    PlacedParameter,
    ShardedParameter,
    cut_parameter,
    dtensor_layout,
    per_parameter_layout,
    replicated_layout,
)
from muon_dist.layout.per_parameter import slice_length
from muon_dist.optim import Binding, Muon
from tests.distributed import RankFailure, run_ranks
from tests.optim.test_distributed import make_flat
from tests.optim.test_muon import gradients


def steps_and_phases() -> tuple[int, list[tuple[str, int | None]]]:
    """One step of flat shards in buckets of 0.02 MiB: what `Progress` went through."""
    optimizer, shard, cuts = make_flat(0.02)
    rank = dist.get_rank()
    whole = torch.cat([g.reshape(-1) for g in gradients(0).values()])
    shard.grad = whole[cuts[rank] : cuts[rank + 1]].clone()
    seen: list[tuple[str, int | None]] = []
    progress = optimizer.runtime.transport.progress
    progress.listeners.append(lambda p: seen.append((p.operation, p.bucket)))
    optimizer.step()
    return progress.step, seen


def test_progress_names_every_phase_and_bucket_and_counts_the_step():
    for step, seen in run_ranks(steps_and_phases, 2):
        assert step == 1
        assert [operation for operation, bucket in seen if bucket is None][-3:] == ["adamw", "momentum", "idle"]
        buckets = max(bucket for _, bucket in seen if bucket is not None) + 1
        assert buckets > 1
        for operation in ("gather", "orthogonalize", "scatter", "update"):
            # with overlap a rank turns to the messages of a bucket twice: it sends, and it waits
            assert list(dict.fromkeys(b for name, b in seen if name == operation)) == list(range(buckets)), operation


def test_progress_of_a_phased_layout_counts_only_the_last_phase():
    """Under ZeRO-3 each sub-group is stepped by a call of its own; together they are one optimizer step."""
    shards = [torch.nn.Parameter(torch.ones(32)) for _ in range(2)]
    parameters = [torch.nn.Parameter(torch.ones(4, 8)) for _ in range(2)]
    optimizer = Muon([{"params": parameters, "param_names": ["a", "b"]}], lr=0.1)
    placed = [[PlacedParameter(n, 32, 0, cut_parameter(n, (4, 8)))] for n in ("a", "b")]
    layout = per_parameter_layout(placed, 1)
    optimizer.bind(Binding(layout, tuple(shards), None, torch.device("cpu")), {0: 0, 1: 0})
    counted = []
    for shard in shards:
        optimizer.param_groups[0]["params"] = [shard]
        shard.grad = torch.ones_like(shard)
        optimizer.step()
        counted.append(optimizer.runtime.transport.progress.step)
    assert counted == [0, 1]


SHAPES = [(64, 64), (64, 160), (160, 64), (96, 128)] * 12


def make_optimizer(layout: str, **options: object) -> tuple[Muon, list[torch.nn.Parameter]]:
    """Muon on matrices of SHAPES, whole on every rank, sliced as by ZeRO-3, or in two copies as by HSDP; with
    gradients."""
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    names = [f"m{i}" for i in range(len(SHAPES))]
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    group = {"params": parameters, "param_names": names, "ns_dtype": options.pop("ns_dtype", None)}
    optimizer = Muon([group], lr=0.02, **options)
    if layout == "replicated":
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        return optimizer, parameters
    if layout == "copies":
        return optimizer, bind_copies(optimizer, parameters, generator)
    sizes = [slice_length(p.numel(), world) for p in parameters]
    ends = list(itertools.accumulate(sizes))
    shard = torch.nn.Parameter(torch.zeros(ends[-1]))  # slices, the last ones padded
    shard.grad = torch.zeros_like(shard)
    placed = []
    for name, p, size, end in zip(names, parameters, sizes, ends, strict=True):
        placed.append(PlacedParameter(name, p.numel(), end - size, cut_parameter(name, p.shape)))
        gradient = torch.randn(p.shape, generator=generator)
        for target, whole in ((shard.data, p.detach()), (shard.grad, gradient)):
            part = whole.view(-1)[rank * size : (rank + 1) * size]
            target[end - size : end - size + part.numel()] = part
    optimizer.param_groups[0]["params"] = [shard]
    optimizer.bind(
        Binding(per_parameter_layout([placed], world), (shard,), dist.group.WORLD, torch.device("cpu")), {0: 0}
    )
    return optimizer, [shard]


def trained(layout: str, steps: int, options: dict, in_pairs: bool = True) -> tuple[list[torch.Tensor], int, int, int]:
    optimizer, tensors = make_optimizer(layout, **options)
    optimizer.bound_runtime().transport.in_pairs = in_pairs
    for _ in range(steps):
        optimizer.step()
    runtime = optimizer.runtime
    (program,) = runtime.programs()
    buckets = len(program.buckets)
    return [t.detach() for t in tensors], buckets, runtime.orthogonalized, runtime.transport.bytes_sent


def bind_copies(optimizer: Muon, parameters: list[torch.nn.Parameter], generator: torch.Generator) -> list:
    """Two copies, each cut by rows over half of the ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    shards = world // 2
    columns = [dist.new_group([shard, shard + shards]) for shard in range(shards)]
    placed, buffers = [], []
    for i, p in enumerate(parameters):
        name, shape = f"m{i}", tuple(p.shape)
        whole = ShardedParameter(name, shape, (2, shards), tuple(range(world)), (None, 0), cut_parameter(name, shape))
        buffers.append(torch.nn.Parameter(p.detach().chunk(shards)[rank % shards].clone()))
        buffers[-1].grad = torch.randn(shape, generator=generator).chunk(shards)[rank % shards].clone()
        placed.append(whole)
    optimizer.param_groups[0]["params"] = buffers
    layout, cpu = dtensor_layout(placed, world), torch.device("cpu")
    binding = Binding(layout, tuple(buffers), dist.group.WORLD, cpu, column=columns[rank % shards])
    optimizer.bind(binding, dict.fromkeys(range(len(buffers)), 0))
    return buffers


@pytest.mark.each_choice
@pytest.mark.parametrize(
    ("layout", "world", "wire"),
    [
        *itertools.product(("replicated", "sliced"), (1, 2, 3), (None,)),
        *itertools.product(("replicated", "sliced"), (2,), (torch.bfloat16,)),
        ("copies", 4, None),
        ("copies", 4, torch.bfloat16),
    ],
)
def test_overlap_changes_no_bit(layout, world, wire):
    """Nor does the number of buckets, where nothing is rounded on the way and one thread computes."""
    runs = [
        run_ranks(trained, world, layout, 3, {"overlap": overlap, "bucket_mb": bucket_mb, "wire_dtype": wire})
        for overlap, bucket_mb in ((True, 0.5), (False, 0.5), (True, 64.0))
    ]
    assert runs[0][0][1] > 3 and runs[2][0][1] == 1
    for run in runs[1:]:
        for (tensors, _, calls, sent), (others, _, other_calls, other_sent) in zip(runs[0], run, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))
            assert (calls, sent) == (other_calls, other_sent)
    assert sum(calls for _, _, calls, _ in runs[0]) == 3 * len(SHAPES)


@pytest.mark.each_choice
@pytest.mark.parametrize("layout", ["sliced", "copies"])
@pytest.mark.parametrize("wire", [None, torch.bfloat16])
def test_the_all_to_all_of_accelerators_gives_the_same_bits(layout, wire):
    """`dist.all_to_all_single`, which gloo has as well."""
    options = {"bucket_mb": 0.5, "wire_dtype": wire}
    for pair in zip(*(run_ranks(trained, 4, layout, 3, options, way) for way in (True, False)), strict=True):
        (tensors, *counts), (others, *other_counts) = pair
        assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))
        assert counts == other_counts


def peak_of_a_step(layout: str, options: dict) -> tuple[int, float, int]:
    optimizer, _ = make_optimizer(layout, **options)
    optimizer.step()  # plans, and makes the momentum
    peak = peak_bytes(optimizer.step)
    (program,) = optimizer.runtime.programs()
    return peak, options["bucket_mb"] * 2**20, len(program.buckets)


@pytest.mark.each_choice
@pytest.mark.parametrize(("layout", "world"), [("replicated", 2), ("sliced", 2), ("copies", 4)])
@pytest.mark.parametrize(
    "options",
    [
        {"bucket_mb": 0.5},
        {"bucket_mb": 1.0},
        {"bucket_mb": 0.5, "ns_dtype": torch.bfloat16, "wire_dtype": torch.bfloat16},
        {"bucket_mb": 0.5, "ns_dtype": torch.float16},
    ],
    ids=str,
)
def test_a_step_allocates_at_most_two_buckets(layout, world, options):
    for peak, bucket, buckets in run_ranks(peak_of_a_step, world, layout, options):
        assert buckets >= 3
        assert 0.2 * bucket < peak <= 2 * bucket


@pytest.mark.parametrize(("layout", "world"), [("sliced", 2), ("copies", 4)])
def test_of_matrices_too_large_for_a_bucket_two_buckets_are_those_of_the_largest(layout, world):
    largest = max(m * n for m, n in SHAPES)
    for peak, _, buckets in run_ranks(peak_of_a_step, world, layout, {"bucket_mb": 0.05}):
        assert buckets >= len(SHAPES) / world / 1.5
        assert peak <= 36 * largest


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 0.5), (torch.bfloat16, 1.0)])
def test_other_gradients_are_taken_in_parts(dtype, factor):
    """One that must be rescaled (DeepSpeed's clip taken back) or is in bf16 never has a second, whole copy."""

    def peak() -> tuple[int, int]:
        p = torch.nn.Parameter(torch.zeros(64 * 1024, 64, dtype=dtype))
        optimizer = Muon([{"params": [p], "cuts": [{"heads": 1024}]}], bucket_mb=0.5)
        layout = replicated_layout([optimizer.specs[0][0].matrices], 1)
        binding = Binding(layout, (p,), None, torch.device("cpu"), gradient_factor=lambda: factor)
        optimizer.bind(binding, {0: 0})
        p.grad = torch.ones_like(p)
        optimizer.step()
        return peak_bytes(optimizer.step), p.numel() * 2

    for measured, whole in run_ranks(peak, 1):
        assert measured <= 2**20 < whole


def test_what_runs_is_said_for_every_shape():
    def names(ns_dtype: torch.dtype) -> dict[tuple[int, int], str]:
        optimizer, _ = make_optimizer("replicated", ns_dtype=ns_dtype, overlap=False)
        optimizer.step()
        return optimizer.runtime.kernels(optimizer.param_groups)

    (found,) = run_ranks(names, 1, torch.float16)
    assert found == {
        (64, 64): "standard, float16, torch",
        (64, 160): "Gram form, segments of 2, float16, torch",
        (160, 64): "Gram form, segments of 2, float16, torch",
        (96, 128): "standard, float16, torch",
    }


def test_overlap_must_be_the_same_on_all_ranks():
    """It decides the order of the messages."""

    def mismatched() -> None:
        optimizer, _ = make_optimizer("replicated", overlap=dist.get_rank() == 0)
        optimizer.step()

    with pytest.raises(RankFailure, match=r"(?s)PlanMismatchError.*overlap.*rank 0: True.*rank 1: False"):
        run_ranks(mismatched, 2)


@pytest.mark.slow
def test_compiled_steps_agree_with_uncompiled_ones():
    def difference() -> float:
        tensors = []
        for compiled in (True, False):
            optimizer, parameters = make_optimizer("replicated", ns_compile=compiled)
            optimizer.step()
            tensors.append(torch.cat([p.detach().flatten() for p in parameters]))
            names = optimizer.runtime.kernels(optimizer.param_groups).values()
            assert all(name.endswith("compiled") == compiled for name in names)
        return float((tensors[0] - tensors[1]).norm() / tensors[1].norm())

    assert max(run_ranks(difference, 1, timeout=250.0)) < 1e-6

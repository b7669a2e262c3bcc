"""16-bit weights: rounding that is unbiased and equal everywhere, masters that are the fp32 run."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.fsdp  # 2 s that every forked rank would pay again
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from muon_dist import Muon
from muon_dist.adapters import module_state
from muon_dist.checkpoint import Contents, Ranks, Saver, load, open_checkpoint
from muon_dist.errors import ConfigError
from muon_dist.layout import Block
from muon_dist.optim.low_precision import MASTER
from muon_dist.optim.rounding import key, opened, random_bits, round_stochastically
from muon_dist.optim.rules import RULES
from tests.distributed import run_ranks
from tests.optim.low_precision import decayed, moved

CPU = torch.device("cpu")
STOCHASTIC: dict[str, Any] = {"stochastic_rounding": True, "rounding_seed": 7}
MASTERS: dict[str, Any] = {"master_weights": True}


# The random numbers -------------------------------------------------------------------------------------------------


def plain_bits(number: int, indices: np.ndarray) -> np.ndarray:
    """The hash written down a second time, in unsigned arithmetic."""
    with np.errstate(over="ignore"):
        x = indices.astype(np.uint64).astype(np.uint32) + np.uint32(number & 0xFFFFFFFF)
        x ^= x >> np.uint32(16)
        x *= np.uint32(0x7FEB352D)
        x ^= x >> np.uint32(15)
        x += np.uint32(number >> 32)
        x *= np.uint32(0x846CA68B)
    return (x >> np.uint32(16)).astype(np.int64)


BLOCKS = [
    Block.run(0, 77),
    Block.run(12345, 1),
    Block(11, 5, 3, 9),
    Block.run(2**31 - 5, 20),
    Block.run(2**32 + 3, 33),
]


def indices(block: Block) -> np.ndarray:
    rows = block.start + np.arange(block.rows, dtype=np.int64)[:, None] * block.stride
    return (rows + np.arange(block.cols)).reshape(-1)


def test_the_random_numbers_are_a_function_of_key_and_element() -> None:
    places = [(key(3, f"w{n}", 5), block) for n, block in enumerate(BLOCKS)]
    expected = np.concatenate([plain_bits(number, indices(block)) for number, block in places])
    assert np.array_equal(random_bits(places, CPU).numpy(), expected)


def test_every_part_of_the_key_counts() -> None:
    keys = {key(*parts) for parts in ((0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), (0, "a", 1, 1))}
    assert len(keys) == 5


def test_the_random_numbers_look_random() -> None:
    """Uniform, and without correlation between neighbours, steps and tensors, to five standard deviations."""
    n = 2**16
    numbers = [random_bits([(key(0, name, s), Block.run(0, n))], CPU).double() for name in "ab" for s in range(16)]
    counts = torch.histc(torch.cat(numbers), 256, 0, 65536)
    expected = len(numbers) * n / 256
    assert float(((counts - expected) ** 2 / expected).sum()) < 255 + 5 * (2 * 255) ** 0.5
    unit = [(x / 65536 - 0.5 + 2**-17) * 12**0.5 for x in numbers]
    for lag in (1, 2, 3, 4, 8, 64, 4096):
        assert abs(float((unit[0][lag:] * unit[0][:-lag]).sum())) < 5 * n**0.5, lag
    for other in unit[1:]:
        assert abs(float((unit[0] * other).sum())) < 5 * n**0.5
    low = [(x.long() & 1).double() * 2 - 1 for x in numbers]
    assert all(abs(float(x.sum())) < 5 * n**0.5 for x in low)
    by_step = torch.stack(unit[:16])  # of one element over the steps
    assert float(by_step.mean(0).abs().max()) < 5.5 / 16**0.5


def test_the_mean_of_many_roundings_is_the_number() -> None:
    values = torch.randn(64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 64)
    down = (values.view(torch.int32) & -0x10000).view(torch.float32).double()
    up = ((values.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32).double()
    total, times = torch.zeros(64, dtype=torch.float64), 4096
    for step in range(times):
        rounded = values.clone()
        round_stochastically(rounded, [(key(0, "w", step), Block.run(0, 64))])
        assert torch.equal(rounded, rounded.bfloat16().float())
        found = rounded.double()
        assert bool(((found == down) | (found == up)).all())
        total += found
    share = (values.double() - down) / (up - down)
    deviation = (share * (1 - share) / times).sqrt()
    assert bool((((total / times - down) / (up - down) - share).abs() <= 5 * deviation + 1e-12).all())


def test_what_bfloat16_has_stays_as_it_is() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -2.5, 3.0e38, 1e-40, float("inf"), float("-inf")]).bfloat16().float()
    nan = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    for step in range(50):
        rounded = torch.cat([values, nan])
        round_stochastically(rounded, [(key(0, "w", step), Block.run(0, 12))])
        assert torch.equal(rounded[:8].view(torch.int32), values.view(torch.int32))
        assert bool(rounded[8:].isnan().all())


@pytest.mark.parametrize("elements", [1, 7, 30, 10**6])
def test_how_many_are_rounded_at_a_time_changes_nothing(elements: int) -> None:
    shapes = [((77,), BLOCKS[0]), ((5, 3), BLOCKS[2]), ((4, 5), Block.run(40, 20)), ((2, 3), Block(6, 2, 3, 6))]

    def results(elements: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(shape, generator=generator).bfloat16() for shape, _ in shapes]
        places = [(key(1, f"w{n}", 1), block) for n, (_, block) in enumerate(shapes)]
        updates = [torch.randn(w.shape, generator=generator) * 1e-3 for w in weights]
        for some in opened(weights, places, elements):
            for wide, n, rows in zip(some.wide, some.members, some.slices, strict=True):
                wide.add_(updates[n][rows])
        return weights

    assert all(torch.equal(a, b) for a, b in zip(results(elements), results(10**6), strict=True))


# Training -----------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Two matrices, one of them cut into heads, three experts, a table and a vector."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"square": (12, 12), "qkv": (12, 8), "experts": (4, 6, 8), "table": (23, 8), "bias": (7,)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator).bfloat16().to(dtype)))

    def optimizer(self, **options: Any) -> Muon:
        named = dict(self.named_parameters())
        groups: list[dict[str, Any]] = [
            {
                "params": [named[n] for n in ("square", "qkv", "experts")],
                "param_names": ["square", "qkv", "experts"],
                "cuts": [None, {"heads": 3}, None],
            },
            {
                "params": [named["table"], named["bias"]],
                "param_names": ["table", "bias"],
                "algorithm": "adamw",
                "lr": 1e-3,
            },
        ]
        decay: dict[str, Any] = {} if options.get("rule") == "hyperball" else {"weight_decay": 0.1}
        return Muon(groups, lr=0.01, **decay, **options)


def whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def give(model: Model, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in model.parameters():
        g = torch.randn(p.shape, generator=generator).bfloat16().to(p.dtype)
        p.grad = distribute_tensor(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g


def exact(optimizer: Muon) -> None:
    """Replace Newton-Schulz, whose last bits depend on which matrices are stacked, by elementwise arithmetic."""
    optimizer.bound_runtime().orthogonalize = lambda stack, group: stack.mul_(0.125).clamp_(-0.2, 0.2)


def made(layout: str, options: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> tuple[Model, Muon]:
    model = Model(dtype)
    world = dist.get_world_size()
    if layout == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    elif layout == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")))
    elif layout == "columns":
        mesh = init_device_mesh("cpu", (world,))
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: torch.distributed.tensor.Shard(p.dim() - 1))
    optimizer = model.optimizer(**options)
    exact(optimizer)
    return model, optimizer


def train(model: Model, optimizer: Muon, first: int, last: int) -> dict[str, torch.Tensor]:
    for step in range(first, last):
        give(model, step)
        optimizer.step()
    return {n: whole(p) for n, p in model.named_parameters()}


def trained(layout: str, options: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    model, optimizer = made(layout, options, dtype)
    return train(model, optimizer, 0, 4)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("rule", RULES)
def test_stochastic_rounding_is_equal_under_every_layout(rule: str) -> None:
    """Bit for bit, on one to four ranks, with small buckets as well."""
    options = {**STOCHASTIC, "rule": rule}
    expected = run_ranks(trained, 1, "ddp", options)[0]
    cases = [(2, "ddp", 0.001), (3, "fsdp2", 256.0)]
    if rule == "muon":
        cases += [
            (3, "ddp", 256.0),
            (1, "fsdp2", 256.0),
            (2, "fsdp2", 0.001),
            (2, "columns", 256.0),
            (4, "hsdp", 256.0),
        ]
    for world, layout, bucket_mb in cases:
        found = run_ranks(trained, world, layout, {**options, "bucket_mb": bucket_mb})
        assert all(same(of_rank, expected) == [] for of_rank in found), (world, layout, bucket_mb)
    other = run_ranks(trained, 1, "ddp", {**options, "rounding_seed": 8})[0]
    assert len(same(other, expected)) >= 4


def alone(options: dict[str, Any], dtype: torch.dtype) -> tuple[Model, Muon]:
    model = Model(dtype)
    optimizer = model.optimizer(process_group=None, **options)
    return model, optimizer


@pytest.mark.parametrize("rule", RULES)
def test_masters_are_the_weights_of_the_fp32_run(rule: str) -> None:
    model, optimizer = alone({**MASTERS, "rule": rule}, torch.bfloat16)
    twin, plain = alone({"rule": rule}, torch.float32)
    found, expected = train(model, optimizer, 0, 5), train(twin, plain, 0, 5)
    assert same(found, {name: w.bfloat16() for name, w in expected.items()}) == []
    masters = {name: optimizer.state[p][MASTER] for name, p in model.named_parameters()}
    assert same(masters, expected) == []


def test_masters_under_fsdp2_are_sharded_and_equal() -> None:
    def masters() -> tuple[dict[str, torch.Tensor], bool]:
        model, optimizer = made("fsdp2", MASTERS)
        train(model, optimizer, 0, 4)
        kept = {name: optimizer.state[p][MASTER] for name, p in model.named_parameters()}
        sharded = all(k.to_local().numel() < k.numel() for k in kept.values())
        return {name: whole(k) for name, k in kept.items()}, sharded

    expected = run_ranks(trained, 1, "ddp", {}, torch.float32)[0]
    for found, sharded in run_ranks(masters, 2):
        assert same(found, expected) == [] and sharded


@pytest.mark.parametrize("rule", RULES)
def test_stochastic_rounding_stays_near_the_fp32_run(rule: str) -> None:
    """In 60 steps that plain bfloat16 does not follow: the mean over the elements is that of fp32."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, options, dtype in (
        ("fp32", {}, torch.float32),
        ("stochastic", STOCHASTIC, torch.bfloat16),
        ("plain", {}, torch.bfloat16),
    ):
        weight = nn.Parameter(torch.ones(64, 64).to(dtype) + torch.eye(64, dtype=dtype))
        groups = [{"params": [weight], "rule": rule}]
        optimizer = Muon(groups, lr=1e-4, process_group=None, **options)
        for step in range(60):
            weight.grad = torch.ones(64, 64, dtype=dtype) + (step % 2) * torch.eye(64, dtype=dtype)
            optimizer.step()
        found[name] = weight.detach().double()
    before = torch.ones(64, 64).double() + torch.eye(64).double()
    way = float((found["fp32"] - before).mean())
    assert abs(float((found["stochastic"] - before).mean()) / way - 1) < 0.25  # 3 standard deviations
    if rule != "hyperball":  # which takes longer steps
        assert abs(float((found["plain"] - before).mean()) / way) < 0.2


@pytest.mark.slow
def test_the_table_of_the_docs() -> None:
    """What is lost, and what is kept, within the noise of 4,096 elements."""
    assert decayed("bfloat16", 50) == [1.0, 1.0]
    for way in ("bfloat16, `stochastic_rounding`", "bfloat16, `master_weights`"):
        assert decayed(way, 50) == pytest.approx(decayed("fp32", 50), rel=5e-3)
        assert moved(way, 200)[0] == pytest.approx(1.0, abs=0.2)
    assert moved("bfloat16", 200)[0] < 0.1


# State --------------------------------------------------------------------------------------------------------------


def through_torch_save(optimizer: Muon) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("options", [STOCHASTIC, MASTERS], ids=["stochastic", "masters"])
@pytest.mark.parametrize("bound", [False, True])
def test_a_state_dict_goes_on_exactly(options: dict[str, Any], bound: bool) -> None:
    model, optimizer = alone(options, torch.bfloat16)
    train(model, optimizer, 0, 3)
    saved, weights = through_torch_save(optimizer), copy.deepcopy(model.state_dict())
    expected = train(model, optimizer, 3, 6)
    again, other = alone(options, torch.bfloat16)
    if bound:
        train(again, other, 7, 9)
    again.load_state_dict(weights)
    other.load_state_dict(saved)
    assert same(train(again, other, 3, 6), expected) == []
    twin = copy.deepcopy((model, optimizer))
    assert same(train(*twin, 6, 8), train(model, optimizer, 6, 8)) == []


def test_a_state_without_masters_begins_them_from_the_weights() -> None:
    model, optimizer = alone({}, torch.bfloat16)
    train(model, optimizer, 0, 3)
    saved, weights = optimizer.state_dict(), copy.deepcopy(model.state_dict())
    again, other = alone(MASTERS, torch.bfloat16)
    again.load_state_dict(weights)
    other.load_state_dict(saved)
    train(again, other, 3, 4)
    for p in again.parameters():
        assert torch.equal(other.state[p][MASTER].bfloat16(), p)
    back, plain = alone({}, torch.bfloat16)  # and the other way round
    back.load_state_dict(again.state_dict())
    plain.load_state_dict(other.state_dict())
    train(back, plain, 4, 5)
    assert not any(MASTER in state for state in plain.state.values())


def test_weights_that_somebody_else_changes_count() -> None:
    """Elements that were changed are taken over; the others keep their low bits."""
    model, optimizer = alone(MASTERS, torch.bfloat16)
    train(model, optimizer, 0, 3)
    before = optimizer.state[model.table][MASTER].clone()
    model.table.data[:3] = 5.0
    optimizer.param_groups[1]["lr"] = 0.0
    train(model, optimizer, 3, 4)
    after = optimizer.state[model.table][MASTER]
    assert bool((after[:3] == 5.0).all()) and torch.equal(after[3:], before[3:])
    optimizer.state[model.table].pop(MASTER)
    train(model, optimizer, 4, 5)
    assert torch.equal(optimizer.state[model.table][MASTER].bfloat16(), model.table)


def saved_and_on(folder: str, layout: str, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    model, optimizer = made(layout, options)
    train(model, optimizer, 0, 3)
    ranks = Ranks.of_the_run()
    held = module_state.holding(model, optimizer, ranks.size)
    Saver(folder, ranks).save(held.pieces, Contents(3, held.layout))
    return train(model, optimizer, 3, 6)


def resumed(folder: str, layout: str, options: dict[str, Any], first: int) -> dict[str, torch.Tensor]:
    model, optimizer = made(layout, options)
    train(model, optimizer, 7, 7 + first)
    ranks = Ranks.of_the_run()
    checkpoint = open_checkpoint(f"{folder}/checkpoint-3", ranks)
    load(checkpoint, module_state.holding(model, optimizer, ranks.size, source=checkpoint), ranks)
    return train(model, optimizer, 3, 6)


@pytest.mark.each_choice
@pytest.mark.parametrize("options", [STOCHASTIC, MASTERS], ids=["stochastic", "masters"])
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_checkpoint_goes_on_exactly_under_every_layout(tmp_path: Any, options: dict[str, Any], layout: str) -> None:
    expected = run_ranks(saved_and_on, 2, str(tmp_path), layout, options)[0]
    for world, other, first in ((2, "ddp", 0), (2, "fsdp2", 2), (3, "fsdp2", 0), (1, "ddp", 0)):
        for found in run_ranks(resumed, world, str(tmp_path), other, options, first):
            assert same(found, expected) == [], (world, other)


def test_a_checkpoint_goes_to_another_precision_and_back(tmp_path: Any) -> None:
    """Weights are saved as the masters, so an fp32 run continues from them as the run itself does."""
    expected = run_ranks(saved_and_on, 2, str(tmp_path), "ddp", MASTERS)[0]

    def in_fp32() -> dict[str, torch.Tensor]:
        model, optimizer = made("ddp", {}, torch.float32)
        ranks = Ranks.of_the_run()
        checkpoint = open_checkpoint(f"{tmp_path}/checkpoint-3", ranks)
        load(checkpoint, module_state.holding(model, optimizer, ranks.size, source=checkpoint), ranks)
        return train(model, optimizer, 3, 6)

    found = run_ranks(in_fp32, 2)[0]
    assert same({name: w.bfloat16() for name, w in found.items()}, expected) == []
    for options in ({}, STOCHASTIC):  # and a run without masters takes it over
        run_ranks(resumed, 2, str(tmp_path), "fsdp2", options, 0)


def through_dcp(folder: str, options: dict[str, Any]) -> list[str]:
    """Parameters that differ after torch.distributed.checkpoint has saved and loaded a run under FSDP2."""
    model, optimizer = made("fsdp2", options)
    train(model, optimizer, 0, 3)
    of_model, of_optimizer = get_state_dict(model, optimizer)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=folder)
    expected = train(model, optimizer, 3, 6)
    again, other = made("fsdp2", options)
    of_model, of_optimizer = get_state_dict(again, other)
    state = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(again, other, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return same(train(again, other, 3, 6), expected)


@pytest.mark.parametrize("options", [STOCHASTIC, MASTERS], ids=["stochastic", "masters"])
def test_torchs_own_checkpoints_go_on_exactly(tmp_path: Any, options: dict[str, Any]) -> None:
    assert run_ranks(through_dcp, 2, str(tmp_path), options) == [[], []]


# What is said -------------------------------------------------------------------------------------------------------


def said(options: dict[str, Any], dtype: torch.dtype) -> list[str]:
    model, optimizer = Model(dtype), None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = model.optimizer(**options)
        train(model, optimizer, 0, 3)
    return [str(w.message) for w in caught if "round" in str(w.message)]


def test_plain_rounding_is_said_once_on_the_first_rank() -> None:
    (text,), of_others = run_ranks(said, 2, {}, torch.bfloat16)
    assert "5 of 5 parameters are torch.bfloat16" in text and "square" in text
    assert "master_weights=True" in text and "stochastic_rounding=True" in text and of_others == []


@pytest.mark.parametrize(
    ("options", "dtype"), [({}, torch.float32), (STOCHASTIC, torch.bfloat16), (MASTERS, torch.float16)]
)
def test_nothing_is_said_where_nothing_is_lost(options: dict[str, Any], dtype: torch.dtype) -> None:
    assert run_ranks(said, 1, options, dtype) == [[]]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="master_weights and stochastic_rounding are both on"):
        Model(torch.bfloat16).optimizer(**STOCHASTIC, **MASTERS)
    model, optimizer = alone(STOCHASTIC, torch.float16)
    give(model, 0)
    with pytest.raises(ConfigError, match=r"square is torch\.float16: use master_weights=True"):
        optimizer.step()


def operations(options: dict[str, Any]) -> Iterator[str]:
    from torch.utils._python_dispatch import TorchDispatchMode

    names: list[str] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    model, optimizer = alone(options, torch.bfloat16)
    train(model, optimizer, 0, 2)
    give(model, 2)
    with Count():
        optimizer.step()
    return iter(names)


def test_a_step_with_an_option_is_a_few_operations_for_each_bucket() -> None:
    plain = len(list(operations({})))
    assert len(list(operations(MASTERS))) <= plain + 40
    assert len(list(operations(STOCHASTIC))) <= plain + 200

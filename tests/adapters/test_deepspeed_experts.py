"""DeepSpeed's own MoE layers with ZeRO 0, 1 and 2: experts on some of the ranks, copied over others."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import muon_dist
from muon_dist.errors import FrameworkError
from tests.distributed import run_ranks

pytest.importorskip("deepspeed")

import deepspeed
from deepspeed.moe.layer import MoE

from muon_dist.optim.muon import Muon
from tests.adapters.deepspeed_ranks import Case, Truth, full_gradient, least_bytes
from tests.adapters.test_deepspeed_autotp import loaded_from, resaved, saved_to

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(600)]

WIDTH, EXPERTS, SAMPLES, STEPS = 12, 4, 32, 5
Weights = dict[str, torch.Tensor]


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 10), nn.Linear(10, WIDTH, bias=False)
        self.kept = nn.Parameter(torch.ones(WIDTH), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x * self.kept)))


class Net(nn.Module):
    """One MoE layer for each of `sizes`, their `ep_size`. No token is dropped, however the batch is cut."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.dense = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in sizes)
        self.layers = nn.ModuleList(
            MoE(WIDTH, Expert(), EXPERTS, size, k=1, capacity_factor=float(EXPERTS), min_capacity=0, use_rts=False)
            for size in sizes
        )

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for dense, layer in zip(self.dense, self.layers, strict=True):
            x = x + layer(torch.tanh(dense(x)))[0]
        return (x - y).square().mean()


def number(name: str, sizes: tuple[int, ...], rank: int) -> str:
    """The name with the number of the expert among those of all ranks: of DeepSpeed's ranks r, r + ep_size, ..."""
    found = re.fullmatch(r"layers\.(\d+)\.(.*)deepspeed_experts\.(\d+)\.(.*)", name)
    if found is None:
        return name
    layer, path, local, rest = found.groups()
    size = sizes[int(layer)]
    return f"layers.{layer}.{path}deepspeed_experts.{int(local) + rank % size * (EXPERTS // size)}.{rest}"


@dataclass(frozen=True)
class Run:
    """Under as many ranks as there are."""

    case: Case
    sizes: tuple[int, ...] = field(default=(2,))

    def engine(self) -> tuple[Any, Muon]:
        deepspeed.init_distributed("gloo", verbose=False)
        world, rank = dist.get_world_size(), dist.get_rank()
        model = Net(self.sizes)
        for name, p in model.named_parameters():
            generator = torch.Generator().manual_seed(zlib.crc32(number(name, self.sizes, rank).encode()))
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.3)
        groups = muon_dist.param_groups(model, lr=0.02, weight_decay=0.1, adamw_lr=3e-3, adamw_weight_decay=0.05)
        optimizer = Muon(groups, ns_dtype=torch.float32, **self.case.muon)
        config = {
            "train_micro_batch_size_per_gpu": SAMPLES // (world * self.case.accumulation),
            "gradient_accumulation_steps": self.case.accumulation, "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True, "zero_optimization": {"stage": self.case.stage},
            "steps_per_print": 10**9, **self.case.config,
        }  # fmt: skip
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        muon_dist.attach(engine)
        return engine, optimizer

    def backward(self, engine: Any, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        dtype = next(engine.module.parameters()).dtype
        parts = (
            torch.randn(2, SAMPLES, WIDTH, generator=generator)
            .to(dtype)
            .chunk(dist.get_world_size() * self.case.accumulation, dim=1)
        )
        for micro in range(self.case.accumulation):
            engine.backward(engine(*parts[micro * dist.get_world_size() + dist.get_rank()]))
            if micro < self.case.accumulation - 1:
                engine.step()

    def weights(self, engine: Any) -> Weights:
        named = engine.module.named_parameters()
        return {number(n, self.sizes, dist.get_rank()): p.detach().clone() for n, p in named}


def stepped(run: Run) -> dict[str, Any]:
    engine, optimizer = run.engine()
    trained = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
    truth = Truth({n: p.detach().clone() for n, p in trained.items()}, optimizer)
    calls = []
    for step in range(STEPS):
        run.backward(engine, step)
        gradients = {n: full_gradient(engine, p) for n, p in trained.items()}
        before = optimizer.orthogonalized
        engine.step()
        calls.append(optimizer.orthogonalized - before)
        truth.step(gradients)
    plan, runtime = optimizer.plan, optimizer.runtime
    assert plan is not None and runtime is not None
    result = {
        "same": max((trained[n].detach() - truth.weights[n]).abs().max().item() for n in truth.momentum),
        "weights": run.weights(engine),
        "calls": calls,
        "matrices": [m.matrix.name for m in plan.layout.matrices],
        "sent": runtime.transport.bytes_sent / STEPS,
        "formula": least_bytes(plan),
    }
    engine.destroy()
    return result


def all_stepped(runs: list[Run]) -> list[dict[str, Any]]:
    return [stepped(run) for run in runs]


def checked(ranks: int, runs: list[Run]) -> None:
    alone = [Run(Case(0, config=run.case.config), (1,) * len(run.sizes)) for run in runs]
    [truths] = run_ranks(all_stepped, 1, alone)
    by_rank = run_ranks(all_stepped, ranks, runs, timeout=200)
    for run, truth, results in zip(runs, truths, zip(*by_rank, strict=True), strict=True):
        names = [n for n in results[0]["matrices"] if "experts" in n]
        assert len(names) == len(set(names)) == 2 * EXPERTS * len(run.sizes)
        exact = 0.0 if not run.case.config.get("gradient_clipping") else 1e-6
        for r in results:
            assert r["same"] <= exact, (run, r["same"])
            for n, w in r["weights"].items():
                assert torch.allclose(w, truth["weights"][n], rtol=0, atol=2e-5), (run, n)
        assert {n for r in results for n in r["weights"]} == set(truth["weights"])
        assert sum(r["sent"] for r in results) == results[0]["formula"], run
        calls = [sum(of_step) for of_step in zip(*(r["calls"] for r in results), strict=True)]
        assert calls == [len(truth["matrices"])] * STEPS, run


CLIP = {"gradient_clipping": 0.05}


def test_experts_on_some_ranks_are_those_of_one_process() -> None:
    """Every rank has experts of its own (4), or two ranks have copies (2); both in one model."""
    checked(
        4, [Run(Case(0), (2, 4)), Run(Case(1, accumulation=2, config=CLIP), (2, 4)), Run(Case(2), (2,)), Run(Case(0))]
    )


@pytest.mark.slow
def test_experts_of_two_ranks_are_those_of_one_process() -> None:
    checked(2, [Run(Case(stage), sizes) for stage in (0, 1, 2) for sizes in ((1,), (2,))])


def rounded(stages: list[int]) -> list[list[str]]:
    """At each stage, the weights in bfloat16 that are not the reference's fp32 ones, rounded."""
    found = []
    for stage in stages:
        run = Run(Case(stage, config={"bf16": {"enabled": True}}))
        engine, optimizer = run.engine()
        trained = {n: p for n, p in engine.module.named_parameters() if p.requires_grad}
        start = {n: p.detach().float() for n, p in trained.items()}
        truth = Truth(start, optimizer)
        for step in range(STEPS):
            run.backward(engine, step)
            gradients = {n: full_gradient(engine, p) for n, p in trained.items()}
            engine.step()
            truth.step(gradients)
        moved = [n for n in truth.momentum if torch.equal(trained[n].float(), start[n])]
        wrong = [n for n in truth.momentum if not torch.equal(trained[n], truth.weights[n].bfloat16())]
        found.append(moved + wrong)
        engine.destroy()
    return found


@pytest.mark.parametrize("stages", [[1], pytest.param([0, 2], marks=pytest.mark.slow)])
def test_experts_in_16_bits_are_the_rounded_reference(stages: list[int]) -> None:
    for wrong in run_ranks(rounded, 2, stages, timeout=200):
        assert wrong == [[]] * len(stages)


def resumed(run: Run, folder: str) -> list[Weights]:
    """Weights after four steps; after our save at step two, a load and two steps; and with DeepSpeed's save."""
    engine, _ = run.engine()
    for step in range(4):
        run.backward(engine, step)
        engine.step()
        if step == 1:
            saved_to(engine, folder)
            engine.save_checkpoint(folder + "/own", tag="two")
    found = [run.weights(engine)]
    for own in (False, True):
        engine, _ = run.engine()
        if own:
            engine.load_checkpoint(folder + "/own", tag="two")
        else:
            loaded_from(engine, folder)
        for step in (2, 3):
            run.backward(engine, step)
            engine.step()
        found.append(run.weights(engine))
    return found


def state_in(run: Run, folder: str) -> dict[str, torch.Tensor]:
    """All weights and optimizer state of a checkpoint, as one process loads them."""
    engine, optimizer = run.engine()
    loaded_from(engine, folder)
    found = run.weights(engine)
    for n, p in engine.module.named_parameters():
        found |= {f"{n} {key}": value.clone() for key, value in optimizer.state.get(p, {}).items()}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 0])
def test_a_checkpoint_goes_on_under_another_number_of_experts_a_rank(stage: int, tmp_path: Any) -> None:
    first, second, third = (str(tmp_path / name) for name in ("first", "second", "third"))
    here = Run(Case(stage))
    for unbroken, *after in run_ranks(resumed, 4, here, first, timeout=200):
        for weights in after:
            assert all(torch.equal(w, unbroken[n]) for n, w in weights.items())
    run_ranks(resaved, 2, Run(Case(2), (1,)), first, second)
    run_ranks(resaved, 4, Run(Case(stage), (4,)), second, third)
    alone = Run(Case(0), (1,))
    [wanted] = run_ranks(state_in, 1, alone, first)
    assert sum(key.endswith("momentum_buffer") for key in wanted) == 2 * EXPERTS + 2
    for folder in (second, third):
        [found] = run_ranks(state_in, 1, alone, folder)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], value) for key, value in wanted.items())


def mixed(stage: int) -> str:
    run = Run(Case(stage))
    made = muon_dist.param_groups

    def without(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
        """One of Muon's groups holds the dense weights and the experts."""
        groups = made(model, **options)
        dense, experts = (g for g in groups if g["algorithm"] == "muon")
        for key in ("params", "param_names", "cuts"):
            dense[key] = dense[key] + experts[key]
        return [g for g in groups if g is not experts]

    muon_dist.param_groups = without  # type: ignore[attr-defined]
    with pytest.raises(FrameworkError) as raised:
        run.engine()
    return str(raised.value)


def test_experts_in_a_group_with_others_are_refused() -> None:
    for said in run_ranks(mixed, 2, 1):
        assert "muon_dist.param_groups(model)" in said and "ranks [0, 1]" in said

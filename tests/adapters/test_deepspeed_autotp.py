"""DeepSpeed's AutoTP with ZeRO 0 to 3: two ranks hold a layer together, two copies of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import muon_dist
from muon_dist.errors import ReplicaError
from tests.distributed import run_ranks

pytest.importorskip("deepspeed")

from muon_dist.adapters import deepspeed_state, module_state
from muon_dist.checkpoint import Contents, Ranks, Saver, load, open_checkpoint
from muon_dist.optim.muon import Muon
from tests.adapters.deepspeed_ranks import (
    Case,
    Truth,
    batch,
    ds_config,
    full_gradient,
    least_bytes,
    make_model,
    master,
)

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(600)]

TP, STEPS, WIDTH = 2, 5, 12
Weights = dict[str, torch.Tensor]
UNEVEN = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 51, "tie_word_embeddings": True}
# (query, key, value) and (gate, up) as they stand in one weight.
FUSED = {
    "layer_specs": [
        {"patterns": [r".*qkv\.weight$"], "shape": [[8, 4, 4], -1], "partition_dim": 0},
        {"patterns": [r".*gate_up\.weight$"], "shape": [2, -1], "partition_dim": 0},
        {"patterns": [r".*(out|mix|down)\.weight$"], "partition_type": "row"},
    ],
    "use_default_specs": False,
}


class Fused(nn.Module):
    """Fused weights; `whole` is on every rank; `idle` gets no gradient; `kept` is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 16, bias=False)
        self.out, self.mix = nn.Linear(8, WIDTH, bias=False), nn.Linear(4, WIDTH, bias=False)
        self.gate_up, self.down = nn.Linear(WIDTH, 20, bias=False), nn.Linear(10, WIDTH)
        self.whole, self.idle = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 6, bias=False)
        self.kept = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        unit = self.qkv.weight.shape[0] // 4
        q, k, v = self.qkv(x).split([2 * unit, unit, unit], dim=-1)
        x = x + self.out(torch.tanh(q)) + self.mix(k * v)
        gate, up = self.gate_up(self.whole(x)).chunk(2, dim=-1)
        return self.kept(x) + self.down(torch.tanh(gate) * up)


@dataclass(frozen=True)
class Run:
    """tp: the ranks that hold a layer together; 1 without AutoTP."""

    case: Case
    tp: int = TP
    model: dict[str, Any] = field(default_factory=dict)

    def made(self) -> nn.Module:
        if self.case.model == "fused":
            torch.manual_seed(0)
            return Fused()
        return make_model(self.case.model, **self.model)

    def muon(self, model: nn.Module) -> Muon:
        entries = [{"pattern": r".*weight", "algorithm": "muon"}] if self.case.model == "fused" else []
        groups = muon_dist.param_groups(
            model, lr=0.02, weight_decay=0.1, adamw_lr=3e-3, adamw_weight_decay=0.05, groups=entries
        )
        return Muon(groups, ns_dtype=torch.float32, **self.case.muon)

    def loss(self, model: Any, step: int, copies: int = 1, copy: int = 0, micro: int = 0) -> torch.Tensor:
        part = micro * copies + copy
        if self.case.model == "fused":
            x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step))
            x = x.chunk(copies * self.case.accumulation)[part] if copies else x
            return (model(x) - x.roll(1, -1)).square().mean()
        tokens = batch(step).chunk(copies * self.case.accumulation)[part] if copies else batch(step)
        return model(input_ids=tokens, labels=tokens).loss

    def engine(self) -> tuple[Any, Muon]:
        import deepspeed

        deepspeed.init_distributed("gloo", verbose=False)
        model = self.made()
        optimizer = self.muon(model)
        copies = dist.get_world_size() // self.tp
        config = ds_config(self.case, copies)
        if self.case.model == "fused":
            config["train_micro_batch_size_per_gpu"] = 8 // (copies * self.case.accumulation)
        if self.tp > 1:
            config["tensor_parallel"] = {"autotp_size": self.tp}
            if self.case.model == "fused":
                config["tensor_parallel"]["partition_config"] = FUSED
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        if self.case.attach:
            muon_dist.attach(engine)
        return engine, optimizer

    def backward(self, engine: Any, step: int) -> None:
        copies = dist.get_world_size() // self.tp
        for micro in range(self.case.accumulation):
            engine.backward(self.loss(engine, step, copies, dist.get_rank() // self.tp, micro))
            if micro < self.case.accumulation - 1:
                engine.step()

    def gradients(self, model: nn.Module, weights: Weights, step: int) -> Weights:
        """Of one process."""
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, w in weights.items():
                parameters[name].copy_(w)
        model.zero_grad()
        self.loss(model, step, copies=0).backward()
        return {
            n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in parameters.items() if n in weights
        }


def whole(p: Any, local: torch.Tensor) -> torch.Tensor:
    """The whole of what this rank holds as it holds the parameter `p`: put together by what AutoTP says of the cut."""
    from deepspeed.utils import groups

    found = getattr(p, "ds_autotp_universal_checkpoint_meta", None)
    if found is None or found["replicated"]:
        return local
    group, axis = groups.get_tensor_model_parallel_group(), found["partition_dim"]
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, local.clone(), group=group)
    widths = found["sub_param_shard_widths"] or [found["partition_sizes"]]
    by_rank = [part.split([w[rank] for w in widths], dim=axis) for rank, part in enumerate(parts)]
    return torch.cat([of_rank[i] for i in range(len(widths)) for of_rank in by_rank], dim=axis)


def trained(engine: Any) -> dict[str, Any]:
    return {n: p for n, p in engine.module.named_parameters() if p.requires_grad}


def masters(engine: Any, optimizer: Muon) -> Weights:
    found = master_of_trained(engine, optimizer)
    return {n: whole(p, found[n]) for n, p in trained(engine).items()}


def master_of_trained(engine: Any, optimizer: Muon) -> Weights:
    if engine.zero_optimization():
        import deepspeed

        shape = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in trained(engine).items()}
        return {
            n: deepspeed.utils.safe_get_full_fp32_param(p).detach().float().reshape(shape[n]).clone()
            for n, p in trained(engine).items()
        }
    return master(engine, optimizer)


def norm_of(gradients: Weights) -> float:
    return float(torch.stack([g.norm() for g in gradients.values()]).norm())


def stepped(run: Run) -> dict[str, Any]:
    """Errors of five steps on this rank, and what they took."""
    engine, optimizer = run.engine()
    start = {n: p.detach().clone() for n, p in run.made().named_parameters() if p.requires_grad}
    assert all(torch.equal(w, start[n]) for n, w in masters(engine, optimizer).items())
    truth, alone = Truth(start, optimizer), Truth(start, optimizer)
    lone, calls, bound = run.made(), [], engine.gradient_clipping()
    for step in range(STEPS):
        run.backward(engine, step)
        gradients = {n: whole(p, full_gradient(engine, p)) for n, p in trained(engine).items()}
        before = optimizer.orthogonalized
        engine.step()
        calls.append(optimizer.orthogonalized - before)
        truth.step(gradients)
        own = run.gradients(lone, {n: w.detach() for n, w in alone.weights.items()}, step)
        alone.step(own, 1.0 if not bound else 1.0 / max(1.0, (norm_of(own) + 1e-6) / bound))
    found = masters(engine, optimizer)
    plan, runtime = optimizer.plan, optimizer.runtime
    assert plan is not None and runtime is not None
    result = {
        "same": max((found[n] - truth.weights[n]).abs().max().item() for n in truth.momentum),
        "alone": max((found[n] - w).abs().max().item() for n, w in alone.weights.items()),
        "calls": calls,
        "matrices": len(plan.layout.matrices),
        "sent": runtime.transport.bytes_sent / STEPS,
        "formula": least_bytes(plan),
    }
    engine.destroy()
    return result


def all_stepped(runs: list[Run]) -> list[dict[str, Any]]:
    return [stepped(run) for run in runs]


def checked(runs: list[Run]) -> None:
    by_rank = run_ranks(all_stepped, 4, runs, timeout=200)
    for run, results in zip(runs, zip(*by_rank, strict=True), strict=True):
        # Muon's gradients are exempt from the clip: that they get back what it divided by rounds.
        exact = 0.0 if not run.case.config.get("gradient_clipping") else 1e-6
        for r in results:
            assert r["same"] <= exact and r["alone"] < 2e-5, (run, r)
            assert sum(found["sent"] for found in results) == r["formula"] > 0, (run, r)
        calls = [sum(of_step) for of_step in zip(*(r["calls"] for r in results), strict=True)]
        assert calls == [results[0]["matrices"]] * STEPS, run


CLIPPED = Case(1, model="fused", accumulation=2, attach=True, config={"gradient_clipping": 0.05})


def test_fused_weights_whole_ones_and_idle_ones_are_those_of_one_process() -> None:
    checked([Run(Case(0, model="fused")), Run(CLIPPED), Run(Case(3, model="fused"))])


@pytest.mark.slow
def test_uneven_heads_and_tied_embeddings_are_those_of_one_process() -> None:
    checked([Run(Case(2), model=UNEVEN)])


@pytest.mark.slow
def test_a_llama_under_every_stage_is_that_of_one_process() -> None:
    checked([Run(Case(stage)) for stage in range(4)] + [Run(Case(0), model=UNEVEN), Run(Case(1), model=UNEVEN)])


def rounded(stages: list[int]) -> list[float]:
    """The largest difference of an fp32 master from the reference, after steps in bfloat16 at each stage."""
    found = []
    for stage in stages:
        run = Run(Case(stage, dtype="bf16"))
        engine, optimizer = run.engine()
        start = masters(engine, optimizer)
        whole_model = {n: p.detach().bfloat16().float() for n, p in run.made().named_parameters()}
        assert all(torch.equal(w, whole_model[n]) for n, w in start.items())
        truth = Truth(start, optimizer)
        for step in range(STEPS):
            run.backward(engine, step)
            gradients = {n: whole(p, full_gradient(engine, p)) for n, p in trained(engine).items()}
            engine.step()
            truth.step(gradients)
        now = masters(engine, optimizer)
        assert all((now[n] - w).abs().max() > 0 for n, w in start.items())
        found.append(max((now[n] - truth.weights[n]).abs().max().item() for n in now))
        engine.destroy()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stages", [[0, 1], [2, 3]])
def test_masters_of_16_bit_weights_are_those_of_the_reference(stages: list[int]) -> None:
    for errors in run_ranks(rounded, 2, stages, timeout=200):
        assert errors == [0.0] * len(stages)


# Checkpoints ---------------------------------------------------------------------------------------------------------


def loaded_from(engine: Any, folder: str) -> None:
    ranks = Ranks(dist.group.WORLD)
    checkpoint = open_checkpoint(Path(folder) / "checkpoint-2", ranks)
    load(checkpoint, deepspeed_state.holding(engine, source=checkpoint), ranks)


def saved_to(engine: Any, folder: str) -> None:
    held = deepspeed_state.holding(engine)
    Saver(folder, Ranks(dist.group.WORLD)).save(held.pieces, Contents(2, held.layout))


def resumed(run: Run, folder: str) -> tuple[Weights, Weights, Weights]:
    """Weights after four steps; after our save at step two, a load and two steps; and with DeepSpeed's save."""
    engine, optimizer = run.engine()
    for step in range(4):
        run.backward(engine, step)
        engine.step()
        if step == 1:
            saved_to(engine, folder)
            engine.save_checkpoint(folder + "/own", tag="two")
    found = [masters(engine, optimizer)]
    for own in (False, True):
        engine, optimizer = run.engine()
        if own:
            engine.load_checkpoint(folder + "/own", tag="two")
        else:
            loaded_from(engine, folder)
        for step in (2, 3):
            run.backward(engine, step)
            engine.step()
        found.append(masters(engine, optimizer))
    return found[0], found[1], found[2]


def resaved(run: Run, folder: str, target: str) -> None:
    """Load and save without a step between."""
    engine, _ = run.engine()
    loaded_from(engine, folder)
    saved_to(engine, target)


def state_in(run: Run, folder: str) -> dict[str, torch.Tensor]:
    """All weights and optimizer state of a checkpoint, as one process without DeepSpeed loads them."""
    model = run.made()
    optimizer = run.muon(model)
    checkpoint = open_checkpoint(Path(folder) / "checkpoint-2", Ranks(None))
    load(checkpoint, module_state.holding(model, optimizer, 1, source=checkpoint), Ranks(None))
    found = {n: p.detach().clone() for n, p in model.named_parameters()}
    for n, p in model.named_parameters():
        found |= {f"{n} {key}": value.clone() for key, value in optimizer.state.get(p, {}).items()}
    return found


@pytest.mark.parametrize(
    "stage", [1, pytest.param(0, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_a_checkpoint_goes_on_and_loads_under_other_layouts(stage: int, tmp_path: Path) -> None:
    here, other = Run(Case(stage, model="fused")), Run(Case(2, model="fused"), tp=1)
    first, second, third = (str(tmp_path / name) for name in ("first", "second", "third"))
    for unbroken, *after in run_ranks(resumed, 4, here, first, timeout=200):
        for weights in after:
            assert all(torch.equal(w, unbroken[n]) for n, w in weights.items())
    run_ranks(resaved, 2, other, first, second)
    run_ranks(resaved, 4, here, second, third)
    [wanted] = run_ranks(state_in, 1, here, first)
    assert sum(key.endswith("momentum_buffer") for key in wanted) == 7 and any("exp_avg" in key for key in wanted)
    for folder in (second, third):
        [found] = run_ranks(state_in, 1, here, folder)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], value) for key, value in wanted.items())


# Evidence ------------------------------------------------------------------------------------------------------------


def odd_copy(run: Run) -> str:
    """The error of a first step where one tensor-parallel rank has other weights in a layer that is whole on each."""
    made = Fused.__init__

    def other(self: Fused) -> None:
        made(self)
        with torch.no_grad():
            self.whole.weight.add_(dist.get_rank() % TP)

    Fused.__init__ = other  # type: ignore[method-assign]
    engine, _ = run.engine()
    run.backward(engine, 0)
    with pytest.raises(ReplicaError) as raised:
        engine.step()
    return str(raised.value)


def test_whole_weights_that_differ_between_tensor_parallel_ranks_are_named() -> None:
    for stage in (0, 1):
        for said in run_ranks(odd_copy, 4, Run(Case(stage, model="fused"))):
            assert "whole.weight" in said and "idle" not in said, said

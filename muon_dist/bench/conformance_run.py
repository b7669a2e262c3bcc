"""One case of `muon-dist bench conformance` on its ranks: train a few steps under a witness."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from muon_dist.audit.witness import Witness, witness
from muon_dist.bench.conformance_cases import DECAY, LR, MOMENTUM, VOCABULARY, Case, make_model
from muon_dist.bench.conformance_engines import make_engine

STEPS = 6
FOLLOWED = 4
CLIP = 0.1
ZERO_FROM = 2
STILL = "model.layers.0.mlp.up_proj.weight"


@dataclass
class Training:
    """A loop of one framework.

    Attributes:
        backward: forward and backward of one micro-batch; the second argument says whether more follow.
        step: the optimizer's, with the clip of the case.
        save, load: the whole state to and from a folder.
    """

    followed: Any
    model: nn.Module
    backward: Callable[[torch.Tensor, bool], None]
    step: Callable[[], None]
    save: Callable[[str], Any]
    load: Callable[[str, Any], None]


def run(case: Case) -> dict[str, Any]:
    """Run a case on this rank. Returns errors, findings and choices as plain data."""
    engine = case.framework.startswith("zero") or case.framework == "autotp"
    training = _engine(case) if engine else _loop(case)
    names = [r"model\.layers\.0\..*(q|up|down)_proj\.weight"]
    matrices: Any = FOLLOWED if case.framework != "autotp" else names
    if case.condition == "zero gradients":
        matrices = [STILL]
    found = witness(
        training.followed, model=training.model, rule=case.peer.rule, matrices=matrices, **dict(case.peer.asked)
    )
    _train(case, training, found)
    return {
        "steps": found.steps,
        "error": max((s.difference.error for s in found.seen), default=None),
        "noise": max((s.noise for s in found.seen), default=0.0),
        "findings": sorted({f.cause: f.sentence for f in found.findings}.items()),
        "choices": sorted({f.cause: f.sentence for f in found.choices}.items()),
    }


def _train(case: Case, training: Training, found: Witness) -> None:
    micro = 2 if case.condition == "accumulation" else 1
    folder = tempfile.mkdtemp() if dist.get_rank() == 0 else None
    box = [folder]
    dist.broadcast_object_list(box)
    saved: Any = None
    steps = STEPS + (4 if case.condition == "zero gradients" else 0)
    for step in range(steps):
        if case.condition == "resume" and step == STEPS // 2:
            saved = training.save(str(box[0]))
        for i in range(micro):
            training.backward(batch(2 * step + i, case), i + 1 < micro)
        training.step()
    if case.condition == "resume":
        training.load(str(box[0]), saved)
        for step in range(3):
            training.backward(batch(100 + step, case), False)
            training.step()
    found.close()


def batch(seed: int, case: Case) -> torch.Tensor:
    """Tokens of this rank, (8, 16); ranks of a tensor-parallel group share theirs."""
    rank = 0 if case.framework in ("tp", "autotp") else dist.get_rank()
    return torch.randint(0, VOCABULARY, (8, 16), generator=torch.Generator().manual_seed(1000 * seed + rank))


def _still(step: int, model: nn.Module) -> torch.Tensor | None:
    """The weight whose gradient is zero from step `ZERO_FROM` on."""
    return dict(model.named_parameters())[STILL] if step >= ZERO_FROM else None


def _loop(case: Case) -> Training:
    """Loops of torch: DDP, FSDP2, tensor parallelism of DTensors."""
    model: Any = make_model()
    if case.condition == "bf16":
        model = model.bfloat16()
    called = _sharded(case, model)
    assert case.peer.build is not None
    optimizers = case.peer.build(model)
    count = [0]

    def backward(tokens: torch.Tensor, more: bool) -> None:
        waiting = called.no_sync() if more and hasattr(called, "no_sync") else contextlib.nullcontext()
        with waiting:
            called(input_ids=tokens, labels=tokens).loss.div(2 if case.condition == "accumulation" else 1).backward()

    def step() -> None:
        if case.condition == "clip":
            _clip(list(model.parameters()))
        still = _still(count[0], model) if case.condition == "zero gradients" else None
        if still is not None and still.grad is not None:
            still.grad.zero_()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        count[0] += 1

    def save(folder: str) -> Any:
        return copy.deepcopy([model.state_dict(), [o.state_dict() for o in optimizers]])

    def load(folder: str, saved: Any) -> None:
        model.load_state_dict(saved[0])
        for optimizer, state in zip(optimizers, saved[1], strict=True):
            optimizer.load_state_dict(state)

    return Training(optimizers, model, backward, step, save, load)


def _clip(parameters: list[nn.Parameter]) -> None:
    """`clip_grad_norm_` over plain tensors and DTensors together; torch's own function refuses to stack them."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = [g.norm() for g in gradients]
    total = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
    for g in gradients:
        g.mul_(min(1.0, CLIP / (float(total) + 1e-6)))


def _sharded(case: Case, model: Any) -> Any:
    """The model in the wrapper of its framework."""
    if case.framework == "ddp":
        from muon_dist.bench.peers_ddp import wrap

        return wrap(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if case.framework == "fsdp2":
        from muon_dist.bench.peers_fsdp2 import shard

        return shard(model, mesh)
    columns, rows = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
    for layer in model.model.layers:
        plan: dict[str, Any] = {f"self_attn.{n}": ColwiseParallel() for n in columns[:3]}
        plan |= {f"mlp.{n}": ColwiseParallel() for n in columns[3:]}
        plan |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
        parallelize_module(layer, mesh, {n: plan[n] for n in plan if n.split(".")[1] in (*columns, *rows)})
    return model


def _engine(case: Case) -> Training:
    model: Any = make_model()
    engine = make_engine(case, model, lr=LR, momentum=MOMENTUM, decay=DECAY, clip=CLIP)
    parameters = dict(engine.module.named_parameters())
    count = [0]
    if case.condition == "zero gradients":
        parameters[STILL].register_hook(lambda g: torch.zeros_like(g) if count[0] >= ZERO_FROM else g)

    def backward(tokens: torch.Tensor, more: bool) -> None:
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        if more:
            engine.step()

    def step() -> None:
        engine.step()
        count[0] += 1

    def load(folder: str, saved: Any) -> None:
        engine.load_checkpoint(folder)

    return Training(engine, engine.module, backward, step, lambda folder: engine.save_checkpoint(folder), load)

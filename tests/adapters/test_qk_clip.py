"""QK-clip against plain fp64 loops: kinds of attention, layouts, 16-bit weights, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM, DistributedConfig, TrainingArguments

from muon_dist import Muon, MuonTrainer, param_groups
from muon_dist.adapters.hf_attention import attach, highest_logits
from muon_dist.errors import ConfigError, FrameworkError, NonFiniteError
from tests.adapters.plain_qk_clip import (
    ADAMW_LR,
    DECAY,
    EPS,
    KINDS,
    LR,
    SAMPLES,
    STEPS,
    THRESHOLDS,
    VOCABULARY,
    batch,
    labels_in,
    loss_of,
    make_model,
    plain_weights,
)
from tests.distributed import run_ranks

TOLERANCE = 2e-5
Tensors = dict[str, torch.Tensor]


def make_muon(model: Any, **options: Any) -> Muon:
    groups = param_groups(model, lr=LR, weight_decay=DECAY, adamw_lr=ADAMW_LR, adamw_weight_decay=0.0)
    return Muon(groups, eps=EPS, ns_dtype=torch.float32, **options)


def shared_of(rank: int, world: int, step: int) -> dict[str, torch.Tensor]:
    """This rank's samples of the batch."""
    return {name: value.chunk(world)[rank] for name, value in batch(step).items()}


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def far(model: Any, wanted: Tensors) -> float:
    """Largest difference of any weight from the plain ones; those must be of the same model."""
    found = {n.removeprefix("module."): full(p) for n, p in model.named_parameters()}
    assert found.keys() == wanted.keys()
    return max(float((found[n].double() - wanted[n]).abs().max()) for n in wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_as_in_plain_lines(kind: str) -> None:
    """Maxima of each head and step, and the weights at the end; recomputation and evaluation in between."""
    threshold = THRESHOLDS.get(kind, 2.0)
    wanted, history = plain_weights(kind, threshold)
    without, _ = plain_weights(kind, None)
    model = make_model(kind)
    if kind in ("llama", "gpt2"):
        model.gradient_checkpointing_enable({"use_reentrant": kind == "gpt2"})
    optimizer = make_muon(model)
    clip = attach(model, optimizer, threshold=threshold)
    clipped = 0
    for step in range(STEPS):
        inputs = batch(step)
        for part in (slice(0, 2), slice(2, SAMPLES)):  # micro-batches
            loss_of(model, {n: v[part] for n, v in inputs.items()}, labels_in(inputs)).backward()
        with torch.no_grad():
            model.eval()(input_ids=batch(step + 50)["input_ids"])
            model.train()
        seen = clip.maxima.taken(torch.device("cpu"))
        heads = [value for layer in clip.maxima.layers for value in history[step][layer.name]]
        assert seen.tolist() == pytest.approx(heads, abs=TOLERANCE)
        for number, layer in enumerate(clip.maxima.layers):  # put them back
            clip.maxima.record(number, seen[number * layer.heads : (number + 1) * layer.heads])
        optimizer.step()
        optimizer.zero_grad()
        clipped += clip.clipped
        assert clip.max_logit == pytest.approx(max(heads), abs=TOLERANCE)
    assert 0 < clipped < STEPS * 8
    assert far(model, wanted) < TOLERANCE < 0.01 < far(model, without)


def layouts(cases: list[tuple[str, str]], wanted: dict[str, Tensors]) -> dict[tuple[str, str], float]:
    """The distance from plain weights under copies (DDP) and FSDP2, the batch over all ranks."""
    world, rank, found = dist.get_world_size(), dist.get_rank(), {}
    for layout, kind in cases:
        model = make_model(kind)
        if layout == "copies":
            wrapped = DistributedDataParallel(model)
        else:
            mesh = init_device_mesh("cpu", (world,))
            place = None if layout == "fsdp2" else lambda p: torch.distributed.tensor.Shard(p.dim() - 1)
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh, shard_placement_fn=place)
            wrapped = fully_shard(model, mesh=mesh, shard_placement_fn=place)
        optimizer = make_muon(model)
        attach(model, optimizer, threshold=THRESHOLDS.get(kind, 2.0))
        for step in range(STEPS):
            # the mean over the ranks is the sum over the samples
            loss = loss_of(wrapped, shared_of(rank, world, step), labels_in(batch(step)))
            (loss * world).backward()
            optimizer.step()
            optimizer.zero_grad()
        found[layout, kind] = far(model, wanted[kind])
    return found


def test_copies_and_fsdp2() -> None:
    cases = [("copies", "qwen2"), ("fsdp2", "qwen2"), ("columns", "llama"), ("fsdp2", "olmo2"), ("fsdp2", "deepseek_v3")]
    wanted = {kind: plain_weights(kind, THRESHOLDS.get(kind, 2.0))[0] for _, kind in cases}
    for found in run_ranks(layouts, 3, cases, wanted):
        assert found.keys() == set(cases) and max(found.values()) < TOLERANCE, found


def tensor_parallel(folder: str, sizes: dict[str, int], wanted: Tensors) -> float:
    model = AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(**sizes), dtype=torch.float32
    ).train()
    optimizer, tp = make_muon(model), sizes["tp_size"]
    attach(model, optimizer, threshold=2.0, share=lambda: (dist.get_rank() % tp, tp))
    for step in range(STEPS):
        parts = dist.get_world_size() // tp
        inputs = shared_of(dist.get_rank() // tp, parts, step)
        (loss_of(model, inputs, labels_in(batch(step))) * parts).backward()
        optimizer.step()
        optimizer.zero_grad()
    return far(model, wanted)


def test_tensor_parallelism_sees_some_of_the_heads(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    wanted = plain_weights("llama", 2.0)[0]
    for sizes in ({"tp_size": 2}, {"tp_size": 2, "fsdp_size": 2}):
        ranks = sizes["tp_size"] * sizes.get("fsdp_size", 1)
        assert max(run_ranks(tensor_parallel, ranks, str(tmp_path), sizes, wanted)) < TOLERANCE

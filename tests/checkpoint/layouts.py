"""A tiny model under every layout, with one face: step, what it holds, and the truth by other means than pieces."""

from __future__ import annotations

import os
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from muon_dist.adapters import deepspeed_state, module_state
from muon_dist.checkpoint import Checkpoint, Holding, Ranks
from muon_dist.optim.muon import Muon
from tests.adapters import deepspeed_ranks

LAYOUTS = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
GLOBAL_BATCH = 12
SEQUENCE = 10
RATE = 0.01


def batch(step: int) -> torch.Tensor:
    """The samples of a step, whatever the number of ranks."""
    generator = torch.Generator().manual_seed(500 + step)
    return torch.randint(0, deepspeed_ranks.VOCABULARY, (GLOBAL_BATCH, SEQUENCE), generator=generator)


class Run:
    """A model, its optimizer and its framework on this rank.

    Attributes:
        seen: hashes of the samples that this rank used, a list for each step.
    """

    def __init__(
        self,
        layout: str,
        kind: str = "llama",
        dtype: str = "fp32",
        config: dict[str, Any] | None = None,
        muon: dict[str, Any] | None = None,
    ) -> None:
        self.layout = layout
        self.world, self.rank = dist.get_world_size(), dist.get_rank()
        self.ranks = Ranks(dist.group.WORLD if self.world > 1 else None)
        self.engine: Any = None
        self.seen: list[list[int]] = []
        case = deepspeed_ranks.Case(
            stage=int(layout[-1]) if layout.startswith("zero") else 0,
            model=kind,
            lr=RATE,
            dtype=dtype,
            config=config or {},
            muon=muon or {},
        )
        if layout.startswith("zero"):
            self.engine, self.optimizer = _engine(case)
            self.model: Any = self.engine.module
            return
        self.model = deepspeed_ranks.make_model(kind)
        if layout == "fsdp2":
            mesh = init_device_mesh("cpu", (self.world,))
            for module in list(self.model.modules()):
                if type(module).__name__.endswith(("DecoderLayer", "GPT2Block")):
                    fully_shard(module, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        elif self.world > 1:
            self.model = nn.parallel.DistributedDataParallel(self.model)
        self.optimizer = deepspeed_ranks.make_muon(self.model, case)

    def step(self, number: int, accumulation: int = 1) -> float:
        """One optimizer step on the global batch; the loss over all of it."""
        parts = batch(number).chunk(self.world * accumulation)
        total = 0.0
        self.seen.append([])
        for micro in range(accumulation):
            tokens = parts[micro * self.world + self.rank]
            self.seen[-1] += [hash(tuple(row.tolist())) for row in tokens]
            forward = self.engine if self.engine is not None else self.model
            loss = forward(input_ids=tokens, labels=tokens).loss
            total += loss.item() / accumulation
            if self.engine is not None:
                self.engine.backward(loss)
                self.engine.step()
            else:
                (loss / accumulation).backward()
        if self.engine is None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        mean = torch.tensor(total, dtype=torch.float64)
        dist.all_reduce(mean)
        return mean.item() / self.world

    def holding(self, source: Checkpoint | None = None) -> Holding:
        if self.engine is not None:
            return deepspeed_state.holding(self.engine, source=source)
        return module_state.holding(self.model, self.optimizer, self.world, source=source)

    # ---- the truth, by other means

    def whole(self, kind: str) -> dict[str, torch.Tensor]:
        """Name -> whole tensor: "weight" (masters), "momentum_buffer", "exp_avg" or "exp_avg_sq"."""
        if self.layout in ("zero1", "zero2"):
            return self._whole12(kind)
        if self.layout == "zero3":
            return self._whole3(kind)
        found = {}
        for name, p in self.model.named_parameters():
            value = p if kind == "weight" else self.optimizer.state.get(p, {}).get(kind)
            if kind == "momentum_buffer" and self.layout == "ddp":
                continue
            if value is not None:
                value = value.full_tensor() if hasattr(value, "full_tensor") else value
                found[name.removeprefix("module.")] = value.detach().clone()
        if kind == "momentum_buffer" and self.layout == "ddp":
            assert isinstance(self.optimizer, Muon)
            state = [self.optimizer.full_state_dict()]
            dist.broadcast_object_list(state)
            names = [spec.name for specs in self.optimizer.specs for spec in specs]
            entries = {names[i].removeprefix("module."): entry for i, entry in state[0]["state"].items()}
            found = {name: entry[kind].clone() for name, entry in entries.items() if kind in entry}
        return found

    def _names(self) -> dict[int, str]:
        return {id(p): name for name, p in self.model.named_parameters()}

    def _value(self, flat: torch.Tensor, kind: str) -> torch.Tensor | None:
        return flat if kind == "weight" else self.optimizer.state[flat].get(kind)

    def _whole12(self, kind: str) -> dict[str, torch.Tensor]:
        wrapper, found = self.engine.optimizer, {}
        if hasattr(wrapper, "single_partition_of_fp32_groups"):
            slices, groups = wrapper.single_partition_of_fp32_groups, wrapper.round_robin_bit16_groups
        else:
            slices, groups = wrapper.fp32_groups_flat_partition, wrapper.bf16_groups
        for flat, group in zip(slices, groups, strict=True):
            value = self._value(flat, kind)
            if value is None:
                continue
            parts = [torch.empty_like(value) for _ in range(self.world)]
            dist.all_gather(parts, value.detach().contiguous())
            whole, at = torch.cat(parts), 0
            for p in group:
                found[self._names()[id(p)]] = whole[at : at + p.numel()].view(p.shape).clone()
                at += p.numel()
        return found

    def _whole3(self, kind: str) -> dict[str, torch.Tensor]:
        wrapper, found = self.engine.optimizer, {}
        for flat, group in zip(wrapper.fp32_partitioned_groups_flat, wrapper.fp16_groups, strict=True):
            value = self._value(flat, kind)
            if value is None:
                continue
            at = 0
            for p in group:
                length = -(-p.ds_numel // self.world)
                parts = [torch.empty(length) for _ in range(self.world)]
                dist.all_gather(parts, value.detach()[at : at + length].contiguous())
                found[self._names()[id(p)]] = torch.cat(parts)[: p.ds_numel].view(p.ds_shape).clone()
                at += length
        return found

    def working_copies(self) -> dict[str, torch.Tensor]:
        """The weights that the forward pass uses, whole."""
        if self.engine is not None:
            return deepspeed_ranks.whole_model(self.engine)
        return self.whole("weight")


def _engine(case: deepspeed_ranks.Case) -> tuple[Any, Muon]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29566")
    deepspeed.init_distributed("gloo", verbose=False)
    model = deepspeed_ranks.make_model(case.model)
    config = deepspeed_ranks.ds_config(case, dist.get_world_size())
    optimizer = deepspeed_ranks.make_muon(model, case)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, optimizer

"""A small state on forked ranks, without a model: what the commit tests save and load."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from muon_dist.checkpoint import Contents, Holding, Piece, Ranks, Saver
from muon_dist.checkpoint.piece import run, whole
from muon_dist.layout import Block

DOCUMENTS = {"notes.json": b"{}", "hf/config.json": b"{}"}
SHAPES = {"a": (7, 5), "b": (3,), "c": (4, 4, 2)}


def ranks() -> Ranks:
    return Ranks(dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None)


def values(name: str, shift: float) -> torch.Tensor:
    """Whole numbers, different in every element, tensor and shift."""
    number = sum(SHAPES[name])
    return torch.arange(float(torch.Size(SHAPES[name]).numel())).view(SHAPES[name]) + 1000 * number + 100_000 * shift


def holding(shift: float, sharded: bool = True) -> tuple[Holding, dict[str, torch.Tensor]]:
    """Every tensor twice: its weight whole on each rank, its momentum cut into uneven runs; and a block of columns."""
    here = ranks()
    tensors: dict[str, torch.Tensor] = {}
    pieces: list[Piece] = []
    everyone = tuple(range(here.size))
    for name, shape in SHAPES.items():
        tensors[name] = values(name, shift)
        pieces += whole(name, "weight", shape, tensors[name], everyone)
        full = (values(name, shift) + 0.5).view(-1)
        if not sharded:
            tensors[f"{name}/momentum"] = full
            pieces += whole(name, "momentum", shape, full, everyone)
            continue
        first, last = here.rank * full.numel() // here.size, (here.rank + 1) * full.numel() // here.size
        tensors[f"{name}/momentum"] = full[first:last].clone()
        pieces += run(name, "momentum", shape, first, tensors[f"{name}/momentum"])
    columns = values("a", shift)[:, here.rank :: here.size] + 0.25  # each rank some columns, one by one
    for i in range(columns.shape[1]):
        column = columns[:, i : i + 1].contiguous()
        tensors[f"column{i}"] = column
        pieces.append(Piece("a", "columns", (7, 5), Block.of(here.rank + i * here.size, 7, 1, 5), column))
    return Holding("test", pieces), tensors


def save(folder: str | Path, step: int, shift: float | None = None, **options: object) -> Saver:
    saver = Saver(folder, ranks(), **options)  # type: ignore[arg-type]
    held, _ = holding(step if shift is None else shift)
    here = ranks()
    saver.save(
        held.pieces,
        Contents(
            step, held.layout, {"position": {"step": step}}, documents={"notes.json": b"{}", "hf/config.json": b"{}"}
        ),
        state={"scheduler": {"last": step}},
        rank_state={"number": 10 * step + here.rank, "random": torch.arange(3) + here.rank},
    )
    return saver

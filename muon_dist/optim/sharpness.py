"""The learning rate compared with the curvature's limit, for a model that this process holds completely."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from muon_dist.errors import FrameworkError
from muon_dist.layout import Matrix, view
from muon_dist.numerics import newton_schulz
from muon_dist.numerics.sharpness import Curvature, StableStep, stable_step
from muon_dist.optim.binding import update_scale
from muon_dist.optim.muon import Muon


@dataclass(frozen=True)
class _Block:
    """A matrix inside a parameter, and Muon's update for its gradient."""

    matrix: Matrix
    parameter: int
    gradient: Tensor  # (rows, cols)
    update: Tensor  # (rows, cols), times scale: a step is lr times this


def probe_sharpness(optimizer: Muon, loss: Callable[[], Tensor], *, lanczos: int = 12) -> dict[str, Any]:
    """The largest stable step of every Muon matrix, and of all together, compared with the learning rate.

    The direction is Muon's update for the gradient G of `loss`, without momentum, as in the theory: O = scale x
    newton_schulz(G). In a row for one matrix only this matrix moves, so its curvature is the diagonal block of the
    Hessian. In the row "whole" all Muon matrices move together, and no AdamW parameter. Each row costs (2 + `lanczos`)
    backward passes through the gradient. Local: with DDP, call this on one rank, and let `loss` call the inner module.

    Returns:
        `whole` and `matrices`, each with name, lr, bound, of_bound (lr / bound), threshold, of_threshold, nds_update,
        nds_gradient, largest, slope; None in place of infinity.

    Raises:
        FrameworkError: a framework has partitioned the parameters (ZeRO-3, ZeRO-1/2 with flat groups, FSDP2).
    """
    parameters, groups = _whole_parameters(optimizer)
    # Fused attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        curvature = Curvature(loss(), parameters)
        blocks = _blocks(optimizer, curvature, groups)
        rows = []
        for block in blocks:
            lr = float(groups[block.parameter]["lr"])
            step = stable_step(
                block.gradient.reshape(-1), block.update.reshape(-1), _block_product(curvature, block), lanczos=lanczos
            )
            rows.append(_row(block.matrix.name, lr, step))
        # lr may differ between groups: "whole" is in units of the first group's lr
        base = float(groups[blocks[0].parameter]["lr"])
        ratios = [float(groups[b.parameter]["lr"]) / base if base else 1.0 for b in blocks]
        gradient = torch.cat([b.gradient.reshape(-1) for b in blocks])
        update = torch.cat([b.update.reshape(-1) * r for b, r in zip(blocks, ratios, strict=True)])
        whole = stable_step(gradient, update, _whole_product(curvature, blocks), lanczos=lanczos)
    return {"whole": _row("all Muon matrices together", base, whole), "matrices": rows}


def _whole_parameters(optimizer: Muon) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """The Muon parameters, and the group of each. Raises FrameworkError if a framework has partitioned them."""
    parameters: list[Tensor] = []
    groups: list[dict[str, Any]] = []
    for group, specs, algorithm in zip(optimizer.param_groups, optimizer.specs, optimizer.algorithms, strict=True):
        if algorithm != "muon":
            continue
        for p in group["params"]:
            if hasattr(p, "ds_id"):
                raise FrameworkError(
                    "sharpness: DeepSpeed ZeRO-3 has partitioned the parameters, so no rank can differentiate twice "
                    "through them; probe a saved checkpoint in one process: muon-dist spectra probe RUN"
                )
        if [tuple(p.shape) for p in group["params"]] != [s.shape for s in specs] or any(
            hasattr(p, "device_mesh") for p in group["params"]
        ):
            raise FrameworkError(
                f"sharpness: the parameters of group '{group.get('name', algorithm)}' are pieces that a framework "
                "(DeepSpeed ZeRO, FSDP2) has made; probe a checkpoint in one process: muon-dist spectra probe RUN"
            )
        parameters += group["params"]
        groups += [group] * len(group["params"])
    return parameters, groups


def _at(flat: Tensor, matrix: Matrix) -> Tensor:
    """The (rows, cols) view of a matrix inside a flattened parameter."""
    return view(flat, matrix.block)


def _blocks(optimizer: Muon, curvature: Curvature, groups: list[dict[str, Any]]) -> list[_Block]:
    specs = [
        s for of_group, a in zip(optimizer.specs, optimizer.algorithms, strict=True) if a == "muon" for s in of_group
    ]
    blocks = []
    for index, (spec, group) in enumerate(zip(specs, groups, strict=True)):
        flat = curvature.gradients[index].contiguous().view(-1)
        for matrix in spec.matrices:
            gradient = _at(flat, matrix)
            update = newton_schulz(gradient.contiguous(), group["ns_steps"], group["ns_schedule"], group["ns_dtype"])
            scale = update_scale(group["scale"], matrix)
            blocks.append(_Block(matrix, index, gradient, update.to(gradient.dtype) * scale))
    return blocks


def _block_product(curvature: Curvature, block: _Block) -> Callable[[Tensor], Tensor]:
    parameter = curvature.parameters[block.parameter]

    def product(vector: Tensor) -> Tensor:
        full = torch.zeros_like(parameter)
        _at(full.view(-1), block.matrix).copy_(vector.view(block.matrix.rows, block.matrix.cols))
        vectors: list[Tensor | None] = [None] * len(curvature.parameters)
        vectors[block.parameter] = full
        found = curvature.product(vectors)[block.parameter]
        assert found is not None
        return _at(found.contiguous().view(-1), block.matrix).reshape(-1)

    return product


def _whole_product(curvature: Curvature, blocks: list[_Block]) -> Callable[[Tensor], Tensor]:
    sizes = [b.matrix.numel for b in blocks]

    def product(vector: Tensor) -> Tensor:
        full = [torch.zeros_like(p) for p in curvature.parameters]
        for block, part in zip(blocks, vector.split(sizes), strict=True):
            _at(full[block.parameter].view(-1), block.matrix).copy_(part.view(block.matrix.rows, block.matrix.cols))
        found = [f.contiguous().view(-1) for f in curvature.product(full) if f is not None]
        return torch.cat([_at(found[b.parameter], b.matrix).reshape(-1) for b in blocks])

    return product


def _row(name: str, lr: float, step: StableStep) -> dict[str, Any]:
    def finite(value: float) -> float | None:
        return value if abs(value) < float("inf") else None

    def share(limit: float) -> float | None:
        return lr / limit if limit > 0 else None

    return {
        "name": name,
        "lr": lr,
        "bound": finite(step.bound),
        "of_bound": share(step.bound),
        "threshold": finite(step.threshold),
        "of_threshold": share(step.threshold),
        "nds_update": step.nds_update,
        "nds_gradient": step.nds_gradient,
        "largest": step.largest,
        "slope": step.slope,
    }

"""How far NorMuon by shards is from NorMuon: what two others make of it, next to their own result on whole matrices.

    python -m tests.optim.shard_errors                 # formulas written here
    python -m tests.optim.shard_errors --dion FOLDER   # microsoft/dion's own function, of a checkout

Both orthogonalize the whole matrix; what differs is what they do to this rank's shard of it.

dion (`normuon_update_megabatch_async`): a second moment of each row of the shard, then the shard is scaled back to
its own norm. Megatron-LM (`TensorParallelAdaptiveMuon`, through Emerging-Optimizers` `AdaptiveMuon`): a second moment
the longer axis of the shard, and no scaling back.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from muon_dist.optim.reference import plain_newton_schulz

BETA2, EPS, STEPS = 0.95, 1e-8, 20
SHAPES = ((256, 256), (1024, 256), (256, 1024))
SHARDS = (2, 4, 8)
Normalize = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(orthogonalized shard, its second moment) -> (update, second moment)."""


def dion(shard: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    moment = moment.lerp(shard.square().mean(dim=1, keepdim=True), 1 - BETA2)
    update = shard / (moment.sqrt() + EPS)
    return update * (shard.norm() / update.norm()), moment


def megatron(shard: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    along = 1 if shard.shape[0] >= shard.shape[1] else 0
    moment = moment.lerp(shard.square().mean(dim=along, keepdim=True), 1 - BETA2)
    return shard * moment.clamp_min(EPS).rsqrt(), moment


def dions_own(folder: str) -> Normalize:
    """The function of a checkout, which does not need the GPU that the rest of the package wants."""
    sys.path.insert(0, folder)
    from dion.normuon import _normuon_normalization_core as core

    return lambda shard, moment: core(shard, moment, torch.tensor(BETA2))


@functools.cache
def orthogonalized(shape: tuple[int, int]) -> list[Tensor]:
    """Updates of some steps: a matrix whose rows have unequal sizes, with noise in every step."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randn(shape[0], 1, generator=generator, dtype=torch.float64).exp()
    signal = sizes * torch.randn(shape, generator=generator, dtype=torch.float64)
    momentum, found = torch.zeros_like(signal), []
    for _ in range(STEPS):
        momentum.lerp_(signal + sizes * torch.randn(shape, generator=generator, dtype=torch.float64), 0.05)
        found.append(plain_newton_schulz(momentum))
    return found


def last_update(normalize: Normalize, shape: tuple[int, int], count: int, axis: int) -> Tensor:
    """The update of the last step, made by `count` shards along `axis`."""
    moments: list[Tensor] = [torch.zeros((), dtype=torch.float64)] * count
    whole = torch.empty(0)
    for update in orthogonalized(shape):
        made = [normalize(s, m.expand(_moment_shape(s, m, normalize))) for s, m in
                zip(update.chunk(count, axis), moments, strict=True)]  # fmt: skip
        moments = [moment for _, moment in made]
        whole = torch.cat([part for part, _ in made], dim=axis)
    return whole


def _moment_shape(shard: Tensor, moment: Tensor, normalize: Normalize) -> tuple[int, ...]:
    """Of a second moment before the first step; its own afterwards."""
    if moment.dim():
        return tuple(moment.shape)
    rows, cols = shard.shape
    return (rows, 1) if normalize is not megatron or rows >= cols else (1, cols)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dion", metavar="FOLDER")
    folder = parser.parse_args().dion
    rules = {"dion": dions_own(folder) if folder else dion, "Megatron-LM": megatron}
    print("| matrix | shards of | " + " | ".join(f"{name}, {n}" for name in rules for n in SHARDS) + " |")
    print("|---|---|" + "---|" * len(rules) * len(SHARDS))
    for shape in SHAPES:
        for axis, of in ((0, "rows"), (1, "columns")):
            cells = []
            for normalize in rules.values():
                exact = last_update(normalize, shape, 1, 0)
                found = (last_update(normalize, shape, n, axis) for n in SHARDS)
                cells += [f"{100 * float((f - exact).norm() / exact.norm()):.1f}%" for f in found]
            print(f"| {shape[0]} x {shape[1]} | {of} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

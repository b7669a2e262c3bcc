"""Integer-valued weights cut up by a layout and moved by the real exchange, for the tests of `flat` and
`per_parameter`."""

from __future__ import annotations

import torch
import torch.distributed as dist

from muon_dist.exchange.transport import Transport
from muon_dist.layout import Layout, Matrix, view
from muon_dist.optim.binding import Binding
from muon_dist.optim.options import Options
from muon_dist.optim.runtime import Runtime, Work
from muon_dist.ownership import assign_owners


def round_trip(layout: Layout, shards: list[list[torch.Tensor]], wholes: dict[str, torch.Tensor], policy: str) -> int:
    """Gather every matrix to its owner and scatter it back, on each rank; returns the matrices this rank owned.

    `shards[buffer][rank]` are the buffers, `wholes` the flattened parameters by name, both integer-valued. Momentum is
    set to the shards, so what is gathered must be `wholes`, bit for bit; the update scattered back is 2 x the matrix,
    so each buffer must end as shard - 2 x shard wherever a matrix lies and untouched elsewhere (padding).
    """
    rank = dist.get_rank()
    # momentum 1: the buffer stays what it is, whatever the gradient
    group = {"lr": 1.0, "scale": "none", "nesterov": False, "momentum": 1.0, "ns_dtype": torch.float32,
             "ns_schedule": "keller", "ns_steps": 5, "weight_decay": 0.0}  # fmt: skip
    buffers = tuple(s[rank].clone() for s in shards)
    binding = Binding(layout, buffers, dist.group.WORLD, torch.device("cpu"))
    plan = assign_owners(layout, policy=policy)
    transport = Transport(dist.group.WORLD, torch.device("cpu"))
    runtime = Runtime(
        binding, plan, transport, dict.fromkeys(range(len(buffers)), 0), Options(bucket_mb=1800 / 2**20),
        orthogonalize=lambda stack, group: stack.mul_(2),
    )  # fmt: skip
    seen = []

    def observe(m: Matrix, momentum: torch.Tensor, update: torch.Tensor) -> None:
        wanted = wholes[m.parameter].as_strided((m.rows, m.cols), (m.block.stride, 1), m.block.start)
        assert torch.equal(momentum, wanted), m.name
        assert torch.equal(update, 2 * wanted), m.name
        seen.append(m.name)

    runtime.observer = observe
    for phase in layout.phases or (tuple(range(len(buffers))),):
        for i in phase:
            if i in runtime.momentum:
                assert runtime.momentum[i].shape == buffers[i].shape
                runtime.momentum[i].copy_(shards[i][rank])
        runtime.step({i: Work(buffers[i], torch.zeros_like(buffers[i]), group) for i in phase})
    for i, buffer in enumerate(buffers):
        expected = shards[i][rank].clone()
        for m in layout.matrices:
            for f in m.on(rank):
                if f.buffer == i:
                    view(expected, f.local).neg_()
        assert torch.equal(buffer, expected)
    return len(seen)

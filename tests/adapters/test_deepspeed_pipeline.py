"""DeepSpeed's PipelineModule: two stages, two copies of each, ZeRO 0 and 1."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from muon_dist import Muon
from tests.distributed import run_ranks

pytest.importorskip("deepspeed")

pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(600)]
WIDTH, LAYERS, MICRO, LR = 12, 4, 2, 0.02
Weights = dict[str, torch.Tensor]


class Layer(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(super().forward(x))


def batches(copy: int, first: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Micro-batches of one copy, from step `first` on."""
    number = first * MICRO
    while True:
        x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1000 * copy + number))
        yield x, x.roll(1, -1)
        number += 1


def optimizer(module: torch.nn.Module, **options: Any) -> Muon:
    named = dict(module.named_parameters())
    group = {"params": list(named.values()), "param_names": list(named)}
    return Muon([group], lr=LR, ns_dtype=torch.float32, **options)


def engine(stage: int) -> Any:
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule

    from muon_dist.adapters.deepspeed import prepare_process

    prepare_process(gpu=False)
    deepspeed.init_distributed("gloo", verbose=False)
    specs = [LayerSpec(Layer, WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
    net = PipelineModule(
        specs, num_stages=2, loss_fn=torch.nn.functional.mse_loss, seed_layers=True, base_seed=0,
        partition_method="uniform",
    )  # fmt: skip
    config = {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": MICRO, "train_batch_size": 4 * MICRO,
        "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
    }  # fmt: skip
    made, *_ = deepspeed.initialize(model=net, optimizer=optimizer(net), config=config)
    return made


def weights(of: Any) -> Weights:
    return {n: p.detach().clone() for n, p in of.module.named_parameters()}


def staged(stage: int, folder: str) -> tuple[Weights, Weights, Weights, tuple[int, int]]:
    """This stage's weights at the start, after four steps, and after a load at step two and two more; (matrices,
    matrices orthogonalized in four steps on this rank)."""
    first = engine(stage)
    start, copy = weights(first), first.mpu.get_data_parallel_rank()
    data = batches(copy, 0)
    for step in range(4):
        first.train_batch(data_iter=data)
        if step == 1:
            first.save_checkpoint(folder, tag="two")
    muon = first.basic_optimizer
    assert muon.plan.layout.world_size == 2 and dist.get_world_size() == 4
    again = engine(stage)
    again.load_checkpoint(folder, tag="two")
    data = batches(copy, 2)
    for _ in range(2):
        again.train_batch(data_iter=data)
    return start, weights(first), weights(again), (len(muon.plan.layout.matrices), muon.orthogonalized)


def alone(start: Weights) -> Weights:
    net = torch.nn.Sequential(*(Layer(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    net.load_state_dict(start)
    steps = optimizer(net, process_group=None)
    copies = [batches(copy, 0) for copy in range(2)]
    for _ in range(4):
        for data in copies:
            for _ in range(MICRO):
                x, y = next(data)
                (torch.nn.functional.mse_loss(net(x), y) / (2 * MICRO)).backward()
        steps.step()
        steps.zero_grad()
    return {n: p.detach().clone() for n, p in net.named_parameters()}


@pytest.mark.parametrize("stage", [0, 1])
def test_the_stages_of_a_pipeline_are_one_model(stage: int, tmp_path: Path) -> None:
    results = run_ranks(staged, 4, stage, str(tmp_path), timeout=120)
    wanted = alone({n: w for start, *_ in results for n, w in start.items()})
    assert len(wanted) == LAYERS
    for _, found, resumed, _ in results:
        for n, w in found.items():
            assert torch.allclose(w, wanted[n], rtol=0, atol=2e-6)
            assert torch.equal(resumed[n], w), n
    assert sum(calls for *_, (_, calls) in results) == 4 * LAYERS

"""Layers that freeze and thaw in mid-run, and what a checkpoint brings back of them; and other memory formats."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from muon_dist import Muon
from muon_dist.adapters.module_state import holding
from muon_dist.checkpoint import Contents, Ranks, Saver, load, open_checkpoint
from tests.distributed import run_ranks
from tests.optim.test_muon import gradients
from tests.optim.test_rules import WITH_MEMORY, Run, Tensors, assert_close, options_of, plain

FROZEN = ("wide", "experts", "heads")


def advance(run: Run, first: int, last: int) -> None:
    """FROZEN has no gradients in steps 2 to 4."""
    for step in range(first, last):
        frozen = FROZEN if 2 <= step < 5 else ()
        for name, p in run.parameters.items():
            p.requires_grad_(name not in frozen)
        given = gradients(step)
        if run.layout == "flat":
            for name in frozen:
                given[name].zero_()  # as ZeRO has it
            run.step(given)
            continue
        real = dict(run.parameters)
        run.parameters = {n: p for n, p in real.items() if n not in frozen}
        for name in frozen:
            real[name].grad = None
        run.step(given)
        run.parameters = real


def made(layout: str, name: str) -> Run:
    """A run of a rule, or of a case of `WITH_MEMORY`."""
    rule, options = WITH_MEMORY.get(name, (name, {}))
    return Run(layout, rule, **options)


def thawed(layout: str, rule: str) -> Tensors:
    run = made(layout, rule)
    advance(run, 0, 7)
    return run.weights()


@pytest.mark.each_choice
@pytest.mark.parametrize(("layout", "world"), [("copies", 1), ("copies", 3), ("fsdp2", 3)])
@pytest.mark.parametrize("rule", ["muon", "normuon", "namo", "momentum_at_owner"])
def test_frozen_matrices_stay_and_go_on_with_their_momentum(layout: str, world: int, rule: str) -> None:
    reference = plain(WITH_MEMORY.get(rule, (rule, {}))[0], 2)
    for step in range(2, 7):
        reference.step({n: g for n, g in gradients(step).items() if n not in FROZEN or step >= 5})
    for found in run_ranks(thawed, world, layout, rule):
        assert_close(found, reference.weights, 2e-5)


def written(folder: str, rule: str) -> Tensors:
    run = made("fsdp2", rule)
    advance(run, 0, 4)
    state = {"weights": run.model.state_dict(), "optimizer": get_optimizer_state_dict(run.model, run.optimizer)}
    dcp.save(state, checkpoint_id=folder)
    advance(run, 4, 7)
    return run.weights()


def resumed(folder: str, rule: str, frozen_first: bool) -> Tensors:
    run = made("fsdp2", rule)
    if frozen_first:
        for name in FROZEN:
            run.parameters[name].requires_grad_(False)
    state = {"weights": run.model.state_dict(), "optimizer": get_optimizer_state_dict(run.model, run.optimizer)}
    dcp.load(state, checkpoint_id=folder)
    with pytest.warns(RuntimeWarning, match="3 frozen parameters") if frozen_first else nullcontext():
        set_optimizer_state_dict(run.model, run.optimizer, state["optimizer"])
    advance(run, 4, 7)
    return run.weights()


@pytest.mark.parametrize("rule", ["muon", "namo", "momentum_at_owner"])
def test_dcp_resumes_while_layers_are_frozen(tmp_path: Path, rule: str) -> None:
    expected = run_ranks(written, 2, str(tmp_path), rule)[0]
    for found in run_ranks(resumed, 2, str(tmp_path), rule, False):
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    # torch leaves out the state of what is frozen when it loads: as with AdamW, it begins at zero when it thaws.
    reference = plain(WITH_MEMORY.get(rule, (rule, {}))[0], 2)
    for step in range(2, 7):
        if step == 5:
            cut = [m.name for name in FROZEN for m in reference.matrices[name]]
            reference.memory = {name: kept for name, kept in reference.memory.items() if name not in cut}
        reference.step({n: g for n, g in gradients(step).items() if n not in FROZEN or step >= 5})
    for found in run_ranks(resumed, 2, str(tmp_path), rule, True):
        assert_close(found, reference.weights, 2e-5)


class Network(torch.nn.Module):
    """A matrix, and a convolution for each algorithm; `images` puts the convolutions into channels_last."""

    def __init__(self, images: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(6, 5, bias=False)
        self.first, self.second = (torch.nn.Conv2d(3, 4, 3, bias=False) for _ in range(2))
        if images:
            self.to(memory_format=torch.channels_last)
            assert not self.first.weight.is_contiguous()


def optimizer_of(network: Network) -> Muon:
    muon: dict[str, Any] = {
        "params": [network.linear.weight, network.first.weight],
        "param_names": ["linear.weight", "first.weight"],
    }
    adamw = {"params": [network.second.weight], "param_names": ["second.weight"], "algorithm": "adamw"}
    return Muon([muon, adamw], **options_of("muon"))


def images(folder: str, formats: tuple[bool, bool]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """4 steps in the first format, and the last 2 of them again, from a checkpoint, in the second."""
    ranks = Ranks(dist.group.WORLD if dist.get_world_size() > 1 else None)
    found = []
    for again, of_images in enumerate(formats):
        network = Network(of_images)
        optimizer = optimizer_of(network)
        for step in range(4):
            if step == 2 and again:
                checkpoint = open_checkpoint(Path(folder) / "checkpoint-2", ranks)
                load(checkpoint, holding(network, optimizer, ranks.size, source=checkpoint), ranks)
            if step == 2 and not again:
                held = holding(network, optimizer, ranks.size)
                Saver(folder, ranks).save(held.pieces, Contents(2, held.layout))
            generator = torch.Generator().manual_seed(step if step >= 2 or not again else 100)
            for p in network.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
                if of_images and p.ndim == 4:
                    p.grad = p.grad.to(memory_format=torch.channels_last)
            optimizer.step()
        assert network.first.weight.is_contiguous(memory_format=torch.channels_last) == of_images
        found.append([p.detach().contiguous() for p in network.parameters()])
    return found[0], found[1]


@pytest.mark.each_choice
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("formats", [(True, True), (True, False), (False, True)])
def test_memory_formats_step_and_save_alike(tmp_path: Path, world: int, formats: tuple[bool, bool]) -> None:
    plain_first, _ = run_ranks(images, 1, str(tmp_path / "plain"), (False, False))[0]
    for first, again in run_ranks(images, world, str(tmp_path / "saved"), formats):
        assert all(torch.equal(a, b) for a, b in zip(first, plain_first, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(again, plain_first, strict=True))

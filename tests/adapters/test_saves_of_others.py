"""What other libraries save of a Muon under DDP: whole with `momentum_everywhere`, said at the save without it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.fsdp  # 2 s that every forked rank would pay again
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from muon_dist import Muon
from muon_dist.adapters import module_state
from muon_dist.checkpoint import Contents, Ranks, Saver, load, open_checkpoint
from muon_dist.errors import FrameworkError
from muon_dist.optim.rules import RULES
from muon_dist.optim.state import MOMENTUM
from tests.distributed import run_ranks

EVERYWHERE: dict[str, Any] = {"momentum_everywhere": True}
Weights = dict[str, torch.Tensor]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(11, 8), nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12, bias=False), nn.Linear(12, 11)
    )


def optimizer(net: nn.Module, **options: Any) -> Muon:
    """Two matrices and one that is cut into heads, which have several owners."""
    named = {name.removeprefix("module."): p for name, p in net.named_parameters()}
    matrices = ["1.weight", "3.weight", "4.weight"]
    rest = [name for name in named if name not in matrices]
    groups: list[dict[str, Any]] = [
        {"params": [named[n] for n in matrices], "param_names": matrices, "cuts": [None, {"heads": 4}, None]},
        {"params": [named[n] for n in rest], "param_names": rest, "algorithm": "adamw"},
    ]
    return Muon(groups, lr=0.01, **options)


def train(net: nn.Module, steps: Any, first: int, last: int) -> Weights:
    """Real backward passes through DDP, on another batch for each rank."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
        tokens = torch.randint(0, 11, (6,), generator=generator)
        steps.zero_grad()
        nn.functional.cross_entropy(net(tokens), tokens.roll(1)).backward()
        steps.step()
    return {name.removeprefix("module."): p.detach().clone() for name, p in net.named_parameters()}


def prepared(options: dict[str, Any]) -> tuple[Any, Any, Accelerator | None]:
    net = DistributedDataParallel(model())
    return net, optimizer(net, **options), None


def through_accelerate(options: dict[str, Any]) -> tuple[Any, Any, Accelerator | None]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # asked for, not used: the group exists
    accelerator = Accelerator(cpu=True)
    net = model()
    net, wrapped = accelerator.prepare(net, optimizer(net, **options))
    assert isinstance(net, DistributedDataParallel)
    return net, wrapped, accelerator


# Each saver as its users call it: (make, save, load) ----------------------------------------------------------------


def torch_save(net: Any, steps: Any, folder: str, accelerator: Any) -> None:
    if dist.get_rank() == 0:
        torch.save({"model": net.module.state_dict(), "optimizer": steps.state_dict()}, f"{folder}/state.pt")
    dist.barrier()


def torch_load(net: Any, steps: Any, folder: str, accelerator: Any) -> None:
    saved = torch.load(f"{folder}/state.pt")
    net.module.load_state_dict(saved["model"])
    steps.load_state_dict(saved["optimizer"])


def dcp_save(net: Any, steps: Any, folder: str, accelerator: Any) -> None:
    of_model, of_optimizer = get_state_dict(net, steps)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=f"{folder}/dcp")


def dcp_load(net: Any, steps: Any, folder: str, accelerator: Any) -> None:
    of_model, of_optimizer = get_state_dict(net, steps)
    state = {"model": of_model, "optimizer": of_optimizer}
    dcp.load(state, checkpoint_id=f"{folder}/dcp")
    set_state_dict(net, steps, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def accelerate_save(net: Any, steps: Any, folder: str, accelerator: Any) -> None:
    accelerator.save_state(f"{folder}/accelerate")
    dist.barrier()


def accelerate_load(net: Any, steps: Any, folder: str, accelerator: Any) -> None:
    accelerator.load_state(f"{folder}/accelerate")


SAVERS: dict[str, tuple[Callable[..., Any], Callable[..., None], Callable[..., None]]] = {
    "torch.save": (prepared, torch_save, torch_load),
    "DCP": (prepared, dcp_save, dcp_load),
    "accelerate": (through_accelerate, accelerate_save, accelerate_load),
}


def goes_on(saver: str, folder: str, options: dict[str, Any], first: int) -> tuple[list[str], bool, list[str]]:
    """(parameters that differ after a resume, momentum is whole, what was said at the save)."""
    make, save, restore = SAVERS[saver]
    net, steps, accelerator = make(options)
    train(net, steps, 0, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save(net, steps, folder, accelerator)
    said = [str(w.message) for w in caught if "momentum" in str(w.message)]
    expected = train(net, steps, 3, 6)
    again, others, accelerator = make(options)
    train(again, others, 7, 7 + first)
    restore(again, others, folder, accelerator)
    found = train(again, others, 3, 6)
    whole = all(others.state[p][MOMENTUM].shape == p.shape for p in others.param_groups[0]["params"])
    return [name for name in found if not torch.equal(found[name], expected[name])], whole, said


@pytest.mark.each_choice
@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize("rule", RULES)
def test_with_the_option_every_saver_goes_on_exactly(tmp_path: Path, saver: str, rule: str) -> None:
    options = {**EVERYWHERE, "rule": rule}
    for first in (0, 2) if rule in ("muon", "normuon") else (0,):
        assert run_ranks(goes_on, 2, saver, str(tmp_path), options, first) == [([], True, [])] * 2


def said_at_the_save(saver: str, folder: str) -> list[str]:
    make, save, _ = SAVERS[saver]
    net, steps, accelerator = make({})
    train(net, steps, 0, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save(net, steps, folder, accelerator)
    return [str(w.message) for w in caught if "momentum" in str(w.message)]


@pytest.mark.parametrize("saver", SAVERS)
def test_without_it_the_save_says_so(tmp_path: Path, saver: str) -> None:
    first = run_ranks(said_at_the_save, 2, saver, str(tmp_path))[0]
    assert len(first) == 1
    assert "momentum_everywhere=True" in first[0] and "muon_dist.checkpoint" in first[0]


# What one rank refuses ----------------------------------------------------------------------------------------------


def refused(first: int, only: int | None) -> tuple[str, str, bool]:
    """Type and text of the error when a rank loads what it cannot take; and whether the weights stay as they were.

    first: steps before the load. only: the rank that loads something else than its own state; None: all load rank 0's.
    """
    net, steps, _ = prepared({})
    train(net, steps, 0, 2)
    own = steps.state_dict()
    given: list[Any] = [own]
    dist.broadcast_object_list(given)
    again, others, _ = prepared({})
    train(again, others, 0, first)
    before = {name: p.detach().clone() for name, p in again.named_parameters()}
    if only is None:
        given = given if dist.get_rank() else [own]
    else:
        given = [torch.optim.AdamW(net.parameters()).state_dict() if dist.get_rank() == only else own]
    try:
        others.load_state_dict(given[0])
        train(again, others, 3, 4)
    except Exception as error:
        untouched = all(torch.equal(p, before[name]) for name, p in again.named_parameters())
        return type(error).__name__, str(error), untouched
    return "", "", False


@pytest.mark.parametrize("first", [0, 2])
def test_what_one_rank_refuses_every_rank_refuses_with_its_message(first: int) -> None:
    """Rank 1 does not find its momentum in the file of rank 0; rank 0, which does, would go on into a gloo error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        of_ranks = run_ranks(refused, 2, first, None)
    for kind, text, untouched in of_ranks:
        assert kind == "CheckpointError" and "which rank 1 owns" in text and "full_state_dict()" in text and untouched
    assert of_ranks[0][1].startswith("rank 1: ")


def test_a_file_of_another_optimizer_on_one_rank_is_refused_on_all() -> None:
    for kind, text, untouched in run_ranks(refused, 2, 2, 1):
        assert kind == "ConfigError" and "the state of another optimizer" in text and untouched


# What the option costs, and where else it holds ---------------------------------------------------------------------


def traffic(rule: str, options: dict[str, Any]) -> tuple[int, int, int, list[str]]:
    """(collectives and bytes of the third step, elements of momentum, what was logged)."""
    net, steps, _ = prepared({**options, "rule": rule})
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("muon_dist")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    train(net, steps, 0, 2)
    before = steps.runtime.transport.collectives, steps.runtime.transport.bytes_sent
    train(net, steps, 2, 3)
    transport = steps.runtime.transport
    held = sum(t.numel() for t in steps.runtime.momentum.values())
    said = [line for line in lines if "momentum_everywhere" in line]
    return transport.collectives - before[0], transport.bytes_sent - before[1], held, said


def test_the_option_costs_memory_and_nothing_that_travels() -> None:
    elements = 12 * 8 + 12 * 12 + 11 * 12
    for rule, more in (("muon", 0), ("normuon", 1)):  # normuon's memory on owners: one small all-reduce
        plain, kept = run_ranks(traffic, 2, rule, {}), run_ranks(traffic, 2, rule, EVERYWHERE)
        assert [k[:2] for k in kept] == [(p[0] + more, p[1]) for p in plain]
        assert sum(p[2] for p in plain) == elements and [k[2] for k in kept] == [elements] * 2
        (text,), of_others = kept[0][3], kept[1][3]
        assert f"{4 * elements / 1e6:.1f} MB" in text and of_others == [] and plain[0][3] == []


def ours(folder: str, options: tuple[dict[str, Any], dict[str, Any]]) -> tuple[Weights, Weights]:
    ranks = Ranks.of_the_run()
    net, steps, _ = prepared(options[0])
    train(net, steps, 0, 3)
    held = module_state.holding(net, steps, ranks.size)
    path = Saver(folder, ranks).save(held.pieces, Contents(3, held.layout))
    expected = train(net, steps, 3, 6)
    again, others, _ = prepared(options[1])
    checkpoint = open_checkpoint(f"{folder}/checkpoint-3", ranks)
    load(checkpoint, module_state.holding(again, others, ranks.size, source=checkpoint), ranks)
    assert path is None or path.name == "checkpoint-3"
    return train(again, others, 3, 6), expected


@pytest.mark.parametrize("rule", ["muon", "normuon"])
def test_our_checkpoints_go_from_one_to_the_other(tmp_path: Path, rule: str) -> None:
    both = ({"rule": rule}, {"rule": rule, **EVERYWHERE})
    for n, options in enumerate((both, both[::-1], (both[1], both[1]))):
        for found, expected in run_ranks(ours, 2, str(tmp_path / str(n)), options):
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def gathered_under_hsdp(options: dict[str, Any]) -> str:
    """DCP's full_state_dict under HSDP, whose momentum otherwise lies on some ranks of the mesh only."""
    net = model()
    fully_shard(net, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    steps = optimizer(net, **options)
    train(net, steps, 0, 2)
    try:
        state = get_optimizer_state_dict(net, steps, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    except FrameworkError as error:
        return str(error)
    if dist.get_rank():
        return ""
    found = [state["state"][name][MOMENTUM] for name in ("1.weight", "3.weight", "4.weight")]
    expected = [(12, 8), (12, 12), (11, 12)]
    assert [tuple(t.shape) for t in found] == expected and all(bool(t.ne(0).all()) for t in found)
    return ""


def test_hsdp_can_be_gathered_with_the_option() -> None:
    assert run_ranks(gathered_under_hsdp, 4, EVERYWHERE) == [""] * 4
    assert "save sharded" in run_ranks(gathered_under_hsdp, 4, {})[0]

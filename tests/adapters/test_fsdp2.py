"""FSDP2 over forked gloo ranks: `fully_shard` on a tiny Llama, with real gradients, against one process."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.fsdp  # 2 s that every forked rank would pay again
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import LlamaConfig, LlamaForCausalLM

from muon_dist import Muon, MuonFactory, param_groups
from muon_dist.adapters import module_state
from muon_dist.checkpoint import Contents, Ranks, Saver, open_checkpoint
from muon_dist.checkpoint import load as load_checkpoint
from muon_dist.errors import FrameworkError, MuonDistError
from muon_dist.exchange import bytes_sent, make_buckets
from muon_dist.layout import cut_parameter
from muon_dist.numerics import newton_schulz
from muon_dist.optim.reference import reference_step
from muon_dist.routing import SplitRule, route
from tests.distributed import run_ranks

LR, DECAY = 0.02, 0.1
SPLITS = (SplitRule(r".*q_proj\.weight", heads=4),)
MATRICES = 2 * (4 + 6)  # two layers: q_proj cut into four, and k, v, o, gate, up, down
Result = dict[str, torch.Tensor]


def llama() -> LlamaForCausalLM:
    """Sizes that 3 and 4 do not divide; k_proj and v_proj have 6 rows, so 4 ranks hold 2, 2, 2 and none."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=37, hidden_size=20, intermediate_size=26, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=6, max_position_embeddings=16,
                         tie_word_embeddings=True, attn_implementation="eager")  # fmt: skip
    return LlamaForCausalLM(config)


def shard(model: Any, mesh: DeviceMesh | None = None, **options: Any) -> Any:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def make_mesh(shape: tuple[int, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def make_optimizer(model: nn.Module, heads: int = 4, **options: Any) -> Muon:
    splits = [SplitRule(r".*q_proj\.weight", heads=heads)]
    return Muon(param_groups(model, lr=LR, weight_decay=DECAY, splits=splits), **options)


def heads_under(policy: str) -> int:
    """Under round_robin 12 of one row: six in a shard, with owners, and so sources, in both copies of HSDP."""
    return 12 if policy == "round_robin" else 4


def batch(step: int, rank: int) -> torch.Tensor:
    return torch.randint(0, 37, (2, 8), generator=torch.Generator().manual_seed(100 * step + rank))


def backward(model: Any, step: int, rank: int) -> float:
    tokens = batch(step, rank)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return float(loss.detach())


def whole(tensors: dict[str, Any]) -> Result:
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in tensors.items()}


def difference(found: Result, expected: Result) -> float:
    """The largest relative Frobenius error over the parameters."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).norm() / expected[n].norm()) for n in expected)


# The reference: one process, whole tensors, the plain lines of optim/reference.py and torch's own AdamW ------------


def reference(world: int, steps: int, given: list[Result] | None = None) -> Result:
    """After `steps` on the averaged gradients of `world` batches, or on `given` gradients."""
    model = llama()
    table = route(model, splits=SPLITS)
    named = dict(model.named_parameters())
    momentum = {r.fqn: torch.zeros_like(named[r.fqn]) for r in table.select("muon")}
    cuts = {r.fqn: {"heads": r.split.heads if r.split else None} for r in table.select("muon")}
    adamw = torch.optim.AdamW(
        [{"params": [named[r.fqn]], "weight_decay": DECAY if r.decay else 0.0} for r in table.select("adamw")],
        lr=LR, betas=(0.9, 0.95), eps=1e-8,
    )  # fmt: skip
    for step in range(steps):
        model.zero_grad()
        for rank in range(world if given is None else 0):
            backward(model, step, rank)
        with torch.no_grad():
            for name, p in named.items():
                p.grad = p.grad / world if given is None else given[step][name].clone()
            for name, buffer in momentum.items():
                p = named[name]
                matrices = cut_parameter(name, p.shape, **cuts[name])
                reference_step(p, p.grad, buffer, matrices, lr=LR, weight_decay=DECAY, iteration=newton_schulz)
        adamw.step()
    return whole(dict(named))


def train(shape: tuple[int, ...], steps: int, policy: str = "balanced") -> dict[str, Any]:
    model = shard(llama(), make_mesh(shape))
    optimizer = make_optimizer(model, owner_policy=policy)
    gradients = []
    for step in range(steps):
        backward(model, step, dist.get_rank())
        gradients.append(whole({n: p.grad for n, p in model.named_parameters()}))
        optimizer.step()
        optimizer.zero_grad()
    runtime, plan = optimizer.runtime, optimizer.plan
    buckets = make_buckets(plan, range(len(plan.layout.matrices)), 2**40)
    held = {n: p for n, p in model.named_parameters() if "momentum_buffer" in optimizer.state[p]}
    return {
        "parameters": whole(dict(model.named_parameters())),
        "gradients": gradients,
        "calls": optimizer.orthogonalized,
        "sent": runtime.transport.bytes_sent,
        "predicted": steps
        * bytes_sent(plan, buckets, dist.get_rank(), 4, 4, copies=shape[0] if len(shape) > 1 else 1),
        "momentum": sum(m.numel() for m in runtime.momentum.values()),
        "aliased": all(
            optimizer.state[p]["momentum_buffer"].to_local().data_ptr() == runtime.momentum[i].data_ptr()
            for i, p in enumerate(runtime.binding.buffers)
            if i in runtime.momentum
        ),
        "muon": sum(p.numel() for p in held.values()),
        "kind": plan.layout.kind,
    }


@pytest.mark.parametrize(
    "shape", [(3,), (2, 2), *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ((1,), (2,), (4,)))], ids=str
)
def test_equals_one_process_with_exact_calls_and_bytes(shape):
    world = math.prod(shape)
    steps = 20 if shape == (2,) else 5
    results = run_ranks(train, world, shape, steps)
    expected, trained = reference(world, steps, results[0]["gradients"]), reference(world, steps)
    print(shape, steps, *(difference(results[0]["parameters"], other) for other in (expected, trained)))
    for r in results:
        assert r["kind"] == "dtensor" and r["aliased"]
        assert difference(r["parameters"], expected) < 1e-6
        # Its own gradients are summed in another order, which Newton-Schulz enlarges where they have small directions
        assert difference(r["parameters"], trained) < 1e-4
        assert all(torch.equal(r["parameters"][n], results[0]["parameters"][n]) for n in expected)
        assert r["sent"] == r["predicted"] and (r["sent"] > 0 or world == 1)
    assert sum(r["calls"] for r in results) == steps * MATRICES
    # Once over all ranks, also under HSDP, but for the two q_proj if their heads have their sources in several copies
    total, more_copies = sum(r["momentum"] for r in results), shape[0] - 1 if len(shape) == 2 else 0
    allowed = more_copies * 2 * 12 * 20
    assert results[0]["muon"] <= total <= results[0]["muon"] + allowed


def over_two_axes(gradients: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[int]]:
    """Weights after two steps on a 2 x 2 x 2 mesh whose first two axes hold copies, and the column of this rank."""
    mesh = init_device_mesh("cpu", (2, 2, 2))
    placements = [Replicate(), Replicate(), Shard(0)]
    weights = [nn.Parameter(distribute_tensor(torch.zeros_like(g), mesh, placements)) for g in gradients]
    optimizer = Muon(weights, lr=LR, bucket_mb=0.01)
    for p, g in zip(weights, gradients, strict=True):
        p.grad = distribute_tensor(g.clone(), mesh, placements)
    optimizer.step()
    optimizer.step()
    return [p.detach().full_tensor() for p in weights], optimizer.runtime.transport.column_ranks


def test_copies_over_two_mesh_axes_get_the_update_from_one_another():
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(12, 8, generator=generator) for _ in range(9)]
    alone = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    optimizer = Muon(alone, lr=LR)
    for p, g in zip(alone, gradients, strict=True):
        p.grad = g.clone()
    optimizer.step()
    optimizer.step()
    for rank, (weights, column) in enumerate(run_ranks(over_two_axes, 8, gradients)):
        assert column == [r for r in range(8) if r % 2 == rank % 2]
        assert all(torch.equal(w, p) for w, p in zip(weights, alone, strict=True))


# torch's own Muon on the same DTensors ----------------------------------------------------------------------------


def updates_of_both() -> dict[str, tuple[float, float]]:
    """Relative difference and cosine of one step's update, ours against `torch.optim.Muon`, both in bf16 and by the
    same coefficients."""
    torch.manual_seed(1)
    mesh = make_mesh((2,))
    shapes = {"square": (24, 24), "wide": (15, 40), "tall": (31, 12)}
    start = {n: torch.randn(s) for n, s in shapes.items()}
    gradient = {n: torch.randn(s) for n, s in shapes.items()}
    found = []
    for make in (
        lambda ps: Muon([{"params": ps}], lr=LR, weight_decay=DECAY, ns_dtype=torch.bfloat16),
        lambda ps: torch.optim.Muon(ps, lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"),
    ):
        parameters = {n: nn.Parameter(distribute_tensor(w, mesh, [Shard(0)])) for n, w in start.items()}
        for n, p in parameters.items():
            p.grad = distribute_tensor(gradient[n], mesh, [Shard(0)])
        make(list(parameters.values())).step()
        found.append(whole(parameters))
    result = {}
    for n in shapes:
        ours, torchs = (f[n] - start[n] * (1 - LR * DECAY) for f in found)
        cosine = nn.functional.cosine_similarity(ours.flatten(), torchs.flatten(), dim=0)
        result[n] = float((ours - torchs).norm() / torchs.norm()), float(cosine)
    return result


def test_torch_muon_on_dtensors_agrees_within_its_bf16():
    for result in run_ranks(updates_of_both, 2):
        print(result)
        for relative, cosine in result.values():
            assert relative < 0.05 and cosine > 0.999


# Policies of fully_shard, and ways to get there -------------------------------------------------------------------


def check_steps(model: Any, optimizer: Muon, parameters: dict[str, Any], steps: int = 2) -> None:
    """Real gradients as FSDP2 left them on the parameters; the step must be the reference's on exactly those."""
    specs = {s.name: s.matrices for group in optimizer.specs for s in group if s.matrices}
    momentum = {n: torch.zeros(parameters[n].shape) for n in specs}
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, step, dist.get_rank())
        expected = whole({n: parameters[n] for n in specs})
        gradients = whole({n: parameters[n].grad for n in specs if parameters[n].grad is not None})
        optimizer.step()
        for n, gradient in gradients.items():
            reference_step(
                expected[n], gradient, momentum[n], specs[n], lr=LR, weight_decay=DECAY, iteration=newton_schulz
            )
        # Shards end at other places than whole tensors, where the last bits of a lerp may differ; of o_proj's gradient
        # Newton-Schulz makes 1e-6 of that.
        assert gradients and difference(whole({n: parameters[n] for n in specs}), expected) < 3e-6


def policies() -> None:
    mesh = make_mesh((2,))
    for options in (
        {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
        {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16), "reshard_after_forward": False},
        {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    ):
        model = shard(llama(), mesh, **options)
        optimizer = make_optimizer(model)
        check_steps(model, optimizer, dict(model.named_parameters()))
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert all(m.dtype == torch.float32 for m in optimizer.runtime.momentum.values())


def test_mixed_precision_reshard_and_offload_step_the_fp32_shards():
    run_ranks(policies, 2)


def frozen_and_unused() -> None:
    model = llama()
    model.model.layers[0].self_attn.o_proj.weight.requires_grad_(False)
    frozen = model.model.layers[0].self_attn.o_proj.weight.detach().clone()
    model = shard(model, make_mesh((2,)))
    optimizer = make_optimizer(model)
    assert "model.layers.0.self_attn.o_proj.weight" not in [s.name for g in optimizer.specs for s in g]
    # A gradient that is missing on all ranks: this layer's MLP is left out of the forward
    layer = model.model.layers[1]
    layer.mlp.forward = lambda x: torch.zeros_like(x)
    before = whole({n: p for n, p in model.named_parameters() if "layers.1.mlp" in n})
    named = dict(model.named_parameters())
    backward(model, 0, dist.get_rank())
    assert all(named[n].grad is None for n in before)
    optimizer.zero_grad()
    check_steps(model, optimizer, named)
    assert all(torch.equal(w, before[n]) for n, w in whole({n: named[n] for n in before}).items())
    assert torch.equal(whole(named)["model.layers.0.self_attn.o_proj.weight"], frozen)
    # ... and on one rank alone: zero there, no hang
    for p in model.parameters():
        if p.requires_grad:
            p.grad = None if dist.get_rank() == 0 else torch.ones_like(p)
    optimizer.step()


def test_frozen_parameters_and_missing_gradients():
    run_ranks(frozen_and_unused, 2)


def from_meta() -> None:
    mesh = make_mesh((2,))
    weights = llama().state_dict()
    for early in (False, True):
        with torch.device("meta"):
            model = llama()
        model = shard(model, mesh)
        optimizer = make_optimizer(model) if early else None
        if optimizer is not None:
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            with pytest.raises(FrameworkError, match=r"still on the meta device: call model.to_empty"):
                optimizer.step()
            optimizer.zero_grad()
        model.to_empty(device="cpu")
        model.tie_weights()
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(distribute_tensor(weights[n], mesh, [Shard(0)]))
            for n, b in llama().named_buffers():
                model.get_buffer(n).copy_(b)
        check_steps(model, optimizer or make_optimizer(model), dict(model.named_parameters()))


def test_meta_device_then_to_empty():
    run_ranks(from_meta, 2)


def subgroups() -> list[str]:
    done = []
    for ranks in ([2, 1], [[1], [2]]):  # backwards, and HSDP over a part of the world
        mesh = DeviceMesh("cpu", ranks, mesh_dim_names=("replicate", "shard")[-torch.tensor(ranks).ndim :])
        if dist.get_rank() == 0:
            continue  # never steps: a collective over the world would hang
        model = shard(llama(), mesh)
        optimizer = make_optimizer(model)
        check_steps(model, optimizer, dict(model.named_parameters()))
        done.append(optimizer.plan.layout.world_size)
    return done


def test_a_mesh_over_a_part_of_the_ranks():
    assert run_ranks(subgroups, 3, timeout=40) == [[], [2, 2], [2, 2]]


def replicated_dtensors() -> tuple[int, float]:
    mesh = make_mesh((2,))
    torch.manual_seed(0)
    start = {n: torch.randn(8, 6) for n in "abc"}
    ps = {n: nn.Parameter(distribute_tensor(w, mesh, [Replicate()])) for n, w in start.items()}
    optimizer = Muon([{"params": list(ps.values())}], lr=LR, weight_decay=DECAY)
    momentum = {n: torch.zeros(8, 6) for n in ps}
    for _ in range(2):
        for n, p in ps.items():
            g = torch.randn(8, 6)
            p.grad = distribute_tensor(g, mesh, [Replicate()])
            cut = cut_parameter(n, (8, 6))
            reference_step(start[n], g, momentum[n], cut, lr=LR, weight_decay=DECAY, iteration=newton_schulz)
        optimizer.step()
    return sum(m.numel() for m in optimizer.runtime.momentum.values()), difference(whole(ps), start)


def test_replicate_keeps_momentum_on_the_owner():
    results = run_ranks(replicated_dtensors, 2)
    assert sum(held for held, _ in results) == 3 * 8 * 6
    assert all(error < 1e-6 for _, error in results)


# The optimizer made before fully_shard ----------------------------------------------------------------------------


def swapped() -> None:
    """Placeholders while the model is sharded, then the DTensors: what accelerate does."""
    model = llama()
    optimizer = make_optimizer(model)
    names = {id(p): n for n, p in model.named_parameters()}
    wanted = [[names[id(p)] for p in g["params"]] for g in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"] = [torch.empty(1) for _ in group["params"]]
    model = shard(model, make_mesh((2,)))
    sharded = dict(model.named_parameters())
    for group, of_group in zip(optimizer.param_groups, wanted, strict=True):
        group["params"] = [sharded[n] for n in of_group]
    check_steps(model, optimizer, sharded)


def test_parameters_replaced_after_the_optimizer_is_made():
    run_ranks(swapped, 2)


def left_behind() -> str:
    model = llama()
    optimizer = make_optimizer(model)
    model = shard(model, make_mesh((2,)))
    backward(model, 0, dist.get_rank())
    with pytest.raises(FrameworkError) as caught:
        optimizer.step()
    return str(caught.value)


def test_an_optimizer_left_behind_by_fully_shard_is_named():
    for message in run_ranks(left_behind, 2):
        assert "make Muon after fully_shard, or pass both to accelerator.prepare" in message


def critic_beside_an_actor() -> bool:
    """A plain model of its own, beside one under fully_shard, whose first gradients are still to come."""
    actor = shard(llama(), make_mesh((2,)))
    critic = nn.Linear(20, 26, bias=False)  # a shape of the actor's
    bare = nn.Parameter(torch.eye(5))
    for weight in (critic.weight, bare):
        optimizer = Muon([weight], lr=LR)
        optimizer.full_state_dict()
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return actor is not None and bool((bare != torch.eye(5)).any())


def test_a_plain_model_beside_one_under_fully_shard_is_stepped():
    assert run_ranks(critic_beside_an_actor, 2) == [True, True]


# Refusals ----------------------------------------------------------------------------------------------------------


def refusal(parameters: list[torch.Tensor], **options: Any) -> str:
    for p in parameters:
        p.grad = torch.zeros_like(p)
    names = [f"w{i}" for i in range(len(parameters))]
    optimizer = Muon([{"params": parameters, "param_names": names}], lr=LR, **options)
    with pytest.raises(MuonDistError) as caught:
        optimizer.step()
    return f"{type(caught.value).__name__}: {caught.value}"


def refusals() -> dict[str, str]:
    rank = dist.get_rank()
    line, square = make_mesh((4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    halves = [DeviceMesh("cpu", ranks) for ranks in ([0, 1], [2, 3])]

    def on(mesh: DeviceMesh, *placements: Any) -> nn.Parameter:
        return nn.Parameter(distribute_tensor(torch.ones(8, 4), mesh, placements))

    strided = [_StridedShard(0, split_factor=2), _StridedShard(0, split_factor=2)]
    pair = dist.new_group([0, 1])
    torch.manual_seed(rank)
    own = nn.Parameter(torch.randn(8, 4))
    part: Any = halves[0] if rank < 2 else line
    here = nn.Parameter(DTensor.from_local(torch.ones(8 // part.size(), 4), part, [Shard(0)], run_check=False))
    return {
        "partial": refusal([nn.Parameter(DTensor.from_local(torch.ones(8, 4), line, [Partial()]))]),
        "twice strided": refusal([nn.Parameter(DTensor.from_local(torch.ones(2, 4), square, strided))]),
        "plain": refusal([on(line, Shard(0)), own]),
        "ranks": refusal([on(line, Shard(0)), here]),
        "group": refusal([on(line, Shard(0))], process_group=pair if rank < 2 else None),
        "none": refusal([on(line, Shard(0))], process_group=None),
    }


def test_what_cannot_be_exact_is_refused_by_name():
    first, *_, last = run_ranks(refusals, 4)
    expected = {
        "partial": r"FrameworkError: w0 is placed P.* over mesh axis 'shard'.*redistribute",
        "twice strided": r"FrameworkError: w0 is placed .*torch does not say which elements a rank holds",
        "plain": r"ReplicaError: .*these weights are not the same: w1: ranks 0, 1, 2, 3 do not agree",
        "ranks": r"FrameworkError: w1 is on meshes of ranks \[\[0, 1\], \[0, 1, 2, 3\]\].*process_group=",
        "group": r"FrameworkError: process_group has ranks \[0, 1\], but the mesh of w0 has \[0, 1, 2, 3\]",
        "none": r"FrameworkError: process_group has ranks \[0\], but the mesh of w0 has",
    }
    assert first.keys() == last.keys() == expected.keys()
    for case, pattern in expected.items():
        assert re.match(pattern, first[case]), first[case]


def fsdp1() -> list[str]:
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1

    messages = []
    for original in (True, False):
        wrapped = FSDP1(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)), use_orig_params=original, device_id="cpu")
        with pytest.raises(FrameworkError) as caught:
            param_groups(wrapped, lr=LR)
        messages.append(str(caught.value))
        with pytest.raises(FrameworkError):
            MuonFactory()(wrapped, lr=LR, print_routing=False)
        with pytest.raises(FrameworkError):
            Muon(list(wrapped.parameters()), lr=LR)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    optimizer = Muon(param_groups(model, lr=LR))
    FSDP1(model, use_orig_params=True, device_id="cpu")(torch.ones(2, 4)).sum().backward()
    with pytest.raises(FrameworkError) as caught:
        optimizer.step()
    return [*messages, str(caught.value)]


def test_fsdp1_is_refused_before_and_after_the_optimizer():
    for messages in run_ranks(fsdp1, 2):
        assert len(messages) == 3
        assert all("belongs to FSDP1" in m and "fully_shard" in m for m in messages)


# Checkpoints through torch.distributed.checkpoint -----------------------------------------------------------------


def logical_momentum(optimizer: Muon) -> Result:
    """Every matrix's momentum put together from all ranks' own pieces; no DTensor involved."""
    runtime = optimizer.runtime
    own = [
        (matrix.name, matrix.numel, f.block.start, piece.reshape(-1).clone())
        for buffer in runtime.momentum
        for matrix, f, piece in runtime.momentum_pieces(buffer)
    ]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    found: Result = {}
    for name, numel, offset, piece in (item for pieces in every for item in pieces):
        found.setdefault(name, torch.full((numel,), torch.nan))[offset : offset + piece.numel()] = piece
    return found


def continued(model: Any, optimizer: Muon, steps: range) -> Result:
    for step in steps:
        backward(model, step, dist.get_rank())
        optimizer.step()
        optimizer.zero_grad()
    return whole(dict(model.named_parameters()))


def save(shape: tuple[int, ...], folder: str, policy: str) -> tuple[Result, Result, Result, int]:
    model = shard(llama(), make_mesh(shape))
    optimizer = make_optimizer(model, heads_under(policy), owner_policy=policy)
    at_save = continued(model, optimizer, range(3))
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=folder)
    momentum = logical_momentum(optimizer)
    copied = optimizer.runtime.binding.everywhere(optimizer.plan)
    for buffer, p in enumerate(optimizer.runtime.binding.buffers):
        stored = optimizer.state[p]["momentum_buffer"]
        if len(shape) == 2 and buffer not in copied and stored.device_mesh.get_coordinate() is not None:
            with pytest.raises(FrameworkError, match=r"momentum under HSDP.*save sharded"):
                stored.full_tensor()
    return momentum, at_save, continued(model, optimizer, range(3, 5)), len(copied)


def load(shape: tuple[int, ...], folder: str, policy: str) -> tuple[Result, Result, Result]:
    model = shard(llama(), make_mesh(shape))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    optimizer = make_optimizer(model, heads_under(policy), owner_policy=policy)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    assert [g["name"] for g in optimizer.param_groups] == ["muon", "adamw", "adamw_no_decay"]
    assert optimizer.param_groups[0]["lr"] == LR
    at_load = whole(dict(model.named_parameters()))
    momentum = logical_momentum(optimizer)
    return momentum, at_load, continued(model, optimizer, range(3, 5))


@pytest.mark.parametrize(
    ("saved", "policy", "copied", "loaded"),
    [
        pytest.param((2,), "balanced", 0, [(2,), (3,)], marks=pytest.mark.slow),
        pytest.param((2,), "balanced", 0, [(4,), (2, 2)], marks=pytest.mark.slow),
        pytest.param((2, 2), "local", 0, [(3,), (2, 2)], marks=pytest.mark.slow),
        # Heads of a shard of q_proj have their sources in both copies, so both keep its momentum
        ((2, 2), "round_robin", 2, [(2,), (2, 2)]),
    ],
    ids=str,
)
def test_checkpoint_moves_to_other_meshes_bit_for_bit(saved, policy, copied, loaded, tmp_path: Path):
    folder = str(tmp_path / "checkpoint")
    momentum, at_save, after, found_copied = run_ranks(save, math.prod(saved), saved, folder, policy)[0]
    assert found_copied == copied
    assert len(momentum) == 2 * (heads_under(policy) + 6)
    assert all(m.isfinite().all() and m.any() for m in momentum.values())
    for shape in loaded:
        for found, at_load, later in run_ranks(load, math.prod(shape), shape, folder, policy):
            assert all(torch.equal(found[n], m) for n, m in momentum.items()) and found.keys() == momentum.keys()
            assert all(torch.equal(at_load[n], w) for n, w in at_save.items())
            if shape == saved:
                assert all(torch.equal(later[n], w) for n, w in after.items())


def own_format(folder: str) -> tuple[Result, list[bool]]:
    """Save and load through muon_dist.checkpoint under HSDP with momentum that both copies keep."""
    kept: list[Result] = []
    for round_ in range(2):
        model = shard(llama(), make_mesh((2, 2)))
        optimizer = make_optimizer(model, heads_under("round_robin"), owner_policy="round_robin")
        if round_ == 0:
            continued(model, optimizer, range(2))
        held = module_state.holding(model, optimizer, dist.get_world_size())
        ranks = Ranks(dist.group.WORLD)
        if round_ == 0:
            Saver(Path(folder), ranks).save(held.pieces, Contents(2, held.layout))
        else:
            load_checkpoint(open_checkpoint(Path(folder) / "checkpoint-2", ranks), held, ranks)
        runtime = optimizer.runtime
        copied = runtime.binding.everywhere(runtime.plan)
        kept.append({str(buffer): m.clone() for buffer, m in runtime.momentum.items() if buffer in copied})
    return kept[0], [torch.equal(kept[0][buffer], m) and bool(m.any()) for buffer, m in kept[1].items()]


def test_a_load_fills_every_copy_of_momentum(tmp_path: Path):
    results = run_ranks(own_format, 4, str(tmp_path))
    assert all(len(equal) == 2 and all(equal) for _, equal in results)
    for rank in (0, 1):  # ranks 0, 2 and 1, 3 hold copies
        assert all(torch.equal(m, results[rank + 2][0][buffer]) for buffer, m in results[rank][0].items())


def full_state() -> tuple[bool, int]:
    """The options with which accelerate's FULL_STATE_DICT works: whole tensors on rank 0, sent out on loading."""
    optimizers = []
    saved: dict[str, Any] = {}
    for round_ in range(2):
        model = shard(llama(), make_mesh((2,)))
        optimizers.append(make_optimizer(model))
        if round_ == 0:
            continued(model, optimizers[0], range(2))
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            saved = get_optimizer_state_dict(model, optimizers[0], options=options)
        else:
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_optimizer_state_dict(model, optimizers[1], saved, options=options)
    first, second = (logical_momentum(o) for o in optimizers)
    return all(torch.equal(second[n], m) for n, m in first.items()), len(saved)


def test_full_state_dict_from_rank_zero():
    assert run_ranks(full_state, 2) == [(True, 2), (True, 0)]


# accelerate --------------------------------------------------------------------------------------------------------


def through_accelerate(folder: str) -> tuple[bool, bool]:
    """accelerate's own preparation, saving and loading for fsdp_version=2.

    On CPU it would take plain DDP whatever the plugin says; the type of the run is therefore set by hand, and nothing
    else.
    """
    from accelerate import Accelerator
    from accelerate.utils import (
        DistributedType,
        FullyShardedDataParallelPlugin,
        load_fsdp_optimizer,
        save_fsdp_optimizer,
    )

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # asked for, not used: the group exists
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"], cpu_ram_efficient_loading=False,
        state_dict_type="SHARDED_STATE_DICT",
    )  # fmt: skip
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    model = llama()
    model, wrapped = accelerator.prepare(model, make_optimizer(model))
    named = dict(model.named_parameters())
    assert all(isinstance(p, DTensor) for p in named.values())
    check_steps(model, wrapped.optimizer, named)
    saved = logical_momentum(wrapped.optimizer)
    save_fsdp_optimizer(plugin, accelerator, wrapped, model, folder)
    continued(model, wrapped, range(3, 4))
    moved = logical_momentum(wrapped.optimizer)
    load_fsdp_optimizer(plugin, accelerator, wrapped, model, folder)
    loaded = logical_momentum(wrapped.optimizer)
    return all(torch.equal(loaded[n], saved[n]) for n in saved), any(torch.equal(moved[n], saved[n]) for n in saved)


def test_accelerate_prepares_steps_saves_and_loads(tmp_path: Path):
    assert run_ranks(through_accelerate, 2, str(tmp_path)) == [(True, False)] * 2


# Copies that are not copies ---------------------------------------------------------------------------------------


def unequal_copies() -> str:
    """HSDP whose second copy has other weights: the broadcast of a start was forgotten."""
    model = shard(llama(), make_mesh((2, 2)))
    optimizer = make_optimizer(model)
    if dist.get_rank() == 3:
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "up_proj" in n).to_local()[0, 0] += 1
    backward(model, 0, dist.get_rank())
    try:
        optimizer.step()
    except MuonDistError as error:
        return f"{type(error).__name__}: {error}"
    return "taken"


def test_copies_under_hsdp_that_differ_are_refused() -> None:
    """The ranks that hold the same shard compare it: the other shards are equal."""
    found = run_ranks(unequal_copies, 4)
    for rank in (1, 3):
        assert "ReplicaError: Muon shares" in found[rank] and "up_proj.weight: ranks 1, 3 do not agree" in found[rank]

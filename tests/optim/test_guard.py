"""A step with a gradient that is not finite changes nothing on any rank; the run ends after too many in a row."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed as dist

from muon_dist.errors import ConfigError, NonFiniteError
from muon_dist.exchange.readers import Reader
from muon_dist.layout import Block
from muon_dist.optim import Muon
from muon_dist.optim.guard import ABSENT, FINITE, NOT_FINITE, ZERO, Split, StepGuard, states
from tests.distributed import run_ranks
from tests.optim.test_distributed import make_flat
from tests.optim.test_muon import SHAPES, gradients, make_groups, make_parameters

WORLD = 4
CPU = torch.device("cpu")


def with_vector(**options) -> tuple[dict[str, torch.nn.Parameter], Muon]:
    parameters = make_parameters()
    vector = torch.nn.Parameter(torch.ones(16))
    groups = [*make_groups(parameters), {"params": [vector], "param_names": ["norm"], "algorithm": "adamw"}]
    return {**parameters, "norm": vector}, Muon(groups, lr=0.02, **options)


def fill(parameters: dict[str, torch.nn.Parameter], step: int) -> None:
    for name, g in gradients(step).items():
        parameters[name].grad = g
    if "norm" in parameters:
        parameters["norm"].grad = torch.full((16,), 0.1 * step + 0.1)


def snapshot(parameters: dict[str, torch.Tensor], optimizer: Muon) -> list[torch.Tensor]:
    kept = [p.detach().clone() for p in parameters.values()]
    for _, state in sorted(((str(k), v) for k, v in optimizer.state_dict()["state"].items()), key=lambda kv: kv[0]):
        kept += [torch.as_tensor(v).clone() for _, v in sorted(state.items()) if torch.is_tensor(v)]
    return kept


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def poison_places(places: list[tuple[int, str, float]]) -> list[tuple[bool, bool, bool]]:
    """For each (rank, parameter, value): unchanged here, applied afterwards, and equal to a run without the step."""
    warnings.simplefilter("ignore", RuntimeWarning)
    parameters, optimizer = with_vector()
    for step in range(2):
        fill(parameters, step)
        optimizer.step()
    out = []
    for rank, name, value in places:
        twin_parameters, twin = with_vector()
        for mine, other in zip(parameters.values(), twin_parameters.values(), strict=True):
            other.data.copy_(mine)
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        before = snapshot(parameters, optimizer)
        fill(parameters, 5)
        if dist.get_rank() == rank:
            parameters[name].grad.view(-1)[-1] = value
        optimizer.step()
        unchanged = same(before, snapshot(parameters, optimizer)) and not optimizer.guard.applied
        fill(parameters, 6)
        fill(twin_parameters, 6)
        optimizer.step()
        twin.step()
        equal = same(snapshot(parameters, optimizer), snapshot(twin_parameters, twin))
        out.append((unchanged, optimizer.guard.applied, equal))
    return out


def places(count: int) -> list[tuple[int, str, float]]:
    names = [*SHAPES, "norm"]
    values = [torch.nan, torch.inf, -torch.inf]
    return [(i % WORLD, names[i % len(names)], values[i % 3]) for i in range(count)]


def test_a_bad_gradient_on_one_rank_changes_nothing_anywhere() -> None:
    for rank in run_ranks(poison_places, WORLD, places(10)):
        assert rank == [(True, True, True)] * 10


def end_of_run(sharded: bool) -> str:
    warnings.simplefilter("ignore", RuntimeWarning)
    if sharded:
        optimizer, shard, cuts = make_flat(256.0)
        rank = dist.get_rank()
    else:
        parameters, optimizer = with_vector(max_nonfinite=3)
    optimizer.guard.max_nonfinite = 3
    for step in range(10):
        if sharded:
            whole = torch.cat([g.reshape(-1) for g in gradients(step).values()])
            shard.grad = whole[cuts[rank] : cuts[rank + 1]].clone()
            bad = shard.grad
        else:
            fill(parameters, step)
            bad = parameters["tall"].grad
        if step >= 2 and dist.get_rank() == 2:
            bad.view(-1)[0] = torch.nan
        if step == 4:
            with pytest.raises(NonFiniteError) as caught:
                optimizer.step()
            assert caught.value.exit_code == 8
            return str(caught.value)
        optimizer.step()
        assert optimizer.guard.applied == (step < 2)
    raise AssertionError("the run did not end")


@pytest.mark.parametrize("sharded", [False, True])
def test_three_in_a_row_end_the_run_and_name_rank_and_parameter(sharded: bool) -> None:
    messages = run_ranks(end_of_run, WORLD, sharded)
    assert len(set(messages)) == 1
    assert "3 optimizer steps in a row" in messages[0]
    assert ("group '0' on rank 2" if sharded else "tall on rank 2") in messages[0]


def test_a_good_step_starts_the_count_again() -> None:
    parameters, optimizer = with_vector(max_nonfinite=2)
    for step in range(6):
        fill(parameters, step)
        if step % 2:
            parameters["wide"].grad[0, 0] = torch.inf
            with pytest.warns(RuntimeWarning, match=r"\(1 in a row\): NaN or infinite: wide on rank 0"):
                optimizer.step()
        else:
            optimizer.step()
    assert optimizer.guard.skipped == 3 and optimizer.guard.in_a_row == 1
    restored = StepGuard(2)
    restored.load_state_dict(optimizer.guard.state_dict())
    assert restored.in_a_row == 1


def collectives_per_step() -> int:
    parameters, optimizer = with_vector()
    fill(parameters, 0)
    optimizer.step()
    before = optimizer.runtime.transport.collectives
    fill(parameters, 1)
    allowed = optimizer.guard.allows(
        optimizer.runtime.transport,
        list(parameters.values()),
        [p.grad for p in parameters.values()],
        lambda: [],
        agreed=None,
        complete=False,
        matrices=[None] * len(parameters),
    )
    assert allowed is not None and list(allowed.present) == [True] * len(parameters) and not allowed.zero
    return optimizer.runtime.transport.collectives - before


def test_it_shares_the_collective_of_the_gradient_flags() -> None:
    assert run_ranks(collectives_per_step, 2) == [1, 1]


def test_a_step_of_many_calls_is_decided_once() -> None:
    """As under ZeRO: groups one at a time, the framework's answer asked for each, and one decision for all of them."""
    for good in (True, False):
        parameters = make_parameters()
        named = list(parameters.items())
        optimizer = Muon([{"params": [p], "param_names": [n]} for n, p in named], lr=0.02, max_nonfinite=2)
        fill(parameters, 0)
        optimizer.step()
        assert optimizer.runtime is not None
        optimizer.runtime.binding.finite = lambda good=good: good
        groups = optimizer.param_groups
        before = snapshot(parameters, optimizer)
        fill(parameters, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            for group in groups:
                optimizer.param_groups = [group]
                optimizer.step()
        optimizer.param_groups = groups
        assert same(before, snapshot(parameters, optimizer)) != good
        assert optimizer.guard.skipped == (0 if good else 1)


def test_a_veto_leaves_the_step_out_and_does_not_count_as_bad() -> None:
    parameters, optimizer = with_vector(max_nonfinite=1)
    fill(parameters, 0)
    optimizer.step()
    before = snapshot(parameters, optimizer)
    optimizer.guard.veto = lambda: True
    optimizer.step()
    assert same(before, snapshot(parameters, optimizer))
    assert (optimizer.guard.vetoed, optimizer.guard.skipped) == (1, 0)


def found(gradients: list, matrices: list | None = None, exact: bool = False) -> list[int]:
    return states(gradients, matrices or [None] * len(gradients), CPU, exact=exact)[0].tolist()


def test_states() -> None:
    good, huge = torch.ones(3), torch.full((4,), 3e38)
    bad = [torch.tensor([1.0, v]) for v in (torch.nan, torch.inf, -torch.inf)]
    half = torch.full((9,), 6e4, dtype=torch.float16)
    assert found([good, None, torch.empty(0)]) == [FINITE, ABSENT, ZERO]
    assert found(bad) == [NOT_FINITE] * 3 == found(bad, exact=True)
    assert found([half, half.bfloat16(), good]) == [FINITE] * 3
    assert found([b.bfloat16() for b in bad]) == [NOT_FINITE] * 3
    assert found([torch.empty(0, dtype=torch.bfloat16), half]) == [ZERO, FINITE]
    assert found([huge]) == [NOT_FINITE]  # the norm overflows
    assert found([huge, None], exact=True) == [FINITE, ABSENT]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("exact", [False, True])
def test_only_zero_is_zero(dtype: torch.dtype, exact: bool) -> None:
    """Squares of the smallest numbers vanish in the norm."""
    tiny = torch.zeros(5, dtype=dtype)
    tiny[3] = -torch.finfo(dtype).tiny
    assert found([torch.zeros(5, dtype=dtype), tiny, -torch.zeros(2, dtype=dtype)], exact=exact) == [
        ZERO,
        FINITE,
        ZERO,
    ]


def test_states_of_the_matrices_of_one_gradient() -> None:
    """This rank holds two matrices whole, half of a third one, and nothing of the fourth."""
    blocks = [Block.run(0, 4), Block.run(4, 4), Block.run(8, 2), Block.run(12, 2)]
    split = Split(Reader((14,), blocks), [0, 1, 1, 2], [10, 11, 12, 13])
    gradient = torch.zeros(14)
    gradient[9] = 1.0
    gradient[10] = torch.nan  # between them
    assert found([torch.ones(2), gradient], [None, split]) == [FINITE, ZERO, FINITE, ZERO, ABSENT]
    assert found([None, None], [None, split]) == [ABSENT] * 5


def test_gradients_too_large_for_a_norm_are_stepped() -> None:
    p = torch.nn.Parameter(torch.eye(4))
    vector = torch.nn.Parameter(torch.zeros(4))
    optimizer = Muon([{"params": [p]}, {"params": [vector], "algorithm": "adamw"}])
    p.grad, vector.grad = torch.eye(4), torch.full((4,), 1e30)
    optimizer.step()
    assert optimizer.guard.applied and optimizer.guard.skipped == 0


def test_refused() -> None:
    with pytest.raises(ConfigError, match="max_nonfinite is 0"):
        Muon([torch.nn.Parameter(torch.eye(2))], max_nonfinite=0)

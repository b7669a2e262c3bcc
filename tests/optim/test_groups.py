"""What a parameter group may hold: an error names everything else before the optimizer is built."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from muon_dist import Muon
from muon_dist.errors import ConfigError


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(shape or (4, 6), dtype=dtype))


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ({"use_muon": False}, r"'use_muon' is a key of another optimizer: write \"algorithm\""),
        ({"num_heads": 4}, r"'num_heads'.*\"heads\": N"),
        ({"split_sizes": [1, 2]}, r"'split_sizes'.*\"sizes\""),
        ({"adjust_lr_fn": "original"}, "'adjust_lr_fn'.*spectral"),
        ({"adjust_lr": "rms_norm"}, "'adjust_lr'.*scale"),
        ({"wd": 0.1}, "'wd'.*weight_decay"),
        ({"algoritm": "adamw"}, "'algoritm' is unknown: did you mean 'algorithm'"),
        ({"weight_decy": 0.1}, "'weight_decy' is unknown: did you mean 'weight_decay'"),
        ({"zzz": 1}, "'zzz' is unknown: use one of .*momentum"),
        ({"lr": "0.1"}, "lr is '0.1': it must be a number"),
        ({"lr": True}, "lr is True: it must be a number"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": float("inf")}, "lr is inf"),
        ({"weight_decay": "x"}, "weight_decay is 'x'"),
        ({"momentum": None}, "momentum is None: it must be a number"),
        ({"ns_steps": 5.0}, "ns_steps is 5.0: it must be a whole number"),
        ({"algorithm": "adamw", "betas": 0.9}, "betas are 0.9: give two numbers"),
        ({"algorithm": "adamw", "betas": (0.9,)}, "betas are .*: give two numbers"),
        ({"algorithm": "adamw", "betas": ("a", 0.9)}, "betas are"),
        ({"algorithm": "adamw", "eps": "1"}, "eps is '1': it must be a number"),
        ({"cuts": [{"haeds": 2}]}, "cut 0 has the unknown key 'haeds': did you mean 'heads'"),
        ({"cuts": [3]}, "cut 0 is 3: give None or a dict"),
        ({"cuts": {"heads": 2}}, "give a list of 1"),
        ({"cuts": [None, None]}, "give a list of 1"),
        ({"param_names": ["a", "b"]}, "2 param_names for 1 params"),
    ],
)
def test_a_group_that_cannot_be_used_is_refused_by_name(group: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Muon([{"params": [weight()], **group}, {"params": [weight()]}])


def test_a_scheduler_of_torch_may_have_written_into_a_group() -> None:
    Muon([{"params": [weight()], "initial_lr": 0.1, "max_lr": 0.2}], lr=0.1)


def test_a_rate_may_be_a_tensor() -> None:
    p = weight()
    optimizer = Muon([{"params": [p], "lr": torch.tensor(0.1)}])
    p.grad = torch.randn_like(p)
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_real_dtype_is_stepped(dtype: torch.dtype) -> None:
    p, vector = weight(dtype=dtype), weight(3, dtype=dtype)
    optimizer = Muon([{"params": [p]}, {"params": [vector], "algorithm": "adamw"}], lr=0.1)
    before = p.detach().clone()
    p.grad, vector.grad = torch.randn_like(p), torch.randn_like(vector)
    optimizer.step()
    assert p.dtype == dtype and not torch.equal(p, before)


def test_complex_parameters_go_through_adamw() -> None:
    p, other = weight(), weight(3, dtype=torch.complex64)
    reference = torch.nn.Parameter(other.detach().clone())
    optimizer = Muon([{"params": [p]}, {"params": [other], "algorithm": "adamw"}], lr=0.1, weight_decay=0.0)
    torchs = torch.optim.AdamW([reference], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    p.grad, other.grad = torch.randn_like(p), torch.randn_like(other)
    reference.grad = other.grad.clone()
    optimizer.step()
    torchs.step()
    assert torch.equal(other, reference)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW([p]),
        lambda p: torch.optim.SGD([p], lr=0.1, momentum=0.9),
        lambda p: torch.optim.Muon([p]),
    ],
)
def test_the_state_of_another_optimizer_is_refused_before_anything_changes(make: Any) -> None:
    p = weight()
    optimizer, other = Muon([p]), make(weight())
    p.grad = torch.randn_like(p)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ConfigError, match="state of another optimizer"):
        optimizer.load_state_dict(other.state_dict())
    after = optimizer.state_dict()
    assert torch.equal(before["state"][0]["momentum_buffer"], after["state"][0]["momentum_buffer"])
    assert before["param_groups"] == after["param_groups"]


def test_a_step_count_that_is_a_number_loads() -> None:
    p, vector = weight(), weight(3)
    optimizer = Muon([{"params": [p]}, {"params": [vector], "algorithm": "adamw"}])
    p.grad, vector.grad = torch.randn_like(p), torch.randn_like(vector)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][1]["step"] = 7
    optimizer.load_state_dict(state)
    optimizer.step()
    assert float(optimizer.state[vector]["step"]) == 8

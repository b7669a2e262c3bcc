"""Arguments of another type than an option has are refused, with the option's name and what to pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import muon_dist
from muon_dist import Muon
from muon_dist.errors import ConfigError
from muon_dist.optim.diagnostics import Diagnostics


def weight() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(4, 6))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"diagnostics": {"every": 3, "foldr": "x"}}, "diagnostics: 'foldr' is unknown: did you mean 'folder'"),
        ({"diagnostics": {}}, r"diagnostics is {}: give a dict such as {\"every\": 100}"),
        ({"diagnostics": 5}, "diagnostics is 5: give a dict"),
        ({"audit": 5}, "audit is 5: give a dict"),
        ({"wire_dtype": "bf16"}, "wire_dtype is 'bf16': use a floating-point dtype such as torch.bfloat16"),
        ({"wire_dtype": torch.int8}, "wire_dtype is torch.int8: use a floating-point dtype"),
        ({"bucket_mb": "a"}, "bucket_mb is 'a': it must be a number"),
        ({"bucket_mb": 0}, "bucket_mb is 0: it must be above 0"),
        ({"rounding_seed": "a"}, "rounding_seed is 'a': it must be a whole number"),
        ({"nesterov": "no"}, "nesterov is 'no': it must be True or False"),
        *[
            ({name: "no"}, f"{name} is 'no': it must be True or False")
            for name in ("overlap", "ns_compile", "master_weights", "stochastic_rounding", "momentum_everywhere")
        ],
    ],
)
def test_an_option_of_another_type_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Muon([weight()], **options)


def test_flags_may_be_numbers_and_diagnostics_an_object() -> None:
    made = Diagnostics(3)
    optimizer = Muon([weight()], nesterov=1, overlap=0, diagnostics=made)  # type: ignore[arg-type]
    assert optimizer.diagnostics is made
    assert Muon([weight()], diagnostics={"every": 7}).diagnostics.every == 7  # type: ignore[union-attr]


@pytest.mark.parametrize("call", [muon_dist.param_groups, muon_dist.routing_table])
@pytest.mark.parametrize("given", [None, [weight()], torch.nn.Linear(4, 6).parameters()])
def test_the_model_is_needed_not_its_parameters(call: Any, given: Any) -> None:
    with pytest.raises(ConfigError, match=r"expected a model.*write param_groups\(model\)"):
        call(given)


def test_params_that_are_no_parameters() -> None:
    with pytest.raises(ConfigError, match="params is 5: pass a model"):
        Muon(5)  # type: ignore[arg-type]

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


@pytest.mark.parametrize("name", ["param_groups", "routing_table"])
@pytest.mark.parametrize("given", [None, [weight()], torch.nn.Linear(4, 6).parameters(), torch.nn.Linear])
def test_the_model_is_needed_not_its_parameters(name: str, given: Any) -> None:
    with pytest.raises(ConfigError, match=rf"expected a model.*write {name}\(model\)"):
        getattr(muon_dist, name)(given)


LAYER = torch.nn.Linear(4, 6)
USED_UP = iter([weight()])
next(USED_UP)


@pytest.mark.parametrize(
    "given, words",
    [
        (5, "params is 5"),
        (None, "params is None"),
        ("model", "params is a str"),
        (LAYER.state_dict(), "params is a OrderedDict"),
        (LAYER.parameters, "params is a method"),
        ([], "params is empty"),
        (USED_UP, "params is empty .*after its first use"),
        ([LAYER], r"params\[0\] is a Linear"),
        ([weight(), ("w", 3)], r"params\[1\] is a tuple"),
        ([{"lr": 0.1}], r"params\[0\] is a group without params"),
    ],
)
def test_params_that_are_no_parameters(given: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"{words}.*pass the model, or muon_dist\.param_groups\(model\)$"):
        Muon(given)


def test_a_model_in_place_of_the_parameters_of_a_group() -> None:
    with pytest.raises(ConfigError, match=r"params\[0\]\['params'\] is a model: write Muon\(model\)"):
        Muon([{"params": LAYER}])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: Muon(lr=0.01), r"Muon: missing .*'params': write muon_dist\.Muon\(muon_dist\.param_groups\(model\)"),
        (lambda: muon_dist.param_groups(), r"param_groups: missing .*'model': write muon_dist\.param_groups\(model"),
        (lambda: muon_dist.param_groups(LAYER, 0.1), r"too many .*: write muon_dist\.param_groups\(model, lr=0"),
        (lambda: muon_dist.routing_table(), r"write muon_dist\.routing_table\(model\)"),
        (lambda: muon_dist.for_trainer(), r"write muon_dist\.for_trainer\(args\)"),
        (lambda: muon_dist.for_trainer(LAYER), r"this is a Linear: write for_trainer\(args\)"),
    ],
)
def test_a_call_with_a_missing_argument_shows_the_call(call: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        call()

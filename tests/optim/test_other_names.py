"""Arguments under the names of other optimizers are refused, with the line to write here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

import muon_dist
from muon_dist.adapters.factory import split_kwargs
from muon_dist.errors import ConfigError


def net() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 4))


def names_of(other: Callable[..., Any]) -> Iterable[str]:
    known = {p for ours in (muon_dist.Muon, muon_dist.param_groups) for p in inspect.signature(ours).parameters}
    return sorted(set(inspect.signature(other).parameters) - known)


DION = "distributed_mesh mu epsilon adjust_lr use_polar_express"  # signatures of packages that are not installed here
KELLER = "rank world_size muon_params adamw_params adamw_lr adamw_betas adamw_eps adamw_wd backend backend_steps wd"
DEEPSPEED = "muon_lr adam_lr"
OPTAX = "learning_rate ns_coeffs beta adam_b1 adam_b2 adam_weight_decay"
EMERGING = "momentum_beta use_nesterov coefficient_type num_ns_steps scale_mode"


@pytest.mark.parametrize(
    "name",
    [
        *names_of(torch.optim.Muon),
        *names_of(torch.optim.AdamW),
        *" ".join((DION, KELLER, DEEPSPEED, OPTAX, EMERGING)).split(),
    ],
)
def test_a_name_of_another_optimizer_is_refused_with_what_to_write(name: str) -> None:
    with pytest.raises(ConfigError, match=f"Muon: '{name}' is an argument of .*: .*(write|leave|call|pass)"):
        muon_dist.Muon(net(), **{name: 1.0})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "name", "words"),
    [
        (muon_dist.Muon, "adjust_lr_fn", "Muon: 'adjust_lr_fn'.*: write scale=.*original"),
        (muon_dist.Muon, "adam_lr", "in param_groups write adamw_lr=..."),
        (muon_dist.Muon, "adamw_lr", "'adamw_lr' is an argument of param_groups"),
        (muon_dist.Muon, "momentm", "Muon: argument 'momentm' is unknown: did you mean 'momentum'?"),
        (muon_dist.Muon, "zzz", "argument 'zzz' is unknown: use one of .*weight_decay"),
        (
            muon_dist.param_groups,
            "momentum",
            "argument 'momentum' is unknown: .*; other options are arguments of Muon",
        ),
        (muon_dist.param_groups, "wd", "write weight_decay=..."),
        (muon_dist.param_groups, "mu", "in Muon write momentum="),
        (muon_dist.param_groups, "weight_decy", "did you mean 'weight_decay'?"),
        (muon_dist.Muon, "adamw_lrr", r"did you mean 'adamw_lr' \(an argument of param_groups\)"),
        (lambda model, **given: split_kwargs(given), "adam_lr", "write adamw_lr=..."),
        (lambda model, **given: split_kwargs(given), "print_ruting", "did you mean 'print_routing'"),
    ],
)
def test_the_refusal_names_the_function_that_has_the_argument(call: Callable[..., Any], name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        call(net(), **{name: 1.0})

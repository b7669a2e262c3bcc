"""Names of our options in other optimizers, and the errors for unknown arguments.

The names are those of torch's Muon and AdamW, DeepSpeed, dion, Keller Jordan, Moonlight, optax and NVIDIA's
Emerging-Optimizers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Set
from typing import Any

from muon_dist.errors import ConfigError
from muon_dist.optim.rules import PARTS
from muon_dist.optim.rules.choice import closest

SCALES = '"match_rms_adamw", "spectral", "unit_rms" or "none"'
RENAMED: dict[str, tuple[str, str]] = {
    "adjust_lr": ("scale", SCALES),
    "adjust_lr_fn": ("scale", '"match_rms_adamw" for "match_rms_adamw", and "spectral" for "original"'),
    "scale_mode": ("scale", SCALES),
    "rms_scale": ("scale", '"match_rms_adamw"'),
    "learning_rate": ("lr", ""),
    "muon_lr": ("lr", ""),
    "adam_lr": ("adamw_lr", ""),
    "wd": ("weight_decay", ""),
    "muon_weight_decay": ("weight_decay", ""),
    "adam_wd": ("adamw_weight_decay", ""),
    "adamw_wd": ("adamw_weight_decay", ""),
    "adam_weight_decay": ("adamw_weight_decay", ""),
    "adam_betas": ("betas", "(0.9, 0.95)"),
    "adamw_betas": ("betas", "(0.9, 0.95)"),
    "beta1": ("betas", '(beta1, beta2) for AdamW, "momentum" for Muon'),
    "beta2": ("betas", '(beta1, beta2) for AdamW; for the rule normuon "rule_options": {"beta2": ...}'),
    "adam_b1": ("betas", "(b1, b2)"),
    "adam_b2": ("betas", "(b1, b2)"),
    "epsilon": ("eps", "1e-8 (of AdamW)"),
    "adam_eps": ("eps", "1e-8"),
    "adamw_eps": ("eps", "1e-8"),
    "mu": ("momentum", "0.95"),
    "beta": ("momentum", "0.95"),
    "momentum_beta": ("momentum", "0.95"),
    "use_nesterov": ("nesterov", "True or False"),
    "num_ns_steps": ("ns_steps", "5"),
    "backend_steps": ("ns_steps", "5"),
    "ns_coefficients": ("ns_schedule", "[[a, b, c]] or a name"),
    "ns_coeffs": ("ns_schedule", "[[a, b, c]] or a name"),
    "coefficient_type": ("ns_schedule", "a name"),
    "use_polar_express": ("ns_schedule", '"polar_express"'),
    **{part: ("rule_options", f'{{"{part}": ...}}') for part in PARTS},
}
"""Name in another optimizer -> our name, and how to write its value ("" if the value stays the same)."""
_GROUPS = "call Muon(param_groups(model)), which divides the parameters between Muon and AdamW"
UNNEEDED = {
    "capturable": "leave it out: ranks agree on each step over the network, which a CUDA graph cannot capture",
    "differentiable": "leave it out: no gradient flows through this step",
    "foreach": "leave it out: the step chooses the fastest implementation itself",
    "fused": "leave it out: the step chooses the fastest implementation itself",
    "maximize": "leave it out and call backward on the negated loss",
    "amsgrad": "leave it out: AdamW groups do not support it",
    "distributed_mesh": "leave it out with fully_shard; else pass process_group=mesh.get_group() to Muon",
    "rank": "leave it out: the step asks torch.distributed",
    "world_size": "leave it out: the step asks torch.distributed",
    "backend": "leave it out: matrices are always orthogonalized by Newton-Schulz, see ns_schedule",
    "muon_params": _GROUPS,
    "adamw_params": _GROUPS,
    "adam_params": _GROUPS,
    "use_muon": 'write overrides=[{"pattern": NAME, "algorithm": "muon"}] in param_groups, "adamw" for the others',
    "num_heads": 'write splits=[{"pattern": ".*q_proj", "heads": N}], or splits="heads", in param_groups',
    "split_sizes": 'write splits=[{"pattern": NAME, "sizes": [...]}] in param_groups',
}
"""Arguments of other optimizers that do not exist here -> what to do instead."""


def arguments_of(function: Callable[..., Any]) -> set[str]:
    """Names of the keyword arguments of a function or class, without its first argument."""
    _, *rest = inspect.signature(function).parameters.values()
    return {p.name for p in rest if p.kind is not p.VAR_KEYWORD}


def refuse_arguments(
    what: str, unknown: Iterable[str], known: Set[str], elsewhere: str = "", there: Set[str] = frozenset()
) -> None:
    """Raise ConfigError for the first unknown keyword argument; the message says what to write instead.

    Args:
        what: name of the called function, at the beginning of the message.
        elsewhere: another function that has further arguments.
        there: the names of these arguments.
    """
    for name in unknown:
        if name not in known:
            raise ConfigError(f"{what}: {_advice(name, known, elsewhere, there)}")


def _advice(name: str, known: Set[str], elsewhere: str, there: Set[str]) -> str:
    if name in there:
        return f"'{name}' is an argument of {elsewhere}: pass it to {elsewhere}"
    if name in UNNEEDED:
        return f"'{name}' is an argument of another optimizer: {UNNEEDED[name]}"
    if name in RENAMED:
        ours, value = RENAMED[name]
        place = "" if ours in known else f"in {elsewhere} "
        return f"'{name}' is an argument of another optimizer: {place}write {ours}={value or '...'}"
    close = closest(name, known | there)
    if close is not None:
        place = f" (an argument of {elsewhere})" if close not in known else ""
        return f"argument '{name}' is unknown: did you mean '{close}'{place}?"
    more = f"; other options are arguments of {elsewhere}" if elsewhere else ""
    return f"argument '{name}' is unknown: use one of {', '.join(sorted(known))}{more}"

"""Reads the options of a parameter group, under the option names of several optimizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from muon_dist.audit.convention import SCALES, Iteration, named

# (option, value) of other optimizers for the factor on an update -> name in SCALES.
_SCALES: Mapping[tuple[str, Any], str] = {
    ("adjust_lr_fn", None): "spectral",  # torch.optim.Muon
    ("adjust_lr_fn", "original"): "spectral",
    ("adjust_lr_fn", "match_rms_adamw"): "match_rms_adamw",
    ("adjust_lr", "spectral_norm"): "rms_to_rms",  # dion
    ("adjust_lr", "rms_norm"): "match_rms_adamw",
    ("adjust_lr", None): "none",
    ("rms_scale", True): "match_rms_adamw",  # muon-fsdp2
    ("rms_scale", False): "spectral",
}


@dataclass(frozen=True)
class Asked:
    """The options that one step of one matrix should follow.

    Attributes:
        rule: "muon", "normuon" or "adamw".
        lr, weight_decay: decoupled decay: the weight shrinks by lr * weight_decay.
        momentum: decay rate of the running mean of gradients.
        nesterov: None if unknown; then the look-ahead is assumed, and a step without it is reported as a choice.
        scale: name in `SCALES`; None if unknown.
        iteration: None if unknown.
        betas, eps: options of AdamW.
        cautious: decay only where update and weight have the same sign.
        pieces: rows of the blocks that are orthogonalized separately; empty for the whole matrix.
    """

    rule: str = "muon"
    lr: float = 0.0
    weight_decay: float = 0.0
    momentum: float = 0.95
    nesterov: bool | None = None
    scale: str | None = None
    iteration: Iteration | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    cautious: bool = False
    pieces: tuple[int, ...] = ()


@dataclass(frozen=True)
class Wanted:
    """Options that the caller of `witness` passed; None: read them from the parameter groups."""

    rule: str = "muon"
    options: Mapping[str, Any] = field(default_factory=dict)


def is_muon_group(group: Mapping[str, Any], optimizer_name: str) -> bool:
    """Whether Muon trains a group. If the group does not say so, the optimizer's class name decides."""
    if "use_muon" in group:
        return bool(group["use_muon"])
    if "algorithm" in group:
        return str(group["algorithm"]).lower() not in ("adamw", "adam", "lion", "sgd")
    return "muon" in optimizer_name.lower() or "dion" in optimizer_name.lower()


def read(group: Mapping[str, Any], wanted: Wanted, pieces: tuple[int, ...] = ()) -> Asked:
    """The options of `group`, overridden by those that the caller of `witness` passed."""

    def first(*names: str, otherwise: Any) -> Any:
        for source in (wanted.options, group):
            for name in names:
                if source.get(name) is not None:
                    return source[name]
        return otherwise

    steps = int(first("ns_steps", "steps", otherwise=5))
    rows = first("ns_coefficients", otherwise=None)
    schedule = first("ns_schedule", otherwise=None)
    iteration: Iteration | None = None
    if rows is not None:
        iteration = Iteration("as given", (tuple(float(v) for v in rows),) * steps)  # type: ignore[arg-type]
    elif schedule is not None:
        iteration = named(str(schedule), steps)
    nesterov = first("nesterov", otherwise=None)
    betas = first("betas", otherwise=(0.9, 0.999))
    return Asked(
        rule=wanted.rule,
        lr=float(first("lr", otherwise=0.0)),
        weight_decay=float(first("weight_decay", "wd", otherwise=0.0)),
        momentum=float(first("momentum", "mu", otherwise=0.95)),
        nesterov=None if nesterov is None else bool(nesterov),
        scale=_scale(group, wanted),
        iteration=iteration,
        betas=(float(betas[0]), float(betas[1])),
        eps=float(first("eps", otherwise=1e-8)),
        cautious=bool(first("cautious_wd", "use_cautious_wd", otherwise=False)),
        pieces=pieces,
    )


def _scale(group: Mapping[str, Any], wanted: Wanted) -> str | None:
    chosen = wanted.options.get("scale") or group.get("scale")
    if chosen in SCALES:
        return str(chosen)
    for (key, value), name in _SCALES.items():
        if key in group and group[key] == value:
            return name
    return None

"""One case of the fuzzer as data: it is drawn, run, shrunk and printed as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from muon_dist.errors import ConfigError

MUON, ADAMW, FROZEN = "muon", "adamw", "frozen"
PROCESS, DDP, FSDP2, ZERO = "process", "ddp", "fsdp2", "zero"
RELOAD, FULL, CHECKPOINT = "reload", "full", "checkpoint"
EXPERTS = "deepspeed_moe.experts.deepspeed_experts"
"""Path of the experts in a DeepSpeed MoE layer."""
SECOND_GROUP: dict[str, Any] = {"scale": "spectral", "momentum": 0.9, "nesterov": False, "weight_decay": 0.02}
"""Options of the parameters with `group` 1. They have half the learning rate and the rule "muon"."""
ADAMW_OPTIONS: dict[str, Any] = {"weight_decay": 0.05, "betas": (0.9, 0.95), "eps": 1e-8}


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model.

    Attributes:
        name: unique; the parameter is `layers.<layer>.<name>.weight` of the model.
        shape: (M, N), (E, M, N) for experts, or one axis under AdamW.
        kind: its optimizer, "muon" or "adamw", or "frozen". layer: its module.
        heads, sizes, transposed: as of `layout.cut_parameter`.
        group: 1 for the second Muon group.
        tp: the tensor axis that tensor parallelism cuts; None: a plain copy on all tp ranks.
        tied: the module holds the parameter under a second name too, and uses both.
        fsdp_dim: the tensor axis that FSDP2 cuts if it divides evenly; else axis 0 is cut.
        listed: each part along the first axis is an expert of a DeepSpeed MoE layer, and a separate parameter.
    """

    name: str
    shape: tuple[int, ...]
    kind: str = MUON
    layer: int = 0
    heads: int | None = None
    sizes: tuple[int, ...] | None = None
    transposed: bool = False
    group: int = 0
    tp: int | None = None
    tied: bool = False
    fsdp_dim: int = 0
    listed: bool = False

    @property
    def fqn(self) -> str:
        return f"layers.{self.layer}.{self.name}.weight"

    @property
    def fqns(self) -> tuple[str, ...]:
        """Names of the model's parameters that hold it: one name, or one per expert."""
        if not self.listed:
            return (self.fqn,)
        return tuple(f"layers.{self.layer}.{self.name}.{EXPERTS}.{i}.weight" for i in range(self.shape[0]))

    @property
    def cut(self) -> dict[str, Any]:
        """Arguments of `layout.cut_parameter`."""
        given = {"heads": self.heads, "sizes": self.sizes, "transposed": self.transposed}
        return {key: value for key, value in given.items() if value}

    def leaves_empty(self, tp: int) -> bool:
        """Whether `torch.chunk` over `tp` ranks leaves a rank without elements."""
        if self.tp is None:
            return False
        length = self.shape[self.tp]
        return -(-length // -(-length // tp)) < tp

    def matrices(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Views of the matrices of a whole tensor. Does not use the package's code, in order to test it."""
        found = [tensor] if tensor.dim() == 2 else list(tensor)
        axis = -1 if self.transposed else -2
        out = found[0].size(axis)
        sizes = [out // self.heads] * self.heads if self.heads else list(self.sizes or [out])
        return [part for matrix in found for part in matrix.split(sizes, axis)]


@dataclass(frozen=True)
class Setup:
    """The framework and mesh that hold the model.

    Attributes:
        framework: "process", "ddp" (`replicate` ranks), "fsdp2" (any of the axes; without `shard` only tensor
            parallelism) or "zero" (DeepSpeed: `replicate`, and one of `tp`, AutoTP, `sp`, Ulysses, and `ep`, MoE
            layers).
        replicate, shard, tp, sp: ranks along the axes of the mesh.
        ep: ranks that share the experts of a layer, among the ranks of the other axes; under "fsdp2" a multiple of
            `tp`.
        stage: of ZeRO.
    """

    framework: str = PROCESS
    replicate: int = 1
    shard: int = 1
    tp: int = 1
    stage: int = 0
    sp: int = 1
    ep: int = 1

    @property
    def world(self) -> int:
        return self.replicate * self.shard * self.tp * self.sp

    @property
    def data(self) -> int:
        """Number of ranks that read different samples, or different parts of samples."""
        return self.replicate * self.shard * self.sp

    @property
    def for_good(self) -> bool:
        """Whether the ranks can run only this case: DeepSpeed keeps the groups of these axes until the process
        ends."""
        return self.framework == ZERO and max(self.tp, self.sp, self.ep) > 1

    @property
    def needs_elements(self) -> bool:
        """FSDP2 and AutoTP refuse a parameter if tensor parallelism leaves a rank without elements of it."""
        return self.tp > 1 and (self.shard > 1 or self.framework == ZERO)

    def shares(self, p: Parameter) -> bool:
        """Whether the ranks of `ep` share the experts of a parameter; `fully_shard` takes no module of a tied one."""
        kind = p.listed if self.framework == ZERO else len(p.shape) == 3 and p.tp == 0 and not p.listed
        return self.ep > 1 and kind and not p.tied and p.shape[0] % self.ep == 0

    def problem(self) -> str | None:
        """The reason why no framework supports this mesh; None if one does."""
        if self.framework not in (PROCESS, DDP, FSDP2, ZERO):
            return "framework must be process, ddp, fsdp2 or zero"
        if self.framework == ZERO:
            if self.shard > 1 or sum(size > 1 for size in (self.tp, self.sp, self.ep)) > 1:
                return "zero takes replicate, and one of tp, sp and ep"
            if self.ep > 1 and (self.stage == 3 or self.replicate % self.ep):
                return "DeepSpeed's MoE layers need a stage below 3, and an ep that divides replicate"
        elif self.framework == FSDP2:
            if self.sp > 1 or (
                self.ep > 1 and (self.shard == 1 or self.ep % self.tp or self.shard * self.tp % self.ep)
            ):
                return "under fsdp2 ep must be a multiple of tp that divides shard x tp, and shard more than 1; no sp"
        elif max(self.shard, self.tp, self.sp, self.ep) > 1:
            return f"{self.framework} has no axis but replicate"
        return None

    def label(self) -> str:
        if self.framework == ZERO:
            own = ((self.tp, "AutoTP"), (self.sp, "Ulysses"), (self.ep, "MoE ep"))
            return " ".join([f"ZeRO-{self.stage} x{self.replicate}", *(f"{n}{size}" for size, n in own if size > 1)])
        axes = ((self.replicate, "copies"), (self.shard, "shards"), (self.tp, "tp"), (self.ep, "ep"))
        return " ".join([self.framework, *(f"{name}{size}" for size, name in axes if size > 1)])


@dataclass(frozen=True)
class Resume:
    """After `at` steps the model and the optimizer are rebuilt and loaded.

    Attributes:
        how: "reload" (`state_dict` and `load_state_dict`), "full" (`full_state_dict`, also to another number of ranks)
            or "checkpoint" (ours, to any layout). setup: framework and mesh afterwards.
    """

    at: int
    how: str
    setup: Setup


@dataclass(frozen=True)
class Case:
    """Everything that a run depends on.

    Attributes:
        seed: of weights and gradients.
        nesterov, scale: None for the rule's default.
        rule_options: of the first group; a part is one of them. ns_rows: rows of a custom `ns_schedule`; empty: Keller
            Jordan's.
        dtype: of weights and gradients; "bfloat16" or "float16" come with `rounding`.
        rounding: "master" (`master_weights`) or "stochastic" (`stochastic_rounding`).
        momentum_everywhere: the optimizer's option.
        audit: every step is audited; an alarm is an error.
        by_pattern: groups are made by `param_groups(model, groups=...)`, one entry per parameter.
        wire: dtype of the messages; None: the dtype of the updates. clip: bound of the norm of all gradients.
        clip_muon: with DeepSpeed, clip Muon's gradients too.
        zero: (step, name, matrix) with a gradient of zero; matrix -1 means the whole parameter.
        missing: (step, name) without a gradient.
    """

    seed: int = 0
    steps: int = 1
    parameters: tuple[Parameter, ...] = ()
    setup: Setup = field(default_factory=Setup)
    rule: str = "muon"
    lr: float = 0.02
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool | None = None
    scale: str | None = None
    rule_options: tuple[tuple[str, float | bool], ...] = ()
    ns_steps: int = 5
    ns_rows: tuple[tuple[float, float, float], ...] = ()
    dtype: str = "float32"
    rounding: str | None = None
    momentum_everywhere: bool = False
    audit: bool = False
    by_pattern: bool = False
    bucket_mb: float = 256.0
    overlap: bool = True
    wire: str | None = None
    owner_policy: str = "balanced"
    accumulation: int = 1
    clip: float | None = None
    clip_muon: bool = False
    zero: tuple[tuple[int, str, int], ...] = ()
    missing: tuple[tuple[int, str], ...] = ()
    resume: Resume | None = None

    @property
    def exact(self) -> bool:
        """Whether gradients have few bits, so that every sum of them is exact in 16 bits.

        Otherwise 16-bit gradients would be rounded before any optimizer sees them.
        """
        return self.dtype != "float32"

    def segments(self) -> list[tuple[Setup, range]]:
        """The setup of each range of steps; two if another group of processes continues."""
        if self.resume is None or self.resume.how == RELOAD:
            return [(self.setup, range(self.steps))]
        at = self.resume.at
        return [(self.setup, range(at)), (self.resume.setup, range(at, self.steps))]

    def setup_of(self, step: int) -> Setup:
        return next(setup for setup, steps in self.segments() if step in steps)

    def rate(self, step: int) -> float:
        """The learning rate of a step: schedules change it."""
        return self.lr * (1 + step % 3) / 2

    def labels(self) -> list[str]:
        """Labels under which a report counts this case: first framework, rule, way to resume."""
        resume = [f"resume {self.resume.how}"] if self.resume is not None else []
        return [self.setup.label(), f"rule {self.rule}", *resume]

    def to_json(self) -> str:
        """One line of JSON; default values are left out."""
        return json.dumps(_sparse(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Case:
        """The case that `to_json` wrote.

        Raises:
            ConfigError: the text is not a JSON object of a case; names the key.
        """
        try:
            given = json.loads(text)
            case = _made(Case, given)
            problem = case.problem()
        except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
            raise ConfigError(f"--replay is not a case of muon-dist fuzz: {error}") from None
        if problem is not None:
            raise ConfigError(f"--replay is not a case of muon-dist fuzz: {problem}")
        return case

    def problem(self) -> str | None:
        """The reason why this case is not valid; None if it is."""
        if not any(p.kind == MUON for p in self.parameters):
            return "no parameter is Muon's"
        if self.steps < 1 or self.accumulation < 1:
            return "steps and accumulation must be at least 1"
        if self.resume is not None and not 0 < self.resume.at < self.steps:
            return "resume.at must lie between the first step and the last"
        wrong = [said for setup, _ in self.segments() if (said := setup.problem()) is not None]
        if wrong:
            return wrong[0]
        if any(p.listed and (p.tied or p.tp is not None) for p in self.parameters):
            return "a listed parameter is neither tied nor cut by tp"
        if self.exact and (self.clip is not None or any(not self.sums_exactly(s) for s, _ in self.segments())):
            return "16-bit gradients are summed exactly: without clip, and over 1, 2, 4, ... samples"
        if self.clip is not None and self.clips_moe:
            return "DeepSpeed clips MoE layers by the mean of the ranks' norms, not by the norm of all gradients"
        for setup, _ in self.segments():
            if setup.needs_elements and any(p.leaves_empty(setup.tp) for p in self.parameters):
                return "FSDP2 and AutoTP refuse a parameter if tensor parallelism leaves a rank without elements of it"
        return None

    @property
    def clips_moe(self) -> bool:
        """Whether clipping would change DeepSpeed's MoE layers; Muon's parameters are exempt from clipping."""
        moe = any(setup.framework == ZERO and setup.ep > 1 for setup, _ in self.segments())
        return moe and (self.clip_muon or any(p.kind == ADAMW for p in self.parameters))

    def sums_exactly(self, setup: Setup) -> bool:
        """Whether the mean over the samples of a step is exact for gradients of few bits."""
        count = setup.data * self.accumulation
        return count & (count - 1) == 0

    def without(self, name: str) -> Case:
        """This case without one parameter."""
        return replace(
            self,
            parameters=tuple(p for p in self.parameters if p.name != name),
            zero=tuple(z for z in self.zero if z[1] != name),
            missing=tuple(m for m in self.missing if m[1] != name),
        )

    def shortened(self, steps: int) -> Case:
        """The first steps of this case."""
        resume = self.resume if self.resume is not None and self.resume.at < steps else None
        return replace(self, steps=steps, resume=resume)


def second_group(case: Case) -> dict[str, Any]:
    """Options of the parameters with `group` 1. Patterns cannot set momentum, so with `by_pattern` it is that of the
    first group."""
    others = {"momentum": case.momentum, "nesterov": True} if case.by_pattern else {}
    return {**SECOND_GROUP, **others}


def _sparse(value: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for f in fields(value):
        given = getattr(value, f.name)
        if isinstance(given, (Setup, Resume)):
            found[f.name] = _sparse(given)
        elif f.name == "parameters":
            found[f.name] = [_sparse(p) for p in given]
        elif given != f.default:
            found[f.name] = given
    return {key: value for key, value in found.items() if value != {}}


_NESTED: Mapping[tuple[type, str], type] = {(Case, "setup"): Setup, (Case, "resume"): Resume, (Resume, "setup"): Setup}


def _made(kind: type, given: Mapping[str, Any]) -> Any:
    names = {f.name for f in fields(kind)}
    for key in given:
        if key not in names:
            raise ValueError(f"{kind.__name__} has no key '{key}'")
    return kind(**dict(_values(kind, given)))


def _values(kind: type, given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in given.items():
        if (kind, key) in _NESTED and value is not None:
            yield key, _made(_NESTED[kind, key], value)
        elif key == "parameters":
            yield key, tuple(_made(Parameter, p) for p in value)
        else:
            yield key, _frozen(value)
    if kind is Resume and "setup" not in given:
        yield "setup", Setup()


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value

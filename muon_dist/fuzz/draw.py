"""Random cases."""

from __future__ import annotations

import random
from dataclasses import replace

from muon_dist.fuzz.case import (
    ADAMW,
    CHECKPOINT,
    DDP,
    FROZEN,
    FSDP2,
    FULL,
    MUON,
    PROCESS,
    RELOAD,
    ZERO,
    Case,
    Parameter,
    Resume,
    Setup,
)
from muon_dist.optim.rules import PARTS, RULES

SIDES = (1, 2, 3, 4, 5, 7, 8, 12, 16, 24, 33)
_MESHES = (
    ((1, 2, 1, 1), 8),
    ((1, 3, 1, 1), 6),
    ((1, 4, 1, 1), 4),
    ((2, 2, 1, 1), 6),
    ((1, 1, 2, 1), 6),
    ((1, 1, 3, 1), 3),
    ((1, 2, 2, 1), 8),
    ((1, 3, 2, 1), 2),
    ((1, 2, 3, 1), 2),
    ((2, 2, 2, 1), 1),
    ((1, 2, 1, 2), 3),
    ((1, 4, 1, 2), 2),
    ((2, 2, 1, 2), 2),
    ((1, 2, 2, 2), 2),
    ((1, 2, 2, 4), 2),
)
"""((replicate, shard, tp, ep) of FSDP2, HSDP, tensor and expert parallelism, how often)."""
_PARTS: dict[str, float | bool] = {
    "cautious": True,
    "row_floor": 0.3825,
    "radial_brake": 0.5,
    "muoneq": True,
    "muon_plus": True,
    "momentum_at_owner": True,
}
_ROWS = (((3.4445, -4.775, 2.0315), (2.0, -1.5, 0.5)), ((4.0848, -6.8946, 2.927), (1.875, -1.25, 0.375)) * 2)
_ENGINES = 0.07
"""Share of DeepSpeed cases: an engine takes as long as ten other cases."""
_AXES = {"": 6, "tp": 3, "ep": 3, "sp": 1}
"""Shares of AutoTP, MoE layers and Ulysses: their processes are forked for one case only."""


def draw(seed: int, number: int, engines: bool = True) -> Case:
    """The case with this number and seed. engines: whether DeepSpeed may be drawn."""
    r = random.Random(f"{seed}/{number}")
    setup = draw_setup(r, engines)
    rule = r.choices(("muon", "normuon", "adamuon", "soap_muon", "hyperball", "namo"), (5, 2, 2, 2, 2, 2))[0]
    case = Case(
        seed=r.randrange(1000),
        steps=r.randint(1, 5),
        parameters=_parameters(r),
        setup=setup,
        rule=rule,
        lr=r.choice((0.02, 0.1)),
        weight_decay=r.choice((0.0, 0.1, 0.1)),
        momentum=r.choice((0.95, 0.95, 0.5)),
        nesterov=r.choice((None, None, False)) if rule != "namo" else None,
        scale=r.choice((None, None, "spectral", "none", "match_rms_adamw", "unit_rms"))
        if rule != "hyperball"
        else None,
        ns_steps=r.choice((5, 5, 1, 3, 6)),
        bucket_mb=r.choice((256.0, 256.0, 1e-4, 1e-3, 5e-3)),
        overlap=r.random() < 0.7,
        wire=r.choices((None, "float32", "bfloat16", "float64"), (12, 1, 1, 1))[0],
        owner_policy=r.choice(("balanced", "balanced", "local", "round_robin")),
        accumulation=r.choice((1, 1, 1, 2, 3)),
        clip=r.choice((None, None, 0.5, 20.0)),
    )
    if setup.framework == ZERO:
        case = replace(case, clip_muon=r.random() < 0.5)
    case = _with_options(r, case)
    if rule == "soap_muon":
        case = replace(case, parameters=tuple(_squared(r, p) for p in case.parameters))
    if case.steps > 1 and r.random() < 0.3:
        case = replace(case, resume=_resume(r, case, engines))
    return _with_gaps(r, _holdable(_with_experts(r, _with_dtype(r, case))))


def _with_options(r: random.Random, case: Case) -> Case:
    """The case with options of rules, parts and the optimizer."""
    own = {"normuon": {"beta2": 0.9}, "adamuon": {"beta2": 0.9}, "namo": {"mu2": 0.9}, "soap_muon": {"beta2": 0.8}}
    chosen: dict[str, float | bool] = dict(own.get(case.rule, {}) if r.random() < 0.3 else {})
    refused = RULES[case.rule].refused
    for name, value in _PARTS.items():
        fits = name not in refused and PARTS[name].misfit(RULES[case.rule]) is None
        if fits and r.random() < 0.12:
            chosen[name] = value
    rows = r.choice(_ROWS) if r.random() < 0.12 else ()
    patterns = r.random() < 0.15 and not any(p.transposed for p in case.parameters)
    return replace(
        case,
        rule_options=tuple(chosen.items()),
        ns_rows=rows,
        ns_steps=5 if rows else case.ns_steps,
        momentum_everywhere=r.random() < 0.12,
        audit=r.random() < 0.2 and _audited(case, bool(rows or chosen)),
        by_pattern=patterns,
    )


def _squared(r: random.Random, p: Parameter) -> Parameter:
    """Mostly square shapes: the eigenvectors of a singular covariance depend on rounding, not on the formula."""
    if p.kind != MUON or p.heads or p.sizes or r.random() < 0.3:
        return p
    return replace(p, shape=(*p.shape[:-1], p.shape[-2]))


def _audited(case: Case, others: bool) -> bool:
    """Whether a case may have an audit. SOAP may not, because its basis may depend on rounding. others: rows or
    options."""
    return case.rule != "soap_muon" and case.scale != "unit_rms" and not others


def _with_dtype(r: random.Random, case: Case) -> Case:
    """Some cases with 16-bit weights; options that would round their gradients are removed."""
    plain = all(setup.framework != ZERO for setup, _ in case.segments())
    if plain and case.rule != "adamuon" and r.random() < 0.15:
        case = replace(case, dtype="bfloat16", rounding=r.choice(("master", "master", "stochastic")))
        if case.rounding == "master" and r.random() < 0.2:
            case = replace(case, dtype="float16")
    if not case.exact:
        return case
    case = replace(case, clip=None, wire=None if case.wire == "bfloat16" else case.wire)
    case = replace(case, accumulation=min(case.accumulation, 2))
    if not all(case.sums_exactly(setup) for setup, _ in case.segments()):
        return replace(case, dtype="float32", rounding=None)
    return case


def _with_experts(r: random.Random, case: Case) -> Case:
    """The case with a parameter that the ranks of `ep` share, if it has experts."""
    sizes = [setup.ep for setup, _ in case.segments() if setup.ep > 1]
    if not sizes:
        return case
    if case.clips_moe:
        case = replace(case, clip=None)
    listed = any(setup.framework == ZERO and setup.ep > 1 for setup, _ in case.segments())
    count = max(sizes) * r.choice((1, 1, 2))
    p = Parameter("experts", (count, r.choice(SIDES), r.choice(SIDES)), tp=None if listed else 0, listed=listed)
    p = replace(p, transposed=not case.by_pattern and r.random() < 0.2, group=int(r.random() < 0.2))
    if case.rule == "soap_muon":
        p = _squared(r, p)
    return replace(case, parameters=(*case.parameters, p))


def _holdable(case: Case) -> Case:
    """The case, changed if torch cannot hold it.

    FSDP2 refuses a parameter if tensor parallelism leaves a rank without elements of it. And if tensor parallelism
    cuts none of Muon's parameters, the optimizer does not know of the axis.
    """
    over = [setup.tp for setup, _ in case.segments() if setup.needs_elements]
    if not over:
        return case

    def fits(p: Parameter) -> bool:
        return not any(p.leaves_empty(tp) for tp in over)

    first, *others = case.parameters
    first = replace(first, listed=False)
    cut = next((q for q in (replace(first, tp=axis) for axis in range(len(first.shape))) if fits(q)), None)
    if cut is None:
        resume = case.resume
        resume = replace(resume, setup=_without_tp(resume.setup)) if resume is not None else None
        return replace(case, setup=_without_tp(case.setup), resume=resume)
    return replace(case, parameters=(cut, *(p if fits(p) else replace(p, tp=None) for p in others)))


def _without_tp(setup: Setup) -> Setup:
    return replace(setup, tp=1, ep=1) if setup.needs_elements else setup


def draw_setup(r: random.Random, engines: bool) -> Setup:
    if engines and r.random() < _ENGINES:
        return _engine(r)
    if r.random() < 0.12:
        return Setup()
    if r.random() < 0.22:
        return Setup(DDP, replicate=r.choice((2, 2, 3, 4)))
    replicate, shard, tp, ep = r.choices([mesh for mesh, _ in _MESHES], [often for _, often in _MESHES])[0]
    return Setup(FSDP2, replicate, shard, tp, ep=ep)


def _engine(r: random.Random) -> Setup:
    axis = r.choices(tuple(_AXES), tuple(_AXES.values()))[0]
    if axis == "tp":
        return Setup(ZERO, replicate=r.choice((1, 2)), tp=r.choice((2, 2, 3)), stage=r.randint(0, 3))
    if axis == "sp":
        return Setup(ZERO, replicate=r.choice((1, 2)), sp=2, stage=r.randint(0, 3))
    if axis == "ep":
        ep = r.choice((2, 2, 4))
        return Setup(ZERO, replicate=ep * (r.choice((1, 2)) if ep == 2 else 1), ep=ep, stage=r.randint(0, 2))
    return Setup(ZERO, replicate=r.choice((1, 2, 2, 3)), stage=r.randint(0, 3))


def _parameters(r: random.Random) -> tuple[Parameter, ...]:
    layers = r.randint(1, 3)
    kinds = [MUON] * r.randint(1, 4) + [ADAMW] * r.randint(0, 2) + [FROZEN] * (r.random() < 0.15)
    found: list[Parameter] = []
    for i, kind in enumerate(kinds):
        if found and kind == MUON and r.random() < 0.3:  # equal shapes, as in layers, so that they are stacked
            like = r.choice([p for p in found if p.kind == MUON])
            found.append(replace(like, name=f"p{i}", layer=r.randrange(layers)))
            continue
        made = _matrix(r, f"p{i}") if kind == MUON else _other(r, f"p{i}", kind)
        tied = kind != FROZEN and r.random() < 0.1 and not made.listed
        found.append(replace(made, layer=r.randrange(layers), tied=tied))
    used = {layer: i for i, layer in enumerate(sorted({p.layer for p in found}))}
    return tuple(replace(p, layer=used[p.layer]) for p in found)


def _matrix(r: random.Random, name: str) -> Parameter:
    rows, cols = r.choice(SIDES), r.choice(SIDES)
    shape = (rows, cols) if r.random() < 0.75 else (r.randint(1, 5), rows, cols)
    p = Parameter(name, shape, group=int(r.random() < 0.2), transposed=r.random() < 0.2)
    out = cols if p.transposed else rows
    if r.random() < 0.3:
        p = replace(p, heads=r.choice([h for h in range(1, out + 1) if out % h == 0]))
    elif out > 2 and r.random() < 0.15:
        first = r.randint(1, out - 1)
        p = replace(p, sizes=(first, out - first))
    p = replace(p, tp=r.choice((None, *range(len(shape)))), fsdp_dim=r.choice((0, 0, 0, 1)))
    return replace(p, listed=True, tp=None) if len(shape) == 3 and r.random() < 0.25 else p


def _other(r: random.Random, name: str, kind: str) -> Parameter:
    shape = (r.choice(SIDES),) if r.random() < 0.6 else (r.choice(SIDES), r.choice(SIDES))
    return Parameter(name, shape, kind, tp=r.choice((None, *range(len(shape)))))


def _resume(r: random.Random, case: Case, engines: bool) -> Resume:
    at = r.randint(1, case.steps - 1)
    plain = (PROCESS, DDP)
    ways = {CHECKPOINT: 2, FULL: 2 * (case.setup.framework in plain), RELOAD: int(case.setup.framework != ZERO)}
    how = r.choices(tuple(ways), tuple(ways.values()))[0]
    if how == RELOAD:
        return Resume(at, how, case.setup)
    setup = draw_setup(r, engines)
    while how == FULL and setup.framework not in plain:
        setup = draw_setup(r, engines)
    return Resume(at, how, setup)


def _with_gaps(r: random.Random, case: Case) -> Case:
    """The case with gradients that are zero or missing; in every step some parameter has a gradient."""
    zero, missing = [], []
    engine = any(setup.framework == ZERO for setup, _ in case.segments())
    first = case.parameters[0]
    for step in range(case.steps):
        if r.random() < 0.12:
            p = r.choice(case.parameters)
            matrices = (p.heads or len(p.sizes or "1")) * (p.shape[0] if len(p.shape) == 3 else 1)
            zero.append((step, p.name, r.randrange(-1, matrices) if p.kind == MUON else -1))
        if r.random() < 0.08 and not engine:
            p = r.choice(case.parameters)
            if p != first and p.kind != FROZEN:
                missing.append((step, p.name))
    return replace(case, zero=tuple(zero), missing=tuple(missing))

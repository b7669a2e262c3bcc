"""Which parameter goes to Muon, which to AdamW, and why.

The decision rests on the type of the module that holds the parameter, on its logical shape and on identity (tied
weights), never on its name: names lie. Users correct it with `Override` and cut fused matrices with `SplitRule`.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from .errors import RoutingError

Algorithm = Literal["muon", "adamw"]

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_CONVOLUTIONS = nn.modules.conv._ConvNd


@dataclass(frozen=True)
class Split:
    """How one parameter is cut into matrices along its output axis; exactly one of the two fields is set.

    heads: into this many blocks of equal size. sizes: into blocks of these sizes (fused QKV, fused gate and up).
    """

    heads: int | None = None
    sizes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Override:
    """Send every parameter whose name matches `pattern` to `algorithm`.

    The pattern is a regular expression that must match the whole FQN, or the whole FQN without its `.weight`.
    When several overrides match, the last one decides.
    """

    pattern: str
    algorithm: Algorithm


@dataclass(frozen=True)
class SplitRule:
    """Cut every Muon parameter whose name matches `pattern` (as in `Override`) into `heads` blocks or into `sizes`.

    When several rules match, the last one decides.
    """

    pattern: str
    heads: int | None = None
    sizes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class MatrixGroup:
    """`count` matrices of one shape; rows are outputs and columns inputs, however the parameter is stored."""

    count: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Route:
    """Where one parameter goes, and why.

    shape: the logical shape as stored. transposed: stored (in, out), or (E, in, out), instead of (out, in).
    aliases: the other FQNs of the same (tied) tensor. A frozen parameter is listed but takes no part in training.
    """

    fqn: str
    shape: tuple[int, ...]
    algorithm: Algorithm
    reason: str
    transposed: bool = False
    split: Split | None = None
    decay: bool = True
    aliases: tuple[str, ...] = ()
    frozen: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def matrices(self) -> tuple[MatrixGroup, ...]:
        """The matrices that Muon orthogonalizes one by one, blocks in order of the output axis; () under AdamW.

        (M, N) is one matrix, (E, M, N) a batch of E, and four axes or more are read as (out, everything else).
        """
        if self.algorithm != "muon":
            return ()
        batch, outputs, inputs = _logical_matrix(self.shape, self.transposed)
        split = self.split or Split(heads=1)
        sizes = split.sizes or (outputs // (split.heads or 1),) * (split.heads or 1)
        return tuple(MatrixGroup(batch * len(list(run)), rows, inputs) for rows, run in itertools.groupby(sizes))


@dataclass(frozen=True)
class RoutingTable:
    """The route of every parameter, in the order of `model.named_parameters()`, tied weights once."""

    routes: tuple[Route, ...]

    def select(self, algorithm: Algorithm) -> tuple[Route, ...]:
        """The routes of one algorithm that are trained; frozen parameters are left out."""
        return tuple(r for r in self.routes if r.algorithm == algorithm and not r.frozen)

    def totals(self) -> dict[str, dict[str, float]]:
        """Parameters, matrices, elements and share of all elements for "muon", "adamw" and "frozen"."""
        everything = sum(r.elements for r in self.routes)
        frozen = tuple(r for r in self.routes if r.frozen)
        parts = {"muon": self.select("muon"), "adamw": self.select("adamw"), "frozen": frozen}
        return {
            name: {
                "parameters": len(routes),
                "matrices": sum(g.count for r in routes for g in r.matrices()) if name == "muon" else 0,
                "elements": sum(r.elements for r in routes),
                "share": sum(r.elements for r in routes) / everything if everything else 0.0,
            }
            for name, routes in parts.items()
        }

    def to_json(self) -> dict[str, Any]:
        """The table as plain data (dicts, lists, strings, numbers), for the run folder."""
        rows = [{**asdict(r), "matrices": [asdict(g) for g in r.matrices()]} for r in self.routes]
        return json.loads(json.dumps({"routes": rows, "totals": self.totals()}))  # tuples become lists

    def render(self) -> str:
        """A plain-text table, one line for each parameter, then the totals."""
        rows = [("parameter", "shape", "algorithm", "matrices", "reason")]
        for r in self.routes:
            reason = r.reason if not r.aliases else f"{r.reason}; tied with {', '.join(r.aliases)}"
            groups = " + ".join(f"{g.count} x ({g.rows}, {g.columns})" for g in r.matrices())
            kind, matrices = ("frozen", "-") if r.frozen else (r.algorithm, groups or "-")
            rows.append((r.fqn, _shape_text(r.shape), kind, matrices, reason))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join((*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[4])) for row in rows]
        for name, total in self.totals().items():
            if total["parameters"] or name == "muon":
                matrices = f"{total['matrices']:,} matrices, " if name == "muon" else ""
                share = f"{total['elements']:,} elements ({total['share']:.1%})"
                lines.append(f"{name}: {total['parameters']:,} parameters, {matrices}{share}")
        return "\n".join(lines)


def logical_shape(p: torch.Tensor) -> tuple[int, ...]:
    """The shape of the whole parameter.

    DeepSpeed's `zero.Init` partitions a parameter before anyone sees it and leaves the shape (0,); the whole shape
    is then in `ds_shape`. A DTensor reports its global shape by itself.
    """
    return tuple(int(n) for n in getattr(p, "ds_shape", p.shape))


@dataclass(frozen=True)
class _Use:
    """One place in the module tree where a parameter is registered."""

    fqn: str
    module: nn.Module
    attribute: str


def _uses(model: nn.Module) -> list[tuple[nn.Parameter, list[_Use]]]:
    found: dict[int, tuple[nn.Parameter, list[_Use]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                fqn = f"{prefix}.{attribute}" if prefix else attribute
                found.setdefault(id(parameter), (parameter, []))[1].append(_Use(fqn, module, attribute))
    return list(found.values())


def _modules_offered(model: nn.Module, method: str) -> Iterator[nn.Module]:
    """What each submodule's `method()` returns (Hugging Face models, also when wrapped), None left out."""
    for module in model.modules():
        if callable(offer := getattr(module, method, None)):
            with contextlib.suppress(NotImplementedError, AttributeError):  # backbones without a text embedding
                if isinstance(offered := offer(), nn.Module):
                    yield offered


def _weight_ids(modules: Iterator[nn.Module] | Sequence[nn.Module]) -> set[int]:
    return {id(m.weight) for m in modules if isinstance(getattr(m, "weight", None), nn.Parameter)}


def embedding_weights(model: nn.Module) -> set[int]:
    """`id()` of the weights of every embedding module, and of what `get_input_embeddings()` returns."""
    tables = [m for m in model.modules() if isinstance(m, _EMBEDDINGS)]
    return _weight_ids([*tables, *_modules_offered(model, "get_input_embeddings")])


def output_head(model: nn.Module) -> set[int]:
    """`id()` of the weight of the output head, if the model has one (a set, since some models have several).

    It is what `get_output_embeddings()` returns where the model, or a module inside it, offers that. Otherwise it is
    the `nn.Linear` whose (out, in) equals (num_embeddings, embedding_dim) of an embedding of the model: the one with
    most rows (a vocabulary is larger than a table of positions), and the last of these in module order.
    """
    offered = _weight_ids(_modules_offered(model, "get_output_embeddings"))
    if offered:
        return offered
    tables = {logical_shape(m.weight) for m in model.modules() if isinstance(m, _EMBEDDINGS)}
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and logical_shape(m.weight) in tables]
    largest = max(reversed(heads), key=lambda m: logical_shape(m.weight)[0], default=None)
    return _weight_ids([largest] if largest is not None else [])


def _is_transposed(use: _Use, shape: tuple[int, ...]) -> bool:
    """transformers' Conv1D keeps (in, out); its fused experts say so themselves (`is_transposed`, gpt-oss, Aria)."""
    if len(shape) == 2:
        return use.attribute == "weight" and any(c.__name__ == "Conv1D" for c in type(use.module).__mro__)
    return len(shape) == 3 and getattr(use.module, "is_transposed", False) is True


def _logical_matrix(shape: tuple[int, ...], transposed: bool) -> tuple[int, int, int]:
    """(batch, outputs, inputs) of a parameter; four axes or more are read as (out, everything else)."""
    if len(shape) > 3:
        return 1, shape[0], math.prod(shape[1:])
    batch = shape[0] if len(shape) == 3 else 1
    outputs, inputs = (shape[-1], shape[-2]) if transposed else (shape[-2], shape[-1])
    return batch, outputs, inputs


def _default(uses: list[_Use], shape: tuple[int, ...], embedding: bool, head: bool) -> tuple[Algorithm, str, bool]:
    """(algorithm, reason, decay) by module type, logical shape and identity."""
    modules = [u.module for u in uses]
    if len(shape) < 2:
        return "adamw", "a vector (one axis)" if shape else "a scalar", False
    if embedding or head:
        return "adamw", "embedding" if embedding else "output head", True
    if any(isinstance(m, _NORMS) for m in modules):
        return "adamw", f"normalisation ({type(modules[0]).__name__})", False
    if len(shape) > 3 or any(isinstance(m, _CONVOLUTIONS) for m in modules):
        return "adamw", f"convolution or more than three axes ({type(modules[0]).__name__})", True
    if len(shape) == 3 and shape[0] == 1:
        return "adamw", "three axes, but a batch of one: no experts", True
    if len(shape) == 3:
        return "muon", f"batch of {shape[0]} matrices", True
    # gpt-oss keeps one bias vector for each expert, (E, out), beside the (E, in, out) weight of the same module
    stacked = {s[0] for p in modules[0]._parameters.values() if p is not None and len(s := logical_shape(p)) == 3}
    if shape[0] in stacked:
        return "adamw", f"{shape[0]} vectors, one for each expert", False
    if 1 in shape:
        return "adamw", "a vector (one side is 1)", True
    return "muon", "matrix", True


class _Rules:
    """Compiled patterns that remember which of them matched something."""

    def __init__(self, what: str, rules: Sequence[Any]) -> None:
        self.what = what
        self.rules = rules
        self.patterns: list[re.Pattern[str]] = []
        self.matched = [False] * len(rules)
        for rule in rules:
            try:
                self.patterns.append(re.compile(rule.pattern))
            except re.error as error:
                raise RoutingError(f"{what} {rule.pattern!r} is not a valid regular expression: {error}") from None

    def _hit(self, index: int, names: Sequence[str]) -> bool:
        fullmatch = self.patterns[index].fullmatch
        return any(fullmatch(n) or fullmatch(n.removesuffix(".weight")) for n in names)

    def last(self, names: Sequence[str]) -> Any | None:
        """The last rule that matches one of the names of a parameter; all that match count as used."""
        found = None
        for index, rule in enumerate(self.rules):
            if self._hit(index, names):
                self.matched[index], found = True, rule
        return found

    def check_all_used(self, routes: Sequence[Route]) -> None:
        """Raise RoutingError for the first rule that matched nothing it can act on."""
        names = [n for r in routes for n in (r.fqn, *r.aliases)]
        for index, rule in enumerate(self.rules):
            if self.matched[index]:
                continue
            idle = ", ".join([n for n in names if self._hit(index, [n])][:3])
            if idle:
                raise RoutingError(f"{self.what} {rule.pattern!r} matches only parameters that go to AdamW: {idle}")
            raise RoutingError(
                f"{self.what} {rule.pattern!r} matches no parameter (the whole name must match, with or without "
                f"'.weight'); the closest name is {_closest(rule.pattern, names)}"
            )


def _closest(pattern: str, names: Sequence[str]) -> str:
    """The name of which an end part (`q_proj`, `self_attn.q_proj`, ...) is most like the pattern."""
    plain = re.sub(r"\\(.)|[.^$*+?()]+", r"\1", pattern)

    def likeness(name: str) -> float:
        parts = name.removesuffix(".weight").split(".")
        ends = ("".join(parts[start:]) for start in range(len(parts)))
        return max(difflib.SequenceMatcher(None, end, plain).ratio() for end in ends)

    return max(names, key=likeness, default="none: the model has no parameters")


def _make_split(rule: SplitRule, fqn: str, shape: tuple[int, ...], transposed: bool) -> Split:
    outputs = _logical_matrix(shape, transposed)[1]
    axis = f"the output axis of {fqn} {_shape_text(shape)}, which has {outputs} rows"
    if rule.heads is not None and outputs % rule.heads:
        raise RoutingError(f"split {rule.pattern!r}: heads = {rule.heads} does not divide {axis}")
    if rule.sizes is not None and sum(rule.sizes) != outputs:
        raise RoutingError(f"split {rule.pattern!r}: the sizes add up to {sum(rule.sizes)}, unlike {axis}")
    return Split(rule.heads, None if rule.sizes is None else tuple(rule.sizes))


def _check_rules(overrides: Sequence[Override], splits: Sequence[SplitRule]) -> None:
    for override in overrides:
        if override.algorithm not in ("muon", "adamw"):
            raise RoutingError(f"override {override.pattern!r}: algorithm {override.algorithm!r} is not muon or adamw")
    for rule in splits:
        if (rule.heads is None) == (rule.sizes is None):
            raise RoutingError(f"split {rule.pattern!r} needs exactly one of heads and sizes")
        numbers = [rule.heads] if rule.heads is not None else list(rule.sizes or ())
        if not numbers or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
            raise RoutingError(f"split {rule.pattern!r}: heads and sizes are whole numbers of at least 1")


def _shape_text(shape: tuple[int, ...]) -> str:
    return f"({', '.join(str(n) for n in shape)})"


def _refuse_muon(uses: list[_Use], shape: tuple[int, ...]) -> str | None:
    """Why a parameter cannot go to Muon although an override says so, or None."""
    name = f"{uses[0].fqn} {_shape_text(shape)}"
    if len(shape) < 2:
        return f"{name} has fewer than two axes and cannot go to muon: Muon orthogonalizes matrices"
    if len(shape) == 3 and any(isinstance(u.module, _CONVOLUTIONS) for u in uses):
        return f"{name} is the kernel of a {type(uses[0].module).__name__}, not a batch of matrices: leave it to adamw"
    return None


def route(model: nn.Module, overrides: Sequence[Override] = (), splits: Sequence[SplitRule] = ()) -> RoutingTable:
    """Decide for every parameter of `model` whether Muon or AdamW trains it.

    To AdamW: embeddings and the output head (`output_head`), normalisation, everything with fewer than two axes or
    with a side of 1, one-vector-per-expert biases, convolutions and four axes or more. To Muon: the other matrices
    (M, N), and (E, M, N) with E > 1 as E matrices. Overrides come last; `splits` cut Muon parameters only.

    Raises RoutingError for a pattern that is malformed or matches nothing, a split that does not fit, a parameter of
    fewer than two axes sent to Muon, a parameter of no elements and unknown logical shape, and when no trained
    parameter reaches Muon.
    """
    _check_rules(overrides, splits)
    found = _uses(model)
    embeddings = embedding_weights(model)
    heads = output_head(model)
    sent, cuts = _Rules("override", overrides), _Rules("split", splits)

    routes: list[Route] = []
    refused: list[str] = []
    for parameter, uses in found:
        names = [u.fqn for u in uses]
        shape = logical_shape(parameter)
        if math.prod(shape) == 0 and parameter.requires_grad:
            raise RoutingError(
                f"{names[0]} has shape {_shape_text(shape)} and no ds_shape: route the model before it is partitioned"
            )
        algorithm, reason, decay = _default(uses, shape, id(parameter) in embeddings, id(parameter) in heads)
        override = sent.last(names)
        if override is not None:
            algorithm, reason = override.algorithm, f"override {override.pattern!r}"
        problem = _refuse_muon(uses, shape) if algorithm == "muon" else None
        if problem is not None:
            refused.append(problem)
            algorithm, reason = "adamw", f"REFUSED: {reason} to muon"
        transposed = _is_transposed(uses[0], shape)
        rule = cuts.last(names) if algorithm == "muon" else None
        split = None if rule is None else _make_split(rule, names[0], shape, transposed)
        frozen, aliases = not parameter.requires_grad, tuple(names[1:])
        routes.append(Route(names[0], shape, algorithm, reason, transposed, split, decay, aliases, frozen))

    table = RoutingTable(tuple(routes))
    sent.check_all_used(routes)
    cuts.check_all_used(routes)
    if refused:
        raise RoutingError("\n".join([*refused, table.render()]))
    if not table.select("muon"):
        raise RoutingError(
            "no parameter reaches Muon: train with AdamW (optimizer.name=adamw) or route a matrix to muon with an "
            f"override\n{table.render()}"
        )
    return table

"""Derives the role of a parameter, its algorithm and a possible doubt from the evidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from muon_dist.routing.evidence import Evidence
from muon_dist.routing.model import Use, is_transposed, kind_of, logical_shape
from muon_dist.routing.table import Algorithm

Role = Literal[
    "matrix",
    "experts",
    "router",
    "adapter",
    "head",
    "table",
    "input",
    "norm",
    "convolution",
    "vector",
    "state",
    "unknown",
]
# Uses of a weight other than a product with an activation, in words. The first match is the reason.
_OTHER_USES = {
    "convolution": "a convolution's kernel",
    "indexed product": "its rows are looked up",
    "tensor product": "a product over several axes, not a batch of matrices",
    "factor": "it multiplies another weight",
    "written": "its rows are written into another tensor",
    "input": "it is used as an activation",
    "added": "it is added and multiplies no input",
    "scaled": "it multiplies element by element",
    "returned": "its module returns it, and it multiplies no input",
}


@dataclass(frozen=True)
class Decision:
    """The algorithm, role and reason of a parameter, whether AdamW decays it, and the doubt ("" if none)."""

    algorithm: Algorithm
    role: Role
    reason: str
    decay: bool = True
    doubt: str = ""
    transposed: bool = False


def decide(key: int, uses: list[Use], shape: tuple[int, ...], evidence: Evidence) -> Decision:
    """The default decision for the parameter with `id()` key, registered at `uses`."""
    kinds = {kind_of(u) for u in uses}
    if len(shape) < 2:
        gain = "norm" in kinds
        return Decision("adamw", "norm" if gain else "vector", "a vector (one axis)" if shape else "a scalar", False)
    doubt = ""
    if key in evidence.same_memory:
        doubt = f"it shares its memory with {evidence.same_memory[key]}, so both are stepped: tie the Parameter itself"
    if key in evidence.tables:
        role: Role = "input" if key in evidence.inputs else "table"
        role = "convolution" if "convolution" in kinds else role
        return Decision("adamw", role, "embedding", doubt=doubt)
    if key in evidence.heads:
        return Decision("adamw", "head", evidence.heads[key], doubt=doubt)
    if key in evidence.guessed:
        doubt = doubt or "no source says so: it has the shape of an embedding"
        return Decision("adamw", "head", "output head", doubt=doubt)
    if "norm" in kinds:
        return Decision("adamw", "norm", f"normalisation ({type(uses[0].owner).__name__})", False)
    if "convolution" in kinds or len(shape) > 3:
        reason = f"convolution or more than three axes ({type(uses[0].owner).__name__})"
        return Decision("adamw", "convolution", reason, doubt=doubt)
    return _by_use(key, uses, shape, evidence, doubt)


def _by_use(key: int, uses: list[Use], shape: tuple[int, ...], evidence: Evidence, doubt: str) -> Decision:
    done = evidence.done.get(key, set())
    known = any(kind_of(u) == "matrix" for u in uses)
    if len(shape) == 3 and shape[0] == 1:
        return Decision("adamw", "state", "three axes, but a batch of one: no experts", known, doubt)
    if len(shape) == 2 and shape[0] in _stacks(uses[0].module):
        return Decision("adamw", "vector", f"{shape[0]} vectors, one per expert", False, doubt)
    if 1 in shape:
        return Decision("adamw", "vector", "a vector (one side is 1)", known, doubt)
    if len(shape) == 2 and done & {"row", "embedding"}:
        # a token table, as in nn.Embedding, or a table of position biases: only a token table is decayed
        tokens = bool(done & {"embedding", "product"})
        return Decision("adamw", "table", "an index selects its rows", tokens, doubt)
    if known or "product" in done or (len(shape) == 3 and "indexed product" in done):
        return _matrix(key, uses, shape, evidence, doubt)
    for use, reason in _OTHER_USES.items():
        if use in done:
            role: Role = "adapter" if use == "factor" else "convolution" if use == "convolution" else "state"
            return Decision("adamw", role, reason, use == "convolution", doubt)
    passed = sorted(d for d in done if d.startswith("passed"))
    reason = f"{passed[0]}, whose source shows no more" if passed else "no source shows what it does"
    missing = "no evidence that it multiplies an input"
    return Decision("adamw", "unknown", reason, False, doubt or missing)


def _matrix(key: int, uses: list[Use], shape: tuple[int, ...], evidence: Evidence, doubt: str) -> Decision:
    """The decision for a matrix or a batch of matrices; transposed if `forward` multiplies it inputs first."""
    done = evidence.done.get(key, set())
    orders = done & {"inputs first", "outputs first"}
    known = any(kind_of(u) == "matrix" for u in uses)
    transposed = is_transposed(uses[0], shape) or (not known and orders == {"inputs first"})
    role: Role = "experts" if len(shape) == 3 else "matrix"
    reason = f"batch of {shape[0]} matrices" if len(shape) == 3 else "matrix"
    if key in evidence.low_rank:
        role, reason = "adapter", "low-rank factor next to a frozen weight"
    elif key in evidence.routers:
        role, reason = "router", "matrix (its output selects experts)"
    doubt = doubt or evidence.finals.get(key, "")
    return Decision("muon", role, reason, True, doubt, transposed)


def _stacks(module: nn.Module) -> set[int]:
    """The first sizes E of a module's three-axis parameters.

    In gpt-oss a module has one bias vector per expert, (E, out), next to the (E, in, out) weight.
    """
    shapes = (logical_shape(p) for p in module._parameters.values() if p is not None)
    return {s[0] for s in shapes if len(s) == 3 and s[0] > 1}

"""The result of routing: the algorithm of each parameter, and the reason."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

from muon_dist.json_files import strict

Algorithm = Literal["muon", "adamw"]
Axis = Literal["outputs", "inputs"]


@dataclass(frozen=True)
class Split:
    """The split of one parameter into matrices; exactly one of heads, sizes and from_model is set.

    heads: number of equal blocks. sizes: sizes of the blocks (fused QKV, fused gate and up). axis: the axis to split;
    for an attention's output projection the heads are along the inputs. from_model: use the model's attention heads
    (`heads.blocks_of`); never set in a route.
    """

    heads: int | None = None
    sizes: tuple[int, ...] | None = None
    axis: Axis = "outputs"
    from_model: bool = False

    def cut(self) -> dict[str, Any]:
        """The arguments of `layout.cut_parameter`."""
        return {"heads": self.heads, "sizes": self.sizes, "axis": self.axis}


@dataclass(frozen=True)
class GroupOptions:
    """The options from the entry of `groups` that matched a parameter; see `GroupRule`."""

    pattern: str
    options: Mapping[str, Any]

    def __str__(self) -> str:
        return f"group {self.pattern!r}: {', '.join(f'{k} {v}' for k, v in self.options.items())}"


@dataclass(frozen=True)
class MatrixGroup:
    """`count` matrices of one shape; rows are outputs and columns are inputs, even if the parameter is transposed."""

    count: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Route:
    """The algorithm that trains one parameter, and the reason.

    shape: the stored logical shape. transposed: stored (in, out), or (E, in, out), instead of (out, in).
    aliases: the other FQNs of the same (tied) tensor. A frozen parameter is listed but not trained.
    group: options from the matching entry of `groups`.
    role: "matrix", "experts", "router", "adapter" for Muon; "head", "table", "input", "norm", "convolution",
    "vector", "state" (only added, scaled or used as input) or "unknown" for AdamW. doubt: text of the doubt, or "".
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
    group: GroupOptions | None = None
    role: str = ""
    doubt: str = ""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def matrices(self) -> tuple[MatrixGroup, ...]:
        """The matrices that Muon orthogonalizes separately, in order along the split axis; () under AdamW.

        (M, N) is one matrix, (E, M, N) is a batch of E, and four axes or more are read as (out, all others).
        """
        if self.algorithm != "muon":
            return ()
        batch, outputs, inputs = logical_matrix(self.shape, self.transposed)
        split = self.split or Split(heads=1)
        length = outputs if split.axis == "outputs" else inputs
        sizes = split.sizes or (length // (split.heads or 1),) * (split.heads or 1)
        shapes = [(size, inputs) if split.axis == "outputs" else (outputs, size) for size in sizes]
        return tuple(MatrixGroup(batch * len(list(run)), *shape) for shape, run in itertools.groupby(shapes))


@dataclass(frozen=True)
class RoutingTable:
    """The route of every parameter, in the order of `model.named_parameters()`, tied weights once."""

    routes: tuple[Route, ...]

    def select(self, algorithm: Algorithm) -> tuple[Route, ...]:
        """The routes of one algorithm, without frozen parameters."""
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
        return cast("dict[str, Any]", strict({"routes": rows, "totals": self.totals()}))

    def render(self) -> str:
        """A plain-text table: one line per parameter, then the totals."""
        rows = [("parameter", "shape", "algorithm", "matrices", "reason")]
        for r in self.routes:
            reason = r.reason if not r.aliases else f"{r.reason}; tied with {', '.join(r.aliases)}"
            reason = reason if r.group is None else f"{reason}; {r.group}"
            reason += f"; DOUBT: {r.doubt}" if r.doubt else ""
            groups = " + ".join(f"{g.count} x ({g.rows}, {g.columns})" for g in r.matrices())
            kind, matrices = ("frozen", "-") if r.frozen else (r.algorithm, groups or "-")
            rows.append((r.fqn, shape_text(r.shape), kind, matrices, reason))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join((*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[4])) for row in rows]
        for name, total in self.totals().items():
            if total["parameters"] or name == "muon":
                matrices = f"{total['matrices']:,} matrices, " if name == "muon" else ""
                share = f"{total['elements']:,} elements ({total['share']:.1%})"
                lines.append(f"{name}: {total['parameters']:,} parameters, {matrices}{share}")
        return "\n".join(lines)


def logical_matrix(shape: tuple[int, ...], transposed: bool) -> tuple[int, int, int]:
    """(batch, outputs, inputs) of a parameter; four axes or more are read as (out, all others)."""
    if len(shape) > 3:
        return 1, shape[0], math.prod(shape[1:])
    batch = shape[0] if len(shape) == 3 else 1
    outputs, inputs = (shape[-1], shape[-2]) if transposed else (shape[-2], shape[-1])
    return batch, outputs, inputs


def shape_text(shape: tuple[int, ...]) -> str:
    return f"({', '.join(str(n) for n in shape)})"

"""Which parameter goes to Muon, which to AdamW.

The decision rests on what a weight does: the type of the module that holds it, ties, and what the source of the
forward does with it (`evidence.py`), never on its name: names lie. Users correct it with `Override` and cut fused
matrices with `SplitRule`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from muon_dist.errors import RoutingError
from muon_dist.routing.evidence import gather
from muon_dist.routing.folded import FoldedTable, fold
from muon_dist.routing.model import CONVOLUTIONS, Use, is_transposed, logical_shape, offered
from muon_dist.routing.roles import decide
from muon_dist.routing.rules import Override, Rules, SplitRule, check_rules, make_split
from muon_dist.routing.table import Route, RoutingTable, shape_text


def _refuse_muon(uses: list[Use], shape: tuple[int, ...]) -> str | None:
    """Why a parameter cannot go to Muon although an override says so, or None."""
    name = f"{uses[0].fqn} {shape_text(shape)}"
    if len(shape) < 2:
        return f"{name} has fewer than two axes and cannot go to muon: Muon orthogonalizes matrices"
    if len(shape) == 3 and any(isinstance(u.module, CONVOLUTIONS) for u in uses):
        return f"{name} is the kernel of a {type(uses[0].module).__name__}, not a batch of matrices: leave it to adamw"
    return None


def embedding_weights(model: nn.Module) -> set[int]:
    """`id()` of the weights that are embedding tables: token, position and other tables of rows."""
    return gather(model).tables


def output_head(model: nn.Module) -> set[int]:
    """`id()` of the weights of the output heads: a language model's, tied or not, and classifiers'.

    The evidence: `get_output_embeddings()`, or a projection whose output goes into the loss, is the logits, or is the
    model's. Where no source can be followed, a projection with the shape of an embedding table counts.
    """
    evidence = gather(model)
    tied = {id(m.weight) for m in offered(model, "get_output_embeddings") if isinstance(m.weight, nn.Parameter)}
    return {*evidence.heads, *evidence.guessed, *tied}


def routing_table(
    model: nn.Module, overrides: Sequence[Override] = (), splits: Sequence[SplitRule] = ()
) -> FoldedTable:
    """Where each parameter of `model` goes and why: one row for all layers that are alike, doubtful rows first.

        print(muon_dist.routing_table(model))

    Args:
        model: on any device, also on the meta device. It is not run.
        overrides, splits: as for `muon_dist.param_groups`.

    Returns:
        `FoldedRow`s with `pattern` (`model.layers.{0-79}.mlp.up_proj.weight`), `shape`, `algorithm`, `role`, `reason`
        and `doubt` ("" where nothing is in doubt, else what is, and the line that settles it).

    Raises:
        RoutingError: a pattern is malformed or matches nothing, or a rule does not fit.
    """
    return fold(_table(model, overrides, splits))


def route(model: nn.Module, overrides: Sequence[Override] = (), splits: Sequence[SplitRule] = ()) -> RoutingTable:
    """Decide for every parameter of `model` whether Muon or AdamW trains it.

    To Muon: what is a matrix by its module's type, or multiplies an input in the source of the forward; (E, M, N) with
    E > 1 as E matrices. To AdamW: embedding tables, output heads, normalisation, convolutions and four axes or more,
    everything with fewer than two axes or with a side of 1, and whatever is only added, looked up or multiplied
    element by element. Overrides come last; `splits` cut Muon parameters only.

    Raises RoutingError for a pattern that is malformed or matches nothing, a split that does not fit, a parameter of
    fewer than two axes sent to Muon, a parameter of no elements and unknown logical shape, and when no trained
    parameter reaches Muon.
    """
    table = _table(model, overrides, splits)
    if not table.select("muon"):
        raise RoutingError(
            "no parameter reaches Muon: train with AdamW (optimizer.name=adamw) or route a matrix to muon with an "
            f"override\n{table.render()}"
        )
    return table


def _table(model: nn.Module, overrides: Sequence[Override], splits: Sequence[SplitRule]) -> RoutingTable:
    check_rules(overrides, splits)
    evidence = gather(model)
    sent, cuts = Rules("override", overrides), Rules("split", splits)

    routes: list[Route] = []
    refused: list[str] = []
    for parameter, uses in evidence.found:
        names = [u.fqn for u in uses]
        shape = logical_shape(parameter)
        if math.prod(shape) == 0 and parameter.requires_grad:
            raise RoutingError(
                f"{names[0]} has shape {shape_text(shape)} and no ds_shape: route the model before it is partitioned"
            )
        default = decide(id(parameter), uses, shape, evidence)
        algorithm, reason, doubt = default.algorithm, default.reason, default.doubt
        override = sent.last(names)
        if override is not None:
            algorithm, reason, doubt = override.algorithm, f"override {override.pattern!r}", ""
        problem = _refuse_muon(uses, shape) if algorithm == "muon" else None
        if problem is not None:
            refused.append(problem)
            algorithm, reason = "adamw", f"REFUSED: {reason} to muon"
        transposed = default.transposed or is_transposed(uses[0], shape)
        rule = cuts.last(names) if algorithm == "muon" else None
        split = None if rule is None else make_split(rule, names[0], shape, transposed)
        frozen, aliases = not parameter.requires_grad, tuple(names[1:])
        routes.append(
            Route(
                names[0],
                shape,
                algorithm,
                reason,
                transposed,
                split,
                default.decay,
                aliases,
                frozen,
                default.role,
                "" if frozen else doubt,
            )
        )

    table = RoutingTable(tuple(routes))
    sent.check_all_used(routes)
    cuts.check_all_used(routes)
    if refused:
        raise RoutingError("\n".join([*refused, table.render()]))
    return table

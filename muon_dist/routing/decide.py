"""Decides which parameters Muon trains and which AdamW.

The decision rests on what a weight does: the type of the module that holds it, ties, and what the source of the
forward does with it (`evidence.py`), never on its name: names lie. Users correct it, cut fused matrices and give
options by name (`GroupRule`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from muon_dist.errors import RoutingError
from muon_dist.routing.evidence import gather
from muon_dist.routing.heads import blocks_of
from muon_dist.routing.model import CONVOLUTIONS, Use, is_transposed, logical_shape, offered
from muon_dist.routing.roles import decide
from muon_dist.routing.rules import GroupRule, Override, Rules, SplitRule, make_split
from muon_dist.routing.table import GroupOptions, Route, RoutingTable, shape_text


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


def route(
    model: nn.Module,
    overrides: Sequence[Override] = (),
    splits: Sequence[SplitRule] = (),
    groups: Sequence[GroupRule] = (),
) -> RoutingTable:
    """Decide for every parameter of `model` whether Muon or AdamW trains it.

    To Muon: what is a matrix by its module's type, or multiplies an input in the source of the forward; (E, M, N) with
    E > 1 as E matrices. To AdamW: embedding tables, output heads, normalisation, convolutions and four axes or more,
    everything with fewer than two axes or with a side of 1, and whatever is only added, looked up or multiplied
    element by element. What `groups`, `overrides` and `splits` say by name decides before that, in this order; splits
    cut Muon parameters only.

    Raises RoutingError for a pattern that is malformed, matches nothing or never wins, a split that does not fit, a
    parameter of fewer than two axes sent to Muon, a parameter of no elements and unknown logical shape, and when no
    trained parameter reaches Muon.
    """
    table = table_of(model, overrides, splits, groups)
    if not table.select("muon"):
        raise RoutingError(
            "no parameter reaches Muon: train with AdamW (optimizer.name=adamw) or route a matrix to muon with an "
            f"override\n{table.render()}"
        )
    return table


def table_of(
    model: nn.Module,
    overrides: Sequence[Override] = (),
    splits: Sequence[SplitRule] = (),
    groups: Sequence[GroupRule] = (),
) -> RoutingTable:
    """`route` of a model that may have nothing for Muon."""
    rules = Rules(groups, overrides, splits)
    evidence = gather(model)
    blocks = blocks_of(model) if rules.asks_model else {}

    routes: list[Route] = []
    refused: list[str] = []
    for parameter, uses in evidence.found:
        names = [u.fqn for u in uses]
        shape = logical_shape(parameter)
        if math.prod(shape) == 0 and parameter.requires_grad:
            raise RoutingError(
                f"{names[0]} has shape {shape_text(shape)} and no ds_shape: a count or width of the model is 0, or "
                "the model was partitioned (ZeRO-3) before it was routed"
            )
        default = decide(id(parameter), uses, shape, evidence)
        algorithm, reason, doubt = default.algorithm, default.reason, default.doubt
        chosen = rules.choose(names)
        if chosen.sender is not None and chosen.sender.algorithm is not None:
            algorithm, reason, doubt = chosen.sender.algorithm, str(chosen.sender), ""
        problem = _refuse_muon(uses, shape) if algorithm == "muon" else None
        if problem is not None:
            refused.append(problem)
            algorithm, reason = "adamw", f"REFUSED: {reason} to muon"
        transposed = default.transposed or is_transposed(uses[0], shape)
        cutter = chosen.cutter if algorithm == "muon" else None
        own = blocks.get(id(parameter))
        split = None if cutter is None else make_split(cutter, names[0], shape, transposed, own)
        frozen, aliases = not parameter.requires_grad, tuple(names[1:])
        group = None if chosen.group is None else GroupOptions(chosen.group.pattern, chosen.group.options)
        routes.append(
            Route(
                names[0], shape, algorithm, reason, transposed, split, default.decay, aliases, frozen, group,
                default.role, "" if frozen else doubt,
            )
        )  # fmt: skip

    table = RoutingTable(tuple(routes))
    if refused:
        raise RoutingError("\n".join([*refused, table.render()]))
    rules.check_all_used(routes)
    return table

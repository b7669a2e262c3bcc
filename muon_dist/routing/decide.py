"""Decides which parameters Muon trains and which AdamW.

The decision uses the type of the weight's module, ties, and the operations on the weight in the source of `forward`
(`evidence.py`). It never uses names, because names can mislead. Users can correct decisions, split fused matrices and
set options by name (`GroupRule`).
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
    """The reason why a parameter cannot go to Muon, even by an override; None if it can."""
    name = f"{uses[0].fqn} {shape_text(shape)}"
    if len(shape) < 2:
        return f"{name} has fewer than two axes and cannot go to muon: Muon orthogonalizes matrices"
    if len(shape) == 3 and any(isinstance(u.module, CONVOLUTIONS) for u in uses):
        return f"{name} is the kernel of a {type(uses[0].module).__name__}, not a batch of matrices: use adamw for it"
    return None


def embedding_weights(model: nn.Module) -> set[int]:
    """`id()` of all embedding tables: token, position and other tables of rows."""
    return gather(model).tables


def output_head(model: nn.Module) -> set[int]:
    """`id()` of the weights of all output heads: of language models, tied or not, and of classifiers.

    A head is the result of `get_output_embeddings()`, or a projection whose output is the input of the loss, the
    logits or the model's output. If the source cannot be followed, a projection with the shape of an embedding table
    counts as the head.
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
    """The routing table of `model`: for every parameter, whether Muon or AdamW trains it.

    To Muon: weights that are matrices by their module's type, or that multiply an input in the source of `forward`;
    (E, M, N) with E > 1 as E matrices. To AdamW: embedding tables, output heads, normalisation, convolutions, weights
    with four axes or more, with fewer than two axes or with a side of 1, and weights that are only added, looked up or
    multiplied element by element. `groups`, `overrides` and `splits` decide before these rules, in this order, by
    name. Splits apply only to Muon's parameters.

    Raises RoutingError for a pattern that is malformed, matches nothing or never wins, a split that does not fit, a
    parameter with fewer than two axes sent to Muon, a parameter without elements and with unknown logical shape, and
    if no trained parameter goes to Muon.
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
    """`route`, but the model need not have a parameter for Muon."""
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

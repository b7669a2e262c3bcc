"""Which parameter goes to Muon, which to AdamW.

The decision rests on the type of the module that holds the parameter, on its logical shape and on identity (tied
weights), never on its name: names lie. Users correct it, cut fused matrices and give options by name (`GroupRule`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from muon_dist.errors import RoutingError
from muon_dist.routing.model import (
    CONVOLUTIONS,
    NORMS,
    Use,
    embedding_weights,
    is_transposed,
    logical_shape,
    output_head,
    uses_of,
)
from muon_dist.routing.rules import GroupRule, Override, Rules, SplitRule, make_split
from muon_dist.routing.table import Algorithm, GroupOptions, Route, RoutingTable, shape_text


def _default(uses: list[Use], shape: tuple[int, ...], embedding: bool, head: bool) -> tuple[Algorithm, str, bool]:
    """(algorithm, reason, decay) by module type, logical shape and identity."""
    modules = [u.module for u in uses]
    if len(shape) < 2:
        return "adamw", "a vector (one axis)" if shape else "a scalar", False
    if embedding or head:
        return "adamw", "embedding" if embedding else "output head", True
    if any(isinstance(m, NORMS) for m in modules):
        return "adamw", f"normalisation ({type(modules[0]).__name__})", False
    if len(shape) > 3 or any(isinstance(m, CONVOLUTIONS) for m in modules):
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


def _refuse_muon(uses: list[Use], shape: tuple[int, ...]) -> str | None:
    """Why a parameter cannot go to Muon although an override says so, or None."""
    name = f"{uses[0].fqn} {shape_text(shape)}"
    if len(shape) < 2:
        return f"{name} has fewer than two axes and cannot go to muon: Muon orthogonalizes matrices"
    if len(shape) == 3 and any(isinstance(u.module, CONVOLUTIONS) for u in uses):
        return f"{name} is the kernel of a {type(uses[0].module).__name__}, not a batch of matrices: leave it to adamw"
    return None


def route(
    model: nn.Module,
    overrides: Sequence[Override] = (),
    splits: Sequence[SplitRule] = (),
    groups: Sequence[GroupRule] = (),
) -> RoutingTable:
    """Decide for every parameter of `model` whether Muon or AdamW trains it.

    To AdamW: embeddings and the output head (`output_head`), normalisation, everything with fewer than two axes or
    with a side of 1, one-vector-per-expert biases, convolutions and four axes or more. To Muon: the other matrices
    (M, N), and (E, M, N) with E > 1 as E matrices. What `groups`, `overrides` and `splits` say by name decides
    before that, in this order; splits cut Muon parameters only.

    Raises RoutingError for a pattern that is malformed, matches nothing or never wins, a split that does not fit, a
    parameter of fewer than two axes sent to Muon, a parameter of no elements and unknown logical shape, and when no
    trained parameter reaches Muon.
    """
    rules = Rules(groups, overrides, splits)
    found = uses_of(model)
    embeddings = embedding_weights(model)
    heads = output_head(model)

    routes: list[Route] = []
    refused: list[str] = []
    for parameter, uses in found:
        names = [u.fqn for u in uses]
        shape = logical_shape(parameter)
        if math.prod(shape) == 0 and parameter.requires_grad:
            raise RoutingError(
                f"{names[0]} has shape {shape_text(shape)} and no ds_shape: a count or width of the model is 0, or "
                "the model was partitioned (ZeRO-3) before it was routed"
            )
        algorithm, reason, decay = _default(uses, shape, id(parameter) in embeddings, id(parameter) in heads)
        chosen = rules.choose(names)
        if chosen.sender is not None and chosen.sender.algorithm is not None:
            algorithm, reason = chosen.sender.algorithm, str(chosen.sender)
        problem = _refuse_muon(uses, shape) if algorithm == "muon" else None
        if problem is not None:
            refused.append(problem)
            algorithm, reason = "adamw", f"REFUSED: {reason} to muon"
        transposed = is_transposed(uses[0], shape)
        cutter = chosen.cutter if algorithm == "muon" else None
        split = None if cutter is None else make_split(cutter, names[0], shape, transposed)
        frozen, aliases = not parameter.requires_grad, tuple(names[1:])
        group = None if chosen.group is None else GroupOptions(chosen.group.pattern, chosen.group.options)
        routes.append(Route(names[0], shape, algorithm, reason, transposed, split, decay, aliases, frozen, group))

    table = RoutingTable(tuple(routes))
    if refused:
        raise RoutingError("\n".join([*refused, table.render()]))
    rules.check_all_used(routes)
    if not table.select("muon"):
        raise RoutingError(
            "no parameter reaches Muon: train with AdamW (optimizer.name=adamw) or route a matrix to muon with an "
            f"override\n{table.render()}"
        )
    return table

"""Evidence of what each parameter does: from module types, ties, model methods, and the source of `forward`."""

from __future__ import annotations

import collections
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from muon_dist.routing.model import Kind, Use, kind_of, logical_shape, offered, storage_of, uses_of
from muon_dist.routing.origins import EACH, Path, Reading, resolve
from muon_dist.routing.source import own_forward, read

Kinds = dict[int, set[Kind | None]]
Ending = Literal["loss", "logits", "feature", "returned", "summed", "summed loss"]
# torch modules that only change shapes or values, and so may follow a head
_SHAPED = (nn.Dropout, nn.Identity, nn.Flatten, nn.Unflatten)


@dataclass
class Evidence:
    """The evidence about the parameters of a model, by `id()` of the parameter.

    found: every parameter with its places of registration. done: its uses in the source (`effects.Effects`).
    tables: embedding tables. inputs: the tables that are matrices and that `get_input_embeddings()` returns.
    heads: output heads, with the evidence. guessed: heads known only by their shape.
    finals: projections whose output leaves the model, without evidence that they are heads.
    routers: weights whose output selects experts. low_rank: factors of a low-rank product next to a frozen weight.
    same_memory: parameter -> another parameter with the same memory.
    """

    found: list[tuple[nn.Parameter, list[Use]]]
    done: dict[int, set[str]] = field(default_factory=lambda: collections.defaultdict(set))
    tables: set[int] = field(default_factory=set)
    inputs: set[int] = field(default_factory=set)
    heads: dict[int, str] = field(default_factory=dict)
    guessed: set[int] = field(default_factory=set)
    finals: dict[int, str] = field(default_factory=dict)
    routers: set[int] = field(default_factory=set)
    low_rank: set[int] = field(default_factory=set)
    same_memory: dict[int, str] = field(default_factory=dict)


def gather(model: nn.Module) -> Evidence:
    """All evidence about `model`, without running it."""
    evidence = Evidence(uses_of(model))
    readings = _Readings(model)
    readings.fill(evidence)
    kinds = {id(p): {kind_of(u) for u in uses} for p, uses in evidence.found}
    evidence.tables = {key for key, k in kinds.items() if "table" in k}
    first = _weights_below(offered(model, "get_input_embeddings"))
    evidence.inputs = {key for key in first - evidence.tables if kinds.get(key) == {"matrix"}}
    evidence.tables |= first
    for key in _weights_below(offered(model, "get_output_embeddings")):
        evidence.heads[key] = "output head"
    _follow_output(model, evidence, readings, kinds)
    _join_same_memory(evidence)
    return evidence


class _Readings:
    """The readings of a model's modules; modules with equal structure share one reading."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.signatures: dict[int, int] = {}
        self.known: dict[tuple[object, ...], int] = {}
        self.read: dict[int, Reading] = {}

    def of(self, module: nn.Module) -> Reading:
        signature = self._signature(module)
        if signature not in self.read:
            self.read[signature] = read(module)
        return self.read[signature]

    def _signature(self, module: nn.Module) -> int:
        if id(module) not in self.signatures:
            children = tuple((n, self._signature(c)) for n, c in module._modules.items() if c is not None)
            key = (type(module), children, tuple(n for n, p in module._parameters.items() if p is not None))
            self.signatures[id(module)] = self.known.setdefault(key, len(self.known))
        return self.signatures[id(module)]

    def fill(self, evidence: Evidence) -> None:
        """Record the uses of each parameter in the source, the routers, and the low-rank factors."""
        for module in self.model.modules():
            reading = self.of(module)
            for path, kinds in reading.uses.items():
                for key in _parameter_ids(module, path):
                    evidence.done[key] |= kinds
            for path, marks in reading.marks.items():
                if "topk" in marks:
                    evidence.routers.update(_parameter_ids(module, path))
            evidence.low_rank |= _low_rank_factors(module, reading)


def projections(module: nn.Module) -> dict[str, nn.Module]:
    """The direct submodules of a module that have one matrix as weight, by name."""
    found = {}
    for name, child in module.named_children():
        weight = getattr(child, "weight", None)
        if isinstance(weight, nn.Parameter) and len(logical_shape(weight)) == 2:
            if kind_of(Use(name, child, "weight", child, "weight")) == "matrix":
                found[name] = child
    return found


def _parameter_ids(module: nn.Module, path: Path) -> set[int]:
    """`id()` of the parameter at `path`, of a parametrized weight's originals, or of the weight of a projection."""
    return {id(p) for p in _parameters_at(module, path)}


def _parameters_at(module: nn.Module, path: Path) -> list[nn.Parameter]:
    found: list[nn.Parameter] = []
    for item in resolve(module, path):
        if isinstance(item, nn.Parameter):
            found.append(item)
        elif isinstance(item, nn.Module):
            originals = [
                p for n, p in item._parameters.items() if p is not None and n.startswith(("original", "weight"))
            ]
            wrapped = item._modules.get("parametrizations")
            if isinstance(wrapped, nn.ModuleDict) and "weight" in wrapped:
                originals += list(wrapped["weight"]._parameters.values())  # type: ignore[arg-type]
            found += originals
    return found


def _low_rank_factors(module: nn.Module, reading: Reading) -> set[int]:
    """`id()` of two consecutive projections (in -> rank -> out), if their module has a frozen (out, in) weight too."""
    factors: set[int] = set()
    frozen = {s for p in module.parameters() if not p.requires_grad and len(s := logical_shape(p)) == 2}
    if not frozen:
        return factors
    for first, takers in reading.passed_on.items():
        for second in takers - {first}:
            for a in _parameters_at(module, first):
                for b in _parameters_at(module, second):
                    sizes = {*logical_shape(a)} if len(logical_shape(a)) == 2 == len(logical_shape(b)) else set()
                    rank = min(sizes & {*logical_shape(b)}, default=0)
                    whole = sizes | {*logical_shape(b)} - {rank}
                    if rank and any({*shape} <= whole and rank < min(shape) for shape in frozen):
                        factors |= {id(p) for p in (a, b) if p.requires_grad}
    return factors


def _weights_below(modules: object) -> set[int]:
    """`id()` of the weights of modules, or of the leaves inside a wrapper (PEFT) that replaces a module."""
    found: set[int] = set()
    for module in modules:  # type: ignore[attr-defined]
        own = [p for p in _parameters_at(module, ()) if len(logical_shape(p)) > 1]
        if not own:
            leaves = [p for p in module.parameters() if len(logical_shape(p)) == 2]
            largest = max((logical_shape(p) for p in leaves), default=None, key=lambda s: s[0] * s[1])
            own = [p for p in leaves if logical_shape(p) == largest]
        found |= {id(p) for p in own}
    return found


# The end of the forward ----------------------------------------------------------------------------------------------


def _follow_output(model: nn.Module, evidence: Evidence, readings: _Readings, kinds: Kinds) -> None:
    root = _unwrap(model)
    ends: dict[int, Ending] = {}
    followed = _ends(root, "returned", readings, ends, set())
    shapes = {id(p): logical_shape(p) for p, _ in evidence.found}
    for key, ending in ends.items():
        shape = shapes.get(key, ())
        picked = evidence.done[key] & {"row", "embedding"} or (key in evidence.routers and ending != "loss")
        if len(shape) != 2 or key in evidence.tables or key in evidence.heads or picked:
            continue
        if ending in ("loss", "logits"):
            evidence.heads[key] = f"output head (its output is the {'logits' if ending == 'logits' else 'loss'})"
        elif ending in ("returned", "summed loss") and shape[0] != shape[1] and not isinstance(root, nn.Linear):
            evidence.heads[key] = "output head (its output is the model's)"
        else:
            evidence.finals[key] = "its output leaves the model, and nothing says that it is a head"
    if not followed and not evidence.heads:
        _guess_head(evidence, kinds, shapes)


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside wrappers (DDP, torch.compile, ...): torch modules with a single child."""
    while own_forward(model) is None and not isinstance(model, nn.Sequential) and not model._parameters:
        children = [c for c in model.children() if next(c.parameters(), None) is not None]
        if len(children) != 1:
            break
        model = children[0]
    return model


def _ends(module: nn.Module, how: Ending, readings: _Readings, ends: dict[int, Ending], seen: set[int]) -> bool:
    """Collect into `ends` the projections whose output `module` returns; return whether its source can be followed."""
    if id(module) in seen:
        return True
    seen.add(id(module))
    weights = _parameters_at(module, ())
    if own_forward(module) is None:
        if isinstance(module, nn.Sequential):
            behind = [m for m in module if next(m.parameters(), None) is not None]
            return _ends(behind[-1], how, readings, ends, seen) if behind else False
        if isinstance(module, nn.Linear):
            ends.update({id(p): how for p in weights})
        return type(module).forward is not nn.Module.forward
    reading = readings.of(module)
    if weights and isinstance(module, nn.Linear):
        ends.update({id(p): how for p in weights})
        return True
    for kind, path, ending in _produced(module, reading, how, outermost=len(seen) == 1):
        if any(taker[: len(path)] != path for taker in reading.passed_on.get(path, ())):
            continue  # the output goes to another module
        if kind == "mul":
            ends.update({key: ending for key in _parameter_ids(module, path)})
            continue
        found = [m for m in resolve(module, path) if isinstance(m, nn.Module)]
        for child in found[-1:] if EACH in path and path in reading.passed_on.get(path, set()) else found:
            _ends(child, ending, readings, ends, seen)
    return bool(reading.returned)


def _produced(module: nn.Module, reading: Reading, how: Ending, outermost: bool) -> set[tuple[str, Path, Ending]]:
    """(kind, path, ending) of values that leave a module: returned values, and inputs of a loss.

    A residual block returns a sum, so except in the outermost module the terms of a sum are not heads.
    """
    found: set[tuple[str, Path, Ending]] = set()
    for o in reading.returned:
        if o.kind in ("out", "mul") and (outermost or not o.summed):
            found.add((o.kind, o.path, _ending(reading.marks.get(o.path, set()), "summed" if o.summed else how)))
    for path, marks in reading.marks.items():
        if marks & {"loss", "logits", "summed loss", "summed logits"}:
            kind = "mul" if any(isinstance(r, nn.Parameter) for r in resolve(module, path)) else "out"
            found.add((kind, path, _ending(marks, how)))
    return found


def _ending(marks: set[str], otherwise: Ending) -> Ending:
    known: tuple[Ending, ...] = ("loss", "logits", "summed loss", "feature")
    if "summed logits" in marks:
        marks = marks | {"summed loss"}
    return next((ending for ending in known if ending in marks), otherwise)


def _guess_head(evidence: Evidence, kinds: Kinds, shapes: dict[int, tuple[int, ...]]) -> None:
    """Guess the head, with a doubt, if no source shows what the model returns: a projection in an embedding's shape.

    It uses the table with the most rows, because a vocabulary is larger than a table of positions, and the last such
    projection.
    """
    tables = {shapes[key] for key in evidence.tables if key in shapes}
    order = [id(p) for p, _ in evidence.found if "matrix" in kinds[id(p)] and id(p) not in evidence.tables]
    alike = [key for key in order if shapes[key] in tables]
    if alike:
        evidence.guessed.add(max(reversed(alike), key=lambda key: shapes[key][0]))
    elif tables and order and "product" not in evidence.done[order[-1]]:
        evidence.finals[order[-1]] = "it is the last projection, and no source shows where its output goes"


def _join_same_memory(evidence: Evidence) -> None:
    """Share roles between different parameters with the same memory (`head.weight.data = embed.weight.data`)."""
    groups: dict[tuple[int, int, int], list[tuple[int, str]]] = collections.defaultdict(list)
    for p, uses in evidence.found:
        if (storage := storage_of(p)) is not None:
            groups[storage].append((id(p), uses[0].fqn))
    for group in groups.values():
        keys = {key for key, _ in group}
        if len(keys) < 2:
            continue
        for (key, _), (_, other) in zip(group, [*group[1:], group[0]], strict=True):
            evidence.same_memory[key] = other
        if keys & evidence.tables:
            evidence.tables |= keys
        elif heads := keys & evidence.heads.keys():
            evidence.heads.update(dict.fromkeys(keys, evidence.heads[min(heads)]))

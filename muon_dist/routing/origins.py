"""Origins of values in the source of a module, and the results of reading the source."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

Path = tuple[str, ...]
EACH, ANY = "*", "?"  # a step into a container: all children, or one child selected by an index
CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True)
class Origin:
    """The origin of a value.

    kind: "ref" is the parameter or module at `path` itself, "out" the result of the module at `path`, "mul" a product
    with the parameter at `path`, "input" an activation from outside.
    row: it was indexed. turned: it was transposed an odd number of times. summed: another activation was added to it,
    or multiplied with it element by element.
    """

    kind: Literal["ref", "out", "mul", "input"]
    path: Path = ()
    row: bool = False
    turned: bool = False
    summed: bool = False


Value = frozenset[Origin]
NOTHING: Value = frozenset()
INPUT: Value = frozenset({Origin("input")})


@dataclass
class Reading:
    """The results from the source of one module. Paths start at this module.

    uses: parameter -> its uses (`Effects`).
    passed_on: producer -> the submodules and parameters that get its output as input.
    marks: producer -> uses of its output: "loss", "logits", "feature", "topk".
    returned: the origins of the values that `forward` returns.
    """

    uses: dict[Path, set[str]] = field(default_factory=dict)
    passed_on: dict[Path, set[Path]] = field(default_factory=dict)
    marks: dict[Path, set[str]] = field(default_factory=dict)
    returned: set[Origin] = field(default_factory=set)


def step(owner: Any, name: str) -> list[Any]:
    """The children of a module at one step of a path. A parametrized weight is its `ParametrizationList`."""
    if not isinstance(owner, nn.Module):
        return []
    if name in (EACH, ANY):
        return [c for c in (*owner._modules.values(), *owner._parameters.values()) if c is not None]
    found: Any = owner._modules.get(name)
    if found is None:
        found = owner._parameters.get(name)
    if found is None and "parametrizations" in owner._modules:
        found = owner._modules["parametrizations"]._modules.get(name)  # type: ignore[union-attr]
    return [] if found is None else [found]


def resolve(owner: nn.Module, path: Path) -> list[Any]:
    """The modules and parameters that a path leads to."""
    found: list[Any] = [owner]
    for name in path:
        found = [child for f in found for child in step(f, name)]
    return found


def is_parametrization(module: Any) -> bool:
    """True for the list with which torch.nn.utils.parametrize replaces a weight."""
    return isinstance(module, nn.utils.parametrize.ParametrizationList)


def activations(value: Value) -> Value:
    """The value's origins that are activations, without parameters and modules."""
    return frozenset(o for o in value if o.kind != "ref")

"""The effects of operations on values with known origins; records them in a `Reading`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import nn

from muon_dist.routing import operations as ops
from muon_dist.routing.model import logical_shape
from muon_dist.routing.origins import (
    ANY,
    CONTAINERS,
    EACH,
    INPUT,
    NOTHING,
    Origin,
    Path,
    Reading,
    Value,
    activations,
    is_parametrization,
    resolve,
    step,
)


class Effects:
    """The operations of one module's source.

    It records these uses: "product" (a matrix times an activation) with "inputs first" or "outputs first" as the order
    of axes, "factor" (times another parameter), "embedding" (`F.embedding`), "row" (an index selects a part), "indexed
    product" (this part is multiplied), "tensor product" (an einsum that is not a batch of matrices), "added",
    "scaled", "input" (used as an activation), "written", "convolution", "returned", and "passed to NAME" for an
    unknown operation.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.reading = Reading()

    def is_parameter(self, origin: Origin) -> bool:
        """True if the origin is a parameter itself, parametrized or not."""
        if origin.kind != "ref" or not origin.path:
            return False
        found = resolve(self.module, origin.path)
        return bool(found) and not any(isinstance(f, nn.Module) and not is_parametrization(f) for f in found)

    def parameters(self, value: Value) -> list[Origin]:
        return [o for o in value if self.is_parameter(o)]

    def modules(self, value: Value) -> list[Origin]:
        return [o for o in value if o.kind == "ref" and o.path and not self.is_parameter(o)]

    def _axes(self, origin: Origin) -> int:
        found = resolve(self.module, origin.path)[0]
        weight = found if isinstance(found, nn.Parameter) else next(iter(found._parameters.values()))
        return len(logical_shape(weight))

    def use(self, origin: Origin, kind: str) -> None:
        self.reading.uses.setdefault(origin.path, set()).add(kind)

    def note(self, value: Value, kind: str) -> None:
        for origin in self.parameters(value):
            self.use(origin, kind)

    def mark(self, value: Value, kind: str) -> None:
        for origin in value:
            if origin.kind in ("out", "mul"):
                self.reading.marks.setdefault(origin.path, set()).add(f"summed {kind}" if origin.summed else kind)

    def consume(self, value: Value, taker: Path) -> None:
        for origin in value:
            if origin.kind in ("out", "mul"):
                self.reading.passed_on.setdefault(origin.path, set()).add(taker)

    def index(self, value: Value, key: str, by: Value = NOTHING) -> Value:
        """The value after indexing: a child of a container, or rows of a parameter; any other value is unchanged.

        If an activation selects rows of a two-axis parameter (a token table), the rows are activations.
        """
        found: set[Origin] = set()
        for origin in value:
            if self.is_parameter(origin):
                picked = bool(activations(by)) and self._axes(origin) == 2
                found.add(Origin("mul", origin.path) if picked else replace(origin, row=True))
                self.use(origin, "row")
            elif origin.kind != "ref":
                found.add(origin)
            else:
                owners = [m for m in resolve(self.module, origin.path) if isinstance(m, CONTAINERS)]
                known = key in (EACH, ANY) or any(step(m, key) for m in owners)
                found |= {Origin("ref", (*origin.path, key if known else ANY))} if owners else set()
        return frozenset(found)

    # Arithmetic -------------------------------------------------------------------------------------------------

    def multiply(self, left: Value, right: Value, outputs_first: bool = False) -> Value:
        """A matrix product. outputs_first: the right operand is (out, in), as in `F.linear`; otherwise (in, out)."""
        products: set[Origin] = set()
        for side, other, inputs_first in ((right, left, not outputs_first), (left, right, False)):
            for origin in self.parameters(side):
                if other and not activations(other):
                    self.use(origin, "factor")
                    products.add(origin)
                    continue
                self.use(origin, "indexed product" if origin.row else "product")
                self.use(origin, "inputs first" if inputs_first != origin.turned else "outputs first")
                self.consume(other, origin.path)
                products.add(Origin("mul", origin.path))
        return frozenset(products) or (INPUT if left or right else NOTHING)

    def einsum(self, equation: str | None, operands: Sequence[Value]) -> Value:
        products: set[Origin] = set()
        everything = NOTHING.union(*operands)
        for position, operand in enumerate(operands):
            for origin in self.parameters(operand):
                summed, inputs_first, matrices = (
                    ops.contraction(equation, position) if equation else (True, None, True)
                )
                if not activations(everything):
                    self.use(origin, "factor")
                    products.add(origin)
                    continue
                kind = "indexed product" if origin.row else "product" if matrices else "tensor product"
                self.use(origin, kind if summed else "scaled")
                if inputs_first is not None:
                    self.use(origin, "inputs first" if inputs_first != origin.turned else "outputs first")
                if summed:
                    self.consume(everything, origin.path)
                    products.add(Origin("mul", origin.path))
        return frozenset(products) or (INPUT if everything else NOTHING)

    def elementwise(self, values: Iterable[Value], kind: str) -> Value:
        """The value of an elementwise sum or product. Records the use of each parameter that meets an activation."""
        values = [v for v in values if v]
        active = [v for v in values if activations(v)]
        if not active:
            return NOTHING.union(*values)
        for value in values:
            self.note(value, kind)
        streams = {activations(v) for v in active}
        produced = {v for v in streams if any(o.kind in ("out", "mul") for o in v)}
        if len(streams) == 1 or (kind == "scaled" and len(produced) == 1):  # a mask, or a division by its own norm
            return next(iter(produced or streams))
        return frozenset(replace(o, summed=True) for o in NOTHING.union(*streams))

    # Calls ------------------------------------------------------------------------------------------------------

    def operation(self, name: str, args: Sequence[Value], named: dict[str, Value]) -> Value:
        """The value of a call of a torch function, or of a function without readable source, by its name."""
        plain = name.removesuffix("_") if not name.startswith("_") else name
        values = [*args, *named.values()]
        if plain in ops.NO_VALUES or not values:
            return NOTHING
        if plain == "linear" and len(values) > 1:
            weight = named.get("weight", args[1] if len(args) > 1 else NOTHING)
            self.note(NOTHING.union(*[*args[2:], named.get("bias", NOTHING)]), "added")
            return self.multiply(named.get("input", args[0] if args else NOTHING), weight, outputs_first=True)
        if plain in ops.PRODUCTS and len(values) > 1:
            return self.multiply(values[0], values[1])
        if plain in ops.ADDED_PRODUCTS and len(values) > 2:
            return self.elementwise([values[0], self.multiply(values[1], values[2])], "added")
        if plain in ops.LOOKUPS:
            self.note(NOTHING.union(*values), "embedding" if plain.startswith("embedding") else "row")
            return frozenset(Origin("mul", o.path) for o in self.parameters(NOTHING.union(*values))) or INPUT
        if plain in ops.WRITES:
            self.note(NOTHING.union(*values[1:]), "written")
            return values[0] | activations(NOTHING.union(*values[1:]))
        if plain in ops.TURNS:
            return frozenset(replace(o, turned=not o.turned) if o.kind == "ref" else o for o in values[0])
        if plain in ops.ADDS or plain in ops.SCALES:
            return self.elementwise(values, "added" if plain in ops.ADDS else "scaled")
        return self._other(plain, values)

    def _other(self, name: str, values: Sequence[Value]) -> Value:
        everything = NOTHING.union(*values)
        if name in ops.FIRST_ALONE:
            return values[0]
        if ops.is_loss(name):
            self.mark(everything, "loss")
            return NOTHING
        if name in ops.CHOICES:
            self.mark(everything, "logits")
        if name == "topk":
            self.mark(everything, "topk")
        active = activations(everything)
        if not active:
            return everything
        joined = name in ops.JOINS
        kind = "input" if joined else "convolution" if ops.is_convolution(name) else f"passed to {name}"
        self.note(everything, kind)
        return active

    def call_module(self, origin: Origin, args: Value) -> Value:
        """The value that the module at `origin` returns for arguments with these origins."""
        found = [m for m in resolve(self.module, origin.path) if isinstance(m, nn.Module)]
        if all(next(m.parameters(), None) is None for m in found):
            return self._without_weights(found, args)
        self.note(args, "input")
        self.consume(args, origin.path)
        return frozenset({Origin("out", origin.path)})

    def _without_weights(self, found: list[nn.Module], args: Value) -> Value:
        if any(isinstance(m, nn.modules.loss._Loss) for m in found):
            self.mark(args, "loss")
            return NOTHING
        if any(isinstance(m, (nn.Softmax, nn.LogSoftmax, nn.Sigmoid)) for m in found):
            self.mark(args, "logits")
        return activations(args) or args

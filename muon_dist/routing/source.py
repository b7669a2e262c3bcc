"""Reads how a module's `forward` uses its parameters and submodules, without running it.

`read(module)` walks the syntax tree of `forward` and of the functions that it calls, and computes the set of origins
of each expression (`origins.py`). It joins branches and reads loops twice. If source is missing or cannot be followed,
the result contains less.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import textwrap
import types
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from muon_dist.routing import operations as ops
from muon_dist.routing.effects import Effects
from muon_dist.routing.origins import (
    ANY,
    EACH,
    INPUT,
    NOTHING,
    Origin,
    Reading,
    Value,
    activations,
    resolve,
    step,
)

_MAX_DEPTH = 6
_SELF: Value = frozenset({Origin("ref")})


def read(module: nn.Module) -> Reading:
    """The `Reading` of a module's source; empty for torch's own modules and for modules without source."""
    reader = _Reader(Effects(module))
    function = own_forward(module)
    if function is not None:
        names = _names(function)
        returned = reader.run(function, {n: INPUT for n in names[1:]} | {names[0]: _SELF})
        reader.effects.note(returned, "returned")
        reader.effects.reading.returned |= returned
    return reader.effects.reading


def own_forward(module: nn.Module) -> types.FunctionType | None:
    """The function of `forward`, without decorators; None if it belongs to torch or its source is not available."""
    function = inspect.unwrap(type(module).forward)
    return function if _readable(function) else None


def _readable(function: Any) -> bool:
    ours = isinstance(function, types.FunctionType) and not str(function.__module__ or "").startswith("torch.")
    return ours and _tree(function) is not None


@functools.lru_cache(maxsize=8192)
def _tree(function: types.FunctionType) -> ast.FunctionDef | None:
    """The syntax tree of a function, or None if its source is not available."""
    try:
        node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError, ValueError):
        return None
    return node if isinstance(node, ast.FunctionDef) else None


def _names(function: types.FunctionType) -> list[str]:
    """The names of all parameters of a function; the first is `self` for a method."""
    tree = _tree(function)
    assert tree is not None
    a = tree.args
    rest = [a.vararg, a.kwarg]
    return [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs, *(r for r in rest if r is not None))]


class _Reader(ast.NodeVisitor):
    """Reads functions. `env` has the origins of the local names of the current function."""

    def __init__(self, effects: Effects) -> None:
        self.effects = effects
        self.module = effects.module
        self.env: dict[str, Value] = {}
        self.results: Value = NOTHING
        self.stack: list[types.FunctionType] = []

    def run(self, function: types.FunctionType, bound: Mapping[str, Value]) -> Value:
        """The origins of the result of `function` for arguments with these origins."""
        tree = _tree(function)
        if tree is None or function in self.stack or len(self.stack) >= _MAX_DEPTH:
            return activations(NOTHING.union(*bound.values()))
        saved = self.env, self.results
        self.env, self.results = dict(bound), NOTHING
        self.stack.append(function)
        for statement in tree.body:
            self.visit(statement)
        results = self.results
        self.stack.pop()
        self.env, self.results = saved
        return results

    # Statements -------------------------------------------------------------------------------------------------

    def generic_visit(self, node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.value(child)
            else:
                self.visit(child)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """A closure, for instance for gradient checkpointing: its value is the value that it returns."""
        saved, self.results = self.results, NOTHING
        for statement in node.body:
            self.visit(statement)
        self.env[node.name] = self.results
        self.results = saved

    def visit_Return(self, node: ast.Return) -> None:
        self.results |= self.value(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            pairs = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
            if pairs and len(target.elts) == len(node.value.elts):  # type: ignore[attr-defined]
                values = [self.value(v) for v in node.value.elts]  # type: ignore[attr-defined]
                for element, value in zip(target.elts, values, strict=True):  # type: ignore[attr-defined]
                    self.bind(element, value)
            else:
                self.bind(target, self.value(node.value))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.bind(node.target, self.value(node.value))

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.bind(node.target, self._binary(node.op, self.value(node.target), self.value(node.value)))

    def visit_For(self, node: ast.For) -> None:
        for _ in range(2):  # one round's results are the next round's inputs
            self.iterate(node.target, node.iter)
            for statement in (*node.body, *node.orelse):
                self.visit(statement)

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            self.value(item.context_expr)
        for statement in node.body:
            self.visit(statement)

    def visit_If(self, node: ast.If) -> None:
        self.value(node.test)
        before = dict(self.env)
        for statement in node.body:
            self.visit(statement)
        taken, self.env = self.env, before
        for statement in node.orelse:
            self.visit(statement)
        self.env = {n: taken.get(n, NOTHING) | self.env.get(n, NOTHING) for n in {*taken, *self.env}}

    def iterate(self, target: ast.expr, over: ast.expr) -> None:
        """Bind the target of a loop, also one over enumerate, zip, items or values."""
        if isinstance(over, ast.Call) and isinstance(target, ast.Tuple):
            name = getattr(over.func, "id", getattr(over.func, "attr", ""))
            if name in ("enumerate", "items") and len(target.elts) == 2:
                inner = over.args[0] if name == "enumerate" else over.func.value  # type: ignore[attr-defined]
                return self.iterate(target.elts[1], inner)
            if name == "zip" and len(target.elts) == len(over.args):
                for element, source in zip(target.elts, over.args, strict=True):
                    self.iterate(element, source)
                return None
        return self.bind(target, self.effects.index(self.value(over), EACH))

    def bind(self, target: ast.expr, value: Value) -> None:
        if isinstance(target, ast.Name):
            self.env[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            for element in target.elts:
                self.bind(element, value)
        elif isinstance(target, ast.Starred):
            self.bind(target.value, value)
        elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):  # outputs.pooled = value
            if activations(held := self.env.get(target.value.id, NOTHING)):
                self.env[target.value.id] = held | activations(value)
        elif isinstance(target, ast.Subscript):  # x[mask] = value
            self.effects.note(value, "written")
            if isinstance(target.value, ast.Name):
                self.env[target.value.id] = self.env.get(target.value.id, NOTHING) | activations(value)

    # Expressions ------------------------------------------------------------------------------------------------

    def value(self, node: ast.AST | None) -> Value:
        """The origins of an expression."""
        if node is None or isinstance(node, ast.Constant):
            return NOTHING
        handler = getattr(self, f"value_{type(node).__name__}", None)
        if handler is not None:
            return handler(node)
        parts = [self.value(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
        return NOTHING.union(*parts)

    def value_Name(self, node: ast.Name) -> Value:
        return self.env.get(node.id, NOTHING)

    def value_NamedExpr(self, node: ast.NamedExpr) -> Value:
        value = self.value(node.value)
        self.bind(node.target, value)
        return value

    def value_Lambda(self, node: ast.Lambda) -> Value:
        return self.value(node.body)

    def value_Compare(self, node: ast.Compare) -> Value:
        self.generic_visit(node)
        return NOTHING

    def value_IfExp(self, node: ast.IfExp) -> Value:
        self.value(node.test)
        return self.value(node.body) | self.value(node.orelse)

    def value_Dict(self, node: ast.Dict) -> Value:
        values = [self.value(v) for v in node.values]
        for key, value in zip(node.keys, values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                self.effects.mark(value, ops.field_mark(key.value))
        return NOTHING.union(*values)

    def _comprehension(self, node: Any) -> Value:
        for generator in node.generators:
            self.iterate(generator.target, generator.iter)
        parts = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        return NOTHING.union(*(self.value(part) for part in parts))

    value_ListComp = value_SetComp = value_GeneratorExp = value_DictComp = _comprehension

    def value_BinOp(self, node: ast.BinOp) -> Value:
        return self._binary(node.op, self.value(node.left), self.value(node.right))

    def _binary(self, op: ast.operator, left: Value, right: Value) -> Value:
        if isinstance(op, ast.MatMult):
            return self.effects.multiply(left, right)
        kind = "added" if isinstance(op, (ast.Add, ast.Sub)) else "scaled"
        return self.effects.elementwise([left, right], kind)

    def value_Subscript(self, node: ast.Subscript) -> Value:
        by = self.value(node.slice)
        whole = self.value(node.value)
        if isinstance(node.slice, ast.Constant) and node.slice.value is not None and node.slice.value is not Ellipsis:
            return self.effects.index(whole, str(node.slice.value))
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        plain = all(isinstance(p, ast.Slice) or (isinstance(p, ast.Constant) and p.value is None) for p in parts)
        return whole if plain else self.effects.index(whole, ANY, by)

    def value_Attribute(self, node: ast.Attribute) -> Value:
        found: set[Origin] = set()
        if node.attr in ops.NO_VALUE_ATTRIBUTES:
            self.value(node.value)
            return NOTHING
        for origin in self.value(node.value):
            if origin.kind == "ref" and node.attr in ("T", "mT", "H", "mH"):
                found.add(replace(origin, turned=not origin.turned))
            elif origin.kind != "ref" or self.effects.is_parameter(origin):
                found.add(origin)
            else:
                found |= self._attribute(origin, node.attr)
        return frozenset(found)

    def _attribute(self, origin: Origin, name: str) -> Value:
        """Attribute of a module: a child, a parameter, the result of a property, its forward, or nothing."""
        if name in ("__call__", "forward"):
            return frozenset({origin})
        owners = resolve(self.module, origin.path)
        if any(step(m, name) for m in owners):
            return frozenset({Origin("ref", (*origin.path, name))})
        member = self._member(origin, name)
        if isinstance(member, property) and _readable(member.fget):
            return self.run(member.fget, {_names(member.fget)[0]: frozenset({origin})})  # type: ignore[arg-type]
        return NOTHING

    def _member(self, origin: Origin, name: str) -> Any:
        """The member of a module's class with this name: a function, a property, ..."""
        owners = (m for m in resolve(self.module, origin.path) if isinstance(m, nn.Module))
        return next((inspect.getattr_static(type(m), name, None) for m in owners), None)

    # Calls ------------------------------------------------------------------------------------------------------

    def value_Call(self, node: ast.Call) -> Value:
        args = [self.value(a) for a in node.args]
        named = {k.arg or "": self.value(k.value) for k in node.keywords}
        everything = NOTHING.union(*args, *named.values())
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if isinstance(node.func, ast.Attribute):
            if isinstance(node.func.value, ast.Call) and getattr(node.func.value.func, "id", "") == "super":
                return self._parent(node, name, args, named)
            base = self.value(node.func.value)
            owners = [o for o in base if o.kind == "ref" and not self.effects.is_parameter(o)]
            if owners:
                return NOTHING.union(*(self._method(o, node, name, args, named) for o in owners))
            if base:
                return self._operation(node, name, [base, *args], named)
        callee = self.value(node.func)
        if modules := self.effects.modules(callee):
            return NOTHING.union(*(self._call_module(o, args, named) for o in modules))
        if callee and isinstance(node.func, ast.Name):  # a closure
            return callee
        target = self._global(node.func)
        if isinstance(target, type):
            for field, value in named.items():
                self.effects.mark(value, ops.field_mark(field))
            return everything
        if modules := self.effects.modules(everything):  # checkpoint(block, x)
            rest = frozenset(everything - set(modules))
            return NOTHING.union(*(self.effects.call_module(o, rest) for o in modules))
        return self._function(node, target, name, args, named)

    def _function(self, node: ast.Call, target: Any, name: str, args: list[Value], named: dict[str, Value]) -> Value:
        if name == "apply" and isinstance(getattr(target, "__self__", None), type):  # torch.autograd.Function
            target, args = target.__self__.forward, [NOTHING, *args]
        function: Any = inspect.unwrap(target) if callable(target) else None
        owner = self._global(node.func.value) if isinstance(node.func, ast.Attribute) else None
        if isinstance(owner, types.ModuleType) and owner.__name__.partition(".")[0] == "torch":
            function = None  # also if a framework has replaced it, as DeepSpeed replaces F.linear
        if not _readable(function) or not any((*args, *named.values())):
            return self._operation(node, name, args, named)
        if ops.is_loss(name):
            self.effects.mark(NOTHING.union(*args, *named.values()), "loss")
        return self.run(function, self._bound(function, args, named))

    def _operation(self, node: ast.Call, name: str, args: list[Value], named: dict[str, Value]) -> Value:
        constants = [a.value if isinstance(a, ast.Constant) else None for a in node.args]
        if name == "einsum":
            equation = constants[0] if constants and isinstance(constants[0], str) else None
            return self.effects.einsum(equation, args[1:])
        if name == "permute" and constants[-2:] in ([1, 0], [2, 1]):
            name = "transpose"
        return self.effects.operation(name, args, named)

    def _call_module(self, origin: Origin, args: list[Value], named: dict[str, Value]) -> Value:
        """The value of a call of a module. A module without weights is read as a function, if it has source."""
        found = [m for m in resolve(self.module, origin.path) if isinstance(m, nn.Module)]
        function = own_forward(found[0]) if found else None
        if function is not None and all(next(m.parameters(), None) is None for m in found):
            return self.run(function, self._bound(function, [frozenset({origin}), *args], named))
        returned = self.effects.call_module(origin, NOTHING.union(*args, *named.values()))
        if function is not None and any(p is not None for m in found for p in m._parameters.values()):
            # a module that only returns its weight (a table of positions) counts as that weight
            own = (o for o in read(found[0]).returned if o.kind == "ref" and o.path)
            returned |= {replace(o, path=(*origin.path, *o.path)) for o in own}
        return returned

    def _method(self, owner: Origin, node: ast.Call, name: str, args: list[Value], named: dict[str, Value]) -> Value:
        """The value of `owner.name(...)` for a module: a child, its forward, a method of its class, or unknown."""
        child = self._attribute(owner, name)
        if modules := self.effects.modules(child):
            return NOTHING.union(*(self._call_module(o, args, named) for o in modules))
        member = self._member(owner, name)
        function = inspect.unwrap(member) if isinstance(member, types.FunctionType) else None
        if _readable(function):
            return self.run(function, self._bound(function, [frozenset({owner}), *args], named))  # type: ignore[arg-type]
        if name in ("values", "items", "keys", "get", "children"):
            return self.effects.index(frozenset({owner}), ANY if name == "get" else EACH)
        return self._operation(node, name, args, named)

    def _parent(self, node: ast.Call, name: str, args: list[Value], named: dict[str, Value]) -> Value:
        """The value of `super().name(...)`: the method of the module's next class that has it."""
        classes = type(self.module).__mro__
        own = [vars(c).get(self.stack[-1].__name__) for c in classes]
        here = [i for i, f in enumerate(own) if callable(f) and inspect.unwrap(f) is self.stack[-1]]
        following = classes[here[0] + 1 :] if here else ()
        member = next((vars(c)[name] for c in following if name in vars(c)), None)
        function = inspect.unwrap(member) if isinstance(member, types.FunctionType) else None
        if _readable(function):
            return self.run(function, self._bound(function, [_SELF, *args], named))  # type: ignore[arg-type]
        if name == "forward" and isinstance(self.module, nn.Linear) and args:
            return self.effects.multiply(args[0], frozenset({Origin("ref", ("weight",))}), outputs_first=True)
        return self._operation(node, name, args, named)

    def _bound(self, function: types.FunctionType, args: list[Value], named: dict[str, Value]) -> dict[str, Value]:
        names = _names(function)
        bound = dict(zip(names, args, strict=False))
        for extra in args[len(names) :]:
            bound[names[-1]] = bound.get(names[-1], NOTHING) | extra
        for name, value in named.items():
            key = name if name in names else names[-1] if names else ""
            bound[key] = bound.get(key, NOTHING) | value
        return bound

    def _global(self, node: ast.expr) -> Any:
        """The object with this dotted name in the function's module, or None."""
        if isinstance(node, ast.Name):
            return self.stack[-1].__globals__.get(node.id, getattr(builtins, node.id, None)) if self.stack else None
        if isinstance(node, ast.Attribute):
            owner = self._global(node.value)
            return getattr(owner, node.attr, None) if isinstance(owner, (types.ModuleType, type)) else None
        return None

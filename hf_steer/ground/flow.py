"""What a method's source says of the parts of its module: which it calls, in which order, and what they are handed.

`self.projector(self.tower(pixels).last_hidden_state)` tells that the projector reads the tower, and which of its outputs. Nothing
is run, so that this costs the same on any device and for any size. What comes out of a branch or a loop is taken to be what may.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

RESHAPING = (
    "view",
    "reshape",
    "unflatten",
    "unfold",
    "permute",
    "transpose",
    "flatten",
    "cat",
    "stack",
    "concat",
    "split",
    "chunk",
)
"""Functions after which a feature may have another size; what else is done to features leaves it as it is."""
NUMBERS = ("shape", "size", "dim", "ndim", "numel", "device", "dtype", "tolist")
"""What a tensor tells of itself: none of its features."""


@dataclass(frozen=True)
class Came:
    """What a value is made of.

    Attributes:
        part: path, from the module, of the part that gave it; or `"="` and the name of an argument of the method.
        field: of the part's output; empty for the whole.
        reshaped: whether its features may have been joined or taken apart since.
        itself: the part, and not what it gives.
    """

    part: str
    field: str = ""
    reshaped: bool = False
    itself: bool = False


Value = frozenset[Came]
NOTHING: Value = frozenset()


@dataclass(frozen=True)
class Call:
    """One part's call: its path from the module, and what each of its arguments, by place or name, is made of."""

    part: str
    arguments: tuple[tuple[int | str, Value], ...]

    def reads(self, part: str) -> tuple[int | str, Came] | None:
        """The first argument that another part gives, and how."""
        return next(((at, came) for at, value in self.arguments for came in sorted(value, key=_order) if came.part == part), None)

    @property
    def parts(self) -> set[str]:
        """All that come into it."""
        return {came.part for _, value in self.arguments for came in value}


def _order(came: Came) -> tuple[bool, str]:
    return came.reshaped, came.field


@dataclass(frozen=True)
class Flow:
    """The calls of a module's own parts that a method's source holds, in their order, and what it gives back, by field."""

    calls: tuple[Call, ...]
    fields: Mapping[str, Value]


def follow(owner: nn.Module, method: str, arguments: Iterable[str] = ()) -> Flow:
    """What a module's method does with its parts.

    Args:
        owner: the module.
        method: its name.
        arguments: of the method, whose way is followed as well.
    """
    reader = _Reader(owner)
    reader.method(method, {name: frozenset({Came(f"={name}")}) for name in arguments})
    return Flow(tuple(reader.calls), reader.fields)


@cache
def _parsed(function: Callable[..., Any]) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):  # without its source nothing can be said of it
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


_METHODS: dict[tuple[type, str], Callable[..., Any] | None] = {}


def method_of(kind: type, name: str) -> Callable[..., Any] | None:
    """A method that a model's own class brings, without what is wrapped around it; None for those that all models have."""
    if (kind, name) not in _METHODS:
        _METHODS[kind, name] = _method_of(kind, name)
    return _METHODS[kind, name]


def _method_of(kind: type, name: str) -> Callable[..., Any] | None:
    for own in kind.__mro__:
        found = vars(own).get(name)
        if inspect.isfunction(found):
            return None if own.__module__.startswith(("torch.", "transformers.modeling_utils")) else inspect.unwrap(found)
    return None


class _Reader:
    """Goes through a method's statements, and notes what each name holds."""

    def __init__(self, owner: nn.Module) -> None:
        self.owner = owner
        self.calls: dict[Call, None] = {}
        self.running: list[str] = []
        self.fields: dict[str, Value] = {}

    def method(self, name: str, given: Mapping[str, Value]) -> Value:
        function = method_of(type(self.owner), name)
        tree = None if function is None or name in self.running else _parsed(function)
        if tree is None:
            return frozenset().union(*given.values()) if given else NOTHING
        self.running.append(name)
        names = dict(given)
        returned = self._block(tree.body, names, surely=True)
        self.running.pop()
        return returned

    def _block(self, statements: Iterable[ast.stmt], names: dict[str, Value], *, surely: bool) -> Value:
        returned = NOTHING
        for statement in statements:
            returned |= self._statement(statement, names, surely=surely)
        return returned

    def _statement(self, statement: ast.stmt, names: dict[str, Value], *, surely: bool) -> Value:
        if isinstance(statement, ast.Return):
            if len(self.running) == 1 and isinstance(statement.value, ast.Call):
                for own in statement.value.keywords:
                    self.fields[str(own.arg)] = self.fields.get(str(own.arg), NOTHING) | self.value(own.value, names)
            return self.value(statement.value, names)
        if isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            found = self.value(statement.value, names)
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for target in targets:
                self._assign(target, found, names, surely=surely and not isinstance(statement, ast.AugAssign))
        elif isinstance(statement, ast.Expr):
            found = self.value(statement.value, names)
            function = statement.value.func if isinstance(statement.value, ast.Call) else None
            if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id != "self":
                self._assign(function.value, found, names, surely=False)  # a list that grows
        elif isinstance(statement, (ast.For, ast.While)):
            if isinstance(statement, ast.For):
                self._assign(statement.target, self.value(statement.iter, names), names, surely=False)
            once = self._block(statement.body, names, surely=False)
            return once | self._block([*statement.body, *statement.orelse], names, surely=False)
        elif isinstance(statement, ast.If):
            self.value(statement.test, names)
            return self._block([*statement.body, *statement.orelse], names, surely=False)
        elif isinstance(statement, ast.With):
            return self._block(statement.body, names, surely=surely)
        elif isinstance(statement, ast.Try):
            return self._block([*statement.body, *statement.orelse, *statement.finalbody], names, surely=False)
        return NOTHING

    def _assign(self, target: ast.expr, found: Value, names: dict[str, Value], *, surely: bool) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            for each in target.elts:
                self._assign(each, found, names, surely=surely)
        elif isinstance(target, ast.Name):
            names[target.id] = found if surely else names.get(target.id, NOTHING) | found
        elif isinstance(target, (ast.Attribute, ast.Subscript, ast.Starred)):
            self._assign(target.value, found, names, surely=False)

    def value(self, node: ast.AST | None, names: dict[str, Value]) -> Value:
        """What an expression is made of."""
        if node is None or isinstance(node, (ast.Constant, ast.Compare)):
            return NOTHING
        if isinstance(node, ast.Name):
            return names.get(node.id, NOTHING)
        if isinstance(node, ast.Call):
            return self._called(node, names)
        if isinstance(node, ast.Attribute):
            return self._attribute(node, names)
        if isinstance(node, ast.Subscript):
            found = self.value(node.value, names)
            first = isinstance(node.slice, ast.Constant) and node.slice.value == 0
            return frozenset(Came(c.part, c.field or ("0" if first else ""), c.reshaped, c.itself) for c in found)
        if isinstance(node, (ast.ListComp, ast.GeneratorExp, ast.SetComp)):
            inner = dict(names)
            for generator in node.generators:
                self._assign(generator.target, self.value(generator.iter, inner), inner, surely=True)
            return self.value(node.elt, inner)
        if isinstance(node, ast.IfExp):
            return self.value(node.body, names) | self.value(node.orelse, names)
        return frozenset().union(*(self.value(child, names) for child in ast.iter_child_nodes(node)))

    def _attribute(self, node: ast.Attribute, names: dict[str, Value]) -> Value:
        path = _path(node)
        if path is not None:
            part, rest = self._part(path)
            return frozenset({Came(part, itself=True)}) if part and not rest else NOTHING
        if node.attr in NUMBERS:
            return NOTHING
        found = self.value(node.value, names)
        return frozenset(Came(c.part, c.field or node.attr, c.reshaped) for c in found if not c.itself)

    def _part(self, path: list[str]) -> tuple[str, list[str]]:
        """The longest beginning of a path that is a part of the module, and the rest."""
        module: Any = self.owner
        for depth, name in enumerate(path):
            inner = module._modules.get(name)
            if inner is None:
                return ".".join(path[:depth]), path[depth:]
            module = inner
        return ".".join(path), []

    def _called(self, node: ast.Call, names: dict[str, Value]) -> Value:
        given: list[tuple[int | str, Value]] = [(at, self.value(own, names)) for at, own in enumerate(node.args)]
        given += [(own.arg, self.value(own.value, names)) for own in node.keywords if own.arg is not None]
        every = frozenset().union(*(value for _, value in given)) if given else NOTHING
        path = _path(node.func) if isinstance(node.func, ast.Attribute) else None
        if path is not None:
            part, rest = self._part(path)
            if not part and len(rest) == 1:
                return self._own_method(rest[0], given)
            if part and (not rest or self._does_work(part, rest)):
                return self._part_called(part, given)
            return every if not part else NOTHING
        if isinstance(node.func, ast.Attribute):
            found, name = self.value(node.func.value, names), node.func.attr
            if name in NUMBERS:
                return NOTHING
        else:
            found, name = self.value(node.func, names), getattr(node.func, "id", "")
            parts = sorted(came.part for came in found if came.itself)
            if parts:
                return frozenset().union(*(self._part_called(part, given) for part in parts))
        every |= frozenset(came for came in found if not came.itself or name in ("items", "values"))
        return _reshaped(every) if name in RESHAPING else every

    def _does_work(self, part: str, rest: list[str]) -> bool:
        """Whether what is called is a part's own method, such as `encode`; one whose name begins with `_` only counts something."""
        kind = type(self.owner.get_submodule(part))
        return len(rest) == 1 and not rest[0].startswith("_") and method_of(kind, rest[0]) is not None

    def _own_method(self, name: str, given: list[tuple[int | str, Value]]) -> Value:
        if name == "get_input_embeddings":
            words = self.owner.get_input_embeddings()  # type: ignore[operator]
            return frozenset(Came(path, itself=True) for path, module in self.owner.named_modules() if module is words)
        function = method_of(type(self.owner), name)
        if function is None:
            return frozenset().union(*(value for _, value in given)) if given else NOTHING
        order = [own for own in inspect.signature(function).parameters if own != "self"]
        placed = {(order[at] if isinstance(at, int) and at < len(order) else str(at)): value for at, value in given}
        return self.method(name, placed)

    def _part_called(self, part: str, given: list[tuple[int | str, Value]]) -> Value:
        module = self.owner.get_submodule(part)
        if next(module.parameters(), None) is None:  # an activation, a dropout, a pooling
            every = frozenset().union(*(value for _, value in given)) if given else NOTHING
            return frozenset(came for came in every if not came.itself)
        self.calls[Call(part, tuple((at, frozenset(c for c in value if not c.itself)) for at, value in given))] = None
        return frozenset({Came(part)})


def _reshaped(value: Value) -> Value:
    return frozenset(Came(came.part, came.field, True, came.itself) for came in value)


def _path(node: ast.expr) -> list[str] | None:
    """The names behind `self.`, indices left out; None for another expression."""
    names: list[str] = []
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        if isinstance(node, ast.Attribute):
            names.append(node.attr)
        node = node.value
    return names[::-1] if isinstance(node, ast.Name) and node.id == "self" else None

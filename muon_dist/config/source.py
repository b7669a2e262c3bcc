"""YAML files as plain data, with the line of each value.

Only plain data is read: no tag makes an object. Scalars follow the YAML 1.2 core schema, in which `no` is text and
`1e-3` is a number; PyYAML's own YAML 1.1 rules read them as False and as text.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Keys = tuple[str | int, ...]

MAX_BYTES = 1 << 20
MAX_NODES = 100_000
_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F_]+|0o[0-7_]+")
_FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_RESOLVERS = (
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), "tTfF"),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+0123456789."),
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("merge", re.compile(r"<<"), "<"),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own class attribute)


class ConfigDumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or the rules above would read as something else."""


for _name, _pattern, _first in _RESOLVERS:
    _whole = re.compile(rf"(?:{_pattern.pattern})\Z")
    _Loader.add_implicit_resolver(_TAG + _name, _whole, list(_first))
    if _name in ("int", "float"):
        ConfigDumper.add_implicit_resolver(_TAG + _name, _whole, list(_first))


@dataclass(frozen=True)
class Place:
    """The place of a value: a file and line, or an override."""

    where: str
    line: int | None = None

    def __str__(self) -> str:
        return self.where if self.line is None else f"{self.where}:{self.line}"


@dataclass(frozen=True)
class Problem:
    """One thing wrong, at a place, with the dotted path of the key."""

    place: Place
    keys: Keys
    message: str

    def __str__(self) -> str:
        path = ".".join(str(k) for k in self.keys)
        return f"{self.place}: {path}: {self.message}" if path else f"{self.place}: {self.message}"


@dataclass
class Document:
    """The plain data of a YAML document, with the place of each value and the problems found."""

    data: Any
    places: dict[Keys, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    broken: bool = False
    """A whole file is missing or unreadable, so the rest cannot be checked for missing keys."""

    def place(self, keys: Keys) -> Place:
        """The place of a value, or of the innermost block around it that has a place."""
        for end in range(len(keys), -1, -1):
            if keys[:end] in self.places:
                return self.places[keys[:end]]
        return Place("config")


def read(path: Path) -> Document:
    """The document in a file; unreadable or malformed files give a document whose data is None and a problem."""
    name = str(path)
    try:
        if not path.is_file():
            return _failed(Place(name), _no_file(path))
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        return _failed(Place(name), f"cannot be read: {error.strerror}")
    if len(raw) > MAX_BYTES:
        return _failed(Place(name), f"larger than {MAX_BYTES} bytes: not a configuration")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
            return _failed(Place(name), "UTF-16: save it as UTF-8")
        line = raw.count(b"\n", 0, error.start) + 1
        return _failed(Place(name, line), f"not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}")
    return parse(text, name)


def _no_file(path: Path) -> str:
    """The reason why `path` cannot be a configuration, and the YAML file that may be meant."""
    if path.exists():
        inside = sorted(path.glob("[!_]*.yaml")) if path.is_dir() else []
        return "not a file" + (f"; name a YAML file in it, such as {inside[0]}" if inside else "")
    close = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
    return "no such file" + (f"; did you mean {path.parent / close[0]}?" if close else "")


def parse(text: str, name: str, numbered: bool = True) -> Document:
    """Plain data from YAML text; `numbered` False leaves the line out of places (an override has none)."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        return _failed(Place(name, line if numbered else None), f"character U+{ord(text[error.position]):04X} in YAML")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark is not None else 1
        where = Place(name, line if numbered else None)
        problem = str(error.problem or error.context)
        if "'\\t'" in problem:
            problem = f"a tab where YAML allows spaces only: indent with spaces ({problem})"
        return _failed(where, f"not valid YAML: {problem}")
    except RecursionError:
        return _failed(Place(name), "nested too deeply")
    finally:
        if loader is not None:
            loader.dispose()
    if node is None:
        return Document(None, {(): Place(name)})
    reader = _Plain(name, numbered)
    return Document(reader.value(node, ()), reader.places, reader.problems)


def comment_after_value(text: str) -> str | None:
    """The part of a one-line value that YAML reads as a comment: `# b` in `a # b`; None if there is none.

    A `#` inside quotes is text, and so is one that no space precedes.
    """
    try:
        tokens = [t for t in yaml.scan(text, Loader=yaml.SafeLoader) if t.end_mark.index > t.start_mark.index]
    except yaml.YAMLError:
        return None  # `parse` says what is wrong
    rest = text[max((t.end_mark.index for t in tokens), default=0) :].strip()
    return rest if rest.startswith("#") else None


def _failed(place: Place, message: str) -> Document:
    return Document(None, {(): place}, [Problem(place, (), message)], broken=True)


class _Plain:
    """Turns YAML nodes into plain data; a node that is not plain becomes a problem and None."""

    def __init__(self, name: str, numbered: bool) -> None:
        self.name, self.numbered = name, numbered
        self.places: dict[Keys, Place] = {}
        self.problems: list[Problem] = []
        self.open: list[yaml.Node] = []
        self.nodes = 0

    def value(self, node: yaml.Node, keys: Keys) -> Any:
        place = self._place(node)
        self.places.setdefault(keys, place)
        self.nodes += 1
        if any(node is outer for outer in self.open):
            self._refuse(node, keys, "an alias inside the value that it repeats")
            return None
        if self.nodes > MAX_NODES:
            if self.nodes == MAX_NODES + 1:
                self._refuse(node, keys, f"more than {MAX_NODES} values, counted with aliases")
            return None
        self.open.append(node)
        try:
            if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
                return self._mapping(node, keys)
            if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
                return [self.value(item, (*keys, i)) for i, item in enumerate(node.value)]
            return self._scalar(node, keys)
        finally:
            self.open.pop()

    def _place(self, node: yaml.Node) -> Place:
        return Place(self.name, node.start_mark.line + 1 if self.numbered else None)

    def _refuse(self, node: yaml.Node, keys: Keys, message: str) -> None:
        self.problems.append(Problem(self._place(node), keys, message))

    def _mapping(self, node: yaml.MappingNode, keys: Keys) -> dict[str, Any]:
        out: dict[str, Any] = {}
        first: dict[str, yaml.Node] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                self._refuse(key_node, keys, "merge keys (<<) are not supported: name a file with base:")
                continue
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TAG + "str":
                shown = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                self._refuse(key_node, keys, f"the key {shown} is not text: put it in quotes")
                continue
            key = key_node.value
            if key in first:
                line = first[key].start_mark.line + 1
                self._refuse(key_node, (*keys, key), f"duplicate key, first given in line {line}: keep one")
                continue
            first[key] = key_node
            inner = (*keys, key)
            self.places[inner] = self._place(key_node)
            out[key] = self.value(value_node, inner)
        return out

    def _integer(self, node: yaml.Node, keys: Keys, value: int) -> int | None:
        if abs(value) < 1 << 63:
            return value
        self._refuse(node, keys, "a whole number of more than 63 bits, which no setting accepts")
        return None

    def _scalar(self, node: yaml.Node, keys: Keys) -> Any:
        kind, text = node.tag.removeprefix(_TAG), node.value
        try:
            if kind == "str":
                if "\0" in text or any(0xD800 <= ord(c) <= 0xDFFF for c in text):
                    self._refuse(
                        node, keys, "contains a NUL or half a surrogate pair, which is not allowed in a setting"
                    )
                    return None
                return text
            if kind == "null":
                return None
            if kind == "bool":
                return {"true": True, "false": False}[text.lower()]
            if kind == "int":
                return self._integer(node, keys, int(text.replace("_", ""), 0))
            if kind == "float":
                bare = text.replace("_", "").lower()
                return float(bare.replace(".inf", "inf").replace(".nan", "nan"))
        except (ValueError, KeyError, TypeError, AttributeError):
            shown = text if len(text) <= 60 else text[:57] + "..."
            self._refuse(node, keys, f"{shown!r} is not a {kind}")
            return None
        shown = "!!" + kind if node.tag.startswith(_TAG) else node.tag
        self._refuse(node, keys, f"the tag {shown} is refused: a configuration may contain plain data only")
        return None


def closest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean X?" with the closest names, or "; known: ..." with all names if none is close."""
    names = list(known)
    found = _expanded(name, names) or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if found:
        return f"; did you mean {' or '.join(found)}?"
    return f"; known: {', '.join(sorted(names))}" if len(names) <= 24 else ""


def _expanded(name: str, known: list[str]) -> list[str]:
    """Known names with the same letters (`rl`: lr), the same initials (`tensor_parallel`: tp) or more words (`dp`:
    dp_replicate, dp_shard), which are too short for difflib. The first of these three that finds any."""
    initials = "".join(word[:1] for word in name.split("_"))
    return (
        [k for k in known if sorted(k) == sorted(name)]
        or [k for k in known if len(initials) > 1 and k == initials]
        or [k for k in known if k.startswith(f"{name}_") or name.startswith(f"{k}_")][:2]
    )

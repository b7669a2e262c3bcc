"""Files, inheritance and overrides -> one checked `Config`, or every error at once."""

from __future__ import annotations

import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from muon_dist.config.paths import expand_path
from muon_dist.config.plugins import import_plugins
from muon_dist.config.redact import is_secret, redact
from muon_dist.config.schema import Config
from muon_dist.config.source import Document, Keys, Place, Problem, closest, comment_after_value, parse, read
from muon_dist.config.trainer import trainer_problems, with_switches
from muon_dist.config.validate import contradictions, missing_files, optimizer_problems
from muon_dist.errors import ConfigError, DataError, MuonDistError


def load_config(path: str | Path, overrides: Sequence[str] = (), *, reads_files: bool = False) -> Config:
    """The configuration in a YAML file, laid over its `base:` files, with dotted overrides applied last.

    overrides: texts such as `optimizer.muon.lr=0.01`; the value is YAML. Mappings are merged key by key, lists are
    replaced whole; a number in an override's path (`data.sources.0.weight=2`) names an item of a list.
    reads_files: the files and folders that it names have to be there: text, tokenizer, model, DeepSpeed.

    Raises ConfigError that lists everything wrong, one line each: file:line (or the override), dotted path, what is
    wrong and the closest key. DataError, in the same form, if only text or a tokenizer is missing.
    """
    document = _with_bases(Path(path), ())
    for text in overrides:
        _override(document, text)
    return _check(document, reads_files)


def _check(document: Document, reads_files: bool) -> Config:
    data, problems = document.data, document.problems
    if not document.broken and not isinstance(data, dict):
        problems.append(Problem(document.place(()), (), "holds no settings: a mapping of keys to values is needed"))
    if document.broken or not isinstance(data, dict):
        raise _error(problems)
    found: list[tuple[Keys, str]] = []
    if isinstance(data.get("trainer"), dict):
        data["trainer"] = with_switches(data["trainer"])
        found += trainer_problems(data["trainer"])
    found += import_plugins(data)
    try:
        config: Config | None = _validated(data)
    except ValidationError as error:
        found += _schema_problems(data, error)
        config = _without(data, [keys for keys, _ in found])
    if config is not None:
        found += contradictions(config)
    gone = list(missing_files(config)) if reads_files and config is not None else []
    found += gone
    if config is not None and not found and not problems:
        found += optimizer_problems(config)  # imports torch: seconds, which another error should not cost
    # One line per key: a value of the wrong type is not reported as a contradiction too.
    told = {p.keys for p in problems}
    first = {keys: message for keys, message in reversed(found) if keys not in told}
    problems += [Problem(document.place(keys), keys, message) for keys, message in first.items()]
    if problems or config is None:
        text = {keys for keys, _ in gone if keys[0] in ("data", "tokenizer")}
        raise _error(problems, DataError if text.issuperset(p.keys for p in problems) else ConfigError)
    return config


def _validated(data: Any) -> Config:
    # JSON, because pydantic's strict mode then accepts a list for a tuple, but still no text for a number.
    return Config.model_validate_json(json.dumps(data), strict=True)


def _without(data: Any, wrong: Sequence[Keys]) -> Config | None:
    """The configuration without its wrong keys, to find contradictions among the rest; None if the rest is invalid."""
    for keys in wrong:
        data = _removed(data, keys)
    try:
        return _validated(data)
    except ValidationError:
        return None


def _removed(data: Any, keys: Keys) -> Any:
    if isinstance(data, dict) and keys and keys[0] in data:
        rest = {k: v for k, v in data.items() if k != keys[0]}
        return rest if len(keys) == 1 else {**data, keys[0]: _removed(data[keys[0]], keys[1:])}
    if isinstance(data, list) and len(keys) > 1 and isinstance(keys[0], int):
        return [_removed(item, keys[1:]) if i == keys[0] else item for i, item in enumerate(data)]
    return data


def _error(problems: Sequence[Problem], kind: type[MuonDistError] = ConfigError) -> MuonDistError:
    ordered = sorted(problems, key=lambda p: (p.place.where, p.place.line or 0, str(p.keys)))
    count = f"{len(ordered)} errors in the configuration:\n  " if len(ordered) > 1 else ""
    return kind(count + "\n  ".join(str(p) for p in ordered))


def _with_bases(path: Path, below: tuple[Path, ...]) -> Document:
    """The document in `path`, laid over the one that its `base:` names; `below` are the files that led here."""
    document = read(path)
    if not isinstance(document.data, dict) or "base" not in document.data:
        return document
    base = document.data.pop("base")
    chain = (*below, path.resolve())
    if not isinstance(base, str) or not base:
        return _no_base(document, "needs the path of a file")
    try:
        target = path.parent / expand_path(base)
    except ValueError as error:
        return _no_base(document, str(error))
    try:
        circle = target.resolve() in chain
        found = target.is_file()
    except OSError as error:  # a name that is too long, or links in a circle
        return _no_base(document, f"cannot be read: {error.strerror}")
    if circle:
        names = " -> ".join(str(p) for p in (*chain, target.resolve()))
        return _no_base(document, f"these files name each other as base: {names}")
    if not found:
        return _no_base(document, f"no such file: {target}")
    return _merge(_with_bases(target, chain), document)


def _no_base(document: Document, message: str) -> Document:
    document.problems.append(Problem(document.place(("base",)), ("base",), message))
    document.broken = True
    return document


def _merge(lower: Document, upper: Document) -> Document:
    """`upper` over `lower`: mappings key by key, everything else replaced whole."""
    problems, broken = lower.problems + upper.problems, lower.broken or upper.broken
    if not isinstance(lower.data, dict) or not isinstance(upper.data, dict):
        return Document(upper.data, upper.places, problems, broken)
    places = dict(lower.places)
    data = _merged(lower.data, upper, (), places)
    return Document(data, {**places, **upper.places}, problems, broken)


def _merged(lower: dict[str, Any], upper: Document, keys: Keys, places: dict[Keys, Place]) -> dict[str, Any]:
    own: Any = upper.data
    for key in keys:
        own = own[key]
    out = dict(lower)
    for key, value in own.items():
        inner = (*keys, key)
        if isinstance(value, dict) and isinstance(lower.get(key), dict):
            out[key] = _merged(lower[key], upper, inner, places)
            continue
        for stale in [k for k in places if k[: len(inner)] == inner]:
            del places[stale]
        out[key] = value
    return out


def _override(document: Document, text: str) -> None:
    """Apply `a.b.c=VALUE` to the document."""
    name, equals, value = text.partition("=")
    shown = name if is_secret(name) else text
    place = Place(f"override {shown}")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        message = "write an override as key.key=value, for instance optimizer.muon.lr=0.01"
        document.problems.append(Problem(place, (), message))
        return
    if not isinstance(document.data, dict):
        return
    read_value = _value(value, place)
    keys: list[str | int] = []
    at: Any = document.data
    for part in parts:
        step: str | int = int(part) if isinstance(at, list) and part.isdecimal() and int(part) < len(at) else part
        if isinstance(at, list) and isinstance(step, str):
            there = f"its items are 0 to {len(at) - 1}" if at else "it is empty"
            document.problems.append(Problem(place, tuple(keys), f"is a list, and has no item {part!r}: {there}"))
            return
        keys.append(step)
        at = at[step] if isinstance(step, int) else at.get(step) if isinstance(at, dict) else None
    document.problems += [Problem(p.place, (*keys, *p.keys), p.message) for p in read_value.problems]
    document.data = _set(document.data, keys, read_value.data)
    replaced = tuple(keys)
    if not isinstance(read_value.data, dict):
        document.places = {k: v for k, v in document.places.items() if k[: len(keys)] != replaced}
    new = [replaced[:n] for n in range(1, len(keys)) if replaced[:n] not in document.places]
    document.places.update({at: place for at in (*new, *((*replaced, *inner) for inner in read_value.places))})


def _value(text: str, place: Place) -> Document:
    """The value of an override: YAML, except that `#` begins no comment in it (`prompt=a # b` is the text `a # b`)."""
    found = parse(text, str(place), numbered=False)
    comment = comment_after_value(text)
    if comment is None:
        return found
    if isinstance(found.data, (dict, list)) or text.lstrip()[:1] in ("'", '"'):
        message = f"ends in {comment!r}, which YAML takes for a comment: leave it out, or put it inside the quotes"
        return Document(None, {(): place}, [Problem(place, (), message)], broken=True)
    return Document(text.strip(), {(): place})


def _set(at: Any, keys: Sequence[str | int], value: Any) -> Any:
    """A copy of `at` in which the value under `keys` is set, or merged where both are mappings."""
    if not keys:
        if isinstance(at, dict) and isinstance(value, dict):
            return {**at, **{k: _set(at.get(k), (), v) for k, v in value.items()}}
        return value
    key, rest = keys[0], keys[1:]
    if isinstance(key, int):
        return [_set(item, rest, value) if i == key else item for i, item in enumerate(at)]
    block = at if isinstance(at, dict) else {}
    return {**block, key: _set(block.get(key), rest, value)}


def _schema_problems(data: Any, error: ValidationError) -> list[tuple[Keys, str]]:
    found = []
    for detail in error.errors():
        keys = _real_keys(data, detail["loc"], detail["type"])
        found.append((keys, _message(keys, detail)))
    return found


def _real_keys(data: Any, loc: Sequence[str | int], kind: str) -> Keys:
    """pydantic's location without the names of union members, which are not keys."""
    keys: list[str | int] = []
    for i, part in enumerate(loc):
        inside = (isinstance(data, dict) and part in data) or (
            isinstance(data, list) and isinstance(part, int) and part < len(data)
        )
        if inside:
            data = data[part]
            keys.append(part)
        elif i == len(loc) - 1 and kind == "missing":
            keys.append(part)
    return tuple(keys)


def _message(keys: Keys, detail: Mapping[str, Any]) -> str:
    kind, given = detail["type"], detail["input"]
    if kind == "missing":
        return "this key is needed"
    if kind == "extra_forbidden":
        return f"unknown key{_suggest(keys)}"
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    if kind == "literal_error":
        expected = [x.strip("'") for x in detail["ctx"]["expected"].replace(" or ", ", ").split(", ")]
        hint = closest(given, expected) if isinstance(given, str) else ""
        hint = hint if hint.startswith("; did") else ""
        return f"{given!r} is not one of {', '.join(expected)}{hint}"
    shown = repr(redact({str(keys[-1]) if keys else "": given}).popitem()[1])
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    message = str(detail["msg"]).replace("Input should be", "should be")
    return f"{message[0].lower()}{message[1:]}, not {shown}"


def _suggest(keys: Keys) -> str:
    """The closest key of the same block; or the same key in another block, where it was put by mistake."""
    name, parent = str(keys[-1]), keys[:-1]
    if parent[:2] == ("optimizer", "groups"):
        from muon_dist.optim.rules.entries import FOREIGN  # imports torch: seconds

        if name in FOREIGN:
            return f": {FOREIGN[name]}"
    blocks = _blocks(Config, ())
    here = blocks.get(tuple(k for k in parent if not isinstance(k, int)), [])
    hint = closest(name, here)
    if hint.startswith("; did you mean"):
        return hint
    mapped = [block for block in blocks if block[:2] != ("optimizer", "groups")]  # it repeats every name
    elsewhere = [".".join((*block, name)) for block in mapped if name in blocks[block]]
    return f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else hint


def _blocks(model: type[BaseModel], keys: tuple[str, ...]) -> dict[tuple[str, ...], list[str]]:
    """Dotted path -> field names of every block under `model`, list items counted as their list."""
    found = {keys: [info.alias or name for name, info in model.model_fields.items()]}
    for name, info in model.model_fields.items():
        for kind in (info.annotation, *typing.get_args(info.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found.update(_blocks(kind, (*keys, name)))
    return found

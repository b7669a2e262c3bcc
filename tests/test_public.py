"""User code keeps working: public names stay, and so does every way to call them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests import public

KNOWN: dict[str, Any] = json.loads(public.FILE.read_text())
POSITIONAL = ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD")


def changes(old: public.Signature, new: public.Signature) -> list[str]:
    """The reasons why a call that was right before may fail now."""
    found = {name: (kind, default) for name, kind, default in new}
    wrong = []
    for name, kind, default in old:
        if name not in found:
            wrong.append(f"{name} is gone")
        elif found[name][0] != kind and not (kind == "KEYWORD_ONLY" and found[name][0] == "POSITIONAL_OR_KEYWORD"):
            wrong.append(f"{name} was {kind}, is {found[name][0]}")
        elif default is not None and found[name][1] != default:
            wrong.append(f"{name} was {default} by default, is {found[name][1]}")
    before = [name for name, kind, _ in old if kind in POSITIONAL]
    after = [name for name, kind, _ in new if kind in POSITIONAL]
    if after[: len(before)] != before:
        wrong.append(f"the order was {before}, is {after}")
    given = {name for name, _, _ in old}
    wrong += [f"{n} is new and has no default" for n, k, d in new if n not in given and d is None and "VAR" not in k]
    return wrong


@pytest.mark.parametrize("name", KNOWN)
def test_a_public_name_stays(name: str) -> None:
    new = public.signature(name)
    if KNOWN[name] is not None:
        assert new is not None
        assert changes([tuple(p) for p in KNOWN[name]], new) == []


def test_a_changed_signature_is_seen() -> None:
    old = [("a", "POSITIONAL_OR_KEYWORD", None), ("b", "KEYWORD_ONLY", "1")]
    assert changes(old, old) == []
    assert changes(old, [*old, ("c", "KEYWORD_ONLY", "2")]) == []
    for new in (
        [old[0]],
        [("x", *old[0][1:]), old[1]],
        [old[0], ("b", "KEYWORD_ONLY", "2")],
        [*old, ("c", "KEYWORD_ONLY", None)],
    ):
        assert changes(old, new)

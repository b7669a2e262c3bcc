"""The search for objects of frameworks that keep no list of what they made."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from itertools import compress
from typing import Any


def living(*classes: type, frozen: bool = False) -> list[Any]:
    """All objects of `classes` and of their subclasses that exist in this process.

    It looks at every object, which takes about 0.1 s per million, so call it before the first step only. It compares
    types, because isinstance may make an object import modules.

    Args:
        classes: the kinds of objects to find.
        frozen: also look at what the program has set aside by `gc.freeze()`. It stays set aside, together with what
            was made since.
    """
    kinds = set(_with_subclasses(classes))
    frozen = frozen and gc.get_freeze_count() > 0
    if frozen:
        gc.unfreeze()
    objects = gc.get_objects()
    if frozen:
        gc.freeze()
    return list(compress(objects, map(kinds.__contains__, map(type, objects))))


def _with_subclasses(classes: Iterable[type]) -> Iterator[type]:
    for cls in classes:
        yield cls
        yield from _with_subclasses(type.__subclasses__(cls))

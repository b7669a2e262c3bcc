"""Calls with a missing or a surplus argument: the error says what to write, not only what Python cannot bind."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from muon_dist.errors import ConfigError

P = ParamSpec("P")
T = TypeVar("T")


def called_as(example: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator: a call that Python cannot bind to the parameters is a ConfigError that shows `example`.

    The signature that readers, editors and `inspect` see stays that of the function.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)
        name = example.partition("(")[0].rpartition(".")[2]

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise ConfigError(f"{name}: {error}: write {example}") from None
            return function(*args, **kwargs)

        return call

    return decorate

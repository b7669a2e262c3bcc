"""The Newton-Schulz iteration through `torch.compile`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from muon_dist.errors import ConfigError
from muon_dist.numerics.iteration import (
    PLAIN,
    Form,
    Products,
    Workspace,
    buffers,
    full_fp32,
    iterate,
    normal_dtype,
    normalize,
)
from muon_dist.numerics.schedules import Row, Schedule, get_schedule
from muon_dist.waiting import told

_SHAPES = 1024
"""Number of compiled forms that are kept; with PyTorch's default of 8 it would stop compiling."""


def _whole(
    x: Tensor, schedule: Schedule, rows: tuple[Row, ...], segment: int, dtype: torch.dtype, products: Products
) -> Tensor:
    count, m, n = x.shape
    other = torch.empty(count, m, n, dtype=dtype, device=x.device)
    squares = [other.new_empty(count, min(m, n), min(m, n)) for _ in range(buffers(segment))]
    space = Workspace(segment, other, squares)
    exact = torch.empty(x.shape, dtype=normal_dtype(x.dtype, dtype), device=x.device)
    start = exact if exact.dtype == dtype else torch.empty_like(space.other)
    normalize(x, schedule, start, exact)
    return iterate(start, space.other, rows, space, products)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_whole, dynamic=False, fullgraph=True)


_begun: set[tuple[object, ...]] = set()


def _first(shape: tuple[int, ...], *kind: object) -> AbstractContextManager[None]:
    """Context that prints a note if compilation takes long; only for the first stack of a shape and kind."""
    if (shape, *kind) in _begun:
        return nullcontext()
    _begun.add((shape, *kind))
    return told(f"torch.compile builds Newton-Schulz for a stack of shape {shape}")


def compiled_iteration(
    x: Tensor, schedule: Schedule, rows: tuple[Row, ...], segment: int, dtype: torch.dtype, products: Products
) -> Tensor:
    """The orthogonalized stack (B, M, N) in `dtype`, by code that is compiled once per shape of the stack.

    Raises ConfigError if compilation fails; it never runs uncompiled.
    """
    import torch._dynamo  # only here: it takes 2 s to import

    built = _first(tuple(x.shape), x.dtype, dtype, x.device.type, len(rows), segment)
    try:
        with built, torch._dynamo.config.patch(recompile_limit=_SHAPES, accumulated_recompile_limit=_SHAPES):
            return _compiled()(x, schedule, rows, segment, dtype, products)
    except Exception as error:
        raise ConfigError(
            f"ns_compile=True, but torch.compile failed on {x.device} ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}): leave ns_compile out, or "
            "install the compiler that it needs (a C++ compiler on CPU, Triton on CUDA)"
        ) from error


@torch.no_grad()
def orthogonalize_compiled(source: Tensor, target: Tensor | None = None, *, form: Form) -> None:
    """Orthogonalize a stack with compiled code: as `iteration.orthogonalize`, compiled once per shape.

    source: (B, rows, columns). target: receives the result, in the target's dtype; None: `source` is overwritten.
    """
    target = source if target is None else target
    if not source.numel():
        return
    with full_fp32(source.device), torch.autocast(source.device.type, enabled=False):
        result = compiled_iteration(source, form.schedule, form.rows, form.segment, form.dtype, form.products)
        target.copy_(result)


def check_compiler(device: torch.device) -> None:
    """Compile a small iteration on `device`, so that a missing compiler is reported before the first step.

    Raises ConfigError as `compiled_iteration`.
    """
    schedule = get_schedule("keller")
    x = torch.ones(1, 2, 3, device=device)
    compiled_iteration(x, schedule, schedule.coefficients(1), 1, torch.float32, PLAIN)

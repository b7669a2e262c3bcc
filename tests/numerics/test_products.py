"""Symmetric kernels prove themselves before they are used, whatever goes wrong with them."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from muon_dist.numerics import products
from muon_dist.numerics.iteration import PLAIN, Products, SymmetricKernels

CPU = torch.device("cpu")
PROVE = products.prove


def gemm(
    x: torch.Tensor, y: torch.Tensor, C: Any = None, out: Any = None, alpha: float = 1.0, beta: float = 0.0
) -> None:
    result = alpha * (x.float() @ y.float())
    out.copy_(result if C is None else result + beta * C.float())


def test_right_products_pass() -> None:
    products.prove(SymmetricKernels(gemm), CPU)
    products.prove(Products(), CPU)


@pytest.mark.parametrize("spoil", ["tall", "half", "beta"])
def test_a_wrong_product_is_found(spoil: str) -> None:
    def wrong(x: torch.Tensor, y: torch.Tensor, **options: Any) -> None:
        gemm(x, y, **{**options, **({"beta": 0.0} if spoil == "beta" else {})})
        if spoil == "half":
            options["out"].tril_()
        if spoil == "tall" and not x.is_contiguous():
            options["out"].zero_()

    with pytest.raises(RuntimeError, match="off"):
        products.prove(SymmetricKernels(wrong), CPU)


@pytest.mark.parametrize("error", [ImportError("no quack"), ValueError("driver"), AssertionError("sm_120")])
def test_kernels_that_do_not_work_are_left_out(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def broken(*given: Any, **options: Any) -> None:
        raise error

    module = types.ModuleType("quack.gemm_interface")
    module.gemm_symmetric = broken  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "quack", types.ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.gemm_interface", module)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(products, "prove", lambda kernels, device: PROVE(kernels, CPU))
    assert products._symmetric_kernels.__wrapped__() is PLAIN

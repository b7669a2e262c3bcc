"""SOAP-Muon: Adam in the eigenbasis of Shampoo's preconditioner, before the orthogonalization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from muon_dist.optim.rules.muon import GRADIENT, Group, MuonRule, Owned, Size

ROWS, COLUMNS = "row_covariance", "column_covariance"
ROW_BASIS, COLUMN_BASIS = "row_basis", "column_basis"
SECOND_MOMENT, STEPS = "projected_second_moment", "basis_steps"
# 1e-8 stands in the record's script, both as the epsilon of the division and below the norm.
_EPS = 1e-8


class SoapMuonRule(MuonRule):
    """The look-ahead preconditioned as by SOAP (arXiv 2409.11321), then orthogonalized: the records of the NanoGPT
    optimization benchmark (modded-nanogpt, track 3, 2026-05-04, "SOAP on MLPs").

        P = Ql^T U Qr;  V <- lerp(V, P^2, 1 - beta2);  X = Ql (P / (sqrt(V) + 1e-8)) Qr^T
        update = newton_schulz(X ||U|| / ||X||)
        L <- lerp(L, G G^T, 1 - beta2);  R <- lerp(R, G^T G, 1 - beta2)

    G is the raw gradient. In the first step there is no basis, and X = U. The eigenvectors of L and R are taken after
    the first step with a gradient, largest first; after every `frequency` steps Ql <- qr(L Ql), with the columns of Ql
    and the rows of V sorted by the estimated eigenvalues first, and Qr alike. V has no bias correction.

    Eigenvectors of eigenvalues that are equal, as those of a singular L are, depend on the last bit: the result then
    is the same on every layout, but another machine's may differ.
    """

    name: ClassVar[str] = "soap_muon"
    # .90 and 10: SOAP_BETA2 and precondition_frequency of the record's script; one beta for V, L and R.
    options: ClassVar[Mapping[str, float]] = {"beta2": 0.9, "frequency": 10}
    elsewhere: ClassVar[Mapping[str, str]] = {"beta1": "momentum"}
    owner_memory: ClassVar[Mapping[str, Size]] = {
        ROWS: lambda matrix: matrix.rows**2,
        COLUMNS: lambda matrix: matrix.cols**2,
        ROW_BASIS: lambda matrix: matrix.rows**2,
        COLUMN_BASIS: lambda matrix: matrix.cols**2,
        SECOND_MOMENT: lambda matrix: matrix.numel,
        STEPS: lambda matrix: 1,
    }
    sends: ClassVar[tuple[str, ...]] = (GRADIENT,)

    def problem(self, group: Group) -> str | None:
        beta2, frequency = group["rule_options"]["beta2"], group["rule_options"]["frequency"]
        if not 0 <= beta2 < 1:
            return f"beta2 is {beta2}: it must be in [0, 1)"
        whole = frequency >= 1 and frequency == int(frequency)
        return None if whole else f"frequency is {frequency}: it must be a whole number of steps"

    def direction(self, owned: Owned, group: Group) -> None:
        beta2, frequency = group["rule_options"]["beta2"], int(group["rule_options"]["frequency"])
        steps = torch.cat(owned.memory[STEPS]).tolist()  # one read of the host for the stack
        rows, cols = owned.stack.shape[-2:]
        for i, (update, gradient) in enumerate(zip(owned.stack, owned.sent[GRADIENT], strict=True)):
            kept = {name: of_name[i] for name, of_name in owned.memory.items()}
            left, right = kept[ROW_BASIS].view(rows, rows), kept[COLUMN_BASIS].view(cols, cols)
            moment = kept[SECOND_MOMENT].view(rows, cols)
            if steps[i]:
                _precondition(update, left, right, moment, beta2)
            if not steps[i] and not gradient.any():
                continue  # a zero matrix has no basis: wait for a gradient
            covariances = kept[ROWS].view(rows, rows), kept[COLUMNS].view(cols, cols)
            covariances[0].lerp_(gradient @ gradient.mT, 1 - beta2)
            covariances[1].lerp_(gradient.mT @ gradient, 1 - beta2)
            if not steps[i]:
                left.copy_(_eigenbasis(covariances[0]))
                right.copy_(_eigenbasis(covariances[1]))
            elif steps[i] % frequency == 0:
                _turn(covariances[0], left, moment)
                _turn(covariances[1], right, moment.mT)
            kept[STEPS].add_(1)
        owned.orthogonalize(owned.stack)


def _precondition(update: Tensor, left: Tensor, right: Tensor, moment: Tensor, beta2: float) -> None:
    """Adam's division in the basis, in place; the norm stays."""
    length = update.norm()
    projected = left.mT @ update @ right
    moment.lerp_(projected.square(), 1 - beta2)
    update.copy_(left @ projected.div_(moment.sqrt().add_(_EPS)) @ right.mT)
    update.mul_(length / update.norm().clamp_min(_EPS))


def _eigenbasis(covariance: Tensor) -> Tensor:
    """The eigenvectors as columns, of the largest eigenvalue first."""
    return torch.linalg.eigh(covariance.double())[1].flip(1).to(covariance.dtype)


def _turn(covariance: Tensor, basis: Tensor, moment: Tensor) -> None:
    """One step of the power iteration on the basis; the rows of the second moment are sorted with it. In place."""
    order = torch.einsum("ij,ij->j", basis, covariance @ basis).argsort(descending=True)
    moment.copy_(moment[order])
    basis.copy_(torch.linalg.qr((covariance @ basis[:, order]).double())[0])

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
# The record's script uses 1e-8 both as the epsilon of the division and in the denominator of the norm.
_EPS = 1e-8


class SoapMuonRule(MuonRule):
    """The look-ahead, preconditioned by SOAP (arXiv 2409.11321) and then orthogonalized.

    Source: the record of the NanoGPT optimization benchmark, modded-nanogpt, track 3, 2026-05-04, "SOAP on MLPs".

        P = Ql^T U Qr;  V <- lerp(V, P^2, 1 - beta2);  X = Ql (P / (sqrt(V) + 1e-8)) Qr^T
        update = newton_schulz(X ||U|| / ||X||)
        L <- lerp(L, G G^T, 1 - beta2);  R <- lerp(R, G^T G, 1 - beta2)

    G is the raw gradient. In the first step there is no basis, so X = U. After the first step with a gradient, Ql and
    Qr are the eigenvectors of L and R, in order of falling eigenvalues. After every `frequency` steps the columns of
    Ql and the rows of V are sorted by the estimated eigenvalues, then Ql <- qr(L Ql); the same for Qr. V has no bias
    correction.

    If eigenvalues are equal, as for a singular L, the eigenvectors depend on the last bit. Then the result is still
    the same under every layout, but may differ on another machine.
    """

    name: ClassVar[str] = "soap_muon"
    # 0.9 and 10 are SOAP_BETA2 and precondition_frequency in the record's script; V, L and R share one beta.
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
        steps = torch.cat(owned.memory[STEPS]).tolist()  # the host waits once per stack
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
    """Apply Adam's division in the basis, in place; the norm of `update` does not change."""
    length = update.norm()
    projected = left.mT @ update @ right
    moment.lerp_(projected.square(), 1 - beta2)
    update.copy_(left @ projected.div_(moment.sqrt().add_(_EPS)) @ right.mT)
    update.mul_(length / update.norm().clamp_min(_EPS))


def _eigenbasis(covariance: Tensor) -> Tensor:
    """The eigenvectors as columns, in order of falling eigenvalues."""
    return torch.linalg.eigh(covariance.double())[1].flip(1).to(covariance.dtype)


def _turn(covariance: Tensor, basis: Tensor, moment: Tensor) -> None:
    """One step of power iteration on the basis, in place; sorts the rows of the second moment in the same order."""
    order = torch.einsum("ij,ij->j", basis, covariance @ basis).argsort(descending=True)
    moment.copy_(moment[order])
    basis.copy_(torch.linalg.qr((covariance @ basis[:, order]).double())[0])

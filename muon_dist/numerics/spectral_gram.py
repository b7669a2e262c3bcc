"""The measures of `spectral_stats`, computed from Gram matrices: cheap enough for a live run."""

from __future__ import annotations

import torch
from torch import Tensor

from muon_dist.numerics.spectral import SpectralStats, _finite_or_zero, _input_measures, _ratio

# In a matrix stored in fp32, directions smaller than this, relative to the largest, are rounding errors.
RESOLUTION = 2.0**-23


@torch.no_grad()
def gram_spectral_stats(x: Tensor, orthogonalized: Tensor) -> SpectralStats:
    """`spectral_stats(x, orthogonalized)` by symmetric eigenvalues on the shorter side, in fp64.

    It takes one third to two thirds of the time of the decompositions, less for longer matrices. Measured on one CPU
    thread, with five Newton-Schulz steps for comparison: (128, 384) 7.8 ms against 15.1 ms, steps 2.6 ms; (512, 512)
    106 ms against 156 ms, steps 54 ms. Squaring loses half of the digits: a singular value s has an error of about
    eps(fp64) s_max^2 / s, so the smallest resolved one is 1e-8 s_max. In fp64 this is below the rounding of an fp32
    matrix (6e-8). In fp32 it would be 3e-4 s_max, and the sum over hundreds of small singular values would be noise.
    So it uses fp64 on every device.

    The cosine needs no polar factor: with G G^T = U S^2 U^T, <X, U V^T> = sum_i (U^T G X^T U)_ii / s_i, here over the
    directions above 2^-23 s_max. `spectral_stats` includes directions down to fp64's rounding, so its cosine is lower
    if many directions are rounding errors (condition 1e8); all other measures agree to 1e-7.

    Args:
        x, orthogonalized: (M, N).

    Raises:
        ValueError: not two matrices of one shape.
    """
    if x.ndim != 2 or x.shape != orthogonalized.shape or x.numel() == 0:
        raise ValueError(f"expected two non-empty matrices of one shape, got {x.shape} and {orthogonalized.shape}")
    if x.size(0) > x.size(1):
        x, orthogonalized = x.T, orthogonalized.T
    pair = torch.stack((x.detach().double(), orthogonalized.detach().double()))
    pair, poison = _finite_or_zero(pair)
    scale = pair[0].abs().amax()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    g, update = pair[0] / scale, pair[1]
    squares, u = torch.linalg.eigh(g @ g.T)
    singular = squares.clamp_min(0).sqrt().flip(0)
    kept = singular > RESOLUTION * singular[0]
    values = torch.linalg.eigvalsh(update @ update.T).clamp_min(0).sqrt()
    # (U^T (G X^T) U)_ii, in the descending order of `singular`
    inner = ((g @ update.T @ u) * u).sum(0).flip(0)
    overlap = torch.where(kept, inner / singular.masked_fill(~kept, 1.0), torch.zeros_like(inner)).sum()
    norms = torch.linalg.vector_norm(update) * kept.sum().double().sqrt()
    columns = _input_measures((singular * scale)[None])
    measures = torch.stack(
        [
            *(c.squeeze(0) + poison[0, 0] for c in columns),
            (values.square() - 1.0).square().mean().sqrt() + poison[1, 0],
            (values - 1.0).abs().amax() + poison[1, 0],
            _ratio(overlap, norms) + poison.sum(),
        ]
    )
    return SpectralStats(*measures.tolist())

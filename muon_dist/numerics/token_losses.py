"""The cross entropy for evaluating language models, independent of the training loss."""

from __future__ import annotations

import torch
from torch.nn import functional

IGNORED = -100
"""Label of a position that is not predicted, as in transformers."""


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed loss in nats and number of predicted tokens of each sample, float32 (B, 2).

    logits: (B, T, V), of any dtype. labels: (B, T), not shifted: logits[t - 1] predict position t. It is the plain
    cross entropy, without label smoothing and without an auxiliary loss of experts. The sum of the losses divided by
    the sum of the numbers is the mean loss per token, for any grouping of samples into batches.
    """
    targets = labels[:, 1:].to(logits.device)
    counts = (targets != IGNORED).sum(dim=1)
    sums = [  # one sample at a time, because the whole batch in float32 would be the largest tensor of an evaluation
        functional.cross_entropy(one[:-1].float(), target, ignore_index=IGNORED, reduction="sum")
        for one, target in zip(logits, targets, strict=True)
    ]
    return torch.stack([torch.stack(sums), counts.to(torch.float32)], dim=1)

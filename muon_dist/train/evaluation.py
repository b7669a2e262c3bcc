"""How well a model predicts text: one process, no trainer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from muon_dist.adapters.hf_trainer import bits_per_byte
from muon_dist.errors import DataError
from muon_dist.numerics.token_losses import token_losses


def evaluate(
    model: Any, dataset: Dataset[Any], bytes_per_token: float, *, batch_size: int = 8, max_samples: int | None = None
) -> dict[str, float]:
    """Mean loss (nats per predicted token), perplexity and bits per byte of `model` on the samples of `dataset`.

    A sample of T tokens gives T - 1 predictions, as in training. max_samples: the first so many only.
    """
    count = len(dataset) if max_samples is None else min(max_samples, len(dataset))  # type: ignore[arg-type]
    if count < 1:
        raise DataError("no sample to evaluate on")
    batches = DataLoader(torch.utils.data.Subset(dataset, range(count)), batch_size=batch_size)
    nats, predictions = 0.0, 0
    model.eval()
    with torch.no_grad():
        for batch in batches:
            ids = batch["input_ids"].to(model.device)
            sums = token_losses(model(input_ids=ids, use_cache=False).logits, ids).double().sum(dim=0)
            nats, predictions = nats + sums[0].item(), predictions + int(sums[1].item())
    mean = nats / predictions
    return {
        "loss": mean,
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
        "bits_per_byte": bits_per_byte(mean, bytes_per_token),
        "samples": count,
        "predicted_tokens": predictions,
    }

"""Loss and perplexity of a model on text, in one process without a trainer."""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from muon_dist.adapters.hf.trainer import bits_per_byte
from muon_dist.checkpoint.manifest import model_folder
from muon_dist.checkpoint.weights import trained_with
from muon_dist.data import Manifest, Source, load_tokenizer, prepare
from muon_dist.data.dataset import MixtureDataset
from muon_dist.data.shards import MANIFEST_FILE
from muon_dist.errors import DataError
from muon_dist.numerics.token_losses import token_losses


def evaluate(
    model: Any, dataset: Dataset[Any], bytes_per_token: float, *, batch_size: int = 8, max_samples: int | None = None
) -> dict[str, float]:
    """Mean loss (nats per predicted token), perplexity and bits per byte of `model` on the samples of `dataset`.

    A sample of T tokens gives T - 1 predictions, as in training. max_samples: use only this many samples, the first
    ones.
    """
    count = len(dataset) if max_samples is None else min(max_samples, len(dataset))  # type: ignore[arg-type]
    if count < 1:
        raise DataError("no sample to evaluate: the data have less than one sample, or max_samples is below 1")
    batches = DataLoader(torch.utils.data.Subset(dataset, range(count)), batch_size=batch_size)
    nats, predictions = 0.0, 0
    model.eval()
    with torch.no_grad():
        for batch in batches:
            inputs = {name: value.to(model.device) for name, value in batch.items()}
            labels = inputs.pop("labels")
            sums = token_losses(model(**inputs, use_cache=False).logits, labels).double().sum(dim=0)
            nats, predictions = nats + sums[0].item(), predictions + int(sums[1].item())
    mean = nats / predictions
    return {
        "loss": mean,
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
        "bits_per_byte": bits_per_byte(mean, bytes_per_token),
        "samples": count,
        "predicted_tokens": predictions,
    }


def is_prepared(path: str | Path) -> bool:
    """`path` is a folder of token shards."""
    return (Path(path) / MANIFEST_FILE).is_file()


def check_tokenizer(data: str | Path, folder: Path) -> None:
    """Raises DataError unless the prepared folder and the model in `folder` have the same tokenizer.

    A loss over tokens of another tokenizer looks like a valid number, but means nothing.
    """
    path = model_folder(folder)
    manifest = Manifest.load(data)
    own = load_tokenizer(path)
    if manifest.tokenizer_sha256 == own.info.sha256 or manifest.tokenizer_sha256 in trained_with(folder):
        return
    raise DataError(
        f"{data}: its tokens are of another tokenizer (sha256 {manifest.tokenizer_sha256[:12]}, {manifest.vocab_size} "
        f"tokens) than that of the model in {path} ({own.info.vocab_size} tokens), so a loss would say nothing: "
        "evaluate on the text itself (--text), or prepare it with the model's tokenizer (tokenizer.path)"
    )


@contextlib.contextmanager
def text_dataset(
    text: str | Path, folder: Path, sequence_length: int, vocab_size: int, packing: str = "concatenate"
) -> Iterator[MixtureDataset]:
    """All of a text as samples for the model in `folder`, in a temporary folder that is removed at the end of the
    context.

    sequence_length: tokens per sample at most; a shorter text is one sample. Raises DataError if it is not text.
    """
    with tempfile.TemporaryDirectory(prefix="muon-dist-eval-") as temporary:
        out = Path(temporary) / "tokens"
        tokenizer = shutil.copytree(
            model_folder(folder),
            Path(temporary) / "tokenizer",
            ignore=shutil.ignore_patterns("*.safetensors*", "config.json"),
        )  # without the model's type, because AutoTokenizer may choose another class for it
        source = Source(path=str(text))
        manifest = prepare([source], tokenizer, out, validation_fraction=0.0, progress=False)
        length = min(sequence_length, manifest.totals("train")[0])
        yield MixtureDataset.open(out, "train", length, vocab_size=vocab_size, packing=packing)

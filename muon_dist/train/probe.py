"""`muon-dist spectra probe`: the learning rate of a run compared with the limit from the curvature."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from muon_dist.adapters.factory import MuonFactory
from muon_dist.adapters.hf.callbacks import quiet_transformers
from muon_dist.config import Config, load_config
from muon_dist.data.dataset import MixtureDataset
from muon_dist.errors import CheckpointError, ConfigError
from muon_dist.json_files import read_lines, write_lines
from muon_dist.model.load import load_model
from muon_dist.optim.sharpness import probe_sharpness
from muon_dist.train import build, corpus
from muon_dist.train.folder import RunFolder


def probe_run(run: str | Path, *, step: int | None = None, samples: int = 4, lanczos: int = 12) -> dict[str, Any]:
    """Probe a checkpoint of a run on training samples, in this process; the result goes to spectra/sharpness.jsonl.

    step: of the checkpoint; None for the newest. samples: of the probe batch, spread evenly over the training data.

    Raises ConfigError when the run did not use Muon or has no configuration, CheckpointError when there is no such
    checkpoint, DataError when its data is gone.
    """
    quiet_transformers()
    folder = RunFolder(Path(run))
    if not folder.config.is_file():
        raise ConfigError(f"{folder.config} is missing: a probe needs the run's own configuration")
    config = load_config(folder.config)
    if config.optimizer.name != "muon":
        raise ConfigError(f"{folder.root} was trained with {config.optimizer.name}: only Muon's updates are probed")
    checkpoint = _checkpoint(folder, step)
    at = int(checkpoint.name.rpartition("-")[2])
    model: Any = load_model(checkpoint, torch.float32)
    batch = _batch(config, model.config.vocab_size, samples)
    factory, chosen = build.optimizer_factory(config, build.routing_table(config, model))
    assert factory is MuonFactory
    optimizer = MuonFactory()(model, **{**chosen, "lr": _lr(folder, at, config), "process_group": None})
    found = probe_sharpness(
        optimizer, lambda: model(input_ids=batch, labels=batch, use_cache=False).loss, lanczos=lanczos
    )
    record = {
        "step": at,
        "lr": optimizer.param_groups[0]["lr"],
        "samples": len(batch),
        "sequence_length": batch.shape[1],
        "lanczos": lanczos,
        **found,
    }
    _add(folder.spectra / "sharpness.jsonl", record)
    return record


def _checkpoint(folder: RunFolder, step: int | None) -> Path:
    finished = folder.finished_checkpoints()
    steps = [int(p.name.rpartition("-")[2]) for p in finished]
    if not finished:
        raise CheckpointError(f"{folder.checkpoints} holds no finished checkpoint to probe")
    if step is None:
        return finished[-1]
    if step not in steps:
        raise CheckpointError(f"{folder.checkpoints} holds no checkpoint of step {step}, but of {steps}")
    return finished[steps.index(step)]


def _batch(config: Config, vocab_size: int, samples: int) -> torch.Tensor:
    """(samples, sequence length) of token ids."""
    data = MixtureDataset.open(
        corpus.tokens_folder(config), "train", config.data.sequence_length, vocab_size=vocab_size
    )
    count = min(samples, len(data))
    return torch.stack([data[i * len(data) // count]["input_ids"] for i in range(count)])


def _lr(folder: RunFolder, step: int, config: Config) -> float:
    """Muon's logged learning rate at `step`; the configured one if nothing was logged."""
    lr = config.optimizer.muon.lr
    if not folder.metrics.is_file():
        return lr
    for _, line in read_lines(folder.metrics):
        if line is not None and line.get("step", step + 1) <= step and "lr/muon" in line:
            lr = float(line["lr/muon"])
    return lr


def _add(path: Path, record: dict[str, Any]) -> None:
    """Write a probe into the file; it replaces an earlier probe of the same step."""
    lines = [line for _, line in read_lines(path) if line is not None] if path.is_file() else []
    kept = [line for line in lines if line["step"] != record["step"]]
    write_lines(path, sorted([*kept, record], key=lambda line: line["step"]))


def table(record: dict[str, Any]) -> str:
    """The probe as text: one sentence for the whole update, then one line per matrix."""
    whole = record["whole"]
    lines = [f"step {record['step']}, lr {record['lr']:.3g}, {record['samples']} samples: {_sentence(whole)}", ""]
    width = max(len(m["name"]) for m in record["matrices"])
    heads = ("bound", "lr/bound", "threshold", "lr/threshold", "NDS(O)", "NDS(G)")
    keys = ("bound", "of_bound", "threshold", "of_threshold", "nds_update", "nds_gradient")
    lines.append("  ".join(["matrix".ljust(width), *(h.rjust(12) for h in heads)]))
    for m in [*record["matrices"], whole]:
        cells = ("inf" if m[k] is None else f"{m[k]:.3g}" for k in keys)
        lines.append("  ".join([m["name"].ljust(width), *(c.rjust(12) for c in cells)]))
    return "\n".join(lines)


def _sentence(row: dict[str, Any]) -> str:
    if row["of_bound"] is None or row["of_threshold"] is None:
        return "the update does not descend on this batch, so no step along it is stable"
    return (
        f"lr is at {row['of_bound']:.2g} of the bound and at {row['of_threshold']:.2g} of the one-step threshold "
        "of the whole Muon update"
    )

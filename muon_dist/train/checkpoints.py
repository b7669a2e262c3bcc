"""`muon-dist checkpoint`: list, verify, export, convert."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from muon_dist.adapters.hf_callbacks import quiet_transformers
from muon_dist.checkpoint import MODEL_FOLDER, Checkpoint, Contents, Ranks, commits, newest_good, open_checkpoint
from muon_dist.checkpoint.manifest import NAME as MANIFEST
from muon_dist.checkpoint.piece import WEIGHT, Piece, whole
from muon_dist.checkpoint.writer import commit, take
from muon_dist.errors import CheckpointError, ConfigError
from muon_dist.model.load import load_model, parameter_shapes
from muon_dist.train.folder import RunFolder
from muon_dist.train.models import export_folder

_TAG = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
# what transformers needs besides the weights; never code
_DOCUMENTS = ("*.json", "*.model", "*.txt", "*.jinja")
_WEIGHT_FILES = re.compile(r".*\.(safetensors|safetensors\.index\.json|bin|pt|pth)")
# file of DeepSpeed's universal format -> our kind
_UNIVERSAL = {"fp32": WEIGHT, "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "momentum_buffer": "momentum"}


def found(path: str | Path) -> list[Path]:
    """The checkpoints meant by a path: itself, or those of a run folder or of a folder of checkpoints, oldest first.

    Raises CheckpointError when there is none.
    """
    root = Path(path)
    if (root / MANIFEST).exists():
        return [root]
    paths = RunFolder(root).finished_checkpoints() or commits(root)
    if not paths:
        raise CheckpointError(f"{root}: neither a checkpoint nor a folder with finished ones")
    return paths


def describe(path: Path) -> dict[str, Any]:
    """One row of the list; `problem` says what is wrong where the manifest or a file's size is."""
    try:
        checkpoint = Checkpoint.look(path)
    except CheckpointError as error:
        return {"path": str(path), "problem": str(error)}
    manifest = checkpoint.manifest
    return {
        "path": str(path),
        "step": manifest.step,
        "bytes": manifest.nbytes(),
        "world_size": manifest.world_size,
        "layout": manifest.layout,
        "kinds": manifest.kinds(),
        "parameters": sum(t.numel for (kind, _), t in manifest.tensors.items() if kind == WEIGHT),
        "position": manifest.info.get("position"),
        "problem": None,
    }


def verify(path: str | Path) -> Iterator[tuple[Path, str | None]]:
    """(checkpoint, what is wrong with it or None), every byte read."""
    for checkpoint in found(path):
        try:
            open_checkpoint(checkpoint)
        except CheckpointError as error:
            yield checkpoint, str(error)
        else:
            yield checkpoint, None


def export(path: str | Path, out: str | Path, dtype: str | None = None) -> Path:
    """Write the model of a checkpoint, or of the newest good one of a run, as a Hugging Face folder; its source."""
    paths = found(path)
    if len(paths) == 1:
        source = paths[0]
    else:
        newest = newest_good(paths[0].parent)
        assert newest is not None
        source = newest.path
    export_folder(source, out, dtype)
    return source


def convert(
    source: str | Path,
    out: str | Path,
    *,
    model: str | Path | None = None,
    weights_only: bool = False,
    step: int | None = None,
) -> str:
    """Make one of our checkpoints from other weights, or a Hugging Face folder from a checkpoint; what was done.

    source: one of our checkpoints (becomes a Hugging Face folder); a Hugging Face folder; or DeepSpeed's universal
    format, whose configuration and tokenizer come from the Hugging Face folder `model`, and AdamW's `step` where it
    leaves it out (ZeRO-3).

    Raises:
        ConfigError: `out` exists.
        CheckpointError: `source` is nothing of these, such as DeepSpeed's own files, which are pickled, or not of
            `model`.
    """
    quiet_transformers()
    path, target = Path(source), Path(out)
    if target.exists():
        raise ConfigError(f"{target} exists already: choose another folder")
    if not _TAG.fullmatch(target.name):
        raise ConfigError(f"{target.name!r}: a checkpoint's name has letters, digits, and . _ - behind the first")
    if (path / MANIFEST).is_file():
        export_folder(path, target)
        return "a Hugging Face folder"
    if (path / "zero").is_dir():
        if model is None:
            raise ConfigError(f"{path} says nothing of the model: name a folder with its config.json by --model")
        documents = _documents(Path(model))
        _write(target, list(_universal(path / "zero", parameter_shapes(model), weights_only, step)), documents)
        return "a checkpoint, from DeepSpeed's universal format"
    _refuse_deepspeed(path)
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path}: no checkpoint ({MANIFEST}), no Hugging Face folder (config.json), and not DeepSpeed's universal "
            "format (zero/)"
        )
    parameters = load_model(path).named_parameters()
    pieces = [p for name, tensor in parameters for p in whole(name, WEIGHT, tuple(tensor.shape), tensor)]
    _write(target, pieces, _documents(path))
    return "a checkpoint, from Hugging Face weights"


def _write(target: Path, pieces: list[Piece], documents: dict[str, bytes]) -> None:
    snapshot, _ = take(pieces, 0, {})
    contents = Contents(0, "converted", documents=documents, name=target.name)
    commit(target.parent, Ranks(), snapshot, contents)


def _documents(folder: Path) -> dict[str, bytes]:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json there")
    paths = {p for pattern in _DOCUMENTS for p in folder.glob(pattern) if p.is_file() and not p.is_symlink()}
    return {
        f"{MODEL_FOLDER}/{p.name}": p.read_bytes()
        for p in sorted(paths)
        if not _WEIGHT_FILES.fullmatch(p.name) and _TAG.fullmatch(p.name)
    }


# DeepSpeed -------------------------------------------------------------------------------------------------------


def _refuse_deepspeed(path: Path) -> None:
    tag = path / "latest"
    step = path / tag.read_text(encoding="utf-8").strip() if tag.is_file() else path
    if any(step.glob("*_states.pt")):
        raise CheckpointError(
            f"{path} is DeepSpeed's own format, which is pickled: make the universal format of it where you trust it "
            f"(python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state --input_folder {step} "
            "--output_folder NEW), and convert that. It keeps weights and AdamW's state; a Muon run continues "
            "from our checkpoints"
        )


def _universal(
    zero: Path, shapes: Mapping[str, tuple[int, ...]], weights_only: bool, step: int | None
) -> Iterator[Piece]:
    """The pieces of `zero/NAME/{fp32,exp_avg,...}.pt`; tensors and numbers alone are unpickled.

    Of ZeRO-3 the tensors are flat and AdamW's step is missing: `shapes` and `step` say what they are.
    """
    found = {p.name: p for p in sorted(zero.iterdir()) if (p / "fp32.pt").is_file() and not p.is_symlink()}
    if missing := shapes.keys() - found.keys():
        raise CheckpointError(f"{zero} does not hold {min(missing)}, which config.json says the model has")
    if unknown := found.keys() - shapes.keys():
        raise CheckpointError(f"{zero} holds {min(unknown)}, which config.json says the model does not have")
    for name, folder in found.items():
        files = {kind: folder / f"{file}.pt" for file, kind in _UNIVERSAL.items() if (folder / f"{file}.pt").is_file()}
        for kind, file in files.items():
            if weights_only and kind != WEIGHT:
                continue
            tensor = _tensor(file)
            if tensor.numel() != math.prod(shapes[name]):
                raise CheckpointError(f"{file} has {tensor.numel()} elements, {name} is of shape {shapes[name]}")
            yield from whole(name, kind, shapes[name], tensor.reshape(shapes[name]).contiguous())
        if "exp_avg" in files and not weights_only:
            yield from whole(name, "step", (), _adamw_step(folder / "step.pt", step))


def _adamw_step(file: Path, given: int | None) -> torch.Tensor:
    if not file.is_file() and given is None:
        raise CheckpointError(
            f"{file} is missing: of ZeRO-3 the universal format leaves AdamW's step out: name it by --step (it is "
            "in its source folder's name), or leave AdamW's state out by --weights-only"
        )
    value = _tensor(file) if file.is_file() else given
    return torch.as_tensor(value, dtype=torch.float32).reshape(())


def _tensor(path: Path) -> Any:
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds on what it refuses to unpickle
        raise CheckpointError(f"{path} is not a plain tensor: {type(error).__name__}: {error}") from error
    return value["param"] if isinstance(value, dict) else value


# Tables ----------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """The list for people."""
    lines = [f"{'step':>9}  {'size':>9}  {'ranks':>5}  {'layout':<13} holds"]
    for row in rows:
        if row["problem"] is not None:
            lines.append(f"{'damaged':>9}  {row['problem']}")
            continue
        holds = ", ".join(row["kinds"])
        size = f"{row['bytes'] / 2**20:,.1f} MiB"
        lines.append(f"{row['step']:>9}  {size:>9}  {row['world_size']:>5}  {row['layout']:<13} {holds}")
        lines.append(f"{'':>9}  {row['path']}")
    return "\n".join(lines)


def to_json(rows: list[dict[str, Any]]) -> str:
    """The list for programs."""
    return json.dumps(rows, indent=2)

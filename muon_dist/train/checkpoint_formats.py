"""The formats that `muon-dist checkpoint convert` reads: one class per format, tried in the order of `FORMATS`.

A new format is one subclass of `CheckpointFormat`, added to `FORMATS`.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from muon_dist.checkpoint import MODEL_FOLDER, Contents, Ranks
from muon_dist.checkpoint.manifest import NAME as MANIFEST
from muon_dist.checkpoint.manifest import is_checkpoint
from muon_dist.checkpoint.piece import WEIGHT, Piece, whole
from muon_dist.checkpoint.writer import commit, take
from muon_dist.errors import CheckpointError, ConfigError
from muon_dist.model.load import load_model, parameter_shapes
from muon_dist.train.models import export_folder

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
"""Of a checkpoint, and of a file in one."""
# what transformers needs besides the weights; never code
_DOCUMENTS = ("*.json", "*.model", "*.txt", "*.jinja")
_WEIGHT_FILES = re.compile(r".*\.(safetensors|safetensors\.index\.json|bin|pt|pth)")


@dataclass(frozen=True)
class Given:
    """Information that the caller gives in addition to the folder.

    model: Hugging Face folder with configuration and tokenizer. weights_only: leave optimizer state out. step: AdamW's
    step, if the folder does not contain it.
    """

    model: str | Path | None = None
    weights_only: bool = False
    step: int | None = None


class CheckpointFormat(ABC):
    """A format of saved weights."""

    @staticmethod
    @abstractmethod
    def matches(path: Path) -> bool:
        """Whether the folder `path` is of this format."""

    @staticmethod
    @abstractmethod
    def convert(path: Path, target: Path, given: Given) -> str:
        """Write the new folder `target` from `path`, and return a description of it. Raises CheckpointError,
        ConfigError."""


class Own(CheckpointFormat):
    """One of our checkpoints, which becomes a Hugging Face folder."""

    @staticmethod
    def matches(path: Path) -> bool:
        return is_checkpoint(path)

    @staticmethod
    def convert(path: Path, target: Path, given: Given) -> str:
        export_folder(path, target)
        return "a Hugging Face folder"


class Universal(CheckpointFormat):
    """DeepSpeed's universal format: `zero/NAME/{fp32,exp_avg,...}.pt`; only tensors and numbers are unpickled."""

    # file -> our kind
    files: ClassVar[Mapping[str, str]] = {
        "fp32": WEIGHT,
        "exp_avg": "exp_avg",
        "exp_avg_sq": "exp_avg_sq",
        "momentum_buffer": "momentum",
    }

    @staticmethod
    def matches(path: Path) -> bool:
        return (path / "zero").is_dir()

    @staticmethod
    def convert(path: Path, target: Path, given: Given) -> str:
        if given.model is None:
            raise ConfigError(f"{path} does not describe the model: name a folder with its config.json with --model")
        documents = _documents(Path(given.model))
        _write(target, Universal._pieces(path / "zero", parameter_shapes(given.model), given), documents)
        return "a checkpoint, from DeepSpeed's universal format"

    @staticmethod
    def _pieces(zero: Path, shapes: Mapping[str, tuple[int, ...]], given: Given) -> Iterator[Piece]:
        """Under ZeRO-3 the tensors are flat and AdamW's step is missing: `shapes` and `given.step` supply them."""
        found = {p.name: p for p in sorted(zero.iterdir()) if (p / "fp32.pt").is_file() and not p.is_symlink()}
        if missing := shapes.keys() - found.keys():
            raise CheckpointError(f"{zero} does not hold {min(missing)}, which the model has by its config.json")
        if unknown := found.keys() - shapes.keys():
            raise CheckpointError(f"{zero} holds {min(unknown)}, which the model does not have by its config.json")
        for name, folder in found.items():
            paths = {kind: folder / f"{file}.pt" for file, kind in Universal.files.items()}
            kinds = {kind: file for kind, file in paths.items() if file.is_file()}
            for kind, file in kinds.items():
                if given.weights_only and kind != WEIGHT:
                    continue
                tensor = _tensor(file)
                if tensor.numel() != math.prod(shapes[name]):
                    raise CheckpointError(f"{file} has {tensor.numel()} elements, but {name} has shape {shapes[name]}")
                yield from whole(name, kind, shapes[name], tensor.reshape(shapes[name]).contiguous())
            if "exp_avg" in kinds and not given.weights_only:
                yield from whole(name, "step", (), _adamw_step(folder / "step.pt", given.step))


class DeepSpeed(CheckpointFormat):
    """DeepSpeed's own files, which are pickled: refused; the message has the command that makes the universal
    format."""

    @staticmethod
    def _step_folder(path: Path) -> Path:
        tag = path / "latest"
        return path / tag.read_text(encoding="utf-8").strip() if tag.is_file() else path

    @staticmethod
    def matches(path: Path) -> bool:
        return any(DeepSpeed._step_folder(path).glob("*_states.pt"))

    @staticmethod
    def convert(path: Path, target: Path, given: Given) -> str:
        raise CheckpointError(
            f"{path} is DeepSpeed's own format, which is pickled: make the universal format of it where you trust it "
            "(python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state --input_folder "
            f"{DeepSpeed._step_folder(path)} --output_folder NEW), and convert that. It keeps weights and AdamW's "
            "state; a Muon run continues from our checkpoints"
        )


class HuggingFace(CheckpointFormat):
    """A model as transformers saves it, which becomes one of our checkpoints."""

    @staticmethod
    def matches(path: Path) -> bool:
        return (path / "config.json").is_file()

    @staticmethod
    def convert(path: Path, target: Path, given: Given) -> str:
        parameters = load_model(path).named_parameters()
        pieces = (p for name, tensor in parameters for p in whole(name, WEIGHT, tuple(tensor.shape), tensor))
        _write(target, pieces, _documents(path))
        return "a checkpoint, from Hugging Face weights"


FORMATS: tuple[type[CheckpointFormat], ...] = (Own, Universal, DeepSpeed, HuggingFace)


def format_of(path: Path) -> type[CheckpointFormat]:
    """The format of a folder. Raises CheckpointError if no format fits."""
    for one in FORMATS:
        if one.matches(path):
            return one
    raise CheckpointError(
        f"{path}: no checkpoint ({MANIFEST}), no Hugging Face folder (config.json), and not DeepSpeed's universal "
        "format (zero/)"
    )


def _write(target: Path, pieces: Iterable[Piece], documents: dict[str, bytes]) -> None:
    snapshot, _ = take(list(pieces), 0, {})
    contents = Contents(0, "converted", documents=documents, name=target.name)
    commit(target.parent, Ranks(), snapshot, contents)


def _documents(folder: Path) -> dict[str, bytes]:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: no config.json there")
    paths = {p for pattern in _DOCUMENTS for p in folder.glob(pattern) if p.is_file() and not p.is_symlink()}
    return {
        f"{MODEL_FOLDER}/{p.name}": p.read_bytes()
        for p in sorted(paths)
        if not _WEIGHT_FILES.fullmatch(p.name) and NAME.fullmatch(p.name)
    }


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
    except Exception as error:  # torch raises many kinds of errors when it refuses to unpickle
        raise CheckpointError(f"{path} is not a plain tensor: {type(error).__name__}: {error}") from error
    return value["param"] if isinstance(value, dict) else value

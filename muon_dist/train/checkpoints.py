"""`muon-dist checkpoint`: list, verify, export, convert."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from muon_dist.adapters.hf.callbacks import quiet_transformers
from muon_dist.checkpoint import Checkpoint, commits, newest_good, open_checkpoint
from muon_dist.checkpoint.manifest import is_checkpoint
from muon_dist.checkpoint.piece import WEIGHT
from muon_dist.errors import CheckpointError, ConfigError
from muon_dist.json_files import indented
from muon_dist.train.checkpoint_formats import NAME, Given, format_of
from muon_dist.train.folder import RunFolder
from muon_dist.train.models import export_folder


def found(path: str | Path) -> list[Path]:
    """The checkpoints under a path (a checkpoint, a run folder or a folder of checkpoints), oldest first.

    Raises CheckpointError when there is none.
    """
    root = Path(path)
    if is_checkpoint(root):
        return [root]
    paths = RunFolder(root).finished_checkpoints() or commits(root)
    if not paths:
        raise CheckpointError(f"{root}: neither a checkpoint nor a folder with finished ones")
    return paths


def describe(path: Path) -> dict[str, Any]:
    """One row of the list; `problem`: the error of the manifest or of a file's size, or None."""
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
    """(checkpoint, its damage or None) after every byte was read."""
    for checkpoint in found(path):
        try:
            open_checkpoint(checkpoint)
        except CheckpointError as error:
            yield checkpoint, str(error)
        else:
            yield checkpoint, None


def export(path: str | Path, out: str | Path, dtype: str | None = None) -> Path:
    """Write the model of a checkpoint, or of a run's newest undamaged one, as a Hugging Face folder. Returns its
    source."""
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
    """Make a muon-dist checkpoint from other weights, or a Hugging Face folder from a checkpoint. Returns a
    description.

    source: one of our checkpoints (becomes a Hugging Face folder); a Hugging Face folder; or DeepSpeed's universal
    format, whose configuration and tokenizer come from the Hugging Face folder `model`, and AdamW's `step` where it
    leaves it out (ZeRO-3).

    Raises:
        ConfigError: `out` exists.
        CheckpointError: `source` has another format, such as DeepSpeed's own pickled files, or is not of `model`.
    """
    quiet_transformers()
    path, target = Path(source), Path(out)
    if target.exists():
        raise ConfigError(f"{target} exists already: choose another folder")
    if not NAME.fullmatch(target.name):
        raise ConfigError(
            f"{target.name!r}: a checkpoint's name has letters, digits, . _ and -, and does not begin with a dot"
        )
    return format_of(path).convert(path, target, Given(model, weights_only, step))


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
    return indented(rows)

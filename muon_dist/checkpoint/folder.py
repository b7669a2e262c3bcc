"""The folder of checkpoints: commits, deletion of old ones, and cleanup after killed processes.

`checkpoint-STEP` is a commit. Names that begin with a dot are not commits: `.checkpoint-STEP.tmp-X` is being written,
`.checkpoint-STEP.old-X` is being replaced by a newer commit of the same step, `.trash-X` is being removed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from muon_dist.checkpoint.files import sync_folder
from muon_dist.checkpoint.manifest import is_checkpoint
from muon_dist.checkpoint.phases import enter

_COMMIT = re.compile(r"checkpoint-(\d+)")
_OLD = re.compile(r"\.checkpoint-(\d+)\.old-[0-9a-f]+")
_LEFT = re.compile(r"\.checkpoint-\d+\.tmp-[0-9a-f]+|\.trash-.*")


def checkpoint_name(step: int) -> str:
    """The name of the checkpoint of an optimizer step."""
    return f"checkpoint-{step}"


def temporary_name(step: int) -> str:
    """A new name for a checkpoint while it is written."""
    return f".checkpoint-{step}.tmp-{os.urandom(4).hex()}"


def step_of(path: str | Path) -> int | None:
    """The optimizer step in a checkpoint's name; None for other names."""
    name = Path(path).name
    match = _COMMIT.fullmatch(name) or _OLD.fullmatch(name)
    return int(match[1]) if match else None


def commits(root: str | Path) -> list[Path]:
    """Committed checkpoints, by name, oldest step first, without links. Their contents are not read."""
    found: dict[int, Path] = {}
    for pattern in (_OLD, _COMMIT):  # if both exist, the newer commit wins
        for path in Path(root).iterdir() if Path(root).is_dir() else ():
            match = pattern.fullmatch(path.name)
            if match and not path.is_symlink() and is_checkpoint(path):
                found[int(match[1])] = path
    return [path for _, path in sorted(found.items())]


def publish(temporary: Path, final: Path, rank: int = 0) -> None:
    """Rename a finished, synced folder to its final name. At every moment the old or the new commit exists."""
    root = final.parent
    old: Path | None = None
    if final.exists():
        old = final.with_name(f".{final.name}.old-{os.urandom(4).hex()}")
        enter("set_aside", final, rank)
        final.rename(old)
    enter("rename", final, rank)
    temporary.rename(final)
    sync_folder(root, rank)
    enter("renamed", final, rank)
    if old is not None:
        with contextlib.suppress(OSError):  # the commit is complete; `tidy` removes the rest
            remove(old, rank)


def remove(path: Path, rank: int = 0) -> None:
    """Rename a folder, then delete it file by file, so that no half-deleted folder counts as a commit."""
    enter("delete", path, rank)
    trash = path.with_name(f".trash-{path.name.lstrip('.')}-{os.urandom(4).hex()}")
    path.rename(trash)
    shutil.rmtree(trash)


def tidy(root: str | Path) -> list[Path]:
    """Remove temporary folders of killed processes; return the removed folders. No save may be running there.

    If a killed process had renamed a commit to replace it, but did not finish, the commit gets its name back.
    """
    removed = []
    for path in sorted(Path(root).iterdir()) if Path(root).is_dir() else ():
        if old := _OLD.fullmatch(path.name):
            final = path.with_name(checkpoint_name(int(old[1])))
            if not final.exists():
                path.rename(final)
                continue
        if old or _LEFT.fullmatch(path.name):
            shutil.rmtree(path)
            removed.append(path)
    return removed


def set_aside_after(root: str | Path, step: int) -> list[Path]:
    """Rename commits of later steps than `step`, which the resumed run will reach again; return the new paths."""
    moved = []
    for path in commits(root):
        number = step_of(path)
        if number is not None and number > step:
            target = path.with_name(f"set-aside-{checkpoint_name(number)}-{os.urandom(4).hex()}")
            path.rename(target)
            moved.append(target)
    return moved


def retire(
    root: str | Path,
    newest: Path,
    *,
    keep_last: int | None,
    keep_every: int | None,
    protected: Collection[Path] = (),
    rank: int = 0,
) -> list[Path]:
    """Remove the checkpoints that the policy does not keep; return them.

    newest: the newest commit, which is always kept. keep_last: number of newest commits to keep, `newest` included;
    None keeps all. keep_every: also keep steps that are multiples of it. protected: always kept (the best model).
    """
    if keep_last is None:
        return []
    names = {newest.name, *(Path(p).name for p in protected)}
    others = [p for p in commits(root) if p.name != newest.name]
    if keep_last > 1:
        names.update(p.name for p in others[-(keep_last - 1) :])
    removed = []
    for path in others:
        step = step_of(path)
        if path.name not in names and not (keep_every is not None and step is not None and step % keep_every == 0):
            remove(path, rank)
            removed.append(path)
    return removed

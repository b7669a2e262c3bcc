"""Limits, memory, disks and left-over locks of this machine."""

from __future__ import annotations

import os
import resource
import shlex
import shutil
from pathlib import Path

from muon_dist.doctor.verdict import Level, Verdict
from muon_dist.waiting import build_locks, extensions_folder

GIB = 2**30


def check_limits(files: int = 4096, infiniband: Path = Path("/sys/class/infiniband")) -> list[Verdict]:
    """Limits of open files, and of locked memory if there is InfiniBand. files: open files that a process needs."""
    verdicts = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < files:
        enough = hard == resource.RLIM_INFINITY or hard >= files
        fix = f"ulimit -n {files}" + ("" if enough else f", after raising the hard limit of {hard} (limits.conf)")
        text = f"a process may open {soft} files; sockets, data loaders and shards need {files}"
        verdicts.append(Verdict("limits", "warning", text, fix, figures={"files": soft}))
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if locked != resource.RLIM_INFINITY and infiniband.is_dir() and any(infiniband.iterdir()):
        text = f"InfiniBand needs locked memory, and a process may lock {locked / 2**20:.0f} MiB"
        fix = "ulimit -l unlimited (in a container: --ulimit memlock=-1)"
        verdicts.append(Verdict("limits", "problem", text, fix, figures={"memlock": locked}))
    return verdicts or [Verdict("limits", "ok", f"{soft} open files", figures={"files": soft})]


def check_shared_memory(path: Path = Path("/dev/shm"), wanted: float = 1.0) -> list[Verdict]:
    """Free shared memory, for NCCL and data loaders. wanted: GiB."""
    if not path.is_dir():
        return [Verdict("shared memory", "problem", f"{path} is not there", f"mount -t tmpfs tmpfs {path}")]
    usage = shutil.disk_usage(path)
    figures = {"total": usage.total, "free": usage.free}
    text = f"{path}: {usage.free / 2**20:,.0f} of {usage.total / 2**20:,.0f} MiB free"
    if usage.free >= wanted * GIB:
        return [Verdict("shared memory", "ok", text, figures=figures)]
    # docker's default of 64 MiB is too small for NCCL with 8 GPUs
    fix = f"in a container: --shm-size 8g; else: mount -o remount,size=8g {path}, or delete old files in it"
    level: Level = "problem" if usage.free < wanted * GIB / 16 else "warning"
    return [Verdict("shared memory", level, f"{text}, wanted {wanted:g} GiB", fix, figures=figures)]


def check_locks(folder: Path | None = None) -> list[Verdict]:
    """Locks that a killed build left behind: a later run waits for them forever, without a message.

    torch keeps a lock open while it builds (torch.utils.file_baton), so a lock that no process has open is stale.
    """
    locks = build_locks(folder)
    if not locks:
        return [Verdict("extension locks", "ok", f"none in {folder if folder is not None else extensions_folder()}")]
    verdicts = []
    for lock in locks:
        holder = _process_with(lock)
        if holder is None:
            text = f"{lock} is left from a build that was killed; the next one waits for it forever"
            verdicts.append(Verdict("extension locks", "problem", text, f"rm {shlex.quote(str(lock))}"))
        else:
            text = f"{lock}: process {holder} compiles there"
            verdicts.append(Verdict("extension locks", "warning", text, "wait until it is done"))
    return verdicts


def _process_with(path: Path) -> int | None:
    """A process that has the file open, among the processes that this user may inspect."""
    wanted = os.stat(path)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            for link in (process / "fd").iterdir():
                found = os.stat(link)
                if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                    return int(process.name)
        except OSError:
            continue
    return None


def check_disk(path: Path = Path("."), wanted: float = 20.0) -> list[Verdict]:
    """Free space in the folder for checkpoints, and whether it can be written. wanted: GiB."""
    existing = path
    while not existing.exists():
        existing = existing.absolute().parent
    usage = shutil.disk_usage(existing)
    files = os.statvfs(existing)
    figures = {"total": usage.total, "free": usage.free}
    text = f"{path}: {usage.free / GIB:,.1f} of {usage.total / GIB:,.1f} GiB free"
    if not os.access(existing, os.W_OK):
        return [
            Verdict("disk", "problem", f"{existing} cannot be written", "choose another --run-dir", figures=figures)
        ]
    if files.f_files and files.f_favail == 0:
        return [Verdict("disk", "problem", f"{path}: no inodes left", "delete files there", figures=figures)]
    if usage.free < wanted * GIB:
        fix = "free space, or choose another --run-dir; a checkpoint takes 8 to 12 bytes per parameter"
        level: Level = "problem" if usage.free < wanted * GIB / 20 else "warning"
        return [Verdict("disk", level, f"{text}, wanted {wanted:g} GiB", fix, figures=figures)]
    return [Verdict("disk", "ok", text, figures=figures)]

"""What a checkpoint costs: `python -m tests.checkpoint.cost [--config configs/llama-60m.yaml] [--json FILE]`.

One process, all state of Muon and AdamW after two steps on random gradients. Each kind of save is repeated; the first
of the background saves, which allocates its buffers, is shown by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from muon_dist import Muon, param_groups
from muon_dist.adapters import module_state
from muon_dist.checkpoint import Contents, Saver, load, open_checkpoint
from muon_dist.config import load_config
from muon_dist.model import build_model


def make(config: Path) -> tuple[torch.nn.Module, Muon]:
    """The model of a configuration, and its optimizer with state."""
    settings = load_config(config)
    vocabulary = settings.tokenizer.vocab_size or 32_000
    model = build_model(settings.model, vocab_size=vocabulary, seed=0, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    optimizer = Muon(param_groups(model, lr=0.01, weight_decay=0.1), ns_steps=1)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, optimizer


def seconds(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def plain_save(folder: Path, model: torch.nn.Module, optimizer: Muon) -> None:
    """What a training script does: one file, synced like ours."""
    path = folder / "plain.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def measure(config: Path, folder: Path, repeats: int) -> dict[str, Any]:
    model, optimizer = make(config)
    held = module_state.holding(model, optimizer, 1)
    times: dict[str, list[float]] = {"torch.save": [], "synchronous": [], "background": []}
    quiet, beside = Saver(folder / "a", keep_last=1), Saver(folder / "b", background=True, keep_last=1)
    written: list[float] = []
    for number in range(repeats + 1):
        times["torch.save"].append(seconds(lambda: plain_save(folder, model, optimizer)))
        for name, saver in (("synchronous", quiet), ("background", beside)):
            contents = Contents(number, held.layout)
            times[name].append(seconds(lambda saver=saver, contents=contents: saver.save(held.pieces, contents)))
        written.append(seconds(beside.wait))
    checkpoint = open_checkpoint(folder / "a" / f"checkpoint-{repeats}")
    checking = seconds(lambda: open_checkpoint(checkpoint.path))
    loading = seconds(lambda: load(checkpoint, held))
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": {"torch.save": (folder / "plain.pt").stat().st_size, "checkpoint": checkpoint.manifest.nbytes()},
        "seconds": {name: statistics.median(found[1:]) for name, found in times.items()},
        "first background save": times["background"][0],
        "written in the background": statistics.median(written[1:]),
        "verify": checking,
        "load": loading,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/llama-60m.yaml"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the temporary folder")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        found = measure(chosen.config, Path(folder), chosen.repeats)
    sizes = found["bytes"]
    print(f"{found['parameters']:,} parameters; bytes: torch.save {sizes['torch.save']:,}, "
          f"checkpoint {sizes['checkpoint']:,} ({sizes['checkpoint'] / sizes['torch.save'] - 1:+.2%})")  # fmt: skip
    base = found["seconds"]["torch.save"]
    for name, value in found["seconds"].items():
        print(f"a step waits {value:7.3f} s for {name:<12} {value / base:6.1%} of torch.save")
    print(f"first background save {found['first background save']:.3f} s; written after "
          f"{found['written in the background']:.3f} s more; verified in {found['verify']:.3f} s, loaded in "
          f"{found['load']:.3f} s")  # fmt: skip
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""The file of docs/own-loop.md, run as it stands: saved on two ranks, continued on three."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.distributed import run_ranks


def code(root: Path, sharding: str, dtype: str, steps: int) -> str:
    """The page's file with other settings. The ranks of a test have their process group already."""
    found = re.search(
        r"<!-- file: train.py -->\n```python\n(.*?)```", (root / "docs/own-loop.md").read_text(), re.DOTALL
    )
    assert found is not None
    text = found[1]
    for old, new in (
        ('SHARDING = "ddp"', f'SHARDING = "{sharding}"'),
        ("DTYPE = torch.float32", f"DTYPE = torch.{dtype}"),
        ("STEPS, WARMUP, SAVE_EVERY = 20,", f"STEPS, WARMUP, SAVE_EVERY = {steps},"),
        ('dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")\n', ""),
        ("dist.destroy_process_group()\n", ""),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def follow(folder: str, text: str) -> tuple[dict[str, torch.Tensor], str]:
    """Run the file in `folder`; its weights at the end, whole, and what it printed."""
    os.makedirs(folder, exist_ok=True)
    os.chdir(folder)
    file = Path(f"train-{dist.get_rank()}.py")
    file.write_text(text)  # a file, because routing reads the source of `forward`
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        names = runpy.run_path(str(file))
    weights = {
        name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach().float().clone()
        for name, p in names["model"].named_parameters()
    }
    return weights, said.getvalue()


@pytest.mark.each_choice
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_it_continues_on_another_number_of_ranks(root: Path, tmp_path: Path, sharding: str, dtype: str) -> None:
    split, whole = str(tmp_path / "split"), str(tmp_path / "whole")
    run_ranks(follow, 2, split, code(root, sharding, dtype, 10))
    continued, said = run_ranks(follow, 3, split, code(root, sharding, dtype, 20))[0]
    assert re.findall(r"^step (\d+)", said, re.MULTILINE)[0] == "11"
    expected, _ = run_ranks(follow, 3, whole, code(root, sharding, dtype, 20))[0]
    # Sums over 2 and 3 ranks are rounded differently. AdamW makes full steps of bfloat16 gradients, which have 8 bits.
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    for name, weight in expected.items():
        assert (continued[name] - weight).norm() <= tolerance * weight.norm(), name

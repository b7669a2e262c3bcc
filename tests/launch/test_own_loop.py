"""The files of docs/own-loop.md, run as they stand: saved on two ranks, continued on three."""

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


def code(root: Path, file: str, *settings: str) -> str:
    """A file of the page with other settings, such as `STAGE = 1`. The ranks of a test have their process group."""
    found = re.search(
        rf"<!-- file: {file} -->\n```python\n(.*?)```", (root / "docs/own-loop.md").read_text(), re.DOTALL
    )
    assert found is not None
    group = r"^(dist\.init_process_group|dist\.destroy_process_group|deepspeed\.init_distributed)\(.*\n"
    text = re.sub(group, "", found[1], flags=re.MULTILINE)
    for setting in settings:
        name, value = setting.split(" = ")
        text, changed = re.subn(rf"^({name}\b[^=\n]*= )[^,\s]+", rf"\g<1>{value}", text, flags=re.MULTILINE)
        assert changed == 1, setting
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
    if "engine" in names:
        from tests.adapters.deepspeed_ranks import master

        return master(names["engine"], names["optimizer"]), said.getvalue()
    weights = {
        name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach().float().clone()
        for name, p in names["model"].named_parameters()
    }
    return weights, said.getvalue()


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert (found[name] - weight).norm() <= tolerance * weight.norm(), name


@pytest.mark.each_choice
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_it_continues_on_another_number_of_ranks(root: Path, tmp_path: Path, sharding: str, dtype: str) -> None:
    split, whole = str(tmp_path / "split"), str(tmp_path / "whole")
    settings = (f'SHARDING = "{sharding}"', f"DTYPE = torch.{dtype}")
    run_ranks(follow, 2, split, code(root, "train.py", *settings, "STEPS = 10"))
    continued, said = run_ranks(follow, 3, split, code(root, "train.py", *settings))[0]
    assert re.findall(r"^step (\d+)", said, re.MULTILINE)[0] == "11"
    expected, _ = run_ranks(follow, 3, whole, code(root, "train.py", *settings))[0]
    # Sums over 2 and 3 ranks are rounded differently. AdamW makes full steps of bfloat16 gradients, which have 8 bits.
    same(continued, expected, 1e-5 if dtype == "float32" else 1e-2)


@pytest.mark.deepspeed
@pytest.mark.each_choice
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage, later", [(1, 2), (2, 3), (3, 1)])
def test_deepspeed_continues_at_another_stage(root: Path, tmp_path: Path, stage: int, later: int, bf16: bool) -> None:
    pytest.importorskip(
        "tests.adapters.deepspeed_ranks"
    )  # DeepSpeed's settings for tests, before the ranks are forked
    split, whole = str(tmp_path / "split"), str(tmp_path / "whole")
    file = "train_deepspeed.py"
    run_ranks(follow, 2, split, code(root, file, f"STAGE = {stage}", f"BF16 = {bf16}", "STEPS = 10"))
    continued, said = run_ranks(follow, 3, split, code(root, file, f"STAGE = {later}", f"BF16 = {bf16}"))[0]
    assert re.findall(r"^step (\d+)", said, re.MULTILINE)[0] == "11"
    expected, _ = run_ranks(follow, 3, whole, code(root, "train.py"))[0]  # DDP, fp32
    same(continued, expected, 3e-2 if bf16 else 1e-5)  # gradients of 8 bits: AdamW steps fully along rounding

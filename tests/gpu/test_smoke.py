"""Tests of a GPU: every path on the device against the CPU in fp64, memory, host reads, kernels, speed.

Tests whose failure stops everything come first. Without a GPU the same tests run on the CPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from muon_dist import Muon, newton_schulz
from muon_dist.bench.memory import peak_bytes
from muon_dist.bench.orthogonalize import run as bench_orthogonalize
from muon_dist.checkpoint.host_memory import HostMemory
from muon_dist.checkpoint.piece import whole
from muon_dist.checkpoint.writer import take
from muon_dist.exchange.transport import Transport
from muon_dist.numerics import compute_dtype, kernel_name
from muon_dist.optim.rules import RULES
from tests.distributed import run_ranks
from tests.gpu.models import alone, error, gradients, optimizer, parameters
from tests.gpu.parity import LAYOUTS, compare

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
Figure = Callable[[str, object], None]
GPUS = torch.cuda.device_count() if os.environ.get("MUON_DIST_SMOKE_DEVICE") != "cpu" else 0
# CI does the same on the CPU in tests/numerics and tests/train.
ELSEWHERE = pytest.mark.skipif(
    not GPUS and not os.environ.get("MUON_DIST_SMOKE_DEVICE"), reason="tested on the CPU elsewhere"
)


def test_environment(device: torch.device, figure: Figure) -> None:
    figure("torch", torch.__version__)
    if device.type == "cuda":
        figure("GPU", torch.cuda.get_device_name(device))
        figure("capability", str(torch.cuda.get_device_capability(device)))
        figure("NCCL", str(torch.cuda.nccl.version()))
        figure("memory, GiB", round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1))


@pytest.mark.parametrize(
    "shape", [(512, 1024), (1024, 512), (768, 768), (130, 257), (4, 512, 1376), (2, 256, 128), (64, 64, 40)], ids=str
)
def test_newton_schulz_is_that_of_the_cpu_in_fp64(
    shape: tuple[int, ...], device: torch.device, figure: Figure
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if device.type == "cpu" and x.numel() > 200_000:
        pytest.skip("too long for a CPU, whose bf16 may be in software")
    exact = newton_schulz(x.double(), dtype=torch.float64)
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)):
        if device.type == "cpu" and dtype == torch.float16:
            continue  # in software
        found = error([newton_schulz(x.to(device), dtype=dtype)], [exact])
        figure(f"error, {kernel_name(*shape[-2:], dtype, device)}, {'x'.join(map(str, shape))}", f"{found:.1e}")
        assert found < bound


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_fp32_is_fp32_whatever_products_are_set_to(precision: str, device: torch.device) -> None:
    x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    exact = newton_schulz(x.double(), dtype=torch.float64)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert error([newton_schulz(x.to(device), dtype=torch.float32)], [exact]) < 1e-4
    finally:
        torch.set_float32_matmul_precision(before)


def test_every_matrix_of_a_stack_is_treated_alone(device: torch.device, figure: Figure) -> None:
    size = (6, 512, 1024) if device.type == "cuda" else (6, 96, 160)
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device)
    for dtype in (torch.float32, torch.bfloat16):
        stack, singles = newton_schulz(x, dtype=dtype), torch.stack([newton_schulz(y, dtype=dtype) for y in x])
        figure(f"a stack of 6 has the bits of its matrices alone, {dtype}", torch.equal(stack, singles))
        assert error([stack], [singles]) < (1e-5 if dtype == torch.float32 else 2e-2)
    bad = x.clone()
    bad[1, 0, 0] = float("nan")
    bad[2] *= 1e-30
    bad[3] = 0
    y, z = newton_schulz(bad, dtype=torch.float32), newton_schulz(x, dtype=torch.float32)
    assert y[1].isnan().all() and not y[3].any()
    assert torch.equal(y[0], z[0]) and error([y[2]], [z[2]]) < 1e-3


@pytest.mark.parametrize("rule", RULES)
def test_a_step_is_that_of_the_cpu(rule: str, device: torch.device) -> None:
    if device.type == "cpu" and rule != "muon":
        pytest.skip("compares the CPU with itself")
    options = {"rule": rule, **({} if rule == "hyperball" else {"weight_decay": 0.1})}
    assert error(alone(device, **options), alone(torch.device("cpu"), **options)) < 1e-4


@contextlib.contextmanager
def no_host_reads(device: torch.device, reads: list[int], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, every wait of the host for the device is an error, except the one for the flags of the gradients."""
    real = Transport.highest
    cuda = device.type == "cuda"

    def highest(self: Transport, *values: torch.Tensor) -> Any:
        reads.append(1)
        if cuda:
            torch.cuda.set_sync_debug_mode("default")
        found = real(self, *values)
        if cuda:
            torch.cuda.set_sync_debug_mode("error")
        return found

    monkeypatch.setattr(Transport, "highest", highest)
    try:
        if cuda:
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        if cuda:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rule", RULES)
def test_the_host_waits_once_in_a_step(
    rule: str, device: torch.device, wait: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = parameters(device)
    muon = optimizer(weights, process_group=None, rule=rule)
    for step in range(3):
        for p, g in zip(weights, gradients(step), strict=True):
            p.grad = g.to(device)
        reads: list[int] = []
        wait()
        with no_host_reads(device, reads, monkeypatch) if step == 2 else contextlib.nullcontext():
            muon.step()
    assert reads == [1]


def test_a_background_save_holds_what_was_there(device: torch.device, wait: Callable[[], None]) -> None:
    x = torch.randn(2048, 2048, device=device)
    pieces, memory = whole("w", "weight", tuple(x.shape), x), HostMemory()
    for _ in range(3):
        before = x.clone()
        snapshot, _ = take(pieces, 0, {}, host=memory)
        for _ in range(50):
            x.add_(1.0)
        wait()
        assert torch.equal(snapshot.items[0][1].view_as(before).to(device), before)


@pytest.mark.parametrize("adamw", [False, True])
def test_a_step_allocates_at_most_two_buckets(
    adamw: bool, device: torch.device, wait: Callable[[], None], figure: Figure
) -> None:
    """Of a stack of layers as of a 1B Llama, and with two embeddings of 67M under AdamW, on a GPU."""
    cuda = device.type == "cuda"
    side, bucket = (2048, 256.0) if cuda else (128, 1.0)
    layer = [(side, side)] * 4 + [(2 * side, side)] * 2 + [(side, 2 * side)]
    weights = [torch.nn.Parameter(torch.zeros(s, device=device)) for s in layer * (2 if adamw else 6)]
    others = (
        [torch.nn.Parameter(torch.zeros((16 if cuda else 12) * side, side, device=device)) for _ in range(2)]
        if adamw
        else []
    )
    groups = [{"params": weights}, *([{"params": others, "algorithm": "adamw"}] if adamw else [])]
    muon = Muon(groups, lr=1e-3, bucket_mb=bucket, process_group=None)
    for _ in range(3):
        for p in weights + others:
            p.grad = torch.randn_like(p)
        wait()
        if cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            muon.step()
            wait()
            peak = torch.cuda.max_memory_allocated() - before
        else:
            peak = peak_bytes(muon.step)
    figure(
        f"allocated in a step{' with AdamW' if adamw else ''}, MiB (bound {2 * bucket:.0f})", round(peak / 2**20, 1)
    )
    assert peak <= 2 * bucket * 2**20


def ranks_environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def torchrun(ranks: int, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m",
               "tests.gpu.parity", *arguments]  # fmt: skip
    environment = ranks_environment()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{"))))


@pytest.mark.parametrize(("layout", "ranks"), [("copies", 2), ("rows", 3)])
def test_ranks_that_share_one_device(layout: str, ranks: int, device: torch.device, figure: Figure) -> None:
    """gloo carries tensors of a GPU as well; NCCL refuses two ranks on one."""
    if device.type == "cuda":
        found = torchrun(ranks, layout, "--backend", "gloo", "--device", str(device))
    else:  # forked ranks import nothing; CUDA does not survive a fork
        found = run_ranks(compare, ranks, layout, device)[0]
    figure(f"{layout}, {ranks} ranks: error to one process", f"{found['error']:.1e}")
    figure(f"{layout}, {ranks} ranks: overlap on and off have the same bits", found["overlap_same_bits"])
    assert found["copies_equal"] and found["error"] < 1e-4 and found["overlap_error"] < 1e-4


@pytest.mark.skipif(not GPUS, reason="needs a GPU")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nccl_of_ranks_that_share_one_gpu(layout: str, device: torch.device, figure: Figure) -> None:
    found = torchrun(4 if layout == "hsdp" else 2, layout, "--backend", "cpu:gloo,cuda:nccl", "--device", str(device))
    figure(f"NCCL on one GPU, {layout}: error to one process", f"{found['error']:.1e}")
    figure(f"NCCL on one GPU, {layout}: overlap on and off have the same bits", found["overlap_same_bits"])
    assert found["copies_equal"] and found["error"] < 1e-4 and found["overlap_error"] < 1e-4


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_with_a_gpu_each(layout: str, figure: Figure) -> None:
    if layout == "hsdp" and GPUS < 4:
        pytest.skip("needs four GPUs")
    found = torchrun(4 if layout == "hsdp" else min(GPUS, 8), layout, "--backend", "cpu:gloo,cuda:nccl")
    figure(f"NCCL, {layout}: error to one process", f"{found['error']:.1e}")
    figure(f"NCCL, {layout}: overlap on and off have the same bits", found["overlap_same_bits"])
    assert found["copies_equal"] and found["error"] < 1e-4 and found["overlap_error"] < 1e-4


# Speed --------------------------------------------------------------------------------------------------------------


def layers(device: torch.device) -> list[torch.nn.Parameter]:
    side, count = (2048, 22) if device.type == "cuda" else (64, 2)
    layer = [(side, side)] * 4 + [(11 * side // 4, side)] * 2 + [(side, 11 * side // 4)]
    return [torch.nn.Parameter(torch.zeros(s, device=device)) for s in layer * count]


def stepped(muon: torch.optim.Optimizer, wait: Callable[[], None], steps: int = 3) -> tuple[float, float]:
    """Seconds of the host and of the whole step, the best of some."""
    best = (float("inf"), float("inf"))
    for _ in range(steps):
        wait()
        start = time.perf_counter()
        muon.step()
        host = time.perf_counter() - start
        wait()
        best = min(best, (host, time.perf_counter() - start), key=lambda pair: pair[1])
    return best


def test_kernels_and_host_time(device: torch.device, wait: Callable[[], None], figure: Figure) -> None:
    weights = layers(device)
    muon = Muon(weights, lr=1e-3, process_group=None)
    for p in weights:
        p.grad = torch.randn_like(p)
    muon.step()
    host, whole_step = stepped(muon, wait)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        muon.step()
        wait()
    kernels = [e for e in profiler.events() if str(e.device_type).endswith("CUDA") and not e.is_user_annotation]
    millions = sum(p.numel() for p in weights) / 1e6
    figure(f"one rank, {millions:.0f}M elements: host, ms", round(1e3 * host, 2))
    figure(f"one rank, {millions:.0f}M elements: step, ms", round(1e3 * whole_step, 2))
    figure(f"one rank, {millions:.0f}M elements: kernels and copies", len(kernels))
    if device.type == "cuda":
        busy = sum(e.device_time_total for e in kernels) / 1e3
        figure(f"one rank, {millions:.0f}M elements: GPU busy, ms", round(busy, 2))


def test_against_torchs_muon(device: torch.device, wait: Callable[[], None], figure: Figure) -> None:
    """In turn on the same weights, both in the dtype that torch's computes in (bf16)."""
    found: dict[str, float] = {}
    sides = {
        "ours": lambda ps: Muon(ps, lr=1e-3, ns_dtype=torch.bfloat16, process_group=None),
        "torch.optim.Muon": lambda ps: torch.optim.Muon(ps, lr=1e-3, adjust_lr_fn="match_rms_adamw"),
    }
    made = {}
    for name, make in sides.items():
        weights = layers(device)
        for p in weights:
            p.grad = torch.randn_like(p)
        made[name] = make(weights)
        made[name].step()
    for name, muon in made.items():
        found[name] = stepped(muon, wait)[1]
        figure(f"step of {name}, bf16, ms", round(1e3 * found[name], 2))
    figure("torch.optim.Muon / ours", round(found["torch.optim.Muon"] / found["ours"], 2))


def test_the_iteration_against_its_products(device: torch.device, figure: Figure) -> None:
    cuda = device.type == "cuda"
    dtypes = ["float32", "bfloat16", "float16"] if cuda else ["float32"]
    for row in bench_orthogonalize("gpu" if cuda else "ci", dtypes, "", device):
        figure(
            f"Newton-Schulz {row['batch']} x {row['rows']} x {row['cols']}, {row['dtype']}, {row['form']}",
            f"{1e3 * row['seconds']:.2f} ms, {row['flops_per_second'] / 1e12:.1f} TFLOP/s, "
            f"{row['ratio_of_products']:.2f} of its products alone, error to fp64 {row['error_to_float64']:.1e}",
        )


@ELSEWHERE
def test_compiled_equals_the_loop(device: torch.device, figure: Figure) -> None:
    x = torch.randn(4, 128, 344, device=device)
    start = time.perf_counter()
    found = newton_schulz(x, compiled=True)
    figure("torch.compile of one shape, s", round(time.perf_counter() - start, 1))
    dtype = compute_dtype(None, device)
    assert error([found], [newton_schulz(x)]) < (1e-4 if dtype == torch.float32 else 2e-2)


# A whole run ---------------------------------------------------------------------------------------------------------


@ELSEWHERE
def test_a_run_is_told_to_stop_and_goes_on(device: torch.device, tmp_path: Path, figure: Figure) -> None:
    """`muon-dist train` with guards and saves in the background: SIGTERM, then the losses of a run without a stop."""
    settings = [
        "configs/quickstart.yaml", f"run_dir={tmp_path}", f"data.dir={tmp_path / 'data'}", "trainer.max_steps=24",
        "trainer.save_steps=8", "trainer.eval_strategy=no", "trainer.logging_steps=1", "data.sequence_length=128",
        "trainer.per_device_train_batch_size=2", "evaluation.generate_tokens=0", "checkpoint.async=true",
        "model={model_type: llama, hidden_size: 64, intermediate_size: 176, num_hidden_layers: 2, "
        "num_attention_heads: 4, num_key_value_heads: 4}",
        f"trainer.use_cpu={str(device.type == 'cpu').lower()}", "tokenizer.sample_bytes=2000000",
    ]  # fmt: skip
    environment = ranks_environment()

    def start(name: str, *more: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "muon_dist.cli", "train", *settings, f"name={name}", *more]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def losses(name: str) -> dict[int, float]:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return {entry["step"]: entry["loss"] for entry in map(json.loads, lines) if "loss" in entry}

    whole_run = start("whole")
    output, _ = whole_run.communicate(timeout=600)
    assert whole_run.returncode == 0, output[-3000:]
    stopped = start("stopped")
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 5:
        assert stopped.poll() is None and time.monotonic() < deadline, stopped.communicate()[0][-3000:]
        time.sleep(0.05)
    stopped.send_signal(signal.SIGTERM)
    output, _ = stopped.communicate(timeout=300)
    assert stopped.returncode in (75, 0), output[-3000:]
    if stopped.returncode == 75:
        resumed = start("stopped", "--resume", "auto")
        output, _ = resumed.communicate(timeout=600)
        assert resumed.returncode == 0, output[-3000:]
    first, again = losses("whole"), losses("stopped")
    assert first.keys() == again.keys()
    worst = max(abs(first[s] - again[s]) for s in first)
    figure("largest difference of the losses after a stop", worst)
    assert worst <= (0.0 if device.type == "cpu" else 1e-3)

"""bf16 on the wire: what it does to the update, by spectrum, and to the loss of a run.

Figures of docs/performance.md: pytest -s -m "slow or not slow" tests/optim/test_wire.py
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from muon_dist.numerics import newton_schulz
from muon_dist.optim import Muon, param_groups
from tests.distributed import run_ranks
from tests.numerics.spectra import gaussian, log_spaced, power_law, relative_error, with_spectrum

SPECTRA = {
    "gaussian": None,
    "cond1e2": log_spaced(96, 1e2),
    "cond1e4": log_spaced(96, 1e4),
    "cond1e6": log_spaced(96, 1e6),
    "power1": power_law(96, 1),
    "power2": power_law(96, 2),
    "rank8": power_law(8, 0),
    "rank1": power_law(1, 0),
}


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


@pytest.mark.parametrize("spectrum", list(SPECTRA))
def test_bf16_on_the_wire_is_no_worse_than_newton_schulz_in_bf16(spectrum: str) -> None:
    """Every element rounded once on its way there and once on its way back; Newton-Schulz between in fp32."""
    values = SPECTRA[spectrum]
    x = (gaussian(96, 256, seed=0) if values is None else with_spectrum(96, 256, values, seed=0)[0]).float()
    exact = newton_schulz(x, dtype=torch.float32)
    scattered = exact.bfloat16()
    both = newton_schulz(x.bfloat16().float(), dtype=torch.float32).bfloat16()
    computed = newton_schulz(x, dtype=torch.bfloat16)
    errors = [relative_error(y, exact) for y in (scattered, both, computed)]
    cosines = [cosine(y, exact) for y in (scattered, both, computed)]
    print(spectrum, *(f"{c:.6f} {e:.4f}" for c, e in zip(cosines, errors, strict=True)))
    assert errors[0] < 0.002 and cosines[0] > 0.999998
    assert errors[1] < errors[2]


def noisy(spectrum: str, noise: float) -> Iterator[torch.Tensor]:
    """80 gradients (96, 256) in fp32: in every singular direction a signal, and noise `noise` times as large."""
    values, generator = SPECTRA[spectrum], torch.Generator().manual_seed(1)
    if values is None:
        signal = gaussian(96, 256, seed=0)
        yield from ((signal + noise * gaussian(96, 256, seed=s)).float() for s in range(1, 81))
        return
    u, v = (torch.linalg.qr(gaussian(n, len(values), seed=n)).Q for n in (96, 256))
    for _ in range(80):
        drawn = 1 + noise * torch.randn(len(values), dtype=torch.float64, generator=generator)
        yield ((u * (values * drawn)) @ v.T).float()


@pytest.mark.parametrize("noise", [1.0, 4.0])
@pytest.mark.parametrize("spectrum", list(SPECTRA))
def test_rounding_of_gradients_averages_out(spectrum: str, noise: float) -> None:
    """Gradients sent in bf16 make a better update than momentum sent in bf16.

    But for one: of rank 1 all noise is in one number, whose draws nearly cancel here: momentum is small beside
    the rounding of the gradients.
    """
    momentum, of_rounded = torch.zeros(96, 256), torch.zeros(96, 256)
    for gradient in noisy(spectrum, noise):
        rounded = gradient.bfloat16().float()
        momentum.lerp_(gradient, 0.05)
        of_rounded.lerp_(rounded, 0.05)
    sent = [gradient.lerp(momentum, 0.95), gradient.lerp(momentum, 0.95).bfloat16(), rounded.lerp(of_rounded, 0.95)]
    exact, by_momentum, by_gradients = (newton_schulz(x.float(), dtype=torch.float32) for x in sent)
    errors = [relative_error(y, exact) for y in (by_momentum, by_gradients)]
    cosines = [cosine(y, exact) for y in (by_momentum, by_gradients)]
    print(spectrum, noise, *(f"{c:.6f} {e:.4f}" for c, e in zip(cosines, errors, strict=True)))
    assert (errors[1] < 0.75 * errors[0]) != ((spectrum, noise) == ("rank1", 4.0))


def losses(wire_dtype: torch.dtype | None, ns_dtype: torch.dtype, seed: int, steps: int) -> list[float]:
    """A byte-level Llama on the source of the standard library, under FSDP2: this rank's losses."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=176, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=64,
        )
    )  # fmt: skip
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    groups = param_groups(model, lr=0.01, adamw_lr=0.003)
    optimizer = Muon(groups, wire_dtype=wire_dtype, ns_dtype=ns_dtype)
    text = b"".join(path.read_bytes() for path in sorted(Path(statistics.__file__).parent.glob("*.py")))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
    found = []
    for _ in range(steps):
        starts = torch.randint(len(data) - 64, (8,), generator=generator)
        batch = torch.stack([data[s : s + 64] for s in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss))
    return found


@pytest.mark.slow
def test_bf16_on_the_wire_does_not_change_the_loss() -> None:
    """Two seeds each: the difference that the wire makes is smaller than the one that the seed makes."""
    variants = {
        "exact": (None, torch.float32),
        "bf16 wire": (torch.bfloat16, torch.float32),
        "bf16 wire, bf16 Newton-Schulz": (torch.bfloat16, torch.bfloat16),
    }
    final: dict[str, list[float]] = {}
    for name, (wire, compute) in variants.items():
        for seed in (0, 1):
            by_rank = run_ranks(losses, 2, wire, compute, seed, 200, timeout=170.0)
            final.setdefault(name, []).append(statistics.mean(loss for rank in by_rank for loss in rank[-40:]))
    print(final)
    exact = final["exact"]
    assert max(exact) < 2.6  # from 5.5: it has learned
    for name in list(variants)[1:]:
        assert abs(statistics.mean(final[name]) - statistics.mean(exact)) < max(abs(exact[0] - exact[1]), 0.02), name

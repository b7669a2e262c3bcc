"""What an audit costs: time and bytes beside a step of training.

    python -m tests.audit_cost [STEPS] [K]

Two DDP ranks train a Llama of 24 M parameters outside embedding and head (the model of configs/llama-60m.yaml) on
short batches, so that the share of the audit is if anything too large. The time is what the host spends in the audit,
waiting for the other rank included; the bytes are what a rank sends for it, against its share of a ring all-reduce of
the gradients and its updates.
"""

from __future__ import annotations

import sys
import time
import warnings

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModelForCausalLM

from muon_dist.optim import Muon, param_groups
from tests.distributed import run_ranks

TOKENS = 1024


def cost(steps: int, every: int) -> dict[str, float]:
    """Of one rank."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8, vocab_size=2048,
        num_key_value_heads=8,
    )  # fmt: skip
    plain = AutoModelForCausalLM.from_config(config)
    model = DistributedDataParallel(plain)
    optimizer = Muon(param_groups(plain, lr=1e-3), lr=1e-3, audit={"every": every})
    audit, total, seconds = optimizer.audit, 0.0, 0.0
    for step in range(steps + 1):
        ids = torch.randint(0, 2048, (TOKENS // 256, 256))
        began = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step:  # the first plans
            total += time.perf_counter() - began
        else:
            seconds = audit.seconds
    gradients = 4 * sum(p.numel() for p in plain.parameters())  # ring all-reduce on two ranks: once in each direction
    updates = (optimizer.runtime.transport.bytes_sent - audit.bytes_sent) / (steps + 1)
    return {
        "parameters": sum(p.numel() for g in optimizer.param_groups[:1] for p in g["params"]),
        "step": total / steps,
        "audit": (audit.seconds - seconds) / steps,
        "bytes": gradients + updates,
        "audit bytes": audit.bytes_sent / (steps + 1),
        "alarms": len(audit.alarms),
    }


def main() -> None:
    steps, every = (int(a) for a in (sys.argv[1:] + ["20", "20"][len(sys.argv) - 1 :])[:2])
    every_rank = run_ranks(cost, 2, steps, every, timeout=1800.0)
    print("| rank | Muon parameters | step, s | audit, ms | share | bytes, MB | audit, MB | share | alarms |")
    print("|---|---|---|---|---|---|---|---|---|")
    for rank, c in enumerate(every_rank):
        times = f"{c['step']:.2f} | {1e3 * c['audit']:.1f} | {c['audit'] / c['step']:.2%}"
        sent = f"{c['bytes'] / 1e6:.0f} | {c['audit bytes'] / 1e6:.2f} | {c['audit bytes'] / c['bytes']:.2%}"
        print(f"| {rank} | {c['parameters'] / 1e6:.1f} M | {times} | {sent} | {c['alarms']} |")


if __name__ == "__main__":
    main()

"""What QK-clip costs: steps of a small Llama with and without it, in turn, on one process.

    python -m tests.measure_qk_clip

Without: its hooks are attached, but they look at no forward pass. Each forward pass with it computes the logits once
more, without gradients.
"""

from __future__ import annotations

import statistics
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from muon_dist import Muon, param_groups
from muon_dist.adapters.hf import attention
from muon_dist.routing import route

ROUNDS = 9
SIZES = ((128, 256), (128, 1024), (384, 256))
"""Width of the model, tokens of the sample."""


def seconds(width: int, length: int) -> tuple[list[float], list[float]]:
    """Of the steps (without, with), after one of each."""
    config = AutoConfig.for_model(
        "llama", vocab_size=1024, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4,
        num_attention_heads=width // 32, num_key_value_heads=width // 32, max_position_embeddings=length,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
    optimizer = Muon(param_groups(model, lr=0.01, table=route(model)))
    attention.attach(model, optimizer)
    watched = dict(attention._watched)
    tokens = torch.randint(0, 1024, (1, length))
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(2 * ROUNDS + 2):
        attention._watched.clear()
        if number % 2:
            attention._watched.update(watched)
        begin = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found[number % 2].append(time.perf_counter() - begin)
    return found[0][1:], found[1][1:]


def main() -> None:
    torch.set_num_threads(1)
    print("| width | tokens | step without | with | ratio (lowest to highest) |\n|---|---|---|---|---|")
    for width, length in SIZES:
        without, with_ = seconds(width, length)
        ratios = [b / a for a, b in zip(without, with_, strict=True)]
        print(
            f"| {width} | {length} | {1e3 * statistics.median(without):.0f} ms | "
            f"{1e3 * statistics.median(with_):.0f} ms | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()

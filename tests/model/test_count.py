"""Counts against the sums of the architectures, and against the operations that torch counts."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from muon_dist.model import build_model, count_parameters, flops_per_token
from tests.model.test_build import KINDS, LLAMA

VOCAB, WIDTH, INNER, LAYERS = 96, 32, 64, 2
# four attention weights, three of the feed-forward, two norms; the last norm
LLAMA_BODY = LAYERS * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER + 2 * WIDTH) + WIDTH


def test_llama_untied_and_tied() -> None:
    body, table = LLAMA_BODY, VOCAB * WIDTH
    count = count_parameters(build_model(LLAMA, vocab_size=VOCAB, seed=0))
    assert (count.total, count.non_embedding, count.head) == (body + 2 * table, body, table)
    assert (count.active, count.active_non_embedding) == (count.total, count.non_embedding)
    tied = count_parameters(build_model({**LLAMA, "tie_word_embeddings": True}, vocab_size=VOCAB, seed=0))
    assert (tied.total, tied.non_embedding, tied.head) == (body + table, body, table)


def test_positions_count_as_embeddings() -> None:
    count = count_parameters(build_model(KINDS["gpt2"], vocab_size=VOCAB, seed=0))
    assert count.total - count.non_embedding == (VOCAB + 64) * WIDTH


def test_a_token_uses_its_own_experts_only() -> None:
    for kind in ("mixtral", "qwen3_moe"):
        count = count_parameters(build_model(KINDS[kind], vocab_size=VOCAB, seed=0))
        expert = 3 * WIDTH * 32
        assert count.total - count.active == LAYERS * (4 - 2) * expert
        assert count.non_embedding - count.active_non_embedding == LAYERS * (4 - 2) * expert


def test_partitioned_parameters_count_whole() -> None:
    model = build_model(LLAMA, vocab_size=VOCAB, seed=0)
    before = count_parameters(model)
    for parameter in model.parameters():  # as DeepSpeed's zero.Init leaves it
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert count_parameters(model) == before


def test_flops_match_those_that_torch_counts() -> None:
    # Eager attention multiplies whole matrices, as the formula assumes. torch counts only matrix products, so the
    # vectors are subtracted. The counts are exact integers.
    length = 64
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    for kind, settings in KINDS.items():
        model = build_model({**settings, **eager}, vocab_size=VOCAB, seed=0)
        ids = torch.arange(length)[None]
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, labels=ids).loss.backward()
        vectors = 6 * sum(p.numel() for p in model.parameters() if p.ndim < 2)
        assert counter.get_total_flops() == length * (flops_per_token(model, length) - vectors), kind


def test_longer_sequences_and_sliding_windows() -> None:
    model = build_model(LLAMA, vocab_size=VOCAB, seed=0)
    per_position = 12 * LAYERS * WIDTH
    assert flops_per_token(model, 128) - flops_per_token(model, 64) == 64 * per_position
    model.config.sliding_window = 32
    assert flops_per_token(model, 128) == flops_per_token(model, 32)
    model.config.layer_types = ["sliding_attention", "full_attention"]
    assert flops_per_token(model, 128) - flops_per_token(model, 32) == 96 * per_position // 2

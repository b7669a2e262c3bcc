"""A corpus and a configuration small enough for a whole run in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

CONFIG = """
name: tiny
seed: 0
run_dir: {folder}/runs
tokenizer: {{vocab_size: 320}}
data:
  sources:
    - {{path: {folder}/corpus}}
  dir: {folder}/data
  sequence_length: 16
  validation_fraction: 0.1
  workers: 1
model:
  model_type: llama
  hidden_size: 32
  intermediate_size: 64
  num_hidden_layers: 2
  num_attention_heads: 4
  num_key_value_heads: 4
  max_position_embeddings: 64
  tie_word_embeddings: true
optimizer:
  muon: {{lr: 0.02, ns_dtype: float32}}
  adamw: {{lr: 0.01}}
trainer:
  use_cpu: true
  max_steps: 8
  per_device_train_batch_size: 4
  logging_steps: 1
  save_steps: 4
  lr_scheduler_type: linear
evaluation: {{generate_prompt: "the cat", generate_tokens: 8}}
"""


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus of 200 short documents and tiny.yaml."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "corpus").mkdir()
    animals, verbs, places = ("cat dog fox hen owl".split(), "sat ran hid ate".split(), "mat hill tree barn".split())
    for number in range(200):
        sentences = [
            f"the {animals[(number * 3 + k) % 5]} {verbs[(number + 2 * k) % 4]} by the {places[(number * k) % 4]}."
            for k in range(1, 8)
        ]
        (folder / "corpus" / f"{number:03d}.txt").write_text(" ".join(sentences) + "\n")
    (folder / "tiny.yaml").write_text(CONFIG.format(folder=folder))
    return folder


@pytest.fixture(scope="session")
def finished(workspace: Path) -> dict[str, Any]:
    """The summary of a finished run of tiny.yaml. Leave its folder as it is."""
    from muon_dist.config import load_config
    from muon_dist.train import run

    return run.train(load_config(workspace / "tiny.yaml"))

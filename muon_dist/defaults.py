"""Defaults that are used in several places: signatures, the schema of a configuration, the planner.

`tests/test_defaults.py` checks that all places agree. This module does not import torch, and neither does the schema.
"""

from __future__ import annotations

from typing import Final

# Muon
RULE: Final = "muon"
WEIGHT_DECAY = 0.1
MOMENTUM = 0.95
NS_STEPS = 5
NS_SCHEDULE: Final = "keller"
BUCKET_MB = 256.0
OWNER_POLICY: Final = "balanced"
COST: Final = "analytic"
QK_THRESHOLD = 100.0
QK_ALPHA = 0.5

# AdamW
BETAS = (0.9, 0.95)
EPS = 1e-8
CLIP_ADAMW = 1.0

# Guards
MAX_NONFINITE = 5
SPIKE_WINDOW = 128  # OLMo-core, SkipStepOptimizer: 6 standard deviations over the last 128 losses
SPIKE_SIGMAS = 6.0
HASH_EVERY = 100
STRAGGLER_SECONDS = 0.1
DIAGNOSTICS_BUDGET = 0.02

# Data
VOCAB_SIZE = 4096
SAMPLE_BYTES = 50_000_000
TEXT_FIELD: Final = "text"
DOCUMENT_BYTES = 16384
MAX_BAD_RECORDS = 1000
VALIDATION_FRACTION = 0.02
SHARD_TOKENS = 10_000_000
SEQUENCE_LENGTH = 1024

# Samples of text
TEMPERATURE = 0.8
TOP_K = 40
PROMPT: Final = "The"

"""Exact sharded Muon: the optimizer, its parameter groups, and the classes for the Hugging Face Trainer.

Names load on first use, so that `import muon_dist` imports neither transformers nor DeepSpeed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from muon_dist.version import __version__ as __version__

if TYPE_CHECKING:
    from muon_dist.adapters.deepspeed import attach
    from muon_dist.adapters.factory import MuonFactory, for_trainer
    from muon_dist.adapters.hf.guarded import Guards
    from muon_dist.adapters.hf.trainer import MuonTrainer
    from muon_dist.audit.witness import witness
    from muon_dist.numerics.newton_schulz import newton_schulz
    from muon_dist.numerics.schedules import register_schedule
    from muon_dist.optim.groups import param_groups, routing_table
    from muon_dist.optim.muon import Muon
    from muon_dist.optim.rules import register_rule, register_scale
    from muon_dist.report.log_table import metrics

_HOMES = {
    "Guards": "muon_dist.adapters.hf.guarded",
    "attach": "muon_dist.adapters.deepspeed",
    "Muon": "muon_dist.optim.muon",
    "MuonFactory": "muon_dist.adapters.factory",
    "MuonTrainer": "muon_dist.adapters.hf.trainer",
    "for_trainer": "muon_dist.adapters.factory",
    "metrics": "muon_dist.report.log_table",
    "newton_schulz": "muon_dist.numerics.newton_schulz",
    "param_groups": "muon_dist.optim.groups",
    "register_rule": "muon_dist.optim.rules",
    "register_scale": "muon_dist.optim.rules",
    "register_schedule": "muon_dist.numerics.schedules",
    "routing_table": "muon_dist.optim.groups",
    "witness": "muon_dist.audit.witness",
}

__all__ = [
    "Guards",
    "Muon",
    "MuonFactory",
    "MuonTrainer",
    "attach",
    "for_trainer",
    "metrics",
    "newton_schulz",
    "param_groups",
    "register_rule",
    "register_scale",
    "register_schedule",
    "routing_table",
    "witness",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'muon_dist' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

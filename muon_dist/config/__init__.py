"""Configuration files: schema, loading, and removal of credentials before anything is written to disk."""

from __future__ import annotations

from muon_dist.config.load import load_config
from muon_dist.config.redact import REDACTED, is_secret, redact
from muon_dist.config.schema import Config, json_schema

__all__ = ["REDACTED", "Config", "is_secret", "json_schema", "load_config", "redact"]

"""Keep credentials out of logs, saved configurations and reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REDACTED = "<redacted>"
_SIGNS = ("TOKEN", "KEY", "SECRET", "PASSWORD")


def is_secret(key: str) -> bool:
    """True for a name that contains TOKEN, KEY, SECRET or PASSWORD, in any case."""
    return any(sign in key.upper() for sign in _SIGNS)


def redact(value: Any) -> Any:
    """A copy of plain data; every non-empty text under a secret key is replaced by `REDACTED`.

    Only text is replaced: `shard_tokens: 10000000` and `num_key_value_heads: 4` are counts, and `tokenizer:` holds a
    mapping, which is searched in turn. A list under a secret key loses its texts.
    """
    return _redact(value, False)


def _redact(value: Any, secret: bool) -> Any:
    if isinstance(value, Mapping):
        return {k: _redact(v, isinstance(v, (str, list, tuple)) and is_secret(str(k))) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_redact(v, secret) for v in value]
    return REDACTED if secret and isinstance(value, str) and value else value

"""Types of single values in a configuration: numbers within bounds, switches, paths, names of schedules."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema

from muon_dist.config.paths import expand_path, is_url
from muon_dist.config.source import closest
from muon_dist.defaults import NS_SCHEDULE

DType = Literal["float32", "bfloat16", "float16"]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
PositiveInt = Annotated[int, Field(ge=1)]


def _known_schedule(schedule: Any) -> Any:
    if schedule == NS_SCHEDULE:
        return schedule
    from muon_dist.numerics import get_schedule  # imports torch: seconds, which an error elsewhere should not cost

    # its ConfigError names the closest schedule, and is a ValueError, as pydantic requires
    found = get_schedule(schedule)
    return schedule if isinstance(schedule, str) else found.rows


def _known_scale(scale: str) -> str:
    from muon_dist.optim.rules.scale import SCALES  # imports torch

    if scale not in SCALES:
        hint = closest(scale, SCALES)
        hint = hint if hint.startswith("; did") else ""
        raise ValueError(f"{scale!r} is not one of {', '.join(SCALES)}{hint}")
    return scale


def _number_or_switch(value: Any) -> Any:
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError("should be a finite number, true or false")
    return value


def _local_path(text: str) -> str:
    """A path on a mounted file system, expanded; for files that are written by rename, which object stores lack."""
    if not text:
        raise ValueError("is empty: name a folder")
    if is_url(text):
        raise ValueError(f"{text!r} is a URL: name a folder on a mounted file system")
    return expand_path(text)


SWITCHES = {"on": True, "yes": True, "off": False, "no": False}


def switch(value: Any) -> Any:
    """`on`, `yes`, `off` and `no` as booleans; YAML 1.2 reads them as text."""
    return SWITCHES.get(value.lower(), value) if isinstance(value, str) else value


def _text_path(text: str) -> str:
    """A path or URL, expanded."""
    if not text:
        raise ValueError("is empty: name a file or a folder")
    return expand_path(text)


Flag = Annotated[bool, BeforeValidator(switch)]
# written with doubled dollar signs, so that reading it again gives the same path
_AsWritten = PlainSerializer(lambda path: path.replace("$", "$$"), when_used="json")
LocalPath = Annotated[str, AfterValidator(_local_path), _AsWritten]
DataPath = Annotated[str, AfterValidator(_text_path), _AsWritten]
OnBadRecord = Literal["stop", "skip"]
_NUMBERS = {"type": "array", "items": {"type": "number"}, "minItems": 3, "maxItems": 3}


def _scale_names(json_schema: dict[str, Any]) -> None:
    from muon_dist.optim.rules.scale import SCALES  # imports torch

    json_schema.update({"type": "string", "examples": list(SCALES)})  # a plugin may have others


def _schedule_names(json_schema: dict[str, Any]) -> None:
    from muon_dist.numerics import SCHEDULES  # imports torch

    names = {"type": "string", "examples": list(SCHEDULES)}
    json_schema["anyOf"] = [names, {"type": "array", "items": _NUMBERS, "minItems": 1}]


Scale = Annotated[str, AfterValidator(_known_scale), Field(json_schema_extra=_scale_names)]
"""A factor on the update, by name."""
Schedule = Annotated[Any, AfterValidator(_known_schedule), Field(json_schema_extra=_schedule_names)]
"""Coefficients of the Newton-Schulz iteration: a name, or rows [a, b, c]."""
RuleOptions = dict[
    str, Annotated[Any, AfterValidator(_number_or_switch), WithJsonSchema({"type": ["number", "boolean"]})]
]


class Block(BaseModel):
    """Base of every block: immutable, no unknown keys, no conversion of types, no NaN or infinity."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=(), validate_default=True
    )

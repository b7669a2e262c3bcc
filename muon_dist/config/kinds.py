"""Types of single values in a configuration: numbers within bounds, switches, paths, names of schedules."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from muon_dist.config.paths import expand_path

DType = Literal["float32", "bfloat16", "float16"]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
PositiveInt = Annotated[int, Field(ge=1)]
Scale = Literal["match_rms_adamw", "spectral", "none"]


def _known_schedule(name: str) -> str:
    from muon_dist.numerics import get_schedule  # imports torch: seconds, which a file that is missing should not cost

    get_schedule(name)  # a ConfigError that names the closest schedule, and a ValueError as pydantic needs it
    return name


def _local_path(text: str) -> str:
    """A path on a mounted file system, expanded; for what is written by rename, which no object store has."""
    if not text:
        raise ValueError("is empty: name a folder")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        raise ValueError(f"{text!r} is a URL: name a folder on a mounted file system")
    return expand_path(text)


SWITCHES = {"on": True, "yes": True, "off": False, "no": False}


def switch(value: Any) -> Any:
    """`on`, `yes`, `off` and `no`, as people write them, which YAML 1.2 reads as text."""
    return SWITCHES.get(value.lower(), value) if isinstance(value, str) else value


def _text_path(text: str) -> str:
    """A path or URL, expanded."""
    if not text:
        raise ValueError("is empty: name a file or a folder")
    return expand_path(text)


Flag = Annotated[bool, BeforeValidator(switch)]
# written with its dollar signs doubled, so that it is the same path when it is read again
_AsWritten = PlainSerializer(lambda path: path.replace("$", "$$"), when_used="json")
LocalPath = Annotated[str, AfterValidator(_local_path), _AsWritten]
DataPath = Annotated[str, AfterValidator(_text_path), _AsWritten]
OnBadRecord = Literal["stop", "skip"]


def _schedule_names(json_schema: dict[str, Any]) -> None:
    from muon_dist.numerics import SCHEDULES  # imports torch

    json_schema["enum"] = list(SCHEDULES)


ScheduleName = Annotated[str, AfterValidator(_known_schedule), Field(json_schema_extra=_schedule_names)]


class Block(BaseModel):
    """Base of every block: immutable, no unknown keys, no conversion of types, no NaN or infinity."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=(), validate_default=True
    )

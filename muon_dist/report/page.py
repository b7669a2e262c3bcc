"""Common parts of all pages: reading the template, writing the finished page."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from muon_dist.errors import DataError


def template(name: str, **filters: Callable[..., Any]) -> Template:
    """The template `name`.html.j2 of this folder with these filters. It escapes its arguments."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(filters)
    return environment.from_string(files("muon_dist.report").joinpath(f"{name}.html.j2").read_text(encoding="utf-8"))


def save(page: str, target: Path) -> Path:
    """Write a page, make its folder, and return its path. Raises DataError if it cannot be written."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write {target}: {error.strerror}; choose another --output") from error
    return target

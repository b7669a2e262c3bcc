"""Scripts from the templates of this folder, and the parts that files of every launcher share."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from muon_dist.launcher.job import Job


def script(template: str, **given: Any) -> str:
    """The script that `templates/TEMPLATE.j2` makes of `given`. Texts are not quoted by default: use the filter
    `quote`."""
    environment = Environment(
        loader=PackageLoader("muon_dist.launcher"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["quote"] = shlex.quote
    return environment.get_template(f"{template}.j2").render(**given)


def header(command: Sequence[str], *notes: str) -> str:
    """The comment at the top of a file: the command that made it, and notes."""
    made = shlex.join(command).replace("\n", " ")
    return "\n".join([f"# Made by: {made}", *(f"# {note}" for note in notes)])


def words(job: Job) -> str:
    """`-m muon_dist.cli ...`, quoted."""
    return shlex.join(["-m", "muon_dist.cli", *job.arguments])

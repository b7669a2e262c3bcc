"""The public names and their signatures, as `tests/public.json` keeps them from commit e03e19f on.

python -m tests.public NAME...    # write down new ones; what is written is never taken away
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("public.json")
Signature = list[tuple[str, str, str | None]]


def find(name: str) -> Any:
    """The object of a dotted name."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AttributeError(name)


def signature(name: str) -> Signature | None:
    """(parameter, kind, repr of its default) of a callable; None for anything else."""
    found = find(name)
    if not callable(found) or not str(getattr(found, "__module__", "")).startswith("muon_dist"):
        return None
    try:
        parameters = inspect.signature(found).parameters.values()
    except ValueError:
        return None
    return [(p.name, p.kind.name, None if p.default is p.empty else _text(p.default)) for p in parameters]


def _text(default: Any) -> str:
    return "a function" if inspect.isfunction(default) else repr(default)


def main(names: list[str]) -> None:
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    known.update({name: signature(name) for name in names if name not in known})
    FILE.write_text("{\n" + ",\n".join(f" {json.dumps(n)}: {json.dumps(known[n])}" for n in sorted(known)) + "\n}\n")


if __name__ == "__main__":
    main(sys.argv[1:])

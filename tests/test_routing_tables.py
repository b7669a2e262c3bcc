"""Routing of transformers' architectures against tables that were written by hand from their code."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig

from muon_dist.routing import route
from tests.routing_tables import CASES, MUON_ROLES, Case


def build(case: Case) -> nn.Module:
    config = AutoConfig.for_model(case.kind, **case.settings)
    with torch.device("meta"):
        return getattr(transformers, case.cls)._from_config(config)


def compiled(text: str) -> list[re.Pattern[str]]:
    """Patterns of names from the notation of the tables: `#` is a number, `{a,b}` one of several words."""
    patterns = []
    for word in text.split():
        regex = re.escape(word).replace(r"\#", r"\d+").replace(r"\{", "(?:").replace(r"\}", ")")
        patterns.append(re.compile(regex.replace(",", "|") + r"(\.weight)?"))
    return patterns


def matched(name: str, text: str) -> bool:
    return any(p.fullmatch(name) for p in compiled(text))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.cls)
def test_table_of(case: Case) -> None:
    model = build(case)
    table = route(model)
    wrong: list[str] = []
    used: set[str] = set()
    aliases = [a for r in table.routes if r.role == "table" for a in r.aliases]
    for r in table.routes:
        names = (r.fqn, *r.aliases)
        assert set(names) == {n for n, p in model.named_parameters(remove_duplicate=False) if p is at(model, r.fqn)}
        if len(r.shape) < 2:
            assert r.algorithm == "adamw" and not r.decay, r
            continue
        expected = {role for role, text in case.roles.items() if matched(r.fqn, text)}
        used |= {p.pattern for text in case.roles.values() for p in compiled(text) if p.fullmatch(r.fqn)}
        if expected != {r.role}:
            wrong.append(f"{r.fqn} {r.shape}: expected {expected or 'to be listed'}, found {r.role} ({r.reason})")
        elif (r.algorithm == "muon") != (r.role in MUON_ROLES):
            wrong.append(f"{r.fqn}: {r.role} goes to {r.algorithm}")
        if r.transposed != matched(r.fqn, case.transposed):
            wrong.append(f"{r.fqn}: transposed is {r.transposed}")
        if bool(r.doubt) != matched(r.fqn, case.doubtful):
            wrong.append(f"{r.fqn}: doubt {r.doubt!r}")
        if r.decay and (r.role == "state" or matched(r.fqn, case.undecayed)):
            wrong.append(f"{r.fqn}: {r.role} is decayed")
    every = [p.pattern for text in case.roles.values() for p in compiled(text)]
    wrong += [f"no parameter for {pattern}" for pattern in every if pattern not in used]
    wrong += [f"not tied: {p.pattern}" for p in compiled(case.tied) if not any(p.fullmatch(a) for a in aliases)]
    assert not wrong, "\n".join(wrong)


def at(model: nn.Module, name: str) -> nn.Parameter:
    owner, _, attribute = name.rpartition(".")
    return model.get_submodule(owner)._parameters[attribute]  # type: ignore[return-value]


def test_there_are_forty() -> None:
    assert len({c.kind for c in CASES}) >= 40

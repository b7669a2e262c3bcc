"""The registry of update rules, and functions that add to it."""

from __future__ import annotations

import difflib

from muon_dist.errors import ConfigError
from muon_dist.optim.rules.adamuon import AdaMuonRule
from muon_dist.optim.rules.hyperball import HyperballRule
from muon_dist.optim.rules.muon import MuonRule
from muon_dist.optim.rules.namo import NamoRule
from muon_dist.optim.rules.normuon import NorMuonRule
from muon_dist.optim.rules.parts import PARTS
from muon_dist.optim.rules.soap_muon import SoapMuonRule

RULES: dict[str, MuonRule] = {
    rule.name: rule for rule in (MuonRule(), NorMuonRule(), AdaMuonRule(), HyperballRule(), NamoRule(), SoapMuonRule())
}
"""Rules by the value of the option `rule`; `register_rule` adds to them."""

# Names of other entries in a parameter's state.
_TAKEN = frozenset(
    {"momentum_buffer", "zero_gradient_steps", "rounding_steps", "master", "step", "exp_avg", "exp_avg_sq"}
)


def register_rule(rule: MuonRule) -> None:
    """Register a rule: `rule=rule.name` then selects it. Call this on every rank before the optimizer is made.

    State dicts, checkpoints, layouts, groups and parts work as for the built-in rules.

    Args:
        rule: an instance of a subclass of `MuonRule`. The class needs no arguments, and the object keeps no state.

    Raises:
        ConfigError: its name, or a name in its memory or options, is taken; or an attribute looks like a misspelled
            attribute of `MuonRule`, which would have no effect.
    """
    if not isinstance(rule, MuonRule):
        raise ConfigError(f"{rule!r} is not a rule: pass an instance of a subclass of muon_dist.optim.rules.MuonRule")
    known = RULES.get(rule.name)
    if known is not None and _origin(known) == _origin(rule):  # a notebook cell that runs twice
        RULES[rule.name] = rule
        return
    if known is not None:
        raise ConfigError(f"rule '{rule.name}' exists already: choose another name")
    for name in (*rule.owner_memory, *rule.matrix_memory):
        if name in _TAKEN or name in memory_names() or ":" in name:
            raise ConfigError(f"rule '{rule.name}': '{name}' in its memory is taken: choose another name, without ':'")
    for name in rule.options:
        if name in PARTS:
            raise ConfigError(f"rule '{rule.name}': its option '{name}' has the name of a part: choose another")
    _check_names(type(rule), rule.name)
    RULES[rule.name] = rule


def _check_names(kind: type[MuonRule], rule: str) -> None:
    """Raise ConfigError for an attribute that looks like a misspelled one of `MuonRule`: it would have no effect."""
    public = [name for name in dir(MuonRule) if not name.startswith("_")]
    for name in vars(kind):
        meant = [] if name in public else difflib.get_close_matches(name, public, n=1, cutoff=0.8)
        if meant and not name.startswith("_") and meant[0] not in vars(kind):
            raise ConfigError(
                f"rule '{rule}': nothing uses '{name}'; did you mean '{meant[0]}'? (Other names must begin with '_'.)"
            )


def _origin(rule: MuonRule) -> tuple[str, str]:
    return type(rule).__module__, type(rule).__qualname__


def memory_names() -> set[str]:
    """Names in the state of all tensors that rules and parts keep besides momentum."""
    of_rules = {name for rule in RULES.values() for name in (*rule.owner_memory, *rule.matrix_memory)}
    return of_rules.union(*(part.owner_memory for part in PARTS.values()))

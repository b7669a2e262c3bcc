"""Update rules: one file for each. The exchange knows none of them; see `MuonRule` for the seam."""

from muon_dist.optim.rules.hyperball import HyperballRule
from muon_dist.optim.rules.muon import Group, MuonRule, Owned
from muon_dist.optim.rules.namo import NamoRule
from muon_dist.optim.rules.normuon import NorMuonRule

RULES: dict[str, MuonRule] = {rule.name: rule for rule in (MuonRule(), NorMuonRule(), HyperballRule(), NamoRule())}
"""By the value of the option `rule`."""

__all__ = ["RULES", "Group", "HyperballRule", "MuonRule", "NamoRule", "NorMuonRule", "Owned"]

"""Update rules, one file per rule. The exchange does not depend on any rule; `MuonRule` is the interface."""

from muon_dist.optim.rules.adamuon import AdaMuonRule
from muon_dist.optim.rules.hyperball import HyperballRule
from muon_dist.optim.rules.muon import Group, HeldWeights, MuonRule, Owned
from muon_dist.optim.rules.namo import NamoRule
from muon_dist.optim.rules.normuon import NorMuonRule
from muon_dist.optim.rules.parts import PARTS, Part, with_parts
from muon_dist.optim.rules.registry import RULES, memory_names, register_rule
from muon_dist.optim.rules.scale import SCALES, register_scale
from muon_dist.optim.rules.soap_muon import SoapMuonRule

__all__ = [
    "PARTS",
    "RULES",
    "SCALES",
    "AdaMuonRule",
    "Group",
    "HeldWeights",
    "HyperballRule",
    "MuonRule",
    "NamoRule",
    "NorMuonRule",
    "Owned",
    "Part",
    "SoapMuonRule",
    "memory_names",
    "register_rule",
    "register_scale",
    "with_parts",
]

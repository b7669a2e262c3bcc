"""What a run will cost, from its configuration alone: memory, bytes, balance, time."""

from muon_dist.planner.devices import DEVICES, Device, measured_device
from muon_dist.planner.estimate import Exchange, exchange_of
from muon_dist.planner.model import Settings, Workload, describe_model
from muon_dist.planner.placement import LAYOUTS, Placement, place
from muon_dist.planner.plan import Plan, make_plan

__all__ = [
    "DEVICES",
    "LAYOUTS",
    "Device",
    "Exchange",
    "Placement",
    "Plan",
    "Settings",
    "Workload",
    "describe_model",
    "exchange_of",
    "make_plan",
    "measured_device",
    "place",
]

"""FSDP2 and every other placement of DTensors: where they lie, and the binding of Muon to them."""

from muon_dist.adapters.fsdp2.binder import bind
from muon_dist.adapters.fsdp2.storage import check_parameter

__all__ = ["bind", "check_parameter"]

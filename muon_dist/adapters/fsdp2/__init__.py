"""FSDP2 and all other placements of DTensors: reading them, and binding Muon to them."""

from muon_dist.adapters.fsdp2.binder import bind
from muon_dist.adapters.fsdp2.storage import check_parameter

__all__ = ["bind", "check_parameter"]

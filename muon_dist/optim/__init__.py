"""The optimizer."""

from muon_dist.optim.binding import Binding, NotReady, ParameterSpec, update_scale
from muon_dist.optim.diagnostics import Diagnostics
from muon_dist.optim.groups import param_groups
from muon_dist.optim.muon import Muon

__all__ = ["Binding", "Diagnostics", "Muon", "NotReady", "ParameterSpec", "param_groups", "update_scale"]

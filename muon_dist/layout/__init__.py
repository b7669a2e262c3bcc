"""Layouts: which rank holds which fragments of every matrix."""

from muon_dist.layout.dtensor import ShardedParameter, dtensor_layout
from muon_dist.layout.flat import FlatGroup, PlacedParameter, flat_layout
from muon_dist.layout.fragment import (
    Fragment,
    Layout,
    Matrix,
    MatrixLayout,
    Span,
    cut_parameter,
    fragments_of_run,
)
from muon_dist.layout.per_parameter import per_parameter_layout
from muon_dist.layout.replicated import replicated_layout

__all__ = [
    "FlatGroup",
    "Fragment",
    "Layout",
    "Matrix",
    "MatrixLayout",
    "PlacedParameter",
    "ShardedParameter",
    "Span",
    "cut_parameter",
    "dtensor_layout",
    "flat_layout",
    "fragments_of_run",
    "per_parameter_layout",
    "replicated_layout",
]

"""Layouts: which rank holds which fragments of every matrix."""

from muon_dist.layout.block import Block, view
from muon_dist.layout.cuts import ShardedParameter, dtensor_layout
from muon_dist.layout.flat import FlatGroup, PlacedParameter, flat_layout
from muon_dist.layout.fragments import Fragment, Fragments, fragments_of_run
from muon_dist.layout.layout import Layout, MatrixLayout
from muon_dist.layout.matrix import Matrix, cut_parameter
from muon_dist.layout.parameter import StoredParameter, matrix_layouts
from muon_dist.layout.per_parameter import per_parameter_layout
from muon_dist.layout.replicated import replicated_layout
from muon_dist.layout.shard import Shard

__all__ = [
    "Block",
    "FlatGroup",
    "Fragment",
    "Fragments",
    "Layout",
    "Matrix",
    "MatrixLayout",
    "PlacedParameter",
    "Shard",
    "ShardedParameter",
    "StoredParameter",
    "cut_parameter",
    "dtensor_layout",
    "flat_layout",
    "fragments_of_run",
    "matrix_layouts",
    "per_parameter_layout",
    "replicated_layout",
    "view",
]

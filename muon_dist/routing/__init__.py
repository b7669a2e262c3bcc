"""Which parameter goes to Muon, which to AdamW, and why."""

from muon_dist.routing.decide import route
from muon_dist.routing.model import embedding_weights, logical_shape, output_head
from muon_dist.routing.rules import Override, SplitRule
from muon_dist.routing.table import Algorithm, MatrixGroup, Route, RoutingTable, Split

__all__ = [
    "Algorithm",
    "MatrixGroup",
    "Override",
    "Route",
    "RoutingTable",
    "Split",
    "SplitRule",
    "embedding_weights",
    "logical_shape",
    "output_head",
    "route",
]

"""Which parameter goes to Muon, which to AdamW, and why."""

from muon_dist.routing.decide import route
from muon_dist.routing.grouping import RoutedGroup, routed_groups
from muon_dist.routing.model import embedding_weights, logical_shape, output_head
from muon_dist.routing.rules import GroupRule, Override, SplitRule
from muon_dist.routing.table import Algorithm, GroupOptions, MatrixGroup, Route, RoutingTable, Split

__all__ = [
    "Algorithm",
    "GroupOptions",
    "GroupRule",
    "MatrixGroup",
    "Override",
    "Route",
    "RoutedGroup",
    "RoutingTable",
    "Split",
    "SplitRule",
    "embedding_weights",
    "logical_shape",
    "output_head",
    "route",
    "routed_groups",
]

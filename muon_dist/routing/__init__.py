"""Routing: the choice of Muon or AdamW for each parameter, with the reason."""

from muon_dist.routing.announce import announce, is_rank_zero
from muon_dist.routing.decide import embedding_weights, output_head, route, table_of
from muon_dist.routing.folded import FoldedRow, FoldedTable, fold
from muon_dist.routing.grouping import RoutedGroup, routed_groups
from muon_dist.routing.model import expert_group, logical_shape
from muon_dist.routing.rules import GroupRule, Override, SplitRule
from muon_dist.routing.table import Algorithm, GroupOptions, MatrixGroup, Route, RoutingTable, Split

__all__ = [
    "Algorithm",
    "FoldedRow",
    "FoldedTable",
    "GroupOptions",
    "GroupRule",
    "MatrixGroup",
    "Override",
    "Route",
    "RoutedGroup",
    "RoutingTable",
    "Split",
    "SplitRule",
    "announce",
    "embedding_weights",
    "expert_group",
    "fold",
    "is_rank_zero",
    "logical_shape",
    "output_head",
    "route",
    "routed_groups",
    "table_of",
]

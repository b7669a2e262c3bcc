"""Which parameter goes to Muon, which to AdamW, and why."""

from muon_dist.routing.announce import announce, is_rank_zero
from muon_dist.routing.decide import embedding_weights, output_head, route, routing_table
from muon_dist.routing.folded import FoldedRow, FoldedTable, fold
from muon_dist.routing.model import logical_shape
from muon_dist.routing.rules import Override, SplitRule
from muon_dist.routing.table import Algorithm, MatrixGroup, Route, RoutingTable, Split

__all__ = [
    "Algorithm",
    "FoldedRow",
    "FoldedTable",
    "MatrixGroup",
    "Override",
    "Route",
    "RoutingTable",
    "Split",
    "SplitRule",
    "announce",
    "embedding_weights",
    "fold",
    "is_rank_zero",
    "logical_shape",
    "output_head",
    "route",
    "routing_table",
]

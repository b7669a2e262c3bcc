"""Which rank orthogonalizes each matrix, what the work costs, and in which order ZeRO-1/2 lays out the parameters."""

from muon_dist.ownership.cost import CostModel
from muon_dist.ownership.plan import OwnershipPlan, assign_owners, digest, first_difference, stack_length

__all__ = ["CostModel", "OwnershipPlan", "assign_owners", "digest", "first_difference", "stack_length"]

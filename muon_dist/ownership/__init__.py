"""The owner of each matrix, the cost of its work, and the best order of parameters under ZeRO-1/2."""

from muon_dist.ownership.cost import CostModel
from muon_dist.ownership.plan import OwnershipPlan, assign_owners, digest, first_difference, stack_length

__all__ = ["CostModel", "OwnershipPlan", "assign_owners", "digest", "first_difference", "stack_length"]

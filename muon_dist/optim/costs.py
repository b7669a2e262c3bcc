"""The cost model that balances owners: analytic, or seconds that rank 0 measured and sent to the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from muon_dist.errors import ConfigError
from muon_dist.layout import MatrixLayout
from muon_dist.numerics import compute_dtype
from muon_dist.optim.binding import Binding, Group
from muon_dist.optim.options import ANALYTIC, Options, iterations
from muon_dist.ownership import OwnershipPlan, assign_owners, stack_length
from muon_dist.ownership.cost import CostModel
from muon_dist.ownership.measured_cost import measure
from muon_dist.ranks import Ranks


def agreed_cost(
    cost: str | CostModel, binding: Binding, groups: Sequence[Group], group_of: Mapping[int, int]
) -> CostModel:
    """The cost model that `cost` names. "measured" is a collective: all ranks use the times of rank 0.

    Rank 0 times every shape of the layout with the steps, schedule and dtype of the first Muon group, as one matrix
    and in stacks of the size that ranks will have.

    Raises:
        ConfigError: the measurement failed on rank 0; raised on all ranks.
    """
    if isinstance(cost, CostModel):
        return cost
    if cost == ANALYTIC:
        return CostModel()

    def measured() -> CostModel:
        try:
            return _measured(binding, groups[min(group_of.values())])
        except Exception as error:
            raise ConfigError(f"cost: measuring Newton-Schulz failed: {type(error).__name__}: {error}") from error

    return Ranks(binding.group).first(measured)


def _measured(binding: Binding, group: Group) -> CostModel:
    layout = binding.layout
    shapes = Counter((min(m.matrix.rows, m.matrix.cols), max(m.matrix.rows, m.matrix.cols)) for m in layout.matrices)
    return measure(
        {(*shape, n) for shape, count in shapes.items() for n in (1, stack_length(count, layout.world_size))},
        steps=group["ns_steps"],
        schedule=group["ns_schedule"],
        dtype=compute_dtype(group["ns_dtype"], binding.device, group["ns_schedule"]),
        device=binding.device,
    )


def owners_for(
    binding: Binding,
    groups: Sequence[Group],
    group_of: Mapping[int, int],
    options: Options,
    cost: CostModel,
) -> OwnershipPlan:
    """`assign_owners` with the steps and compute dtype of each matrix's parameter group."""

    def of(m: MatrixLayout) -> Group:
        return groups[group_of[m.buffer]]

    return assign_owners(
        binding.layout,
        policy=options.owner_policy,
        cost=cost,
        steps=lambda m: iterations(of(m)),
        dtype=lambda m: compute_dtype(of(m)["ns_dtype"], binding.device, of(m)["ns_schedule"]),
        bytes_per_element=(options.wire_dtype or torch.float32).itemsize,
    )

"""Orders of parameters under which ZeRO-1/2's equal slices begin between matrices."""

from __future__ import annotations

import pytest
from torch import nn

import muon_dist
from muon_dist.errors import ConfigError
from muon_dist.layout import FlatGroup, Matrix, PlacedParameter, cut_parameter, flat_layout
from muon_dist.ownership import OwnershipPlan, assign_owners
from muon_dist.ownership.cost import CostModel
from muon_dist.ownership.partition_order import partition_order, slice_elements
from muon_dist.routing import SplitRule

Parameters = list[tuple[Matrix, ...]]


def llama(hidden: int, wide: int, layers: int, key_value: int | None = None) -> Parameters:
    kv = key_value or hidden
    shapes = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden),
              "gate": (wide, hidden), "up": (wide, hidden), "down": (hidden, wide)}  # fmt: skip
    return [cut_parameter(f"{i}.{name}", shape) for i in range(layers) for name, shape in shapes.items()]


def laid_out(parameters: Parameters, order: list[int], ranks: int) -> OwnershipPlan:
    numels = [sum(m.numel for m in p) for p in parameters]
    placed, at = [], 0
    for i in order:
        placed.append(PlacedParameter(f"p{i}", numels[i], at, parameters[i]))
        at += numels[i]
    return assign_owners(flat_layout([FlatGroup(tuple(placed), slice_elements(numels, ranks))], ranks))


def moved(plan: OwnershipPlan) -> int:
    """Elements that travel to an owner."""
    return sum(m.matrix.numel - m.held(o) for m, o in zip(plan.layout.matrices, plan.owners, strict=True))


def imbalance(plan: OwnershipPlan) -> float:
    load = plan.load(lambda m: CostModel().orthogonalize(m.matrix.rows, m.matrix.cols, 5))
    return max(load) * len(load) / sum(load)


def busiest(plan: OwnershipPlan) -> float:
    """Seconds of arithmetic and movement of the rank that ends last."""
    model, ends = CostModel(), [0.0] * plan.layout.world_size
    for m, owner in zip(plan.layout.matrices, plan.owners, strict=True):
        missing = m.matrix.numel - m.held(owner)
        ends[owner] += model.orthogonalize(m.matrix.rows, m.matrix.cols, 5) + 2 * model.move(missing, 4)
    return max(ends)


@pytest.mark.parametrize("ranks", [2, 4, 8, 16, 32])
def test_llama_7b_moves_nothing_where_layers_divide(ranks):
    parameters = llama(4096, 11008, 32)
    plan = laid_out(parameters, partition_order(parameters, ranks), ranks)
    assert moved(plan) == 0
    assert imbalance(plan) < 1 + 1e-9


@pytest.mark.parametrize(
    ("parameters", "ranks"),
    [
        (llama(4096, 11008, 32), 64),
        (llama(4096, 11008, 32), 48),
        (llama(8192, 28672, 80, 1024), 256),
        (llama(24, 50, 2, 12), 3),
        (llama(24, 50, 2, 12), 4),
    ],
)
def test_where_they_do_not_divide_fewer_elements_travel_than_in_the_given_order(parameters, ranks):
    given = laid_out(parameters, list(range(len(parameters))), ranks)
    order = partition_order(parameters, ranks)
    assert sorted(order) == list(range(len(parameters)))
    ordered = laid_out(parameters, order, ranks)
    assert moved(ordered) < 0.6 * moved(given)
    assert busiest(ordered) < busiest(given)


def test_layers_stay_neighbours():
    """Parameters of one shape keep their order, so that a slice holds a few whole layers or parts of neighbours."""
    parameters = llama(4096, 11008, 32)
    order = partition_order(parameters, 64)
    places = {parameters[i][0].name: place for place, i in enumerate(order)}
    for name in ("q", "down"):
        of_layers = [places[f"{layer}.{name}"] for layer in range(32)]
        assert max(abs(place - 7 * layer) for layer, place in enumerate(of_layers)) <= 21


def test_a_boundary_between_experts_of_one_parameter_is_free():
    """Four experts on two ranks, and a router: the slices begin between experts or nearly so."""
    parameters = [cut_parameter("experts", (4, 32, 16)), cut_parameter("router", (4, 16)), cut_parameter("q", (4, 16))]
    order = partition_order(parameters, 2)
    assert moved(laid_out(parameters, order, 2)) == 0
    assert order.index(0) == 1  # one small matrix on each side
    assert moved(laid_out(parameters, [0, 1, 2], 2)) > 0


def test_more_ranks_than_matrices_never_ends_later():
    parameters = llama(64, 176, 2)
    for ranks in (16, 40):
        given = laid_out(parameters, list(range(len(parameters))), ranks)
        assert busiest(laid_out(parameters, partition_order(parameters, ranks), ranks)) <= busiest(given)


def test_param_groups_keeps_names_cuts_and_parameters_in_step():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleDict({"qkv": nn.Linear(8, 24), "o": nn.Linear(8, 9)}) for _ in "ab")
            self.narrow = nn.Linear(8, 17)

    model = Model()
    splits = [SplitRule(r".*qkv", sizes=(8, 8, 8))]
    plain, *_ = muon_dist.param_groups(model, splits=splits)
    names = dict(model.named_parameters())
    orders = set()
    for partitions in range(1, 9):
        group, *_ = muon_dist.param_groups(model, splits=splits, partitions=partitions)
        orders.add(tuple(group["param_names"]))
        assert sorted(group["param_names"]) == sorted(plain["param_names"])
        for p, name, cut in zip(group["params"], group["param_names"], group["cuts"], strict=True):
            assert p is names[name]
            assert cut == plain["cuts"][plain["param_names"].index(name)]
            assert ("sizes" in cut) == name.endswith("qkv.weight")
    assert len(orders) > 1
    with pytest.raises(ConfigError, match="partitions is 0: it must be at least 1"):
        muon_dist.param_groups(model, partitions=0)

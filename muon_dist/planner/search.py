"""All meshes of a number of ranks, estimated without choosing owners: thousands in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from muon_dist.errors import ConfigError
from muon_dist.exchange.schedule import bytes_of_two_buckets
from muon_dist.ownership.cost import CostModel
from muon_dist.planner.communication import bytes_by_axis
from muon_dist.planner.devices import LINK_SHARE, Device
from muon_dist.planner.memory import memory_of, usable
from muon_dist.planner.mesh import LAYOUTS, OPTIONS, Mesh, make_mesh, problems
from muon_dist.planner.model import Settings, Workload
from muon_dist.planner.placement import held_bytes
from muon_dist.planner.plan import Plan, iteration_dtype
from muon_dist.planner.times import adamw_seconds, muon_seconds, seconds_of

_ALIKE = 0.01  # share of the step: among meshes within it, the one with the fewest axes is the best
_LEAST_TOKENS = 2048  # tokens of a sample per rank: a shorter sample is not worth cutting further


@dataclass(frozen=True)
class Outline:
    """A mesh with its figures. Muon's work is taken as evenly spread, unless the figures come `of_plan`.

    Attributes:
        mesh: ranks by axis.
        settings: with the accumulation that keeps the tokens per step. memory, seconds: as in `Plan`. fits: whether
            the memory is enough.
    """

    mesh: Mesh
    settings: Settings
    memory: dict[str, float]
    seconds: dict[str, float]
    fits: bool

    @classmethod
    def of_plan(cls, plan: Plan, settings: Settings) -> Outline:
        """The figures of a plan, with real owners."""
        return cls(plan.mesh, settings, plan.memory, plan.seconds, plan.fits)

    @property
    def total(self) -> float:
        return sum(self.memory.values())

    @property
    def step(self) -> float:
        return adamw_seconds(self.seconds) + muon_seconds(self.seconds)

    @property
    def axes(self) -> int:
        """Number of options of this mesh besides the layout."""
        return sum(getattr(self.mesh, name) > 1 for name in OPTIONS)


def outline(mesh: Mesh, workload: Workload, settings: Settings, device: Device) -> Outline:
    """The figures of one pipeline stage on a `mesh` that fits the model."""
    stage, world, dtype = workload.largest_stage(mesh.pp), mesh.stage_ranks, iteration_dtype(settings, device)
    held, axes = held_bytes(stage, settings, mesh), bytes_by_axis(stage, settings, mesh)
    model = CostModel(device.matmul(dtype))
    times = [
        (model.orthogonalize(p.matrices[0].rows, p.matrices[0].cols, settings.iterations, dtype), n * len(p.matrices))
        for p, n, muon in stage.kinds
        if muon
    ]
    largest = max((p.matrices[0].rows * p.matrices[0].cols for p in stage.muon), default=0)
    itemsize = (settings.wire_dtype or dtype).itemsize
    momentum = 4.0 * stage.muon_elements / world
    if mesh.layout in ("fsdp2", "hsdp"):
        momentum = held.weights / mesh.dp_replicate * stage.muon_elements / max(stage.parameters, 1)
    memory = memory_of(
        stage, settings, mesh, device, held=held, momentum=momentum,
        buckets=max(2 * settings.bucket_mb * 2**20, bytes_of_two_buckets(dtype.itemsize, True) * largest),
    )  # fmt: skip
    sent = (4 + itemsize) * stage.muon_elements / world
    seconds = seconds_of(
        stage, settings, device, mesh, axes, held=held, momentum=momentum,
        newton_schulz=max(sum(t * n for t, n in times) / world, max((t for t, _ in times), default=0.0)),
        exchange=sent / (device.inside if world <= mesh.per_node else device.between) / LINK_SHARE,
    )  # fmt: skip
    return Outline(mesh, settings, memory, seconds, sum(memory.values()) <= usable(device))


def every_mesh(workload: Workload, settings: Settings, ranks: int, per_node: int) -> Iterator[Mesh]:
    """The meshes of `ranks` that fit the model: tp within a node, ep dividing the experts, pp dividing the layers,
    dp_shard and dp_replicate dividing the rest."""
    experts = workload.architecture.experts
    sizes = {
        "tp": [n for n in _divisors(per_node) if n <= ranks],
        "pp": [n for n in _divisors(workload.layers) if ranks % n == 0],
        "ep": [n for n in _divisors(experts) if n <= ranks] if experts else [1],
        "cp": [n for n in _powers(ranks) if settings.sequence_length >= n * _LEAST_TOKENS or n == 1],
    }
    for layout in LAYOUTS:
        on_dtensors = layout in ("fsdp2", "hsdp")
        options = (
            [dict(zip(sizes, chosen, strict=True)) for chosen in product(*sizes.values())]
            if on_dtensors
            else [{"sp": sp, "pp": pp} for sp, pp in product(sizes["cp"], sizes["pp"])]
        )
        for axes in options:
            inner = axes.get("tp", 1) * axes.get("pp", 1) * axes.get("cp", 1)
            copies = [n for n in _divisors(ranks // inner) if n > 1] if layout == "hsdp" else [None]
            for number in copies:
                try:
                    mesh = make_mesh(layout, ranks, per_node, axes | ({"dp_replicate": number} if number else {}))
                except ConfigError:
                    continue
                if next(problems(mesh, workload, settings), None) is None:
                    yield mesh


def outlines(
    workload: Workload, settings: Settings, device: Device, ranks: int, per_node: int, tokens: int
) -> list[Outline]:
    """Every mesh of `ranks` for which some accumulation gives `tokens` tokens per step."""
    found = []
    for mesh in every_mesh(workload, settings, ranks, per_node):
        one = mesh.data * settings.sequence_length * settings.micro_batch
        if tokens % one == 0:
            found.append(outline(mesh, workload, replace(settings, accumulation=tokens // one), device))
    return found


def ranked(found: list[Outline]) -> list[Outline]:
    """The meshes that fit, best first. Among those about as fast as the fastest, fewest axes are best."""
    fitting = sorted((o for o in found if o.fits), key=lambda o: o.step)
    if not fitting:
        return []
    close = [o for o in fitting if o.step <= fitting[0].step * (1 + _ALIKE)]
    best = min(close, key=lambda o: (o.axes, o.step))
    return [best, *(o for o in fitting if o is not best)]


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length()) if 2**i <= most]

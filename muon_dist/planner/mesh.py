"""The device mesh of a plan: ranks along each axis, their checks, and the links that an axis uses.

Ranks are numbered as accelerate and transformers number them, from the slowest axis to the fastest:
pp, dp_replicate, dp_shard, cp, sp, tp. Expert parallelism groups the same ranks a second time: dp_shard x cp x tp =
efsdp x ep, with ep the fastest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from muon_dist.errors import ConfigError
from muon_dist.model.parallel import misfits
from muon_dist.planner.model import Settings, Workload

LAYOUTS = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "hsdp")
_ON_DTENSORS = ("fsdp2", "hsdp")
_AUTOTP = tuple(("tp", layout) for layout in ("zero1", "zero2", "zero3"))
OPTIONS = ("tp", "cp", "sp", "ep", "pp", "dp_replicate")
"""The axes that a user chooses; dp_shard gets the remaining ranks."""


@dataclass(frozen=True)
class Mesh:
    """Ranks along each axis.

    Attributes:
        layout: one of LAYOUTS.
        per_node: consecutive ranks of a machine.
        pp: pipeline stages.
        dp_replicate: copies of the model under HSDP and DDP.
        dp_shard: data-parallel ranks that share one copy of the model.
        cp: ranks of ring attention.
        sp: ranks of DeepSpeed's Ulysses.
        tp: ranks of tensor parallelism; under ZeRO, of DeepSpeed's AutoTP.
        ep: ranks that share the experts of a layer, within dp_shard x cp x tp.
    """

    layout: str
    per_node: int
    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    sp: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage; they share one Muon."""
        return self.dp_replicate * self.dp_shard * self.cp * self.sp * self.tp

    @property
    def ranks(self) -> int:
        return self.pp * self.stage_ranks

    @property
    def data(self) -> int:
        """Number of data-parallel ranks, which read different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def fsdp(self) -> int:
        """Ranks among which `fully_shard` cuts a dense parameter."""
        return self.dp_shard * self.cp

    @property
    def efsdp(self) -> int:
        """Ranks among which `fully_shard` cuts the experts of one expert-parallel rank."""
        return self.fsdp * self.tp // self.ep

    def options(self) -> str:
        """The mesh as command-line options."""
        words = [f"--layout {self.layout}"]
        for name in OPTIONS:
            if name == "dp_replicate" and (
                self.layout != "hsdp" or self.dp_replicate == _copies(self.ranks, self.per_node, self)
            ):
                continue
            if getattr(self, name) > 1:
                words.append(f"--{name.replace('_', '-')} {getattr(self, name)}")
        return " ".join(words)

    def ring_between(self, size: int, stride: int) -> float:
        """Average share of the bytes in a ring of `size` ranks, `stride` apart, that come from another node: one rank
        per node receives from outside."""
        together = self._together(size, stride)
        return 0.0 if together == size else 1 / together

    def peers_between(self, size: int, stride: int) -> float:
        """Share of the other ranks of such a group that are on other nodes, for an all-to-all."""
        return (size - self._together(size, stride)) / (size - 1) if size > 1 else 0.0

    def _together(self, size: int, stride: int) -> int:
        """Ranks of such a group on one node."""
        return min(size, max(1, self.per_node // stride))


def _copies(ranks: int, per_node: int, mesh: Mesh) -> int:
    """Default number of copies of the model under HSDP: one per node, or one per as few nodes as a copy needs."""
    return max(1, ranks // mesh.pp // max(per_node, mesh.cp * mesh.tp))


def make_mesh(layout: str, world: int, per_node: int, axes: Mapping[str, int] | None = None) -> Mesh:
    """The mesh of `world` ranks.

    Args:
        axes: ranks along the axes of OPTIONS, 1 (dp_replicate: the layout's own) where one is missing.

    Raises:
        ConfigError: names the option that does not fit the layout or the number of ranks.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"--layout {layout}: use one of {', '.join(LAYOUTS)}")
    given = {name: size for name, size in (axes or {}).items() if size is not None}
    for name, size in given.items():
        if name not in OPTIONS:
            raise ConfigError(f"--{name}: use one of {', '.join('--' + n for n in OPTIONS)}")
        if size < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {size}: must be at least 1")
    copies = given.pop("dp_replicate", None)
    mesh = Mesh(layout, per_node, **given)
    _check_layout(mesh, copies)
    used = [name for name in ("tp", "cp", "sp", "pp") if getattr(mesh, name) > 1]
    product = mesh.tp * mesh.cp * mesh.sp * mesh.pp
    if world % product:
        names = " ".join(f"--{name} {getattr(mesh, name)}" for name in used)
        raise ConfigError(f"{names}: {world} ranks are not a multiple of {product}")
    data = world // product
    if layout == "ddp":
        return _with_data(mesh, data, 1)
    if layout != "hsdp":
        return _with_data(mesh, 1, data)
    if copies is None:
        copies = _copies(world, per_node, mesh)
        if data % copies or (world // mesh.pp) % per_node:
            raise ConfigError(
                f"--layout hsdp: {world // mesh.pp} ranks are not a multiple of {per_node} a node: give the number of "
                "copies as --dp-replicate"
            )
    if data % copies:
        raise ConfigError(f"--dp-replicate {copies}: the {data} data-parallel ranks are not a multiple of it")
    return _with_data(mesh, copies, data // copies)


def _with_data(mesh: Mesh, copies: int, shards: int) -> Mesh:
    made = Mesh(mesh.layout, mesh.per_node, mesh.pp, copies, shards, mesh.cp, mesh.sp, mesh.tp, mesh.ep)
    inner = made.fsdp * made.tp
    if made.ep > 1 and (made.ep % made.tp or inner % made.ep):
        raise ConfigError(
            f"--ep {made.ep}: must be a multiple of tp = {made.tp} and divide dp_shard x cp x tp = {inner}, the ranks "
            "of one copy of the model"
        )
    return made


def _check_layout(mesh: Mesh, copies: int | None) -> None:
    """Raise ConfigError for an axis that the libraries do not offer with a layout, or where Muon does not run."""
    layout = mesh.layout
    for name in ("tp", "cp", "ep"):
        if getattr(mesh, name) > 1 and layout not in _ON_DTENSORS and (name, layout) not in _AUTOTP:
            raise ConfigError(f"--{name} {getattr(mesh, name)} with --layout {layout}: use --layout fsdp2 or hsdp")
    if mesh.tp > 1 and mesh.sp > 1:
        raise ConfigError(f"--tp {mesh.tp} with --sp {mesh.sp}: DeepSpeed has AutoTP or Ulysses: use one of them")
    if mesh.sp > 1 and layout in _ON_DTENSORS:
        raise ConfigError(
            f"--sp {mesh.sp} with --layout {layout}: Ulysses is DeepSpeed's: use --layout zero1, zero2 or zero3, or "
            "--cp for ring attention"
        )
    if mesh.pp > 1 and layout.startswith("zero"):
        raise ConfigError(
            f"--pp {mesh.pp} with --layout {layout}: DeepSpeed's PipelineModule is not planned: use --layout ddp, "
            "fsdp2 or hsdp, which mean torch.distributed.pipelining"
        )
    if copies is not None and layout != "hsdp":
        raise ConfigError(f"--dp-replicate {copies} with --layout {layout}: copies of shards are --layout hsdp")


def check_model(mesh: Mesh, workload: Workload, settings: Settings) -> None:
    """Raise ConfigError for an axis that does not divide the model or the context; names the option."""
    for problem in problems(mesh, workload, settings):
        raise ConfigError(problem)


def problems(mesh: Mesh, workload: Workload, settings: Settings) -> Iterator[str]:
    """The axes of `mesh` that do not fit the model, by option."""
    sizes = {name: getattr(mesh, name) for name in ("tp", "cp", "sp", "ep")}
    for axis, problem in misfits(sizes, workload.architecture, settings.sequence_length):
        yield f"--{axis} {sizes[axis]}: {problem}"
    if mesh.pp > workload.layers:
        yield f"--pp {mesh.pp}: more stages than the {workload.layers} layers of the model"


def own_loop(mesh: Mesh) -> tuple[str, ...]:
    """The reasons why no library runs `mesh`; empty if one does."""
    found = []
    if mesh.pp > 1:
        found.append("pp: build the stages with torch.distributed.pipelining, with one Muon on each")
    if mesh.pp > 1 and mesh.layout in _ON_DTENSORS and mesh.fsdp * mesh.dp_replicate > 1:
        found.append("pp with FSDP2: transformers refuses it; call fully_shard on each stage")
    if mesh.ep > 1 and mesh.cp > 1:
        found.append("ep with cp: transformers has no cp, accelerate no ep")
    if mesh.ep > 1 and mesh.pp > 1:
        found.append("ep with pp: transformers refuses to dispatch tokens in a pipeline")
    return tuple(found)


def notes(mesh: Mesh) -> tuple[str, ...]:
    """Remarks for a user who wants to run this mesh."""
    loop = own_loop(mesh)
    found = [f"needs your own training loop ({'; '.join(loop)})"] if loop else []
    if mesh.cp > 1:
        found.append("cp: ring attention has no CPU kernel; Muon's layout is tested, the attention is torch's")
    return tuple(found)


def describe(mesh: Mesh) -> str:
    """The axes with more than one rank, slowest first."""
    names = ("pp", "dp_replicate", "dp_shard", "cp", "sp", "tp")
    axes = [f"{name} {getattr(mesh, name)}" for name in names if getattr(mesh, name) > 1]
    experts = f" (experts: efsdp {mesh.efsdp} x ep {mesh.ep})" if mesh.ep > 1 else ""
    assert math.prod(getattr(mesh, name) for name in names) == mesh.ranks
    return (" x ".join(axes) or "1 rank") + experts

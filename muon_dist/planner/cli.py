"""``muon-dist plan``: the cost of a run, computed without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from muon_dist.arguments import SettingsCommand
from muon_dist.config.parallel import Parallel
from muon_dist.errors import ConfigError
from muon_dist.json_files import indented, read_object

if TYPE_CHECKING:
    from torch import nn

    from muon_dist.config import Config
    from muon_dist.planner.model import Settings, Workload
    from muon_dist.routing import RoutingTable

app = typer.Typer()
_Ranks = int | None


@app.command(cls=SettingsCommand)
def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, such as configs/llama-7b.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, for example optimizer.muon.bucket_mb=128."),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="Ranks per machine.")] = 8,
    device: Annotated[
        str, typer.Option(help="a100, h100, h200, b200, mi300x, cpu, or measured for this machine.")
    ] = "h100",
    layout: Annotated[
        str | None,
        typer.Option(help="ddp, zero1, zero2, zero3, fsdp2 or hsdp; default: from the configuration."),
    ] = None,
    tp: Annotated[_Ranks, typer.Option(help="Ranks of tensor parallelism.")] = None,
    cp: Annotated[_Ranks, typer.Option(help="Ranks of context parallelism (ring attention).")] = None,
    sp: Annotated[_Ranks, typer.Option(help="Ranks of sequence parallelism (Ulysses).")] = None,
    ep: Annotated[_Ranks, typer.Option(help="Ranks that share a layer's experts, within dp_shard x cp x tp.")] = None,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline stages.")] = 1,
    dp_replicate: Annotated[
        _Ranks, typer.Option(help="Copies of the model under hsdp; one per node by default.")
    ] = None,
    order: Annotated[
        bool, typer.Option(help="Under ZeRO-1/2, order Muon's group so that slices begin between matrices.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    advice: Annotated[bool, typer.Option(help="Look for better settings and meshes.")] = True,
) -> None:
    """Compute memory, bytes per link, balance of Newton-Schulz and overhead of a run on any number of machines; needs
    no GPU.

    The mesh is that of the configuration (parallel:, deepspeed), unless options change it.
    """
    from muon_dist.config import load_config

    given = load_config(config, overrides or [])  # first: errors of the file come before torch's import
    from muon_dist.planner.advice import advise
    from muon_dist.planner.devices import find_device
    from muon_dist.planner.plan import make_plan
    from muon_dist.planner.report import show

    chosen = find_device(device)
    kind = layout or layout_of(given)
    workload, settings = unpack(given)
    settings = replace(settings, ordered=order and settings.ordered)
    given_axes = {"tp": tp, "cp": cp, "sp": sp, "ep": ep, "pp": pp, "dp_replicate": dp_replicate}
    axes = axes_of(given, kind) | {name: size for name, size in given_axes.items() if size is not None}
    check_ranks(given, axes, layout is None, nodes * gpus_per_node)
    ranks = nodes * gpus_per_node
    typer.echo(f"planning {workload.name} on {ranks:,} ranks ...", err=True)
    made = make_plan(workload, settings, chosen, layout=kind, nodes=nodes, per_node=gpus_per_node, axes=axes)
    if advice:
        typer.echo(f"looking for a better mesh of {ranks:,} ranks (--no-advice skips this) ...", err=True)
        made = advise(made, workload, settings, chosen)
    if as_json:
        typer.echo(indented(made.to_json()))
    else:
        show(made, chosen)


@app.command()
def balance(
    configs: Annotated[list[Path], typer.Argument(metavar="CONFIG...", help="YAML files.")],
    ranks: Annotated[
        list[int] | None,
        typer.Option(min=1, help="A number of ranks; repeat it. Default 8 16 32 64 128 256 512 1024."),
    ] = None,
    device: Annotated[str, typer.Option(help="As for plan.")] = "h100",
) -> None:
    """Print a Markdown table of the balance of Newton-Schulz: load of the busiest rank divided by the mean."""
    from muon_dist.config import load_config
    from muon_dist.planner.balance import balance as rows_of
    from muon_dist.planner.balance import markdown
    from muon_dist.planner.devices import find_device

    rows = []
    for path in configs:
        workload, settings = unpack(load_config(path))
        rows += rows_of(workload, settings, find_device(device), ranks or [2**i for i in range(3, 11)])
    typer.echo(markdown(rows))


def unpack(config: Config) -> tuple[Workload, Settings]:
    """The model of a configuration, routed on the meta device, and the settings that a plan depends on."""
    from muon_dist.config.routing import routing_rules
    from muon_dist.model import DTYPES
    from muon_dist.optim.rules.choice import check_options
    from muon_dist.planner.model import Settings, describe_model

    muon, trainer = config.optimizer.muon, config.trainer
    workload = describe_model(
        config.name,
        config.model,
        vocabulary=_vocabulary(config),
        sequence_length=config.data.sequence_length,
        **routing_rules(config.optimizer),
    )
    zero = _deepspeed(config).get("zero_optimization") or {}
    settings = Settings(
        ns_steps=muon.ns_steps,
        ns_schedule=muon.ns_schedule,
        ns_dtype=DTYPES[muon.ns_dtype] if muon.ns_dtype is not None else None,
        wire_dtype=DTYPES[muon.wire_dtype] if muon.wire_dtype is not None else None,
        bucket_mb=muon.bucket_mb,
        overlap=muon.overlap,
        owner_policy=muon.owner_policy,
        sequence_length=config.data.sequence_length,
        micro_batch=int(trainer.get("per_device_train_batch_size", 8)),
        accumulation=int(trainer.get("gradient_accumulation_steps", 1)),
        checkpointing=bool(trainer.get("gradient_checkpointing", False)),
        low_precision=bool(trainer.get("bf16", False) or trainer.get("fp16", False)),
        sub_group_size=int(zero.get("sub_group_size", 10**9)),
        ordered=not zero.get("round_robin_gradients", False),
        momentum_everywhere=muon.momentum_everywhere,
        rule=check_options(muon.model_dump(exclude_none=True)),
    )
    return workload, settings


def routed(config: Config) -> tuple[nn.Module, RoutingTable]:
    """The model of a configuration on the meta device, where weights take no memory, and its routing."""
    from muon_dist.config.routing import routing_rules
    from muon_dist.planner.model import build_on_meta
    from muon_dist.routing import route

    model = build_on_meta(config.model, _vocabulary(config))
    return model, route(model, **routing_rules(config.optimizer))


def _vocabulary(config: Config) -> int:
    return config.tokenizer.vocab_size or 32768


def layout_of(config: Config) -> str:
    """The layout of the configuration: its ZeRO stage, FSDP2, HSDP, or DDP."""
    stage = (_deepspeed(config).get("zero_optimization") or {}).get("stage", 0)
    if stage:
        return f"zero{stage}"
    block = config.parallel
    if block is not None and config.deepspeed is None:
        alone = block.dp_shard == 1 and block.tp * block.cp * block.ep == 1
        return "ddp" if alone else "fsdp2" if block.dp_replicate == 1 else "hsdp"
    return "fsdp2" if config.trainer.get("fsdp") else "ddp"


def axes_of(config: Config, layout: str) -> dict[str, int]:
    """The configuration's ranks by axis under `layout`, from its `parallel:` block or DeepSpeed's keys.

    Raises:
        ConfigError: AutoTP with a `partition_config`.
    """
    block = config.parallel
    axes = {} if block is None else {name: getattr(block, name) for name in ("tp", "cp", "sp", "ep")}
    if block is not None and layout == "hsdp":
        axes["dp_replicate"] = block.dp_replicate
    if layout in ("fsdp2", "hsdp"):
        return {**axes, "sp": 1}
    settings = _deepspeed(config)
    tensor = settings.get("tensor_parallel") or {}
    size = int(tensor.get("autotp_size", (tensor.get("tp") or {}).get("tp_size", 0)) or 0)
    if tensor.get("partition_config"):
        raise ConfigError(
            "deepspeed.tensor_parallel.partition_config: plan cuts a model by its own tensor-parallel plan: remove "
            "the key to plan so"
        )
    axes["tp"] = max(axes.get("tp", 1), size)
    return {**axes, "sp": max(axes.get("sp", 1), int(settings.get("sequence_parallel_size", 1)))}


def check_ranks(config: Config, axes: Mapping[str, int], own_layout: bool, ranks: int) -> None:
    """Raises ConfigError if `parallel.dp_shard` is set and differs from the planned mesh.

    Args:
        axes: the planned axes; if an option differs from the block, dp_shard is not compared.
        own_layout: the layout is the configuration's.
    """
    block = config.parallel
    if block is None or block.dp_shard is None or not own_layout:
        return
    names = ("tp", "cp", "sp", "ep", "dp_replicate")
    if all(axes.get(name, getattr(block, name)) == getattr(block, name) for name in names) and axes.get("pp", 1) == 1:
        Parallel.of(block.model_dump(exclude={"sp_backend"}), ranks)


def _deepspeed(config: Config) -> dict[str, Any]:
    given = config.deepspeed
    if given is None or isinstance(given, dict):
        return given or {}
    return read_object(Path(given))

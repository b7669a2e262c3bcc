"""The block `curriculum` of a configuration: settings that change at a given optimizer step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from muon_dist.config.data import DataConfig
from muon_dist.config.kinds import BelowOne, Block, NonNegative, PositiveInt, RuleOptions, Scale, Schedule
from muon_dist.config.source import Keys


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class PartDataConfig(Block):
    """Data of a part; null: the value of the part before."""

    sequence_length: Annotated[int, Field(ge=2)] | None = Field(default=None, description="tokens in a sample")
    packing: Literal["concatenate", "document_mask", "best_fit"] | None = Field(
        default=None, description="how documents share a sample"
    )
    weights: Annotated[tuple[NonNegative, ...], BeforeValidator(_tuple)] | None = Field(
        default=None, description="share of each of data.sources, in their order; 0: not drawn"
    )


class PartMuonConfig(Block):
    """Settings of the Muon groups in a part; null: the value of the part before."""

    rule: str | None = Field(
        default=None, description="update rule; momentum stays, and the other state of a new rule begins at zero"
    )
    rule_options: RuleOptions | None = Field(
        default=None, description="options of the rule; null: unchanged, or the defaults of a new rule"
    )
    weight_decay: NonNegative | None = None
    momentum: BelowOne | None = None
    nesterov: bool | None = None
    ns_steps: PositiveInt | None = None
    ns_schedule: Schedule | None = None
    scale: Scale | None = None


class PartOptimizerConfig(Block):
    """The optimizer of a part."""

    muon: PartMuonConfig = PartMuonConfig()


class PartConfig(Block):
    """A part of a run; the part before ends where it begins."""

    from_step: PositiveInt = Field(description="optimizer steps that are done when the part begins")
    data: PartDataConfig = PartDataConfig()
    optimizer: PartOptimizerConfig = PartOptimizerConfig()
    lr_scheduler_type: str | None = Field(
        default=None,
        description="transformers name of a schedule over the steps of the part; null: the old schedule continues",
    )
    lr_scheduler_kwargs: dict[str, Any] | None = Field(default=None, description="arguments of lr_scheduler_type")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(default=0, description="steps of warmup of lr_scheduler_type")
    lr_scale: NonNegative | None = Field(
        default=None,
        description="factor on all learning rates: on the configured rates with lr_scheduler_type, else on the old "
        "schedule, which continues; null: the new schedule begins at the rate that the part before reached",
    )


@dataclass(frozen=True)
class PartData:
    """Data of a part with all values filled in. weights: one per source."""

    from_step: int
    sequence_length: int
    packing: str
    weights: tuple[float, ...]


def data_of_parts(data: DataConfig, curriculum: Sequence[PartConfig]) -> tuple[PartData, ...]:
    """The data of each part of a run; the first part has the values of the block `data`."""
    parts = [PartData(0, data.sequence_length, data.packing, tuple(source.weight for source in data.chosen))]
    for part in curriculum:
        before, own = parts[-1], part.data
        length = own.sequence_length if own.sequence_length is not None else before.sequence_length
        weights = own.weights if own.weights is not None else before.weights
        parts.append(PartData(part.from_step, length, own.packing or before.packing, weights))
    return tuple(parts)


def muon_of_parts(muon: dict[str, Any], curriculum: Sequence[PartConfig]) -> list[dict[str, Any]]:
    """The settings of the Muon groups in each part; the first part has the settings `muon`."""
    parts = [muon]
    for part in curriculum:
        before, own = parts[-1], part.optimizer.muon.model_dump(exclude_none=True)
        other_rule = own.get("rule", before["rule"]) != before["rule"]
        parts.append({**before, **({"rule_options": {}} if other_rule else {}), **own})
    return parts


def changes_rule(part: PartConfig) -> bool:
    """Whether a part changes any setting of the Muon groups."""
    return bool(part.optimizer.muon.model_dump(exclude_none=True))


def curriculum_problems(
    data: DataConfig, curriculum: Sequence[PartConfig], model: dict[str, Any], longest: Sequence[str]
) -> Iterator[tuple[Keys, str]]:
    """Yield the errors of the parts. longest: names that models give to the setting of their longest sequence."""
    if data.chosen and not any(source.weight for source in data.chosen):
        yield ("data", "sources"), "all have weight 0, so no text would be drawn: give one a weight above 0"
    for index, part in enumerate(curriculum):
        keys: Keys = ("curriculum", index)
        if index and part.from_step <= curriculum[index - 1].from_step:
            yield (
                (*keys, "from_step"),
                f"is {part.from_step}, and must be above that of the part before, {curriculum[index - 1].from_step}",
            )
        weights = part.data.weights
        if weights is not None and len(weights) != len(data.chosen):
            yield (*keys, "data", "weights"), f"has {len(weights)} numbers for {len(data.chosen)} sources"
        elif weights is not None and not any(weights):
            yield (*keys, "data", "weights"), "are all 0, so no text would be drawn: set one above 0"
        for name in ("lr_scheduler_kwargs", "warmup_steps"):
            if part.lr_scheduler_type is None and getattr(part, name):
                yield (*keys, name), "belongs to lr_scheduler_type, which is not set: set both or neither"
        for name in longest:
            most, length = model.get(name), part.data.sequence_length
            if isinstance(most, int) and length is not None and length > most:
                yield (
                    (*keys, "data", "sequence_length"),
                    f"is {length}, more than model.{name} = {most}: shorten it or raise model.{name}",
                )


def packing_problems(
    parts: Sequence[PartData], parallel: Any, model: dict[str, Any], has_deepspeed: bool
) -> Iterator[tuple[Keys, str]]:
    """Yield settings that cannot be used with documents kept apart in a sample."""
    packed = [(index, part.packing) for index, part in enumerate(parts) if part.packing != "concatenate"]
    if not packed:
        return
    index, packing = packed[0]
    keys: Keys = ("data", "packing") if index == 0 else ("curriculum", index - 1, "data", "packing")
    for axis in ("cp", "sp"):
        if parallel is not None and getattr(parallel, axis) > 1:
            yield (
                keys,
                f"is {packing}, but parallel.{axis} splits each sample over ranks, where attention cannot keep "
                f"documents apart: set packing to concatenate, or parallel.{axis} to 1",
            )
    if has_deepspeed and model.get("partitioned_init"):
        yield (
            keys,
            f"is {packing}, but with model.partitioned_init it cannot be tested whether the model keeps documents "
            "apart: leave partitioned_init out, or set packing to concatenate",
        )

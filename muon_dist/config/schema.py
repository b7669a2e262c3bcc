"""The schema of a configuration: frozen pydantic models that refuse unknown keys.

Field names are the keys of the YAML file; the descriptions end up in `muon-dist schema`. Nothing below `train/` sees
these objects: they are unpacked there into plain arguments.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from muon_dist import defaults
from muon_dist.config.curriculum import PartConfig, PartData, data_of_parts
from muon_dist.config.data import DataConfig, TokenizerConfig
from muon_dist.config.kinds import (
    BelowOne,
    Block,
    DType,
    Flag,
    LocalPath,
    NonNegative,
    Positive,
    PositiveInt,
    RuleOptions,
    Scale,
    Schedule,
)
from muon_dist.config.paths import expand_model_paths, expand_path, expand_trainer_paths
from muon_dist.config.redact import redact
from muon_dist.config.source import ConfigDumper
from muon_dist.config.splits import CutConfig, SplitConfig, heads_of_all, heads_of_entry


class MuonConfig(Block):
    """Settings of the Muon groups; null: the default of the rule."""

    lr: NonNegative
    rule: str = Field(
        default=defaults.RULE,
        description="update rule: muon, normuon, adamuon, soap_muon, hyperball, namo, or the name of a plugin's rule",
    )
    rule_options: RuleOptions = Field(
        default_factory=dict,
        description="further options of the rule, such as beta2 of normuon, and optional parts: cautious, "
        "row_floor, radial_brake, muoneq, muon_plus, momentum_at_owner",
    )
    weight_decay: NonNegative | None = Field(
        default=None, description="decoupled weight decay; null: 0.1, or 0 under hyperball"
    )
    momentum: BelowOne = defaults.MOMENTUM
    nesterov: bool | None = Field(default=None, description="null: true, or false under namo")
    ns_steps: PositiveInt = Field(default=defaults.NS_STEPS, description="Newton-Schulz steps")
    ns_schedule: Schedule = Field(
        default=defaults.NS_SCHEDULE,
        description="coefficients of the Newton-Schulz iteration: a name, or [[a, b, c], ...], one row per step",
    )
    ns_dtype: DType | None = Field(
        default=None, description="dtype of the iteration; null: float16 on GPUs, float32 elsewhere"
    )
    scale: Scale | None = Field(
        default=None,
        description="match_rms_adamw: 0.2 sqrt(max(m, n)), so an AdamW learning rate carries over; spectral: "
        "sqrt(max(1, m/n)); unit_rms: sqrt(m/n); none: 1; or a plugin's (m outputs, n inputs); null: match_rms_adamw, "
        "or none under hyperball and namo",
    )
    bucket_mb: Positive = Field(
        default=defaults.BUCKET_MB,
        description="MiB per bucket; a step allocates at most twice this; a larger matrix has its own bucket",
    )
    overlap: Flag = Field(
        default=True, description="send other buckets while one is orthogonalized; the result is the same bit for bit"
    )
    ns_compile: Flag = Field(default=False, description="Newton-Schulz through torch.compile")
    wire_dtype: DType | None = Field(
        default=None, description="dtype in which momentum and updates are sent; null: not rounded"
    )
    owner_policy: Literal["balanced", "local", "round_robin"] = Field(
        default=defaults.OWNER_POLICY, description="how the owner of each matrix is chosen"
    )
    cost: Literal["analytic", "measured"] = Field(
        default=defaults.COST,
        description="cost of a matrix for owner_policy balanced; measured: timed once per shape, kept in a file",
    )
    master_weights: Flag = Field(
        default=False, description="fp32 master copies of 16-bit parameters, AdamW's too: 4 more bytes per element"
    )
    stochastic_rounding: Flag = Field(
        default=False,
        description="random rounding of bfloat16 parameters, AdamW's too; its mean is exact; drawn from seed",
    )
    momentum_everywhere: Flag = Field(
        default=False,
        description="momentum on every rank that holds a copy of a weight, so that any library saves all momentum: 4 "
        "bytes per element on each of these ranks",
    )


class AdamWConfig(Block):
    """Settings of the AdamW groups: embeddings, output head, vectors; all parameters if optimizer.name is adamw."""

    lr: NonNegative
    weight_decay: NonNegative = Field(
        default=defaults.WEIGHT_DECAY, description="decoupled weight decay; not applied to biases and norms"
    )
    betas: tuple[BelowOne, BelowOne] = defaults.BETAS
    eps: Positive = defaults.EPS


class ClipConfig(Block):
    """Largest gradient norm over all parameters, above which an algorithm's gradients are clipped; null: not clipped.

    Muon needs no bound, because its update does not depend on the gradient's size.
    """

    muon: Positive | None = None
    adamw: Positive | None = defaults.CLIP_ADAMW


class QKClipConfig(Block):
    """Scale the query and key weights of heads with large attention logits down after each step."""

    threshold: Positive = Field(default=defaults.QK_THRESHOLD, description="heads with a larger logit are scaled down")
    alpha: Annotated[float, Field(ge=0, le=1)] = Field(
        default=defaults.QK_ALPHA, description="share of the exponent that the queries take; the keys take the rest"
    )


class OverrideConfig(Block):
    """Send the parameters whose whole name matches the regular expression to an algorithm."""

    pattern: str
    algorithm: Literal["muon", "adamw"]


class GroupConfig(Block):
    """Options of the parameters that a pattern matches; null: the value without this entry.

    The first entry that matches a parameter decides.
    """

    pattern: str = Field(
        min_length=1, description="regular expression for the whole name, or the whole name without .weight"
    )
    algorithm: Literal["muon", "adamw"] | None = None
    lr: NonNegative | None = Field(default=None, description="learning rate, not a factor; the schedule multiplies it")
    weight_decay: NonNegative | None = Field(
        default=None, description="weight decay of all matches, also of biases and norms"
    )
    rule: str | None = Field(default=None, description="update rule; null: optimizer.muon.rule")
    rule_options: RuleOptions | None = None
    scale: Scale | None = None
    split: Annotated[CutConfig | None, BeforeValidator(heads_of_entry)] = Field(
        default=None, description="how Muon's parameters are split into matrices; heads: one per attention head"
    )


class RoutingConfig(Block):
    """Corrections of the routing: short forms of entries of groups that set only algorithm or split."""

    overrides: tuple[OverrideConfig, ...] = ()
    split: Annotated[tuple[SplitConfig, ...], BeforeValidator(heads_of_all)] = Field(
        default=(), description="how Muon's parameters are split into matrices; heads: one per attention head"
    )


class AuditConfig(Block):
    """Other ranks recompute a share of the optimizer's steps; see docs/audit.md."""

    every: Annotated[int, Field(ge=0)] = Field(
        default=0, description="every so many steps one step is audited; 0: no audit"
    )
    matrices: PositiveInt = Field(default=1, description="Muon matrices that an audited step recomputes")
    tolerance: Positive | None = Field(
        default=None, description="largest relative error of an update; null: computed from the dtypes"
    )
    on_alarm: Literal["warn", "stop", "undo"] = Field(
        default="warn", description="stop: end with exit code 13; undo: take the step back"
    )


class OptimizerConfig(Block):
    """Muon with AdamW for the rest, or AdamW only."""

    name: Literal["muon", "adamw"] = "muon"
    muon: MuonConfig
    adamw: AdamWConfig
    clip: ClipConfig = ClipConfig()
    qk_clip: QKClipConfig | None = Field(default=None, description="null: logits are not clipped")
    routing: RoutingConfig = RoutingConfig()
    groups: tuple[GroupConfig, ...] = Field(default=(), description="options of parameters by name")
    plugins: tuple[str, ...] = Field(
        default=(), description="Python modules that register rules, scales or schedules; imported on every rank first"
    )
    audit: AuditConfig = AuditConfig()


class EvaluationConfig(Block):
    """The sample that is generated at the end."""

    generate_prompt: str = Field(default=defaults.PROMPT, description="text that the sample continues")
    generate_tokens: Annotated[int, Field(ge=0)] = Field(default=64, description="tokens to generate; 0: no sample")
    temperature: NonNegative = Field(default=defaults.TEMPERATURE, description="0: always the most probable token")
    top_k: PositiveInt = Field(default=defaults.TOP_K, description="choose among this many most probable tokens")


class DiagnosticsConfig(Block):
    """Spectral measures of every Muon matrix, written by its owner to the run folder's spectra/."""

    every: Annotated[int, Field(ge=0)] = Field(default=0, description="measure every so many steps; 0: never")
    budget: Annotated[float, Field(gt=0, le=1)] = Field(
        default=defaults.DIAGNOSTICS_BUDGET,
        description="largest share of the time that measuring may take; 1: no limit",
    )


class CheckpointConfig(Block):
    """How a run is saved and continued. trainer.save_strategy and trainer.save_steps say when."""

    background: Flag = Field(
        default=True,
        alias="async",
        description="write in the background: training waits only for the copy to host memory",
    )
    keep_last: PositiveInt | None = Field(default=None, description="newest checkpoints to keep; null: all")
    keep_every: PositiveInt | None = Field(default=None, description="also keep steps that are multiples of this")
    on_error: Literal["stop", "continue"] = Field(
        default="stop", description="if a save fails, for instance on a full disk: end the run, or warn and continue"
    )
    resume: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="without --resume, continue from the newest checkpoint; auto: if the same launch starts again; "
        "always: whenever there is one; never",
    )


class GuardsConfig(Block):
    """Settings of the guards of a run."""

    max_nonfinite: PositiveInt = Field(
        default=defaults.MAX_NONFINITE,
        description="this many skipped steps in a row (NaN or infinite gradient) end the run",
    )
    spike: Literal["off", "skip", "rollback"] = Field(
        default="off",
        description="if the loss jumps: do nothing; skip the step; or skip it and return to the last checkpoint",
    )
    spike_window: Annotated[int, Field(ge=4)] = Field(
        default=defaults.SPIKE_WINDOW, description="number of earlier losses that a loss is compared with"
    )
    spike_sigmas: Positive = Field(
        default=defaults.SPIKE_SIGMAS,
        description="a loss this many standard deviations above the earlier losses is a spike",
    )
    hash_every: Annotated[int, Field(ge=0)] = Field(
        default=defaults.HASH_EVERY,
        description="compare the copies of parameters every so many steps, and before saves; 0: never",
    )
    watchdog_seconds: NonNegative | None = Field(
        default=None, description="longest time of one operation; null: 0.9 of trainer.ddp_timeout; 0: no watchdog"
    )
    straggler_seconds: NonNegative = Field(
        default=defaults.STRAGGLER_SECONDS, description="warn about a rank that is repeatedly slower by this; 0: never"
    )
    signals: Flag = Field(default=True, description="on SIGTERM and SIGUSR1 save a checkpoint and exit with 75")


class ParallelConfig(Block):
    """Ranks along each mesh axis; dp_replicate x dp_shard x cp x sp x tp is the number of ranks of the run.

    dp_shard, tp and ep split the model, dp_replicate copies it, cp and sp split the tokens of a sample. ep groups the
    dp_shard x tp ranks of one copy a second time, so it is not a factor of the product.
    """

    dp_replicate: PositiveInt = Field(default=1, description="copies of the model")
    dp_shard: PositiveInt | None = Field(
        default=None,
        description="data-parallel ranks that shard one copy (FSDP2); null: all remaining ranks",
    )
    tp: PositiveInt = Field(default=1, description="ranks of tensor parallelism, inside a node")
    cp: PositiveInt = Field(default=1, description="ranks of context parallelism (ring attention), on GPUs")
    sp: PositiveInt = Field(default=1, description="ranks of sequence parallelism (Ulysses), with deepspeed")
    sp_backend: Literal["deepspeed"] = "deepspeed"
    ep: PositiveInt = Field(
        default=1, description="ranks that share the experts of a layer, among the dp_shard x tp ranks of a copy"
    )


class Config(Block):
    """One run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$", max_length=200)] = Field(
        description="the run folder is run_dir/name"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    run_dir: LocalPath = "runs"
    tokenizer: Annotated[TokenizerConfig, Field(default_factory=lambda: TokenizerConfig(path=None))]
    data: DataConfig = DataConfig()
    model: Annotated[
        dict[str, Any],
        BeforeValidator(expand_model_paths),
        WithJsonSchema(
            {
                "type": "object",
                "properties": {
                    "model_type": {"type": "string"},
                    "dtype": {"enum": ["float32", "bfloat16", "float16"]},
                    "partitioned_init": {"type": "boolean"},
                    "init_from": {"type": "string"},
                },
                "anyOf": [{"required": ["model_type"]}, {"required": ["init_from"]}],
                "description": "model_type, or init_from (a model folder, checkpoint or run whose weights are the "
                "first ones); dtype, partitioned_init (under ZeRO-3 no process ever holds the whole "
                "model), and keyword arguments of transformers.AutoConfig.for_model",
            }
        ),
    ]
    optimizer: OptimizerConfig
    trainer: Annotated[dict[str, Any], BeforeValidator(expand_trainer_paths)] = Field(
        default_factory=dict, description="arguments of transformers.TrainingArguments"
    )
    deepspeed: Annotated[
        Any,
        AfterValidator(lambda value: expand_path(value) if isinstance(value, str) else value),
        WithJsonSchema(
            {
                "anyOf": [{"type": "string"}, {"type": "object"}, {"type": "null"}],
                "description": "DeepSpeed configuration: the path of its JSON file, or the configuration itself",
            }
        ),
    ] = None
    curriculum: Annotated[
        tuple[PartConfig, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)
    ] = Field(
        default=(), description="parts with other data, schedule or Muon settings, each from a given optimizer step"
    )
    parallel: ParallelConfig | None = Field(
        default=None, description="mesh of ranks; null: DDP, unless deepspeed or trainer.fsdp is set"
    )
    evaluation: EvaluationConfig = EvaluationConfig()
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()
    guards: GuardsConfig = GuardsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @property
    def parts(self) -> tuple[PartData, ...]:
        """The data of each part of the run; one part without a curriculum."""
        return data_of_parts(self.data, self.curriculum)

    def to_yaml(self, redacted: bool = True) -> str:
        """The whole configuration as YAML that `load_config` reads back.

        Values of keys that look like credentials are replaced unless `redacted` is False.
        """
        plain = self.model_dump(mode="json", by_alias=True)
        return yaml.dump(
            redact(plain) if redacted else plain, Dumper=ConfigDumper, sort_keys=False, allow_unicode=True
        )


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a configuration file, `base` included."""
    schema = Config.model_json_schema()
    schema["properties"]["base"] = {
        "type": "string",
        "description": "configuration file that this one changes, relative to this file",
    }
    return schema

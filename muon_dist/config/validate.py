"""Checks that a schema cannot express: settings that contradict each other."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from muon_dist.config.curriculum import changes_rule, curriculum_problems, muon_of_parts, packing_problems
from muon_dist.config.data import TOKENS, SourceConfig
from muon_dist.config.paths import is_there, is_url
from muon_dist.config.schema import Config, GroupConfig, MuonConfig
from muon_dist.config.source import Keys
from muon_dist.config.trainer import DECIDED_ELSEWHERE
from muon_dist.errors import ConfigError, RoutingError

Found = Iterator[tuple[Keys, str]]

# Names that the model types give to the longest sequence (GPT-2: n_positions).
_LONGEST = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


def contradictions(config: Config) -> Found:
    """Settings that contradict each other; each message names both keys and the fix."""
    yield from _tokenizer_and_data(config)
    yield from _model(config)
    yield from _routing(config)
    yield from _trainer(config)
    yield from _deepspeed(config)
    yield from _parallel(config)
    yield from _guards(config)
    yield from curriculum_problems(config.data, config.curriculum, config.model, _LONGEST)
    yield from packing_problems(config.parts, config.parallel, config.model, config.deepspeed is not None)


def missing_files(config: Config) -> Found:
    """Files and folders that the configuration names but that do not exist or cannot be read."""
    yield from _missing_text(config)
    if config.tokenizer.path is not None and not Path(config.tokenizer.path).exists():
        yield (
            ("tokenizer", "path"),
            f"{config.tokenizer.path}: no such folder. A tokenizer of the hub must be downloaded first: hf download "
            "NAME --local-dir FOLDER",
        )
    start = config.model.get("init_from")
    if isinstance(start, str) and not Path(start).exists():
        yield (
            ("model", "init_from"),
            f"{start}: no such folder. A model of the hub must be downloaded first: hf download NAME --local-dir "
            "FOLDER",
        )
    if isinstance(config.deepspeed, str) and not Path(config.deepspeed).is_file():
        yield (
            ("deepspeed",),
            f"{config.deepspeed}: no such file. Name a JSON file, such as configs/deepspeed/zero2.json, or write the "
            "settings here",
        )
    elif isinstance(config.deepspeed, str):
        yield from _no_settings(Path(config.deepspeed))


def _no_settings(file: Path) -> Found:
    """A DeepSpeed file that is no JSON object."""
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        yield (
            ("deepspeed",),
            f"{file}:{error.lineno}: this is not JSON ({error.msg}, column {error.colno}): correct it",
        )
    except (OSError, ValueError) as error:
        yield ("deepspeed",), f"{file} cannot be read: {error}"
    else:
        if not isinstance(read, dict):
            yield (
                ("deepspeed",),
                f"{file} holds a {type(read).__name__}: DeepSpeed's settings are a JSON object {{...}}",
            )


def _missing_text(config: Config) -> Found:
    """Local sources that do not exist, unless their tokens are already prepared. URLs and the hub are not checked."""
    if (Path(config.data.dir) / TOKENS).exists():
        return
    data = config.data
    own: list[tuple[Keys, str | tuple[str, ...] | None]] = [(("data", "path"), data.path)]
    listed = data.sources if data.path is None else ()
    for name, sources in (("sources", listed), ("validation_sources", data.validation_sources)):
        own += [(("data", name, index, "path"), source.path) for index, source in enumerate(sources)]
    for keys, paths in own:
        for path in (paths,) if isinstance(paths, str) else paths or ():
            if not is_url(path) and not is_there(Path(path)):
                yield keys, f"{path}: no such file or folder"


def _guards(config: Config) -> Found:
    guards = config.guards
    if guards.spike != "off" and config.optimizer.name != "muon":
        yield (
            ("guards", "spike"),
            f"is {guards.spike} and optimizer.name is {config.optimizer.name}: only Muon can skip a step; set "
            "guards.spike to off",
        )
    timeout = config.trainer.get("ddp_timeout", 1800)
    if guards.watchdog_seconds is not None and guards.watchdog_seconds >= timeout:
        yield (
            ("guards", "watchdog_seconds"),
            f"is {guards.watchdog_seconds:g} and trainer.ddp_timeout is {timeout}: the run would end before the "
            "watchdog names the slow rank. Set watchdog_seconds below ddp_timeout",
        )


def _tokenizer_and_data(config: Config) -> Found:
    tokenizer, data = config.tokenizer, config.data
    if tokenizer.path is not None and tokenizer.vocab_size is not None:
        yield (
            ("tokenizer", "vocab_size"),
            f"contradicts tokenizer.path ({tokenizer.path}), whose vocabulary is fixed: remove it or set it to null",
        )
    if tokenizer.path is None and tokenizer.vocab_size is None:
        yield ("tokenizer", "vocab_size"), "is null and so is tokenizer.path: set one of them"
    if data.path is None and data.text_field != "text":
        yield ("data", "text_field"), "belongs to data.path, which is not set: set data.sources.0.text_field instead"
    if not data.chosen:
        yield ("data", "sources"), "is empty: name a source, for instance {builtin: stdlib}"
    if tokenizer.path is not None:
        for name in sorted(n for n in ("special_tokens", "split_digits") if getattr(tokenizer, n)):
            yield (
                ("tokenizer", name),
                f"needs a tokenizer that is trained here, but tokenizer.path is {tokenizer.path}: remove one of them",
            )
    yield from _outputs_among_data(config)
    for index, source in enumerate(data.sources if data.path is None else ()):
        yield from _source(("data", "sources", index), source)
    for index, source in enumerate(data.validation_sources):
        yield from _source(("data", "validation_sources", index), source)
    if (
        data.validation_fraction == 0
        and not data.validation_sources
        and config.trainer.get("eval_strategy", "no") != "no"
    ):
        yield (
            ("data", "validation_fraction"),
            f"is 0, so trainer.eval_strategy = {config.trainer['eval_strategy']} has nothing to evaluate: "
            "raise it or set trainer.eval_strategy to 'no'",
        )


def _outputs_among_data(config: Config) -> Found:
    """Folders that a run writes inside a data source, which would read them the next time. Hidden ones are not
    read."""
    for source in (*config.data.chosen, *config.data.validation_sources):
        paths = source.path if isinstance(source.path, tuple) else (source.path,)
        for path in (source.dataset, *paths):
            if path is None or not os.path.isdir(path):
                continue
            corpus = Path(path).resolve()
            for keys, folder in ((("data", "dir"), config.data.dir), (("run_dir",), config.run_dir)):
                place = Path(folder).resolve()
                hidden = any(part.startswith(".") for part in place.parts[len(corpus.parts) :])
                if place.is_relative_to(corpus) and not hidden:
                    yield (
                        keys,
                        f"({folder}) is inside the data source {path}, which would read it as text the next time: "
                        "choose a folder outside",
                    )


def _source(keys: Keys, source: SourceConfig) -> Found:
    kinds = [k for k in ("builtin", "path", "dataset") if getattr(source, k) is not None]
    if len(kinds) != 1:
        given = " and ".join(kinds) if kinds else "none of them"
        yield keys, f"needs exactly one of builtin, path and dataset, and has {given}"
        return
    of_dataset = {"config", "streaming", "revision"}
    of_text = {"format", "document_bytes", "separator"}
    builtin = of_dataset | of_text | {"split", "text_field", "on_bad_record", "max_bad_records"}
    misplaced = {"builtin": builtin, "path": of_dataset, "dataset": of_text}[kinds[0]]
    for name in sorted(n for n in misplaced if getattr(source, n) != SourceConfig.model_fields[n].default):
        yield (*keys, name), f"has no meaning for a source with {kinds[0]}: remove {name}"


def _model(config: Config) -> Found:
    model, data, tokenizer = config.model, config.data, config.tokenizer
    if not isinstance(model.get("model_type"), str) and not isinstance(model.get("init_from"), str):
        yield ("model", "model_type"), "is needed: the transformers model type, for instance llama"
    if model.get("init_from") is not None and not isinstance(model["init_from"], str):
        yield ("model", "init_from"), f"{model['init_from']!r} is not the path of a model, checkpoint or run folder"
    if model.get("init_from") is not None and model.get("partitioned_init"):
        yield (
            ("model", "partitioned_init"),
            "builds fresh weights, and model.init_from is set: leave one of them out",
        )
    if model.get("dtype", "float32") not in ("float32", "bfloat16", "float16"):
        yield ("model", "dtype"), f"{model['dtype']!r} is not one of float32, bfloat16, float16"
    if not isinstance(model.get("partitioned_init", False), bool):
        yield ("model", "partitioned_init"), f"{model['partitioned_init']!r} is not true or false"
    vocabulary = model.get("vocab_size")
    if isinstance(vocabulary, int) and tokenizer.vocab_size is not None and vocabulary < tokenizer.vocab_size:
        yield (
            ("model", "vocab_size"),
            f"is {vocabulary}, but tokenizer.vocab_size is {tokenizer.vocab_size}: remove model.vocab_size, "
            "which is filled in from the tokenizer, or make it larger (a padded vocabulary)",
        )
    for name in _LONGEST:
        longest = model.get(name)
        if isinstance(longest, int) and data.sequence_length > longest:
            yield (
                ("data", "sequence_length"),
                f"is {data.sequence_length}, more than model.{name} = {longest}: shorten it or raise model.{name}",
            )


def optimizer_problems(config: Config) -> Found:
    """What only the rules and schedules of Muon know to be wrong. Imports torch."""
    muon = config.optimizer.muon
    yield from _muon(("optimizer", "muon"), muon)
    for index, own in enumerate(muon_of_parts(muon.model_dump(), config.curriculum)[1:]):
        keys: Keys = ("curriculum", index, "optimizer", "muon")
        if changes_rule(config.curriculum[index]) and config.optimizer.name != "muon":
            yield keys, f"belongs to Muon, but optimizer.name is {config.optimizer.name}: leave it out"
        else:
            yield from _muon(keys, MuonConfig(**own))
    for index, group in enumerate(config.optimizer.groups):
        yield from _group(("optimizer", "groups", index), group, muon)


def _routing(config: Config) -> Found:
    routing = config.optimizer.routing
    yield from _low_precision(config)
    yield from _qk_clip(config)
    for index, override in enumerate(routing.overrides):
        yield from _pattern(("optimizer", "routing", "overrides", index, "pattern"), override.pattern)
    for index, split in enumerate(routing.split):
        yield from _pattern(("optimizer", "routing", "split", index, "pattern"), split.pattern)
        if not split.one_way:
            yield ("optimizer", "routing", "split", index), "needs exactly one of heads and sizes"


def _low_precision(config: Config) -> Found:
    muon = config.optimizer.muon
    if muon.master_weights and muon.stochastic_rounding:
        problem = (
            "and optimizer.muon.master_weights are both on: set one of them to false (masters need no random rounding)"
        )
        yield ("optimizer", "muon", "stochastic_rounding"), problem
    for name in ("master_weights", "stochastic_rounding"):
        if getattr(muon, name) and config.optimizer.name == "adamw":
            problem = "is on, but optimizer.name is adamw, which is torch.optim.AdamW and has no such option"
            yield ("optimizer", "muon", name), problem


def _qk_clip(config: Config) -> Found:
    if config.optimizer.qk_clip is not None and config.optimizer.name != "muon":
        yield ("optimizer", "qk_clip"), f"belongs to Muon, but optimizer.name is {config.optimizer.name}: leave it out"


def _muon(keys: Keys, muon: MuonConfig) -> Found:
    from muon_dist.numerics import get_schedule  # imports torch

    schedule = get_schedule(muon.ns_schedule)
    try:
        schedule.coefficients(muon.ns_steps)
    except ConfigError as error:
        yield (*keys, "ns_steps"), str(error)
    if schedule.fp32_only and muon.ns_dtype not in (None, "float32"):
        yield (
            (*keys, "ns_dtype"),
            f"is {muon.ns_dtype}, but optimizer.muon.ns_schedule = {schedule.name} is defined in float32: "
            "set ns_dtype to float32 or null, or choose another schedule",
        )
    if muon.rule == "muon" and not muon.rule_options:
        return
    from muon_dist.optim.rules.choice import check_options  # imports torch: seconds

    try:
        check_options(muon.model_dump(exclude_none=True))
    except ConfigError as error:
        yield keys, str(error)


def _group(keys: Keys, group: GroupConfig, muon: MuonConfig) -> Found:
    if group.split is not None and not group.split.one_way:
        yield (*keys, "split"), "needs exactly one of heads and sizes"
        return
    from muon_dist.optim.rules.entries import check_entry  # imports torch: seconds

    try:
        check_entry(group.model_dump(exclude_none=True), muon.rule)
    except ConfigError as error:
        yield keys, str(error).removeprefix("entry: ")
    except RoutingError as error:
        yield (*keys, "pattern"), str(error)


def _pattern(keys: Keys, pattern: str) -> Found:
    try:
        re.compile(pattern)
    except re.error as error:
        yield keys, f"{pattern!r} is not a valid regular expression: {error}"


def _trainer(config: Config) -> Found:
    trainer = config.trainer
    for name, ours in DECIDED_ELSEWHERE.items():
        if name in trainer:
            yield ("trainer", name), f"is decided by {ours}: set that, and remove trainer.{name}"
    for half, other in (("bf16", "fp16"), ("bf16_full_eval", "fp16_full_eval")):
        if trainer.get(half) and trainer.get(other):
            yield ("trainer", other), f"and trainer.{half} are both true: keep one of them"
    if config.data.global_batch_size is not None and "gradient_accumulation_steps" in trainer:
        yield (
            ("trainer", "gradient_accumulation_steps"),
            f"follows from data.global_batch_size = {config.data.global_batch_size} and the number of processes: "
            "remove one of them",
        )
    if config.checkpoint.keep_last is not None and "save_total_limit" in trainer:
        yield ("trainer", "save_total_limit"), "and checkpoint.keep_last say the same: remove one of them"
    wsd = trainer.get("lr_scheduler_type") == "warmup_stable_decay"
    kwargs = trainer.get("lr_scheduler_kwargs")
    if wsd and not (isinstance(kwargs, dict) and "num_decay_steps" in kwargs):
        yield (
            ("trainer", "lr_scheduler_kwargs"),
            "needs num_decay_steps when trainer.lr_scheduler_type is warmup_stable_decay: "
            "add lr_scheduler_kwargs: {num_decay_steps: N}",
        )


def _deepspeed(config: Config) -> Found:
    deepspeed = config.deepspeed
    if deepspeed is None:
        return
    if not isinstance(deepspeed, (str, dict)):
        yield ("deepspeed",), f"needs a path, a mapping or null, not a {type(deepspeed).__name__}"
        return
    if config.trainer.get("fsdp"):
        yield ("trainer", "fsdp"), "and deepspeed are both set: keep one of them"
    if isinstance(deepspeed, dict):
        if "optimizer" in deepspeed:
            yield (
                ("deepspeed", "optimizer"),
                f"would replace the optimizer of optimizer.name = {config.optimizer.name}: remove deepspeed.optimizer",
            )
        zero = deepspeed.get("zero_optimization")
        stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
        if stage not in (0, 1, 2, 3, "auto"):
            yield ("deepspeed", "zero_optimization", "stage"), f"is {stage!r}: write 0, 1, 2 or 3"
        for half in ("bf16", "fp16"):
            block = deepspeed.get(half)
            enabled = block.get("enabled") if isinstance(block, dict) else None
            if isinstance(enabled, bool) and enabled != bool(config.trainer.get(half, False)):
                yield (
                    ("deepspeed", half, "enabled"),
                    f"is {str(enabled).lower()}, but trainer.{half} is "
                    f"{str(bool(config.trainer.get(half, False))).lower()}: set both to the same, or enabled to auto",
                )


def _parallel(config: Config) -> Found:
    """Contradictions at any number of ranks; the number of ranks and the model are checked later, when they are
    known."""
    block, deepspeed = config.parallel, config.deepspeed
    if block is None:
        return
    if config.trainer.get("fsdp"):
        yield ("trainer", "fsdp"), "and parallel both shard the model: remove trainer.fsdp, and set parallel.dp_shard"
    if deepspeed is not None:
        instead = {
            "tp": "set deepspeed.tensor_parallel.autotp_size instead",
            "cp": "set parallel.sp instead, DeepSpeed's sequence parallelism",
            "ep": "remove one of them: transformers' expert parallelism is not DeepSpeed's",
            "dp_replicate": "remove it: the ZeRO stage says what each rank holds",
        }
        for name in (name for name in instead if getattr(block, name) > 1):
            yield ("parallel", name), f"is {getattr(block, name)} and deepspeed is set: {instead[name]}"
        size = deepspeed.get("sequence_parallel_size", block.sp) if isinstance(deepspeed, dict) else block.sp
        if size != block.sp:
            yield (
                ("parallel", "sp"),
                f"is {block.sp}, but deepspeed.sequence_parallel_size is {size}: set both to the same number",
            )
    elif block.sp > 1:
        yield (
            ("parallel", "sp"),
            f"is {block.sp} and deepspeed is null: sequence parallelism (Ulysses) needs DeepSpeed. Set deepspeed, for "
            "instance to configs/deepspeed/zero1.json; or, on GPUs, set parallel.cp instead",
        )
    for first, second in (("cp", "sp"), ("cp", "tp"), ("cp", "ep")):
        if getattr(block, first) > 1 and getattr(block, second) > 1:
            yield ("parallel", first), f"and parallel.{second} are both above 1: no library has both; keep one of them"
    if config.model.get("partitioned_init") and deepspeed is None:
        yield ("model", "partitioned_init"), "needs DeepSpeed's ZeRO-3, but deepspeed is not set: remove it"

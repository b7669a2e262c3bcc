"""Settings that contradict each other, and the trainer block."""

from __future__ import annotations

import dataclasses
import enum
import re
import typing
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

from muon_dist.config import load_config
from muon_dist.config.trainer import training_arguments
from muon_dist.errors import ConfigError, DataError

MINIMAL = """\
name: tiny
model: {model_type: llama, hidden_size: 32}
optimizer:
  muon: {lr: 0.01}
  adamw: {lr: 0.003}
"""


@pytest.mark.parametrize(
    "overrides, first, second",
    [
        (["tokenizer={path: tok, vocab_size: 100}"], "tokenizer.vocab_size: ", "tokenizer.path (tok)"),
        (["tokenizer.vocab_size=null"], "tokenizer.vocab_size: ", "tokenizer.path"),
        (["data.sources=[]"], "data.sources: ", "name a source"),
        (["data.sources=[{weight: 1}]"], "data.sources.0: ", "builtin, path and dataset, and has none"),
        (["data.sources=[{path: a, builtin: stdlib}]"], "data.sources.0: ", "has builtin and path"),
        (["data.sources=[{path: a, streaming: false}]"], "data.sources.0.streaming: ", "source with path"),
        (["data.sources=[{dataset: a, format: text}]"], "data.sources.0.format: ", "source with dataset"),
        (
            ["data.validation_fraction=0", "trainer.eval_strategy=steps"],
            "data.validation_fraction: ",
            "trainer.eval_strategy = steps",
        ),
        (["model.model_type=null"], "model.model_type: ", "is needed"),
        (["model.dtype=float64"], "model.dtype: ", "float32, bfloat16, float16"),
        (["model.vocab_size=7"], "model.vocab_size: ", "tokenizer.vocab_size is 4096"),
        (
            ["model.max_position_embeddings=128", "data.sequence_length=256"],
            "data.sequence_length: is 256",
            "model.max_position_embeddings = 128",
        ),
        (["model.n_positions=128", "data.sequence_length=256"], "data.sequence_length: ", "model.n_positions"),
        (
            ["optimizer.muon.ns_schedule=strict", "optimizer.muon.ns_dtype=bfloat16"],
            "optimizer.muon.ns_dtype: is bfloat16",
            "optimizer.muon.ns_schedule = strict",
        ),
        (
            ["optimizer.muon.ns_schedule=strict", "optimizer.muon.ns_steps=9"],
            "optimizer.muon.ns_steps: ",
            "ns_schedule='strict'",
        ),
        (
            ["optimizer.routing.overrides=[{pattern: '(', algorithm: muon}]"],
            "optimizer.routing.overrides.0.pattern: ",
            "not a valid regular expression",
        ),
        (["optimizer.muon.rule=normoun"], "optimizer.muon: ", "'normoun' is unknown (did you mean normuon?)"),
        (["optimizer.muon.rule_options={beta2: 0.9}"], "optimizer.muon: ", "rule 'muon' has no option 'beta2'"),
        (
            ["optimizer.muon={lr: 0.1, rule: normuon, rule_options: {beta1: 0.9}}"],
            "optimizer.muon: ",
            "rule 'normuon': 'beta1' is called momentum here",
        ),
        (["optimizer.muon={lr: 0.1, rule: namo, nesterov: true}"], "optimizer.muon: ", "has no nesterov"),
        (["optimizer.muon={lr: 0.1, rule: hyperball, weight_decay: 0.1}"], "optimizer.muon: ", "has no weight_decay"),
        (
            ["optimizer.muon={lr: 0.1, stochastic_rounding: true, master_weights: true}"],
            "optimizer.muon.stochastic_rounding: ",
            "optimizer.muon.master_weights are both on",
        ),
        (
            ["optimizer.name=adamw", "optimizer.muon.master_weights=true"],
            "optimizer.muon.master_weights: is on",
            "optimizer.name is adamw",
        ),
        (["optimizer.routing.split=[{pattern: a}]"], "optimizer.routing.split.0: ", "one of heads and sizes"),
        (["optimizer.routing.split=[{pattern: a, sizes: []}]"], "optimizer.routing.split.0: ", "heads and sizes"),
        (["trainer={bf16: true, fp16: true}"], "trainer.fp16: ", "trainer.bf16 are both true"),
        (["trainer.learning_rate=0.1"], "trainer.learning_rate: ", "optimizer.muon.lr and optimizer.adamw.lr"),
        (["trainer.max_grad_norm=1.0"], "trainer.max_grad_norm: ", "optimizer.clip.adamw"),
        (["trainer.output_dir=x"], "trainer.output_dir: ", "run_dir and name"),
        (
            ["trainer.lr_scheduler_type=warmup_stable_decay"],
            "trainer.lr_scheduler_kwargs: ",
            "trainer.lr_scheduler_type is warmup_stable_decay",
        ),
        (["optimizer.name=adamw", "guards.spike=skip"], "guards.spike: is skip", "optimizer.name is adamw"),
        (
            ["guards.watchdog_seconds=60", "trainer.ddp_timeout=60"],
            "guards.watchdog_seconds: is 60",
            "trainer.ddp_timeout is 60",
        ),
        (["deepspeed=7"], "deepspeed: ", "a path, a mapping or null"),
        (["deepspeed.zero_optimization.stage=7"], "deepspeed.zero_optimization.stage: is 7", "0, 1, 2 or 3"),
        (["deepspeed=ds.json", "trainer.fsdp=full_shard"], "trainer.fsdp: ", "and deepspeed are both set"),
        (["parallel.tp=2", "trainer.fsdp=full_shard"], "trainer.fsdp: and parallel", "parallel.dp_shard"),
        (
            ["parallel.tp=2", "deepspeed=ds.json"],
            "parallel.tp: is 2 and deepspeed",
            "deepspeed.tensor_parallel.autotp",
        ),
        (["parallel.ep=2", "deepspeed=ds.json"], "parallel.ep: is 2 and deepspeed", "remove one of them"),
        (["parallel.sp=2"], "parallel.sp: is 2 and deepspeed is null", "configs/deepspeed/zero1.json"),
        (
            ["parallel.sp=2", "deepspeed={sequence_parallel_size: 4}"],
            "parallel.sp: is 2",
            "deepspeed.sequence_parallel_size is 4",
        ),
        (["parallel={cp: 2, tp: 2}"], "parallel.cp: and parallel.tp", "no library has both"),
        (["parallel={cp: 2, ep: 2}"], "parallel.cp: and parallel.ep", "no library has both"),
        (["parallel={cp: 2, sp: 2}", "deepspeed=ds.json"], "parallel.cp: is 2 and deepspeed", "set parallel.sp"),
        (["parallel.dp_replicate=2", "deepspeed=ds.json"], "parallel.dp_replicate: is 2 and deepspeed", "ZeRO stage"),
        (["parallel={}", "model.partitioned_init=true"], "model.partitioned_init: needs", "deepspeed is not set"),
        (["trainer.parallelism_config=null"], "trainer.parallelism_config: is decided by parallel", "set that"),
        (["deepspeed.optimizer.type=Adam"], "deepspeed.optimizer: ", "optimizer.name = muon"),
        (["deepspeed={bf16: {enabled: true}}"], "deepspeed.bf16.enabled: is true", "trainer.bf16 is false"),
    ],
)
def test_contradictions_name_both_keys(tmp_path: Path, overrides: list[str], first: str, second: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert "errors in the configuration" not in text, text
    assert first in text and second in text, text
    assert caught.value.exit_code == 2


def test_what_is_written_may_not_lie_in_what_is_read(tmp_path: Path) -> None:
    """Otherwise the tokens, the tokenizer and the figures of a run would become text of the next run."""
    (tmp_path / "corpus").mkdir()
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    source = f"data.sources=[{{path: {tmp_path}/corpus}}]"
    for key, place in (("data.dir", "corpus/data"), ("data.dir", "corpus"), ("run_dir", "corpus/a/../runs")):
        with pytest.raises(ConfigError, match=rf"{re.escape(key)}: .*is inside the data source {tmp_path}/corpus"):
            load_config(path, [source, f"{key}={tmp_path}/{place}"])
    for place in ("corpus-data", "corpus/.cache", "corpus/../data"):
        assert load_config(path, [source, f"data.dir={tmp_path}/{place}"]).data.dir.endswith(place)


def test_contradictions_are_found_beside_other_errors(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL + "trainer: {fp16: true, bf16: true}\nseeed: 1\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    text = str(caught.value)
    assert "trainer.fp16: " in text and "seeed: unknown key; did you mean seed?" in text


@pytest.mark.parametrize(
    "value, expected",
    [
        ("bf16=1", "trainer.bf16: needs true or false, not 1"),
        ("max_steps=ten", "trainer.max_steps: needs a whole number, not 'ten'"),
        ("save_total_limit=[1]", "trainer.save_total_limit: needs a whole number or null, not [1]"),
        ("warmup_steps=0.1", None),
        ("report_to=[tensorboard]", None),
        ("gradient_checkpointing_kwargs={use_reentrant: false}", None),
        ("eval_strategy=epoch", None),
        ("save_strategy=somtimes", "trainer.save_strategy: 'somtimes' is not one of no, steps, epoch, best"),
    ],
)
def test_trainer_values(tmp_path: Path, value: str, expected: str | None) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    if expected is None:
        name = value.split("=")[0]
        assert name in load_config(path, [f"trainer.{value}"]).trainer
    else:
        with pytest.raises(ConfigError) as caught:
            load_config(path, [f"trainer.{value}"])
        assert expected in str(caught.value)


def test_text_that_is_not_there(tmp_path: Path) -> None:
    """Reported with its key before torch is imported, but not if tokens are prepared, nor by commands that read no
    text."""
    path, gone, data = tmp_path / "c.yaml", tmp_path / "gone", tmp_path / "data"
    path.write_text(MINIMAL)
    (tmp_path / "pair.idx").touch()
    there = [str(tmp_path / "pair"), str(tmp_path / "*.txt"), "s3://bucket/gone"]
    sources = f"data.sources=[{{path: {there}}}, {{path: [{path}, {gone}]}}]"
    listed = [f"data.dir={data}", sources, f"data.validation_sources=[{{path: {gone}}}]"]
    with pytest.raises(DataError) as error:
        load_config(path, listed, reads_files=True)
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert any(f"data.sources.1.path: {gone}: no such file or folder" in line for line in lines)
    assert any(f"data.validation_sources.0.path: {gone}: no such file or folder" in line for line in lines)
    with pytest.raises(DataError, match=r"data.path: .*gone: no such file or folder"):
        load_config(path, [f"data.dir={data}", f"data.path={gone}"], reads_files=True)
    named = ["tokenizer={path: gpt2}", "model.init_from=org/model", "deepspeed=zero9.json", f"data.dir={data}"]
    with pytest.raises(ConfigError) as error:
        load_config(path, named, reads_files=True)
    for words in (
        "tokenizer.path: gpt2: no such folder. A tokenizer of the hub must be downloaded first: hf download",
        "model.init_from: org/model: no such folder. A model of the hub must be downloaded first: hf download",
        "deepspeed: zero9.json: no such file. Name a JSON file",
    ):
        assert words in str(error.value)
    load_config(path, named)
    load_config(path, listed)
    (data / "tokens").mkdir(parents=True)
    load_config(path, listed, reads_files=True)


def test_types_of_the_trainer_block_are_those_of_transformers() -> None:
    """They are read from its source, without the import."""
    hints = typing.get_type_hints(TrainingArguments)
    real = {f.name: hints[f.name] for f in dataclasses.fields(TrainingArguments) if f.init}
    ours = training_arguments()
    assert list(ours) == list(real)

    def plain(kind: Any) -> Any:
        """The values of an enumeration, and what is compared of other types: those of Python as they are."""
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            return [member.value for member in kind]
        if typing.get_args(kind):
            return [plain(inner) for inner in typing.get_args(kind)]
        return kind if kind in (int, float, str, bool, dict, type(None), False) else Any

    different = [name for name, kind in real.items() if plain(kind) != plain(ours[name])]
    assert different == ["debug"]  # a list of an enumeration's values; they are not compared


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"zero_optimization": {"stage": 2,}}', "ds.json:1: this is not JSON .*correct it"),
        ("[]", "ds.json holds a list"),
        (None, "no such file"),
    ],
)
def test_a_deepspeed_file_that_cannot_be_read(tmp_path: Path, text: str | None, words: str) -> None:
    (tmp_path / "run.yaml").write_text(MINIMAL, encoding="utf-8")
    if text is not None:
        (tmp_path / "ds.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=f"deepspeed: .*{words}"):
        load_config(tmp_path / "run.yaml", [f"deepspeed={tmp_path}/ds.json"], reads_files=True)

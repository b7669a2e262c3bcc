"""A default has the same value in all places: schema, signatures, pages of docs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from muon_dist import Guards, Muon, MuonTrainer, cli
from muon_dist.adapters.hf.attention import attach
from muon_dist.adapters.hf.trainer import CheckpointOptions
from muon_dist.audit.recompute import Hyperparameters
from muon_dist.audit.settings import AuditSettings
from muon_dist.config import parallel
from muon_dist.config import schema as s
from muon_dist.config.data import DataConfig, SourceConfig, TokenizerConfig
from muon_dist.data import Source, prepare, train_tokenizer
from muon_dist.data.formats import Options as FormatOptions
from muon_dist.guards.spikes import SpikeDetector
from muon_dist.optim import Diagnostics
from muon_dist.optim.options import Options
from muon_dist.optim.qk_clip import QKClip
from muon_dist.optim.rules import RULES
from muon_dist.planner.model import Settings
from muon_dist.train.generation import generate

DOCS = Path(__file__).parents[1] / "docs"
NONE = object()  # there is no default

# One row per pair: block of the schema, what takes the same options, schema's name -> the other's name.
PAIRS: tuple[tuple[type[BaseModel], Callable[..., Any], Mapping[str, str]], ...] = (
    (s.MuonConfig, Muon, {}),
    (s.MuonConfig, Options, {}),
    (s.MuonConfig, Settings, {}),
    (s.MuonConfig, Hyperparameters, {}),
    (s.AdamWConfig, Muon, {}),
    (s.AdamWConfig, Hyperparameters, {}),
    (s.ClipConfig, MuonTrainer, {"muon": "clip_muon", "adamw": "clip_adamw"}),
    (s.QKClipConfig, attach, {}),
    (s.QKClipConfig, QKClip, {}),
    (s.AuditConfig, AuditSettings, {}),
    (s.DiagnosticsConfig, Diagnostics, {}),
    (s.GuardsConfig, Guards, {}),
    (s.GuardsConfig, Muon, {}),
    (s.GuardsConfig, SpikeDetector, {"spike_window": "window", "spike_sigmas": "sigmas"}),
    (s.CheckpointConfig, CheckpointOptions, {}),
    (s.EvaluationConfig, generate, {}),
    (s.EvaluationConfig, cli.generate, {"generate_prompt": "prompt"}),
    (s.ParallelConfig, parallel.Parallel, {}),
    (SourceConfig, Source, {}),
    (SourceConfig, FormatOptions, {}),
    (DataConfig, prepare, {}),
    (DataConfig, FormatOptions, {}),
    (DataConfig, Source, {}),
    (DataConfig, Settings, {}),
    (TokenizerConfig, train_tokenizer, {}),
)
# (block, other's name, option): why the two differ. Anything else that differs is a mistake.
DIFFERENT = {
    ("MuonConfig", "Muon", "weight_decay"): "null is the rule's default; the other is that of the rule muon",
    ("MuonConfig", "Muon", "rule_options"): "none, either way",
    ("MuonConfig", "Muon", "nesterov"): "null is the rule's default",
    ("MuonConfig", "Muon", "scale"): "null is the rule's default",
    ("MuonConfig", "Hyperparameters", "weight_decay"): "of a step as it was asked for, where none was named",
    ("MuonConfig", "Hyperparameters", "nesterov"): "null is the rule's default",
    ("MuonConfig", "Hyperparameters", "scale"): "null is the rule's default",
    ("AdamWConfig", "Hyperparameters", "weight_decay"): "of a step as it was asked for, where none was named",
    ("MuonConfig", "Settings", "rule"): "a name; the other is the rule itself",
    ("AuditConfig", "AuditSettings", "every"): "0: no audit. Settings are made only for an audit",
    (
        "CheckpointConfig",
        "CheckpointOptions",
        "background",
    ): "a program of one's own may end right after its last save",
    ("ParallelConfig", "Parallel", "dp_shard"): "null: all ranks that the other axes leave; the other is their number",
    ("SourceConfig", "Source", "on_bad_record"): "null: data.on_bad_record",
    ("SourceConfig", "Source", "max_bad_records"): "null: data.max_bad_records",
    ("DataConfig", "prepare", "workers"): "a command may start processes, a call in a program should not",
    ("TokenizerConfig", "train_tokenizer", "vocab_size"): "null where path is given; without it the same",
    ("TokenizerConfig", "train_tokenizer", "sample_bytes"): "another size would train everybody's tokenizer again",
}


def of_schema(block: type[BaseModel]) -> dict[str, Any]:
    """Option -> default of a block, NONE where it must be given."""
    found = {n: f.get_default(call_default_factory=True) for n, f in block.model_fields.items()}
    return {name: NONE if value is PydanticUndefined else value for name, value in found.items()}


def of_signature(takes: Callable[..., Any]) -> dict[str, Any]:
    if is_dataclass(takes):
        return {f.name: NONE if f.default is MISSING else f.default for f in fields(takes) if f.init}
    parameters = inspect.signature(takes).parameters.values()
    return {p.name: NONE if p.default is p.empty else p.default for p in parameters}


def shared() -> Iterator[tuple[str, str, str, Any, Any]]:
    for block, takes, names in PAIRS:
        other = of_signature(takes)
        for option, default in of_schema(block).items():
            name = names.get(option, option)
            if name in other and NONE not in (default, other[name]):
                yield block.__name__, takes.__name__, option, default, other[name]


@pytest.mark.parametrize(("block", "other", "option", "ours", "theirs"), list(shared()))
def test_schema_and_signature_agree(block: str, other: str, option: str, ours: Any, theirs: Any) -> None:
    if (block, other, option) in DIFFERENT:
        assert ours != theirs, "they agree now: take the row out of DIFFERENT"
    else:
        assert ours == theirs, f"{block}.{option} is {ours!r} by default, of {other} {theirs!r}"


def test_every_pair_shares_an_option() -> None:
    rows = list(shared())
    assert {(block.__name__, takes.__name__) for block, takes, _ in PAIRS if takes is not Hyperparameters} <= {
        (block, other) for block, other, *_ in rows
    }
    assert set(DIFFERENT) <= {(block, other, option) for block, other, option, *_ in rows}


def test_the_vocabulary_that_is_trained() -> None:
    assert TokenizerConfig().vocab_size == of_signature(train_tokenizer)["vocab_size"]  # type: ignore[call-arg]
    assert f"({TokenizerConfig().vocab_size} unless given)" in str(
        TokenizerConfig.model_fields["vocab_size"].description
    )  # type: ignore[call-arg]


# ---- pages


@lru_cache(maxsize=1)
def by_key() -> dict[str, list[Any]]:
    """Last part of a key of the configuration -> its defaults, of every block that has it."""
    found: dict[str, list[Any]] = {}
    blocks = {block for block, _, _ in PAIRS} | {s.Config, s.OptimizerConfig}
    for block in sorted(blocks, key=lambda b: b.__name__):
        for name, default in of_schema(block).items():
            key = block.model_fields[name].alias or name
            found.setdefault(key, []).append(default)
            found.setdefault(f"{block.__name__.removesuffix('Config').lower()}.{key}", []).append(default)
    return found


def stated() -> Iterator[tuple[str, str, Any]]:
    """(page, key, default) as the pages state them: in code, and in comments of YAML."""
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for key, value in re.findall(r"`(?:\w+\.)*?(\w+(?:\.\w+)?)[:=] ?([^`{]+)`, the default", text):
            yield page.name, key, yaml.safe_load(value)
        for table in re.findall(r"^\|[^|\n]*\| default \|.*\n(?:\|.*\n)+", text, re.MULTILINE):
            for key, value in re.findall(r"^\| `(\w+)` \| (\S+) \|", table, re.MULTILINE):  # one word: a value
                yield page.name, key, yaml.safe_load(value.strip("`"))
        for line in re.findall(r"^ *\w+: .*#.*\bdefault\b.*$", text, re.MULTILINE):
            key, value, comment = re.match(r" *(\w+): (.+?) +#(.*)", line).groups()  # type: ignore[union-attr]
            other = re.search(r"(\S+?)(?:: \w+)?,? \(?(?:the )?default\b", comment)
            said = other[1] if other is not None else ""
            is_value = re.fullmatch(r"null|true|false|[\d.e-]+", said) is not None
            yield page.name, key, yaml.safe_load(said if is_value else value)


@pytest.mark.parametrize(("page", "key", "value"), list(stated()))
def test_a_page_states_the_default(page: str, key: str, value: Any) -> None:
    name = key.replace("clip_", "clip.")
    if name not in by_key():
        name = name.rpartition(".")[2]
    assert name in by_key(), f"{page}: {key} is no key of the configuration"
    assert value in by_key()[name], f"{page}: {key} is {by_key()[name]} by default, not {value!r}"


def test_pages_are_read() -> None:
    forms = {"clip.adamw", "clip_adamw", "keep_last", "async", "every", "qk_clip", "bucket_mb"}
    assert {key for _, key, _ in stated()} >= forms


def test_the_table_of_rules_states_their_options() -> None:
    table = (DOCS / "rules.md").read_text(encoding="utf-8").split("| `rule` | update |")[1].split("\n\n")[0]
    rows = {row.split("|")[1].strip(" `"): row.split("|")[3] for row in table.splitlines()[2:]}
    assert set(rows) == set(RULES)
    for name, options in rows.items():
        found = {key: float(value) for key, value in re.findall(r"`(\w+)` ([\d.e-]+)", options)}
        assert found == {key: float(value) for key, value in RULES[name].options.items()}, name

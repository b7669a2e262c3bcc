"""Loading: inheritance, overrides, and the error of every kind of bad input."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from muon_dist.config import Config, json_schema, load_config
from muon_dist.errors import ConfigError
from muon_dist.optim.rules import SCALES

MINIMAL = """\
name: tiny
model: {model_type: llama, hidden_size: 32}
optimizer:
  muon: {lr: 1e-2}
  adamw: {lr: 0.003}
"""


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def errors(path: Path, *overrides: str) -> list[str]:
    """The lines of the error, without the folder, sorted as shown."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2
    lines = str(caught.value).replace(f"{path.parent}/", "").split("\n  ")
    if len(lines) > 1:
        assert lines.pop(0) == f"{len(lines)} errors in the configuration:"
    return lines


def test_defaults_and_types(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    assert config.optimizer.muon.lr == 0.01  # 1e-2 is text in YAML 1.1
    assert config.optimizer.adamw.betas == (0.9, 0.95) and config.optimizer.clip.muon is None
    assert config.tokenizer.vocab_size == 4096 and config.data.sources[0].builtin == "stdlib"
    assert load_config(write(tmp_path, MINIMAL + "tokenizer: {path: tok}\n")).tokenizer.vocab_size is None
    with pytest.raises(ValueError, match="frozen"):
        config.optimizer.muon.lr = 1.0  # type: ignore[misc]


def test_yaml_1_2_scalars(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, MINIMAL + "trainer: {eval_strategy: no, max_steps: 1_000}\nrun_dir: 2026-11-22\n")
    )
    assert config.trainer == {"eval_strategy": "no", "max_steps": 1000}
    assert config.run_dir == "2026-11-22"


def test_base_is_relative_merged_and_lists_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, MINIMAL + "data: {sources: [{builtin: stdlib}, {path: a}], sequence_length: 64}\n", "low.yaml")
    write(tmp_path, "base: low.yaml\nmodel: {hidden_size: 64}\n", "middle.yaml")
    text = (
        "base: ../middle.yaml\nname: top\ndata: {sources: [{path: b, weight: 2}]}\noptimizer: {muon: {ns_steps: 6}}\n"
    )
    config = load_config(write(tmp_path / "sub", text))
    assert config.name == "top" and config.model == {"model_type": "llama", "hidden_size": 64}
    assert [s.path for s in config.data.sources] == ["b"] and config.data.sequence_length == 64
    assert config.optimizer.muon.lr == 0.01 and config.optimizer.muon.ns_steps == 6


def test_errors_name_the_file_of_an_inherited_key(tmp_path: Path) -> None:
    write(tmp_path, MINIMAL + "data: {workers: 0}\n", "low.yaml")
    path = write(tmp_path, "base: low.yaml\n\ndata: {sequence_length: none}\n")
    assert errors(path) == [
        "low.yaml:6: data.workers: should be greater than or equal to 1, not 0",
        "run.yaml:3: data.sequence_length: should be a valid integer, not 'none'",
    ]
    assert errors(path, "data.workers=2") == [
        "run.yaml:3: data.sequence_length: should be a valid integer, not 'none'"
    ]


def test_base_that_is_missing_or_goes_in_a_circle(tmp_path: Path) -> None:
    path = write(tmp_path, "name: x\nbase: nowhere.yaml\n")
    assert errors(path) == [f"run.yaml:2: base: no such file: {tmp_path}/nowhere.yaml".replace(f"{tmp_path}/", "")]
    write(tmp_path, "base: run.yaml\n", "other.yaml")
    (line,) = errors(write(tmp_path, "base: other.yaml\n"))
    assert line == "other.yaml:1: base: these files name each other as base: run.yaml -> other.yaml -> run.yaml"
    assert errors(write(tmp_path, "base: [a]\n")) == ["run.yaml:1: base: needs the path of a file"]


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "data: {sources: [{builtin: stdlib}, {path: a}]}\n")
    config = load_config(
        path,
        [
            "optimizer.muon.lr=2e-2",
            "optimizer.adamw.betas=[0.8, 0.9]",
            "optimizer.clip={muon: 2.0}",
            "data.sources.1.weight=3",
            "trainer.eval_strategy=no",
            "tokenizer={path: a=b, vocab_size: null}",
            "optimizer.routing.overrides=[{pattern: lm_head, algorithm: muon}]",
        ],
    )
    assert config.optimizer.muon.lr == 0.02 and config.optimizer.adamw.betas == (0.8, 0.9)
    assert config.optimizer.clip.muon == 2.0 and config.optimizer.clip.adamw == 1.0
    assert [s.weight for s in config.data.sources] == [1.0, 3.0]
    assert config.trainer["eval_strategy"] == "no" and config.tokenizer.path == "a=b"
    assert config.optimizer.routing.overrides[0].pattern == "lm_head"


def test_bad_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    assert errors(path, "seed", "optimizer.moun.lr=1", "data.sequence_length=1.5", "seed=[1") == [
        "override data.sequence_length=1.5: data.sequence_length: should be a valid integer, not 1.5",
        "override optimizer.moun.lr=1: optimizer.moun: unknown key; did you mean muon?",
        "override seed: write an override as key.key=value, for instance optimizer.muon.lr=0.01",
        "override seed=[1: seed: not valid YAML: expected ',' or ']', but got '<stream end>'",
    ]
    for override, meant in (
        ("optimizer.muon.rl=1", "lr"),
        ("optimizer.muon.learning_rate=1", "lr"),
        ("parallel.tensor_parallel=2", "tp"),
        ("parallel.tp_size=2", "tp"),
        ("parallel.dp=2", "dp_replicate or dp_shard"),
    ):
        (line,) = errors(path, override)
        assert line.endswith(f": unknown key; did you mean {meant}?")
    sources = write(tmp_path, MINIMAL + "data: {sources: [{builtin: stdlib}, {path: a}]}\n", "sources.yaml")
    for item in ("2", "x", "-1"):
        (line,) = errors(sources, f"data.sources.{item}.weight=3")
        assert line.endswith(f": data.sources: is a list, and has no item {item!r}: its items are 0 to 1")
    (line,) = errors(path, "trainer.resume_from_checkpoint=runs/x/checkpoints/checkpoint-8")
    assert "is decided by the option --resume of muon-dist train" in line
    (line,) = errors(path, "trainer.hub_token=[hf_verysecret]")
    assert "hf_verysecret" not in line and line.startswith("override trainer.hub_token: ")


def test_all_errors_at_once_with_lines_and_closest_keys(tmp_path: Path) -> None:
    text = """\
name: a/b
name: again
lr: 0.1
model: {model_type: llama, max_position_embeddings: 128}
optimizer:
  muon:
    lr: fast
    ns_schedule: kellr
    scale: spectra
  adamw: {lr: 0.001, betas: [0.9, 1.5]}
data: {sequence_length: 256, sources: [{builtin: stdlib, wieght: 2}]}
trainer:
  max_step: 10
  bf16: maybe
  lr_scheduler_type: cosin
evaluaton: {}
"""
    lines = errors(write(tmp_path, text))
    starts = [
        "run.yaml:1: name: ",
        "run.yaml:2: name: duplicate key, first given in line 1",
        "run.yaml:3: lr: unknown key; did you mean optimizer.muon.lr or optimizer.adamw.lr?",
        "run.yaml:7: optimizer.muon.lr: should be a valid number, not 'fast'",
        "run.yaml:8: optimizer.muon.ns_schedule: unknown ns_schedule 'kellr'; did you mean 'keller'?",
        "run.yaml:9: optimizer.muon.scale: 'spectra' is not one of match_rms_adamw, spectral, unit_rms, none; did you",
        "run.yaml:10: optimizer.adamw.betas.1: should be less than 1, not 1.5",
        "run.yaml:11: data.sources.0.wieght: unknown key; did you mean weight?",
        "run.yaml:13: trainer.max_step: unknown TrainingArguments name; did you mean max_steps?",
        "run.yaml:14: trainer.bf16: needs true or false, not 'maybe'",
        "run.yaml:15: trainer.lr_scheduler_type: 'cosin' is not one of linear, cosine,",
        "run.yaml:16: evaluaton: unknown key; did you mean evaluation?",
    ]
    # A key that is given twice is reported once.
    assert [s for s in starts[1:] if not any(line.startswith(s) for line in lines)] == []
    assert len(lines) == len(starts) - 1


def test_missing_keys_are_placed_at_their_block(tmp_path: Path) -> None:
    assert errors(write(tmp_path, "seed: 1\noptimizer:\n  muon: {}\n")) == [
        "run.yaml:1: model: this key is needed",
        "run.yaml:1: name: this key is needed",
        "run.yaml:2: optimizer.adamw: this key is needed",
        "run.yaml:3: optimizer.muon.lr: this key is needed",
    ]


@pytest.mark.parametrize(
    "raw, expected",
    [
        (b"name: x\noptimizer: [1,\n", r"run\.yaml:3: not valid YAML: "),
        (b"name: x\n\tseed: 1\n", r"run\.yaml:2: not valid YAML: "),
        (b"name: x\nseed: \xff1\n", r"run\.yaml:2: not UTF-8: byte 0xff at offset 14"),
        ("\ufeffname: x\n".encode("utf-16-le"), r"run\.yaml: UTF-16: save it as UTF-8"),
        (b"name: x\nseed: \x07\n", r"run\.yaml:2: character U\+0007 in YAML"),
        (b"", r"run\.yaml: holds no settings"),
        (b"- a\n- b\n", r"run\.yaml:1: holds no settings"),
        (b"a: 1\n---\nb: 2\n", r"run\.yaml:2: not valid YAML: but found another document"),
        (b"1: x\n", r"run\.yaml:1: the key 1 is not text"),
        (b"x: &a [*a]\n", r"run\.yaml:1: x\.0: an alias inside the value that it repeats"),
        (b"a: &a {name: x}\nb: {<<: *a}\n", r"run\.yaml:2: b: merge keys \(<<\) are not supported"),
        (b"seed: !!int x\n", r"run\.yaml:1: seed: 'x' is not a int"),
        (b"a: " + b"[" * 3000 + b"]" * 3000, r"run\.yaml: nested too deeply"),
        (b"#" * (1 << 20) + b"\n", r"run\.yaml: larger than 1048576 bytes"),
    ],
)
def test_malformed_files(tmp_path: Path, raw: bytes, expected: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(raw)
    lines = errors(path)
    assert any(re.match(expected, line) for line in lines), lines


def test_missing_file(tmp_path: Path) -> None:
    assert errors(tmp_path / "run.yaml") == ["run.yaml: no such file"]
    assert errors(tmp_path) == [f"{tmp_path.name}: not a file"]
    (tmp_path / "runs.yaml").touch()
    assert errors(tmp_path / "run.yaml") == ["run.yaml: no such file; did you mean runs.yaml?"]
    assert errors(tmp_path) == [
        f"{tmp_path.name}: not a file; name a YAML file in it, such as {tmp_path.name}/runs.yaml"
    ]
    with pytest.raises(ConfigError, match="not a file"):
        load_config(tmp_path)


def test_aliases_cannot_grow_without_bound(tmp_path: Path) -> None:
    bomb = "\n".join(["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)])
    assert any("more than 100000 values" in line for line in errors(write(tmp_path, bomb + "\n")))


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system", "!!python/name:os.system", "!!binary", "!mine", "!!timestamp"]
)
def test_tags_that_make_objects_are_refused(tmp_path: Path, tag: str) -> None:
    canary = tmp_path / "canary"
    path = write(tmp_path, MINIMAL + f'run_dir: {tag} ["touch {canary}"]\n')
    (line,) = errors(path)
    assert line == f"run.yaml:6: run_dir: the tag {tag} is refused: a configuration may contain plain data only"
    (line,) = errors(write(tmp_path, MINIMAL), f'run_dir={tag} "touch {canary}"')
    assert f"the tag {tag} is refused" in line
    assert not canary.exists()


@pytest.mark.parametrize("name", ["../escape", ".hidden", "..", "a b", ""])
def test_names_that_leave_the_run_folder(tmp_path: Path, name: str) -> None:
    (line,) = errors(write(tmp_path, MINIMAL), f"name='{name}'")
    assert f"override name='{name}': name: " in line


def test_yaml_round_trip(tmp_path: Path) -> None:
    trainer = "trainer: {eval_strategy: no, run_name: '1e5', log_level: 'on', hub_revision: '0o7', max_steps: 5}\n"
    prompt = 'evaluation: {generate_prompt: "caf\\u00e9: {x}\\n# 12"}\n'
    path = write(tmp_path, MINIMAL + trainer + prompt + "deepspeed: {a: 1.0e-8, b: [1, null]}\n")
    config = load_config(path, ["optimizer.routing.split=[{pattern: '.*q', heads: 8}]", "optimizer.muon.lr=1e-7"])
    again = load_config(write(tmp_path, config.to_yaml(), "again.yaml"))
    assert again == config and isinstance(again, Config)
    assert again.trainer["run_name"] == "1e5" and again.evaluation.generate_prompt == "caf\u00e9: {x}\n# 12"


def test_saved_configuration_holds_no_secret(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL), ["trainer.hub_token=hf_abc", "data.shard_tokens=77"])
    assert "hf_abc" not in config.to_yaml() and "hf_abc" in config.to_yaml(redacted=False)
    assert "shard_tokens: 77" in config.to_yaml()


def test_a_plugin_registers_names_before_they_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    (tmp_path / "own_scale_of_a_test.py").write_text(
        "import muon_dist\nmuon_dist.register_scale('quarter of a test', lambda out, fan_in: (out / fan_in) ** 0.25)\n"
    )
    text = MINIMAL.replace("muon: {lr: 1e-2}", "plugins: [own_scale_of_a_test]\n  muon: {lr: 1e-2}")
    scale = "optimizer.muon.scale=quarter of a test"
    assert load_config(write(tmp_path, text), [scale]).optimizer.muon.scale == "quarter of a test"
    SCALES.pop("quarter of a test")
    assert errors(write(tmp_path, MINIMAL), scale)[0].startswith("override optimizer.muon.scale=quarter of a test: ")
    for names, problem in (
        ("[nothing_of_this_name]", ".0: 'nothing_of_this_name' cannot be imported: ModuleNotFoundError: No module"),
        ("[own.py]", ".0: 'own.py' cannot be imported: .*: write the name of a module, not the path of a file"),
        ("own", ": should be a valid array, not 'own'"),
    ):
        [line] = errors(write(tmp_path, text), f"optimizer.plugins={names}")
        assert re.fullmatch(f"override optimizer.plugins=.*: optimizer.plugins{problem}.*", line), line


def test_json_schema_knows_every_key() -> None:
    schema = json_schema()
    assert {"name", "base", "optimizer", "trainer"} <= set(schema["properties"])
    muon = schema["$defs"]["MuonConfig"]
    assert (
        "keller" in muon["properties"]["ns_schedule"]["anyOf"][0]["examples"] and muon["additionalProperties"] is False
    )
    assert set(schema["required"]) == {"name", "model", "optimizer"}


PATHS = [
    "run_dir",
    "data.dir",
    "data.path",
    "tokenizer.path",
    "deepspeed",
    "trainer.fsdp_config",
    "data.sources.0.path",
    "data.sources.0.dataset",
]


def setting(key: str, value: str) -> list[str]:
    """Overrides that set a path key, whatever else it needs."""
    if key.startswith("data.sources.0."):
        return [f"data.sources=[{{{key.rpartition('.')[2]}: '{value}'}}]"]
    return [f"{key}={value}"]


@pytest.mark.parametrize("key", PATHS)
def test_home_and_variables_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("CORPUS", "/data/corpus")
    monkeypatch.delenv("MISSING", raising=False)
    path = write(tmp_path, MINIMAL)

    def found(value: str) -> object:
        at: object = load_config(path, setting(key, value)).model_dump()
        for part in key.split("."):
            at = at[int(part)] if isinstance(at, (list, tuple)) else at[part]  # type: ignore[index]
        return at

    assert found("~/x") == "/home/me/x"
    assert found("${CORPUS}/x") == "/data/corpus/x" and found("a/$CORPUS") == "a//data/corpus"
    assert found("cost$$x") == "cost$x"
    for value, parts in {
        "${MISSING}/x": ["MISSING is not set", "${MISSING}/x"],
        "~nosuchuser/x": ["nosuchuser", "no home folder"],
        "${not a name}": ["is not an environment variable: write ${NAME}, or $$ for a dollar sign"],
    }.items():
        lines = "\n".join(errors(path, *setting(key, value)))
        assert key.rpartition(".")[2] in lines and all(part in lines for part in parts), lines


def test_variables_in_base_and_lists_of_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASES", str(tmp_path))
    write(tmp_path, MINIMAL, "low.yaml")
    config = load_config(write(tmp_path, "base: ${BASES}/low.yaml\ndata: {path: [a, '${BASES}/b', 's3://x/y']}\n"))
    assert config.data.chosen[0].path == ("a", f"{tmp_path}/b", "s3://x/y")
    (line,) = errors(write(tmp_path, "base: ${NO_BASES}/low.yaml\n"))
    assert line.startswith("run.yaml:1: base: ") and "NO_BASES is not set" in line


def test_own_text_takes_the_place_of_the_sources_and_comes_back(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "data: {sources: [{builtin: stdlib}]}\n")
    config = load_config(path, ["data.path=mine/$$", "data.text_field=a.b", "data.on_bad_record=skip"])
    assert [(source.path, source.text_field) for source in config.data.chosen] == [("mine/$", "a.b")]
    assert load_config(write(tmp_path, config.to_yaml(), "again.yaml")) == config
    (line,) = errors(path, "data.text_field=body")
    assert "data.text_field: belongs to data.path" in line and "data.sources.0.text_field" in line


def test_yaml_as_people_write_it(tmp_path: Path) -> None:
    text = MINIMAL + "trainer: {bf16: off, use_cpu: ON, eval_strategy: no, max_steps: 1_000, warmup_steps: 1e1}\n"
    config = load_config(
        write(tmp_path, text), ["optimizer.muon.overlap=off", "tokenizer.split_digits=yes", "optimizer.muon.lr=1E-3"]
    )
    assert config.trainer["bf16"] is False and config.trainer["use_cpu"] is True
    assert config.trainer["eval_strategy"] == "no" and config.trainer["max_steps"] == 1000
    assert config.optimizer.muon.overlap is False and config.tokenizer.split_digits is True
    assert config.optimizer.muon.lr == 1e-3
    (line,) = errors(write(tmp_path, "name: x\nmodel:\n\tmodel_type: llama\n"))
    assert line.startswith("run.yaml:3: ") and "tab" in line and "spaces" in line
    (line,) = errors(write(tmp_path, MINIMAL), "trainer.max_steps=0")
    assert "trainer.max_steps: is 0, and must be at least 1" in line
    config = load_config(write(tmp_path, MINIMAL), ["evaluation.generate_prompt=a # b"])
    assert config.evaluation.generate_prompt == "a # b"

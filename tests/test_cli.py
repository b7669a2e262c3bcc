"""The command line as a user meets it: help, bad input with its message and exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from muon_dist.cli import main

CONFIG = """\
name: tiny
tokenizer: {{vocab_size: 320}}
data:
  sources: [{{path: {corpus}}}]
  dir: {folder}/data
  sequence_length: 16
  workers: 1
model: {{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 4}}
optimizer: {{muon: {{lr: 0.02}}, adamw: {{lr: 0.01}}}}
trainer: {{use_cpu: true, max_steps: 1}}
run_dir: {folder}/runs
"""


@pytest.fixture()
def config(tmp_path: Path) -> Path:
    (tmp_path / "corpus").mkdir()
    for number in range(60):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"Document {number} says: one, two, three and {number}.\n")
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG.format(corpus=tmp_path / "corpus", folder=tmp_path))
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    shown = capsys.readouterr()
    code = stop.value.code
    return int(code or 0), shown.out, shown.err


def refused(capsys: pytest.CaptureFixture[str], code: int, text: str, *arguments: object) -> None:
    found, out, err = run(capsys, *arguments)
    assert (found, text in err) == (code, True), f"exit {found}\n{out}\n{err}"
    assert err.startswith("error: ") and "Traceback" not in err


# ---- what works


def loaded_after(code: str) -> set[str]:
    """The heavy packages that are imported when `code` has run."""
    heavy = "{'torch', 'transformers', 'deepspeed', 'datasets'}"
    ask = f"import json, sys; print(json.dumps(sorted({heavy} & {{*sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", f"{code}; {ask}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def test_help_names_every_command() -> None:
    command = [sys.executable, "-m", "muon_dist.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    for name in ("train", "tokenizer", "prepare", "eval", "generate", "export", "schema"):
        assert f" {name} " in done.stdout


def test_what_is_not_needed_is_not_imported() -> None:
    assert loaded_after("import muon_dist.cli") == set()
    names = "muon_dist.Muon, muon_dist.param_groups, muon_dist.newton_schulz, muon_dist.MuonFactory"
    assert loaded_after(f"import muon_dist; {names}") == {"torch"}


@pytest.mark.parametrize(
    "wrong",
    ["seeed=3", "trainer.max_stepz=3", "trainer.bf16=maybe", "trainer.lr_scheduler_type=cosin",
     "tokenizer.path=nowhere", "optimizer.muon.lr=fast", "trainer.max_grad_norm=1.0", "deepspeed=nowhere.json",
     "parallel.tp=0"],
)  # fmt: skip
def test_an_error_of_a_key_imports_nothing_heavy(root: Path, wrong: str) -> None:
    """torch and transformers take seconds, and a user who has mistyped a key waits for the message."""
    call = f"load_config({str(root / 'configs/quickstart.yaml')!r}, [{wrong!r}], reads_files=True)"
    code = "import contextlib; from muon_dist.config import load_config; from muon_dist.errors import MuonDistError\n"
    code += "raised = False\ntry:\n    " + call + "\nexcept MuonDistError:\n    raised = True\nassert raised"
    assert loaded_after(code) == set()


def test_completion_is_that_of_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "muon_dist.cli", "--show-completion", "bash"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "complete -o default -F _muon_dist_completion muon-dist" in done.stdout


def test_an_empty_project_folder(capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, 2, "DIR is empty", "init", "")


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "schema")
    assert code == 0
    assert {"name", "data", "model", "optimizer", "trainer"} <= set(json.loads(out)["properties"])


def test_tokenizer_and_prepare(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    code, out, _ = run(capsys, "tokenizer", config)
    assert code == 0 and "320 tokens" in out
    code, out, _ = run(capsys, "prepare", config)
    assert code == 0 and "train: " in out and "validation: " in out
    manifest = config.parent / "data" / "tokens" / "manifest.json"
    written = manifest.stat().st_mtime_ns
    assert run(capsys, "prepare", config, "--verify")[0] == 0
    assert manifest.stat().st_mtime_ns == written, "what was done was done again"


# ---- bad input


def test_no_such_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    refused(capsys, 2, "nowhere.yaml", "train", tmp_path / "nowhere.yaml")


def test_malformed_yaml(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    config.write_text("name: x\ndata: [unclosed\n")
    refused(capsys, 2, "tiny.yaml:", "train", config)


def test_unknown_and_duplicate_keys_all_at_once(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    text = config.read_text().replace("max_steps", "max_stepz") + "name: again\nseeed: 3\n"
    config.write_text(text)
    code, _, err = run(capsys, "train", config)
    assert code == 2
    for part in ("max_stepz", "did you mean max_steps?", "seeed", "did you mean seed?", "name"):
        assert part in err, err


def test_bad_override(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    refused(capsys, 2, "did you mean", "train", config, "optimizer.muon.lrr=0.1")
    refused(capsys, 2, "optimizer.muon.lr", "train", config, "optimizer.muon.lr=fast")
    refused(capsys, 2, "key.key=value", "train", config, "optimizer.muon.lr")


def test_contradiction(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    refused(capsys, 2, "max_grad_norm", "train", config, "trainer.max_grad_norm=1.0")


def test_unknown_model_setting(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    refused(capsys, 2, "did you mean hidden_size?", "train", config, "model.hiden_size=8")


def test_no_data(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    missing = "data.sources.0.path=" + str(config.parent / "missing")
    refused(capsys, 3, "missing: no such file or folder", "prepare", config, missing)


def test_empty_data(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    (config.parent / "empty.txt").write_text("")
    refused(capsys, 3, "empty.txt", "train", config, "data.sources.0.path=" + str(config.parent / "empty.txt"))


def test_text_that_is_not_utf8(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    (config.parent / "corpus" / "bad.txt").write_bytes(b"twelve bytes\xff\xfe and more")
    code, _, err = run(capsys, "train", config)
    assert code == 3 and "bad.txt" in err and "12" in err, err


def test_data_too_short_for_one_sample(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    refused(capsys, 3, "data.sequence_length", "train", config, "data.sequence_length=2000",
            "model.max_position_embeddings=4000")  # fmt: skip


def test_tokens_of_another_tokenizer_are_made_again(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    """Shards of one tokenizer with a smaller model, which has no embedding row for some of their ids."""
    assert run(capsys, "prepare", config)[0] == 0
    other = ("tokenizer.path=" + str(small_tokenizer(config)), "tokenizer.vocab_size=null")
    code, out, err = run(capsys, "train", config, *other)
    assert code == 0 and "another tokenizer" in out + err, f"exit {code}\n{out}\n{err}"


def small_tokenizer(config: Path) -> Path:
    from muon_dist.data import Source, train_tokenizer

    folder = config.parent / "small"
    train_tokenizer([Source(path=config.parent / "corpus")], folder, vocab_size=310)
    return folder


def test_nothing_reaches_muon(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    everything = "optimizer.routing.overrides=[{pattern: '.*', algorithm: adamw}]"
    code, _, err = run(capsys, "train", config, everything)
    assert code == 4 and "Muon" in err and "self_attn.q_proj.weight" in err, err


def test_vector_sent_to_muon(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    norm = "optimizer.routing.overrides=[{pattern: '.*norm.*', algorithm: muon}]"
    code, _, err = run(capsys, "train", config, norm)
    assert code == 4 and "norm" in err, err


def test_override_that_matches_nothing(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    refused(capsys, 4, "q_projj", "train", config,
            "optimizer.routing.overrides=[{pattern: '.*q_projj', algorithm: adamw}]")  # fmt: skip


def test_nothing_to_resume_from(capsys: pytest.CaptureFixture[str], config: Path) -> None:
    refused(capsys, 7, "no finished checkpoint", "train", config, "--resume", "auto")
    refused(capsys, 7, "nowhere", "train", config, "--resume", "nowhere")


def test_no_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for command in (["eval", tmp_path], ["generate", tmp_path], ["export", tmp_path, tmp_path / "out"]):
        refused(capsys, 7, "neither a model", *command)


def test_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "train")[0] == 2
    assert run(capsys, "trian")[0] == 2
    assert run(capsys, "generate", "x", "--tokens", "0")[0] == 2


def test_no_traceback_and_the_other_ranks_are_silent(tmp_path: Path) -> None:
    for rank, shown in (("0", True), ("1", False)):
        done = subprocess.run(
            [sys.executable, "-m", "muon_dist.cli", "train", str(tmp_path / "no.yaml")],
            env={**os.environ, "RANK": rank, "WORLD_SIZE": "2"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") == shown, done.stderr
        assert "Traceback" not in done.stderr

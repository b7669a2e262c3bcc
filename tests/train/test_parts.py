"""Redaction, run folders, the number of a rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from muon_dist.config import load_config
from muon_dist.errors import ConfigError
from muon_dist.train import distributed, environment
from muon_dist.train.build import checkpoint_options
from muon_dist.train.command import continuing
from muon_dist.train.folder import RunFolder, Start, changed_settings
from muon_dist.train.lock import RunLock
from muon_dist.train.summary import rows, show

# ---- secrets


def test_no_secret_reaches_the_environment_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-1")
    monkeypatch.setenv("WANDB_API_KEY", "canary-2")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-3")
    monkeypatch.setenv("MY_PASSWORD", "canary-4")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("sys.argv", ["muon-dist", "train", "x.yaml", "trainer.hub_token=canary-5", "seed=3"])
    text = json.dumps(environment.describe())
    assert "canary" not in text
    found = json.loads(text)
    assert found["variables"]["HF_TOKEN"] == "<redacted>"
    assert found["variables"]["OMP_NUM_THREADS"] == "1"
    assert "AWS_SECRET_ACCESS_KEY" not in found["variables"]
    assert found["command"][-1] == "seed=3"


def test_harmless_settings_are_shown() -> None:
    shown = ["tokenizer.path=some/folder", "data.shard_tokens", "model.num_key_value_heads=4"]
    assert environment.redact_arguments(shown[:2]) == shown[:2]


def test_no_secret_reaches_a_checkpoint(workspace: Path) -> None:
    config = load_config(workspace / "tiny.yaml", ["trainer.hub_token=canary-6"])
    kept = json.dumps(checkpoint_options(config).config)
    assert "canary" not in kept and '"hub_token": "<redacted>"' in kept and '"vocab_size": 320' in kept


# ---- folders


def checkpoint(root: Path, step: int, finished: bool) -> Path:
    folder = root / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    if finished:
        (folder / "manifest.json").write_text("{}")
    return folder


def test_auto_takes_the_newest_finished_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    checkpoint(tmp_path, 9, True)
    newest = checkpoint(tmp_path, 10, True)
    checkpoint(tmp_path, 11, False)
    (tmp_path / "checkpoints" / ".checkpoint-12.tmp-0").mkdir()
    assert folder.decide("auto", False).resume == "auto" and folder.finished_checkpoints()[-1] == newest


def checkpoint_names(root: Path) -> list[str]:
    return sorted(p.name for p in (root / "checkpoints").iterdir())


def test_overwrite_leaves_what_is_not_the_runs(tmp_path: Path) -> None:
    checkpoint(tmp_path, 3, True)
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "notes.txt").write_text("mine")
    start = RunFolder(tmp_path).decide(None, True)
    assert start == Start(None, replaces=True) and checkpoint_names(tmp_path) == ["checkpoint-3"], "nothing yet"
    RunFolder(tmp_path).begin(start)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["launch.json", "notes.txt"]


def test_a_run_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot make the run folder"):
        RunLock(tmp_path / "file" / "run").take()


def test_changed_settings() -> None:
    old = {"a": {"lr": 0.1, "same": 1}, "gone": 2}
    new = {"a": {"lr": 0.2, "same": 1}, "new": [1]}
    assert changed_settings(old, new) == ["a.lr: 0.1 -> 0.2", "gone: 2 -> None", "new: None -> [1]"]


# ---- the command that continues a run


@pytest.mark.parametrize(
    ("arguments", "environment", "command"),
    [
        (["train", "a b.yaml", "seed=1"], {}, "muon-dist train 'a b.yaml' seed=1"),
        (["train", "--resume", "if-any", "x.yaml", "--overwrite"], {}, "muon-dist train x.yaml"),
        (["train", "x.yaml", "--resume=runs/x/checkpoints/checkpoint-5"], {}, "muon-dist train x.yaml"),
        (["train", "x.yaml", "trainer.hub_token=s"], {}, "muon-dist train x.yaml 'trainer.hub_token=<redacted>'"),
        (["train", "x.yaml"], {"WORLD_SIZE": "4"}, "torchrun --nproc-per-node 4 -m muon_dist.cli train x.yaml"),
        (
            ["train", "x.yaml"],
            {
                "WORLD_SIZE": "8",
                "MUON_DIST_COMMAND": "sbatch --nodes 4 launch/slurm.sbatch train x.yaml --resume auto",
            },
            "sbatch --nodes 4 launch/slurm.sbatch train x.yaml",
        ),
    ],
)
def test_the_command_that_goes_on(arguments: list[str], environment: dict[str, str], command: str) -> None:
    given = ["/env/bin/muon-dist", *arguments]
    assert continuing(True, given, environment) == f"{command} --resume auto"
    assert continuing(False, given, environment) == f"{command} --overwrite"
    assert continuing(True, ["my_program.py"], environment) == "train(config, resume='auto')"


# ---- ranks


def test_a_rank_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "two")
    with pytest.raises(ConfigError, match="RANK is 'two'"):
        distributed.rank()


# ---- the summary

SUMMARY = {
    "name": "x",
    "optimizer": "muon",
    "validation_loss": 3.25,
    "tokens_per_s": 12345.6,
    "mfu": 0.25,
    "peak_flops": 5e10,
    "checkpoint": None,
    "sample": "Once [bold]upon[/bold]",
}


def test_the_summary_leaves_out_what_is_unknown() -> None:
    assert dict(rows(SUMMARY)) == {
        "validation loss": "3.2500 nats per token",
        "tokens per second": "12,346",
        "MFU": "25.0% of 50 GFLOP/s",
    }


def test_the_summary_is_plain_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show(SUMMARY)
    shown = capsys.readouterr().out
    assert "validation loss: 3.2500 nats per token\n" in shown
    assert "Once [bold]upon[/bold]" in shown and "\x1b" not in shown

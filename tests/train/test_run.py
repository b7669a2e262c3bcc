"""A whole run: the files in its folder, resuming, AdamW, and the commands for its model."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from muon_dist.checkpoint import Checkpoint
from muon_dist.checkpoint.weights import Choice, Weights
from muon_dist.config import load_config
from muon_dist.errors import CheckpointError, ConfigError, DataError
from muon_dist.model.load import load_model, load_text_tokenizer
from muon_dist.numerics.schedules import _SCHEDULES
from muon_dist.optim.rules import RULES, SCALES
from muon_dist.report.run_page import status, tiles
from muon_dist.report.run_record import read_run
from muon_dist.train import run
from muon_dist.train.folder import RunFolder
from muon_dist.train.models import evaluate_folder, export_folder, find_weights, generate_from_folder
from tests.optim.test_rules import example_of_the_docs


def train(path: Path, overrides: Sequence[str] = (), **options: Any) -> dict[str, Any]:
    return run.train(load_config(path, overrides), **options)


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_the_run_folder(finished: dict[str, Any], workspace: Path) -> None:
    root = Path(finished["run"])
    assert root == workspace / "runs" / "tiny"
    assert yaml.safe_load((root / "config.yaml").read_text())["optimizer"]["muon"]["momentum"] == 0.95
    environment = json.loads((root / "environment.json").read_text())
    assert environment["packages"]["torch"].startswith("2.")
    routes = json.loads((root / "routing.json").read_text())
    assert "self_attn.q_proj.weight" in json.dumps(routes)
    assert "model.embed_tokens.weight" in (root / "routing.txt").read_text()
    lines = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    train_lines = [line for line in lines if "loss" in line]
    assert [line["step"] for line in train_lines] == list(range(1, 9))
    assert train_lines[-1]["loss"] < train_lines[0]["loss"]
    assert [p.name for p in sorted((root / "checkpoints").iterdir())] == ["checkpoint-4", "checkpoint-8"]
    assert json.loads((root / "summary.json").read_text()) == json.loads(json.dumps(finished))
    assert finished["tokens"] == 8 * 4 * 16
    assert finished["sample"].startswith("the cat")


def test_the_model_loads_with_transformers_alone(finished: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished["model"])
    for tokenizer in (AutoTokenizer.from_pretrained(finished["model"]), load_text_tokenizer(finished["checkpoint"])):
        text = "the fox hid by the barn.\n"
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
        assert len(tokenizer) == model.config.vocab_size
    assert same(weights(finished["model"]), load_model(finished["checkpoint"]).state_dict())


def test_eval_agrees_with_the_trainer(finished: dict[str, Any]) -> None:
    figures = evaluate_folder(finished["run"])
    assert figures["loss"] == pytest.approx(finished["validation_loss"], rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(finished["validation_bits_per_byte"], rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["loss"]))


def test_bits_per_byte_counts_bytes_of_text(finished: dict[str, Any], workspace: Path) -> None:
    """Against the definition: bits to predict all tokens of the split, over the bytes of its text."""
    from muon_dist.data.dataset import MixtureDataset

    dataset = MixtureDataset.open(workspace / "data" / "tokens", "validation", 16)
    ids = [i for k in range(len(dataset)) for i in dataset[k]["input_ids"].tolist()]
    text = AutoTokenizer.from_pretrained(finished["model"]).decode(ids, skip_special_tokens=True)
    bits_per_token = finished["validation_loss"] / math.log(2)
    direct = bits_per_token * len(ids) / len(text.encode())
    # the last, shorter rest of the split is in the manifest's count and not in the samples
    assert finished["validation_bits_per_byte"] == pytest.approx(direct, rel=0.02)


def test_resume_ends_where_the_whole_run_ended(finished: dict[str, Any], workspace: Path, tmp_path: Path) -> None:
    whole = weights(finished["model"])
    halted = ["run_dir=" + str(tmp_path), "trainer.max_steps=8"]
    train(workspace / "tiny.yaml", halted)
    root = tmp_path / "tiny"
    # as if it had been killed after its first checkpoint
    for path in (root / "checkpoints" / "checkpoint-8" / "manifest.json", root / "summary.json"):
        path.unlink()
    # a resumed run may log and save at other steps; Trainer would keep those of the checkpoint
    resumed = train(
        workspace / "tiny.yaml", [*halted, "trainer.logging_steps=3", "trainer.save_steps=6"], resume="auto"
    )
    assert same(weights(resumed["model"]), whole)
    steps = [json.loads(line)["step"] for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert [s for s in steps if s <= 7] == [1, 2, 3, 4, 6]
    assert (root / "checkpoints" / "checkpoint-6" / "manifest.json").exists()


def test_a_run_is_not_overwritten_unasked(finished: dict[str, Any], workspace: Path) -> None:
    before = (Path(finished["run"]) / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"holds a run already: .*--resume auto.*--overwrite"):
        train(workspace / "tiny.yaml")
    assert (Path(finished["run"]) / "metrics.jsonl").read_bytes() == before


def test_nothing_to_resume(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"--resume auto: .* holds no finished checkpoint"):
        train(workspace / "tiny.yaml", run_dir=str(tmp_path), resume="auto")


def test_resume_if_any(workspace: Path, tmp_path: Path) -> None:
    """The command that a launcher repeats: from the start while there is no checkpoint, then from the newest
    checkpoint."""
    config = load_config(workspace / "tiny.yaml", ["trainer.max_steps=4", "trainer.save_steps=2"])
    folder = RunFolder(tmp_path / "tiny")
    for unfinished in (False, True):
        if unfinished:  # killed before its first checkpoint was whole
            (folder.checkpoints / "checkpoint-2").mkdir(parents=True)
        assert folder.decide("if-any", overwrite=False).resume is None
    run.train(config, run_dir=str(tmp_path), resume="if-any")
    assert folder.decide("if-any", overwrite=False).resume == "auto"
    assert [p.name for p in folder.finished_checkpoints()] == ["checkpoint-2", "checkpoint-4"]


def test_other_data_is_refused_on_resume(finished: dict[str, Any], workspace: Path) -> None:
    other = str(workspace / "other")
    with pytest.raises(CheckpointError, match="another order of samples"):
        train(workspace / "tiny.yaml", ["seed=1"], resume=finished["checkpoint"], run_dir=other)


def test_adamw_is_one_line_away(
    finished: dict[str, Any], workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = train(workspace / "tiny.yaml", ["optimizer.name=adamw", "trainer.max_steps=2"], run_dir=str(tmp_path))
    lines = [json.loads(line) for line in Path(out["metrics"]).read_text().splitlines()]
    first = next(line for line in lines if "loss" in line)
    muon = next(line for line in map(json.loads, Path(finished["metrics"]).read_text().splitlines()) if "loss" in line)
    assert "optimizer.name is adamw: AdamW trains all parameters" in capsys.readouterr().out
    # same weights, same first batch; and every parameter under AdamW's rate
    assert first["loss"] == muon["loss"]
    assert "lr/muon" not in first and first["lr/adamw"] == 0.01
    checkpoint = Checkpoint.look(out["checkpoint"])
    parameters = {name for kind, name in checkpoint.manifest.tensors if kind == "weight"}
    assert checkpoint.states.keys() == parameters
    assert all(kinds.keys() == {"step", "exp_avg", "exp_avg_sq"} for kinds in checkpoint.states.values())


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("normuon", {"beta2": 0.9}),
        pytest.param("hyperball", {}, marks=pytest.mark.slow),
        pytest.param("namo", {"mu2": 0.9}, marks=pytest.mark.slow),
    ],
)
def test_a_rule_is_one_line_away_and_resumes(workspace: Path, tmp_path: Path, rule: str, options: dict) -> None:
    chosen = [f"optimizer.muon.rule={rule}", f"optimizer.muon.rule_options={json.dumps(options)}"]
    halted = [*chosen, "run_dir=" + str(tmp_path), "trainer.max_steps=4", "trainer.save_steps=2"]
    out = train(workspace / "tiny.yaml", halted)
    whole = weights(out["model"])
    (tmp_path / "tiny" / "checkpoints" / "checkpoint-4" / "manifest.json").unlink()
    kinds = set(Checkpoint.look(tmp_path / "tiny" / "checkpoints" / "checkpoint-2").manifest.kinds())
    assert kinds > {"weight", "momentum", "exp_avg"}
    assert {*RULES[rule].owner_memory, *RULES[rule].matrix_memory} <= kinds
    (tmp_path / "tiny" / "summary.json").unlink()
    assert same(weights(train(workspace / "tiny.yaml", halted, resume="auto")["model"]), whole)
    with pytest.raises(CheckpointError, match="trained by another algorithm or rule"):
        train(workspace / "tiny.yaml", [*halted[2:], "trainer.max_steps=6"], resume="auto")


def test_a_rule_of_a_plugin_trains_and_resumes(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example of docs/rules.md, as a module in the current folder, from the YAML alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    (tmp_path / "own_rule_of_a_test.py").write_text(example_of_the_docs().replace("averaged", "averaged by a plugin"))
    chosen = ["optimizer.plugins=[own_rule_of_a_test]", "optimizer.muon.rule=averaged by a plugin",
              "optimizer.muon.rule_options={beta: 0.8, cautious: true}", "optimizer.muon.scale=quarter",
              "optimizer.muon.ns_schedule=gentle", "run_dir=" + str(tmp_path),
              "trainer.max_steps=4", "trainer.save_steps=2"]  # fmt: skip
    with patch.dict(RULES), patch.dict(SCALES), patch.dict(_SCHEDULES):
        out = train(workspace / "tiny.yaml", chosen)
        whole = weights(out["model"])
        assert "average" in Checkpoint.look(out["checkpoint"]).manifest.kinds()
        (tmp_path / "tiny" / "checkpoints" / "checkpoint-4" / "manifest.json").unlink()
        (tmp_path / "tiny" / "summary.json").unlink()
        assert same(weights(train(workspace / "tiny.yaml", chosen, resume="auto")["model"]), whole)


def test_an_epoch_is_a_pass_over_the_data(finished: dict[str, Any], workspace: Path, tmp_path: Path) -> None:
    """A step takes a third of the samples: passes end at steps 3 and 6, and after a resume with other batches."""
    from muon_dist.data.dataset import MixtureDataset

    samples = len(MixtureDataset.open(workspace / "data" / "tokens", "train", 16))
    third = -(-samples // 3)
    epochs = [f"trainer.{kind}_strategy=epoch" for kind in ("save", "eval", "logging")]
    few = ["trainer.max_steps=-1", "trainer.num_train_epochs=2", f"trainer.per_device_train_batch_size={third}"]
    out = train(workspace / "tiny.yaml", [*few, *epochs], run_dir=str(tmp_path))
    root = Path(out["run"])
    assert out["steps"] == 6
    assert [p.name for p in RunFolder(root).finished_checkpoints()] == ["checkpoint-3", "checkpoint-6"]

    def logged(key: str) -> list[tuple[int, float]]:
        lines = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["epoch"]) for line in lines if key in line]

    assert logged("loss") == logged("eval_loss") == [(s, pytest.approx(s * third / samples)) for s in (3, 6)]
    other = ["trainer.max_steps=8", f"trainer.per_device_train_batch_size={2 * third}"]
    train(workspace / "tiny.yaml", [*other, *epochs], run_dir=str(tmp_path), resume="auto")
    assert logged("loss")[2:] == logged("eval_loss")[2:] == [(8, pytest.approx(10 * third / samples))]


def test_epochs_become_steps(workspace: Path, tmp_path: Path) -> None:
    from muon_dist.data.dataset import MixtureDataset

    samples = len(MixtureDataset.open(workspace / "data" / "tokens", "train", 16))
    overrides = ["trainer.max_steps=-1", "trainer.num_train_epochs=0.1", "trainer.save_strategy='no'"]
    out = train(workspace / "tiny.yaml", overrides, run_dir=str(tmp_path))
    assert out["steps"] == math.ceil(0.1 * samples / 4)
    assert out["checkpoint"] is None


def test_a_prompt_that_is_not_utf8(finished: dict[str, Any]) -> None:
    """Bytes of a shell in another encoding arrive as lone surrogates."""
    with pytest.raises(ConfigError, match="the prompt is not UTF-8"):
        generate_from_folder(finished["run"], "caf\udce9", 4)


def test_generation_is_the_same_for_a_seed(finished: dict[str, Any]) -> None:
    first, weights = generate_from_folder(finished["run"], "the dog", 12, temperature=1.0, seed=5)
    assert weights == Weights(Path(finished["model"]), 8)
    assert first == generate_from_folder(finished["model"], "the dog", 12, temperature=1.0, seed=5)[0]
    assert first.startswith("the dog") and len(first) > len("the dog")
    others = {generate_from_folder(finished["run"], "the dog", 12, temperature=1.0, seed=s)[0] for s in range(4)}
    assert len(others) > 1
    assert generate_from_folder(finished["run"], "", 12, temperature=1.0, seed=5)[0]  # an empty prompt is one


def test_export(finished: dict[str, Any], tmp_path: Path) -> None:
    export_folder(finished["run"], tmp_path / "half", "bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    export_folder(finished["run"], tmp_path / "same")
    assert same(weights(tmp_path / "same"), weights(finished["model"]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["half", "same"]
    with pytest.raises(ConfigError, match="exists already"):
        export_folder(finished["run"], tmp_path / "same")
    with pytest.raises(ConfigError, match="--dtype int8: use one of float32"):
        export_folder(finished["run"], tmp_path / "new", "int8")


def test_find_weights(finished: dict[str, Any], tmp_path: Path) -> None:
    assert find_weights(finished["run"]) == find_weights(finished["model"]) == Weights(Path(finished["model"]), 8)
    assert find_weights(finished["checkpoint"]) == Weights(Path(finished["checkpoint"]), 8)
    export_folder(finished["run"], tmp_path / "exported")
    assert find_weights(tmp_path / "exported").step == 8
    with pytest.raises(CheckpointError, match="neither a model"):
        find_weights(tmp_path)


def test_everything_speaks_of_the_newest_weights(workspace: Path, tmp_path: Path) -> None:
    """A run that was extended, and ended before it had a final model: its checkpoint of step 12 is used."""
    train(workspace / "tiny.yaml", run_dir=str(tmp_path))
    root = tmp_path / "tiny"

    def crash(*arguments: Any) -> None:
        raise KeyboardInterrupt

    finish, run._finish = run._finish, crash
    try:
        with pytest.raises(KeyboardInterrupt):
            train(workspace / "tiny.yaml", ["trainer.max_steps=12"], run_dir=str(tmp_path), resume="auto")
    finally:
        run._finish = finish
    newest = Weights(root / "checkpoints" / "checkpoint-12", 12)
    assert find_weights(root) == newest and find_weights(root / "model").step == 8
    figures = evaluate_folder(root)
    assert (figures["model"], figures["step"]) == (str(newest.path), 12)
    assert figures["loss"] == evaluate_folder(newest.path)["loss"] != evaluate_folder(root / "model")["loss"]
    assert generate_from_folder(root, "the dog", 4)[1] == newest
    assert export_folder(root, tmp_path / "exported") == newest
    assert same(weights(tmp_path / "exported"), load_model(newest.path).state_dict())
    record = read_run(root)
    assert record.weights == newest and status(record).startswith("not finished")
    shown = dict(tiles(record))
    assert shown["newest weights"] == "step 12" and shown["steps"] == "12"


def test_figures_belong_to_the_weights_that_are_saved(workspace: Path, tmp_path: Path) -> None:
    """`load_best_model_at_end`, with the highest loss as the best: the final model is that of step 4 of 8."""
    out = train(
        workspace / "tiny.yaml",
        ["trainer.load_best_model_at_end=true", "trainer.metric_for_best_model=eval_loss",
         "trainer.greater_is_better=true", "trainer.eval_strategy=steps", "trainer.eval_steps=4"],
        run_dir=str(tmp_path),
    )  # fmt: skip
    assert (out["steps"], out["weights_step"]) == (8, 4)
    best, last = find_weights(out["run"]), Weights(Path(out["checkpoint"]), 8)
    assert best == find_weights(out["model"]) == Weights(Path(out["model"]), 4), "what the run ended with"
    assert find_weights(out["run"], Choice(step=8)) == last and find_weights(out["run"], Choice(best=True)) == last
    assert find_weights(out["run"], Choice(best=True, greater=True)) == best
    with pytest.raises(CheckpointError, match="no weights of step 5, but of 4, 8"):
        find_weights(out["run"], Choice(step=5))
    assert evaluate_folder(best.path)["loss"] == pytest.approx(out["validation_loss"], rel=1e-5)
    assert evaluate_folder(last.path)["loss"] != pytest.approx(out["validation_loss"], rel=1e-5)
    shown = dict(tiles(read_run(out["run"])))
    assert "validation loss at step 4" in shown and shown["newest weights"] == "step 4"


def test_a_run_that_goes_on_from_an_earlier_step_sets_its_model_aside(workspace: Path, tmp_path: Path) -> None:
    """Steps after that one belong to an abandoned branch: no file mentions them, even after a crash."""
    train(workspace / "tiny.yaml", run_dir=str(tmp_path))
    root = tmp_path / "tiny"
    earlier = str(root / "checkpoints" / "checkpoint-4")
    saved, run._finish = run._finish, lambda *arguments: pytest.fail("crashed")
    try:
        with pytest.raises(pytest.fail.Exception):
            changed = ["trainer.max_steps=6", "checkpoint.async=false"]
            train(workspace / "tiny.yaml", changed, run_dir=str(tmp_path), resume=earlier)
    finally:
        run._finish = saved
    assert find_weights(root) == Weights(root / "checkpoints" / "checkpoint-6", 6)
    record = read_run(root)
    assert record.final is None and record.weights == find_weights(root)
    assert len(list(root.glob("set-aside-*"))) == 2


# ---- a start that is refused


def contents(root: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p.relative_to(root)): (p.read_bytes(), p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        (["seed=1"], CheckpointError),  # another order of samples
        (["data.sources=[{path: /nowhere/at/all}]", "data.dir=TMP/data"], DataError),
        (["model.hidden_size=64"], CheckpointError),  # another model
        pytest.param(["model.num_hidden_layers=3"], CheckpointError, marks=pytest.mark.slow),
    ],
)
def test_a_refused_resume_changes_nothing(
    workspace: Path, tmp_path: Path, overrides: list[str], error: type[Exception]
) -> None:
    train(workspace / "tiny.yaml", run_dir=str(tmp_path))
    before = contents(tmp_path / "tiny")
    with pytest.raises(error):
        changes = [text.replace("TMP", str(tmp_path)) for text in overrides]
        train(workspace / "tiny.yaml", [*changes, "trainer.max_steps=12"], run_dir=str(tmp_path), resume="auto")
    assert contents(tmp_path / "tiny") == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_refused_start_leaves_nothing_behind(workspace: Path, tmp_path: Path, overwrite: bool) -> None:
    """`--overwrite` removes a run only when the new one begins."""
    if overwrite:
        train(workspace / "tiny.yaml", ["trainer.max_steps=2"], run_dir=str(tmp_path))
    before = contents(tmp_path)
    with pytest.raises(DataError):
        train(
            workspace / "tiny.yaml",
            ["data.sources=[{path: /nowhere/at/all}]", f"data.dir={workspace}/none"],
            run_dir=str(tmp_path),
            overwrite=overwrite,
        )
    with pytest.raises(ConfigError):
        train(workspace / "tiny.yaml", ["trainer.fsdp=full_shard"], run_dir=str(tmp_path), overwrite=overwrite)
    assert contents(tmp_path) == before and (overwrite or not any(tmp_path.iterdir()))


def test_a_tracker_that_cannot_begin_leaves_everything_as_it_was(
    finished: dict[str, Any], workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tracker writes into the run folder before it fails; a start and a resume remove these files."""
    from transformers.integrations import integration_utils

    class Tracker(integration_utils.TensorBoardCallback):
        def __init__(self) -> None:
            self.folder = Path(os.environ["TENSORBOARD_LOGGING_DIR"])

        def on_train_begin(self, *_: object, **__: object) -> None:
            (self.folder / "events").write_text("x")
            raise RuntimeError(f"cannot write to {self.folder}")

    Tracker.__module__ = integration_utils.__name__
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    asked = ["trainer.report_to=tensorboard", "trainer.max_steps=12"]
    with pytest.raises(ConfigError, match=f"cannot start: cannot write to {tmp_path}/new/tiny/trackers/tensorboard"):
        train(workspace / "tiny.yaml", asked, run_dir=str(tmp_path / "new"))
    assert not list(tmp_path.rglob("*.json*")) and not (tmp_path / "new" / "tiny").exists()
    shutil.copytree(finished["run"], tmp_path / "old" / "tiny")
    before = contents(tmp_path / "old")
    with pytest.raises(ConfigError, match="cannot start"):
        train(workspace / "tiny.yaml", asked, run_dir=str(tmp_path / "old"), resume="auto")
    assert contents(tmp_path / "old") == before and not (tmp_path / "old" / "tiny" / "trackers").exists()
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ

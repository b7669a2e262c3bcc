"""Parts of a run, packed documents and existing weights, through whole runs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from muon_dist.checkpoint import Checkpoint
from muon_dist.config import load_config
from muon_dist.data.dataset import MixtureDataset
from muon_dist.errors import CheckpointError, ConfigError
from muon_dist.model import build_model
from muon_dist.model.load import load_model
from muon_dist.model.packed import keep_documents_apart
from muon_dist.train import run
from muon_dist.train.models import evaluate_folder
from tests.distributed import run_ranks

PARTS = (
    "data.global_batch_size=4",
    "trainer.per_device_train_batch_size=2",
    "data.sources=[{path: %s/corpus}, {path: %s/corpus, weight: 0, max_documents: 50}]",
    "data.dir=%s/two",
    "trainer.save_steps=2",
    "curriculum=[{from_step: 3, data: {sequence_length: 32, weights: [1, 3], packing: best_fit}},"
    " {from_step: 6, lr_scheduler_type: linear, data: {weights: [0, 1]}}]",
)


def lines(root: str | Path) -> list[dict[str, Any]]:
    text = (Path(root) / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if "loss" in line]


def overrides(workspace: Path) -> list[str]:
    return [text.replace("%s", str(workspace)) for text in PARTS]


def trained(workspace: Path, name: str, more: Sequence[str] = (), **options: Any) -> dict[str, Any]:
    config = load_config(workspace / "tiny.yaml", [*overrides(workspace), f"name={name}", *more])
    return run.train(config, **options)


@pytest.fixture(scope="module")
def finished(workspace: Path) -> dict[str, Any]:
    return trained(workspace, "parts")


def test_the_parts_are_trained(finished: dict[str, Any]) -> None:
    found = lines(finished["run"])
    assert [line["part"] for line in found] == [1, 1, 1, 2, 2, 2, 3, 3]
    assert [line["tokens"] for line in found] == [64, 128, 192, 320, 448, 576, 704, 832]
    # The schedule of the run until step 6 (2/8 of it are left); then a decay to zero over the last two steps.
    factors = [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert [line["lr/muon"] for line in found] == pytest.approx([0.02 * factor for factor in factors])


@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.slow), 4, 6])
def test_a_resumed_run_is_the_same(finished: dict[str, Any], workspace: Path, step: int) -> None:
    """Inside the first part, inside the second, and where the third begins."""
    source = Path(finished["run"]) / "checkpoints" / f"checkpoint-{step}"
    again = trained(workspace, f"again-{step}", resume=str(source))
    whole = {line["step"]: line["loss"] for line in lines(finished["run"])}
    assert {line["step"]: line["loss"] for line in lines(again["run"])} == {k: v for k, v in whole.items() if k > step}


def two_ranks(workspace: str, source: str) -> list[float]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # accelerate asks; the process group is there already
    done = trained(Path(workspace), "on-two", resume=source)
    return [line["loss"] for line in lines(done["run"])]


def test_two_ranks_go_on_with_the_same_samples(finished: dict[str, Any], workspace: Path) -> None:
    source = Path(finished["run"]) / "checkpoints" / "checkpoint-4"
    losses = run_ranks(two_ranks, 2, str(workspace), str(source))[0]
    assert losses == pytest.approx([line["loss"] for line in lines(finished["run"])][4:], abs=2e-4)


RULES = (
    "trainer.save_steps=1",
    "curriculum=[{from_step: 3, optimizer: {muon: {rule: normuon, rule_options: {beta2: 0.9}, scale: unit_rms}}},"
    " {from_step: 6, optimizer: {muon: {momentum: 0.5, weight_decay: 0}}}]",
)


def by_rules(workspace: Path, name: str, more: Sequence[str] = RULES, **options: Any) -> dict[int, float]:
    """Step -> loss of a run whose rule changes twice."""
    config = load_config(workspace / "tiny.yaml", [f"name={name}", "data.global_batch_size=4", *more])
    return {line["step"]: line["loss"] for line in lines(run.train(config, **options)["run"])}


def rules_on_two(workspace: str, source: str) -> dict[int, float]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # accelerate asks; the process group is there already
    return by_rules(Path(workspace), "rules-on-two", resume=source)


def test_a_rule_changes_on_the_way(workspace: Path) -> None:
    """Equals a run with one rule that is stopped there and continues with a curriculum; also if resumed."""
    whole = by_rules(workspace, "rules")
    saved = workspace / "runs" / "rules" / "checkpoints"
    rules = [Checkpoint.look(saved / f"checkpoint-{step}").manifest.info["position"]["rules"] for step in (3, 4, 8)]
    assert rules == [{"muon": "muon"}, {"muon": "normuon"}, {"muon": "normuon"}]
    plain = by_rules(workspace, "one-rule", ["trainer.save_steps=3"])
    stopped = workspace / "runs" / "one-rule" / "checkpoints" / "checkpoint-3"
    assert plain[3] == whole[3] and plain[5] != whole[5]
    assert by_rules(workspace, "stopped", resume=str(stopped)) == {k: v for k, v in whole.items() if k > 3}
    for step in (2, 3, 6):  # inside the first part, and where the second and the third begin
        again = by_rules(workspace, f"rules-{step}", resume=str(saved / f"checkpoint-{step}"))
        assert again == {k: v for k, v in whole.items() if k > step}, step
    on_two = run_ranks(rules_on_two, 2, str(workspace), str(saved / "checkpoint-5"))[0]
    assert list(on_two.values()) == pytest.approx([whole[6], whole[7], whole[8]], abs=2e-4)


def test_what_is_done_cannot_be_changed_and_what_comes_can(finished: dict[str, Any], workspace: Path) -> None:
    source = Path(finished["run"]) / "checkpoints" / "checkpoint-4"
    with pytest.raises(CheckpointError, match="another order of samples"):
        trained(workspace, "moved", ["curriculum.0.from_step=2"], resume=str(source))
    later = trained(workspace, "later", ["curriculum.1.from_step=7"], resume=str(source))
    assert [line["part"] for line in lines(later["run"])] == [2, 2, 2, 3]


def test_evaluation_packs_as_training(workspace: Path) -> None:
    changes = ["name=masked", "data.packing=document_mask", "trainer.max_steps=2"]
    done = run.train(load_config(workspace / "tiny.yaml", changes))
    found = evaluate_folder(done["run"])
    assert found["loss"] == pytest.approx(done["validation_loss"], rel=1e-5)
    dataset = MixtureDataset.open(workspace / "data" / "tokens", "validation", 16, packing="document_mask")
    labels = torch.stack([dataset[index]["labels"][1:] for index in range(len(dataset))])
    assert found["predicted_tokens"] == int((labels >= 0).sum()) < labels.numel()


def test_logits_of_a_packed_sample_are_those_of_its_documents(workspace: Path, finished: dict[str, Any]) -> None:
    model = load_model(finished["model"]).eval()
    keep_documents_apart(model, "best_fit")
    dataset = MixtureDataset.open(workspace / "two" / "tokens", "train", 64, packing="document_mask")
    index = next(k for k in range(len(dataset)) if (dataset[k]["position_ids"][1:] == 0).any())
    sample = dataset[index]
    with torch.no_grad():
        packed = model(input_ids=sample["input_ids"][None], position_ids=sample["position_ids"][None]).logits[0]
        cuts = [*torch.nonzero(sample["position_ids"] == 0).flatten().tolist(), 64]
        for start, stop in pairwise(cuts):
            alone = model(input_ids=sample["input_ids"][None, start:stop]).logits[0]
            assert torch.allclose(packed[start:stop], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "kind, more",
    [
        ("bloom", {"n_layer": 1, "n_head": 4}),
        ("opt", {"ffn_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "word_embed_proj_dim": 32}),
        ("mamba", {"num_hidden_layers": 1}),
    ],
)
def test_models_that_mix_documents_are_refused(kind: str, more: dict[str, Any]) -> None:
    model = build_model({"model_type": kind, "hidden_size": 32, **more}, vocab_size=100, seed=0)
    with pytest.raises(ConfigError, match=rf"data\.packing: best_fit, and {kind} .*concatenate"):
        keep_documents_apart(model, "best_fit")


@pytest.mark.parametrize("source", ["run", "model", "checkpoint"])
def test_a_run_starts_from_existing_weights(finished: dict[str, Any], workspace: Path, source: str) -> None:
    changes = [f"name=from-{source}", "trainer.max_steps=1", f"model={{init_from: {finished[source]}}}"]
    base = (workspace / "tiny.yaml").read_text()
    head, rest = base.split("model:\n")[0], base.split("optimizer:\n")[1]
    (workspace / "from.yaml").write_text(f"{head}optimizer:\n{rest}")
    config = load_config(workspace / "from.yaml", [*overrides(workspace)[:-1], *changes, "optimizer.muon.lr=0.0"])
    done = run.train(config)
    before, after = load_model(finished["model"]).state_dict(), load_model(done["model"]).state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.allclose(before[name], after[name], atol=1e-6)


def test_starting_weights_of_another_tokenizer_are_refused(finished: dict[str, Any], workspace: Path) -> None:
    changes = ["name=other", "tokenizer.vocab_size=310", f"data.dir={workspace}/other"]
    with pytest.raises(ConfigError, match=r"model\.init_from.*tokenizer\.path"):
        run.train(load_config(workspace / "tiny.yaml", [*changes, f"model.init_from={finished['model']}"]))


@pytest.mark.parametrize(
    "change, message",
    [
        ("curriculum=[{from_step: 5}, {from_step: 5}]", r"curriculum\.1\.from_step.*above.*5"),
        ("curriculum=[{from_step: 5, data: {weights: [1, 2]}}]", r"curriculum\.0\.data\.weights.*2 numbers for 1"),
        ("curriculum=[{from_step: 5, data: {sequence_length: 65}}]", r"curriculum\.0\.data\.sequence_length.*64"),
        ("curriculum=[{from_step: 5, data: {weight: [1]}}]", r"curriculum\.0\.data\.weight.*weights"),
        ("curriculum=[{from_step: 5, warmup_steps: 2}]", r"curriculum\.0\.warmup_steps.*lr_scheduler_type"),
        (
            "curriculum=[{from_step: 5, optimizer: {muon: {rule: normoun}}}]",
            r"curriculum\.0\.optimizer\.muon.*did you mean normuon",
        ),
        (
            "curriculum=[{from_step: 5, optimizer: {muon: {rule: hyperball, weight_decay: 0.1}}}]",
            r"curriculum\.0\.optimizer\.muon.*no weight_decay",
        ),
        ("data.sources.0.weight=0", r"data\.sources.*weight 0"),
        ("model.init_from=3", r"model\.init_from"),
    ],
)
def test_wrong_parts_are_named(workspace: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(workspace / "tiny.yaml", [change])


def test_an_unknown_schedule_is_named_before_data_are_prepared(workspace: Path) -> None:
    changes = ["name=unknown", "curriculum=[{from_step: 5, lr_scheduler_type: lineer}]"]
    with pytest.raises(ConfigError, match=r"curriculum\.0\.lr_scheduler_type"):
        run.train(load_config(workspace / "tiny.yaml", changes))

"""`optimizer.groups` of a configuration: in a real run, in the plan, in an AdamW run, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from muon_dist.bench.host import measure
from muon_dist.cli import main
from muon_dist.config import load_config
from muon_dist.config.routing import routing_rules
from muon_dist.errors import ConfigError
from muon_dist.planner.cli import routed, unpack
from muon_dist.routing import Override, SplitRule
from muon_dist.train import build, run
from tests.optim.plain_groups import GROUPS, RATES, Plain, batch, model, settings

OVERRIDES = [
    f"optimizer.groups={json.dumps(GROUPS)}",
    f"optimizer.muon.lr={RATES['lr']}",
    f"optimizer.muon.weight_decay={RATES['weight_decay']}",
    f"optimizer.adamw.lr={RATES['adamw_lr']}",
    f"optimizer.adamw.weight_decay={RATES['adamw_weight_decay']}",
]
UNTIED = "model.tie_word_embeddings=false"


def command(arguments: list[str]) -> Any:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code


def optimizer_of(path: Path, net: Any, *overrides: str) -> Any:
    config = load_config(path, [*OVERRIDES, *overrides])
    factory, options = build.optimizer_factory(config, build.routing_table(config, net))
    return factory()(net, **options)


def test_each_parameter_has_the_options_of_its_entry(workspace: Path) -> None:
    net = model()
    optimizer, plain = optimizer_of(workspace / "tiny.yaml", net), Plain(dict(net.named_parameters()))
    for step in range(3):
        optimizer.zero_grad()
        net(input_ids=batch(step), labels=batch(step)).loss.backward()
        plain.step({n: p.grad for n, p in net.named_parameters()})
        optimizer.step()
    plain.check(dict(net.named_parameters()))


def test_a_run_with_adamw_keeps_what_is_adamws_in_both(workspace: Path) -> None:
    net = model()
    optimizer = optimizer_of(workspace / "tiny.yaml", net, "optimizer.name=adamw")
    assert isinstance(optimizer, torch.optim.AdamW)
    names = {id(p): n for n, p in net.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    for name in names.values():
        chosen = settings(name)
        adamw = RATES["adamw_lr"], RATES["adamw_weight_decay"]
        assert found[name] == (adamw if chosen["rule"] else (chosen["lr"], chosen["weight_decay"])), name


def test_a_run_logs_and_records_its_groups(workspace: Path, tmp_path: Path) -> None:
    settings = [*OVERRIDES, UNTIED, "trainer.max_steps=2", "trainer.save_strategy='no'"]
    root = Path(run.train(load_config(workspace / "tiny.yaml", settings), run_dir=str(tmp_path))["run"])
    lines = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if "loss" in line)
    assert (first["lr/muon"], first["lr/muon lm_head"], first[r"lr/muon .*\.q_proj"]) == (0.02, 0.01, 0.013)
    routes = {r["fqn"]: r for r in json.loads((root / "routing.json").read_text())["routes"]}
    assert routes["lm_head.weight"]["group"] == {"pattern": "lm_head", "options": {"lr": 0.01, "rule": "hyperball"}}
    assert "group 'lm_head': lr 0.01, rule hyperball" in (root / "routing.txt").read_text()
    again = load_config(root / "config.yaml")
    assert [g.pattern for g in again.optimizer.groups] == [g["pattern"] for g in GROUPS]


def test_short_forms_and_groups_are_read_in_one_place(workspace: Path) -> None:
    config = load_config(workspace / "tiny.yaml", [
        "optimizer.routing.overrides=[{pattern: '.*down_proj', algorithm: adamw}]",
        "optimizer.routing.split=[{pattern: '.*q_proj', heads: 4}]",
        "optimizer.groups=[{pattern: '.*k_proj', lr: 0.5, split: {sizes: [16, 16]}}]",
    ])  # fmt: skip
    rules = routing_rules(config.optimizer)
    assert rules["overrides"] == [Override(".*down_proj", "adamw")]
    assert rules["splits"] == [SplitRule(".*q_proj", heads=4)]
    (entry,) = rules["groups"]
    assert (entry.pattern, dict(entry.options), entry.split.sizes) == (".*k_proj", {"lr": 0.5}, (16, 16))


@pytest.mark.parametrize("layout", ["zero1", "zero3", "fsdp2"])
def test_the_plan_knows_groups(workspace: Path, capsys: pytest.CaptureFixture[str], layout: str) -> None:
    arguments = ["plan", str(workspace / "tiny.yaml"), UNTIED, *OVERRIDES, "--gpus-per-node", "2", "--layout", layout]
    assert command([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["matrices"] == 2 * 4 + 2 * 5 + 1 + 1


@pytest.mark.parametrize("layout", ["ddp", "zero1", "zero3", "fsdp2"])
def test_a_step_is_counted_with_groups(workspace: Path, layout: str) -> None:
    config = load_config(workspace / "tiny.yaml", [*OVERRIDES, UNTIED])
    found = measure(*routed(config), *unpack(config), layout, 8, 1)
    assert found["collectives"] > 0 and found["newton_schulz"]["matrices"] > 0


@pytest.mark.parametrize(("entry", "key", "words"), [
    ("{pattern: '.*q_proj', algoritm: adamw}", "optimizer.groups.0.algoritm", "unknown key; did you mean algorithm?"),
    ("{pattern: '.*q_proj', use_muon: false}", "optimizer.groups.0.use_muon", 'unknown key: write algorithm: "muon"'),
    ("{pattern: '.*q_proj', num_heads: 4}", "optimizer.groups.0.num_heads", "unknown key: write split: {heads: N}"),
    ("{pattern: '.*q_proj', lr: '0.1'}", "optimizer.groups.0.lr", "should be a valid number, not '0.1'"),
    ("{pattern: '.*q_proj', lr: -1}", "optimizer.groups.0.lr", "greater than or equal to 0"),
    ("{pattern: '.*q_proj', algorithm: adam}", "optimizer.groups.0.algorithm", "did you mean adamw"),
    ("{pattern: '.*q_proj', scale: rms}", "optimizer.groups.0.scale", "'rms' is not one of match_rms_adamw"),
    ("{lr: 0.1}", "optimizer.groups.0.pattern", "this key is needed"),
    ("{pattern: '*.q_proj', lr: 0.1}", "optimizer.groups.0.pattern", "at position 0. If it is meant as a glob"),
    ("{pattern: lm_head, split: {heads: 2, haeds: 2}}", "optimizer.groups.0.split.haeds", "did you mean heads?"),
    ("{pattern: '.*q_proj', split: {}}", "optimizer.groups.0.split", "needs exactly one of heads and sizes"),
    ("{pattern: '.*q_proj', rule: normuom}", "optimizer.groups.0", "rule 'normuom' is unknown (did you mean norm"),
    ("{pattern: '.*q_proj', rule_options: {beta2: 0.9}}", "optimizer.groups.0", "rule 'muon' has no option 'beta2'"),
    ("{pattern: '.*q_proj', algorithm: adamw, scale: none}", "optimizer.groups.0", "'scale' is an option of Muon"),
])  # fmt: skip
def test_a_wrong_entry_is_one_line_with_its_key(workspace: Path, entry: str, key: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(workspace / "tiny.yaml", [f"optimizer.groups=[{entry}]"])
    text = str(caught.value)
    assert f": {key}: " in text and words in text and "\n" not in text, text


def test_a_pattern_that_matches_nothing_ends_a_run_with_code_4(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = "optimizer.groups=[{pattern: '.*q_projj', lr: 0.1}]"
    assert command(["train", str(workspace / "tiny.yaml"), wrong, "--run-dir", str(tmp_path)]) == 4
    assert "group '.*q_projj' matches no parameter" in capsys.readouterr().err

"""Groups by pattern: what each entry does, what is refused, and a rule that was changed afterwards."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import muon_dist
from muon_dist import Muon, MuonFactory, param_groups
from muon_dist.errors import ConfigError, RoutingError
from muon_dist.routing import Override, Split, SplitRule, route
from tests.optim.plain_groups import GROUPS, RATES, Plain, batch, model, settings

FP32 = {"ns_dtype": torch.float32}


def made(how: str) -> tuple[Any, Muon]:
    net = model()
    if how == "factory":
        return net, MuonFactory()(net, groups=GROUPS, print_routing=False, **RATES, **FP32)
    if how == "model":  # RATES of AdamW have no argument there: two more entries, behind all others
        rest = [
            {"pattern": r".*layernorm.*", "lr": 0.003},
            {"pattern": r".*\.[kvo]_proj", "lr": 0.02, "weight_decay": 0.1},
        ]
        groups = [dict(g) for g in (*GROUPS, *rest)]
        groups[3]["weight_decay"] = 0.05  # of down_proj
        return net, Muon(net, lr=0.02, weight_decay=0.1, groups=groups, **FP32)
    return net, Muon(param_groups(net, groups=GROUPS, **RATES), **FP32)


@pytest.mark.parametrize("how", ["param_groups", "model", "factory"])
def test_each_parameter_has_the_options_of_its_entry(how: str) -> None:
    net, optimizer = made(how)
    plain = Plain(dict(net.named_parameters()))
    for step in range(4):
        optimizer.zero_grad()
        net(input_ids=batch(step), labels=batch(step)).loss.backward()
        plain.step({n: p.grad for n, p in net.named_parameters()})
        optimizer.step()
    plain.check(dict(net.named_parameters()))


@pytest.mark.parametrize("scheduler", [
    lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
])  # fmt: skip
def test_schedulers_multiply_the_rate_of_each_group(scheduler: Any) -> None:
    net, optimizer = made("param_groups")
    plain, schedule = Plain(dict(net.named_parameters())), scheduler(optimizer)
    names = dict(net.named_parameters())
    for step in range(3):
        optimizer.zero_grad()
        net(input_ids=batch(step), labels=batch(step)).loss.backward()
        plain.step({n: p.grad for n, p in names.items()}, schedule.get_last_lr()[0] / 0.02)
        optimizer.step()
        schedule.step()
    plain.check(names)
    assert optimizer.param_groups[0]["name"] == "muon" and optimizer.param_groups[0]["lr"] < 0.01


def test_groups_and_their_names() -> None:
    net, optimizer = made("param_groups")
    found = {n: g for g in optimizer.param_groups for n in g["param_names"]}
    assert found.keys() == {n for n, _ in net.named_parameters()}
    for name, group in found.items():
        wanted = settings(name)
        assert group["algorithm"] == ("adamw" if wanted["rule"] is None else "muon")
        assert (group["lr"], group["weight_decay"]) == (wanted["lr"], wanted["weight_decay"]), name
        assert group.get("rule", "muon") == (wanted["rule"] or "muon"), name
    names = [g["name"] for g in optimizer.param_groups]
    assert len(set(names)) == len(names)
    assert r"muon .*\.q_proj" in names and r"adamw_no_decay model\.layers\.0\..*" in names
    again = Muon(copy.deepcopy(optimizer.param_groups))
    assert [g["name"] for g in again.param_groups] == names


def test_short_forms_are_entries_of_the_same_grammar() -> None:
    short = route(model(), [Override(".*down_proj", "adamw")], [SplitRule(".*q_proj", heads=4)])
    entries = [{"pattern": ".*down_proj", "algorithm": "adamw"}, {"pattern": ".*q_proj", "split": {"heads": 4}}]
    net = model()
    by_pattern = param_groups(net, groups=entries)
    plain = param_groups(net, table=short)
    assert [(g["name"], g["param_names"], g.get("cuts")) for g in by_pattern] == [
        (g["name"], g["param_names"], g.get("cuts")) for g in plain
    ]
    dicts = param_groups(net, overrides=entries[:1], splits=[{"pattern": ".*q_proj", "heads": 4}])
    assert [g["param_names"] for g in dicts] == [g["param_names"] for g in plain]


def test_an_entry_decides_before_a_short_form() -> None:
    groups = [{"pattern": "lm_head", "algorithm": "adamw", "lr": 0.5}, {"pattern": ".*q_proj", "split": {"heads": 2}}]
    splits = [SplitRule(".*q_proj", heads=4), SplitRule(".*o_proj", heads=2)]
    made = param_groups(model(), groups=groups, overrides=[Override("lm_head", "muon")], splits=splits)
    found = {n: (g, i) for g in made for i, n in enumerate(g["param_names"])}
    assert found["lm_head.weight"][0]["lr"] == 0.5 and found["lm_head.weight"][0]["algorithm"] == "adamw"
    group, i = found["model.layers.0.self_attn.q_proj.weight"]
    assert group["cuts"][i]["heads"] == 2
    group, i = found["model.layers.0.self_attn.o_proj.weight"]
    assert group["cuts"][i]["heads"] == 2
    # an entry without an algorithm leaves it to the short form
    (head,) = (
        g for g in param_groups(model(), groups=[{"pattern": "lm_head", "lr": 0.5}],
                                overrides=[Override("lm_head", "muon")]) if g.get("lr") == 0.5
    )  # fmt: skip
    assert head["algorithm"] == "muon"


def test_an_entry_with_a_pattern_alone_keeps_later_ones_away() -> None:
    groups = [{"pattern": ".*q_proj"}, {"pattern": ".*_proj", "lr": 0.5}]
    rates = {n: g.get("lr") for g in param_groups(model(), groups=groups) for n in g["param_names"]}
    assert rates["model.layers.1.self_attn.q_proj.weight"] is None
    assert rates["model.layers.1.self_attn.k_proj.weight"] == 0.5


def test_a_rule_without_weight_decay_does_not_get_that_of_the_others() -> None:
    groups = [{"pattern": ".*q_proj", "rule": "hyperball"}, {"pattern": ".*k_proj", "rule": "namo"}]
    optimizer = Muon(param_groups(model(), weight_decay=0.3, groups=groups), nesterov=True, scale="spectral")
    found = {g["name"]: g for g in optimizer.param_groups}
    hyperball, namo, muon = (found[name] for name in ("muon .*q_proj", "muon .*k_proj", "muon"))
    assert (hyperball["weight_decay"], hyperball["scale"]) == (0.0, "none")
    assert (namo["weight_decay"], namo["nesterov"], namo["scale"]) == (0.3, False, "none")
    assert (muon["weight_decay"], muon["scale"]) == (0.3, "spectral")


def test_options_of_the_optimizer_hold_for_an_entry_of_the_same_rule() -> None:
    groups = [{"pattern": ".*q_proj", "rule": "normuon", "lr": 0.5}]
    optimizer = Muon(param_groups(model(), groups=groups), rule="normuon", rule_options={"beta2": 0.5}, scale="none")
    assert [(g["scale"], g["rule_options"]["beta2"]) for g in optimizer.param_groups if g["algorithm"] == "muon"] == [
        ("none", 0.5), ("none", 0.5),
    ]  # fmt: skip


def test_the_example_of_the_page_runs() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "groups.md").read_text(encoding="utf-8")
    found: dict[str, Any] = {"muon_dist": muon_dist, "model": model()}
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], found)
    rates = {g["name"]: g["lr"] for g in found["optimizer"].param_groups}
    assert rates[r"muon .*\.q_proj"] == 0.01 and rates["adamw_no_decay model\\.layers\\.0\\..*"] == 0.005
    assert yaml.safe_load(re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)[0])["optimizer"]["groups"] == [
        dict(g) for g in found["groups"][:2]
    ]


# What is refused ----------------------------------------------------------------------------------------------------

Q = {"pattern": ".*q_proj"}


@pytest.mark.parametrize(("entry", "words"), [
    ({**Q, "algoritm": "adamw"}, r"groups\[1\] \('\.\*q_proj'\): 'algoritm' is unknown: did you mean 'algorithm'\?"),
    ({**Q, "weight_decy": 0.1}, "'weight_decy' is unknown: did you mean 'weight_decay'"),
    ({"patern": ".*"}, r"groups\[1\]: 'patern' is unknown: did you mean 'pattern'"),
    ({**Q, "zzz": 1}, "'zzz' is unknown: use one of algorithm, lr, pattern, rule, rule_options, scale, split, weight"),
    ({**Q, "use_muon": False}, r"'use_muon' is not a key of an entry: write algorithm: \"muon\" or \"adamw\""),
    ({**Q, "num_heads": 4}, "'num_heads' is not a key of an entry: write split: {heads: N}"),
    ({**Q, "split_sizes": [2]}, "'split_sizes' is not a key of an entry: write split: {sizes"),
    ({**Q, "adjust_lr_fn": "original"}, "'adjust_lr_fn' is not a key of an entry: write scale"),
    ({**Q, "wd": 0.1}, "'wd' is not a key of an entry: write weight_decay"),
    ({**Q, "lr_mult": 2}, "'lr_mult' is not a key of an entry: write lr, which is absolute"),
    ({**Q, "params": []}, "'params' is not a key of an entry: write pattern"),
    ({"lr": 0.1}, r"groups\[1\]: pattern is missing: write a regular expression"),
    ({"pattern": None}, "pattern is missing: write"),
    ({"pattern": 3}, "pattern is 3: write"),
    ({"pattern": ""}, "pattern is '': write"),
    ({**Q, "lr": "0.1"}, "lr is '0.1': it must be a number"),
    ({**Q, "lr": True}, "lr is True: it must be a number"),
    ({**Q, "lr": -0.1}, "lr is -0.1: it must be at least 0"),
    ({**Q, "lr": float("nan")}, "lr is nan"),
    ({**Q, "lr": float("inf")}, "lr is inf: it must be finite"),
    ({**Q, "weight_decay": "x"}, "weight_decay is 'x'"),
    ({**Q, "algorithm": "adam"}, "algorithm 'adam' is unknown: did you mean 'adamw'"),
    ({**Q, "algorithm": "sgd"}, "algorithm 'sgd' is unknown: use one of"),
    ({**Q, "rule": "normuom"}, r"rule 'normuom' is unknown \(did you mean normuon\?\)"),
    ({**Q, "rule": "normuon", "rule_options": {"mu2": 0.9}}, "rule 'normuon' has no option 'mu2'.*it has beta2, eps"),
    ({**Q, "rule": "normuon", "rule_options": {"beta2": "x"}}, "beta2 of rule 'normuon' is 'x'"),
    ({**Q, "rule": "normuon", "rule_options": 3}, "rule_options is 3: it must be a dict"),
    ({**Q, "rule_options": 3}, "rule_options is 3: it must be a dict"),
    ({**Q, "rule": "hyperball", "weight_decay": 0.1}, "weight_decay is 0.1, but rule 'hyperball' has no weight_decay"),
    ({**Q, "scale": "rms"}, "scale 'rms' is unknown: use match_rms_adamw, spectral, unit_rms or none"),
    ({**Q, "algorithm": "adamw", "scale": "none"}, "'scale' is an option of Muon, but algorithm is 'adamw'"),
    ({**Q, "algorithm": "adamw", "rule": "namo"}, "'rule' is an option of Muon, but algorithm is 'adamw'"),
    ({**Q, "algorithm": "adamw", "split": {"heads": 2}}, "'split' is an option of Muon"),
    ({**Q, "split": 4}, r"split is 4: give \{\"heads\": N\}, \{\"sizes\": \[\.\.\.\]\}, or \"heads\""),
    ({**Q, "split": {"haeds": 4}}, "split: 'haeds' is unknown: did you mean 'heads'"),
    ({**Q, "split": {"num_heads": 4}}, "split: 'num_heads' is not a key of an entry: write heads"),
    ({**Q, "split": {"sizes": 4}}, "sizes of split is 4"),
    (3, r"groups\[1\] is 3: give a dict with \"pattern\""),
])  # fmt: skip
def test_an_entry_that_cannot_be_used_is_refused_by_name(entry: Any, words: str) -> None:
    for make in (
        lambda groups: param_groups(model(), groups=groups),
        lambda groups: MuonFactory()(model(), lr=0.1, groups=groups, print_routing=False),
    ):
        with pytest.raises(ConfigError, match=words):
            make([{"pattern": "lm_head"}, entry])


@pytest.mark.parametrize(("entries", "words"), [
    ([{"pattern": ".*q_prj", "lr": 0.1}], r"'\.\*q_prj' matches no parameter .*closest name is .*q_proj\.weight"),
    ([{"pattern": "q_proj", "lr": 0.1}], r"it is a part of .*q_proj\.weight: write '\.\*q_proj\.\*'"),
    ([{"pattern": "(", "lr": 0.1}], r"group '\(' is not a valid regular expression"),
    ([{"pattern": "*.q_proj", "lr": 0.1}], r"nothing to repeat.*If it is meant as a glob, write '\.\*\\\\\.q_proj'"),
    ([{"pattern": r".*norm.*", "algorithm": "muon"}], "norm.weight .20. has fewer than two axes"),
    ([{"pattern": r".*norm.*", "rule": "namo"}], "matches only parameters that go to AdamW: .*norm"),
    ([{"pattern": "lm_head", "split": {"heads": 2}}], "'lm_head' matches only parameters that go to AdamW: lm_head"),
    ([{"pattern": ".*q_proj", "split": {"heads": 5}}], r"heads = 5 does not divide .*q_proj\.weight \(12, 20\)"),
    ([{"pattern": ".*q_proj", "split": {"sizes": [6, 7]}}], "the sizes add up to 13, which does not fit .* 12 rows"),
    ([{"pattern": ".*q_proj", "split": {}}], "needs exactly one of heads and sizes"),
    ([{"pattern": ".*q_proj", "split": {"heads": 2, "sizes": [6, 6]}}], "needs exactly one of heads and sizes"),
    ([{"pattern": ".*q_proj", "split": {"heads": 2.0}}], "whole numbers of at least 1"),
    ([{"pattern": ".*", "lr": 0.1}, {"pattern": "lm_head", "lr": 0.2}],
     r"group 'lm_head' decides about no parameter: the first match wins, and the earlier group '\.\*'"),
    ([{"pattern": ".*", "algorithm": "adamw", "lr": 0.1}], "no parameter reaches Muon"),
])  # fmt: skip
def test_an_entry_that_does_not_fit_the_model_is_refused_by_name(entries: list[Any], words: str) -> None:
    with pytest.raises(RoutingError, match=words):
        param_groups(model(), groups=entries)


@pytest.mark.parametrize(("given", "words"), [
    ({"groups": {"pattern": ".*"}}, "groups is .*: give a list of dicts"),
    ({"groups": ".*"}, "groups is '.*': give a list"),
    ({"overrides": [{"pattern": "lm_head", "algoritm": "muon"}]}, "did you mean 'algorithm'"),
    ({"overrides": [{"pattern": "lm_head"}]}, r"overrides\[0\] \('lm_head'\): algorithm is missing"),
    ({"splits": [{"pattern": ".*q_proj", "num_heads": 2}]}, "'num_heads' is not a key of an entry"),
])  # fmt: skip
def test_short_forms_as_dicts_are_checked_as_well(given: dict[str, Any], words: str) -> None:
    for make in (
        lambda: param_groups(model(), **given),
        lambda: MuonFactory()(model(), lr=0.1, print_routing=False, **given),
    ):
        with pytest.raises(ConfigError, match=words):
            make()


def test_groups_need_a_model_and_a_table_is_not_changed_by_them() -> None:
    net = model()
    with pytest.raises(ConfigError, match=r"params is not a model: write Muon\(model, groups"):
        Muon(net.model.layers[0].mlp.parameters(), groups=[{"pattern": ".*", "lr": 0.1}])
    with pytest.raises(ConfigError, match="table and groups are both given"):
        param_groups(net, table=route(net), groups=[{"pattern": ".*q_proj", "lr": 0.1}])
    with pytest.raises(ConfigError, match="table and overrides are both given"):
        MuonFactory()(net, lr=0.1, table=route(net), overrides=[Override("lm_head", "muon")], print_routing=False)
    assert param_groups(net, groups=[{"pattern": ".*q_proj", "split": Split(heads=2)}])[0]["name"] == "muon"


def test_options_of_the_factorys_rule_are_known_before_the_model() -> None:
    wrong = {"groups": [{"pattern": ".*q_proj", "rule_options": {"beta2": 0.9}}]}
    with pytest.raises(ConfigError, match="rule 'muon' has no option 'beta2'"):
        MuonFactory()(model(), lr=0.1, print_routing=False, **wrong)
    right = MuonFactory()(model(), lr=0.1, rule="normuon", print_routing=False, **wrong)
    options = {g["name"]: g["rule_options"]["beta2"] for g in right.param_groups if g["algorithm"] == "muon"}
    assert options == {"muon": 0.95, "muon .*q_proj": 0.9}
    with pytest.raises(ConfigError, match=r"group muon \.\*q_proj: rule 'muon' has no option 'beta2'"):
        Muon(param_groups(model(), **wrong))


def test_a_rule_in_a_group_of_adamw_is_refused() -> None:
    net = model()
    groups = param_groups(net)
    groups[1]["rule"] = "normuon"
    with pytest.raises(ConfigError, match="group adamw: 'rule' is an option of Muon, but algorithm is 'adamw'"):
        Muon(groups)


# What is changed later ----------------------------------------------------------------------------------------------


def stepped(optimizer: Muon, net: Any, step: int = 0) -> None:
    net(input_ids=batch(step), labels=batch(step)).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("when", [0, 1])
@pytest.mark.parametrize(("group", "change", "words"), [
    (0, {"algorithm": "adamw"}, "group muon: algorithm was 'muon' when the optimizer was made, and is 'adamw' now"),
    (1, {"algorithm": "muon"}, "group adamw.*: algorithm was 'adamw' when the optimizer was made, and is 'muon' now"),
    (0, {"rule": "normuon"}, "group muon: rule was 'muon' when the optimizer was made, and is 'normuon' now"),
    (1, {"rule": "normuon"}, "group adamw.*: rule was 'muon'"),
    (3, {"rule": "namo"}, r"rule was 'normuon' when the optimizer was made, and is 'namo' now"),
    (0, {"rule_options": {"beta2": 0.5}}, r"rule_options was \[\] .* is \['beta2'\] now"),
    (3, {"rule_options": {"beta2": 0.5}}, r"rule_options was \['beta2', 'eps'\] .* is \['beta2'\] now"),
    (3, {"rule_options": None}, r"rule_options was \['beta2', 'eps'\] .* is \[\] now"),
])  # fmt: skip
@pytest.mark.each_choice
def test_the_next_step_refuses_another_algorithm_or_rule(when: int, group: int, change: Any, words: str) -> None:
    net, optimizer = made("param_groups")
    assert optimizer.param_groups[3]["name"].startswith("muon .*") and optimizer.param_groups[3]["rule"] == "normuon"
    for step in range(when):
        stepped(optimizer, net, step)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    optimizer.param_groups[group].update(change)
    with pytest.raises(ConfigError, match=words):
        stepped(optimizer, net, when)
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


def test_what_may_change_later_takes_effect() -> None:
    net, optimizer = made("param_groups")
    plain = Plain(dict(net.named_parameters()))
    for step in range(3):
        optimizer.zero_grad()
        net(input_ids=batch(step), labels=batch(step)).loss.backward()
        plain.step({n: p.grad for n, p in net.named_parameters()})
        optimizer.step()
        for rule in plain.rules.values():
            rule.momentum = 0.8
            if "beta2" in rule.options:
                rule.options["beta2"] = 0.5
        for group in optimizer.param_groups:
            group["momentum"] = 0.8
            if "rule_options" in group and "beta2" in group["rule_options"]:
                group["rule_options"]["beta2"] = 0.5
    plain.check(dict(net.named_parameters()))

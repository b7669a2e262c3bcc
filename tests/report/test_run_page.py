"""The page of a run: whole, unfinished, incomplete, damaged, and hostile."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from muon_dist.errors import DataError
from muon_dist.report.run_page import render, write_run_page
from muon_dist.report.run_record import read_run

CONFIG = {
    "name": "<script>alert(1)</script>",
    "model": {"model_type": "llama", "hidden_size": 8},
    "optimizer": {"name": "muon", "muon": {"lr": 0.02}},
    "trainer": {"hub_token": "hf_verysecret", "max_steps": 40},
    "diagnostics": {"every": 10},
}
MATRICES = [f"model.layers.{layer}.{kind}.weight" for layer in range(3) for kind in ("attn.q_proj", "mlp.up_proj")]


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def spectrum(name: str, step: int, value: float) -> dict[str, Any]:
    layer, kind = int(name.split(".")[2]), ".".join(name.split(".")[3:5])
    measures = ("s_mean", "s_max", "flatness", "stable_rank", "nuclear_rank", "nuclear_rank_ratio", "effective_rank")
    more = ("residual", "max_deviation", "cosine")
    shape = {"rows": 8, "cols": 8, "layer": layer, "type": kind}
    return {"step": step, "round": step, "matrix": name, **shape, **dict.fromkeys((*measures, *more), value)}


@pytest.fixture()
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "tried")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a finished run, drawn once."""
    root = make_run(tmp_path_factory.mktemp("page") / "tried")
    path = write_run_page(root)
    assert path == root / "report.html"
    return path.read_text()


def make_run(root: Path) -> Path:
    """The folder of a finished run on two ranks."""
    root.mkdir()
    (root / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (root / "environment.json").write_text(
        json.dumps({"command": ["muon-dist", "train"], "packages": {"torch": "2.13.0"}, "variables": {"RANK": "0"}})
    )
    route = {"shape": [8, 8], "algorithm": "muon", "reason": "matrix", "aliases": [], "frozen": False}
    totals = {"muon": {"parameters": 6, "matrices": 6, "elements": 384, "share": 0.75}}
    routing = {"routes": [{"fqn": name, **route} for name in MATRICES], "totals": totals}
    (root / "routing.json").write_text(json.dumps(routing))
    owners = [{"name": n, "rows": 8, "cols": 8, "owner": i % 2, "flops": 1000} for i, n in enumerate(MATRICES)]
    loads = [{"rank": r, "matrices": 3, "flops": 3000, "momentum": 192} for r in range(2)]
    plan = {"layout": "replicated", "policy": "balanced", "world_size": 2, "matrices": owners, "loads": loads}
    (root / "ownership.json").write_text(json.dumps(plan))
    metrics: list[dict[str, Any]] = []
    for step in range(10, 50, 10):
        figures = {"loss": 8 / step, "lr/muon": 0.02, "lr/adamw": 0.01, "tokens_per_s": 1000.0, "tokens": step}
        metrics.append({"step": step, "time": 1e9 + step, **figures, "grad_norm/muon": 1.0})
    metrics.append({"step": 40, "time": 1e9 + 41, "eval_loss": 0.25, "eval_bits_per_byte": 0.5})
    write_lines(root / "metrics.jsonl", metrics)
    events = [("started", 0, 1e9), ("checkpoint", 20, 1e9 + 20), ("checkpoint", 40, 1e9 + 40), ("ended", 40, 1e9 + 42)]
    write_lines(
        root / "events.jsonl",
        [{"event": e, "step": s, "time": t, "world_size": 2, "steps": 40} for e, s, t in events],
    )
    for rank in range(2):
        owned = MATRICES[rank::2]
        write_lines(
            root / "spectra" / f"rank-{rank}.jsonl",
            [spectrum(n, s, 0.1 + s / 100) for s in (1, 10, 20) for n in owned],
        )
    checkpoint = root / "checkpoints" / "checkpoint-40"
    checkpoint.mkdir(parents=True)
    for name in ("trainer_state.json", "manifest.json"):
        (checkpoint / name).write_text("{}")
    (root / "summary.json").write_text(json.dumps({"validation_loss": 0.25, "steps": 40, "sample": "the <b>cat</b>"}))
    return root


class Page(HTMLParser):
    """Tags and attributes of a page; fails on a tag that is not closed as it was opened."""

    VOID = ("meta", "link", "br", "use", "image")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words += data


def test_a_finished_run(text: str) -> None:
    page = Page(text)
    assert "What is missing" not in page.words and "finished" in page.words
    # loss, learning rates, throughput, norms; the scale and two heat maps; six measures; the load of the ranks
    assert [tag for tag, _ in page.tags].count("svg") == 4 + 3 + 6 + 1
    for word in ("0.2500", "attn.q_proj", "rank 1", "checkpoint", "2.13.0", "no longer on disk"):
        assert word in page.words, word
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_it_loads_nothing_and_runs_nothing(text: str) -> None:
    for tag, attributes in Page(text).tags:
        assert tag not in ("script", "iframe", "object", "a"), tag
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "src", "xlink:href"):
                assert value is not None and value.startswith(("#", "data:")), (tag, value)


def test_text_from_files_is_escaped_and_secrets_are_not_shown(text: str) -> None:
    assert "hf_verysecret" not in text
    assert "<script>" not in text and "the <b>cat" not in text
    assert "<script>alert(1)</script>" in Page(text).words and "the <b>cat</b>" in Page(text).words


def test_colours_follow_the_page(text: str) -> None:
    assert "currentColor" in text and "var(--grid)" in text
    assert "#010203" not in text and "#040506" not in text


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("config.yaml", "config.yaml is missing"),
        ("environment.json", "environment.json is missing"),
        ("routing.json", "routing.json is missing"),
        ("ownership.json", "ownership.json is missing: it is written after the first step"),
        ("metrics.jsonl", "metrics.jsonl is missing"),
        ("events.jsonl", "events.jsonl is missing"),
        ("summary.json", "summary.json is missing: the run has not finished"),
        ("spectra/rank-1.jsonl", "no file from rank 1"),
    ],
)
def test_a_missing_file_is_named(run: Path, name: str, problem: str) -> None:
    (run / name).unlink()
    problems = read_run(run).problems
    assert len(problems) == 1 and problem in problems[0]


def test_a_page_of_the_log_alone(run: Path) -> None:
    for path in [p for p in run.rglob("*") if p.is_file() and p.name != "metrics.jsonl"]:
        path.unlink()
    record = read_run(run)
    page = Page(render(record))
    assert all(problem in page.words for problem in record.problems)
    assert [tag for tag, _ in page.tags].count("svg") == 4


def test_an_unfinished_run(run: Path) -> None:
    (run / "summary.json").unlink()
    (run / "checkpoints" / "checkpoint-40" / "manifest.json").unlink()
    words = Page(render(read_run(run))).words
    assert "not finished: last logged at step 40 of 40" in words and "the save was cut off" in words


def test_damage_is_named(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('[1, 2]\n{"loss": 1.0}\n{"step": 50, "lo')
    with (run / "spectra" / "rank-0.jsonl").open("a") as file:
        file.write("\0\0\n")
    (run / "environment.json").write_text('{"command": ')
    (run / "routing.json").write_text("{}")
    record = read_run(run)
    joined = "\n".join(record.problems)
    assert "metrics.jsonl: 3 damaged lines left out (lines 6, 7, 8)." in joined
    assert "spectra/rank-0.jsonl: 1 damaged line left out (line 10)." in joined
    assert "environment.json cannot be read" in joined
    assert "routing.json lacks routes, totals" in joined
    assert len(record.training) == 4
    Page(render(record))


def test_parts_of_a_curriculum_and_losses_of_sources(run: Path) -> None:
    parts = [
        {"from_step": 20, "data": {"weights": [1, 3], "packing": None}, "optimizer": {"muon": {"rule": "normuon"}}},
        {"from_step": 90, "lr_scheduler_type": "linear", "warmup_steps": 0},
    ]
    (run / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "curriculum": parts}))
    before = Page(render(read_run(run)))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 40, "eval_loss": 0.3, "eval_loss/books": 0.2, "eval_loss/code": 0.4}) + "\n")
    text = render(read_run(run))
    page = Page(text)
    assert "<td>2</td><td>20</td><td>data.weights [1, 3], optimizer.muon.rule normuon</td>" in text
    assert "<td>3</td><td>90 (not begun)</td><td>lr_scheduler_type linear</td>" in text
    assert "a part of the curriculum begins" in page.words and "code: 0.4 at step 40" in page.words
    assert [tag for tag, _ in page.tags].count("svg") == [tag for tag, _ in before.tags].count("svg") + 1
    (run / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "curriculum": 3}))
    Page(render(read_run(run)))


def test_values_that_are_not_finite(run: Path) -> None:
    lines = [{"step": 10, "time": 0, "loss": None}, {"step": 20, "time": 0, "loss": float("nan"), "lr/muon": 0.0}]
    write_lines(run / "metrics.jsonl", lines)
    write_lines(run / "spectra" / "rank-0.jsonl", [{**spectrum(MATRICES[0], 1, 0.5), "flatness": None}])
    Page(render(read_run(run)))


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"name": "new"}))
    record = read_run(tmp_path)
    words = Page(render(record)).words
    assert "no step was logged" in words and "metrics.jsonl is missing" in words


def test_adamw_owns_nothing(run: Path) -> None:
    (run / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "optimizer": {"name": "adamw"}}))
    (run / "ownership.json").unlink()
    assert read_run(run).problems == []


def test_refused(tmp_path: Path, run: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        read_run(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="not a run folder"):
        read_run(tmp_path / "empty")
    with pytest.raises(DataError, match=re.escape(f"cannot write {tmp_path}")):
        write_run_page(run, tmp_path)


def test_the_heat_map_keeps_what_was_measured_last() -> None:
    from muon_dist.report.figures import by_type, newest

    first, second = MATRICES[0], MATRICES[2]
    lines = [spectrum(first, 1, 0.2), spectrum(second, 1, 0.4), spectrum(second, 10, 0.8)]
    assert by_type(lines, "flatness") == {"attn.q_proj": ([1, 10], [pytest.approx(0.3), pytest.approx(0.5)])}
    assert {name: r["step"] for name, r in newest(lines, "flatness")[10].items()} == {first: 1, second: 10}


def test_rounding_does_not_look_like_a_difference() -> None:
    """The curves of two runs that differ by 1e-9 filled the figure, on an axis that began at 6.19321427."""
    from muon_dist.report.figures import lines

    series = {"one": ([1, 2], [6.193214270, 6.193214271]), "two": ([1, 2], [6.193214275, 6.193214279])}
    drawn = lines("x", series, ylabel="eval_loss", description="two runs")
    assert drawn is not None and "6.193" in drawn and "+6.19" not in drawn

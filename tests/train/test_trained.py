"""Commands for a finished run: eval with text and other tokens, tasks, the log as a table, runs side by side."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import muon_dist
from muon_dist import cli
from muon_dist.config import load_config
from muon_dist.errors import ConfigError, DataError
from muon_dist.json_files import append_line
from muon_dist.report.compare_page import write_compare_page
from muon_dist.report.log_table import as_csv, as_text, read_log
from muon_dist.train import corpus, run
from muon_dist.train.compare import compare
from muon_dist.train.models import evaluate_folder, export_folder
from muon_dist.train.tasks import evaluate_tasks
from tests.report.test_run_page import Page, make_run

# ---- text


def test_eval_of_raw_text(finished: dict[str, Any], tmp_path: Path) -> None:
    """Against the definition: bits to predict the text's tokens, over its bytes. As --text, and as --data."""
    text = "the cat sat by the mat. " * 20
    (tmp_path / "own.txt").write_text(text)
    found = evaluate_folder(finished["run"], text=tmp_path / "own.txt")
    assert evaluate_folder(finished["run"], data=tmp_path / "own.txt") == found
    model = AutoModelForCausalLM.from_pretrained(finished["model"])
    tokenizer = AutoTokenizer.from_pretrained(finished["model"])
    ids = torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
    samples = [ids[i : i + 16] for i in range(0, len(ids) - 15, 16)]
    with torch.no_grad():
        nats = [
            functional.cross_entropy(model(s[None]).logits[0, :-1], s[1:], reduction="sum").item() for s in samples
        ]
    assert found["predicted_tokens"] == 15 * len(samples)
    assert found["loss"] == pytest.approx(math.fsum(nats) / (15 * len(samples)), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2) * len(ids) / len(text), rel=1e-5)
    assert (found["step"], found["data"]) == (8, str(tmp_path / "own.txt"))
    (tmp_path / "short.txt").write_text("the cat")
    assert evaluate_folder(finished["run"], text=tmp_path / "short.txt")["samples"] == 1


def test_data_of_eval_that_moved_are_found_or_asked_for(
    finished: dict[str, Any], workspace: Path, tmp_path: Path
) -> None:
    """A whole `data.dir` works like its `tokens`, a URL like a path; if the data no longer exist, the message asks for
    other data."""
    moved, data = tmp_path / "moved run", tmp_path / "data"
    shutil.copytree(finished["run"], moved)
    shutil.copytree(workspace / "data", data)
    wanted = evaluate_folder(finished["run"])["loss"]
    assert evaluate_folder(moved, data=data)["loss"] == evaluate_folder(moved, data=data / "tokens")["loss"] == wanted
    text = tmp_path / "a.txt"
    text.write_text("the cat sat by the mat. " * 9)
    assert evaluate_folder(moved, text=f"file://{text}")["loss"] == evaluate_folder(moved, text=text)["loss"]
    config = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(config.replace(f"{workspace}/data", f"{workspace}/gone"))
    with pytest.raises(DataError, match=r"gone/tokens: the data of the run no longer exist: .*--data or --text"):
        evaluate_folder(moved)
    with pytest.raises(ConfigError, match=r"--sequence-length 65: the model has 64 positions"):
        evaluate_folder(moved, text=text, sequence_length=65)


def test_tokens_of_another_tokenizer_are_refused(finished: dict[str, Any], workspace: Path, tmp_path: Path) -> None:
    """Tokens of the run's own tokenizer are accepted, for an export too."""
    foreign = load_config(
        workspace / "tiny.yaml",
        [f"data.dir={tmp_path}/data", "tokenizer.vocab_size=310"],
    )
    corpus.prepare(foreign)
    with pytest.raises(DataError, match=r"tokens are of another tokenizer .*--text"):
        evaluate_folder(finished["run"], data=corpus.tokens_folder(foreign))
    own = corpus.tokens_folder(load_config(workspace / "tiny.yaml"))
    export_folder(finished["run"], tmp_path / "exported")
    for folder in (finished["run"], finished["checkpoint"], tmp_path / "exported"):
        assert evaluate_folder(folder, data=own, sequence_length=16, max_samples=2)["samples"] == 2
    with pytest.raises(ConfigError, match="--data and --text"):
        evaluate_folder(finished["run"], data=own, text=own)


# ---- tasks

TASK = """
task: animals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{[right, wrong]}}}}"
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_tasks(finished: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of lm-evaluation-harness, where it is installed; else a message that says what to install."""
    rows = [{"start": "the cat sat by the", "right": " mat", "wrong": "zq" * 12}] * 3
    (tmp_path / "animals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "animals.yaml").write_text(TASK.format(file=tmp_path / "animals.jsonl"))
    with pytest.raises(ConfigError, match="no YAML file of a task"):
        evaluate_tasks(finished["run"], tmp_path / "nothing")
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="pip install lm-eval"):
            evaluate_tasks(finished["run"], tmp_path / "animals.yaml")
        return
    found = evaluate_tasks(finished["run"], tmp_path)
    assert found["step"] == 8 and found["tasks"]["animals"]["acc"] == 1.0
    (tmp_path / "animals.jsonl").unlink()
    with pytest.raises(DataError, match="lm-evaluation-harness"):
        evaluate_tasks(finished["run"], tmp_path / "animals.yaml")


# ---- the log


def test_the_log_as_a_table(finished: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    logged = [json.loads(line) for line in Path(finished["metrics"]).read_text().splitlines()]
    losses = [line["loss"] for line in logged if "loss" in line]
    rows = list(csv.DictReader(io.StringIO(as_csv(read_log(finished["run"])))))
    assert [float(row["loss"]) for row in rows] == losses and [int(row["step"]) for row in rows] == list(range(1, 9))
    assert float(rows[-1]["eval_loss"]) == finished["validation_loss"] and rows[0]["eval_loss"] == ""
    table = muon_dist.metrics(finished["run"])
    assert table["loss"].tolist() == losses and table.index.tolist() == list(range(1, 9))
    assert table.loc[8, "eval_loss"] == finished["validation_loss"] and math.isnan(table.loc[1, "eval_loss"])
    head, *lines = as_text(read_log(finished["run"])).splitlines()
    assert head.split()[:3] == ["step", "epoch", "loss"] and len(lines) == 8


def test_a_log_that_is_damaged_or_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="no such file"):
        muon_dist.metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{bad\n")
    with pytest.raises(DataError, match="no step was logged"):
        muon_dist.metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    capsys.readouterr()
    assert muon_dist.metrics(tmp_path).index.tolist() == [1]
    assert "note: metrics.jsonl: 1 damaged line left out (line 2)" in capsys.readouterr().err


# ---- runs side by side


def test_runs_on_one_page(finished: dict[str, Any], tmp_path: Path) -> None:
    """One legend, the same colour in every figure, values under the pointer, one size of text, no script."""
    other = make_run(tmp_path / "tried")  # no learning rate of its own is missing, but no gradient norm of all
    third = tmp_path / "third"
    shutil.copytree(other, third)
    text = write_compare_page([finished["run"], other, third], tmp_path / "out.html").read_text()
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.words.count("finished") == 3 and f"({third})" in page.words, "equal names are told apart"
    assert re.search(r"loss.*: 0\.2 at step 40", text.replace("\n", "")) is not None
    svgs = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(svgs) >= 6 and len({(a["viewbox"].split()[2], a["style"]) for a in svgs}) == 1
    assert text.count("legend") and "optimizer.muon.lr" not in page.words
    assert "data.sequence_length" in page.words, "a setting that differs"
    with pytest.raises(ConfigError, match="named twice"):
        write_compare_page([other, other], tmp_path / "out.html")
    with pytest.raises(SystemExit):
        cli.main(["report", str(other), str(third), "--step", "4", "--output", str(tmp_path / "step.html")])
    assert not (tmp_path / "step.html").exists(), "--step was ignored"


def test_runs_in_one_table(finished: dict[str, Any], tmp_path: Path) -> None:
    """Any two runs; their losses are compared at the last step that both have evaluated."""
    run, other = Path(finished["run"]), tmp_path / "longer"
    shutil.copytree(run, other)
    (other / "summary.json").unlink()
    append_line(other / "metrics.jsonl", {"step": 99, "eval_loss": 1.0})
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(re.sub(r"^name: .*$", "name: longer", config, flags=re.MULTILINE))
    options: dict[str, Any] = {"seeds": 1, "jobs": 1, "output": tmp_path}
    table = compare(run, [str(other)], lrs=None, **options)
    assert f"validation loss, all at step 8 {finished['validation_loss']:.4f} {finished['validation_loss']:.4f}" in (
        " ".join(table.split())
    )
    assert "finished" in table and "not finished: last logged at step 99" in table
    assert table.splitlines()[-1].split()[0] == "name" and table.splitlines()[-1].split()[2] == "longer"
    for wrong, lrs, message in (
        ([], None, "two or more"),
        ([str(run)], None, "each once"),
        ([str(other)], [0.1], "--lr"),
    ):
        with pytest.raises(ConfigError, match=message):
            compare(run, wrong, lrs=lrs, **options)


# ---- validation sources


def test_own_validation_sources(workspace: Path, tmp_path: Path) -> None:
    """All validation sources are evaluated, each has its loss, no training text is kept for validation; passes are
    logged."""
    for name, text in (("cats", "the cat sat by the mat. "), ("owls", "the owl hid by the tree. ")):
        (tmp_path / f"{name}.txt").write_text(text * 40)
    own = [f"{{path: {tmp_path}/{name}.txt}}" for name in ("cats", "owls")]
    settings = [f"data.validation_sources=[{', '.join(own)}]", f"data.dir={tmp_path}/data", "trainer.max_steps=2"]
    mixture = f"data.sources=[{{path: {workspace}/corpus}}, {{path: {tmp_path}/cats.txt, weight: 3.0}}]"
    config = load_config(workspace / "tiny.yaml", [*settings, mixture])
    out = run.train(config, run_dir=str(tmp_path / "runs"))
    lines = [json.loads(line) for line in Path(out["metrics"]).read_text().splitlines()]
    last = next(line for line in lines if "eval_loss" in line)
    each = [evaluate_folder(out["run"], text=tmp_path / f"{name}.txt") for name in ("cats", "owls")]
    for figures, source in zip(each, ("00-cats.txt", "01-owls.txt"), strict=True):
        assert last[f"eval_loss/{source}"] == pytest.approx(figures["loss"], rel=1e-5)
    tokens = [figures["predicted_tokens"] for figures in each]
    mean = sum(f["loss"] * n for f, n in zip(each, tokens, strict=True)) / sum(tokens)
    assert out["validation_loss"] == pytest.approx(mean, rel=1e-5)
    assert evaluate_folder(out["run"])["loss"] == pytest.approx(mean, rel=1e-5)
    samples = json.loads((Path(out["run"]) / "data.json").read_text())["samples"]
    second = next(line for line in lines if "loss" in line and line["step"] == 2)
    drawn = {name: round(second[f"passes/{name}"] * count) for name, count in samples["train"].items()}
    assert sum(drawn.values()) == 8 and drawn["01-cats.txt"] == 6, "three of four samples"
    manifest = json.loads((tmp_path / "data" / "tokens" / "manifest.json").read_text())
    assert all(source["splits"]["validation"]["tokens"] == 0 for source in manifest["sources"])

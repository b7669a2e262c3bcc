"""The chain: whole, tampered with, cut, resumed; and what `muon-dist verify` says of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from muon_dist.audit.chain import Chain, read_chain
from muon_dist.audit.verify import verify
from muon_dist.cli import app
from muon_dist.errors import AuditError, ConfigError
from muon_dist.report.run_page import render
from muon_dist.report.run_record import read_run

START = {"step": 0, "every": 2, "matrices": 1, "seed": 0, "layout": "replicated", "world_size": 2, "names": ["a", "b"]}


def audit(step: int, alarms: tuple[dict[str, object], ...] = ()) -> dict[str, object]:
    errors = {"momentum": 1e-8, "direction": 1e-6, "weight": 1e-8}
    return {
        "kind": "audit", "step": step, "matrix": "ab"[step // 2 % 2], "algorithm": "muon", "owner": step // 2 % 2,
        "auditor": 1 - step // 2 % 2, "errors": errors, "tolerance": {"momentum": 1e-6, "direction": 1e-5},
        "alarms": list(alarms),
    }  # fmt: skip


def written(path: Path, steps: range = range(2, 14, 2)) -> Chain:
    chain = Chain(path, writes=True)
    chain.start(START)
    for step in steps:
        chain.append(audit(step))
    return chain


@pytest.fixture()
def path(tmp_path: Path) -> Path:
    written(tmp_path / "audit.jsonl")
    return tmp_path / "audit.jsonl"


def change(path: Path, line: int, old: str, new: str) -> None:
    lines = path.read_text().splitlines(keepends=True)
    assert old in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(old, new)
    path.write_text("".join(lines))


def test_a_whole_chain(path: Path):
    found = verify(path.parent)
    assert found.good and found.lines == 7 and len(found.audits) == 6
    assert found.counts() == {"a": 3, "b": 3} and found.ranks() == {0: (3, 3), 1: (3, 3)}
    assert not found.gaps and sum(p.audits for p in found.periods()) == 6
    found.raise_if_bad()


@pytest.mark.parametrize(
    ("line", "old", "new", "said"),
    [
        (3, '"direction": 1e-06', '"direction": 1e-07', "line 3: changed"),
        (1, '"every": 2', '"every": 4', "line 1: changed"),
        (7, '"step": 12', '"step": 14', "line 7: changed"),
        (4, '{"', '{', "line 4: not a record"),
    ],
)  # fmt: skip
def test_a_changed_line_is_named(path: Path, line: int, old: str, new: str, said: str):
    change(path, line, old, new)
    problems = read_chain(path).problems
    assert len(problems) == 1 and problems[0].startswith(said)


def test_a_forged_digest_shows_in_the_next_line(path: Path):
    lines = path.read_text().splitlines()
    record = json.loads(lines[3])
    record["digest"] = "f" * 64
    lines[3] = json.dumps(record)
    path.write_text("\n".join(lines) + "\n")
    assert [p.partition(":")[0] for p in read_chain(path).problems] == ["line 4", "line 5"]


Lines = list[str]
BROKEN: dict[str, tuple[Callable[[Lines], Lines], list[str]]] = {
    "two lines removed": (lambda t: t[:2] + t[4:], ["line 3: 2 lines missing before it"]),
    "first line removed": (lambda t: t[1:], ["line 1: 1 line missing before it"]),
    "a line moved back": (
        lambda t: [*t[:2], t[3], t[2], *t[4:]],
        ["line 3: 1 line missing before it", "line 4: out of order, it was written as line 3 and comes after line 4",
         "line 5: changed, or the digest of the line before it was"],
    ),
    "a line twice": (
        lambda t: [*t[:4], t[3], *t[4:]], ["line 5: is line 4 once more"],
    ),
    "cut inside a line": (lambda t: [*t[:-1], t[-1][:-40]], ["line 7: cut off: it has no end",
                                                            "line 7: not a record with a digest"]),
    "no end of the last line": (lambda t: [*t[:-1], t[-1].rstrip()], ["line 7: cut off: it has no end"]),
    "empty": (lambda t: [], ["the file is empty"]),
    "only an end of line": (lambda t: ["\n"], ["the file is empty"]),
    "an empty line": (lambda t: [*t[:3], "\n", *t[3:]], ["line 4: not a record with a digest"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_chain_is_named(path: Path, name: str):
    change_lines, said = BROKEN[name]
    path.write_text("".join(change_lines(path.read_text().splitlines(keepends=True))))
    assert read_chain(path).problems == said
    result = CliRunner().invoke(app, ["verify", str(path)])
    assert isinstance(result.exception, AuditError) and result.exception.exit_code == 13
    assert said[0] in " ".join(result.output.split())


def test_a_run_that_was_resumed_into_another_file_is_whole_when_the_files_are_put_together(path: Path):
    lines = path.read_text().splitlines()
    second = path.with_name("second.jsonl")
    resumed = Chain(second, writes=True)
    resumed.start({**START, "step": 6}, json.loads(lines[3])["digest"], 4)
    resumed.append(audit(8))
    assert read_chain(second).problems == [
        "line 1: continues from line 4, which is in another file: put that file's lines before it"
    ]
    second.write_text(path.read_text() + second.read_text())
    found = verify(second)
    assert found.good and found.abandoned == 3 and found.starts == 2


def test_lines_that_a_resumed_run_left_are_a_branch(path: Path):
    lines = path.read_text().splitlines()
    head = json.loads(lines[3])["digest"]  # of the checkpoint at step 6
    path.write_text(path.read_text() + '{"half of a li')
    resumed = Chain(path, writes=True)
    resumed.start({**START, "step": 6}, head, 4)
    for step in (8, 10):
        resumed.append(audit(step))
    found = verify(path)
    assert found.good and found.abandoned == 3 and found.starts == 2
    assert [r["step"] for r in found.audits] == [2, 4, 6, 8, 10]


def test_a_resume_from_a_line_that_is_gone_is_a_problem(path: Path):
    Chain(path, writes=True).start(START, "a" * 64, 4)
    assert read_chain(path).problems == ["line 8: continues from line 4, which is missing"]


def test_a_new_run_in_an_old_file_begins_anew(path: Path):
    written(path, range(2, 6, 2))
    found = verify(path)
    assert found.good and found.abandoned == 7 and len(found.audits) == 2


def test_missing_steps_are_said(tmp_path: Path):
    chain = written(tmp_path / "audit.jsonl", range(2, 6, 2))
    chain.append(audit(10))
    assert verify(tmp_path).gaps == [(6, 8)]


def test_command_and_report(path: Path):
    (path.parent / "config.yaml").write_text("name: tried\noptimizer: {name: muon}\n")
    result = CliRunner().invoke(app, ["verify", str(path.parent)])
    assert result.exit_code == 0 and "whole, 7 lines" in result.output and "2 of 2 recomputed" in result.output
    assert json.loads(CliRunner().invoke(app, ["verify", "--json", str(path)]).output)["good"]
    change(path, 3, "1e-06", "1e-07")
    result = CliRunner().invoke(app, ["verify", str(path)])
    assert isinstance(result.exception, AuditError) and result.exception.exit_code == 13 and "line 3" in result.output
    assert "recomputed" in (page := render(read_run(path.parent))) and "line 3: changed" in page


def test_an_alarm_is_a_failure(path: Path):
    alarm = {"stage": "decay", "sentence": "weight decay was not applied", "causes": ["skipped_decay"], "ranks": []}
    written(path)
    chain = Chain(path, writes=True)
    last = json.loads(path.read_text().splitlines()[-1])
    chain.head, chain.lines = last["digest"], last["line"]
    chain.append(audit(14, (alarm,)))
    found = verify(path)
    assert not found.problems and not found.good
    with pytest.raises(AuditError, match="step 14"):
        found.raise_if_bad()
    assert "decay: weight decay was not applied" in CliRunner().invoke(app, ["verify", str(path)]).output


def test_no_audit_is_said(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"optimizer\.audit\.every"):
        verify(tmp_path)

"""Writes the figures of the device tests as one Markdown table and one page: `python -m tests.gpu.page FOLDER`."""

from __future__ import annotations

import html
import json
import sys
from pathlib import Path
from typing import Any

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>muon_dist on a device</title>
<style>body{{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}}table{{border-collapse:collapse}}
td,th{{border:1px solid #bbb;padding:.2em .6em;text-align:left;vertical-align:top}}.failed{{color:#b00}}
pre{{white-space:pre-wrap}}</style><h1>muon_dist on a device</h1><p>{summary}</p>
<h2>Figures</h2><table><tr><th>what<th>value</tr>{figures}</table>
<h2>Tests</h2><table><tr><th>test<th>outcome<th>s</tr>{tests}</table></html>
"""


def rows(entries: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(figures, outcomes)."""
    return [e for e in entries if "figure" in e], [e for e in entries if "outcome" in e]


def summary(outcomes: list[dict[str, Any]]) -> str:
    counts = {kind: sum(e["outcome"] == kind for e in outcomes) for kind in ("passed", "failed", "skipped")}
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def markdown(entries: list[dict[str, Any]]) -> str:
    figures, outcomes = rows(entries)
    lines = [summary(outcomes), "", "| what | value |", "|---|---|"]
    lines += [f"| {e['figure']} | {e['value']} |" for e in figures]
    lines += [f"\n**failed: {e['test']}**\n\n```\n{e['why']}\n```" for e in outcomes if e["outcome"] == "failed"]
    return "\n".join(lines) + "\n"


def page(entries: list[dict[str, Any]]) -> str:
    figures, outcomes = rows(entries)
    shown = "".join(f"<tr><td>{html.escape(str(e['figure']))}<td>{html.escape(str(e['value']))}</tr>" for e in figures)
    tests = "".join(
        f'<tr class="{e["outcome"]}"><td>{html.escape(e["test"])}<pre>{html.escape(e["why"])}</pre><td>{e["outcome"]}'
        f"<td>{e['seconds']:.1f}</tr>"
        for e in outcomes
    )
    return PAGE.format(summary=summary(outcomes), figures=shown, tests=tests)


def main(folder: str) -> None:
    root = Path(folder)
    entries = json.loads((root / "gpu.json").read_text())
    (root / "gpu.md").write_text(markdown(entries))
    (root / "gpu.html").write_text(page(entries))
    print(markdown(entries))
    print("\n".join(f"-> {root / name}" for name in ("gpu.json", "gpu.md", "gpu.html")))


if __name__ == "__main__":
    main(sys.argv[1])

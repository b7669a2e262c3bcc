"""README, docs and the pages of .github: links resolve, commands name existing options, blocks of code can be parsed.

(Other tests run the commands that take seconds; `.ci/extended` runs the tutorial.)
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from muon_dist.cli import app

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")])
EXTRAS = re.compile(r"muon-dist\[([\w,]+)\]|'\.\[([\w,]+)\]'")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them: lower case, hyphens for spaces."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+?)\s*$", text, re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{name(page)} links to {target}"
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found), f"{name(page)} links to {target}; headings: {sorted(anchors(found))}"


def test_every_page_is_in_the_navigation() -> None:
    listed: set[str] = set()

    def walk(entry: Any) -> None:
        for value in entry.values() if isinstance(entry, dict) else entry:
            listed.add(value) if isinstance(value, str) else walk(value)

    walk(yaml.safe_load((ROOT / ".mkdocs.yml").read_text())["nav"])
    assert listed == {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}


def test_nothing_says_to_install_what_pip_cannot_find() -> None:
    """The package is on no index: pages name a folder (`-e .`) or a wheel, messages the missing package itself."""
    texts = [
        *PAGES,
        *(p for folder in ("muon_dist", "launch", "configs") for p in (ROOT / folder).rglob("*") if p.is_file()),
    ]
    wrong = re.compile(r"pip install[^`\n]*(?<!/)\bmuon[-_]dist(?:\[|['\"`\s])")
    assert [name(p) for p in texts if p.suffix != ".pyc" and wrong.search(p.read_text(encoding="utf-8"))] == []


def test_the_notebook_is_the_tutorial() -> None:
    """Its cells are the tutorial's text and commands, as `python docs/.site/notebook.py --write` makes them. What the
    page shows below a command is what the notebook's cell printed, line by line."""
    page = (ROOT / "docs" / "tutorial.md").read_text()
    assert "](tutorial.ipynb)" in page  # mkdocs has no page for a notebook, so a link leads to it
    spec = spec_from_file_location("notebook", ROOT / "docs" / ".site" / "notebook.py")
    assert spec is not None and spec.loader is not None
    builder = module_from_spec(spec)
    spec.loader.exec_module(builder)
    cells = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text())["cells"]
    assert [(c["cell_type"], "".join(c["source"])) for c in cells] == builder.cells(page)
    assert all(c["outputs"] for c in cells if c["cell_type"] == "code" and "cat >" not in "".join(c["source"]))
    printed = ["".join(t for o in c["outputs"] for t in o["text"]) for c in cells if c["cell_type"] == "code"]
    assert builder.refreshed(page, printed) == (page, [])


def shell_commands(page: Path) -> list[list[str]]:
    """Words of the commands in a page's shell blocks, and in `code` that begins like a command."""
    text = page.read_text()
    lines = [
        line
        for block in re.findall(r"```(?:bash|sh|shell|console)\n(.*?)```", text, re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
    ]
    lines += [" ".join(code.split()) for code in re.findall(r"`((?:muon-dist|python -m|pytest|bash) [^`]+)`", text)]
    found = []
    for line in lines:
        line = line.removeprefix("$ ")
        for part in re.split(r"&&|\|\|?|;", line.split(" #")[0]):
            try:
                words = shlex.split(part, comments=True)
            except ValueError:  # half of a quoted text with one of the separators in it
                continue
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words.pop(0)
            if words:
                found.append(words)
    return found


def check_ours(words: list[str], where: str, written: set[str]) -> None:
    """A command names a subcommand, options and configurations that exist, or files that an earlier command has
    `written`."""
    command: Any = get_command(app)
    rest = list(words)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        step = rest.pop(0)
        if step == "...":
            return
        assert step in command.commands, f"{where}: no command {step}"
        command = command.commands[step]
    known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}
    used = {w.partition("=")[0] for w in rest if w.startswith("--")}
    assert used <= known, f"{where}: no option {sorted(used - known)}"
    for path in (w for w in rest if w.startswith(("configs/", "launch/")) and "..." not in w):
        assert path in written or (ROOT / path).exists(), f"{where}: no file {path}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_name_what_there_is(page: Path) -> None:
    written = set(re.findall(r"^cat > (\S+)", page.read_text(), re.MULTILINE))
    for words in shell_commands(page):
        where = f"{name(page)}: {' '.join(words)}"
        if words[0] == "muon-dist":
            check_ours(words[1:], where, written)
        elif words[0] == "bash" and words[1].endswith(".sh") and words[1].startswith(("launch/", ".ci/")):
            assert (ROOT / words[1]).is_file(), f"{where}: no such script"
        elif words[0] == "pytest":
            for path in (w for w in words[1:] if w.startswith("tests/")):
                assert (ROOT / path.partition("::")[0]).exists(), f"{where}: no {path}"
        elif words[:2] == ["python", "-m"] and words[2].startswith("tests"):
            module = ROOT / words[2].replace(".", "/")
            assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file(), (
                f"{where}: no such module"
            )


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_python_in_the_pages(page: Path) -> None:
    """Blocks of Python can be parsed, and the names that they import from muon_dist exist."""
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "muon_dist":
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    there = hasattr(module, alias.name) or find_spec(f"{node.module}.{alias.name}")
                    assert there, f"{name(page)}: {node.module} has no {alias.name}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "muon_dist":
                assert hasattr(importlib.import_module("muon_dist"), node.attr), f"{name(page)}: muon_dist.{node.attr}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_extras_and_keys_in_the_pages(page: Path) -> None:
    """Extras that pages install are declared, and YAML blocks can be read."""
    text = page.read_text()
    declared = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    for found in EXTRAS.findall(text):
        for extra in "".join(found).split(","):
            assert re.search(rf"^{extra} = \[", declared, re.MULTILINE), f"{name(page)}: no extra {extra}"
    for block in re.findall(r"```ya?ml\n(.*?)```", text, re.DOTALL):
        yaml.safe_load(block)

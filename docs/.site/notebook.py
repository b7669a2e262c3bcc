"""The tutorial as a notebook: its shell and Python blocks become cells, and are run in an empty folder.

    python docs/.site/notebook.py            # run all cells; the first that fails ends with its error
    python docs/.site/notebook.py --write    # and write the outputs to docs/tutorial.ipynb and to the page

Running needs nbclient and ipykernel; `bash .ci/extended notebook` installs them in an environment of its own.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1]
LONGEST = 100
"""Lines of an output that are kept."""
BLOCK = re.compile(r"(^```(?:bash|python|text)\n.*?^```$)", re.DOTALL | re.MULTILINE)


def cells(page: str) -> list[tuple[str, str]]:
    """("markdown" or "code", text) for each cell of the tutorial `page`. Outputs (```text) are left out."""
    made = []
    for part in BLOCK.split(page):
        found = re.fullmatch(r"```(bash|python|text)\n(.*?)\n?```", part, re.DOTALL)
        if found is None:
            if part.strip():
                made.append(("markdown", part.strip()))
        elif found[1] == "python" or found[2].startswith("cd "):
            made.append(("code", re.sub(r"\Acd ", "%cd ", found[2])))  # the folder of all later cells
        elif found[1] == "bash":
            made.append(("code", "%%bash\nexec 2>&1\n" + found[2]))
    return made


def shortened(text: str) -> str:
    """The first and last lines of an output, without a terminal's control characters."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line.split("\r")[-1]) for line in text.splitlines()]
    if len(lines) > LONGEST:
        lines = [*lines[: LONGEST // 2], "...", *lines[-LONGEST // 2 :]]
    return "\n".join(lines) + "\n"


def words(line: str) -> str:
    """A line of an output without its figures, and with one space or dash for many: what stays from run to run."""
    return re.sub(r"([ ─━])\1+", r"\1", re.sub(r"[\d.,:]+(?:e[-+]\d+)?", "#", line)).strip()


def refreshed(page: str, outputs: list[str]) -> tuple[str, list[str]]:
    """(`page` with the lines of `outputs` in its ```text blocks, the lines there that no command printed).

    outputs: of each code cell. A block shows some lines of the cell above it; `...` marks lines that are left out.
    """
    made, lost, cell = [], [], -1
    for part in BLOCK.split(page):
        if part.startswith(("```bash\n", "```python\n")):
            cell += 1
        elif part.startswith("```text\n"):
            printed, shown = outputs[cell].splitlines(), []
            for line in part.splitlines()[1:-1]:
                same = [i for i, other in enumerate(printed) if words(other) == words(line)]
                found = next((i for i in same if printed[i].rstrip() == line), same[0] if same else None)
                if line == "..." or found is None:
                    shown.append(line)
                    lost += [line] if line != "..." else []
                else:
                    shown.append(printed[found].rstrip())
                    printed = printed[found + 1 :]
            part = "\n".join(["```text", *shown, "```"])
        made.append(part)
    return "".join(made), lost


def main(write: bool) -> None:
    """Run the tutorial. Raises nbclient's CellExecutionError at the first cell that fails."""
    import nbformat
    from nbclient import NotebookClient
    from nbformat import v4

    page = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    made = [
        v4.new_markdown_cell(text, id=f"cell-{i}") if kind == "markdown" else v4.new_code_cell(text, id=f"cell-{i}")
        for i, (kind, text) in enumerate(cells(page))
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = v4.new_notebook(cells=made, metadata={"kernelspec": kernel})
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=900, coalesce_streams=True, resources=resources).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times, which differ in every run
        if cell.cell_type == "code":  # standard error has progress bars of Python cells; shell cells print all of it
            cell.outputs = [o for o in cell.outputs if o.output_type == "stream" and o.name == "stdout"]
            for output in cell.outputs:
                output.text = shortened(output.text).replace(folder, "/tmp")
    if write:
        nbformat.write(notebook, DOCS / "tutorial.ipynb")
        outputs = ["".join(o.text for o in cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]
        page, lost = refreshed(page, outputs)
        (DOCS / "tutorial.md").write_text(page, encoding="utf-8")
        print(*(f"on the page, but no longer printed: {line}" for line in lost), sep="\n")


if __name__ == "__main__":
    main("--write" in sys.argv[1:])

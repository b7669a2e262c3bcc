"""One self-contained HTML page of the experiments: reads the JSON and SVG files that ``muon-dist spectra run`` wrote.

The page makes no requests: it contains its styles and figures, and no script.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from markupsafe import Markup

from muon_dist.errors import DataError
from muon_dist.json_files import read_object
from muon_dist.report.page import save, template

_KEYS = ("experiment", "title", "claim", "verdict", "criteria", "notes", "profile", "seconds", "environment", "config")
_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_REFUSED = {"script", "foreignObject", "image", "a", "iframe"}

SOURCES = {
    "theory": "theory",
    "paper": "claim of the paper",
    "reading": "asked by the reading",
    "falsifier": "falsifier",
}


def inline_svg(path: Path) -> Markup:
    """The <svg> element of a figure file, without metadata, for use inside HTML.

    Raises DataError if the file is not an SVG, or contains an element that could run or load something.
    """
    try:
        root = ElementTree.fromstring(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ElementTree.ParseError) as error:
        raise DataError(f"{path}: not a readable SVG file ({error}); run `muon-dist spectra run` again") from error
    if root.tag != f"{{{_SVG}}}svg":
        raise DataError(f"{path}: its root element is not <svg>")
    for child in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(child)
    for element in root.iter():
        name = element.tag.rpartition("}")[2]
        unsafe = [
            key
            for key, value in element.attrib.items()
            if key.rpartition("}")[2].startswith("on")
            or (key.rpartition("}")[2] == "href" and not value.startswith("#"))
        ]
        if name in _REFUSED or unsafe:
            raise DataError(f"{path}: refused <{name}> {unsafe}: a figure must not run or load anything")
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    # the page decides the size; the viewBox keeps the proportions
    root.attrib.pop("width", None)
    root.attrib.pop("height", None)
    root.set("role", "img")
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All results of a folder in order of name (E1 ... E8, NS), each with its figures.

    Raises DataError for a folder without results, and for a file that is damaged or not a result.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; run `muon-dist spectra run all --output {folder}` first")
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = read_object(path)
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path}: cannot be read as a result ({error}); run the experiment again, or remove the file"
            ) from error
        missing = [key for key in _KEYS if key not in record]
        if missing:
            raise DataError(f"{path}: not an experiment result, without {', '.join(missing)}; move it elsewhere")
        name = re.escape(record["experiment"])
        figures = [p for p in folder.iterdir() if re.fullmatch(rf"{name}-\d+\.svg", p.name)]
        records.append(record | {"figures": [inline_svg(p) for p in sorted(figures)]})
    if not records:
        raise DataError(f"{folder}: no result files; run `muon-dist spectra run all --output {folder}` first")
    return records


def _measured(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def render(records: list[dict[str, Any]]) -> str:
    """The page as text. Everything from the files is escaped, except the figures, which ``inline_svg`` has checked."""
    return template("experiments", measured=_measured).render(records=records, sources=SOURCES)


def write_page(folder: Path, output: Path) -> Path:
    """Write the page of all results in ``folder``; returns its path."""
    return save(render(read_results(folder)), output)

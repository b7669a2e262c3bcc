"""The experiments' page contains everything, escapes everything, and loads nothing."""

from __future__ import annotations

import json
import re

import pytest

from muon_dist.errors import DataError
from muon_dist.report.experiments_page import inline_svg, write_page

SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="5pt" height="5pt" viewBox="0 0 5 5">{}</svg>'


def record(name: str = "E1", **changes: object) -> dict[str, object]:
    criterion = {"name": "a", "measured": 0.123456, "threshold": "< 1", "passed": True, "source": "falsifier"}
    whole = {
        "experiment": name, "title": "T", "claim": "C", "verdict": "holds", "criteria": [criterion], "notes": ["n"],
        "profile": "quick", "seconds": 1.0, "environment": {}, "config": {},
    }  # fmt: skip
    return whole | changes


def write(folder, *records):
    for r in records:
        (folder / f"{r['experiment']}.json").write_text(json.dumps(r))


def test_page_holds_every_experiment_and_only_its_own_figures(tmp_path):
    write(tmp_path, record("E1"), record("E2", title="Second"))
    (tmp_path / "E1-1.svg").write_text(SVG.format("<text>first</text>"))
    (tmp_path / "E1-2.svg").write_text(SVG.format("<text>second</text>"))
    (tmp_path / "E11-1.svg").write_text(SVG.format("<text>other</text>"))
    page = write_page(tmp_path, tmp_path / "out" / "page.html").read_text()
    assert page.index("first") < page.index("second") < page.index("E2. Second")
    assert "other" not in page and "0.1235" in page and 'class="tag">falsifier' in page
    assert 'width="5pt"' not in page and 'viewBox="0 0 5 5"' in page


def test_text_is_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    write(tmp_path, record(title=evil, claim=evil, notes=[evil], config={"x": evil}, verdict=f"holds in part: {evil}"))
    page = write_page(tmp_path, tmp_path / "page.html").read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") >= 4


def test_page_loads_nothing(tmp_path):
    write(tmp_path, record())
    (tmp_path / "E1-1.svg").write_text(SVG.format("<text>x</text>"))
    page = write_page(tmp_path, tmp_path / "page.html").read_text()
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#|data:,)""", page) and "url(" not in page.replace("url(#", "")
    assert "@import" not in page


@pytest.mark.parametrize(
    "content",
    [
        "<script>1</script>",
        '<rect onload="1"/>',
        '<image href="http://example.org/a.png"/>',
        '<use xmlns:xlink="http://www.w3.org/1999/xlink" xlink:href="http://example.org/a.svg#b"/>',
        "<foreignObject/>",
    ],
)
def test_figures_that_run_or_load_something_are_refused(tmp_path, content):
    path = tmp_path / "E1-1.svg"
    path.write_text(SVG.format(content))
    with pytest.raises(DataError, match=r"E1-1\.svg"):
        inline_svg(path)


@pytest.mark.parametrize("content", ["", "<html/>", "<svg>"])
def test_figures_that_are_no_svg_are_refused(tmp_path, content):
    path = tmp_path / "E1-1.svg"
    path.write_text(content)
    with pytest.raises(DataError, match=r"E1-1\.svg"):
        inline_svg(path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"experiment": "E1"}'])
def test_files_that_are_no_results_are_named(tmp_path, content):
    (tmp_path / "E1.json").write_text(content)
    with pytest.raises(DataError, match=r"E1\.json"):
        write_page(tmp_path, tmp_path / "page.html")


def test_folder_without_results(tmp_path):
    with pytest.raises(DataError, match="spectra run"):
        write_page(tmp_path, tmp_path / "page.html")
    with pytest.raises(DataError, match="no such folder"):
        write_page(tmp_path / "missing", tmp_path / "page.html")

"""English text of the running Python's standard library: a corpus that needs no download."""

from __future__ import annotations

import ast
import functools
import gc
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from muon_dist.data.document import Document
from muon_dist.errors import DataError

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_STDLIB_SKIP = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "turtledemo"})


def stdlib_root() -> Path:
    """Folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_files() -> list[Path]:
    """The standard library's Python files without tests and installed packages, sorted."""
    root = stdlib_root()
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _STDLIB_SKIP]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise DataError(f"builtin stdlib: {root} holds no Python source files; use another source.")
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


@functools.lru_cache(maxsize=1)
def read_stdlib() -> tuple[Document, ...]:
    """English text of the Python standard library: the language reference of ``pydoc_data.topics`` (a document a
    topic) and every module's docstrings (a document a module). Sources are parsed, never imported or run.
    Kept in memory (about 2 MB) because parsing them takes seconds.
    """
    root = stdlib_root()
    found: list[Document] = []
    collecting = gc.isenabled()
    gc.disable()  # trees hold no circles, and looking for some takes as long as parsing
    try:
        for path in stdlib_files():
            name = path.relative_to(root).as_posix()
            found += [Document(text.encode("utf-8"), f"stdlib {name}") for text in _english(path, name)]
    finally:
        if collecting:
            gc.enable()
    return tuple(found)


def _english(path: Path, name: str) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:  # templates and Python 2 samples that some builds ship
            return []
    texts = _topics(tree) if name == "pydoc_data/topics.py" else [_docstrings(tree)]
    return [text for text in texts if text and _encodable(text)]


def _docstrings(tree: ast.Module) -> str:
    """Docstrings of a module, its classes and functions, in the order of the source."""
    return "\n\n".join(text for node in _documented(tree) if (text := ast.get_docstring(node)))


def _documented(node: ast.AST) -> Iterator[_Documented]:
    # through statements alone: expressions hold no definitions, and are most of a tree
    if isinstance(node, _Documented):
        yield node
    for field in ("body", "handlers", "orelse", "finalbody"):
        children = getattr(node, field, None)
        if isinstance(children, list):
            for child in children:
                yield from _documented(child)


def _topics(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            return [topics[name] for name in sorted(topics)]
    return []


def _encodable(text: str) -> bool:
    return not any(0xD800 <= ord(character) <= 0xDFFF for character in text)

"""Documents that do not come from text files: rows of ``datasets``, and the text of the running Python's standard
library."""

from __future__ import annotations

import ast
import functools
import gc
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from muon_dist.config.paths import is_url
from muon_dist.data.document import Document, Item, SourceGoneError, row_document
from muon_dist.errors import DataError
from muon_dist.failures import one_line

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_STDLIB_SKIP = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "turtledemo"})


def read_dataset(
    name: str, config: str | None, split: str, streaming: bool, revision: str | None, field: str
) -> Iterator[Item]:
    """Rows of a ``datasets`` name of the hub, of a local folder, or of a folder that ``save_to_disk`` wrote. Code of a
    dataset is never run: ``trust_remote_code`` is not passed, and datasets >= 4 has no loading scripts.
    """
    rows = _saved_rows(name, split) if is_saved(name) else _loaded_rows(name, config, split, streaming, revision)
    for number, record in enumerate(_rows(rows, name, split)):
        origin = f"dataset {name!r} row {number}"
        if not isinstance(record, dict):
            raise DataError(f"{origin}: is {type(record).__name__}, and a split holds rows: set split.")
        yield row_document(record, field, origin)


def _loaded_rows(name: str, config: str | None, split: str, streaming: bool, revision: str | None) -> Any:
    import datasets

    # The cache of `datasets` identifies local files by their times, so it could give rows of older content.
    mode = "force_redownload" if not streaming and Path(name).exists() else None
    try:
        return datasets.load_dataset(
            name, config, split=split, streaming=streaming, revision=revision, download_mode=mode
        )
    except Exception as error:  # datasets raises its own, fsspec's, the hub's and the network's errors here
        raise DataError(
            f"dataset {name!r} (split {split!r}) cannot be loaded: {type(error).__name__}: {one_line(error)}"
        ) from error


def _saved_rows(name: str, split: str) -> Any:
    import datasets

    try:
        loaded = datasets.load_from_disk(name)
    except Exception as error:  # a damaged folder: errors of arrow, JSON, files
        raise DataError(
            f"{name}: datasets cannot load this folder ({type(error).__name__}: {one_line(error)})"
        ) from error
    if isinstance(loaded, dict) and split not in loaded:
        raise DataError(f"{name}: there is no split {split!r}; there is: {', '.join(loaded)}. Set split.")
    return loaded[split] if isinstance(loaded, dict) else loaded


def _rows(rows: Any, name: str, split: str) -> Iterator[Any]:
    """The rows. `datasets` reads lazily; an error between two rows becomes a DataError that says where."""
    number = 0
    try:
        for row in rows:
            yield row
            number += 1
    except Exception as error:  # as in `_loaded_rows`; errors of our own reader do not pass through here
        cause = error.__cause__ or error  # its own messages say little: "An error occurred while generating"
        raise DataError(
            f"dataset {name!r} (split {split!r}) cannot be read after row {number - 1}: "
            f"{type(cause).__name__}: {one_line(cause)}"
        ) from error


def is_saved(path: str | Path) -> bool:
    """Whether ``datasets`` saved this folder by ``save_to_disk``."""
    if is_url(path):
        return False
    root = Path(path)
    return (root / "dataset_dict.json").is_file() or (
        (root / "state.json").is_file() and (root / "dataset_info.json").is_file()
    )


def hub_commit(name: str, split: str, revision: str | None) -> str:
    """The current commit of a dataset of the hub. Raises SourceGoneError if the hub cannot be reached."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name, revision=revision, timeout=30).sha)
    except Exception as error:  # no network, no such name, no permission
        raise SourceGoneError(
            f"dataset {name!r} cannot be loaded (split {split!r}): the hub cannot be asked for it "
            f"({type(error).__name__}: {one_line(error)})"
        ) from error


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
    """English text of the Python standard library: the language reference of ``pydoc_data.topics`` (one document per
    topic) and every module's docstrings (one document per module). Sources are parsed, never imported or run. Kept in
    memory (about 2 MB) because parsing them takes seconds.
    """
    root = stdlib_root()
    found: list[Document] = []
    collecting = gc.isenabled()
    gc.disable()  # syntax trees have no cycles, and looking for cycles takes as long as parsing
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
    # statements only: expressions contain no definitions, and are most of a tree
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

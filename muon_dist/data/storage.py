"""Files of a corpus: local paths, folders, globs, URLs through fsspec; compression is detected from the content."""

from __future__ import annotations

import bz2
import contextlib
import fnmatch
import glob
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from muon_dist.config.paths import index_of, is_pattern, is_url
from muon_dist.data.document import SourceGoneError, say
from muon_dist.data.files import sha256_stream
from muon_dist.errors import DataError
from muon_dist.failures import one_line

_BUFFER = 1 << 20
HEAD_BYTES = 1 << 16


def _zstd(raw: Any) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(raw, "zstd")


# First bytes of a compressed file -> (name, how it is opened).
_COMPRESSIONS: dict[bytes, tuple[str, Callable[[Any], Any]]] = {
    b"\x1f\x8b": ("gzip", lambda raw: gzip.GzipFile(fileobj=raw)),
    b"\x28\xb5\x2f\xfd": ("zstd", _zstd),
    b"BZh": ("bzip2", bz2.BZ2File),
    b"\xfd7zXZ\x00": ("xz", lzma.LZMAFile),
}


@dataclass(frozen=True)
class DataFile:
    """One file: ``path`` is its full path or URL, ``name`` its path within the source, which decides the order of
    files.

    ``remote`` is the fsspec file system of a URL, and None for a local file.
    """

    path: str
    name: str
    remote: Any = None

    @property
    def suffix(self) -> str:
        """The last suffix in lower case, without a suffix of compression: ".csv" for "a.csv.gz"."""
        path = PurePosixPath(self.name.lower())
        return PurePosixPath(path.stem).suffix if path.suffix in (".gz", ".zst", ".bz2", ".xz") else path.suffix

    def size(self) -> int:
        """Size of the stored file in bytes."""
        with self._named():
            return int(self.remote.size(self.path) or 0) if self.remote else Path(self.path).stat().st_size

    def record(self, known: Mapping[str, Any] | None) -> dict[str, Any]:
        """Name, size, stamp and SHA-256; if size and stamp agree with ``known``, its hash is used.

        A local file's stamp includes the inode's change time, which no program can set back.
        """
        with self._named():
            if self.remote is not None:
                stamp: list[Any] = [str(self.remote.ukey(self.path))]
            else:
                stat = Path(self.path).stat()
                stamp = [stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        size = self.size()
        if known and known.get("size") == size and known.get("stamp") == stamp:
            digest = known["sha256"]
        else:
            with self.open() as stream:
                digest = sha256_stream(stream)
        return {"path": self.name, "size": size, "stamp": stamp, "sha256": digest}

    def sibling(self, suffix: str) -> DataFile:
        """The file of the same path with ``suffix`` added."""
        return DataFile(self.path + suffix, self.name + suffix, self.remote)

    def exists(self) -> bool:
        """Whether the file exists."""
        return bool(self.remote.isfile(self.path)) if self.remote else Path(self.path).is_file()

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The stored bytes of the file. A read error becomes a DataError that names the file."""
        with self._named():
            stream = self.remote.open(self.path, "rb") if self.remote else Path(self.path).open("rb")
            with stream:
                yield stream

    @contextlib.contextmanager
    def decompressed(self) -> Iterator[BinaryIO]:
        """The file's content; gzip, zstd, bzip2 and xz are known by their first bytes."""
        with self.open() as raw:
            first = raw.read(8)
            raw.seek(0)
            for magic, (_, opener) in _COMPRESSIONS.items():
                if first.startswith(magic):
                    with io.BufferedReader(opener(raw), _BUFFER) as stream:
                        yield cast(BinaryIO, stream)
                    return
            yield raw

    def head(self) -> bytes:
        """The first HEAD_BYTES of the content."""
        with self.decompressed() as stream:
            return stream.read(HEAD_BYTES)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        unreadable = DataError if self.remote is None else SourceGoneError  # a server may not answer
        try:
            yield
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise DataError(f"{self.path}: damaged or cut off, cannot be decompressed ({one_line(error)}).") from None
        except FileNotFoundError:
            raise unreadable(f"{self.path}: no such file (it was there when the source was listed).") from None
        except OSError as error:
            if error.filename is not None and self.remote is None:
                raise  # its message names the file
            raise unreadable(f"{self.path}: cannot be read ({one_line(error)}).") from None
        except (DataError, GeneratorExit, KeyboardInterrupt, MemoryError):
            raise
        except Exception as error:
            if self.remote is None:
                raise
            raise unreadable(f"{self.path}: cannot be read ({type(error).__name__}: {one_line(error)}).") from None


def find_files(paths: Sequence[str | Path]) -> list[DataFile]:
    """The files of paths: files, folders (walked), globs and URLs of any of these; in order, each once.

    A folder's files are sorted by name; hidden ones are left out. A link in a folder may point only inside that
    folder; linked folders are not walked (they may form cycles). Raises SourceGoneError if a path does not exist or is
    empty, and DataError for a broken link, a link that leads out of the folder, and a file that is named twice.
    """
    found: list[DataFile] = []
    for path in paths:
        found += _find_remote(str(path)) if is_url(path) else _find_local(Path(path))
    seen: set[str] = set()
    for file in found:
        key = str(Path(file.path).absolute()) if file.remote is None else file.path
        if key in seen:
            raise DataError(f"{file.path}: the source's path names it twice: name each file once.")
        seen.add(key)
    return found


def _find_local(root: Path) -> list[DataFile]:
    if not root.exists() and index_of(root).is_file():
        root = index_of(root)
    if not root.exists() and is_pattern(root):
        matches = sorted(Path(name) for name in glob.glob(str(root), recursive=True))
        files = [match for match in matches if match.is_file()]
        folders = [match for match in matches if match.is_dir() and root.parts[-1] != "**"]
        if not any(file.stat().st_size for file in files):
            only = f", only folders such as {folders[0]}: write {root}/* or {root}/**" if folders else ""
            if not only and "[" in str(root):
                only = "; where a name itself holds a bracket, write [[] for it"
            raise SourceGoneError(f"{root}: no non-empty file matches this pattern{only}.")
        if folders and "**" not in root.parts:
            say(
                f"{root}: matches folders too, which are left out, such as {folders[0]}; for their files "
                f"write {root}/*"
            )
        return [DataFile(str(file), file.name) for file in files]
    if not root.exists():
        raise SourceGoneError(f"{root}: no such file or folder (a data source's path).")
    if root.is_file():
        if root.stat().st_size == 0:
            raise DataError(f"{root}: the file is empty (0 bytes at byte offset 0).")
        return [DataFile(str(root), root.name)]
    if not root.is_dir():
        raise DataError(f"{root}: neither a file nor a folder (a device, pipe or socket): name a file or a folder.")
    walked = sorted(_walk(root, root.resolve()), key=lambda path: path.relative_to(root).as_posix())
    if not any(path.stat().st_size for path in walked):
        raise SourceGoneError(f"{root}: the folder holds no non-empty file.")
    return [DataFile(str(path), path.relative_to(root).as_posix()) for path in walked]


def _walk(folder: Path, root: Path) -> Iterator[Path]:
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_symlink():
            if not entry.exists():
                raise DataError(f"{entry}: the link is broken.")
            if not entry.resolve().is_relative_to(root):
                raise DataError(f"{entry}: the link leads out of the corpus folder; name its target as a source.")
            if entry.is_dir():
                continue
        if entry.is_dir():
            yield from _walk(entry, root)
        elif entry.is_file():
            yield entry


def _find_remote(url: str) -> list[DataFile]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
        if url.lower().startswith(("file://", "local://")):
            return _find_local(Path(path))
        system.invalidate_cache()  # an old listing lacks newer files
        if system.isfile(path):
            names = [path]
        elif is_pattern(path):
            names = [name for name in sorted(system.glob(path)) if system.isfile(name)]
        else:
            names = sorted(system.find(path))
        base = path if system.isdir(path) else str(PurePosixPath(path).parent)
    except ImportError as error:
        raise DataError(f"{url}: a package is missing to read such URLs ({one_line(error)}).") from None
    except ValueError as error:
        raise DataError(f"{url}: fsspec knows no such URL ({one_line(error)}).") from None
    except DataError:
        raise
    except FileNotFoundError as error:  # a bucket that does not exist
        raise SourceGoneError(f"{url}: no such file or folder ({one_line(error)}).") from None
    except Exception as error:  # every file system has its own errors
        raise SourceGoneError(
            f"{url}: cannot be reached ({type(error).__name__}: {one_line(error)}). "
            "Check the URL, the network and your credentials."
        ) from None
    files = [DataFile(name, name.removeprefix(base).lstrip("/"), system) for name in names]
    files = [file for file in files if not fnmatch.fnmatch(f"/{file.name}", "*/.*")]
    if not files:
        raise SourceGoneError(f"{url}: no such file or folder, or nothing in it (a data source's path).")
    return files

"""Token files of other programs: Megatron's ``.bin`` with ``.idx``, and datatrove's ``.ds`` with ``.ds.index``.

Megatron's index, little-endian: ``MMIDIDX\\0\\0``, version 1 (uint64), a code for the token type (uint8), the numbers
of sequences and of document bounds (uint64 each), tokens of each sequence (int32), its byte offset (int64), and the
document bounds as numbers of sequences (int64), the first 0. datatrove: tokens as uint16 or uint32; the index holds
the end of each document in tokens (uint64); the first line of ``.metadata`` is ``TOKENIZER|BYTES_PER_TOKEN``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from muon_dist.data.document import Document, Item, say
from muon_dist.data.shards import Manifest, SplitIndex
from muon_dist.data.storage import DataFile
from muon_dist.errors import ConfigError, DataError

MAGIC = b"MMIDIDX\0\0"
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_HEADER = struct.Struct("<9sQBQQ")
_BLOCK = 1 << 20  # tokens
EXPORTS = ("megatron", "datatrove")


def _documents(file: DataFile, ends: npt.NDArray[np.int64], dtype: str) -> Iterator[Item]:
    """The documents of a file of tokens; ``ends`` (documents,) are the ends of the documents, counted in tokens."""
    width = np.dtype(dtype).itemsize
    if len(ends) and (ends[0] < 0 or (np.diff(ends) < 0).any() or file.size() != int(ends[-1]) * width):
        raise DataError(
            f"{file.path}: {file.size()} bytes, and its index says {int(ends[-1])} tokens of {width} bytes: the two "
            "files do not belong together, or one is cut off."
        )
    start = 0
    with file.open() as stream:
        for number, end in enumerate(ends.tolist()):
            ids = np.frombuffer(stream.read((end - start) * width), dtype=dtype)
            if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < 1 << 31:
                raise DataError(f"{file.path} document {number}: holds a token id outside 0 .. 2^31 - 1.")
            yield Document(ids.astype("<i4").tobytes(), f"{file.path} document {number}", tokens=True)
            start = end


def read_megatron(file: DataFile) -> Iterator[Item]:
    """The documents of a pair that Megatron wrote; ``file`` is the index. Raises DataError on a damaged pair."""
    tokens = DataFile(file.path.removesuffix(".idx") + ".bin", file.name.removesuffix(".idx") + ".bin", file.remote)
    if not tokens.exists():
        raise DataError(f"{file.path}: the file with its tokens is missing ({tokens.path}).")
    with file.open() as stream:
        raw = stream.read()
    try:
        magic, version, code, sequences, bounds = _HEADER.unpack_from(raw)
        lengths = np.frombuffer(raw, "<i4", sequences, _HEADER.size)
        documents = np.frombuffer(raw, "<i8", bounds, _HEADER.size + 12 * sequences)
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[documents]
    except (struct.error, ValueError, IndexError):
        raise DataError(f"{file.path}: not an index of Megatron, or damaged or cut off.") from None
    if magic != MAGIC or version != 1 or code not in _TYPES:
        raise DataError(f"{file.path}: an index of Megatron of version 1 with whole numbers is needed.")
    if not len(ends) or ends[0] != 0:
        raise DataError(f"{file.path}: damaged, its first document does not begin at 0.")
    yield from _documents(tokens, ends[1:], _TYPES[code])


def read_datatrove(file: DataFile) -> Iterator[Item]:
    """The documents of a ``.ds`` file. Raises DataError on files that do not belong together."""
    index = file.sibling(".index")
    if not index.exists():
        raise DataError(f"{file.path}: its index is missing ({index.path}), which says where documents end.")
    with index.open() as stream:
        raw = stream.read()
    if len(raw) % 8:
        raise DataError(f"{index.path}: {len(raw)} bytes, not a whole number of 8-byte ends: damaged.")
    ends = np.frombuffer(raw, "<u8").astype(np.int64)
    width = 4 if len(ends) and file.size() == 4 * int(ends[-1]) else 2
    metadata = file.sibling(".metadata")
    if metadata.exists():
        with metadata.open() as stream:
            name, _, size = stream.readline().decode("utf-8", "replace").strip().rpartition("|")
        width = int(size) if size in ("2", "4") else width
        if name:
            say(f"{file.path}: tokens of the tokenizer {name!r}, as its metadata say; tokenizer.path must be the same")
    yield from _documents(file, ends, f"<u{width}")


def export_tokens(folder: str | Path, out: str | Path, kind: str) -> list[Path]:
    """Write each source and split of a prepared folder for another program. Returns the files with the tokens.

    Documents keep their order and their end-of-sequence token. Raises ConfigError on an unknown kind or an ``out``
    that exists, DataError on a folder that is not prepared.
    """
    if kind not in EXPORTS:
        raise ConfigError(f"{kind!r} is not one of {', '.join(EXPORTS)}")
    root, target = Path(folder), Path(out)
    manifest = Manifest.load(root)
    if target.exists() and any(target.iterdir() if target.is_dir() else (target,)):
        raise ConfigError(f"{target} exists already: choose another folder")
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for source in manifest.sources:
        for split, totals in source.splits.items():
            if totals.documents:
                place, index = manifest.find(root, split, source.folder)
                write = _write_megatron if kind == "megatron" else _write_datatrove
                written.append(write(place, index, target / f"{source.folder}-{split}", manifest.tokenizer_sha256))
    return written


def _ends(place: Path, index: SplitIndex) -> npt.NDArray[np.int64]:
    return np.fromfile(place / "documents.bin", dtype="<i8").reshape(index.documents, 2)[:, 0]


def _copy(place: Path, index: SplitIndex, path: Path, dtype: str) -> None:
    with path.open("wb") as stream:
        for shard in index.shards:
            ids = np.memmap(place / shard.file, dtype=index.dtype, mode="r", shape=(shard.tokens,))
            for start in range(0, shard.tokens, _BLOCK):
                stream.write(ids[start : start + _BLOCK].astype(dtype).tobytes())


def _write_megatron(place: Path, index: SplitIndex, prefix: Path, tokenizer: str) -> Path:
    code = 8 if index.vocab_size < 65500 else 4  # Megatron's own choice of the type
    path = Path(f"{prefix}.bin")
    _copy(place, index, path, _TYPES[code])
    lengths = np.diff(_ends(place, index), prepend=0)
    offsets = np.concatenate([[0], np.cumsum(lengths[:-1])]) * np.dtype(_TYPES[code]).itemsize
    with path.with_suffix(".idx").open("wb") as stream:
        stream.write(_HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1))
        stream.write(lengths.astype("<i4").tobytes())
        stream.write(offsets.astype("<i8").tobytes())
        stream.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
    return path


def _write_datatrove(place: Path, index: SplitIndex, prefix: Path, tokenizer: str) -> Path:
    path = Path(f"{prefix}.ds")
    _copy(place, index, path, index.dtype)
    Path(f"{path}.index").write_bytes(_ends(place, index).astype("<u8").tobytes())
    width = np.dtype(index.dtype).itemsize
    Path(f"{path}.metadata").write_text(f"sha256:{tokenizer}|{width}\n{index.tokens}\n{index.tokens}")
    return path

"""Token files of Megatron and datatrove, in and out: bytes as their formats say, and files that their writers made."""

from __future__ import annotations

import importlib
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from muon_dist.data import Source, TokenizerInfo, load_tokenizer, prepare
from muon_dist.data.corpus import documents
from muon_dist.data.token_files import export_tokens
from muon_dist.errors import ConfigError

from .refusal import refused
from .test_preparation import files_of, stream

DOCUMENTS = [[5, 6, 7, 2], [8, 2], [9, 10, 11, 12, 13, 2]]
FLAT = [one for ids in DOCUMENTS for one in ids]


def megatron(prefix: Path, code: int = 8, dtype: str = "<u2") -> Path:
    """The pair of files for DOCUMENTS, the last one of two sequences, written out byte by byte."""
    lengths, bounds = [4, 2, 3, 3], [0, 1, 2, 4]
    width = np.dtype(dtype).itemsize
    Path(f"{prefix}.bin").write_bytes(np.array(FLAT, dtype=dtype).tobytes())
    Path(f"{prefix}.idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<Q", 1)
        + struct.pack("<B", code)
        + struct.pack("<QQ", 4, 4)
        + struct.pack("<4i", *lengths)
        + struct.pack("<4q", *(width * n for n in (0, 4, 6, 9)))
        + struct.pack("<4q", *bounds)
    )
    return Path(f"{prefix}.idx")


def datatrove(path: Path, letter: str = "H") -> Path:
    """The files for DOCUMENTS, written out byte by byte."""
    path.write_bytes(struct.pack(f"<12{letter}", *FLAT))
    Path(f"{path}.index").write_bytes(struct.pack("<3Q", 4, 6, 12))
    Path(f"{path}.metadata").write_text(f"tok|{2 if letter == 'H' else 4}\n12\n12 T")
    return path


def ids_of(source: Source) -> list[list[int]]:
    return [one.ids.tolist() for one in documents(source) if one.tokens]


def test_files_written_byte_by_byte_are_read(tmp_path: Path) -> None:
    for number, (code, dtype) in enumerate([(8, "<u2"), (4, "<i4"), (5, "<i8")]):
        path = megatron(tmp_path / f"m{number}", code, dtype)
        for name in (path, path.with_suffix("")):  # Megatron names a pair by its prefix
            assert ids_of(Source(path=name)) == DOCUMENTS
    for letter in "HI":
        assert ids_of(Source(path=datatrove(tmp_path / f"{letter}.ds", letter))) == DOCUMENTS
    (tmp_path / "I.ds.metadata").unlink()
    assert ids_of(Source(path=tmp_path / "I.ds")) == DOCUMENTS
    (tmp_path / "other.txt").write_text("no tokens")
    assert ids_of(Source(path=tmp_path)) == DOCUMENTS * 5


def test_damaged_token_files_are_named(tmp_path: Path) -> None:
    path = megatron(tmp_path / "m")
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:20], whole[:9] + b"\x02" + whole[10:]):
        path.write_bytes(damaged)
        with refused(path):
            ids_of(Source(path=path))
    path.write_bytes(whole)
    path.with_suffix(".bin").write_bytes(b"\0\0\0")
    with refused(tmp_path / "m.bin", "3 bytes", "12 tokens of 2 bytes"):
        ids_of(Source(path=path))
    path.with_suffix(".bin").unlink()
    with refused(path, "the file with its tokens is missing", "m.bin"):
        ids_of(Source(path=path))
    path = datatrove(tmp_path / "d.ds")
    Path(f"{path}.index").write_bytes(b"123")
    with refused(f"{path}.index", "3 bytes"):
        ids_of(Source(path=path))
    Path(f"{path}.index").unlink()
    with refused(path, "index is missing"):
        ids_of(Source(path=path, format="datatrove"))


@pytest.mark.parametrize("kind", ["megatron", "datatrove"])
def test_out_and_in_again_gives_the_same_shards(
    tmp_path: Path, prepared: Path, tokenizer: TokenizerInfo, kind: str
) -> None:
    written = export_tokens(prepared, tmp_path / "out", kind)
    assert [path.stem for path in written] == ["00-topics-train", "00-topics-validation"]
    source = Source(path=written[0] if kind == "datatrove" else written[0].with_suffix(".idx"))
    settings = {"validation_fraction": 0, "shard_tokens": 20_000}
    prepare([source], tokenizer.path, tmp_path / "again", **settings)
    again = tmp_path / "again" / source.folder(0) / "train"
    for before, after in zip(stream(prepared / "00-topics" / "train"), stream(again), strict=True):
        assert np.array_equal(before, after)  # tokens, and document ends in tokens and in bytes of text
    with pytest.raises(ConfigError, match="exists already"):
        export_tokens(prepared, tmp_path / "out", kind)
    with pytest.raises(ConfigError, match="megatron, datatrove"):
        export_tokens(prepared, tmp_path / "other", "arrow")


def test_documents_of_tokens_are_split_as_their_text_is(
    tmp_path: Path, corpus: Path, tokenizer: TokenizerInfo
) -> None:
    source = Source(path=corpus)
    prepare([source], tokenizer.path, tmp_path / "all", validation_fraction=0)
    (path, *_) = export_tokens(tmp_path / "all", tmp_path / "out", "megatron")
    for name, one in {"text": source, "tokens": Source(path=path.with_suffix(".idx"))}.items():
        prepare([one], tokenizer.path, tmp_path / name, validation_fraction=0.1)
    first, second = (files_of(next((tmp_path / name).glob("00-*"))) for name in ("text", "tokens"))
    assert first == second


def test_tokens_of_another_tokenizer_are_refused(tmp_path: Path, tokenizer: TokenizerInfo) -> None:
    path = megatron(tmp_path / "m")
    raw = np.fromfile(path.with_suffix(".bin"), dtype="<u2")
    raw[3] = 1000
    raw.tofile(path.with_suffix(".bin"))
    with refused("document 0", "token id 1000", "tokenizer.path"):
        prepare([Source(path=path)], tokenizer.path, tmp_path / "out", validation_fraction=0)


def writers(name: str) -> object:
    """A module of another program, where .ci/extended (part tokens) has installed it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if os.environ.get("MUON_DIST_TEST_WRITERS") == "required":
            raise
        pytest.skip(f"{name}: {error}")


def test_files_of_megatrons_own_writer_and_reader(tmp_path: Path, prepared: Path) -> None:
    indexed = writers("megatron.core.datasets.indexed_dataset")
    torch = sys.modules["torch"]
    for dtype in (np.uint16, np.int32):
        builder = indexed.IndexedDatasetBuilder(str(tmp_path / f"{dtype.__name__}.bin"), dtype=dtype)  # type: ignore[attr-defined]
        for one in DOCUMENTS[:2]:
            builder.add_document(torch.tensor(one), [len(one)])
        builder.add_document(torch.tensor(DOCUMENTS[2]), [3, 3])
        builder.finalize(str(tmp_path / f"{dtype.__name__}.idx"))
        assert ids_of(Source(path=tmp_path / f"{dtype.__name__}.idx")) == DOCUMENTS
    (path, *_) = export_tokens(prepared, tmp_path / "out", "megatron")
    read = indexed.IndexedDataset(str(path.with_suffix("")))  # type: ignore[attr-defined]
    ids, ends = stream(prepared / "00-topics" / "train")
    assert np.array_equal(np.concatenate([read[k] for k in range(len(read))]), ids) and len(read) == len(ends)
    assert np.array_equal(read.document_indices, np.arange(len(ends) + 1))


def test_files_of_datatroves_own_writer_and_reader(tmp_path: Path, prepared: Path) -> None:
    tokens = writers("datatrove.pipeline.tokens.tokenizer")
    for size in (2, 4):
        file = tokens.TokenizedFile(  # type: ignore[attr-defined]
            str(tmp_path), f"{size}.ds", tokenizer_name_or_path="tok", save_final_metadata=True, token_size=size
        )
        for one in DOCUMENTS:
            file.write(one, None)
        file.close()
        assert ids_of(Source(path=tmp_path / f"{size}.ds")) == DOCUMENTS
    (path, *_) = export_tokens(prepared, tmp_path / "out", "datatrove")
    ids, _ = stream(prepared / "00-topics" / "train")
    reader = writers("datatrove.utils.dataset").DatatroveFileDataset(  # type: ignore[attr-defined]
        str(path), seq_len=31, token_size=2, return_positions=False
    )
    found = [reader[k]["input_ids"].tolist() for k in range(len(reader))]
    assert found == [ids[32 * k : 32 * k + 32].tolist() for k in range(len(found))] and len(found) == len(ids) // 32


def test_shown_samples_have_their_document_ends(prepared: Path, tokenizer: TokenizerInfo) -> None:
    from muon_dist.data.show import show_samples

    lines = list(show_samples(prepared, load_tokenizer(tokenizer.path), 4096, 2))
    ends = [line for line in lines if line == "---- <|eos|> end of document"]
    ids, _ = stream(prepared / "00-topics" / "train")
    count = len(ids) // 4096
    assert lines[0] == f"==== 00-topics: sample 0 of {count}, 4096 tokens"
    shown = [ids[k * 4096 : (k + 1) * 4096] for k in (0, count // 2)]
    assert len(ends) == sum(int((one == 2).sum()) for one in shown) > 0
    text = load_tokenizer(tokenizer.path).decode(shown[0][: int(np.argmax(shown[0] == 2))].tolist())
    assert lines[1] == text

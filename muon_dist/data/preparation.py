"""From sources to token shards: several processes, bounded memory, one rename at the end."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import multiprocessing
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from hashlib import blake2b
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from muon_dist.data.corpus import Source, documents, same_source, size_hint, source_record
from muon_dist.data.document import say
from muon_dist.data.encoder import Encoder
from muon_dist.data.files import folder_lock, new_folder
from muon_dist.data.shards import (
    MANIFEST_FILE,
    Manifest,
    PreparedSource,
    SplitTotals,
    SplitWriter,
    check_folder,
    token_dtype,
)
from muon_dist.data.tokenizer import load_tokenizer
from muon_dist.defaults import SHARD_TOKENS, VALIDATION_FRACTION
from muon_dist.errors import DataError

_BATCH_BYTES = 1 << 20  # bytes of text in one task of a worker
_BATCH_DOCUMENTS = 1024
_INLINE_BATCHES = 8  # a corpus with fewer batches is done before worker processes could start


def prepare(
    sources: Sequence[Source],
    tokenizer_dir: str | Path,
    out_dir: str | Path,
    *,
    validation_fraction: float = VALIDATION_FRACTION,
    shard_tokens: int = SHARD_TOKENS,
    workers: int = 1,
    seed: int = 0,
    progress: bool = True,
    overwrite: bool = False,
    verify: bool = False,
    rebuild: bool = False,
    add_bos: bool | None = None,
) -> Manifest:
    """Tokenize the sources into ``out_dir`` and return its manifest.

    Every source keeps its own shard set, so that weights apply at sampling time. A document goes to the validation
    split by a hash of its text and ``seed``: the same text always to the same side, whatever else the corpus holds;
    if that selects no document of a source, the document with the lowest hash goes there. The bytes written do not
    depend on ``workers``.

    A folder prepared before from the same inputs is kept, after a check of its file sizes (``verify``: of every
    SHA-256). The inputs are tokenizer, settings and documents; paths, times, names, compression and weights do not
    count, and a source that no longer exists counts as unchanged. A folder of other inputs is a DataError, or is built
    again with ``rebuild``; a damaged one is built again only with ``overwrite``. The folder appears by one rename
    after everything is on disk. DataError also on bad sources (see ``documents``).

    ``add_bos``: begin documents with the beginning-of-sequence token; None: as the tokenizer does it.
    """
    _check_settings(sources, validation_fraction, shard_tokens, workers)
    out = Path(out_dir)
    encoder = load_tokenizer(tokenizer_dir, add_bos)
    settings = {"validation_fraction": validation_fraction, "shard_tokens": shard_tokens, "seed": seed}
    with folder_lock(out):
        known, trouble = _existing(out, overwrite)
        old = [one.record for one in known.sources] if known else []
        records = [source_record(s, old[k] if k < len(old) else None) for k, s in enumerate(sources)]
        if known is not None:
            trouble = _difference(known, encoder, settings, sources, records)
            if trouble is None:
                trouble = _damage(out, known, verify)
                if trouble is None:
                    return known
            elif rebuild:
                say(f"{out}: {trouble} It is prepared again.")
                overwrite = True
        if trouble is not None and not overwrite:
            raise DataError(f"{trouble} Choose another folder, or prepare again with overwrite.")
        with new_folder(out) as folder:
            bar = _bar(progress, sources)
            with bar, _encoding(encoder, seed, workers) as encode:
                prepared = [
                    _prepare_source(source, record, folder / source.folder(k), encoder, settings, encode, bar)
                    for k, (source, record) in enumerate(zip(sources, records, strict=True))
                ]
            info = encoder.info
            manifest = Manifest(info.vocab_size, info.eos_id, info.sha256, settings, tuple(prepared), info.bos_ids)
            manifest.write(folder)
        return manifest


def _check_settings(sources: Sequence[Source], fraction: float, shard_tokens: int, workers: int) -> None:
    if not sources:
        raise DataError("data.sources: at least one source is needed.")
    if not 0 <= fraction < 1:
        raise DataError(f"data.validation_fraction: {fraction} is not in [0, 1).")
    if shard_tokens < 1 or workers < 1:
        raise DataError(f"data.shard_tokens ({shard_tokens}) and data.workers ({workers}) must be at least 1.")


def _existing(out: Path, overwrite: bool) -> tuple[Manifest | None, str | None]:
    """The manifest in ``out`` if there is one, and its error. Raises DataError for a folder of another program."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None, None
    if not (out / MANIFEST_FILE).is_file():
        raise DataError(f"{out}: exists and was not prepared by this program (no {MANIFEST_FILE}); choose another.")
    try:
        return Manifest.load(out), None
    except DataError as error:
        if not overwrite:
            raise
        return None, str(error)


def _damage(out: Path, known: Manifest, verify: bool) -> str | None:
    try:
        check_folder(out, known, hashes=verify)
    except DataError as error:
        return str(error)
    return None


def _difference(
    known: Manifest, encoder: Encoder, settings: dict[str, Any], sources: Sequence[Source], records: list[Any]
) -> str | None:
    """The difference from the earlier inputs, or None. A source with changed files is read, because documents
    decide."""
    start = "was prepared from other inputs: "
    info = encoder.info
    if (known.tokenizer_sha256, known.eos_id) != (info.sha256, info.eos_id):
        return f"The data folder {start}another tokenizer."
    if known.bos_ids != info.bos_ids:
        return f"The data folder {start}token ids {known.bos_ids} before each document (now {info.bos_ids})."
    if known.settings != settings:
        changed = [
            f"{k} {known.settings.get(k)} (now {settings[k]})"
            for k in settings
            if known.settings.get(k) != settings[k]
        ]
        return f"The data folder {start}{', '.join(changed)}."
    if len(known.sources) != len(records):
        return f"The data folder {start}{len(known.sources)} sources (now {len(records)})."
    for one, source, record in zip(known.sources, sources, records, strict=True):
        if not same_source(one.record, record) and ("commit" in record or _content(source) != one.content_sha256):
            return f"The data folder {start}the content or description of source {record['label']} has changed."
    return None


def _content(source: Source) -> str:
    """The digest of a source's documents, as `_batches` takes it."""
    digest = hashlib.sha256()
    for _ in _batches(source, digest):
        pass
    return digest.hexdigest()


def _bar(progress: bool, sources: Sequence[Source]) -> Any:
    """A progress bar over bytes of text; silent unless this is rank 0 on a terminal."""
    shown = progress and sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
    hints = [size_hint(source) for source in sources] if shown else []
    total = sum(hint for hint in hints if hint is not None) if None not in hints else None
    return tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=not shown)


class _Batch(NamedTuple):
    """Documents of one kind (UTF-8 text, or with ``tokens`` ids as in ``Document``), and the origin of the first."""

    data: list[bytes]
    tokens: bool
    origin: str


class _Encoded(NamedTuple):
    """A batch of documents: ids of all with their end-of-sequence tokens (tokens,), and per document its tokens, its
    bytes and its hash for the split, each (documents,)."""

    ids: npt.NDArray[np.integer[Any]]
    lengths: list[int]
    sizes: list[int]
    keys: list[int]


def _encode(encoder: Encoder, seed: int, batch: _Batch) -> _Encoded:
    """The batch as tokens. Documents of tokens are decoded, because their bytes and their split depend on the text."""
    info = encoder.info
    bos, eos = np.array(info.bos_ids, dtype=np.int64), np.array([info.eos_id])
    if batch.tokens:
        found = [encoder.bare(np.frombuffer(data, dtype="<i4"), batch.origin) for data in batch.data]
        texts = [encoder.decode(ids.tolist()).encode("utf-8") for ids in found]
    else:
        texts = batch.data
        found = encoder.encode([data.decode("utf-8") for data in texts])
    ids = np.concatenate([part for one in found for part in (bos, one, eos)])
    salt = seed.to_bytes(16, "little", signed=True)
    keys = [int.from_bytes(blake2b(data, digest_size=8, key=salt).digest(), "little") for data in texts]
    narrow = ids.astype(token_dtype(info.vocab_size))
    return _Encoded(narrow, [len(bos) + len(one) + 1 for one in found], [len(data) for data in texts], keys)


_worker: tuple[Encoder, int] | None = None


def _start_worker(encoder: Encoder, seed: int) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process, one core
    _worker = (encoder, seed)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:  # a killed parent cannot stop its workers, and they would wait for tasks forever
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _encode_in_worker(batch: _Batch) -> _Encoded:
    assert _worker is not None
    return _encode(*_worker, batch)


class _Encoding:
    """Encodes batches in order: the first few here, the rest in worker processes, which start when needed."""

    def __init__(self, encoder: Encoder, seed: int, workers: int) -> None:
        self.encoder, self.seed, self.workers = encoder, seed, workers
        self.pool: ProcessPoolExecutor | None = None
        self._inline = _INLINE_BATCHES

    def run(self, batches: Iterator[_Batch]) -> Iterator[_Encoded]:
        """Results in the order of the batches, with at most two running tasks per worker."""
        here = batches if self.workers == 1 else itertools.islice(batches, self._inline)
        for batch in here:
            self._inline -= 1
            yield _encode(self.encoder, self.seed, batch)
        pending: deque[Future[_Encoded]] = deque()
        try:
            for batch in batches:
                pending.append(self._started().submit(_encode_in_worker, batch))
                if len(pending) > 2 * self.workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise DataError("A worker process of the preparation died (out of memory?); use fewer workers.") from None

    def _started(self) -> ProcessPoolExecutor:
        if self.pool is None:
            # spawn: a fork would copy the locks of this process's threads (torch, tokenizers), even if they are held
            context = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(self.workers, context, _start_worker, (self.encoder, self.seed))
        return self.pool


@contextlib.contextmanager
def _encoding(encoder: Encoder, seed: int, workers: int) -> Iterator[_Encoding]:
    encoding = _Encoding(encoder, seed, workers)
    try:
        yield encoding
    finally:
        if encoding.pool is not None:
            encoding.pool.shutdown(cancel_futures=True)


def _batches(source: Source, digest: Any) -> Iterator[_Batch]:
    """Documents in batches of about _BATCH_BYTES; ``digest`` takes in every document and its length."""
    batch, size = _Batch([], False, ""), 0
    for data, place, tokens in documents(source):
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
        if batch.data and (size >= _BATCH_BYTES or len(batch.data) >= _BATCH_DOCUMENTS or tokens != batch.tokens):
            yield batch
            batch, size = _Batch([], tokens, place), 0
        elif not batch.data:
            batch = _Batch([], tokens, place)
        batch.data.append(data)
        size += len(data)
    if batch.data:
        yield batch


class _Splitter:
    """Sends each document to its split. Until a document has a hash below the threshold, the one with the lowest hash
    is held back: if no such document comes, it becomes the validation split."""

    def __init__(self, train: SplitWriter, validation: SplitWriter, fraction: float) -> None:
        self.train, self.validation = train, validation
        self._threshold = fraction * 2.0**64
        self._held: tuple[int, npt.NDArray[np.integer[Any]], int] | None = None

    def add(self, key: int, ids: npt.NDArray[np.integer[Any]], size: int) -> None:
        if key < self._threshold:
            self.validation.add(ids, size)
        elif self._threshold == 0 or self.validation.documents:
            self.train.add(ids, size)
        elif self._held is None:
            self._held = (key, ids.copy(), size)
        elif key < self._held[0]:
            self._release(self.train)
            self._held = (key, ids.copy(), size)
        else:
            self.train.add(ids, size)

    def _release(self, writer: SplitWriter) -> None:
        if self._held is not None:
            writer.add(*self._held[1:])
            self._held = None

    def finish(self, label: str) -> dict[str, SplitTotals]:
        self._release(self.train if self.validation.documents or not self.train.documents else self.validation)
        count = self.train.documents + self.validation.documents
        if not count:
            raise DataError(f"{label}: holds no text: every document is empty.")
        if not self.train.documents or (self._threshold and not self.validation.documents):
            raise DataError(
                f"{label}: too short to be split: {count} document(s) of "
                f"{self.train.bytes + self.validation.bytes} bytes in all. "
                "Add text, lower the source's document_bytes, or set data.validation_fraction to 0."
            )
        return {"train": self.train.finish(), "validation": self.validation.finish()}


def _prepare_source(
    source: Source,
    record: dict[str, Any],
    folder: Path,
    encoder: Encoder,
    settings: dict[str, Any],
    encoding: _Encoding,
    bar: Any,
) -> PreparedSource:
    info = encoder.info
    train, validation = (
        SplitWriter(folder / split, info.vocab_size, info.eos_id, settings["shard_tokens"])
        for split in ("train", "validation")
    )
    splitter = _Splitter(train, validation, settings["validation_fraction"])
    digest = hashlib.sha256()
    batches = _batches(source, digest)
    first = next(batches, None)
    if first is not None and not first.tokens:
        encoder.check([data.decode("utf-8") for data in first.data], source.label)
    for batch in encoding.run(itertools.chain([first] if first is not None else [], batches)):
        starts = itertools.accumulate(batch.lengths, initial=0)
        for start, length, size, key in zip(starts, batch.lengths, batch.sizes, batch.keys, strict=False):
            splitter.add(key, batch.ids[start : start + length], size)
            bar.update(size)
    splits = splitter.finish(source.label)
    return PreparedSource(folder.name, record, digest.hexdigest(), splits)

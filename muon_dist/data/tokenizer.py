"""Training a sentencepiece tokenizer on a corpus, and loading any tokenizer for the preparation of shards.

The model is trained by sentencepiece and saved as a ``tokenizers`` file (``tokenizer.json``), which is what
``AutoTokenizer`` loads and what encodes the corpus. Both give the same ids, and both decode every text exactly, with
one exception: sentencepiece writes a space as U+2581, so it decodes a genuine U+2581 as a space. Here a space is a
space, and U+2581 is encoded by its bytes.
"""

from __future__ import annotations

import heapq
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from muon_dist.data.corpus import Source, documents, same_source, size_hint, source_record
from muon_dist.data.document import say
from muon_dist.data.encoder import (
    Encoder,
    TokenizerInfo,
    bos_ids,
    definition,
    vocabulary_size,
)
from muon_dist.data.files import folder_lock, new_folder, read_json, sha256_file, sha256_json
from muon_dist.defaults import VOCAB_SIZE
from muon_dist.errors import DataError
from muon_dist.failures import one_line
from muon_dist.json_files import write_json
from muon_dist.pretrained import pretrained_tokenizer

MODEL_TYPES = ("bpe", "unigram")
UNK, BOS, EOS, PAD = "<unk>", "<|bos|>", "<|eos|>", "<|pad|>"  # ids 0 to 3; not <s>, which HTML pages contain
TRAINING_FILE = "training.json"
MODEL_FILE = "sentencepiece.model"
_SPACE = "\u2581"  # how sentencepiece writes a space
_MAX_LINE = 4096  # characters of a training sentence; longer lines are cut
_CHECK_BYTES = 1 << 20  # text on which the saved tokenizer is checked
_SCORE_STEP = 64
_NORMAL = 1  # sentencepiece_model.proto, SentencePiece.Type.NORMAL
_USER = 4  # USER_DEFINED
_UNIGRAM = 1  # TrainerSpec.ModelType.UNIGRAM


def train_tokenizer(
    sources: Sequence[Source],
    out_dir: str | Path,
    *,
    model_type: str = "bpe",
    vocab_size: int = VOCAB_SIZE,
    sample_bytes: int = 20_000_000,
    seed: int = 0,
    threads: int = 1,
    overwrite: bool = False,
    special_tokens: Sequence[str] = (),
    split_digits: bool = False,
    rebuild: bool = False,
) -> TokenizerInfo:
    """Train a tokenizer on a sample of the sources and save it as a folder for ``AutoTokenizer``.

    Byte fallback, no normalization, the newline is one symbol, runs of spaces may be one piece. The sample takes
    whole documents up to ``sample_bytes`` in all, each source its share by weight. ``special_tokens`` become one token
    each wherever a text contains them. ``split_digits``: each digit is a token. A folder with a tokenizer of the same
    inputs does not change (weights do not count); a tokenizer of other inputs is replaced only with ``rebuild`` or
    ``overwrite``.

    Raises DataError when a source is bad, the corpus is too small for the vocabulary (the largest possible one is
    named), or a text of the corpus is not decoded exactly.
    """
    if model_type not in MODEL_TYPES:
        raise DataError(f"tokenizer.model_type: {model_type!r} is not one of {', '.join(MODEL_TYPES)}.")
    if not sources:
        raise DataError("A tokenizer needs at least one data source.")
    out = Path(out_dir)
    with folder_lock(out):
        known = read_json(out / TRAINING_FILE) if (out / TRAINING_FILE).exists() else {}
        records = [source_record(source, old) for source, old in _pairs(sources, known.get("sources", []))]
        settings = {
            "model_type": model_type,
            "vocab_size": vocab_size,
            "sample_bytes": sample_bytes,
            "seed": seed,
        }
        # only if they are set, so that tokenizers trained before these settings existed stay valid
        settings |= {"special_tokens": list(special_tokens)} if special_tokens else {}
        settings |= {"split_digits": True} if split_digits else {}
        if _is_done(out, known, settings, sources, records, overwrite, rebuild):
            return load_tokenizer(out).info
        sample = list(_sample(sources, sample_bytes, seed))
        model = _train(sample, model_type, vocab_size, threads, special_tokens, split_digits)
        with new_folder(out) as folder:
            _save(model, folder, special_tokens)
            _check(folder, sample)
            files = {file.name: sha256_file(file) for file in sorted(folder.iterdir())}
            about = {"weights": [source.weight for source in sources], "sample_sha256": sha256_json(sample)}
            write_json(folder / TRAINING_FILE, {"settings": settings, "files": files, "sources": records, **about})
        return load_tokenizer(out).info


def _pairs(sources: Sequence[Source], known: Sequence[Any]) -> Iterator[tuple[Source, Any]]:
    return ((source, known[k] if k < len(known) else None) for k, source in enumerate(sources))


def _is_done(
    out: Path,
    known: dict[str, Any],
    settings: dict[str, Any],
    sources: Sequence[Source],
    records: list[Any],
    overwrite: bool,
    rebuild: bool,
) -> bool:
    """Whether ``out`` has the tokenizer of these inputs. Raises DataError if it is damaged or of other inputs."""
    if not out.exists() or not any(out.iterdir()):
        return False
    difference = _difference(out, known, settings, sources, records)
    if difference is None:
        return _is_whole(out, known, overwrite)
    if overwrite:
        return False
    if not rebuild:
        raise DataError(
            f"{out}: holds a tokenizer trained with other inputs (different: {difference}). "
            "Choose another folder, or overwrite it."
        )
    say(f"{out}: other inputs than before ({difference}): the tokenizer is trained again.")
    return False


def _difference(
    out: Path, known: dict[str, Any], settings: dict[str, Any], sources: Sequence[Source], records: list[Any]
) -> str | None:
    """The difference from the inputs of the tokenizer in ``out``, or None. If files differ, the sample is drawn again
    with the earlier weights, because only its text counts."""
    if not known:
        raise DataError(f"{out}: holds something other than a tokenizer trained here; choose another folder.")
    before = {name: value for name, value in known["settings"].items() if name != "weights"}
    changed = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
    if changed:
        return ", ".join(changed)
    old = known.get("sources", [])
    if len(old) == len(records) and all(same_source(a, b) for a, b in zip(old, records, strict=True)):
        return None
    weights = known.get("weights", [])
    if len(weights) == len(sources):
        then = [replace(source, weight=weight) for source, weight in zip(sources, weights, strict=True)]
        sample = list(_sample(then, settings["sample_bytes"], settings["seed"]))
        if sha256_json(sample) == known.get("sample_sha256"):
            return None
    return "sources"


def _is_whole(out: Path, known: dict[str, Any], overwrite: bool) -> bool:
    damaged = [name for name, digest in known["files"].items() if _differs(out / name, digest)]
    if damaged and not overwrite:
        raise DataError(f"{out / damaged[0]}: damaged (its SHA-256 is not the recorded one). Overwrite the tokenizer.")
    return not damaged


def _differs(file: Path, digest: str) -> bool:
    return not file.is_file() or sha256_file(file) != digest


def _sample(sources: Sequence[Source], sample_bytes: int, seed: int) -> Iterator[str]:
    """Documents up to ``sample_bytes`` in all, each source its share by weight. If a source's size is known, the
    documents with the lowest hashes of their numbers are taken, from all over it; of a stream, the first ones."""
    total = sum(source.weight for source in sources)
    for source in sources:
        share = sample_bytes * source.weight / total
        taken = list(_lowest(source, share, seed) if size_hint(source) is not None else _first(source, share))
        if not taken:
            raise DataError(f"{source.label}: no text for the tokenizer's sample; raise tokenizer.sample_bytes.")
        yield from taken


def _texts(source: Source) -> Iterator[bytes]:
    for document in documents(source):
        if document.tokens:
            raise DataError(
                f"{source.label}: holds tokens, not text, from which no tokenizer can be trained: set tokenizer.path "
                "to the tokenizer that made them."
            )
        yield document.data


def _first(source: Source, share: float) -> Iterator[str]:
    size = 0
    for data in _texts(source):
        yield data.decode("utf-8")
        size += len(data)
        if size >= share:
            return


def _lowest(source: Source, share: float, seed: int) -> Iterator[str]:
    chosen: list[tuple[int, int, bytes]] = []  # a heap, the highest hash first
    size = 0
    for number, data in enumerate(_texts(source)):
        digest = blake2b(f"{seed} {number}".encode(), digest_size=8).digest()
        heapq.heappush(chosen, (-int.from_bytes(digest, "little"), number, data))
        size += len(data)
        while size > share and len(chosen) > 1:
            size -= len(heapq.heappop(chosen)[2])
    return (data.decode("utf-8") for _, _, data in sorted(chosen, key=lambda one: one[1]))


def _sentences(sample: Sequence[str]) -> Iterator[str]:
    """Training sentences: lines without the characters that the trainer cannot take (its own space sign, NUL)."""
    for text in sample:
        for line in text.replace(_SPACE, " ").replace("\0", " ").split("\n"):
            for start in range(0, len(line), _MAX_LINE):
                yield line[start : start + _MAX_LINE]


def _train(
    sample: Sequence[str], model_type: str, vocab_size: int, threads: int, special: Sequence[str], split_digits: bool
) -> bytes:
    """The serialized sentencepiece model."""
    import sentencepiece

    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(sample),
            model_writer=buffer,
            model_type=model_type,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n", *special],
            split_digits=split_digits,
            # the characters of special and byte pieces, so that a text that spells such a piece never matches it
            required_chars="".join(sorted({*"<0x123456789ABCDEF>", *UNK, *BOS, *EOS, *PAD})),
            character_coverage=0.9999,
            max_sentence_length=4 * _MAX_LINE,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            unk_piece=UNK,
            bos_piece=BOS,
            eos_piece=EOS,
            pad_piece=PAD,
            # unigram sums over threads in float32: another number of threads gives another model
            num_threads=threads if model_type == "bpe" else 1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(_explain(str(error), vocab_size, sum(map(len, sample)))) from None
    return _rounded(buffer.getvalue())


def _explain(message: str, vocab_size: int, characters: int) -> str:
    start = f"tokenizer.vocab_size: {vocab_size} is too"
    if found := re.search(r"value <= (\d+)", message):
        return f"{start} large for this corpus ({characters} characters sampled); the largest possible is {found[1]}."
    if found := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return f"{start} small for this corpus; the smallest possible is {found[1]}."
    if "insert_id" in message or "vocab_size()" in message:
        return f"{start} small: the 256 bytes, the special pieces and the single characters of the corpus need more."
    return f"sentencepiece cannot train on this corpus: {message.strip()}"


def _proto(model: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    return proto


def _rounded(model: bytes) -> bytes:
    """Unigram scores rounded to 1/64. Sentencepiece adds them in float32, ``tokenizers`` in float64; sums of such
    scores are exact in both, so ties between segmentations are resolved equally (before, they differed in 56 of 62,696
    lines of the default corpus). The number of tokens is unchanged to six digits.
    """
    proto = _proto(model)
    if proto.trainer_spec.model_type == _UNIGRAM:
        for piece in proto.pieces:
            piece.score = round(piece.score * _SCORE_STEP) / _SCORE_STEP
    return bytes(proto.SerializeToString())


def _save(model: bytes, folder: Path, special: Sequence[str]) -> None:
    """Write the folder: tokenizer.json, its configuration, and the sentencepiece model."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    proto = _proto(model)
    # sentencepiece's sign for a space becomes the space itself, so a genuine U+2581 in a text stays unchanged
    pieces = [(p.piece.replace(_SPACE, " ") if p.type == _NORMAL else p.piece, p.score, p.type) for p in proto.pieces]
    tokenizer = Tokenizer(_unigram(pieces) if proto.trainer_spec.model_type == _UNIGRAM else _bpe(pieces))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (UNK, BOS, EOS, PAD)])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in special])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    (folder / MODEL_FILE).write_bytes(model)


def _bpe(pieces: Sequence[tuple[str, float, int]]) -> Any:
    """BPE with a merge for every way to make a piece of two pieces, best piece first. Among the merges of one piece
    the longer left part comes first: that equals merging from the left in runs of one character."""
    from tokenizers import models

    normal = sorted((-score, name) for name, score, kind in pieces if kind == _NORMAL)
    names = {name for _, name in normal}
    merges = [
        (name[:k], name[k:])
        for _, name in normal
        for k in range(len(name) - 1, 0, -1)
        if name[:k] in names and name[k:] in names
    ]
    vocab = {name: number for number, (name, _, _) in enumerate(pieces)}
    return models.BPE(vocab=vocab, merges=merges, unk_token=UNK, byte_fallback=True, fuse_unk=True)


def _unigram(pieces: Sequence[tuple[str, float, int]]) -> Any:
    """Unigram; control and byte pieces get a score below any spelling of them, because ``tokenizers``, unlike
    sentencepiece, would match them in a text that contains their names."""
    from tokenizers import models

    never = min(score for _, score, kind in pieces if kind == _NORMAL) - 1e4
    scored = [(name, score if kind in (_NORMAL, _USER) else never) for name, score, kind in pieces]
    return models.Unigram(scored, unk_id=0, byte_fallback=True)


def _check(folder: Path, sample: Sequence[str]) -> None:
    """Load the folder as a user does, and check that texts decode exactly and have sentencepiece's ids."""
    import sentencepiece

    encoder = load_tokenizer(folder)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / MODEL_FILE))
    checked = 0
    for text in sample:
        ids = encoder.encode([text])[0].tolist()
        if encoder.decode(ids) != text:
            raise DataError(f"The tokenizer does not give this text of the corpus back: {text[:200]!r}")
        if _SPACE not in text and ids != reference.encode(text):
            raise DataError(f"The saved tokenizer and sentencepiece give different ids for: {text[:200]!r}")
        checked += len(text)
        if checked >= _CHECK_BYTES:
            return


def load_tokenizer(path: str | Path, add_bos: bool | None = None) -> Encoder:
    """The encoder of any folder that ``AutoTokenizer`` loads from disk, with a ``tokenizers`` backend and an
    end-of-sequence token. Nothing is downloaded and no code of the folder is run. Raises DataError otherwise.

    ``add_bos``: whether documents begin with the beginning-of-sequence token; None: as the tokenizer does it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such tokenizer folder.")
    try:
        tokenizer = pretrained_tokenizer(folder)
    except Exception as error:  # transformers raises many kinds on a damaged or incomplete folder
        raise DataError(
            f"{folder}: AutoTokenizer cannot load this folder ({type(error).__name__}: {one_line(error)})."
        ) from error
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{folder}: the tokenizer has no end-of-sequence token, which every document needs at its end."
        )
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise DataError(f"{folder}: the tokenizer has no tokenizer.json; save it in the fast format first.")
    made = definition(tokenizer, folder)
    digest = sha256_json({**made, "post_processor": None})
    bos = bos_ids(tokenizer, add_bos)
    info = TokenizerInfo(folder, vocabulary_size(tokenizer), tokenizer.eos_token_id, digest, bos)
    return Encoder(info, json.dumps(made))

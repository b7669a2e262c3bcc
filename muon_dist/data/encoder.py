"""Text to token ids and back, the same in shards, prompts and samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from muon_dist.data.document import say
from muon_dist.errors import DataError

_CHECKED_BYTES = 1 << 18  # characters of a source with which a tokenizer is tested


@dataclass(frozen=True)
class TokenizerInfo:
    """Facts about a tokenizer folder.

    ``vocab_size`` is one more than the largest id, also if ids have gaps. ``sha256`` is the hash of everything that
    decides the ids of a text; the format of the file does not matter. ``bos_ids`` are the ids with which each document
    begins.
    """

    path: Path
    vocab_size: int
    eos_id: int
    sha256: str
    bos_ids: tuple[int, ...] = ()


class Encoder:
    """Text to ids with the tokenizer of a folder. It is pickled as the folder's own definition, so that worker
    processes encode exactly as this process does."""

    def __init__(self, info: TokenizerInfo, definition: str) -> None:
        from tokenizers import Tokenizer

        self.info = info
        self._definition = definition
        self._tokenizer = Tokenizer.from_str(definition)
        # a special token spelled in a text is text: it must not end a document
        self._tokenizer.encode_special_tokens = True

    def __reduce__(self) -> tuple[Any, ...]:
        return Encoder, (self.info, self._definition)

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.int64]]:
        """Token ids of each text, shape (tokens,), nothing added."""
        try:
            found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the Rust library raises only a bare Exception
            raise DataError(f"{self.info.path}: the tokenizer cannot encode text ({error}).") from error
        return [np.asarray(encoding.ids, dtype=np.int64) for encoding in found]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens by name."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def bare(self, ids: npt.NDArray[np.integer[Any]], origin: str) -> npt.NDArray[np.int64]:
        """Ids from another program, (tokens,), without the tokens that begin and end a document.

        Raises DataError when an id is outside the vocabulary.
        """
        if len(ids) and int(ids.max()) >= self.info.vocab_size:
            raise DataError(
                f"{origin}: holds token id {int(ids.max())}, and the tokenizer {self.info.path} has "
                f"{self.info.vocab_size} ids: set tokenizer.path to the tokenizer that made the file."
            )
        bos = len(self.info.bos_ids)
        if bos and tuple(ids[:bos].tolist()) == self.info.bos_ids:
            ids = ids[bos:]
        if len(ids) and ids[-1] == self.info.eos_id:
            ids = ids[:-1]
        return ids.astype(np.int64)

    def check(self, texts: Sequence[str], label: str) -> None:
        """Test the tokenizer on the beginning of a source; warns if a text does not decode to itself.

        Raises DataError if the same text gets other ids the second time.
        """
        left = _CHECKED_BYTES
        for text in texts:
            part, left = text[:left], left - len(text)
            first, second = self.encode([part])[0].tolist(), self.encode([part])[0].tolist()
            if first != second:
                raise DataError(
                    f"{self.info.path}: the tokenizer gives other ids for the same text each time (sampling): "
                    "turn its sampling off."
                )
            back = self.decode(first)
            if back != part:
                at = next((k for k, (a, b) in enumerate(zip(part, back, strict=False)) if a != b), len(back))
                start = max(at - 20, 0)
                say(
                    f"{self.info.path}: the tokenizer is lossy: of {label}, {part[start : at + 20]!r} comes back as "
                    f"{back[start : at + 20]!r}. The model learns and writes the second form."
                )
                return
            if left <= 0:
                return


def definition(tokenizer: Any, folder: Path) -> dict[str, Any]:
    """The definition for the ``tokenizers`` library: without truncation, padding and dropout; the tokenizer's own
    markers are found in text. The tokens that frame a text (BOS, EOS, PAD, UNK) stay special: a text cannot spell
    them."""
    definition: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    definition |= {"truncation": None, "padding": None}
    if definition["model"].get("dropout"):
        say(
            f"{folder}: the tokenizer has a BPE dropout of {definition['model']['dropout']}, which would give other "
            "tokens in each run: text is encoded without it."
        )
        definition["model"]["dropout"] = None
    frame = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    for added in definition.get("added_tokens", []):
        added["special"] = added["special"] and added["content"] in frame
    return definition


def vocabulary_size(tokenizer: Any) -> int:
    """Number of ids that a model needs for a transformers tokenizer: one more than its largest id."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))


def text_ids(tokenizer: Any, text: str, framed: bool) -> list[int]:
    """The token ids of a text, with or without the tokenizer's own tokens before and after it."""
    ids = tokenizer(text, add_special_tokens=framed, return_token_type_ids=False)["input_ids"]
    return [int(one) for one in np.asarray(ids).reshape(-1)]


def frame(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(ids that a transformers tokenizer puts before a text, ids that it puts behind it)."""
    bare, full = text_ids(tokenizer, "a", False), text_ids(tokenizer, "a", True)
    for start in range(len(full) - len(bare) + 1):
        if bare and full[start : start + len(bare)] == bare:
            return tuple(full[:start]), tuple(full[start + len(bare) :])
    return (), ()


def bos_ids(tokenizer: Any, add_bos: bool | None) -> tuple[int, ...]:
    """The ids with which each document begins. Raises DataError if ``add_bos`` is on and there is no such token."""
    before = frame(tokenizer)[0]
    if add_bos is None or (add_bos and before):
        return before
    if add_bos and tokenizer.bos_token_id is None:
        raise DataError("data.add_bos is true, and the tokenizer has no beginning-of-sequence token: remove add_bos.")
    return (tokenizer.bos_token_id,) if add_bos else ()


def frame_as_documents(tokenizer: Any, add_bos: bool | None) -> None:
    """Make a transformers tokenizer encode a text as in the shards: the same ids before it, nothing after it, no
    dropout. A model that is saved with it then gets prompts in the form of its training text."""
    from tokenizers.processors import TemplateProcessing

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    if getattr(backend.model, "dropout", None):
        backend.model.dropout = None
    wanted = bos_ids(tokenizer, add_bos)
    if frame(tokenizer) == (wanted, ()):
        return
    for name, value in (("add_bos_token", bool(wanted)), ("add_eos_token", False)):
        if hasattr(tokenizer, name):
            setattr(tokenizer, name, value)
    names = tokenizer.convert_ids_to_tokens(list(wanted))
    backend.post_processor = TemplateProcessing(
        single=[*names, "$A"], pair=[*names, "$A", "$B:1"], special_tokens=list(zip(names, wanted, strict=True))
    )

"""Texts to token ids in large batches, and which token a place in the text falls on.

A text is always tokenized whole, so its ids are the tokenizer's own. Where in it a source or a
target begins is then found from the lengths of the tokens in bytes, which byte-level tokenizers
give for nothing; for others, and for texts that the tokenizer normalises, from its offsets.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from llmray.data.plain_text import PlainText

Parts = Sequence[str]  # a text cut into sources and targets in turn


@dataclass(frozen=True)
class Encoded:
    """Token ids of some texts, one after the other.

    `bounds[i]` and `bounds[i + 1]` enclose the ids of text i. `borders[i]` says for each part of
    text i how many of its tokens lie before the part's end.
    """

    ids: np.ndarray  # (T,) int32
    bounds: np.ndarray  # (num_texts + 1,) int64
    borders: list[list[int]]


class Encoder:
    """A tokenizer, read from the text of its tokenizer.json.

    Args:
        tokenizer_json: that text.
        plain: which special tokens the texts hold as plain text; None where all are tokens.
    """

    def __init__(self, tokenizer_json: str, plain: PlainText | None = None) -> None:
        self._plain = plain
        raw = json.loads(plain.renamed(tokenizer_json) if plain else tokenizer_json)
        # nothing is added, cut or padded here; a post-processor would also trim offsets
        raw |= {"truncation": None, "padding": None, "post_processor": None}
        self._tokenizer = Tokenizer.from_str(json.dumps(raw))
        self._may_compose, normalises = _normalisation(raw.get("normalizer"))
        self._token_bytes = None if normalises else _token_bytes(self._tokenizer, raw)

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of texts one after the other, (T,) int32, and their bounds, (num_texts + 1,) int64.

        No token is added before or after a text.
        """
        return self._encode(self._revealed(texts))

    def _encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return _joined(self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False))

    def _revealed(self, texts: Sequence[str]) -> Sequence[str]:
        return texts if self._plain is None else list(map(self._plain.revealed, texts))

    def encode_parts(self, texts: Sequence[Parts]) -> Encoded:
        """Ids of texts that consist of sources and targets in turn, and the borders of these.

        A token that reaches over the end of a part belongs to the source on either side.
        """
        texts = [self._revealed(parts) for parts in texts]
        wholes = ["".join(parts) for parts in texts]
        if self._token_bytes is None:
            encodings = self._tokenizer.encode_batch(wholes, add_special_tokens=False)
            ids, bounds = _joined(encodings)
            pairs = zip(texts, encodings, strict=True)
            return Encoded(ids, bounds, [_by_offsets(parts, found) for parts, found in pairs])
        ids, bounds = self._encode(wholes)
        ends = np.cumsum(self._token_bytes[ids])
        borders = []
        for i, parts in enumerate(texts):
            found = self._by_bytes(parts, wholes[i], ends, int(bounds[i]), int(bounds[i + 1]))
            if found is None:
                encoding = self._tokenizer.encode(wholes[i], add_special_tokens=False)
                found = _by_offsets(parts, encoding)
            borders.append(found)
        return Encoded(ids, bounds, borders)

    def borders(self, parts: Parts, ids: np.ndarray) -> list[int]:
        """How many tokens lie before the end of each part of a text that has the tokens `ids`.

        A token that reaches over the end of a part belongs to the part of even number beside it.
        """
        parts = self._revealed(parts)
        whole = "".join(parts)
        found = None
        if self._token_bytes is not None:
            ends = np.cumsum(self._token_bytes[ids])
            found = self._by_bytes(parts, whole, ends, 0, len(ids))
        if found is None:
            encoding = self._tokenizer.encode(whole, add_special_tokens=False)
            found = _by_offsets(parts, encoding)
        return found

    def _by_bytes(
        self, parts: Parts, whole: str, ends: np.ndarray, first: int, last: int
    ) -> list[int] | None:
        """Borders from lengths in bytes; None where these do not add up to the text's."""
        sizes = [len(part) if part.isascii() else len(part.encode()) for part in parts]
        places = list(accumulate(sizes))
        before = int(ends[first - 1]) if first else 0
        if last == first or int(ends[last - 1]) - before != places[-1]:
            return None
        if self._may_compose and not unicodedata.is_normalized("NFC", whole):
            return None
        borders = np.searchsorted(ends[first:last], np.array(places) + before, "right").tolist()
        for number in range(0, len(places), 2):  # where a source ends and a target begins
            count = borders[number]
            reached = int(ends[first + count - 1]) - before if count else 0
            borders[number] += reached != places[number]
        return list(borders)


def _joined(encodings: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    lists = [encoding.ids for encoding in encodings]
    bounds = np.fromiter(accumulate(map(len, lists), initial=0), np.int64, len(lists) + 1)
    return np.fromiter(chain.from_iterable(lists), np.int32, int(bounds[-1])), bounds


def _by_offsets(parts: Parts, encoding: Any) -> list[int]:
    """Borders from the characters that each token covers."""
    size = sum(map(len, parts))
    borders = []
    for number, place in enumerate(accumulate(map(len, parts))):
        at, token = place, None
        while at < size and (token := encoding.char_to_token(at)) is None:
            at += 1  # a blank that the tokenizer drops
        if token is None:
            borders.append(len(encoding))
            continue
        is_source = number % 2 == 0
        borders.append(token + (is_source and encoding.token_to_chars(token)[0] < place))
    return borders


def _normalisation(normalizer: Any) -> tuple[bool, bool]:
    """Whether a normalizer composes characters, and whether it does anything beyond that."""
    if normalizer is None:
        return False, False
    if normalizer["type"] == "Sequence":
        found = [_normalisation(inner) for inner in normalizer["normalizers"]]
        return any(composes for composes, _ in found), any(more for _, more in found)
    return normalizer["type"] == "NFC", normalizer["type"] != "NFC"


def _token_bytes(tokenizer: Tokenizer, raw: dict[str, Any]) -> np.ndarray | None:
    """How many bytes of text each token stands for, by id; None where that is not fixed."""
    if not _is_byte_level(raw.get("pre_tokenizer")):
        return None
    added = tokenizer.get_added_tokens_decoder()
    if any(token.lstrip or token.rstrip for token in added.values()):
        return None  # such a token takes blanks of the text with it
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    sizes = np.zeros(max(vocabulary.values()) + 1, np.int64)
    for text, index in vocabulary.items():
        # each character of an ordinary token is one byte, those of an added one are text
        sizes[index] = len(text.encode()) if index in added else len(text)
    return sizes


def _is_byte_level(pre_tokenizer: Any) -> bool:
    if pre_tokenizer is None:
        return False
    if pre_tokenizer["type"] == "Sequence":
        return any(_is_byte_level(inner) for inner in pre_tokenizer["pretokenizers"])
    return pre_tokenizer["type"] == "ByteLevel" and not pre_tokenizer.get("add_prefix_space")

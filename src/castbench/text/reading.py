"""A description as a model reads it: its tokens, and the word, sentence and part that each belongs to."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from castbench.errors import InputError
from castbench.text.normalise import normalise_matscibert
from castbench.text.parts import PARTS, find_parts
from castbench.text.tokens import PackedTokens

SPECIAL = len(PARTS)  # the part of [CLS] and [SEP]
LABELS = (*PARTS, "[CLS], [SEP]")


@dataclass(frozen=True)
class Reading:
    """A text of T tokens, [CLS] first, cut where the cache is cut.

    Attributes:
        text: what the tokenizer saw.
        ids: (T,) int64 tokens.
        words: the text between white space, as far as it was read, with [CLS] and [SEP].
        word: (T,) index of each token's word.
        part: (T,) index into `LABELS`.
        sentence: (T,) number of the sentence; -1 for [CLS] and [SEP].
        n_full: tokens before the text was cut.
    """

    text: str
    ids: np.ndarray
    words: list[str]
    word: np.ndarray
    part: np.ndarray
    sentence: np.ndarray
    n_full: int

    @property
    def inner(self) -> np.ndarray:
        """Places (t,) of the tokens that are neither [CLS] nor [SEP]."""
        return np.flatnonzero(self.part != SPECIAL)

    def by_word(self, weights: np.ndarray) -> np.ndarray:
        """Weights (..., T) of tokens summed over each word (..., W)."""
        return weights @ np.equal.outer(self.word, np.arange(len(self.words))).astype(weights.dtype)

    def by_part(self, weights: np.ndarray) -> np.ndarray:
        """Weights (..., T) of tokens summed over each entry of `LABELS` (..., parts)."""
        return weights @ np.equal.outer(self.part, np.arange(len(LABELS))).astype(weights.dtype)

    @property
    def part_of_word(self) -> list[int]:
        """Entry of `LABELS` of each word's first token."""
        _, first = np.unique(self.word, return_index=True)
        return self.part[first].tolist()


class Reader:
    """Cuts texts as `tokenize_text` does.

    Raises:
        InputError: the tokenizer cannot say which characters a token stands for.
    """

    def __init__(self, encoder: Path, max_tokens: int, normalise: bool):
        from castbench.text.tokenizer import load_tokenizer  # seconds

        self.tokenizer = load_tokenizer(encoder)
        self.max_tokens, self.normalise = max_tokens, normalise
        if not self.tokenizer.is_fast:
            raise InputError(f"{encoder}: has no fast tokenizer, which knows a token's place in the text")

    @classmethod
    def of(cls, tokens: Path, encoder: Path) -> Self:
        """The reader of a folder written by `tokenize_text`."""
        manifest = PackedTokens.open(tokens).manifest
        return cls(encoder, manifest["max_tokens"], manifest["normalise"] != "none")

    def read(self, text: str | None) -> Reading:
        """Tokens of a text; [CLS] alone where there is none."""
        text = (text or "").strip()
        text = normalise_matscibert(text) if self.normalise else text
        cls, sep = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        tokens = [(cls, (0, 0), True)]  # id, characters, whether it stands for none
        if text:
            encoded = self.tokenizer(
                text,
                return_offsets_mapping=True,
                return_special_tokens_mask=True,
                truncation=False,
                verbose=False,
            )
            columns = (encoded[name] for name in ("input_ids", "offset_mapping", "special_tokens_mask"))
            tokens = list(zip(*columns, strict=True))
        n_full = len(tokens)
        if n_full > self.max_tokens:
            tokens = [*tokens[: self.max_tokens - 1], (sep, (0, 0), True)]
        return self._label(text, tokens, n_full)

    def _label(self, text: str, tokens: list[tuple[int, tuple[int, int], bool]], n_full: int) -> Reading:
        characters = [(match.start(), match.group()) for match in re.finditer(r"\S+", text)]
        starts = np.array([start for start, _ in characters], dtype=np.int64)
        spans = find_parts(text)
        span_starts = np.array([span.start for span in spans], dtype=np.int64)
        words, word, part, sentence = [], [], [], []
        seen = -1  # the word of the text that the last token belongs to
        for token, (start, stop), special in tokens:
            if special:
                words.append(str(self.tokenizer.convert_ids_to_tokens(token)))
                part.append(SPECIAL)
                sentence.append(-1)
            else:
                # Pieces of bytes hold a space, or are one.
                start += len(text[start:stop]) - len(text[start:stop].lstrip())
                place = int(np.searchsorted(starts, start, side="right")) - 1
                if place != seen:
                    words.append(characters[place][1])
                    seen = place
                span = spans[max(int(np.searchsorted(span_starts, start, side="right")) - 1, 0)]
                part.append(PARTS.index(span.part))
                sentence.append(span.sentence)
            word.append(len(words) - 1)
        ids = np.array([token for token, _, _ in tokens])
        return Reading(text, ids, words, np.array(word), np.array(part), np.array(sentence), n_full)

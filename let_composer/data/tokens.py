"""Documents of a piece to token ids: exact, and in memory bounded by the piece even for one very long document."""

import contextlib
import hashlib
import io
import json
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from let_composer.data import DataError, describe
from let_composer.data.plan import Plan
from let_composer.data.sources import Piece

__all__ = ["PROBLEMS_KEPT", "UNLABELLED", "Encoder", "documents"]

log = logging.getLogger(__name__)

UNLABELLED = "unlabelled"
STRETCH = 1 << 20  # characters given to the tokenizer at a time: an encoding takes some 100 bytes a token
WINDOW = 256
TRIES = 8
PROBLEMS_KEPT = 100


class Encoder:
    """A tokenizer that reads special tokens as plain text and cuts long texts only where that changes no id."""

    def __init__(self, tokenizer: str, dtype: str) -> None:
        self.tokenizer, self.dtype = Tokenizer.from_str(tokenizer), dtype
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        # A document that contains "<|endoftext|>" must not be able to end itself.
        self.tokenizer.encode_special_tokens = True

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """Encode texts that together hold about ``STRETCH`` characters, unless one alone is longer."""
        short = iter(self._encode([text for text in texts if len(text) <= STRETCH]))
        return [
            next(short) if len(text) <= STRETCH else np.concatenate([self._encode([s])[0] for s in self._cut(text)])
            for text in texts
        ]

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, self.dtype) for encoding in encodings]

    def _cut(self, text: str) -> Iterator[str]:
        start = 0
        while (left := len(text) - start) > STRETCH:
            if not (cut := self._place(text, start + STRETCH // 2, start + STRETCH)):
                log.warning(
                    "This tokenizer gives other ids where a long document is cut, so its next %d characters are "
                    "tokenized at once. That takes some 100 bytes a token.",
                    left,
                )
                break
            yield text[start:cut]
            start = cut
        yield text[start:]

    def _place(self, text: str, low: int, high: int) -> int | None:
        for mark in "\n ":
            place = high
            for _ in range(TRIES):
                if (place := text.rfind(mark, low, place)) < 0:
                    break
                before, after = text[place - WINDOW : place], text[place : place + WINDOW]
                whole, left, right = self._encode([before + after, before, after])
                if np.array_equal(whole, np.concatenate([left, right])):
                    return place
        return None


def documents(
    piece: Piece, plan: Plan, problems: list[dict[str, Any]], counts: Counter[str]
) -> Iterator[tuple[str, str, float, int]]:
    """Yield text, subset, the text's place in [0, 1) by its hash, and its bytes.

    What cannot be read is raised as DataError or, to be skipped, counted, and the first of it added to ``problems``.
    """
    for number, line in enumerate(io.BytesIO(piece.payload), piece.first_line):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
            text = row.get(plan.text_key) if isinstance(row, dict) else None
            if not isinstance(text, str):
                got = f"one with {', '.join(row)}" if isinstance(row, dict) else str(row)
                kind, message = "no text", f"expected an object with a string under {plan.text_key!r}, got {got[:80]}"
            elif not text or text.isspace():
                kind, message = "empty text", "the document holds no text"
            else:
                yield text, _subset(row) if plan.by_subset else "", *_digest(text)
                continue
        except UnicodeError as error:
            kind, message = "invalid UTF-8", str(error)
        except (ValueError, RecursionError) as error:
            kind, message = "invalid JSON", str(error)
        problem = {"path": piece.path, "line": number, "kind": kind, "message": message[:200]}
        if plan.on_error == "stop":
            raise DataError(describe(problem))
        counts[kind] += 1
        if len(problems) < PROBLEMS_KEPT:
            problems.append(problem)


def _subset(row: dict[str, Any]) -> str:
    meta = row.get("meta")
    if isinstance(meta, str):
        with contextlib.suppress(ValueError):
            meta = json.loads(meta)
    name = (meta.get("pile_set_name") if isinstance(meta, dict) else None) or row.get("pile_set_name")
    return name.encode().decode() if isinstance(name, str) else UNLABELLED  # lone surrogates are an error here


def _digest(text: str) -> tuple[float, int]:
    """Where the text falls in [0, 1), and its length in bytes; raises UnicodeEncodeError for lone surrogates."""
    digest, size = hashlib.blake2b(digest_size=8), 0
    for start in range(0, len(text), STRETCH):
        block = text[start : start + STRETCH].encode()
        digest.update(block)
        size += len(block)
    return int.from_bytes(digest.digest(), "big") / 2**64, size

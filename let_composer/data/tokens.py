"""Documents of a piece to token ids: exact, and in memory bounded by the piece even for one very long document."""

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from let_composer.data import DataError
from let_composer.data.reading import Piece

__all__ = ["UNLABELLED", "Documents", "Encoder", "describe"]

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
        return [
            np.array(encoding.ids, self.dtype)
            for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def _cut(self, text: str) -> Iterator[str]:
        start = 0
        while len(text) - start > STRETCH:
            cut = self._place(text, start + STRETCH // 2, start + STRETCH)
            if not cut:
                log.warning(
                    "This tokenizer gives other ids where a long document is cut, so its next %d characters are "
                    "tokenized at once. That takes some 100 bytes a token.",
                    len(text) - start,
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


class Documents:
    """The documents of a piece; what cannot be read is counted or, with ``stop``, raised as DataError."""

    def __init__(self, piece: Piece, text_key: str, by_subset: bool, stop: bool) -> None:
        self.piece, self.text_key, self.by_subset, self.stop = piece, text_key, by_subset, stop
        self.problems: list[dict[str, Any]] = []
        self.counts: dict[str, int] = {}

    def __iter__(self) -> Iterator[tuple[str, str, float, int]]:
        """Yield text, subset, the text's place in [0, 1) by its hash, and its bytes."""
        payload = self.piece.payload
        lines: Any = payload if isinstance(payload, list) else _lines(payload)
        for number, line in enumerate(lines, self.piece.first_line):
            try:
                if isinstance(line, bytes):
                    if not line.strip():
                        continue
                    line = json.loads(line)
                text = line.get(self.text_key) if isinstance(line, dict) else None
                if isinstance(text, bytes):
                    text = text.decode()
                if not isinstance(text, str):
                    expected = f"expected an object with a string under {self.text_key!r}, got {str(line)[:80]}"
                    self._problem(number, "no text", expected)
                elif not text or text.isspace():
                    self._problem(number, "empty text", "the document holds no text")
                else:
                    yield text, _subset(line) if self.by_subset else "", *_digest(text)
            except DataError:
                raise
            except UnicodeError as error:
                self._problem(number, "invalid UTF-8", str(error))
            except (ValueError, RecursionError) as error:
                self._problem(number, "invalid JSON", str(error))

    def _problem(self, line: int, kind: str, message: str) -> None:
        problem = {"path": self.piece.path, "line": line, "kind": kind, "message": message[:200]}
        if self.stop:
            raise DataError(describe(problem))
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if len(self.problems) < PROBLEMS_KEPT:
            self.problems.append(problem)


def describe(problem: dict[str, Any]) -> str:
    """Say where and what it is, in a line."""
    return f"{problem['path']}, line {problem['line']}: {problem['kind']}: {problem['message']}"


def _lines(payload: bytes) -> Iterator[bytes]:
    start = 0
    while start < len(payload):
        end = payload.find(b"\n", start) + 1 or len(payload)
        yield payload[start:end]
        start = end


def _subset(row: dict[str, Any]) -> str:
    meta = row.get("meta")
    if isinstance(meta, str | bytes):
        with contextlib.suppress(ValueError):
            meta = json.loads(meta)
    name = (meta.get("pile_set_name") if isinstance(meta, dict) else None) or row.get("pile_set_name")
    if isinstance(name, bytes):
        name = name.decode()
    return name if isinstance(name, str) else UNLABELLED


def _digest(text: str) -> tuple[float, int]:
    """Where the text falls in [0, 1), and its length in bytes; raises UnicodeEncodeError for lone surrogates."""
    digest, size = hashlib.blake2b(digest_size=8), 0
    for start in range(0, len(text), STRETCH):
        block = text[start : start + STRETCH].encode()
        digest.update(block)
        size += len(block)
    return int.from_bytes(digest.digest(), "big") / 2**64, size

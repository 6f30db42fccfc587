"""Documents of a piece to token ids: exact, and in memory bounded by the piece even for one very long document."""

import contextlib
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from let_composer.data import DataError, describe
from let_composer.data.plan import Plan
from let_composer.data.sources import Piece

__all__ = ["PROBLEMS_KEPT", "UNLABELLED", "Encoder", "documents"]

UNLABELLED = "unlabelled"
STRETCH = 1 << 20  # characters given to the tokenizer at a time
WINDOW = 256
PROBLEMS_KEPT = 100


class Encoder:
    """A tokenizer that reads special tokens as plain text.

    It takes some 100 bytes of memory a token. A long text is cut at line ends that change no id; what has none is
    tokenized at once.
    """

    def __init__(self, tokenizer: str, dtype: str) -> None:
        self.tokenizer, self.dtype = Tokenizer.from_str(tokenizer), dtype
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        # A document that contains "<|endoftext|>" must not be able to end itself.
        self.tokenizer.encode_special_tokens = True

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """Encode texts that together hold about ``STRETCH`` characters, unless one alone is longer."""
        if all(len(text) <= STRETCH for text in texts):
            return self._encode(texts)
        return [np.concatenate([self._encode([part])[0] for part in self._stretches(text)]) for text in texts]

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, self.dtype) for encoding in encodings]

    def _stretches(self, text: str) -> Iterator[str]:
        start = 0
        while len(text) - start > STRETCH:
            line_end = text.rfind("\n", start + WINDOW, start + STRETCH)
            for end in (line_end, line_end + 1) if line_end > 0 else ():
                left, right = text[end - WINDOW : end], text[end : end + WINDOW]
                first, second, whole = self._encode([left, right, left + right])
                if np.array_equal(whole, np.concatenate([first, second])):
                    yield text[start:end]
                    start = end
                    break
            else:
                break
        yield text[start:]


def documents(
    piece: Piece, plan: Plan, problems: list[dict[str, Any]], counts: Counter[str]
) -> Iterator[tuple[str, str, float, int]]:
    """Yield text, subset, the text's place in [0, 1) by its hash, and its bytes.

    What cannot be read is raised as DataError or, to be skipped, counted, and the first of it added to ``problems``.
    """

    def problem(line: int, kind: str, message: str) -> None:
        found = {"path": piece.path, "line": line, "kind": kind, "message": message[:200]}
        if plan.on_error == "stop":
            raise DataError(describe(found))
        counts[kind] += 1
        if len(problems) < PROBLEMS_KEPT:
            problems.append(found)

    if piece.damage:
        problem(**piece.damage)
    for number, line in enumerate(io.BytesIO(piece.payload), piece.first_line):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
            text = row.get(plan.text_key) if isinstance(row, dict) else None
            about = (_subset(row) if plan.by_subset else "", *_digest(text)) if isinstance(text, str) else None
        except UnicodeError as error:
            problem(number, "invalid UTF-8", str(error))
        except (ValueError, RecursionError) as error:
            problem(number, "invalid JSON", str(error))
        else:
            if not about:
                got = f"one with {', '.join(row)}" if isinstance(row, dict) else str(row)
                problem(number, "no text", f"expected an object with a string under {plan.text_key!r}, got {got[:80]}")
            elif not text or text.isspace():
                problem(number, "empty text", "the document holds no text")
            else:
                yield text, *about


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

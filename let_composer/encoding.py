"""Exact token ids of much text in little time and bounded memory.

A byte-level tokenizer cuts text into pieces (words with the space before them, numbers, runs of punctuation) and
encodes each by itself. Text repeats its pieces, so the ids of a piece are computed once, by the tokenizer, and then
looked up. What has to be known here is where the tokenizer certainly cuts; for the pre-tokenizers of most models it is.
All other tokenizers encode whole texts, or stretches of them where cutting was seen to change nothing.
"""

import itertools
import json
import logging
import re
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

from tokenizers import Tokenizer

__all__ = ["Encoder"]

logger = logging.getLogger(__name__)

# Most characters that the tokenizer is given at a time: an encoding takes some 100 bytes a token.
STRETCH = 1 << 20
# Bytes, roughly, that the remembered pieces may take before they are forgotten.
REMEMBERED = 128 << 20
CHECKED = 1 << 14
WINDOW = 256
TRIES = 16

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Llama 3 and Qwen 2, which differ in how many digits make a piece.
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The same for ASCII text, spelt out for Python's re. A piece here may be several of the tokenizer's, never half of one.
SPACE = r"\t-\r "
MARK = r"\x00-\x08\x0e-\x1f!-/:-@\[-`{-\x7f"
CONTRACTION = "'(?:[sdmt]|ll|ve|re)"
ENDING = rf"|[{SPACE}]+(?![^{SPACE}])|[{SPACE}]+"
ASCII = {
    GPT2: rf"{CONTRACTION}| ?[A-Za-z]+| ?[0-9]+| ?[{MARK}]+" + ENDING,
    # Digits are taken out first, and spaces before them are then the last of their stretch.
    "digits": rf"{CONTRACTION}| ?[A-Za-z]+|[0-9]+| ?[{MARK}]+|[{SPACE}]+(?![^{SPACE}0-9])|[{SPACE}]+",
    **{
        CL100K % digits: rf"(?i:{CONTRACTION})|[{MARK}\t\v\f ]?[A-Za-z]+|[0-9]{digits}| ?[{MARK}]+[\r\n]*"
        rf"|[{SPACE}]*[\r\n]+" + ENDING
        for digits in ("{1,3}", "")
    },
}
# Which characters beyond ASCII are letters depends on the version of Unicode, which are spaces has not since 2013. So a
# run between spaces that holds any is kept whole, with the spaces before it. Unicode's normal form C reaches across no
# cut either: it leaves ASCII as it is, but for the base of an accent.
SPACES = SPACE + r"\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
OTHER = (
    rf"(?:(?=[{SPACES}])|(?<![^{SPACES}]))(?=[{SPACES}]*[{MARK}A-Za-z0-9]*[^\x00-\x7f])"
    rf"[{SPACES}]*[^{SPACES}]*"
)


class Encoder:
    """A tokenizer, faster, with the same ids for every text.

    Args:
        tokenizer: What ``tokenizers.Tokenizer.to_str`` gives. Its special tokens are read as plain text.
        typecode: Of ``array.array``, for the ids.
    """

    def __init__(self, tokenizer: str, typecode: str) -> None:
        """Find out whether the tokenizer's cuts are known."""
        self.tokenizer, self.typecode = Tokenizer.from_str(tokenizer), typecode
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        # A document that contains "<|endoftext|>" must not be able to end itself.
        self.tokenizer.encode_special_tokens = True
        self.ids: dict[str, bytes] = {}
        self.remembered = 0
        table = json.loads(tokenizer)
        ascii_pattern = _pattern(table)
        self.patterns: dict[bool, re.Pattern[str]] = {}
        if ascii_pattern is not None:
            # In the one family whose punctuation takes the line ends after it, they belong to such a run as well.
            lines = rf"(?:[{SPACES}]*[\r\n])?" if r"\r\n" in ascii_pattern else ""
            self.patterns = {True: re.compile(ascii_pattern), False: re.compile(f"{OTHER}{lines}|{ascii_pattern}")}
        spaces = sorted((t["content"] for t in table["added_tokens"] if not t["special"]), key=len, reverse=True)
        self.spaces = re.compile(f"({'|'.join(spaces)})") if spaces else None

    @property
    def knows_pieces(self) -> bool:
        """Whether ids are looked up piece by piece."""
        return bool(self.patterns)

    def __call__(self, texts: list[str]) -> list[bytes]:
        """Encode texts, which together should hold about ``STRETCH`` characters unless one alone is longer.

        Returns:
            The ids of each text, as the bytes of an ``array.array``; special tokens are neither read nor added.
        """
        if not self.patterns:
            return [b"".join(part) for part in self._in_stretches(texts)]
        if max(map(len, texts), default=0) > STRETCH:
            return [b"".join(self._long(text)) for text in texts]
        pieces = [self._pieces(text) for text in texts]
        self._learn(set().union(*pieces))
        found = [b"".join(map(self.ids.__getitem__, part)) for part in pieces]
        self._check(texts, found)
        return found

    def _check(self, texts: list[str], found: list[bytes]) -> None:
        """Compare one of the texts with what the tokenizer itself makes of it."""
        for text, ids in zip(texts, found, strict=True):
            if 0 < len(text) < CHECKED:
                if [ids] != self._encode([text]):
                    raise RuntimeError(
                        "the ids put together from pieces are not the tokenizer's own, for a text that starts with "
                        f"{text[:80]!r}. This is a bug in let_composer.encoding: please report it with the tokenizer."
                    )
                return

    def _pieces(self, text: str) -> list[str]:
        parts = self.spaces.split(text) if self.spaces else (text,)
        return list(itertools.chain.from_iterable(map(self.patterns[text.isascii()].findall, parts)))

    def _long(self, text: str) -> Iterator[bytes]:
        find = self.patterns[text.isascii()].finditer

        def pieces() -> Iterator[str]:
            for part in self._parts(text):
                for found in find(part):
                    yield found[0]

        stream = pieces()
        while batch := list(itertools.islice(stream, STRETCH // 8)):
            self._learn(set(batch))
            yield b"".join(map(self.ids.__getitem__, batch))

    def _parts(self, text: str) -> Iterator[str]:
        """Split as ``re.split`` does, one part at a time."""
        start = 0
        for found in self.spaces.finditer(text) if self.spaces else ():
            yield text[start : found.start()]
            yield found[0]
            start = found.end()
        yield text[start:] if start else text

    def _learn(self, pieces: set[str]) -> None:
        if self.remembered > REMEMBERED:
            self.ids.clear()
            self.remembered = 0
        for batch in _batches(pieces.difference(self.ids)):
            self.ids.update(zip(batch, self._encode(batch), strict=True))
            self.remembered += sum(map(len, batch)) * 4 + len(batch) * 200

    def _encode(self, texts: list[str]) -> list[bytes]:
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [array(self.typecode, encoding.ids).tobytes() for encoding in encoded]

    # ---- tokenizers whose cuts are not known ----

    def _in_stretches(self, texts: list[str]) -> list[list[bytes]]:
        stretches = [(number, stretch) for number, text in enumerate(texts) for stretch in self._stretches(text)]
        found: list[list[bytes]] = [[] for _ in texts]
        numbers = iter([number for number, _ in stretches])
        for batch in _batches(stretch for _, stretch in stretches):
            for ids in self._encode(batch):
                found[next(numbers)].append(ids)
        return found

    def _stretches(self, text: str) -> Iterator[str]:
        start = 0
        while len(text) - start > STRETCH:
            cut = self._cut(text, start + STRETCH // 2, start + STRETCH)
            if not cut:
                logger.warning(
                    "This tokenizer gives other ids where a long document is cut, so the next %d characters of one are "
                    "tokenized at once. That takes some 100 bytes a token.",
                    len(text) - start,
                )
                break
            yield text[start:cut]
            start = cut
        yield text[start:] if start else text

    def _cut(self, text: str, low: int, high: int) -> int | None:
        """Find a space before which the tokenizer is seen to cut: with it or without, the ids around are the same."""
        for _ in range(TRIES):
            high = text.rfind(" ", low, high)
            if high < 0:
                return None
            before, after = text[high - WINDOW : high], text[high : high + WINDOW]
            whole, left, right = self._encode([before + after, before, after])
            if whole == left + right:
                return high
        return None


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Group texts to ``STRETCH`` characters."""
    batch, length = [], 0
    for text in texts:
        if batch and length + len(text) > STRETCH:
            yield batch
            batch, length = [], 0
        batch.append(text)
        length += len(text)
    if batch:
        yield batch


def _pattern(table: dict[str, Any]) -> str | None:
    """Find the pattern of pieces for a tokenizer.json; None where it is not known that cutting changes nothing."""
    if table["model"].get("dropout") or (table["normalizer"] or {"type": "NFC"}) != {"type": "NFC"}:
        return None
    plain = [token for token in table["added_tokens"] if not token["special"]]
    if any(
        token["content"].strip(" ") or token["lstrip"] or token["rstrip"] or token["single_word"] for token in plain
    ):
        return None
    if plain and any(" " in token["content"] for token in table["added_tokens"] if token["special"]):
        return None
    steps = table["pre_tokenizer"] or {}
    *first, last = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if last["use_regex"]:
        kinds = [step["type"] for step in first]
        return {(): ASCII[GPT2], ("Digits",): ASCII["digits"]}.get(tuple(kinds))
    if (
        len(first) == 1
        and first[0]["type"] == "Split"
        and first[0]["behavior"] == "Isolated"
        and not first[0]["invert"]
    ):
        return ASCII.get(first[0]["pattern"].get("Regex"))
    return None

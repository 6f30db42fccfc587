"""The fast encoder gives the ids of the tokenizer for every text, however it was cut and whatever is remembered."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_pile import EOS, english, jsonl
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from let_composer import encoding
from let_composer.encoding import Encoder

Split = pre_tokenizers.Split
ByteLevel = pre_tokenizers.ByteLevel
CUTS: dict[str, Any] = {
    "gpt2": lambda: ByteLevel(add_prefix_space=False),
    "neox": lambda: ByteLevel(add_prefix_space=False),
    "smollm2": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(True), ByteLevel(add_prefix_space=False)]),
    "digits": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(False), ByteLevel(add_prefix_space=False)]),
    **{
        name: lambda digits=digits: pre_tokenizers.Sequence(
            [Split(Regex(encoding.CL100K % digits), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        for name, digits in (("llama3", "{1,3}"), ("qwen2", ""))
    },
}
# Every class of character that a pre-tokenizer tells apart, and some that Unicode versions moved between them.
LETTERS = ["a", "S", "t", "ll", "'re", "'S", "'", "1", "23", ".", "_(", "\x00", "\x1c", " ", "  ", " " * 30, "\t", "\n"]
LETTERS += ["\r\n", "\f", "é", "e\u0301", "\u0301", "½", "²", "٣", "“", "—", "\xa0", "\u2028", "\u3000", "\x85", "漢字"]
LETTERS += ["🙂", "\u180e", "\u200b", "\u2000", "ſ", "K", ";", "\u0338", "\U0001e900", "가", "\u11a8", EOS]


def make(name: str) -> Tokenizer:
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = CUTS[name]()
    if name in ("neox", "qwen2"):
        tokenizer.normalizer = normalizers.NFC()
    # Merges within and across what is cut, so that a piece which is cut elsewhere gets other ids.
    texts = [*english(60_000), *gibberish(4_000, 12, seed=7)]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=3000,
            special_tokens=[EOS],
            initial_alphabet=ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if name == "neox":
        tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    return tokenizer


@pytest.fixture(scope="module", params=list(CUTS))
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return make(request.param)


def expected(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    return [encoded.ids for encoded in encoder.tokenizer.encode_batch(texts, add_special_tokens=False)]


def got(encoder: Encoder, texts: list[str]) -> list[list[int]]:
    return [np.frombuffer(ids, "uint16").tolist() for ids in encoder(texts)]


def gibberish(count: int, length: int, seed: int = 3) -> list[str]:
    chooser = random.Random(seed)
    texts = []
    for _ in range(count):
        some = chooser.sample(LETTERS, chooser.randint(2, 6))
        texts.append("".join(chooser.choices(some, k=chooser.randint(1, length))))
    return texts


def test_ids_are_the_tokenizers(tokenizer: Tokenizer) -> None:
    encoder = Encoder(tokenizer.to_str(), "H")
    assert encoder.knows_pieces
    texts = ["", *english(100_000), *gibberish(20_000, 12)]
    for text, ours, theirs in zip(texts, got(encoder, texts), expected(encoder, texts), strict=True):
        assert ours == theirs, repr(text)


def test_a_long_text_is_cut_nowhere(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "STRETCH", 1000)
    encoder = Encoder(tokenizer.to_str(), "H")
    texts = ["".join(gibberish(400, 12)), "\n\n".join(english(50_000)), "ab" * 3000, "漢字" * 2000]
    assert got(encoder, texts) == expected(encoder, texts)


def test_pieces_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "REMEMBERED", 20_000)
    encoder = Encoder(make("neox").to_str(), "H")
    texts = english(100_000)
    for start in range(0, len(texts), 20):
        batch = texts[start : start + 20]
        assert got(encoder, batch) == expected(encoder, batch)
        assert len(encoder.ids) < 1500


@pytest.mark.parametrize("cut", ["another pattern", "word", "none", "start"])
def test_unknown_tokenizers_are_cut_where_it_changes_nothing(
    cut: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = make("gpt2")
    edit: Any = tokenizer
    edit.pre_tokenizer = {
        "another pattern": pre_tokenizers.Sequence(
            [Split(Regex(r"\s?\p{L}+"), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
        ),
        "word": pre_tokenizers.Sequence(
            [pre_tokenizers.Whitespace(), ByteLevel(add_prefix_space=False, use_regex=False)]
        ),
        "none": ByteLevel(add_prefix_space=False, use_regex=False),
        "start": ByteLevel(add_prefix_space=False),
    }[cut]
    if cut == "start":  # put before each stretch, so that every cut shows
        edit.normalizer = normalizers.Prepend("_")
    encoder = Encoder(tokenizer.to_str(), "H")
    assert not encoder.knows_pieces
    monkeypatch.setattr(encoding, "STRETCH", 2000)
    texts = [*english(20_000), "\n\n".join(english(20_000))]
    largest: list[int] = []
    encode = encoder._encode
    monkeypatch.setattr(encoder, "_encode", lambda batch: largest.append(sum(map(len, batch))) or encode(batch))
    assert got(encoder, texts) == expected(encoder, texts)
    assert (max(largest) > 2000) == (cut == "start") == ("tokenized at once" in caplog.text)


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table["model"].update(dropout=0.1),
        lambda table: table.update(normalizer={"type": "Lowercase"}),
        lambda table: table["pre_tokenizer"].update(add_prefix_space=True),
        lambda table: table["added_tokens"].append({**table["added_tokens"][0], "content": "<x>", "special": False}),
    ],
)
def test_what_would_change_the_cuts_is_seen(change: Any) -> None:
    table = json.loads(make("gpt2").to_str())
    assert encoding._pattern(table)
    change(table)
    assert encoding._pattern(table) is None


MEMORY = """
import resource, sys
from pathlib import Path
from tokenizers import Tokenizer
from let_composer.pile import Job, Piece, _start_worker, _tokenize
tokenizer, folder = sys.argv[1:]
line = Path(folder, "a.jsonl").read_bytes()
_start_worker(Job(tokenizer, 0, "uint16", "text", 0.0, False, "stop", Path(folder)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
_tokenize(Piece(0, 0, "a.jsonl", 1, line, len(line)))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / len(line))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "neox"])
def test_memory_for_one_large_document(tmp_path: Path, name: str) -> None:
    """Beside the document a worker needs a small multiple of it, where encodings alone would be more than 20 times."""
    text = "\n\n    ".join(english())
    (tmp_path / "a.jsonl").write_bytes(jsonl([text * (20_000_000 // len(text))]))
    command = [sys.executable, "-c", MEMORY, make(name).to_str(), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 6


def test_a_cut_in_the_wrong_place_is_noticed() -> None:
    encoder = Encoder(make("gpt2").to_str(), "H")
    encoder.patterns = {True: re.compile(r"."), False: re.compile(r".")}
    with pytest.raises(RuntimeError, match="not the tokenizer's own, for a text that starts with 'the the the"):
        encoder(["the the the the"])


def test_spaces_are_the_tokenizers() -> None:
    """Every character of Unicode but the surrogates, in patterns and in the built-in one."""
    every = "".join(map(chr, (*range(0xD800), *range(0xE000, 0x110000))))
    ours = re.sub(f"[^{encoding.SPACES}]", "", every)
    assert "".join(part for part, _ in Split(Regex(r"\S"), "removed").pre_tokenize_str(every)) == ours
    for space in ours:
        # The built-in pattern cuts "\t\tx" three times.
        cuts = ByteLevel(add_prefix_space=False).pre_tokenize_str(f"a\t\t{space}")
        assert len(cuts) == 2

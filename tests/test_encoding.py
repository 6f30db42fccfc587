"""The fast encoder gives the ids of the tokenizer for every text, however it was cut and whatever is remembered."""

import random
from typing import Any

import numpy as np
import pytest
from test_pile import EOS, english
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
    texts = [*english(60_000), *("".join(pair) for pair in zip(LETTERS * 41, LETTERS[1:] * 41, strict=False))] * 2
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1500,
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

"""The ids are the tokenizer's, however long the text, and special tokens in it are text."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_convert import EOS, LENGTH, english, jsonl, make_tokenizer, plan, run, samples
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from let_composer.data import tokens
from let_composer.data.tokens import Encoder

# streaming opens files and shared memory and leaves closing them to the interpreter's exit.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

Split, ByteLevel = pre_tokenizers.Split, pre_tokenizers.ByteLevel
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS: dict[str, Any] = {
    "gpt2": lambda: ByteLevel(add_prefix_space=False),
    "smollm2": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(True), ByteLevel(add_prefix_space=False)]),
    "llama3": lambda: pre_tokenizers.Sequence(
        [Split(Regex(CL100K), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    ),
    "none": lambda: ByteLevel(add_prefix_space=False, use_regex=False),
    "start": lambda: ByteLevel(add_prefix_space=False),
}
# Every class of character that a pre-tokenizer tells apart.
LETTERS = ["a", "S", "ll", "'re", "'", "1", "23", ".", "_(", "\x00", " ", "  ", " " * 30, "\t", "\n", "\n\n", "\r\n"]
LETTERS += ["é", "e\u0301", "½", "٣", "“", "\xa0", "\u2028", "\u3000", "漢字", "🙂", "\u200b", "ſ", EOS]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), 3000)


@pytest.mark.parametrize("cut", CUTS)
def test_a_long_text_is_cut_only_where_no_id_changes(tokenizer: str, cut: str, monkeypatch: pytest.MonkeyPatch) -> None:
    edit: Any = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    edit.pre_tokenizer = CUTS[cut]()
    if cut == "start":  # put before each stretch, so that every cut shows
        edit.normalizer = normalizers.Prepend("_")
    encoder = Encoder(edit.to_str(), "uint16")
    chooser = random.Random(3)
    gibberish = "".join("".join(chooser.choices(chooser.sample(LETTERS, 4), k=12)) for _ in range(2000))
    lines = gibberish.replace(" ", "")
    texts = ["", *english(20_000), "\n\n".join(english(40_000)), gibberish, lines, "ab" * 3000, "漢字" * 2000]
    whole = encoder(texts)
    monkeypatch.setattr(tokens, "STRETCH", 2000)
    stretches: list[int] = []
    encode = encoder._encode
    monkeypatch.setattr(
        encoder, "_encode", lambda batch: stretches.append(max(map(len, batch), default=0)) or encode(batch)
    )
    for text, before, after in zip(texts[-5:], whole[-5:], encoder(texts[-5:]), strict=True):
        assert np.array_equal(before, after), text[:50]
    encoder([texts[-5]])
    assert (max(stretches[-30:]) > 2000) == (cut == "start")


def test_a_document_longer_than_a_stretch_and_one_that_names_the_end(tmp_path: Path, tokenizer: str) -> None:
    text = "\n\n".join(english(400_000))
    texts = [text * (2 * tokens.STRETCH // len(text) + 1), f"The token {EOS} ends nothing. " * 200, "a short one"]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    run(plan(tmp_path / "a.jsonl", tokenizer, piece_bytes=1 << 24, shard_bytes=1 << 22), tmp_path / "out", 1)
    stream = np.concatenate(samples(tmp_path / "out" / "train"))
    hf = AutoTokenizer.from_pretrained(tokenizer)
    hf.backend_tokenizer.encode_special_tokens = True
    expected = [i for text in texts for i in [*hf.backend_tokenizer.encode(text).ids, hf.eos_token_id]]
    assert stream.tolist() == expected[: len(stream)] and len(expected) - len(stream) < LENGTH


MEMORY = """
import resource, sys
from pathlib import Path
from let_composer.data.plan import Plan
from let_composer.data.shards import Job, start_worker, write_piece
from let_composer.data.sources import list_sources, read_pieces
work, plan = Path(sys.argv[2]), Plan((), sys.argv[1], 64, on_error="skip")
start_worker(Job(plan, Path(sys.argv[1], "tokenizer.json").read_text(), 0, "uint16", work, None), {})
def most(file):
    ((source,), _) = list_sources([file])
    for piece in read_pieces(source, 0, 1 << 20, "text"):
        write_piece(piece)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = most(sys.argv[3])
print([most(file) - before for file in sys.argv[4:]])
"""


@pytest.mark.slow
def test_memory_is_bounded(tmp_path: Path, tokenizer: str) -> None:
    """For a document of 30 MB in one line, and for a million rows that have no text."""
    text = "\n".join(english(400_000))
    (tmp_path / "small.jsonl").write_bytes(jsonl([text] * 8))
    (tmp_path / "textless.jsonl").write_bytes(b'{"body": "x"}\n' * 1_000_000)
    (tmp_path / "long.jsonl").write_bytes(jsonl([text * 75]))
    for folder in ("pieces", "out"):
        (tmp_path / folder).mkdir()
    names = [str(tmp_path / f"{name}.jsonl") for name in ("small", "textless", "long")]
    command = [sys.executable, "-c", MEMORY, tokenizer, str(tmp_path), *names]
    textless, long = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert textless < 50e6
    assert long < 8 * 75 * len(text)  # tokenized at once it is some 30 times its size

"""The ids are the tokenizer's, special tokens in a text are text, and a piece bounds the memory."""

import json
import subprocess
import sys

import pytest
from texts import english, jsonl, plan, run

MEMORY = """
import resource, sys
from pathlib import Path
from let_composer.data.sources import read_pieces
from let_composer.data.tokens import start_worker, tokenize
sys.path.insert(0, "tests")
from texts import plan
args = plan("", sys.argv[1], on_error="skip", eos_id=0, dtype="uint16")
start_worker(args, Path(sys.argv[1], "tokenizer.json").read_text())
def most(file):
    for piece in read_pieces(file, 1 << 20, "text"):
        tokenize(piece)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = most(sys.argv[2])
print([most(file) - before for file in sys.argv[3:]])
"""


@pytest.mark.slow
def test_memory_is_bounded(tmp_path, bpe):
    """Half a million rows without text take no more than others; a document takes up to 100 times its size."""
    text = "\n".join(english(400_000))
    (tmp_path / "small.jsonl").write_bytes(jsonl([text] * 8))
    (tmp_path / "textless.jsonl").write_bytes(b'{"body": "x"}\n' * 500_000)
    (tmp_path / "long.jsonl").write_bytes(jsonl([text * 10]))
    names = [str(tmp_path / f"{name}.jsonl") for name in ("small", "textless", "long")]
    command = [sys.executable, "-c", MEMORY, bpe, *names]
    textless, long = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert textless < 50e6
    assert long < 100 * 10 * len(text)


def test_a_document_that_is_too_long_is_said(tmp_path, bpe):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["a short one", "a" * ((64 << 20) + 1)]))
    with pytest.raises(
        ValueError, match=r"a\.jsonl, line 2: too long: expected at most 67108864 bytes, got .*: split it"
    ):
        run(plan(tmp_path / "a.jsonl", bpe), tmp_path / "out", workers=1)

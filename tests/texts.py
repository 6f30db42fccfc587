"""What the tests of the data path share: real text, a tokenizer trained on it, and a conversion in small pieces."""

import argparse
import json
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import StreamingDataset
from streaming.base.util import clean_stale_shared_memory
from transformers import AutoTokenizer

from let_composer.data.convert import add_arguments, convert

LENGTH = 64
EOS = "<|endoftext|>"
# streaming and boto3 open files, sockets and shared memory and leave closing them to the interpreter's exit.
leaves_open = [pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")]


def english(limit: int = 400_000) -> list[str]:
    """Paragraphs of Python's own reference, which every Python has."""
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))[:limit]
    return [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]


def ids(texts: list[str], tokenizer: str) -> list[int]:
    """What the shards must hold: special tokens are text, and each document has its end."""
    hf = AutoTokenizer.from_pretrained(tokenizer)
    hf.backend_tokenizer.encode_special_tokens = True
    return [i for text in texts for i in [*hf.backend_tokenizer.encode(text).ids, hf.eos_token_id]]


def jsonl(texts: list[str], subset: Callable[[int], str] = lambda _: "Pile-CC") -> bytes:
    rows = ({"text": text, "meta": {"pile_set_name": subset(i)}} for i, text in enumerate(texts))
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def plan(inputs: Path | str, tokenizer: str, **changes: Any) -> argparse.Namespace:
    """Arguments of the command line."""
    small: dict[str, Any] = {"sequence_length": LENGTH, "piece_bytes": 40_000, "shard_bytes": 20_000, "workers": 2}
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args([str(inputs), "--out", "", "--tokenizer", tokenizer, "--quiet"])
    return argparse.Namespace(**{**vars(args), **small, **changes})


def run(plan: argparse.Namespace, out: Path | str, **changes: Any) -> dict[str, Any]:
    return convert(argparse.Namespace(**{**vars(plan), "out": str(out), **changes}))


def shards(folder: Path) -> dict[str, bytes]:
    """Every file of a finished folder but those that reading leaves there."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".mds" and path.name != "streams.yaml"
    }


def samples(folder: Path) -> list[np.ndarray]:
    clean_stale_shared_memory()
    data = StreamingDataset(local=str(folder), batch_size=1, shuffle=False)
    return [data[i]["tokens"] for i in range(data.num_samples)]


def documents(folder: Path, tokenizer: str) -> list[str]:
    """The documents of a split in their order; what follows the last EOS is left out."""
    hf, stream = AutoTokenizer.from_pretrained(tokenizer), np.concatenate(samples(folder))
    ends = np.flatnonzero(stream == hf.eos_token_id)
    return [hf.decode(part[:-1].tolist()) for part in np.split(stream, ends + 1)[:-1]]

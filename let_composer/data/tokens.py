"""One piece of input to the token ids of its documents, in a worker."""

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import signal
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from multiprocessing.connection import wait
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from let_composer.data.sources import Piece

__all__ = ["PROBLEMS_KEPT", "SPLITS", "UNLABELLED", "start_worker", "tokenize"]

SPLITS = ("train", "val")
UNLABELLED = "unlabelled"
PROBLEMS_KEPT = 20
LONGEST = 64 << 20  # bytes of a document, which takes up to 100 times its size in memory

_args: Any
_tokenizer: Any


def start_worker(args: Any, tokenizer: str) -> None:
    """Prepare a process that outlives no killed parent; only the parent answers Ctrl-C, which reaches both."""
    global _args, _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if parent := multiprocessing.parent_process():
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _args, _tokenizer = args, Tokenizer.from_str(tokenizer)
    _tokenizer.no_truncation()
    _tokenizer.no_padding()
    # A document that contains "<|endoftext|>" must not be able to end itself.
    _tokenizer.encode_special_tokens = True


def tokenize(piece: Piece) -> tuple[dict[str, tuple[int, int, np.ndarray]], list[str], Counter[str]]:
    """Return documents, their bytes and ids for each ``"subset/split"``; what could not be read; how much of a kind."""
    problems, counts = list[str](), Counter[str]()
    streams: dict[str, list[tuple[int, np.ndarray]]] = defaultdict(list)
    for stream, text, size in _documents(piece, problems, counts):
        # Without the offsets that encode works out. One by one is quicker than in batches.
        (encoding,) = _tokenizer.encode_batch_fast([text], add_special_tokens=False)
        streams[stream].append((size, np.array([*encoding.ids, _args.eos_id], _args.dtype)))
    found = {}
    for stream, documents in streams.items():
        sizes, ids = zip(*documents, strict=True)
        found[stream] = len(sizes), sum(sizes), np.concatenate(ids)
    return found, problems, counts


def _documents(piece: Piece, problems: list[str], counts: Counter[str]) -> Iterator[tuple[str, str, int]]:
    """Yield stream, text and its bytes; raise, or count and note, what cannot be read."""

    def problem(line: int, kind: str, message: str) -> None:
        found = f"{piece.path}, line {line}: {kind}: {message[:200]}"
        if _args.on_error == "stop":
            raise ValueError(found)
        counts[kind] += 1
        if len(problems) < PROBLEMS_KEPT:
            problems.append(found)

    if piece.damage:
        problem(piece.first_line + piece.payload.count(b"\n"), "damaged file", piece.damage)
    for number, line in enumerate(io.BytesIO(piece.payload), piece.first_line):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
            text = row.get(_args.text_key) if isinstance(row, dict) else None
            content = text.encode() if isinstance(text, str) else None  # lone surrogates are an error
            subset = _subset(row) if _args.by_subset and content else ""
        except UnicodeError as error:
            problem(number, "invalid UTF-8", str(error))
        except (ValueError, RecursionError) as error:
            problem(number, "invalid JSON", str(error))
        else:
            if content is None:
                got = str(list(row) if isinstance(row, dict) else row)[:80]
                problem(number, "no text", f"expected an object with a string under {_args.text_key!r}, got {got}")
            elif not text or text.isspace():
                problem(number, "empty text", "the document holds no text")
            elif len(content) > LONGEST:
                problem(number, "too long", f"expected at most {LONGEST} bytes, got {len(content)}: split it")
            else:
                place = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") / 2**64
                yield f"{subset}/{SPLITS[place < _args.validation]}", text, len(content)


def _subset(row: dict[str, Any]) -> str:
    meta = row.get("meta")
    if isinstance(meta, str):
        with contextlib.suppress(ValueError):
            meta = json.loads(meta)
    name = (meta.get("pile_set_name") if isinstance(meta, dict) else None) or row.get("pile_set_name")
    return name.encode().decode() if isinstance(name, str) else UNLABELLED

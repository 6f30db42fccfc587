"""One piece of input to its shards, in a worker, and what is left over of all pieces to the last shards."""

import dataclasses
import logging
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from let_composer.data import DataError, replacing, write_json
from let_composer.data.plan import Plan
from let_composer.data.sources import Piece
from let_composer.data.streams import PILE_WEIGHTS
from let_composer.data.tokens import STRETCH, UNLABELLED, Encoder, documents

__all__ = [
    "HASH",
    "SPLITS",
    "Job",
    "leftovers",
    "start_worker",
    "stream_folder",
    "upload",
    "write_piece",
    "write_shards",
]

SPLITS = ("train", "val")
HASH = "xxh128"


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker needs to know besides the piece."""

    plan: Plan
    tokenizer: str
    eos: int
    dtype: str
    work: Path
    remote: str | None

    def record(self, piece: str, suffix: str = ".json") -> Path:
        """Where a piece's record is, once all else of the piece is there, or its tokens that are left over."""
        return self.work / "pieces" / f"{piece}{suffix}"


_job: Job
_encoder: Encoder


def start_worker(job: Job, environment: dict[str, str]) -> None:
    """Prepare a process that outlives no killed parent; only the parent answers Ctrl-C, which reaches both."""
    global _job, _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if parent := multiprocessing.parent_process():
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    os.environ.update(environment, TOKENIZERS_PARALLELISM="false")  # the server that forks may have an older one
    _job, _encoder = job, Encoder(job.tokenizer, job.dtype)


def write_piece(piece: Piece) -> set[str]:
    """Write a piece's shards, what is too little for one, and the record that says so; returns the subsets found."""
    plan, end = _job.plan, np.array([_job.eos], _job.dtype)
    problems, counts = [], Counter()
    streams: dict[str, Any] = defaultdict(lambda: {"documents": 0, "bytes": 0, "parts": []})
    batch: list[tuple[list[np.ndarray], str]] = []

    def encode() -> None:
        for (parts, _), ids in zip(batch, _encoder([text for _, text in batch]), strict=True):
            parts += ids, end
        batch.clear()

    length = 0
    for text, subset, place, size in documents(piece, plan, problems, counts):
        about = streams[f"{subset}/{SPLITS[place < plan.validation]}"]
        about["documents"] += 1
        about["bytes"] += size
        batch.append((about["parts"], text))
        if (length := length + len(text)) >= STRETCH:
            encode()
            length = 0
    encode()
    left = {}
    for stream, about in streams.items():
        tokens = np.concatenate(about.pop("parts"))
        whole = len(tokens) // plan.sequence_length * plan.sequence_length
        if tokens.nbytes < plan.piece_bytes >> 7:  # no tiny shards
            whole = 0
        folder = f"{stream_folder(stream)}/{piece.name}"
        about["shards"] = write_shards(_job, folder, tokens[:whole].reshape(-1, plan.sequence_length)) if whole else []
        about["tokens"], left[stream] = len(tokens), tokens[whole:]
    with replacing(_job.record(piece.name, ".npz")) as partial, partial.open("wb") as file:
        np.savez(file, **left)
    write_json(_job.record(piece.name), {"streams": streams, "problems": problems, "problem_counts": counts})
    return {stream.rpartition("/")[0] for stream in streams}


def leftovers(job: Job, stream: str, pieces: Iterable[str]) -> Iterator[np.ndarray]:
    """Yield samples of what a stream's pieces left over, in their order."""
    rest = np.empty(0, job.dtype)
    for piece in pieces:
        with np.load(job.record(piece, ".npz")) as left:
            rest = np.concatenate([rest, left[stream]])
        whole = len(rest) // job.plan.sequence_length * job.plan.sequence_length
        yield from rest[:whole].reshape(-1, job.plan.sequence_length)
        rest = rest[whole:]


def stream_folder(stream: str) -> str:
    """Return the folder of ``"subset/split"``; those of any two subsets differ."""
    subset, _, split = stream.rpartition("/")
    slug = re.sub(r"[^a-z0-9]+", "-", subset.lower()).strip("-")[:60]
    if not (subset in PILE_WEIGHTS or subset in ("", UNLABELLED)):
        slug += f"-{blake2b(subset.encode(), digest_size=3).hexdigest()}"
    return f"{slug}/{split}" if slug else split


def write_shards(job: Job, folder: str, samples: Iterable[np.ndarray]) -> list[dict[str, Any]]:
    """Write samples to a folder below ``out`` and upload them; returns their entries in the index above the folder."""
    from streaming import MDSWriter

    out = job.work / "out"
    with replacing(out / folder) as partial:
        columns = {"tokens": f"ndarray:{job.dtype}:{job.plan.sequence_length}"}
        options: Any = {"compression": "zstd", "hashes": [HASH], "size_limit": job.plan.shard_bytes}
        writer = MDSWriter(columns=columns, out=str(partial), **options)
        for sample in samples:
            writer.write({"tokens": sample})
        # Not finish, which writes an index that is not wanted and sleeps a second for uploads that there are none of.
        writer.flush_shard()
        writer.executor.shutdown()
    for info in writer.shards:
        for part in (info["raw_data"], info["zip_data"]):
            part["basename"] = f"{folder.rpartition('/')[2]}/{part['basename']}"
    if job.remote:
        upload(out, job.remote, [f"{folder}/{name}" for name in sorted(os.listdir(out / folder))])
        shutil.rmtree(out / folder)
    return writer.shards


def upload(root: Path, remote: str, files: list[str]) -> None:
    """Upload files below ``root`` to the same names below ``remote``, in their order; none checks that it is there."""
    from streaming.base.storage.upload import CloudUploader

    logging.getLogger("streaming.base.storage.upload").setLevel(logging.ERROR)  # it warns of folders that are not empty
    try:
        uploader = CloudUploader.get((str(root), remote), keep_local=True, exist_ok=True)
        for file in files:
            uploader.upload_file(file)
    except Exception as error:  # each store has its own
        raise DataError(
            f"Cannot upload to {remote}: {type(error).__name__}: {error}. Check name, keys and network, and call "
            "again: what is finished is kept."
        ) from error

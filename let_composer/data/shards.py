"""One piece of input to its shards, in a worker, and what is left over of all pieces to the last shards."""

import dataclasses
import logging
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from let_composer.data import DataError, replacing, write_json
from let_composer.data.plan import Plan
from let_composer.data.reading import Piece
from let_composer.data.streams import PILE_WEIGHTS
from let_composer.data.tokens import STRETCH, UNLABELLED, Documents, Encoder

__all__ = ["HASH", "SPLITS", "Job", "folder_name", "leftovers", "start_worker", "upload", "write_piece", "write_shards"]

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

    def record(self, piece: str) -> Path:
        """Where a piece's record is, once all else of the piece is there."""
        return self.work / "pieces" / f"{piece}.json"


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
    documents = Documents(piece, _job.plan.text_key, _job.plan.by_subset, _job.plan.on_error == "stop")
    end = np.array([_job.eos], _job.dtype)
    found: dict[tuple[str, str], Any] = {}
    pending: list[tuple[Any, str]] = []
    length = 0

    def encode() -> None:
        for (about, _), ids in zip(pending, _encoder([text for _, text in pending]), strict=True):
            about["parts"] += ids, end
        pending.clear()

    for text, subset, place, size in documents:
        key = subset, SPLITS[place < _job.plan.validation]
        about = found.setdefault(key, {"documents": 0, "bytes": 0, "parts": []})
        about["documents"] += 1
        about["bytes"] += size
        pending.append((about, text))
        length += len(text)
        if length >= STRETCH:
            encode()
            length = 0
    encode()
    streams, left = {}, [end[:0]]
    for (subset, split), about in sorted(found.items()):
        tokens = np.concatenate(about.pop("parts"))
        rest = len(tokens) % _job.plan.sequence_length
        whole = len(tokens) - rest if tokens.nbytes >= _job.plan.piece_bytes >> 7 else 0  # no tiny shards
        folder = f"{folder_name(subset)}{split}/{piece.name}"
        shards = write_shards(_job, folder, tokens[:whole].reshape(-1, _job.plan.sequence_length)) if whole else []
        left_at = sum(map(len, left))
        left.append(tokens[whole:])
        about |= {"tokens": len(tokens), "left": len(tokens) - whole, "left_at": left_at, "shards": shards}
        streams[f"{subset}/{split}"] = about
    with replacing(_job.work / "pieces" / f"{piece.name}.left") as partial:
        np.concatenate(left).tofile(partial)
    record = {"streams": streams, "problems": documents.problems, "problem_counts": documents.counts}
    write_json(_job.record(piece.name), record)
    return {subset for subset, _ in found}


def folder_name(subset: str) -> str:
    """Return ``"name/"`` for a subset, ``""`` for none; the names of any two subsets differ."""
    slug = re.sub(r"[^a-z0-9]+", "-", subset.lower()).strip("-")[:60]
    if subset in PILE_WEIGHTS or subset in ("", UNLABELLED):
        return f"{slug}/" if slug else ""
    return f"{slug}-{blake2b(subset.encode(), digest_size=3).hexdigest()}/"


def write_shards(job: Job, folder: str, samples: Iterable[np.ndarray]) -> list[dict[str, Any]]:
    """Write samples to a folder below ``out`` and upload them; returns their entries in the index above the folder."""
    from streaming import MDSWriter

    out = job.work / "out"
    with replacing(out / folder) as partial:
        column = {"tokens": f"ndarray:{job.dtype}:{job.plan.sequence_length}"}
        writer = MDSWriter(
            columns=column, out=str(partial), compression="zstd", hashes=[HASH], size_limit=job.plan.shard_bytes
        )
        for sample in samples:
            writer.write({"tokens": sample})
        # Not finish, which writes an index that is not wanted and sleeps a second for uploads that there are none of.
        writer.flush_shard()
        writer.executor.shutdown()
    shards: list[dict[str, Any]] = writer.shards
    name = folder.rpartition("/")[2]
    for info in shards:
        for part in ("raw_data", "zip_data"):
            info[part]["basename"] = f"{name}/{info[part]['basename']}"
    if job.remote:
        files = [f"{folder}/{path.name}" for path in sorted((out / folder).iterdir())]
        upload(out, job.remote, files)
        shutil.rmtree(out / folder)
    return shards


def leftovers(job: Job, stream: str, records: dict[str, Any]) -> Iterator[np.ndarray]:
    """Yield samples of what a stream's pieces left over, in their order."""
    rest = np.empty(0, job.dtype)
    for name, record in records.items():
        if stream not in record["streams"]:
            continue
        left, start = record["streams"][stream]["left"], record["streams"][stream]["left_at"] * rest.itemsize
        file = job.work / "pieces" / f"{name}.left"
        rest = np.concatenate([rest, np.fromfile(file, job.dtype, count=left, offset=start)])
        whole = len(rest) // job.plan.sequence_length * job.plan.sequence_length
        yield from rest[:whole].reshape(-1, job.plan.sequence_length)
        rest = rest[whole:]


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

"""Tokens to shards: a stream is one row of tokens, cut where a shard is full, whatever pieces they came in."""

import json
import logging
import re
import tempfile
import time
import zipfile
from collections import Counter
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

import numpy as np

from let_composer.data.manifest import MANIFEST, different
from let_composer.data.streams import PILE_WEIGHTS
from let_composer.data.tokens import PROBLEMS_KEPT, SPLITS, UNLABELLED
from let_composer.files import replacing, write_json

__all__ = ["HASH", "Shards", "unfinished", "upload"]

HASH = "xxh128"


class Shards:
    """All streams (``"subset/split"``) on their way to shards in a folder or store, and how far the input is read.

    What is known of them is kept in one file beside the folder, so that a later call goes on from there. What was
    written since is written again.
    """

    def __init__(self, wanted: dict[str, Any], folder: Path, file: Path, remote: str | None) -> None:
        self.folder, self.file, self.remote = folder, file, remote
        self.dtype, self.length = wanted["dtype"], wanted["sequence_length"]
        sample_bytes = np.dtype(self.dtype).itemsize * self.length
        self.full = max(wanted["arguments"]["shard_bytes"] // sample_bytes, 1) * self.length
        self.rest: dict[str, np.ndarray] = {}  # the tokens of each stream that fill no shard yet
        self.next_save = 0.0
        self.state: dict[str, Any] = {"wanted": wanted, "done": [-1, -1], "problems": [], "counts": {}, "streams": {}}
        kept = unfinished(file)
        if not kept and (there := next(filter(Path.exists, (folder, file)), None)):
            raise ValueError(f"{there} is wanted for unfinished work, but holds something else. Choose another --out.")
        if not folder.exists():
            self.save()
            folder.mkdir()
            return
        self.state, self.rest = json.loads(kept.pop("state").item()), kept
        if differs := different(self.state["wanted"], wanted):
            raise ValueError(
                f"{folder} holds the unfinished work of another call ({differs:.600}). Finish that call, or remove "
                f"it: rm -r {folder}"
            )

    def save(self) -> None:
        """Keep what is done."""
        started = time.monotonic()
        with replacing(self.file) as partial, partial.open("wb") as file:
            np.savez(file, state=np.array(json.dumps(self.state).encode()), **self.rest)
        self.next_save = time.monotonic() + 20 * (time.monotonic() - started)

    def add(self, place: list[int], found: dict[str, Any], problems: list[str], counts: Counter[str]) -> None:
        """Take what ``tokenize`` made of the piece at ``place``, and write the shards that it fills."""
        for stream, documents in found.items():
            self._append(stream, *documents)
        # A damaged file first: it is the most that is lost.
        problems = sorted(self.state["problems"] + problems, key=lambda problem: ": damaged file: " not in problem)
        self.state["problems"] = problems[:PROBLEMS_KEPT]
        self.state["counts"] = dict(Counter(self.state["counts"]) + counts)
        self.state["done"] = place
        if time.monotonic() > self.next_save:
            self.save()

    def _append(self, stream: str, documents: int, size: int, ids: np.ndarray) -> None:
        about = self.state["streams"].setdefault(stream, {"documents": 0, "bytes": 0, "shards": []})
        about["documents"] += documents
        about["bytes"] += size
        tokens = np.concatenate([self.rest.get(stream, ids[:0]), ids])
        while len(tokens) >= self.full:
            self._write(stream, tokens[: self.full])
            tokens = tokens[self.full :]
        self.rest[stream] = tokens

    def finish(self, manifest: dict[str, Any], seed: int | None) -> None:
        """Complete ``manifest``, and write all that is not there yet, the shards in an order that ``seed`` decides."""
        state, indexes = self.state, {}
        manifest |= {"problems": {"counts": state["counts"], "first": state["problems"]}, "streams": {}}
        for subset in sorted({stream.rpartition("/")[0] for stream in state["streams"]}):
            splits = {}
            for split in SPLITS:
                splits[split], written = self._close(f"{subset}/{split}")
                if seed is not None:
                    written = [written[i] for i in np.random.default_rng(seed).permutation(len(written))]
                if written:
                    index = json.dumps({"version": 2, "shards": written}, sort_keys=True)
                    indexes[stream_folder(f"{subset}/{split}")] = index
            manifest["streams"][subset] = {"folder": stream_folder(f"{subset}/").rstrip("/"), "splits": splits}
        trains = [about["splits"]["train"] for about in manifest["streams"].values()]
        if not any(train["samples"] for train in trains):
            tokens = sum(train["tokens_left_over"] for train in trains)
            raise ValueError(
                f"The input holds {tokens} tokens for training, less than one sequence of {self.length}. "
                "Give more text or a smaller --sequence-length."
            )
        for folder, index in indexes.items():
            (self.folder / folder / "index.json").write_text(index)
            write_json(self.folder / folder / MANIFEST, manifest | {"index_sha256": sha256(index.encode()).hexdigest()})
        write_json(self.folder / MANIFEST, manifest)
        if self.remote:
            # An index after its manifest, and last what says that all is there: a reader finds the whole or nothing.
            files = [f"{folder}/{name}" for folder in indexes for name in (MANIFEST, "index.json")]
            upload(self.folder, self.remote, [*files, MANIFEST])

    def _close(self, stream: str) -> tuple[dict[str, int], list[dict[str, Any]]]:
        """Write the last samples of a stream; returns what the manifest says about it, and its shards."""
        self._append(stream, 0, 0, np.empty(0, self.dtype))  # it may hold no document
        about, tokens = self.state["streams"][stream], self.rest[stream]
        if whole := len(tokens) // self.length * self.length:
            self._write(stream, tokens[:whole])
        samples = sum(shard["samples"] for shard in about["shards"])
        counts = {what: about[what] for what in ("documents", "bytes")} | {"samples": samples}
        counts |= {"tokens": samples * self.length, "tokens_left_over": len(tokens) - whole}
        return counts, about["shards"]

    def _write(self, stream: str, tokens: np.ndarray) -> None:
        from streaming import MDSWriter

        folder, shards = stream_folder(stream), self.state["streams"][stream]["shards"]
        (self.folder / folder).mkdir(parents=True, exist_ok=True)
        columns = {"tokens": f"ndarray:{self.dtype}:{self.length}"}
        with tempfile.TemporaryDirectory() as empty:  # it takes no other
            writer = MDSWriter(columns=columns, out=empty, compression="zstd", hashes=[HASH], size_limit=None)
        writer.local, writer.shards = str(self.folder / folder), shards  # it numbers its files by them
        for sample in tokens.reshape(-1, self.length):
            writer.write({"tokens": sample})
        writer.flush_shard()  # not finish, which writes an index that is not wanted
        writer.executor.shutdown()
        if self.remote:
            file = f"{folder}/{shards[-1]['zip_data']['basename']}"
            upload(self.folder, self.remote, [file])
            (self.folder / file).unlink()


def unfinished(file: Path) -> dict[str, Any]:
    """Read what ``Shards`` keeps in a file; nothing of a file that is not there or another's."""
    if not zipfile.is_zipfile(file):
        return {}
    with np.load(file) as arrays:
        return dict(arrays) if "state" in arrays else {}


def stream_folder(stream: str) -> str:
    """Return the folder of ``"subset/split"``; those of any two subsets differ."""
    subset, _, split = stream.rpartition("/")
    slug = re.sub(r"[^a-z0-9]+", "-", subset.lower()).strip("-")[:60]
    if not (subset in PILE_WEIGHTS or subset in ("", UNLABELLED)):
        slug += f"-{blake2b(subset.encode(), digest_size=3).hexdigest()}"
    return f"{slug}/{split}" if slug else split


def upload(root: Path, remote: str, files: list[str]) -> None:
    """Upload files below ``root`` to the same names below ``remote``, in their order; none checks that it is there."""
    from streaming.base.storage.upload import CloudUploader

    logging.getLogger("streaming.base.storage.upload").setLevel(logging.ERROR)  # it warns of folders that are not empty
    try:
        uploader = CloudUploader.get((str(root), remote), keep_local=True, exist_ok=True)
        for file in files:
            uploader.upload_file(file)
    except Exception as error:  # each store has its own
        failed = f"Cannot upload to {remote}: {type(error).__name__}: {error}"
        raise ValueError(f"{failed}. Check name, keys and network, and call again: finished work is kept.") from error

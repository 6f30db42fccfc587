"""The whole conversion: what was asked for, what is there already, the workers, and how it is finished."""

import errno
import json
import multiprocessing
import os
import shutil
import time
from collections import Counter, deque
from concurrent.futures import Future, ProcessPoolExecutor
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from let_composer.data import DataError, replacing, write_json
from let_composer.data.manifest import MANIFEST, join
from let_composer.data.plan import Plan, clean, finished, locked, recipe, work_folder
from let_composer.data.shards import Shards, stream_folder, upload
from let_composer.data.sources import list_sources, read_pieces
from let_composer.data.streams import check_proportions, streams_block
from let_composer.data.tokens import PROBLEMS_KEPT, SPLITS, start_worker, tokenize

__all__ = ["convert"]

VERSIONS = ("mosaicml-streaming", "numpy", "tokenizers", "transformers", "zstd")


def convert(
    plan: Plan,
    out: str,
    workers: int | None = None,
    work: str | None = None,
    proportions: dict[str, float] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Convert documents into MDS shards at ``out``, continuing an earlier call that was interrupted.

    Args:
        plan: What to convert, and how.
        out: Folder to make (it appears when all is done), or a remote folder (``s3://`` and the others that streaming
            uploads to; its ``manifest.json`` is uploaded when all else is there).
        workers: Processes. The bytes written do not depend on it. Default: one for each core.
        work: Folder in which to make the folder of unfinished work. Default: the one in which ``out`` is, or the
            current one when ``out`` is remote.
        proportions: Share of each subset in ``streams.yaml``. Default: see ``streams_block``.
        progress: Whether to show a progress bar. Default: ``True``.

    Returns:
        The manifest.

    Raises:
        DataError: Input that cannot be read (``on_error: stop``), an output folder that holds something else, or
            arguments that do not fit together.
    """
    if workers is not None and workers < 1:
        raise DataError(f"workers must be at least 1, got {workers}.")
    if proportions and not plan.by_subset:
        raise DataError("Proportions are of subsets: add --by-subset.")
    sources, left_out = list_sources(plan.inputs)
    wanted, serialized = recipe(plan, sources)
    remote = join(out) if "://" in out else None
    folder = work_folder(out, work)
    manifest = finished(out, wanted, plan.on_error)
    if manifest and not proportions and not folder.exists():
        return manifest
    with locked(folder):
        manifest = finished(out, wanted, plan.on_error)
        if manifest is None:
            if remote:
                upload(folder, remote, [])  # is it there, and may we write?
            shards = Shards(plan, wanted | {"remote": remote}, folder)
            worker = plan, serialized, wanted["tokenizer"]["eos_id"], wanted["dtype"]
            _convert_pieces(shards, sources, worker, workers or len(os.sched_getaffinity(0)), proportions, progress)
            manifest = wanted | {"versions": {package: version(package) for package in VERSIONS}, "left_out": left_out}
            _finish(shards, manifest, plan.shuffle_seed)
            if not remote:
                _move(shards.out, Path(os.path.realpath(out)))
        root = folder if remote else Path(out)
        with replacing(root / "streams.yaml") as partial:
            partial.write_text(streams_block(manifest, out, proportions))
        if remote:
            upload(root, remote, ["streams.yaml"])
        clean(folder)
    return manifest


def _convert_pieces(
    shards: Shards, sources: dict[str, Any], worker: tuple[Any, ...], workers: int, proportions: Any, progress: bool
) -> None:
    """Have all pieces tokenized that are not yet, and take their tokens in the order of the input."""
    from tqdm import tqdm

    plan, state = worker[0], shards.state
    if state["problems"] and plan.on_error == "stop":  # of a call that skipped
        raise DataError(state["problems"][0])
    # Not fork: the parent has threads by now (tokenizers, torch), which a forked child may find holding locks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["let_composer.data.tokens"])
    pending: deque[tuple[list[int], Future[Any]]] = deque()

    def collect(most: int) -> None:
        while len(pending) > most:
            place, future = pending.popleft()
            try:
                found, problems, counts = future.result()
            except DataError:
                shards.save()
                raise
            check_proportions(proportions, {stream.rpartition("/")[0] for stream in found})
            for stream, documents in found.items():
                shards.add(stream, *documents)
            # A damaged file first: it is the most that is lost.
            state["problems"] = sorted(state["problems"] + problems, key=lambda p: " file: " not in p)[:PROBLEMS_KEPT]
            state["counts"] = Counter(state["counts"]) + counts
            state["done"] = place
            if time.monotonic() - shards.saved > 20 * shards.took:
                shards.save()

    sizes = [about["bytes"] for about in sources.values()]
    pool = ProcessPoolExecutor(workers, context, start_worker, worker)
    bar = tqdm(total=sum(sizes) or None, unit="B", unit_scale=True, disable=not progress)
    try:
        for number, source in enumerate(sources):
            if number < state["done"][0]:
                continue
            for count, piece in enumerate(read_pieces(source, plan.piece_bytes, plan.text_key)):
                if [number, count] > state["done"]:
                    pending.append(([number, count], pool.submit(tokenize, piece)))
                    collect(2 * workers)
                bar.update(sum(sizes[:number]) + piece.position - bar.n)
        collect(0)
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()


def _finish(shards: Shards, manifest: dict[str, Any], shuffle_seed: int | None) -> None:
    """Complete ``manifest``, and write all that is not there yet."""
    state, indexes = shards.state, {}
    manifest["problems"] = {"counts": dict(sorted(state["counts"].items())), "first": state["problems"]}
    manifest["streams"] = {}
    for subset in sorted({stream.rpartition("/")[0] for stream in state["streams"]}):
        folder = stream_folder(f"{subset}/").rstrip("/")
        splits = {split: shards.finish(f"{subset}/{split}") for split in SPLITS}
        manifest["streams"][subset] = {"folder": folder, "splits": {split: n for split, (n, _) in splits.items()}}
        for split, (_, written) in splits.items():
            if shuffle_seed is not None:
                written = [written[i] for i in np.random.default_rng(shuffle_seed).permutation(len(written))]
            if written:
                indexes[join(folder, split)] = json.dumps({"version": 2, "shards": written}, sort_keys=True)
    trains = [about["splits"]["train"] for about in manifest["streams"].values()]
    if not any(train["samples"] for train in trains):
        raise DataError(
            f"The input holds {sum(train['tokens_left_over'] for train in trains)} tokens for training, less than one "
            f"sequence of {shards.length}. Give more text or a smaller --sequence-length."
        )
    for folder, index in indexes.items():
        (shards.out / folder).mkdir(parents=True, exist_ok=True)
        (shards.out / folder / "index.json").write_text(index)
        write_json(shards.out / folder / MANIFEST, manifest | {"index_sha256": sha256(index.encode()).hexdigest()})
    write_json(shards.out / MANIFEST, manifest)
    if shards.remote:
        # An index after its manifest, and last what says that all is there: a reader finds the whole or nothing.
        files = [f"{folder}/{name}" for folder in indexes for name in (MANIFEST, "index.json")]
        upload(shards.out, shards.remote, [*files, MANIFEST])


def _move(folder: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:  # another disk
            raise
        with replacing(target) as partial:
            shutil.copytree(folder, partial)

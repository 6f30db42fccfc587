"""The whole conversion: what was asked for, what is there already, the workers, and how it is finished."""

import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from let_composer.data import DataError, describe, replacing, shards, write_json
from let_composer.data.manifest import MANIFEST, join
from let_composer.data.plan import Plan, claim, clean, finished, locked, wanted, work_folder
from let_composer.data.shards import SPLITS, Job, stream_folder, upload
from let_composer.data.sources import Source, list_sources, read_pieces
from let_composer.data.streams import check_proportions, streams_block
from let_composer.data.tokens import PROBLEMS_KEPT

__all__ = ["convert"]


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
            uploads to; its ``manifest.json`` is uploaded last).
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
    check_proportions(proportions, set(), complete=False)
    if proportions and not plan.by_subset:
        raise DataError("Proportions are of subsets: add --by-subset.")
    sources, left_out = list_sources(plan.inputs)
    manifest, serialized = wanted(plan, sources)
    remote = join(out) if "://" in out else None
    folder = work_folder(out, work)
    done = finished(out, manifest)
    if done is None or folder.exists():
        with locked(folder):
            done = finished(out, manifest)
            if done is None:
                claim(folder, manifest | {"remote": remote})
                job = Job(plan, serialized, manifest["tokenizer"]["eos_id"], manifest["dtype"], folder, remote)
                if remote:
                    upload(folder, remote, [])  # is it there, and may we write?
                records = _convert_pieces(job, sources, workers, proportions, progress)
                done = manifest | {"left_out": left_out}
                _finish(job, done, records, out, proportions)
            clean(folder)
    if proportions:
        with tempfile.TemporaryDirectory() if remote else contextlib.nullcontext(out) as root:
            _write_streams(Path(root), done, out, proportions)
            if remote:
                upload(Path(root), remote, ["streams.yaml"])
    return done


def _convert_pieces(
    job: Job, sources: list[Source], workers: int | None, proportions: dict[str, float] | None, progress: bool
) -> dict[str, Any]:
    """Have all pieces written that are not yet, and return their records in the order of the input."""
    from tqdm import tqdm

    workers = workers or len(os.sched_getaffinity(0))
    # Not fork: the parent has threads by now (tokenizers, torch), which a forked child may find holding locks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["let_composer.data.shards", "streaming"])
    plan, records = job.plan, {}
    pending: set[Future[set[str]]] = set()

    def collect(most: int) -> None:
        while len(pending) > most:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                pending.remove(future)
                check_proportions(proportions, future.result(), complete=False)

    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=shards.start_worker, initargs=(job, dict(os.environ))
    )
    bar = tqdm(total=sum(s.size or 0 for s in sources) or None, unit="B", unit_scale=True, disable=not progress)
    try:
        for number, source in enumerate(sources):
            read_before, cut = bar.n, job.record(f"{number:05}")
            # It lists all pieces of the source; some may still have been with a worker.
            names = json.loads(cut.read_text()) if cut.exists() else []
            if not cut.exists() or not all(job.record(name).exists() for name in names):
                names = []
                for piece in read_pieces(source, number, plan.piece_bytes, plan.text_key):
                    names.append(piece.name)
                    if not job.record(piece.name).exists():
                        collect(2 * workers - 1)
                        pending.add(pool.submit(shards.write_piece, piece))
                    bar.update(read_before + piece.position - bar.n)
                write_json(cut, names)
            bar.update(read_before + (source.size or 0) - bar.n)
            records |= dict.fromkeys(names)
        collect(0)
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
    for name in records:
        records[name] = record = json.loads(job.record(name).read_text())
        if record["problems"] and plan.on_error == "stop":  # written by a call that skipped
            raise DataError(describe(record["problems"][0]))
    return records


def _finish(
    job: Job, manifest: dict[str, Any], records: dict[str, Any], out: str, proportions: dict[str, float] | None
) -> None:
    """Complete ``manifest``, write what is left, and let ``out`` appear."""
    length, problems, counts = job.plan.sequence_length, [], Counter()
    for record in records.values():
        counts.update(record["problem_counts"])
        problems += record["problems"]
    problems.sort(key=lambda problem: not problem["kind"].endswith("file"))  # a damaged file is the most that is lost
    manifest["problems"] = {"counts": dict(sorted(counts.items())), "first": problems[:PROBLEMS_KEPT]}
    manifest["streams"], indexes, root = {}, {}, job.work / "out"
    order = list(records)
    if job.plan.shuffle_seed is not None:
        order = np.random.default_rng(job.plan.shuffle_seed).permutation(order).tolist()
    for subset in sorted({key.rpartition("/")[0] for record in records.values() for key in record["streams"]}):
        about = manifest["streams"][subset] = {"folder": stream_folder(f"{subset}/").rstrip("/"), "splits": {}}
        for split in SPLITS:
            stream, folder = f"{subset}/{split}", stream_folder(f"{subset}/{split}")
            pieces = [piece for piece in order if stream in records[piece]["streams"]]
            parts = [records[piece]["streams"][stream] for piece in pieces]
            total = {name: sum(part[name] for part in parts) for name in ("documents", "bytes", "tokens")}
            written = [shard for part in parts for shard in part["shards"]]
            samples, left_over = divmod(total["tokens"], length)
            if sum(shard["samples"] for shard in written) < samples:
                written += shards.write_shards(job, f"{folder}/rest", shards.leftovers(job, stream, sorted(pieces)))
            if samples:
                indexes[folder] = json.dumps({"version": 2, "shards": written}, sort_keys=True)
            kept = {"tokens": samples * length, "samples": samples, "tokens_left_over": left_over}
            about["splits"][split] = total | kept
    trains = [about["splits"]["train"] for about in manifest["streams"].values()]
    if not any(train["samples"] for train in trains):
        raise DataError(
            f"The input holds {sum(train['tokens_left_over'] for train in trains)} tokens for training, less than one "
            f"sequence of {length}. Give more text or a smaller --sequence-length."
        )
    _write_streams(root, manifest, out, proportions)
    for folder, index in indexes.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        with replacing(root / folder / "index.json") as partial:
            partial.write_text(index)
        write_json(root / folder / MANIFEST, manifest | {"index_sha256": hashlib.sha256(index.encode()).hexdigest()})
    write_json(root / MANIFEST, manifest)
    if job.remote:
        # An index after its manifest, and last what says that all is there: a reader finds the whole or nothing.
        files = [f"{folder}/{name}" for folder in indexes for name in (MANIFEST, "index.json")]
        upload(root, job.remote, [*files, "streams.yaml", MANIFEST])
        return
    target = Path(os.path.realpath(out))
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        root.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with replacing(target) as partial:
            shutil.copytree(root, partial)


def _write_streams(root: Path, manifest: dict[str, Any], out: str, proportions: dict[str, float] | None) -> None:
    with replacing(root / "streams.yaml") as partial:
        partial.write_text(streams_block(manifest, out, proportions))

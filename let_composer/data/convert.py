"""The whole conversion: what was asked for, what is there already, the workers, and how it is finished."""

import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import tempfile
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from let_composer.data import DataError, replacing, write_json
from let_composer.data.manifest import MANIFEST, join
from let_composer.data.plan import Plan, check_work, clean, finished, locked, wanted, work_folder
from let_composer.data.reading import Reading, piece_name, read_pieces
from let_composer.data.shards import (
    SPLITS,
    Job,
    folder_name,
    leftovers,
    start_worker,
    upload,
    write_piece,
    write_shards,
)
from let_composer.data.sources import Source, list_sources
from let_composer.data.streams import check_proportions, streams_block
from let_composer.data.tokens import PROBLEMS_KEPT, describe

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
        work: Folder in which to make the folder of unfinished work, on the disk of ``out``. Default: the one in which
            ``out`` is, or the current one when ``out`` is remote.
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
    folder = work_folder(out, work)
    done = finished(out, manifest)
    if done is None or folder.exists():
        with locked(folder):
            done = finished(out, manifest)
            if done is None:
                check_work(folder, manifest)
                made, remote = manifest["tokenizer"], join(out) if "://" in out else None
                job = Job(plan, serialized, made["eos_id"], manifest["dtype"], folder, remote)
                if job.remote:
                    upload(folder, job.remote, [])
                readings, records = _convert_pieces(job, sources, workers, proportions, progress)
                done = manifest | {"left_out": left_out}
                _finish(job, done, readings, records, out, proportions)
            clean(folder)
    if proportions:
        write_streams(out, done, proportions)
    return done


def _convert_pieces(
    job: Job, sources: list[Source], workers: int | None, proportions: dict[str, float] | None, progress: bool
) -> tuple[list[Reading], dict[str, Any]]:
    """Have all pieces written that are not yet; returns what was read, and the pieces' records in their order."""
    from tqdm import tqdm

    workers = workers or len(os.sched_getaffinity(0))
    # Not fork: the parent has threads by now (tokenizers, torch), which a forked child may find holding locks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["let_composer.data.shards", "streaming"])
    plan, stop, readings = job.plan, job.plan.on_error == "stop", []
    pending: dict[Any, tuple[int, int]] = {}
    positions = [0] * len(sources)
    bar = tqdm(total=sum(s.size or 0 for s in sources) or None, unit="B", unit_scale=True, disable=not progress)

    def collect(most: int) -> None:
        while len(pending) > most:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                number, position = pending.pop(future)
                check_proportions(proportions, future.result(), complete=False)
                bar.update(max(position - positions[number], 0))
                positions[number] = max(position, positions[number])

    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=(job, dict(os.environ)))
    try:
        for number, source in enumerate(sources):
            file = job.work / "pieces" / f"{number:05}.json"
            # It says that all pieces have been cut; some may still have been with a worker.
            reading = Reading(**json.loads(file.read_text())) if file.exists() else Reading()
            if not file.exists() or not all(job.record(piece_name(number, n)).exists() for n in range(reading.pieces)):
                reading = Reading()
                for piece in read_pieces(source, number, plan.piece_bytes, reading, plan.text_key):
                    if not job.record(piece.name).exists():
                        collect(2 * workers - 1)
                        pending[pool.submit(write_piece, piece)] = number, piece.position
            if reading.problem and stop:
                raise DataError(describe({"path": source.path, **reading.problem}))
            write_json(file, dataclasses.asdict(reading))
            readings.append(reading)
        collect(0)
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
    names = [piece_name(number, n) for number, reading in enumerate(readings) for n in range(reading.pieces)]
    records = {name: json.loads(job.record(name).read_text()) for name in names}
    if problems := [p for record in records.values() for p in record["problems"]] if stop else []:
        raise DataError(describe(problems[0]))  # written by a call that skipped
    return readings, records


def _finish(
    job: Job,
    manifest: dict[str, Any],
    readings: list[Reading],
    records: dict[str, Any],
    out: str,
    proportions: dict[str, float] | None,
) -> None:
    plan, sources = job.plan, manifest["sources"]
    problems = [{"path": s["path"], **r.problem} for s, r in zip(sources, readings, strict=True) if r.problem]
    counts = Counter(p["kind"] for p in problems)
    for record in records.values():
        counts.update(record["problem_counts"])
        problems += record["problems"]
    manifest["problems"] = {"counts": dict(sorted(counts.items())), "first": problems[:PROBLEMS_KEPT]}
    for source, reading in zip(sources, readings, strict=True):
        source["sha256"] = reading.sha256
    order = list(records)
    if plan.shuffle_seed is not None:
        order = np.random.default_rng(plan.shuffle_seed).permutation(order).tolist()
    root, indexes = job.work / "out", {}
    manifest["streams"] = {}
    for subset in sorted({key.rpartition("/")[0] for record in records.values() for key in record["streams"]}):
        splits = {}
        for split in SPLITS:
            found = {
                n: records[n]["streams"][key] for n in order if (key := f"{subset}/{split}") in records[n]["streams"]
            }
            tokens = sum(part["tokens"] for part in found.values())
            samples, left_over = divmod(tokens, plan.sequence_length)
            shards = [shard for part in found.values() for shard in part["shards"]]
            folder = f"{folder_name(subset)}{split}"
            if sum(shard["samples"] for shard in shards) < samples:
                shards += write_shards(job, f"{folder}/rest", leftovers(job, f"{subset}/{split}", records))
            if samples:
                indexes[folder] = json.dumps({"version": 2, "shards": shards}, sort_keys=True)
            splits[split] = {
                "documents": sum(part["documents"] for part in found.values()),
                "bytes": sum(part["bytes"] for part in found.values()),
                "samples": samples,
                "tokens": samples * plan.sequence_length,
                "tokens_left_over": left_over,
            }
        manifest["streams"][subset] = {"folder": folder_name(subset).rstrip("/"), "splits": splits}
    trains = [about["splits"]["train"] for about in manifest["streams"].values()]
    if not any(train["samples"] for train in trains):
        raise DataError(
            f"The input holds {sum(train['tokens_left_over'] for train in trains)} tokens for training, less than one "
            f"sequence of {plan.sequence_length}. Give more text or a smaller --sequence-length."
        )
    with replacing(root / "streams.yaml") as partial:
        partial.write_text(streams_block(manifest, out, proportions))
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
    else:
        target = Path(os.path.realpath(out))
        target.parent.mkdir(parents=True, exist_ok=True)
        root.rename(target)


def write_streams(out: str, manifest: dict[str, Any], proportions: dict[str, float]) -> None:
    """Write ``streams.yaml`` anew in a finished folder."""
    with tempfile.TemporaryDirectory() if "://" in out else contextlib.nullcontext(out) as folder:
        with replacing(Path(folder, "streams.yaml")) as partial:
            partial.write_text(streams_block(manifest, out, proportions))
        if "://" in out:
            upload(Path(folder), join(out), ["streams.yaml"])

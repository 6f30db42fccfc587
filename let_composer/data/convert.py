r"""Turn the Pile's documents, or any text in its format, into streaming MDS shards for llm-foundry.

    let-composer prepare /data/pile/train --out /data/pile-mds --tokenizer EleutherAI/gpt-neox-20b \
        --sequence-length 2048 --validation 0.001

Inputs are JSON lines (.jsonl, .jsonl.zst, .jsonl.gz, .json.gz), .parquet files, folders of them, and URLs for fsspec,
such as s3://, https://, hf://datasets/NAME[@REVISION]/FOLDER/*.parquet for the Hugging Face hub. Stop it at any moment
and call it again: it continues, and the shards are byte for byte the same, with any number of workers. Until then the
work is in OUT.partial and OUT.partial.npz, which are beside OUT or, if that is remote, in the current folder.
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from let_composer.data.manifest import MANIFEST, join, read_manifest
from let_composer.data.plan import Plan, add_arguments, different, recipe
from let_composer.data.shards import Shards, stream_folder, upload
from let_composer.data.sources import list_sources, read_pieces
from let_composer.data.streams import check_proportions, streams_block
from let_composer.data.tokens import SPLITS, UNLABELLED, start_worker, tokenize
from let_composer.data.verify import verify
from let_composer.files import replacing, write_json

__all__ = ["add_arguments", "convert", "run"]

AGAIN = "call again: what is finished is kept."
VERSIONS = ("mosaicml-streaming", "numpy", "tokenizers", "transformers", "zstd")


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    say, options = functools.partial(print, file=sys.stderr), dict(vars(args))
    options["proportions"] = dict(options["proportions"])
    del options["verify"]
    plan = Plan(**options)
    manifest = convert(plan)
    for name, about in manifest["streams"].items():
        for split, n in about["splits"].items():
            say(f"{name or 'all'} {split}:", *(f"{n[what]:,} {what}" for what in ("documents", "samples", "tokens")))
    if UNLABELLED in manifest["streams"]:
        say("The unlabelled have no name under meta.pile_set_name or pile_set_name.")
    for line in manifest["problems"]["first"][:20]:
        say(f"skipped: {line}")
    for what, counts in (("skipped in all", manifest["problems"]["counts"]), ("left out", manifest["left_out"])):
        if counts:
            say(f"{what}:", ", ".join(f"{n} {kind}" for kind, n in counts.items()))
    say(f"{plan.out}: ready.")
    if plan.by_subset:
        print(streams_block(manifest, plan.out, plan.proportions), end="")
    if args.verify:
        verify(plan.out)


def convert(plan: Plan) -> dict[str, Any]:
    """Convert documents into MDS shards at ``plan.out``, continuing an earlier call that was interrupted.

    Returns:
        The manifest.

    Raises:
        ValueError: Input that cannot be read (``on_error: stop``), an output folder that holds something else, or
            arguments that do not fit together.
    """
    sources, left_out = list_sources(plan.inputs)
    wanted, serialized = recipe(plan, sources)
    remote = join(plan.out) if "://" in plan.out else None
    target = Path(remote.rpartition("/")[2]).absolute() if remote else Path(os.path.realpath(plan.out))
    folder, state = (target.with_name(f"{target.name}.{ending}") for ending in ("partial", "partial.npz"))
    with _locked(folder):
        manifest = _finished(plan, wanted)
        if manifest is None:
            shards = Shards(wanted, folder, state, remote)
            if remote:
                upload(folder, remote, [])  # is it there, and may we write?
            _convert_pieces(shards, plan, sources, (plan, serialized, wanted["tokenizer"]["eos_id"], wanted["dtype"]))
            manifest = wanted | {"versions": {package: version(package) for package in VERSIONS}, "left_out": left_out}
            _finish(shards, manifest, plan)
            if not remote:
                folder.rename(target)
        elif not (plan.proportions or state.exists()):
            return manifest
        _write_streams(manifest, plan, remote)
        if state.exists():
            shutil.rmtree(folder, ignore_errors=True)
            state.unlink()
    return manifest


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from the folder; errors of disk and memory are told in the user's terms."""
    from filelock import FileLock, Timeout

    lock = folder.with_name(f"{folder.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
    except Timeout as error:
        raise ValueError(f"Another process is at work in {folder}. Wait for it, or choose another --out.") from error
    except OSError as error:
        free = f"{shutil.disk_usage(lock.parent).free / 1e9:.2f} GB free on the disk of {folder}"
        raise ValueError(f"Cannot go on: {error} ({free}). Put that right and {AGAIN}") from error
    except BrokenProcessPool as error:
        raise ValueError(f"A worker was killed, most often for want of memory. With fewer --workers {AGAIN}") from error


def _finished(plan: Plan, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """Return the manifest of an earlier call that did the same; refuse whatever else is there."""
    found, out = read_manifest(plan.out)[0], plan.out
    if found is None:
        if "://" not in out and os.path.lexists(out) and (not os.path.isdir(out) or os.listdir(out)):
            raise ValueError(f"{out} is there already and holds something else. Choose another --out, or empty it.")
    elif differs := different({key: found.get(key) for key in wanted}, wanted):
        raise ValueError(f"{out} holds shards made otherwise ({differs:.600}). Choose another --out, or remove it.")
    elif plan.on_error == "stop" and (first := found["problems"]["first"]):
        raise ValueError(f"{out} was made with --on-error skip, and lacks what could not be read: {first[0]}")
    return found


def _convert_pieces(shards: Shards, plan: Plan, sources: dict[str, Any], worker: tuple[Any, ...]) -> None:
    """Have all pieces tokenized that are not yet, and take their tokens in the order of the input."""
    from tqdm import tqdm

    done, problems = shards.state["done"], shards.state["problems"]
    if problems and plan.on_error == "stop":  # of a call that skipped
        raise ValueError(problems[0])
    pending: deque[tuple[list[int], Future[Any]]] = deque()

    def collect(most: int) -> None:
        while len(pending) > most:
            place, future = pending.popleft()
            try:
                found, problems, counts = future.result()
            except ValueError:
                shards.save()
                raise
            check_proportions(plan.proportions, {stream.rpartition("/")[0] for stream in found})
            shards.add(place, found, problems, counts)

    # Not fork: the parent has threads by now (tokenizers, torch), which a forked child may find holding locks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["let_composer.data.tokens"])
    workers = plan.workers or len(os.sched_getaffinity(0))
    pool = ProcessPoolExecutor(workers, context, start_worker, worker)
    sizes = [about["bytes"] for about in sources.values()]
    try:
        with tqdm(total=sum(sizes) or None, unit="B", unit_scale=True, disable=plan.quiet) as bar:
            for number, source in enumerate(sources):
                if number < done[0]:
                    continue
                for count, piece in enumerate(read_pieces(source, plan.piece_bytes, plan.text_key)):
                    if [number, count] > done:
                        pending.append(([number, count], pool.submit(tokenize, piece)))
                        collect(2 * workers)
                    bar.update(sum(sizes[:number]) + piece.position - bar.n)
            collect(0)
    finally:
        pool.shutdown(cancel_futures=True)
    shards.save()


def _finish(shards: Shards, manifest: dict[str, Any], plan: Plan) -> None:
    """Complete ``manifest``, and write all that is not there yet."""
    state, indexes = shards.state, {}
    manifest["problems"] = {"counts": dict(sorted(state["counts"].items())), "first": state["problems"]}
    manifest["streams"] = {}
    for subset in sorted({stream.rpartition("/")[0] for stream in state["streams"]}):
        splits = {}
        for split in SPLITS:
            splits[split], written = shards.finish(f"{subset}/{split}")
            if plan.shuffle_seed is not None:
                written = [written[i] for i in np.random.default_rng(plan.shuffle_seed).permutation(len(written))]
            if written:
                index = json.dumps({"version": 2, "shards": written}, sort_keys=True)
                indexes[stream_folder(f"{subset}/{split}")] = index
        manifest["streams"][subset] = {"folder": stream_folder(f"{subset}/").rstrip("/"), "splits": splits}
    trains = [about["splits"]["train"] for about in manifest["streams"].values()]
    if not any(train["samples"] for train in trains):
        raise ValueError(
            f"The input holds {sum(train['tokens_left_over'] for train in trains)} tokens for training, less than one "
            f"sequence of {shards.length}. Give more text or a smaller --sequence-length."
        )
    for folder, index in indexes.items():
        (shards.folder / folder).mkdir(parents=True, exist_ok=True)
        (shards.folder / folder / "index.json").write_text(index)
        write_json(shards.folder / folder / MANIFEST, manifest | {"index_sha256": sha256(index.encode()).hexdigest()})
    write_json(shards.folder / MANIFEST, manifest)
    if shards.remote:
        # An index after its manifest, and last what says that all is there: a reader finds the whole or nothing.
        files = [f"{folder}/{name}" for folder in indexes for name in (MANIFEST, "index.json")]
        upload(shards.folder, shards.remote, [*files, MANIFEST])


def _write_streams(manifest: dict[str, Any], plan: Plan, remote: str | None) -> None:
    with tempfile.TemporaryDirectory() as here:
        root = here if remote else plan.out
        with replacing(Path(root, "streams.yaml")) as partial:
            partial.write_text(streams_block(manifest, plan.out, plan.proportions))
        if remote:
            upload(Path(here), remote, ["streams.yaml"])

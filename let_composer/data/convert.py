r"""Turn the Pile's documents, or any text in its format, into streaming MDS shards for llm-foundry.

    let-composer prepare /data/pile/train --out /data/pile-mds --tokenizer EleutherAI/gpt-neox-20b \
        --sequence-length 2048 --validation 0.001

Inputs are JSON lines (.jsonl, .jsonl.zst, .jsonl.gz, .json.gz), .parquet files, folders of them, and URLs for fsspec,
such as s3://, https://, hf://datasets/NAME[@REVISION]/FOLDER/*.parquet for the Hugging Face hub. Stop it at any moment
and call it again: it continues, and the shards are byte for byte the same, with any number of workers. Until then the
work is in OUT.partial and OUT.partial.npz, which are beside OUT or, if that is remote, in the current folder under the
whole URL's name.
"""

import argparse
import contextlib
import dataclasses
import functools
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from let_composer.data.manifest import different, is_remote, join, read_manifest, recipe
from let_composer.data.shards import Shards, unfinished, upload
from let_composer.data.sources import list_sources, read_pieces
from let_composer.data.streams import check_proportions, streams_block
from let_composer.data.tokens import UNLABELLED, start_worker, tokenize
from let_composer.data.verify import verify
from let_composer.files import replacing

__all__ = ["Plan", "add_arguments", "convert", "run"]

AGAIN = "call again: what is finished is kept."
VERSIONS = ("mosaicml-streaming", "numpy", "tokenizers", "transformers", "zstd")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the user decides."""

    inputs: Sequence[str]  # files, folders, globs or URLs
    out: str  # folder that appears when all is done, or a remote one: its manifest.json is uploaded last
    tokenizer: str  # name or folder of a Hugging Face tokenizer
    sequence_length: int  # tokens a sample
    validation: float = 0.0  # share of documents, by hash of their text, that goes to the validation split
    by_subset: bool = False  # one stream for each pile_set_name
    proportions: dict[str, float] | None = None  # of the subsets in streams.yaml; default: see streams_block
    eos: str | None = None  # text that ends each document; default: the tokenizer's own
    on_error: Literal["stop", "skip"] = "stop"  # at a document or file that cannot be read
    shuffle_seed: int | None = 17  # of the order of shards; None keeps the order of the input
    text_key: str = "text"  # name of the field or column with the text
    shard_bytes: int = 16 << 20  # of a shard before compression: some 32 MiB of text
    piece_bytes: int = 8 << 20  # input bytes given to a worker at a time; no byte written depends on it
    workers: int | None = None  # processes; default: one for each core; no byte written depends on it
    quiet: bool = False  # no progress bar

    def __post_init__(self) -> None:
        for name in ("sequence_length", "workers"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}.")
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation must be a share in [0, 1), such as 0.01, got {self.validation}.")
        if self.proportions and not self.by_subset:
            raise ValueError("Proportions are of subsets: add --by-subset.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take the command line's arguments."""
    add = parser.add_argument
    add("inputs", nargs="+", help="files, folders, globs or URLs")
    add("--out", required=True, help="folder to make, or s3://, gs://, oci://, ... to upload to")
    add("--tokenizer", required=True, help="folder with tokenizer.json or name of a hub tokenizer")
    add("--sequence-length", type=int, default=2048, help="tokens a sample (%(default)s)")
    add("--validation", type=float, default=0.0, help="share of documents held out (%(default)s)")
    add("--by-subset", action="store_true", help="one stream for each meta.pile_set_name")
    weights = "share of each subset in streams.yaml; default: the Pile's own, or token counts"
    add("--proportions", nargs="+", type=_proportion, default=(), metavar="SUBSET=WEIGHT", help=weights)
    add("--eos", help="token that ends each document (the tokenizer's own)")
    add("--on-error", choices=("stop", "skip"), default="stop", help="at unreadable input (%(default)s)")
    add("--seed", dest="shuffle_seed", type=int, default=17, metavar="N", help="of the order of shards (%(default)s)")
    order = "keep the shards in the order of the input"
    add("--no-shuffle", dest="shuffle_seed", action="store_const", const=None, help=order)
    add("--text-key", default="text", help="field or column with the text (%(default)s)")
    add("--workers", type=int, help="processes (one for each core)")
    add("--verify", action="store_true", help="read all of OUT back at the end")
    add("--quiet", action="store_true", help="no progress bar")


def _proportion(entry: str) -> tuple[str, float]:
    name, _, weight = entry.rpartition("=")
    with contextlib.suppress(ValueError):
        if 0 < float(weight) < math.inf:
            return name, float(weight)
    expected = "expected SUBSET=WEIGHT with a weight above 0, such as 'Pile-CC=0.5'"
    raise argparse.ArgumentTypeError(f"{expected}, got {entry!r}. Leave out what is not wanted.")


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
    remote = join(plan.out) if is_remote(plan.out) else None
    target = Path(quote(remote, safe="")).absolute() if remote else Path(os.path.realpath(plan.out))
    folder, state = (target.with_name(f"{target.name}.{ending}") for ending in ("partial", "partial.npz"))
    with _locked(folder):
        manifest = _finished(plan, wanted)
        if manifest is None:
            shards = Shards(wanted, folder, state, remote)
            if remote:
                upload(folder, remote, [])  # is it there, and may we write?
            _convert_pieces(shards, plan, sources, (plan, serialized, wanted["tokenizer"]["eos_id"], wanted["dtype"]))
            manifest = wanted | {"versions": {package: version(package) for package in VERSIONS}, "left_out": left_out}
            shards.finish(manifest, plan.shuffle_seed)
            if not remote:
                folder.rename(target)
        elif not (plan.proportions or unfinished(state)):
            return manifest
        _write_streams(manifest, plan, remote)
        if unfinished(state):
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
        if not is_remote(out) and os.path.lexists(out) and (not os.path.isdir(out) or os.listdir(out)):
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
            found, problems, counts = future.result()
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


def _write_streams(manifest: dict[str, Any], plan: Plan, remote: str | None) -> None:
    with tempfile.TemporaryDirectory() as here:
        root = here if remote else plan.out
        with replacing(Path(root, "streams.yaml")) as partial:
            partial.write_text(streams_block(manifest, plan.out, plan.proportions))
        if remote:
            upload(Path(here), remote, ["streams.yaml"])

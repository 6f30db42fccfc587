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
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from filelock import FileLock, Timeout
from tqdm import tqdm

from let_composer.data.manifest import different, is_remote, join, read_manifest, recipe
from let_composer.data.shards import Shards, unfinished, upload
from let_composer.data.sources import list_sources, read_pieces
from let_composer.data.streams import check_proportions, streams_block
from let_composer.data.tokens import UNLABELLED, start_worker, tokenize
from let_composer.data.verify import verify
from let_composer.files import replacing

__all__ = ["add_arguments", "convert", "run"]

VERSIONS = ("mosaicml-streaming", "numpy", "tokenizers", "transformers", "zstd")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take the command line's arguments."""
    add = parser.add_argument
    add("inputs", nargs="+", help="files, folders, globs or URLs")
    add("--out", required=True, help="folder to make, or s3://, gs://, oci://, ... to upload to")
    add("--tokenizer", required=True, help="folder with tokenizer.json or name of a hub tokenizer")
    add("--sequence-length", type=int, default=2048, help="tokens a sample (%(default)s)")
    add("--validation", type=float, default=0.0, help="share of documents held out, by their text (%(default)s)")
    add("--by-subset", action="store_true", help="one stream for each meta.pile_set_name")
    weights = "share of each subset in streams.yaml; default: the Pile's own, or token counts"
    add("--proportions", nargs="+", type=_proportion, default=(), metavar="SUBSET=WEIGHT", help=weights)
    add("--eos", help="token that ends each document (the tokenizer's own)")
    add("--on-error", choices=("stop", "skip"), default="stop", help="at unreadable input (%(default)s)")
    add("--seed", dest="shuffle_seed", type=int, default=17, metavar="N", help="of the order of shards (%(default)s)")
    add("--no-shuffle", dest="shuffle_seed", action="store_const", const=None, help="keep the order of the input")
    add("--text-key", default="text", help="field or column with the text (%(default)s)")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (%(default)s, one a core)")
    add("--verify", action="store_true", help="read all of OUT back at the end")
    add("--quiet", action="store_true", help="no progress bar")
    # Bytes of a shard before compression, some 32 MiB of text; and of the input that a worker gets at a time.
    parser.set_defaults(shard_bytes=16 << 20, piece_bytes=8 << 20)


def _proportion(entry: str) -> tuple[str, float]:
    name, _, weight = entry.rpartition("=")
    with contextlib.suppress(ValueError):
        if 0 < float(weight) < math.inf:
            return name, float(weight)
    raise argparse.ArgumentTypeError(f"expected SUBSET=WEIGHT, weight above 0, such as 'Pile-CC=0.5', got {entry!r}")


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    args.proportions = dict(args.proportions)
    manifest = convert(args)
    names = {"": "all", UNLABELLED: "unlabelled, without meta.pile_set_name or pile_set_name"}
    made = {names.get(name, name): about["splits"] for name, about in manifest["streams"].items()}
    about = {"made": made, "skipped": manifest["problems"], "left out": manifest["left_out"]}
    yaml.safe_dump(about, sys.stderr, default_flow_style=None, sort_keys=False, width=10**6, allow_unicode=True)
    if args.by_subset:
        print(streams_block(manifest, args.out, args.proportions), end="")
    print(f"{args.out}: ready.", file=sys.stderr)
    if args.verify:
        verify(args.out)


def convert(args: argparse.Namespace) -> dict[str, Any]:
    """Convert documents into MDS shards at ``args.out``, or go on where an earlier call was cut; returns the manifest.

    Raises:
        ValueError: For input that cannot be read, a folder that holds something else, arguments that do not fit.
    """
    if min(args.sequence_length, args.workers) < 1:
        raise ValueError(f"--sequence-length and --workers must exceed 0, got {args.sequence_length}, {args.workers}.")
    if not 0 <= args.validation < 1:
        raise ValueError(f"--validation must be a share in [0, 1), such as 0.01, got {args.validation}.")
    if args.proportions and not args.by_subset:
        raise ValueError("--proportions are of subsets: add --by-subset.")
    sources, left_out = list_sources(args.inputs)
    wanted, serialized = recipe(args, sources)
    remote = join(args.out) if is_remote(args.out) else None
    target = Path(quote(remote, safe="")).absolute() if remote else Path(os.path.realpath(args.out))
    folder, state = (target.with_name(f"{target.name}.{ending}") for ending in ("partial", "partial.npz"))
    with _locked(folder):
        manifest = _finished(args, wanted)
        if manifest is None:
            shards = Shards(wanted, folder, state, remote)
            if remote:
                upload(folder, remote, [])  # is it there, and may we write?
            args.eos_id, args.dtype = wanted["tokenizer"]["eos_id"], wanted["dtype"]
            _convert_pieces(shards, args, sources, serialized)
            manifest = wanted | {"versions": {package: version(package) for package in VERSIONS}, "left_out": left_out}
            shards.finish(manifest, args.shuffle_seed)
            if not remote:
                folder.rename(target)
        elif not (args.proportions or unfinished(state)):
            return manifest
        with tempfile.TemporaryDirectory() as here:
            root = Path(here if remote else args.out)
            with replacing(root / "streams.yaml") as partial:
                partial.write_text(streams_block(manifest, args.out, args.proportions))
            if remote:
                upload(root, remote, ["streams.yaml"])
        if unfinished(state):
            shutil.rmtree(folder, ignore_errors=True)
            state.unlink()
    return manifest


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from the folder; errors of disk and memory are told in the user's terms."""
    lock = folder.with_name(f"{folder.name}.lock")
    try:
        with FileLock(lock, timeout=0):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
    except Timeout as error:
        raise ValueError(f"Another process is at work in {folder}. Wait for it, or choose another --out.") from error
    except OSError as error:
        raise ValueError(f"Cannot go on: {error}. Put that right and call again: what is finished is kept.") from error
    except BrokenProcessPool as error:
        raise ValueError(
            "A worker was killed, mostly for want of memory. Call again with fewer --workers: what is done is kept."
        ) from error


def _finished(args: argparse.Namespace, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """Return the manifest of an earlier call that did the same; refuse whatever else is there."""
    found, out = read_manifest(args.out)[0], args.out
    if found is None:
        if not is_remote(out) and os.path.lexists(out) and (not os.path.isdir(out) or os.listdir(out)):
            raise ValueError(f"{out} is there already and holds something else. Choose another --out, or empty it.")
    elif differs := different({key: found.get(key) for key in wanted}, wanted):
        raise ValueError(f"{out} holds shards made otherwise ({differs:.600}). Choose another --out, or remove it.")
    elif args.on_error == "stop" and (first := found["problems"]["first"]):
        raise ValueError(f"{out} was made with --on-error skip, and lacks what could not be read: {first[0]}")
    return found


def _convert_pieces(shards: Shards, args: argparse.Namespace, sources: dict[str, Any], tokenizer: str) -> None:
    """Have all pieces tokenized that are not yet, and take their tokens in the order of the input."""
    done, problems = shards.state["done"], shards.state["problems"]
    if problems and args.on_error == "stop":  # of a call that skipped
        raise ValueError(problems[0])
    pending: deque[tuple[list[int], Future[Any]]] = deque()

    def collect(most: int) -> None:
        while len(pending) > most:
            place, future = pending.popleft()
            found, problems, counts = future.result()
            check_proportions(args.proportions, {stream.rpartition("/")[0] for stream in found})
            shards.add(place, found, problems, counts)

    # Not fork: the parent has threads by now (tokenizers, torch), which a forked child may find holding locks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["let_composer.data.tokens"])
    sizes = [about["bytes"] for about in sources.values()]
    bar = tqdm(total=sum(sizes) or None, unit="B", unit_scale=True, disable=args.quiet)
    with bar, ProcessPoolExecutor(args.workers, context, start_worker, (args, tokenizer)) as pool:
        for number, source in list(enumerate(sources))[max(done[0], 0) :]:
            for count, piece in enumerate(read_pieces(source, args.piece_bytes, args.text_key)):
                if [number, count] > done:
                    pending.append(([number, count], pool.submit(tokenize, piece)))
                    collect(2 * args.workers)
                bar.update(sum(sizes[:number]) + piece.position - bar.n)
        collect(0)
    shards.save()

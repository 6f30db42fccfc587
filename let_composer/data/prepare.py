r"""Turn the Pile's documents, or any text in its format, into streaming MDS shards for llm-foundry.

    let-composer prepare /data/pile/train --out /data/pile-mds --tokenizer EleutherAI/gpt-neox-20b \
        --sequence-length 2048 --validation 0.001

Inputs are JSON lines (.jsonl, .jsonl.zst, .jsonl.gz, .json.gz), .parquet files, folders of them, and URLs for fsspec,
such as s3://, https://, hf://datasets/NAME[@REVISION]/FOLDER/*.parquet for the Hugging Face hub. Stop it at any moment
and call it again: it continues, and the shards are byte for byte the same, with any number of workers.
"""

import argparse
import contextlib
import dataclasses
import functools
import math
import sys
import time

from let_composer.data.convert import convert
from let_composer.data.plan import Plan
from let_composer.data.streams import streams_block
from let_composer.data.tokens import UNLABELLED
from let_composer.data.verify import verify

__all__ = ["add_arguments", "run"]


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
    add("--proportions", nargs="+", type=_proportion, metavar="SUBSET=WEIGHT", help=weights)
    add("--eos", help="token that ends each document (the tokenizer's own)")
    add("--on-error", choices=("stop", "skip"), default="stop", help="at unreadable input (%(default)s)")
    order = {"dest": "shuffle_seed", "default": 17}
    add("--no-shuffle", action="store_const", const=None, help="keep the shards in the order of the input", **order)
    add("--seed", type=int, metavar="N", help="of the order of shards (%(default)s)", **order)
    add("--text-key", default="text", help="field or column with the text (%(default)s)")
    add("--workers", type=int, help="processes (one for each core)")
    add("--work", help="folder in which to keep unfinished work (beside OUT, as OUT.partial)")
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
    say = functools.partial(print, file=sys.stderr)
    plan = Plan(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Plan) if field.name in args})
    proportions, started = dict(args.proportions or ()) or None, time.monotonic()
    manifest = convert(plan, args.out, args.workers, args.work, proportions, progress=not args.quiet)
    for name, about in manifest["streams"].items():
        for split, n in about["splits"].items():
            say(f"{name or 'all'} {split}:", *(f"{n[what]:,} {what}" for what in ("documents", "samples", "tokens")))
    if UNLABELLED in manifest["streams"]:
        say("The unlabelled have no name under meta.pile_set_name or pile_set_name.")
    skipped = manifest["problems"]
    counts = [f"{n} x {kind}" for kind, n in skipped["counts"].items()]
    counts += [f"{len(manifest['left_out'])} files or folders not read"] if manifest["left_out"] else []
    for what, lines in (("not read", manifest["left_out"]), ("skipped", skipped["first"]), ("in all", counts)):
        for line in lines[:20]:
            say(f"{what}: {line}")
    say(f"{args.out}: ready ({time.monotonic() - started:.1f} s).")
    if args.by_subset:
        print(streams_block(manifest, args.out, proportions), end="")
    if args.verify:
        verify(args.out)

"""Turn the Pile's documents, or any text in its format, into streaming MDS shards for llm-foundry.

    let-composer prepare /data/pile/train --out /data/pile-mds --tokenizer EleutherAI/gpt-neox-20b \
        --sequence-length 2048 --validation 0.001

Inputs are .jsonl, .jsonl.zst, .jsonl.gz and .parquet files, folders of them, URLs that fsspec reads (s3://, https://,
hf:// ...) or hf:NAME[@REVISION][:SPLIT[:CONFIGURATION]] for a data set of the Hugging Face hub. Stop it at any moment
and call it again: it continues, and the shards are byte for byte the same, with any number of workers.
"""

import argparse
import sys
import time
from typing import Any

from let_composer.data import DataError, describe
from let_composer.data.convert import convert
from let_composer.data.plan import Plan
from let_composer.data.streams import streams_block
from let_composer.data.tokens import UNLABELLED

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take the command line's arguments."""
    parser.add_argument("inputs", nargs="+", help="files, folders, URLs or hf:NAME")
    parser.add_argument("--out", required=True, help="folder to make, or s3://, gs://, oci://, ... to upload to")
    parser.add_argument("--tokenizer", required=True, help="folder with tokenizer.json or name of a hub tokenizer")
    parser.add_argument("--sequence-length", type=int, default=2048, help="tokens a sample (%(default)s)")
    parser.add_argument("--validation", type=float, default=0.0, help="share of documents held out (%(default)s)")
    parser.add_argument("--by-subset", action="store_true", help="one stream for each meta.pile_set_name")
    weights = "share of each subset in streams.yaml; default: the Pile's own, or token counts"
    parser.add_argument("--proportions", nargs="+", metavar="SUBSET=WEIGHT", help=weights)
    parser.add_argument("--eos", help="token that ends each document (the tokenizer's own)")
    parser.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="at unreadable input (%(default)s)"
    )
    parser.add_argument("--no-shuffle", action="store_true", help="keep the pieces in the order of the input")
    parser.add_argument("--seed", type=int, default=17, help="of the order of pieces (%(default)s)")
    parser.add_argument("--text-key", default="text", help="field or column with the text (%(default)s)")
    parser.add_argument("--workers", type=int, help="processes (one for each core)")
    parser.add_argument("--work", help="folder in which to keep unfinished work (beside OUT, as OUT.partial)")
    parser.add_argument("--verify", action="store_true", help="read all of OUT back at the end")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    proportions = _proportions(args.proportions)
    values = {name: getattr(args, name) for name in ("tokenizer", "sequence_length", "validation", "by_subset", "eos")}
    seed = None if args.no_shuffle else args.seed
    plan = Plan(tuple(args.inputs), **values, on_error=args.on_error, text_key=args.text_key, shuffle_seed=seed)
    started = time.monotonic()
    try:
        manifest = convert(plan, args.out, args.workers, args.work, proportions, progress=not args.quiet)
    except KeyboardInterrupt:
        raise SystemExit("let-composer prepare: stopped. Call it again with the same arguments to continue.") from None
    _report(manifest)
    print(f"{args.out}: ready ({time.monotonic() - started:.1f} s).", file=sys.stderr)
    if args.by_subset:
        print(streams_block(manifest, args.out, proportions), end="")
    if args.verify:
        from let_composer.data.verify import verify

        verify(args.out)


def _proportions(given: list[str] | None) -> dict[str, float] | None:
    try:
        return {name: float(weight) for name, _, weight in (entry.rpartition("=") for entry in given or ())} or None
    except ValueError as error:
        raise DataError(f"--proportions takes SUBSET=WEIGHT, such as 'Pile-CC=0.5', got {given}") from error


def _report(manifest: dict[str, Any]) -> None:
    for name, about in manifest["streams"].items():
        for split, n in about["splits"].items():
            numbers = f"{n['documents']:,} documents, {n['samples']:,} samples, {n['tokens']:,} tokens"
            print(f"{name or 'all'} {split}: {numbers}", file=sys.stderr)
    if UNLABELLED in manifest["streams"]:
        print("The unlabelled have no name under meta.pile_set_name or pile_set_name.", file=sys.stderr)
    for line in manifest["left_out"][:20]:
        print(f"not read: {line}", file=sys.stderr)
    if manifest["left_out"]:
        print(f"not read in all: {len(manifest['left_out'])} files or folders", file=sys.stderr)
    for problem in manifest["problems"]["first"][:20]:
        print(f"skipped: {describe(problem)}", file=sys.stderr)
    if counts := manifest["problems"]["counts"]:
        print("skipped in all: " + ", ".join(f"{n} x {kind}" for kind, n in counts.items()), file=sys.stderr)

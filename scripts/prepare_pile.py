"""Turn the Pile's documents, or any text in its format, into streaming MDS shards for llm-foundry.

    python scripts/prepare_pile.py /data/pile/train --out /data/pile-mds --tokenizer EleutherAI/gpt-neox-20b \
        --sequence-length 2048 --validation 0.001

Inputs are .jsonl, .jsonl.zst, .jsonl.gz and .parquet files, folders of them, URLs that fsspec reads (s3://, https://,
hf:// ...) or hf:NAME[:SPLIT] for a data set of the Hugging Face hub. Stop it at any moment and call it again: it
continues, and the shards are byte for byte the same, with any number of workers.
"""

import argparse
import sys
import time

from let_composer.pile import PileError, Plan, convert, streams_block, verify

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", help="files, folders, URLs or hf:NAME[:SPLIT]")
    parser.add_argument("--out", required=True, help="folder to make, or s3://, gs://, oci://, ... to upload to")
    parser.add_argument("--tokenizer", help="folder or name of a Hugging Face tokenizer")
    parser.add_argument("--sequence-length", type=int, default=2048, help="tokens a sample (%(default)s)")
    parser.add_argument("--validation", type=float, default=0.0, help="share of documents held out (%(default)s)")
    parser.add_argument("--by-subset", action="store_true", help="one stream for each meta.pile_set_name")
    parser.add_argument(
        "--proportions",
        nargs="+",
        metavar="SUBSET=WEIGHT",
        help="weights for the streams: block, which is printed; default: the Pile's own, or token counts",
    )
    parser.add_argument("--eos", help="token that ends each document (the tokenizer's own)")
    parser.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="at unreadable input (%(default)s)"
    )
    parser.add_argument("--no-shuffle", action="store_true", help="keep the samples in the order of the input")
    parser.add_argument("--seed", type=int, default=17, help="of the order of samples (%(default)s)")
    parser.add_argument("--text-key", default="text", help="field or column with the text (%(default)s)")
    parser.add_argument("--workers", type=int, help="processes (one for each core)")
    parser.add_argument("--work", help="folder for unfinished work (OUT.partial)")
    parser.add_argument("--verify", action="store_true", help="read all of OUT back through llm-foundry's loader")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    if args.inputs:
        if not args.tokenizer:
            parser.error(
                "--tokenizer is needed: a folder with tokenizer.json, or a name such as EleutherAI/gpt-neox-20b"
            )
        proportions = _proportions(parser, args.proportions)
        plan = Plan(
            inputs=tuple(args.inputs),
            tokenizer=args.tokenizer,
            sequence_length=args.sequence_length,
            validation=args.validation,
            by_subset=args.by_subset,
            eos=args.eos,
            on_error=args.on_error,
            shuffle_seed=None if args.no_shuffle else args.seed,
            text_key=args.text_key,
        )
        started = time.monotonic()
        manifest = convert(plan, args.out, args.workers, args.work, progress=not args.quiet)
        _report(manifest, args.out, time.monotonic() - started)
        if args.by_subset or proportions:
            print(streams_block(manifest, args.out, proportions), end="")
    elif not args.verify:
        parser.error("nothing to do: give input files, or --verify to check shards that are there")
    if args.verify:
        verify(args.out)
    return 0


def _proportions(parser: argparse.ArgumentParser, given: list[str] | None) -> dict[str, float] | None:
    if not given:
        return None
    try:
        return {name: float(weight) for name, _, weight in (entry.rpartition("=") for entry in given)}
    except ValueError:
        parser.error(f"--proportions takes SUBSET=WEIGHT, such as 'Pile-CC=0.5', got {given}")


def _report(manifest: dict, out: str, seconds: float) -> None:
    for name, about in manifest["streams"].items():
        for split, counts in about["splits"].items():
            print(
                f"{name or 'all'} {split}: {counts['documents']:,} documents, {counts['samples']:,} samples, "
                f"{counts['tokens']:,} tokens",
                file=sys.stderr,
            )
    for problem in manifest["problems"]["first"][:20]:
        print(
            f"skipped: {problem['path']}, line {problem['line']}: {problem['kind']}: {problem['message']}",
            file=sys.stderr,
        )
    if counts := manifest["problems"]["counts"]:
        print("skipped in all: " + ", ".join(f"{n} x {kind}" for kind, n in counts.items()), file=sys.stderr)
    print(f"{out}: ready ({seconds:.1f} s).", file=sys.stderr)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PileError as error:
        sys.exit(f"prepare_pile: {error}")
    except KeyboardInterrupt:
        sys.exit("prepare_pile: stopped. Call it again with the same arguments to continue.")

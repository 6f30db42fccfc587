"""Turn the Pile's documents, or any text in its format, into streaming MDS shards for llm-foundry.

    python scripts/prepare_pile.py /data/pile/train --out /data/pile-mds --tokenizer EleutherAI/gpt-neox-20b \
        --sequence-length 2048 --validation 0.001

Inputs are .jsonl, .jsonl.zst, .jsonl.gz and .parquet files, folders of them, URLs that fsspec reads (s3://, https://,
hf:// ...) or hf:NAME[:SPLIT] for a data set of the Hugging Face hub. Stop it at any moment and call it again: it
continues, and the shards are byte for byte the same, with any number of workers.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
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
    parser.add_argument(
        "--benchmark", action="store_true", help="time llm-foundry's converter and this one on one core, on one .jsonl"
    )
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
        if args.benchmark:
            return benchmark(parser, args)
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


# Each in a process of its own on one core; importing is not timed, all else is: workers starting, reading, writing.
OURS = """
import json, sys, time
from streaming import MDSWriter
from transformers import AutoTokenizer
from let_composer.pile import Plan, convert
source, tokenizer, length, out = sys.argv[1:]
started = time.monotonic()
manifest = convert(Plan((source,), tokenizer, int(length)), out, workers=1, progress=False)
seconds = time.monotonic() - started
print(json.dumps([seconds, manifest["streams"][""]["splits"]["train"]["tokens"]]))
"""
THEIRS = """
import json, os, sys, time
from transformers import AutoTokenizer
from llmfoundry.command_utils import convert_dataset_json_from_args
source, tokenizer, length, out = sys.argv[1:]
eos = AutoTokenizer.from_pretrained(tokenizer).eos_token
started = time.monotonic()
convert_dataset_json_from_args(source, out, "zstd", int(length), "train", tokenizer, eos_text=eos)
seconds = time.monotonic() - started
print(json.dumps([seconds, sum(s["samples"] for s in json.load(open(f"{out}/index.json"))["shards"]) * int(length)]))
"""


def benchmark(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Convert one file with llm-foundry's ``convert_dataset_json`` and with ours, both on one core; print the ratio."""
    if len(args.inputs) != 1 or not os.path.isfile(args.inputs[0]):
        parser.error(f"--benchmark takes one local file, which both converters read, got {args.inputs}")
    core = min(os.sched_getaffinity(0))
    rates = {}
    for name, program in (("llm-foundry", THEIRS), ("let_composer", OURS)):
        with tempfile.TemporaryDirectory() as folder:
            # Its own cache folder: llm-foundry's converter would else find the file parsed by an earlier call.
            environment = {**os.environ, "HF_DATASETS_CACHE": f"{folder}/cache", "TOKENIZERS_PARALLELISM": "false"}
            done = subprocess.run(
                [
                    sys.executable,
                    "-c",
                    program,
                    args.inputs[0],
                    args.tokenizer,
                    str(args.sequence_length),
                    f"{folder}/out",
                ],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                preexec_fn=lambda: os.sched_setaffinity(0, {core}),
            )
        seconds, tokens = json.loads(done.stdout.splitlines()[-1])
        rates[name] = tokens / seconds
        print(f"{name}: {tokens:,} tokens in {seconds:.1f} s on one core: {rates[name]:,.0f} tokens/s")
    ours = rates["let_composer"]
    print(f"ratio: {ours / rates['llm-foundry']:.2f}")
    print(f"20B tokens on 64 such cores, computed and not measured: {20e9 / (64 * ours) / 60:.0f} minutes")
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

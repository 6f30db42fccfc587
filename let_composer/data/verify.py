"""Read every shard back as streaming does and check hashes, counts and token ids.

let-composer verify /data/pile-mds
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator

import numpy as np

from let_composer.data.manifest import join, load_tokenizer, read_manifest
from let_composer.data.shards import HASH

__all__ = ["add_arguments", "run", "verify"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take the command line's arguments."""
    parser.add_argument("out", metavar="OUT", help="what let-composer prepare made, local or remote")


def run(args: argparse.Namespace) -> None:
    """Run the verb."""
    verify(args.out)


def verify(out: str) -> dict[str, int]:
    """Read every shard of ``out`` back and print the first sample of each split; returns tokens read for each."""
    manifest, why_not = read_manifest(out)
    if manifest is None:
        raise ValueError(f"Nothing to verify in {out}: {why_not}.")
    tokenizer, read = load_tokenizer(manifest["tokenizer"]["name"]), {}
    splits = [(about["folder"], *split) for about in manifest["streams"].values() for split in about["splits"].items()]
    for where, counts in ((join(out, folder, split), counts) for folder, split, counts in splits if counts["samples"]):
        read[where] = 0
        for number, sample in enumerate(_samples(where)):
            read[where] += len(sample)
            if (largest := int(sample.max())) >= manifest["tokenizer"]["vocabulary_size"]:
                raise ValueError(f"{where}: token {largest} is not in the tokenizer's vocabulary.")
            if number == 0:
                print(f"--- {where}, sample 0:\n{tokenizer.decode(sample.tolist())}\n")
        if read[where] != counts["tokens"]:
            raise ValueError(f"{where}: the manifest says {counts['tokens']} tokens, read {read[where]}.")
        print(f"{where}: {counts['samples']:,} samples, {read[where]:,} tokens, hashes right.", file=sys.stderr)
    return read


def _samples(where: str) -> Iterator[np.ndarray]:
    from streaming import Stream
    from streaming.base.world import World

    with tempfile.TemporaryDirectory() as cache:
        # As from a store: only what is downloaded and decompressed has its hashes checked.
        stream = Stream(remote=where, local=cache, validate_hash=HASH, download_retry=2, download_timeout=60)
        stream.apply_default({"split": "", "keep_zip": False})
        try:
            for shard in stream.get_shards(World.detect(), allow_unsafe_types=False):
                stream.prepare_shard(shard)
                yield from (shard[number]["tokens"] for number in range(shard.samples))
                shard.evict()
        except (ValueError, RuntimeError, OSError) as error:
            raise ValueError(f"{where} cannot be read back: {error}") from error

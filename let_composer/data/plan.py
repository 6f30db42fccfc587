"""What is to be done, and what of it decides the bytes that are written."""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any, Literal

from let_composer.data.manifest import tokenizer_fingerprint

__all__ = ["Plan", "add_arguments", "different", "load_tokenizer", "recipe"]

FORMAT = 6  # raise it when the bytes written for the same input change


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


def load_tokenizer(name: str) -> Any:
    """Load a fast tokenizer."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No tokenizer at {name!r}: expected a folder with tokenizer.json or a name on the model hub. {error}"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(f"{name} has no fast tokenizer (tokenizer.json), which is what workers tokenize with.")
    return tokenizer


def recipe(plan: Plan, sources: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return all that decides the bytes, as the manifest has it, and the tokenizer as workers take it."""
    tokenizer = load_tokenizer(plan.tokenizer)
    table, serialized = tokenizer.get_vocab(), tokenizer.backend_tokenizer.to_str()
    eos = plan.eos if plan.eos is not None else tokenizer.eos_token
    if eos not in table:
        raise ValueError(f"The text that ends a document must be one token of {plan.tokenizer}, got {eos!r}.")
    size = max(table.values()) + 1
    about = {"name": plan.tokenizer, "fingerprint": tokenizer_fingerprint(tokenizer), "vocabulary_size": size}
    about |= {"sha256": hashlib.sha256(serialized.encode()).hexdigest(), "eos": eos, "eos_id": table[eos]}
    arguments = ("validation", "by_subset", "shuffle_seed", "text_key", "shard_bytes")
    return {
        "format": FORMAT,
        "tokenizer": about,
        "sequence_length": plan.sequence_length,
        # llm-foundry widens whatever integers it finds; torch reads uint16 but no other unsigned type as widely.
        "dtype": "uint16" if size <= 1 << 16 else "int32",
        "arguments": {name: getattr(plan, name) for name in arguments},
        "sources": sources,
    }, serialized


def different(there: Any, here: Any, about: str = "") -> str:
    """Say what differs, value by value."""
    if isinstance(there, dict) and isinstance(here, dict):
        found = [different(there.get(key), here.get(key), f"{about} {key}") for key in here | there]
        return "; ".join(filter(None, found))
    return f"{about.strip()}: {json.dumps(there)} there, {json.dumps(here)} wanted" if there != here else ""

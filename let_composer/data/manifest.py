"""What the shards were made of and for, and the check that a training run fits them: all that training imports."""

import hashlib
import json
import logging
import operator
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from let_composer.configuration import build_tokenizer

__all__ = ["MANIFEST", "check_config", "different", "is_remote", "join", "load_tokenizer", "read_manifest", "recipe"]

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 6  # raise it when the bytes written for the same input change


def is_remote(folder: str) -> bool:
    """Whether streaming takes it for a store's URL."""
    return "://" in folder or folder.startswith("dbfs:/")


def join(*parts: str | None) -> str:
    """Join parts of a path or URL, with one slash between them however they end."""
    return re.sub(r"(?<!:)/+", "/", "/".join(part for part in parts if part)).rstrip("/")


def tokenizer_fingerprint(tokenizer: Any, below: int | None = None) -> str:
    """Hash what every id means (below an id, if given): equal for equal tables, whatever the tokenizer's name."""
    table = sorted((i, token) for token, i in tokenizer.get_vocab().items() if below is None or i < below)
    return "sha256:" + hashlib.sha256(json.dumps(table).encode()).hexdigest()


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


def recipe(plan: Any, sources: dict[str, Any]) -> tuple[dict[str, Any], str]:
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


def read_manifest(folder: str) -> tuple[dict[str, Any] | None, str]:
    """Read the manifest in a local or remote folder; None where there is none of ours, and why."""
    from streaming.base.storage.download import CloudDownloader

    try:
        with tempfile.TemporaryDirectory() as here:
            CloudDownloader.direct_download(join(folder, MANIFEST), f"{here}/{MANIFEST}", timeout=20)
            manifest = json.loads(Path(here, MANIFEST).read_text())
        operator.itemgetter("fingerprint", "name", "vocabulary_size")(manifest["tokenizer"])
        return manifest, ""
    except FileNotFoundError:
        return None, f"there is no {MANIFEST}"
    # Each store has its own exception for "no such file", and a file can hold anything.
    except Exception as error:
        return None, f"its {MANIFEST} cannot be read as one of let-composer prepare ({type(error).__name__}: {error})"


def check_config(config: dict[str, Any]) -> dict[str, Any]:
    """Refuse shards of another tokenizer or length, and caches of others: llm-foundry applies it to every run's config.

    Each rank checks for itself: nodes have caches of their own. Shards without a manifest pass with a warning.
    """
    tokenizer = None
    for folder, cached, max_seq_len in _shards(config) if config.get("tokenizer") else ():
        manifest, why_not = read_manifest(folder)
        if manifest:
            if (got := manifest["sequence_length"]) != max_seq_len:
                raise ValueError(
                    f"The shards in {folder} hold sequences of {got} tokens, but max_seq_len is {max_seq_len}. Set "
                    f"max_seq_len to {got}, or prepare shards with --sequence-length {max_seq_len}."
                )
            try:
                tokenizer = tokenizer or build_tokenizer(config["tokenizer"])
            except (OSError, ValueError) as error:
                why_not = f"the run's tokenizer cannot be built ({error})"
            else:
                _check(manifest, folder, tokenizer, cached)
        if why_not:
            log.warning("Whether the shards in %s fit the run's tokenizer and length is unknown: %s.", folder, why_not)
    return config


def _check(manifest: dict[str, Any], folder: str, tokenizer: Any, cached: str | None) -> None:
    made = manifest["tokenizer"]
    ours = tokenizer_fingerprint(tokenizer, made["vocabulary_size"])  # tokens added since are in no shard
    if made["fingerprint"] != ours:
        raise ValueError(
            f"The shards in {folder} were made with the tokenizer {made['name']!r} ({made['vocabulary_size']} tokens, "
            f"{made['fingerprint'][:19]}…), but the run's is {tokenizer.name_or_path!r} ({len(tokenizer)} tokens, "
            f"{ours[:19]}…): the same ids mean other text. Use that tokenizer, or prepare shards with this one."
        )
    index, expected = Path(cached or "", "index.json"), manifest.get("index_sha256")
    if cached and expected and index.is_file() and hashlib.sha256(index.read_bytes()).hexdigest() != expected:
        raise ValueError(
            f"{cached} holds the index of other shards than {folder}, from an earlier run: streaming would read those. "
            f"Remove it (rm -r {cached}), or name another folder as local."
        )


def _shards(config: dict[str, Any]) -> Iterator[tuple[str, str | None, int]]:
    """Yield where each stream's shards are, where streaming caches them, and the sequence length."""
    loaders = [config.get("train_loader"), config.get("eval_loader"), *(config.get("eval_loaders") or [])]
    for dataset in (loader.get("dataset") for loader in loaders if isinstance(loader, dict)):
        if isinstance(dataset, dict) and "max_seq_len" in dataset:
            for stream in (dataset.get("streams") or {"": dataset}).values():
                remote, local = stream.get("remote"), stream.get("local")
                if remote or local:
                    split = stream.get("split") or dataset.get("split")
                    cached = join(local, split) if remote and local and remote != local else None
                    yield join(remote or local, split), cached, dataset["max_seq_len"]

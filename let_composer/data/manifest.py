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

__all__ = ["MANIFEST", "check_config", "check_manifest", "join", "read_manifest", "tokenizer_fingerprint"]

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


def join(*parts: str | None) -> str:
    """Join parts of a path or URL, with one slash between them however they end."""
    return re.sub(r"(?<!:)/+", "/", "/".join(part for part in parts if part)).rstrip("/")


def tokenizer_fingerprint(tokenizer: Any, below: int | None = None) -> str:
    """Hash what every id means (below an id, if given): equal for equal tables, whatever the tokenizer's name."""
    table = sorted((i, token) for token, i in tokenizer.get_vocab().items() if below is None or i < below)
    return "sha256:" + hashlib.sha256(json.dumps(table).encode()).hexdigest()


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


def check_manifest(
    manifest: dict[str, Any], folder: str, tokenizer: Any, max_seq_len: int, cached: str | None = None
) -> None:
    """Refuse shards made for another tokenizer or length, and the index of other shards in the folder ``cached``."""
    if (got := manifest["sequence_length"]) != max_seq_len:
        raise ValueError(
            f"The shards in {folder} hold sequences of {got} tokens, but max_seq_len is {max_seq_len}. Set max_seq_len "
            f"to {got}, or prepare shards with --sequence-length {max_seq_len}."
        )
    made = manifest["tokenizer"]
    ours = tokenizer_fingerprint(tokenizer, made["vocabulary_size"])  # tokens added since are in no shard
    if made["fingerprint"] != ours:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise ValueError(
            f"The shards in {folder} were made with the tokenizer {made['name']!r} ({made['vocabulary_size']} tokens, "
            f"{made['fingerprint'][:19]}…), but the run's is {name!r} ({len(tokenizer)} tokens, {ours[:19]}…): the "
            "same ids mean other text. Use that tokenizer, or prepare shards with this one."
        )
    index, expected = Path(cached or "", "index.json"), manifest.get("index_sha256")
    if cached and expected and index.is_file() and hashlib.sha256(index.read_bytes()).hexdigest() != expected:
        raise ValueError(
            f"{cached} holds the index of other shards than {folder}, from an earlier run: streaming would read those. "
            f"Remove it (rm -r {cached}), or name another folder as local."
        )


def check_config(config: dict[str, Any]) -> dict[str, Any]:
    """Check the shards of all loaders of a training config: a transform that llm-foundry applies to every run.

    Each rank checks for itself: nodes have caches of their own. Shards without a manifest pass with a warning.

    Args:
        config: A llm-foundry training config.

    Returns:
        The config as it came.

    Raises:
        ValueError: Shards made for another tokenizer or sequence length, or streaming's cache holds other shards.
    """
    tokenizer = None
    for folder, cached, max_seq_len in _shards(config) if config.get("tokenizer") else ():
        manifest, why_not = read_manifest(folder)
        if manifest:
            try:
                tokenizer = tokenizer or _build_tokenizer(config["tokenizer"])
            except (OSError, ValueError) as error:
                why_not = f"the run's tokenizer cannot be built ({error})"
            else:
                check_manifest(manifest, folder, tokenizer, max_seq_len, cached)
        if why_not:
            message = "Neither the tokenizer nor the sequence length of the shards in %s was checked: %s."
            log.warning(message, folder, why_not)
    return config


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


def _build_tokenizer(config: dict[str, Any]) -> Any:
    from llmfoundry import registry
    from transformers import AutoTokenizer

    # Not llm-foundry's build_tokenizer, which is a collective of all ranks.
    name, kwargs = config["name"], config.get("kwargs") or {}
    make = registry.tokenizers.get if name in registry.tokenizers else None
    return make(name)(**kwargs) if make else AutoTokenizer.from_pretrained(name, **kwargs)

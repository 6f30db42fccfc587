"""What the shards were made of and for, and the check that a training run fits them: all that training imports."""

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from let_composer.data import DataError

__all__ = ["MANIFEST", "check_config", "check_manifest", "join", "read_manifest", "tokenizer_fingerprint"]

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


def join(*parts: str | None) -> str:
    """Join parts of a path or URL, with one slash between them however they end."""
    return re.sub(r"(?<!:)/+", "/", "/".join(part for part in parts if part)).rstrip("/")


def tokenizer_fingerprint(tokenizer: Any, below: int | None = None) -> str:
    """Hash what every id means, so that two tokenizers can be compared by one string.

    Args:
        tokenizer: Any Hugging Face tokenizer.
        below: Leaves out ids from here on. Default: none.

    Returns:
        ``sha256:`` and 64 hex digits; equal for equal id-to-token tables, whatever the tokenizer's class or name.
    """
    table = sorted((i, token) for token, i in tokenizer.get_vocab().items() if below is None or i < below)
    return "sha256:" + hashlib.sha256(json.dumps(table).encode()).hexdigest()


def check_manifest(folder: str, tokenizer: Any, max_seq_len: int, cached: str | None = None) -> None:
    """Refuse shards that were made for another tokenizer or sequence length, and a cache of other shards.

    Args:
        folder: A split's folder, local or remote (``s3://`` and whatever else streaming downloads from).
        tokenizer: The run's Hugging Face tokenizer.
        max_seq_len: The run's sequence length, in tokens.
        cached: The folder that streaming keeps this split's shards in. Default: none, they are read where they are.

    Raises:
        ValueError: The manifest beside the shards names another tokenizer or length, or the index in ``cached`` is not
            the one of ``folder``; the message has both values. Shards without a manifest pass, and a line in the log
            says so.
    """
    if manifest := read_manifest(folder):
        _check(manifest, folder, tokenizer, max_seq_len, cached)


def _check(manifest: dict[str, Any], folder: str, tokenizer: Any, max_seq_len: int, cached: str | None) -> None:
    if (got := manifest["sequence_length"]) != max_seq_len:
        raise DataError(
            f"The shards in {folder} hold sequences of {got} tokens, but max_seq_len is {max_seq_len}. Set max_seq_len "
            f"to {got}, or prepare shards with --sequence-length {max_seq_len}."
        )
    made = manifest["tokenizer"]
    ours = tokenizer_fingerprint(tokenizer, made["vocabulary_size"])  # tokens added since are in no shard
    if made["fingerprint"] != ours:
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise DataError(
            f"The shards in {folder} were made with the tokenizer {made['name']!r} ({made['vocabulary_size']} tokens, "
            f"{made['fingerprint'][:19]}…), but the run's is {name!r} ({len(tokenizer)} tokens, {ours[:19]}…): the "
            "same ids mean other text. Use that tokenizer, or prepare shards with this one."
        )
    index = Path(cached, "index.json") if cached else None
    expected = manifest.get("index_sha256")
    if index and expected and index.is_file() and hashlib.sha256(index.read_bytes()).hexdigest() != expected:
        raise DataError(
            f"{cached} holds the index of other shards than {folder}, from an earlier run: streaming would read those. "
            f"Remove it (rm -r {cached}), or name another folder as local."
        )


def read_manifest(folder: str, above: bool = True) -> dict[str, Any] | None:
    """Read the manifest in a folder or, on disk, in the one above it; None where there is none of ours."""
    folder = join(folder)
    unchecked = f"Neither the tokenizer nor the sequence length of the shards in {folder} was checked"
    try:
        if "://" in folder:
            manifest = json.loads(_download(f"{folder}/{MANIFEST}"))
        else:
            paths = [path / MANIFEST for path in (Path(folder), *[Path(folder).parent] * above)]
            path = next((path for path in paths if path.is_file()), None)
            manifest = json.loads(path.read_text()) if path else None
    # Each store has its own exception for "no such file"; a manifest is optional, and the data loader itself reports
    # shards that cannot be reached.
    except Exception as error:
        log.warning("%s: cannot read %s (%s: %s).", unchecked, MANIFEST, type(error).__name__, error)
        return None
    made = manifest.get("tokenizer") if isinstance(manifest, dict) else None
    if (
        isinstance(made, dict)
        and {"fingerprint", "name", "vocabulary_size"} <= set(made)
        and "sequence_length" in (manifest or {})
    ):
        return manifest
    missing = manifest is None
    log.log(
        logging.INFO if missing else logging.WARNING,
        "%s: %s.",
        unchecked,
        f"there is no {MANIFEST}" if missing else f"its {MANIFEST} is not one of let-composer prepare",
    )
    return None


def _download(url: str) -> str:
    from streaming.base.storage.download import CloudDownloader

    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, "file.json")
        CloudDownloader.direct_download(url, local, timeout=20)
        return Path(local).read_text()


def check_config(config: dict[str, Any]) -> dict[str, Any]:
    """Check the shards of all loaders of a training config: a transform that llm-foundry applies to every run.

    Global rank 0 reads and tells the others, which wait for it, so that all ranks raise the same.

    Args:
        config: A llm-foundry training config.

    Returns:
        The config as it came.

    Raises:
        ValueError: What ``check_manifest`` raises.
    """
    from composer.utils import dist, get_device

    shards = list(_shards(config))
    if not shards or not config.get("tokenizer"):
        return config
    verdict: list[Any] = [None]
    if dist.get_global_rank() == 0:
        try:
            _check_all(config["tokenizer"], shards)
        except DataError as error:
            verdict = [str(error)]
    if dist.get_world_size() > 1:
        dist.initialize_dist(get_device(None), timeout=config.get("dist_timeout", 600.0))  # what comes next anyway
        dist.broadcast_object_list(verdict)
    if verdict[0]:
        raise DataError(verdict[0])
    return config


def _shards(config: dict[str, Any]) -> Iterator[tuple[str, str | None, int]]:
    loaders = [config.get("train_loader"), config.get("eval_loader"), *(config.get("eval_loaders") or [])]
    for dataset in (loader.get("dataset") for loader in loaders if isinstance(loader, dict)):
        if isinstance(dataset, dict) and "max_seq_len" in dataset:
            for stream in (dataset.get("streams") or {"": dataset}).values():
                remote, local = stream.get("remote"), stream.get("local")
                if remote or local:
                    split = stream.get("split") or dataset.get("split")
                    cached = join(local, split) if remote and local and remote != local else None
                    yield join(remote or local, split), cached, dataset["max_seq_len"]


def _check_all(tokenizer: dict[str, Any], shards: list[tuple[str, str | None, int]]) -> None:
    found = [(manifest, *about) for about in shards if (manifest := read_manifest(about[0]))]
    if not found:
        return
    from llmfoundry import registry
    from transformers import AutoTokenizer

    # Not llm-foundry's build_tokenizer, which is a collective of all ranks.
    make = registry.tokenizers.get(tokenizer["name"]) if tokenizer["name"] in registry.tokenizers else None
    try:
        kwargs = tokenizer.get("kwargs") or {}
        built = make(**kwargs) if make else AutoTokenizer.from_pretrained(tokenizer["name"], **kwargs)
    except (OSError, ValueError) as error:
        log.warning("The shards were not checked: the tokenizer cannot be built (%s).", error)
        return
    for manifest, folder, cached, max_seq_len in found:
        _check(manifest, folder, built, max_seq_len, cached)

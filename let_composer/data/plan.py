"""What decides the bytes that are written, and what is there already of them."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from pathlib import Path
from typing import Any

from let_composer.data import DataError, describe, write_json
from let_composer.data.manifest import read_manifest, tokenizer_fingerprint
from let_composer.data.sources import Source

__all__ = ["Plan", "claim", "clean", "finished", "load_tokenizer", "locked", "wanted", "work_folder"]

FORMAT = 5  # raise it when the bytes written for the same input change
VERSIONS = ("mosaicml-streaming", "numpy", "tokenizers", "transformers", "zstd")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that decides the bytes written.

    Args:
        inputs: Files, folders, globs or URLs.
        tokenizer: Name or folder of a Hugging Face tokenizer.
        sequence_length: Tokens a sample.
        validation: Share of documents, by hash of their text, that goes to the validation split. Default: ``0``.
        by_subset: One stream for each ``pile_set_name``. Default: ``False``.
        eos: Text that ends each document. Default: the tokenizer's own.
        on_error: ``stop`` at a document or file that cannot be read, or ``skip`` it. Default: ``stop``.
        shuffle_seed: Seed of the order of pieces; None keeps the order of the input. Default: ``17``.
        text_key: Name of the field or column with the text. Default: ``text``.
        piece_bytes: Input bytes that become one shard of each stream. Default: 32 MiB.
        shard_bytes: Most uncompressed bytes of a shard. Default: 64 MiB.
    """

    inputs: tuple[str, ...]
    tokenizer: str
    sequence_length: int
    validation: float = 0.0
    by_subset: bool = False
    eos: str | None = None
    on_error: str = "stop"
    shuffle_seed: int | None = 17
    text_key: str = "text"
    piece_bytes: int = 32 << 20
    shard_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        for name, right, expected in (
            ("sequence_length", self.sequence_length >= 1, "at least 1"),
            ("validation", 0 <= self.validation < 1, "a share in [0, 1), such as 0.01 for one document in 100"),
            ("on_error", self.on_error in ("stop", "skip"), "stop or skip"),
        ):
            if not right:
                raise DataError(f"{name} must be {expected}, got {getattr(self, name)!r}.")


def load_tokenizer(name: str) -> Any:
    """Load a fast tokenizer."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise DataError(
            f"No tokenizer at {name!r}: expected a folder with tokenizer.json or a name on the model hub. {error}"
        ) from error
    if not tokenizer.is_fast:
        raise DataError(f"{name} has no fast tokenizer (tokenizer.json), which is what workers tokenize with.")
    return tokenizer


def wanted(plan: Plan, sources: list[Source]) -> tuple[dict[str, Any], str]:
    """Return the manifest as far as it is known before the work, and the tokenizer as workers take it."""
    tokenizer = load_tokenizer(plan.tokenizer)
    table, serialized = tokenizer.get_vocab(), tokenizer.backend_tokenizer.to_str()
    eos = plan.eos if plan.eos is not None else tokenizer.eos_token
    if (eos_id := table.get(eos)) is None:
        raise DataError(f"The text that ends a document must be one token of {plan.tokenizer}, got {eos!r}.")
    size = max(table.values()) + 1
    known = ("inputs", "tokenizer", "sequence_length")
    manifest = {
        "format": FORMAT,
        "tokenizer": {
            "name": plan.tokenizer,
            "fingerprint": tokenizer_fingerprint(tokenizer),
            "sha256": hashlib.sha256(serialized.encode()).hexdigest(),
            "vocabulary_size": size,
            "eos": eos,
            "eos_id": eos_id,
        },
        "sequence_length": plan.sequence_length,
        # llm-foundry widens whatever integers it finds; torch reads uint16 but no other unsigned type as widely.
        "dtype": "uint16" if size <= 1 << 16 else "int32",
        "arguments": {name: value for name, value in dataclasses.asdict(plan).items() if name not in known},
        "sources": [{"path": s.path, "bytes": s.size, "version": s.version} for s in sources],
        "versions": {package: version(package) for package in VERSIONS},
    }
    return manifest, serialized


def _different(found: dict[str, Any], expected: dict[str, Any], about: tuple[str, ...] = ("path", "bytes")) -> str:
    """Say what decides the bytes and differs: no versions, nor ``on_error``: the same, as far as it gets."""

    def flat(manifest: dict[str, Any]) -> dict[str, Any]:
        values = {k: manifest.get(k) for k in ("format", "sequence_length", "dtype", "remote")}
        values |= {f"tokenizer {k}": v for k, v in manifest.get("tokenizer", {}).items()} | manifest["arguments"]
        return values | {"sources": [{k: s[k] for k in about} for s in manifest["sources"]], "on_error": None}

    def short(value: Any) -> str:
        text = json.dumps(value)
        return text if len(text) <= 300 else f"{text[:300]}…"

    there, here = flat(found), flat(expected)
    names = [k for k in here | there if here.get(k) != there.get(k)]
    return "; ".join(f"{k}: {short(there.get(k))} there, {short(here.get(k))} wanted" for k in names)


def finished(out: str, expected: dict[str, Any]) -> dict[str, Any] | None:
    """Return the manifest of an earlier call that did the same; refuse whatever else is there."""
    found, _ = read_manifest(out)
    if found is None:
        if "://" not in out and os.path.lexists(out) and (not os.path.isdir(out) or os.listdir(out)):
            raise DataError(f"{out} is there already and holds something else. Choose another --out, or empty it.")
        return None
    if different := _different(found, expected):
        raise DataError(
            f"{out} holds shards made otherwise ({different}). Choose another --out, or remove that folder."
        )
    if expected["arguments"]["on_error"] == "stop" and found["problems"]["first"]:
        problem = describe(found["problems"]["first"][0])
        raise DataError(f"{out} was made with --on-error skip, and lacks what could not be read: {problem}")
    return found


def work_folder(out: str, work: str | None) -> Path:
    """Return the folder of unfinished work, which nothing else may be in."""
    target = Path(out if "://" in out else os.path.realpath(out))
    inside = Path(os.path.realpath(work or ("." if "://" in out else target.parent)))
    if target in (inside, *inside.parents):
        raise DataError(
            f"--work {work} is --out or inside it, which appears only when all is done. Name another folder."
        )
    return inside / f"{target.name}.partial"


def claim(folder: Path, expected: dict[str, Any]) -> None:
    """Claim a new folder for this plan, or go on in one that was claimed for the same; it is locked."""
    plan = folder / "plan.json"
    if plan.exists():
        if different := _different(json.loads(plan.read_text()), expected, ("path", "bytes", "version")):
            raise DataError(
                f"{folder} holds the unfinished work of another call ({different}). Finish that call, or remove it: "
                f"rm -r {folder}"
            )
    elif any(path.name != "plan.json.writing" for path in folder.iterdir()):
        raise DataError(f"{folder} is wanted for unfinished work, but holds something else. Choose another --work.")
    write_json(plan, expected)
    for name in ("pieces", "out"):
        (folder / name).mkdir(exist_ok=True)


def clean(folder: Path) -> None:
    """Remove what ``claim`` and the work made, and the folder if nothing else is in it; it is locked."""
    if (folder / "plan.json").exists():
        for name in ("pieces", "out"):
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / "plan.json").unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder and hold it; errors of disk and memory are told in the user's terms."""
    from filelock import FileLock, Timeout

    lock = folder.with_name(f"{folder.name}.lock")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0):
            folder.mkdir(exist_ok=True)
            yield
            lock.unlink(missing_ok=True)
    except Timeout as error:
        raise DataError(f"Another process is at work in {folder}. Wait for it, or choose another --out.") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(folder).free / 1e9
        raise DataError(
            f"No room to write in {folder} ({error.strerror}; {free:.2f} GB free on that disk). Make room and call "
            "again: what is finished is kept."
        ) from error
    except BrokenProcessPool as error:
        raise DataError(
            "A worker process was killed, most often for want of memory. Call again with fewer --workers: what is "
            "finished is kept."
        ) from error

"""What decides the bytes that are written, and what is there already of them."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Literal

from let_composer.data import DataError
from let_composer.data.manifest import read_manifest, tokenizer_fingerprint

__all__ = ["Plan", "clean", "different", "finished", "load_tokenizer", "locked", "recipe", "work_folder"]

FORMAT = 6  # raise it when the bytes written for the same input change


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the user decides about the bytes written."""

    inputs: Sequence[str]  # files, folders, globs or URLs
    tokenizer: str  # name or folder of a Hugging Face tokenizer
    sequence_length: int  # tokens a sample
    validation: float = 0.0  # share of documents, by hash of their text, that goes to the validation split
    by_subset: bool = False  # one stream for each pile_set_name
    eos: str | None = None  # text that ends each document; default: the tokenizer's own
    on_error: Literal["stop", "skip"] = "stop"  # at a document or file that cannot be read
    shuffle_seed: int | None = 17  # of the order of shards; None keeps the order of the input
    text_key: str = "text"  # name of the field or column with the text
    shard_bytes: int = 16 << 20  # of a shard before compression: some 32 MiB of text
    piece_bytes: int = 8 << 20  # input bytes given to a worker at a time; no byte written depends on it

    def __post_init__(self) -> None:
        if self.sequence_length < 1:
            raise DataError(f"sequence_length must be at least 1, got {self.sequence_length}.")
        if not 0 <= self.validation < 1:
            raise DataError(f"validation must be a share in [0, 1), such as 0.01, got {self.validation}.")


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


def recipe(plan: Plan, sources: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return all that decides the bytes, as the manifest has it, and the tokenizer as workers take it."""
    tokenizer = load_tokenizer(plan.tokenizer)
    table, serialized = tokenizer.get_vocab(), tokenizer.backend_tokenizer.to_str()
    eos = plan.eos if plan.eos is not None else tokenizer.eos_token
    if eos not in table:
        raise DataError(f"The text that ends a document must be one token of {plan.tokenizer}, got {eos!r}.")
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


def finished(out: str, wanted: dict[str, Any], on_error: str) -> dict[str, Any] | None:
    """Return the manifest of an earlier call that did the same; refuse whatever else is there."""
    found, _ = read_manifest(out)
    if found is None:
        if "://" not in out and os.path.lexists(out) and (not os.path.isdir(out) or os.listdir(out)):
            raise DataError(f"{out} is there already and holds something else. Choose another --out, or empty it.")
    elif differs := different({key: found.get(key) for key in wanted}, wanted):
        raise DataError(f"{out} holds shards made otherwise ({differs:.600}). Choose another --out, or remove it.")
    elif on_error == "stop" and (first := found["problems"]["first"]):
        raise DataError(f"{out} was made with --on-error skip, and lacks what could not be read: {first[0]}")
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


def clean(folder: Path) -> None:
    """Remove what the work made, and the folder if nothing else is in it; it is locked."""
    for name in ("out", "shard") if (folder / "state.npz").exists() else ():
        shutil.rmtree(folder / name, ignore_errors=True)
    for path in (*folder.glob("streams.yaml*"), *folder.glob("state.npz*")):  # the halves of a killed call, too
        path.unlink()
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

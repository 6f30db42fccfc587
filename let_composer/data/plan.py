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

from let_composer.data import PARTIAL, DataError, write_json
from let_composer.data.manifest import join, read_manifest, tokenizer_fingerprint
from let_composer.data.sources import Source
from let_composer.data.tokens import describe

__all__ = ["Plan", "check_work", "clean", "finished", "load_tokenizer", "locked", "wanted", "work_folder"]

FORMAT = 4  # raise it when the bytes written for the same input change


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that decides the bytes written.

    Args:
        inputs: Files, folders, URLs or ``hf:`` names.
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
        if not self.inputs:
            raise DataError("Expected at least one input file or folder, got none.")
        if self.sequence_length < 1:
            raise DataError(f"sequence_length must be at least 1, got {self.sequence_length}.")
        if not 0 <= self.validation < 1:
            raise DataError(
                f"validation must be a share in [0, 1), got {self.validation}. 0.01 is one document in 100."
            )
        if self.on_error not in ("stop", "skip"):
            raise DataError(f"on_error must be stop or skip, got {self.on_error!r}.")
        if not (1 <= self.shard_bytes < 1 << 31 and self.piece_bytes >= 1):
            raise DataError("shard_bytes must be in [1, 2**31) and piece_bytes at least 1.")


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
    table = tokenizer.get_vocab()
    eos = plan.eos if plan.eos is not None else tokenizer.eos_token
    if (eos_id := table.get(eos)) is None:
        raise DataError(f"The text that ends a document must be one token of {plan.tokenizer}, got {eos!r}.")
    size = max(table.values()) + 1
    serialized = tokenizer.backend_tokenizer.to_str()
    arguments = dataclasses.asdict(plan)
    for name in ("inputs", "tokenizer", "sequence_length"):
        del arguments[name]
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
        "arguments": arguments,
        "sources": [{"path": s.path, "bytes": s.size, "version": s.version} for s in sources],
        "versions": {p: version(p) for p in ("mosaicml-streaming", "numpy", "tokenizers", "transformers", "zstd")},
    }
    return manifest, serialized


def _different(found: dict[str, Any], expected: dict[str, Any], about: tuple[str, ...] = ("path", "bytes")) -> str:
    """Say what decides the bytes and differs: no versions, nor ``on_error``: the same, as far as it gets."""

    def flat(manifest: dict[str, Any]) -> dict[str, Any]:
        sources = [{k: s.get(k) for k in about} for s in manifest.get("sources", [])]
        values = {k: manifest.get(k) for k in ("format", "sequence_length", "dtype")}
        values |= {f"tokenizer {k}": v for k, v in manifest.get("tokenizer", {}).items()}
        return values | manifest.get("arguments", {}) | {"sources": sources, "on_error": None}

    def short(value: Any) -> str:
        text = json.dumps(value)
        return text if len(text) <= 300 else f"{text[:300]}…"

    there, here = flat(found), flat(expected)
    names = [k for k in here | there if here.get(k) != there.get(k)]
    return "; ".join(f"{k}: {short(there.get(k))} there, {short(here.get(k))} wanted" for k in names)


def finished(out: str, expected: dict[str, Any]) -> dict[str, Any] | None:
    """Return the manifest of an earlier call that did the same; refuse whatever else is there."""
    found = read_manifest(out, above=False)
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
    """Return the folder of unfinished work, which nothing else may be in, after seeing that it can become ``out``."""
    target = Path(out if "://" in out else os.path.realpath(out))
    name = f"{target.name}-{hashlib.sha256(join(out).encode()).hexdigest()[:8]}{PARTIAL}"
    if "://" in out:
        return Path(work or ".", name)
    if work is None:
        return target.with_name(f"{target.name}{PARTIAL}")
    if target in (inside := Path(os.path.realpath(work)), *inside.parents):
        raise DataError(
            f"--work {work} is --out or inside it, which appears only when all is done. Name another folder."
        )
    inside.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    probe = inside / f"{name}.{os.getpid()}"
    probe.touch()
    try:
        probe.rename(target.parent / probe.name).unlink()
    except OSError as error:
        probe.unlink()
        raise DataError(
            f"--work {work} must be on the disk of --out {out}, as the finished folder is renamed ({error.strerror})."
        ) from error
    return inside / name


def check_work(folder: Path, expected: dict[str, Any]) -> None:
    """Claim a new folder for this plan, or go on in one that was claimed for the same; it is locked."""
    plan_file = folder / "plan.json"
    if plan_file.exists():
        if different := _different(json.loads(plan_file.read_text()), expected, ("path", "bytes", "version")):
            raise DataError(
                f"{folder} holds the unfinished work of another call ({different}). Finish that call, or remove it: "
                f"rm -r {folder}"
            )
        for path in [*folder.rglob(f"*{PARTIAL}")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif any(not path.name.endswith(PARTIAL) for path in folder.iterdir()):
        raise DataError(f"{folder} is wanted for unfinished work, but holds something else. Choose another --work.")
    write_json(plan_file, expected)
    (folder / "pieces").mkdir(exist_ok=True)
    (folder / "out").mkdir(exist_ok=True)


def clean(folder: Path) -> None:
    """Remove what ``check_work`` and the work made, and the folder if nothing else is in it; it is locked."""
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

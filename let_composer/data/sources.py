"""What there is to read: files, folders, URLs and hub data sets, cut into pieces of whole documents."""

import dataclasses
import glob
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from let_composer.data import DataError

__all__ = ["Source", "filesystem", "hub_name", "list_sources"]

KINDS = {".jsonl": "jsonl", ".jsonl.zst": "zst", ".jsonl.zstd": "zst", ".jsonl.gz": "gz", ".parquet": "parquet"}


@dataclasses.dataclass(frozen=True)
class Source:
    """One input: a file or a hub data set; ``version`` is its time of change, tag or revision."""

    path: str
    kind: str
    size: int | None
    version: str = ""


def list_sources(inputs: Sequence[str]) -> tuple[list[Source], list[str]]:
    """Resolve files, folders, globs, URLs and ``hf:`` names into sources, in a fixed order, links followed.

    Returns:
        The sources, and a line for each file that was left out.
    """
    sources, left_out = [], []
    for name in inputs:
        if name.startswith("hf:") and not name.startswith("hf://"):
            sources.append(Source(name, "hf", None, _revision(name)))
            continue
        found = _local(name, left_out) if "://" not in name else _remote(name, left_out)
        if not found:
            raise DataError(f"Nothing to read in {name}: expected files that end in {', '.join(KINDS)}.")
        sources += found
    if repeated := [path for path, n in Counter(s.path for s in sources).items() if n > 1]:
        raise DataError(f"Named more than once: {', '.join(repeated)}. Its documents would be repeated.")
    return sources, left_out


def _kind(path: str) -> str | None:
    return next((kind for suffix, kind in KINDS.items() if path.lower().endswith(suffix)), None)


def _missing(name: str) -> DataError:
    return DataError(
        f"No such file or folder: {name}. Expected {', '.join(KINDS)} files, a folder of them, a URL that fsspec reads "
        "or hf:NAME for a data set of the Hugging Face hub."
    )


def _usable(path: str, left_out: list[str], root: str) -> bool:
    hidden = any(part.startswith(".") for part in path.removeprefix(root).split("/"))
    reason = "hidden" if hidden else "" if _kind(path) else "not a format that is read"
    if reason:
        left_out.append(f"{path}: {reason}")
    return not reason


def _local(name: str, left_out: list[str]) -> list[Source]:
    paths, seen = [], {}
    for top in [name] if os.path.lexists(name) else sorted(glob.glob(name, recursive=True)):
        if not os.path.isdir(top):
            if not _kind(top):
                raise DataError(f"Cannot read {top}: expected a name that ends in {', '.join(KINDS)}.")
            paths.append(top)
        for folder, folders, files in os.walk(top, followlinks=True):
            if (first := seen.setdefault(os.path.realpath(folder), folder)) != folder:
                left_out.append(f"{folder}: the same folder as {first}")
                folders.clear()
                continue
            left_out += [f"{folder}/{f}: hidden" for f in folders if f.startswith(".")]
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            for path in (os.path.join(folder, file) for file in files):
                if not os.path.exists(path):
                    left_out.append(f"{path}: a link to nothing")
                elif _usable(path, left_out, top):
                    paths.append(path)
    if not paths and not os.path.exists(name):
        raise _missing(name)
    found = []
    for path in sorted(paths):
        if not os.path.exists(path):
            raise DataError(f"{path} is a link to {os.readlink(path)}, which does not exist.")
        info = os.stat(path)
        # Absolute only where the user was: the manifest need not depend on where a relative input lies.
        shown = path if os.path.isabs(name) else os.path.relpath(path)
        found.append(Source(shown, str(_kind(path)), info.st_size, str(info.st_mtime)))
    return found


def _remote(name: str, left_out: list[str]) -> list[Source]:
    fs, root = filesystem(name)
    if fs.isdir(root):
        paths = [path for path in fs.find(root) if _usable(path, left_out, root)]
    elif fs.exists(root):
        paths = [root]
    elif not glob.has_magic(root):
        raise _missing(name)
    else:
        paths = fs.glob(root)
    found = []
    for path in sorted(paths):
        if (kind := _kind(path)) is None:
            raise DataError(f"Cannot read {path}: expected a name that ends in {', '.join(KINDS)}.")
        info = fs.info(path)
        version = info.get("mtime") or info.get("LastModified") or info.get("ETag") or ""
        found.append(Source(fs.unstrip_protocol(path), kind, info.get("size"), str(version)))
    return found


def filesystem(name: str) -> tuple[Any, str]:
    """Find what reads a URL."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(name)
    except ImportError as error:
        raise DataError(
            f"Reading {name} needs a package that is not installed: {error}. (s3:// takes pip install s3fs, gs:// pip "
            "install gcsfs.)"
        ) from error
    except ValueError as error:
        raise DataError(f"Expected a file, folder, URL or hf:NAME, got {name!r}: {error}") from error


def hub_name(name: str) -> tuple[str, str | None, str, str | None]:
    """Take hf:NAME[@REVISION][:SPLIT[:CONFIGURATION]] apart."""
    repository, _, rest = name.removeprefix("hf:").partition(":")
    split, _, configuration = rest.partition(":")
    repository, _, revision = repository.partition("@")
    return repository, revision or None, split or "train", configuration or None


def _revision(name: str) -> str:
    """Return the commit that the hub has now, so that a continued call cannot mix two; a local folder has none."""
    repository, revision, _, _ = hub_name(name)
    if os.path.exists(repository):
        return ""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(repository, revision=revision).sha)
    except (OSError, ValueError) as error:
        raise DataError(
            f"Cannot find {name} on the Hugging Face hub: {error} Expected hf:NAME[@REVISION][:SPLIT[:CONFIGURATION]] "
            "and a connection; files on disk are named by their path."
        ) from error

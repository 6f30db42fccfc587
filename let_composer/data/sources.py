"""What there is to read: files, folders and URLs, as pieces of whole lines, the same ones each time."""

import glob
import gzip
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import fsspec
import pyarrow
import pyarrow.parquet
from backports import zstd

__all__ = ["Piece", "list_sources", "read_pieces"]

ENDINGS = (".jsonl", ".parquet")
ENDINGS += tuple(f"{lines}{packed}" for lines in (".jsonl", ".json") for packed in (".gz", ".zst", ".zstd"))


class Piece(NamedTuple):
    """A run of whole lines of one source, each a JSON object: what one worker tokenizes at a time."""

    path: str
    first_line: int
    payload: bytes
    position: int  # of the reader in the source's bytes
    damage: str  # that the source has after this piece, as the reader says; "" if it has none


def list_sources(inputs: Sequence[str]) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """Find all files of files, folders, globs and URLs, in a fixed order, hub data sets pinned.

    Returns:
        For each file its bytes (0 where a web server does not say) and its version: its time of change, or what its
        store calls its content. How many files were left out, for each reason.
    """
    sources, left_out = {}, Counter()
    for name in inputs:
        try:
            found = dict(_find(name, left_out))
        except (OSError, ImportError, ValueError) as error:  # each store has its own
            raise ValueError(f"Cannot list {name}: {error}") from error
        if not found:
            raise ValueError(
                f"Nothing to read at {name}. Expected files that end in {', '.join(ENDINGS)}, folders of them, or URLs "
                "for fsspec, such as s3://BUCKET/FOLDER or hf://datasets/NAME[@REVISION]/FOLDER/*.parquet."
            )
        if twice := sorted(sources.keys() & found.keys()):
            raise ValueError(f"Named more than once: {twice[0]}. Its documents would be repeated.")
        sources |= found
    return sources, dict(sorted(left_out.items()))


def _find(name: str, left_out: Counter[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    fs, root = fsspec.core.url_to_fs(name)
    local = "file" in fs.protocol
    if "hf" in fs.protocol:  # the commit that the hub has now, so that a continued call cannot mix two
        from huggingface_hub import HfApi

        place = fs.resolve_path(root)
        commit = HfApi().repo_info(place.repo_id, revision=place.revision, repo_type=place.repo_type).sha
        root = f"{place.repo_type}s/{place.repo_id}@{commit}/{place.path_in_repo}".rstrip("/")
    tops = [root] if fs.exists(root) else glob.glob(root, recursive=True) if local else fs.glob(root)
    web = name.startswith("http")  # where only asking for all of a file would tell it from a page of links
    found = dict[str, str]()
    for top in tops:
        files = [top] if web and top.lower().endswith(ENDINGS) else _walk(top, left_out) if local else fs.find(top)
        found |= dict.fromkeys(files, top)
    for path, top in sorted(found.items()):
        if "/." in f"/{path.removeprefix(top)}":
            left_out["hidden"] += 1
        elif local and not os.path.isfile(path):
            raise ValueError(f"{path} leads to {os.path.realpath(path)}, which is no file. Remove it, or mend it.")
        elif not path.lower().endswith(ENDINGS):
            left_out["of no format that is read"] += 1
        else:
            info = fs.info(path)
            version = next((str(info[k]) for k in ("mtime", "LastModified", "ETag", "blob_id") if info.get(k)), "")
            yield path if local else fs.unstrip_protocol(path), {"bytes": info["size"] or 0, "version": version}


def _walk(top: str, left_out: Counter[str]) -> Iterator[str]:
    """The file, or all files of the folder, each folder once; follows links, as fsspec does not."""
    if not os.path.isdir(top):
        yield top
    seen = set[str]()
    for folder, folders, files in os.walk(top, followlinks=True):
        if (place := os.path.realpath(folder)) in seen:
            left_out["links to a folder that is read"] += 1
            folders.clear()
            continue
        seen.add(place)
        yield from (os.path.join(folder, file) for file in files)


def read_pieces(source: str, piece_bytes: int, text_key: str) -> Iterator[Piece]:
    """Cut a source at the first line end after each ``piece_bytes``; ``text_key`` is for sources with columns."""
    fs, path = fsspec.core.url_to_fs(source)
    lines, size, first, damage = [], 0, 1, ""

    def read(*size: int) -> bytes:
        try:
            return from_store(*size)
        except Exception as error:  # each store has its own; an OSError from pyarrow itself is a damaged page
            raise ValueError(f"Cannot read {source}: {error}. Put that right and call again.") from error

    with fs.open(path, "rb") as file:
        from_store, file.read = file.read, read
        # Kept by name: a reader that nothing holds closes the file.
        reader = _rows(file, source, text_key) if path.lower().endswith(".parquet") else _lines(file, path)
        try:
            for line in reader:
                lines.append(line)
                size += len(line)
                if size >= piece_bytes:
                    yield Piece(source, first, b"".join(lines), file.tell(), "")
                    first, lines, size = first + len(lines), [], 0
        except (EOFError, gzip.BadGzipFile, zlib.error, zstd.ZstdError, pyarrow.ArrowException) as error:
            damage = str(error)
        if lines or damage:
            yield Piece(source, first, b"".join(lines), file.tell(), damage)


def _lines(file: Any, path: str) -> Iterable[bytes]:
    buffered = io.BufferedReader(file, 1 << 20)  # fsspec's own lines are slow
    if path.lower().endswith(".gz"):
        return gzip.GzipFile(fileobj=buffered)
    if path.lower().endswith((".zst", ".zstd")):  # the Pile's files use long windows
        return zstd.ZstdFile(buffered, options={zstd.DecompressionParameter.window_log_max: 31})
    return buffered


def _rows(file: Any, source: str, text_key: str) -> Iterator[bytes]:
    """Yield rows as JSON lines; bytes that are no UTF-8 become lone surrogates, which the worker finds."""

    def text(value: Any) -> Any:
        return value.decode(errors="surrogateescape") if isinstance(value, bytes) else value

    try:
        table = pyarrow.parquet.ParquetFile(file)
        if text_key not in (names := table.schema_arrow.names):
            raise ValueError(f"{source} has no column {text_key!r}: --text-key must be one of {', '.join(names)}.")
        names = [name for name in names if name in (text_key, "meta", "pile_set_name")]
        for batch in table.iter_batches(batch_size=256, columns=names):
            # As bytes, so that a row that is not UTF-8 costs no other.
            columns = [c.cast(pyarrow.large_binary()) if "string" in str(c.type)[:12] else c for c in batch.columns]
            for row in pyarrow.RecordBatch.from_arrays(columns, names).to_pylist():
                yield json.dumps({name: text(row[name]) for name in names}, default=str).encode() + b"\n"
    except (OSError, UnicodeDecodeError) as error:  # a damaged page, or a nested string
        raise pyarrow.ArrowInvalid(str(error)) from error

"""What there is to read: files, folders and URLs, as pieces of whole lines, the same ones each time."""

import glob
import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import fsspec

from let_composer.data import DataError

__all__ = ["Piece", "list_sources", "read_pieces"]

ENDINGS = (".jsonl", ".parquet")
ENDINGS += tuple(f"{lines}{packed}" for lines in (".jsonl", ".json") for packed in (".gz", ".zst", ".zstd"))


class Piece(NamedTuple):
    """A run of whole lines of one source, each a JSON object: what one worker tokenizes at a time."""

    path: str
    first_line: int
    payload: bytes
    position: int  # of the reader in the source's bytes
    damage: tuple[str, str] | None  # that the source has after this piece: its kind, and what the reader says


def list_sources(inputs: Sequence[str]) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """Find all files of files, folders, globs and URLs, in a fixed order, links followed, hub data sets pinned.

    Returns:
        For each file its bytes (0 where a web server does not say) and its version: its time of change, or what its
        store calls its content. How many files and folders were left out, for each reason.
    """
    sources, left_out = {}, Counter()
    for name in inputs:
        try:
            found = dict(_find(name, left_out))
        except (OSError, ImportError, ValueError) as error:  # each store has its own
            raise DataError(f"Cannot list {name}: {error}") from error
        if not found:
            raise DataError(
                f"Nothing to read at {name}. Expected files that end in {', '.join(ENDINGS)}, folders of them, or URLs "
                "for fsspec, such as s3://BUCKET/FOLDER or hf://datasets/NAME[@REVISION]/FOLDER/*.parquet."
            )
        if twice := sorted(sources.keys() & found.keys()):
            raise DataError(f"Named more than once: {twice[0]}. Its documents would be repeated.")
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
    seen = set()
    for path in sorted(path for top in tops for path in _walk(fs, top, seen, left_out)):
        if not path.lower().endswith(ENDINGS):
            left_out["of no format that is read"] += 1
        elif local and not os.path.exists(path):
            left_out["links to nothing"] += 1
        else:
            info = fs.info(path)
            version = next((str(info[k]) for k in ("mtime", "LastModified", "ETag", "blob_id") if info.get(k)), "")
            yield path if local else fs.unstrip_protocol(path), {"bytes": info["size"] or 0, "version": version}


def _walk(fs: Any, top: str, seen: set[str], left_out: Counter[str]) -> Iterator[str]:
    if not fs.isdir(top):
        yield top
        return
    local = "file" in fs.protocol  # fsspec follows no links
    for folder, folders, files in os.walk(top, followlinks=True) if local else fs.walk(top):
        place = os.path.realpath(folder) if local else folder
        if place in seen:
            left_out["links to a folder that is read"] += 1
            folders.clear()
            continue
        seen.add(place)
        for path in (f"{folder}/{file}" for file in files):
            if "/." in path.removeprefix(top):
                left_out["hidden"] += 1
            else:
                yield path


def read_pieces(source: str, piece_bytes: int, text_key: str) -> Iterator[Piece]:
    """Cut a source at the first line end after each ``piece_bytes``; ``text_key`` is for sources with columns."""
    import pyarrow
    from backports import zstd

    fs, path = fsspec.core.url_to_fs(source)
    buffer, line, damage = bytearray(), 1, None
    with fs.open(path, "rb") as file:

        def piece(end: int) -> Piece:
            nonlocal line
            made = Piece(source, line, bytes(buffer[:end]), file.tell(), damage)
            line += made.payload.count(b"\n")
            del buffer[:end]
            return made

        try:
            for block in _rows(file, source, text_key) if path.lower().endswith(".parquet") else _blocks(file, path):
                buffer += block
                while end := buffer.find(b"\n", max(piece_bytes - 1, len(buffer) - len(block))) + 1:
                    yield piece(end)
        except EOFError as error:
            damage = "truncated file", str(error)
        except (gzip.BadGzipFile, zlib.error, zstd.ZstdError, pyarrow.ArrowException) as error:
            damage = "corrupt file", str(error)
        if damage:  # what follows the last line end is half a document
            del buffer[buffer.rfind(b"\n") + 1 :]
        if buffer or damage:
            yield piece(len(buffer))


def _blocks(file: Any, path: str) -> Iterator[bytes]:
    from backports import zstd

    if path.lower().endswith(".gz"):
        file = gzip.GzipFile(fileobj=file)
    elif path.lower().endswith((".zst", ".zstd")):  # the Pile's files use long windows
        file = zstd.ZstdFile(file, options={zstd.DecompressionParameter.window_log_max: 31})
    read = getattr(file, "read1", file.read)  # all that is good before the damage
    while block := read(1 << 20):
        yield block


def _rows(file: Any, source: str, text_key: str) -> Iterator[bytes]:
    """Yield rows as JSON lines; bytes that are no UTF-8 become lone surrogates, which the worker finds."""
    import pyarrow.parquet

    def text(value: Any) -> Any:
        return value.decode(errors="surrogateescape") if isinstance(value, bytes) else value

    try:
        table = pyarrow.parquet.ParquetFile(file)
        if text_key not in (names := table.schema_arrow.names):
            raise DataError(f"{source} has no column {text_key!r}: --text-key must be one of {', '.join(names)}.")
        names = [name for name in names if name in (text_key, "meta", "pile_set_name")]
        for batch in table.iter_batches(batch_size=256, columns=names):
            # As bytes, so that a row that is not UTF-8 costs no other.
            columns = [c.cast(pyarrow.large_binary()) if "string" in str(c.type)[:12] else c for c in batch.columns]
            for row in pyarrow.RecordBatch.from_arrays(columns, names).to_pylist():
                yield json.dumps({name: text(row[name]) for name in names}, default=str).encode() + b"\n"
    except (OSError, UnicodeDecodeError) as error:  # a damaged page, or a nested string
        raise pyarrow.ArrowInvalid(str(error)) from error

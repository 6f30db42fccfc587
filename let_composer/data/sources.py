"""What there is to read: files, folders and URLs, as pieces of whole lines, the same ones each time."""

import dataclasses
import glob
import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from let_composer.data import DataError

__all__ = ["Piece", "Source", "list_sources", "read_pieces"]

PACKED = {".gz": "gz", ".zst": "zst", ".zstd": "zst"}
KINDS = {".jsonl": "jsonl", ".parquet": "parquet"}
KINDS |= {f"{lines}{ending}": kind for lines in (".jsonl", ".json") for ending, kind in PACKED.items()}
ENDINGS = ", ".join(KINDS)


@dataclasses.dataclass(frozen=True)
class Source:
    """One input file; ``version`` is its time of change or what its store calls its content."""

    path: str
    kind: str
    size: int | None  # some web servers do not say
    version: str


@dataclasses.dataclass(frozen=True)
class Piece:
    """A run of whole lines of one source, each a JSON object: what one worker turns into shards at a time."""

    name: str
    path: str
    first_line: int
    payload: bytes
    position: int
    damage: dict[str, Any] | None = None


def list_sources(inputs: Sequence[str]) -> tuple[list[Source], list[str]]:
    """Resolve files, folders, globs and URLs into sources, in a fixed order, links followed, hub data sets pinned.

    Returns:
        The sources, and a line for each file that was left out.
    """
    sources, left_out = [], []
    for name in inputs:
        try:
            sources += _find(name, left_out)
        except OSError as error:  # each store has its own
            raise DataError(f"Cannot list {name}: {error}") from error
    if repeated := [path for path, n in Counter(s.path for s in sources).items() if n > 1]:
        raise DataError(f"Named more than once: {', '.join(repeated)}. Its documents would be repeated.")
    return sources, left_out


def _filesystem(name: str) -> tuple[Any, str]:
    import fsspec

    try:
        return fsspec.core.url_to_fs(name) if "://" in name else (fsspec.filesystem("file"), name)
    except ImportError as error:
        raise DataError(
            f"Reading {name} needs a package that is not installed: {error}. (s3:// takes pip install s3fs, gs:// pip "
            "install gcsfs.)"
        ) from error
    except ValueError as error:
        raise DataError(f"Expected a file, folder or URL, got {name!r}: {error}") from error


def _find(name: str, left_out: list[str]) -> list[Source]:
    fs, root = _filesystem(name)
    if "hf" in fs.protocol:  # the commit that the hub has now, so that a continued call cannot mix two
        from huggingface_hub import HfApi

        place = fs.resolve_path(root)
        commit = HfApi().repo_info(place.repo_id, revision=place.revision, repo_type=place.repo_type).sha
        root = f"{place.repo_type}s/{place.repo_id}@{commit}/{place.path_in_repo}".rstrip("/")
    local = "file" in fs.protocol
    there = os.path.lexists(root) if local else fs.exists(root)
    paths, seen = [], {}
    for top in [root] if there else glob.glob(root, recursive=True) if local else fs.glob(root):
        paths += _walk(fs, top, seen, left_out) if fs.isdir(top) else [top]
    if not (paths or there):
        raise DataError(
            f"No such file or folder: {name}. Expected {ENDINGS} files, a folder of them, or a URL that fsspec reads, "
            "such as s3://BUCKET/FOLDER or hf://datasets/NAME[@REVISION]/FOLDER/*.parquet on the Hugging Face hub."
        )
    found = []
    for path in sorted(paths):
        if local and not os.path.exists(path):
            raise DataError(f"{path} is a link to {os.readlink(path)}, which does not exist.")
        if (kind := _kind(path)) is None:
            raise DataError(f"Cannot read {path}: expected a name that ends in {ENDINGS}.")
        info = fs.info(path)
        version = next((str(info[k]) for k in ("mtime", "LastModified", "ETag", "blob_id") if info.get(k)), "")
        found.append(Source(fs.unstrip_protocol(path) if "://" in name else path, kind, info["size"], version))
    if not found:
        raise DataError(f"Nothing to read in {name}: expected files that end in {ENDINGS}.")
    return found


def _kind(path: str) -> str | None:
    return next((kind for suffix, kind in KINDS.items() if path.lower().endswith(suffix)), None)


def _walk(fs: Any, top: str, seen: dict[str, str], left_out: list[str]) -> Iterator[str]:
    local = "file" in fs.protocol  # fsspec follows no links
    for folder, folders, files in os.walk(top, followlinks=True) if local else [(top, [], fs.find(top))]:
        if local and (first := seen.setdefault(os.path.realpath(folder), folder)) != folder:
            left_out.append(f"{folder}: the same folder as {first}")
            folders.clear()
        else:
            left_out += [f"{folder}/{f}: hidden" for f in folders if f.startswith(".")]
            folders[:] = [f for f in folders if not f.startswith(".")]
            for path in [os.path.join(folder, file) for file in files] if local else files:
                if any(part.startswith(".") for part in path.removeprefix(top).split("/")):
                    left_out.append(f"{path}: hidden")
                elif _kind(path) is None:
                    left_out.append(f"{path}: not a format that is read")
                elif local and not os.path.exists(path):
                    left_out.append(f"{path}: a link to nothing")
                else:
                    yield path


def read_pieces(source: Source, number: int, piece_bytes: int, text_key: str) -> Iterator[Piece]:
    """Cut a source, the ``number``-th, at the first line end after each ``piece_bytes`` decompressed bytes.

    Names sort as the input does; ``text_key`` is for sources that have columns. The last piece says what was damaged.
    """
    import pyarrow
    from backports import zstd

    buffer, line, position, count = bytearray(), 1, 0, 0

    def piece(end: int, damage: dict[str, Any] | None = None) -> Piece:
        nonlocal line, count
        made = Piece(f"{number:05}-{count:07}", source.path, line, bytes(buffer[:end]), position, damage)
        line, count = line + made.payload.count(b"\n"), count + 1
        del buffer[:end]
        return made

    kind = message = ""
    try:
        for block, position in (_parquet_lines if source.kind == "parquet" else _blocks)(source, text_key):  # noqa: B007
            buffer += block
            while end := buffer.find(b"\n", max(piece_bytes - 1, len(buffer) - len(block))) + 1:
                yield piece(end)
    except EOFError as error:
        kind, message = "truncated file", str(error)
    except (gzip.BadGzipFile, zlib.error, zstd.ZstdError, pyarrow.ArrowException) as error:
        kind, message = "corrupt file", str(error)
    if kind:  # what follows the last line end is half a document
        del buffer[buffer.rfind(b"\n") + 1 :]
        yield piece(len(buffer), {"line": line + buffer.count(b"\n"), "kind": kind, "message": message})
    elif buffer:
        yield piece(len(buffer))


def _blocks(source: Source, _: str) -> Iterator[tuple[bytes, int]]:
    from backports import zstd

    fs, path = _filesystem(source.path)
    with fs.open(path, "rb") as file:
        stream: Any = file
        if source.kind == "gz":
            stream = gzip.GzipFile(fileobj=file)
        elif source.kind == "zst":  # the Pile's files use long windows
            stream = zstd.ZstdFile(file, options={zstd.DecompressionParameter.window_log_max: 31})
        read = getattr(stream, "read1", stream.read)  # all that is good before the damage
        while block := read(1 << 20):
            yield block, file.tell()


def _parquet_lines(source: Source, text_key: str) -> Iterator[tuple[bytes, int]]:
    import pyarrow.parquet

    fs, path = _filesystem(source.path)
    done = 0
    with fs.open(path, "rb") as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
            if text_key not in (names := table.schema_arrow.names):
                expected = f"--text-key must be one of {', '.join(names)}"
                raise DataError(f"{source.path} has no column {text_key!r}: {expected}.")
            names = [name for name in names if name in (text_key, "meta", "pile_set_name")]
            for batch in table.iter_batches(batch_size=256, columns=names):
                # As bytes, so that a row that is not UTF-8 costs no other.
                columns = [c.cast(pyarrow.large_binary()) if "string" in str(c.type)[:12] else c for c in batch.columns]
                rows = zip(*(column.to_pylist() for column in columns), strict=True)
                done += batch.num_rows
                lines = b"".join(_line(dict(zip(names, row, strict=True))) for row in rows)
                yield lines, (source.size or 0) * done // table.metadata.num_rows
        except (OSError, UnicodeDecodeError) as error:  # a damaged page, or a nested string
            raise pyarrow.ArrowInvalid(str(error)) from error


def _line(row: dict[str, Any]) -> bytes:
    """Write a row as JSON; bytes that are no UTF-8 become lone surrogates, which the worker finds."""
    row = {k: v.decode(errors="surrogateescape") if isinstance(v, bytes) else v for k, v in row.items()}
    return json.dumps(row, default=str).encode() + b"\n"

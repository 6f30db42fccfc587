"""What there is to read: files, folders, URLs and hub data sets, as pieces of whole lines, the same ones each time."""

import dataclasses
import glob
import gzip
import hashlib
import json
import os
import types
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from let_composer.data import DataError

__all__ = ["Piece", "Reading", "Source", "list_sources", "piece_name", "read_pieces"]

KINDS = {".jsonl": "jsonl", ".jsonl.zst": "zst", ".jsonl.zstd": "zst", ".jsonl.gz": "gz", ".parquet": "parquet"}
ENDINGS = ", ".join(KINDS)


@dataclasses.dataclass(frozen=True)
class Source:
    """One input: a file or a hub data set; ``version`` is its time of change, tag or revision."""

    path: str
    kind: str
    size: int | None
    version: str


@dataclasses.dataclass(frozen=True)
class Piece:
    """A run of whole lines of one source, each a JSON object: what one worker turns into shards at a time."""

    name: str
    path: str
    first_line: int
    payload: bytes
    position: int


@dataclasses.dataclass
class Reading:
    """What is known about a source once it has been read to its end."""

    pieces: int = 0
    sha256: str | None = None
    problem: dict[str, Any] | None = None


def list_sources(inputs: Sequence[str]) -> tuple[list[Source], list[str]]:
    """Resolve files, folders, globs, URLs and ``hf:`` names into sources, in a fixed order, links followed.

    Returns:
        The sources, and a line for each file that was left out.
    """
    sources, left_out = [], []
    for name in inputs:
        hub = name.startswith("hf:") and not name.startswith("hf://")
        sources += [Source(name, "hf", None, _revision(name))] if hub else _find(name, left_out)
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
        raise DataError(f"Expected a file, folder, URL or hf:NAME, got {name!r}: {error}") from error


def _find(name: str, left_out: list[str]) -> list[Source]:
    fs, root = _filesystem(name)
    local = "file" in fs.protocol
    there = os.path.lexists(root) if local else fs.exists(root)
    paths, seen = [], {}
    for top in [root] if there else glob.glob(root, recursive=True) if local else fs.glob(root):
        paths += _walk(fs, top, seen, left_out) if fs.isdir(top) else [top]
    if not (paths or there):
        raise DataError(
            f"No such file or folder: {name}. Expected {ENDINGS} files, a folder of them, a URL that fsspec reads or "
            "hf:NAME for a data set of the Hugging Face hub."
        )
    found = []
    for path in sorted(paths):
        if local and not os.path.exists(path):
            raise DataError(f"{path} is a link to {os.readlink(path)}, which does not exist.")
        if (kind := _kind(path)) is None:
            raise DataError(f"Cannot read {path}: expected a name that ends in {ENDINGS}.")
        info = fs.info(path)
        version = info.get("mtime") or info.get("LastModified") or info.get("ETag") or ""
        found.append(Source(fs.unstrip_protocol(path) if "://" in name else path, kind, info.get("size"), str(version)))
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
            for path in (os.path.join(folder, file) for file in files):
                if any(part.startswith(".") for part in path.removeprefix(top).split("/")):
                    left_out.append(f"{path}: hidden")
                elif _kind(path) is None:
                    left_out.append(f"{path}: not a format that is read")
                elif local and not os.path.exists(path):
                    left_out.append(f"{path}: a link to nothing")
                else:
                    yield path


def _hub_name(name: str) -> tuple[str, str | None, str, str | None]:
    repository, _, rest = name.removeprefix("hf:").partition(":")
    split, _, configuration = rest.partition(":")
    repository, _, revision = repository.partition("@")
    return repository, revision or None, split or "train", configuration or None


def _revision(name: str) -> str:
    """Return the commit that the hub has now, so that a continued call cannot mix two; a local folder has none."""
    repository, revision, _, _ = _hub_name(name)
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


def piece_name(source: int, number: int) -> str:
    """Name a piece; names sort as the input does."""
    return f"{source:05}-{number:07}"


def read_pieces(source: Source, number: int, piece_bytes: int, reading: Reading, text_key: str) -> Iterator[Piece]:
    """Cut a source, the ``number``-th, at the first line end after each ``piece_bytes`` decompressed bytes.

    ``reading`` is complete when the iterator ends; ``text_key`` is for sources that have columns.
    """
    buffer, line, position = bytearray(), 1, 0

    def piece(end: int) -> Piece:
        nonlocal line
        made = Piece(piece_name(number, reading.pieces), source.path, line, bytes(buffer[:end]), position)
        reading.pieces += 1
        line += made.payload.count(b"\n")
        del buffer[:end]
        return made

    for block, position in (_hub_lines if source.kind == "hf" else _blocks)(source, text_key, reading):  # noqa: B007
        buffer += block
        while end := buffer.find(b"\n", max(piece_bytes - 1, len(buffer) - len(block))) + 1:
            yield piece(end)
    if reading.problem:  # what follows the last line end is half a document
        reading.problem["line"] = line + buffer.count(b"\n")
        del buffer[buffer.rfind(b"\n") + 1 :]
    if buffer:
        yield piece(len(buffer))


def _blocks(source: Source, text_key: str, reading: Reading) -> Iterator[tuple[bytes, int]]:
    import pyarrow
    from backports import zstd

    digest = hashlib.sha256()
    fs, path = _filesystem(source.path)
    with fs.open(path, "rb") as file:

        def read(size: int = -1) -> bytes:
            block = file.read(size)
            digest.update(block)
            return block

        def rest() -> str:
            while read(1 << 20):
                pass
            return digest.hexdigest()

        stream: Any = types.SimpleNamespace(read=read, read1=read)
        if source.kind == "gz":
            stream = gzip.GzipFile(fileobj=stream)
        elif source.kind == "zst":  # the Pile's files use long windows
            stream = zstd.ZstdFile(stream, options={zstd.DecompressionParameter.window_log_max: 31})
        try:
            if source.kind == "parquet":
                reading.sha256 = rest()
                for lines, share in _parquet_lines(file, source, text_key):
                    yield lines, int(share * (source.size or 0))
                return
            while block := stream.read1(1 << 20):
                yield block, file.tell()
        except EOFError as error:
            reading.problem = {"kind": "truncated file", "message": str(error)}
        except (gzip.BadGzipFile, zlib.error, zstd.ZstdError, pyarrow.ArrowException) as error:
            reading.problem = {"kind": "corrupt file", "message": str(error)[:200]}
        reading.sha256 = reading.sha256 or rest()


def _parquet_lines(file: Any, source: Source, text_key: str) -> Iterator[tuple[bytes, float]]:
    import pyarrow.parquet

    done = 0
    try:
        table = pyarrow.parquet.ParquetFile(file)
        names = _columns(source, text_key, table.schema_arrow.names)
        for batch in table.iter_batches(batch_size=256, columns=names):
            # As bytes, so that a row that is not UTF-8 costs no other.
            columns = [c.cast(pyarrow.large_binary()) if "string" in str(c.type)[:12] else c for c in batch.columns]
            rows = zip(*(column.to_pylist() for column in columns), strict=True)
            done += batch.num_rows
            yield b"".join(_line(dict(zip(names, row, strict=True))) for row in rows), done / table.metadata.num_rows
    except (OSError, UnicodeDecodeError) as error:  # a damaged page, or a nested string
        raise pyarrow.ArrowInvalid(str(error)) from error


def _hub_lines(source: Source, text_key: str, reading: Reading) -> Iterator[tuple[bytes, int]]:
    from datasets import load_dataset

    repository, _, split, configuration = _hub_name(source.path)
    try:
        options: Any = {"revision": source.version} if source.version else {}
        for row in map(dict, load_dataset(repository, configuration, split=split, streaming=True, **options)):
            yield _line({name: row[name] for name in _columns(source, text_key, list(row))}), 0
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{source.path} cannot be read: {error} Call again: what is finished is kept.") from error


def _columns(source: Source, text_key: str, names: list[str]) -> list[str]:
    if text_key not in names:
        raise DataError(f"{source.path} has no column {text_key!r}: --text-key must be one of {', '.join(names)}.")
    return [name for name in names if name in (text_key, "meta", "pile_set_name")]


def _line(row: dict[str, Any]) -> bytes:
    """Write a row as JSON; bytes that are no UTF-8 become lone surrogates, which the worker finds."""
    row = {k: v.decode(errors="surrogateescape") if isinstance(v, bytes) else v for k, v in row.items()}
    return json.dumps(row, default=str).encode() + b"\n"

"""A source cut into pieces of whole documents, the same ones each time; what is damaged is said, the rest is kept."""

import contextlib
import dataclasses
import gzip
import hashlib
import zlib
from collections.abc import Iterator
from typing import IO, Any

from let_composer.data import DataError
from let_composer.data.sources import Source, filesystem, hub_name

__all__ = ["Piece", "Reading", "piece_name", "read_pieces"]

ROW = 64  # bytes that a row takes besides its text


@dataclasses.dataclass(frozen=True)
class Piece:
    """A run of whole documents of one source: what one worker turns into shards at a time."""

    name: str
    path: str
    first_line: int
    payload: bytes | list[dict[str, Any]]
    position: int


@dataclasses.dataclass
class Reading:
    """What is known about a source once it has been read to its end."""

    pieces: int = 0
    sha256: str | None = None
    problem: dict[str, Any] | None = None


def read_pieces(source: Source, number: int, piece_bytes: int, reading: Reading, text_key: str) -> Iterator[Piece]:
    """Cut a source, the ``number``-th, at the first line or row after each ``piece_bytes`` decompressed bytes.

    ``reading`` is complete when the iterator ends; ``text_key`` is for sources that have columns.
    """
    if source.kind in ("parquet", "hf"):
        parts = _cut_rows((_hub_rows if source.kind == "hf" else _parquet_rows)(source, reading, text_key), piece_bytes)
    else:
        parts = _cut_lines(source, reading, piece_bytes)
    for first_line, payload, position in parts:
        reading.pieces += 1
        yield Piece(piece_name(number, reading.pieces - 1), source.path, first_line, payload, position)


def piece_name(source: int, number: int) -> str:
    """Name a piece; names sort as the input does."""
    return f"{source:05}-{number:07}"


class _Counted:
    """A binary file that hashes and counts what is read from it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self.position = file, hashlib.sha256(), 0

    def read(self, size: int = -1) -> bytes:
        block = self.file.read(size)
        self.digest.update(block)
        self.position += len(block)
        return block

    def hash(self) -> str:
        while self.read(1 << 20):
            pass
        return self.digest.hexdigest()


@contextlib.contextmanager
def _open(source: Source) -> Iterator[Any]:
    fs, path = filesystem(source.path) if "://" in source.path else (None, source.path)
    with fs.open(path, "rb") if fs else open(path, "rb") as file:
        yield file


def _cut_lines(source: Source, reading: Reading, piece_bytes: int) -> Iterator[tuple[int, bytes, int]]:
    from backports import zstd

    buffer, searched, first_line = bytearray(), 0, 1
    with _open(source) as opened:
        file = stream = _Counted(opened)  # pyright: ignore[reportAssignmentType]
        if source.kind == "gz":
            stream: Any = gzip.GzipFile(fileobj=file)  # pyright: ignore[reportArgumentType]
        elif source.kind == "zst":  # the Pile's files use long windows
            stream = zstd.ZstdFile(file, options={zstd.DecompressionParameter.window_log_max: 31})  # pyright: ignore
        read = getattr(stream, "read1", stream.read)
        try:
            while block := read(1 << 20):
                buffer += block
                while len(buffer) >= piece_bytes:
                    end = buffer.find(b"\n", max(searched, piece_bytes - 1)) + 1
                    searched = 0 if end else len(buffer)
                    if not end:
                        break
                    payload = bytes(buffer[:end])
                    del buffer[:end]
                    yield first_line, payload, file.position
                    first_line += payload.count(b"\n")
        except EOFError as error:
            reading.problem = {"kind": "truncated file", "message": str(error)}
        except (gzip.BadGzipFile, zlib.error, zstd.ZstdError) as error:
            reading.problem = {"kind": "corrupt file", "message": str(error)}
        if reading.problem:  # what follows the last line end is half a document
            reading.problem["line"] = first_line + buffer.count(b"\n")
            del buffer[buffer.rfind(b"\n") + 1 :]
        if buffer:
            yield first_line, bytes(buffer), file.position
        reading.sha256 = file.hash()


def _cut_rows(rows: Iterator[tuple[dict[str, Any], Any, int]], piece_bytes: int) -> Iterator[tuple[int, Any, int]]:
    batch, size, first, position = [], 0, 1, 0
    for row, text, position in rows:
        batch.append(row)
        size += ROW + (len(text) if isinstance(text, str | bytes) else 0)
        if size >= piece_bytes:
            yield first, batch, position
            first += len(batch)
            batch, size = [], 0
    if batch:
        yield first, batch, position


def _need_column(source: Source, text_key: str, names: list[str]) -> None:
    if text_key not in names:
        raise DataError(f"{source.path} has no column {text_key!r}: --text-key must be one of {', '.join(names)}.")


def _hub_rows(source: Source, reading: Reading, text_key: str) -> Iterator[tuple[dict[str, Any], Any, int]]:
    from datasets import load_dataset

    repository, _, split, configuration = hub_name(source.path)
    try:
        options: Any = {"revision": source.version} if source.version else {}
        for row in map(dict, load_dataset(repository, configuration, split=split, streaming=True, **options)):
            _need_column(source, text_key, list(row))
            yield row, row[text_key], 0
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{source.path} cannot be read: {error} Call again: what is finished is kept.") from error


def _parquet_rows(source: Source, reading: Reading, text_key: str) -> Iterator[tuple[dict[str, Any], Any, int]]:
    import pyarrow.parquet

    number = 0
    with _open(source) as file:
        reading.sha256 = _Counted(file).hash()
        try:
            table = pyarrow.parquet.ParquetFile(file)
            _need_column(source, text_key, table.schema_arrow.names)
            names = [c for c in table.schema_arrow.names if c in (text_key, "meta", "pile_set_name")]
            for batch in table.iter_batches(batch_size=256, columns=names):
                # Bytes, which the worker decodes as it does lines: a row that is not UTF-8 costs no other.
                columns = [c.cast(pyarrow.large_binary()) if "string" in str(c.type)[:12] else c for c in batch.columns]
                for values in zip(*(column.to_pylist() for column in columns), strict=True):
                    number += 1
                    row = dict(zip(names, values, strict=True))
                    yield row, row[text_key], int((source.size or 0) * number / table.metadata.num_rows)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            reading.problem = {"kind": "corrupt file", "message": str(error)[:200], "line": number + 1}

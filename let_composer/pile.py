"""The Pile's documents as streaming MDS shards that llm-foundry's text loader reads.

Two steps, each of many small files that appear whole (written under another name, then renamed), so that a killed run
continues where it was and ends in the same bytes, whatever the number of workers:

    documents ── cut into pieces at line ends ──► token file per piece ── fixed samples, shuffled ──► one shard a folder

Importing this module loads neither streaming nor llm-foundry nor transformers.
"""

import contextlib
import dataclasses
import errno
import gzip
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

__all__ = [
    "PILE_WEIGHTS",
    "PileError",
    "Plan",
    "check_manifest",
    "convert",
    "list_sources",
    "streams_block",
    "tokenizer_fingerprint",
    "verify",
]

MANIFEST = "manifest.json"
SPLITS = ("train", "validation")
UNLABELLED = "unlabelled"
# Raise it when the bytes written for the same input change.
FORMAT = 2
# Characters that are tokenized, or hashed, at a time.
STRETCH = 1 << 20
PROBLEMS_KEPT = 100
HASH = "xxh128"
# Importing streaming takes seconds; so much is written sooner without workers.
WRITTEN_ALONE = 512 << 20

# Share of each subset in the Pile, in percent of what a model sees in one pass (Gao et al. 2020, table 1).
PILE_WEIGHTS = {
    "Pile-CC": 18.11,
    "PubMed Central": 14.40,
    "Books3": 12.07,
    "OpenWebText2": 10.01,
    "ArXiv": 8.96,
    "Github": 7.59,
    "FreeLaw": 6.12,
    "StackExchange": 5.13,
    "USPTO Backgrounds": 3.65,
    "PubMed Abstracts": 3.07,
    "Gutenberg (PG-19)": 2.17,
    "OpenSubtitles": 1.55,
    "Wikipedia (en)": 1.53,
    "DM Mathematics": 1.24,
    "Ubuntu IRC": 0.88,
    "BookCorpus2": 0.75,
    "EuroParl": 0.73,
    "HackerNews": 0.62,
    "YoutubeSubtitles": 0.60,
    "PhilPapers": 0.38,
    "NIH ExPorter": 0.30,
    "Enron Emails": 0.14,
}


class PileError(ValueError):
    """Something about the input, the output folder or the arguments that the user can put right."""


# ---- tokenizer and manifest ----


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash what every id means, so that two tokenizers can be compared by one string.

    Args:
        tokenizer: Any Hugging Face tokenizer.

    Returns:
        ``sha256:`` and 64 hex digits; equal for equal id-to-token tables, whatever the tokenizer's class or name.
    """
    table = sorted((i, token) for token, i in tokenizer.get_vocab().items())
    return "sha256:" + hashlib.sha256(json.dumps(table).encode()).hexdigest()


def check_manifest(folder: str, tokenizer: Any, sequence_length: int) -> None:
    """Refuse shards that were made for another tokenizer or sequence length.

    Args:
        folder: A split's folder, local or remote (``s3://`` and whatever else streaming downloads from).
        tokenizer: The run's Hugging Face tokenizer.
        sequence_length: The run's ``max_seq_len``.

    Raises:
        ValueError: The manifest beside the shards names another tokenizer or length; the message has both values.
            Shards without a manifest pass.
    """
    manifest = _read_manifest(folder)
    if manifest is None:
        return
    if (got := manifest["sequence_length"]) != sequence_length:
        raise ValueError(
            f"The shards in {folder} hold sequences of {got} tokens, but max_seq_len is {sequence_length}. Set "
            f"max_seq_len to {got}, or prepare shards with --sequence-length {sequence_length}."
        )
    made = manifest["tokenizer"]
    if made["fingerprint"] != (ours := tokenizer_fingerprint(tokenizer)):
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        raise ValueError(
            f"The shards in {folder} were made with the tokenizer {made['name']!r} ({made['vocabulary_size']} tokens, "
            f"{made['fingerprint'][:19]}…), but the run's is {name!r} ({len(tokenizer)} tokens, {ours[:19]}…): the "
            "same ids mean other text. Use that tokenizer, or prepare shards with this one."
        )


def _read_manifest(folder: str) -> dict[str, Any] | None:
    if "://" not in folder:
        for path in (Path(folder) / MANIFEST, Path(folder).parent / MANIFEST):
            if path.is_file():
                manifest = json.loads(path.read_text())
                return manifest if "tokenizer" in manifest and "sequence_length" in manifest else None
        return None
    return _download_json(f"{folder.rstrip('/')}/{MANIFEST}")


def _download_json(url: str) -> dict[str, Any] | None:
    from streaming.base.storage.download import CloudDownloader

    with tempfile.TemporaryDirectory() as folder:
        local = os.path.join(folder, "file.json")
        try:
            CloudDownloader.direct_download(url, local, timeout=20)
        # Each store has its own exception for "no such file"; a manifest is optional, and shards that cannot be
        # reached are reported by the data loader itself.
        except Exception:
            return None
        return json.loads(Path(local).read_text())


# ---- sources ----


@dataclasses.dataclass(frozen=True)
class Source:
    """One input: a file, or a data set of the Hugging Face hub (``hf:name`` or ``hf:name:split``)."""

    path: str
    kind: str
    size: int | None
    modified: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A run of whole documents of one source: what one worker tokenizes at a time."""

    source: int
    number: int
    path: str
    first_line: int
    payload: bytes | list[Any]
    position: int

    @property
    def name(self) -> str:
        """Name of its token file."""
        return _piece_name(self.source, self.number)


def _piece_name(source: int, number: int) -> str:
    return f"{source:05}-{number:07}"


KINDS = {
    ".jsonl": "jsonl",
    ".jsonl.zst": "zst",
    ".jsonl.zstd": "zst",
    ".jsonl.gz": "gz",
    ".parquet": "parquet",
}


def _kind(path: str) -> str | None:
    return next((kind for suffix, kind in KINDS.items() if path.lower().endswith(suffix)), None)


def list_sources(inputs: Sequence[str]) -> list[Source]:
    """Resolve files, folders, URLs and ``hf:`` names into sources, in a fixed order.

    Args:
        inputs: What the user named. Folders are searched for all formats, and URLs may hold globs.

    Raises:
        PileError: Nothing there, or a format that is not read.
    """
    import fsspec

    sources = []
    for name in inputs:
        if name.startswith("hf:") and not name.startswith("hf://"):
            sources.append(Source(name, "hf", None))
            continue
        try:
            fs, root = fsspec.core.url_to_fs(name)
        except ImportError as error:
            raise PileError(
                f"Reading {name} needs a package that is not installed: {error}. (s3:// takes pip install s3fs, gs:// "
                "pip install gcsfs.)"
            ) from error
        except ValueError as error:
            raise PileError(f"Expected a file, folder, URL or hf:NAME, got {name!r}: {error}") from error
        if fs.isdir(root):
            found = [path for path in fs.find(root) if _kind(path)]
        elif fs.exists(root):
            found = [root]
        elif any(c in root for c in "*?["):
            found = fs.glob(root)
        else:
            raise PileError(
                f"No such file or folder: {name}. Expected {', '.join(KINDS)} files, a folder of them, a URL that "
                "fsspec reads, or hf:NAME for a data set of the Hugging Face hub."
            )
        if not found:
            raise PileError(f"Nothing to read in {name}: expected files that end in {', '.join(KINDS)}.")
        for path in sorted(found):
            kind = _kind(path)
            if kind is None:
                raise PileError(f"Cannot read {path}: expected a name that ends in {', '.join(KINDS)}.")
            info = fs.info(path)
            if "://" in name:
                shown = fs.unstrip_protocol(path)
            else:
                # Absolute only where the user was: the manifest need not depend on where a relative input lies.
                shown = path if os.path.isabs(name) else os.path.relpath(path)
            modified = info.get("mtime") or info.get("LastModified") or info.get("ETag") or ""
            sources.append(Source(shown, kind, info.get("size"), str(modified)))
    if repeated := [path for path, n in Counter(s.path for s in sources).items() if n > 1]:
        raise PileError(f"Named more than once: {', '.join(repeated)}. Its documents would be repeated.")
    return sources


class _Counted:
    """A binary file that hashes and counts what is read from it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self.position = file, hashlib.sha256(), 0

    def read(self, size: int = -1) -> bytes:
        block = self.file.read(size)
        self.digest.update(block)
        self.position += len(block)
        return block


class _Damaged(Exception):
    """A compressed file that ends too early or does not decompress."""


def _blocks(file: _Counted, kind: str) -> Iterator[bytes]:
    """Yield decompressed blocks; all that could be read comes before ``_Damaged`` is raised."""
    if kind == "gz":
        with gzip.open(file, "rb") as stream:  # pyright: ignore[reportCallIssue, reportArgumentType]
            try:
                while block := stream.read1(1 << 20):
                    yield block
            except EOFError as error:
                raise _Damaged("truncated file", str(error)) from error
            except (gzip.BadGzipFile, zlib.error) as error:
                raise _Damaged("corrupt file", str(error)) from error
    elif kind == "zst":
        try:
            import zstandard
        except ImportError as error:
            raise PileError("Reading .zst needs the package zstandard: pip install zstandard") from error
        # Not stream_reader: it takes a truncated file for a whole one. The Pile's files use long windows.
        codec = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        frame = None
        while block := file.read(1 << 16):
            while block:
                frame = frame or codec.decompressobj()
                try:
                    yield frame.decompress(block)
                except zstandard.ZstdError as error:
                    raise _Damaged("corrupt file", str(error)) from error
                block = b""
                if frame.eof:
                    block, frame = frame.unused_data, None
        if frame is not None:
            raise _Damaged("truncated file", "the last zstd frame is not complete")
    else:
        while block := file.read(1 << 20):
            yield block


@dataclasses.dataclass
class Reading:
    """What is known about a source once it has been read to its end."""

    pieces: int = 0
    sha256: str | None = None
    problem: dict[str, Any] | None = None


def _lines(source: Source, number: int, piece_bytes: int, reading: Reading) -> Iterator[Piece]:
    """Cut a JSONL file at the first line end after each ``piece_bytes``, wherever the blocks end."""
    import fsspec

    with fsspec.open(source.path, "rb") as opened:
        file = _Counted(opened)  # pyright: ignore[reportArgumentType]
        buffer, searched, first_line = bytearray(), 0, 1

        def piece(end: int) -> Piece:
            nonlocal searched, first_line
            cut = Piece(number, reading.pieces, source.path, first_line, bytes(buffer[:end]), file.position)
            del buffer[:end]
            reading.pieces += 1
            first_line += cut.payload.count(b"\n")  # pyright: ignore[reportArgumentType]
            searched = 0
            return cut

        try:
            for block in _blocks(file, source.kind):
                buffer += block
                while len(buffer) >= piece_bytes:
                    end = buffer.find(b"\n", max(searched, piece_bytes - 1))
                    if end < 0:
                        searched = len(buffer)
                        break
                    yield piece(end + 1)
        except _Damaged as error:
            reading.problem = dict(zip(("kind", "message"), error.args, strict=True))
        if reading.problem:
            # What follows the last line end is half a document.
            reading.problem["line"] = first_line + buffer.count(b"\n")
            del buffer[buffer.rfind(b"\n") + 1 :]
        if buffer:
            yield piece(len(buffer))
        while file.read(1 << 20):
            pass
        reading.sha256 = file.digest.hexdigest()


def _rows(source: Source, number: int, piece_bytes: int, reading: Reading, text_key: str) -> Iterator[Piece]:
    """Group the rows of a Parquet file or a hub data set into pieces of about ``piece_bytes``."""
    import fsspec

    def records() -> Iterator[tuple[dict[str, Any], int]]:
        if source.kind == "hf":
            from datasets import load_dataset

            name, _, split = source.path.removeprefix("hf:").partition(":")
            for row in load_dataset(name, split=split or "train", streaming=True):
                yield dict(row), 0
            return
        import pyarrow.parquet

        with fsspec.open(source.path, "rb") as opened:
            file = _Counted(opened)  # pyright: ignore[reportArgumentType]
            while file.read(1 << 20):
                pass
            reading.sha256 = file.digest.hexdigest()
        with fsspec.open(source.path, "rb") as opened:
            try:
                table = pyarrow.parquet.ParquetFile(opened)
                names = table.schema_arrow.names
                rows = max(table.metadata.num_rows, 1)
                seen = 0
                columns = [c for c in names if c in (text_key, "meta", "pile_set_name")]
                for batch in table.iter_batches(batch_size=256, columns=columns):
                    seen += batch.num_rows
                    for row in batch.to_pylist():
                        yield row, int((source.size or 0) * seen / rows)
            except pyarrow.ArrowInvalid as error:
                reading.problem = {"kind": "corrupt file", "message": str(error), "line": 0}

    batch: list[Any] = []
    size, first = 0, 1
    for row, position in records():
        batch.append(row)
        size += len(row[text_key]) if isinstance(row.get(text_key), str) else 0
        if size >= piece_bytes:
            yield Piece(number, reading.pieces, source.path, first, batch, position)
            reading.pieces += 1
            first += len(batch)
            batch, size = [], 0
    if batch:
        yield Piece(number, reading.pieces, source.path, first, batch, source.size or 0)
        reading.pieces += 1


# ---- plan ----


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that decides the bytes written.

    Args:
        inputs: Files, folders, URLs or ``hf:`` names.
        tokenizer: Name or folder of a Hugging Face tokenizer.
        sequence_length: Tokens a sample.
        validation: Share of documents, by hash of their text, that goes to the validation split.
        by_subset: One stream for each ``pile_set_name``.
        eos: Text that ends each document; None takes the tokenizer's own.
        on_error: ``stop`` at a document or file that cannot be read, or ``skip`` it.
        shuffle_seed: Seed of the order of samples; None keeps the order of the input.
        text_key: Name of the field or column with the text.
        piece_bytes: Input bytes a worker takes at a time.
        shard_bytes: Uncompressed bytes of a shard.
        compression: What ``MDSWriter`` compresses with.
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
    piece_bytes: int = 8 << 20
    shard_bytes: int = 64 << 20
    compression: str = "zstd"

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not self.inputs:
            raise PileError("Expected at least one input file or folder, got none.")
        if self.sequence_length < 1:
            raise PileError(f"sequence_length must be at least 1, got {self.sequence_length}.")
        if not 0 <= self.validation < 1:
            raise PileError(
                f"validation must be a share in [0, 1), got {self.validation}. 0.01 is one document in 100."
            )
        if self.on_error not in ("stop", "skip"):
            raise PileError(f"on_error must be stop or skip, got {self.on_error!r}.")
        if self.shard_bytes >= 1 << 31 or self.shard_bytes < 1 or self.piece_bytes < 1:
            raise PileError("shard_bytes must be in [1, 2**31) and piece_bytes at least 1.")


def _load_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise PileError(
            f"No tokenizer at {name!r}: expected a folder with tokenizer.json or a name on the model hub. {error}"
        ) from error
    if not tokenizer.is_fast:
        raise PileError(f"{name} has no fast tokenizer (tokenizer.json), which is what workers tokenize with.")
    return tokenizer


# ---- tokenizing, in workers ----


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker needs to know besides the piece."""

    tokenizer: str
    eos: int
    dtype: str
    text_key: str
    validation: float
    by_subset: bool
    on_error: str
    folder: Path


_job: Job
_encoder: Any


def _start_worker(job: Job) -> None:
    import multiprocessing
    from multiprocessing.connection import wait

    global _job, _encoder
    # Ctrl-C reaches the whole process group: only the parent answers it. And no worker outlives a killed parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if parent := multiprocessing.parent_process():
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from let_composer.encoding import Encoder

    _job, _encoder = job, Encoder(job.tokenizer, np.dtype(job.dtype).char)


def _documents(piece: Piece, problem: Any) -> Iterator[tuple[str, str, float, int]]:
    """Yield text, subset, place in [0, 1) and bytes of each document of the piece, and report the others."""
    payload = piece.payload
    lines: Iterable[Any] = payload.split(b"\n") if isinstance(payload, bytes) else payload
    for number, line in enumerate(lines, piece.first_line):
        if isinstance(line, bytes):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except UnicodeDecodeError as error:
                problem(number, "invalid UTF-8", str(error))
                continue
            except (ValueError, RecursionError) as error:
                problem(number, "invalid JSON", str(error))
                continue
        else:
            row = line
        text = row.get(_job.text_key) if isinstance(row, dict) else None
        if not isinstance(text, str):
            problem(number, "no text", f"expected an object with a string under {_job.text_key!r}, got {str(row)[:80]}")
            continue
        if not text or text.isspace():
            problem(number, "empty text", "the document holds no text")
            continue
        subset = UNLABELLED
        if _job.by_subset:
            meta = row.get("meta")
            if isinstance(meta, str):
                with contextlib.suppress(ValueError):
                    meta = json.loads(meta)
            name = (meta.get("pile_set_name") if isinstance(meta, dict) else None) or row.get("pile_set_name")
            subset = name if isinstance(name, str) else UNLABELLED
        try:
            yield text, subset, *_digest(text)
        except UnicodeEncodeError as error:
            problem(number, "invalid UTF-8", str(error))


def _digest(text: str) -> tuple[float, int]:
    """Where the text falls in [0, 1), and its length in bytes; raises UnicodeEncodeError for lone surrogates."""
    digest, size = hashlib.blake2b(digest_size=8), 0
    for start in range(0, len(text), STRETCH):
        block = text[start : start + STRETCH].encode()
        digest.update(block)
        size += len(block)
    return int.from_bytes(digest.digest(), "big") / 2**64, size


def _tokenize(piece: Piece) -> dict[str, Any]:
    """Write the piece's tokens, stream after stream, and the record that says where each stream lies."""
    problems: list[dict[str, Any]] = []
    counts: Counter[str] = Counter()

    def problem(line: int, kind: str, message: str) -> None:
        if _job.on_error == "stop":
            raise PileError(_describe({"path": piece.path, "line": line, "kind": kind, "message": message}))
        counts[kind] += 1
        if len(problems) < PROBLEMS_KEPT:
            problems.append({"path": piece.path, "line": line, "kind": kind, "message": message[:200]})

    found: dict[tuple[str, str], list[bytes]] = {}
    documents: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    keys: list[tuple[str, str]] = []
    texts: list[str] = []
    length = 0
    end = np.array([_job.eos], _job.dtype).tobytes()

    def encode() -> None:
        for key, tokens in zip(keys, _encoder(texts), strict=True):
            found.setdefault(key, []).extend((tokens, end))
        keys.clear()
        texts.clear()

    for text, subset, where, size in _documents(piece, problem):
        key = (subset, SPLITS[where < _job.validation])
        documents[key] += 1
        sizes[key] += size
        keys.append(key)
        texts.append(text)
        length += len(text)
        if length >= STRETCH:
            encode()
            length = 0
    encode()

    streams = {}
    target = _job.folder / f"{piece.name}.bin"
    partial = _job.folder / f"{piece.name}.bin.{os.getpid()}"
    offset = 0
    with partial.open("wb") as file:
        for key in sorted(found):
            count = sum(map(len, found[key])) // len(end)
            file.writelines(found[key])
            streams["/".join(key)] = {
                "offset": offset,
                "tokens": count,
                "documents": documents[key],
                "bytes": sizes[key],
            }
            offset += count
    partial.replace(target)
    record = {"streams": streams, "problems": problems, "problem_counts": dict(counts)}
    _write_json(_job.folder / f"{piece.name}.json", record)
    return {"tokens": offset, "position": piece.position, "source": piece.source}


def _describe(problem: dict[str, Any]) -> str:
    return f"{problem['path']}, line {problem['line']}: {problem['kind']}: {problem['message']}"


def _write_json(path: Path, value: Any) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    partial.replace(path)


# ---- writing shards, in workers ----


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard to write: which samples of a stream, and where the stream's tokens lie."""

    folder: Path
    remote: str | None
    samples: np.ndarray
    sequence_length: int
    dtype: str
    compression: str
    tokens: Path
    pieces: Sequence[str]
    offsets: np.ndarray
    starts: np.ndarray


def _write_shard(shard: Shard) -> int:
    from streaming import MDSWriter

    if shard.folder.exists():
        return 0
    samples = _gather(shard)
    partial = shard.folder.with_name(f"{shard.folder.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    with MDSWriter(
        columns={"tokens": f"ndarray:{shard.dtype}:{shard.sequence_length}"},
        out=(str(partial), f"{shard.remote}/{shard.folder.name}") if shard.remote else str(partial),
        keep_local=True,
        compression=shard.compression,
        hashes=[HASH],
        size_limit=None,
    ) as writer:
        for sample in samples:
            writer.write({"tokens": sample})
    if shard.remote:
        for file in partial.glob("shard.*"):
            file.unlink()
    partial.rename(shard.folder)
    return len(samples)


def _gather(shard: Shard) -> np.ndarray:
    """Read the samples in the order in which they lie on disk, into the order in which they are wanted."""
    length, width = shard.sequence_length, np.dtype(shard.dtype).itemsize
    out = np.empty((len(shard.samples), length), shard.dtype)
    current, file = -1, None
    try:
        for row in np.argsort(shard.samples):
            begin = int(shard.samples[row]) * length
            filled = 0
            which = int(np.searchsorted(shard.starts, begin, side="right")) - 1
            while filled < length:
                inside = begin + filled - int(shard.starts[which])
                count = min(length - filled, int(shard.starts[which + 1]) - begin - filled)
                if which != current:
                    if file:
                        file.close()
                    file = (shard.tokens / f"{shard.pieces[which]}.bin").open("rb")
                    current = which
                assert file
                file.seek((int(shard.offsets[which]) + inside) * width)
                out[row, filled : filled + count] = np.frombuffer(file.read(count * width), shard.dtype)
                filled += count
                which += 1
    finally:
        if file:
            file.close()
    return out


# ---- the whole conversion ----


def convert(plan: Plan, out: str, workers: int | None = None, work: str | None = None, progress: bool = True) -> dict:
    """Convert documents into MDS shards at ``out``, continuing an earlier call that was interrupted.

    Args:
        plan: What to convert, and how.
        out: Folder to make (it appears when all is done), or a remote folder (``s3://`` and the others that
            ``MDSWriter`` uploads to; its ``manifest.json`` is uploaded last).
        workers: Processes; None takes one for each core. The bytes written do not depend on it.
        work: Folder for unfinished work; None takes ``out`` with ``.partial`` appended, or, when ``out`` is remote, a
            folder in the current one. It needs room for the tokens (two bytes each up to 65,536 ids) and, when ``out``
            is local, the shards.
        progress: Whether to show a progress bar.

    Returns:
        The manifest.

    Raises:
        PileError: Input that cannot be read (``on_error: stop``), an output folder that holds something else, or
            arguments that do not fit together.
    """
    from importlib.metadata import version

    remote = out.rstrip("/") if "://" in out else None
    sources = list_sources(plan.inputs)
    tokenizer = _load_tokenizer(plan.tokenizer)
    eos = plan.eos if plan.eos is not None else tokenizer.eos_token
    eos_id = tokenizer.get_vocab().get(eos)
    if eos_id is None:
        raise PileError(f"The text that ends a document must be one token of {plan.tokenizer}, got {eos!r}.")
    size = max(tokenizer.get_vocab().values()) + 1
    serialized = tokenizer.backend_tokenizer.to_str()
    manifest: dict[str, Any] = {
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
        "arguments": {k: v for k, v in dataclasses.asdict(plan).items() if k not in ("tokenizer", "sequence_length")},
        "sources": [{"path": s.path, "bytes": s.size} for s in sources],
        "versions": {
            name: version(name) for name in ("mosaicml-streaming", "numpy", "tokenizers", "transformers", "zstd")
        },
    }
    manifest = json.loads(json.dumps(manifest))
    if done := _finished(out, remote, manifest):
        return done

    folder = Path(work) if work else _work_folder(out, remote, manifest)
    with _locked(folder), _kind_errors(folder):
        plan_file = folder / "plan.json"
        wanted = {**manifest, "modified": [s.modified for s in sources]}
        if plan_file.exists() and (found := json.loads(plan_file.read_text())) != wanted:
            differing = sorted(k for k in wanted if found.get(k) != wanted[k])
            raise PileError(
                f"{folder} holds the unfinished work of a call with other {', '.join(differing)}. Finish that call, or "
                f"remove it: rm -r {folder}"
            )
        (folder / "tokens").mkdir(exist_ok=True)
        _write_json(plan_file, wanted)
        job = Job(
            serialized,
            eos_id,
            manifest["dtype"],
            plan.text_key,
            plan.validation,
            plan.by_subset,
            plan.on_error,
            folder / "tokens",
        )
        large = sum(s.size or 1 << 40 for s in sources) > WRITTEN_ALONE
        with _pool(workers, job, large) as pool:
            readings = _tokenize_all(plan, sources, folder / "tokens", pool, progress)
            _write_all(plan, manifest, sources, readings, folder, remote, pool, progress)
        result = folder / "out"
        (result / "streams.yaml").write_text(streams_block(manifest, out))
        if remote:
            with _no_warnings():
                _upload(result, remote, manifest)
        else:
            with contextlib.suppress(OSError):
                Path(out).rmdir()
            result.rename(out)
    shutil.rmtree(folder)
    return manifest


def _finished(out: str, remote: str | None, wanted: dict[str, Any]) -> dict[str, Any] | None:
    if remote:
        found = _download_json(f"{remote}/{MANIFEST}")
    else:
        path = Path(out) / MANIFEST
        found = json.loads(path.read_text()) if path.is_file() else None
        if found is None and Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
            raise PileError(f"{out} is there already and holds something else. Choose another --out, or empty it.")
    if found is None:
        return None
    sources = [{k: v for k, v in s.items() if k in ("path", "bytes")} for s in found.get("sources", [])]
    if differing := [k for k in wanted if {**found, "sources": sources}.get(k) != wanted[k]]:
        shown = "; ".join(f"{k}: {_short(found.get(k))} there, {_short(wanted[k])} wanted" for k in differing)
        raise PileError(f"{out} holds shards made otherwise ({shown}). Choose another --out, or remove that folder.")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 300 else f"{text[:300]}…"


def _work_folder(out: str, remote: str | None, manifest: dict[str, Any]) -> Path:
    if not remote:
        return Path(out.rstrip("/") + ".partial")
    digest = hashlib.sha256(json.dumps([remote, manifest], sort_keys=True).encode()).hexdigest()
    return Path(f"prepare-pile-{digest[:12]}.partial")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PileError(f"Another process is at work in {folder}. Wait for it, or choose another --out.") from error
        yield


@contextlib.contextmanager
def _kind_errors(folder: Path) -> Iterator[None]:
    from concurrent.futures.process import BrokenProcessPool

    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = shutil.disk_usage(folder).free / 1e9
        raise PileError(
            f"No room to write in {folder} ({error.strerror}; {free:.2f} GB free on that disk). Make room and call "
            "again: what is finished is kept."
        ) from error
    except BrokenProcessPool as error:
        raise PileError(
            "A worker process was killed, most often for want of memory. Call again with fewer --workers: what is "
            "finished is kept."
        ) from error


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    """Keep streaming's notes about its own temporary folders from the user's screen."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _pool(workers: int | None, job: Job, large: bool) -> Iterator[Any]:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    workers = workers or len(os.sched_getaffinity(0))
    # Not fork: the parent has threads by now (tokenizers, torch), which a forked child may find holding locks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["let_composer.pile", "let_composer.encoding"] + ["streaming"] * large)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(job,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _drain(pool: Any, tasks: Iterable[tuple[Any, Any, int]], done: Any, room: int) -> None:
    """Run tasks ``(function, argument, size)`` with at most ``room`` of size (or one task) under way."""
    from concurrent.futures import FIRST_COMPLETED, wait

    pending: dict[Any, int] = {}

    def collect(block: bool) -> None:
        finished, _ = wait(pending, timeout=None if block else 0, return_when=FIRST_COMPLETED)
        for future in finished:
            del pending[future]
            done(future.result())

    for function, argument, size in tasks:
        while pending and sum(pending.values()) + size > room:
            collect(True)
        pending[pool.submit(function, argument)] = size
        collect(False)
    while pending:
        collect(True)


def _tokenize_all(plan: Plan, sources: list[Source], folder: Path, pool: Any, progress: bool) -> list[Reading]:
    from tqdm import tqdm

    total = sum(s.size or 0 for s in sources)
    bar = tqdm(total=total or None, unit="B", unit_scale=True, desc="tokenize", disable=not progress)
    positions = dict.fromkeys(range(len(sources)), 0)
    tokens = 0

    def advance(source: int, position: int) -> None:
        if position > positions[source]:
            bar.update(position - positions[source])
            positions[source] = position

    def done(result: dict[str, Any]) -> None:
        nonlocal tokens
        tokens += result["tokens"]
        seconds = max(bar.format_dict["elapsed"], 1e-3)
        bar.set_postfix_str(f"{tokens / 1e6:.1f}M tokens, {tokens / seconds / 1e3:.0f}k/s", refresh=False)
        advance(result["source"], result["position"])

    readings = [Reading() for _ in sources]

    def tasks() -> Iterator[tuple[Any, Any, int]]:
        for number, source in enumerate(sources):
            reading, record = readings[number], folder / f"{number:05}.json"
            if record.exists():
                # It says that all pieces have been cut; some may still have been with a worker.
                reading = Reading(**json.loads(record.read_text()))
                if all((folder / f"{_piece_name(number, n)}.json").exists() for n in range(reading.pieces)):
                    readings[number] = reading
                    advance(number, source.size or 0)
                    continue
                reading = readings[number]
            cut = (
                _rows(source, number, plan.piece_bytes, reading, plan.text_key)
                if source.kind in ("parquet", "hf")
                else _lines(source, number, plan.piece_bytes, reading)
            )
            for piece in cut:
                if not (folder / f"{piece.name}.json").exists():
                    size = len(piece.payload) if isinstance(piece.payload, bytes) else plan.piece_bytes
                    yield _tokenize, piece, size
            if reading.problem and plan.on_error == "stop":
                raise PileError(_describe({"path": source.path, **reading.problem}))
            _write_json(record, dataclasses.asdict(reading))

    with bar:
        _drain(pool, tasks(), done, room=2 * pool._max_workers * plan.piece_bytes)
        bar.update(max(total - bar.n, 0))
    return readings


def _write_all(
    plan: Plan,
    manifest: dict[str, Any],
    sources: list[Source],
    readings: list[Reading],
    folder: Path,
    remote: str | None,
    pool: Any,
    progress: bool,
) -> None:
    from streaming.base.util import merge_index
    from tqdm import tqdm

    names = [_piece_name(s, p) for s, reading in enumerate(readings) for p in range(reading.pieces)]
    records = [json.loads((folder / "tokens" / f"{name}.json").read_text()) for name in names]
    problems = [{"path": s.path, **r.problem} for s, r in zip(sources, readings, strict=True) if r.problem]
    counts = Counter(p["kind"] for p in problems)
    for record in records:
        counts.update(record["problem_counts"])
        problems += record["problems"]
    manifest["sources"] = [
        {"path": s.path, "bytes": s.size, "sha256": r.sha256} for s, r in zip(sources, readings, strict=True)
    ]
    manifest["problems"] = {"counts": dict(sorted(counts.items())), "first": problems[:PROBLEMS_KEPT]}

    subsets = sorted({key.rpartition("/")[0] for record in records for key in record["streams"]})
    folders: dict[str, str] = {}
    for subset in subsets:
        slug = re.sub(r"[^a-z0-9]+", "-", subset.lower()).strip("-") or UNLABELLED
        while slug in folders.values():
            slug += "-x"
        folders[subset] = slug
    tasks, indexes = [], []
    manifest["streams"] = {}
    width = np.dtype(manifest["dtype"]).itemsize
    per_shard = max(1, plan.shard_bytes // (plan.sequence_length * width))
    for subset in subsets:
        name = folders[subset] if plan.by_subset else ""
        about: dict[str, Any] = {"folder": name, "splits": {}}
        manifest["streams"][subset if plan.by_subset else ""] = about
        for split in SPLITS:
            found = [(n, r["streams"][f"{subset}/{split}"]) for n, r in zip(names, records, strict=True)
                     if f"{subset}/{split}" in r["streams"]]  # fmt: skip
            tokens = sum(part["tokens"] for _, part in found)
            samples = tokens // plan.sequence_length
            about["splits"][split] = {
                "documents": sum(part["documents"] for _, part in found),
                "bytes": sum(part["bytes"] for _, part in found),
                "samples": samples,
                "tokens": samples * plan.sequence_length,
                "tokens_left_over": tokens - samples * plan.sequence_length,
            }
            if not samples:
                continue
            starts = np.concatenate([[0], np.cumsum([part["tokens"] for _, part in found], dtype=np.int64)])
            offsets = np.array([part["offset"] for _, part in found], np.int64)
            order = np.arange(samples)
            if plan.shuffle_seed is not None:
                order = np.random.default_rng(plan.shuffle_seed).permutation(samples)
            target = folder / "out" / name / split
            target.mkdir(parents=True, exist_ok=True)
            index = []
            for number, first in enumerate(range(0, samples, per_shard)):
                shard = Shard(
                    target / f"{number:05}",
                    "/".join(part for part in (remote, name, split) if part) if remote else None,
                    order[first : first + per_shard],
                    plan.sequence_length,
                    manifest["dtype"],
                    plan.compression,
                    folder / "tokens",
                    [n for n, _ in found],
                    offsets,
                    starts,
                )
                tasks.append((_write_shard, shard, 1))
                index.append(str(shard.folder / "index.json"))
            indexes.append((target, index))
    if not any(a["splits"]["train"]["samples"] for a in manifest["streams"].values()):
        tokens = sum(a["splits"]["train"]["tokens_left_over"] for a in manifest["streams"].values())
        raise PileError(
            f"The input holds {tokens} tokens for training, less than one sequence of {plan.sequence_length}. Give "
            "more text or a smaller --sequence-length."
        )
    with tqdm(total=len(tasks), unit="shard", desc="write", disable=not progress) as bar:
        if sum(len(shard.samples) for _, shard, _ in tasks) * plan.sequence_length * width <= WRITTEN_ALONE:
            for _, shard, _ in tasks:
                _write_shard(shard)
                bar.update()
        else:
            _drain(pool, tasks, lambda _: bar.update(), room=2 * pool._max_workers)
    for target, index in indexes:
        with _no_warnings():
            merge_index(index, str(target), keep_local=True)
    for target, _ in indexes:
        _write_json(target / MANIFEST, manifest)
    _write_json(folder / "out" / MANIFEST, manifest)


def _upload(result: Path, remote: str, manifest: dict[str, Any]) -> None:
    from streaming.base.storage.upload import CloudUploader

    for about in manifest["streams"].values():
        for split, counts in about["splits"].items():
            if counts["samples"]:
                parts = [part for part in (about["folder"], split) if part]
                target = (str(result.joinpath(*parts)), "/".join([remote, *parts]))
                uploader = CloudUploader.get(target, keep_local=True, exist_ok=True)
                # The index last: until it is there, a reader finds no data set at all.
                for file in (MANIFEST, "index.json"):
                    uploader.upload_file(file)
    uploader = CloudUploader.get((str(result), remote), keep_local=True, exist_ok=True)
    for file in ("streams.yaml", MANIFEST):
        uploader.upload_file(file)


def streams_block(manifest: dict[str, Any], out: str, proportions: dict[str, float] | None = None) -> str:
    """Write the ``streams:`` block for ``train_loader.dataset`` of a llm-foundry YAML.

    Args:
        manifest: What ``convert`` returned.
        out: Where the shards are, as the training machines see it.
        proportions: Weight of each subset; None takes the Pile's published weights when all subsets are the Pile's,
            and else their token counts.
    """
    counts = {
        name: about["splits"]["train"]["tokens"]
        for name, about in manifest["streams"].items()
        if about["splits"]["train"]["samples"]
    }
    if proportions is None:
        proportions = PILE_WEIGHTS if all(name in PILE_WEIGHTS for name in counts) else counts
    if missing := sorted(set(counts) - set(proportions)):
        raise PileError(f"No proportion for {', '.join(missing)}. Expected one for each of {', '.join(counts)}.")
    total = sum(proportions[name] for name in counts)
    lines = ["# For train_loader.dataset of a llm-foundry YAML, in place of its local, remote and split."]
    if "://" in out:
        lines += [
            "# Name a folder on each machine's own disk in variables.cache; cache_limit beside streams bounds it."
        ]
    lines += ["streams:"]
    for name in counts:
        folder = manifest["streams"][name]["folder"]
        where = "/".join(part for part in (out.rstrip("/"), folder) if part)
        lines += [f"  {folder or 'all'}:  # {counts[name]:,} tokens"]
        if "://" in out:
            lines += [f"    remote: {where}", f"    local: ${{variables.cache}}/{folder or 'all'}"]
        else:
            lines += [f"    local: {where}"]
        lines += ["    split: train", f"    proportion: {proportions[name] / total:.6g}"]
    return "\n".join(lines) + "\n"


def verify(out: str, samples: int = 2) -> dict[str, int]:
    """Read every shard back through llm-foundry's own loader and check hashes, counts and token ids.

    Args:
        out: What ``convert`` made.
        samples: How many samples of each split to decode and print.

    Returns:
        Tokens read for each split folder.

    Raises:
        PileError: Something read differs from the manifest.
    """
    from llmfoundry.data.text_data import StreamingTextDataset
    from streaming.base.util import clean_stale_shared_memory

    manifest = _read_manifest(out)
    if manifest is None:
        raise PileError(f"Expected {MANIFEST} in {out}, found none: was it made by prepare_pile.py?")
    tokenizer = _load_tokenizer(manifest["tokenizer"]["name"])
    length, read = manifest["sequence_length"], {}
    check_manifest(out, tokenizer, length)
    for about in manifest["streams"].values():
        for split, counts in about["splits"].items():
            if not counts["samples"]:
                continue
            where = "/".join(part for part in (out.rstrip("/"), about["folder"], split) if part)
            clean_stale_shared_memory()
            with tempfile.TemporaryDirectory() as cache:
                try:
                    # As from a store: only what is downloaded and decompressed has its hashes checked.
                    data = StreamingTextDataset(
                        tokenizer=tokenizer,
                        max_seq_len=length,
                        remote=where,
                        local=cache,
                        validate_hash=HASH,
                        batch_size=1,
                        shuffle=False,
                        cache_limit="1gb",
                    )
                    tokens, largest = 0, 0
                    for number in range(data.num_samples):
                        sample: Any = data[number]
                        tokens += len(sample)
                        largest = max(largest, int(sample.max()))
                        if number < samples:
                            print(f"--- {where}, sample {number}:\n{tokenizer.decode(sample.tolist())}\n")
                except (ValueError, RuntimeError, OSError) as error:
                    raise PileError(f"{where} cannot be read back: {error}") from error
            if tokens != counts["tokens"]:
                raise PileError(f"{where}: the manifest says {counts['tokens']} tokens, read {tokens}.")
            if largest >= manifest["tokenizer"]["vocabulary_size"]:
                raise PileError(f"{where}: token {largest} is not in the tokenizer's vocabulary.")
            print(f"{where}: {counts['samples']:,} samples, {tokens:,} tokens, hashes right.", file=sys.stderr)
            read[where] = tokens
    return read

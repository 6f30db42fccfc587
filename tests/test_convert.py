"""Documents to shards: what is written, that nothing is lost, repeated or half there, and what bad input says."""

import contextlib
import gzip
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd
from filelock import FileLock
from texts import EOS, LENGTH, documents, english, ids, jsonl, leaves_open, plan, run, samples, shards
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

pytestmark = leaves_open


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file of good text."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(english(60_000)))
    return tmp_path / "a.jsonl"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


# ---- what is written ----


def test_every_token_of_every_document_in_order(tmp_path, bpe):
    texts = [f"{i} {text}" for i, text in enumerate(english())] + [f"The token {EOS} ends nothing.", "漢字🙂"]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(jsonl(texts[:500]))
    (tmp_path / "in" / "b.jsonl").write_bytes(jsonl(texts[500:]))
    made = plan(tmp_path / "in", bpe)
    manifest = run(made, tmp_path / "plain", shuffle_seed=None)
    assert run(made, tmp_path / "shuffled")["streams"] == manifest["streams"]
    rows, mixed = (samples(tmp_path / name / "train") for name in ("plain", "shuffled"))
    assert all(row.dtype == np.uint16 and row.shape == (LENGTH,) for row in rows)
    expected = ids(texts, bpe)
    assert np.concatenate(rows).tolist() == expected[: len(expected) // LENGTH * LENGTH]
    assert manifest["streams"][""]["splits"]["train"] == {
        "documents": len(texts),
        "bytes": sum(len(text.encode()) for text in texts),
        "samples": len(rows),
        "tokens": len(rows) * LENGTH,
        "tokens_left_over": len(expected) % LENGTH,
    }
    assert len(list((tmp_path / "plain" / "train").glob("shard.*.zstd"))) > 5, "meant to fill several shards"
    places = {bytes(row): place for place, row in enumerate(rows)}
    where = np.array([places[bytes(row)] for row in mixed])
    assert sorted(map(bytes, rows)) == sorted(map(bytes, mixed))
    assert 0.2 < (where[: len(where) // 2] < len(where) // 2).mean() < 0.8


def test_every_format_gives_the_same_shards(tmp_path, out, bpe):
    data = jsonl(english(150_000))
    half = data.index(b"\n", len(data) // 2) + 1
    rows = [json.loads(line) for line in data.splitlines()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet", row_group_size=50)
    files = {
        "a.jsonl": data,
        "b.jsonl.zst": zstd.compress(data),
        "frames.jsonl.zst": zstd.compress(data[:half]) + zstd.compress(data[half:]),
        "c.json.gz": gzip.compress(data),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    found: dict[str, bytes] = {}
    for name in [*(tmp_path / name for name in [*files, "d.parquet"]), f"file://{tmp_path}/*.jsonl"]:
        run(plan(name, bpe), out)
        content = {k: v for k, v in shards(out).items() if not k.endswith("manifest.json")}
        assert content == (found := found or content), name
        shutil.rmtree(out)


def test_validation_holds_out_by_text(tmp_path, out, bpe):
    texts = sorted({text.strip() for text in english()})
    # The same texts again in another order: a copy must not land on the other side.
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts + texts[::-1]))
    run(plan(tmp_path / "a.jsonl", bpe, validation=0.2, shuffle_seed=None), out)
    train, val = (documents(out / split, bpe) for split in ("train", "val"))
    assert not set(train) & set(val)
    assert 0.15 < len(val) / (2 * len(texts)) < 0.25
    assert len(train) + len(val) >= 2 * len(texts) - 10


def test_by_subset(tmp_path, out, bpe):
    names = ["Pile-CC", "Wikipedia (en)", "My own / texts"]
    texts = [f"{i % 3} {text}" for i, text in enumerate(english())]
    data = jsonl(texts, lambda i: names[i % 3])
    # Some have meta as a string, as a column may have it.
    (tmp_path / "a.jsonl").write_bytes(
        data.replace(b'{"pile_set_name": "Pile-CC"}', b'"{\\"pile_set_name\\": \\"Pile-CC\\"}"')
    )
    manifest = run(plan(tmp_path / "a.jsonl", bpe, by_subset=True, shuffle_seed=None), out)
    folders = [manifest["streams"][name]["folder"] for name in names]
    assert folders[:2] == ["pile-cc", "wikipedia-en"] and folders[2].startswith("my-own-texts-")
    for i, (name, folder) in enumerate(zip(names, folders, strict=True)):
        read, mine = documents(out / folder / "train", bpe), texts[i::3]
        assert read == mine[: len(read)] and len(read) > 0.98 * len(mine)
        assert manifest["streams"][name]["splits"]["train"]["documents"] == len(mine)


def test_wide_vocabulary_takes_wider_integers(tmp_path, out):
    words = [EOS, *(f"w{i}" for i in range(70_000))]
    model: Any = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=EOS))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=model, eos_token=EOS).save_pretrained(tmp_path / "t")
    texts = [" ".join(f"w{i * 9}" for i in range(start, start + 90)) for start in range(0, 7600, 70)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    run(plan(tmp_path / "a.jsonl", str(tmp_path / "t"), shuffle_seed=None), out)
    rows = samples(out / "train")
    assert rows[0].dtype == np.int32
    assert rows[0][:3].tolist() == [1, 10, 19] and max(int(row.max()) for row in rows) > 1 << 16


# ---- the same bytes, come what may ----


def test_neither_workers_nor_pieces_change_the_bytes(tmp_path, bpe):
    (tmp_path / "a.jsonl").write_bytes(jsonl(english()))
    made = plan(tmp_path / "a.jsonl", bpe, validation=0.1)
    run(made, tmp_path / "1", workers=1)
    run(made, tmp_path / "3", workers=3, piece_bytes=7_000)
    assert shards(tmp_path / "1") == shards(tmp_path / "3")


PROGRAM = """
import resource, sys
if len(sys.argv) > 5:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[5]), int(sys.argv[5])))
sys.path.insert(0, sys.argv[1])
from texts import plan, run
try:
    run(plan(sys.argv[2], sys.argv[3], validation=0.1), sys.argv[4])
except ValueError as error:
    sys.exit(f"ValueError: {error}")
"""


def program(source: Path, bpe: str, out: Path, *limit: str) -> subprocess.Popen[str]:
    """The same in a process of its own, which may write files of so many bytes."""
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), str(source), bpe, str(out), *limit]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, source, out, bpe):
    """``LET_KILLS=30`` kills that often. A moment is a count of files written, so that all of the work is met."""
    source.write_bytes(jsonl(english() * 4))
    again = plan(source, bpe, validation=0.1)
    run(again, tmp_path / "unbroken")
    chooser = random.Random(5)
    for kill in range(int(os.environ.get("LET_KILLS", "2"))):
        process = program(source, bpe, out)
        moment = chooser.randrange(len(shards(tmp_path / "unbroken")))
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if sum(len(files) for _, _, files in os.walk(tmp_path / "out.partial")) > moment:
                time.sleep(0.02 * chooser.random())
                break
            time.sleep(0.001)
        process.kill()
        process.communicate()
        if kill % 2 or out.exists():  # every second time it goes on where the one before was killed
            run(again, out)
            assert shards(out) == shards(tmp_path / "unbroken"), moment
            assert not list(tmp_path.glob("out.*")), moment
            shutil.rmtree(out)


def test_interrupted_at_every_step_of_the_end(tmp_path, source, out, bpe, step):
    source.write_bytes(jsonl(english(60_000), lambda i: ["Pile-CC", "Github"][i % 2]))
    made = plan(source, bpe, validation=0.1, by_subset=True, piece_bytes=1 << 20)
    run(made, tmp_path / "unbroken")
    with pytest.raises(KeyboardInterrupt), step(tmp_path, 1, containing="index.json"):
        run(made, out)
    (tmp_path / "near the end").mkdir()
    for path in tmp_path.glob("out.partial*"):
        path.rename(tmp_path / "near the end" / path.name)
    for number in range(1, 1000):
        shutil.copytree(tmp_path / "near the end", tmp_path, dirs_exist_ok=True)
        try:
            with step(tmp_path, number):
                run(made, out)
            break
        except KeyboardInterrupt:
            pass
        run(made, out)
        assert shards(out) == shards(tmp_path / "unbroken") and (out / "streams.yaml").exists(), number
        assert not list(tmp_path.glob("out.*")), number
        shutil.rmtree(out)
    assert number > 30


_STEP: dict[str, Any] = {"left": 0}


def _count(event: str, args: tuple[Any, ...]) -> None:
    writes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") or (event == "open" and "w" in str(args[1]))
    if _STEP["left"] and writes and _STEP["folder"] in str(args[0]) and _STEP["containing"] in str(args[0]):
        _STEP["left"] -= 1
        if not _STEP["left"]:
            raise KeyboardInterrupt


@pytest.fixture(scope="session")
def step() -> Callable[..., Any]:
    """Interrupt at the nth change of a folder, as Ctrl-C or a failing disk would, in this process."""
    sys.addaudithook(_count)

    @contextlib.contextmanager
    def interrupt(folder: Path, number: int, containing: str = "") -> Iterator[None]:
        _STEP.update(left=number, folder=str(folder), containing=containing)
        try:
            yield
        finally:
            _STEP["left"] = 0

    return interrupt


@pytest.mark.slow
def test_full_disk_stops_cleanly(tmp_path, source, out, bpe):
    source.write_bytes(jsonl(english()))
    process = program(source, bpe, out, "6000")
    error = process.communicate()[1]
    assert process.returncode == 1 and "ValueError: Cannot go on: " in error
    assert "File too large" in error and "call again" in error and not out.exists()
    made = plan(source, bpe, validation=0.1)
    run(made, out)
    run(made, tmp_path / "unbroken")
    assert shards(out) == shards(tmp_path / "unbroken")


# ---- what is there already ----


def test_second_call_returns_what_is_there(source, out, bpe):
    made = plan(source, bpe)
    first = run(made, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert run(made, out) == first
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(ValueError, match=r"made otherwise \(sequence_length: 64 there, 32 wanted\)"):
        run(made, out, sequence_length=32)


def test_other_work_is_refused_but_not_for_on_error(tmp_path, source, out, bpe, step):
    source.write_bytes(jsonl(english(100_000)) + b"broken\n" + jsonl(english(60_000)))
    made = plan(source, bpe)
    with pytest.raises(ValueError, match="invalid JSON"):
        run(made, out)
    with pytest.raises(ValueError, match=r"of another call \(arguments validation: 0\.0 there, 0\.5 wanted\).*rm -r"):
        run(made, out, validation=0.5)
    source.rename(tmp_path / "before")
    source.write_bytes(b"changed")
    with pytest.raises(ValueError, match=rf"of another call \(sources {source} bytes: \d+ there, 7 wanted"):
        run(made, out)
    (tmp_path / "before").rename(source)
    with pytest.raises(KeyboardInterrupt), step(tmp_path, 1, containing="index.json"):
        run(made, out, on_error="skip")
    with pytest.raises(ValueError, match=r"a\.jsonl, line \d+: invalid JSON"):
        run(made, out)
    assert run(made, out, on_error="skip")["problems"]["counts"] == {"invalid JSON": 1}
    run(made, tmp_path / "at once", on_error="skip")
    assert shards(out) == shards(tmp_path / "at once")
    with pytest.raises(ValueError, match="made with --on-error skip, and lacks .*invalid JSON"):
        run(made, out)


def test_two_processes_at_once(tmp_path, source, out, bpe):
    source.write_bytes(jsonl(english()))
    with FileLock(tmp_path / "out.partial.lock"), pytest.raises(ValueError, match="Another process is at work"):
        run(plan(source, bpe), out)
    both = [program(source, bpe, out) for _ in range(2)]
    for process in both:
        error = process.communicate()[1]
        assert process.returncode == 0 or "Another process is at work" in error, error
    run(plan(source, bpe, validation=0.1), tmp_path / "alone")
    assert shards(out) == shards(tmp_path / "alone") and not list(tmp_path.glob("out.*"))


def test_what_is_not_ours_is_kept(tmp_path, source, bpe):
    made = plan(source, bpe)
    np.savez(tmp_path / "mine.partial.npz", mine=1)
    with pytest.raises(ValueError, match=r"mine\.partial\.npz is wanted for unfinished work, but holds something else"):
        run(made, tmp_path / "mine")
    assert np.load(tmp_path / "mine.partial.npz")["mine"] == 1
    for folder in (tmp_path / "out", tmp_path / "new.partial"):
        folder.mkdir()
        (folder / "mine.txt").write_text("kept")
        with pytest.raises(ValueError, match="holds something else"):
            run(made, folder.with_suffix(""))
        assert (folder / "mine.txt").read_text() == "kept"
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    run(made, tmp_path / "link")
    run(made, tmp_path / "not there yet" / "out")
    assert shards(tmp_path / "empty") == shards(tmp_path / "not there yet" / "out")


# ---- bad input ----

BAD_LINES = [
    ("invalid JSON", b'{"text": "half a docu\n'),
    ("invalid UTF-8", b'{"text": "\xff\xfe is not UTF-8, and the line is long enough"}\n'),
    ("invalid UTF-8", b'{"text": "half a pair \\ud83d of surrogates"}\n'),
    ("empty text", b'{"text": " \\n", "meta": {}}\n'),
    ("no text", b'{"content": "under another name"}\n'),
    ("no text", b'{"text": 3}\n'),
    ("no text", b"[1, 2]\n"),
]


def test_bad_lines(source, out, bpe):
    lines = jsonl(english(100_000)).splitlines(keepends=True)
    good = len(lines)
    for number, (_, line) in enumerate(BAD_LINES):
        lines.insert(100 + 20 * number, line)
    source.write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 101: invalid JSON"):
        run(plan(source, bpe), out)
    assert not out.exists()
    manifest = run(plan(source, bpe, on_error="skip"), out)
    expected = [f"{source}, line {101 + 20 * number}: {kind}: " for number, (kind, _) in enumerate(BAD_LINES)]
    for line, start in zip(manifest["problems"]["first"], expected, strict=True):
        assert line.startswith(start)
    assert "expected an object with a string under 'text', got ['content']" in manifest["problems"]["first"][4]
    assert manifest["problems"]["counts"] == {"empty text": 1, "invalid JSON": 1, "invalid UTF-8": 2, "no text": 3}
    assert manifest["streams"][""]["splits"]["train"]["documents"] == good


def test_damaged_files(tmp_path, out, bpe):
    """All whole lines before the damage are there, and the next file."""
    data = jsonl([f"{i} {text}" for i, text in enumerate(english())])
    checked = {zstd.CompressionParameter.checksum_flag: 1}
    for suffix, packed in (("zst", zstd.compress(data, options=checked)), ("gz", gzip.compress(data))):
        half = 2 * len(packed) // 3
        (tmp_path / f"truncated.jsonl.{suffix}").write_bytes(packed[:half])
        (tmp_path / f"corrupt.jsonl.{suffix}").write_bytes(packed[:half] + b"\0" * 64 + packed[half + 64 :])
    (tmp_path / "whole.jsonl").write_bytes(data)
    with pytest.raises(ValueError, match=r"corrupt\.jsonl\.gz, line \d+: (damaged file|invalid)"):
        run(plan(tmp_path, bpe), out)
    manifest = run(plan(tmp_path, bpe, on_error="skip"), out)
    counts, first = manifest["problems"]["counts"], manifest["problems"]["first"]
    assert counts.pop("damaged file") == 4
    pattern = re.escape(f"{tmp_path}/") + r"(.*), line (\d+): damaged file: "
    lines = {found[1]: int(found[2]) for line in first[:4] if (found := re.match(pattern, line))}
    assert sorted(lines) == sorted(path.name for path in tmp_path.glob("*.jsonl.*"))
    assert min(lines.values()) >= 1 and lines["truncated.jsonl.zst"] > 100
    read = sum(line - 1 for line in lines.values()) + len(data.splitlines())
    # gzip has its checksum at the end: what was changed before is met first, as broken lines.
    assert manifest["streams"][""]["splits"]["train"]["documents"] == read - sum(counts.values())


def test_damaged_parquet(tmp_path, bpe):
    texts = [f"{i} {text}" for i, text in enumerate(english() * 2)]
    raw = [text.encode() for text in texts]
    raw[700] = b"\xff\xfe is not UTF-8"
    binary = pyarrow.array(raw, pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), len(raw), binary.buffers())
    source, made = tmp_path / "a.parquet", plan(tmp_path / "a.parquet", bpe, text_key="body", shuffle_seed=None)

    def check(body: Any, damage: tuple[int, int], message: str, problem: str, documents: int) -> None:
        options: dict[str, Any] = {"row_group_size": 1024, "use_dictionary": False, "compression": "gzip"}
        pyarrow.parquet.write_table(pyarrow.table({"body": body}), source, **options)
        place = pyarrow.parquet.ParquetFile(source).metadata.row_group(1).column(0).data_page_offset
        content = bytearray(source.read_bytes())
        content[place + damage[0] : place + damage[1]] = bytes(damage[1] - damage[0])
        source.write_bytes(content)
        with pytest.raises(ValueError, match=rf"a\.parquet, {message}"):
            run(made, tmp_path / f"stopped at {problem}")
        manifest = run(made, tmp_path / problem, on_error="skip")
        assert manifest["problems"]["counts"] == {problem: 1}
        assert manifest["streams"][""]["splits"]["train"]["documents"] == documents

    check(column, (0, 0), "line 701: invalid UTF-8", "invalid UTF-8", len(texts) - 1)
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'text': --text-key must be one of body\."):
        run(made, tmp_path / "nothing", text_key="text")
    check(texts, (200, 400), "line 1025: damaged file", "damaged file", 1024)


@pytest.mark.parametrize(
    ("inputs", "changes", "message"),
    [
        ("empty", {}, "Nothing to read at .*Expected files that end in .jsonl"),
        ("a.txt", {}, "Nothing to read at .*Expected files that end in .jsonl"),
        ("a.jsonl", {"workers": -1}, "--workers must exceed 0, got 64, -1"),
        ("a.jsonl", {"tokenizer": "nowhere/at all"}, "No tokenizer at 'nowhere/at all'"),
        ("a.jsonl", {"eos": "<eos>"}, "must be one token of .*got '<eos>'"),
        ("a.jsonl", {"sequence_length": 0}, "must exceed 0, got 0, 2"),
        ("a.jsonl", {"validation": 1.0}, r"--validation must be a share in \[0, 1\), such as .* got 1\.0"),
        ("a.jsonl", {"text_key": "body"}, r"line 1: no text: .*a string under 'body', got \['text', 'meta'\]"),
        ("a.jsonl", {"sequence_length": 1_000_000}, "less than one sequence of 1000000"),
    ],
)
def test_what_the_user_can_put_right(tmp_path, source, out, bpe, inputs, changes, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=message):
        run(plan(tmp_path / inputs, bpe), out, **changes)
    assert not out.exists()


def test_a_store_whose_url_has_no_slashes_is_no_folder(tmp_path, source, bpe, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="Cannot upload to dbfs:/Volumes/a/b/c/pile: .*Check name, keys and network"):
        run(plan(source, bpe), "dbfs:/Volumes/a/b/c/pile")
    assert not (tmp_path / "dbfs:").exists()

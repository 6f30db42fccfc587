"""Documents to shards: what is written, that nothing is lost, repeated or half there, and what bad input says."""

import contextlib
import dataclasses
import gzip
import json
import os
import pydoc_data.topics
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backports import zstd
from filelock import FileLock
from streaming import StreamingDataset
from streaming.base.util import clean_stale_shared_memory
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from let_composer.data import DataError
from let_composer.data.convert import convert
from let_composer.data.plan import Plan

pytestmark = pytest.mark.filterwarnings(
    # streaming opens its shared memory and leaves closing it to the interpreter's exit.
    "ignore::ResourceWarning",
)
LENGTH = 64
EOS = "<|endoftext|>"


def english(limit: int = 400_000) -> list[str]:
    """Paragraphs of Python's own reference, which every Python has."""
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))[:limit]
    return [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]


def make_tokenizer(folder: Path, vocab_size: int = 700) -> str:
    bpe: Any = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "special_tokens": [EOS, "<|padding|>"],
        "initial_alphabet": pre_tokenizers.ByteLevel.alphabet(),
        "show_progress": False,
    }
    bpe.train_from_iterator(english(100_000), trainers.BpeTrainer(**settings))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=EOS, pad_token="<|padding|>", clean_up_tokenization_spaces=False
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def jsonl(texts: list[str], subset: Callable[[int], str] = lambda _: "Pile-CC") -> bytes:
    rows = ({"text": text, "meta": {"pile_set_name": subset(i)}} for i, text in enumerate(texts))
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def plan(inputs: Path | str, tokenizer: str, **changes: Any) -> Plan:
    values: dict[str, Any] = {"sequence_length": LENGTH, "piece_bytes": 40_000, "shard_bytes": 20_000}
    return Plan(inputs=(str(inputs),), tokenizer=tokenizer, **{**values, **changes})


def run(plan: Plan, out: Path, workers: int = 2) -> dict[str, Any]:
    return convert(plan, str(out), workers=workers, progress=False)


def shards(folder: Path) -> dict[str, bytes]:
    """Every file of a finished folder but those that reading leaves there."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".mds" and path.name != "streams.yaml"
    }


def samples(folder: Path) -> list[np.ndarray]:
    clean_stale_shared_memory()
    data = StreamingDataset(local=str(folder), batch_size=1, shuffle=False)
    return [data[i]["tokens"] for i in range(data.num_samples)]


def documents(stream: np.ndarray, tokenizer: str) -> list[str]:
    """The documents of a token stream in its own order; what follows the last EOS is left out."""
    hf = AutoTokenizer.from_pretrained(tokenizer)
    ends = np.flatnonzero(stream == hf.eos_token_id)
    return [hf.decode(part[part != hf.eos_token_id].tolist()) for part in np.split(stream, ends + 1)[:-1]]


# ---- what is written ----


def test_tokens_in_order_are_the_documents(tmp_path: Path, tokenizer: str) -> None:
    texts = english()
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    manifest = run(plan(tmp_path / "a.jsonl", tokenizer, piece_bytes=1 << 20), tmp_path / "out")
    rows = samples(tmp_path / "out" / "train")
    assert all(row.dtype == np.uint16 and row.shape == (LENGTH,) for row in rows)
    hf = AutoTokenizer.from_pretrained(tokenizer)
    expected = [i for text in texts for i in [*hf(text)["input_ids"], hf.eos_token_id]]
    assert np.concatenate(rows).tolist() == expected[: len(expected) // LENGTH * LENGTH]
    counts = manifest["streams"][""]["splits"]["train"]
    assert counts["tokens_left_over"] == len(expected) % LENGTH
    assert (counts["documents"], counts["tokens"]) == (len(texts), len(rows) * LENGTH)
    assert len(list((tmp_path / "out" / "train").glob("*/shard.*.zstd"))) > 5, "meant to fill several shards"


def test_no_token_is_lost_between_pieces(tmp_path: Path, tokenizer: str) -> None:
    texts = english()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(jsonl(["first " + t for t in texts]))
    (tmp_path / "in" / "b.jsonl").write_bytes(jsonl(["second " + t for t in texts]))
    plain = run(plan(tmp_path / "in", tokenizer, shuffle_seed=None), tmp_path / "plain")
    shuffled = run(plan(tmp_path / "in", tokenizer), tmp_path / "shuffled")
    hf = AutoTokenizer.from_pretrained(tokenizer)
    ids = np.concatenate(
        [[*hf(f"{which} {text}")["input_ids"], hf.eos_token_id] for which in ("first", "second") for text in texts]
    )
    rows, mixed = (samples(tmp_path / name / "train") for name in ("plain", "shuffled"))
    counts = plain["streams"][""]["splits"]["train"]
    assert counts == shuffled["streams"][""]["splits"]["train"]
    assert counts["tokens"] + counts["tokens_left_over"] == len(ids) and counts["tokens_left_over"] < LENGTH
    # Rows of the pieces in their order, then one row after the other of what they left over.
    missing = np.bincount(ids, minlength=700) - np.bincount(np.concatenate(rows), minlength=700)
    assert missing.min() >= 0 and missing.sum() == counts["tokens_left_over"]
    assert rows[0].tolist() == ids[:LENGTH].tolist()
    assert sorted(map(bytes, rows)) == sorted(map(bytes, mixed))
    places = {bytes(row): place for place, row in enumerate(rows)}
    where = np.array([places[bytes(row)] for row in mixed])
    half = len(where) // 2
    assert 0.3 < (where[:half] < half).mean() < 0.7


def test_every_format_gives_the_same_shards(tmp_path: Path, tokenizer: str) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = english(150_000)
    data = jsonl(texts)
    whole, half = zstd.compress, data.index(b"\n", len(data) // 2) + 1
    files = {
        "a.jsonl": data,
        "b.jsonl.zst": whole(data),
        "frames.jsonl.zst": whole(data[:half]) + whole(data[half:]),
        "c.json.gz": gzip.compress(data),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    rows = [json.loads(line) for line in data.splitlines()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet", row_group_size=50)
    found: dict[int, Any] = {}
    for name in [*files, "d.parquet"]:
        # Rows are cut elsewhere than lines, so one piece holds them all.
        for size in (40_000, 1 << 20) if name in files else (1 << 20,):
            run(plan(tmp_path / name, tokenizer, piece_bytes=size), tmp_path / "out")
            content = {k: v for k, v in shards(tmp_path / "out").items() if not k.endswith("manifest.json")}
            assert content == found.setdefault(size, content), name
            shutil.rmtree(tmp_path / "out")


def test_remote_input(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(english(60_000)))
    run(plan(f"file://{tmp_path}/*.jsonl", tokenizer), tmp_path / "url")
    run(plan(tmp_path, tokenizer), tmp_path / "local")
    assert samples(tmp_path / "url" / "train")[0].tolist() == samples(tmp_path / "local" / "train")[0].tolist()


def test_document_cannot_end_itself(tmp_path: Path, tokenizer: str) -> None:
    texts = [f"The token {EOS} ends a document. Number {i}." for i in range(200)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    run(plan(tmp_path / "a.jsonl", tokenizer, shuffle_seed=None, piece_bytes=1 << 20), tmp_path / "out")
    read = documents(np.concatenate(samples(tmp_path / "out" / "train")), tokenizer)
    assert read == texts[: len(read)] and len(read) > 190


def test_validation_holds_out_by_text(tmp_path: Path, tokenizer: str) -> None:
    texts = sorted({text.strip() for text in english()})
    (tmp_path / "in").mkdir()
    # The same texts again in another file and order: a copy must not land on the other side.
    (tmp_path / "in" / "a.jsonl").write_bytes(jsonl(texts))
    (tmp_path / "in" / "b.jsonl").write_bytes(jsonl(texts[::-1]))
    run(plan(tmp_path / "in", tokenizer, validation=0.2, shuffle_seed=None, piece_bytes=1 << 20), tmp_path / "out")
    sides = [documents(np.concatenate(samples(tmp_path / "out" / split)), tokenizer) for split in ("train", "val")]
    assert not set(sides[0]) & set(sides[1])
    assert 0.15 < len(sides[1]) / (2 * len(texts)) < 0.25
    assert len(sides[0]) + len(sides[1]) >= 2 * len(texts) - 20


def test_by_subset(tmp_path: Path, tokenizer: str) -> None:
    names = ["Pile-CC", "Wikipedia (en)", "Github"]
    texts = [f"{i % 3} {text}" for i, text in enumerate(english())]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts, lambda i: names[i % 3]))
    manifest = run(
        plan(tmp_path / "a.jsonl", tokenizer, by_subset=True, shuffle_seed=None, piece_bytes=1 << 20), tmp_path / "out"
    )
    assert set(manifest["streams"]) == set(names)
    for i, name in enumerate(names):
        about = manifest["streams"][name]
        read = documents(np.concatenate(samples(tmp_path / "out" / about["folder"] / "train")), tokenizer)
        mine = [text for text in texts if text.startswith(f"{i} ")]
        assert read == mine[: len(read)] and len(read) > 0.98 * len(mine)
        assert about["splits"]["train"]["documents"] == len(mine)


def test_wide_vocabulary_takes_wider_integers(tmp_path: Path) -> None:
    words = [EOS, *(f"w{i}" for i in range(70_000))]
    model: Any = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=EOS))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=model, eos_token=EOS).save_pretrained(tmp_path / "t")
    (tmp_path / "a.jsonl").write_bytes(
        jsonl([" ".join(f"w{i * 9}" for i in range(start, start + 90)) for start in range(7600)][::70])
    )
    run(plan(tmp_path / "a.jsonl", str(tmp_path / "t"), shuffle_seed=None, piece_bytes=1 << 20), tmp_path / "out")
    rows = samples(tmp_path / "out" / "train")
    assert rows[0].dtype == np.int32
    assert rows[0][:3].tolist() == [1, 10, 19] and max(int(row.max()) for row in rows) > 1 << 16


# ---- the same bytes, come what may ----


def test_workers_do_not_change_the_bytes(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(english()))
    for workers in (1, 3):
        run(plan(tmp_path / "a.jsonl", tokenizer, validation=0.1), tmp_path / f"out-{workers}", workers)
    assert shards(tmp_path / "out-1") == shards(tmp_path / "out-3")


PROGRAM = """
import resource, sys
if len(sys.argv) > 4:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), int(sys.argv[4])))
from let_composer.data import DataError
from let_composer.data.convert import convert
from let_composer.data.plan import Plan
source, tokenizer, out = sys.argv[1:4]
try:
    plan = Plan((source,), tokenizer, 64, validation=0.1, piece_bytes=40_000, shard_bytes=20_000)
    convert(plan, out, workers=2, progress=False)
except DataError as error:
    sys.exit(f"DataError: {error}")
"""


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path, tokenizer: str) -> None:
    """``LET_KILLS=30`` kills that often. A moment is a count of files written, so that all of the work is met."""
    source, out, work = tmp_path / "a.jsonl", tmp_path / "out", tmp_path / "out.partial"
    source.write_bytes(jsonl(english() * 4))
    again = plan(source, tokenizer, validation=0.1)
    run(again, tmp_path / "unbroken")
    chooser = random.Random(5)
    for kill in range(int(os.environ.get("LET_KILLS", "2"))):
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(source), tokenizer, str(out)])
        moment = chooser.randrange(150)  # some 40 pieces, each with shards, what is left over and a record
        deadline = time.monotonic() + 120
        while (
            process.poll() is None
            and sum(len(files) for _, _, files in os.walk(work)) < moment
            and time.monotonic() < deadline
        ):
            time.sleep(0.001)
        process.kill()
        process.wait()
        if kill % 2 or out.exists():  # every second time it goes on where the one before was killed
            run(again, out)
            assert shards(out) == shards(tmp_path / "unbroken"), moment
            assert not work.exists(), moment
            shutil.rmtree(out)


def test_interrupted_at_every_step_of_the_end(tmp_path: Path, tokenizer: str, step: Callable[..., Any]) -> None:
    source, out, work = tmp_path / "a.jsonl", tmp_path / "out", tmp_path / "out.partial"
    source.write_bytes(jsonl(english(100_000), lambda i: ["Pile-CC", "Github", "ArXiv"][i % 3]))
    made = plan(source, tokenizer, validation=0.1, by_subset=True)
    run(made, tmp_path / "unbroken")
    with pytest.raises(KeyboardInterrupt), step(tmp_path, 1, containing="rest"):
        run(made, out)
    shutil.copytree(work, tmp_path / "all pieces")
    for number in range(1, 1000):
        try:
            with step(tmp_path, number):
                run(made, out)
            break
        except KeyboardInterrupt:
            pass
        run(made, out)
        assert shards(out) == shards(tmp_path / "unbroken"), number
        assert not work.exists(), number
        shutil.rmtree(out)
        shutil.copytree(tmp_path / "all pieces", work)
    assert number > 50


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
def test_full_disk_stops_cleanly(tmp_path: Path, tokenizer: str) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_bytes(jsonl(english() + ["word " * 40_000]))
    command = [sys.executable, "-c", PROGRAM, str(source), tokenizer, str(out), "6000"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "DataError: No room to write" in done.stderr and "call again" in done.stderr
    assert not out.exists()
    again = plan(source, tokenizer, validation=0.1)
    run(again, out)
    run(again, tmp_path / "unbroken")
    assert shards(out) == shards(tmp_path / "unbroken")


def test_second_call_returns_what_is_there(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(english(60_000)))
    made = plan(tmp_path / "a.jsonl", tokenizer)
    first = run(made, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert run(made, tmp_path / "out") == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    with pytest.raises(DataError, match=r"made otherwise \(sequence_length: 64 there, 32 wanted\)"):
        run(plan(tmp_path / "a.jsonl", tokenizer, sequence_length=32), tmp_path / "out")


def test_foreign_folder_is_left_alone(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(english(60_000)))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    with pytest.raises(DataError, match="holds something else"):
        run(plan(tmp_path / "a.jsonl", tokenizer), tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"


# ---- other work ----


def test_other_work_is_refused_but_not_for_on_error(tmp_path: Path, tokenizer: str, step: Callable[..., Any]) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_bytes(jsonl(english(60_000)) + b"broken\n" + jsonl(english(100_000)))
    with pytest.raises(DataError, match="invalid JSON"):
        run(plan(source, tokenizer), out)
    with pytest.raises(
        DataError, match=r"unfinished work of another call \(validation: 0\.0 there, 0\.5 wanted\).*rm -r"
    ):
        run(plan(source, tokenizer, validation=0.5), out)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.partial" / "pieces").glob("*-*.json")}
    skipping = plan(source, tokenizer, on_error="skip")
    with pytest.raises(KeyboardInterrupt), step(tmp_path, 1, containing="streams.yaml"):
        run(skipping, out)
    assert kept and all(path.stat().st_mtime_ns == time for path, time in kept.items())
    with pytest.raises(DataError, match=r"a\.jsonl, line \d+: invalid JSON"):
        run(plan(source, tokenizer), out)
    assert run(skipping, out)["problems"]["counts"] == {"invalid JSON": 1}
    run(skipping, tmp_path / "at once")
    assert shards(out) == shards(tmp_path / "at once")
    with pytest.raises(DataError, match="made with --on-error skip, and lacks .*invalid JSON"):
        run(plan(source, tokenizer), out)


def test_changed_input_is_refused_and_other_versions_are_not(tmp_path: Path, tokenizer: str) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_bytes(jsonl(english(60_000)) + b"broken\n")
    with pytest.raises(DataError, match="invalid JSON"):
        run(plan(source, tokenizer), out)
    file = tmp_path / "out.partial" / "plan.json"
    file.write_text(file.read_text().replace(np.__version__, "0.0.1"))
    with pytest.raises(DataError, match="invalid JSON"):
        run(plan(source, tokenizer), out)
    source.write_bytes(jsonl(english(60_000)))
    with pytest.raises(DataError, match=r"of another call \(.*sources: \["):
        run(plan(source, tokenizer), out)


def test_two_processes_at_once(tmp_path: Path, tokenizer: str) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_bytes(jsonl(english()))
    with FileLock(tmp_path / "out.partial.lock"), pytest.raises(DataError, match="Another process is at work"):
        run(plan(source, tokenizer), out)
    command = [sys.executable, "-c", PROGRAM, str(source), tokenizer, str(out)]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate()[1] for process in both]
    for process, error in zip(both, errors, strict=True):
        assert process.returncode == 0 or "Another process is at work" in error, error
    run(plan(source, tokenizer, validation=0.1), tmp_path / "alone")
    assert shards(out) == shards(tmp_path / "alone") and not (tmp_path / "out.partial").exists()


def test_work_deletes_only_its_own(tmp_path: Path, tokenizer: str) -> None:
    work, out = tmp_path / "work", tmp_path / "not there yet" / "out"
    work.mkdir()
    (work / "mine.txt").write_text("kept")
    (work / "a.jsonl").write_bytes(jsonl(english(60_000)))
    made = plan(work / "a.jsonl", tokenizer)
    convert(made, str(out), workers=1, work=str(work), progress=False)
    assert sorted(path.name for path in work.iterdir()) == ["a.jsonl", "mine.txt"]
    for inside in (tmp_path / "new", tmp_path / "new" / "below"):
        with pytest.raises(DataError, match="is --out or inside it"):
            convert(made, str(tmp_path / "new"), work=str(inside), progress=False)
    beside = tmp_path / "new.partial"
    beside.mkdir()
    (beside / "mine.txt").write_text("kept")
    with pytest.raises(DataError, match="holds something else"):
        run(made, tmp_path / "new")
    assert (beside / "mine.txt").read_text() == "kept"
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    run(made, tmp_path / "link")
    assert shards(tmp_path / "empty") == shards(out)


def test_work_on_another_disk(tmp_path: Path, tokenizer: str, step: Callable[..., Any]) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second disk at /dev/shm")
    (tmp_path / "a.jsonl").write_bytes(jsonl(english(60_000)))
    made, out = plan(tmp_path / "a.jsonl", tokenizer), tmp_path / "out"
    with tempfile.TemporaryDirectory(dir=elsewhere) as work:
        with pytest.raises(KeyboardInterrupt), step(tmp_path, 3, containing="out.writing"):
            convert(made, str(out), workers=1, work=work, progress=False)
        assert not out.exists()
        convert(made, str(out), workers=1, work=work, progress=False)
        assert not os.listdir(work)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"]
    run(made, tmp_path / "here")
    assert shards(out) == shards(tmp_path / "here")


# ---- bad input ----

BAD_LINES = {
    "invalid JSON": b'{"text": "half a docu\n',
    "invalid UTF-8": b'{"text": "\xff\xfe is not UTF-8, and the line is long enough"}\n',
    "invalid UTF-8 (surrogate)": b'{"text": "half a pair \\ud83d of surrogates"}\n',
    "empty text": b'{"text": " \\n", "meta": {}}\n',
    "no text": b'{"content": "under another name"}\n',
    "no text (number)": b'{"text": 3}\n',
    "no text (list)": b"[1, 2]\n",
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_line(tmp_path: Path, tokenizer: str, kind: str) -> None:
    texts = english(100_000)
    lines = jsonl(texts).splitlines(keepends=True)
    lines.insert(200, BAD_LINES[kind])
    source = tmp_path / "a.jsonl"
    source.write_bytes(b"".join(lines))
    with pytest.raises(DataError, match=rf"a\.jsonl, line 201: {kind.partition(' (')[0]}"):
        run(plan(source, tokenizer), tmp_path / "stopped")
    assert not (tmp_path / "stopped").exists()
    manifest = run(plan(source, tokenizer, on_error="skip"), tmp_path / "out")
    (problem,) = manifest["problems"]["first"]
    assert (problem["line"], problem["path"]) == (201, str(source))
    assert manifest["problems"]["counts"] == {kind.partition(" (")[0]: 1}
    assert manifest["streams"][""]["splits"]["train"]["documents"] == len(texts)


@pytest.mark.parametrize("suffix", ["zst", "gz"])
@pytest.mark.parametrize("damage", ["truncated", "corrupt"])
def test_damaged_file(tmp_path: Path, tokenizer: str, suffix: str, damage: str) -> None:
    data = jsonl([f"{i} {text}" for i, text in enumerate(english() * 2)])
    packed = (
        zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1})
        if suffix == "zst"
        else gzip.compress(data)
    )
    half = 2 * len(packed) // 3
    packed = packed[:half] if damage == "truncated" else packed[:half] + b"\0" * 64 + packed[half + 64 :]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / f"a.jsonl.{suffix}").write_bytes(packed)
    (tmp_path / "in" / "b.jsonl").write_bytes(jsonl(english(60_000)))
    # gzip has its checksum at the end: what was changed before may be met first, as a broken line.
    kinds = f"({damage} file{'|invalid JSON|invalid UTF-8' if (damage, suffix) == ('corrupt', 'gz') else ''})"
    with pytest.raises(DataError, match=rf"a\.jsonl\.{suffix}, line \d+: {kinds}"):
        run(plan(tmp_path / "in", tokenizer), tmp_path / "stopped")
    manifest = run(plan(tmp_path / "in", tokenizer, on_error="skip", shuffle_seed=None), tmp_path / "out")
    counts = manifest["streams"][""]["splits"]["train"]
    (problem,) = [p for p in manifest["problems"]["first"] if p["kind"] == f"{damage} file"]
    broken = sum(manifest["problems"]["counts"].values()) - 1
    # All whole lines before the damage are there, and the next file.
    assert counts["documents"] == problem["line"] - 1 - broken + len(english(60_000))
    assert suffix == "gz" or damage == "corrupt" or problem["line"] > 100


def test_damaged_parquet(tmp_path: Path, tokenizer: str) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = [f"{i} {text}" for i, text in enumerate(english() * 2)]
    raw = [text.encode() for text in texts]
    raw[700] = b"\xff\xfe is not UTF-8"
    binary = pyarrow.array(raw, pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), len(raw), binary.buffers())
    source = tmp_path / "a.parquet"
    options: dict[str, Any] = {"row_group_size": 1024, "use_dictionary": False, "compression": "gzip"}
    pyarrow.parquet.write_table(pyarrow.table({"body": column}), source, **options)
    with pytest.raises(DataError, match=r"a\.parquet has no column 'text': --text-key must be one of body\."):
        run(plan(source, tokenizer), tmp_path / "nothing")
    made = plan(source, tokenizer, text_key="body", on_error="skip", shuffle_seed=None)
    with pytest.raises(DataError, match=r"a\.parquet, line 701: invalid UTF-8"):
        run(dataclasses.replace(made, on_error="stop"), tmp_path / "stopped")
    manifest = run(made, tmp_path / "out")
    assert manifest["problems"]["counts"] == {"invalid UTF-8": 1}
    assert manifest["streams"][""]["splits"]["train"]["documents"] == len(texts) - 1
    shutil.rmtree(tmp_path / "out")
    pyarrow.parquet.write_table(pyarrow.table({"body": texts}), source, **options)
    place = pyarrow.parquet.ParquetFile(source).metadata.row_group(1).column(0).data_page_offset
    content = bytearray(source.read_bytes())
    content[place + 200 : place + 400] = bytes(200)
    source.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet, line 1025: corrupt file"):
        run(dataclasses.replace(made, on_error="stop"), tmp_path / "stopped again")
    manifest = run(made, tmp_path / "out")
    assert manifest["problems"]["counts"] == {"corrupt file": 1}
    assert manifest["streams"][""]["splits"]["train"]["documents"] == 1024
    assert run(made, tmp_path / "out") == manifest


def test_errors_before_any_work(tmp_path: Path, tokenizer: str) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(jsonl(english(60_000)))
    for inputs, message in (
        (tmp_path / "none.jsonl", "No such file or folder"),
        (tmp_path / "empty", "Nothing to read"),
        (tmp_path / "a.txt", "Cannot read .*ends in .jsonl"),
        ("nosuch://bucket/a.jsonl", "Expected a file, folder or URL"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        (tmp_path / "a.txt").write_text("x")
        with pytest.raises(DataError, match=message):
            run(plan(inputs, tokenizer), tmp_path / "out")
    with pytest.raises(DataError, match=r"line \d+: no text: .*a string under 'body', got one with text, meta"):
        run(plan(source, tokenizer, text_key="body"), tmp_path / "stopped")
    with pytest.raises(DataError, match="workers must be at least 1, got -1"):
        run(plan(source, tokenizer), tmp_path / "out", workers=-1)
    with pytest.raises(DataError, match="No tokenizer at"):
        run(plan(source, str(tmp_path / "empty")), tmp_path / "out")
    with pytest.raises(DataError, match="must be one token of .*got '<eos>'"):
        run(plan(source, tokenizer, eos="<eos>"), tmp_path / "out")
    with pytest.raises(DataError, match="Named more than once"):
        run(Plan((str(source), str(source)), tokenizer, 64), tmp_path / "out")
    for changes, message in (
        ({"sequence_length": 0}, "sequence_length must be at least 1, got 0"),
        ({"validation": 1.0}, r"validation must be a share in \[0, 1\), such as .* got 1\.0"),
        ({"on_error": "warn"}, "on_error must be stop or skip, got 'warn'"),
    ):
        with pytest.raises(DataError, match=message):
            plan(source, tokenizer, **changes)
    with pytest.raises(DataError, match="less than one sequence of 1000000"):
        run(plan(source, tokenizer, sequence_length=1_000_000), tmp_path / "out")

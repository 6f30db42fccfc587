"""Documents to shards: what is written, that nothing is lost, repeated or half there, and what bad input says."""

import gzip
import json
import os
import pydoc_data.topics
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from streaming import StreamingDataset
from streaming.base.util import clean_stale_shared_memory
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from let_composer import pile
from let_composer.pile import PileError, Plan, check_manifest, convert, streams_block, tokenizer_fingerprint

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
    manifest = run(plan(tmp_path / "a.jsonl", tokenizer, shuffle_seed=None), tmp_path / "out")
    rows = samples(tmp_path / "out" / "train")
    assert all(row.dtype == np.uint16 and row.shape == (LENGTH,) for row in rows)
    hf = AutoTokenizer.from_pretrained(tokenizer)
    expected = [i for text in texts for i in [*hf(text)["input_ids"], hf.eos_token_id]]
    assert np.concatenate(rows).tolist() == expected[: len(expected) // LENGTH * LENGTH]
    counts = manifest["streams"][""]["splits"]["train"]
    assert counts["tokens_left_over"] == len(expected) % LENGTH
    assert (counts["documents"], counts["tokens"]) == (len(texts), len(rows) * LENGTH)
    assert len(list((tmp_path / "out" / "train").glob("[0-9]*"))) > 5, "meant to fill several shards"


def test_shuffle_is_a_permutation_that_mixes_the_files(tmp_path: Path, tokenizer: str) -> None:
    texts = english()
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(jsonl(["first " + t for t in texts]))
    (folder / "b.jsonl").write_bytes(jsonl(["second " + t for t in texts]))
    run(plan(folder, tokenizer, shuffle_seed=None), tmp_path / "plain")
    run(plan(folder, tokenizer), tmp_path / "shuffled")
    plain, shuffled = samples(tmp_path / "plain" / "train"), samples(tmp_path / "shuffled" / "train")
    assert sorted(map(bytes, plain)) == sorted(map(bytes, shuffled))
    places = {bytes(row): place for place, row in enumerate(plain)}
    where = np.array([places[bytes(row)] for row in shuffled])
    half = len(where) // 2
    assert 0.4 < (where[:half] < half).mean() < 0.6


def test_every_format_gives_the_same_shards(tmp_path: Path, tokenizer: str) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = english(150_000)
    data = jsonl(texts)
    whole, half = zstandard.ZstdCompressor().compress, data.index(b"\n", len(data) // 2) + 1
    files = {
        "a.jsonl": data,
        "b.jsonl.zst": whole(data),
        "frames.jsonl.zst": whole(data[:half]) + whole(data[half:]),
        "c.jsonl.gz": gzip.compress(data),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    rows = [json.loads(line) for line in data.splitlines()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet", row_group_size=50)
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "train.jsonl").write_bytes(data)
    found = {}
    for name in [*files, "d.parquet", f"hf:{hub}"]:
        source = name if name.startswith("hf:") else str(tmp_path / name)
        out = tmp_path / f"out-{len(found)}"
        run(plan(source, tokenizer), out)
        found[name] = {k: v for k, v in shards(out).items() if not k.endswith("manifest.json")}
    for name, content in found.items():
        assert content == found["a.jsonl"], name


def test_remote_input(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(english(60_000)))
    run(plan(f"file://{tmp_path}/*.jsonl", tokenizer), tmp_path / "url")
    run(plan(tmp_path, tokenizer), tmp_path / "local")
    assert samples(tmp_path / "url" / "train")[0].tolist() == samples(tmp_path / "local" / "train")[0].tolist()


def test_long_document_is_tokenized_as_a_whole(tmp_path: Path, tokenizer: str) -> None:
    text = "\n\n".join(english(400_000))
    text = text * (3 * pile.STRETCH // len(text) + 1)
    no_space = "ab" * (pile.STRETCH // 2 + 1000)
    texts = [text, no_space, "a short one"]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    run(plan(tmp_path / "a.jsonl", tokenizer, shuffle_seed=None, shard_bytes=1 << 22), tmp_path / "out", 1)
    stream = np.concatenate(samples(tmp_path / "out" / "train"))
    hf = AutoTokenizer.from_pretrained(tokenizer)
    expected = [i for text in texts for i in [*hf(text)["input_ids"], hf.eos_token_id]]
    assert stream.tolist() == expected[: len(stream)] and len(expected) - len(stream) < LENGTH


def test_document_cannot_end_itself(tmp_path: Path, tokenizer: str) -> None:
    texts = [f"The token {EOS} ends a document. Number {i}." for i in range(200)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    run(plan(tmp_path / "a.jsonl", tokenizer, shuffle_seed=None), tmp_path / "out")
    read = documents(np.concatenate(samples(tmp_path / "out" / "train")), tokenizer)
    assert read == texts[: len(read)] and len(read) > 190


def test_validation_holds_out_by_text(tmp_path: Path, tokenizer: str) -> None:
    texts = sorted({text.strip() for text in english()})
    (tmp_path / "in").mkdir()
    # The same texts again in another file and order: a copy must not land on the other side.
    (tmp_path / "in" / "a.jsonl").write_bytes(jsonl(texts))
    (tmp_path / "in" / "b.jsonl").write_bytes(jsonl(texts[::-1]))
    run(plan(tmp_path / "in", tokenizer, validation=0.2, shuffle_seed=None), tmp_path / "out")
    sides = [
        documents(np.concatenate(samples(tmp_path / "out" / split)), tokenizer) for split in ("train", "validation")
    ]
    assert not set(sides[0]) & set(sides[1])
    assert 0.15 < len(sides[1]) / (2 * len(texts)) < 0.25
    assert len(sides[0]) + len(sides[1]) >= 2 * len(texts) - 20


def test_by_subset(tmp_path: Path, tokenizer: str) -> None:
    names = ["Pile-CC", "Wikipedia (en)", "Github"]
    texts = [f"{i % 3} {text}" for i, text in enumerate(english())]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts, lambda i: names[i % 3]))
    manifest = run(plan(tmp_path / "a.jsonl", tokenizer, by_subset=True, shuffle_seed=None), tmp_path / "out")
    assert set(manifest["streams"]) == set(names)
    for i, name in enumerate(names):
        about = manifest["streams"][name]
        read = documents(np.concatenate(samples(tmp_path / "out" / about["folder"] / "train")), tokenizer)
        mine = [text for text in texts if text.startswith(f"{i} ")]
        assert read == mine[: len(read)] and len(read) > 0.98 * len(mine)
        assert about["splits"]["train"]["documents"] == len(mine)


def test_streams_block_is_what_streaming_samples(tmp_path: Path, tokenizer: str) -> None:
    from omegaconf import OmegaConf
    from streaming import Stream

    names = ["Pile-CC", "ArXiv"]
    (tmp_path / "a.jsonl").write_bytes(jsonl(english(), lambda i: names[i % 10 == 0]))
    manifest = run(plan(tmp_path / "a.jsonl", tokenizer, by_subset=True), tmp_path / "out")
    block: Any = OmegaConf.to_container(OmegaConf.load(tmp_path / "out" / "streams.yaml"))
    total = pile.PILE_WEIGHTS["Pile-CC"] + pile.PILE_WEIGHTS["ArXiv"]
    for name, key in zip(names, ("pile-cc", "arxiv"), strict=True):
        assert block["streams"][key]["proportion"] == pytest.approx(pile.PILE_WEIGHTS[name] / total, rel=1e-4)
    own: Any = OmegaConf.create(streams_block(manifest, str(tmp_path / "out"), {"Pile-CC": 1, "ArXiv": 3}))
    clean_stale_shared_memory()
    data = StreamingDataset(streams=[Stream(**s) for s in own["streams"].values()], batch_size=1, epoch_size=400)
    per_stream = dict(zip(own["streams"], (s.choose for s in data.streams), strict=True))
    assert per_stream == {"arxiv": 300, "pile-cc": 100}
    remote: Any = OmegaConf.create(f"variables: {{cache: /disk}}\n{streams_block(manifest, 's3://bucket/pile')}")
    assert remote["streams"]["arxiv"]["local"] == "/disk/arxiv"
    assert remote["streams"]["arxiv"]["remote"] == "s3://bucket/pile/arxiv"
    with pytest.raises(PileError, match="No proportion for ArXiv"):
        streams_block(manifest, "out", {"Pile-CC": 1})
    assert sum(pile.PILE_WEIGHTS.values()) == pytest.approx(100)


def test_wide_vocabulary_takes_wider_integers(tmp_path: Path) -> None:
    words = [EOS, *(f"w{i}" for i in range(70_000))]
    model: Any = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=EOS))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=model, eos_token=EOS).save_pretrained(tmp_path / "t")
    (tmp_path / "a.jsonl").write_bytes(
        jsonl([" ".join(f"w{i * 9}" for i in range(start, start + 90)) for start in range(7600)][::70])
    )
    run(plan(tmp_path / "a.jsonl", str(tmp_path / "t"), shuffle_seed=None), tmp_path / "out")
    rows = samples(tmp_path / "out" / "train")
    assert rows[0].dtype == np.int32
    assert rows[0][:3].tolist() == [1, 10, 19] and max(int(row.max()) for row in rows) > 1 << 16


# ---- the same bytes, come what may ----


def test_workers_do_not_change_the_bytes(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(english()))
    for workers in (1, 3):
        # Once by a worker, once in the parent.
        monkeypatch.setattr(pile, "WRITTEN_ALONE", 0 if workers == 1 else 1 << 30)
        run(plan(tmp_path / "a.jsonl", tokenizer, validation=0.1), tmp_path / f"out-{workers}", workers)
    assert shards(tmp_path / "out-1") == shards(tmp_path / "out-3")


PROGRAM = """
import resource, sys
if len(sys.argv) > 4:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), int(sys.argv[4])))
from let_composer.pile import PileError, Plan, convert
source, tokenizer, out = sys.argv[1:4]
try:
    plan = Plan((source,), tokenizer, 64, validation=0.1, piece_bytes=40_000, shard_bytes=20_000)
    convert(plan, out, workers=2, progress=False)
except PileError as error:
    sys.exit(f"PileError: {error}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_run_again(tmp_path: Path, tokenizer: str, stop: signal.Signals) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_bytes(jsonl(english() * 4))
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(source), tokenizer, str(out)],
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    tokens = tmp_path / "out.partial" / "tokens"
    deadline = time.monotonic() + 300
    try:
        while len(list(tokens.glob("*-*.json"))) < 5:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        if stop == signal.SIGINT:
            os.killpg(process.pid, stop)
            process.wait(60)
    finally:
        process.kill()
        process.communicate()
    assert not out.exists()
    assert len(list(tokens.glob("*-*.json"))) < 40, "meant to be stopped in the middle"
    # A file of a write that was cut off, and what a shard's would be: neither may be taken for a finished one.
    (tokens / "00000-0000039.bin.123").write_bytes(b"half")
    again = plan(source, tokenizer, validation=0.1)
    run(again, out)
    run(again, tmp_path / "unbroken")
    assert shards(out) == shards(tmp_path / "unbroken")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_full_disk_stops_cleanly(tmp_path: Path, tokenizer: str) -> None:
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    source.write_bytes(jsonl(english() + ["word " * 40_000]))
    command = [sys.executable, "-c", PROGRAM, str(source), tokenizer, str(out), "60000"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "PileError: No room to write" in done.stderr and "call again" in done.stderr
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
    with pytest.raises(PileError, match=r"made otherwise \(sequence_length: 64 there, 32 wanted\)"):
        run(plan(tmp_path / "a.jsonl", tokenizer, sequence_length=32), tmp_path / "out")


def test_foreign_folder_is_left_alone(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(english(60_000)))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    with pytest.raises(PileError, match="holds something else"):
        run(plan(tmp_path / "a.jsonl", tokenizer), tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"


def test_other_unfinished_work_is_refused(tmp_path: Path, tokenizer: str) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(jsonl(english(60_000)) + b"broken\n")
    with pytest.raises(PileError, match="invalid JSON"):
        run(plan(source, tokenizer), tmp_path / "out")
    with pytest.raises(PileError, match=r"unfinished work of a call with other arguments.*rm -r"):
        run(plan(source, tokenizer, on_error="skip"), tmp_path / "out")
    source.write_bytes(jsonl(english(60_000)))
    with pytest.raises(PileError, match=r"other modified, sources"):
        run(plan(source, tokenizer), tmp_path / "out")


def test_two_processes_at_once(tmp_path: Path, tokenizer: str) -> None:
    import fcntl

    (tmp_path / "a.jsonl").write_bytes(jsonl(english(60_000)))
    (tmp_path / "out.partial").mkdir()
    with (tmp_path / "out.partial" / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(PileError, match="Another process is at work"):
            run(plan(tmp_path / "a.jsonl", tokenizer), tmp_path / "out")


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
    with pytest.raises(PileError, match=rf"a\.jsonl, line 201: {kind.partition(' (')[0]}"):
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
    packed = zstandard.ZstdCompressor(write_checksum=True).compress(data) if suffix == "zst" else gzip.compress(data)
    half = 2 * len(packed) // 3
    packed = packed[:half] if damage == "truncated" else packed[:half] + b"\0" * 64 + packed[half + 64 :]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / f"a.jsonl.{suffix}").write_bytes(packed)
    (tmp_path / "in" / "b.jsonl").write_bytes(jsonl(english(60_000)))
    # gzip has its checksum at the end: what was changed before may be met first, as a broken line.
    kinds = f"({damage} file{'|invalid JSON|invalid UTF-8' if (damage, suffix) == ('corrupt', 'gz') else ''})"
    with pytest.raises(PileError, match=rf"a\.jsonl\.{suffix}, line \d+: {kinds}"):
        run(plan(tmp_path / "in", tokenizer), tmp_path / "stopped")
    manifest = run(plan(tmp_path / "in", tokenizer, on_error="skip", shuffle_seed=None), tmp_path / "out")
    counts = manifest["streams"][""]["splits"]["train"]
    problem = manifest["problems"]["first"][0]
    broken = sum(manifest["problems"]["counts"].values()) - 1
    # All whole lines before the damage are there, and the next file.
    assert problem["kind"] == f"{damage} file"
    assert counts["documents"] == problem["line"] - 1 - broken + len(english(60_000))
    assert suffix == "gz" or damage == "corrupt" or problem["line"] > 100


def test_a_store_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(PileError, match=r"Reading s3://bucket/a\.jsonl needs a package .* pip install s3fs"):
        pile.list_sources(["s3://bucket/a.jsonl"])


def test_errors_before_any_work(tmp_path: Path, tokenizer: str) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(jsonl(english(60_000)))
    for inputs, message in (
        (tmp_path / "none.jsonl", "No such file or folder"),
        (tmp_path / "empty", "Nothing to read"),
        (tmp_path / "a.txt", "Cannot read .*ends in .jsonl"),
        ("nosuch://bucket/a.jsonl", "Expected a file, folder, URL"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        (tmp_path / "a.txt").write_text("x")
        with pytest.raises(PileError, match=message):
            run(plan(inputs, tokenizer), tmp_path / "out")
    with pytest.raises(PileError, match="No tokenizer at"):
        run(plan(source, str(tmp_path / "empty")), tmp_path / "out")
    with pytest.raises(PileError, match="must be one token of .*got '<eos>'"):
        run(plan(source, tokenizer, eos="<eos>"), tmp_path / "out")
    with pytest.raises(PileError, match="Named more than once"):
        run(Plan((str(source), str(source)), tokenizer, 64), tmp_path / "out")
    for changes, message in (
        ({"sequence_length": 0}, "sequence_length must be at least 1, got 0"),
        ({"validation": 1.0}, r"validation must be a share in \[0, 1\), got 1.0"),
        ({"on_error": "warn"}, "on_error must be stop or skip, got 'warn'"),
    ):
        with pytest.raises(PileError, match=message):
            plan(source, tokenizer, **changes)
    with pytest.raises(PileError, match="less than one sequence of 1000000"):
        run(plan(source, tokenizer, sequence_length=1_000_000), tmp_path / "out")


# ---- fingerprint and manifest ----


def test_fingerprint_is_of_the_table(tmp_path: Path, tokenizer: str) -> None:
    hf = AutoTokenizer.from_pretrained(tokenizer)
    fingerprint = tokenizer_fingerprint(hf)
    hf.save_pretrained(tmp_path / "copy")
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path / "copy")) == fingerprint
    table = json.loads((tmp_path / "copy" / "tokenizer.json").read_text())
    vocab = table["model"]["vocab"]
    a, b = "Ġthe", "Ġof"
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (tmp_path / "copy" / "tokenizer.json").write_text(json.dumps(table))
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path / "copy")) != fingerprint


def test_manifest_is_checked(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(english(60_000)))
    out = tmp_path / "out"
    run(plan(tmp_path / "a.jsonl", tokenizer), out)
    hf = AutoTokenizer.from_pretrained(tokenizer)
    check_manifest(str(out / "train"), hf, LENGTH)
    check_manifest(str(out), hf, LENGTH)
    with pytest.raises(ValueError, match="sequences of 64 tokens, but max_seq_len is 128"):
        check_manifest(str(out / "train"), hf, 128)
    other = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path / "other", 600))
    with pytest.raises(ValueError, match=r"\(700 tokens, sha256:.*\(600 tokens, sha256:"):
        check_manifest(str(out / "train"), other, LENGTH)
    (out / "train" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="max_seq_len is 128"):
        check_manifest(str(out / "train"), hf, 128)
    (out / "manifest.json").unlink()
    check_manifest(str(out / "train"), other, 128)


def test_manifest_check_is_quick_and_imports_little(tmp_path: Path, tokenizer: str) -> None:
    program = (
        "import sys, let_composer.pile; "
        "print([m for m in ('streaming', 'llmfoundry', 'transformers', 'composer') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    words = {f"token-{i}": i for i in range(50_000)}
    large = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="token-0")))
    times = []
    for _ in range(5):
        started = time.process_time()
        tokenizer_fingerprint(large)
        times.append(time.process_time() - started)
    assert min(times) < 0.25

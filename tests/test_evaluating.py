"""In-context scores of Composer checkpoints and Hugging Face folders, against scores counted by hand."""

import json
import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from conftest import LENGTH, VOCABULARY, load_tokenizer
from test_ranks import one_rank, resumable
from transformers import AutoModelForCausalLM

from let_composer import LET
from let_composer import evaluating as script
from let_composer.cli import main

KINDS = {"choices": "multiple_choice", "schema": "schema", "words": "language_modeling"}
WORDS = VOCABULARY - 2


def sentence(rng: random.Random, length: int) -> str:
    return " ".join(f"w{rng.randrange(WORDS)}" for _ in range(length))


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


def by_hand(model: Any, items: dict[str, list[dict[str, Any]]]) -> dict[tuple[str, str], float]:
    """Zero-shot shares of right answers: the likeliest choice, or every token the likeliest; nothing is padded."""

    @torch.no_grad()
    def likelihood(before: str, after: str) -> tuple[float, bool]:
        context, target = ids(before), torch.tensor(ids(after))
        row = torch.tensor([[*context, *target.tolist()]])
        logits = model.eval()(input_ids=row).logits[0, len(context) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
        return -float(loss), bool((logits.argmax(-1) == target).all())

    def right(item: dict[str, Any], norm: bool) -> bool:
        if "context" in item:
            return likelihood(item["context"], item["continuation"])[1]
        if "query" in item:
            scores = [likelihood(item["query"], c)[0] / (len(c) if norm else 1) for c in item["choices"]]
        else:
            scores = [likelihood(option, item["continuation"])[0] for option in item["context_options"]]
        return scores.index(max(scores)) == item["gold"]

    kinds = [*((task, "acc") for task in items), ("choices", "acc_norm")]
    return {(t, m): sum(right(item, m == "acc_norm") for item in items[t]) / len(items[t]) for t, m in kinds}


def write(folder: Path, items: dict[str, list[dict[str, Any]]]) -> str:
    """The files as they are prepared for llm-foundry; returns the path of their list."""
    tasks = []
    for task, rows in items.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        tasks.append({"label": task, "dataset_uri": f"{folder}/{task}.jsonl", "icl_task_type": KINDS[task]})
    (folder / "tasks.yaml").write_text(yaml.safe_dump({"icl_tasks": tasks}))
    return str(folder / "tasks.yaml")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # datasets' and lm-eval's own; what is tested is the scores
def test_the_command_finds_the_scores_counted_by_hand(tmp_path, items, train, tokenizer, teacher_folder, capsys):
    checkpoints, exported, out = tmp_path / "checkpoints", tmp_path / "exported", tmp_path / "out" / "scores"
    run = train(LET(teacher_folder, student_layer=1, weight=0.1), save_folder=str(checkpoints), save_interval="6ba")
    student = run.state.model.model
    student.save_pretrained(exported)
    tokenizer.save_pretrained(exported)
    models = {teacher_folder: AutoModelForCausalLM.from_pretrained(teacher_folder)}
    models |= {str(checkpoints / "latest-rank0.pt"): student, str(exported): student}
    path = write(tmp_path, items)
    arguments = ["--tasks", path, "--limit", "10", "--shots", "0", "--out", str(out)]
    assert main(["eval", *models, *arguments]) == 0
    assert [p.name for p in out.parent.iterdir()] == ["scores.json"]
    written = pd.read_json(f"{out}.json").set_index(["model", "task", "metric"])
    for name, model in models.items():
        expected = by_hand(model, {task: rows[:10] for task, rows in items.items()})
        assert written.score[name].to_dict() == pytest.approx(expected)
        assert name != teacher_folder or 0 < min(expected.values()) < max(expected.values()) < 1
    run.close()
    first = written.loc[teacher_folder]
    assert set(first["items"]) == {10}
    assert first.chance[:, "acc"][list(KINDS)].tolist() == pytest.approx([(1 / 4 + 1 / 3 + 1 / 5) / 3, 1 / 2, 0])
    score = first.score["choices", "acc"]
    assert first.error["choices", "acc"] == pytest.approx((score * (1 - score) / 10) ** 0.5)
    assert f"{100 * score:.1f} ±" in capsys.readouterr().out
    perplexity = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
    tasks = [{**task, "metric_list": [perplexity]} for task in script.local_tasks(path)[0] if task["task"] == "words"]
    assert script.score(teacher_folder, tasks, num_fewshot=0).empty
    assert "words has neither acc nor acc_norm" in capsys.readouterr().out


@pytest.mark.slow
def test_a_sharded_checkpoint_is_the_same_model(tmp_path, teacher_folder):
    with one_rank():
        for kind, save in (("sharded", "sharded"), (None, "whole")):
            resumable(load_tokenizer(teacher_folder), None, tmp_path, fsdp=kind, save=save, max_duration="3ba")
    assert list((tmp_path / "sharded" / "ep0-ba3").glob("*.distcp"))
    sharded, whole = (script.open_model(str(tmp_path / name)) for name in ("sharded/ep0-ba3", "whole/ep0-ba3-rank0.pt"))
    torch.testing.assert_close(sharded[0].state_dict(), whole[0].state_dict())
    assert sharded[1].get_vocab() == whole[1].get_vocab()
    assert sharded[0].config.max_seq_len == whole[0].config.max_seq_len == LENGTH


def test_what_is_missing_is_explained(tmp_path, items, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, items)
    (tmp_path / "run" / "ep0-ba6").mkdir(parents=True)
    (tmp_path / "run" / "ep0-ba6" / ".metadata").touch()
    for model, message in (
        ("./nowhere", "neither config.json nor .metadata. Sharded checkpoints in it: none"),
        (path, "is not a Composer checkpoint"),
        ("./run", "Sharded checkpoints in it: ep0-ba6"),
        ("run/ep0-ba6", "is not a Composer checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            script.open_model(model)
    with pytest.raises(ValueError, match="lm-eval has no 'hellaswagg' .did you mean 'hellaswag"):
        script.score("x", ["hellaswagg"])
    assert main(["eval", "x", "--tasks", "hellaswag", path]) == 1
    assert f"expected --tasks to be one YAML or names, got hellaswag {path}" in capsys.readouterr().err
    (tmp_path / "schema.jsonl").unlink()
    with pytest.raises(OSError, match="No such file or directory: .*schema.jsonl"):
        script.local_tasks(path)

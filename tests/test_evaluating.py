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
from sample_data.__main__ import EVALS
from test_ranks import one_rank, resumable
from transformers import AutoModelForCausalLM

from let_composer import LET
from let_composer import evaluating as script
from let_composer.cli import main

WORDS = VOCABULARY - 2
Questions = dict[str, list[tuple[dict[str, Any], list[tuple[str, str]], int]]]


def ids(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


@pytest.fixture
def questions(teacher_folder) -> Questions:
    """Of three tasks: the document, what is asked of the model, and which answer is right; the number of answers
    differs, and the first question has not the most."""
    rng = random.Random(0)

    def sentence(length: int) -> str:
        return " ".join(f"w{rng.randrange(WORDS)}" for _ in range(length))

    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder).eval()
    found: Questions = {"piqa": [], "winogrande": [], "lambada": []}
    for number in range(12):
        query, answers, gold = (
            sentence(4),
            [sentence(rng.randint(1, 3)) for _ in range([4, 3, 5][number % 3])],
            rng.randrange(3),
        )
        doc = {"query": query, "choices": answers, "gold": gold}
        found["piqa"].append((doc, [(query, answer) for answer in answers], gold))
        before, first, second, after, gold = sentence(2), sentence(1), sentence(2), sentence(2), rng.randrange(2)
        doc = {"sentence": f"{before} _ {after}", "option1": first, "option2": second, "answer": str(1 + gold)}
        found["winogrande"].append((doc, [(f"{before} {option}", after) for option in (first, second)], gold))
        context = sentence(5)
        with torch.no_grad():
            likeliest = int(teacher(torch.tensor([ids(context)])).logits[0, -1, :WORDS].argmax())
        answer = f"w{likeliest if number % 2 else 0}"
        found["lambada"].append(({"query": context, "choices": [answer]}, [(context, answer)], 0))
    return found


def by_hand(model: Any, questions: Questions, limit: int) -> dict[tuple[str, str], float]:
    """Zero-shot shares of right answers: the likeliest choice, or every token the likeliest; nothing is padded."""

    @torch.no_grad()
    def likelihood(before: str, after: str) -> tuple[float, bool]:
        context, target = ids(before), torch.tensor(ids(after))
        row = torch.tensor([[*context, *target.tolist()]])
        logits = model.eval()(input_ids=row).logits[0, len(context) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
        return -float(loss), bool((logits.argmax(-1) == target).all())

    def right(pairs: list[tuple[str, str]], gold: int, norm: bool) -> bool:
        if len(pairs) == 1:
            return likelihood(*pairs[0])[1]
        scores = [likelihood(before, after)[0] / (len(after) if norm else 1) for before, after in pairs]
        return scores.index(max(scores)) == gold

    kinds = [*((task, "acc") for task in questions), ("piqa", "acc_norm")]
    return {
        (task, metric): sum(right(*asked, metric == "acc_norm") for _, *asked in questions[task][:limit]) / limit
        for task, metric in kinds
    }


def write(folder: Path, questions: Questions) -> list[str]:
    """The documents and the YAMLs, read as sample data's are."""
    for task, asked in questions.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc, *_ in asked))
        files = {"data_files": {"test": f"{folder}/{task}.jsonl"}}
        config = {"task": task, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", **EVALS[task][1]}
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(config))
    return [f"{folder}/{task}.yaml" for task in questions]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # datasets' and lm-eval's own; what is tested is the scores
def test_the_command_finds_the_scores_counted_by_hand(tmp_path, questions, train, tokenizer, teacher_folder, capsys):
    checkpoints, exported, out = tmp_path / "checkpoints", tmp_path / "exported", tmp_path / "out" / "scores"
    run = train(LET(teacher_folder, student_layer=1, weight=0.1), save_folder=str(checkpoints), save_interval="6ba")
    student = run.state.model.model
    student.save_pretrained(exported)
    tokenizer.save_pretrained(exported)
    models = {teacher_folder: AutoModelForCausalLM.from_pretrained(teacher_folder)}
    models |= {str(checkpoints / "latest-rank0.pt"): student, str(exported): student}
    files = write(tmp_path, questions)
    assert main(["eval", *models, "--tasks", *files, "--limit", "10", "--shots", "0", "--out", str(out)]) == 0
    assert [p.name for p in out.parent.iterdir()] == ["scores.json"]
    written = pd.read_json(f"{out}.json").set_index(["model", "task", "metric"])
    for name, model in models.items():
        expected = by_hand(model, questions, 10)
        assert written.score[name].to_dict() == pytest.approx(expected)
        assert name != teacher_folder or 0 < min(expected.values()) < max(expected.values()) < 1
    run.close()
    first = written.loc[teacher_folder]
    assert set(first["items"]) == {10}
    chances = [sum(1 / len(pairs) for _, pairs, _ in questions["piqa"][:10]) / 10, 1 / 2, 0]
    assert first.chance[:, "acc"][list(questions)].tolist() == pytest.approx(chances)
    score = first.score["piqa", "acc"]
    assert first.error["piqa", "acc"] == pytest.approx((score * (1 - score) / 10) ** 0.5)
    assert f"{100 * score:.1f} ±" in capsys.readouterr().out
    with open(files[-1], "a") as file:
        file.write("metric_list: [{metric: perplexity}]")
    assert script.score(teacher_folder, files[-1:], num_fewshot=0).empty
    assert "lambada has neither acc nor acc_norm" in capsys.readouterr().out


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


def test_what_is_missing_is_explained(tmp_path, questions, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second, third = write(tmp_path, questions)
    (tmp_path / "run" / "ep0-ba6").mkdir(parents=True)
    (tmp_path / "run" / "ep0-ba6" / ".metadata").touch()
    for model, message in (
        ("./nowhere", "neither config.json nor .metadata. Sharded checkpoints in it: none"),
        (first, "is not a Composer checkpoint"),
        ("./run", "Sharded checkpoints in it: ep0-ba6"),
        ("run/ep0-ba6", "is not a Composer checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            script.open_model(model)
    Path(first).write_text("icl_tasks: []")
    Path(second).write_text("task: {")
    for task, message in (
        ("hellaswagg", "no such file, and lm-eval has no 'hellaswagg' .did you mean 'hellaswag"),
        (first, f"lm-eval cannot read {first}: .*icl_tasks"),
        (second, f"lm-eval cannot read {second}: "),
    ):
        with pytest.raises(ValueError, match=message):
            script.score("x", [task])
    Path("lambada.jsonl").unlink()
    with pytest.raises(OSError, match="lambada.jsonl"):
        script.score("x", [third])

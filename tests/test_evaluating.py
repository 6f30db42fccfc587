"""In-context scores of Composer checkpoints and Hugging Face folders, against scores counted by hand."""

import random
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import LENGTH, VOCABULARY, load_tokenizer
from test_ranks import one_rank, resumable
from test_sample_data import evaluation_files
from transformers import AutoModelForCausalLM

from let_composer import LET
from let_composer import evaluating as script
from let_composer.cli import main

WORDS = VOCABULARY - 2
Docs = dict[str, list[dict[str, Any]]]


def ids(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


@pytest.fixture
def docs(teacher_folder) -> Docs:
    """Of two tasks: one with three to five choices, and one of words, of which the teacher knows every second."""
    rng = random.Random(0)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder).eval()
    found: Docs = {"piqa": [], "lambada": []}

    def sentence(length: int) -> str:
        return " ".join(f"w{rng.randrange(WORDS)}" for _ in range(length))

    for number in range(48):
        choices = [sentence(rng.randint(1, 3)) for _ in range([4, 3, 5][number % 3])]
        found["piqa"].append({"query": sentence(4), "choices": choices, "gold": rng.randrange(3)})
        query = sentence(5)
        word = int(teacher(torch.tensor([ids(query)])).logits[0, -1, :WORDS].argmax()) + number % 2
        found["lambada"].append({"query": query, "choices": [f"w{word % WORDS}"]})
    return found


@torch.no_grad()
def by_hand(model: Any, docs: list[dict[str, Any]]) -> list[float]:
    """Zero-shot shares of right answers, likeliest as they are and for their length; nothing is padded."""
    right = torch.zeros(2)
    for doc in docs:
        context, found = ids(doc["query"]), []
        for choice in doc["choices"]:
            logits = model.eval()(torch.tensor([context + ids(choice)])).logits[0, len(context) - 1 : -1]
            found.append(-torch.nn.functional.cross_entropy(logits, torch.tensor(ids(choice)), reduction="sum"))
        scores, lengths = torch.tensor(found), torch.tensor([len(choice) for choice in doc["choices"]])
        right += torch.tensor([scores.argmax() == doc["gold"], (scores / lengths).argmax() == doc["gold"]])
    return (right / len(docs)).tolist()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # datasets' and lm-eval's own; what is tested is the scores
def test_the_command_finds_the_scores_counted_by_hand(
    tmp_path, monkeypatch, docs, train, tokenizer, teacher_folder, capsys
):
    run = train(LET(teacher_folder, student_layer=1, weight=0.1), save_folder=str(tmp_path / "run"))
    student, checkpoint, out = run.state.model.model, str(tmp_path / "run/latest-rank0.pt"), tmp_path / "out/scores"
    student.save_pretrained(tmp_path / "exported")
    tokenizer.save_pretrained(tmp_path / "exported")
    for name in (checkpoint, str(tmp_path / "exported")):
        torch.testing.assert_close(script.open_model(name)[0].state_dict(), student.state_dict())
    models, files = [teacher_folder, checkpoint], evaluation_files(tmp_path, monkeypatch, docs)
    assert main(["eval", *models, "--tasks", *files, "--limit", "40", "--shots", "0", "--out", str(out)]) == 0
    assert [p.name for p in out.parent.iterdir()] == ["scores.json"]
    written = pd.read_json(f"{out}.json").set_index(["model", "task", "metric"])
    for name, model in zip(models, (AutoModelForCausalLM.from_pretrained(teacher_folder), student), strict=True):
        assert written.score[name, "piqa"].tolist() == pytest.approx(by_hand(model, docs["piqa"][:40]))
    run.close()
    words, (score, norm) = written.loc[teacher_folder, "lambada", "acc"], written.score[teacher_folder, "piqa"]
    assert (words["items"], words.score, words.chance, words.error) == (40, 0.5, 0, pytest.approx((0.25 / 40) ** 0.5))
    chance = sum(1 / len(doc["choices"]) for doc in docs["piqa"][:40]) / 40
    assert written.chance[:, "piqa"].tolist() == pytest.approx([chance] * 4) and 0 < score != norm < 1
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


def test_what_is_missing_is_explained(tmp_path, docs, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = evaluation_files(tmp_path, monkeypatch, docs)
    Path("llm-foundry.yaml").write_text("icl_tasks: []")
    Path("broken.yaml").write_text("task: {")
    Path("eval/piqa.jsonl").unlink()
    Path("run/ep0-ba6").mkdir(parents=True)
    Path("run/ep0-ba6/.metadata").touch()
    for model, tasks, message in (
        ("./nowhere", [second], "neither config.json nor .metadata. Sharded checkpoints in it: none"),
        (first, [second], "is not a Composer checkpoint"),
        ("./run", [second], "Sharded checkpoints in it: ep0-ba6"),
        ("run/ep0-ba6", [second], "is not a Composer checkpoint"),
        ("x", [second, "hellaswagg"], "no such file, and lm-eval has no 'hellaswagg' .did you mean 'hellaswag"),
        ("x", ["llm-foundry.yaml"], "lm-eval cannot read llm-foundry.yaml: .*icl_tasks"),
        ("x", ["broken.yaml"], "lm-eval cannot read broken.yaml: "),
        ("x", [first], "piqa.jsonl"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            script.score(model, tasks)

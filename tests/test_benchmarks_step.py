"""The benchmark of steps at a size where it proves nothing but that it measures what it says."""

import json
from pathlib import Path

import pytest
import step as script  # scripts/benchmarks/step.py
import torch
from conftest import VOCABULARY, foundry_yaml
from llmfoundry.models.layers.blocks import MPTBlock

pytestmark = pytest.mark.filterwarnings("ignore:.*tokenizer was not provided")


@pytest.fixture
def run(tmp_path, teacher_folder) -> str:
    return foundry_yaml(tmp_path, algorithms={"let": {"teacher": teacher_folder}})


def test_three_kinds_of_steps_take_turns(run, tmp_path, capsys):
    script.main([run, "--rounds", "2", "--steps", "4", "--out", str(tmp_path / "steps")])
    written = json.loads((tmp_path / "steps.json").read_text())
    turns = (("guided", 0), ("after stop", 0), ("plain", 0), ("plain", 1), ("guided", 1), ("after stop", 1))
    found = [(step["kind"], step["round"]) for step in written["steps"] if step["seconds"] > 0]
    assert found == [turn for turn in turns for _ in range(2)]
    assert written["plan"]["teacher"]["flops"] > 0 and written["machine"]["torch"]
    assert "guided / plain:" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:FSDP is switching to use", "ignore:The `NO_SHARD` sharding strategy")
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_the_yaml_names_is_what_runs(run, monkeypatch, wrapped):
    """FSDP and recomputed blocks are built; ids fit both vocabularies; the teacher runs in guided steps alone."""
    calls: list[tuple[int, bool]] = []
    blocks: list[int] = []
    hidden, forward = script.LET._run_teacher, MPTBlock.forward

    def align(self, state):
        assert int(state.batch["input_ids"].max()) < VOCABULARY
        calls.append((state.timestamp.batch.value, state.fsdp_enabled))
        return hidden(self, state)

    def count(self, *args, **kwargs):
        blocks.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(torch.cuda, "current_device", torch.cuda.current_device)  # put back what measure() sets
    monkeypatch.setattr(script.LET, "_run_teacher", align)
    monkeypatch.setattr(MPTBlock, "forward", count)
    config = script.load(run, [f"model.vocab_size={2 * VOCABULARY}"])
    if wrapped:
        config.fsdp_config = {"activation_checkpointing": True, "activation_checkpointing_reentrant": False}
    found = list(script.measure(config, rounds=2, steps=3))
    assert len(found) == 2 and set(found[-1].microbatch) == {4}
    assert calls == [(batch, wrapped) for _ in range(2) for batch in (0, 0, 1, 1, 2, 2)]  # two microbatches a step
    assert len(blocks) == 2 * 3 * 3 * 2 * 4 * (2 if wrapped else 1)  # rounds, kinds, steps, microbatches, blocks


def test_a_model_of_the_hub(run, teacher_folder):
    hub = f"{{name: hf_causal_lm, pretrained_model_name_or_path: {teacher_folder}, pretrained: true}}"
    config = script.load(run, [f"tokenizer.name={teacher_folder}", "algorithms.let.student_layer=1"])
    config.model = script.om.create(hub)
    (found,) = script.measure(config, rounds=1, steps=3)
    assert list(found.kind) == ["guided", "after stop", "plain"]


def test_bad_input(run):
    with pytest.raises(ValueError, match="expected at least one round of more than 2 steps, got 5 of 2"):
        script.main([run, "--steps", "2"])
    with pytest.raises(ValueError, match="expected a YAML with algorithms.let"):
        script.main([str(Path(__file__).parents[1] / "yamls" / "quickstart" / "baseline.yaml")])

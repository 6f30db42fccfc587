"""The benchmark of steps at a size where it proves nothing but that it measures what it says."""

import json
from pathlib import Path

import benchmark_step as script  # scripts/benchmark_step.py
import pytest
from conftest import LENGTH, VOCABULARY

pytestmark = pytest.mark.filterwarnings("ignore:.*tokenizer was not provided")


@pytest.fixture
def run(tmp_path, teacher_folder) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(f"""
model:
  name: mpt_causal_lm
  d_model: 32
  n_heads: 2
  n_layers: 4
  max_seq_len: {LENGTH}
  vocab_size: {VOCABULARY}
  attn_config: {{attn_impl: torch}}
  loss_fn: torch_crossentropy
max_seq_len: {LENGTH}
optimizer: {{name: decoupled_adamw, lr: 1.0e-3}}
algorithms: {{let: {{teacher: {teacher_folder}}}}}
max_duration: 100ba
global_train_batch_size: 4
device_train_microbatch_size: 2
precision: fp32
""")
    return str(path)


def test_three_kinds_of_steps_take_turns(run, tmp_path, capsys):
    found = script.main([run, "--rounds", "2", "--steps", "4", "--out", str(tmp_path / "steps")])
    assert {kind: [len(part) for part in entry.seconds] for kind, entry in found.items()} == {
        "plain": [2, 2],
        "guided": [2, 2],
        "after stop": [2, 2],
    }
    written = json.loads((tmp_path / "steps.json").read_text())
    assert written["steps"]["guided"]["seconds"] == found["guided"].seconds
    assert written["plan"]["teacher"]["flops"] > 0 and written["machine"]["torch"]
    assert "guided / plain:" in capsys.readouterr().out


def test_the_teacher_runs_in_guided_steps_alone(run, monkeypatch):
    calls: list[int] = []
    hidden = script.LET._run_teacher

    def align(self, state):
        calls.append(state.timestamp.batch.value)
        return hidden(self, state)

    monkeypatch.setattr(script.LET, "_run_teacher", align)
    script.measure(script.load(run, []), rounds=1, steps=4)
    assert calls == [0, 0, 1, 1, 2, 2, 3, 3]  # two microbatches a step; none after the stop


def test_bad_input(run):
    with pytest.raises(ValueError, match="expected at least one round of more than 2 steps, got 5 of 2"):
        script.main([run, "--steps", "2"])
    with pytest.raises(ValueError, match="expected a YAML with algorithms.let"):
        script.main([str(Path(__file__).parents[1] / "yamls" / "quickstart" / "baseline.yaml")])

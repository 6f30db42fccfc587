"""The train script's short forms and overrides, and LET through llm-foundry's own configuration and data path."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import train as script  # scripts/train.py
from conftest import foundry_yaml
from llmfoundry.command_utils.train import train_from_yaml
from omegaconf import OmegaConf as om
from streaming import MDSWriter

from let_composer.configuration import load

ELSEWHERE = {"data": "nowhere", "tokenizer": "nowhere"}


def write(path: Path, algorithms: str) -> str:
    path.write_text(f"max_duration: 4ba\nalgorithms:{algorithms}\n")
    return str(path)


@pytest.mark.parametrize(
    ("algorithms", "expected"),
    [
        (" [let]", {"let": {}}),
        (" let", {"let": {}}),
        ("\n  let:", {"let": {}}),
        ("\n  let: {}", {"let": {}}),
        ("\n  let: {weight: 0.3}", {"let": {"weight": 0.3}}),
        (" [alibi: {max_sequence_length: 8}, let]", {"alibi": {"max_sequence_length": 8}, "let": {}}),
        ("\n- alibi:\n    max_sequence_length: 8\n- let:", {"alibi": {"max_sequence_length": 8}, "let": {}}),
        ("", {}),
    ],
)
def test_short_forms_and_overrides(tmp_path, algorithms, expected):
    path = write(tmp_path / "run.yaml", algorithms)
    assert om.to_container(load(path, []))["algorithms"] == expected
    overridden = om.to_container(load(path, ["algorithms.let.weight=0.05", "max_duration=2ba"]))
    assert overridden["max_duration"] == "2ba"
    assert overridden["algorithms"] == {**expected, "let": {**expected.get("let", {}), "weight": 0.05}}
    assert list(overridden["algorithms"]) == list({**expected, "let": {}})  # order is the order of execution


@pytest.mark.parametrize(
    "given", ["algorithms.let=null", "algorithms={let: null}", "algorithms=null", "algorithms=[]", "algorithms={}"]
)
def test_null_removes_on_the_command_line_and_in_a_second_yaml(tmp_path, given):
    path = write(tmp_path / "run.yaml", "\n  gradient_clipping: {clipping_type: norm}\n  let: {weight: 0.3}")
    second = tmp_path / "second.yaml"
    om.save(om.from_cli([given]), second)
    left = {"gradient_clipping": {"clipping_type": "norm"}} if "let" in given else {}
    assert load(path, [given]).algorithms == load(path, [str(second)]).algorithms == left
    assert load(path, [str(second), "algorithms=[let]"]).algorithms == {**left, "let": {}}


def test_a_yaml_with_a_base_is_a_difference_from_it(tmp_path):
    write(tmp_path / "whole.yaml", "\n  gradient_clipping: {clipping_type: norm}\n  let: {weight: 0.3}")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "other.yaml").write_text("base: ../whole.yaml\nalgorithms: {gradient_clipping: null}\n")
    (tmp_path / "last.yaml").write_text("base: in/other.yaml\nseed: 3\n")
    found = om.to_container(load(str(tmp_path / "last.yaml"), ["algorithms.let.stop=2ba"]))
    assert found == {"max_duration": "4ba", "seed": 3, "algorithms": {"let": {"weight": 0.3, "stop": "2ba"}}}
    write(tmp_path / "whole.yaml", " let\nbase: last.yaml")
    with pytest.raises(ValueError, match="last.yaml ends up as its own base. Leave base out of whole.yaml"):
        load(str(tmp_path / "last.yaml"), [])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("algorithms: [lett]", "algorithms has no 'lett' .did you mean 'let'?"),
        ("algorithms: {gradient_cliping: {}}", "algorithms has no .* .did you mean 'gradient_clipping'?"),
        ("algorithms: [let, let]", "algorithms names 'let' twice"),
        ("algorithms: [3]", "algorithms must list names or mappings of a name to its arguments, got 3"),
        ("algorithms: {rkd: }", "algorithms has no 'rkd' that null could remove. To add it, write rkd: {}"),
        ("algorithms: {rkd: '${nowhere}'}", r"algorithms cannot be read: [\s\S]*Interpolate single arguments alone"),
        ("base: whole.yaml", "only the first YAML may have a base"),
        ("max_duraton=2ba", "the YAML has no 'max_duraton' .did you mean 'max_duration'"),
        ("algorithms.let.wieght=1", "LET has no 'wieght' .did you mean 'weight'"),
        ("algorithms.let.weight=-1", "weight must be finite"),
        ("run_name=???", ".*run.yaml leaves run_name open"),
        ("a=[1", "the command line cannot be read"),
        ("nowhere.yaml", "there is no YAML at 'nowhere.yaml'"),
        ("global_train_batch_size=null", "the YAML has no global_train_batch_size, which training needs"),
    ],
)
def test_what_a_user_can_put_right_is_told_in_a_line(tmp_path, given, message):
    """On the command line, and in a second YAML."""
    if ": " in given:
        (tmp_path / "second.yaml").write_text(given)
        given = str(tmp_path / "second.yaml")
    path = foundry_yaml(tmp_path, variables=ELSEWHERE, algorithms={"let": {}})
    with pytest.raises(SystemExit, match=f"train.py: {message}"):
        script.main([path, given])


def test_other_errors_keep_their_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "train", lambda config: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        script.main([foundry_yaml(tmp_path, variables=ELSEWHERE)])


@pytest.fixture
def shards(tmp_path, tokenizer) -> dict[str, str]:
    """Random tokens, as the variables of a YAML."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        with MDSWriter(out=str(tmp_path / "shards" / split), columns={"tokens": "ndarray:int32"}) as writer:
            for _ in range(40):
                writer.write({"tokens": generator.integers(0, 62, 16, dtype=np.int32)})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return {"data": str(tmp_path / "shards"), "tokenizer": str(tmp_path / "tokenizer")}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # llm-foundry's, streaming's and multiprocessing's own; what is tested is the run
def test_one_line_added_to_a_foundry_yaml_trains_with_let(shards, tmp_path, teacher_folder, capsys):
    """Through llm-foundry's own entry, not ours."""

    def run(**algorithms: Any) -> Any:
        trainer = train_from_yaml(foundry_yaml(tmp_path, variables=shards, max_duration="6ba", algorithms=algorithms))
        logged = trainer.logger.destinations[0].data
        trainer.close()
        return {name: [value for _, value in points] for name, points in logged.items()}

    plain, guided = run(), run(let={"teacher": teacher_folder, "weight": 1.0, "stop": "0.5dur"})
    shown = capsys.readouterr().err  # llm-foundry replaces the root logger's handlers
    for line in ("for model.transformer.blocks.2", "LET guides until 3ba", "the teacher is released"):
        assert line in shown
    assert guided["let/weight"] == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert len(guided["let/loss"]) == 3
    assert len(guided["loss/train/total"]) == len(plain["loss/train/total"]) == 6
    assert len(guided["metrics/eval/LanguageCrossEntropy"]) == 3
    assert guided["metrics/eval/LanguageCrossEntropy"][0] == plain["metrics/eval/LanguageCrossEntropy"][0]
    assert guided["let/lm_loss"][0] == pytest.approx(plain["loss/train/total"][0])


@pytest.mark.filterwarnings("ignore")
def test_shards_made_otherwise_are_refused_before_training(shards):
    made = {"vocabulary_size": 62, "name": "here", "fingerprint": "sha256:0"}
    manifest = Path(shards["data"]) / "train" / "manifest.json"
    manifest.write_text(json.dumps({"sequence_length": 32, "tokenizer": made}))
    with pytest.raises(ValueError, match="hold sequences of 32 tokens, but max_seq_len is 16"):
        train_from_yaml(foundry_yaml(manifest.parent, variables=shards))

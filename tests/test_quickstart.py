"""What the quickstart trains again and what it keeps; its steps themselves are tested where they are."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def quickstart(tmp_path):
    """Run the script on its YAMLs with a launcher that only notes what it is asked for, and leaves a checkpoint."""
    shutil.copytree(ROOT / "yamls" / "quickstart", tmp_path / "yamls" / "quickstart")
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "quickstart.sh", tmp_path / "scripts")
    bin = tmp_path / ".venv" / "bin"
    bin.mkdir(parents=True)
    launcher = """
        name=baseline
        for word; do case $word in */teacher.yaml) name=teacher ;; */let.yaml) name=let ;; esac; done
        shift 3
        echo "$name $(ls runs/*/$name 2>/dev/null | wc -l) $OMP_WAIT_POLICY $*" >> calls
        folder=$(ls -d runs/* | tail -n 1)/$name
        mkdir -p "$folder/checkpoints"
        [ ! -e early-$name ] || exit 1
        touch "$folder/checkpoints/latest.pt"
        [ ! -e fail-$name ]
    """
    for path, body in {
        tmp_path / "scripts" / "install.sh": "",
        bin / "composer": launcher,
        bin / "let-composer": "",
        bin / "python": '[ "$1" != -c ]',  # no CUDA
    }.items():
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def run(*arguments: str) -> list[str]:
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        subprocess.run(["bash", "scripts/quickstart.sh", *arguments], cwd=tmp_path, capture_output=True, timeout=60)
        return calls.read_text().splitlines() if calls.exists() else []

    def change(name: str) -> None:
        with open(tmp_path / "yamls" / "quickstart" / f"{name}.yaml", "a") as file:
            file.write("seed: 18\n")

    run.root, run.change = tmp_path, change
    return run


def names(calls: list[str]) -> list[str]:
    """Runs, and whether they found a checkpoint."""
    return [" ".join(call.split()[:2]) for call in calls]


def test_a_changed_yaml_is_trained_anew_with_all_that_depends_on_it(quickstart):
    first = quickstart()
    assert names(first) == ["teacher 0", "baseline 0", "let 0"]
    assert all("PASSIVE yamls/quickstart/baseline.yaml" in call for call in first)
    assert quickstart() == []
    quickstart.change("let")
    assert names(quickstart()) == ["let 0"]  # and not from the old checkpoint
    quickstart.change("teacher")
    assert names(quickstart()) == ["teacher 0", "let 0"]
    quickstart.change("baseline")
    assert names(quickstart()) == ["teacher 0", "baseline 0", "let 0"]


def test_an_interrupted_run_goes_on_unless_something_changed_or_it_had_no_checkpoint(quickstart):
    (quickstart.root / "fail-baseline").touch()
    assert names(quickstart()) == ["teacher 0", "baseline 0"]
    assert names(quickstart()) == ["baseline 1"]
    quickstart.change("baseline")
    assert names(quickstart()) == ["teacher 0", "baseline 0"]
    (quickstart.root / "fail-baseline").unlink()
    (quickstart.root / "early-let").touch()
    assert names(quickstart()) == ["baseline 1", "let 0"]
    assert names(quickstart()) == ["let 0"]
    (quickstart.root / "data/quickstart/shards").mkdir(parents=True)
    (quickstart.root / "data/quickstart/shards/manifest.json").write_text("{}")
    assert names(quickstart()) == ["teacher 0", "baseline 0", "let 0"]


def test_the_pretrained_teacher_is_not_trained(quickstart):
    baseline, let = quickstart("--pretrained")
    assert baseline.endswith("yamls/quickstart/baseline.yaml yamls/quickstart/pretrained.yaml")
    assert let.endswith(
        "pretrained.yaml yamls/quickstart/let.yaml algorithms.let.weight=1 algorithms.let.normalize_teacher=standardize"
    )

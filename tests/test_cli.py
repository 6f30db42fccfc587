"""The command as a user has it: from a wheel, outside of the repository, beside the locked packages."""

import importlib
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from let_composer.cli import VERBS, main

ROOT = Path(__file__).parents[1]


def test_what_a_user_can_put_right_is_told_in_a_line(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        (["compare", "nowhere"], "let-composer compare: there is no run at nowhere."),
        (["yaml", "let_1b"], "let-composer yaml: the package has no 'let_1b' (did you mean 'let_1b4'?)"),
    ):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
    with pytest.raises(SystemExit):
        main(["compair"])
    assert "there is no verb 'compair' (did you mean 'compare'?)" in capsys.readouterr().err


def test_a_folder_in_the_place_of_a_file_is_kept(capsys, tmp_path):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    assert main(["plan", str(ROOT / "yamls" / "let_1b4.yaml"), "--out", str(tmp_path / "runs")]) == 1
    assert f"let-composer plan: {tmp_path}/runs is a folder. Give the name of a file" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["runs", "mine"]


def is_program(path: Path) -> bool:
    return "ArgumentParser" in path.read_text()


@pytest.mark.parametrize("program", [*VERBS, *filter(is_program, sorted((ROOT / "scripts").rglob("*.py")))], ids=str)
def test_help_shows_the_docstring_as_it_is_written(program, capsys, monkeypatch):
    """A line's backslash at its end glues it to the next, unless the docstring is raw."""
    with pytest.raises(SystemExit) as ended:
        if isinstance(program, Path):
            monkeypatch.setattr(sys, "argv", [program.name, "--help"])
            runpy.run_path(str(program), run_name="__main__")
        main([program, "--help"])
    shown, source = capsys.readouterr().out, program
    assert ended.value.code == 0 and shown.startswith("usage: ")
    if not isinstance(program, Path):
        source = Path(importlib.import_module(VERBS[program][0]).__file__ or "")
    lines = source.read_text().split('"""')[1].splitlines()
    assert len(lines) > 1 and set(map(str.rstrip, lines)) <= set(map(str.rstrip, shown.splitlines()))


@pytest.mark.slow
def test_a_wheel_outside_of_the_repository(tmp_path, teacher_folder):
    for name in ("let_composer", "yamls", "pyproject.toml", "README.md", "LICENSE"):  # a build writes beside its source
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (tmp_path / "source").mkdir(exist_ok=True)
        copy(ROOT / name, tmp_path / "source" / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "--no-deps"]
    place = ["--no-build-isolation", "--ignore-installed", "--prefix", str(tmp_path / "env"), str(tmp_path / "source")]
    subprocess.run([*pip, *place], check=True)
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")

    def call(*arguments: str) -> str:
        program, environment = tmp_path / "env" / "bin" / "let-composer", {**os.environ, "PYTHONPATH": str(packages)}
        done = subprocess.run([program, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert arguments[0] != "plan" or not done.stderr  # nothing of what libraries say
        return done.stdout

    assert all(verb in call("--help") for verb in VERBS)
    assert "let_1b4 " in call("yaml")
    (tmp_path / "my.yaml").write_text(call("yaml", "let_7b"))
    plan = call("plan", "my.yaml", "--gpus", "32", "--gpu", "h100", "run_name=mine")
    assert plan.startswith("run ") and "mine" in plan and "fits in 79 GiB" in plan
    texts = [{"text": f"w{i} " * 40, "meta": {"pile_set_name": "Toy"}} for i in range(30)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    shape = ["--sequence-length", "16", "--validation", "0.2", "--workers", "1"]
    call("prepare", "texts.jsonl", "--out", "shards", "--tokenizer", teacher_folder, *shape)
    assert "shards/val, sample 0" in call("verify", "shards")
    rows = ["step,time/token,metrics/eval/LanguageCrossEntropy", "0,0,", "1,100,", "2,200,3.5"]
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").write_text("\n".join(rows))
    assert "b reaches the final loss of a, 3.500" in call("compare", "a.csv", "b.csv", "--out", "out/c")
    assert len(list((tmp_path / "out").iterdir())) == 4

"""The experiment's runner: what would run, in which order, what is reused, and what the page says of it."""

from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import pytest
import sweep  # scripts/evidence/sweep.py
from filelock import FileLock
from omegaconf import OmegaConf as om

from let_composer.configuration import read_methods

ROOT = Path(__file__).parent.parent
BASE = {
    "variables": {"runs": "elsewhere"},
    "run_name": "base",
    "seed": 1,
    "train_loader": {"dataset": {"shuffle_seed": 1}},
    "optimizer": {"lr": 1.0},
}
EXPERIMENT = {
    "base": "base.yaml",
    "runs": "runs",
    "seeds": [3, 4],
    "settings": {"max_duration": "2ba"},
    "teachers": {"small": {"max_duration": "9ba"}, "unused": {}},
    "arms": {
        "plain": {},
        "guided": {"algorithms": {"let": {"teacher": "${variables.runs}/huggingface/small"}}},
        "hub": {"algorithms": {"let": {"teacher": "EleutherAI/pythia-14m"}}},
    },
    "tables": {"one": {"plain": "plain", "with LET": "guided"}},
    "overview": {"LET": {"a small teacher": "guided"}},
}


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    om.save(om.create(BASE), "base.yaml")
    om.save(om.create(EXPERIMENT), "experiment.yaml")
    return sweep.read("experiment.yaml")


def test_seeds_one_after_the_other_and_the_teacher_that_is_needed_first(experiment):
    jobs = sweep.plan(experiment, only=["plain", "g*"])
    assert [job.name for job in jobs] == ["small", "plain-s3", "guided-s3", "plain-s4", "guided-s4"]
    guided = jobs[2].config
    assert (guided.seed, guided.train_loader.dataset.shuffle_seed, guided.run_name) == (3, 3, "guided-s3")
    assert (guided.max_duration, guided.optimizer.lr, guided.variables.runs) == ("2ba", 1.0, "runs")
    assert jobs[0].config.max_duration == "9ba" and jobs[0].config.seed == 1
    assert [(job.arm, sorted(job.needs)) for job in jobs[:3]] == [("", []), ("plain", []), ("guided", ["small"])]
    assert [job.name for job in sweep.plan(experiment, [9], ["pl*"])] == ["plain-s9"]
    with pytest.raises(ValueError, match=r"no arm matches 'plane\*' .did you mean 'plain'.*There are"):
        sweep.plan(experiment, only=["pl*", "plane*"])


def test_settings_and_folder_from_the_command_line(experiment):
    changed = sweep.read("experiment.yaml", ["optimizer.lr=3.0", "max_duration=5ba"], runs="elsewhere/runs")
    small, plain = sweep.plan(changed, [3])[:2]
    assert (plain.config.optimizer.lr, plain.config.max_duration) == (3.0, "5ba")
    assert (small.config.variables.runs, small.config.max_duration) == ("elsewhere/runs", "9ba")  # an arm's own wins


def test_in_the_report_an_arm_stands_beside_the_baseline_of_its_own_seeds(experiment):
    experiment.arms.update({"late": experiment.arms.guided, "alone": {}})
    experiment.tables = {
        "one": {"plain": "plain", "with LET": "guided", "worse": "late", "hub": "hub", "to come": "alone"},
        "two": {"with LET": "guided", "plain": "plain"},
        "three": {"to come": "alone", "plain": "plain"},
    }
    experiment.overview = {"LET": {"of the hub": "hub", "good": "guided", "bad": "late", "to come": "alone"}}
    losses = {
        "small": (6.5, 4.5),
        "plain-s3": (6.0, 5.0, 4.0),
        "plain-s4": (6.0, 5.0, 3.0),
        "guided-s3": (5.0, 3.5, 3.0),
        "guided-s4": (5.0, 3.5, 2.0),
        "late-s4": (7.0, 6.0, 5.0),
        "hub-s4": (6.0, 5.0, 3.5),
    }
    jobs = sweep.plan(experiment)
    for job in jobs:
        if job.name in losses:
            job.write(".done")
            job.file().mkdir()
            rows = [f"{i + 1},{10 * i + 10},{loss}" for i, loss in enumerate(losses[job.name])]
            log = ["step,time/token,metrics/eval/LanguageCrossEntropy", "0,0,", *rows]
            (job.file() / "log.csv").write_text("\n".join(log))
    page = Path("experiment.md")
    page.write_text(f"# Notes\n\nStay.\n\n{sweep.MARK}\n\nAn older table.\n")
    sweep.tables(experiment, jobs, page)
    notes, _, report = page.read_text().partition(f"{sweep.MARK}\n")
    assert notes == "# Notes\n\nStay.\n\n" and "older" not in report and "torch " in report
    good = ["2", "2.500 (2.000..3.000)", "+1.000", "67%", "-1.00", "44%"]
    bad = ["1", "5.000", "-2.000", "-", "-1.50", "-"]  # against the baseline of seed 4 alone
    hub = ["1", "3.500", "-0.500", "-", "", ""]
    tables = [part for part in report.split("\n\n") if part.startswith("|")]
    cells = [[[cell.strip() for cell in line[1:-1].split("|")] for line in of.splitlines()[2:]] for of in tables]
    assert cells[1] == [
        ["**one**", "plain", "2", "3.500 (3.000..4.000)", "", "100%", "-1.00", "79% (75%..83%)"],
        ["", "with LET", *good],
        ["", "worse", *bad],
        ["", "hub", *hub],
        ["**two**", "with LET", "2", "2.500 (2.000..3.000)", "", "100%", "-2.00", "44%"],
        ["", "plain", "2", "3.500 (3.000..4.000)", "-1.000", "-", "", ""],
    ]
    assert cells[0] == [["**LET**", "of the hub", *hub], ["", "good", *good], ["", "bad", *bad]]
    drawing = Path("runs/overview.svg").read_text()
    assert "good" in drawing and "bad: never" in drawing and Path("runs/overview.png").exists()
    assert "guided-s4" in Path("runs/two.json").read_text()
    one = Path("runs/one.json").read_text()
    assert "late-s4" in one and "plain-s3" not in one  # the seed that all have


@pytest.fixture
def train(experiment, monkeypatch):
    """Train seed 3, where a run leaves but a checkpoint, and may be cut off; returns which runs began or went on."""
    experiment.settings.autoresume = True
    cuts, calls = {}, []

    def start(command: list[str], stdout: TextIO, **_: Any) -> Any:
        checkpoints = Path(command[-1]).with_suffix("") / "checkpoints"
        name, found = checkpoints.parent.name.removesuffix("-s3"), checkpoints.exists()
        calls.append(f"{name} goes on" if found else f"{name} begins")
        cut = cuts.get(name)
        if cut != "at once":
            checkpoints.mkdir(parents=True, exist_ok=True)
            (checkpoints / "latest.pt").touch()
        stdout.write("(2ba). No training would occur. Please" if cut == "at the end" else "cut off")
        fails = cut in ("at once", "midway") or (cut == "at the end" and found)
        return SimpleNamespace(wait=lambda seconds=None: int(fails))

    def run(only: str = "[!h]*", **cut: str) -> list[str]:
        cuts.update(cut)
        calls.clear()
        sweep.run([job for job in sweep.plan(experiment, [3]) if fnmatch(job.name, only)], 1)
        return list(calls)

    monkeypatch.setattr(sweep.subprocess, "Popen", start)
    Path("runs").mkdir()
    return run


def test_only_what_changed_is_trained_anew(train, experiment):
    assert train() == ["small begins", "plain begins", "guided begins"]
    marker = Path("runs/plain-s3.done")
    om.save(om.create(dict(reversed(om.load(marker).items()))), marker)
    assert train() == []  # nor does the order of keys count
    experiment.arms.guided.algorithms.let.weight = 1
    assert train() == ["guided begins"]  # and not from the old checkpoint
    experiment.teachers.small.max_duration = "8ba"
    assert train() == ["small begins", "guided begins"]
    experiment.settings.precision = "fp32"
    assert train() == ["small begins", "plain begins", "guided begins"]


def test_an_interrupted_run_goes_on_unless_something_changed_or_it_had_no_checkpoint(train, experiment, capsys):
    assert train(plain="midway") == ["small begins", "plain begins", "guided begins"]
    shown = capsys.readouterr().out
    assert "train.py runs/plain-s3.yaml " in shown and "cut off\nplain-s3: failed (1), the whole log is runs" in shown
    assert train() == ["plain goes on"]
    experiment.arms.plain.precision = "fp32"
    assert train() == ["plain begins"]
    experiment.arms.plain.autoresume = False
    assert train() == train() == ["plain begins"]
    experiment.arms.plain = {}
    assert train(plain="at once") == train() == ["plain begins"]
    (events := Path("runs/plain-s3/events")).mkdir(parents=True)
    assert train(plain="midway") == ["plain begins"] and not events.exists()
    assert train(plain="at the end") == ["plain goes on", "plain begins"]
    assert train() == []


def test_what_a_teacher_taught_is_trained_anew_when_it_is(train, experiment):
    """In a later call, too, after one that ended with the teacher, and where it was not done; nothing else is."""
    train("*")
    Path("runs/another's.done").touch()
    experiment.teachers.small.max_duration = "8ba"
    assert train("small") == ["small begins"]
    assert train("*", guided="midway") == ["guided begins"]
    experiment.teachers.small.max_duration = "7ba"
    assert train("small") == ["small begins"]
    assert train("*") == ["guided begins"]
    assert Path("runs/another's.done").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "missing or unknown: seed"),
        ({"tables": {"a": {"x": "absent"}}}, "tables: a in wrong.yaml compares absent, which is no arm"),
        ({"overview": {"LET": {"x": "hub"}}}, "overview: LET in wrong.yaml compares hub, which is in no table"),
    ],
)
def test_mistakes_are_found_before_anything_runs(experiment, change, message):
    om.save(om.merge(om.create(EXPERIMENT), change), "wrong.yaml")
    with pytest.raises(ValueError, match=message):
        sweep.read("wrong.yaml")


EXPERIMENTS = [path for path in sorted((ROOT / "yamls").glob("*/*.yaml")) if "arms" in om.load(path)]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_the_experiments_here_are_whole(path):
    """Every arm takes what its algorithms take, and compares with a teacher that the file trains or that is made."""
    experiment = sweep.read(path)
    for job in sweep.plan(experiment, [17]):
        for options in read_methods(job.config).values():
            assert job.needs or options.teacher == "data/offline/smollm2-135m", job.name
        for teacher in job.needs.values():  # exports itself to where the arm looks
            export = teacher.config.callbacks.hf_checkpointer
            assert (export.save_folder, export.huggingface_folder_name) == (experiment.runs, teacher.name)


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_those_that_wait_for_it_do_not_run(experiment, capsys):
    with pytest.raises(ValueError, match="failed: small, guided-s3, plain-s3. The logs are in runs"):
        sweep.main(["experiment.yaml", "--only", "guided", "plain", "--seeds", "3", "--workers", "2"])
    assert "small: failed" in capsys.readouterr().out
    assert "which training needs" in Path("runs/small.log").read_text()
    assert not Path("runs/guided-s3.log").exists()
    with FileLock("runs/.lock"), pytest.raises(ValueError, match="another call is at work in runs"):
        sweep.main(["experiment.yaml"])

"""The experiment's runner: what would run, in which order, what is reused."""

import fcntl
from pathlib import Path

import numpy as np
import pytest
import sweep  # scripts/sweep.py
from omegaconf import OmegaConf as om

from let_composer import LET

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
    },
    "tables": {"one": {"plain": "plain", "with LET": "guided"}},
    "overview": {"LET": {"plain": {"a small teacher": "guided"}}},
}


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    om.save(om.create(BASE), "base.yaml")
    om.save(om.create(EXPERIMENT), "experiment.yaml")
    return sweep.read("experiment.yaml")


def test_seeds_one_after_the_other_and_the_teacher_that_is_needed_first(experiment):
    jobs = sweep.plan(experiment)
    assert [job.name for job in jobs] == ["small", "plain-s3", "guided-s3", "plain-s4", "guided-s4"]
    guided = jobs[2].config
    assert (guided.seed, guided.train_loader.dataset.shuffle_seed, guided.run_name) == (3, 3, "guided-s3")
    assert (guided.max_duration, guided.optimizer.lr, guided.variables.runs) == ("2ba", 1.0, "runs")
    assert jobs[0].config.max_duration == "9ba" and jobs[0].config.seed == 1
    assert [job.arm for job in jobs] == ["", "plain", "guided", "plain", "guided"]
    assert [sorted(job.needs) for job in jobs[:3]] == [[], [], ["small"]]
    assert [job.name for job in sweep.plan(experiment, [9], ["pl*"])] == ["plain-s9"]
    with pytest.raises(ValueError, match=r"no arm matches 'plane\*' .did you mean 'plain'.*There are"):
        sweep.plan(experiment, only=["plane*"])
    with pytest.raises(ValueError, match="no table matches 'nosuch'"):
        sweep.main(["experiment.yaml", "--tables", "nosuch", "--list"])


def test_settings_and_folder_from_the_command_line(experiment):
    changed = sweep.read("experiment.yaml", ["optimizer.lr=3.0", "max_duration=5ba"], runs="elsewhere/runs")
    small, plain = sweep.plan(changed, [3])[:2]
    assert (plain.config.optimizer.lr, plain.config.max_duration) == (3.0, "5ba")
    assert (small.config.variables.runs, small.config.max_duration) == ("elsewhere/runs", "9ba")  # an arm's own wins


def curve(name, *losses):
    tokens = np.arange(1, len(losses) + 1) * 10.0
    return sweep.comparing.Run(name, "loss", (tokens, np.array(losses)), (tokens, tokens), (tokens, tokens))


def test_in_the_report_an_arm_stands_beside_the_baseline_of_its_own_seeds(experiment, monkeypatch):
    experiment.arms.update({"late": experiment.arms.guided, "alone": {}})
    experiment.tables = {
        "one": {"plain": "plain", "with LET": "guided", "worse": "late", "to come": "alone"},
        "two": {"with LET": "guided", "plain": "plain"},
        "three": {"to come": "alone", "plain": "plain"},
    }
    jobs, runs = sweep.plan(experiment), Path("runs")
    runs.mkdir()
    losses = {
        "small": (4.5,),
        "plain-s3": (6.0, 5.0, 4.0),
        "plain-s4": (6.0, 5.0, 3.0),
        "guided-s3": (5.0, 3.5, 3.0),
        "guided-s4": (5.0, 3.5, 2.0),
        "late-s4": (7.0, 6.0, 5.0),
    }
    for job in jobs:
        if job.name in losses:
            (runs / f"{job.name}.done").write_text(om.to_yaml(job.config))
    called = []
    monkeypatch.setattr(sweep.comparing, "read_run", lambda path: curve(path.name, *losses[path.name]))
    monkeypatch.setattr(sweep.comparing, "compare", lambda *arguments: called.append(arguments))
    monkeypatch.setattr(sweep, "overview", lambda *_: [])
    page = Path("experiment.md")
    page.write_text(f"# Notes\n\nStay.\n\n{sweep.MARK}\n\nAn older table.\n")
    sweep.tables(experiment, jobs, page)
    notes, _, report = page.read_text().partition(f"{sweep.MARK}\n")
    assert notes == "# Notes\n\nStay.\n\n" and "older" not in report
    assert "torch " in report and "three" not in report and "to come" not in report
    assert report.split("## Every arm\n")[1].strip().splitlines()[2:] == [
        "| **one** | plain | 2 | 3.500 (3.000..4.000) |  | 100% | 79% (75%..83%) |",
        "|  | with LET | 2 | 2.500 (2.000..3.000) | +1.000 | 67% (67%..67%) | 44% (44%..44%) |",
        "|  | worse | 1 | 5.000 | -2.000 | never | never |",  # against the baseline of seed 4 alone
        "| **two** | with LET | 2 | 2.500 (2.000..3.000) |  | 100% | 44% (44%..44%) |",
        "|  | plain | 2 | 3.500 (3.000..4.000) | -1.000 | never |  |",
    ]
    arms = {"plain": "plain", "with LET": "guided", "worse": "late"}
    paths = {label: [runs / f"{arm}-s4"] for label, arm in arms.items()}
    assert called[0] == (paths, runs / "small", runs / "one")
    (runs / "plain-s3.done").unlink()
    (runs / "plain-s4.done").unlink()
    called.clear()
    sweep.tables(experiment, jobs, page, "one")
    assert not called


def test_the_overview_sets_what_an_arm_saves_against_the_lead_of_its_teacher(experiment, tmp_path, monkeypatch):
    experiment.arms.worse = experiment.arms.guided
    experiment.overview = {"LET": {"plain": {"good": "guided", "bad": "worse"}}}
    jobs, runs = sweep.plan(experiment), Path("runs")
    runs.mkdir()
    losses = {"small": (3.0,), "plain": (6.0, 5.0, 4.0), "guided": (5.0, 4.0, 3.5), "worse": (6.0, 5.0, 4.5)}
    for job in jobs:
        if job.config.get("seed") != 4 or job.arm == "plain":  # the second seed of the arms is still to come
            (runs / f"{job.name}.done").write_text(om.to_yaml(job.config))
    monkeypatch.setattr(sweep.comparing, "read_run", lambda path: curve(path.name, *losses[path.name.split("-")[0]]))
    guided, worse = sweep.overview(experiment, jobs)
    assert (guided.method, guided.arm, guided.seeds) == ("LET", "good", 1)
    assert guided.lead == worse.lead == pytest.approx(1.0)
    assert (guided.gain, guided.share["mean"]) == (pytest.approx(0.5), pytest.approx(2 / 3))
    assert (worse.gain, worse.share) == (pytest.approx(-0.5), None)
    sweep.draw([guided, worse], tmp_path / "overview")
    assert {path.name for path in tmp_path.glob("overview.*")} == {"overview.json", "overview.png", "overview.svg"}
    drawing = (tmp_path / "overview.svg").read_text()
    assert "good" in drawing and "bad: never" in drawing


def test_a_teacher_that_was_not_trained_here_has_no_lead_and_the_page_comes_first(experiment, monkeypatch):
    experiment.arms.guided.algorithms.let.teacher = "EleutherAI/pythia-14m"
    jobs, runs, page = sweep.plan(experiment, [3]), Path("runs"), Path("page.md")
    assert not any(job.needs for job in jobs)
    runs.mkdir()
    for job in jobs:
        (runs / f"{job.name}.done").write_text(om.to_yaml(job.config))
    losses = {"plain": (6.0, 5.0, 4.0), "guided": (5.0, 4.0, 3.5)}
    monkeypatch.setattr(sweep.comparing, "read_run", lambda path: curve(path.name, *losses[path.name.split("-")[0]]))
    monkeypatch.setattr(sweep.comparing, "compare", lambda *_: None)
    monkeypatch.setattr(sweep.shutil, "which", lambda _: None)  # a machine without git
    monkeypatch.setenv("PATH", "/nowhere")
    sweep.tables(experiment, jobs, page)
    assert "| LET | a small teacher | 1 | not trained here | +0.500 | 67% |" in page.read_text()
    assert (runs / "overview.png").exists()
    monkeypatch.setattr(sweep, "overview", lambda *_: 1 / 0)
    page.unlink()
    with pytest.raises(ZeroDivisionError):
        sweep.tables(experiment, jobs, page)
    assert "|  | with LET | 1 | 3.500 |" in page.read_text()


def test_what_is_done_is_done_with_these_settings_alone(experiment, tmp_path):
    job = sweep.plan(experiment)[1]
    assert not job.done(tmp_path)
    (tmp_path / "plain-s3.done").write_text(om.to_yaml(job.config))
    assert job.done(tmp_path) and sweep.run([job], tmp_path, 1) == []
    job.config.optimizer.lr = 2.0
    assert not job.done(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "missing or unknown: seed"),
        ({"tables": {"a": {"x": "absent"}}}, "the table a in wrong.yaml compares absent, which is no arm"),
        (
            {"overview": {"LET": {"plain": {"x": "gone"}}}},
            "the overview of LET in wrong.yaml compares gone, which is no arm",
        ),
    ],
)
def test_mistakes_are_found_before_anything_runs(experiment, change, message):
    om.save(om.merge(om.create(EXPERIMENT), change), "wrong.yaml")
    with pytest.raises(ValueError, match=message):
        sweep.read("wrong.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "yamls" / "evidence").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_experiments_here_are_whole(path):
    """Every arm takes what its algorithms take, and compares with a teacher that the file trains."""
    experiment = sweep.read(path)
    for job in sweep.plan(experiment, [17]):
        algorithms = om.to_container(job.config.algorithms, resolve=True)
        assert isinstance(algorithms, dict)
        for name, options in algorithms.items():
            if name in ("let", "rkd", "salt"):
                assert job.needs or options["teacher"] == job.config.variables.pretrained, job.name
            if name == "let":
                LET(**options)


def test_a_run_that_fails_is_named_and_those_that_wait_for_it_do_not_run(experiment, tmp_path, capsys):
    jobs = [job for job in sweep.plan(experiment, [3]) if job.name != "plain-s3"]
    assert sweep.run(jobs, tmp_path / "runs", 2) == ["small", "guided-s3"]
    assert "small: failed" in capsys.readouterr().out
    assert "Traceback" in (tmp_path / "runs" / "small.log").read_text()
    assert not (tmp_path / "runs" / "guided-s3.log").exists()


def test_two_calls_do_not_share_a_folder(experiment):
    Path("runs").mkdir()
    with open("runs/.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another call is at work in runs"):
            sweep.main(["experiment.yaml"])

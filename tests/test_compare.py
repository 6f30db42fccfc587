"""Reading what Composer's TensorBoard logger writes, and the numbers made of it."""

import json
import math

import numpy as np
import pytest
from compare import LOSS, _apart, crossing, draw, group, main, read_run, spread, summarize, table
from composer import Evaluator
from composer.callbacks import SpeedMonitor
from composer.loggers import TensorboardLogger
from conftest import LENGTH, build_data
from torch.utils.tensorboard import SummaryWriter

from let_composer import LET

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's and its protobuf's own


def write_run(folder, loss: list[float], guided: int = 0, seconds: float = 2.0, memory: float | None = None) -> str:
    """40 batches of 100 tokens, evaluated after every tenth; guided batches take half as long again."""
    time = 0.0
    with SummaryWriter(str(folder)) as writer:
        for step in range(10 * len(loss)):
            writer.add_scalar("time/token", step * 100, step)
            writer.add_scalar("loss/train/total", 5.0, step)
            if step <= guided and guided:
                writer.add_scalar("let/weight", 1 - step / guided, step)
            if step < guided:
                writer.add_scalar("let/cosine", 0.5, step)
                writer.add_scalar("let/constant_cosine", 0.1, step)
            if memory is not None:
                writer.add_scalar("memory/peak_allocated_mem", memory - 0.5 * (step == 0), step)
            time += seconds * (1.5 if step < guided else 1)
            if seconds:
                writer.add_scalar("time/train", time / 3600, step + 1)
        for number, value in enumerate(loss):
            writer.add_scalar(LOSS, value, 10 * (number + 1))
    return str(folder)


def read(*folders):
    return [read_run(folder) for folder in folders]


def test_crossing():
    curve = (np.array([10.0, 20.0, 30.0]), np.array([6.0, 5.0, 4.0]))
    assert crossing(curve, 4.5) == pytest.approx(25)
    assert crossing(curve, 7.0) == 10
    assert crossing(curve, 3.9) is None
    assert crossing((curve[0], np.array([6.0, np.nan, 4.0])), 3.9) is None


def test_spread_is_over_what_is_there():
    assert spread([1.0, None, 3.0]) == {"mean": 2, "min": 1, "max": 3, "std": pytest.approx(math.sqrt(2)), "n": 2}
    assert spread([5.0]) == {"mean": 5, "min": 5, "max": 5, "std": 0, "n": 1}
    assert spread([None, None]) is None


def test_folders_that_differ_in_their_seed_alone_are_one_arm(tmp_path):
    names = ("plain-s1", "plain_seed2", "let-s1", "let-s17", "let-s17x", "lr=0.1")
    for name in names:
        (tmp_path / name).mkdir()
    paths = [f"{tmp_path}/{name}" for name in names]
    arms = group(paths)
    assert {arm: [folder.name for folder in folders] for arm, folders in arms.items()} == {
        "plain": ["plain-s1", "plain_seed2"],
        "let": ["let-s1", "let-s17"],
        "let-s17x": ["let-s17x"],
        "lr=0.1": ["lr=0.1"],
    }
    named = group([f"a=b={tmp_path}/plain*", f"x={tmp_path}/let-s1", f"x={tmp_path}/lr=0.1"])
    assert list(named) == ["a=b", "x"] and [len(folders) for folders in named.values()] == [2, 2]
    with pytest.raises(ValueError, match="there is no run at .*nowhere"):
        group([f"{tmp_path}/nowhere"])
    with pytest.raises(ValueError, match="plain-s1 is given twice"):
        group([paths[0], f"x={paths[0]}"])


def test_the_table_says_what_was_logged(tmp_path):
    baseline = read(write_run(tmp_path / "baseline", [6.0, 5.0, 4.5, 4.0], memory=2.5))
    let = read(write_run(tmp_path / "let", [5.0, 4.0, 3.5, 3.0], guided=20))
    summary = summarize({"baseline": baseline, "let": let})
    plain, guided = (arm["seeds"][0] for arm in summary["arms"])
    assert plain["tokens"] == 4000 and plain["tokens_to_baseline_loss"] == pytest.approx(4000)
    assert guided["tokens_to_baseline_loss"] == pytest.approx(2000)
    assert plain["train_seconds"] == pytest.approx(80, rel=1e-4)
    assert guided["seconds_to_baseline_loss"] == pytest.approx(60, rel=1e-4)
    assert guided["guided_tokens_per_second"] == pytest.approx(100 / 3, rel=1e-3)
    assert guided["plain_tokens_per_second"] == pytest.approx(50, rel=1e-3)
    assert plain["guided_tokens_per_second"] is None
    assert (plain["peak_gb"], guided["peak_gb"]) == (2.5, None)
    rows = table(summary).splitlines()
    assert "validation loss at 0.004M tokens" in rows[0]
    assert rows[2] == "| baseline | 1 | 4.000 | 0.004M | 80 s | 100% | 100% | - | - | 50 | 2.50 GB |"
    assert rows[3] == "| let | 1 | 3.000 | 0.004M | 100 s | 50% | 75% | - | 33 | 50 | - |"


def test_seeds_are_averaged_and_their_spread_shown(tmp_path):
    plain = [write_run(tmp_path / f"plain-s{n}", [6.0, 5.0, 4.5, final]) for n, final in enumerate((3.8, 4.2))]
    let = [
        write_run(tmp_path / "let-s1", [5.0, 4.0, 3.5, 3.0], guided=20),
        write_run(tmp_path / "let-s2", [5.0, 4.5, 4.0, 3.0, 2.5], guided=20),
        write_run(tmp_path / "let-s3", [6.0, 6.0, 6.0, 6.0], guided=20),
    ]
    teacher = read_run(write_run(tmp_path / "teacher", [5.0, 3.5]))
    summary = summarize({arm: read(*folders) for arm, folders in group([*plain, *let]).items()}, teacher)
    assert summary["baseline"] == "plain" and summary["baseline_final_loss"] == pytest.approx(4.0)
    assert summary["equal_tokens"] == 4000  # of which all have a loss
    arm = summary["arms"][1]["over_seeds"]
    reached = {"mean": 2500, "min": 2000, "max": 3000, "std": math.sqrt(2) * 500, "n": 2}
    assert arm["tokens_to_baseline_loss"] == pytest.approx(reached)
    assert arm["tokens_to_teacher_loss"] == pytest.approx(
        {**reached, "mean": 3250, "min": 3000, "max": 3500, "std": math.sqrt(2) * 250}
    )
    assert arm["loss_at_equal_tokens"]["mean"] == pytest.approx(4.0)
    rows = table(summary).splitlines()
    assert "| plain | 2 | 4.000 (3.800..4.200) |" in rows[2] and "of 2 seeds" in rows[2]
    assert "| 63% (50%..75%), 2 of 3 seeds |" in rows[3] and "| 0.00325M (0.003..0.0035), 2 of 3 seeds |" in rows[3]
    assert rows[4].startswith("| teacher: teacher | 1 | 3.500 | 0.002M | 40 s | - | - | - |")


def test_a_run_without_times_is_read(tmp_path):
    runs = read(write_run(tmp_path / "a", [6.0, 5.0], seconds=0.0))
    summary = summarize({"a": runs})
    assert summary["arms"][0]["seeds"][0]["train_seconds"] is None
    assert "| a | 1 | 5.000 | 0.002M | - | 100% | - | - | - | - | - |" in table(summary)
    draw({"a": runs}, summary, tmp_path / "picture")
    assert (tmp_path / "picture.png").exists()


def test_a_diverged_arm_is_shown_as_such(tmp_path):
    folders = [write_run(tmp_path / "a", [6.0, 5.0]), write_run(tmp_path / "b", [6.0, math.nan])]
    main([*folders, "--out", str(tmp_path / "picture")])
    arms = json.loads((tmp_path / "picture.json").read_text())["arms"]
    assert arms[1]["seeds"][0]["final_loss"] is None and arms[1]["over_seeds"]["loss_at_equal_tokens"] is None
    with pytest.raises(ValueError, match="the final loss of b is nan"):
        main([*reversed(folders), "--out", str(tmp_path / "picture")])


def test_labels_do_not_touch():
    assert _apart([1.0, 5.0, 3.0], 1.0) == [1.0, 5.0, 3.0]
    places = _apart([1.0, 1.0, 1.1, 9.0], 0.5)
    assert min(np.diff(sorted(places))) >= 0.5 - 1e-6 and places[3] == 9.0
    assert places[0] < places[1] < places[2] and np.mean(places[:3]) == pytest.approx(31 / 30)


def test_files_are_written(tmp_path, capsys):
    plain = [write_run(tmp_path / f"plain-s{n}", [6.0, 5.0, 4.5, 4.0 + n / 10]) for n in (1, 2)]
    let = write_run(tmp_path / "let", [5.0, 4.0, 3.5, 3.0], guided=20)
    arguments = [*plain, f"LET, weight 1={let}", "--teacher", plain[0], "--out", str(tmp_path / "out" / "comparison")]
    main(arguments)
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {f"comparison.{s}" for s in ("json", "png", "svg")}
    written = json.loads((out / "comparison.json").read_text())
    assert [arm["arm"] for arm in written["arms"]] == ["plain", "LET, weight 1"]
    assert written["curves"]["plain"][1]["loss"] == [[1000, 2000, 3000, 4000], pytest.approx([6, 5, 4.5, 4.2])]
    assert "tokens to the baseline's final loss" in capsys.readouterr().out
    first = (out / "comparison.svg").read_bytes()
    assert b"LET, weight 1 reaches plain" in first
    main(arguments)
    assert (out / "comparison.svg").read_bytes() == first


@pytest.mark.slow
def test_what_composer_itself_logs(tmp_path, train, tokenizer, teacher_folder):
    for name, algorithms in {"plain-s1": [], "let-s1": [LET(teacher_folder, student_layer=1, stop="4ba")]}.items():
        train(
            *algorithms,
            run_name=name,
            loggers=[TensorboardLogger(log_dir=str(tmp_path), flush_interval=1)],
            callbacks=[SpeedMonitor(window_size=2)],
            eval_dataloader=Evaluator(
                label="eval", dataloader=build_data(tokenizer), metric_names=["LanguageCrossEntropy"]
            ),
            eval_interval="2ba",
            max_duration="8ba",
        ).close()
    arms = {arm: read(*folders) for arm, folders in group([f"{tmp_path}/plain-s1", f"{tmp_path}/let-s1"]).items()}
    batch = 8 * LENGTH
    plain, let = (summary["seeds"][0] for summary in summarize(arms)["arms"])
    assert plain["tokens"] == let["tokens"] == 8 * batch
    assert arms["let"][0].loss[0].tolist() == [2 * batch, 4 * batch, 6 * batch, 8 * batch]
    assert arms["let"][0].guidance["let/weight"][1].tolist() == pytest.approx([0.1, 0.075, 0.05, 0.025, 0])
    assert plain["guided_tokens_per_second"] is None
    assert min(let["guided_tokens_per_second"], let["plain_tokens_per_second"], plain["plain_tokens_per_second"]) > 0


def test_a_folder_without_runs_is_explained(tmp_path):
    with pytest.raises(ValueError, match="no TensorBoard event files"):
        read_run(tmp_path)
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("time/token", 0, 0)
    with pytest.raises(ValueError, match="was not evaluated"):
        read_run(tmp_path)

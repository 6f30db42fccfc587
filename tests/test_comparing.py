"""Reading what Composer's loggers write, the numbers made of it, and the page that shows them."""

import json
import math
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
from composer.callbacks import SpeedMonitor
from composer.loggers import TensorboardLogger
from conftest import LENGTH, evaluator
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from torch.utils.tensorboard import SummaryWriter

from let_composer import LET
from let_composer.cli import main
from let_composer.comparing import compare, group, summarize, table, verdict
from let_composer.logs import Run, read_log, read_run
from let_composer.picture import PALETTE

SHARE = "let/teacher_flops_share"
LOSS = "metrics/eval/LanguageCrossEntropy"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's and its protobuf's own


def write_run(folder, loss: list[float], guided: int = 0, memory: float | None = None) -> str:
    """40 batches of 100 tokens, evaluated after every tenth; they take 2 seconds, guided ones 3."""
    steps = range(10 * len(loss))
    took = np.cumsum([3 if step < guided else 2 for step in steps]) / 3600
    log: dict[str, dict[int, float]] = {
        "time/token": {step: step * 100 for step in steps},
        "let/weight": {step: 1 - step / guided for step in range(guided + 1) if guided},
        "let/cosine": dict.fromkeys(range(guided), 0.5),
        "let/constant_cosine": dict.fromkeys(range(guided), 0.1),
        SHARE: dict.fromkeys(range(guided), 0.25),
        "memory/peak_allocated_mem": {step: memory - 0.5 * (step == 0) for step in steps if memory},
        "time/train": {step + 1: took[step] for step in steps},
        LOSS: {10 * (number + 1): value for number, value in enumerate(loss)},
    }
    with SummaryWriter(str(folder)) as writer:
        for tag, values in log.items():
            for step, value in values.items():
                writer.add_scalar(tag, value, step)
    return str(folder)


def arms(*folders: str) -> dict[str, list[Run]]:
    return {arm: [read_run(path) for path in paths] for arm, paths in group(folders).items()}


def test_folders_that_differ_in_their_seed_alone_are_one_arm(tmp_path):
    paths = [tmp_path / name for name in ("plain-s1", "plain_seed2", "let-s1", "let-s17", "let-s17x", "lr=0.1")]
    for path in paths:
        path.mkdir()
    arms = group(list(map(str, paths)))
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
        group([str(paths[0]), f"x={paths[0]}"])


def test_the_table_says_what_was_logged(tmp_path):
    baseline = write_run(tmp_path / "baseline", [6.0, 5.0, 4.5, 4.0], memory=2.5)
    summary = summarize(arms(baseline, write_run(tmp_path / "let", [5.0, 4.0, 3.5, 3.0], guided=20)))
    assert {row: tuple(cells) for row, *cells in table(summary).T.itertuples()} == {
        "seeds": ("1", "1"),
        "eval/LanguageCrossEntropy at 0.004M": ("4.000", "3.000"),
        "tokens": ("0.004M", "0.004M"),
        "compute": ("0.004M", "0.004667M"),
        "of it the teacher's": ("0.0%", "14.3%"),
        "training time": ("80 s", "100 s"),
        "tokens to the baseline's end": ("100%", "50%"),
        "compute to it": ("100%", "67%"),
        "time to it": ("100%", "75%"),
        "tokens/s guided": ("-", "33"),
        "tokens/s plain": ("50", "50"),
        "peak memory": ("2.50 GB", "-"),
    }
    assert verdict(summary) == (
        "let reaches the final loss of baseline, 4.000, after 50% of its tokens and 67% of its compute, the teacher's "
        "forward included. One seed each."
    )
    assert verdict(summarize(arms(baseline))) == "baseline ends at a loss of 4.000. One seed each."


def test_seeds_are_averaged_and_their_spread_shown(tmp_path):
    plain = [write_run(tmp_path / f"plain-s{n}", [6.0, 5.0, 4.5, final]) for n, final in enumerate((3.8, 4.2))]
    let = [
        write_run(tmp_path / "let-s1", [5.0, 4.0, 3.5, 3.0], guided=20),
        write_run(tmp_path / "let-s2", [5.0, 4.5, 4.0, 3.0, 2.5], guided=20),
        write_run(tmp_path / "let-s3", [6.0, 6.0, 6.0, 6.0], guided=20),
    ]
    teacher = read_run(write_run(tmp_path / "teacher", [5.0, 3.5]))
    summary = summarize(arms(*plain, *let), teacher)
    rows, loss = table(summary), "eval/LanguageCrossEntropy at 0.004M"  # at tokens for which all have a loss
    assert "peak memory" not in rows  # as no run logged it
    assert rows.loc["plain", ["seeds", loss]].tolist() == ["2", "4.000 (3.800..4.200)"]
    assert rows.loc["let", loss] == "4.000 (3.000..6.000)"
    assert rows.loc["let", "tokens to the baseline's end"] == "63% (50%..75%), 2 of 3 seeds"
    assert rows.loc["let", "passes its teacher at"] == "0.00325M (0.003..0.0035), 2 of 3 seeds"
    assert rows.loc["teacher: teacher", [loss, "training time", "compute"]].tolist() == ["3.500", "40 s", "-"]
    assert "Only 2 of its 3 seeds do. Means of 2 to 3 seeds." in verdict(summary)


def test_a_diverged_arm_is_shown_as_such(tmp_path):
    folders = [write_run(tmp_path / "a", [6.0, 5.0]), write_run(tmp_path / "b", [math.inf, math.nan])]
    compare(group(folders), None, tmp_path / "picture")
    _, diverged = json.loads((tmp_path / "picture.json").read_text())["arms"]
    assert diverged["seeds"][0]["final_loss"] is None
    assert diverged["over_seeds"]["loss_at_equal_tokens"] is diverged["over_seeds"]["tokens_to_baseline_loss"] is None
    with pytest.raises(ValueError, match="the final loss of b is nan"):
        compare(group(folders[::-1]), None, tmp_path / "picture")
    spike = write_run(tmp_path / "c", [6.0, math.inf, 4.0])
    assert "c reaches the final loss of a, 5.000" in verdict(summarize(arms(folders[0], spike)))


def test_a_guided_run_that_has_just_begun_is_drawn(tmp_path):
    head = "step,time/token,metrics/eval/LanguageCrossEntropy,let/weight,let/teacher_flops_share"
    (tmp_path / "a.csv").write_text("\n".join([head, "0,0,6.0,,", "1,100,4.0,,", "2,200,3.5,,"]))
    (tmp_path / "b.csv").write_text("\n".join([head, "0,0,6.0,1.0,0.3", "1,100,,0.9,0.3"]))
    compare(group([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")]), None, tmp_path / "picture")
    assert (tmp_path / "picture.html").exists()


def test_files_are_written(tmp_path, capsys):
    plain = [write_run(tmp_path / f"plain-s{n}", [6.0, 5.0, 4.5, 4.0 + n / 10]) for n in (1, 2)]
    let = write_run(tmp_path / "let", [5.0, 4.0, 3.5, 3.0], guided=20)
    out = tmp_path / "out"
    arguments = ["compare", *plain, f"LET, weight 1={let}", "--teacher", plain[0], "--out", str(out / "comparison")]
    assert main(arguments) == 0
    assert {path.name for path in out.iterdir()} == {f"comparison.{s}" for s in ("html", "json", "png", "svg")}
    written = json.loads((out / "comparison.json").read_text())
    assert [arm["arm"] for arm in written["arms"]] == ["plain", "LET, weight 1"]
    assert written["curves"]["plain"][1]["loss"] == [[1000, 2000, 3000, 4000], pytest.approx([6, 5, 4.5, 4.2])]
    assert "LET, weight 1 reaches the final loss of plain" in capsys.readouterr().out
    first = (out / "comparison.svg").read_bytes()
    for text in ("LET, weight 1 reaches the final", "teacher released", "teacher took 14.3%", "of plain training"):
        assert text.encode() in first
    assert main(arguments) == 0
    assert (out / "comparison.svg").read_bytes() == first


@pytest.mark.slow
def test_the_page_in_a_browser(tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    plain = write_run(tmp_path / "plain", [6.0, 5.0, 4.5, 4.0])
    let = write_run(tmp_path / "<b>let</b>", [5.0, 4.0, 3.5, 3.0], guided=20)
    compare(group([plain, f"<i>let</i>={let}"]), None, tmp_path / "page")
    page = (tmp_path / "page.html").read_text()
    assert not re.search(r"(src|href)=.(?!data:)", page)  # nothing is fetched
    assert "&lt;i&gt;let&lt;/i&gt; reaches the final loss of plain" in page and "<i>" not in page
    picture = tmp_path / "seen.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += [f"--screenshot={picture}", "--window-size=1100,2400", (tmp_path / "page.html").as_uri()]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    pixels = imread(picture)[..., :3]
    halves = pixels[: len(pixels) // 2], pixels[len(pixels) // 2 :]
    for color in PALETTE[:2]:  # both arms, over tokens and over compute
        assert all((np.abs(half - to_rgb(color)).max(-1) < 0.02).sum() > 100 for half in halves)


@pytest.mark.slow
def test_what_composer_itself_logs(tmp_path, train, tokenizer, teacher_folder):
    let = LET(teacher_folder, student_layer=1, stop="4ba", weight=0.1)
    for name, algorithms in {"plain-s1": [], "let-s1": [let]}.items():
        loggers = [TensorboardLogger(log_dir=str(tmp_path), flush_interval=1)]
        run = {"run_name": name, "loggers": loggers, "callbacks": [SpeedMonitor(window_size=2)], "max_duration": "8ba"}
        train(*algorithms, **run, eval_dataloader=evaluator(tokenizer), eval_interval="2ba").close()
    runs, batch = arms(f"{tmp_path}/plain-s1", f"{tmp_path}/let-s1"), 8 * LENGTH
    plain, let = (row["seeds"][0] for row in summarize(runs)["arms"])
    assert plain["tokens"] == let["tokens"] == plain["compute"] == 8 * batch
    assert let["compute"] == pytest.approx(batch * (4 + 4 / (1 - read_log(tmp_path / "let-s1")[0][SHARE].iloc[0])))
    assert runs["let"][0].loss[0].tolist() == [2 * batch, 4 * batch, 6 * batch, 8 * batch]
    assert runs["let"][0].guidance["let/weight"][1].tolist() == pytest.approx([0.1, 0.075, 0.05, 0.025, 0])
    assert math.isnan(plain["guided_tokens_per_second"])
    assert min(let["guided_tokens_per_second"], let["plain_tokens_per_second"], plain["plain_tokens_per_second"]) > 0
    assert runs["plain"][0].settings["num_nodes"] == 1 and "let/teacher" not in runs["plain"][0].settings
    assert runs["let"][0].settings["let/teacher"] == teacher_folder


def test_exports_of_other_trackers_give_the_same_run(tmp_path):
    write_run(tmp_path / "let", [5.0, 4.0], guided=5, memory=2.0)
    log, _ = read_log(tmp_path / "let")
    wide = pd.DataFrame(log).rename_axis("_step").reset_index()
    wide.to_csv(tmp_path / "pandas.csv", index=False)  # of wandb.Api().run(...).history()
    long = pd.DataFrame(log).rename_axis("step").melt(ignore_index=False, var_name="metric").dropna().reset_index()
    long.assign(**{"Run": "let", "Run ID": "1f"}).to_csv(tmp_path / "mlflow.csv", index=False)
    (tmp_path / "charts").mkdir()
    for number, name in enumerate(log):  # a file for each chart
        chart = pd.DataFrame({f"let - {name}": log[name], f"let - {name}__MIN": log[name], f"let - {name}__MAX": 9})
        chart.rename_axis("Step").to_csv(tmp_path / "charts" / f"{number}.csv")
    expected = read_run(tmp_path / "let")
    for export in ("pandas.csv", "mlflow.csv", "charts"):
        run = read_run(tmp_path / export)
        for name in ("loss", "compute", "train_seconds", "peak_gb", "guided_speed", "plain_speed"):
            np.testing.assert_allclose(getattr(run, name), getattr(expected, name))
    fifth = wide[wide._step % 5 == 0].drop(columns="time/train")
    for part in (wide[wide._step >= 7], fifth):  # from a later step on; every fifth, without times
        part.to_csv(tmp_path / "part.csv", index=False)
        run = read_run(tmp_path / "part.csv")
        assert run.loss[0].tolist() == [1000, 2000]
        assert ("training time" in table(summarize({"a": [run]}))) == (part is not fifth)
    two = pd.read_csv(tmp_path / "charts" / "0.csv")
    two.assign(**{"other - x": 1}).to_csv(tmp_path / "charts" / "0.csv", index=False)
    long.assign(Run=["a", *["b"] * (len(long) - 1)]).to_csv(tmp_path / "mlflow.csv", index=False)
    (tmp_path / "text.csv").write_text("a,b\n1,2\n")
    for export, message in (
        ("charts", "0.csv holds 2 runs: let, other"),
        ("mlflow.csv", "holds 2 runs: a, b. Export one file for each"),
        ("text.csv", "no column Step, _step or step. Its columns are a, b"),
    ):
        with pytest.raises(ValueError, match=message):
            read_run(tmp_path / export)


def test_the_metric_is_chosen_and_its_direction(tmp_path):
    for name, accuracy in (("a", [0.2, 0.3]), ("b", [0.3, 0.4])):
        folder = write_run(tmp_path / name, [5.0, 4.0])
        with SummaryWriter(folder) as writer:
            for number, value in enumerate(accuracy):
                writer.add_scalar("metrics/pile/Accuracy", value, 10 * (number + 1))
                writer.add_scalar("metrics/eval/pile/LanguageCrossEntropy", 1.0, 10 * (number + 1))
    runs = [str(tmp_path / name) for name in ("a", "b")]
    assert main(["compare", *runs, "--metric", "pile/Accuracy", "--out", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out.json").read_text())
    assert summary["arms"][1]["over_seeds"]["tokens_to_baseline_loss"]["mean"] == 1000
    assert read_run(runs[0], LOSS).metric == LOSS
    with pytest.raises(ValueError, match="Choose with --metric: metrics/eval/Lang.*, metrics/eval"):
        read_run(runs[0])
    with pytest.raises(ValueError, match="no metric Acuracy .did you mean 'Accuracy"):
        read_run(runs[0], "Acuracy")


def test_a_folder_without_runs_is_explained(tmp_path):
    with pytest.raises(ValueError, match="no TensorBoard event files"):
        read_run(tmp_path)
    for name in ("a", "b/c"):
        write_run(tmp_path / "several" / name, [5.0])
    with pytest.raises(ValueError, match="several holds 2 runs: a, b/c. Give each of them"):
        read_run(tmp_path / "several")
    write_run(tmp_path / "several" / "a", [5.0])
    with pytest.raises(ValueError, match="a holds 2 runs, or one that began again"):
        read_run(tmp_path / "several" / "a")
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("time/token", 0, 0)
    with pytest.raises(ValueError, match="was not evaluated"):
        read_run(tmp_path)

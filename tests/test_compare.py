"""Reading what Composer's TensorBoard logger writes, and the numbers made of it."""

import json

import numpy as np
import pytest
from compare import LOSS, crossing, main, read_run, summarize, table
from torch.utils.tensorboard import SummaryWriter

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's and its protobuf's own


def write_run(folder, loss: list[float], guided: int = 0, seconds: float = 2.0) -> str:
    """40 batches of 100 tokens, evaluated after every tenth; guided batches take half as long again."""
    time = 0.0
    with SummaryWriter(str(folder)) as writer:
        for step in range(40):
            writer.add_scalar("time/token", step * 100, step)
            writer.add_scalar("loss/train/total", 5.0, step)
            if step <= guided and guided:
                writer.add_scalar("let/weight", 1 - step / guided, step)
            if step < guided:
                writer.add_scalar("let/cosine", 0.5, step)
                writer.add_scalar("let/constant_cosine", 0.1, step)
            time += seconds * (1.5 if step < guided else 1)
            writer.add_scalar("time/train", time / 3600, step + 1)
        for step, value in zip((10, 20, 30, 40), loss, strict=True):
            writer.add_scalar(LOSS, value, step)
    return str(folder)


def test_crossing():
    curve = (np.array([10.0, 20.0, 30.0]), np.array([6.0, 5.0, 4.0]))
    assert crossing(curve, 4.5) == pytest.approx(25)
    assert crossing(curve, 7.0) == 10
    assert crossing(curve, 3.9) is None


def test_the_table_says_what_was_logged(tmp_path):
    baseline = read_run(write_run(tmp_path / "baseline", [6.0, 5.0, 4.5, 4.0]))
    let = read_run(write_run(tmp_path / "let", [5.0, 4.0, 3.5, 3.0], guided=20))
    rows = summarize([baseline, let])
    assert rows[0]["tokens"] == 4000 and rows[0]["tokens_to_baseline_loss"] == pytest.approx(4000)
    assert rows[1]["tokens_to_baseline_loss"] == pytest.approx(2000)
    assert rows[0]["train_seconds"] == pytest.approx(80, rel=1e-4)
    assert rows[1]["seconds_to_baseline_loss"] == pytest.approx(60, rel=1e-4)
    assert rows[1]["guided_tokens_per_second"] == pytest.approx(100 / 3, rel=1e-3)
    assert rows[1]["plain_tokens_per_second"] == pytest.approx(50, rel=1e-3)
    assert rows[0]["guided_tokens_per_second"] is None
    assert "| let | 3.000 | 0.00M | 100 s | 50% | 75% | 33 | 50 |" in table(rows)


def test_files_are_written(tmp_path, capsys):
    runs = [
        write_run(tmp_path / "baseline", [6.0, 5.0, 4.5, 4.0]),
        write_run(tmp_path / "let", [5.0, 4.0, 3.5, 3.0], guided=20),
    ]
    main([*runs, "--teacher", runs[0], "--out", str(tmp_path / "out" / "comparison")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"comparison.{s}" for s in ("json", "png", "svg")}
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"][1]["run"] == "let"
    assert "final validation loss" in capsys.readouterr().out


def test_a_folder_without_runs_is_explained(tmp_path):
    with pytest.raises(ValueError, match="no TensorBoard event files"):
        read_run(tmp_path)
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("time/token", 0, 0)
    with pytest.raises(ValueError, match="was not evaluated"):
        read_run(tmp_path)

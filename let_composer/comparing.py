"""Compare runs by what Composer logged, several seeds to an arm; the first arm is the baseline.

  let-composer compare runs/baseline runs/let --teacher runs/teacher --out runs/comparison
  let-composer compare "runs/baseline-s*" "runs/let-s*"      # names that differ in the seed's suffix alone
  let-composer compare "plain=runs/2026-01-*" "LET=runs/a" "LET=runs/b" --metric pile/LanguageCrossEntropy

A run is a folder with TensorBoard's event files, or CSV from W&B or MLflow: one file, or a folder of one run's files.
Names that end in -s1, _s1, -seed1 or _seed1 and differ in that alone are seeds of one arm; NAME=RUN says so otherwise,
and patterns may stand for several runs. pile/LanguageCrossEntropy is that of the evaluation loader pile; of accuracies
more is better. Prints a table and writes OUT.html (all in one page), OUT.png, OUT.svg and OUT.json. Times need
Composer's speed monitor, memory its memory monitor, the teacher's compute LET's own metrics.
"""

import argparse
import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from let_composer.files import replacing
from let_composer.logs import METRIC, Curve, Run, read_run

__all__ = ["add_arguments", "cell", "compare", "crossing", "group", "run", "spread", "summarize", "table", "verdict"]

SEED = re.compile(r"[-_]s(eed)?\d+$")
Arms = dict[str, list[Run]]


def group(arguments: Sequence[str]) -> dict[str, list[Path]]:
    """Sort runs into arms: folders or CSV files, or NAME=RUN; patterns are expanded.

    Raises:
        ValueError: If a run does not exist or comes twice.
    """
    arms: dict[str, list[Path]] = {}
    for argument in arguments:
        # Names of arms and of folders may hold a "=" themselves: the first reading that is there is meant.
        splits = [("", argument), *((argument[:i], argument[i + 1 :]) for i, c in enumerate(argument) if c == "=")]
        name, found = next(((n, found) for n, path in splits if (found := _runs(path))), ("", []))
        if not found:
            raise ValueError(f"there is no run at {argument}. Give run folders or CSV files, or NAME=RUN.")
        for path in found:
            if any(path in others for others in arms.values()):
                raise ValueError(f"{path} is given twice. A run is one seed of one arm.")
            arms.setdefault(name or SEED.sub("", path.name.removesuffix(".csv")), []).append(path)
    return arms


def _runs(pattern: str) -> list[Path]:
    if Path(pattern).exists():
        return [Path(pattern)]
    return [path for path in map(Path, sorted(glob.glob(pattern))) if path.is_dir() or path.suffix == ".csv"]


def crossing(curve: Curve, level: float) -> float:
    """Where a falling curve first reaches a level, linear between its points; NaN if it never does."""
    x, y = (of[np.isfinite(curve[1])] for of in curve)
    if not (below := np.flatnonzero(y <= level)).size:
        return np.nan
    i = slice(max(0, int(below[0]) - 1), int(below[0]) + 1)
    return float(np.interp(-level, -y[i], x[i]))


def _measure(run: Run, tokens: float, level: float, teacher: float, sign: int) -> dict[str, Any]:
    """The figures of one run: losses in the metric's unit, times in seconds, compute in the FLOPs of one token of plain
    training; NaN for what was not logged or never happened. Losses are compared at so many ``tokens``; ``level`` and
    ``teacher`` are to be reached, from below if ``sign`` is -1."""
    x, y = run.loss
    end, reached, compute = x[-1], crossing((x, sign * y), sign * level), np.interp(x[-1], *run.compute)
    return {
        "run": run.name,
        "final_loss": y[-1],
        "loss_at_equal_tokens": np.interp(tokens, x, y),
        "tokens": end,
        "compute": compute,
        "teacher_share": 1 - end / compute if compute else np.nan,  # of the compute
        "train_seconds": run.train_seconds[1][-1],
        "tokens_to_baseline_loss": reached,
        "compute_to_baseline_loss": np.interp(reached, *run.compute),
        "seconds_to_baseline_loss": np.interp(reached, *run.train_seconds),
        "tokens_to_teacher_loss": crossing((x, sign * y), sign * teacher),
        "guided_tokens_per_second": run.guided_speed,
        "plain_tokens_per_second": run.plain_speed,
        "peak_gb": run.peak_gb,
    }


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, lowest, highest and number of the values that are there; ``None`` if none is."""
    known: Any = pd.Series(values, dtype=float).dropna()
    return {"mean": known.mean(), "min": known.min(), "max": known.max(), "n": len(known)} if len(known) else None


def summarize(arms: Arms, teacher: Run | None = None) -> dict[str, Any]:
    """All figures: of each run, and their spread over an arm's seeds. The first arm is the baseline; the loss to be
    reached is the mean of its seeds' final ones.

    Raises:
        ValueError: If the baseline's final loss is not a number, or the runs were compared by different metrics.
    """
    baseline, runs = next(iter(arms)), [run for own in arms.values() for run in own]
    metrics = sorted({run.metric for run in runs})
    if len(metrics) > 1:
        raise ValueError(f"the runs were evaluated with different metrics: {', '.join(metrics)}. Choose with --metric.")
    level = float(np.mean([run.loss[1][-1] for run in arms[baseline]]))
    if not np.isfinite(level):
        raise ValueError(f"the final loss of {baseline} is {level}: nothing can be compared to it.")
    tokens, rising = min(run.loss[0][-1] for run in runs), "accuracy" in metrics[0].lower()
    goal, sign = teacher.loss[1][-1] if teacher else np.nan, -1 if rising else 1
    rows = []
    for arm, own in arms.items():
        seeds = [_measure(run, tokens, level, goal, sign) for run in own]
        over_seeds = {key: spread([seed[key] for seed in seeds]) for key in seeds[0] if key != "run"}
        rows.append({"arm": arm, "over_seeds": over_seeds, "seeds": seeds})
    flops = [run.flops_per_token for run in runs]
    return {
        "metric": metrics[0],
        "rising": rising,
        "baseline": baseline,
        "baseline_final_loss": level,
        "equal_tokens": tokens,
        "flops_per_token": flops[0] if np.ptp(flops) < 0.01 * flops[0] else None,  # of plain training, where they agree
        "arms": rows,
        "teacher": _measure(teacher, teacher.loss[0][-1], np.nan, np.nan, 1) if teacher else None,
    }


def verdict(summary: dict[str, Any]) -> str:
    """What the comparison shows, in one or two sentences."""
    baseline, level, (first, *others) = summary["baseline"], summary["baseline_final_loss"], summary["arms"]
    counts = sorted({len(row["seeds"]) for row in summary["arms"]})
    mean = "One seed each." if counts == [1] else f"Means of {' to '.join(map(str, counts))} seeds."
    what = "loss" if METRIC in summary["metric"] else summary["metric"].rpartition("/")[2]
    if not others:
        return f"{baseline} ends at a {what} of {level:.3f}. {mean}"
    reached = [row for row in others if row["over_seeds"]["tokens_to_baseline_loss"]]
    if not reached:
        return f"No arm reaches the final {what} of {baseline}, {level:.3f}. {mean}"

    def rank(row: dict[str, Any]) -> tuple[bool, float]:
        tokens = row["over_seeds"]["tokens_to_baseline_loss"]
        return tokens["n"] < len(row["seeds"]), tokens["mean"]

    best = min(reached, key=rank)
    own, whole, seeds = best["over_seeds"], first["over_seeds"], len(best["seeds"])
    tokens, compute = (own[f"{over}_to_baseline_loss"]["mean"] / whole[over]["mean"] for over in ("tokens", "compute"))
    n = own["tokens_to_baseline_loss"]["n"]
    only = f" Only {n} of its {seeds} seeds do." if n < seeds else ""
    return (
        f"{best['arm']} reaches the final {what} of {baseline}, {level:.3f}, after {tokens:.0%} of its tokens and "
        f"{compute:.0%} of its compute, the teacher's forward included.{only} {mean}"
    )


def cell(values: dict[str, float] | None, seeds: int, form: str, unit: float = 1, suffix: str = "") -> str:
    """A spread in ``unit`` as text: mean (lowest..highest), and of how many seeds, if not of all; - for none."""
    if values is None or np.isnan(unit):
        return "-"
    mean, low, high = (format(values[key] / unit, form) for key in ("mean", "min", "max"))
    band = "" if low == high else f" ({low}..{high})"
    return f"{mean}{suffix}{band}" + ("" if values["n"] == seeds else f", {values['n']} of {seeds} seeds")


def table(summary: dict[str, Any]) -> pd.DataFrame:
    """The summary as text cells, a row for each arm; shares are of the baseline's means, ranges are over seeds."""
    rows = {row["arm"]: (len(row["seeds"]), row["over_seeds"]) for row in summary["arms"]}
    _, whole = rows[summary["baseline"]]
    if summary["teacher"] is not None:
        own = {key: spread([value]) for key, value in summary["teacher"].items() if key != "run"}
        rows[f"teacher: {summary['teacher']['run']}"] = 1, {**own, "compute": None, "teacher_share": None}
    unit, suffix, _ = scale(summary, "tokens")
    compute_unit, compute_suffix, _ = scale(summary, "compute")

    def share(key: str) -> tuple[str, float, str]:
        return ".0%", (whole[key] or {}).get("mean", np.nan), ""

    final = summary["metric"].removeprefix("metrics/")
    columns = {
        f"{final} at {summary['equal_tokens'] / unit:.4g}{suffix}": ("loss_at_equal_tokens", ".3f", 1, ""),
        "tokens": ("tokens", ".4g", unit, suffix),
        "compute": ("compute", ".4g", compute_unit, compute_suffix),
        "of it the teacher's": ("teacher_share", ".1%", 1, ""),
        "training time": ("train_seconds", ",.0f", 1, " s"),
        "tokens to the baseline's end": ("tokens_to_baseline_loss", *share("tokens")),
        "compute to it": ("compute_to_baseline_loss", *share("compute")),
        "time to it": ("seconds_to_baseline_loss", *share("train_seconds")),
        "passes its teacher at": ("tokens_to_teacher_loss", ".4g", unit, suffix),
        "tokens/s guided": ("guided_tokens_per_second", ",.0f", 1, ""),
        "tokens/s plain": ("plain_tokens_per_second", ",.0f", 1, ""),
        "peak memory": ("peak_gb", ".2f", 1, " GB"),
    }
    cells = {column: [cell(row[key], n, *how) for n, row in rows.values()] for column, (key, *how) in columns.items()}
    frame = pd.DataFrame({"seeds": [str(n) for n, _ in rows.values()], **cells}, index=pd.Index(rows, name="arm"))
    return frame.loc[:, (frame != "-").any()]


def scale(summary: dict[str, Any], over: str) -> tuple[float, str, str]:
    """A readable unit of ``tokens`` or ``compute``: its size in tokens of plain training, its suffix and its name."""
    tokens, flops = summary["equal_tokens"], summary["flops_per_token"]
    if over == "compute" and flops:
        sizes = {1e18: "EFLOP", 1e15: "PFLOP", 1e12: "TFLOP"}
        size = next((size for size in sizes if tokens * flops >= 2 * size), 1e12)
        return size / flops, f" {sizes[size]}", sizes[size]
    size, name = (1e9, "billions of tokens") if tokens >= 2e9 else (1e6, "millions of tokens")
    return size, name[0].upper(), f"{name} of plain training" if over == "compute" else name


def compare(arms: dict[str, list[Path]], teacher: Path | str | None, out: Path | str, metric: str = METRIC) -> None:
    """Read runs as :func:`group` sorts them, print their table, and write OUT.html, OUT.png, OUT.svg and OUT.json.

    Raises:
        ValueError: If a run cannot be read or compared.
    """
    from let_composer.picture import write_pictures

    runs = {arm: [read_run(path, metric) for path in paths] for arm, paths in arms.items()}
    teacher_run = read_run(teacher, metric) if teacher else None
    summary = summarize(runs, teacher_run)
    write_pictures(runs, summary, out)
    curves = {arm: [vars(run) for run in of] for arm, of in runs.items()}
    written = {**summary, "curves": curves, "teacher_curves": vars(teacher_run) if teacher_run else None}
    with replacing(Path(f"{out}.json")) as partial:
        pd.Series(written).to_json(partial, indent=1, double_precision=15)
    print(f"{verdict(summary)}\n\n{table(summary).T.to_string()}\n")
    print("Several seeds: mean (lowest..highest). Training the teacher is not counted.")
    print(f"written: {out}.html .png .svg .json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``let-composer compare``."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="[NAME=]RUN; the first arm is the baseline")
    parser.add_argument("--teacher", metavar="RUN", help="the run that trained the teacher, for its cost and its loss")
    parser.add_argument("--out", default="comparison", help="where to write, without suffix (default: %(default)s)")
    parser.add_argument("--metric", default=METRIC, help="a logged metric or its end (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Carry out ``let-composer compare``."""
    compare(group(args.runs), args.teacher, args.out, args.metric)

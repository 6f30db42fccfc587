"""Compare runs by what Composer logged; the first is the baseline.

    python scripts/compare.py runs/quickstart/baseline runs/quickstart/let --teacher runs/quickstart/teacher \
        --out runs/quickstart/comparison

Reads the event files of Composer's TensorBoard logger and, for times, of its speed monitor. Prints a table and writes
OUT.json, OUT.png and OUT.svg.
"""

import argparse
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

__all__ = ["Run", "crossing", "draw", "main", "read_run", "summarize", "table"]

LOSS = "metrics/eval/LanguageCrossEntropy"
Curve = tuple[np.ndarray, np.ndarray]


@dataclass
class Run:
    """What one run logged. A curve is a pair of arrays: tokens seen, value."""

    name: str
    loss: Curve  # validation loss
    train_seconds: Curve  # time in training, evaluation and start-up left out
    guidance: dict[str, Curve]  # the let/ metrics
    guided_seconds: float | None  # mean of one batch, over guided batches after the first two
    plain_seconds: float | None
    peak_gib: float | None


def read_run(folder: str | Path) -> Run:
    """Read the event files of one run.

    Args:
        folder: Holds the event files, directly or in folders below.

    Raises:
        ValueError: If there are none, or nothing was evaluated.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = Path(folder)
    series: dict[str, dict[int, float]] = {}
    for part in sorted({file.parent for file in folder.rglob("events.out.tfevents.*")}):
        events = EventAccumulator(str(part), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            # A resumed run logs some steps twice: the later value is the one that training went on from.
            series.setdefault(tag, {}).update((event.step, event.value) for event in events.Scalars(tag))
    if not series:
        raise ValueError(f"there are no TensorBoard event files in {folder}. Give the run's folder under log_dir.")
    if LOSS not in series:
        raise ValueError(f"{folder} has no {LOSS}: the run was not evaluated. Set eval_loader and eval_interval.")

    # Composer logs under the number of batches done before the event: time/token at the start of a batch, evaluations
    # and the speed monitor after it.
    steps, tokens = (np.array(a, dtype=float) for a in zip(*sorted(series["time/token"].items()), strict=True))
    steps, tokens = np.append(steps, steps[-1] + 1), np.append(tokens, tokens[-1] + np.diff(tokens, prepend=0).max())

    def curve(tag: str) -> Curve:
        x, y = (np.array(a, dtype=float) for a in zip(*sorted(series.get(tag, {0: np.nan}).items()), strict=True))
        return np.interp(x, steps, tokens), y

    hours = dict(sorted(series.get("time/train", {}).items()))
    guided = {step + 1 for step, weight in series.get("let/weight", {}).items() if weight > 0}

    def seconds(kind: bool) -> float | None:
        ends = [step for step in hours if step > 2 and step - 1 in hours and (step in guided) == kind]
        return float(np.mean([hours[s] - hours[s - 1] for s in ends])) * 3600 if ends else None

    peaks = series.get("memory/peak_allocated_mem", {})
    train_tokens, train_hours = curve("time/train")
    return Run(
        name=folder.name,
        loss=curve(LOSS),
        train_seconds=(train_tokens, train_hours * 3600),
        guidance={tag: curve(tag) for tag in series if tag.startswith("let/")},
        guided_seconds=seconds(True),
        plain_seconds=seconds(False),
        peak_gib=max(peaks.values()) if peaks else None,
    )


def crossing(curve: Curve, level: float) -> float | None:
    """Where a falling curve first reaches a level, linear between its points; ``None`` if it never does."""
    x, y = curve
    below = np.flatnonzero(y <= level)
    if not len(below):
        return None
    i = int(below[0])
    if i == 0:
        return float(x[0])
    return float(x[i - 1] + (x[i] - x[i - 1]) * (y[i - 1] - level) / (y[i - 1] - y[i]))


def summarize(runs: list[Run], teacher: Run | None = None) -> list[dict]:
    """One row per run: final loss, and what it took to reach the baseline's.

    Args:
        runs: The first is the baseline.
        teacher: The run that trained the teacher; its time is what a user who has no teacher pays on top.
    """
    level = runs[0].loss[1][-1]
    rows = []
    for run in [*runs, *([teacher] if teacher else [])]:
        tokens = crossing(run.loss, level) if run is not teacher else None
        batch = float(np.diff(run.train_seconds[0]).max()) if len(run.train_seconds[0]) > 1 else float("nan")
        rows.append(
            {
                "run": run.name,
                "final_loss": float(run.loss[1][-1]),
                "tokens": float(run.loss[0][-1]),
                "train_seconds": float(run.train_seconds[1][-1]),
                "tokens_to_baseline_loss": tokens,
                "seconds_to_baseline_loss": None if tokens is None else float(np.interp(tokens, *run.train_seconds)),
                "guided_tokens_per_second": batch / run.guided_seconds if run.guided_seconds else None,
                "plain_tokens_per_second": batch / run.plain_seconds if run.plain_seconds else None,
                "peak_gib": run.peak_gib,
            }
        )
    return rows


def table(rows: list[dict]) -> str:
    """The rows as Markdown; shares are of the first row's totals."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None or value != value else format(value, form)

    def share(value: float | None, whole: float) -> str:
        return "-" if value is None else f"{value / whole:.0%}"

    lines = [
        "| run | final validation loss | tokens | training time | tokens to baseline's final loss | time to it "
        "| tokens/s guided | tokens/s plain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['run']} | {number(row['final_loss'], '.3f')} | {row['tokens'] / 1e6:.2f}M "
            f"| {number(row['train_seconds'], '.0f')} s "
            f"| {share(row['tokens_to_baseline_loss'], rows[0]['tokens'])} "
            f"| {share(row['seconds_to_baseline_loss'], rows[0]['train_seconds'])} "
            f"| {number(row['guided_tokens_per_second'], ',.0f')} | {number(row['plain_tokens_per_second'], ',.0f')} |"
        )
    return "\n".join(lines)


def draw(runs: list[Run], out: str | Path, teacher: Run | None = None) -> None:
    """Write OUT.png and OUT.svg: validation loss, weight of the guidance, cosine beside the constant vector's score."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = ["#777777", "#c8442a", "#2a6fc8", "#3a9a4f", "#8a52b0"]
    figure, axes = plt.subplots(3, 1, figsize=(8, 8.5), sharex=True, height_ratios=[3, 1, 1.6], constrained_layout=True)
    losses, weights, cosines = axes
    level = runs[0].loss[1][-1]
    for run, color in zip(runs, colors * len(runs), strict=False):
        tokens, values = run.loss
        losses.plot(tokens / 1e6, values, "o-", ms=3, color=color, label=f"{run.name}: {values[-1]:.3f}")
        if run is not runs[0] and (reached := crossing(run.loss, level)) is not None:
            losses.plot([reached / 1e6], [level], "*", ms=14, color=color, zorder=3)
            losses.annotate(
                f"{run.name} is there after\n{reached / runs[0].loss[0][-1]:.0%} of the tokens",
                (reached / 1e6, level),
                xytext=(-12, -46),
                textcoords="offset points",
                ha="right",
                color=color,
                arrowprops={"arrowstyle": "-", "color": color},
            )
        if "let/weight" in run.guidance:
            weights.plot(run.guidance["let/weight"][0] / 1e6, run.guidance["let/weight"][1], color=color)
            cosines.plot(*_millions(run.guidance["let/cosine"]), color=color, label=f"{run.name}: student and teacher")
            cosines.plot(
                *_millions(run.guidance["let/constant_cosine"]), "--", color=color, label="the best constant vector"
            )
    losses.axhline(level, color=colors[0], lw=1, ls=":", label="the baseline's final loss")
    if teacher is not None:
        losses.axhline(teacher.loss[1][-1], color="#c8a22a", lw=1, ls="-.", label=f"teacher: {teacher.loss[1][-1]:.3f}")
    losses.set_ylabel("validation loss [nats/token]")
    losses.legend()
    weights.set_ylabel("weight of\nthe guidance")
    weights.set_ylim(bottom=0)
    cosines.set_ylabel("cosine")
    if cosines.lines:
        cosines.legend()
    cosines.set_xlabel("tokens seen by the student [millions]")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for suffix in ("png", "svg"):
        partial = Path(f"{out}.partial.{suffix}")
        figure.savefig(partial, dpi=130)
        os.replace(partial, f"{out}.{suffix}")
    plt.close(figure)


def _millions(curve: Curve) -> Curve:
    return curve[0] / 1e6, curve[1]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="run folders; the first is the baseline")
    parser.add_argument("--teacher", help="the run that trained the teacher, for its cost and its loss")
    parser.add_argument("--out", default="comparison", help="where to write, without suffix (default: comparison)")
    options = parser.parse_args(arguments)
    runs = [read_run(folder) for folder in options.runs]
    teacher = read_run(options.teacher) if options.teacher else None
    rows = summarize(runs, teacher)
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    draw(runs, options.out, teacher)
    details = [asdict(run) for run in runs]
    partial = Path(f"{options.out}.partial.json")
    partial.write_text(json.dumps({"rows": rows, "runs": details}, indent=1, default=lambda array: array.tolist()))
    os.replace(partial, f"{options.out}.json")
    print(table(rows))
    print(f"\nwritten: {options.out}.json, {options.out}.png, {options.out}.svg")


if __name__ == "__main__":
    main()

"""Compare runs by what Composer logged, several seeds to an arm; the first arm is the baseline.

    python scripts/compare.py runs/quickstart/baseline runs/quickstart/let --teacher runs/quickstart/teacher \
        --out runs/quickstart/comparison
    python scripts/compare.py "runs/baseline-s*" "runs/let-s*"       # names that differ in the seed's suffix alone
    python scripts/compare.py "plain=runs/2026-01-*" "LET, weight 1=runs/a" "LET, weight 1=runs/b"

Runs whose names differ in a final -s1, _s1, -seed1 or _seed1 alone are seeds of one arm; NAME=FOLDER, where a pattern
may stand for several folders, says so otherwise. Reads the event files of Composer's TensorBoard logger, for times its
speed monitor's, for memory its memory monitor's. Prints a table and writes OUT.json, OUT.png and OUT.svg.
"""

import argparse
import glob
import json
import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Run", "crossing", "draw", "group", "main", "measure", "read_run", "spread", "summarize", "table"]

LOSS = "metrics/eval/LanguageCrossEntropy"
SEED = re.compile(r"[-_]s(eed)?\d+$")
Curve = tuple[np.ndarray, np.ndarray]
Arms = dict[str, list["Run"]]


@dataclass
class Run:
    """What one run logged. A curve is a pair of arrays: tokens seen, value."""

    name: str
    loss: Curve  # validation loss
    train_seconds: Curve  # time in training, evaluation and start-up left out
    guidance: dict[str, Curve]  # the let/ metrics
    guided_seconds: float | None  # mean of one batch, over guided batches after the first two
    plain_seconds: float | None
    peak_gb: float | None  # 1e9 bytes, allocated on the device


def group(arguments: list[str]) -> dict[str, list[Path]]:
    """Sort run folders into arms.

    Args:
        arguments: Folders, or NAME=FOLDER; patterns are expanded.

    Returns:
        Folders by arm, in the order of the arguments.

    Raises:
        ValueError: If a folder does not exist or comes twice.
    """
    arms: dict[str, list[Path]] = {}
    for argument in arguments:
        # Names of arms and of folders may hold a "=" themselves: the first reading that is there is meant.
        splits = [("", argument), *((argument[:i], argument[i + 1 :]) for i, c in enumerate(argument) if c == "=")]
        name, folders = next(((n, found) for n, path in splits if (found := _folders(path))), ("", []))
        if not folders:
            raise ValueError(f"there is no run at {argument}. Give run folders, or NAME=FOLDER.")
        for folder in folders:
            if any(folder in others for others in arms.values()):
                raise ValueError(f"{folder} is given twice. A run is one seed of one arm.")
            arms.setdefault(name or SEED.sub("", folder.name), []).append(folder)
    return arms


def _folders(pattern: str) -> list[Path]:
    if Path(pattern).is_dir():
        return [Path(pattern)]
    return [folder for found in sorted(glob.glob(pattern)) if (folder := Path(found)).is_dir()]


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
        peak_gb=max(peaks.values()) if peaks else None,
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


def measure(run: Run, tokens: float, level: float, teacher_loss: float | None = None) -> dict[str, Any]:
    """The figures of one run.

    Args:
        run: The run.
        tokens: Where losses are compared.
        level: The loss to be reached, the baseline's final one.
        teacher_loss: The teacher's; default: ``None``, unknown.

    Returns:
        Losses in nats per token, times in seconds; ``None`` for what was not logged or never happened.
    """

    def known(value: float) -> float | None:
        return float(value) if np.isfinite(value) else None

    def time(at: float | None) -> float | None:
        return None if at is None else known(float(np.interp(at, *run.train_seconds)))

    reached = crossing(run.loss, level)
    x = run.train_seconds[0]
    batch = float(np.diff(x).max()) if len(x) > 1 else None
    return {
        "run": run.name,
        "final_loss": known(run.loss[1][-1]),
        "loss_at_equal_tokens": known(float(np.interp(tokens, *run.loss))),
        "tokens": float(run.loss[0][-1]),
        "train_seconds": time(x[-1]),
        "tokens_to_baseline_loss": reached,
        "seconds_to_baseline_loss": time(reached),
        "tokens_to_teacher_loss": None if teacher_loss is None else crossing(run.loss, teacher_loss),
        "guided_tokens_per_second": batch / run.guided_seconds if batch and run.guided_seconds else None,
        "plain_tokens_per_second": batch / run.plain_seconds if batch and run.plain_seconds else None,
        "peak_gb": run.peak_gb,
    }


def spread(values: list[float | None]) -> dict[str, float] | None:
    """Mean, lowest, highest and sample deviation of the values that are there; ``None`` if none is."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    deviation = float(np.std(known, ddof=1)) if len(known) > 1 else 0.0
    return {"mean": float(np.mean(known)), "min": min(known), "max": max(known), "std": deviation, "n": len(known)}


def summarize(arms: Arms, teacher: Run | None = None) -> dict[str, Any]:
    """All figures: of each run, and their spread over an arm's seeds.

    Args:
        arms: Runs by arm; the first arm is the baseline. The loss to be reached is the mean of its seeds' final ones.
        teacher: The run that trained the teacher; its time is what a user who has no teacher pays on top.

    Raises:
        ValueError: If the baseline's final loss is not a number.
    """
    baseline = next(iter(arms))
    level = float(np.mean([run.loss[1][-1] for run in arms[baseline]]))
    if not np.isfinite(level):
        raise ValueError(f"the final loss of {baseline} is {level}: nothing can be compared to it.")
    tokens = float(min(run.loss[0][-1] for runs in arms.values() for run in runs))
    teacher_loss = None if teacher is None else float(teacher.loss[1][-1])
    rows = []
    for arm, runs in arms.items():
        seeds = [measure(run, tokens, level, teacher_loss) for run in runs]
        over_seeds = {key: spread([seed[key] for seed in seeds]) for key in seeds[0] if key != "run"}
        rows.append({"arm": arm, "over_seeds": over_seeds, "seeds": seeds})
    return {
        "baseline": baseline,
        "baseline_final_loss": level,
        "equal_tokens": tokens,
        "arms": rows,
        "teacher": None if teacher is None else measure(teacher, teacher.loss[0][-1], -np.inf),
    }


def table(summary: dict[str, Any]) -> str:
    """The summary as Markdown; shares are of the baseline's means, several seeds are shown as mean (min..max)."""
    unit, name = _unit(summary["equal_tokens"])
    whole = summary["arms"][0]["over_seeds"]
    lines = [
        f"| arm | seeds | validation loss at {summary['equal_tokens'] / unit:.4g}{name[0].upper()} tokens | tokens "
        "| training time | tokens to the baseline's final loss | time to it | passes its teacher at "
        "| tokens/s guided | tokens/s plain | peak memory |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]

    def cell(values: dict[str, float] | None, form: str, seeds: int, scale: float = 1, suffix: str = "") -> str:
        if values is None:
            return "-"
        mean, low, high = (format(values[key] / scale, form) for key in ("mean", "min", "max"))
        band = "" if low == high else f" ({low}..{high})"
        return f"{mean}{suffix}{band}" + ("" if values["n"] == seeds else f", {values['n']:.0f} of {seeds} seeds")

    rows = [(row["arm"], len(row["seeds"]), row["over_seeds"]) for row in summary["arms"]]
    if summary["teacher"] is not None:
        row = {key: spread([value]) for key, value in summary["teacher"].items() if key != "run"}
        rows.append((f"teacher: {summary['teacher']['run']}", 1, row))
    for arm, seeds, row in rows:
        cells = [
            cell(row["loss_at_equal_tokens"], ".3f", seeds),
            cell(row["tokens"], ".4g", seeds, unit, name[0].upper()),
            cell(row["train_seconds"], ",.0f", seeds, 1, " s"),
            cell(row["tokens_to_baseline_loss"], ".0%", seeds, whole["tokens"]["mean"]),
            cell(row["seconds_to_baseline_loss"], ".0%", seeds, (whole["train_seconds"] or {}).get("mean", 1)),
            cell(row["tokens_to_teacher_loss"], ".4g", seeds, unit, name[0].upper()),
            cell(row["guided_tokens_per_second"], ",.0f", seeds),
            cell(row["plain_tokens_per_second"], ",.0f", seeds),
            cell(row["peak_gb"], ".2f", seeds, 1, " GB"),
        ]
        lines.append(f"| {arm} | {seeds} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _unit(tokens: float) -> tuple[float, str]:
    return (1e9, "billions") if tokens >= 2e9 else (1e6, "millions")


def _mean(curves: list[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, mean, lowest and highest over seeds, as far as all of them went."""
    end = min(x[-1] for x, _ in curves)
    grid = curves[0][0][curves[0][0] <= end]
    values = np.stack([np.interp(grid, x, y) for x, y in curves])
    return grid, values.mean(0), values.min(0), values.max(0)


def _apart(wanted: list[float], gap: float) -> list[float]:
    """Heights for labels, as near as possible to where they belong, none closer than ``gap`` to the next."""
    order = np.argsort(wanted)
    placed = np.array(wanted, dtype=float)[order]
    for _ in range(200):
        short = gap - np.diff(placed)
        if (short <= 1e-9).all():
            break
        push = np.maximum(short, 0) / 2
        placed[:-1] -= push
        placed[1:] += push
    result = np.empty_like(placed)
    result[order] = placed
    return result.tolist()


def draw(arms: Arms, summary: dict[str, Any], out: str | Path, teacher: Run | None = None) -> None:
    """Write OUT.png and OUT.svg: validation loss and, of guided arms, the guidance's weight and the cosine.

    Args:
        arms: As given to :func:`summarize`.
        summary: What it returned.
        out: Path without suffix.
        teacher: As given to :func:`summarize`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "compare"  # the same bytes for the same runs
    palette = ["#666666", "#c8442a", "#2a6fc8", "#2f8f46", "#8a52b0", "#b8860b", "#1b9e9e", "#d0578f"]
    colors = {arm: palette[1 + (i - 1) % (len(palette) - 1) if i else 0] for i, arm in enumerate(arms)}
    guided = {arm: runs for arm, runs in arms.items() if all("let/cosine" in run.guidance for run in runs)}
    rows, heights = (3, [3.2, 0.8, 1.4]) if guided else (1, [1])
    figure, axes = plt.subplots(
        rows,
        1,
        figsize=(9.5, 8.5 if guided else 5),
        sharex=True,
        height_ratios=heights,
        constrained_layout=True,
        squeeze=False,
    )
    losses = axes[0][0]
    unit, name = _unit(summary["equal_tokens"])
    level, whole = summary["baseline_final_loss"], summary["arms"][0]["over_seeds"]

    def band(axis: Any, curves: list[Curve], color: str, style: str = "-") -> tuple[float, float]:
        x, mean, low, high = _mean(curves)
        axis.fill_between(x / unit, low, high, color=color, alpha=0.2, lw=0)
        axis.plot(x / unit, mean, style, color=color, lw=1.8)
        return float(x[-1] / unit), float(mean[-1])

    labels: list[tuple[float, float, str, str]] = []
    for row in summary["arms"]:
        arm, reached = row["arm"], row["over_seeds"]["tokens_to_baseline_loss"]
        x, y = band(losses, [run.loss for run in arms[arm]], colors[arm])
        text = f"{arm}: {y:.3f}"
        if arm != summary["baseline"] and reached is not None:
            losses.plot(reached["mean"] / unit, level, "*", ms=15, color=colors[arm], mec="white", zorder=4)
            share = reached["mean"] / whole["tokens"]["mean"]
            seconds = row["over_seeds"]["seconds_to_baseline_loss"]
            if len(arms) > 4:
                text += f", ★ {share:.0%}"
            else:
                text += f"\n★ after {share:.0%} of the tokens"
                if seconds is not None and whole["train_seconds"] is not None:
                    text += f",\n{seconds['mean'] / whole['train_seconds']['mean']:.0%} of the time"
        labels.append((x, y, text, colors[arm]))
    losses.axhline(level, color=palette[0], lw=1, ls=":")

    # From where the baseline has done a fifth: what it does before that is so steep that it would hide the differences.
    x, y, *_ = _mean([run.loss for run in arms[summary["baseline"]]])
    top = max(float(np.interp(0.2 * x[-1], x, y)), level + 1e-3)
    bottom = float(np.nanmin(np.concatenate([run.loss[1] for runs in arms.values() for run in runs])))
    if teacher is not None:
        own = float(teacher.loss[1][-1])
        if bottom - own <= top - bottom:
            losses.axhline(own, color="black", lw=1, ls="--")
            labels.append((0, own, f"its teacher: {own:.3f}", "black"))
            bottom = min(bottom, own)
        else:
            losses.annotate(f"its teacher, {own:.3f}, is below", (0.01, 0.02), xycoords="axes fraction")
    margin = 0.06 * (top - bottom)
    losses.set_ylim(bottom - margin, top + margin)
    right = max(x for x, *_ in labels)
    lines = max(text.count("\n") + 1 for *_, text, _ in labels)
    ends = [y if y <= top else top for _, y, *_ in labels]  # too high, or not a number
    places = _apart(ends, (0.02 + 0.045 * lines) * (top - bottom))
    for (*_, text, color), end, place in zip(labels, ends, places, strict=True):
        losses.annotate(
            text,
            (right, end),
            xytext=(1.03 * right, place),
            va="center",
            color=color,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.8},
        )
    losses.set_ylabel("validation loss [nats/token]")
    losses.set_xlim(0, right)
    losses.set_title(_headline(summary, arms), loc="left", fontsize=11)

    if guided:
        weights, cosines = axes[1][0], axes[2][0]
        for arm, runs in guided.items():
            band(weights, [run.guidance["let/weight"] for run in runs], colors[arm])
            for tag, style, text in (
                ("cosine", "-", "student\nand teacher"),
                ("constant_cosine", "--", "best constant\nvector"),
            ):
                x, y = band(cosines, [run.guidance[f"let/{tag}"] for run in runs], colors[arm], style)
                if arm == next(iter(guided)):
                    cosines.annotate(
                        text, (x, y), xytext=(8, 0), textcoords="offset points", va="center", color=colors[arm]
                    )
        weights.set_ylabel("weight of\nthe guidance")
        weights.set_ylim(bottom=0)
        cosines.set_ylabel("cosine")
    axes[-1][0].set_xlabel(f"tokens seen by the student [{name}]")
    for (axis,) in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for suffix in ("png", "svg"):
        partial = Path(f"{out}.partial.{suffix}")
        figure.savefig(partial, dpi=130, metadata={"Date": None} if suffix == "svg" else None)
        os.replace(partial, f"{out}.{suffix}")
    plt.close(figure)


def _headline(summary: dict[str, Any], arms: Arms) -> str:
    whole = summary["arms"][0]["over_seeds"]["tokens"]["mean"]
    reached = {
        row["arm"]: row["over_seeds"]["tokens_to_baseline_loss"]["mean"] / whole
        for row in summary["arms"][1:]
        if row["over_seeds"]["tokens_to_baseline_loss"] is not None
    }
    counts = sorted({len(runs) for runs in arms.values()})
    seeds = (
        "one seed each" if counts == [1] else f"mean of {' to '.join(map(str, counts))} seeds, band: lowest to highest"
    )
    if len(arms) == 1:
        return f"{summary['baseline']} ({seeds})"
    if not reached:
        return f"No arm reaches {summary['baseline']}'s final loss (dotted; {seeds})"
    best = min(reached, key=reached.__getitem__)
    return (
        f"{best} reaches {summary['baseline']}'s final loss (dotted) after {reached[best]:.0%} of its tokens\n({seeds})"
    )


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Command line; returns the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="[NAME=]FOLDER; the first arm is the baseline")
    parser.add_argument("--teacher", help="the run that trained the teacher, for its cost and its loss")
    parser.add_argument("--out", default="comparison", help="where to write, without suffix (default: comparison)")
    options = parser.parse_args(arguments)
    arms = {arm: [read_run(folder) for folder in folders] for arm, folders in group(options.runs).items()}
    teacher = read_run(options.teacher) if options.teacher else None
    summary = summarize(arms, teacher)
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    draw(arms, summary, options.out, teacher)
    curves = {arm: [asdict(run) for run in runs] for arm, runs in arms.items()}
    written = {**summary, "curves": curves, "teacher_curves": asdict(teacher) if teacher else None}
    partial = Path(f"{options.out}.partial.json")
    partial.write_text(json.dumps(written, indent=1, default=_plain, allow_nan=False))
    os.replace(partial, f"{options.out}.json")
    print(table(summary))
    print("\nSeveral seeds: mean (min..max). Shares are of the baseline's mean tokens and training time.")
    print(f"written: {options.out}.json, {options.out}.png, {options.out}.svg")
    return summary


def _plain(array: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in array]


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"compare: {error}")

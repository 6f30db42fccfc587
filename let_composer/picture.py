"""A comparison as pictures and as one page that needs nothing beside it."""

import base64
import html
import io
import os
import platform
import textwrap
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from let_composer import __version__
from let_composer.comparing import Arms, scale, table, verdict
from let_composer.logs import METRIC, Curve, Run

__all__ = ["draw", "write_page"]

PALETTE = ("#666666", "#c8442a", "#2a6fc8", "#2f8f46", "#8a52b0", "#b8860b", "#1b9e9e", "#d0578f")
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
h1 {{ font-size: 1.4rem }} h2 {{ font-size: 1.1rem; margin-top: 2rem }} img {{ width: 100% }}
table {{ border-collapse: collapse; font-size: .85rem; display: block; overflow-x: auto }}
th, td {{ border: 0; border-bottom: 1px solid #ddd; padding: .3rem .7rem; text-align: right; vertical-align: top }}
th:first-child, td:first-child {{ text-align: left }} td {{ overflow-wrap: anywhere }} p.note {{ color: #666 }}
</style></head><body>
<h1>{title}</h1>
{table}
<p class="note">Several seeds: mean (lowest..highest). Shares are of the baseline's means. Compute counts the teacher's
forward as LET logged it; it does not count training the teacher.</p>
<h2>Over tokens</h2><img alt="curves over tokens" src="{tokens}">
<h2>Over compute, the teacher's included</h2><img alt="curves over compute" src="{compute}">
<h2>Settings that differ</h2>{differ}
<details><summary>Settings that all runs share</summary>{shared}</details>
<h2>Environment</h2>{environment}
</body></html>
"""


def draw(arms: Arms, summary: dict[str, Any], out: str | Path, teacher: Run | None = None) -> None:
    """Write OUT.png and OUT.svg: the curves over tokens and, of guided arms, the guidance's weight and the cosine.

    Args:
        arms: As given to :func:`let_composer.comparing.summarize`.
        summary: What it returned.
        out: Path without suffix.
        teacher: As given to it.
    """
    for suffix in ("png", "svg"):
        partial = Path(f"{out}.partial.{suffix}")
        partial.write_bytes(_figure(arms, summary, teacher, "tokens", suffix))
        os.replace(partial, f"{out}.{suffix}")


def write_page(arms: Arms, summary: dict[str, Any], out: str | Path, teacher: Run | None = None) -> None:
    """Write OUT.html: verdict, table, curves over tokens and over compute, settings, environment.

    Args:
        arms: As for :func:`draw`.
        summary: As for :func:`draw`.
        out: As for :func:`draw`.
        teacher: As for :func:`draw`.
    """
    differ, shared = _settings(arms)
    unknown = "<p>These runs logged no settings: only TensorBoard's event files hold them.</p>"
    environment = pd.Series(
        {
            "page made": date.today().isoformat(),
            "with": f"let-composer {__version__}, pandas {pd.__version__}, Python {platform.python_version()}",
            **{name: value for name, value in shared.items() if str(name).startswith(("composer_", "num_"))},
        }
    )
    images = {
        axis: "data:image/svg+xml;base64," + base64.b64encode(_figure(arms, summary, teacher, axis, "svg")).decode()
        for axis in ("tokens", "compute")
    }
    page = PAGE.format(
        title=html.escape(verdict(summary)),
        table=table(summary).T.to_html(border=0),
        **images,
        differ=differ.to_html(border=0) if len(differ) else unknown if shared.empty else "<p>None.</p>",
        shared=shared.to_frame("").to_html(border=0, header=False),
        environment=environment.to_frame("").to_html(border=0, header=False),
    )
    partial = Path(f"{out}.partial.html")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, f"{out}.html")


def _settings(arms: Arms) -> tuple[pd.DataFrame, pd.Series]:
    """Settings by arm where arms differ, and those that all share; several values of an arm's seeds side by side."""
    keys = sorted({key for runs in arms.values() for run in runs for key in run.settings})
    rows = {
        key: {
            arm: ", ".join(dict.fromkeys(str(run.settings.get(key, "not set")) for run in runs))
            for arm, runs in arms.items()
        }
        for key in keys
    }
    differ = {key: row for key, row in rows.items() if len(set(row.values())) > 1}
    shared = {key: next(iter(row.values())) for key, row in rows.items() if key not in differ}
    return pd.DataFrame.from_dict(differ, orient="index"), pd.Series(shared, dtype=object)


def _figure(arms: Arms, summary: dict[str, Any], teacher: Run | None, over: str, suffix: str) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    baseline, level, sign = summary["baseline"], summary["baseline_final_loss"], -1 if summary["rising"] else 1
    colors = {arm: PALETTE[1 + (i - 1) % (len(PALETTE) - 1) if i else 0] for i, arm in enumerate(arms)}
    unit, name = scale(summary["equal_tokens"])
    if over == "tokens":
        label = f"tokens seen by the student [{name}]"
    elif flops := summary["flops_per_token"]:
        unit, label = 1e15 / flops, "compute of student and teacher [PFLOP]"
    else:
        label = f"compute of student and teacher [of plain training on so many {name} of tokens]"

    def placed(run: Run, curve: Curve) -> Curve:
        return (curve[0] if over == "tokens" else np.interp(curve[0], *run.compute)) / unit, curve[1]

    def band(axis: Any, arm: str, curves: list[Curve], style: str = "-") -> tuple[float, float]:
        x, mean, low, high = _mean(curves)
        axis.fill_between(x, low, high, color=colors[arm], alpha=0.2, lw=0)
        axis.plot(x, mean, style, color=colors[arm], lw=1.8)
        return float(x[-1]), float(mean[-1])

    guidance: dict[str, dict[str, list[Curve]]] = {}  # by metric and arm
    for arm, runs in arms.items():
        for tag in ("weight", "cosine", "constant_cosine"):
            found = [placed(run, c) for run in runs for key, c in run.guidance.items() if key.partition("/")[2] == tag]
            if len(found) == len(runs):
                guidance.setdefault(tag, {})[arm] = found
    below = [panel for panel in ("weight", "cosine") if panel in guidance]
    heights = [3.2, *({"weight": 0.8, "cosine": 1.4}[panel] for panel in below)]
    with plt.rc_context({"svg.hashsalt": f"compare {over}"}):  # the same bytes for the same runs
        figure, axes = plt.subplots(
            len(heights), 1, figsize=(9.5, 3.3 + 1.65 * sum(heights[1:]) + 1.7), sharex=True, height_ratios=heights,
            layout="constrained", squeeze=False,
        )  # fmt: skip
        losses, *panels = axes[:, 0]
        losses.axhline(level, color=PALETTE[0], lw=1, ls=":")
        labels: list[tuple[float, float, str, str]] = []
        for row in summary["arms"]:
            arm, own = row["arm"], row["over_seeds"]
            curves = [placed(run, run.loss) for run in arms[arm]]
            x, y = band(losses, arm, curves)
            text = f"{arm}: {y:.3f}"
            reached, whole = own[f"{over}_to_baseline_loss"], summary["arms"][0]["over_seeds"][over]
            if arm != baseline and reached and whole:
                losses.plot(reached["mean"] / unit, level, "*", ms=15, color=colors[arm], mec="white", zorder=4)
                share = f"{reached['mean'] / whole['mean']:.0%}"
                text += f", ★ {share}" if len(arms) > 4 else f"\n★ after {share} of the {over}"
            labels.append((x, y, text, colors[arm]))

        # From where the baseline has done a fifth: what it does before is so steep that it would hide the differences.
        x, y, *_ = _mean([placed(run, run.loss) for run in arms[baseline]])
        worst = level + sign * max(sign * (float(np.interp(0.2 * x[-1], x, y)) - level), 1e-3)
        best = sign * float(np.nanmin(np.concatenate([sign * run.loss[1] for runs in arms.values() for run in runs])))
        if teacher is not None:
            own = float(teacher.loss[1][-1])
            if abs(best - own) <= abs(worst - best):
                losses.axhline(own, color="black", lw=1, ls="--")
                labels.append((0, own, f"its teacher: {own:.3f}", "black"))
                best = sign * min(sign * best, sign * own)
            else:
                losses.annotate(f"its teacher, {own:.3f}, is beyond", (0.01, 0.02), xycoords="axes fraction")
        low, high = sorted((best, worst))
        margin = 0.06 * (high - low)
        losses.set_ylim(low - margin, high + margin)
        right = max(x for x, *_ in labels)
        lines = max(text.count("\n") + 1 for *_, text, _ in labels)
        ends = [min(max(y, low), high) if np.isfinite(y) else worst for _, y, *_ in labels]
        places = _apart(ends, (0.02 + 0.045 * lines) * (high - low))
        for (*_, text, color), end, place in zip(labels, ends, places, strict=True):
            losses.annotate(
                text, (right, end), xytext=(1.03 * right, place), va="center", color=color, annotation_clip=False,
                arrowprops={"arrowstyle": "-", "color": color, "lw": 0.8},
            )  # fmt: skip
        is_loss = summary["metric"].endswith(METRIC)
        losses.set_ylabel("validation loss [nats/token]" if is_loss else summary["metric"].removeprefix("metrics/"))
        losses.set_xlim(0, right)
        losses.set_title("\n".join(textwrap.wrap(verdict(summary), 90)), loc="left", fontsize=11)

        for panel, axis in zip(below, panels, strict=True):
            axis.set_ylabel("weight of\nthe guidance" if panel == "weight" else "cosine")
            for tag, style, text in (
                ("weight", "-", ""),
                ("cosine", "-", "student\nand teacher"),
                ("constant_cosine", "--", "best constant\nvector"),
            ):
                if not tag.endswith(panel):
                    continue
                for number, (arm, curves) in enumerate(guidance.get(tag, {}).items()):
                    end = band(axis, arm, curves, style)
                    if number == 0:
                        axis.annotate(
                            text, end, xytext=(8, 0), textcoords="offset points", va="center", color=colors[arm]
                        )
            if panel == "weight":
                axis.set_ylim(bottom=0)
        axes[-1][0].set_xlabel(label)
        for axis in axes[:, 0]:
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        written = io.BytesIO()
        figure.savefig(written, format=suffix, dpi=130, metadata={"Date": None} if suffix == "svg" else None)
        plt.close(figure)
    return written.getvalue()


def _mean(curves: list[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Where, mean, lowest and highest over seeds, as far as all of them went."""
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

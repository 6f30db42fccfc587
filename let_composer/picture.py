"""A comparison as pictures and as one page that needs nothing beside it."""

import base64
import html
import io
import itertools
import platform
import textwrap
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from let_composer import __version__
from let_composer.comparing import Arms, scale, table, verdict
from let_composer.files import replacing
from let_composer.logs import METRIC, Run

__all__ = ["PALETTE", "write_pictures"]

PALETTE = ("#666666", "#c8442a", "#2a6fc8", "#2f8f46", "#8a52b0", "#b8860b", "#1b9e9e", "#d0578f")
# Below the losses over tokens, where a run logged them: each panel's label, metrics and lines.
PANELS = {
    "weight of\nthe guidance": {"weight": "-"},
    "cosine; dashed: of\na constant vector": {"cosine": "-", "constant_cosine": "--"},
}
Band = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # where; mean, lowest and highest over seeds
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
<p class="note">Several seeds: mean (lowest..highest), in curves a band. Shares are of the baseline's means.
Compute counts the teacher's forward as LET logged it; it does not count training the teacher.</p>
<h2>Over compute, the teacher's included</h2><img alt="curves over compute" src="{compute}">
<h2>Over tokens</h2><img alt="curves over tokens" src="{tokens}">
<h2>Settings that differ</h2>{differ}
<h2>Environment</h2>{environment}
</body></html>
"""


def write_pictures(arms: Arms, summary: dict[str, Any], out: str | Path) -> None:
    """Write OUT.png and OUT.svg, losses over compute, and OUT.html: verdict, table, curves, settings, environment; of
    the arms that :func:`let_composer.comparing.summarize` was given, and its summary."""
    figures = {over: _draw(arms, summary, over) for over in ("compute", "tokens")}
    svg = {over: _render(figure, "svg") for over, figure in figures.items()}
    differ, shared = _settings(arms)
    unknown = "<p>These runs logged no settings: only TensorBoard's event files hold them.</p>"
    environment = {
        "page made": date.today().isoformat(),
        "with": f"let-composer {__version__}, pandas {pd.__version__}, Python {platform.python_version()}",
        **shared.filter(regex="^(composer_|num_)"),
    }
    page = PAGE.format(
        title=html.escape(verdict(summary)),
        table=table(summary).T.to_html(border=0),
        **{over: f"data:image/svg+xml;base64,{base64.b64encode(image).decode()}" for over, image in svg.items()},
        differ=differ.to_html(border=0) if len(differ) else "<p>None.</p>" if len(shared) else unknown,
        environment=pd.Series(environment).to_frame("").to_html(border=0, header=False),
    )
    contents = {"png": _render(figures["compute"], "png"), "svg": svg["compute"], "html": page.encode()}
    for suffix, content in contents.items():
        with replacing(Path(f"{out}.{suffix}")) as partial:
            partial.write_bytes(content)


def _settings(arms: Arms) -> tuple[Any, Any]:
    """Settings by arm where arms differ, and those that all share; several values of an arm's seeds side by side."""
    keys = sorted({key for runs in arms.values() for run in runs for key in run.settings})
    values = {
        arm: [", ".join(dict.fromkeys(str(run.settings.get(key, "not set")) for run in runs)) for key in keys]
        for arm, runs in arms.items()
    }
    settings: Any = pd.DataFrame(values, index=pd.Index(keys))
    differ = settings.nunique(axis=1) > 1
    return settings[differ], settings[~differ].iloc[:, 0]


def _draw(arms: Arms, summary: dict[str, Any], over: str) -> Figure:
    """Losses over ``compute`` or ``tokens``, the guided part of each run shaded; over tokens also the ``PANELS``."""
    unit, _, name = scale(summary, over)
    colors = dict(zip(arms, itertools.chain(PALETTE[:1], itertools.cycle(PALETTE[1:])), strict=False))
    bands = {arm: _bands(runs, over, unit) for arm, runs in arms.items()}
    logged = {metric for of in bands.values() for metric in of if over == "tokens"}
    panels = {label: metrics for label, metrics in PANELS.items() if logged & metrics.keys()}
    heights = [4.0] + [1.4] * len(panels)
    figure = Figure(figsize=(8, 1.2 + sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    _draw_losses(axes[0], bands, colors, summary, over)
    for axis, (label, metrics) in zip(axes[1:], panels.items(), strict=True):
        axis.set_ylabel(label)
        for arm, metric in itertools.product(arms, metrics):
            if metric in bands[arm]:
                _plot(axis, bands[arm][metric], color=colors[arm], ls=metrics[metric])
    axes[-1].set_xlabel(f"compute, the teacher's included [{name}]" if over == "compute" else f"{name} seen")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _bands(runs: list[Run], over: str, unit: float) -> dict[str, Band]:
    """What is compared, under "", and each metric of the guidance that all seeds of an arm logged."""
    logged = [{tag.partition("/")[2]: curve for tag, curve in run.guidance.items()} | {"": run.loss} for run in runs]
    bands = {}
    for metric in set.intersection(*map(set, logged)):
        curves = [own[metric] for own in logged]
        if over == "compute":
            curves = [(np.interp(x, *run.compute), y) for run, (x, y) in zip(runs, curves, strict=True)]
        grid = curves[0][0][curves[0][0] <= min(x[-1] for x, _ in curves)]
        values = np.stack([np.interp(grid, x, y) for x, y in curves])
        bands[metric] = grid / unit, values.mean(0), values.min(0), values.max(0)
    return bands


def _plot(axis: Any, band: Band, **style: Any) -> None:
    x, mean, low, high = band
    axis.plot(x, mean, lw=1.8, **style)
    axis.fill_between(x, low, high, color=style["color"], alpha=0.25, lw=0)


def _draw_losses(
    axis: Any, bands: dict[str, dict[str, Band]], colors: dict[str, str], summary: dict[str, Any], over: str
) -> None:
    level, whole = summary["baseline_final_loss"], summary["arms"][0]["over_seeds"][over]["mean"]
    unit, *_ = scale(summary, over)
    axis.axhline(level, color=PALETTE[0], lw=1, ls=":")
    for row in summary["arms"]:
        arm, own, of = row["arm"], row["over_seeds"], bands[row["arm"]]
        reached, text = own[f"{over}_to_baseline_loss"], f"{row['arm']}: {of[''][1][-1]:.3f}"
        if arm != summary["baseline"] and reached:
            axis.plot(reached["mean"] / unit, level, "*", ms=15, color=colors[arm], mec="white", zorder=4)
            text += f", ★ after {reached['mean'] / whole:.0%} of the {over}"
        _plot(axis, of[""], color=colors[arm], label=text)
        if "weight" in of:
            stop, share = of["weight"][0][-1], own["teacher_share"]  # none where nothing is computed yet
            text = f"guided; the teacher took {share['mean']:.1%} of the compute" if share else "guided"
            axis.axvspan(0, stop, color=colors[arm], alpha=0.1, lw=0, label=text)
            if stop < 0.98 * of[""][0][-1]:
                place, above = (stop, 0.02), axis.get_xaxis_transform()
                axis.text(*place, "teacher released ", color=colors[arm], ha="right", transform=above)
    # After a fifth of each run: what comes before is so steep that it would hide the differences.
    late = np.concatenate([y[x >= 0.2 * x[-1]] for x, y, *_ in (of[""] for of in bands.values())])
    low, high = np.nanmin(late), np.nanmax(late)
    if summary["teacher"]:
        own = summary["teacher"]["final_loss"]
        axis.axhline(own, color="black", lw=1, ls="--", label=f"its teacher: {own:.3f}")
        if abs(own - level) <= 2 * (high - low):
            low, high = min(low, own), max(high, own)
    room = max(0.06 * (high - low), 1e-3)
    axis.set_ylim(low - room, high + room)
    axis.set_xlim(left=0)
    axis.legend(loc="lower right" if summary["rising"] else "upper right")
    is_loss = summary["metric"].endswith(METRIC)
    axis.set_ylabel("validation loss [nats/token]" if is_loss else summary["metric"].removeprefix("metrics/"))
    axis.set_title(textwrap.fill(verdict(summary), 84), loc="left", fontsize=11)


def _render(figure: Figure, suffix: str) -> bytes:
    written = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "compare"}):  # the same bytes for the same runs
        figure.savefig(written, format=suffix, dpi=200, metadata={"Date": None})
    return written.getvalue()

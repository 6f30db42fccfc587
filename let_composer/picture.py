"""A comparison as pictures and as one page that needs nothing beside it."""

import base64
import html
import io
import platform
import textwrap
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from let_composer import __version__
from let_composer.comparing import Arms, scale, table, verdict
from let_composer.files import replacing
from let_composer.logs import METRIC, Curve, Run

__all__ = ["PALETTE", "write_pictures"]

PALETTE = ("#666666", "#c8442a", "#2a6fc8", "#2f8f46", "#8a52b0", "#b8860b", "#1b9e9e", "#d0578f")
# Below the losses over tokens, where a run logged them: height in inches, label, and each metric's line and name.
PANELS: dict[str, Any] = {
    "weight": (0.9, "weight of\nthe guidance", [("weight", "-", None)]),
    "cosine": (1.6, "cosine", [("cosine", "-", "to the teacher"), ("constant_cosine", "--", "best constant vector")]),
}
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


def write_pictures(arms: Arms, summary: dict[str, Any], out: str | Path, teacher: Run | None = None) -> None:
    """Write OUT.png and OUT.svg, losses over compute, and OUT.html: verdict, table, curves, settings, environment.

    Args:
        arms: As given to :func:`let_composer.comparing.summarize`.
        summary: What it returned.
        out: Path without suffix.
        teacher: As given to it.
    """
    by_compute, by_tokens = (_Picture(arms, summary, teacher, over) for over in ("compute", "tokens"))
    svg = by_compute.render("svg")
    sources = {"compute": svg, "tokens": by_tokens.render("svg")}
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
        **{over: f"data:image/svg+xml;base64,{base64.b64encode(image).decode()}" for over, image in sources.items()},
        differ=differ.to_html(border=0) if len(differ) else "<p>None.</p>" if len(shared) else unknown,
        environment=pd.Series(environment).to_frame("").to_html(border=0, header=False),
    )
    for suffix, content in (("png", by_compute.render("png")), ("svg", svg), ("html", page.encode())):
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


class _Picture:
    """Losses over ``compute`` or ``tokens``, the guided part of each run shaded."""

    def __init__(self, arms: Arms, summary: dict[str, Any], teacher: Run | None, over: str) -> None:
        self.arms, self.summary, self.teacher, self.over = arms, summary, teacher, over
        self.colors = {arm: PALETTE[1 + (i - 1) % (len(PALETTE) - 1) if i else 0] for i, arm in enumerate(arms)}
        self.unit, _, name = scale(summary, over)
        self.label = f"compute, the teacher's included [{name}]" if over == "compute" else f"{name} seen"

    def render(self, suffix: str) -> bytes:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        logged = {panel for panel in PANELS for arm in self.arms if self.curves(arm, panel)}
        below = [PANELS[panel] for panel in PANELS if panel in logged and self.over == "tokens"]
        heights = [4.0, *(height for height, *_ in below)]
        with plt.rc_context({"svg.hashsalt": f"compare {self.over}"}):  # the same bytes for the same runs
            figure, axes = plt.subplots(
                len(heights), 1, figsize=(8, 1.2 + sum(heights)), sharex=True, height_ratios=heights,
                layout="constrained", squeeze=False,
            )  # fmt: skip
            self.draw_losses(axes[0, 0])
            self.draw_guidance(axes[0, 0])
            for (_, *panel), axis in zip(below, axes[1:, 0], strict=True):
                self.draw_panel(axis, *panel)
            axes[-1, 0].set_xlabel(self.label)
            for axis in axes[:, 0]:
                axis.grid(alpha=0.25)
                axis.spines[["top", "right"]].set_visible(False)
            written = io.BytesIO()
            figure.savefig(written, format=suffix, dpi=200, metadata={"Date": None} if suffix == "svg" else None)
            plt.close(figure)
        return written.getvalue()

    def curves(self, arm: str, metric: str = "") -> list[Curve]:
        """Of each seed what is compared, or a metric of its guidance; nothing if a seed did not log that."""
        found = []
        for run in self.arms[arm]:
            guidance = {tag.partition("/")[2]: curve for tag, curve in run.guidance.items()}
            if metric and metric not in guidance:
                return []
            tokens, values = guidance[metric] if metric else run.loss
            x = np.interp(tokens, *run.compute) if self.over == "compute" else tokens
            found.append((x / self.unit, values))
        return found

    def draw_losses(self, axis: Any) -> None:
        summary, level = self.summary, self.summary["baseline_final_loss"]
        whole = summary["arms"][0]["over_seeds"][self.over]
        axis.axhline(level, color=PALETTE[0], lw=1, ls=":")
        for row in summary["arms"]:
            arm, reached = row["arm"], row["over_seeds"][f"{self.over}_to_baseline_loss"]
            text = f"{arm}: {_mean(self.curves(arm))[1][-1]:.3f}"
            if arm != summary["baseline"] and reached and whole:
                axis.plot(reached["mean"] / self.unit, level, "*", ms=15, color=self.colors[arm], mec="white", zorder=4)
                text += f", ★ after {reached['mean'] / whole['mean']:.0%} of the {self.over}"
            _band(axis, self.curves(arm), color=self.colors[arm], label=text)
        # After a fifth of each run: what comes before is so steep that it would hide the differences.
        late = np.concatenate([y[x >= 0.2 * x[-1]] for x, y, *_ in map(_mean, map(self.curves, self.arms))])
        low, high = np.nanmin(late), np.nanmax(late)
        if self.teacher is not None:
            own = float(self.teacher.loss[1][-1])
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

    def draw_guidance(self, axis: Any) -> None:
        """Mark where each arm's guidance ends. For a single one, shade that part and name the teacher's share."""
        guided = {row["arm"]: row for row in self.summary["arms"] if self.curves(row["arm"], "weight")}
        for i, (arm, row) in enumerate(guided.items()):
            color = self.colors[arm]
            stop = float(np.mean([x[-1] for x, _ in self.curves(arm, "weight")]))
            end = float(np.mean([x[-1] for x, _ in self.curves(arm)]))
            if len(guided) == 1:
                axis.axvspan(0, stop, color=color, alpha=0.1, lw=0)
            axis.axvline(stop, color=color, lw=1)
            text = "teacher released" if stop < 0.98 * end else "guided to the end"
            if len(guided) == 1 and (share := row["over_seeds"]["teacher_share"]):
                text += f", it took {share['mean']:.1%} of the compute"
            # On the side of the start, where curves leave room, one below the other.
            height, early = 0.09 + 0.06 * i, stop < 0.45 * end
            axis.annotate(
                text, (min(stop, 0.6 * end), 1 - height if self.summary["rising"] else height),
                (5 if early else -5, 0), color=color, ha="left" if early else "right", va="center",
                xycoords=("data", "axes fraction"), textcoords="offset points",
            )  # fmt: skip

    def draw_panel(self, axis: Any, label: str, metrics: list[tuple[str, str, str | None]]) -> None:
        axis.set_ylabel(label)
        for metric, style, text in metrics:
            for arm in self.arms:
                if curves := self.curves(arm, metric):
                    _band(axis, curves, ls=style, color=self.colors[arm], label=text)
                    text = None  # one entry for all arms
        if len(metrics) > 1:
            axis.legend(fontsize=8)


def _band(axis: Any, curves: list[Curve], **style: Any) -> None:
    """The mean over seeds, and a band from the lowest to the highest."""
    x, mean, low, high = _mean(curves)
    axis.plot(x, mean, lw=1.8, **style)
    axis.fill_between(x, low, high, color=style["color"], alpha=0.25, lw=0)


def _mean(curves: list[Curve]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Where, mean, lowest and highest over seeds, as far as all of them went."""
    grid = curves[0][0][curves[0][0] <= min(x[-1] for x, _ in curves)]
    values = np.stack([np.interp(grid, x, y) for x, y in curves])
    return grid, values.mean(0), values.min(0), values.max(0)

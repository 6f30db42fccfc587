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
from let_composer.data import replacing
from let_composer.logs import METRIC, Curve, Run

__all__ = ["PALETTE", "write_pictures"]

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
<h2>Environment</h2>{environment}
</body></html>
"""


def write_pictures(arms: Arms, summary: dict[str, Any], out: str | Path, teacher: Run | None = None) -> None:
    """Write OUT.png and OUT.svg, curves over tokens, and OUT.html: verdict, table, curves, settings, environment.

    Args:
        arms: As given to :func:`let_composer.comparing.summarize`.
        summary: What it returned.
        out: Path without suffix.
        teacher: As given to it.
    """
    drawn = {axis: _figure(arms, summary, teacher, axis, "svg") for axis in ("tokens", "compute")}
    differ, shared = _settings(arms)
    unknown = "<p>These runs logged no settings: only TensorBoard's event files hold them.</p>"
    environment = {
        "page made": date.today().isoformat(),
        "with": f"let-composer {__version__}, pandas {pd.__version__}, Python {platform.python_version()}",
        **{name: value for name, value in shared.items() if name.startswith(("composer_", "num_"))},
    }
    page = PAGE.format(
        title=html.escape(verdict(summary)),
        table=table(summary).T.to_html(border=0),
        **{axis: f"data:image/svg+xml;base64,{base64.b64encode(image).decode()}" for axis, image in drawn.items()},
        differ=pd.DataFrame(differ).T.to_html(border=0) if differ else "<p>None.</p>" if shared else unknown,
        environment=pd.Series(environment).to_frame("").to_html(border=0, header=False),
    )
    png = _figure(arms, summary, teacher, "tokens", "png")
    for suffix, content in (("png", png), ("svg", drawn["tokens"]), ("html", page.encode())):
        with replacing(Path(f"{out}.{suffix}")) as partial:
            partial.write_bytes(content)


def _settings(arms: Arms) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Settings by arm where arms differ, and those that all share; several values of an arm's seeds side by side."""
    differ, shared = {}, {}
    for key in sorted({key for runs in arms.values() for run in runs for key in run.settings}):
        values = {a: [str(run.settings.get(key, "not set")) for run in runs] for a, runs in arms.items()}
        row = {arm: ", ".join(dict.fromkeys(own)) for arm, own in values.items()}
        if len(set(row.values())) > 1:
            differ[key] = row
        else:
            shared[key] = next(iter(row.values()))
    return differ, shared


def _figure(arms: Arms, summary: dict[str, Any], teacher: Run | None, over: str, suffix: str) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    level, sign = summary["baseline_final_loss"], -1 if summary["rising"] else 1
    unit, name = scale(summary["equal_tokens"])
    label = f"tokens seen by the student [{name}]"
    if over == "compute":
        label = f"compute of student and teacher [of plain training on so many {name} of tokens]"
        if flops := summary["flops_per_token"]:
            unit, label = 1e15 / flops, "compute of student and teacher [PFLOP]"

    def band(axis: Any, curves: list[Curve], **style: Any) -> None:
        x, mean, low, high = _mean(curves)
        axis.plot(x, mean, lw=1.8, **style)
        axis.fill_between(x, low, high, color=style["color"], alpha=0.2, lw=0)

    def placed(run: Run, curve: Curve) -> Curve:
        return (curve[0] if over == "tokens" else np.interp(curve[0], *run.compute)) / unit, curve[1]

    guidance: dict[str, dict[str, list[Curve]]] = {}  # by metric and arm
    for arm, runs in arms.items():
        for tag in ("weight", "cosine", "constant_cosine"):
            found = [placed(run, c) for run in runs for key, c in run.guidance.items() if key.partition("/")[2] == tag]
            if len(found) == len(runs):
                guidance.setdefault(tag, {})[arm] = found
    below = [panel for panel in ("weight", "cosine") if panel in guidance]
    heights = [3.2, *({"weight": 0.8, "cosine": 1.4}[panel] for panel in below)]
    colors = {arm: PALETTE[1 + (i - 1) % (len(PALETTE) - 1) if i else 0] for i, arm in enumerate(arms)}
    with plt.rc_context({"svg.hashsalt": f"compare {over}"}):  # the same bytes for the same runs
        figure, axes = plt.subplots(
            len(heights), 1, figsize=(9.5, 3.3 + 1.65 * sum(heights[1:]) + 1.7), sharex=True, height_ratios=heights,
            layout="constrained", squeeze=False,
        )  # fmt: skip
        losses, *panels = axes[:, 0]
        losses.axhline(level, color=PALETTE[0], lw=1, ls=":")
        whole = summary["arms"][0]["over_seeds"][over]
        for row in summary["arms"]:
            arm, curves = row["arm"], [placed(run, run.loss) for run in arms[row["arm"]]]
            text, reached = f"{arm}: {_mean(curves)[1][-1]:.3f}", row["over_seeds"][f"{over}_to_baseline_loss"]
            if arm != summary["baseline"] and reached and whole:
                losses.plot(reached["mean"] / unit, level, "*", ms=15, color=colors[arm], mec="white", zorder=4)
                text += f", ★ after {reached['mean'] / whole['mean']:.0%} of the {over}"
            band(losses, curves, color=colors[arm], label=text)
        # From where the baseline has done a fifth: what it does before is so steep that it would hide the differences.
        x, y, *_ = _mean([placed(run, run.loss) for run in arms[summary["baseline"]]])
        worst = level + sign * max(sign * (float(np.interp(0.2 * x[-1], x, y)) - level), 1e-3)
        best = sign * float(np.nanmin(np.concatenate([sign * run.loss[1] for runs in arms.values() for run in runs])))
        if teacher is not None:
            own = float(teacher.loss[1][-1])
            losses.axhline(own, color="black", lw=1, ls="--", label=f"its teacher: {own:.3f}")
            if abs(best - own) <= abs(worst - best):
                best = sign * min(sign * best, sign * own)
        low, high = sorted((best, worst))
        losses.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
        losses.set_xlim(left=0)
        losses.legend(loc="lower right" if summary["rising"] else "upper right")
        is_loss = summary["metric"].endswith(METRIC)
        losses.set_ylabel("validation loss [nats/token]" if is_loss else summary["metric"].removeprefix("metrics/"))
        losses.set_title("\n".join(textwrap.wrap(verdict(summary), 90)), loc="left", fontsize=11)
        for panel, axis in zip(below, panels, strict=True):
            axis.set_ylabel("weight of\nthe guidance" if panel == "weight" else "cosine")
            for tag, style, text in (
                ("weight", "-", None),
                ("cosine", "-", "student and teacher"),
                ("constant_cosine", "--", "best constant vector"),
            ):
                for arm, curves in guidance.get(tag, {}).items() if tag.endswith(panel) else ():
                    band(axis, curves, ls=style, color=colors[arm], label=text)
                    text = None  # one entry for all arms
            if panel == "cosine":
                axis.legend(fontsize=8)
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
    grid = curves[0][0][curves[0][0] <= min(x[-1] for x, _ in curves)]
    values = np.stack([np.interp(grid, x, y) for x, y in curves])
    return grid, values.mean(0), values.min(0), values.max(0)

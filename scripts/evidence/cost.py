"""Draw what guidance costs at 1.4B and 7B, as let-composer plan computes it. Nothing in it is measured.

python scripts/evidence/cost.py .assets/cost.png
"""

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot
import pandas as pd

from let_composer.cli import told
from let_composer.configuration import load, quiet
from let_composer.files import replacing
from let_composer.planning import HARDWARE, make_plan

YAMLS = ("let_1b4", "let_7b")
GPUS, GPU, UTILIZATION = 32, "h100", 0.4


def main(arguments: list[str] | None = None) -> None:
    """Write a picture: hours of the whole run, and memory of a GPU, with the teacher's part in red."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="PNG to write")
    out = parser.parse_args(arguments).out
    matplotlib.use("Agg")
    figure, axes = matplotlib.pyplot.subplots(1, 2, figsize=(9.5, 2.6), constrained_layout=True)
    hours, memory = {}, {}
    for name in YAMLS:
        with quiet():
            plan = make_plan(load(f"yamls/{name}.yaml", []), GPUS, HARDWARE[GPU], UTILIZATION)
        label, share = f"{plan.run}\n{plan.teacher_name}", plan.break_even_tokens / plan.tokens
        hours[label] = (plan.hours or 0.0), (plan.hours or 0.0) * share / (1 + share)
        memory[label] = sum(plan.memory.values()), plan.memory["teacher"]
    titles = (f"the whole run on {GPUS} H100, hours", "memory of a GPU, GiB")
    for axis, title, found in zip(axes, titles, (hours, memory), strict=True):
        bars = pd.DataFrame({label: (whole - teacher, teacher) for label, (whole, teacher) in found.items()}).T
        bars.plot.barh(ax=axis, stacked=True, color=["#999999", "#c8442a"], width=0.45, legend=False, fontsize=8)
        for row, (whole, teacher) in enumerate(found.values()):
            axis.text(0, row - 0.28, f" {whole:.1f}, of it the teacher {teacher:.2f}", fontsize=8, va="bottom")
        axis.set_title(f"{title} (computed; teacher red)", loc="left", fontsize=10)
        axis.set_ylim(len(found) - 0.4, -0.7)
        axis.spines[["top", "right"]].set_visible(False)
    with replacing(out) as partial:
        figure.savefig(partial, format="png", dpi=130)


if __name__ == "__main__":
    sys.exit(told("cost", main))

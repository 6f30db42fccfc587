"""Draw what guidance costs at 1.4B and 7B, as let-composer plan computes it. Nothing in it is measured.

python scripts/evidence/cost.py .assets/cost.png
"""

import argparse
import sys
from pathlib import Path

from let_composer.cli import told
from let_composer.configuration import load, quiet
from let_composer.files import replacing
from let_composer.planning import HARDWARE, Plan, make_plan

__all__ = ["draw", "main"]

YAMLS = ("let_1b4", "let_7b")
GPUS, GPU, UTILIZATION = 32, "h100", 0.4


def draw(plans: list[Plan], out: Path) -> None:
    """Write a picture: hours of the whole run, and memory of a GPU, with the teacher's part in red."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9.5, 2.6), constrained_layout=True)
    shares = [plan.break_even_tokens / plan.tokens for plan in plans]
    hours = [(plan.hours or 0.0, share / (1 + share)) for plan, share in zip(plans, shares, strict=True)]
    sizes = [(sum(plan.memory.values()), plan.memory["teacher"]) for plan in plans]
    figures = {
        f"the whole run on {GPUS} H100, hours": [(whole, whole * share) for whole, share in hours],
        "memory of a GPU, GiB": sizes,
    }
    for axis, (title, rows) in zip(axes, figures.items(), strict=True):
        for row, (whole, teacher) in enumerate(rows):
            axis.barh(row, whole - teacher, color="#999999", height=0.45)
            axis.barh(row, teacher, left=whole - teacher, color="#c8442a", height=0.45)
            axis.text(0, row - 0.28, f" {whole:.1f}, of it the teacher {teacher:.2f}", fontsize=8, va="bottom")
        axis.set_title(f"{title} (computed; teacher red)", loc="left", fontsize=10)
        axis.set_yticks(range(len(plans)), [f"{plan.run}\n{plan.teacher_name}" for plan in plans], fontsize=8)
        axis.set_ylim(len(plans) - 0.4, -0.7)
        axis.spines[["top", "right"]].set_visible(False)
    with replacing(out) as partial:
        figure.savefig(partial, format="png", dpi=130)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="PNG to write")
    out, plans = parser.parse_args(arguments).out, []
    for name in YAMLS:
        with quiet():
            config = load(f"yamls/{name}.yaml", [])
        plans.append(make_plan(config, GPUS, GPU, HARDWARE[GPU], UTILIZATION))
    draw(plans, out)


if __name__ == "__main__":
    sys.exit(told("cost", main))

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
TEACHER = "#c8442a"


def draw(plans: list[Plan], out: Path) -> None:
    """Write a picture: hours of the whole run, and memory of a GPU, with the teacher's part in red."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (time, memory) = plt.subplots(1, 2, figsize=(9.5, 2.6), constrained_layout=True)
    for row, plan in enumerate(plans):
        assert plan.hours is not None
        extra = plan.break_even_tokens / plan.tokens
        parts = {"student": plan.hours / (1 + extra), "teacher": plan.hours * extra / (1 + extra)}
        label = f"{plan.hours:.1f} h, of it the teacher {parts['teacher']:.1f} h (+{extra:.1%})"
        _stack(time, row, parts, label)
        teacher = sum(size for part, size in plan.memory.items() if "teacher" in part)
        _stack(memory, row, plan.memory, f"{sum(plan.memory.values()):.0f} GiB, of it the teacher {teacher:.2f} GiB")
    for axis, title in ((time, f"the whole run on {GPUS} H100, hours"), (memory, "memory of a GPU, GiB")):
        axis.set_title(f"{title} (computed)", loc="left", fontsize=10)
        axis.set_yticks(range(len(plans)), [f"{plan.run}\n{plan.teacher_name}" for plan in plans], fontsize=8)
        axis.set_ylim(len(plans) - 0.4, -0.7)
        axis.spines[["top", "right"]].set_visible(False)
    with replacing(out) as partial:
        figure.savefig(partial, format="png", dpi=130)
    plt.close(figure)


def _stack(axis: object, row: int, parts: dict[str, float], label: str) -> None:
    left = 0.0
    for shade, (part, size) in enumerate(sorted(parts.items(), key=lambda item: "teacher" in item[0])):
        color = TEACHER if "teacher" in part else str(0.45 + 0.4 * shade / max(len(parts) - 1, 1))
        axis.barh(row, size, left=left, color=color, height=0.45)  # pyright: ignore[reportAttributeAccessIssue]
        left += size
    axis.text(0.1, row - 0.28, label, fontsize=8, va="bottom")  # pyright: ignore[reportAttributeAccessIssue]


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

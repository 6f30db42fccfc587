"""Draw what guidance costs at 1.4B and 7B, as let-composer plan computes it. Nothing in it is measured.

python scripts/evidence/cost.py .assets/cost.png
"""

import sys
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from let_composer.configuration import load, quiet
from let_composer.files import replacing
from let_composer.planning import HARDWARE, make_plan


def main(out: Path) -> None:
    """Write a picture: hours of the whole run, and memory of a GPU, with the teacher's part in red."""
    hours, memory = {}, {}
    for name in ("let_1b4", "let_7b"):
        with quiet():
            plan = make_plan(load(f"yamls/{name}.yaml", []), 32, HARDWARE["h100"], 0.4)
        assert plan.hours is not None
        label = f"{plan.run}\n{plan.teacher_name}"
        alone, teacher = plan.hours / (1 + plan.break_even_tokens / plan.tokens), plan.memory["teacher"]
        hours[label] = alone, plan.hours - alone
        memory[label] = sum(plan.memory.values()) - teacher, teacher
    figure = Figure(figsize=(9.5, 2.6), layout="constrained")
    titles = ("the whole run on 32 H100, hours", "memory of a GPU, GiB")
    for axis, title, found in zip(figure.subplots(1, 2), titles, (hours, memory), strict=True):
        bars = pd.DataFrame(found).T
        bars.plot.barh(ax=axis, stacked=True, color=["#999999", "#c8442a"], width=0.45, legend=False, fontsize=8)
        labels = [f" {student + teacher:.1f}, of it the teacher {teacher:.2f}" for student, teacher in found.values()]
        axis.bar_label(axis.containers[1], labels, fontsize=8)
        axis.set_title(f"{title} (computed; teacher red)", loc="left", fontsize=10)
        axis.margins(x=0.6)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    with replacing(out) as partial:
        figure.savefig(partial, format="png", dpi=130)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

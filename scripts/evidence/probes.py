"""Does guidance cost what the validation text does not show? Two probes of the runs of an experiment.

    python scripts/evidence/probes.py yamls/evidence/evidence.yaml

Another kind of text: Python code, of the installed torch. Copying: tokens of that code in random order, twice in a row;
the figure is what the first time saves the second. Both in nats per token, mean (lowest..highest) over seeds; "more" is
than the same seed of the table's first arm. Every run must have exported its model (hf_checkpointer).
"""

import argparse
import sys
from pathlib import Path

import pandas as pd
import sweep
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer

from let_composer.cli import told
from let_composer.comparing import cell, spread

__all__ = ["main"]

ROWS, LENGTH = 256, 128


@torch.no_grad()
def losses(model: nn.Module, rows: Tensor) -> Tensor:
    """Of each next token, ``[N, S - 1]``, in nats."""
    logits = torch.cat([model(part).logits for part in rows.split(32)]).float()
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none")


def measure(experiment: sweep.DictConfig) -> dict[tuple[str, int], dict[str, float]]:
    """The figures of each finished run, by arm and seed."""
    from llmfoundry.models.mpt import MPTForCausalLM

    runs, found, jobs = Path(experiment.runs), {}, sweep.plan(experiment)
    code = "".join(file.read_text() for file in sorted(Path(nn.__file__).parent.glob("modules/*.py")))
    ids = AutoTokenizer.from_pretrained(jobs[0].config.tokenizer.name)(code)["input_ids"]
    text = torch.tensor(ids[: ROWS * LENGTH]).view(ROWS, LENGTH)
    shuffled = text.flatten()[torch.randperm(text.numel(), generator=torch.Generator().manual_seed(17))]
    twice = shuffled.view(-1, LENGTH // 2)[:ROWS].repeat(1, 2)
    for job in jobs:
        if job.arm and job.done():
            model = MPTForCausalLM.from_pretrained(runs / "huggingface" / job.name).eval()
            first, second = losses(model, twice).split(LENGTH // 2, dim=1)
            saved = (first.mean() - second.mean()).item()
            found[job.arm, job.config.seed] = {"Python code": losses(model, text).mean().item(), "copying": saved}
    return found


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="YAML; the first arm of a table is its baseline")
    experiment = sweep.read(parser.parse_args(arguments).experiment)
    found, rows = measure(experiment), []
    for name, arms in experiment.tables.items():
        baseline = next(iter(arms.values()))
        for label, arm in arms.items():
            seeds = [seed for of, seed in found if of == arm and (baseline, seed) in found]
            row: dict[str, object] = {"table": name, "arm": label, "seeds": len(seeds)}
            for probe in ("Python code", "copying"):
                own = [found[arm, seed][probe] for seed in seeds]
                more = [value - found[baseline, seed][probe] for value, seed in zip(own, seeds, strict=True)]
                row[probe] = cell(spread(own), len(seeds), ".3f")
                row[f"{probe}, more"] = cell(spread(more), len(seeds), "+.3f")
            rows += [row] * bool(seeds)
    print(pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True))


if __name__ == "__main__":
    sys.exit(told("probes", main))

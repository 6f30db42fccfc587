"""Does guidance cost what the validation text does not show? Two probes of the runs of an experiment.

    python scripts/evidence/probes.py yamls/evidence/evidence.yaml

Another kind of text: Python code, of the installed torch. Copying: tokens of that code in random order, twice in a row;
the figure is what the first time saves the second. Both in nats per token. Prints a table, with the mean over seeds of
the difference to the baseline's run of the same seed. Every run must have exported its model (hf_checkpointer).
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import sweep
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer

from let_composer.cli import told

__all__ = ["main"]

ROWS, LENGTH = 256, 128


@torch.no_grad()
def losses(model: nn.Module, rows: Tensor) -> Tensor:
    """Of each next token, ``[N, S - 1]``, in nats."""
    logits = torch.cat([model(part).logits for part in rows.split(32)]).float()
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none")


def code(tokenizer: str) -> Tensor:
    """Tokens of Python code, ``[ROWS, LENGTH]``."""
    files = sorted(Path(nn.__file__).parent.glob("modules/*.py"))
    ids = AutoTokenizer.from_pretrained(tokenizer)("".join(file.read_text() for file in files))["input_ids"]
    return torch.tensor(ids[: ROWS * LENGTH]).view(ROWS, LENGTH)


def measure(experiment: sweep.DictConfig) -> Iterator[dict[str, object]]:
    """Each finished run's seed, arm and figures."""
    from llmfoundry.models.mpt import MPTForCausalLM

    runs = Path(experiment.runs)
    text = code(sweep.om.load(experiment.base).tokenizer.name)
    shuffled = text.flatten()[torch.randperm(text.numel(), generator=torch.Generator().manual_seed(17))]
    twice = shuffled.view(-1, LENGTH // 2)[:ROWS].repeat(1, 2)
    for job in sweep.plan(experiment):
        if job.arm and job.done(runs):
            model = MPTForCausalLM.from_pretrained(runs / "huggingface" / job.name).eval()
            first, second = losses(model, twice).split(LENGTH // 2, dim=1)
            yield {
                "arm": job.arm,
                "seed": job.config.seed,
                "Python code": losses(model, text).mean().item(),
                "saved by copying": (first.mean() - second.mean()).item(),
            }


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="YAML; the first arm of its first table is the baseline")
    experiment = sweep.read(parser.parse_args(arguments).experiment)
    baseline = next(iter(next(iter(experiment.tables.values())).values()))
    found = pd.DataFrame(measure(experiment)).set_index(["arm", "seed"])
    more = (found - found.loc[baseline]).groupby("arm", sort=False).mean()
    table = found.groupby("arm", sort=False).mean().join(more, rsuffix=", more than the baseline's")
    print(table.assign(seeds=found.groupby("arm").size()).to_markdown(floatfmt=".3f"))


if __name__ == "__main__":
    sys.exit(told("probes", main))

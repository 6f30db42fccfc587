r"""What LET adds to a step: plain, guided and after-stop steps of one model in one Trainer, taking turns.

    python scripts/benchmarks/step.py yamls/let_1b4.yaml --gpu h100 --out runs/benchmarks/1b4
    python scripts/benchmarks/step.py yamls/quickstart/baseline.yaml \
        algorithms.let.teacher=EleutherAI/pythia-31m model.d_model=256 model.n_heads=4 model.n_layers=6 \
        max_seq_len=256 global_train_batch_size=4 device_train_microbatch_size=4

Each round trains without LET, and with it until and after its stop, a few steps each. FSDP, activation checkpointing,
precision and microbatches (``auto`` too) are the YAML's, on one device. Student and teacher have the shapes that the
YAML names and random weights, the tokens are random: cost does not depend on them. The optimizer is plain SGD: in a
real run a step of it is small against many microbatches, and a 7B model fits one card. Prints step time, tokens/s, peak
memory and utilisation next to what planning expects; OUT.json holds the rounds that have ended, rewritten after each.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from composer import Callback, Logger, State, Trainer
from machine import machine
from omegaconf import DictConfig
from omegaconf import OmegaConf as om
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from let_composer import LET
from let_composer.cli import told
from let_composer.configuration import load
from let_composer.counting import build_model, teacher_config
from let_composer.files import write_json
from let_composer.planning import HARDWARE, Hardware, Plan, make_plan

__all__ = ["build", "main", "measure", "table"]

KINDS = ("plain", "guided", "after stop")
WARMUP = 2  # first steps of each turn that do not count


class _Clock(Callback):
    """Times whole batches, from the first to the last event of each, and notes the most memory that torch held."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.start = 0.0

    def after_dataloader(self, state: State, logger: Logger) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.start = time.perf_counter()

    def batch_end(self, state: State, logger: Logger) -> None:
        peak = None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() / 2**30
        seconds, size = time.perf_counter() - self.start, state.device_train_microbatch_size
        self.steps.append({"seconds": seconds, "microbatch": size, "peak_gib": peak})


class _Endless(LET):
    """Guides although the student has caught up, as it has at once with a teacher of random weights."""

    def report(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        values = super().report(sums)
        self.ends_early = ""
        return values


def build(config: DictConfig, folder: str) -> tuple[Any, dict[str, Any], int]:
    """The YAML's student, LET's options with a teacher in ``folder`` of its shape, and the smaller vocabulary."""
    if om.select(config, "algorithms.let") is None:
        raise ValueError("expected a YAML with algorithms.let: what is measured is its cost.")
    let = cast(dict[str, Any], om.to_container(config.algorithms.let, resolve=True))
    torch.manual_seed(0)
    model = build_model(config, {"init_device": "cpu"})
    source = teacher_config(let.get("teacher", LET().teacher))
    if isinstance(source, str):
        source = AutoConfig.from_pretrained(source)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    AutoModelForCausalLM.from_config(source, torch_dtype=dtype).save_pretrained(folder)
    return model, {**let, "teacher": folder}, min(source.vocab_size, model.model.config.vocab_size)


def measure(config: DictConfig, rounds: int, steps: int) -> Iterator[pd.DataFrame]:
    """Time so many steps of each kind in each round; after every round yields a row for every step so far."""
    if steps <= WARMUP or rounds < 1:
        raise ValueError(f"expected at least one round of more than {WARMUP} steps, got {rounds} of {steps}.")
    found, clock = list[dict[str, Any]](), _Clock()
    if not torch.cuda.is_available():  # all that FSDP needs to run without: Composer asks CUDA for the device
        torch.cuda.current_device = lambda: torch.device("cpu")  # pyright: ignore[reportAttributeAccessIssue]
    with tempfile.TemporaryDirectory() as folder:
        model, options, vocabulary = build(config, folder)
        batch = int(config.global_train_batch_size)
        ids = torch.randint(vocabulary, (batch * 2 * steps, int(config.max_seq_len)))
        rows: Any = [{"input_ids": row, "labels": row} for row in ids]
        # Constant, so that every guided step does the same work.
        let = _Endless(**{**options, "stop": f"{steps}ba", "anneal": "constant"})
        fsdp = om.to_container(config.fsdp_config, resolve=True) if config.get("fsdp_config") else None
        trainer = Trainer(
            model=model,
            optimizers=torch.optim.SGD(model.parameters(), lr=1e-6),
            train_dataloader=DataLoader(rows, batch_size=batch),
            algorithms=let,
            callbacks=clock,
            max_duration=f"{2 * steps}ba",
            device_train_microbatch_size=config.device_train_microbatch_size,
            precision=str(config.get("precision", "amp_bf16")),
            parallelism_config=cast(Any, {"fsdp": fsdp}) if fsdp else None,
            progress_bar=False,
            log_to_console=False,
        )
        together = list(trainer.state.algorithms)
        for number in range(rounds):
            turns = [(KINDS[1:], together), (KINDS[:1], [])]
            for kinds, algorithms in turns[:: -1 if number % 2 else 1]:  # so that being first favours nobody
                clock.steps = []
                trainer.state.algorithms = algorithms
                trainer.fit(duration=f"{steps * len(kinds)}ba", reset_time=True)
                for index, kind in enumerate(kinds):
                    kept = clock.steps[index * steps + WARMUP : (index + 1) * steps]
                    found += [{"kind": kind, "round": number, **step} for step in kept]
            yield pd.DataFrame(found)
        trainer.close()


def table(found: pd.DataFrame, plan: Plan, hardware: Hardware | None) -> str:
    """The measurements as text, next to the plan's expectation; ranges are over rounds."""
    kinds: Any = found.groupby("kind")
    seconds = kinds.seconds.median()
    rounds: Any = found.pivot_table("seconds", "round", "kind", aggfunc="median")
    of_plain = rounds.div(rounds.plain, axis=0)
    flops = plan.step_flops * (1 + plan.guided_overhead * (seconds.index == "guided"))
    columns = {
        "s/step": seconds,
        "tokens/s": plan.global_batch * plan.sequence_length / seconds,
        "of plain, median": of_plain.median(),
        "least": of_plain.min(),
        "most": of_plain.max(),
        "peak GiB": kinds.peak_gib.max(),
        "utilisation": flops / seconds / hardware.tflops / 1e12 if hardware else None,
    }
    expected, ratio = 1 + plan.guided_overhead, of_plain.guided.median()
    return (
        f"{pd.DataFrame(columns).loc[list(KINDS)].to_string(float_format='{:,.4g}'.format, na_rep='-')}\n"
        f"guided / plain: {ratio:.3f} measured, {expected:.3f} expected from FLOPs: {ratio / expected - 1:+.1%} apart; "
        f"microbatches of {', '.join(map(str, found.microbatch.unique()))}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("yaml", help="a training YAML of llm-foundry with algorithms.let")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for scripts/train.py")
    parser.add_argument("--rounds", type=int, default=5, help="how often the kinds take turns (default: 5)")
    parser.add_argument("--steps", type=int, default=10, help="of each kind in a round (default: 10)")
    parser.add_argument("--gpu", choices=HARDWARE, help="for the utilisation")
    parser.add_argument("--out", type=Path, help="path without suffix: writes OUT.json")
    args = parser.parse_intermixed_args(arguments)
    config = load(args.yaml, args.overrides)
    hardware = HARDWARE.get(args.gpu)
    plan = make_plan(config, 1, hardware, 0.4)
    command = {"yaml": args.yaml, "overrides": args.overrides, "rounds": args.rounds, "steps": args.steps}
    report = {"command": command, "machine": machine(), "plan": plan}
    for found in measure(config, args.rounds, args.steps):
        print(table(found, plan, hardware), flush=True)
        if args.out:
            write_json(args.out.with_suffix(".json"), report | {"steps": found.to_dict("records")})


if __name__ == "__main__":
    sys.exit(told("step", main))

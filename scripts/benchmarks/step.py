r"""What LET adds to a step: plain, guided and after-stop steps of one model in one Trainer, taking turns.

    python scripts/benchmarks/step.py yamls/let_1b4.yaml --gpu h100 --out runs/benchmarks/1b4
    python scripts/benchmarks/step.py yamls/quickstart/baseline.yaml yamls/quickstart/let.yaml \
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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from composer import Callback, DataSpec, Event, Logger, State, Trainer
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

__all__ = ["Measurement", "build", "main", "measure", "table"]

KINDS = ("plain", "guided", "after stop")


@dataclass
class Measurement:
    """Steps of one kind. Seconds of every step that was kept, and the most memory that torch held, in GiB."""

    seconds: list[list[float]] = field(default_factory=list)  # by round
    peak_gib: float | None = None
    microbatch: int | None = None

    @property
    def median(self) -> float:
        return float(np.median(np.concatenate(self.seconds)))


class _Clock(Callback):
    """Times whole batches, from the first to the last event of each."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.peaks: list[float] = []
        self._start = 0.0

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.AFTER_DATALOADER:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            self._start = time.perf_counter()
        elif event == Event.BATCH_END:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                self.peaks.append(torch.cuda.max_memory_allocated() / 2**30)
            self.seconds.append(time.perf_counter() - self._start)


class _Endless(LET):
    """Guides although the student has caught up, as it has at once with a teacher of random weights."""

    def report(self, sums: Mapping[str, torch.Tensor], weight: float) -> dict[str, float]:
        values = super().report(sums, weight)
        self.ends_early = ""
        return values


def build(config: DictConfig, folder: str) -> tuple[Any, dict[str, Any], int]:
    """The YAML's student, LET's options with a teacher in ``folder`` of its shape, and the smaller vocabulary."""
    options = (config.get("algorithms") or {}).get("let")
    if options is None:
        raise ValueError("expected a YAML with algorithms.let: what is measured is its cost.")
    let = cast(dict[str, Any], om.to_container(options, resolve=True))
    torch.manual_seed(0)
    model = build_model(config, {"init_device": "cpu"})
    source = teacher_config(let.get("teacher", LET().options.teacher))
    if isinstance(source, str):
        source = AutoConfig.from_pretrained(source)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    AutoModelForCausalLM.from_config(source, torch_dtype=dtype).save_pretrained(folder)
    return model, {**let, "teacher": folder}, min(source.vocab_size, model.model.config.vocab_size)


def measure(config: DictConfig, rounds: int, steps: int, warmup: int = 2) -> Iterator[dict[str, Measurement]]:
    """Time the three kinds of steps of a training YAML; yields what there is after every round.

    ``steps`` are those of each kind in a round; of each turn the first ``warmup`` do not count.
    """
    if steps <= warmup or rounds < 1:
        raise ValueError(f"expected at least one round of more than {warmup} steps, got {rounds} of {steps}.")
    found = {kind: Measurement() for kind in KINDS}
    clock = _Clock()
    if not torch.cuda.is_available():  # all that FSDP needs to run without: Composer asks CUDA for the device
        torch.cuda.current_device = lambda: torch.device("cpu")  # pyright: ignore[reportAttributeAccessIssue]
    with tempfile.TemporaryDirectory() as folder:
        model, options, vocabulary = build(config, folder)
        batch = int(config.global_train_batch_size)
        rows = torch.randint(vocabulary, (batch * 2 * steps, int(config.max_seq_len)))
        # Constant, so that every guided step does the same work.
        let = _Endless(**{**options, "stop": f"{steps}ba", "anneal": "constant"})
        fsdp = om.to_container(config.fsdp_config, resolve=True) if config.get("fsdp_config") else None
        if fsdp is None and torch.cuda.is_available():
            model = model.cuda()
        trainer = Trainer(
            model=model,
            optimizers=torch.optim.SGD(model.parameters(), lr=1e-6),
            train_dataloader=DataSpec(
                DataLoader(cast(Any, rows), batch_size=batch, collate_fn=_collate, drop_last=True),
                get_num_tokens_in_batch=lambda batch: batch["input_ids"].numel(),
            ),
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
                clock.seconds, clock.peaks = [], []
                trainer.state.algorithms = algorithms
                trainer.fit(duration=f"{steps * len(kinds)}ba", reset_time=True)
                for index, kind in enumerate(kinds):
                    kept = slice(index * steps + warmup, (index + 1) * steps)
                    found[kind].seconds.append(clock.seconds[kept])
                    found[kind].microbatch = int(cast(Any, trainer.state.device_train_microbatch_size))
                    if clock.peaks:
                        found[kind].peak_gib = max(found[kind].peak_gib or 0.0, *clock.peaks[kept])
            yield found
        trainer.close()


def table(found: dict[str, Measurement], plan: Plan, hardware: Hardware | None) -> str:
    """The measurements as text, next to the plan's expectation."""
    tokens, rows, of_plain = plan.global_batch * plan.sequence_length, {}, {}
    for kind, entry in found.items():
        rounds = zip(entry.seconds, found["plain"].seconds, strict=True)
        of_plain[kind] = ratios = [float(np.median(own) / np.median(plain)) for own, plain in rounds]
        flops = plan.step_flops * (1 + plan.guided_overhead * (kind == "guided"))
        rows[kind] = {
            "s/step": f"{entry.median:.4f}",
            "tokens/s": f"{tokens / entry.median:,.0f}",
            "of plain, median (least - most over rounds)": (
                f"{np.median(ratios):.3f} ({min(ratios):.3f} - {max(ratios):.3f})"
            ),
            "peak GiB": "-" if entry.peak_gib is None else f"{entry.peak_gib:.2f}",
            "utilisation": f"{flops / entry.median / hardware.tflops / 1e12:.1%}" if hardware else "-",
        }
    expected, ratio = 1 + plan.guided_overhead, float(np.median(of_plain["guided"]))
    return (
        f"{pd.DataFrame(rows).T.to_string()}\n"
        f"guided / plain: {ratio:.3f} measured, {expected:.3f} expected from FLOPs: {ratio / expected - 1:+.1%} apart; "
        f"microbatches of {', '.join(sorted({str(entry.microbatch) for entry in found.values()}))}"
    )


def main(arguments: list[str] | None = None) -> dict[str, Measurement]:
    """Command line; returns what it measured."""
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
    plan = make_plan(config, 1, args.gpu, hardware, 0.4)
    command = {"yaml": args.yaml, "overrides": args.overrides, "rounds": args.rounds, "steps": args.steps}
    found: dict[str, Measurement] = {}
    for found in measure(config, args.rounds, args.steps):
        print(table(found, plan, hardware), flush=True)
        if args.out:
            steps = {kind: asdict(entry) for kind, entry in found.items()}
            report = {"command": command, "machine": machine(), "steps": steps, "plan": asdict(plan)}
            write_json(args.out.with_suffix(".json"), report)
    return found


def _collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = torch.stack(rows)
    return {"input_ids": ids, "labels": ids}


if __name__ == "__main__":
    sys.exit(told("step", main))

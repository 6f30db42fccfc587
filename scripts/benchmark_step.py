"""What LET adds to a step: plain, guided and after-stop steps of one model in one process, taking turns.

    python scripts/benchmark_step.py yamls/let_1b4.yaml --gpu h100 --out runs/benchmark_step/1b4
    python scripts/benchmark_step.py yamls/quickstart/baseline.yaml yamls/quickstart/let.yaml \
        algorithms.let.teacher=EleutherAI/pythia-31m model.d_model=256 model.n_heads=4 model.n_layers=6 \
        max_seq_len=256 global_train_batch_size=4 device_train_microbatch_size=4

Each round trains without LET, and with it until and after its stop, a few steps each, through Composer's Trainer.
Student and teacher have the shapes that the YAML names and random weights, the tokens are random: cost does not depend
on them. The optimizer is plain SGD: in a real run a step of it is small against many microbatches, and a 7B model fits
one card. Prints step time, tokens/s, peak memory and utilisation next to what planning expects, and writes OUT.json.
"""

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from composer import Callback, DataSpec, Event, Logger, State, Trainer
from llmfoundry.utils.builders import build_composer_model
from omegaconf import DictConfig
from omegaconf import OmegaConf as om
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModel

from let_composer import LET
from let_composer.configuration import load
from let_composer.planning import HARDWARE, Hardware, Plan, make_plan, teacher_config

__all__ = ["Measurement", "main", "measure", "table"]

KINDS = ("plain", "guided", "after stop")


@dataclass
class Measurement:
    """Steps of one kind. Seconds of every step that was kept, and the most memory that torch held, in GiB."""

    seconds: list[list[float]]  # by round
    peak_gib: float | None

    @property
    def median(self) -> float:
        """Of all steps."""
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


def measure(config: DictConfig, rounds: int, steps: int, warmup: int = 2) -> dict[str, Measurement]:
    """Time the three kinds of steps of a training YAML.

    Args:
        config: As `let_composer.configuration.load` reads it, with ``algorithms.let``.
        rounds: How often the kinds take turns.
        steps: Steps of each kind in a round, warm-up included.
        warmup: Steps at the start of each turn that do not count.

    Raises:
        ValueError: If nothing would be left to measure, or the YAML has no LET.
    """
    if steps <= warmup or rounds < 1:
        raise ValueError(f"expected at least one round of more than {warmup} steps, got {rounds} of {steps}.")
    options = (config.get("algorithms") or {}).get("let")
    if options is None:
        raise ValueError("expected a YAML with algorithms.let: what is measured is its cost.")
    let = cast(dict[str, Any], om.to_container(options, resolve=True))
    model_config = cast(dict[str, Any], om.to_container(config.model, resolve=True))
    name = model_config.pop("name")
    model_config |= {"init_device": "cpu", "use_train_metrics": False}
    batch, length = int(config.global_train_batch_size), int(config.max_seq_len)
    torch.manual_seed(0)
    model = build_composer_model(name, model_config, None)
    if torch.cuda.is_available():
        model = model.cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    rows = torch.randint(int(model_config["vocab_size"]), (batch * 2 * steps, length))
    found: dict[str, Measurement] = {kind: Measurement([], None) for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        source = teacher_config(let.get("teacher", LET().options.teacher))
        if isinstance(source, str):
            source = AutoConfig.from_pretrained(source)
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        AutoModel.from_config(source, torch_dtype=dtype).save_pretrained(folder)
        # Constant, so that every guided step does the same work.
        guidance = {**let, "teacher": folder, "stop": f"{steps}ba", "anneal": "constant", "weight": 1.0}
        for number in range(rounds):
            turns: list[tuple[list[LET], tuple[str, ...]]] = [([], KINDS[:1]), ([LET(**guidance)], KINDS[1:])]
            for algorithms, kinds in turns[:: -1 if number % 2 else 1]:  # so that being first favours nobody
                clock = _Clock()
                trainer = Trainer(
                    model=model,
                    optimizers=optimizer,
                    train_dataloader=DataSpec(
                        DataLoader(cast(Any, rows), batch_size=batch, collate_fn=_collate, drop_last=True),
                        get_num_tokens_in_batch=lambda batch: batch["input_ids"].numel(),
                    ),
                    algorithms=algorithms,
                    callbacks=clock,
                    max_duration=f"{steps * len(kinds)}ba",
                    device_train_microbatch_size=int(config.device_train_microbatch_size),
                    precision=str(config.get("precision", "amp_bf16")),
                    progress_bar=False,
                    log_to_console=False,
                )
                trainer.fit()
                trainer.close()
                for index, kind in enumerate(kinds):
                    kept = slice(index * steps + warmup, (index + 1) * steps)
                    found[kind].seconds.append(clock.seconds[kept])
                    if clock.peaks:
                        found[kind].peak_gib = max(found[kind].peak_gib or 0.0, *clock.peaks[kept])
    return found


def table(found: dict[str, Measurement], plan: Plan, hardware: Hardware | None) -> str:
    """The measurements as text, next to the plan's expectation."""
    plain = found["plain"]
    by_round = {
        kind: [float(np.median(a) / np.median(b)) for a, b in zip(found[kind].seconds, plain.seconds, strict=True)]
        for kind in KINDS
    }
    lines = ["steps       s/step  tokens/s  of plain, median (least - most over rounds)  peak GiB  utilisation"]
    tokens = plan.global_batch * plan.sequence_length
    for kind in KINDS:
        entry = found[kind]
        ratios = by_round[kind]
        flops = plan.step_flops * (1 + plan.guided_overhead * (kind == "guided"))
        used = f"{flops / entry.median / hardware.tflops / 1e12:.1%}" if hardware else "-"
        peak = "-" if entry.peak_gib is None else f"{entry.peak_gib:.2f}"
        spread = f"{np.median(ratios):.3f} ({min(ratios):.3f} - {max(ratios):.3f})"
        lines.append(
            f"{kind:<10} {entry.median:>7.4f} {tokens / entry.median:>9,.0f}  {spread:<43} {peak:>9}  {used:>11}"
        )
    expected, ratio = 1 + plan.guided_overhead, float(np.median(by_round["guided"]))
    lines.append(
        f"guided / plain: {ratio:.3f} measured, {expected:.3f} expected from FLOPs: {ratio / expected - 1:+.1%} apart"
    )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Measurement]:
    """Command line of the module's docstring; returns what it measured."""
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
    found = measure(config, args.rounds, args.steps)
    print(table(found, plan, hardware))
    if args.out:
        report = {
            "command": {"yaml": args.yaml, "overrides": args.overrides, "rounds": args.rounds, "steps": args.steps},
            "machine": _machine(),
            "steps": {kind: asdict(entry) for kind, entry in found.items()},
            "plan": asdict(plan),
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        part = args.out.with_suffix(".json.tmp")
        part.write_text(json.dumps(report, indent=2) + "\n")
        os.replace(part, args.out.with_suffix(".json"))
    return found


def _collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = torch.stack(rows)
    return {"input_ids": ids, "labels": ids}


def _machine() -> dict[str, Any]:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()

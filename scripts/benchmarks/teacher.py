"""In which form the teacher's forward costs least: eager, compiled or captured; in line or beside the student.

    python scripts/benchmarks/teacher.py yamls/let_1b4.yaml --out runs/benchmarks/teacher-1b4 [key=value ...]

Times one microbatch of a training YAML with random weights, without FSDP: the teacher alone, the student's forward and
backward alone, and both, with the teacher in line before the student's backward or on a stream of its own beside the
student's forward. A form that does not work here says why in the table. OUT.json is rewritten after every form.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import machine, write
from step import build
from torch.utils.benchmark import Timer

from let_composer.cli import told
from let_composer.configuration import load
from let_composer.loss import alignment_loss
from let_composer.student import resolve_layer
from let_composer.teacher import Teacher

__all__ = ["FORMS", "main"]

FORMS = ("eager", "compiled", "captured")


def captured(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A CUDA graph of ``run``; replaying it returns the tensor that it fills."""
    beside: Any = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return out

    return replay


def beside(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], Callable[[], torch.Tensor]]:
    """``run`` on a stream of its own: what starts it, and what waits for it and returns what it made."""
    stream: Any = torch.cuda.Stream()
    found: list[torch.Tensor] = []

    def start() -> None:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found[:] = [run()]

    def take() -> torch.Tensor:
        torch.cuda.current_stream().wait_stream(stream)
        return found[0]

    return start, take


def milliseconds(step: Callable[[], object], repeats: int) -> float:
    """Of a call, on average; torch's timer warms up, and waits for the device at both ends."""
    timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
    return timer.timeit(repeats).mean * 1e3


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Command line; returns the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("yaml", help="a training YAML of llm-foundry with algorithms.let")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for scripts/train.py")
    parser.add_argument("--form", choices=FORMS, nargs=1, default=FORMS, help="one alone (default: all)")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True, help="path without suffix: writes OUT.json")
    args = parser.parse_intermixed_args(arguments)
    config = load(args.yaml, args.overrides)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        model, options, vocabulary = build(config, folder)
        teacher = Teacher(folder, layer=options.get("teacher_layer", -1), device=device)
    model = model.to(device, torch.bfloat16 if cuda else torch.float32)
    block = resolve_layer(model, options.get("student_layer", 3))[1]
    size = (int(config.device_train_microbatch_size), int(config.max_seq_len))
    ids = torch.randint(vocabulary, size, device=device)
    mask = torch.ones_like(ids, dtype=torch.bool)
    seen: list[torch.Tensor] = []
    block.register_forward_hook(lambda module, inputs, output: seen.append(output[0]) or None)

    def student(before: Callable[[], Any] = lambda: None, after: Callable[[], Any] = lambda: None) -> None:
        seen.clear()
        before()
        batch = {"input_ids": ids, "labels": ids}
        loss = model.loss(model(batch), batch)
        loss = loss["total"] if isinstance(loss, dict) else loss
        if (states := after()) is not None:
            loss = loss + 0.1 * alignment_loss(seen[0], states)
        loss.backward()
        model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def eager() -> torch.Tensor:
        return teacher.hidden(ids)

    forms: dict[str, Callable[[], Callable[[], torch.Tensor]]] = {
        "eager": lambda: eager,
        "compiled": lambda: torch.compile(eager, dynamic=False),
        "captured": lambda: captured(eager),
    }
    alone, rows = milliseconds(student, args.repeats), []
    print(f"student alone {alone:.3f} ms, microbatch of {size[0]} x {size[1]}, {mask.numel()} tokens")
    for name in args.form:
        row: dict[str, Any] = {"form": name, "student_ms": alone}
        try:
            run = forms[name]()
            row["teacher_ms"] = milliseconds(run, args.repeats)
            row["in_line_ms"] = milliseconds(partial(student, after=run), args.repeats)
            row["beside_ms"] = milliseconds(partial(student, *beside(run)), args.repeats)
        except Exception as error:  # what a compiler or a capture may raise; the other forms are still to come
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        rows.append(row)
        print(", ".join(f"{key} {value:.3f}" if isinstance(value, float) else str(value) for key, value in row.items()))
        write(args.out.with_suffix(".json"), {"machine": machine(), "yaml": args.yaml, "rows": rows})
    return rows


if __name__ == "__main__":
    sys.exit(told("teacher", main))

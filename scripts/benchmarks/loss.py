"""What the alignment loss costs: our kernels against plain torch, and how the kernels compile.

    python scripts/benchmark_loss.py --out runs/benchmark_loss    # on a CUDA GPU: table, JSON, picture
    python scripts/benchmark_loss.py --compile-report             # anywhere: registers, loads and spills, no GPU needed
    python scripts/benchmark_loss.py --device cpu --pairs 64/32 --tokens 64 --methods ours eager --repeats 3

Before anything is timed, loss and gradient must agree with the reference in fp64. Inputs rotate through more memory
than any L2 cache holds. Bytes are the compulsory ones: every state read once, the gradient written once, and the
numbers saved per token. The share is of the bandwidth of a large copy on the same device in the same run.

Not compared: Liger's cosine loss is a cosine of logits after both LM heads, in chunks; it has no hidden-state loss.
"""

import argparse
import datetime
import itertools
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from let_composer.loss import Implementation, alignment_loss, reference

PAIRS = ["2048/2048", "2048/768", "2048/576", "4096/2048", "768/128"]  # student/teacher width
TOKENS = [1024, 2048, 4096, 8192, 16384, 32768, 65536]
METHODS = ["ours", "eager", "compiled"]  # our kernels, the reference, torch.compile of the reference
PASSES = ("forward", "backward", "both")
ROTATE = 512 * 2**20  # bytes to cycle through, several times the largest L2 cache


# --- the compile report: what ptxas makes of the kernels, no GPU needed ---

ARCHITECTURES = (80, 90, 100)  # A100, H100/H200, B200


@contextmanager
def compiling(architecture: int) -> Iterator[list]:
    """Kernels are compiled for an architecture and collected where they would be launched."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    found, run = [], triton.JITFunction.run

    def compile_only(self, *args, **kwargs):
        found.append((self, run(self, *args, **kwargs | {"warmup": True})))

    device = {"device": architecture, "stream": 0, "target": GPUTarget("cuda", architecture, 32)}
    functions: Any = SimpleNamespace(**{f"get_current_{name}": lambda *_, v=v: v for name, v in device.items()})
    driver.set_active(functions)
    triton.JITFunction.run = compile_only  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield found
    finally:
        triton.JITFunction.run = run
        driver.reset_active()


def compile_report(
    pairs: list[str],
    architectures: Sequence[int] = ARCHITECTURES,
    dtype: torch.dtype = torch.bfloat16,
    normalized: bool = False,
) -> list[dict]:
    """Compile what a guided step launches, for either side resized; one row per kernel, pair and architecture.

    Args:
        pairs: Widths, student/teacher.
        architectures: Compute capabilities, times ten.
        dtype: Of the student; the teacher is in bf16.
        normalized: Whether the teacher's features are standardised.
    """
    from let_composer.loss import kernels

    rows = []
    for pair, sm in itertools.product(pairs, architectures):
        widths = [int(width) for width in pair.split("/")]
        student, teacher = torch.ones(64, widths[0], dtype=dtype), torch.ones(64, widths[1], dtype=torch.bfloat16)
        mean = torch.ones(widths[1]) if normalized else None
        for resize in ("student", "teacher") if widths[0] != widths[1] else ("-",):
            with compiling(sm) as found:
                arguments = (student, teacher, torch.ones(64, dtype=torch.bool), mean, mean)
                loss, saved, counts = kernels._forward(*arguments, resize == "student")
                kernels._backward(loss, student, teacher, mean, mean, saved, counts, resize == "student")
                if resize != "teacher":  # the same for both
                    kernels._sums(teacher, saved[2], mean, mean, False)
                    kernels._sums(teacher, saved[2], mean, None, True)
            for kernel, compiled in found:
                row = {"kernel": kernel.__name__.strip("_").removesuffix("_kernel"), "pair": pair, "resize": resize}
                constants = {kernel.arg_names[i]: value for (i,), value in compiled.src.constants.items()}
                tile = [str(constants[name]) for name in ("R", "G", "V", "C") if name in constants]
                row |= {"sm": sm, "tile": "x".join(tile), "warps": compiled.metadata.num_warps}
                rows.append(row | _inspect(compiled))
    return rows


def _inspect(compiled) -> dict:
    """Registers and the like from the binary; accesses of a thread to global memory, by bits, from the PTX."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [tool, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    assert found is not None, text
    registers, stack, shared, local = map(int, found.groups())
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?(\w[\w.]*)", text, re.MULTILINE)
    row: dict[str, Any] = {"registers": registers, "spilled": stack + local, "shared": shared}
    row |= {"instructions": len(opcodes) - opcodes.count("NOP")}
    row |= {"barriers": sum(opcode.startswith("BAR") for opcode in opcodes)}
    for name, instruction in (("loads", "ld"), ("stores", "st")):
        accesses = re.findall(rf"\b{instruction}\.global[.\w:]*?(?:\.v(\d))?\.b(\d+)\b", compiled.asm["ptx"])
        row[name] = dict(sorted(Counter(int(vector or 1) * int(bits) for vector, bits in accesses).items()))
    return row


def report_table(rows: list[dict]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    for row in rows:
        cells = row | {key: ", ".join(f"{n}x{bits}" for bits, n in row[key].items()) for key in ("loads", "stores")}
        lines.append("| " + " | ".join(str(cell) for cell in cells.values()) + " |")
    return "\n".join(lines)


# --- the benchmark ---


def compulsory_bytes(which: str, tokens: int, student: int, teacher: int, itemsize: int = 2) -> int:
    """Bytes that must cross the memory bus at least once."""
    forward = (student + teacher) * itemsize + 1 + 12  # states, mask, what is saved
    backward = (2 * student + teacher) * itemsize + 12  # states and gradient, what was saved
    return tokens * {"forward": forward, "backward": backward, "both": forward + backward}[which]


def eager_loss(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return reference.alignment(student, teacher, mask)[0]


def methods(names: list[str], implementation: Implementation) -> dict[str, Callable]:
    def ours(student, teacher, mask):
        return alignment_loss(student, teacher, mask, implementation=implementation)

    eager = eager_loss
    return {name: {"ours": ours, "eager": eager}.get(name) or torch.compile(eager) for name in names}


def gate(function: Callable, pair: str, dtype: torch.dtype, device: str) -> None:
    """Stop unless loss and gradient are as close to fp64 as eager is, up to a little."""
    student_width, teacher_width = map(int, pair.split("/"))
    torch.manual_seed(0)
    student = torch.randn(257 if device == "cuda" else 5, student_width, device=device).to(dtype)
    teacher = torch.randn(*student.shape[:-1], teacher_width, device=device).to(dtype)
    mask = torch.rand(student.shape[0], device=device) < 0.8

    def run(f, *states):
        leaf = states[0].detach().requires_grad_()
        loss = f(leaf, *states[1:], mask)
        return loss.detach().double(), torch.autograd.grad(loss, leaf)[0].double()

    truth, truth_grad = run(eager_loss, student.double(), teacher.double())
    eager, eager_grad = run(eager_loss, student, teacher)
    loss, grad = run(function, student, teacher)
    error, allowed = (
        (grad - truth_grad).norm() / truth_grad.norm(),
        (eager_grad - truth_grad).norm() / truth_grad.norm(),
    )
    # Triton's interpreter cuts bf16 where a GPU rounds: twice eager's error.
    if (loss - truth).abs() > (eager - truth).abs() + 1e-5 or error > allowed * (1 if device == "cuda" else 2.1) + 1e-3:
        raise SystemExit(
            f"{student_width}/{teacher_width}: wrong result (gradient error {error:.1e}); nothing was timed."
        )


def timed(step: Callable[[int], object], repeats: int, device: str) -> dict[str, float]:
    """Milliseconds of ``step(i)``: median, 20th and 80th percentile."""
    for i in range(3):
        step(i)
    if device == "cuda":
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        torch.cuda.synchronize()
        for i, (start, end) in enumerate(events):
            start.record(torch.cuda.current_stream())
            step(i)
            end.record(torch.cuda.current_stream())
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) for start, end in events]
    else:
        times = []
        for i in range(repeats):
            begin = time.perf_counter()
            step(i)
            times.append((time.perf_counter() - begin) * 1e3)
    quantiles = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else times * 4
    return {"ms": statistics.median(times), "ms_p20": quantiles[0], "ms_p80": quantiles[3]}


def copy_bandwidth(device: str, repeats: int) -> float:
    """GB/s of a large copy, reads plus writes: what "100 %" means here."""
    size = 2**30 if device == "cuda" else 2**24
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / 1e6 / timed(lambda i: target.copy_(source), repeats, device)["ms"]


def measure(function: Callable, tokens: int, pair: str, dtype: torch.dtype, device: str, repeats: int) -> list[dict]:
    """Time forward, backward and both of one method at one size."""
    student_width, teacher_width = map(int, pair.split("/"))
    bytes_per_set = tokens * (student_width + teacher_width) * dtype.itemsize
    sets = max(-(-ROTATE // bytes_per_set), 1) if device == "cuda" else 2
    students = [torch.randn(tokens, student_width, device=device, dtype=dtype).requires_grad_() for _ in range(sets)]
    teachers = [torch.randn(tokens, teacher_width, device=device, dtype=dtype) for _ in range(sets)]
    mask = torch.ones(tokens, dtype=torch.bool, device=device)

    def forward(i: int):
        return function(students[i % sets], teachers[i % sets], mask)

    def both(i: int):
        return torch.autograd.grad(forward(i), students[i % sets])

    both(0)  # compile
    memory = None
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both(0)
        memory = (torch.cuda.max_memory_allocated() - before) / 2**20
    losses = [forward(i) for i in range(min(sets, 8))]  # graphs to run the backward of, again and again

    def backward(i: int):
        return torch.autograd.grad(losses[i % len(losses)], students[i % len(losses)], retain_graph=True)

    rows = []
    for which, step in zip(PASSES, (forward, backward, both), strict=True):
        times = timed(step, repeats, device)
        moved = compulsory_bytes(which, tokens, student_width, teacher_width, dtype.itemsize)
        rows.append({"pass": which, **times, "gb_per_s": moved / 1e6 / times["ms"], "peak_extra_mib": memory})
    return rows


def environment(device: str) -> dict:
    def version(package: str) -> str | None:
        try:
            return __import__(package).__version__
        except ImportError:
            return None

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "triton": version("triton"),
        "cuda": torch.version.cuda,  # pyright: ignore[reportAttributeAccessIssue]
        "python": sys.version.split()[0],
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def benchmark(options: argparse.Namespace) -> dict:
    dtype = getattr(torch, options.dtype)
    functions = methods(options.methods, options.implementation)
    for pair in options.pairs:
        for function in functions.values():
            gate(function, pair, dtype, options.device)
    copy = copy_bandwidth(options.device, options.repeats)
    results = []
    for pair in options.pairs:
        for tokens in options.tokens:
            for name, function in functions.items():
                for row in measure(function, tokens, pair, dtype, options.device, options.repeats):
                    row = {"pair": pair, "tokens": tokens, "method": name} | row | {"share": row["gb_per_s"] / copy}
                    results.append(row)
                    print(
                        f"{pair:>10} {tokens:>6} {name:>8} {row['pass']:>8} {row['ms']:9.4f} ms "
                        f"[{row['ms_p20']:.4f}, {row['ms_p80']:.4f}] {row['gb_per_s']:8.1f} GB/s {row['share']:6.1%}",
                        flush=True,
                    )
    return {
        "environment": environment(options.device),
        "dtype": options.dtype,
        "copy_gb_per_s": copy,
        "results": results,
    }


def draw(report: dict, path: Path) -> None:
    """One picture: share of the copy bandwidth over tokens, one panel per width pair, forward plus backward."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pairs = list(dict.fromkeys(row["pair"] for row in report["results"]))
    figure, panels = pyplot.subplots(1, len(pairs), figsize=(3 * len(pairs) + 1, 3.4), sharey=True, squeeze=False)
    for panel, pair in zip(panels[0], pairs, strict=True):
        rows = [row for row in report["results"] if row["pair"] == pair and row["pass"] == "both"]
        for method in dict.fromkeys(row["method"] for row in rows):
            line = [(row["tokens"], row["share"]) for row in rows if row["method"] == method]
            panel.plot(*zip(*line, strict=True), marker="o", label=method)
        panel.set(title=f"student/teacher {pair}", xlabel="tokens", xscale="log", ylim=(0, None))
    panels[0][0].set_ylabel("share of copy bandwidth\n(forward + backward)")
    panels[0][-1].legend()
    about = report["environment"]
    figure.suptitle(
        f"{about['device']}, {report['dtype']}, torch {about['torch']}, triton {about['triton']}", fontsize=9
    )
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile-report", action="store_true", help="print how the kernels compile, as markdown")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmark_loss"), help="folder of the JSON and the picture"
    )
    parser.add_argument("--sm", nargs="+", type=int, default=list(ARCHITECTURES), help="architectures of the report")
    parser.add_argument("--pairs", nargs="+", default=PAIRS, metavar="S/T", help="student/teacher widths")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--implementation", default="auto", help="of ours: auto, triton or torch")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=100)
    options = parser.parse_args(arguments)
    if options.compile_report:
        print(report_table(compile_report(options.pairs, options.sm, getattr(torch, options.dtype))))
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here. Use --compile-report, or --device cpu for a smoke run.")
    report = benchmark(options)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "benchmark_loss.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, options.out / "benchmark_loss.png")


if __name__ == "__main__":
    main()

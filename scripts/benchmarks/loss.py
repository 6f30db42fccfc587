"""What the alignment loss costs: our kernels against plain torch, and how the kernels compile.

    python scripts/benchmarks/loss.py --out runs/benchmarks/loss    # on a CUDA GPU: table, JSON, picture
    python scripts/benchmarks/loss.py --compile-report            # anywhere: registers, loads, spills; no GPU needed
    python scripts/benchmarks/loss.py --device cpu --pairs 64/32 --tokens 64 --methods ours eager --repeats 3

Before anything is timed, loss and gradient must agree with the reference in fp64. On CUDA ``triton.testing.do_bench``
times; what the host needs to hand a call over stands apart. Bytes are the compulsory ones: every state read once, the
gradient written once, and the numbers saved per token. The share is of the bandwidth of a large copy on the same
device. Rows of OUT that were measured with these sources and settings on this device are kept, so a call that was cut
off goes on.

Not compared: Liger's cosine loss is a cosine of logits after both LM heads, in chunks; it has no hidden-state loss.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
import timeit
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pandas as pd
import torch
from machine import machine
from matplotlib.figure import Figure
from torch._functorch import config as functorch

from let_composer.cli import told
from let_composer.files import write_json
from let_composer.loss import alignment, reference

PAIRS = ["2048/768", "4096/2048", "2048/2048", "2048/576", "768/128"]  # student/teacher width
TOKENS = [8192, 65536, 16384]
METHODS = ["ours", "eager", "compiled"]  # our kernels, the reference, torch.compile of the reference

# For the compile report
ARCHITECTURES = (80, 90, 100)  # A100, H100/H200, B200
WIDTHS = (64, 256, 768, 2048, 8192)


@contextmanager
def compiling(architecture: int) -> Iterator[list]:
    """Kernels are compiled for an architecture and collected where they would be launched."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    found, run, device = [], triton.JITFunction.run, Mock()
    device.get_current_device.return_value = architecture
    device.get_current_stream.return_value = 0
    device.get_current_target.return_value = GPUTarget("cuda", architecture, 32)

    def compile_only(self, *args, **kwargs):
        found.append((self, run(self, *args, **kwargs | {"warmup": True})))

    with patch.object(driver, "active", device), patch.object(triton.JITFunction, "run", compile_only):
        yield found


def compile_report(
    pairs: Sequence[str],
    architectures: Sequence[int] = ARCHITECTURES,
    dtype: str = "bfloat16",
    normalized: bool = False,
) -> list[dict]:
    """Compile what a guided step launches, for either side resized; one row per binary. The teacher is in bf16."""
    from let_composer.loss import kernels

    rows: dict[str, dict] = {}
    for pair, sm in itertools.product(pairs, architectures):
        widths = [int(width) for width in pair.split("/")]
        student = torch.ones(64, widths[0], dtype=getattr(torch, dtype))
        teacher = torch.ones(64, widths[1], dtype=torch.bfloat16)
        mean = torch.ones(widths[1]) if normalized else None
        for resize in ("student", "teacher") if widths[0] != widths[1] else ("-",):
            with compiling(sm) as found:
                arguments = (student, teacher, torch.ones(64, dtype=torch.bool), mean, mean)
                loss, saved, counts = kernels._forward(*arguments, resize == "student")
                kernels._backward(loss, student, teacher, mean, mean, saved, counts, resize == "student")
            for kernel, compiled in found:
                if compiled.hash in rows:  # the same for other widths or the other side
                    continue
                constants = {kernel.arg_names[i]: value for (i,), value in compiled.src.constants.items()}
                rows[compiled.hash] = {
                    "kernel": kernel.__name__.strip("_").removesuffix("_kernel"),
                    "pair": pair,
                    "resize": resize,
                    "student": dtype,
                    "normalized": normalized,
                    "sm": sm,
                    "tile": "x".join(str(constants[name]) for name in ("R", "G", "V") if name in constants),
                    "warps": compiled.metadata.num_warps,
                    **_inspect(compiled),
                }
    return list(rows.values())


def _inspect(compiled) -> dict:
    """Registers and the like from the binary; barriers, and what a thread loads and stores, by bits, from the PTX."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    ptx = compiled.asm["ptx"]
    row: dict[str, Any] = {
        "registers": used["REG"],
        "spilled": used["STACK"] + used["LOCAL"],
        "shared": used["SHARED"],
        "barriers": ptx.count("bar.sync"),
    }
    for name, instruction in (("loads", "ld"), ("stores", "st")):
        accesses = re.findall(rf"\b{instruction}\.global[.\w:]*?(?:\.v(\d))?\.b(\d+)\b", ptx)
        row[name] = dict(sorted(Counter(int(vector or 1) * int(bits) for vector, bits in accesses).items()))
    return row


def method(name: str, options: argparse.Namespace) -> Callable:
    """A function of what :func:`inputs` makes."""

    def ours(student, teacher, mask, mean, std):
        return alignment(student, teacher, mask, mean, std, options.resize, options.implementation)

    def eager(student, teacher, mask, mean, std):
        return reference.alignment(student, teacher, mask, mean, std, options.resize)

    functorch.donated_buffer = False  # so that a backward can run again and again
    torch._dynamo.reset()  # or sizes that were seen before make it compile for any size
    return {"ours": ours, "eager": eager, "compiled": torch.compile(eager, dynamic=False)}[name]


def inputs(tokens: int, pair: str, options: argparse.Namespace) -> tuple[Any, ...]:
    """Student, teacher, mask, and the teacher's mean and deviation, which are one vector or None."""
    (student, teacher), device = map(int, pair.split("/")), options.device
    torch.manual_seed(0)
    mean = torch.rand(teacher, device=device) + 0.5 if options.normalize else None
    return (
        torch.randn(tokens, student, device=device).to(getattr(torch, options.dtype)).requires_grad_(),
        torch.randn(tokens, teacher, device=device).bfloat16(),
        torch.rand(tokens, device=device) < 0.8,
        mean,
        mean,
    )


def gate(name: str, pair: str, options: argparse.Namespace) -> None:
    """Stop unless loss and gradient are those of the reference in fp64, up to a rounding."""

    def run(name, student, *others):
        leaf = student.detach().requires_grad_()
        loss = method(name, options)(leaf, *others)[0]
        return loss.detach().double(), torch.autograd.grad(loss, leaf)[0].double()

    student, teacher, *others = inputs(257 if options.device == "cuda" else 31, pair, options)
    truth, truth_grad = run("eager", student.double(), teacher.double(), *others)
    loss, grad = run(name, student, teacher, *others)
    error = (grad - truth_grad).norm() / truth_grad.norm()
    # A GPU rounds to half an eps, Triton's interpreter cuts bf16.
    allowed = torch.finfo(student.dtype).eps * (0.5 if loss.is_cuda else 1) + 1e-3
    if (loss - truth).abs() > 1e-4 or not error < allowed:
        raise SystemExit(f"{pair}, {name}: wrong result (gradient error {error:.1e}); nothing was timed.")


def timed(step: Callable[[], object], options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a call: median, 20th and 80th percentile. On CUDA the L2 cache is emptied before every call."""
    step()  # which may compile
    quantiles = [0.5, 0.2, 0.8]
    if options.device == "cuda":
        import triton.testing

        found: Any = triton.testing.do_bench(step, rep=options.repeats, quantiles=quantiles)
    else:
        found = 1e3 * np.quantile(timeit.repeat(step, number=1, repeat=options.repeats), quantiles)
    return dict(zip(("ms", "ms_p20", "ms_p80"), map(float, found), strict=True))


def ceilings(options: argparse.Namespace) -> dict[str, float]:
    """What this device reaches, to compare with: a large copy (bytes read and written) and a square matmul."""
    size, width = (2**30, 8192) if options.device == "cuda" else (2**24, 256)
    source = torch.ones(size, dtype=torch.uint8, device=options.device)
    target, square = torch.empty_like(source), torch.randn(width, width, device=options.device).bfloat16()
    return {
        "copy_gb_per_s": 2 * size / 1e6 / timed(lambda: target.copy_(source), options)["ms"],
        "bf16_matmul_tflop_per_s": 2 * width**3 / 1e9 / timed(lambda: square @ square, options)["ms"],
    }


def measure(function: Callable, states: tuple[Any, ...], options: argparse.Namespace) -> list[dict]:
    """Time the passes of one method at one size."""
    student, teacher, mask, *_ = states
    found = function(*states)
    steps: dict[str, Callable] = {
        "forward": lambda: function(*states),
        "backward": lambda: torch.autograd.grad(found[0], student, retain_graph=True),
    }
    compulsory = {  # states, mask or gradient, and what is saved
        "forward": student.nbytes + teacher.nbytes + mask.nbytes + 12 * len(mask),
        "backward": student.nbytes + teacher.nbytes + student.nbytes + 12 * len(mask),
    }
    rows = []
    for which, step in steps.items():
        row = {"pass": which, **timed(step, options)}
        row["gb_per_s"] = compulsory[which] / 1e6 / row["ms"]
        if options.device == "cuda":
            torch.cuda.synchronize()
            row["host_ms"] = timeit.timeit(step, number=20) / 20 * 1e3
        rows.append(row)
    if options.device == "cuda":
        del found
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(function(*states)[0], student)
        memory = (torch.cuda.max_memory_allocated() - before) / 2**20
        rows = [row | {"peak_extra_mib": memory} for row in rows]
    return rows


def benchmark(options: argparse.Namespace) -> dict:
    """Measure what OUT/loss.json does not hold yet, and print the table."""
    path, about = options.out / "loss.json", machine()
    decisive = ("resize", "dtype", "normalize", "device", "implementation", "repeats")
    how = {key: getattr(options, key) for key in decisive}
    report = json.loads(path.read_text()) if path.exists() else {"machine": {}, "how": {}}
    if report["how"] != how or report["machine"] | {"date": about["date"]} != about:
        report = {"machine": about, "how": how, "ceilings": ceilings(options), "results": []}
    print(json.dumps(report["ceilings"]), flush=True)
    for pair, name in itertools.product(options.pairs, options.methods):
        gate(name, pair, options)
    for tokens, pair, name in itertools.product(options.tokens, options.pairs, options.methods):
        cell = {"pair": pair, "tokens": tokens, "method": name}
        if any(cell.items() <= row.items() for row in report["results"]):
            continue
        rows = measure(method(name, options), inputs(tokens, pair, options), options)
        rows = [cell | row | {"share": row["gb_per_s"] / report["ceilings"]["copy_gb_per_s"]} for row in rows]
        report["results"] += rows
        print(*cell.values(), *(f"{row['pass']} {row['ms']:.4f} ms" for row in rows), flush=True)
        write_json(path, report)
    table: Any = pd.DataFrame(report["results"])
    values = [name for name in ("ms", "share", "host_ms", "peak_extra_mib") if name in table]
    table = table.pivot(index=["pair", "tokens", "pass"], columns="method", values=values)
    print(table.to_string(float_format="{:.3g}".format))
    return report


def draw(report: dict, path: Path) -> None:
    """One picture: share of the copy bandwidth over tokens; a column for each width pair, a row for each pass."""
    found: Any = pd.DataFrame(report["results"])
    pairs = list(found.pair.unique())
    figure = Figure(figsize=(3 * len(pairs) + 1, 6), layout="tight")
    panels = figure.subplots(2, len(pairs), sharex=True, sharey=True, squeeze=False)
    for (which, pair), rows in found.groupby(["pass", "pair"]):
        panel = panels[("forward", "backward").index(which)][pairs.index(pair)]
        rows.pivot(index="tokens", columns="method", values="share").plot(ax=panel, marker="o", logx=True)
        panel.set(title=f"student/teacher {pair}, {which}", ylabel="share of copy bandwidth")
    panels[0][0].set_ylim(bottom=0)  # last: once it is set, the shared axis does not grow
    about = report["how"] | {key: report["machine"][key] for key in ("device", "torch", "triton")}
    figure.suptitle(", ".join(f"{key} {value}" for key, value in about.items()), fontsize=9, wrap=True)
    figure.savefig(path, dpi=130)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile-report", action="store_true", help="how the kernels compile, the worst first")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/loss"), help="folder of JSON and picture")
    parser.add_argument("--pairs", nargs="+", default=PAIRS, metavar="S/T", help="student/teacher widths, or all")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--resize", default="student", choices=["student", "teacher"], help="whose features")
    parser.add_argument("--normalize", action="store_true", help="standardise the teacher's features")
    parser.add_argument("--implementation", default="auto", help="of ours: auto, triton or torch")
    parser.add_argument("--dtype", default="bfloat16", help="of the student (default: %(default)s)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=100, help="milliseconds of each timing; on the CPU, calls")
    options = parser.parse_args(arguments)
    if options.compile_report:
        pairs = [f"{a}/{b}" for a in WIDTHS for b in WIDTHS] if options.pairs == ["all"] else options.pairs
        table = pd.DataFrame(compile_report(pairs, dtype=options.dtype, normalized=options.normalize))
        print(table.sort_values(["spilled", "registers"], ascending=False).to_markdown(index=False))
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here. Use --compile-report, or --device cpu for a smoke run.")
    draw(benchmark(options), options.out / "loss.png")


if __name__ == "__main__":
    sys.exit(told("loss", main))

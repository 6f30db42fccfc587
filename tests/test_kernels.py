"""The Triton kernels against the reference in fp64.

The same cases run on CUDA (marker ``gpu``) and, on any machine, in Triton's interpreter. Triton chooses the interpreter
once, while it is imported, and a process that has it cannot compile any more; so ``test_in_the_interpreter`` runs this
file again in a process of its own with ``TRITON_INTERPRET=1``, and no environment variable leaks into other tests.
"""

import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import loss as benchmark  # scripts/benchmarks/loss.py
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from let_composer import loss
from let_composer.loss import alignment_loss, kernels, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    # The interpreter hands one-element arrays to NumPy as scalars; NumPy warns where a GPU silently makes inf or NaN.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # Dynamo itself does, in 2.7
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning"),
]

needs_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
on_device = pytest.mark.parametrize(
    "device", ["cpu" if INTERPRETED else pytest.param("cuda", marks=needs_cuda)], ids=str
)

# Absolute slack on top of eager's own error: for the loss, and relative to the gradient's norm.
SLACK = {torch.float32: (1e-6, 1e-5), torch.bfloat16: (1e-6, 1e-3), torch.float16: (1e-6, 1e-3)}


def states(tokens, width: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*tokens, width, generator=generator).to(dtype).to(device)


def pair(device: str, widths, *dtypes: torch.dtype, tokens=(3,), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Student and teacher, both of one type or each of its own."""
    first, last = dtypes[0], dtypes[-1]
    return states(tokens, widths[0], first, device, seed), states(tokens, widths[1], last, device, seed + 1)


def run(implementation, student, teacher, mask=None, upstream=1.0, **options):
    """Loss, usable tokens, inverse norms and gradient."""
    student = student.detach().requires_grad_()
    found = loss.alignment(student, teacher, mask, implementation=implementation, **options)
    (grad,) = torch.autograd.grad(found.loss * upstream, student)
    return found.loss.detach(), found.usable, found.inverse_norm, grad


def check(student, teacher, mask=None, upstream=-1.7, **options):
    """Ours must not be worse than eager in the same dtype, both measured against the reference in fp64."""
    truth, usable, norms, truth_grad = run("torch", student.double(), teacher.double(), mask, upstream, **options)
    eager, _, _, eager_grad = run("torch", student, teacher, mask, upstream, **options)
    found, counted, inverse, grad = run("triton", student, teacher, mask, upstream, **options)
    assert found.dtype == torch.float32 and found.shape == ()
    assert grad.dtype == student.dtype and grad.shape == student.shape
    assert counted == usable and torch.equal(inverse > 0, norms > 0)
    loss_slack, grad_slack = SLACK[student.dtype]
    assert (found - truth).abs() <= (eager - truth).abs() + loss_slack, (found, truth, eager)
    assert torch.isfinite(grad).all()
    # The interpreter cuts bf16 instead of rounding it, which doubles the error of the last step.
    factor = 2.1 if INTERPRETED and student.dtype == torch.bfloat16 else 1.0
    error, allowed = (grad - truth_grad).norm(), (eager_grad - truth_grad).norm()
    # Where student and teacher agree, the gradient is a difference that cancels: rounding is relative to its terms.
    width = (student if options.get("resize") == "teacher" else teacher).shape[-1]
    mask = torch.ones_like(norms, dtype=torch.bool) if mask is None else mask
    lengths = reference.resize_features(student.double(), width).norm(dim=-1)
    terms = (upstream / mask.sum() / lengths[mask & (lengths >= reference.EPSILON)]).norm()
    slack = grad_slack * truth_grad.norm() + 2e-7 * terms
    assert error <= factor * allowed + slack, (error, allowed, truth_grad.norm(), terms)
    torch.testing.assert_close(inverse.double(), norms, rtol=1e-5, atol=0)
    return found, grad


both_sides = pytest.mark.parametrize("resize", ["student", "teacher"])


FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# Several tiles or less than one, a pattern that repeats and one that does not, up and down.
WIDTHS = [(1536, 576), (768, 128), (512, 512), (384, 1024), (57, 33), (33, 57), (300, 40)]
MIXED = [(FP16,), (BF16, FP32), (FP32, BF16)]
NORMALIZED = {(256, 256): "mean std", (256, 96): "mean std", (96, 256): "mean", (1, 8): "std", (8, 1): "mean std"}
MASKS = [((2, 4), 0.0), ((2, 4), 0.2), ((2, 4), 1.0), ((0,), 1.0), ((2, 0), 1.0)]


@on_device
@both_sides
@pytest.mark.parametrize(
    ("widths", "dtypes", "names", "shape", "share"),
    [
        *((widths, (dtype,), "", (3,), 0.6) for widths in WIDTHS for dtype in (FP32, BF16)),
        *(((128, 48), dtypes, "", (3,), 0.6) for dtypes in MIXED),
        *((widths, (FP32,), names, (3,), 0.6) for widths, names in NORMALIZED.items()),
        *(((64, 24), (FP32,), "", *mask) for mask in MASKS),
    ],
)
def test_values(device, widths, dtypes, names, shape, share, resize):
    mask = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < share).to(device)
    mean = states((), widths[1], FP32, device, 3)
    statistics = {"mean": mean.bfloat16(), "std": mean.abs() + 0.5}
    given = {f"teacher_{name}": statistics[name] for name in names.split()}
    found, grad = check(*pair(device, widths, *dtypes, tokens=shape), mask, resize=resize, **given)
    assert (grad[~mask] == 0).all() and (mask.any() or found == 0)


@on_device
@both_sides
@pytest.mark.parametrize("widths", [(64, 64), (64, 24), (24, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_without_a_direction(device, dtype, widths, resize):
    student, teacher = pair(device, widths, dtype, tokens=(8,))
    student[0] = 0
    teacher[1] = 0
    teacher[2, 5] = torch.nan
    teacher[3, 5] = torch.inf
    student[4, 7] = -torch.inf
    student[5] *= 1e-9
    teacher[6] *= 1e-9
    expected, actual = (run(how, student, teacher, resize=resize) for how in ("torch", "triton"))
    rtol = 1e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-5, check_dtype=False)
    assert torch.equal(actual[3].any(dim=-1), expected[3].any(dim=-1))  # rows pass a gradient or not a bit of it


@on_device
@pytest.mark.parametrize("scales", [(1e37, 1e37), (1e30, 1e-4), (1e-4, 1e30), (1e-5, 1e-5), (1e18, 1.0)])
def test_huge_and_tiny_norms(device, scales):
    for dtype in (torch.bfloat16, torch.float32, torch.float16)[: 3 if max(scales) < 1 else 2]:
        ordinary = pair(device, (64, 24), torch.float32, tokens=(5,))
        student, teacher = (x.mul(scale).to(dtype) for x, scale in zip(ordinary, scales, strict=True))
        student[1:3] = states((2,), 64, dtype, device, 3)  # neighbours of ordinary size
        teacher[2:4] = states((2,), 24, dtype, device, 4)
        check(student, teacher)


@on_device
@both_sides
def test_strides(device, resize):
    def layouts(width, seed):
        base = states((2, 2, 3), width + 8, torch.float32, device, seed)
        yield base[..., :width]
        yield base[:, 0, 1:, 1 : width + 1]  # rows that do not collapse, start off a 16-byte boundary
        yield base[0, 0, :, ::1][:, :width].T.contiguous().T  # last dimension strided
        yield base[0, 0, :1, :width].expand(3, width)
        yield base[0, 0, 0, :width]
        yield base.permute(2, 0, 1, 3)[..., :width]

    for student, teacher in zip(layouts(64, 1), layouts(24, 2), strict=True):
        mask = torch.ones(student.shape[:-1], dtype=torch.bool, device=device)
        if mask.dim() > 1:
            mask = mask.mT.contiguous().mT
            mask[..., 0] = False
        check(student, teacher, mask, resize=resize)


@on_device
@both_sides
@pytest.mark.parametrize("teacher_width", [64, 24, 100])
def test_every_output_is_written_and_reruns_agree_bitwise(device, teacher_width, resize):
    student, teacher = pair(device, (64, teacher_width), torch.bfloat16, tokens=(5,))
    mask = torch.tensor([True, False, True, True, False], device=device)

    before = torch.are_deterministic_algorithms_enabled()
    plain = run("triton", student, teacher, mask, resize=resize)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        poisoned = run("triton", student, teacher, mask, resize=resize)
    finally:
        torch.use_deterministic_algorithms(before)
    for a, b in zip(plain, poisoned, strict=True):
        assert torch.isfinite(a).all() and torch.equal(a, b)


@on_device
def test_at_most_12_bytes_per_token_are_saved(device):
    student, teacher = pair(device, (64, 24), torch.bfloat16, tokens=(50,))
    student.requires_grad_()
    mask = torch.ones(50, dtype=torch.bool, device=device)
    mine = {student.untyped_storage().data_ptr(), teacher.untyped_storage().data_ptr()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        alignment_loss(student, teacher, mask, implementation="triton")
    extra = sum(x.numel() * x.element_size() for x in saved if x.untyped_storage().data_ptr() not in mine)
    assert len(saved) > 0 and extra <= 12 * 50 + 16


@on_device
def test_registered_like_any_op(device):
    student, teacher = pair(device, (24, 16), torch.float32, tokens=(2, 2))
    mask = torch.ones(2, 2, dtype=torch.bool, device=device)
    mean = teacher[0, 0].clone()
    ops: Any = torch.ops.let_composer
    found, saved, counts = ops.alignment_loss(student, teacher, mask, mean, None, True)
    for op, arguments in (
        (ops.alignment_loss, (student.clone().requires_grad_(), teacher, mask, mean, None, True)),
        (ops.alignment_loss, (student[:, 1:].requires_grad_(), teacher[:, 1:], mask[:, 1:], None, None, False)),
        (ops.alignment_loss_backward, (found, student, teacher, mean, None, saved, counts, True)),
    ):
        torch.library.opcheck(op.default, arguments)


def guided(student, teacher):
    mask = student[..., 0] < 1
    found = loss.alignment(student.sin(), teacher, mask, implementation="triton")
    return found.loss + found.inverse_norm.norm()


@on_device
@pytest.mark.parametrize("how", ["compiled", "recomputed", "recomputed reentrantly"])
def test_in_one_graph_and_recomputed(device, how):
    student, teacher = pair(device, (24, 16), torch.float32, tokens=(2, 5))
    student.requires_grad_()
    expected = guided(student, teacher)
    (gradient,) = torch.autograd.grad(expected, student)
    assert gradient.abs().sum() > 0
    if how == "compiled":
        torch._dynamo.reset()
        backend = "inductor" if device == "cuda" else "aot_eager"
        found = torch.compile(guided, fullgraph=True, dynamic=False, backend=backend)(student, teacher)
    else:
        found: Any = checkpoint(guided, student, teacher, use_reentrant=how != "recomputed")
    found.backward()
    torch.testing.assert_close((found, student.grad), (expected, gradient))


@on_device
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 4),
    widths=st.tuples(st.integers(2, 150), st.integers(2, 150)),
    resize=st.sampled_from(["teacher", "student"]),
    seed=st.integers(0, 1000),
)
def test_any_shape(device, tokens, widths, resize, seed):
    mask = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < 0.8
    check(*pair(device, widths, torch.float32, tokens=(tokens,), seed=seed), mask.to(device), resize=resize)


@on_device
def test_widest_rows(device):
    student, teacher = pair(device, (kernels.MAX_WIDTH, 5000), torch.bfloat16, tokens=(1,))
    check(student, teacher, resize="teacher")
    wider = torch.ones(1, kernels.MAX_WIDTH + 1, device=device)
    with pytest.raises(ValueError, match=f"widths up to {kernels.MAX_WIDTH}"):
        alignment_loss(wider, student, implementation="triton")


@on_device
def test_the_door_chooses_the_kernels(device, monkeypatch):
    student, teacher = pair(device, (32, 32), torch.bfloat16)
    monkeypatch.setattr(kernels, "alignment", called := Mock(wraps=kernels.alignment))
    alignment_loss(student, teacher)
    assert called.call_count == (device == "cuda")
    alignment_loss(student, teacher, implementation="triton")
    alignment_loss(student.double(), teacher)
    alignment_loss(student, teacher, implementation="torch")
    assert called.call_count == 1 + (device == "cuda")
    with pytest.raises(ValueError, match="fp32, bf16 and fp16"):
        alignment_loss(student.double(), teacher, implementation="triton")


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("teacher_width", [2048, 768])
def test_memory(device, teacher_width):
    student, teacher = pair(device, (2048, teacher_width), torch.bfloat16, tokens=(4096,))
    student.requires_grad_()
    alignment_loss(student, teacher).backward()
    student.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    alignment_loss(student, teacher).backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= student.numel() * student.element_size() + 4096 * 24 + 2**16  # the gradient, and little beside it


@on_device
def test_benchmark(device, tmp_path, monkeypatch):
    options = f"--device {device} --implementation triton --pairs 64/24 64/64 --repeats 2 --out {tmp_path}".split()
    options += ["--methods", "ours", "eager"]
    benchmark.main([*options, "--normalize", "--resize", "teacher", "--tokens", "2"])
    options += ["--tokens", "2", "3"]
    benchmark.main(options)  # of another kind: nothing is taken over
    report = json.loads((tmp_path / "loss.json").read_text())
    cells = itertools.product((2, 3), ("64/24", "64/64"), ("ours", "eager"), ("forward", "backward"))
    assert [(row["tokens"], row["pair"], row["method"], row["pass"]) for row in report["results"]] == list(cells)
    assert all(row["ms"] > 0 and row["gb_per_s"] > 0 for row in report["results"])
    assert all(figure > 0 for figure in report["ceilings"].values())
    assert {"device", "torch", "triton", "sources", "date"} <= report["machine"].keys()
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    monkeypatch.setattr(benchmark, "measure", None)  # all is there: a second call measures nothing
    benchmark.main(options)

    def wrong(*arguments):
        found = loss.alignment(*arguments[:-1], implementation="torch")
        return found._replace(loss=found.loss * 1.01)

    monkeypatch.setattr(benchmark, "alignment", wrong)
    (tmp_path / "loss.json").unlink()
    with pytest.raises(SystemExit, match="nothing was timed"):
        benchmark.main(options)
    assert not (tmp_path / "loss.json").exists()


# What follows needs a process without the interpreter, and no GPU.
compiled_only = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")


@compiled_only
@pytest.mark.timeout(1800)  # a minute and a half when nothing else runs
def test_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--noconftest", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


# Most registers of a kernel in Triton 3.3, the same where the teacher is normalised, and most barriers. Registers say
# how many warps a multiprocessor keeps to hide latency: 64 leave 32, 96 leave 20, 128 leave 16. Barriers are those of a
# sum over warps, and of layouts that change where no width is a multiple of 32.
LIMITS = {"forward": (96, 128, 4), "backward": (80, 112, 4)}


# A sample of the grid that loss.py --compile-report --pairs all goes through, the default side first.
@compiled_only
@pytest.mark.parametrize(
    ("pair", "architectures", "options"),
    [
        ("2048/768", (80, 90, 100), {}),
        ("4096/2048", (90,), {"normalized": True}),
        ("2048/768", (100,), {"dtype": "float32"}),
        ("768/2048", (80,), {}),
        ("2048/2048", (90,), {}),
        ("64/8192", (100,), {}),
        ("8192/64", (80,), {}),
        ("1000/300", (90,), {}),
    ],
)
def test_compiled_kernels(pair, architectures, options):
    rows = benchmark.compile_report([pair], architectures, **options)
    student, teacher = map(int, pair.split("/"))
    assert {row["kernel"] for row in rows} == LIMITS.keys()
    assert {row["sm"] for row in rows} == set(architectures)
    assert {row["resize"] for row in rows} == ({"-"} if student == teacher else {"student", "teacher"})
    for row in rows:
        *registers, barriers = LIMITS[row["kernel"]]
        assert row["spilled"] == 0 and row["barriers"] <= barriers, row
        assert row["registers"] <= registers[row["normalized"]], row
        if student % 8 or teacher % 8:  # rows start where no vector can
            continue
        if row["kernel"] == "backward":
            assert set(row["stores"]) == {128}, row
        # Whole rows are read in 128 bits, and so is the side that is not resized; but going down to the width of the
        # other, each lane reads two taps and one column: with eight columns its taps would meet in few banks.
        if row["resize"] == "teacher":
            assert row["loads"].get(128, 0) > 0 or student < teacher, row
        if row["resize"] == "-":
            assert 128 in row["loads"] and 16 not in row["loads"], row


@compiled_only
@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors are refused everywhere, but this says why")
def test_cpu_tensors_are_refused_without_the_interpreter():
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        alignment_loss(torch.randn(2, 8), torch.randn(2, 8), implementation="triton")


@compiled_only
def test_broken_triton_warns_once_and_falls_back(monkeypatch):
    monkeypatch.setitem(sys.modules, "let_composer.loss.kernels", None)  # as if importing it failed
    monkeypatch.delattr(loss, "kernels", raising=False)
    monkeypatch.setattr(loss, "_try_triton", functools.cache(loss._try_triton.__wrapped__))
    on_cuda: Any = SimpleNamespace(is_cuda=True)
    with pytest.warns(UserWarning, match="runs in plain torch") as record:
        assert loss._implementation("auto", on_cuda) is reference
        assert loss._implementation("auto", on_cuda, None) is reference
    assert len(record) == 1
    with pytest.raises(RuntimeError, match="Triton does not work here"):
        loss._implementation("triton", on_cuda)
    assert loss._implementation("torch", on_cuda) is reference

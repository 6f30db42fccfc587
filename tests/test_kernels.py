"""The Triton kernels against the reference in fp64.

The same cases run on CUDA (marker ``gpu``) and, on any machine, in Triton's interpreter. Triton chooses the interpreter
once, while it is imported, and a process that has it cannot compile any more; so ``test_in_the_interpreter`` runs this
file again in a process of its own with ``TRITON_INTERPRET=1``, and no environment variable leaks into other tests.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from let_composer import loss
from let_composer.loss import alignment_loss, kernels, reference, target_sum

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


def reference_loss(*arguments, **options) -> Tensor:
    return reference.alignment(*arguments, **options)[0]


def kernels_loss(*arguments, **options) -> Tensor:
    return kernels.alignment(*arguments, **options)[0]


def gradient(function, student: Tensor, upstream: float) -> tuple[Tensor, Tensor]:
    student = student.detach().requires_grad_()
    loss = function(student)
    (grad,) = torch.autograd.grad(loss * upstream, student)
    return loss.detach(), grad


def check(student, teacher, mask=None, *, mean=None, std=None, resize="teacher", upstream=-1.7):
    """Ours must not be worse than eager in the same dtype, both measured against the reference in fp64."""
    if mask is None:
        mask = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)

    def run(function, student, teacher):
        return gradient(lambda s: function(s, teacher, mask, mean, std, resize), student, upstream)

    truth, truth_grad = run(reference_loss, student.double(), teacher.double())
    eager, eager_grad = run(reference_loss, student, teacher)
    loss, grad = run(kernels_loss, student, teacher)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert grad.dtype == student.dtype and grad.shape == student.shape
    loss_slack, grad_slack = SLACK[student.dtype]
    assert (loss - truth).abs() <= (eager - truth).abs() + loss_slack, (loss, truth, eager)
    assert torch.isfinite(grad).all()
    # The interpreter cuts bf16 instead of rounding it, which doubles the error of the last step.
    factor = 2.1 if INTERPRETED and student.dtype == torch.bfloat16 else 1.0
    error, allowed = (grad - truth_grad).norm(), (eager_grad - truth_grad).norm()
    # Where student and teacher agree, the gradient is a difference that cancels: rounding is relative to its terms.
    width = student.shape[-1] if resize == "teacher" else teacher.shape[-1]
    norms = reference.resize_features(student.double(), width).norm(dim=-1)
    terms = (upstream / mask.sum() / norms[mask & (norms >= reference.EPSILON)]).norm()
    slack = grad_slack * truth_grad.norm() + 2e-7 * terms
    assert error <= factor * allowed + slack, (error, allowed, truth_grad.norm(), terms)

    expected = reference.target_sum(teacher.double(), mask, width, mean, std)
    actual = kernels.target_sum(teacher, mask, width, mean, std)
    assert actual.dtype == torch.float32 and actual.shape == (width,)
    found, truth = (
        f.alignment(student.double() if f is reference else student, teacher, mask, mean, std, resize)
        for f in (kernels, reference)
    )
    assert found[1] == truth[1] and torch.equal(found[2] > 0, truth[2] > 0)
    if resize == "teacher" or teacher.shape[-1] == width:
        again = kernels.target_sum(teacher, mask, width, mean, std, found[2])
        torch.testing.assert_close(again.double(), expected, rtol=1e-5, atol=1e-5 * (mask.sum().item() + 1) ** 0.5)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5 * (mask.sum().item() + 1) ** 0.5)
    return loss, grad


PAIRS = [(2048, 768), (2048, 576), (4096, 2048), (768, 128), (512, 512), (768, 2048), (57, 33), (33, 57), (300, 40)]


@on_device
@pytest.mark.parametrize("resize", ["teacher", "student"])
@pytest.mark.parametrize(("student_width", "teacher_width"), PAIRS)
def test_values(device, student_width, teacher_width, resize):
    for dtype in (torch.float32, torch.bfloat16):
        student = states((2, 2), student_width, dtype, device, 1)
        teacher = states((2, 2), teacher_width, dtype, device, 2)
        mask = torch.tensor([[True, False], [True, True]], device=device)
        _, grad = check(student, teacher, mask, resize=resize)
        assert (grad[~mask] == 0).all()


@on_device
@pytest.mark.parametrize("resize", ["teacher", "student"])
@pytest.mark.parametrize("widths", [(256, 256), (256, 96), (96, 256), (1, 8), (8, 1)])
def test_centring_and_standardising(device, widths, resize):
    student, teacher = (states((5,), width, torch.float32, device, width) for width in widths)
    mean = states((), widths[1], torch.float32, device, 3)
    std = mean.abs() + 0.5
    mask = torch.tensor([True, True, False, True, True], device=device)
    check(student, teacher, mask, mean=mean, std=std, resize=resize)
    check(student, teacher, mask, mean=mean.bfloat16(), resize=resize)
    check(student.bfloat16(), teacher, mask, std=std, resize=resize)


@on_device
@pytest.mark.parametrize(
    ("student_dtype", "teacher_dtype"),
    [(torch.float16, torch.float16), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
    ids=str,
)
def test_mixed_types(device, student_dtype, teacher_dtype):
    for resize in ("teacher", "student"):
        student = states((3,), 128, student_dtype, device)
        check(student, states((3,), 48, teacher_dtype, device, 1), resize=resize)
        check(student, states((3,), 128, teacher_dtype, device, 1), resize=resize)


@on_device
@pytest.mark.parametrize("widths", [(64, 64), (64, 24)])
def test_masks(device, widths):
    student, teacher = (states((2, 4), width, torch.float32, device, width) for width in widths)
    for share in (0.0, 0.2, 1.0):
        mask = torch.rand(2, 4, generator=torch.Generator().manual_seed(0)) < share
        loss, grad = check(student, teacher, mask.to(device))
        if not mask.any():
            assert loss == 0 and (grad == 0).all()


@on_device
@pytest.mark.parametrize("resize", ["teacher", "student"])
@pytest.mark.parametrize("widths", [(64, 64), (64, 24), (24, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_without_a_direction(device, dtype, widths, resize):
    student, teacher = (states((8,), width, dtype, device, width) for width in widths)
    student[0] = 0
    teacher[1] = 0
    teacher[2, 5] = torch.nan
    teacher[3, 5] = torch.inf
    student[4, 7] = -torch.inf
    student[5] *= 1e-9
    teacher[6] *= 1e-9
    mask = torch.ones(8, dtype=torch.bool, device=device)
    if resize == "teacher" and widths != (24, 64):  # a skipped input of a wide teacher is not seen, by neither of both
        _, grad = check(student, teacher, mask)
        assert (grad[:7] == 0).all() and (grad[7] != 0).any()
    expected = gradient(lambda s: reference_loss(s, teacher, mask, resize=resize), student, 1.0)
    actual = gradient(lambda s: kernels_loss(s, teacher, mask, resize=resize), student, 1.0)
    torch.testing.assert_close(actual, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-5)


@on_device
@pytest.mark.parametrize("widths", [(64, 64), (64, 24)])
@pytest.mark.parametrize("scales", [(1e37, 1e37), (1e30, 1e-4), (1e-4, 1e30), (1e-5, 1e-5), (1e18, 1.0)])
def test_huge_and_tiny_norms(device, scales, widths):
    for dtype in (torch.bfloat16, torch.float32):
        student = states((5,), widths[0], torch.float32, device, 1).mul(scales[0]).to(dtype)
        teacher = states((5,), widths[1], torch.float32, device, 2).mul(scales[1]).to(dtype)
        student[1:3] = states((2,), widths[0], dtype, device, 3)  # neighbours of ordinary size
        teacher[2:4] = states((2,), widths[1], dtype, device, 4)
        check(student, teacher)
    half = states((3,), widths[0], torch.float16, device) * 1e4
    check(half, states((3,), widths[1], torch.float16, device, 1) * 1e-2)


@on_device
@pytest.mark.parametrize("shape", [(0, 24), (5, 24), (3, 50, 300), (200, 2048)])
def test_feature_sums(device, shape):
    for dtype, offset in ((torch.bfloat16, 30.0), (torch.float32, 3e3)):  # a deviation that is small beside the mean
        teacher = (states(shape[:-1], shape[-1], torch.float32, device) + offset).to(dtype)
        mask = (torch.rand(shape[:-1], generator=torch.Generator().manual_seed(0)) < 0.8).to(device)
        if len(shape) > 2:
            teacher[1, 3, 4], teacher[1, 7, 0], mask[0, 0] = torch.nan, torch.inf, False
        for shift in (None, torch.full(shape[-1:], offset, device=device)):
            found, truth = (f.feature_sums(teacher, mask, shift) for f in (kernels, reference))
            assert found.dtype == torch.float64 and found[0] == truth[0]

            means = [(moments[1:] / truth[0].clamp(min=1)).view(2, -1) for moments in (found, truth)]
            variances = [squares - mean.square() for mean, squares in means]
            torch.testing.assert_close(*variances, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found[1:], truth[1:], rtol=1e-6, atol=1e-2)


@on_device
def test_identical_states_have_no_gradient(device):
    student = states((6,), 96, torch.bfloat16, device)
    loss, grad = gradient(
        lambda s: kernels_loss(s, student, torch.ones(6, dtype=torch.bool, device=device)), student, 1.0
    )
    torch.testing.assert_close(loss.item(), -1.0)
    assert grad.abs().max() < 1e-6


@on_device
@pytest.mark.parametrize("teacher_width", [64, 24])
def test_strides(device, teacher_width):
    def layouts(width, seed):
        base = states((2, 2, 3), width + 8, torch.float32, device, seed)
        yield base[..., :width]
        yield base[:, 0, 1:, 1 : width + 1]  # rows that do not collapse, start off a 16-byte boundary
        yield base[0, 0, :, ::1][:, :width].T.contiguous().T  # last dimension strided
        yield base[0, 0, :1, :width].expand(3, width)
        yield base[0, 0, 0, :width]
        yield base.permute(2, 0, 1, 3)[..., :width]

    for student, teacher in zip(layouts(64, 1), layouts(teacher_width, 2), strict=True):
        mask = torch.ones(student.shape[:-1], dtype=torch.bool, device=device)
        if mask.dim() > 1:
            mask = mask.mT.contiguous().mT
            mask[..., 0] = False
        check(student, teacher, mask)


@on_device
@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_tokens(device, shape):
    student = torch.zeros(*shape, 64, device=device)
    loss, grad = check(student, torch.zeros(*shape, 32, device=device))
    assert loss == 0 and grad.shape == student.shape


@on_device
def test_twice_in_one_graph(device):
    student = states((2, 4), 64, torch.float32, device).requires_grad_()
    first, second = states((2, 4), 64, torch.float32, device, 1), states((2, 4), 24, torch.float32, device, 2)
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0]], device=device) > 0

    def run(f):
        total = f(student, first, mask) * 3 + f(student * 2, second, ~mask) ** 2
        return torch.autograd.grad(total, student)[0]

    torch.testing.assert_close(run(kernels_loss), run(reference_loss), rtol=1e-4, atol=1e-6)


@on_device
@pytest.mark.parametrize("teacher_width", [64, 24, 100])
def test_every_output_is_written_and_reruns_agree_bitwise(device, teacher_width):
    student = states((9,), 64, torch.bfloat16, device)
    teacher = states((9,), teacher_width, torch.bfloat16, device, 1)
    mask = torch.rand(9, generator=torch.Generator().manual_seed(0)).to(device) < 0.5

    def run(resize):
        loss = gradient(lambda s: kernels_loss(s, teacher, mask, resize=resize), student, 1.0)
        return *loss, kernels.target_sum(teacher, mask, 64)

    before = torch.are_deterministic_algorithms_enabled()
    for resize in ("teacher", "student"):
        plain = run(resize)
        torch.use_deterministic_algorithms(True)  # fills new memory with NaN
        try:
            poisoned = run(resize)
        finally:
            torch.use_deterministic_algorithms(before)
        for a, b in zip(plain, poisoned, strict=True):
            assert torch.isfinite(a).all() and torch.equal(a, b)


@on_device
def test_at_most_12_bytes_per_token_are_saved(device):
    student = states((50,), 64, torch.bfloat16, device).requires_grad_()
    teacher = states((50,), 24, torch.bfloat16, device)
    mask = torch.ones(50, dtype=torch.bool, device=device)
    mine = {student.untyped_storage().data_ptr(), teacher.untyped_storage().data_ptr()}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        kernels_loss(student, teacher, mask)
    extra = sum(x.numel() * x.element_size() for x in saved if x.untyped_storage().data_ptr() not in mine)
    assert len(saved) > 0 and extra <= 12 * 50 + 8


@on_device
@pytest.mark.parametrize("resize_student", [False, True])
def test_registered_like_any_op(device, resize_student):
    student, teacher = states((2, 2), 24, torch.float32, device), states((2, 2), 16, torch.float32, device, 1)
    mask = torch.ones(2, 2, dtype=torch.bool, device=device)
    mean = teacher[0, 0].clone()
    ops: Any = torch.ops.let_composer
    loss, saved, counts = ops.alignment_loss(student, teacher, mask, mean, None, resize_student)
    for op, arguments in (
        (ops.alignment_loss, (student.clone().requires_grad_(), teacher, mask, mean, None, resize_student)),
        (
            ops.alignment_loss,
            (student[:, 1:].requires_grad_(), teacher[:, 1:], mask[:, 1:], None, None, resize_student),
        ),
        (ops.alignment_loss_backward, (loss, student, teacher, mean, None, saved, counts, resize_student)),
        (ops.weighted_sums, (teacher, saved[2], mean, None, True)),
        (ops.weighted_sums, (teacher[:, 1:], saved[2, :2], None, None, False)),
    ):
        torch.library.opcheck(op.default, arguments)


@on_device
def test_compiles_into_one_graph(device):
    student, teacher = states((2, 5), 24, torch.float32, device), states((2, 5), 16, torch.float32, device, 1)
    mask = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 0, 1]], device=device) > 0

    def step(student):
        return (
            alignment_loss(student * 2, teacher, mask, implementation="triton")
            + target_sum(teacher, mask, width=24, implementation="triton").norm()
        )

    torch._dynamo.reset()
    compiled = torch.compile(
        step, fullgraph=True, dynamic=False, backend="inductor" if device == "cuda" else "aot_eager"
    )
    torch.testing.assert_close(gradient(compiled, student, 2.0), gradient(step, student, 2.0))


@on_device
@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_activation_checkpointing(device, reentrant):
    student, teacher = states((2, 5), 24, torch.float32, device), states((2, 5), 16, torch.float32, device, 1)

    def step(student):
        return alignment_loss(student.sin(), teacher, implementation="triton")

    expected = gradient(step, student, 2.0)
    assert expected[1].abs().sum() > 0
    student = student.clone().requires_grad_()
    loss = checkpoint(step, student, use_reentrant=reentrant)
    assert isinstance(loss, Tensor)
    (loss * 2.0).backward()
    torch.testing.assert_close((loss.detach(), student.grad), expected)


@on_device
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 4),
    widths=st.tuples(st.integers(2, 300), st.integers(2, 300)),
    resize=st.sampled_from(["teacher", "student"]),
    seed=st.integers(0, 1000),
)
def test_any_shape(device, tokens, widths, resize, seed):
    student, teacher = (states((tokens,), width, torch.float32, device, seed + width) for width in widths)
    mask = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < 0.8
    check(student, teacher, mask.to(device), resize=resize)


@on_device
def test_widest_rows(device):
    width = kernels.MAX_WIDTH
    student = states((2,), width, torch.bfloat16, device)
    check(student, states((2,), width, torch.bfloat16, device, 1))
    check(student, states((2,), 5000, torch.bfloat16, device, 1))
    with pytest.raises(ValueError, match=f"widths up to {width}"):
        alignment_loss(states((1,), width + 1, torch.bfloat16, device), student[:1], implementation="triton")


@on_device
def test_the_door_chooses_the_kernels(device, monkeypatch):
    student, teacher = states((4,), 32, torch.bfloat16, device), states((4,), 32, torch.bfloat16, device, 1)
    called = []
    original = kernels.alignment
    monkeypatch.setattr(kernels, "alignment", lambda *args: called.append(1) or original(*args))
    alignment_loss(student, teacher)
    assert len(called) == (device == "cuda")
    alignment_loss(student, teacher, implementation="triton")
    assert len(called) == 1 + (device == "cuda")
    alignment_loss(student.double(), teacher)
    alignment_loss(student, teacher, implementation="torch")
    assert len(called) == 1 + (device == "cuda")
    with pytest.raises(ValueError, match="fp32, bf16 and fp16"):
        alignment_loss(student.double(), teacher, implementation="triton")


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("teacher_width", [2048, 768])
def test_memory(device, teacher_width):
    student = states((4096,), 2048, torch.bfloat16, device).requires_grad_()
    teacher = states((4096,), teacher_width, torch.bfloat16, device)
    alignment_loss(student, teacher).backward()
    student.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    alignment_loss(student, teacher).backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= student.numel() * student.element_size() + 4096 * 24 + 2**16  # the gradient, and little beside it


def benchmark_loss():
    folder = ROOT / "scripts" / "benchmarks"
    sys.path.append(str(folder))
    spec = importlib.util.spec_from_file_location("benchmark_loss", folder / "loss.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@on_device
@pytest.mark.parametrize("resize", ["student", "teacher"])
def test_benchmark(device, tmp_path, resize):
    pairs = ["64/24", "64/64"]
    options = f"--device {device} --methods ours eager --implementation triton --tokens 2 3 --repeats 2".split()
    options += ["--pairs", *pairs, "--resize", resize, "--out", str(tmp_path)]
    module = benchmark_loss()
    module.main([*options, "--normalize"])
    module.main(options)  # of another kind: nothing is taken over
    report = json.loads((tmp_path / "loss.json").read_text())
    assert [(row["pair"], row["tokens"], row["method"], row["pass"]) for row in report["results"]] == [
        (pair, tokens, method, which)
        for tokens in (2, 3)
        for pair in pairs
        for method in ("ours", "eager")
        for which in ("forward", "backward", "target_sum")
    ]
    assert all(row["ms"] > 0 and row["gb_per_s"] > 0 for row in report["results"]) and report["copy_gb_per_s"] > 0
    assert {"device", "torch", "triton", "sources", "date"} <= report["machine"].keys()
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    module.measure = None  # all is there: a second call measures nothing
    module.main(options)


@on_device
def test_benchmark_refuses_to_time_a_wrong_result(device, tmp_path, monkeypatch):
    module = benchmark_loss()
    wrong = 1.01
    monkeypatch.setattr(module, "alignment", lambda s, t, mask, **_: (wrong * reference_loss(s, t, mask), None, None))
    with pytest.raises(SystemExit, match="nothing was timed"):
        module.main(f"--device {device} --methods ours --pairs 64/64 --tokens 2 --out {tmp_path / 'x'}".split())
    assert not (tmp_path / "x").exists()


# What follows needs a process without the interpreter, and no GPU.
compiled_only = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")


@compiled_only
@pytest.mark.timeout(1800)  # a minute and a half when nothing else runs
def test_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--noconftest", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


# What ptxas makes of a guided step's launches: most registers and barriers of a kernel in Triton 3.3. Registers decide
# how many warps stay to hide latency: 96 leave 20 on a multiprocessor, 64 leave 32.
MOST = {"forward": (96, 0), "mean": (60, 8), "backward": (80, 0), "backward_resized": (64, 0), "sums": (64, 12)}


@compiled_only
@pytest.mark.parametrize(
    ("pair", "options"),
    [
        ("2048/2048", {}),
        ("2048/768", {}),
        ("4096/2048", {}),
        ("768/2048", {}),
        ("64/8192", {}),
        ("8192/64", {}),
        ("2048/768", {"normalized": True}),
        ("2048/768", {"dtype": torch.float32}),
    ],
)
def test_compiled_kernels(pair, options):
    module = benchmark_loss()
    rows = module.compile_report([pair], **options)
    assert {row["sm"] for row in rows} == {80, 90, 100}
    student, teacher = map(int, pair.split("/"))
    sides = ["-"] if student == teacher else ["student", "teacher"]
    assert {row["resize"] for row in rows} == set(sides) and {row["kernel"] for row in rows} <= MOST.keys()
    for row in rows:
        registers, barriers = MOST[row["kernel"]]
        assert row["spilled"] == 0 and row["registers"] <= registers and row["barriers"] <= barriers, row
        if row["kernel"].startswith("backward"):
            assert set(row["stores"]) == {128}, row
        # Whole rows are read in 128 bits, and so is the side that is not resized; but going down to the width of the
        # other, each lane reads two taps and one column: with eight columns its taps would meet in few banks.
        if (row["kernel"], row["resize"]) in (("forward", "teacher"), ("backward", "teacher"), ("sums", "student")):
            assert row["loads"].get(128, 0) > 0 or student < teacher, row
        if row["resize"] == "-" and row["kernel"] in ("forward", "backward"):
            assert 128 in row["loads"] and 16 not in row["loads"], row
    assert len(module.report_table(rows).splitlines()) == 2 + len(rows)


@compiled_only
@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors are refused everywhere, but this says why")
def test_cpu_tensors_are_refused_without_the_interpreter():
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        alignment_loss(torch.randn(2, 8), torch.randn(2, 8), implementation="triton")


@compiled_only
def test_broken_triton_warns_once_and_falls_back(monkeypatch):
    monkeypatch.setitem(sys.modules, "let_composer.loss.kernels", None)  # as if importing it failed
    monkeypatch.delattr(loss, "kernels", raising=False)
    loss._try_triton.cache_clear()
    on_cuda: Any = SimpleNamespace(is_cuda=True)
    try:
        with pytest.warns(UserWarning, match="runs in plain torch") as record:
            assert loss._implementation("auto", on_cuda) is reference
            assert loss._implementation("auto", on_cuda, None) is reference
        assert len(record) == 1
        with pytest.raises(RuntimeError, match="Triton does not work here"):
            loss._implementation("triton", on_cuda)
        assert loss._implementation("torch", on_cuda) is reference
    finally:
        loss._try_triton.cache_clear()

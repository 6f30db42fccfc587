"""The alignment loss: its definition and its door. The kernels are held against it in test_kernels.py."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from let_composer.loss import alignment, alignment_loss, reference, target_sum


def states(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradient(student: Tensor, *args, upstream: float = 1.0, **kwargs) -> Tensor:
    student = student.detach().requires_grad_()
    return torch.autograd.grad(alignment_loss(student, *args, **kwargs) * upstream, student)[0]


def random_mask(*shape: int, share: float = 0.6, seed: int = 2) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def targets(teacher: Tensor, mask: Tensor | None = None, width: int | None = None) -> Tensor:
    """The sum of unit target vectors, in a width of the teacher's or another."""
    width = width or teacher.shape[-1]
    student = teacher.new_ones(*teacher.shape[:-1], width)  # any will do
    return target_sum(teacher, alignment(student, teacher, mask, resize="teacher").inverse_norm, width)


def interpolated(rows: Tensor, width: int) -> Tensor:
    """Torch's own, whose coordinates are exact in fp64 alone."""
    return F.interpolate(rows.flatten(0, -2)[:, None], width, mode="linear").view(*rows.shape[:-1], width)


# --- the definition ---


@pytest.mark.parametrize("widths", [(8, 8), (12, 5), (5, 12)])
@pytest.mark.parametrize("resize", ["teacher", "student"])
def test_gradcheck(widths, resize):
    student, teacher = states(2, 3, widths[0]).requires_grad_(), states(2, 3, widths[1], seed=1)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    mean = states(widths[1], seed=3)
    assert torch.autograd.gradcheck(
        lambda s: 3 * alignment_loss(s, teacher, mask, teacher_mean=mean, resize=resize) ** 2, (student,)
    )


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from([(3, 4), (1,), (6,), (0,), (2, 0)]),
    widths=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    share=st.sampled_from([0.0, 0.7, 1.0]),
    resize=st.sampled_from(["teacher", "student"]),
    normalized=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_value_from_the_definition(shape, widths, share, resize, normalized, dtype, seed):
    student, teacher = (states(*shape, width, seed=seed + i, dtype=dtype) for i, width in enumerate(widths))
    mask = random_mask(*shape, share=share, seed=seed)
    mean, std = (states(widths[1], seed=3), states(widths[1], seed=4).abs() + 0.5) if normalized else (None, None)
    exact, target = student.double(), teacher.double()
    loss = alignment(exact, target, mask, mean, std, resize).loss
    if normalized:
        target = (target - mean) / std
    width = widths[0] if resize == "teacher" else widths[1]
    cosine = F.cosine_similarity(interpolated(exact, width), interpolated(target, width), dim=-1)
    expected = -cosine[mask].mean() if mask.any() else torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    single = {"resize": resize, **({"teacher_mean": mean.float(), "teacher_std": std.float()} if normalized else {})}
    loss = alignment_loss(student, teacher, mask, **single)
    assert loss.dtype == torch.float32 and -1 - 1e-6 <= loss.item() <= 1 + 1e-6
    torch.testing.assert_close(loss.double(), expected, rtol=0, atol=1e-4)
    grad = gradient(student, teacher, mask, **single)
    assert grad.dtype == dtype and torch.isfinite(grad).all() and (grad[~mask] == 0).all()
    constant = targets(teacher, mask, width)
    assert constant.shape == (width,) and constant.norm() <= mask.sum() * (1 + 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("teacher_width", [16, 6])
def test_rows_without_a_direction_count_as_zero_and_pass_no_gradient(dtype, teacher_width):
    student, teacher = states(7, 16, dtype=dtype), states(7, teacher_width, seed=1, dtype=dtype)
    student[0] = 0
    teacher[1] = 0
    teacher[2, 3] = torch.nan
    teacher[3, 3] = -torch.inf
    student[4] *= 1e-8
    student[5, 0] = torch.inf
    loss, usable, _ = alignment(student, teacher)
    assert usable.item() == 1
    assert alignment(student[4:], teacher[4:] * 1e20).usable.item() == 0  # squares overflow in fp32
    grad = gradient(student, teacher)
    torch.testing.assert_close(loss, alignment_loss(student[6:], teacher[6:]) / 7)
    assert (grad[:6] == 0).all() and (grad[6] != 0).any()
    torch.testing.assert_close(targets(teacher, width=16), targets(teacher[[0, 4, 5, 6]], width=16))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e18])
def test_scale_of_a_row_does_not_matter(scale):
    student, teacher = states(5, 16, dtype=torch.float32), states(5, 16, seed=1, dtype=torch.float32)
    expected = alignment_loss(student, teacher)
    torch.testing.assert_close(alignment_loss(student * scale, teacher), expected)
    torch.testing.assert_close(alignment_loss(student, teacher * scale), expected)
    torch.testing.assert_close(targets(teacher * scale), targets(teacher))
    torch.testing.assert_close(gradient(student * scale, teacher) * scale, gradient(student, teacher))


def test_target_sum_is_the_score_of_the_best_constant():
    teacher = states(50, 12) + 1.0
    best = targets(teacher).expand(50, 12)
    score = best[0].norm() / 50
    torch.testing.assert_close(-alignment_loss(best, teacher), score)
    for seed in range(5):
        assert -alignment_loss(states(12, seed=seed).expand(50, 12), teacher) <= score


@pytest.mark.parametrize("widths", [(8, 8), (12, 5), (5, 12), (7, 1), (1, 7), (96, 36), (36, 96), (300, 40), (3, 2048)])
def test_resize_is_torch_interpolate(widths):
    rows = states(4, widths[0], dtype=torch.float32).requires_grad_()
    found = reference.resize_features(rows, widths[1])
    exact = rows.detach().double().requires_grad_()
    expected = interpolated(exact, widths[1])
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    upstream = states(4, widths[1], seed=1)
    (grad,) = torch.autograd.grad(found, rows, upstream.float())
    (expected,) = torch.autograd.grad(expected, exact, upstream)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-5)


# --- the door ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher": torch.zeros(3, 8)}, r"all but the last dimension, got \[2, 4\] and \[3, 8\]"),
        ({"teacher": torch.zeros(2, 8, requires_grad=True)}, r"frozen.*teacher\.detach\(\)"),
        ({"mask": torch.ones(2)}, "boolean tensor of shape"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, r"of shape \[3\]"),
        ({"teacher_mean": torch.zeros(4)}, r"teacher_mean must have shape \[8\], got \[4\]"),
        ({"teacher_std": torch.ones(2, 8)}, r"teacher_std must have shape \[8\]"),
        ({"resize": "both"}, "resize must be one of teacher, student, got 'both'"),
        ({"implementation": "cuda"}, "implementation must be one of auto, triton, torch, got 'cuda'"),
    ],
)
def test_refuses_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        alignment_loss(**{"student": torch.zeros(2, 4), "teacher": torch.zeros(2, 8), **arguments})


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo itself does, in 2.7
def test_one_graph_under_torch_compile():
    student, teacher = states(2, 3, 8, dtype=torch.float32), states(2, 3, 6, seed=1, dtype=torch.float32)

    def step(student):
        found = alignment(student * 2, teacher)
        return found.loss + target_sum(teacher, found.inverse_norm, 6).norm()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(student), step(student))

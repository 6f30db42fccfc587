"""The alignment loss: its definition and its door. The kernels are held against it in test_kernels.py."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from let_composer.loss import alignment, alignment_loss, feature_sums, reference, target_sum


def states(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradient(student: Tensor, *args, upstream: float = 1.0, **kwargs) -> Tensor:
    student = student.detach().requires_grad_()
    return torch.autograd.grad(alignment_loss(student, *args, **kwargs) * upstream, student)[0]


def random_mask(*shape: int, share: float = 0.6, seed: int = 2) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def interpolated(rows: Tensor, width: int) -> Tensor:
    """Torch's own, whose coordinates are exact in fp64 alone."""
    return F.interpolate(rows.flatten(0, -2)[:, None], width, mode="linear").view(*rows.shape[:-1], width)


# --- the definition ---


@pytest.mark.parametrize("resize", ["teacher", "student"])
@pytest.mark.parametrize("widths", [(8, 8), (12, 5), (5, 12), (7, 1), (1, 7)])
def test_value_from_the_definition(widths, resize):
    student, teacher = states(3, 4, widths[0]), states(3, 4, widths[1], seed=1)
    mask = random_mask(3, 4)
    mean, std = states(widths[1], seed=3), states(widths[1], seed=4).abs() + 0.5
    loss = alignment_loss(student, teacher, mask, teacher_mean=mean, teacher_std=std, resize=resize)
    teacher = (teacher - mean) / std
    if resize == "teacher":
        teacher = interpolated(teacher, widths[0])
    else:
        student = interpolated(student, widths[1])
    assert loss.shape == () and loss.dtype == torch.float64
    expected = -F.cosine_similarity(student, teacher, dim=-1)[mask].mean()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)


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
    tokens=st.integers(0, 6),
    widths=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    resize=st.sampled_from(["teacher", "student"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_any_shape(tokens, widths, resize, dtype, seed):
    student, teacher = (states(tokens, width, seed=seed + i, dtype=dtype) for i, width in enumerate(widths))
    mask = random_mask(tokens, share=0.7, seed=seed)
    loss = alignment_loss(student, teacher, mask, resize=resize)
    assert loss.dtype == torch.float32 and -1 - 1e-6 <= loss.item() <= 1 + 1e-6
    expected = alignment_loss(student.double(), teacher.double(), mask, resize=resize)
    torch.testing.assert_close(loss.double(), expected, rtol=0, atol=1e-4)
    assert mask.any() or loss == 0
    grad = gradient(student, teacher, mask, resize=resize)
    assert grad.dtype == dtype and torch.isfinite(grad).all() and (grad[~mask] == 0).all()
    width = widths[0] if resize == "teacher" else widths[1]
    constant = target_sum(teacher, mask, width=width)
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
    total = target_sum(teacher, width=16)
    torch.testing.assert_close(total, target_sum(teacher[[0, 4, 5, 6]], width=16))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e18])
def test_scale_of_a_row_does_not_matter(scale):
    student, teacher = states(5, 16, dtype=torch.float32), states(5, 16, seed=1, dtype=torch.float32)
    expected = alignment_loss(student, teacher)
    torch.testing.assert_close(alignment_loss(student * scale, teacher), expected)
    torch.testing.assert_close(alignment_loss(student, teacher * scale), expected)
    torch.testing.assert_close(target_sum(teacher * scale), target_sum(teacher))
    torch.testing.assert_close(gradient(student * scale, teacher) * scale, gradient(student, teacher))


def test_identical_states_reach_the_minimum():
    student = states(4, 9, 16, dtype=torch.bfloat16)
    torch.testing.assert_close(alignment_loss(student, student).item(), -1.0)
    torch.testing.assert_close(alignment_loss(student, -student).item(), 1.0)
    assert gradient(student, student).abs().max() < 1e-6


def test_gradient_goes_to_the_student_alone_and_adds_up():
    student, teacher = states(3, 8).requires_grad_(), states(3, 8, seed=1)
    first, second = alignment_loss(student, teacher), alignment_loss(student, -teacher)
    (first * 3 + second).backward()
    torch.testing.assert_close(student.grad, gradient(student, teacher, upstream=2.0))
    assert teacher.grad is None
    assert not target_sum(student).requires_grad


def test_target_sum_is_the_score_of_the_best_constant():
    teacher = states(50, 12) + 1.0
    score = target_sum(teacher).norm() / 50
    best = target_sum(teacher).expand(50, 12)
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


@pytest.mark.parametrize("resize", ["teacher", "student"])
def test_norms_that_were_found_give_the_same_target_sum(resize):
    student, teacher, mean = states(4, 5, 12), states(4, 5, 8, seed=1), states(8, seed=2)
    mask = random_mask(4, 5)
    found = alignment(student, teacher, mask, teacher_mean=mean, resize=resize)
    assert found.usable == mask.sum() and torch.equal(found.inverse_norm > 0, mask)
    options = {"width": 12 if resize == "teacher" else 8, "teacher_mean": mean}
    torch.testing.assert_close(
        target_sum(teacher, mask, inverse_norm=found.inverse_norm, **options), target_sum(teacher, mask, **options)
    )
    with pytest.raises(ValueError, match=r"inverse_norm must have shape \[4, 5\]"):
        target_sum(teacher, mask, inverse_norm=found.inverse_norm[0])


@pytest.mark.parametrize("tokens", [0, 1, 64, 3000])
def test_feature_sums(tokens):
    teacher = states(tokens, 6, dtype=torch.float32) + 3e3  # the deviation is small beside the mean
    mask = random_mask(tokens)
    if tokens > 1:
        teacher[0, 3], mask[0] = torch.nan, True
    used = teacher[mask & torch.isfinite(teacher).all(dim=-1)].double()
    for shift in (None, torch.full((6,), 3e3)):
        centred = used - (0 if shift is None else shift.double())
        expected = torch.cat([torch.tensor([float(len(used))]).double(), centred.sum(0), centred.square().sum(0)])
        rtol, atol = (1e-12, 0) if shift is None else (1e-5, 1e-3)  # around the mean, in fp32
        torch.testing.assert_close(feature_sums(teacher, mask, shift), expected, rtol=rtol, atol=atol)


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
        return alignment_loss(student * 2, teacher) + target_sum(teacher, width=8).norm()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(student), step(student))

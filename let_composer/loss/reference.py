"""The alignment loss in plain torch: its definition, its CPU path, the truth of the kernel tests and the baseline of
the benchmarks. Where a kernel differs from this file, the kernel is wrong.
"""

from typing import Any

import torch
from torch import Tensor

__all__ = ["EPSILON", "LARGEST", "alignment", "feature_sums", "resize_features", "target_sum"]

# A row shorter than this has no direction: its cosine is 0 and it passes no gradient. (torch's cosine_similarity would
# hand a zero row a gradient of 1e8.) Neither has a row as long as LARGEST, whose squares overflow in fp32.
EPSILON = 1e-6
LARGEST = 2.0**64

_ROWS = 1024  # that feature_sums converts at a time


def alignment(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    teacher_mean: Tensor | None = None,
    teacher_std: Tensor | None = None,
    resize: str = "student",
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, number of usable tokens and inverse norms of the targets; see :func:`let_composer.loss.alignment`.

    Arithmetic is fp32 (fp64 when an input is). Rows that are masked out, shorter than ``EPSILON``, as long as
    ``LARGEST`` or not finite count as cosine 0 and pass no gradient; the mean is always over all tokens of ``mask``,
    and is 0 when there are none.
    """
    dtype = _arithmetic(student, teacher)
    target = _normalize(teacher, teacher_mean, teacher_std, dtype)
    student = student.to(dtype)
    if resize == "teacher":
        target = resize_features(target, student.shape[-1])
    else:
        student = resize_features(student, target.shape[-1])
    student, student_inverse = _unit(student, mask)
    target, inverse = _unit(target, mask)
    cosine = (student * target).sum(dim=-1)  # [...]
    usable = ((student_inverse > 0) & (inverse > 0)).sum()
    return -cosine.sum() / mask.sum().clamp(min=1), usable, inverse


def target_sum(
    teacher: Tensor,
    inverse_norm: Tensor,
    width: int,
    teacher_mean: Tensor | None = None,
    teacher_std: Tensor | None = None,
) -> Tensor:
    """Sum of the unit target vectors, ``[width]``, from the inverse norms that :func:`alignment` found.

    Its norm divided by the number of tokens is the best mean cosine that one constant vector can reach: what a student
    scores without any information about the token.
    """
    target = _normalize(teacher, teacher_mean, teacher_std, _arithmetic(teacher))
    inverse_norm = inverse_norm.unsqueeze(-1)
    units = torch.where(inverse_norm > 0, target * inverse_norm, 0)
    return resize_features(units.reshape(-1, teacher.shape[-1]).sum(dim=0), width)  # resizing is linear


def feature_sums(teacher: Tensor, mask: Tensor, shift: Tensor | None = None) -> Tensor:
    """Count, sums and sums of squares around ``shift``; see :func:`let_composer.loss.feature_sums`.

    Without a shift the arithmetic is fp64, since fp32 would cancel where a mean is large beside its deviation.
    """
    width = teacher.shape[-1]
    dtype, origin = (torch.float64, 0.0) if shift is None else (torch.float32, shift.float())
    total = torch.zeros(1 + 2 * width, dtype=torch.float64, device=teacher.device)
    for rows, counted in zip(teacher.reshape(-1, width).split(_ROWS), mask.reshape(-1).split(_ROWS), strict=True):
        used = counted & torch.isfinite(rows).all(dim=-1)
        rows = torch.where(used[:, None], rows.to(dtype) - origin, 0)
        total = total + torch.cat([used.sum().view(1), rows.sum(dim=0), rows.square().sum(dim=0)])
    return total


def resize_features(features: Tensor, width: int) -> Tensor:
    """Linear interpolation of the last dimension to ``width``, half-pixel centres (``align_corners=False``).

    Both directions gather, so the gradient is the same in every run. (torch's own ``interpolate`` adds it up with
    atomics on CUDA, and is slow there for rows that are short beside their number.)
    """
    return features if features.shape[-1] == width else _Resize.apply(features, width)  # pyright: ignore


class _Resize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, width: int) -> Tensor:
        ctx.source = features.shape[-1]
        low, high, fraction = _taps(ctx.source, width, features)
        return torch.lerp(features.index_select(-1, low), features.index_select(-1, high), fraction)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        low, high, fraction = _taps(ctx.source, gradient.shape[-1], gradient)
        from_high = gradient * fraction
        return _gather_back(gradient - from_high, low, ctx.source) + _gather_back(from_high, high, ctx.source), None


def _taps(source: int, width: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The two inputs of every output, and the weight of the second."""
    outputs = torch.arange(width, device=like.device)
    numerator = ((2 * outputs + 1) * source - width).clamp(0, 2 * width * (source - 1))  # of an exact coordinate
    low = numerator // (2 * width)
    fraction = (numerator - low * (2 * width)).to(like.dtype) / (2 * width)
    return low, (low + 1).clamp(max=source - 1), fraction


def _gather_back(gradient: Tensor, index: Tensor, source: int) -> Tensor:
    """Sum for each input over the outputs that read it; ``index`` ascends, so these are neighbours."""
    width = gradient.shape[-1]
    inputs = torch.arange(source, device=gradient.device)
    most = 3 * width // (2 * source) + 2  # outputs of one input, half more at an edge
    outputs = torch.searchsorted(index, inputs)[:, None] + torch.arange(most, device=gradient.device)
    inside = outputs < width
    outputs = outputs.clamp(max=width - 1)
    inside &= index[outputs] == inputs[:, None]
    gathered = gradient.index_select(-1, outputs.flatten()).unflatten(-1, (source, most))
    return torch.where(inside, gathered, 0).sum(dim=-1)


def _arithmetic(*inputs: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32


def _normalize(teacher: Tensor, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype) -> Tensor:
    teacher = teacher.to(dtype)
    if mean is not None:
        teacher = teacher - mean.to(dtype)
    if std is not None:
        teacher = teacher / std.to(dtype)
    return teacher


def _unit(rows: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length 1, or 0 without a direction, and what they were multiplied with."""
    norm = torch.linalg.vector_norm(rows.detach(), dim=-1)
    usable = mask & (norm >= EPSILON) & (norm < LARGEST)
    inverse = torch.where(usable, 1 / norm, 0)
    rows = torch.where(usable.unsqueeze(-1), rows, 0)
    return rows / torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp(min=EPSILON), inverse

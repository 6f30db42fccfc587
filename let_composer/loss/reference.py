"""The alignment loss in plain torch: its definition, its CPU path, the truth of the kernel tests and the baseline of
the benchmarks. Where a kernel differs from this file, the kernel is wrong.
"""

import torch
from torch import Tensor

__all__ = ["EPSILON", "LARGEST", "alignment", "resize_features", "target_sum"]

# A row shorter than this has no direction: its cosine is 0 and it passes no gradient. (torch's cosine_similarity would
# hand a zero row a gradient of 1e8.) Neither has a row as long as LARGEST, whose squares overflow in fp32.
EPSILON = 1e-6
LARGEST = 2.0**64

_ROWS = 4096  # that target_sum converts at a time


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
    """Sum of the unit target vectors, ``[width]``, without a gradient.

    Its norm divided by the number of tokens is the best mean cosine that one constant vector can reach: what a student
    scores without any information about the token.

    Args:
        teacher: Hidden states of the teacher, ``[..., D_t]``.
        inverse_norm: What :func:`alignment` found for them, ``[...]``.
        width: In which cosines are taken: the student's, or where that is resized the teacher's.
        teacher_mean: As in :func:`alignment`.
        teacher_std: As in :func:`alignment`.
    """
    dtype = _arithmetic(teacher)
    total = torch.zeros(teacher.shape[-1], dtype=dtype, device=teacher.device)
    rows, inverse = teacher.detach().reshape(-1, len(total)), inverse_norm.reshape(-1, 1)
    for part, scale in zip(rows.split(_ROWS), inverse.split(_ROWS), strict=True):
        target = _normalize(part, teacher_mean, teacher_std, dtype)
        total = total + torch.where(scale > 0, target * scale, 0).sum(dim=0)
    return resize_features(total, width)  # resizing is linear


def resize_features(features: Tensor, width: int) -> Tensor:
    """Linear interpolation of the last dimension to ``width``, half-pixel centres (``align_corners=False``).

    torch's own ``interpolate`` has coordinates in the type of the features, and is slow for rows that are short beside
    their number.
    """
    source = features.shape[-1]
    if source == width:
        return features
    outputs = torch.arange(width, device=features.device)
    numerator = ((2 * outputs + 1) * source - width).clamp(0, 2 * width * (source - 1))  # of an exact coordinate
    low = numerator // (2 * width)
    high = (low + 1).clamp(max=source - 1)
    fraction = (numerator - low * (2 * width)).to(features.dtype) / (2 * width)
    return torch.lerp(features.index_select(-1, low), features.index_select(-1, high), fraction)


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

"""The alignment loss in plain torch: its definition, its CPU path, the truth of the kernel tests and the baseline of
the benchmarks. Where a kernel differs from this file, the kernel is wrong.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["EPSILON", "alignment_loss", "feature_sums", "resize_features", "target_sum"]

# A row shorter than this has no direction: its cosine is 0 and it passes no gradient. (torch's cosine_similarity would
# hand a zero row a gradient of 1e8.)
EPSILON = 1e-6

_ROWS = 1024  # that feature_sums converts at a time

# Legend: B batch, S sequence, S_ student width (D_s), T_ teacher width (D_t), D the width in which cosines are taken.


def alignment_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    teacher_mean: Tensor | None = None,
    teacher_std: Tensor | None = None,
    resize: str = "student",
) -> Tensor:
    """Mean over the tokens of ``mask`` of -cos(student, teacher); see :func:`let_composer.loss.alignment_loss`.

    Arithmetic is fp32 (fp64 when an input is). Rows that are masked out, shorter than ``EPSILON`` or not finite count
    as cosine 0 and pass no gradient; the mean is always over all tokens of ``mask``, and is 0 when there are none.
    """
    dtype = _arithmetic(student, teacher)
    target = _normalize(teacher, teacher_mean, teacher_std, dtype)
    student = student.to(dtype)
    if resize == "teacher":
        target = resize_features(target, student.shape[-1])
    else:
        student = resize_features(student, target.shape[-1])
    cosine = (_unit(student, mask) * _unit(target, mask)).sum(dim=-1)  # [..., ]
    return -cosine.sum() / mask.sum().clamp(min=1)


def target_sum(
    teacher: Tensor,
    mask: Tensor,
    width: int,
    teacher_mean: Tensor | None = None,
    teacher_std: Tensor | None = None,
) -> Tensor:
    """Sum over the tokens of ``mask`` of the unit target vectors, ``[width]``.

    Its norm divided by the number of tokens is the best mean cosine that one constant vector can reach: what a student
    scores without any information about the token.
    """
    target = _normalize(teacher, teacher_mean, teacher_std, _arithmetic(teacher))
    return _unit(resize_features(target, width), mask).reshape(-1, width).sum(dim=0)


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
    """Linear interpolation of the last dimension to ``width``, half-pixel centres (``align_corners=False``)."""
    if features.shape[-1] == width:
        return features
    rows = features.reshape(-1, 1, features.shape[-1])
    return F.interpolate(rows, size=width, mode="linear", align_corners=False).view(*features.shape[:-1], width)


def _arithmetic(*inputs: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32


def _normalize(teacher: Tensor, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype) -> Tensor:
    teacher = teacher.to(dtype)
    if mean is not None:
        teacher = teacher - mean.to(dtype)
    if std is not None:
        teacher = teacher / std.to(dtype)
    return teacher


def _unit(rows: Tensor, mask: Tensor) -> Tensor:
    # Cosines do not see a row's scale, so each row is divided by its largest entry first: squares then neither
    # overflow nor vanish, and the norm of a usable row is at least 1.
    scale = rows.detach().abs().amax(dim=-1, keepdim=True)
    usable = mask.unsqueeze(-1) & torch.isfinite(scale) & (scale > 0)
    scale = torch.where(usable, scale, 1)
    rows = torch.where(usable, rows / scale, 0)
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp(min=1)
    return torch.where(norm.detach() * scale >= EPSILON, rows / norm, 0)

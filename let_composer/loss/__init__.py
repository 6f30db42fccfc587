"""The alignment loss. One door, ``alignment_loss``; behind it the definition (``reference``) and its Triton kernels.

Nothing in this package imports Composer.
"""

import functools
import warnings
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from let_composer.loss import reference
from let_composer.loss.reference import target_sum

__all__ = ["Alignment", "Implementation", "Resize", "alignment", "alignment_loss", "target_sum"]

Resize = Literal["teacher", "student"]
Implementation = Literal["auto", "triton", "torch"]


class Alignment(NamedTuple):
    """What one pass over the states finds. Nothing of it is on the host."""

    loss: Tensor  # scalar, see :func:`alignment_loss`; the only part with a gradient
    usable: Tensor  # scalar: tokens of the mask whose rows had a direction on both sides
    inverse_norm: Tensor  # [...]: 1 / |target row|, 0 where it has no direction or does not count; for target_sum


def alignment_loss(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    teacher_mean: Tensor | None = None,
    teacher_std: Tensor | None = None,
    resize: Resize = "student",
    implementation: Implementation = "auto",
) -> Tensor:
    """Mean negative cosine between a student's and a frozen teacher's hidden states.

    ``L = mean over tokens with mask of -cos(student, (teacher - teacher_mean) / teacher_std)``

    The negative cosine per token is the paper's L_proj (arXiv 2602.05393); the mean over tokens, the treatment of rows
    without a direction and ``align_corners=False`` are our choice, the paper's record is silent.

    Args:
        student: Hidden states of the student, ``[..., D_s]``. The only input that receives a gradient.
        teacher: Hidden states of the teacher, ``[..., D_t]``, detached.
        mask: The tokens that count, boolean ``[...]``. Default: ``None``, all of them.
        teacher_mean: Subtracted from every teacher row, ``[D_t]``. Default: ``None``.
        teacher_std: Divides every teacher row, ``[D_t]``, positive. Default: ``None``.
        resize: Whose features are linearly interpolated to the other's width when ``D_s != D_t``.
            Default: ``"student"``, as in LET.
        implementation: ``"triton"``, ``"torch"``, or ``"auto"``: Triton on CUDA, torch elsewhere. Default: ``"auto"``.

    Returns:
        A scalar in fp32 (fp64 for fp64 inputs), between -1 and 1; 0 when no token counts. Nothing is synchronised with
        the host.

    Raises:
        ValueError: If shapes or options do not fit, or the teacher requires a gradient.
    """
    return alignment(student, teacher, mask, teacher_mean, teacher_std, resize, implementation).loss


def alignment(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    teacher_mean: Tensor | None = None,
    teacher_std: Tensor | None = None,
    resize: Resize = "student",
    implementation: Implementation = "auto",
) -> Alignment:
    """:func:`alignment_loss`, with its arguments and errors, and what it found out on the way."""
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"student and teacher must agree in all but the last dimension, got {list(student.shape)} and "
            f"{list(teacher.shape)}. Run both models on the same tokens."
        )
    if teacher.requires_grad:
        raise ValueError(
            "the teacher is frozen, but these teacher states require a gradient, which would be dropped silently. "
            "Run the teacher under torch.no_grad() or pass teacher.detach()."
        )
    _check_option("resize", resize, Resize)
    if mask is None:
        mask = torch.ones(teacher.shape[:-1], dtype=torch.bool, device=teacher.device)
    if mask.shape != teacher.shape[:-1] or mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be a boolean tensor of shape {list(teacher.shape[:-1])}, one value per token, got {mask.dtype} "
            f"of shape {list(mask.shape)}."
        )
    for name, value in (("teacher_mean", teacher_mean), ("teacher_std", teacher_std)):
        if value is not None and value.shape != teacher.shape[-1:]:
            raise ValueError(f"{name} must have shape {list(teacher.shape[-1:])}, got {list(value.shape)}.")
    function = _implementation(implementation, student, teacher, teacher_mean, teacher_std).alignment
    return Alignment(*function(student, teacher, mask, teacher_mean, teacher_std, resize))


def _check_option(name: str, value: str, options: object) -> None:
    if value not in get_args(options):
        raise ValueError(f"{name} must be one of {', '.join(get_args(options))}, got {value!r}.")


def _implementation(name: str, *inputs: Tensor | None):
    _check_option("implementation", name, Implementation)
    if name == "torch" or (name == "auto" and not any(x is not None and x.is_cuda for x in inputs)):
        return reference
    # Under torch.compile nothing can be tried out; there, a CUDA graph is built on Triton anyhow.
    if not torch.compiler.is_compiling() and not _try_triton():
        if name == "triton":
            raise RuntimeError(
                "implementation='triton' was asked for, but Triton does not work here; the warning says why. Repair "
                "the installation, or use 'auto' or 'torch'."
            )
        return reference
    from let_composer.loss import kernels

    reason = kernels.unsupported(*inputs)
    if reason is None:
        return kernels
    if name == "triton":
        raise ValueError(f"implementation='triton' cannot take these inputs: {reason}. Use 'auto' or 'torch'.")
    return reference


@functools.cache
def _try_triton() -> bool:
    try:
        from let_composer.loss import kernels

        kernels.try_kernels()
    except Exception as error:  # whatever a missing or broken installation raises: training goes on without it
        warnings.warn(f"Triton does not work here, the alignment loss runs in plain torch: {error!r}", stacklevel=2)
        return False
    return True

"""Distillation from logits, in plain torch, without ever holding the teacher's logits of all tokens."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from let_composer.balance import histogram

__all__ = ["compare_logits"]


def compare_logits(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    targets: Tensor,
    project: Callable[[Tensor], Tensor],
    temperature: float = 1.0,
    chunk: int = 1024,
) -> tuple[Tensor, Tensor]:
    """The distillation loss, and how much better the teacher predicts each label.

    The loss is the mean over tokens of ``temperature**2 * KL(teacher || student)``, both softened (Hinton et al. 2015),
    in fp32.

    Works through the tokens in chunks and computes each again in the backward pass, so that beside the student's logits
    and their gradient no tensor is larger than ``[chunk, V]``.

    Args:
        student: Logits ``[B, S, V_s]``.
        teacher: Hidden states ``[B, S, D_t]``.
        mask: Tokens that count, boolean ``[B, S]``.
        targets: The token that is to be predicted at each position, ``[B, S]``, to compare both models on.
        project: From hidden states ``[chunk, D_t]`` to logits ``[chunk, V_t]``. Ids beyond the smaller vocabulary are
            padding and left out.
        temperature: Of both softmaxes, greater than 0. Default: ``1.0``.
        chunk: Tokens at a time. Default: ``1024``.

    Returns:
        A scalar, 0 if no token counts; and the counts ``[BINS]`` for :func:`let_composer.balance.stacking_weight`.
    """

    def divergence(student: Tensor, teacher: Tensor, mask: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            teacher = project(teacher)
        vocabulary = min(student.shape[-1], teacher.shape[-1])
        ours, theirs = (F.log_softmax(x[:, :vocabulary].float() / temperature, dim=-1) for x in (student, teacher))
        tokens = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
        known = mask & (targets >= 0) & (targets < vocabulary)
        label = targets.clamp(0, vocabulary - 1).unsqueeze(-1)
        ratios = (theirs.gather(-1, label) - ours.detach().gather(-1, label)).squeeze(-1)
        return torch.where(mask, tokens, 0).sum(), histogram(ratios, known)

    rows = (student.flatten(0, 1), teacher.flatten(0, 1), mask.flatten(), targets.flatten())
    parts = zip(*(x.split(chunk) for x in rows), strict=True)
    found = [checkpoint(divergence, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    sums, counts = (torch.stack(values) for values in zip(*found, strict=True))
    return temperature**2 * sums.sum() / mask.sum().clamp(min=1), counts.sum(dim=0)

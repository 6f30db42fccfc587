"""Weights that set themselves: equal gradients, a teacher's lead, the best mixture of two models. Nothing here knows a
trainer.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "BINS",
    "GradientRatio",
    "RunningMean",
    "histogram",
    "lead_share",
    "lead_sum",
    "measured",
    "sampled",
    "stacking_weight",
]

_MOMENTUM = 0.9
_FIRST = 0.1  # the paper's weight, until a gradient has been seen
_RANGE = (1e-3, 1e4)
_WELL_AHEAD = 0.5  # nats per token

BINS = 256
_SPAN = 20.0  # nats of log q - log a on either side of 0; what lies further counts as that


def measured(hidden: Tensor, sink: Tensor) -> Tensor:
    """``hidden`` unchanged; the squared norm of its gradient is added to ``sink.grad`` in the backward pass.

    No extra pass, no synchronisation, no copy of the gradient. Works inside torch.compile, since the sink is an input
    like any other.

    Args:
        hidden: Any shape.
        sink: A scalar in fp32 that requires a gradient.
    """
    return _Measured.apply(hidden, sink)  # pyright: ignore[reportReturnType]


class _Measured(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, sink: Tensor) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, torch.linalg.vector_norm(gradient, dtype=torch.float32).square()


class GradientRatio:
    """The weight at which a term's gradient is as long as that of the student's own loss, where both meet.

    ``weight = |d student's loss / d h| / |d term / d h|``, of running means, within [1e-3, 1e4]. Our choice, the paper
    is silent; VQGAN weighs its adversarial loss so. The first batch has the paper's 0.1.
    """

    def __init__(self) -> None:
        self.norms: list[float] | None = None  # of the student's loss, of the unweighted term

    @property
    def weight(self) -> float:
        """The weight for the next batch, before annealing."""
        if self.norms is None:
            return _FIRST
        return min(max(self.norms[0] / self.norms[1], _RANGE[0]), _RANGE[1])

    def update(self, model: float, term: float) -> None:
        """Take in one batch; left out where a gradient vanished or overflowed.

        Args:
            model: Norm of the gradient of the student's loss.
            term: Norm of the gradient of the term at weight 1.
        """
        if not (0 < model < math.inf and 0 < term < math.inf):
            return
        old = self.norms or [model, term]
        self.norms = [_MOMENTUM * o + (1 - _MOMENTUM) * n for o, n in zip(old, (model, term), strict=True)]


@dataclass
class RunningMean:
    """Of what each batch found, plain over the first ten; what is not finite is left out."""

    value: float | None = None  # until a batch has been seen
    batches: int = 0

    @property
    def settled(self) -> bool:
        """Whether it is of so many batches that one alone decides nothing."""
        return self.batches >= round(1 / (1 - _MOMENTUM))

    def update(self, found: float) -> None:
        """Take in one batch."""
        if math.isfinite(found):
            self.batches += 1
            old = found if self.value is None else self.value
            self.value = old + (found - old) * max(1 / self.batches, 1 - _MOMENTUM)


def lead_share(nats: float | None) -> float:
    """What a teacher can still give, a factor from 0 to 1 for the weight: ``lead / 0.5 nats``.

    Whole while the teacher is well ahead, 0 once the student is as good. Our choice, the paper is silent.

    Args:
        nats: How far it is ahead: the student's loss less the teacher's, per token. ``None``, not known yet, is whole.
    """
    return 1.0 if nats is None else min(max(nats / _WELL_AHEAD, 0.0), 1.0)


def sampled(length: int) -> slice:
    """The positions of a row that :func:`lead_sum` looks at: 64 evenly spaced ones, or an eighth of a short row.

    By position, so that any cut of a batch into microbatches and ranks looks at the same tokens.
    """
    step = max(8, -(-length // 64))
    return slice(min(step // 2, max(length - 2, 0)), None, step)  # the last one predicts nothing


def lead_sum(student: Tensor, teacher: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """How far the teacher is ahead on the same tokens: the sum in nats, and the number of tokens, ``[2]`` in fp32.

    Args:
        student: Logits ``[B, S, V_s]``.
        teacher: Logits ``[B, S, V_t]``.
        targets: The token that is to be predicted at each position, ``[B, S]``.
        mask: Tokens that count, boolean ``[B, S]``.
    """
    mask = mask & (targets >= 0) & (targets < min(student.shape[-1], teacher.shape[-1]))
    label = torch.where(mask, targets, 0).flatten()
    theirs, ours = (F.cross_entropy(x.flatten(0, 1).float(), label, reduction="none") for x in (teacher, student))
    return torch.stack([torch.where(mask.flatten(), ours - theirs, 0).sum(), mask.sum()])


def histogram(ratios: Tensor, mask: Tensor) -> Tensor:
    """Counts of log q - log a, ``[BINS]``, for :func:`stacking_weight`.

    Args:
        ratios: log of the teacher's probability of each label over the student's, ``[N]``.
        mask: Tokens that count, boolean ``[N]``.
    """
    bins = ((ratios.clamp(-_SPAN, _SPAN) + _SPAN) * ((BINS - 1) / (2 * _SPAN))).round()
    same = bins.unsqueeze(-1) == torch.arange(BINS, device=bins.device)
    return (same & mask.unsqueeze(-1)).sum(dim=0)


def stacking_weight(counts: Tensor) -> float:
    """The share of the teacher in the mixture of teacher and student that predicts the labels best.

    Fifteen steps of expectation maximisation from one half. Solved anew for every batch: a recursion would lock in, as
    a student that imitates its teacher keeps the ratio at 1.

    Args:
        counts: From :func:`histogram`, summed over microbatches and ranks.
    """
    counts = counts.double().cpu()
    if (tokens := float(counts.sum())) == 0:
        return 0.5
    ratio = torch.linspace(-_SPAN, _SPAN, BINS, dtype=torch.float64).exp()
    share = 0.5
    for _ in range(15):
        share = float((counts * (share * ratio / (share * ratio + 1 - share))).sum()) / tokens
    return share

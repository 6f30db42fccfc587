"""What LET is compared with: distillation from the logits of the same small teacher, on LET's own machinery."""

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from composer.core import State
from composer.loggers import Logger
from torch import Tensor

from let_composer.algorithm import LET, loss_generating, plus, total
from let_composer.annealing import Anneal
from let_composer.teacher import Teacher

__all__ = ["RKD", "SALT", "distillation_loss"]


def distillation_loss(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over tokens of ``temperature**2 * KL(teacher || student)``, both softened (Hinton et al. 2015), in fp32.

    Args:
        student: Logits ``[B, S, V_s]``.
        teacher: Logits ``[B, S, V_t]``; ids beyond the smaller vocabulary are padding and left out.
        mask: Tokens that count, ``[B, S]``.
        temperature: Of both softmaxes, greater than 0. Default: ``1.0``.

    Returns:
        A scalar; 0 if no token counts.
    """
    vocabulary = min(student.shape[-1], teacher.shape[-1])
    ours, theirs = (F.log_softmax(x[..., :vocabulary].float() / temperature, dim=-1) for x in (student, teacher))
    divergence = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    return temperature**2 * torch.where(mask, divergence, 0).sum() / mask.sum().clamp(min=1)


class RKD(LET):
    """Reverse knowledge distillation, the paper's first baseline: the small teacher's logits, for the whole run.

    ``loss = (1 - weight(t)) * student's loss + weight(t) * distillation_loss``

    Shares events, schedule, teacher, checkpoints and metrics with :class:`LET`, the metrics under ``kd/``. Keeps the
    teacher's LM head, and makes several fp32 tensors of the logits' size: an instrument for comparisons, not tuned for
    speed. The paper's weight and temperature are not on record: tune them.

    Args:
        teacher: As in :class:`LET`.
        weight: Share of the distillation term, 0 to 1. Default: ``0.5``, our choice.
        temperature: Of both softmaxes. Default: ``1.0``, our choice.
        stop: As in :class:`LET`. Default: ``"1dur"``, the whole run.
        anneal: As in :class:`LET`. Default: ``"constant"``.
        trust_remote_code: As in :class:`LET`.

    Raises:
        ValueError: As in :class:`LET`, and if weight or temperature is out of range.
    """

    _prefix = "kd"

    def __init__(
        self,
        teacher: str = "EleutherAI/pythia-160m",
        weight: float = 0.5,
        temperature: float = 1.0,
        stop: str = "1dur",
        anneal: Anneal = "constant",
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__(
            teacher,
            student_layer=-1,
            weight=weight,
            stop=stop,
            anneal=anneal,
            trust_remote_code=trust_remote_code,
        )
        if weight > 1:
            raise ValueError(f"weight is the share of the distillation term, from 0 to 1, got {weight}.")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be finite and greater than 0, got {temperature}.")
        self.temperature = float(temperature)
        self._repr = (
            f"{type(self).__name__}(teacher={teacher!r}, weight={self.weight}, temperature={self.temperature}, "
            f"stop={stop!r}, anneal={anneal!r})"
        )

    def _load_teacher(self, device: torch.device) -> Teacher:
        return Teacher(self.teacher_name, device=device, head=True, trust_remote_code=self.trust_remote_code)

    def _align(self, state: State) -> None:
        assert self._capture is not None and self._teacher is not None
        self._capture.clear()
        ids = state.batch["input_ids"]
        teacher = self._teacher.logits(ids, self._attention_mask(state))
        self._teacher_flops += self._teacher.flops(ids.numel(), ids.shape[-1])
        mask = loss_generating(state.batch)
        self._tokens = mask.sum()
        outputs = cast(Mapping[str, Tensor], state.outputs)
        self._term = distillation_loss(outputs["logits"], teacher, mask, self.temperature)
        self._count("tokens", self._tokens)
        self._count("loss", self._tokens * self._term.detach())

    def _add_term(self, state: State) -> None:
        assert self._term is not None and self._tokens is not None
        plain = total(state.loss)
        self._count("lm_loss", self._tokens * plain.detach())
        state.loss = plus(state.loss, self._weight * (self._term - plain))
        self._term = self._tokens = None

    def _report(self, state: State, logger: Logger) -> None:
        tokens = self._sums["tokens"].clamp(min=1)
        loss, lm_loss = torch.cat([self._sums["loss"] / tokens, self._sums["lm_loss"] / tokens]).tolist()
        logger.log_metrics({"kd/loss": loss, "kd/lm_loss": lm_loss}, step=state.timestamp.batch.value - 1)


class SALT(RKD):
    """Small model aided large model training (`arXiv 2410.18779 <https://arxiv.org/abs/2410.18779>`_), the paper's
    second baseline: :class:`RKD` in the early part of training, then plain training. Without its selection of data.

    Args:
        teacher: As in :class:`RKD`.
        weight: As in :class:`RKD`.
        temperature: As in :class:`RKD`.
        stop: As in :class:`RKD`. Default: ``"0.5dur"``, as for :class:`LET`.
        anneal: As in :class:`RKD`. Default: ``"linear"``, as for :class:`LET`.
        trust_remote_code: As in :class:`RKD`.
    """

    def __init__(
        self,
        teacher: str = "EleutherAI/pythia-160m",
        weight: float = 0.5,
        temperature: float = 1.0,
        stop: str = "0.5dur",
        anneal: Anneal = "linear",
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__(teacher, weight, temperature, stop, anneal, trust_remote_code)

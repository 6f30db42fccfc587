"""What LET is compared with: distillation from the logits of the same small teacher."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch
from composer.core import State
from torch import Tensor, nn

from let_composer.annealing import Anneal
from let_composer.balance import RunningMean, stacking_weight
from let_composer.guidance import Guidance
from let_composer.loss.distillation import compare_logits
from let_composer.names import refuse_unknown
from let_composer.objective import language_model_loss, logits_of
from let_composer.options import RKDOptions

__all__ = ["RKD", "SALT"]

_NOTHING_LEFT = 0.05  # of the teacher's share


class RKD(Guidance[RKDOptions]):
    """Reverse knowledge distillation, the paper's first baseline: the small teacher's logits, for the whole run.

    ``loss = (1 - weight(t)) * student's loss + weight(t) * KL(teacher || student)``

    A sibling of :class:`LET`: same events, schedule, teacher, checkpoints and metrics, these under ``kd/``. Beside LET,
    in any order, both terms join with the student's own loss, and a teacher that both name is loaded and run once. What
    a mixture of experts adds to its loss for balance keeps its full weight, where the model reports it apart. Needs no
    block of the student. The paper's weight and temperature are not on record.

    Logs what :class:`LET` logs at the start of a batch, ``kd/loss`` and ``kd/lm_loss``, and ``kd/teacher_share``: the
    share of the teacher in the mixture of both models that predicts the batch's labels best.

    Args:
        teacher: As in :class:`LET`.
        weight: ``"auto"``: the share of the teacher in the best mixture of teacher and student on the labels
            (:func:`stacking_weight`), which ends the guidance when it falls below 0.05. Or a number, the share of the
            distillation term, 0 to 1. Default: ``"auto"``, our choice: it needs no tuning, and did as well as
            the best number tried or better, on other seeds (yamls/evidence/evidence.md).
        temperature: Of both softmaxes; with ``weight: auto`` it is 1. Default: ``1.0``, our choice.
        stop: As in :class:`LET`. Default: ``"1dur"``, the whole run.
        anneal: As in :class:`LET`. Default: ``"constant"``.
        trust_remote_code: As in :class:`LET`.

    Raises:
        TypeError: As in :class:`LET`.
        ValueError: As in :class:`LET`, and if weight or temperature is out of range.
    """

    prefix = "kd"

    def __init__(
        self,
        teacher: str = "EleutherAI/pythia-160m",
        weight: float | Literal["auto"] = "auto",
        temperature: float = 1.0,
        stop: str = "1dur",
        anneal: Anneal = "constant",
        trust_remote_code: bool = False,
        **unknown: Any,
    ) -> None:
        refuse_unknown(type(self).__name__, unknown, [field.name for field in dataclasses.fields(RKDOptions)])
        super().__init__(
            RKDOptions(
                teacher=teacher,
                weight=weight,
                temperature=temperature,
                stop=stop,
                anneal=anneal,
                trust_remote_code=trust_remote_code,
            )
        )

    def attach(self, model: nn.Module, device: torch.device) -> str:
        """Nothing is needed but the outputs."""
        return "logits"

    def term(self, state: State, states: Tensor, mask: Tensor) -> Tensor:
        """The mean KL divergence from the teacher's distribution."""
        assert self._teacher is not None
        term, counts = compare_logits(
            logits_of(state.outputs),
            states,
            mask,
            state.batch["labels"].roll(-1, dims=1),
            self._teacher.project,
            self.options.temperature,
        )
        self._sums.add(counts=counts)
        return term

    def restart(self) -> None:
        """Forget the running share: a run starts."""
        super().restart()
        self._share = RunningMean()

    def strength(self) -> float:
        """The weight before annealing."""
        if self.options.weight != "auto":
            return self.options.weight
        return 0.5 if self._share.value is None else self._share.value

    def report(self, sums: Mapping[str, Tensor], weight: float) -> dict[str, float]:
        """The teacher's share in the best mixture; with ``weight: auto`` it ends the guidance when it is small."""
        self._share.update(share := stacking_weight(sums["counts"]))
        if self.options.weight == "auto" and self._share.settled and self.strength() < _NOTHING_LEFT:
            running = self.strength()
            self.ends_early = f"the teacher's share in the best mixture of both models has fallen to {running:.3f}"
        return {"teacher_share": share}

    def saved(self) -> dict[str, Any]:
        """The running share."""
        return {"share": self._share.state()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take over the running share."""
        self._share.restore(saved["share"])

    def joined(self, term: Tensor, weight: float, loss: Any) -> Tensor:
        """Takes the weight from the student's own term."""
        return weight * (term - language_model_loss(loss))


class SALT(RKD):
    """Small model aided large model training (`arXiv 2410.18779 <https://arxiv.org/abs/2410.18779>`_), the paper's
    second baseline: :class:`RKD` in the early part of training, then plain training. Without its selection of data.

    Args:
        teacher: As in :class:`RKD`.
        weight: As in :class:`RKD`. On one seed ``"auto"`` ended 0.012 nats behind the best number tried, 0.9.
        temperature: As in :class:`RKD`.
        stop: As in :class:`RKD`. Default: ``"0.5dur"``, as for :class:`LET`.
        anneal: As in :class:`RKD`. Default: ``"linear"``, as for :class:`LET`.
        trust_remote_code: As in :class:`RKD`.
    """

    def __init__(
        self,
        teacher: str = "EleutherAI/pythia-160m",
        weight: float | Literal["auto"] = "auto",
        temperature: float = 1.0,
        stop: str = "0.5dur",
        anneal: Anneal = "linear",
        trust_remote_code: bool = False,
        **unknown: Any,
    ) -> None:
        super().__init__(teacher, weight, temperature, stop, anneal, trust_remote_code, **unknown)

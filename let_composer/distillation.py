"""What LET is compared with: distillation from the logits of the same small teacher."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from composer.core import State
from torch import Tensor

from let_composer.annealing import Anneal
from let_composer.balance import RunningMean, stacking_weight
from let_composer.guidance import Guidance
from let_composer.loss.distillation import compare_logits
from let_composer.objective import language_model_loss, logits_of
from let_composer.options import require_type

__all__ = ["RKD", "SALT"]

_NOTHING_LEFT = 0.05  # of the teacher's share


@dataclasses.dataclass(eq=False)
class RKD(Guidance):
    """Reverse knowledge distillation, the paper's first baseline: the small teacher's logits, for the whole run.

    ``loss = (1 - weight(t)) * student's loss + weight(t) * KL(teacher || student)``

    A sibling of :class:`LET`: same events, schedule, teacher and checkpoints. Its metrics are under ``kd/``. Beside
    LET, in any order, both terms join with the student's own loss, and a teacher that both name is loaded and run once.
    What a mixture of experts adds to its loss for balance keeps its full weight, where the model reports it apart. It
    needs no block of the student. The paper's weight and temperature are not on record.

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

    teacher: str = "EleutherAI/pythia-160m"
    weight: float | Literal["auto"] = "auto"
    temperature: float = 1.0
    stop: str = "1dur"
    anneal: Anneal = "constant"
    trust_remote_code: bool = False

    def check(self) -> None:
        """Refuse options of another type or out of range."""
        super().check()
        require_type("temperature", self.temperature, (int, float), "a number")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and greater than 0, got {self.temperature}.")
        if self.weight == "auto" and self.temperature != 1:
            raise ValueError(
                f"with weight: auto, the default, the temperature must be 1, got {self.temperature}. Leave it out, or "
                "give a number as the weight."
            )
        if self.weight != "auto" and self.weight > 1:
            raise ValueError(f"weight is the share of the distillation term, from 0 to 1, got {self.weight}.")

    def projected(self, length: int) -> int:
        """All of them."""
        return length

    def term(self, state: State, states: Tensor, mask: Tensor) -> Tensor:
        """The mean KL divergence from the teacher's distribution."""
        assert self._teacher is not None
        term, counts = compare_logits(
            logits_of(state.outputs),
            states,
            mask,
            state.batch["labels"].roll(-1, dims=1),
            self._teacher.project,
            self.temperature,
        )
        self.add(counts=counts)
        return term

    def restart(self) -> None:
        """Forget the running share: a run starts."""
        super().restart()
        self._share = RunningMean()

    def automatic_weight(self) -> float:
        """The teacher's share in the best mixture, a half until it is known."""
        return 0.5 if self._share.value is None else self._share.value

    def report(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The teacher's share in the best mixture; with ``weight: auto`` it ends the guidance when it is small."""
        self._share.update(share := stacking_weight(sums["counts"]))
        running = self.automatic_weight()
        if self.weight == "auto" and self._share.settled and running < _NOTHING_LEFT:
            self.ends_early = f"the teacher's share in the best mixture of both models has fallen to {running:.3f}"
        return {"teacher_share": share}

    def saved(self) -> dict[str, Any]:
        """The running share."""
        return {"share": [self._share.value, self._share.batches]}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take over the running share."""
        self._share = RunningMean(*saved["share"])

    def joined(self, term: Tensor, loss: Any) -> Tensor:
        """Takes the weight from the student's own term."""
        return term - language_model_loss(loss)


@dataclasses.dataclass(eq=False)
class SALT(RKD):
    """Small model aided large model training (`arXiv 2410.18779 <https://arxiv.org/abs/2410.18779>`_), the paper's
    second baseline: :class:`RKD` in the early part of training, then plain training. Without its selection of data.

    Args:
        weight: As in :class:`RKD`. On one seed ``"auto"`` ended 0.012 nats behind the best number tried, 0.9.
        stop: Default: ``"0.5dur"``, as for :class:`LET`.
        anneal: Default: ``"linear"``, as for :class:`LET`.
    """

    stop: str = "0.5dur"
    anneal: Anneal = "linear"

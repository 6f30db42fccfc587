"""What helps a student without a teacher, to be set beside LET. An experiment names this file under ``code_paths``."""

from typing import Any

import torch.nn.functional as F
from composer import Algorithm, Event, Logger, State
from llmfoundry.registry import algorithms

from let_composer.annealing import Anneal, Schedule
from let_composer.objective import logits_of, loss_generating, plus
from let_composer.student import Capture, resolve_layer

__all__ = ["DeepSupervision", "LabelSmoothing"]


class DeepSupervision(Algorithm):
    """The next token's cross-entropy at an early block of an MPT with tied embeddings, through its last norm and head.

    Args:
        student_layer: As LET's.
        weight: At the start. At 1 both gradients are about as long at the block.
        stop: As LET's.
        anneal: As LET's.
    """

    def __init__(
        self, student_layer: int = 3, weight: float = 1.0, stop: str = "0.5dur", anneal: Anneal = "linear"
    ) -> None:
        self.layer, self.weight = student_layer, weight
        self.schedule = Schedule(stop, anneal)
        self.capture: Capture | None = None

    def match(self, event: Event, state: State) -> bool:
        """While it is not over."""
        known = event in (Event.FIT_START, Event.BEFORE_FORWARD, Event.AFTER_LOSS)
        return known and not self.schedule.over(state.timestamp)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Listen to the block; add to the loss."""
        if event == Event.FIT_START:
            assert state.max_duration is not None
            self.schedule.resolve(state.max_duration, None)
            self.capture = Capture(resolve_layer(state.model, self.layer)[1])
            return
        assert self.capture is not None
        if event == Event.BEFORE_FORWARD:
            self.capture.arm()
            return
        model: Any = state.model
        student = model.model.transformer
        logits = F.linear(student.norm_f(self.capture.take()), student.wte.weight)
        labels = state.batch["labels"]
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        state.loss = plus(state.loss, self.schedule.weight(state.timestamp, self.weight) * loss)


class LabelSmoothing(Algorithm):
    """A share of every target is spread evenly over the vocabulary.

    Args:
        share: From 0 to 1.
    """

    def __init__(self, share: float = 0.1) -> None:
        self.share = share

    def match(self, event: Event, state: State) -> bool:
        """After the loss."""
        return event == Event.AFTER_LOSS

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Mix the loss with that of an even target."""
        mask = loss_generating(state.batch["labels"])
        even = -logits_of(state.outputs)[mask].float().log_softmax(dim=-1).mean()
        loss: Any = state.loss
        state.loss = plus((1 - self.share) * loss, self.share * even)


algorithms.register("deep_supervision", func=DeepSupervision)
algorithms.register("label_smoothing_lm", func=LabelSmoothing)

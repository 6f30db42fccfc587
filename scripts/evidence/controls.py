"""What helps a student without a teacher, to be set beside LET. An experiment names this file under ``code_paths``."""

from typing import Any

import torch.nn.functional as F
from composer import Algorithm, Event, Logger, State
from llmfoundry.registry import algorithms

from let_composer.annealing import Anneal, Schedule
from let_composer.objective import plus
from let_composer.student import resolve_layer

__all__ = ["DeepSupervision", "LabelSmoothing"]


@algorithms.register("deep_supervision")
class DeepSupervision(Algorithm):
    """The next token's cross-entropy at an early block of an MPT with tied embeddings, through its last norm and head.
    Its weight starts at 1, where both gradients are about as long at the block.

    Args:
        student_layer: As LET's.
        stop: As LET's.
        anneal: As LET's.
    """

    def __init__(self, student_layer: int = 3, stop: str = "0.5dur", anneal: Anneal = "linear") -> None:
        self.layer, self.schedule = student_layer, Schedule(stop, anneal)
        self.hidden: Any = None

    def match(self, event: Event, state: State) -> bool:
        """While it is not over."""
        return event in (Event.FIT_START, Event.AFTER_LOSS) and not self.schedule.over(state.timestamp)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Listen to the block; add to the loss."""
        model: Any = state.model
        if event == Event.FIT_START:
            assert state.max_duration is not None
            self.schedule.resolve(state.max_duration, None)
            resolve_layer(model, self.layer)[1].register_forward_hook(self._keep)
            return
        student, labels = model.model.transformer, state.batch["labels"]
        logits = F.linear(student.norm_f(self.hidden), student.wte.weight)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        state.loss = plus(state.loss, self.schedule.weight(state.timestamp, 1.0) * loss)

    def _keep(self, block: Any, inputs: Any, outputs: Any) -> None:
        self.hidden = outputs[0]


@algorithms.register("label_smoothing_lm")
class LabelSmoothing(Algorithm):
    """A tenth of every target is spread evenly over the vocabulary of an MPT."""

    def match(self, event: Event, state: State) -> bool:
        """Once."""
        return event == Event.FIT_START

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Have the model's own loss do it."""
        model: Any = state.model
        model.loss_fn.label_smoothing = 0.1

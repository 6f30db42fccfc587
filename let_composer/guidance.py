"""One guided batch, from its start to its metrics: run the teacher, add a term to the student's loss."""

import logging
from collections.abc import Mapping
from typing import Any

from composer.core import Event, State
from composer.loggers import Logger
from torch import Tensor, nn

from let_composer.lifecycle import Lifecycle, OptionsT
from let_composer.masks import needs_mask
from let_composer.metrics import BatchSums
from let_composer.objective import loss_generating, plus, total
from let_composer.teacher import Teacher

__all__ = ["Guidance"]

log = logging.getLogger(__name__)

_LOW = 0.9  # of let/usable


class Guidance(Lifecycle[OptionsT]):
    """What a method of guiding shares with every other. It has three parts of its own: what it needs of the student and
    of the teacher (:meth:`attach`, its options' ``projected``), its term (:meth:`term`), and how that joins the loss
    (:meth:`joined`).

    Where several guide one run, each joins with the student's own loss, whatever their order.
    """

    def restart(self) -> None:
        """Forget what was learnt on the way: a run starts."""
        self._weight = 0.0  # of this batch
        self._needs_mask = True  # the teacher, in this batch
        self._warned = False
        self._sums = BatchSums()
        self.ends_early = ""  # why, if there is a reason
        self.drop_microbatch()

    def check_teacher(self, teacher: Teacher, model: nn.Module) -> None:
        """Refuse a teacher that cannot read the rows that this student reads."""
        self._separates, length = _documents(model)
        if self._separates:
            teacher.require_separation(length)

    def detach(self) -> None:
        """Let go of the student and of what was kept of a batch."""
        self.drop_batch()

    # ---- what a method brings ----

    def arm(self) -> None:
        """A training forward begins."""

    def term(self, state: State, states: Tensor, mask: Tensor) -> Tensor:
        """The unweighted term of a microbatch, a mean over the tokens of ``mask``.

        Args:
            state: With the student's outputs.
            states: The teacher's hidden states ``[B, S, D_t]``.
            mask: Loss-generating tokens ``[B, S]``.
        """
        raise NotImplementedError

    def joined(self, term: Tensor, weight: float, loss: Any) -> Tensor:
        """What to add to the loss.

        Args:
            term: From :meth:`term`.
            weight: Of this batch.
            loss: The student's own, before any guidance.
        """
        raise NotImplementedError

    def strength(self) -> float:
        """The weight before annealing."""
        raise NotImplementedError

    def gradients(self) -> dict[str, Tensor]:
        """Further sums that are known only after the backward pass."""
        return {}

    def report(self, sums: Mapping[str, Tensor], weight: float) -> dict[str, float]:
        """Learn from a batch, and return further metrics.

        Args:
            sums: Over microbatches and ranks, on the host.
            weight: Of this batch.
        """
        return {}

    # ---- a batch ----

    def batch_event(self, event: Event, state: State, logger: Logger) -> None:
        """An event of a guided batch."""
        if event == Event.BATCH_START:
            self._start_batch(state, logger)
        elif event == Event.BEFORE_TRAIN_BATCH:  # also the entry of a retry after an out-of-memory error
            self.drop_batch()
        elif event == Event.BEFORE_FORWARD:
            self.drop_microbatch()
            self.arm()
        elif event == Event.AFTER_FORWARD:
            self._guide(state)
        elif event == Event.AFTER_LOSS:
            self._join(state)
        elif event == Event.BATCH_END:
            # Not at AFTER_TRAIN_BATCH: there a rank may still run out of memory, leave the others alone in the
            # collective and count the batch again.
            self._finish_batch(state, logger)

    def drop_batch(self) -> None:
        """Forget the batch."""
        self.drop_microbatch()
        self._sums.clear()

    def drop_microbatch(self) -> None:
        """Forget the microbatch."""
        self._states: Tensor | None = None  # the teacher's, of this microbatch
        self._term: Tensor | None = None
        self._tokens: Tensor | None = None
        self._loss: Any = None  # the student's own

    def _start_batch(self, state: State, logger: Logger) -> None:
        assert self._teacher is not None
        batch = state.batch
        if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= batch.keys():
            found = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
            raise ValueError(
                f"{type(self).__name__} needs batches that map 'input_ids' and 'labels' to tensors [B, S], as causal "
                f"language modelling has them. Got {found}. Use a text data loader of llm-foundry, or one like it."
            )
        self._weight = self.schedule.weight(state.timestamp, self.strength())
        self._needs_mask = needs_mask(batch.get("attention_mask"))  # here the batch is still the host's
        length = batch["input_ids"].shape[1]
        head = self._teacher.head_parameters * self.options.projected(length) / length
        teacher = 2 * (self._teacher.parameters + head)
        logger.log_metrics(
            {
                f"{self.prefix}/weight": self._weight,
                f"{self.prefix}/active": 1.0,
                f"{self.prefix}/teacher_flops_share": teacher / (teacher + 6 * self.student_parameters),
            }
        )

    def _guide(self, state: State) -> None:
        mask = loss_generating(state.batch["labels"])
        self._tokens = mask.sum()
        if self._states is None:
            self._run_teacher(state)
        states, self._states = self._states, None
        assert states is not None
        self._term = self.term(state, states, mask)
        self._sums.add(tokens=self._tokens, loss=self._tokens * self._term.detach())

    def _run_teacher(self, state: State) -> None:
        # Outside autocast, as every algorithm: the teacher's weights have the type it is to compute in.
        assert self._teacher is not None
        self._states = self._teacher.hidden(
            state.batch["input_ids"],
            state.batch.get("attention_mask") if self._needs_mask else None,
            state.batch.get("sequence_id") if self._separates else None,
        )
        for other in self.sharing:
            if isinstance(other, Guidance) and other.guiding:
                other._states = self._states

    def _join(self, state: State) -> None:
        assert self._term is not None and self._tokens is not None
        if self._loss is None:  # the first guidance of this microbatch: nothing is added yet
            for guidance in (self, *self.others):
                if isinstance(guidance, Guidance) and guidance.guiding:
                    guidance._loss = state.loss
        self._sums.add(lm_loss=self._tokens * total(self._loss))
        state.loss = plus(state.loss, self.joined(self._term, self._weight, self._loss))
        self.drop_microbatch()

    def _finish_batch(self, state: State, logger: Logger) -> None:
        # Composer has fetched this batch's loss by now, so reading these does not make the device wait. Logged under
        # the clock's own step, as Composer's monitors do at this event: some loggers drop what goes back.
        self._sums.add(**self.gradients())
        sums = self._sums.reduce()
        tokens = max(float(sums["tokens"]), 1.0)
        values = {name: float(sums[name]) / tokens for name in ("loss", "lm_loss")}
        values.update(self.report(sums, self._weight))
        logger.log_metrics({f"{self.prefix}/{name}": value for name, value in values.items()})
        self.schedule.batch = state.timestamp.batch.value
        if values.get("usable", 1.0) < _LOW and not self._warned:
            self._warned = True
            log.warning(
                "%s/usable is %.2f: only that share of the tokens has hidden states with a direction, in student and "
                "teacher. The others are zero or not finite and pass no gradient. Are both models sound?",
                self.prefix,
                values["usable"],
            )
        if self.ends_early:
            log.warning("%s ends early: %s.", type(self).__name__, self.ends_early)
            self.schedule.end = state.timestamp.batch  # for a second fit() and a resumed run, too
        if self.schedule.over(state.timestamp):
            self.retire(state, logger)


def _documents(model: nn.Module) -> tuple[bool, int]:
    """Whether tokens of a packed row attend to their own document only, as in an MPT with attn_uses_sequence_id; and
    the length of a row.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(attention := getattr(config, "attn_config", None), Mapping):
            return bool(attention.get("attn_uses_sequence_id")), int(getattr(config, "max_seq_len", 1))
    return False, 1

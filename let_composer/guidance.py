"""One guided batch, from its start to its metrics: run the teacher, add a term to the student's loss."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from composer.core import Event, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from let_composer.lifecycle import Lifecycle
from let_composer.masks import needs_mask
from let_composer.objective import loss_generating, plus, total

__all__ = ["Guidance"]

log = logging.getLogger(__name__)


class Guidance(Lifecycle):
    """What a method of guiding shares with every other. It has three parts of its own: what it needs of the student and
    of the teacher (:meth:`attach`, :meth:`projected`), its term (:meth:`term`), and how that joins the loss
    (:meth:`joined`).

    Where several guide one run, each joins with the student's own loss, whatever their order.
    """

    def restart(self) -> None:
        """Forget what was learnt on the way: a run starts."""
        self.ends_early = ""  # why, if there is a reason
        self.drop_batch()

    def release(self) -> None:
        """Let go of student, teacher and batch."""
        super().release()
        self.drop_batch()

    # ---- what a method brings ----

    def automatic_weight(self) -> float:
        """With ``weight: auto``, the weight before annealing."""
        raise NotImplementedError

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

    def joined(self, term: Tensor, loss: Any) -> Tensor:
        """What is weighted and added to ``loss``, the student's own before any guidance."""
        return term

    def report(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Learn from the sums of a batch, and return further metrics."""
        raise NotImplementedError

    # ---- a batch ----

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """One event; see :class:`let_composer.LET` for which does what."""
        super().apply(event, state, logger)
        if event == Event.BATCH_START:
            self._start_batch(state, logger)
        elif event == Event.BEFORE_TRAIN_BATCH:  # also the entry of a retry after an out-of-memory error
            self.drop_batch()
        elif event == Event.BEFORE_FORWARD:
            self.arm()
        elif event == Event.AFTER_FORWARD:
            self._guide(state)
        elif event == Event.AFTER_LOSS:
            self._join(state)
        elif event == Event.BATCH_END:
            # Not at AFTER_TRAIN_BATCH: there a rank may still run out of memory, leave the others alone in the
            # collective and count the batch again.
            self._finish_batch(state, logger)

    def add(self, **values: Tensor) -> None:
        """Add what a microbatch contributes to the sums of the batch, in fp64 on the device, so that nobody waits.

        Every rank has to add the same names in the same order.

        Args:
            values: Scalars or vectors.
        """
        for name, value in values.items():
            value = value.detach().double().reshape(-1)
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def sums(self) -> dict[str, Tensor]:
        """What was added, over all ranks, on the host, by one collective and one copy."""
        flat = torch.cat(list(self._sums.values()))
        dist.all_reduce(flat)
        sizes = [value.numel() for value in self._sums.values()]
        return dict(zip(self._sums, flat.cpu().split(sizes), strict=True))

    def drop_batch(self) -> None:
        """Forget the batch."""
        self._sums: dict[str, Tensor] = {}
        self._drop_microbatch()

    def _drop_microbatch(self) -> None:
        self._states: Tensor | None = None  # the teacher's
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
        start = self.automatic_weight() if self.weight == "auto" else self.weight
        self.weight_now = self.schedule.weight(state.timestamp, start)
        self._needs_mask = needs_mask(batch.get("attention_mask"))  # here the batch is still the host's
        length = batch["input_ids"].shape[1]
        head = self._teacher.head_parameters * self.projected(length) / length
        teacher = 2 * (self._teacher.parameters + head)
        share = teacher / (teacher + 6 * self.student_parameters)
        self._log(logger, {"weight": self.weight_now, "active": 1.0, "teacher_flops_share": share})

    def _guide(self, state: State) -> None:
        mask = loss_generating(state.batch["labels"])
        self._tokens = mask.sum()
        states = self._run_teacher(state) if self._states is None else self._states
        self._states = None
        self._term = self.term(state, states, mask)
        self.add(tokens=self._tokens, loss=self._tokens * self._term.detach())

    def _run_teacher(self, state: State) -> Tensor:
        # Outside autocast, as every algorithm: the teacher's weights have the type it is to compute in.
        assert self._teacher is not None
        states = self._teacher.hidden(
            state.batch["input_ids"],
            state.batch.get("attention_mask") if self._needs_mask else None,
            state.batch.get("sequence_id") if self._separates else None,
        )
        for method in self.others:
            if isinstance(method, Guidance) and method._teacher is self._teacher:
                method._states = states
        return states

    def _join(self, state: State) -> None:
        assert self._term is not None and self._tokens is not None
        if self._loss is None:  # the first guidance of this microbatch: nothing is added yet
            for method in (self, *self.others):
                if isinstance(method, Guidance) and method.guiding:
                    method._loss = state.loss
        self.add(lm_loss=self._tokens * total(self._loss))
        state.loss = plus(state.loss, self.weight_now * self.joined(self._term, self._loss))
        self._drop_microbatch()

    def _finish_batch(self, state: State, logger: Logger) -> None:
        # Composer has fetched this batch's loss by now, so reading these does not make the device wait. Logged under
        # the clock's own step, as Composer's monitors do at this event: some loggers drop what goes back.
        sums = self.sums()
        tokens = max(float(sums["tokens"]), 1.0)
        means = {name: float(sums[name]) / tokens for name in ("loss", "lm_loss")}
        self._log(logger, {**means, **self.report(sums)})
        self.schedule.batch = state.timestamp.batch.value
        if self.ends_early:
            log.warning(f"{type(self).__name__} ends early: {self.ends_early}.")
            self.schedule.end = state.timestamp.batch  # for a second fit() and a resumed run, too
        if self.schedule.over(state.timestamp):
            self.retire(state, logger)

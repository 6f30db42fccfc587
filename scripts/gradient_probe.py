"""LET with a look at the gradients: is there a weight that needs no tuning, and when do the two losses disagree?

An instrument for yamls/evidence.yaml, which loads it with ``code_paths: [scripts/gradient_probe.py]`` as the algorithm
``let_probe``. Every ``every`` batches, at the guided block's output h, it takes the gradients of the language model's
loss and of the alignment loss apart (two more partial backward passes) and logs, as ``let/``

* ``gradient_ratio``, norm of weight * d(alignment)/dh over norm of d(language model)/dh,
* ``gradient_cosine`` between them.

With ``balance`` the weight is set so that this ratio, averaged over the last measurements, is ``balance`` times the
annealing; with ``disagreement`` the guidance ends once the averaged cosine has fallen below that number, after it was
above it (an untrained student's gradients are orthogonal to each other). With ``offset`` one constant vector is added
to all of the teacher's states, which tells them no less apart but makes their cosines high, as those of large models
are: the same content, anisotropic. One process only.

To see what a weight of 1 amounts to in a run of your own, for as many batches as it takes:

    python scripts/train.py yamls/pretrained_baseline.yaml "code_paths=[scripts/gradient_probe.py]" max_duration=20ba \
        "algorithms.let_probe={teacher: data/offline/smollm2-135m, weight: 1.0, every: 1, anneal: constant}" \
        algorithms.let_probe.stop=1dur save_folder=null autoresume=false eval_interval=1000ba \
        console_log_interval=1ba global_train_batch_size=8 device_train_microbatch_size=8 run_name=probe
"""

from typing import Any

import torch
from composer.core import State
from composer.loggers import Logger
from llmfoundry import registry
from torch import Tensor

from let_composer.algorithm import LET, total

__all__ = ["ProbedLET"]

DECAY = 0.8  # of the running averages, per measurement


class ProbedLET(LET):
    """LET, measured.

    Args:
        every: Batches from one measurement to the next.
        balance: Ratio of gradient norms that sets the weight, which is then 1 in the options. Default: ``None``.
        disagreement: Mean gradient cosine that ends the guidance when it falls below. Default: ``None``.
        offset: Length of a constant vector, in a random direction, beside the mean length of the teacher's states: with
            1.0 that vector scores about 0.7 against each of them. Default: 0, none.
        options: As for :class:`LET`.
    """

    def __init__(
        self,
        every: int = 10,
        balance: float | None = None,
        disagreement: float | None = None,
        offset: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.every, self.balance, self.disagreement, self.offset = every, balance, disagreement, offset
        self._hidden: Tensor | None = None
        self._norms: tuple[float, float] | None = None  # running means: language model's, alignment's (unweighted)
        self._agreement: float | None = None  # running mean of the cosine
        self._agreed = False  # was it ever above ``disagreement``?
        self._measured: dict[str, float] = {}

    def _set_up(self, state: State, logger: Logger) -> None:
        super()._set_up(state, logger)
        if (capture := self._capture) is not None:
            take = capture.take

            def keep() -> Tensor:
                self._hidden = take()
                return self._hidden

            capture.take = keep
        if self.offset and (teacher := self._teacher) is not None:
            hidden, constant = teacher.hidden, None

            def shifted(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
                nonlocal constant
                states = hidden(input_ids, attention_mask)
                if constant is None:
                    direction = torch.randn(states.shape[-1], generator=torch.Generator().manual_seed(0)).to(states)
                    constant = direction / direction.norm() * self.offset * states.norm(dim=-1).mean()
                return states + constant

            teacher.hidden = shifted

    def _weight_at(self, state: State) -> float:
        annealed = super()._weight_at(state)
        if self.disagreement is not None and self._agreement is not None:
            self._agreed = self._agreed or self._agreement >= self.disagreement
            if self._agreed and self._agreement < self.disagreement:
                return 0.0
        if self.balance is None or self._norms is None:
            return annealed
        language, alignment = self._norms
        return annealed * self.balance * language / max(alignment, 1e-12)

    def _add_term(self, state: State) -> None:
        if state.timestamp.batch.value % self.every == 0:
            assert self._hidden is not None and self._term is not None
            language, alignment = (
                torch.autograd.grad(loss, self._hidden, retain_graph=True)[0].double()
                for loss in (total(state.loss), self._term)
            )
            norms = float(language.norm()), float(alignment.norm())
            cosine = float((language * alignment).sum()) / max(norms[0] * norms[1], 1e-30)
            self._measured = {
                "let/gradient_ratio": self._weight * norms[1] / max(norms[0], 1e-30),
                "let/gradient_cosine": cosine,
            }
            if self._norms is None or self._agreement is None:
                self._norms, self._agreement = norms, cosine
            else:
                mix = [DECAY * old + (1 - DECAY) * new for old, new in zip(self._norms, norms, strict=True)]
                self._norms = mix[0], mix[1]
                self._agreement = DECAY * self._agreement + (1 - DECAY) * cosine
        self._hidden = None
        super()._add_term(state)

    def _report(self, state: State, logger: Logger) -> None:
        super()._report(state, logger)
        logger.log_metrics(self._measured, step=state.timestamp.batch.value - 1)
        self._measured = {}


registry.algorithms.register("let_probe", func=ProbedLET)

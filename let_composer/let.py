"""LET: a small teacher's late hidden states guide an early layer of the student."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch
from composer.core import State
from torch import Tensor, nn

from let_composer.annealing import Anneal
from let_composer.balance import GradientRatio, RunningMean, lead_share, lead_sum, measured, sampled
from let_composer.guidance import Guidance
from let_composer.loss import Implementation, Resize, alignment, target_sum
from let_composer.objective import logits_of
from let_composer.options import require_type
from let_composer.statistics import FeatureStatistics, Normalize
from let_composer.student import Capture, resolve_layer
from let_composer.teacher import Placement

__all__ = ["LET"]

log = logging.getLogger(__name__)

_LOW = 0.9  # of let/usable


@dataclasses.dataclass(eq=False)
class LET(Guidance):
    """Late-to-Early Training (`arXiv 2602.05393 <https://arxiv.org/abs/2602.05393>`_): for the first part of the run, a
    small frozen teacher's late hidden states guide an early layer of the student.

    ``loss = student's loss + weight(t) * mean over loss-generating tokens of -cos(student layer, teacher layer)``

    Runs on ``Event.AFTER_LOAD`` (find the block, load the teacher), ``BATCH_START`` (weight), ``BEFORE_FORWARD`` and
    ``AFTER_FORWARD`` (capture, run the teacher), ``AFTER_LOSS`` (add the term) and ``BATCH_END`` (metrics; when the
    weight has reached zero, free the teacher). After that nothing runs, unless ``FIT_START`` finds that the clock was
    reset: then the guidance starts anew. With ``weight: 0`` no event is matched at all. It adds no synchronisation with
    the host before ``BATCH_END``, where Composer has had one already, but for teachers that :mod:`let_composer.teacher`
    names.

    The fields are the keys of ``algorithms.let`` in an llm-foundry YAML. let_composer/README.md has what it costs, logs
    and works with. Teacher and student must share token ids. A second LET in the same run is refused.

    Args:
        teacher: A causal decoder: hub id, with ``@revision`` if need be, local folder in the Hugging Face format, or
            ``.gguf`` file. Default: ``"EleutherAI/pythia-160m"``, which shares the vocabulary of llm-foundry's MPT
            YAMLs and was trained on the Pile.
        student_layer: Number of student blocks passed, as in HF ``hidden_states[3]``; negative counts from the end. Or
            the dotted path of any module, for models whose blocks are not found. Default: ``3``, our choice (paper: "an
            early layer").
        teacher_layer: Teacher hidden state; ``-1`` is the last, after the final norm. Default: ``-1`` (paper: the last
            layer; after the norm is our choice).
        weight: ``"auto"``: the term's gradient at the guided block is as long as that of the student's loss
            (:class:`GradientRatio`), less as the student comes within half a nat of the teacher (:func:`lead_share`).
            Once it has caught up, in ten batches at the earliest, the guidance ends. Needs the student's logits and the
            teacher's LM head for 64 evenly spaced tokens of a row. Or a number, the weight at the start (paper:
            lambda_0), finite and not negative; the paper's best at 1.4B is 0.1. Default: ``"auto"``, our choice: it
            gained as much as the best number tried. An untrained teacher cost nothing, one overtaken early 0.011 nats
            (yamls/evidence/evidence.md).
        stop: End of the guidance, a Composer time string in ``ba``, ``tok``, ``sp``, ``ep`` or ``dur``. Resolved once
            and kept in checkpoints, until the clock is reset. Past ``max_duration`` it warns. Default: ``"0.5dur"``,
            our choice, the paper is silent; an earlier one saved less with 0.64M students (yamls/evidence/evidence.md).
        anneal: ``"linear"`` (paper) or ``"cosine"`` from ``weight`` to 0 at ``stop``; ``"constant"`` until ``stop``.
            Default: ``"linear"``.
        resize: Whose features are linearly interpolated where the widths differ, ``"teacher"`` or ``"student"``.
            Default: ``"student"``, our choice: sources on the paper disagree, and it did better with 0.64M
            students (yamls/evidence/evidence.md).
        normalize_teacher: ``"none"`` (paper); ``"center"`` subtracts the running mean of every teacher feature;
            ``"standardize"`` also divides by its running deviation. Statistics of earlier batches are used, so the very
            first batch is not normalised. Default: ``"none"``.
        placement: ``"replicate"`` keeps the teacher on every rank; ``"shard"`` spreads it over the ranks of a node
            (FSDP2, whatever the student uses), which excludes ``device_train_microbatch_size: auto``. Default:
            ``"replicate"``.
        implementation: Of the alignment loss: ``"triton"``, ``"torch"``, or ``"auto"``, Triton on CUDA. Default:
            ``"auto"``.
        trust_remote_code: Whether code that comes with the teacher may run. Default: ``False``.

    Raises:
        TypeError: For an argument of another type.
        ValueError: For an unknown argument or a value out of range; at ``AFTER_LOAD`` or ``FIT_START`` for one that
            does not fit the run, at ``BATCH_START`` for batches without ``input_ids`` and ``labels``.
    """

    prefix = "let"

    teacher: str = "EleutherAI/pythia-160m"
    student_layer: int | str = 3
    teacher_layer: int = -1
    weight: float | Literal["auto"] = "auto"
    stop: str = "0.5dur"
    anneal: Anneal = "linear"
    resize: Resize = "student"
    normalize_teacher: Normalize = "none"
    placement: Placement = "replicate"
    implementation: Implementation = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        self._capture: Capture | None = None
        self._sinks: list[Tensor] = []
        super().__post_init__()

    def check(self) -> None:
        """Refuse options of another type or out of range."""
        super().check()
        require_type("student_layer", self.student_layer, (int, str), "a number of blocks or a dotted path")
        require_type("teacher_layer", self.teacher_layer, int, "a number of blocks")
        if self.student_layer == 0 or self.teacher_layer == 0:
            raise ValueError(
                "student_layer and teacher_layer count the blocks passed, from 1; 0 would be the embeddings, which see "
                "no context."
            )
        if self.weight == "auto" and self.teacher_layer != -1:
            raise ValueError(
                "weight: auto compares the teacher's predictions with the student's, so it needs the teacher's last "
                f"layer. Got teacher_layer {self.teacher_layer}: leave it out, or give a number as the weight."
            )

    def projected(self, length: int) -> int:
        """A sample, to know the teacher's lead, where the weight sets itself."""
        return len(range(length)[sampled(length)]) if self.weight == "auto" else 0

    def restart(self) -> None:
        """Forget the running statistics: a run starts."""
        super().restart()
        self._had_gradient = False
        self._warned = False
        self._statistics = FeatureStatistics(self.normalize_teacher)
        self._balance = GradientRatio()
        self._lead = RunningMean()

    def attach(self, model: nn.Module, device: torch.device) -> str:
        """Find the guided block and listen to its output; returns its dotted path."""
        path, block = resolve_layer(model, self.student_layer)
        if _frozen_up_to(model, block):
            raise ValueError(
                f"expected something to train up to {path} (student_layer {self.student_layer}), but all "
                "parameters there are frozen: the guidance would change nothing. Unfreeze them, choose a later layer, "
                "or remove LET."
            )
        example = torch.zeros(1, 8, device=device)
        alignment(example, example, implementation=self.implementation)  # says now if it cannot run here
        self._capture = Capture(block)
        # Of the student's loss and of the weighted term: their gradients are squared norms at the guided block.
        self._sinks = [torch.zeros((), device=device, requires_grad=True) for _ in range(2)]
        return path

    def release(self) -> None:
        """Take the hook off the student, too."""
        super().release()
        if self._capture is not None:
            self._capture.remove()
        self._capture = None

    def drop_batch(self) -> None:
        """Forget the batch, the hidden states captured and the gradients seen in it."""
        super().drop_batch()
        if self._capture is not None:
            self._capture.clear()
        for sink in self._sinks:
            sink.grad = None

    def arm(self) -> None:
        """Listen to the forward that begins."""
        assert self._capture is not None
        self._capture.arm(self._sinks[0])

    def automatic_weight(self) -> float:
        """At which both gradients are equal, less as the teacher's lead shrinks."""
        return lead_share(self._lead.value) * self._balance.weight

    def term(self, state: State, states: Tensor, mask: Tensor) -> Tensor:
        """The mean negative cosine between the guided block's output and the teacher's states."""
        assert self._capture is not None
        student = self._capture.take()
        self._require_gradient(student)
        mean, std = self._statistics.mean_and_std(states.device)
        resize, implementation = self.resize, self.implementation
        found = alignment(measured(student, self._sinks[1]), states, mask, mean, std, resize, implementation)
        width = (student if resize == "teacher" else states).shape[-1]
        self.add(
            usable=found.usable,
            targets=target_sum(states, found.inverse_norm, width, mean, std),
            features=self._statistics.sums(states, mask),
        )
        if self.weight == "auto":
            assert self._teacher is not None
            chosen = sampled(mask.shape[1])
            logits = logits_of(state.outputs)[:, chosen].detach(), self._teacher.project(states[:, chosen])
            targets = state.batch["labels"].roll(-1, dims=1)
            self.add(lead=lead_sum(*logits, targets[:, chosen], mask[:, chosen]))
        return found.loss

    def sums(self) -> dict[str, Tensor]:
        """Those of a batch, and now that they are known the squared norms of both gradients at the guided block."""
        norms = [sink.new_zeros(()) if sink.grad is None else sink.grad for sink in self._sinks]
        self.add(gradients=torch.stack(norms))
        return super().sums()

    def report(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The cosine, what a constant would score, the share of tokens with a direction, and the gradients' ratio."""
        self._statistics.update(sums["features"])
        tokens = float(sums["tokens"])
        model, term = sums["gradients"].sqrt().tolist()
        if self.weight_now:
            self._balance.update(model, term / self.weight_now)
        usable = float(sums["usable"]) / tokens if tokens else 1.0
        if usable < _LOW and not self._warned:
            self._warned = True
            log.warning(
                f"let/usable is {usable:.2f}: only that share of the tokens has hidden states with a direction, in "
                "student and teacher. The others are zero or not finite and pass no gradient. Are both models sound?"
            )
        metrics = {
            "cosine": -float(sums["loss"]) / max(tokens, 1.0),
            "constant_cosine": float(torch.linalg.vector_norm(sums["targets"])) / max(tokens, 1.0),
            "usable": usable,
            "gradient_ratio": term / model if model else 0.0,
        }
        nats, sample = sums["lead"].tolist() if self.weight == "auto" else (0.0, 0.0)
        if sample:
            self._lead.update(nats / sample)
            metrics["lead"] = nats / sample
            if self._lead.settled and lead_share(self._lead.value) == 0:
                self.ends_early = "the student predicts as well as the teacher, which has nothing left to give"
        return metrics

    def saved(self) -> dict[str, Any]:
        """The running statistics and norms."""
        return {
            "statistics": self._statistics.state_dict(),
            "norms": self._balance.norms,
            "lead": [self._lead.value, self._lead.batches],
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take over the running statistics and norms."""
        self._statistics.load_state_dict(saved["statistics"])
        self._balance.norms = saved["norms"]
        self._lead = RunningMean(*saved["lead"])

    def _require_gradient(self, student: Tensor) -> None:
        if student.requires_grad:
            self._had_gradient = True
        elif self._had_gradient:  # another algorithm has frozen blocks in the middle of the run
            self.ends_early = "everything up to the guided block is frozen now, so there is nothing left to guide"
        else:
            raise RuntimeError(
                f"expected the hidden states of student_layer {self.student_layer} to carry a gradient, but "
                "they come out without one, as from re-entrant checkpointing of the model's own "
                "(gradient_checkpointing_enable). Use Composer's activation checkpointing, or use_reentrant: false."
            )


def _frozen_up_to(model: nn.Module, block: nn.Module) -> bool:
    """Whether nothing is trained in the modules that are registered before ``block`` or in it."""
    inside = set(block.modules())
    for module in model.modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            return False
        inside.discard(module)
        if not inside:
            return True
    return False

"""LET as a Composer algorithm. Only this room, and distillation.py which extends it, see State, batches and events."""

import difflib
import gc
import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
import torch.nn.functional as F
from composer.callbacks import SpeedMonitor
from composer.core import Algorithm, Event, State, Time
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from let_composer.annealing import Anneal, annealed_weight, parse_stop, resolve_stop
from let_composer.data.manifest import check_manifest
from let_composer.loss import Implementation, Resize, alignment_loss, target_sum
from let_composer.statistics import FeatureStatistics, Normalize
from let_composer.student import Capture, matmul_parameters, resolve_layer
from let_composer.teacher import Placement, Teacher, check_vocabulary, needs_mask, read_vocabulary

__all__ = ["LET", "loss_generating", "plus", "total"]

log = logging.getLogger(__name__)

_IGNORED = -100  # label of a token that generates no loss, in llm-foundry and Hugging Face

_SETUP = frozenset({Event.INIT, Event.AFTER_LOAD, Event.FIT_START})
_OFF = frozenset({Event.INIT})  # of another Trainer
_GUIDED = _SETUP | {
    Event.BATCH_START,
    Event.BEFORE_TRAIN_BATCH,
    Event.BEFORE_FORWARD,
    Event.AFTER_FORWARD,
    Event.AFTER_LOSS,
    Event.BATCH_END,
}


class LET(Algorithm):
    """Late-to-Early Training (`arXiv 2602.05393 <https://arxiv.org/abs/2602.05393>`_): for the first part of the run, a
    small frozen teacher's late hidden states guide an early layer of the student.

    ``loss = student's loss + weight(t) * mean over loss-generating tokens of -cos(student layer, teacher layer)``

    Runs on ``Event.AFTER_LOAD`` (find the block, load the teacher), ``BATCH_START`` (weight), ``BEFORE_FORWARD`` and
    ``AFTER_FORWARD`` (capture, run the teacher), ``AFTER_LOSS`` (add the term) and ``BATCH_END`` (metrics; when the
    weight has reached zero, free the teacher). After that, and always with ``weight: 0``, nothing runs. A guided
    step costs the teacher's forward without its LM head. It adds no synchronisation with the host before ``BATCH_END``,
    where Composer has had one already (batches padded in front excepted: transformers looks into their mask).

    The constructor's arguments are the keys of ``algorithms.let`` in an llm-foundry YAML. Teacher and student must
    share token ids. In packed batches the teacher attends across documents, as an MPT without ``attn_uses_sequence_id``
    does.

    Runs with DDP, FSDP1 and FSDP2, with activation checkpointing, microbatching and torch.compile; refuses tensor
    parallelism. Every rank must have the same teacher, which is checked.

    Args:
        teacher: A causal decoder: hub id, with ``@revision`` if need be, local folder in the Hugging Face format, or
            ``.gguf`` file. Default: ``"EleutherAI/pythia-160m"``, which shares the vocabulary of llm-foundry's MPT
            YAMLs and was trained on the Pile.
        student_layer: Number of student blocks passed, as in HF ``hidden_states[3]``; negative counts from the end. Or
            the dotted path of any module, for models whose blocks are not found. Default: ``3``, our choice (paper: "an
            early layer").
        teacher_layer: Teacher hidden state; ``-1`` is the last, after the final norm. Default: ``-1`` (paper: the last
            layer; after the norm is our choice).
        weight: Weight at the start, finite and not negative (paper: lambda_0). Default: ``0.1``, the paper's best at
            1.4B; students of a few million parameters needed 10 (README, evidence; ``scripts/gradient_probe.py``
            measures how much of the gradient it is).
        stop: End of the guidance, a Composer time string in ``ba``, ``tok``, ``sp``, ``ep`` or ``dur``. Resolved once,
            and kept in checkpoints. Default: ``"0.5dur"``, our choice, the paper is silent; an earlier one
            saved less with 0.64M students (README, evidence).
        anneal: ``"linear"`` (paper) or ``"cosine"`` from ``weight`` to 0 at ``stop``; ``"constant"`` until ``stop``.
            Default: ``"linear"``.
        resize: Whose features are linearly interpolated where the widths differ, ``"teacher"`` or ``"student"``.
            Default: ``"student"``, our choice: sources on the paper disagree, and it did better with 0.64M
            students (README, evidence).
        normalize_teacher: ``"none"`` (paper); ``"center"`` subtracts the running mean of every teacher feature;
            ``"standardize"`` also divides by its running deviation. Statistics of earlier batches are used, so the very
            first batch is not normalised. Default: ``"none"``.
        placement: ``"replicate"`` keeps the teacher on every rank; ``"shard"`` spreads it over all ranks (FSDP2,
            whatever the student uses), which excludes ``device_train_microbatch_size: auto``. Default:
            ``"replicate"``.
        implementation: Of the alignment loss: ``"triton"``, ``"torch"``, or ``"auto"``, Triton on CUDA. Default:
            ``"auto"``.
        trust_remote_code: Whether code that comes with the teacher may run. Default: ``False``.

    Logs, exact over microbatches and ranks: ``let/weight``, ``let/active`` and ``let/teacher_flops_share`` (the
    teacher's share of a guided step's matmul FLOPs) at the start of a batch; ``let/loss`` (the term, unweighted),
    ``let/lm_loss`` (the student's loss before the term is added), ``let/cosine`` and ``let/constant_cosine`` (what the
    best constant vector would score) at its end, all under the batch's own step; means over tokens, also where Composer
    weights microbatches by samples. Once, ``let/memory_returned_mib``. Composer's ``SpeedMonitor`` counts the student's
    FLOPs only, in ``throughput/device/flops_per_sec`` and ``throughput/device/mfu``; where it logs them, LET logs
    ``let/throughput/device/flops_per_sec`` and ``let/throughput/device/mfu`` under the same step, over the same window
    and with the teacher's included, counted in the same manner (batches of one size, padding and full attention
    included).

    Raises:
        TypeError: For an unknown or wrongly typed argument.
        ValueError: For a value out of range; at ``AFTER_LOAD`` or ``FIT_START`` for one that does not fit the run.
    """

    _prefix = "let"  # of metrics and hyperparameters

    def __init__(
        self,
        teacher: str = "EleutherAI/pythia-160m",
        student_layer: int | str = 3,
        teacher_layer: int = -1,
        weight: float = 0.1,
        stop: str = "0.5dur",
        anneal: Anneal = "linear",
        resize: Resize = "student",
        normalize_teacher: Normalize = "none",
        placement: Placement = "replicate",
        implementation: Implementation = "auto",
        trust_remote_code: bool = False,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise TypeError(_unknown_keys(type(self), unknown))
        _require_type("teacher", teacher, str, "a hub id or a path")
        _require_type("student_layer", student_layer, (int, str), "a number of blocks or a dotted path")
        _require_type("teacher_layer", teacher_layer, int, "a number of blocks")
        _require_type("weight", weight, (int, float), "a number")
        _require_type("trust_remote_code", trust_remote_code, bool, "true or false")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight must be finite and not negative, got {weight}. The paper's value is 0.1.")
        if student_layer == 0 or teacher_layer == 0:
            raise ValueError(
                "student_layer and teacher_layer count the blocks passed, from 1; 0 would be the embeddings, which see "
                "no context."
            )
        for name, value, options in (
            ("anneal", anneal, Anneal),
            ("resize", resize, Resize),
            ("normalize_teacher", normalize_teacher, Normalize),
            ("placement", placement, Placement),
            ("implementation", implementation, Implementation),
        ):
            if value not in get_args(options):
                raise ValueError(f"{name} must be one of {', '.join(get_args(options))}, got {value!r}.")

        self.teacher_name = teacher
        self.student_layer = student_layer
        self.teacher_layer = teacher_layer
        self.weight = float(weight)
        self.stop = stop
        self.anneal: Anneal = anneal
        self.resize: Resize = resize
        self.placement: Placement = placement
        self.implementation: Implementation = implementation
        self.trust_remote_code = trust_remote_code
        self.normalize_teacher: Normalize = normalize_teacher
        self._stop = parse_stop(stop)
        self._repr = (
            f"LET(teacher={teacher!r}, student_layer={student_layer!r}, teacher_layer={teacher_layer}, "
            f"weight={self.weight}, stop={stop!r}, anneal={anneal!r}, resize={resize!r}, "
            f"normalize_teacher={normalize_teacher!r})"
        )

        self._reset()

    def _reset(self) -> None:
        self._events = _SETUP if self.weight > 0 else frozenset()
        self._statistics = FeatureStatistics(self.normalize_teacher)
        self._end: Time | None = None  # stop in ba, tok or sp
        self._teacher: Teacher | None = None
        self._capture: Capture | None = None
        self._student_parameters = 0
        self._weight = 0.0  # of this batch
        self._needs_mask = True  # the teacher, in this batch
        self._term: Tensor | None = None  # of this microbatch, between AFTER_FORWARD and AFTER_LOSS
        self._tokens: Tensor | None = None  # of this microbatch, generating loss
        self._teacher_flops = 0.0  # of this batch on this rank
        self._sums: dict[str, Tensor] = {}  # of this batch, in fp64 on the device

    def __repr__(self) -> str:  # the engine evaluates it for every event
        return self._repr

    def match(self, event: Event, state: State) -> bool:
        """Whether there is anything to do: never with ``weight: 0`` or once the teacher is gone."""
        return event in self._events

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """One event of the method; see the class for which does what."""
        if event == Event.INIT:
            self._end_guidance()  # if this instance served another Trainer before
            self._reset()
            self._student_parameters = matmul_parameters(state.model)  # before FSDP shards them
        elif event == Event.AFTER_LOAD:
            self._set_up(state, logger)
        elif event == Event.FIT_START:
            self._resolve_end(state, required=True)
            self._retire_if_over(state, logger)
        elif event == Event.BATCH_START:
            self._weight = self._weight_at(state)
            self._needs_mask = needs_mask(state.batch.get("attention_mask"))  # here the batch is still the host's
            logger.log_metrics(
                {
                    f"{self._prefix}/weight": self._weight,
                    f"{self._prefix}/active": 1.0,
                    f"{self._prefix}/teacher_flops_share": self._teacher_flops_share(),
                    **self._throughput(state),
                }
            )
        elif event == Event.BEFORE_TRAIN_BATCH:  # also the entry of a retry after an out-of-memory error
            self._forget()
        elif event == Event.BEFORE_FORWARD:
            assert self._capture is not None
            self._capture.arm()
        elif event == Event.AFTER_FORWARD:
            self._align(state)
        elif event == Event.AFTER_LOSS:
            self._add_term(state)
        elif event == Event.BATCH_END:
            # Not at AFTER_TRAIN_BATCH: there a rank may still run out of memory, leave the others alone in the
            # collective and count the batch again.
            self._reduce()
            self._report(state, logger)
            self._retire_if_over(state, logger)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the resolved end and the running statistics, as plain Python values."""
        return {
            **super().state_dict(),
            "teacher": self.teacher_name,
            "student_layer": self.student_layer,
            "teacher_layer": self.teacher_layer,
            "stop": self.stop,
            "end": None if self._end is None else self._end.to_timestring(),
            "statistics": self._statistics.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the end of the guidance and the statistics; warn where the checkpoint was made otherwise."""
        for key, ours in (
            ("teacher", self.teacher_name),
            ("student_layer", self.student_layer),
            ("teacher_layer", self.teacher_layer),
            ("stop", self.stop),
        ):
            if key in state and state[key] != ours:
                log.warning("the checkpoint was made with %s: %r, this run goes on with %r.", key, state[key], ours)
        if state.get("end") and state.get("stop") == self.stop:
            self._end = Time.from_timestring(state["end"])
        if (state.get("teacher"), state.get("teacher_layer")) == (self.teacher_name, self.teacher_layer):
            self._statistics.load_state_dict(state["statistics"])

    def _set_up(self, state: State, logger: Logger) -> None:
        self._resolve_end(state, required=False)
        if self._end is not None and self._weight_at(state) == 0:
            log.info("%s ended at %s: the teacher is not loaded.", type(self).__name__, self._end.to_timestring())
            self._events = _OFF
            return
        dataset = getattr(state.train_dataloader, "dataset", None)  # llm-foundry's text loader has these attributes
        if dataset is not None and hasattr(dataset, "streams") and hasattr(dataset, "max_seq_len"):
            for stream in dataset.streams:
                folder = "/".join(part for part in (stream.remote or stream.local, stream.split) if part)
                check_manifest(folder, dataset.tokenizer, dataset.max_seq_len)
        self._check_parallelism(state)
        path, block = resolve_layer(state.model, self.student_layer)
        device = _device(state)
        example = torch.zeros(1, 8, device=device)
        alignment_loss(example, example, implementation=self.implementation)  # says now if it cannot run here
        with dist.run_local_rank_zero_first():
            vocabulary = read_vocabulary(self.teacher_name, self.trust_remote_code)
            self._teacher = self._load_teacher(device)
        check_vocabulary(_vocabulary(state), vocabulary, self._teacher.rows, self.teacher_name)
        if dist.get_world_size() > 1:
            _check_same(self.teacher_name, dist.all_gather_object(self._teacher.fingerprint()))
        if self.placement == "shard":
            self._teacher.shard()
        self._statistics.to(device)
        self._capture = Capture(block)
        self._events = _GUIDED
        logger.log_hyperparameters(
            {
                f"{self._prefix}/teacher": self.teacher_name,
                f"{self._prefix}/teacher_parameters": self._teacher.parameters,
                f"{self._prefix}/student_module": path,
                f"{self._prefix}/stop": self.stop if self._end is None else self._end.to_timestring(),
            }
        )
        log.info(
            "%r: %s of the student, teacher of %.1fM parameters without embeddings and head.",
            self,
            path,
            self._teacher.parameters / 1e6,
        )

    def _load_teacher(self, device: torch.device) -> Teacher:
        return Teacher(
            self.teacher_name,
            layer=self.teacher_layer,
            device=device,
            placement=self.placement,
            trust_remote_code=self.trust_remote_code,
        )

    def _check_parallelism(self, state: State) -> None:
        if state.tp_config is not None:
            raise ValueError(
                "LET does not run with tensor parallelism: the ranks of a group may hold parts of a hidden state, "
                "which cannot be compared with the teacher's. Leave out parallelism_config['tp'] (tp_config in "
                "llm-foundry); FSDP shards the student as well."
            )
        if self.placement != "shard":
            return
        if dist.get_world_size() == 1:
            raise ValueError(
                "placement: shard needs at least two ranks, this run has one. Use placement: replicate, the default."
            )
        if state.auto_microbatching:
            raise ValueError(
                "placement: shard does not work with device_train_microbatch_size: auto, because a rank that runs out "
                "of memory would leave the others waiting. Set a number, or use placement: replicate."
            )

    def _resolve_end(self, state: State, required: bool) -> None:
        if self._end is not None:
            return
        if state.max_duration is None:
            if required:
                raise ValueError("LET needs max_duration to know when to stop. Give it to the Trainer or to fit().")
            return
        length = state.dataloader_len
        if length is None and state.train_dataloader is None and not required:
            return
        self._end = resolve_stop(self._stop, state.max_duration, None if length is None else int(length))

    def _weight_at(self, state: State) -> float:
        assert self._end is not None
        elapsed = state.timestamp.get(self._end.unit).value
        return annealed_weight(elapsed, self._end.value, self.weight, self.anneal)

    def _align(self, state: State) -> None:
        assert self._capture is not None and self._teacher is not None
        student = self._capture.take()
        if not student.requires_grad:
            raise RuntimeError(
                f"expected the hidden states of student_layer {self.student_layer} to carry a gradient, but the blocks "
                "up to it are frozen, or run inside re-entrant checkpointing of the model's own "
                "(gradient_checkpointing_enable). Unfreeze them, or use Composer's activation checkpointing."
            )
        mask = loss_generating(state.batch)
        self._tokens = mask.sum()
        # Outside autocast, as every algorithm: the teacher's weights have the type it is to compute in.
        ids = state.batch["input_ids"]
        teacher = self._teacher.hidden(ids, self._attention_mask(state))
        self._teacher_flops += self._teacher.flops(ids.numel(), ids.shape[-1])
        mean, std = self._statistics.mean_and_std()
        self._term = alignment_loss(
            student,
            teacher,
            mask,
            teacher_mean=mean,
            teacher_std=std,
            resize=self.resize,
            implementation=self.implementation,
        )
        targets = target_sum(
            teacher,
            mask,
            width=student.shape[-1] if self.resize == "teacher" else None,
            teacher_mean=mean,
            teacher_std=std,
            implementation=self.implementation,
        )
        self._count("tokens", self._tokens)
        self._count("loss", self._tokens * self._term.detach())
        self._count("targets", targets)
        self._count("features", self._statistics.sums(teacher, mask))

    def _attention_mask(self, state: State) -> Tensor | None:
        return state.batch.get("attention_mask") if self._needs_mask else None

    def _add_term(self, state: State) -> None:
        assert self._term is not None and self._tokens is not None
        self._count("lm_loss", self._tokens * total(state.loss).detach())
        state.loss = plus(state.loss, self._weight * self._term)
        self._term = self._tokens = None

    def _forget(self) -> None:
        assert self._capture is not None
        self._capture.clear()
        self._term = self._tokens = None
        self._teacher_flops = 0.0
        self._sums = {}

    def _count(self, name: str, value: Tensor) -> None:
        value = value.double().reshape(-1)
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _reduce(self) -> None:
        flat = torch.cat(list(self._sums.values()))
        dist.all_reduce(flat)
        sizes = [value.numel() for value in self._sums.values()]
        self._sums = dict(zip(self._sums, flat.split(sizes), strict=True))
        if "features" in self._sums:
            self._statistics.update(self._sums["features"])

    def _report(self, state: State, logger: Logger) -> None:
        # Composer has fetched this batch's loss by now, so reading these does not make the device wait. The timestamp
        # has moved on; the step is the one under which Composer logged the loss.
        tokens = self._sums["tokens"].clamp(min=1)
        constant = torch.linalg.vector_norm(self._sums["targets"]) / tokens
        loss, lm_loss, constant_cosine = torch.cat(
            [self._sums["loss"] / tokens, self._sums["lm_loss"] / tokens, constant]
        ).tolist()
        logger.log_metrics(
            {
                f"{self._prefix}/loss": loss,
                f"{self._prefix}/lm_loss": lm_loss,
                f"{self._prefix}/cosine": -loss,
                f"{self._prefix}/constant_cosine": constant_cosine,
            },
            step=state.timestamp.batch.value - 1,
        )

    def _retire_if_over(self, state: State, logger: Logger) -> None:
        if self._teacher is None or self._weight_at(state) > 0:
            return
        device = _device(state)
        cuda = device.type == "cuda"
        size = sum(p.numel() * p.element_size() for p in self._teacher.body.parameters())
        before = torch.cuda.memory_allocated(device) if cuda else size
        self._end_guidance()
        gc.collect()  # modules hold reference cycles
        if cuda:
            torch.cuda.empty_cache()
        returned = (before - (torch.cuda.memory_allocated(device) if cuda else 0)) / 2**20
        logger.log_metrics(
            {
                f"{self._prefix}/weight": 0.0,
                f"{self._prefix}/active": 0.0,
                f"{self._prefix}/memory_returned_mib": returned,
            }
        )
        log.info(
            "%s ended after batch %d: the teacher is released, %.1f MiB of memory returned.",
            type(self).__name__,
            state.timestamp.batch.value,
            returned,
        )

    def _end_guidance(self) -> None:
        if self._capture is not None:
            self._forget()
            self._capture.remove()
        self._capture = self._teacher = None
        self._events = _OFF

    def _teacher_flops_share(self) -> float:
        assert self._teacher is not None
        teacher, student = 2 * self._teacher.parameters, 6 * self._student_parameters
        return teacher / (teacher + student)

    def _throughput(self, state: State) -> dict[str, float]:
        # SpeedMonitor's figures of the batches before, with the teacher's FLOPs added to the student's: it has logged
        # its own under this same step, after LET's turn in BATCH_END.
        monitor = next((callback for callback in state.callbacks if isinstance(callback, SpeedMonitor)), None)
        if monitor is None or len(monitor.history_flops) != monitor.history_flops.maxlen or not self._teacher_flops:
            return {}
        seconds = monitor.history_wct[-1] - monitor.history_wct[0]
        batches = len(monitor.history_wct) - 1
        student = sum(list(monitor.history_flops)[1:]) / dist.get_world_size()
        metrics = {
            f"{self._prefix}/throughput/device/flops_per_sec": (student + batches * self._teacher_flops) / seconds
        }
        if monitor.gpu_flops_available:
            metrics[f"{self._prefix}/throughput/device/mfu"] = (
                metrics[f"{self._prefix}/throughput/device/flops_per_sec"] / monitor.gpu_flops_available
            )
        return metrics


def _check_same(name: str, fingerprints: Sequence[str]) -> None:
    ranks: dict[str, list[int]] = {}
    for rank, fingerprint in enumerate(fingerprints):
        ranks.setdefault(fingerprint, []).append(rank)
    if len(ranks) > 1:
        found = "; ".join(f"{_ranks(numbers)} {fingerprint}" for fingerprint, numbers in ranks.items())
        raise ValueError(
            f"expected the same teacher on every rank, but the weights of {name!r} differ between them ({found}). Give "
            "every node the same files: compare the folders or caches, or name a revision, as in name@revision."
        )


def _ranks(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return f"rank {shown}" if len(numbers) == 1 else f"ranks {shown}" + ", ..." * (len(numbers) > 8)


def loss_generating(batch: Mapping[str, Any]) -> Tensor:
    """The positions whose next token is predicted, ``[B, S]``: those that Composer counts and the student's loss
    averages over."""
    labels = batch.get("labels")
    if labels is None:
        raise ValueError(
            f"LET needs batches with 'labels', as causal language modelling has them. Got {', '.join(batch)}."
        )
    return F.pad(labels[:, 1:] != _IGNORED, (0, 1), value=False)


def total(loss: Any) -> Tensor:
    """The scalar that Composer would train on."""
    if isinstance(loss, Mapping):
        return loss["total"].mean() if "total" in loss else total(tuple(loss.values()))
    if isinstance(loss, (tuple, list)):
        return torch.stack([part.mean() for part in loss]).sum()
    return loss.mean()


def plus(loss: Any, term: Tensor) -> Any:
    """``loss + term`` in the type that came in: some callbacks read only tensors, mixtures of experts return dicts."""
    if isinstance(loss, Mapping):
        return {**loss, "total": total(loss) + term}
    if isinstance(loss, (tuple, list)):
        return type(loss)([loss[0] + term, *loss[1:]])
    return loss + term


def _device(state: State) -> torch.device:
    return state.device.tensor_to_device(torch.empty(0)).device


def _tokenizer(state: State) -> Any:
    return getattr(state.model, "tokenizer", None)


def _vocabulary(state: State) -> dict[int, str]:
    tokenizer = _tokenizer(state)
    if tokenizer is None:
        log.warning("the student's model has no tokenizer: whether the teacher shares its token ids is not checked.")
        return {}
    return {index: token for token, index in tokenizer.get_vocab().items()}


def _require_type(name: str, value: Any, types: type | tuple[type, ...], expected: str) -> None:
    if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
        raise TypeError(f"{name} must be {expected}, got {value!r} ({type(value).__name__}).")


def _unknown_keys(algorithm: type[LET], unknown: Mapping[str, Any]) -> str:
    known = [name for name in inspect.signature(algorithm).parameters if name != "unknown"]
    messages = []
    for name in unknown:
        nearest = difflib.get_close_matches(name, known, n=1)
        messages.append(f"{name!r}" + (f" (did you mean {nearest[0]!r}?)" if nearest else ""))
    return f"{algorithm.__name__} has no option {', '.join(messages)}. Its options are {', '.join(known)}."

"""Wait for a run, guide it, end. What the methods share, whatever they do in between.

Only this room, guidance.py, and let.py and distillation.py, which build on them, see State, events and batches.
"""

import dataclasses
import gc
import logging
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from composer import Callback
from composer.core import Algorithm, Event, State, Time
from composer.loggers import Logger
from composer.utils import dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from let_composer.annealing import Schedule
from let_composer.options import Options
from let_composer.student import matmul_parameters
from let_composer.teacher import Teacher, load_teacher
from let_composer.vocabulary import student_vocabulary

__all__ = ["Lifecycle"]

log = logging.getLogger(__name__)

# Options that may differ in a resumed run; of the teacher, the weights are compared instead.
_MAY_DIFFER = {"teacher", "placement", "implementation", "trust_remote_code"}

_BETWEEN_RUNS = {Event.INIT, Event.AFTER_LOAD, Event.FIT_START}
_WITH_A_TEACHER = _BETWEEN_RUNS | {
    Event.BATCH_START,
    Event.BEFORE_TRAIN_BATCH,
    Event.BEFORE_FORWARD,
    Event.AFTER_FORWARD,
    Event.AFTER_LOSS,
    Event.BATCH_END,
}


class Lifecycle(Options, Algorithm):
    """The teacher, which is there as long as the run is guided, and what a checkpoint keeps. With weight 0 there never
    is one. It may come back after the end: in another Trainer, or where the clock was reset.
    """

    prefix: ClassVar[str]  # of metrics and hyperparameters

    def __post_init__(self) -> None:
        self.check()
        self._teacher: Teacher | None = None
        self._closing: _Closing | None = None
        self._reset()
        if self.off:
            _say(f"{type(self).__name__} has weight 0: the run is not guided.")

    @property
    def guiding(self) -> bool:
        """Whether the teacher is loaded and runs in every training forward."""
        return self._teacher is not None

    # ---- what a method brings ----

    def attach(self, model: nn.Module, device: torch.device) -> str:
        """Find what is needed of the student besides its outputs; returns what is guided, in words."""
        return "logits"

    def restart(self) -> None:
        """Forget what was learnt on the way: a run starts."""

    def saved(self) -> dict[str, Any]:
        """What a checkpoint keeps besides, as plain Python values."""
        return {}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Take over what :meth:`saved` returned, from a run with the same teacher."""

    # ---- events ----

    def match(self, event: Event, state: State) -> bool:
        """Whether there is anything to do: never with ``weight: 0``, hardly ever once the teacher is gone."""
        return not self.off and event in (_WITH_A_TEACHER if self.guiding else _BETWEEN_RUNS)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """One event; see :class:`let_composer.LET` for which does what."""
        if event == Event.INIT:
            self._end(state)  # if this instance served another Trainer before
            self._reset()
            self._meet_others(state)
            self.student_parameters = matmul_parameters(state.model)  # before FSDP shards them
        elif event == Event.AFTER_LOAD:
            if state.train_dataloader is not None:  # else it only evaluates, or gets its data in fit()
                self._begin(state, logger, starts=False)
        elif event == Event.FIT_START:
            self._begin(state, logger, starts=True)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain Python values."""
        return {
            **super().state_dict(),
            "options": dataclasses.asdict(self),
            "fingerprint": self._fingerprint,
            "end": None if self.schedule.end is None else self.schedule.end.to_timestring(),
            "batch": self.schedule.batch,
            "saved": self.saved(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the end of the guidance; say where the checkpoint was made with other options."""
        if self.off or "options" not in state:
            return
        old = state["options"]
        for key, new in dataclasses.asdict(self).items():
            if key not in _MAY_DIFFER and old.get(key, new) != new:
                log.warning(
                    f"the checkpoint was made with {self.prefix}.{key}: {old[key]!r}, this run goes on with {new!r}."
                )
        if state["end"] and old["stop"] == self.stop:
            self.schedule.end = Time.from_timestring(state["end"])
        self.schedule.batch = state["batch"]
        self._fingerprint = state["fingerprint"]
        self._loaded = state

    # ---- beginning ----

    def _reset(self) -> None:
        self.schedule = Schedule(self.stop, self.anneal)
        self.others: list[Lifecycle] = []  # guidances of the same run
        self._fingerprint: str | None = None
        self._loaded: dict[str, Any] | None = None  # a checkpoint's state, until the teacher is known
        self.restart()

    def _meet_others(self, state: State) -> None:
        self.others = [a for a in state.algorithms if isinstance(a, Lifecycle) and a is not self]
        if same := [other for other in self.others if other.prefix == self.prefix]:
            raise ValueError(
                f"expected one algorithm that logs under {self.prefix}/, got {self!r} and {len(same)} more. "
                "They would share metrics and a place in checkpoints. Each takes one pair of layers; keep one of them."
            )

    def _begin(self, state: State, logger: Logger, starts: bool) -> None:
        """Guide from here on or not, as the clock says; ``starts`` when training starts right after."""
        reset = self.schedule.notice(state.timestamp.batch.value)
        if reset:  # Composer: algorithms then start from the beginning
            _say(f"the clock was reset: {type(self).__name__} starts anew.")
            self._loaded = None
            self.restart()
        if state.max_duration is not None:
            length = state.dataloader_len
            self.schedule.resolve(state.max_duration, None if length is None else int(length))
        elif starts:
            raise ValueError(
                f"{type(self).__name__} needs max_duration to know when to stop. Give it to the Trainer or to fit()."
            )
        if self.schedule.over(state.timestamp):
            if self.guiding:
                self.retire(state, logger)
            elif starts:
                _say(f"{type(self).__name__} ended at {self.schedule}: the teacher is not loaded.")
            return
        self._check_parallelism(state)
        if not self.guiding:
            self._set_up(state, logger)
            if reset:
                torch.compiler.reset()  # what was compiled without the hook would never call it
        if starts:
            _say(f"{type(self).__name__} guides until {self.schedule}.")
            logger.log_hyperparameters({f"{self.prefix}/stop": str(self.schedule)})

    def _check_parallelism(self, state: State) -> None:
        if state.tp_config is not None:
            raise ValueError(
                f"{type(self).__name__} does not run with tensor parallelism: the ranks of a group may hold parts of "
                "what is compared with the teacher. Leave out parallelism_config['tp'] (tp_config in llm-foundry); "
                "FSDP shards the student as well."
            )
        if self.placement != "shard":
            return
        if dist.get_local_world_size() == 1:
            raise ValueError(
                "placement: shard shares the teacher between the ranks of a node, and needs at least two ranks there. "
                "This node has one. Use placement: replicate, the default."
            )
        if state.auto_microbatching:
            raise ValueError(
                "placement: shard does not work with device_train_microbatch_size: auto, because a rank that runs out "
                "of memory would leave the others waiting. Set a number, or use placement: replicate."
            )

    def _set_up(self, state: State, logger: Logger) -> None:
        model = state.model.module if isinstance(state.model, DistributedDataParallel) else state.model
        assert isinstance(model, nn.Module)
        device = _device(state)
        guided = self.attach(model, device)
        try:
            with torch.random.fork_rng(devices=[]):
                self._teacher = self._find_teacher(model, device)
            self._separates, length = _documents(model)
            if self._separates:
                self._teacher.require_separation(length)
        except BaseException:
            self.release()
            raise
        self._take_over(self._teacher.fingerprint)
        self._closing = _Closing(self)
        state.callbacks.append(self._closing)
        size = self._teacher.parameters
        facts = {"teacher": self.teacher, "teacher_parameters": size, "student_module": guided}
        logger.log_hyperparameters({f"{self.prefix}/{name}": value for name, value in facts.items()})
        found = f"a teacher of {size / 1e6:.1f}M parameters, embeddings apart, for {guided}"
        _say(f"{self.prefix}: {found}; {self!r}")

    def _find_teacher(self, model: nn.Module, device: torch.device) -> Teacher:
        """The teacher of another guidance of this run where it is the same; else a new one."""
        same = [o for o in self.others if not o.off and o.same_teacher(self)]
        for other in same:
            if other._teacher is not None:
                return other._teacher
        return load_teacher(
            self.teacher,
            student_vocabulary(model),
            head=any(method.projected(1) for method in (self, *same)),
            device=device,
            **self.teacher_arguments(),
        )

    def _take_over(self, fingerprint: str) -> None:
        loaded, self._loaded, self._fingerprint = self._loaded, None, fingerprint
        if loaded and loaded["fingerprint"] in (None, fingerprint):
            self.restore(loaded["saved"])
        elif loaded:
            log.warning(
                f"the checkpoint was made with other teacher weights ({loaded['fingerprint']}) than those of "
                f"{self.teacher} ({fingerprint}): what was learnt about the teacher starts anew."
            )

    # ---- ending ----

    def retire(self, state: State, logger: Logger) -> None:
        """Release the teacher, and say so."""
        assert self._teacher is not None
        device = _device(state)
        shared = any(other._teacher is self._teacher for other in self.others)
        returned = 0 if shared else sum(p.nbytes for p in self._teacher.body.parameters())
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        self._end(state)
        gc.collect()  # modules hold reference cycles
        if device.type == "cuda":
            torch.cuda.empty_cache()
            returned = before - torch.cuda.memory_allocated(device)
        returned /= 2**20
        self._log(logger, {"weight": 0.0, "active": 0.0, "memory_returned_mib": returned})
        _say(
            f"{type(self).__name__} ended after batch {state.timestamp.batch.value}: the teacher is released, "
            f"{returned:.1f} MiB of memory returned."
        )

    def release(self) -> None:
        """Let go of student and teacher. Called as often as may be."""
        self._teacher = None

    def _log(self, logger: Logger, metrics: dict[str, float]) -> None:
        logger.log_metrics({f"{self.prefix}/{name}": value for name, value in metrics.items()})

    def _end(self, state: State) -> None:
        self.release()
        if self._closing in state.callbacks:
            state.callbacks.remove(self._closing)
        self._closing = None


class _Closing(Callback):
    """Ends a guidance when its Trainer is closed in the middle. Algorithms are not told of that; callbacks are."""

    def __init__(self, guidance: Lifecycle) -> None:
        self._guidance = guidance

    def close(self, state: State, logger: Logger) -> None:
        if self._guidance._closing is self:  # else it serves another Trainer by now
            self._guidance.release()


def _say(message: str) -> None:
    """Tell the user, also where the root logger shows warnings only, as under llm-foundry's train script."""
    if dist.get_global_rank() == 0:
        package = logging.getLogger("let_composer")
        if package.level == logging.NOTSET:
            package.setLevel(logging.INFO)
        log.info(message)


def _device(state: State) -> torch.device:
    return state.device.tensor_to_device(torch.empty(0)).device


def _documents(model: nn.Module) -> tuple[bool, int]:
    """Whether tokens of a packed row attend to their own document only, as in an MPT with attn_uses_sequence_id; and
    the length of a row.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(attention := getattr(config, "attn_config", None), Mapping):
            return bool(attention.get("attn_uses_sequence_id")), int(getattr(config, "max_seq_len", 1))
    return False, 1

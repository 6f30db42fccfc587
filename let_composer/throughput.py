"""Throughput of guided training, with the teacher's FLOPs counted."""

from collections import deque

from composer import Callback
from composer.callbacks import SpeedMonitor
from composer.core import State
from composer.loggers import Logger

from let_composer.guidance import Guidance

__all__ = ["GuidedThroughput"]


class GuidedThroughput(Callback):
    """Logs what a device computes per second while a teacher guides.

    Counts as ``SpeedMonitor`` does, which knows the student only, and adds the teacher.

    Runs on ``Event.BATCH_START`` and ``BATCH_END``. Logs ``let/throughput/device/flops_per_sec``, and
    ``let/throughput/device/mfu`` where a ``SpeedMonitor`` of the run knows the device's peak. Counts batches of one
    size, padding and full attention included. Silent after the guidance, when the two agree. In an llm-foundry YAML:
    ``callbacks: {guided_throughput: {}}``.

    Args:
        window_size: Number of batches to average over. Default: ``100``, as in ``SpeedMonitor``.
    """

    def __init__(self, window_size: int = 100) -> None:
        self._flops: deque[float] = deque(maxlen=window_size + 1)
        self._seconds: deque[float] = deque(maxlen=window_size + 1)
        self._guiding: list[Guidance] = []

    def batch_start(self, state: State, logger: Logger) -> None:
        """Note who guides: at the end of its last batch a guidance is gone."""
        self._guiding = [a for a in state.algorithms if isinstance(a, Guidance) and a.guiding]

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log the window that ends here."""
        model = getattr(state.model, "module", state.model)
        count = getattr(model, "flops_per_batch", None)
        if not self._guiding or count is None:
            self._flops.clear()
            self._seconds.clear()
            return
        self._flops.append(count(state.batch) + sum(guidance.batch_flops for guidance in self._guiding))
        self._seconds.append(state.timestamp.total_wct.total_seconds())
        if len(self._flops) < (self._flops.maxlen or 0):
            return
        per_second = sum(list(self._flops)[1:]) / (self._seconds[-1] - self._seconds[0])
        metrics = {"throughput/device/flops_per_sec": per_second}
        monitor = next((c for c in state.callbacks if isinstance(c, SpeedMonitor)), None)
        if monitor is not None and monitor.gpu_flops_available:
            metrics["throughput/device/mfu"] = per_second / monitor.gpu_flops_available
        for guidance in self._guiding:
            logger.log_metrics({f"{guidance.prefix}/{name}": value for name, value in metrics.items()})

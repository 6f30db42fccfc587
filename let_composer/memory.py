"""What a run keeps on each GPU, estimated from what was counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from omegaconf import DictConfig

if TYPE_CHECKING:
    import torch

    from let_composer.counting import StudentCount, TeacherCount

__all__ = ["HARDWARE", "Hardware", "checkpointing", "fits", "memory"]


@dataclass(frozen=True)
class Hardware:
    """A GPU: dense bf16 peak in TFLOP/s, and memory in GiB as torch reports it."""

    tflops: float
    memory: float


# Peaks from NVIDIA's data sheets (SXM, dense).
HARDWARE = {
    "a100-40gb": Hardware(312, 39),
    "a100": Hardware(312, 79),
    "h100": Hardware(989, 79),
    "h200": Hardware(989, 139),
    "b200": Hardware(2250, 178),
}
CHUNK = 1024  # tokens that distillation compares at a time
NODE = 8  # GPUs over which a sharded teacher lies
STATES = {"adam": 8, "lion": 4, "sgd": 4}  # bytes of the optimizer's state a parameter, in fp32


def memory(
    config: DictConfig,
    gpus: int,
    student: StudentCount,
    teacher: TeacherCount | None,
    placement: str,
    tokens: int,
    dtype: torch.dtype,
    distills: bool,
) -> dict[str, float]:
    """GiB on a GPU by part, of the run of a YAML with ``tokens`` in a microbatch, for which both were counted; with RKD
    or SALT it distills.

    Raises:
        ValueError: For a sharding strategy or an optimizer that is not known here.
    """
    fsdp = config.get("fsdp_config") or {}
    strategy = str(fsdp.get("sharding_strategy", "FULL_SHARD")).upper() if fsdp else "NO_SHARD"
    if strategy not in ("FULL_SHARD", "NO_SHARD"):
        raise ValueError(f"planning knows sharding_strategy FULL_SHARD and NO_SHARD, got {strategy}.")
    optimizer = str(config.optimizer.name)
    states = [size for part, size in STATES.items() if part in optimizer]
    if not states:
        raise ValueError(f"planning knows optimizers of the kinds {', '.join(STATES)}, got {optimizer!r}.")
    element, shards = dtype.itemsize, gpus if strategy == "FULL_SHARD" else 1
    parts = {
        "weights": 4 * student.parameters / shards,
        "gradients": 4 * student.trained / shards,
        "optimizer": states[0] * student.trained / shards,
        # Two units in the computing type, one ahead, and the gradient of one.
        "gathered": 3 * element * student.largest_unit if shards > 1 else element * student.parameters * (element < 4),
        "activations": student.checkpointed_activations if checkpointing(config) else student.activations,
    }
    if teacher:
        sharded = placement == "shard" and gpus > 1
        held = teacher.parameters / min(gpus, NODE) + 2 * teacher.largest_unit if sharded else teacher.parameters
        parts["teacher"] = element * (held + tokens * teacher.width) + teacher.activations
        # LET's sample of logits is gone before the backward pass, whose gradient of the logits takes more. Distillation
        # has there one more such gradient; before, a chunk of both models' logits, in this type and twice in fp32.
        if distills:
            parts["distillation"] = teacher.logits * max(tokens * element, 2 * min(tokens, CHUNK) * (element + 8))
    return {part: size / 2**30 for part, size in parts.items()}


def fits(total: float, capacity: float | None) -> bool:
    """Whether so many GiB leave a tenth of the GPU free; yes if it is not known."""
    return capacity is None or total < 0.9 * capacity


def checkpointing(config: DictConfig) -> bool:
    """Whether blocks are computed again in the backward pass."""
    return bool((config.get("fsdp_config") or {}).get("activation_checkpointing", False))

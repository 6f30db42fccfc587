"""What a run keeps on each GPU, estimated from what was counted."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig

from let_composer.counting import StudentCount, TeacherCount

__all__ = ["GIB", "HARDWARE", "Hardware", "checkpointing", "fits", "memory"]

GIB = 2**30


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
CHUNK = 1024  # tokens whose logits distillation holds at a time


def memory(
    config: DictConfig,
    gpus: int,
    student: StudentCount,
    teacher: TeacherCount | None,
    tokens: int,
    dtype: torch.dtype,
    capacity: float | None,
) -> tuple[dict[str, float], dict[str, float], str | None]:
    """Bytes on a GPU by part, what other choices would take, and the teacher's placement.

    Args:
        config: The YAML.
        gpus: How many.
        student: Counted with one microbatch.
        teacher: The same, or ``None``.
        tokens: Of a microbatch.
        dtype: In which the models compute.
        capacity: GiB of a GPU, or ``None`` if it is not known.

    Raises:
        ValueError: For a sharding strategy or an optimizer that is not known here.
    """
    element, shards, recompute = dtype.itemsize, _shards(config, gpus), checkpointing(config)
    parts: dict[str, float] = {
        "weights": 4 * student.parameters / shards,
        "gradients": 4 * student.trained / shards,
        "optimizer": _optimizer_bytes(config) * student.trained / shards,
        # Two units in the computing type, one ahead, and the gradient of one.
        "gathered": 3 * element * student.largest_unit if shards > 1 else element * student.parameters * (element < 4),
        "activations": student.checkpointed_activations if recompute else student.activations,
    }
    other: dict[str, float] = {
        "activations without checkpointing" if recompute else "activations with checkpointing": (
            student.activations if recompute else student.checkpointed_activations
        )
    }
    if not teacher:
        return parts, other, None
    if teacher.logits:  # of both models, in the computing type and twice in fp32
        parts["logits of a chunk"] = 2 * min(tokens, CHUNK) * teacher.logits * (element + 8)
    run = teacher.activations + tokens * teacher.width * element
    replicated = element * teacher.parameters + run
    sharded = element * (teacher.parameters / gpus + 2 * teacher.largest_unit) + run
    fit = fits((sum(parts.values()) + replicated) / GIB, capacity)
    placement = "replicate" if fit or teacher.logits or gpus == 1 or sharded >= replicated else "shard"
    chosen, left = (replicated, sharded) if placement == "replicate" else (sharded, replicated)
    parts["teacher"] = chosen
    if not teacher.logits:
        other[f"teacher, the other way ({'shard' if placement == 'replicate' else 'replicate'})"] = left
    return parts, other, placement


def fits(total: float, capacity: float | None) -> bool:
    """Whether so many GiB leave a tenth of the GPU free; yes if it is not known."""
    return capacity is None or total < 0.9 * capacity


def checkpointing(config: Mapping[Any, Any]) -> bool:
    """Whether blocks are computed again in the backward pass."""
    return bool((config.get("fsdp_config") or {}).get("activation_checkpointing", False))


def _shards(config: Mapping[Any, Any], gpus: int) -> int:
    fsdp = config.get("fsdp_config") or {}
    strategy = str(fsdp.get("sharding_strategy", "FULL_SHARD")).upper() if fsdp else "NO_SHARD"
    if strategy not in ("FULL_SHARD", "NO_SHARD"):
        raise ValueError(f"planning knows sharding_strategy FULL_SHARD and NO_SHARD, got {strategy}.")
    return gpus if strategy == "FULL_SHARD" else 1


def _optimizer_bytes(config: Mapping[Any, Any]) -> int:
    """Bytes of state a parameter, in fp32."""
    name = str(config["optimizer"]["name"])
    states: Iterable[tuple[str, int]] = (("adam", 8), ("lion", 4), ("sgd", 4))
    for part, size in states:
        if part in name:
            return size
    raise ValueError(f"planning knows optimizers of the kinds adam, lion and sgd, got {name!r}.")

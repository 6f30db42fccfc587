"""What a run will cost, before it costs anything: parameters, FLOPs, memory on each GPU, and LET's break-even.

    python scripts/plan.py yamls/let_7b.yaml --gpus 32 --gpu h100 [key=value ...] [--out plan.json]

Builds student and teacher on the meta device and counts there what a step multiplies (attention without the causal
mask, as is customary) and what it keeps for the backward pass; reads no data and no weights. Memory is an estimate:
what the allocator wastes and what NCCL and CUDA take for themselves is not in it.
"""

import argparse
import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
import torch.nn.functional as F
from composer import Time
from llmfoundry.utils.builders import build_composer_model, build_tokenizer
from omegaconf import DictConfig
from omegaconf import OmegaConf as om
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from train import load
from transformers import GPTNeoXConfig

from let_composer import LET
from let_composer.annealing import parse_stop, resolve_stop
from let_composer.options import read_options
from let_composer.student import find_blocks, matmul_parameters
from let_composer.teacher import build_body

__all__ = [
    "HARDWARE",
    "Hardware",
    "Plan",
    "count_student",
    "count_teacher",
    "main",
    "make_plan",
    "table",
    "teacher_config",
]

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

# Shapes of the teachers in yamls/, so that planning needs no network: width, blocks, heads.
PYTHIA = {
    "14m": (128, 6, 4),
    "31m": (256, 6, 8),
    "70m": (512, 6, 8),
    "160m": (768, 12, 12),
    "410m": (1024, 24, 16),
    "1b": (2048, 16, 8),
}


@dataclass
class StudentCount:
    """The student, counted on the meta device; bytes are those of one microbatch in the type it computes in."""

    parameters: int
    matmul_parameters: int
    width: int
    flops: float  # of one token, forward and backward, without recomputation
    block_flops: float  # of one token, forward, in the blocks alone: what activation checkpointing does again
    largest_unit: int  # parameters that are gathered at a time: of a block, or of all that is outside of the blocks
    activations: int  # kept for the backward pass
    checkpointed_activations: int  # with every block recomputed


@dataclass
class TeacherCount:
    """The teacher's body up to the layer that is used, counted on the meta device."""

    parameters: int  # embeddings included
    matmul_parameters: int
    width: int
    flops: float  # of one token, forward
    largest_unit: int
    activations: int  # the most that one block keeps at a time


@dataclass
class Plan:
    """What a run costs. Times need a GPU named; memory in GiB on each GPU."""

    run: str
    gpus: int
    gpu: str | None
    utilization: float
    sequence_length: int
    global_batch: int
    microbatch: int
    steps: float
    tokens: float
    student: StudentCount
    teacher: TeacherCount | None
    teacher_name: str | None
    guided_steps: float
    guided_tokens: float
    step_flops: float  # of a plain step on all GPUs, recomputation included
    guided_overhead: float  # guided step / plain step - 1, by FLOPs
    run_overhead: float
    break_even_tokens: float  # that LET must save to pay for its teacher
    run_flops: float
    hours: float | None
    memory: dict[str, float]
    memory_alternatives: dict[str, float]
    capacity: float | None
    placement: str | None


def count_student(model: nn.Module, batch: int, length: int, fused_attention: bool) -> StudentCount:
    """Count a model that lives on the meta device.

    Args:
        model: An llm-foundry model, in the type it computes in.
        batch: Sequences of a microbatch.
        length: Tokens of a sequence.
        fused_attention: Whether attention keeps no ``[S, S]`` matrices, as flash attention does not.
    """
    blocks = find_blocks(model)[1]
    sections: list[dict[int, int]] = [{} for _ in range(len(blocks) + 1)]  # the last: outside of the blocks
    inputs = [0] * len(blocks)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    now = [len(blocks)]

    def enter(index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            now[0] = index
            x = args[0] if args else kwargs.get("x", kwargs.get("hidden_states"))
            inputs[index] = x.numel() * x.element_size()

        return hook

    def leave(*_: Any) -> None:
        now[0] = len(blocks)

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        square = tensor.ndim >= 2 and tensor.shape[-1] == tensor.shape[-2] == length
        if storage._cdata not in own and not (fused_attention and square):
            sections[now[0]][storage._cdata] = storage.nbytes()
        return tensor

    handles = []
    for index, block in enumerate(blocks):
        handles.append(block.register_forward_pre_hook(enter(index), with_kwargs=True))
        handles.append(block.register_forward_hook(leave))
    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    model.train()
    saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with _meta(), saving, FlopCounterMode(display=False) as forward:
        logits = model({"input_ids": ids})["logits"]
        loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten())  # the model's own looks at values
    for handle in handles:
        handle.remove()
    head = (
        2 * logits.numel() * logits.element_size()
    )  # the trainer holds them until the backward pass is over; gradient
    kept = [sum(section.values()) for section in sections]
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    model.zero_grad(set_to_none=True)
    in_blocks = [sum(p.numel() for p in block.parameters()) for block in blocks]
    tokens = batch * length
    width = inputs[0] // (tokens * next(model.parameters()).element_size())
    parameters = sum(p.numel() for p in model.parameters())
    return StudentCount(
        parameters=parameters,
        matmul_parameters=matmul_parameters(model),
        width=width,
        flops=(forward.get_total_flops() + backward.get_total_flops()) / tokens,
        block_flops=(forward.get_total_flops() - 2 * width * logits.numel()) / tokens,
        largest_unit=max(*in_blocks, parameters - sum(in_blocks)),
        activations=sum(kept) + head,
        checkpointed_activations=sum(inputs) + max(kept[:-1]) + kept[-1] + head,
    )


def count_teacher(body: Any, batch: int, length: int) -> TeacherCount:
    """Count a teacher's body that lives on the meta device, see :func:`let_composer.teacher.build_body`.

    Args:
        body: In the type it computes in.
        batch: Sequences of a microbatch.
        length: Tokens of a sequence.
    """
    blocks = find_blocks(body)[1]
    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    sizes = [0]

    def add(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            sizes[0] += output.numel() * output.element_size()

    handles = [module.register_forward_hook(add) for module in blocks[0].modules() if not list(module.children())]
    with _meta(), torch.no_grad(), FlopCounterMode(display=False) as flops:
        width = body(input_ids=ids, use_cache=False).last_hidden_state.shape[-1]
    for handle in handles:
        handle.remove()
    in_blocks = [sum(p.numel() for p in block.parameters()) for block in blocks]
    parameters = sum(p.numel() for p in body.parameters())
    return TeacherCount(
        parameters=parameters,
        matmul_parameters=matmul_parameters(body),
        width=width,
        flops=flops.get_total_flops() / ids.numel(),
        largest_unit=max(*in_blocks, parameters - sum(in_blocks)),
        activations=sizes[0],
    )


def make_plan(config: DictConfig, gpus: int, gpu: str | None, hardware: Hardware | None, utilization: float) -> Plan:
    """Plan the run of an llm-foundry YAML.

    Args:
        config: As :func:`train.load` reads it; keys that say where data lies may be missing.
        gpus: How many GPUs.
        gpu: Their name, for the report.
        hardware: Their figures, or ``None``: then no times and no verdict on memory.
        utilization: Share of the peak that a step reaches, recomputation counted as work; an assumption.

    Raises:
        ValueError: If the batch does not divide by the GPUs, or the YAML lacks a number that planning needs.
    """
    length = int(_number(config, "max_seq_len"))
    batch = int(_number(config, "global_train_batch_size"))
    if batch % gpus:
        raise ValueError(
            f"global_train_batch_size {batch} does not divide by {gpus} GPUs. Choose a number of GPUs that divides it."
        )
    microbatch = config.get("device_train_microbatch_size", "auto")
    microbatch = min(int(microbatch), batch // gpus) if microbatch != "auto" else 1
    precision = str(config.get("precision", "amp_bf16"))
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    element = dtype.itemsize

    cfg = cast(dict[str, Any], om.to_container(config.model, resolve=True))
    name = cfg.pop("name")
    fused = cfg.get("attn_config", {}).get("attn_impl", "flash") == "flash"
    cfg |= {"init_device": "meta", "use_train_metrics": False}
    tokenizer = None
    if name == "mpt_causal_lm":
        cfg |= {"attn_config": {**cfg.get("attn_config", {}), "attn_impl": "torch"}, "loss_fn": "torch_crossentropy"}
        if cfg["attn_config"].get("rope_impl") == "dail":  # needs flash-attn; multiplies as much
            cfg["attn_config"] |= {"rope_impl": "hf"}
    else:  # a model of the hub asks its tokenizer for the number of tokens
        entry = cast(dict[str, Any], om.to_container(config.tokenizer, resolve=True))
        tokenizer = build_tokenizer(entry["name"], entry.get("kwargs", {}))
    student = count_student(build_composer_model(name, cfg, tokenizer).to(dtype), microbatch, length, fused)

    tokens_a_step = batch * length
    duration = Time.from_timestring(str(config.max_duration))
    steps = _steps(duration, batch, tokens_a_step)
    checkpointing = bool((config.get("fsdp_config") or {}).get("activation_checkpointing", False))
    step_flops = tokens_a_step * (student.flops + checkpointing * student.block_flops)

    teacher, teacher_name, guided = None, None, 0.0
    options = (config.get("algorithms") or {}).get("let")
    if options is not None:
        guidance = read_options(LET, cast(dict[str, Any], om.to_container(options, resolve=True)))
        teacher_name = guidance.teacher
        arguments = guidance.teacher_arguments()
        body = build_body(teacher_config(teacher_name), arguments["layer"], arguments["trust_remote_code"])
        context = getattr(body.config, "max_position_embeddings", length) or length
        teacher = count_teacher(body.to(dtype), microbatch, min(length, context))
        if not guidance.off:
            stop = parse_stop(guidance.stop)
            end = resolve_stop(stop, duration, None)
            guided = min(steps, _steps(end, batch, tokens_a_step))
    overhead = teacher.flops * tokens_a_step / step_flops if teacher else 0.0
    run_flops = step_flops * (steps + guided * overhead)

    shards = _shards(config, gpus)
    parts: dict[str, float] = {
        "weights": 4 * student.parameters / shards,
        "gradients": 4 * student.parameters / shards,
        "optimizer": _optimizer_bytes(config) * student.parameters / shards,
        # Two units in the computing type, one ahead, and the gradient of one.
        "gathered": 3 * element * student.largest_unit if shards > 1 else element * student.parameters * (element < 4),
        "activations": student.checkpointed_activations if checkpointing else student.activations,
    }
    other: dict[str, float] = {
        "activations without checkpointing" if checkpointing else "activations with checkpointing": (
            student.activations if checkpointing else student.checkpointed_activations
        )
    }
    placement = None
    capacity = hardware.memory if hardware else None
    if teacher:
        target = microbatch * length * teacher.width * element
        run = teacher.activations + target
        replicated = element * teacher.parameters + run
        sharded = element * (teacher.parameters / gpus + 2 * teacher.largest_unit) + run
        fits = capacity is None or (sum(parts.values()) + replicated) / GIB < 0.9 * capacity
        placement = "replicate" if fits or gpus == 1 or sharded >= replicated else "shard"
        parts["teacher"] = sharded if placement == "shard" else replicated
        other["teacher, the other way (" + ("replicate)" if placement == "shard" else "shard)")] = (
            replicated if placement == "shard" else sharded
        )
    return Plan(
        run=str(config.get("run_name", "")),
        gpus=gpus,
        gpu=gpu,
        utilization=utilization,
        sequence_length=length,
        global_batch=batch,
        microbatch=microbatch,
        steps=steps,
        tokens=steps * tokens_a_step,
        student=student,
        teacher=teacher,
        teacher_name=teacher_name,
        guided_steps=guided,
        guided_tokens=guided * tokens_a_step,
        step_flops=step_flops,
        guided_overhead=overhead,
        run_overhead=overhead * guided / steps,
        break_even_tokens=overhead * guided * tokens_a_step,
        run_flops=run_flops,
        hours=run_flops / (gpus * hardware.tflops * 1e12 * utilization) / 3600 if hardware else None,
        memory={part: size / GIB for part, size in parts.items()},
        memory_alternatives={part: size / GIB for part, size in other.items()},
        capacity=capacity,
        placement=placement,
    )


def table(plan: Plan) -> str:
    """The plan as text."""
    student, teacher = plan.student, plan.teacher
    rows = [
        ("run", plan.run),
        ("student", f"{student.parameters / 1e6:,.1f}M parameters, {student.flops / 1e9:,.2f} GFLOP a token"),
    ]
    if teacher:
        rows.append(
            (
                "teacher",
                f"{plan.teacher_name}: {teacher.matmul_parameters / 1e6:,.1f}M parameters without embeddings and head, "
                f"{teacher.flops / 1e9:,.3f} GFLOP a token",
            )
        )
    rows += [
        (
            "steps",
            f"{plan.steps:,.0f} of {plan.global_batch} x {plan.sequence_length}: {plan.tokens / 1e9:,.2f}B tokens",
        ),
        ("plain step", f"{plan.step_flops / 1e15:,.2f} PFLOP, recomputation included"),
    ]
    if teacher:
        rows += [
            ("guided", f"{plan.guided_steps:,.0f} steps, {plan.guided_tokens / 1e9:,.2f}B tokens"),
            ("guided step", f"+{plan.guided_overhead:.2%} by FLOPs; the whole run +{plan.run_overhead:.2%}"),
            (
                "break-even",
                f"LET pays once it saves {plan.break_even_tokens / 1e9:,.3f}B tokens, "
                f"{plan.break_even_tokens / plan.tokens:.2%} of the run",
            ),
        ]
    rows.append(("whole run", f"{plan.run_flops / 1e18:,.1f} EFLOP"))
    if plan.hours is not None:
        rows.append(
            (
                "time",
                f"{plan.hours:,.1f} h on {plan.gpus} x {plan.gpu}, {plan.hours * plan.gpus:,.0f} GPU hours, "
                f"if {plan.utilization:.0%} of the peak is reached (an assumption)",
            )
        )
    total = sum(plan.memory.values())
    rows.append(("memory, GiB a GPU", f"{total:,.1f} (estimate), microbatch {plan.microbatch}"))
    rows += [(f"  {part}", f"{size:,.2f}") for part, size in plan.memory.items()]
    rows += [(f"  ({part})", f"{size:,.2f}") for part, size in plan.memory_alternatives.items()]
    if plan.placement:
        rows.append(("placement", plan.placement))
    if plan.capacity is not None:
        rows.append(("verdict", _verdict(total, plan)))
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def main(arguments: list[str] | None = None) -> Plan:
    """Command line of the module's docstring; returns the plan it printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("yaml", help="a training YAML of llm-foundry")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for scripts/train.py")
    parser.add_argument("--gpus", type=int, default=8, help="how many (default: 8)")
    parser.add_argument("--gpu", help=f"one of {', '.join(HARDWARE)}, or any name with --tflops and --memory")
    parser.add_argument("--tflops", type=float, help="dense peak of the GPU in the run's precision, TFLOP/s")
    parser.add_argument("--memory", type=float, help="memory of the GPU, GiB")
    parser.add_argument(
        "--utilization", type=float, default=0.4, help="share of the peak that a step reaches (default: 0.4)"
    )
    parser.add_argument("--out", type=Path, help="also write the plan as JSON")
    args = parser.parse_intermixed_args(arguments)
    hardware = None
    if args.tflops or args.memory:
        if not (args.tflops and args.memory):
            parser.error("--tflops and --memory go together")
        hardware = Hardware(args.tflops, args.memory)
    elif args.gpu:
        hardware = HARDWARE.get(args.gpu)
        if hardware is None:
            parser.error(
                f"no figures for {args.gpu!r}: give its dense peak with --tflops and its memory in GiB with --memory, "
                f"or choose one of {', '.join(HARDWARE)}"
            )
    if args.gpus < 1:
        parser.error(f"--gpus must be at least 1, got {args.gpus}")
    plan = make_plan(load(args.yaml, args.overrides), args.gpus, args.gpu, hardware, args.utilization)
    print(table(plan))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        part = args.out.with_suffix(args.out.suffix + ".tmp")
        part.write_text(json.dumps(asdict(plan), indent=2) + "\n")
        os.replace(part, args.out)
    return plan


@contextlib.contextmanager
def _meta() -> Iterator[None]:
    """Let models run on the meta device, for which torch has no autocast."""
    with mock.patch.object(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext()):
        yield


def _verdict(total: float, plan: Plan) -> str:
    capacity = cast(float, plan.capacity)
    if total < 0.9 * capacity:
        return f"fits in {capacity:.0f} GiB"
    excess = total - 0.9 * capacity
    return (
        f"does not fit: {total:,.1f} of {capacity:.0f} GiB, and a tenth should stay free; {excess:,.1f} GiB too much. "
        "A smaller microbatch, activation checkpointing or more GPUs help."
    )


def _number(config: Mapping[Any, Any], key: str) -> float:
    if (value := config.get(key)) is None:
        raise ValueError(f"the YAML has no {key}, which planning needs. Add it, or give {key}=... on the command line.")
    return float(value)


def _steps(time: Time, batch: int, tokens: int) -> float:
    per_step = {"ba": 1, "sp": batch, "tok": tokens}
    if time.unit.value not in per_step:
        raise ValueError(
            f"expected max_duration and stop in ba, sp, tok or dur, got {time.to_timestring()}. How many batches an "
            "epoch has is known only to whoever reads the data: give max_duration=...ba."
        )
    return float(time.value) / per_step[time.unit.value]


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


def teacher_config(name: str) -> str | GPTNeoXConfig:
    """The teacher's name, or its shape where that is known here, so that no network is needed."""
    size = name.removeprefix("EleutherAI/pythia-").partition("@")[0]
    if size not in PYTHIA or not name.startswith("EleutherAI/"):
        return name
    width, blocks, heads = PYTHIA[size]
    return GPTNeoXConfig(
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        vocab_size=50304,
    )


if __name__ == "__main__":
    main()

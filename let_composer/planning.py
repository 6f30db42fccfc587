"""What a run will cost, before it costs anything: parameters, FLOPs, memory on each GPU, and the teacher's break-even.

  let-composer plan yamls/let_7b.yaml --gpus 32 --gpu h100 --price 2.5
  let-composer plan yamls/let_7b.yaml algorithms.let.teacher=EleutherAI/pythia-410m device_train_microbatch_size=auto

Builds student and teacher on the meta device and counts there what a step multiplies (attention without the causal
mask, as is customary) and what it keeps for the backward pass; reads no data and no weights. Memory is an estimate:
what the allocator wastes and what NCCL and CUDA take for themselves is not in it. Evaluation takes time on top.
"""

import argparse
import inspect
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from omegaconf import DictConfig
from omegaconf import OmegaConf as om

from let_composer.configuration import load, quiet, read_methods, require
from let_composer.files import write_json
from let_composer.names import refuse_unknown

__all__ = ["HARDWARE", "Hardware", "Plan", "add_arguments", "make_plan", "run", "table"]


@dataclass(frozen=True)
class Hardware:
    """A GPU: dense bf16 peak in TFLOP/s, and memory in GiB as torch reports it."""

    name: str
    tflops: float
    memory: float


# Peaks from NVIDIA's data sheets (SXM, dense).
FIGURES = {"a100-40gb": (312, 39), "a100": (312, 79), "h100": (989, 79), "h200": (989, 139), "b200": (2250, 178)}
HARDWARE = {name: Hardware(name, *figures) for name, figures in FIGURES.items()}


class Plan(SimpleNamespace):
    """What a run costs. Times need a GPU named, money a price; memory in GiB on each GPU."""


def make_plan(
    config: DictConfig, gpus: int, hardware: Hardware | None, utilization: float, price: float | None = None
) -> Plan:
    """Plan the run of a YAML, in which keys that say where data lies may be missing.

    Args:
        config: As :func:`let_composer.configuration.load` reads it.
        gpus: How many.
        hardware: Which, or ``None``: then no times and no verdict on memory.
        utilization: Share of the peak that a step reaches, recomputation counted as work.
        price: Of a GPU for an hour. Default: ``None``.

    Raises:
        ValueError: If the batch does not divide by the GPUs, the YAML lacks what planning needs, has a key that nobody
            reads, or a model that planning cannot count.
    """
    with quiet():
        import torch  # here, because --help should not wait for it
        from composer import Time

        from let_composer.annealing import parse_stop, resolve_stop
        from let_composer.counting import build_student, count_student, count_teacher, memory, teacher_config
        from let_composer.teacher import build_body

        _check_keys(config)
        length, batch = int(config.max_seq_len), int(config.global_train_batch_size)
        if batch % gpus:
            raise ValueError(f"global_train_batch_size {batch} does not divide by {gpus} GPUs. Change one of them.")
        dtype = torch.float32 if str(config.get("precision", "amp_bf16")) == "fp32" else torch.bfloat16
        duration, tokens_a_step = Time.from_timestring(str(config.max_duration)), batch * length
        steps = _steps(duration, batch, tokens_a_step)
        methods = {name: own for name, own in read_methods(config).items() if not own.off}
        options = next(iter(methods.values()), None)
        stops = [resolve_stop(parse_stop(own.stop), duration, None) for own in methods.values()]
        guided = min(steps, max((_steps(stop, batch, tokens_a_step) for stop in stops), default=0.0))
        body, context = None, length
        if options:
            if not all(map(options.same_teacher, methods.values())):
                raise ValueError("planning knows one teacher: give all methods the same, with the same options.")
            layer = options.teacher_arguments()["layer"]
            body = build_body(teacher_config(options.teacher), layer, options.trust_remote_code).to(dtype)
            context = min(length, getattr(body.config, "max_position_embeddings", length) or length)
        checkpointing = bool(om.select(config, "fsdp_config.activation_checkpointing"))
        student_model, fused = build_student(config, dtype)
        given = config.get("device_train_microbatch_size", "auto")
        microbatch = batch // gpus if given == "auto" else min(int(given), batch // gpus)
        while True:  # auto halves the microbatch until it fits, as Composer does
            student = count_student(student_model, microbatch, length, fused, checkpointing)
            share = max((m.projected(length) for m in methods.values()), default=0) / length
            teacher = count_teacher(body, microbatch, context, round(microbatch * context * share)) if options else None
            parts = memory(config, methods, gpus, student, teacher, microbatch * length, dtype.itemsize)
            fits = hardware is None or sum(parts.values()) < 0.9 * hardware.memory
            if given != "auto" or microbatch == 1 or fits:
                break
            microbatch //= 2
    step_flops = tokens_a_step * (student.flops + student.recomputed_flops)
    overhead = teacher.flops * tokens_a_step / step_flops if teacher else 0.0
    run_flops = step_flops * (steps + guided * overhead)
    hours = run_flops / (gpus * hardware.tflops * 1e12 * utilization) / 3600 if hardware else None
    return Plan(
        run=str(config.get("run_name", "")),
        gpus=gpus,
        hardware=hardware,
        utilization=utilization,
        sequence_length=length,
        global_batch=batch,
        microbatch=microbatch,
        auto=given == "auto",  # whether the microbatch is planning's choice
        steps=steps,
        tokens=steps * tokens_a_step,
        student=student,
        teacher=teacher,
        teacher_name=options.teacher if options else None,
        methods=list(methods),  # that the teacher serves: let, rkd, salt
        guided_steps=guided,
        guided_tokens=guided * tokens_a_step,
        step_flops=step_flops,  # of a plain step on all GPUs, recomputation included
        guided_overhead=overhead,  # guided step / plain step - 1, by FLOPs
        break_even_tokens=overhead * guided * tokens_a_step,  # that guidance must save to pay for its teacher
        run_flops=run_flops,
        hours=hours,
        price=hours * gpus * price if hours is not None and price is not None else None,
        memory=parts,
        fits=fits if hardware else None,  # with a tenth of the GPU free
    )


def table(plan: Plan) -> str:
    """The plan as text."""
    student, teacher, hardware = plan.student, plan.teacher, plan.hardware
    trained = "" if student.trained == student.parameters else f" ({student.trained / 1e6:,.1f}M trained)"
    total, share = sum(plan.memory.values()), plan.break_even_tokens / plan.tokens
    whole = "" if hardware else ": the whole batch of a GPU; --gpu finds what fits"
    auto = f", auto{whole}" if plan.auto else ""
    rows = {
        "run": plan.run,
        "student": f"{student.parameters / 1e6:,.1f}M parameters{trained}, {student.flops / 1e9:,.2f} GFLOP a token",
        "steps": f"{plan.steps:,.0f} of {plan.global_batch} x {plan.sequence_length}: {plan.tokens / 1e9:,.2f}B tokens",
        "plain step": f"{plan.step_flops / 1e15:,.2f} PFLOP, recomputation included",
    }
    if teacher:
        rows["teacher"] = (
            f"{plan.teacher_name} for {' and '.join(plan.methods)}: {teacher.matmul_parameters / 1e6:,.1f}M parameters "
            f"without embeddings and head, {teacher.flops / 1e9:,.3f} GFLOP a token"
        )
        rows["guided"] = f"{plan.guided_steps:,.0f} steps, {plan.guided_tokens / 1e9:,.2f}B tokens"
        rows["guided step"] = f"+{plan.guided_overhead:.2%} by FLOPs; the whole run +{share:.2%}"
        rows["break-even"] = f"the teacher pays once it saves {plan.break_even_tokens / 1e9:,.3f}B tokens"
    rows["whole run"] = f"{plan.run_flops / 1e18:,.1f} EFLOP"
    if hardware:
        rows["time"] = (
            f"{plan.hours:,.1f} h on {plan.gpus} x {hardware.name}, {plan.hours * plan.gpus:,.0f} GPU hours, "
            f"if {plan.utilization:.0%} of the peak is reached (an assumption)"
        )
    if plan.price is not None:
        rows["price"] = f"{plan.price:,.0f}, of it {plan.price * share / (1 + share):,.0f} for the teacher"
    rows["memory, GiB a GPU"] = f"{total:,.1f} (estimate), microbatch {plan.microbatch}{auto}"
    rows |= {f"  {part}": f"{size:,.2f}" for part, size in plan.memory.items()}
    if hardware:
        rows["verdict"] = f"fits in {hardware.memory:.0f} GiB"
        if not plan.fits:
            rows["verdict"] = (
                f"does not fit: {total:,.1f} of {hardware.memory:.0f} GiB, and a tenth should stay free. A smaller "
                "microbatch, activation checkpointing, more GPUs and placement: shard for the teacher help."
            )
    width = max(map(len, rows))
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows.items())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``let-composer plan``."""
    parser.add_argument("yaml", help="a training YAML of llm-foundry")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for scripts/train.py")
    parser.add_argument("--gpus", type=int, default=8, help="how many (default: %(default)s)")
    parser.add_argument("--gpu", help=f"one of {', '.join(HARDWARE)}, or any name with --tflops and --memory")
    parser.add_argument("--tflops", type=float, help="dense peak of the GPU in the run's precision, TFLOP/s")
    parser.add_argument("--memory", type=float, help="memory of the GPU, GiB")
    parser.add_argument("--price", type=float, help="of one GPU for an hour, in any currency")
    parser.add_argument("--utilization", type=float, default=0.4, help="share of the peak reached (default: 0.4)")
    parser.add_argument("--out", type=Path, help="also write the plan as JSON")


def run(args: argparse.Namespace) -> None:
    """Carry out ``let-composer plan``.

    Raises:
        ValueError: For arguments that make no plan, and as :func:`make_plan`.
    """
    hardware = None
    if bool(args.tflops) != bool(args.memory):
        raise ValueError("--tflops and --memory go together.")
    if args.tflops:
        hardware = Hardware(args.gpu or "GPU", args.tflops, args.memory)
    elif args.gpu:
        refuse_unknown("the table of GPUs (--tflops and --memory describe any other)", [args.gpu], HARDWARE)
        hardware = HARDWARE[args.gpu]
    for name in ("gpus", "price", "utilization"):
        if (value := getattr(args, name)) is not None and value <= 0:
            raise ValueError(f"expected --{name} above 0, got {value}.")
    if args.price is not None and hardware is None:
        raise ValueError("--price needs the GPU's speed: give --gpu too.")
    with quiet():
        config = load(args.yaml, args.overrides)
    plan = make_plan(config, args.gpus, hardware, args.utilization, args.price)
    print(table(plan))
    if args.out:
        write_json(args.out, plan)


def _check_keys(config: DictConfig) -> None:
    """Refuse keys that neither llm-foundry nor Composer reads, and so planning does not either."""
    from composer.utils.parallelism import FSDPConfig
    from llmfoundry.models.mpt import ComposerMPTCausalLM, MPTConfig
    from llmfoundry.utils.config_utils import TRAIN_CONFIG_KEYS
    from transformers import PretrainedConfig

    needed = ("model.name", "max_seq_len", "max_duration", "global_train_batch_size", "optimizer.name")
    require(config, needed, "planning")
    refuse_unknown("the YAML", config, TRAIN_CONFIG_KEYS)
    refuse_unknown("fsdp_config", config.get("fsdp_config") or {}, FSDPConfig.__annotations__)
    if config.get("tp_config"):
        raise ValueError("planning does not know tensor parallelism. Set tp_config=null; LET refuses it too.")
    if config.model.get("name") == "mpt_causal_lm":
        builders = (MPTConfig, ComposerMPTCausalLM, PretrainedConfig)
        known = {name for builder in builders for name in inspect.signature(builder).parameters}
        refuse_unknown("model", config.model, {*known, *PretrainedConfig().to_dict(), "name"})


def _steps(time: Any, batch: int, tokens: int) -> float:
    per_step = {"ba": 1, "sp": batch, "tok": tokens}
    if time.unit.value not in per_step:
        raise ValueError(
            f"expected max_duration and stop in ba, sp, tok or dur, got {time.to_timestring()}. How many batches an "
            "epoch has is known only to whoever reads the data: give max_duration=...ba."
        )
    return float(time.value) / per_step[time.unit.value]

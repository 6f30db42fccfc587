"""What a run multiplies and keeps, counted on the meta device: no data, no weights, no GPU."""

import contextlib
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from omegaconf import OmegaConf as om
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPTNeoXConfig

from let_composer.student import find_blocks, matmul_parameters

__all__ = ["build_model", "build_student", "count_student", "count_teacher", "memory", "teacher_config"]

# Of a configuration: what says that only a part of the weights multiplies a token, or that scans multiply beside them.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
SCANS = ("state_size", "mamba_d_state", "mamba_d_ssm", "ssm_state_size", "attn_layer_period", "linear_num_value_heads")
# Shapes of Pythias by size, so that planning needs no network: width, blocks, heads.
PYTHIA = {"14m": (128, 6, 4), "31m": (256, 6, 8), "70m": (512, 6, 8), "160m": (768, 12, 12)}
PYTHIA |= {"410m": (1024, 24, 16), "1b": (2048, 16, 8)}
# Lets models run on the meta device, for which torch has no autocast.
NO_AUTOCAST = mock.patch.object(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
CHUNK = 1024  # tokens that distillation compares at a time
NODE = 8  # GPUs over which a sharded teacher lies
STATES = {"adam": 8, "lion": 4, "sgd": 4}  # bytes of the optimizer's state a parameter, in fp32


def refuse_uncountable(config: dict[str, Any], whose: str) -> None:
    """Refuse a mixture of experts, and a model with state-space or linear-attention layers."""
    ffn = str((config.get("ffn_config") or {}).get("ffn_type", ""))
    experts = [name for name in EXPERTS if (config.get(name) or 0) > 1] + [ffn] * ("moe" in ffn)
    scans = [name for name in SCANS if config.get(name)]
    for kind, found in (("a mixture of experts", experts), ("a hybrid or state-space model", scans)):
        if found:
            raise ValueError(f"{whose} is {kind} ({found[0]}): planning counts dense transformers alone.")


def build_student(config: DictConfig, dtype: torch.dtype) -> tuple[Any, bool]:
    """The student of a YAML on the meta device, and whether its attention keeps no square matrices.

    Raises:
        ValueError: If it cannot be built or counted.
    """
    cfg = cast(dict[str, Any], om.to_container(config.model, resolve=True))
    refuse_uncountable(cfg, "the student")
    attn, changes = cfg.get("attn_config", {}), {"init_device": "meta"}
    if cfg["name"] == "mpt_causal_lm":  # the torch twins of what needs flash-attn; they multiply as much
        changes |= {"attn_config": attn | {"attn_impl": "torch", "rope_impl": "hf"}, "loss_fn": "torch_crossentropy"}
    model = build_model(config, changes)
    refuse_uncountable(model.model.config.to_dict(), "the student")
    return model.to(dtype), attn.get("attn_impl", "flash") == "flash"


def build_model(config: DictConfig, changes: dict[str, Any]) -> Any:
    """The student of a YAML with random weights, and with changes to what the YAML says of it.

    Raises:
        ValueError: If it cannot be built.
    """
    from llmfoundry.utils.builders import build_composer_model, build_tokenizer

    cfg = cast(dict[str, Any], om.to_container(config.model, resolve=True))
    cfg |= {"use_train_metrics": False, **changes}
    name, tokenizer = cfg.pop("name"), None
    if name != "mpt_causal_lm":  # a model of the hub asks its tokenizer for the number of tokens
        cfg |= {"pretrained": False}
        entry = cast(dict[str, Any], om.to_container(config.tokenizer, resolve=True))
        tokenizer = build_tokenizer(entry["name"], entry.get("kwargs", {}))
    try:
        return build_composer_model(name, cfg, tokenizer)
    except (TypeError, OSError) as error:
        raise ValueError(f"the student cannot be built from model: {error}") from error


def count_student(
    model: nn.Module, batch: int, length: int, fused_attention: bool, checkpointing: bool = False
) -> SimpleNamespace:
    """Count an llm-foundry model on the meta device, in the type it computes in, with a microbatch of so many sequences
    of so many tokens; fused attention keeps no ``[S, S]`` matrices, checkpointing computes every block again."""
    path, blocks = find_blocks(model)
    # As the counter of FLOPs names the blocks; "" is outside of them.
    names = {f"{type(model).__name__}.{path}.{index}" for index in range(len(blocks))}
    kept: dict[str, dict[int, int]] = {name: {} for name in ("", *names)}  # bytes by storage
    own = {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        square = tensor.ndim >= 2 and tensor.shape[-1] == tensor.shape[-2] == length
        if storage._cdata not in own and not (fused_attention and square):
            block = next(iter(names & forward.mod_tracker.parents), "")
            kept[block][storage._cdata] = storage.nbytes()
        return tensor

    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    model.train()
    saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with NO_AUTOCAST, FlopCounterMode(display=False) as forward, saving:
        logits = model({"input_ids": ids})["logits"]
        loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten())  # the model's own looks at values
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    outside, *in_blocks = (sum(storages.values()) for storages in kept.values())
    activations, again = sum(in_blocks), 0
    if checkpointing:  # the inputs of all blocks, and one that is computed again
        width = next(each.embedding_dim for each in model.modules() if isinstance(each, nn.Embedding))
        activations = len(blocks) * ids.numel() * width * logits.element_size() + max(in_blocks)
        again = sum(sum(forward.get_flop_counts()[name].values()) for name in names)
    parameters = sum(p.numel() for p in model.parameters())
    return SimpleNamespace(
        parameters=parameters,
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),  # fewer with LoRA
        flops=(forward.get_total_flops() + backward.get_total_flops()) / ids.numel(),  # of one token
        recomputed_flops=again / ids.numel(),  # of one token, beside them
        largest_unit=_largest_unit(blocks, parameters),
        # Bytes. The trainer holds the logits until the backward pass is over, and there is their gradient.
        activations=outside + activations + 2 * logits.nbytes,
    )


def _largest_unit(blocks: nn.ModuleList, parameters: int) -> int:
    """Parameters that FSDP gathers at a time: of a block, or of all that is outside of the blocks."""
    in_blocks = [sum(p.numel() for p in block.parameters()) for block in blocks]
    return max(*in_blocks, parameters - sum(in_blocks))


def count_teacher(body: Any, batch: int, length: int, projected: int = 0) -> SimpleNamespace:
    """Count a teacher of :func:`let_composer.teacher.build_body`, and its head, as large as its embeddings, for so many
    ``projected`` tokens of a microbatch."""
    refuse_uncountable(body.config.to_dict(), "the teacher")
    blocks = find_blocks(body)[1]
    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    kept: list[int] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            kept.append(output.nbytes)

    handles = [module.register_forward_hook(keep) for module in blocks[0].modules() if not list(module.children())]
    with NO_AUTOCAST, torch.no_grad(), FlopCounterMode(display=False) as flops:
        width = body(input_ids=ids, use_cache=False).last_hidden_state.shape[-1]
    for handle in handles:
        handle.remove()
    parameters = sum(p.numel() for p in body.parameters())
    table = body.get_input_embeddings().weight
    head = table.numel() if projected else 0
    return SimpleNamespace(
        parameters=parameters + head,  # embeddings included
        matmul_parameters=matmul_parameters(body),
        width=width,
        flops=(flops.get_total_flops() + 2 * head * projected) / ids.numel(),  # of one token, forward
        largest_unit=_largest_unit(blocks, parameters),
        activations=sum(kept),  # the most that one block keeps at a time
        logits=table.shape[0] if projected else 0,  # of one token
    )


def teacher_config(name: str) -> str | GPTNeoXConfig:
    """The teacher's name, or its shape where that is known here, so that no network is needed."""
    owner, _, size = name.partition("@")[0].partition("pythia-")
    if owner != "EleutherAI/" or size not in PYTHIA:
        return name
    width, blocks, heads = PYTHIA[size]
    return GPTNeoXConfig(50304, width, blocks, heads, intermediate_size=4 * width)


def memory(
    config: DictConfig,
    methods: dict[str, Any],
    gpus: int,
    student: SimpleNamespace,
    teacher: SimpleNamespace | None,
    tokens: int,
    element: int,
) -> dict[str, float]:
    """GiB on a GPU by part, with ``tokens`` in the microbatch that was counted, and numbers of ``element`` bytes.

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
    shards = gpus if strategy == "FULL_SHARD" else 1
    parts = {
        "weights": 4 * student.parameters / shards,
        "gradients": 4 * student.trained / shards,
        "optimizer": states[0] * student.trained / shards,
        # Two units in the computing type, one ahead, and the gradient of one.
        "gathered": 3 * element * student.largest_unit if shards > 1 else element * student.parameters * (element < 4),
        "activations": student.activations,
    }
    if teacher:
        held = teacher.parameters
        if gpus > 1 and any(options.teacher_arguments()["placement"] == "shard" for options in methods.values()):
            held = held / min(gpus, NODE) + 2 * teacher.largest_unit
        parts["teacher"] = element * (held + tokens * teacher.width) + teacher.activations
        # LET's sample of logits is gone before the backward pass, whose gradient of the logits takes more. Distillation
        # has there one more such gradient; before, a chunk of both models' logits, in this type and twice in fp32.
        if methods.keys() - {"let"}:
            parts["distillation"] = teacher.logits * max(tokens * element, 2 * min(tokens, CHUNK) * (element + 8))
    return {part: size / 2**30 for part, size in parts.items()}

"""Two ranks on the CPU, launched by test_ranks.py; writes what each of them saw.

composer -n 2 tests/ranks.py TEACHER_FOLDER OUT_FOLDER
"""

import sys
from pathlib import Path
from typing import Any

import torch
from composer import Callback, Trainer
from composer.loggers import InMemoryLogger
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config, FSDPConfig
from conftest import allow_fsdp_without_cuda, build_data, build_trainer, load_tokenizer
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerFast

from let_composer import LET
from let_composer.student import resolve_layer

COMPILED = {"compile_config": {"backend": "aot_eager"}}
CASES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp_shard_microbatches": {"placement": "shard", "device_train_microbatch_size": 2},
    "ddp_triton": {"implementation": "triton"},  # in Triton's interpreter
    "fsdp1": {"fsdp1": {}},
    "fsdp1_shard_microbatches": {"fsdp1": {}, "placement": "shard", "device_train_microbatch_size": 2},
    "fsdp1_checkpointing": {"fsdp1": {"activation_checkpointing": True, "activation_checkpointing_reentrant": False}},
    "fsdp1_reentrant": {"fsdp1": {"activation_checkpointing": True}},
    "fsdp1_compiled": {"fsdp1": {}, **COMPILED},
    "fsdp2": {"fsdp2": {}},
    "fsdp2_shard_microbatches": {"fsdp2": {}, "placement": "shard", "device_train_microbatch_size": 2},
    "fsdp2_checkpointing": {"fsdp2": {"activation_checkpointing": True}},
    "fsdp2_compiled": {"fsdp2": {}, **COMPILED},
}

FSDP1_SHARDED = {"fsdp1": {"state_dict_type": "sharded"}}
# Of runs of eight batches, guided for five of them: what goes on from which checkpoint on two ranks.
RESUMED: dict[str, dict[str, Any]] = {
    "sharded": {"fsdp": "sharded", "load": "sharded/ep0-ba3"},
    "sharded_from_one_rank": {"fsdp": "sharded", "load": "one_sharded/ep0-ba3"},
    "sharded_from_fsdp1": {"fsdp": "sharded", "load": "fsdp1/ep0-ba3"},
    "fsdp1": {**FSDP1_SHARDED, "load": "fsdp1/ep0-ba3"},
    "ddp_from_full": {"load": "full/ep0-ba3-rank0.pt"},
    "ddp_from_one_rank": {"load": "one/ep0-ba3-rank0.pt"},
    "full_from_one_rank": {"fsdp": "full", "load": "one/ep0-ba3-rank0.pt"},
}


def build(
    tokenizer: PreTrainedTokenizerFast, teacher: str | None, batch_size: int = 4, **case: Any
) -> tuple[Trainer, InMemoryLogger]:
    """A Trainer with a student of its own, and with LET if there is a teacher."""
    parallelism: dict[str, Any] = {}
    for name, config in (("fsdp1", FSDPConfig), ("fsdp2", FSDP2Config)):
        if name in case:
            parallelism["fsdp"] = config(**case.pop(name))
    if "tp" in case:
        parallelism["tp"] = case.pop("tp")
    options = {key: case.pop(key) for key in ("placement", "implementation", "stop") if key in case}
    options = {"stop": "3ba", "weight": "auto", "normalize_teacher": "standardize", **options}
    trainer = build_trainer(
        tokenizer,
        *([] if teacher is None else [LET(teacher, **options)]),
        # Ragged, so that ranks count different tokens; a batch of both ranks is one of the 8 rows that one rank sees.
        data=build_data(tokenizer, batch_size, lambda rows: dist.get_sampler(rows, shuffle=False), ragged=True),
        loggers=[logger := InMemoryLogger()],
        callbacks=[_MeanOfGradients()],
        parallelism_config=parallelism or None,
        dist_timeout=60,
        **{"max_duration": "4ba", **case},
    )
    return trainer, logger


def run(tokenizer: PreTrainedTokenizerFast, teacher: str, case: dict[str, Any]) -> dict[str, Any]:
    """What one case trained and logged, and how often the block's output was seen, with a gradient or without."""
    trainer, logger = build(tokenizer, teacher, **case)
    fired: list[bool] = []
    if "compile_config" not in case:  # a list that grows inside of what is compiled means compiling at every step
        block = resolve_layer(trainer.state.model, 3)[1]
        block.register_forward_hook(lambda module, args, output: fired.append(output[0].requires_grad))
    trainer.fit()
    parameters = {}
    with FullyShardedDataParallel.summon_full_params(trainer.state.model):  # of FSDP1, if there is any
        for name, p in trainer.state.model.named_parameters():
            for wrapper in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."):
                name = name.replace(wrapper, "")
            full = p.full_tensor() if isinstance(p, DTensor) else p
            parameters[name.removeprefix("module.")] = full.detach().clone()
    trainer.close()
    return {"parameters": parameters, "metrics": _logged(logger, "let/"), "fired": fired}


def resumable(
    tokenizer: PreTrainedTokenizerFast,
    teacher: str | None,
    out: Path,
    fsdp: str | None = None,
    load: str | None = None,
    **options: Any,
) -> dict[str, list[float]]:
    """The curves of a run, batch by batch from where it was loaded.

    Checkpoints are folders in ``out``: ``load`` is the one to go on from, ``save`` (of the options) one to fill.
    ``fsdp`` is ``"full"`` or ``"sharded"`` for FSDP2 with checkpoints of this kind. Without a teacher there is no LET.
    """
    if save := options.pop("save", None):
        options = {"save_folder": str(out / save), "save_interval": "3ba", **options}
    trainer, logger = build(
        tokenizer,
        teacher,
        batch_size=8 // dist.get_world_size(),
        optimizer=torch.optim.AdamW,
        lr=1e-2,
        load_path=None if load is None else str(out / load),
        stop="5ba",
        **{"max_duration": "8ba", **({"fsdp2": {"state_dict_type": fsdp}} if fsdp else {}), **options},
    )
    trainer.fit()
    trainer.close()
    return _logged(logger, "let/l", "loss/train/total")


def _logged(logger: InMemoryLogger, *prefixes: str) -> dict[str, list[float]]:
    return {name: [float(v) for _, v in points] for name, points in logger.data.items() if name.startswith(prefixes)}


def _refuse(tokenizer: PreTrainedTokenizerFast, teacher: str, **case: Any) -> str:
    automatic = case.pop("automatic", False)
    try:
        trainer, _ = build(tokenizer, teacher, **case)
        trainer.state.auto_microbatching = automatic  # as device_train_microbatch_size: auto sets it, on CUDA only
        trainer.fit()
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{case} was not refused")


class _MeanOfGradients(Callback):
    """Where FSDP2 asks for the mean of gradients, gloo gives their sum."""

    def after_train_batch(self, state: Any, logger: Any) -> None:
        if isinstance(state.fsdp_config, FSDP2Config):
            for p in state.model.parameters():
                p.grad /= dist.get_world_size()


def main(teacher: str, folder: str) -> None:
    out = Path(folder)
    allow_fsdp_without_cuda()
    dist.initialize_dist("cpu")
    tokenizer = load_tokenizer(teacher)
    results: dict[str, Any] = {name: run(tokenizer, teacher, case) for name, case in CASES.items()}
    results["refused"] = {
        "shard_auto": _refuse(tokenizer, teacher, placement="shard", automatic=True),
        "tp": _refuse(tokenizer, teacher, fsdp1={}, tp={"tensor_parallel_degree": 2, "layer_plan": {}}),
    }
    results["saved"] = {kind: resumable(tokenizer, teacher, out, fsdp=kind, save=kind) for kind in ("sharded", "full")}
    results["saved"]["fsdp1"] = resumable(tokenizer, teacher, out, save="fsdp1", **FSDP1_SHARDED)
    resumable(tokenizer, None, out, fsdp="sharded", save="plain", max_duration="3ba")
    results["resumed"] = {name: resumable(tokenizer, teacher, out, **options) for name, options in RESUMED.items()}
    results["resumed"]["added"] = resumable(tokenizer, teacher, out, fsdp="sharded", load="plain/ep0-ba3")
    results["resumed"]["removed"] = resumable(tokenizer, None, out, fsdp="sharded", load="sharded/ep0-ba3")
    results["resumed"]["over"] = resumable(tokenizer, "./nowhere", out, fsdp="sharded", load="sharded/ep0-ba6")
    torch.save(results, out / f"rank{dist.get_global_rank()}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])

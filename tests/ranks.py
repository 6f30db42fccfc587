"""Two ranks on the CPU, launched by conftest.py; writes what each of them saw.

composer -n 2 tests/ranks.py TEACHER_FOLDER OUT_FOLDER
"""

import sys
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.loggers import InMemoryLogger
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config, FSDPConfig
from conftest import allow_fsdp_without_cuda, build_data, build_student, load_tokenizer
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

from let_composer import LET
from let_composer.student import resolve_layer

COMPILED = {"compile_config": {"backend": "aot_eager"}}
CASES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp_microbatches": {"device_train_microbatch_size": 2},
    "ddp_shard": {"placement": "shard"},
    "ddp_triton": {"implementation": "triton"},  # in Triton's interpreter
    "ddp_compiled": COMPILED,
    "fsdp1": {"fsdp": FSDPConfig},
    "fsdp1_microbatches": {"fsdp": FSDPConfig, "device_train_microbatch_size": 2},
    "fsdp1_shard": {"fsdp": FSDPConfig, "placement": "shard"},
    "fsdp1_checkpointing": {
        "fsdp": FSDPConfig,
        "activation_checkpointing": True,
        "activation_checkpointing_reentrant": False,
    },
    "fsdp1_reentrant": {"fsdp": FSDPConfig, "activation_checkpointing": True},
    "fsdp1_compiled": {"fsdp": FSDPConfig, **COMPILED},
    "fsdp2": {"fsdp": FSDP2Config},
    "fsdp2_microbatches": {"fsdp": FSDP2Config, "device_train_microbatch_size": 2},
    "fsdp2_shard": {"fsdp": FSDP2Config, "placement": "shard"},
    "fsdp2_checkpointing": {"fsdp": FSDP2Config, "activation_checkpointing": True},
    "fsdp2_compiled": {"fsdp": FSDP2Config, **COMPILED},
}


def build(teacher: str, case: dict[str, Any]) -> tuple[Trainer, InMemoryLogger]:
    model = build_student(load_tokenizer(teacher))
    case = dict(case)
    fsdp = case.pop("fsdp", None)
    checkpointing = {key: case.pop(key) for key in list(case) if key.startswith("activation_checkpointing")}
    parallelism: dict[str, Any] = {"fsdp": fsdp(**checkpointing)} if fsdp else {}
    if "tp" in case:
        parallelism["tp"] = case.pop("tp")
    options = {key: case.pop(key) for key in ("placement", "implementation") if key in case}
    trainer = Trainer(
        model=model,
        # Ragged, so that ranks count different tokens; a batch of both ranks is one of the 8 rows that one rank sees.
        train_dataloader=build_data(
            load_tokenizer(teacher), 4, lambda rows: dist.get_sampler(rows, shuffle=False), ragged=True
        ),
        # Where FSDP2 asks for the mean of gradients, gloo gives their sum: with plain SGD half the rate mends it.
        optimizers=torch.optim.SGD(model.parameters(), lr=0.05 if fsdp is FSDP2Config else 0.1),
        algorithms=LET(teacher, stop="3ba", weight=1.0, normalize_teacher="standardize", **options),
        max_duration="4ba",
        seed=5,
        device="cpu",
        precision="fp32",
        accumulate_train_batch_on_tokens=True,
        progress_bar=False,
        dist_timeout=60,
        loggers=[logger := InMemoryLogger()],
        parallelism_config=parallelism or None,
        **case,
    )
    return trainer, logger


def run(teacher: str, case: dict[str, Any]) -> dict[str, Any]:
    trainer, logger = build(teacher, case)
    fired: list[bool] = []
    if "compile_config" not in case:  # a list that grows inside of what is compiled means compiling at every step
        block = resolve_layer(trainer.state.model, 3)[1]
        block.register_forward_hook(lambda module, args, output: fired.append(output[0].requires_grad))
    trainer.fit()
    parameters = {}
    with FullyShardedDataParallel.summon_full_params(trainer.state.model):  # of FSDP1, if there is any
        for name, p in trainer.state.model.named_parameters():
            full = p.full_tensor() if isinstance(p, DTensor) else p
            for wrapper in ("module.", "_fsdp_wrapped_", "_checkpoint_wrapped_", "_orig_mod."):
                name = name.replace(f"{wrapper}module." if wrapper.endswith("wrapped_") else wrapper, "")
            parameters[name] = full.detach().clone()
    logged = {name: [value for _, value in points] for name, points in logger.data.items() if name.startswith("let/")}
    trainer.close()
    return {"parameters": parameters, "metrics": logged, "fired": fired}


def refuse(teacher: str, case: dict[str, Any]) -> str:
    """The message of the error that has to come."""
    try:
        build(teacher, case)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{case} ran")


def main(teacher: str, out: str) -> None:
    allow_fsdp_without_cuda()
    dist.initialize_dist("cpu")
    rank = dist.get_global_rank()
    import time
    results = {}
    for name, case in CASES.items():
        t = time.time()
        try:
            results[name] = run(teacher, case)
        except Exception as e:
            import traceback; traceback.print_exc()
            results[name] = repr(e)
        print(rank, name, round(time.time() - t, 1), results[name] if isinstance(results[name], str) else [results[name]["metrics"]["let/loss"], len(results[name]["fired"]), all(results[name]["fired"])], flush=True)

    other = Path(out) / "other"
    if rank == 1:
        model = LlamaForCausalLM.from_pretrained(teacher)
        model.model.layers[1].mlp.down_proj.weight.data[0, 0] += 1
        model.save_pretrained(other)
        load_tokenizer(teacher).save_pretrained(other)
    try:
        print(refuse(teacher if rank == 0 else str(other), {}))
    except BaseException as e:
        traceback.print_exc()
    try:
      print(refuse(teacher, {"fsdp": FSDPConfig, "tp": {"tensor_parallel_degree": 2, "layer_plan": {}}}))
    except BaseException as e:
        import traceback; traceback.print_exc()
    torch.save(results, Path(out) / f"rank{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Two ranks on the CPU, launched by test_ranks.py; writes what each of them saw.

composer -n 2 tests/ranks.py TEACHER_FOLDER OUT_FOLDER
"""

import sys
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.loggers import InMemoryLogger
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config
from conftest import build_data, build_student, load_tokenizer
from torch.distributed.tensor import DTensor

from let_composer import LET

CASES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp_microbatches": {"device_train_microbatch_size": 2},
    "ddp_shard": {"placement": "shard"},
    "ddp_triton": {"implementation": "triton"},  # in Triton's interpreter
    "fsdp2": {"fsdp2": {"activation_checkpointing": True}},
    "fsdp2_shard": {"fsdp2": {}, "placement": "shard"},
}


def run(teacher: str, case: dict[str, Any]) -> dict[str, Any]:
    tokenizer = load_tokenizer(teacher)
    model = build_student(tokenizer)
    case = dict(case)
    fsdp = case.pop("fsdp2", None)
    options = {key: case.pop(key) for key in ("placement", "implementation") if key in case}
    trainer = Trainer(
        model=model,
        # Ragged, so that ranks count different tokens; a batch of both ranks is one of the 8 rows that one rank sees.
        train_dataloader=build_data(tokenizer, 4, lambda rows: dist.get_sampler(rows, shuffle=False), ragged=True),
        # Where FSDP2 asks for the mean of gradients, gloo gives their sum: with plain SGD half the rate mends it.
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1 if fsdp is None else 0.1 / dist.get_world_size()),
        algorithms=LET(teacher, stop="3ba", weight=1.0, normalize_teacher="standardize", **options),
        max_duration="4ba",
        seed=5,
        device="cpu",
        precision="fp32",
        accumulate_train_batch_on_tokens=True,
        progress_bar=False,
        dist_timeout=60,
        loggers=[logger := InMemoryLogger()],
        parallelism_config={"fsdp": FSDP2Config(**fsdp)} if fsdp is not None else None,
        **case,
    )
    trainer.fit()
    parameters = {}
    for name, p in trainer.state.model.named_parameters():
        full = p.full_tensor() if isinstance(p, DTensor) else p
        parameters[name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")] = full.detach().clone()
    logged = {name: [value for _, value in points] for name, points in logger.data.items() if name.startswith("let/")}
    trainer.close()
    return {"parameters": parameters, "metrics": logged}


def main(teacher: str, out: str) -> None:
    # FSDP on the CPU needs nothing but this: Composer asks CUDA for the device unconditionally.
    torch.cuda.current_device = lambda: torch.device("cpu")  # pyright: ignore[reportAttributeAccessIssue]
    dist.initialize_dist("cpu")
    results = {name: run(teacher, case) for name, case in CASES.items()}
    torch.save(results, Path(out) / f"rank{dist.get_global_rank()}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])

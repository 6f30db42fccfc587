"""Two ranks on the CPU, launched by test_ranks.py; writes what each of them saw.

composer -n 2 tests/ranks.py TEACHER_FOLDER OUT_FOLDER
"""

import sys
from pathlib import Path
from typing import Any

import torch
from composer import DataSpec, Trainer
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
    "fsdp2": {"fsdp": FSDP2Config(activation_checkpointing=True)},
    "fsdp2_shard": {"fsdp": FSDP2Config(), "placement": "shard"},
}


def shared(tokenizer: Any, batch_size: int = 8) -> DataSpec:
    """Every rank its rows of the batches that one rank would see, ragged, so that ranks count different tokens."""
    data = build_data(tokenizer, ragged=True)
    loader: Any = data.dataloader
    rank, ranks = dist.get_global_rank(), dist.get_world_size()
    share = batch_size // ranks
    rows = [row for i, row in enumerate(loader.dataset) if i % batch_size // share == rank]
    loader = torch.utils.data.DataLoader(rows, batch_size=share, collate_fn=loader.collate_fn)
    return DataSpec(loader, get_num_tokens_in_batch=data.get_num_tokens_in_batch)


def run(teacher: str, case: dict[str, Any]) -> dict[str, Any]:
    tokenizer = load_tokenizer(teacher)
    model = build_student(tokenizer)
    case = dict(case)
    placement, fsdp = case.pop("placement", "replicate"), case.pop("fsdp", None)
    trainer = Trainer(
        model=model,
        train_dataloader=shared(tokenizer),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        algorithms=LET(teacher, stop="3ba", weight=1.0, normalize_teacher="standardize", placement=placement),
        max_duration="4ba",
        seed=5,
        device="cpu",
        precision="fp32",
        accumulate_train_batch_on_tokens=True,
        progress_bar=False,
        dist_timeout=60,
        loggers=[logger := InMemoryLogger()],
        parallelism_config={"fsdp": fsdp} if fsdp else None,
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
    results = {name: run(teacher, case) for name, case in CASES.items()}
    torch.save(results, Path(out) / f"rank{dist.get_global_rank()}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])

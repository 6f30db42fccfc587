"""Two gloo ranks: the same collectives, together the gradient of one rank, and checkpoints that go on elsewhere."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from composer import Callback, Trainer
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config
from conftest import allow_fsdp_without_cuda, assert_close, build_data, build_trainer, load_tokenizer, spawn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerFast

from let_composer import LET
from let_composer.student import resolve_layer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

COMPILED = {"compile_config": {"backend": "aot_eager"}}
CASES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp_shard_microbatches": {"let": {"placement": "shard"}, "device_train_microbatch_size": 2},
    "ddp_triton": {"let": {"implementation": "triton"}},  # in Triton's interpreter
    "fsdp1": {"fsdp1": {}},
    "fsdp1_shard_microbatches": {"fsdp1": {}, "let": {"placement": "shard"}, "device_train_microbatch_size": 2},
    "fsdp1_checkpointing": {"fsdp1": {"activation_checkpointing": True, "activation_checkpointing_reentrant": False}},
    "fsdp1_reentrant": {"fsdp1": {"activation_checkpointing": True}},
    "fsdp1_compiled": {"fsdp1": {}, **COMPILED},
    "fsdp2": {"fsdp2": {}},
    "fsdp2_shard_microbatches": {"fsdp2": {}, "let": {"placement": "shard"}, "device_train_microbatch_size": 2},
    "fsdp2_checkpointing": {"fsdp2": {"activation_checkpointing": True}},
    "fsdp2_compiled": {"fsdp2": {}, **COMPILED},
}

FSDP1_SHARDED = {"fsdp1": {"state_dict_type": "sharded"}}
# Runs of eight batches, guided for five of them: what two ranks save, and what goes on from which checkpoint.
RUNS: dict[str, dict[str, Any]] = {
    "save_sharded": {"fsdp": "sharded", "save": "sharded"},
    "save_full": {"fsdp": "full", "save": "full"},
    "save_fsdp1": {**FSDP1_SHARDED, "save": "fsdp1"},
    "sharded": {"fsdp": "sharded", "load": "sharded/ep0-ba3"},
    "sharded_from_one_rank": {"fsdp": "sharded", "load": "one_sharded/ep0-ba3"},
    "sharded_from_fsdp1": {"fsdp": "sharded", "load": "fsdp1/ep0-ba3"},
    "fsdp1": {**FSDP1_SHARDED, "load": "fsdp1/ep0-ba3"},
    "ddp_from_full": {"load": "full/ep0-ba3-rank0.pt"},
    "ddp_from_one_rank": {"load": "one/ep0-ba3-rank0.pt"},
    "full_from_one_rank": {"fsdp": "full", "load": "one/ep0-ba3-rank0.pt"},
}


def build(
    tokenizer: PreTrainedTokenizerFast,
    teacher: str | None,
    batch_size: int = 4,
    fsdp1: dict[str, Any] | None = None,
    fsdp2: dict[str, Any] | None = None,
    tp: dict[str, Any] | None = None,
    let: dict[str, Any] | None = None,
    **options: Any,
) -> Trainer:
    """A Trainer with a student of its own, and with LET if there is a teacher."""
    guided = {"stop": "3ba", "weight": "auto", "normalize_teacher": "standardize", **(let or {})}
    return build_trainer(
        tokenizer,
        *([] if teacher is None else [LET(teacher, **guided)]),
        # Ragged, so that ranks count different tokens; a batch of both ranks is one of the 8 rows that one rank sees.
        data=build_data(tokenizer, batch_size, lambda rows: dist.get_sampler(rows, shuffle=False), ragged=True),
        callbacks=[_MeanOfGradients()],
        parallelism_config={"fsdp": fsdp1 if fsdp2 is None else FSDP2Config(**fsdp2), "tp": tp},
        dist_timeout=60,
        **{"max_duration": "4ba", **options},
    )


def run(tokenizer: PreTrainedTokenizerFast, teacher: str, case: dict[str, Any]) -> dict[str, Any]:
    """What one case trained and logged, and how often the block's output was seen, with a gradient or without."""
    trainer = build(tokenizer, teacher, **case)
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
    return {"parameters": parameters, "metrics": _logged(trainer, "let/"), "fired": fired}


def resumable(
    tokenizer: PreTrainedTokenizerFast,
    teacher: str | None,
    out: Path,
    fsdp: str | None = None,
    save: str | None = None,
    load: str | None = None,
    **options: Any,
) -> dict[str, list[float]]:
    """The curves of a run, batch by batch from where it was loaded.

    Checkpoints are folders in ``out``: ``load`` is the one to go on from, ``save`` one to fill.
    ``fsdp`` is ``"full"`` or ``"sharded"`` for FSDP2 with checkpoints of this kind. Without a teacher there is no LET.
    """
    trainer = build(
        tokenizer,
        teacher,
        batch_size=8 // dist.get_world_size(),
        optimizer=torch.optim.AdamW,
        lr=1e-2,
        save_folder=save and str(out / save),
        save_interval="3ba",
        load_path=load and str(out / load),
        fsdp2={"state_dict_type": fsdp} if fsdp else None,
        let={"stop": "5ba"},
        **{"max_duration": "8ba", **options},
    )
    trainer.fit()
    trainer.close()
    return _logged(trainer, "let/l", "loss/train/total")


def _logged(trainer: Trainer, *prefixes: str) -> dict[str, list[float]]:
    data = trainer.logger.destinations[0].data
    return {name: [float(v) for _, v in points] for name, points in data.items() if name.startswith(prefixes)}


class _MeanOfGradients(Callback):
    """Where FSDP2 asks for the mean of gradients, gloo gives their sum."""

    def after_train_batch(self, state: Any, logger: Any) -> None:
        if isinstance(state.fsdp_config, FSDP2Config):
            for p in state.model.parameters():
                p.grad /= dist.get_world_size()


def cases(teacher: str, out: Path) -> dict[str, Any]:
    """What one of two ranks saw."""
    allow_fsdp_without_cuda()
    tokenizer = load_tokenizer(teacher)
    with pytest.raises(ValueError, match="does not work with device_train_microbatch_size: auto"):
        trainer = build(tokenizer, teacher, let={"placement": "shard"})
        trainer.state.auto_microbatching = True  # as device_train_microbatch_size: auto sets it, on CUDA only
        trainer.fit()
    with pytest.raises(ValueError, match="LET does not run with tensor parallelism"):
        build(tokenizer, teacher, fsdp1={}, tp={"tensor_parallel_degree": 2, "layer_plan": {}})
    results: dict[str, Any] = {name: run(tokenizer, teacher, case) for name, case in CASES.items()}
    curves = {name: resumable(tokenizer, teacher, out, **options) for name, options in RUNS.items()}
    resumable(tokenizer, None, out, fsdp="sharded", save="plain", max_duration="3ba")
    curves["added"] = resumable(tokenizer, teacher, out, fsdp="sharded", load="plain/ep0-ba3")
    curves["removed"] = resumable(tokenizer, None, out, fsdp="sharded", load="sharded/ep0-ba3")
    curves["over"] = resumable(tokenizer, "./nowhere", out, fsdp="sharded", load="sharded/ep0-ba6")
    return {**results, "curves": curves}


@contextmanager
def one_rank() -> Iterator[None]:
    """FSDP2 needs a process group, even of one; and it warns that it is experimental."""
    with warnings.catch_warnings(), patch.dict(os.environ), patch("torch.cuda.current_device"):
        warnings.simplefilter("ignore")
        allow_fsdp_without_cuda()
        try:
            yield
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def loaded(teacher_folder) -> Any:
    """The tokenizer as it comes from disk: sharded checkpoints hold its files, and go on only where these are equal."""
    return load_tokenizer(teacher_folder)


@pytest.fixture(scope="module")
def checkpoints(loaded, teacher_folder, tmp_path_factory) -> Path:
    """Where one rank has left its."""
    out = tmp_path_factory.mktemp("ranks")
    with one_rank():
        resumable(loaded, teacher_folder, out, save="one")
        resumable(loaded, None, out, save="one_plain", max_duration="3ba")
        resumable(loaded, teacher_folder, out, fsdp="sharded", save="one_sharded")
    return out


@pytest.fixture(scope="module")
def results(checkpoints, teacher_folder) -> list[dict[str, Any]]:
    """What two ranks saw: one launch, as imports take most of its time. They leave checkpoints, too."""
    ones = dict.fromkeys(("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS", "TRITON_INTERPRET"), "1")
    with patch.dict(os.environ, ones):
        return spawn(cases, 1, checkpoints, teacher_folder, checkpoints)


@pytest.fixture(scope="module")
def single(loaded, teacher_folder) -> dict[str, Any]:
    return run(loaded, teacher_folder, {"batch_size": 8})


@pytest.fixture(scope="module")
def uninterrupted(loaded, teacher_folder, tmp_path_factory) -> dict[str, list[float]]:
    return resumable(loaded, teacher_folder, tmp_path_factory.mktemp("out"))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_log_and_train_what_one_does_on_the_whole_batch(results, single, case):
    first, second = (result[case]["metrics"] for result in results)
    assert first == second
    for name, values in first.items():
        assert values == pytest.approx(single["metrics"][name], rel=1e-5, abs=1e-7), name
    for result in results:
        assert_close(single["parameters"], result[case]["parameters"])
        if "compile_config" not in CASES[case]:  # the block is seen once per forward, and with a gradient
            assert result[case]["fired"] == [True] * (8 if "microbatches" in case else 4)


def assert_goes_on(found: dict[str, list[float]], whole: dict[str, list[float]], batch: int) -> None:
    """Along the curve of one rank that never stopped."""
    for name, guided in (("loss/train/total", False), ("let/loss", True), ("let/lm_loss", True)):
        assert len(whole[name]) == (5 if guided else 8)
        assert found.get(name, []) == pytest.approx(whole[name][batch:], rel=1e-4), name


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_go_on_whoever_saved(results, uninterrupted, name):
    first, second = (result["curves"][name] for result in results)
    assert first == second
    assert_goes_on(first, uninterrupted, 3 if "load" in RUNS[name] else 0)


@pytest.mark.parametrize("name", ["ddp_from_full", "sharded"])
def test_one_rank_goes_on_where_two_saved(results, checkpoints, loaded, teacher_folder, uninterrupted, name):
    with one_rank():
        found = resumable(loaded, teacher_folder, checkpoints, **RUNS[name])
    assert_goes_on(found, uninterrupted, 3)


def test_after_the_end_no_teacher_is_loaded(results, uninterrupted):
    over = results[0]["curves"]["over"]  # its teacher does not exist
    assert over.keys() == {"loss/train/total"}
    assert_goes_on(over, uninterrupted, 6)


@pytest.mark.parametrize(("name", "load", "guided"), [("added", "one_plain", 2), ("removed", "one", 0)])
def test_let_added_or_removed(results, checkpoints, loaded, teacher_folder, name, load, guided):
    """As on one rank that does the same."""
    with one_rank():
        teacher = teacher_folder if name == "added" else None
        single = resumable(loaded, teacher, checkpoints, load=f"{load}/ep0-ba3-rank0.pt")
    found = results[0]["curves"][name]
    assert found.keys() == single.keys() and len(found.get("let/loss", [])) == guided
    for curve, values in found.items():
        assert values == pytest.approx(single[curve], rel=1e-4), curve

"""What every test builds on: a small tokenizer, teachers on disk, a small MPT student, real batches for a Trainer."""

import copy
import functools
import gc
import os
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from composer import DataSpec, Evaluator, Trainer
from composer.loggers import InMemoryLogger
from composer.utils import dist
from llmfoundry.data.utils import LossGeneratingTokensCollatorWrapper, get_tokens_per_batch_func
from llmfoundry.models.hf import ComposerHFCausalLM
from llmfoundry.models.mpt import ComposerMPTCausalLM
from omegaconf import OmegaConf as om
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from let_composer import LET
from let_composer.teacher import Teacher

VOCABULARY = 64
LENGTH = 16
_STUDENTS: dict[str, ComposerMPTCausalLM] = {}

gc.freeze()  # what is imported stays: the algorithm collects garbage at its end, and would look through all of it


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCABULARY - 2)} | {"<|endoftext|>": VOCABULARY - 2, "<pad>": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<pad>", model_max_length=10**6
    )


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a byte-level BPE of 700 tokens, as ``let-composer prepare`` takes it."""
    from sample_data.__main__ import train_bpe
    from texts import english

    folder = tmp_path_factory.mktemp("bpe")
    train_bpe(english(100_000), 700, folder)
    return str(folder)


@pytest.fixture(scope="session")
def teacher_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Llama teacher, 2 blocks, width 24, with its tokenizer and its LM head, as save_pretrained writes it."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


# llm-foundry's own mpt-small-cpu, in its keys and values where they concern us, on local shards and few tokens.
FOUNDRY = f"""
variables:
  data: ???
  tokenizer: ???
model:
  name: mpt_causal_lm
  d_model: 32
  n_heads: 2
  n_layers: 4
  expansion_ratio: 4
  max_seq_len: {LENGTH}
  vocab_size: {VOCABULARY}
  no_bias: true
  attn_config: {{attn_impl: torch}}
  loss_fn: torch_crossentropy
tokenizer: {{name: "${{variables.tokenizer}}", kwargs: {{model_max_length: {LENGTH}}}}}
max_seq_len: {LENGTH}
train_loader: &loader
  name: text
  dataset: &data {{local: "${{variables.data}}", split: train, shuffle: true, max_seq_len: {LENGTH}, shuffle_seed: 17}}
  drop_last: true
  num_workers: 2
eval_loader: {{<<: *loader, dataset: {{<<: *data, split: val, shuffle: false}}, drop_last: false}}
scheduler: {{name: cosine_with_warmup, t_warmup: 2ba, alpha_f: 0.1}}
optimizer: {{name: decoupled_adamw, lr: 6.0e-4, betas: [0.9, 0.95], eps: 1.0e-8, weight_decay: 0.0}}
algorithms: {{gradient_clipping: {{clipping_type: norm, clipping_threshold: 1.0}}}}
max_duration: 100ba
eval_interval: 3ba
eval_first: true
global_train_batch_size: 8
device_train_microbatch_size: 4
device_eval_batch_size: 8
precision: fp32
seed: 17
log_to_console: false
loggers: {{inmemory: {{}}}}
callbacks: {{speed_monitor: {{window_size: 10}}, lr_monitor: {{}}, memory_monitor: {{}}, runtime_estimator: {{}}}}
"""


def foundry_yaml(folder: Path, **changes: Any) -> str:
    """Write a complete YAML for llm-foundry, which leaves open where data and tokenizer are; returns its path."""
    om.save(om.merge(om.create(FOUNDRY), changes), folder / "run.yaml")
    return str(folder / "run.yaml")


def load_tokenizer(folder: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


def copy_teacher(folder: str, to: Path, change: Callable[[Any], Any] = lambda model: None) -> str:
    """Save the teacher in ``folder`` in another one, with its tokenizer, after a change to the model in place."""
    model = LlamaForCausalLM.from_pretrained(folder)
    change(model)
    model.save_pretrained(to)
    load_tokenizer(folder).save_pretrained(to)
    return str(to)


def build_student(tokenizer: PreTrainedTokenizerFast, **overrides: Any) -> ComposerMPTCausalLM:
    """A copy of one that is built once, as llm-foundry takes half a second to look up how to initialise it."""
    if (key := f"{id(tokenizer)} {overrides}") not in _STUDENTS:
        options: dict[str, Any] = {
            "d_model": 32,
            "n_heads": 2,
            "n_layers": 4,
            "expansion_ratio": 2,
            "max_seq_len": LENGTH,
            "vocab_size": VOCABULARY,
            "attn_config": {"attn_impl": "torch"},
            "loss_fn": "torch_crossentropy",
            "init_config": {"name": "kaiming_normal_"},
        }
        torch.manual_seed(17)
        _STUDENTS[key] = ComposerMPTCausalLM(tokenizer=tokenizer, **{**options, **overrides})
    torch.manual_seed(17)
    return copy.deepcopy(_STUDENTS[key], {id(tokenizer): tokenizer})


@pytest.fixture
def student(tokenizer: PreTrainedTokenizerFast) -> ComposerMPTCausalLM:
    return build_student(tokenizer)


def build_data(
    tokenizer: PreTrainedTokenizerFast,
    batch_size: int = 8,
    sampler: Callable[[Any], Any] = lambda rows: None,
    change: Callable[[Any], Any] = lambda batch: batch,
    samples: int = 64,
    ragged: bool = False,
    seed: int = 3,
) -> DataSpec:
    """Random sequences, as llm-foundry's data loaders give them to a Trainer; ``ragged`` ones are padded on the right.

    ``change`` makes other batches of them.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY - 2, (samples, LENGTH), generator=generator)
    lengths = torch.randint(3, LENGTH + 1, (samples,), generator=generator) if ragged else [LENGTH] * samples
    rows: list[Any] = [{"input_ids": row[: int(n)].tolist()} for row, n in zip(ids, lengths, strict=True)]
    if ragged:  # to a fixed shape, so that any cut into microbatches and ranks sees the same positions
        rows = [tokenizer.pad(row, padding="max_length", max_length=LENGTH) for row in rows]
    count = get_tokens_per_batch_func()
    base = DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=False)
    collate = LossGeneratingTokensCollatorWrapper(base, count)
    loader: Any = DataLoader(
        rows, batch_size=batch_size, collate_fn=lambda rows: change(collate(rows)), sampler=sampler(rows)
    )
    return DataSpec(loader, get_num_tokens_in_batch=count)


def build_trainer(tokenizer: PreTrainedTokenizerFast, *algorithms: Any, fit: bool = False, **options: Any) -> Trainer:
    """A real Trainer on the CPU, whose first logger keeps metrics; ``optimizer`` is a class, ``lr`` its rate."""
    model = options.pop("model", None) or build_student(tokenizer)
    defaults: dict[str, Any] = {
        "train_dataloader": options.pop("data", None) or build_data(tokenizer),
        "optimizers": options.pop("optimizer", torch.optim.SGD)(model.parameters(), lr=options.pop("lr", 0.1)),
        "max_duration": "6ba",
        "seed": 5,
        "device": "cpu",
        "precision": "fp32",
        "accumulate_train_batch_on_tokens": True,
        "progress_bar": False,
        "loggers": [InMemoryLogger()],
    }
    trainer = Trainer(model=model, algorithms=list(algorithms), **{**defaults, **options})
    if fit:
        trainer.fit()
    return trainer


@pytest.fixture(scope="session")
def train(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Trainer]:
    """Train a student for some batches; takes what :func:`build_trainer` takes, and returns the trainer."""
    return functools.partial(build_trainer, tokenizer, fit=True)


@pytest.fixture
def let(teacher_folder: str) -> Callable[..., LET]:
    """LET with a number as its weight and no head to load, unless another weight is given."""
    return lambda **options: LET(**{"teacher": teacher_folder, "weight": 1.0, **options})


@pytest.fixture
def teacher_sees(monkeypatch) -> Callable[..., list[tuple[bool, bool]]]:
    """Watches the teacher from here on, and may spoil its states: whether it is given a mask, and documents."""

    def watch(spoil: Callable[[torch.Tensor], None] = lambda states: None) -> list[tuple[bool, bool]]:
        given, hidden = [], Teacher.hidden

        def spy(self: Teacher, ids: Any, mask: Any = None, sequence_id: Any = None) -> torch.Tensor:
            given.append((mask is not None, sequence_id is not None))
            states = hidden(self, ids, mask, sequence_id).clone()
            spoil(states)
            return states

        monkeypatch.setattr(Teacher, "hidden", spy)
        return given

    return watch


@pytest.fixture
def saved(train: Callable[..., Trainer], tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Train with a checkpoint after every second batch; returns how to load that after ``batch``."""

    def run(*algorithms: Any, batch: int = 2, **options: Any) -> dict[str, str]:
        train(*algorithms, save_folder=str(tmp_path), save_interval="2ba", **options)
        return {"load_path": str(tmp_path / f"ep0-ba{batch}-rank0.pt")}

    return run


def counted(batch: Any) -> torch.Tensor:
    """The positions ``[B, S]`` whose next token counts."""
    return torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))


def metrics(trainer: Trainer, name: str) -> list[float]:
    """Everything that was logged under ``name``, in order."""
    return [value for _, value in trainer.logger.destinations[0].data[name]]


def parameters(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.state.model.named_parameters()}


def spawn(function: Callable[..., Any], nodes: int, folder: Path, *arguments: Any) -> list[Any]:
    """What ``function(*arguments)`` returns on two ranks of each node, all on the CPU; ``folder`` is to hold it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1], "WORLD_SIZE": 2 * nodes}
    torch.multiprocessing.spawn(_rank, (function, place, folder, arguments), nprocs=2 * nodes, daemon=True)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2 * nodes)]


def _rank(rank: int, function: Callable[..., Any], place: dict[str, Any], folder: Path, arguments: Any) -> None:
    place |= {"RANK": rank, "LOCAL_RANK": rank % 2, "NODE_RANK": rank // 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in place.items()} | {"CUDA_VISIBLE_DEVICES": ""})
    torch.set_num_threads(1)
    dist.initialize_dist("cpu", timeout=60)
    torch.save(function(*arguments), folder / f"rank{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo's taking down hangs now and then where a rank of another group has left already


def allow_fsdp_without_cuda() -> None:
    """FSDP on the CPU needs nothing but this: Composer asks CUDA for the device unconditionally."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # pyright: ignore[reportAttributeAccessIssue]


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def assert_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def hf_student(tokenizer: Any, folder: str, **options: Any) -> ComposerHFCausalLM:
    return ComposerHFCausalLM(
        tokenizer=tokenizer, pretrained_model_name_or_path=folder, pretrained=True, use_train_metrics=False, **options
    )


class Reads(TorchDispatchMode):
    """Counts the operations for which the host would wait for an accelerator."""

    names = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "repeat_interleave.Tensor")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        boolean = name.startswith("index.Tensor") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if boolean or any(name.startswith(known) for known in self.names):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class Sizes(TorchDispatchMode):
    """Collects how many elements the outputs of one operation have."""

    def __init__(self, operation: Any) -> None:
        super().__init__()
        self.operation = operation
        self.found: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is self.operation:
            self.found.append(output.numel())
        return output


def evaluator(tokenizer: Any) -> Evaluator:
    return Evaluator(label="eval", dataloader=build_data(tokenizer, seed=4), metric_names=["LanguageCrossEntropy"])

"""Score models on in-context tasks with lm-eval, chance beside each score.

  let-composer eval EleutherAI/pythia-160m runs/let/checkpoints/ep0-ba4800      # LET's nine tasks, from the hub
  let-composer eval MODEL --tasks data/offline/eval/tasks.yaml --limit 200      # the same from local files
  let-composer eval MODEL --tasks hellaswag piqa --shots 0                      # any task of lm-eval

A model is a Hugging Face folder, a hub id, or a Composer checkpoint: its file, or the folder of a sharded one. A YAML
of local files has llm-foundry's form (icl_tasks). acc takes the likeliest answer, acc_norm the likeliest for its
length. Runs in one process. Needs the extra: pip install "let-composer[eval]".
"""

import argparse
import importlib.util
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from omegaconf import DictConfig
from omegaconf import OmegaConf as om

from let_composer.options import nearest

__all__ = ["NINE", "add_arguments", "local_tasks", "open_model", "run", "score"]

NINE = ["hellaswag", "winogrande", "lambada_openai", "openbookqa", "arc_easy", "arc_challenge", "piqa", "sciq", "boolq"]
# How lm-eval reads llm-foundry's items, by icl_task_type.
KINDS: dict[str, dict[str, Any]] = {
    "multiple_choice": {"doc_to_text": "{{query}}", "doc_to_choice": "choices", "doc_to_target": "gold"},
    "schema": {"doc_to_text": "gold", "doc_to_choice": "context_options", "doc_to_target": "continuation"},
    "language_modeling": {"doc_to_text": "{{context}}"},
}


def local_tasks(path: str) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """lm-eval's tasks for local files, and the share that guessing scores in each.

    Args:
        path: A YAML with llm-foundry's ``icl_tasks``.

    Raises:
        ValueError: If a file is missing, or a task is of another kind.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no list of tasks at {path} (from {Path.cwd()}).")
    listed = om.load(path)
    entries = listed.get("icl_tasks") if isinstance(listed, DictConfig) else None
    if not entries:
        raise ValueError(f"{path} names no tasks. Its icl_tasks is to list them.")
    tasks, chances = [], {}
    for entry in entries:
        kind, label, file = entry.icl_task_type, str(entry.label), Path(entry.dataset_uri)
        if kind not in KINDS:
            raise ValueError(f"{label} is of the kind {kind}; local files may hold {', '.join(KINDS)}.")
        if not file.is_file():
            raise ValueError(f"there is no data of task {label!r} at {file} (from {Path.cwd()}).")
        items = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        answers = [len(item.get("choices") or item.get("context_options") or []) for item in items]
        chances[label] = sum(1 / n for n in answers if n) / len(items)
        delimiter = str(entry.get("continuation_delimiter", " "))
        metrics = ["acc", "acc_norm"] if kind == "multiple_choice" else ["acc"]
        tasks.append(
            {
                "task": label,
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(file.resolve())}},
                "test_split": "test",
                "fewshot_split": "test",
                "target_delimiter": delimiter,
                "fewshot_delimiter": str(entry.get("example_delimiter", "\n\n")),
                "output_type": "loglikelihood" if kind == "language_modeling" else "multiple_choice",
                "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics],
                **({"doc_to_target": delimiter + "{{continuation}}"} if kind == "language_modeling" else {}),
                **KINDS[kind],
            }
        )
    return tasks, chances


def open_model(name: str, trust_remote_code: bool = False) -> tuple[Any, Any, int]:
    """A language model on the GPU if there is one, its tokenizer and its context.

    Args:
        name: A Hugging Face folder, a hub id, the file of a Composer checkpoint or the folder of a sharded one.
        trust_remote_code: Whether code that comes with the model may run. Default: ``False``.

    Raises:
        ValueError: If there is no such model.
    """
    from composer.models import HuggingFaceModel
    from llmfoundry.models.mpt import MPTConfig, MPTForCausalLM
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

    path = Path(name).expanduser()
    weights: dict[str, torch.Tensor] = {}
    if path.is_file() or (path / ".metadata").exists():
        state = _read_checkpoint(path)
        entries = state["integrations"]["huggingface"]["model"]["config"]["content"]
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = HuggingFaceModel.load_huggingface_tokenizer_from_saved_state(
                state["integrations"]["huggingface"], trust_remote_code, folder
            )
        if tokenizer is None:
            raise ValueError(f"{name} holds no tokenizer. Export the model as a Hugging Face folder with one.")
        weights = {key.removeprefix("model."): value for key, value in state["model"].items()}
    else:
        if path.is_dir() and not (path / "config.json").exists():
            inside = sorted(str(each.parent.relative_to(path)) for each in path.glob("*/.metadata"))
            hint = f" It holds the sharded checkpoints {', '.join(inside)}: give one of them." if inside else ""
            raise ValueError(f"{name} has neither config.json (Hugging Face) nor .metadata (sharded Composer).{hint}")
        if not path.is_dir() and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
            raise ValueError(f"there is no model at {name} (from {Path.cwd()}).")
        try:
            entries = PretrainedConfig.get_config_dict(name)[0]
        except OSError as error:
            raise ValueError(f"there is no model {name!r} here or on the hub. ({error})") from error
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    model: Any
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    if entries.get("model_type") == "mpt" and "ffn_config" in entries:  # llm-foundry's; transformers has another
        config: Any = MPTConfig(**{**entries, "init_device": "cpu"})
        config.attn_config["attn_impl"] = "torch"
        build: Any = MPTForCausalLM
    else:
        config = AutoConfig.for_model(**entries) if weights else None
        build = AutoModelForCausalLM
    if weights:
        model = build(config) if build is MPTForCausalLM else build.from_config(config)
        model.load_state_dict(weights)
        model = model.to(dtype)
    else:
        options = {"config": config} if config is not None else {"trust_remote_code": trust_remote_code}
        model = build.from_pretrained(name, torch_dtype=dtype, **options)
    lengths = [entries.get(key) for key in ("max_position_embeddings", "n_positions", "max_seq_len")]
    length = next((n for n in lengths if isinstance(n, int)), 2048)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, length


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """Model and integrations of a Composer checkpoint; the optimizer stays where it is."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        if path.is_file():
            from composer.utils.checkpoint import safe_torch_load

            state = safe_torch_load(str(path))["state"]
        else:
            from torch.distributed.checkpoint import FileSystemReader
            from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
            from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

            loaded: dict[str, Any] = {}
            planner = _EmptyStateDictLoadPlanner(keys={"state.model", "state.integrations"})
            _load_state_dict(loaded, storage_reader=FileSystemReader(path), planner=planner, no_dist=True)
            state = loaded["state"]
        state["integrations"]["huggingface"]["model"]["config"]["content"]
    except (Exception, CheckpointException) as error:
        raise ValueError(
            f"{path} is not a Composer checkpoint of a Hugging Face or llm-foundry language model ({error!r})."
        ) from error
    return state


def score(
    model: str,
    tasks: Sequence[str | dict[str, Any]],
    shots: int | None = 1,
    limit: int | None = None,
    batch_size: int = 8,
    trust_remote_code: bool = False,
) -> pd.DataFrame:
    """Evaluate one model.

    Args:
        model: As in :func:`open_model`.
        tasks: Names of lm-eval's tasks, or its configurations of tasks.
        shots: Worked examples before each item. Default: ``1``; ``None`` for each task's own number.
        limit: Score only the first items of each task. Default: ``None``, all.
        batch_size: Sequences at a time. Default: ``8``.
        trust_remote_code: Whether code that comes with the model may run. Default: ``False``.

    Returns:
        A row for each task and metric: ``task``, ``metric``, ``items``, ``score`` and ``error``, one standard error.

    Raises:
        ValueError: If lm-eval is not installed, or there is no such model or task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError('lm-eval is not installed. Run: pip install "let-composer[eval]"')
    import lm_eval
    from lm_eval.models import huggingface
    from lm_eval.tasks import TaskManager

    from let_composer.counting import quiet

    named = [task for task in tasks if isinstance(task, str)]
    manager = TaskManager(include_defaults=bool(named))
    for name in named:
        if name not in manager.all_tasks:
            raise ValueError(f"lm-eval has no task {name!r}{nearest(name, manager.all_tasks)}.")
    with quiet():
        network, tokenizer, length = open_model(model, trust_remote_code)
        adapter, evaluate = cast(Any, huggingface).HFLM, cast(Any, lm_eval).simple_evaluate
        lm = adapter(
            pretrained=network, tokenizer=tokenizer, backend="causal", max_length=length, batch_size=batch_size
        )
        found = evaluate(
            lm, tasks=list(tasks), num_fewshot=shots, limit=limit, bootstrap_iters=0, log_samples=False,
            task_manager=manager,
        )  # fmt: skip
    rows = []
    for task, values in cast(Any, found)["results"].items():
        for metric in ("acc", "acc_norm"):
            if (value := values.get(f"{metric},none")) is not None:
                items = cast(Any, found)["n-samples"][task]["effective"]
                rows.append((task, metric, items, value, (value * (1 - value) / items) ** 0.5))
    return pd.DataFrame(rows, columns=pd.Index(["task", "metric", "items", "score", "error"]))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``let-composer eval``."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder, hub id or Composer checkpoint")
    parser.add_argument("--tasks", nargs="+", default=NINE, help="a YAML of local files, or names (default: nine)")
    parser.add_argument("--shots", type=int, default=1, help="worked examples (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N items of each task")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences at a time (default: %(default)s)")
    parser.add_argument("--out", default="runs/eval", help="where to write, without suffix (default: %(default)s)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a model")


def run(args: argparse.Namespace) -> None:
    """Carry out ``let-composer eval``.

    Raises:
        ValueError: As :func:`score` and :func:`local_tasks`, or if several processes were started.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("this runs in one process: start it without composer or torchrun.")
    local = len(args.tasks) == 1 and args.tasks[0].endswith((".yaml", ".yml"))
    tasks, chances = local_tasks(args.tasks[0]) if local else (args.tasks, {})
    out = Path(f"{args.out}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    frames = []
    for model in args.models:
        found = score(model, tasks, args.shots, args.limit, args.batch_size, args.trust_remote_code)
        frames.append(found.assign(model=model, shots=args.shots, chance=found.task.map(chances)))
        partial = out.with_name(f"{out.name}.partial")
        partial.write_text(json.dumps(pd.concat(frames).to_dict("records"), indent=1))
        os.replace(partial, out)
    every = pd.concat(frames)
    every["shown"] = [f"{100 * s:.1f} ± {100 * e:.1f}" for s, e in zip(every.score, every.error, strict=True)]
    keys = ["task", "metric", "items"]
    table = every.pivot(index=keys, columns="model", values="shown")
    if chances:
        table = table.assign(chance=[f"{100 * chances[task]:.1f}" for task, *_ in table.index])
    print(f"[%], {args.shots}-shot, ± one standard error\n{table.to_string()}\n")
    means = every[every.metric == "acc"].groupby("model", sort=False).score.mean()
    print("mean of acc over the tasks: " + ", ".join(f"{model} {100 * mean:.1f}" for model, mean in means.items()))
    print(f"written: {out}")

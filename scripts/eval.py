"""Score models with llm-foundry's in-context-learning evaluation, chance level and standard error beside each score.

    python scripts/prepare_offline.py --eval --teacher --out data/offline
    python scripts/eval.py yamls/eval_nine.yaml data/offline/smollm2-135m runs/let/checkpoints/latest-rank0.pt
    python scripts/eval.py yamls/eval_nine.yaml EleutherAI/pythia-160m --limit 200 --set precision=amp_bf16

A model is a Hugging Face folder, a hub id, or a Composer checkpoint of one file (it holds its model's configuration and
tokenizer). Prints a table and writes OUT.json after each model. Runs in one process.
"""

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import composer
import datasets.config
import llmfoundry
import torch
from composer import Callback, Logger, State
from composer.models import HuggingFaceModel
from composer.utils import get_file
from composer.utils.checkpoint import safe_torch_load
from llmfoundry import registry
from llmfoundry.command_utils.eval import evaluate
from llmfoundry.models.layers.attention import is_flash_v2_installed
from llmfoundry.models.mpt import MPTConfig, MPTForCausalLM
from omegaconf import DictConfig
from omegaconf import OmegaConf as om
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

__all__ = ["Result", "Score", "TrimPadding", "load", "main", "score", "select", "table"]


@dataclass(frozen=True)
class Score:
    """One task. Shares are of 1."""

    task: str
    shots: int
    items: int
    chance: float  # mean of 1 / number of choices; 0 where the answer is free text
    majority: float | None  # of the most frequent answer, where all items have the same choices
    accuracy: float
    standard_error: float
    cut: int  # sequences that filled the context: the beginning of their prompt may have been cut off


@dataclass(frozen=True)
class Result:
    """One model; the averages weigh every task alike."""

    model: str
    max_seq_len: int
    seconds: float
    scores: list[Score]

    @property
    def average(self) -> Score:
        """The unweighted mean over the tasks, as a score."""
        scores = self.scores
        return Score(
            task="average",
            shots=scores[0].shots,
            items=sum(s.items for s in scores),
            chance=sum(s.chance for s in scores) / len(scores),
            majority=None,
            accuracy=sum(s.accuracy for s in scores) / len(scores),
            standard_error=sum(s.standard_error**2 for s in scores) ** 0.5 / len(scores),
            cut=sum(s.cut for s in scores),
        )


class TrimPadding(Callback):
    """Cuts off columns that are padding in every row: llm-foundry pads each task to ``max_seq_len``.

    Causal models give the same outputs before them.
    """

    def __init__(self) -> None:
        self.cut: Counter[str] = Counter()

    def eval_batch_start(self, state: State, logger: Logger) -> None:
        """Cut the batch before it goes to the device."""
        if "continuation_indices" not in state.batch:  # generation tasks are padded on the left
            return
        ends = [int(indices[-1]) + 1 for indices in state.batch["continuation_indices"]]
        self.cut[str(state.dataloader_label)] += ends.count(state.batch["input_ids"].shape[1])
        for key in ("input_ids", "labels", "attention_mask"):
            state.batch[key] = state.batch[key][:, : max(ends)]


def load(path: str, overrides: list[str]) -> tuple[DictConfig, list[dict[str, Any]]]:
    """Read the evaluation's YAML and its list of tasks.

    Args:
        path: llm-foundry's evaluation YAML, without models.
        overrides: ``key=value`` strings; keys may be dotted.

    Raises:
        ValueError: If a file is missing or lists no tasks.
    """
    om.clear_resolver("oc.env")  # as llm-foundry does: a config must not read the environment
    config = om.merge(om.load(_require(path, "evaluation YAML")), om.from_cli(overrides))
    assert isinstance(config, DictConfig)
    tasks: Any = config.pop("icl_tasks", None)
    if isinstance(tasks, str):
        hint = "For the nine tasks run: python scripts/prepare_offline.py --eval --out data/offline"
        listed = om.load(_require(tasks, "list of tasks", hint))
        tasks = listed.get("icl_tasks") if isinstance(listed, DictConfig) else None
    if not tasks:
        raise ValueError(f"{path} names no tasks. Set icl_tasks to a list, or to a YAML that has icl_tasks.")
    return config, [dict(om.to_container(task, resolve=True)) for task in tasks]  # pyright: ignore


def _require(path: str, what: str, hint: str = "") -> str:
    if not Path(path).is_file():
        raise ValueError(f"there is no {what} at {path} (from {Path.cwd()}). {hint}".strip())
    return path


def select(task: dict[str, Any], folder: Path, limit: int | None, seed: int) -> list[dict[str, Any]]:
    """Write the items of a task that are to be scored into ``folder``, and let the task read them there.

    Args:
        task: An entry of ``icl_tasks``; its ``dataset_uri`` is changed.
        folder: Where the file goes.
        limit: Score so many items, drawn at random; ``None`` for all. Worked examples are drawn from the same items.
        seed: Of the draw.

    Returns:
        The items in the order of the file.

    Raises:
        ValueError: If the file is missing or too short.
    """
    uri, label = task["dataset_uri"], task["label"]
    source = folder / f"{label}.source.jsonl"
    if "://" in uri and not uri.startswith("hf://"):
        get_file(uri, str(source))
    else:
        hint = "Relative paths start where the program is started; prepare_offline.py --eval writes the nine tasks."
        source = Path(_require(uri, f"data of task {label!r}", hint))
    items = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    if limit is not None and limit < len(items):
        items = [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), limit))]
    if len(items) < 2:
        raise ValueError(f"{source} has {len(items)} items, and a worked example needs another one. Raise --limit.")
    # llm-foundry cuts batches by the first item's number of choices and would tear an item with more of them.
    items.insert(0, items.pop(max(range(len(items)), key=lambda i: (len(_choices(items[i])), -i))))
    target = folder / f"{label}.jsonl"
    target.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    task["dataset_uri"] = str(target)
    return items


def _choices(item: dict[str, Any]) -> list[str]:
    return item.get("choices") or item.get("context_options") or []


def _chance(items: list[dict[str, Any]]) -> tuple[float, float | None]:
    choices = [_choices(item) for item in items]
    chance = sum(1 / len(c) for c in choices if c) / len(items)
    if not choices[0] or any(c != choices[0] for c in choices):
        return chance, None
    return chance, Counter(item["gold"] for item in items).most_common(1)[0][1] / len(items)


def score(
    config: DictConfig,
    tasks: list[dict[str, Any]],
    model: str,
    limit: int | None = None,
    trust_remote_code: bool = False,
) -> Result:
    """Evaluate one model.

    Args:
        config: From :func:`load`.
        tasks: From :func:`load`; left as they are.
        model: A Hugging Face folder, a hub id or the file of a Composer checkpoint.
        limit: Score so many items of each task, drawn at random with the configuration's seed. Default: ``None``, all.
        trust_remote_code: Whether code that comes with the model may run. Default: ``False``.

    Raises:
        ValueError: If there is no such model or a file is missing.
    """
    started = time.time()
    with tempfile.TemporaryDirectory(prefix="eval-") as name:
        work = Path(name)
        tasks = [dict(task) for task in tasks]
        items = {task["label"]: select(task, work, limit, config.get("seed", 17)) for task in tasks}
        folder, load_path = _locate(model, work, trust_remote_code)
        entries = _entries(model, folder)
        length = min([config.max_seq_len, *(v for k in _LENGTHS if isinstance(v := entries.get(k), int))])
        settings: dict[str, Any] = {
            "name": "hf_causal_lm",
            "pretrained_model_name_or_path": folder,
            "pretrained": load_path is None,
            "trust_remote_code": trust_remote_code,
        }
        if entries.get("model_type") == "mpt" and "ffn_config" in entries:
            # llm-foundry's MPT, for which its installed package is the code; transformers has another of that name.
            AutoConfig.register("mpt", MPTConfig, exist_ok=True)
            AutoModelForCausalLM.register(MPTConfig, MPTForCausalLM, exist_ok=True)
            if not (torch.cuda.is_available() and is_flash_v2_installed()):
                settings["config_overrides"] = {"attn_config": {"attn_impl": "torch"}}
        registry.callbacks.register("trim_padding", func=TrimPadding)
        described = {
            "model_name": model,
            "model": settings,
            "tokenizer": {"name": folder, "kwargs": {"model_max_length": length}},
            "load_path": load_path,
        }
        run = om.merge(
            config,
            {
                "models": [described],
                "icl_tasks": tasks,
                "max_seq_len": length,
                "callbacks": {**(config.get("callbacks") or {}), "trim_padding": {}},
            },
        )
        assert isinstance(run, DictConfig)
        with _working_in(work):
            (trainer,), _ = evaluate(run)
        (trimmed,) = (callback for callback in trainer.state.callbacks if isinstance(callback, TrimPadding))
        scores = []
        for task in tasks:
            label = task["label"]
            chance, majority = _chance(items[label])
            for shots in task["num_fewshot"]:
                evaluator = f"{label}/{shots}-shot"
                metric: Any = next(m for m in trainer.state.eval_metrics[evaluator].values() if hasattr(m, "correct"))
                accuracy, total = float(metric.compute()), int(metric.total)
                if total != len(items[label]):
                    raise RuntimeError(f"{evaluator}: {total} items were scored of {len(items[label])} in the file.")
                error = (accuracy * (1 - accuracy) / total) ** 0.5
                scores.append(Score(label, shots, total, chance, majority, accuracy, error, trimmed.cut[evaluator]))
    return Result(model, length, time.time() - started, scores)


_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len")


def _locate(model: str, work: Path, trust_remote_code: bool) -> tuple[str, str | None]:
    """A Hugging Face name or folder, and the checkpoint to load into it if the folder has no weights."""
    path = Path(model).expanduser()
    if path.is_file():
        checkpoint = path.resolve()
        try:
            state = safe_torch_load(str(checkpoint))["state"]["integrations"]["huggingface"]
            entries = state["model"]["config"]["content"]
        except Exception as error:
            raise ValueError(
                f"{model} is not a Composer checkpoint of a Hugging Face or llm-foundry language model ({error!r})."
            ) from error
        folder = work / "model"
        tokenizer = HuggingFaceModel.load_huggingface_tokenizer_from_saved_state(
            state, trust_remote_code, str(work / "tokenizer")
        )
        if tokenizer is None:
            raise ValueError(f"{model} holds no tokenizer. Export the model as a Hugging Face folder with one.")
        tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(entries))
        return str(folder), str(checkpoint)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ValueError(
                f"{model} has no config.json: expected a Hugging Face folder with weights and tokenizer, a hub id, or "
                "a Composer checkpoint of one file. A sharded checkpoint has to be converted first."
            )
        return str(path.resolve()), None
    if path.is_absolute() or model.startswith((".", "~")) or path.suffix == ".pt" or model.count("/") > 1:
        raise ValueError(f"there is no model at {model} (from {Path.cwd()}).")
    return model, None


def _entries(model: str, folder: str) -> dict[str, Any]:
    try:
        return PretrainedConfig.get_config_dict(folder)[0]
    except OSError as error:
        raise ValueError(f"there is no model {model!r} here or on the hub. ({error})") from error


@contextlib.contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    # llm-foundry puts a copy of every task's data into the current folder, and datasets its tables into a cache.
    before, cache = Path.cwd(), datasets.config.HF_DATASETS_CACHE
    os.chdir(folder)
    datasets.config.HF_DATASETS_CACHE = folder / "cache"
    try:
        yield
    finally:
        os.chdir(before)
        datasets.config.HF_DATASETS_CACHE = cache


def table(results: list[Result]) -> str:
    """The results as Markdown, in per cent; ± is one standard error."""
    lines = [
        f"| accuracy [%] | items | chance | most frequent answer | {' | '.join(r.model for r in results)} |",
        "|---|---|---|---|" + "---|" * len(results),
    ]
    for row in zip(*([*r.scores, r.average] for r in results), strict=True):
        first = row[0]
        name = first.task if first.task == "average" else f"{first.task}, {first.shots}-shot"
        majority = "-" if first.majority is None else f"{100 * first.majority:.1f}"
        scores = " | ".join(f"{100 * s.accuracy:.1f} ± {100 * s.standard_error:.1f}" for s in row)
        lines.append(f"| {name} | {first.items:,} | {100 * first.chance:.1f} | {majority} | {scores} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="llm-foundry's evaluation YAML, without models: yamls/eval_nine.yaml")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder, hub id or Composer checkpoint")
    parser.add_argument("--limit", type=int, metavar="N", help="score N items of each task, drawn at random")
    parser.add_argument("--out", default="runs/eval", help="where to write, without suffix (default: runs/eval)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the YAML")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a model")
    options = parser.parse_args(arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        parser.error("this program runs in one process: start it with python, not with composer or torchrun")
    config, tasks = load(options.config, options.set)
    out = Path(f"{options.out}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    results = []
    for model in options.models:
        results.append(score(config, tasks, model, options.limit, options.trust_remote_code))
        written = {
            "results": [{**asdict(r), "average": asdict(r.average)} for r in results],
            "limit": options.limit,
            "config": om.to_container(config),
            "versions": {m.__name__: m.__version__ for m in (torch, composer, llmfoundry)},
        }
        partial = out.with_name(f"{out.name}.partial")
        partial.write_text(json.dumps(written, indent=1))
        os.replace(partial, out)
    print(table(results))
    for result in results:
        for each in result.scores:
            if each.cut:
                print(
                    f"{result.model}: {each.cut} prompts of {each.task} filled {result.max_seq_len} tokens or were cut."
                )
    print(f"\nwritten: {out}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"eval: {error}")

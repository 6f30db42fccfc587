"""Score models on in-context tasks with lm-eval, chance beside each score.

  let-composer eval EleutherAI/pythia-160m runs/let/checkpoints/ep0-ba4800      # LET's nine tasks, from the hub
  let-composer eval MODEL --tasks data/offline/eval/*.yaml --limit 200          # the same from local files
  let-composer eval MODEL --tasks hellaswag piqa --shots 0                      # tasks of lm-eval with acc or acc_norm

A model is a Hugging Face folder, a hub id, or a Composer checkpoint: its file, or the folder of a sharded one. A YAML
has lm-eval's form, too. acc takes the likeliest answer, acc_norm the likeliest for its length. Needs the extra:
pip install "let-composer[eval]".
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from yaml import YAMLError

from let_composer.configuration import quiet
from let_composer.files import replacing
from let_composer.names import refuse_unknown

__all__ = ["NINE", "add_arguments", "open_model", "run", "score"]

NINE = ["hellaswag", "winogrande", "lambada_openai", "openbookqa", "arc_easy", "arc_challenge", "piqa", "sciq", "boolq"]


def open_model(name: str) -> tuple[Any, Any]:
    """A language model and its tokenizer, from a Hugging Face folder, the hub or a Composer checkpoint.

    Raises:
        ValueError, OSError: If there is no such model.
    """
    from composer.models import HuggingFaceModel
    from llmfoundry.models.mpt import MPTConfig, MPTForCausalLM
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    AutoConfig.register("mpt", MPTConfig, exist_ok=True)  # transformers' own cannot read llm-foundry's
    AutoModelForCausalLM.register(MPTConfig, MPTForCausalLM, exist_ok=True)
    path, saved, weights = Path(name).expanduser(), {}, {}
    if path.is_file() or (path / ".metadata").exists():
        saved, weights = _read_checkpoint(path)
        config = AutoConfig.for_model(**saved["model"]["config"]["content"])
    elif (path.is_dir() or name.startswith((".", "~", "/"))) and not (path / "config.json").exists():
        inside = ", ".join(sorted(each.parent.name for each in path.glob("*/.metadata"))) or "none"
        raise ValueError(f"{path} has neither config.json nor .metadata. Sharded checkpoints in it: {inside}.")
    else:
        config = AutoConfig.from_pretrained(name)
    if isinstance(config, MPTConfig):
        config.init_device = "cpu"
        config.attn_config["attn_impl"] = "torch"
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    if not saved:
        model = AutoModelForCausalLM.from_pretrained(name, config=config, torch_dtype=dtype)
        return model, AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_config(config, torch_dtype=dtype)
    model.load_state_dict({key.removeprefix("model."): value for key, value in weights.items()})
    with tempfile.TemporaryDirectory() as folder:
        return model, HuggingFaceModel.load_huggingface_tokenizer_from_saved_state(saved, False, folder)


def _read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What Hugging Face needs of a Composer checkpoint, and the weights; the optimizer's state stays where it is."""
    from composer.utils.checkpoint import safe_torch_load
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    loaded: dict[str, Any] = {}
    try:
        if path.is_file():
            loaded = safe_torch_load(path)
        else:
            planner = _EmptyStateDictLoadPlanner(keys={"state.model", "state.integrations"})
            _load_state_dict(loaded, storage_reader=FileSystemReader(path), planner=planner, no_dist=True)
        return loaded["state"]["integrations"]["huggingface"], loaded["state"]["model"]
    except (Exception, CheckpointException) as error:
        raise ValueError(f"{path} is not a Composer checkpoint of a Hugging Face model ({error!r}).") from error


def score(model: str, tasks: list[str], **options: Any) -> pd.DataFrame:
    """Scores of one model, a row for each task and metric; ``error`` is one standard error. Prints what a task has that
    has neither ``acc`` nor ``acc_norm``.

    Args:
        model: As in :func:`open_model`.
        tasks: Names of lm-eval's tasks, and YAMLs of tasks.
        options: What lm-eval's ``simple_evaluate`` takes.

    Raises:
        ValueError: If lm-eval is not installed, or there is no such model or task.
    """
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError('lm-eval is not installed. Run: pip install "let-composer[eval]"') from error
    names = [task for task in tasks if not Path(task).is_file()]
    manager = TaskManager(include_defaults=bool(names))
    refuse_unknown("there is no such file, and lm-eval", names, manager.all_tasks)
    with quiet():
        try:
            loaded: Any = manager.load(tasks)["tasks"]
        except (ValueError, TypeError, KeyError, YAMLError) as error:
            raise ValueError(f"lm-eval cannot read {' '.join(tasks)}: {error}") from error
        network, tokenizer = open_model(model)
        network = network.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        given = {"pretrained": network, "tokenizer": tokenizer}
        given["max_length"] = getattr(network.config, "max_seq_len", None)  # of MPT; lm-eval knows the others' names
        options |= {"bootstrap_iters": 0, "task_manager": manager}
        found: Any = simple_evaluate("hf", given, list(loaded.values()), **options)
    rows = []
    for task, samples in found["samples"].items():
        scores, items = found["results"][task], found["n-samples"][task]["effective"]
        known = [metric for metric in ("acc", "acc_norm") if f"{metric},none" in scores]
        if not known:
            others = {name: value for name, value in scores.items() if isinstance(value, float)}
            print(f"{task} has neither acc nor acc_norm, and so no place in the table. lm-eval found {others}.")
        choice = found["configs"][task]["output_type"] == "multiple_choice"
        chance = choice * sum(1 / len(sample["arguments"]) for sample in samples) / len(samples)
        rows += [(task, metric, items, scores[f"{metric},none"], chance) for metric in known]
    frame = pd.DataFrame(rows, columns=pd.Index(["task", "metric", "items", "score", "chance"]))
    return frame.assign(error=(frame.score * (1 - frame.score) / frame["items"]) ** 0.5)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``let-composer eval``."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder, hub id or Composer checkpoint")
    parser.add_argument("--tasks", nargs="+", default=NINE, help="names and YAMLs of lm-eval's tasks (default: nine)")
    parser.add_argument("--shots", type=int, default=1, help="worked examples (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N items of each task")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences at a time (default: %(default)s)")
    parser.add_argument("--out", default="runs/eval", help="where to write, without suffix (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Carry out ``let-composer eval``.

    Raises:
        ValueError: As :func:`score`.
    """
    found, out = pd.DataFrame(), Path(f"{args.out}.json")
    for model in args.models:
        own = score(model, args.tasks, num_fewshot=args.shots, limit=args.limit, batch_size=args.batch_size)
        found = pd.concat([found, own.assign(model=model, shots=args.shots)])
        with replacing(out) as partial:
            found.to_json(partial, orient="records", indent=1)
    found["shown"] = (100 * found.score).map("{:.1f}".format) + (100 * found.error).map(" ± {:.1f}".format)
    found["chance"] = (100 * found.chance).map("{:.1f}".format)
    table = found.pivot(index=["task", "metric", "items", "chance"], columns="model", values="shown")
    means = found[found.metric == "acc"].groupby("model", sort=False).score.mean()
    print(f"[%], {args.shots}-shot, ± one standard error\n{table.to_string()}\n")
    print("mean of acc over the tasks: " + ", ".join(f"{model} {100 * mean:.1f}" for model, mean in means.items()))
    print(f"written: {out}")

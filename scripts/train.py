"""Train from an llm-foundry YAML, as llm-foundry's own train script does, with short forms for ``algorithms``.

    composer scripts/train.py yamls/let_125m.yaml variables.data_local=data/pile-mds algorithms.let.weight=0.5

A second YAML is merged into the first, as a cloud's parameters file; and the first into its ``base``, a YAML beside it.

``algorithms: [let]``, ``algorithms: [gradient_clipping: {...}, let]`` and ``let:`` with nothing after it all work, and
so do command-line overrides of a key of any of them. On the command line, and in a YAML that is merged into another,
null removes: ``algorithms.let=null`` trains without LET, ``algorithms=null`` without any algorithm.
"""

import argparse
import linecache
import traceback

from llmfoundry.command_utils.train import train
from llmfoundry.utils.config_utils import TRAIN_CONFIG_KEYS
from omegaconf import DictConfig
from omegaconf import OmegaConf as om

from let_composer.configuration import load, read_methods, require
from let_composer.names import refuse_unknown

__all__ = ["main"]

# What llm-foundry reads from every YAML: of the last two it says no more than KeyError.
NEEDED = ("model", "tokenizer", "optimizer", "scheduler", "train_loader", "max_seq_len", "max_duration",
          "device_eval_batch_size", "global_train_batch_size", "device_train_microbatch_size")  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Train; what the user can put right ends the program with a line, without a traceback."""
    usage = "composer scripts/train.py YAML [YAML ...] [key=value ...]"
    parser = argparse.ArgumentParser(
        usage=usage, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("yaml", metavar="YAML", help="a training YAML of llm-foundry")
    parser.add_argument("more", nargs="*", metavar="YAML or key=value", help="merged into it; keys may be dotted")
    options = parser.parse_args(arguments)
    try:
        config = load(options.yaml, options.more)
        if missing := sorted(key for key in om.missing_keys(config) if not _is_interpolation(config, key)):
            values = " ".join(f"{key}=..." for key in missing)
            raise ValueError(
                f"{options.yaml} leaves {', '.join(missing)} open. Give a value on the command line: {values}"
            )
        refuse_unknown("the YAML", config, TRAIN_CONFIG_KEYS)
        read_methods(config)
        require(config, NEEDED, "training")
        train(config)
    except (ValueError, TypeError, OSError) as error:
        if not _is_ours(error):
            raise
        raise SystemExit(f"train.py: {error}") from error


def _is_ours(error: Exception) -> bool:
    """Whether this package raised it on purpose, and so wrote it for the user."""
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    package = frame.f_globals["__name__"].partition(".")[0]
    source = linecache.getline(frame.f_code.co_filename, line)
    return package in ("let_composer", __name__) and source.lstrip().startswith("raise ")


def _is_interpolation(config: DictConfig, key: str) -> bool:
    parent, _, leaf = key.rpartition(".")
    return om.is_interpolation(om.select(config, parent) if parent else config, leaf)


if __name__ == "__main__":
    main()

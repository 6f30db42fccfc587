"""Train from an llm-foundry YAML, as llm-foundry's own train script does, with short forms for ``algorithms``.

    composer scripts/train.py yamls/let_125m.yaml variables.data_local=data/pile-mds algorithms.let.weight=0.5

A second YAML is merged into the first, as a cloud's parameters file.

``algorithms: [let]``, ``algorithms: [gradient_clipping: {...}, let]`` and ``let:`` with nothing after it all work, and
so do command-line overrides of a key of any of them. On the command line, and in a second YAML, null removes:
``algorithms.let=null`` trains without LET, ``algorithms=null`` without any algorithm.
"""

import sys

from llmfoundry.command_utils.train import train
from omegaconf import DictConfig
from omegaconf import OmegaConf as om

from let_composer.configuration import load

__all__ = ["main"]


def main(arguments: list[str]) -> None:
    """``train.py YAML [YAML ...] [key=value ...]``"""
    if not arguments:
        raise SystemExit(__doc__)
    config = load(arguments[0], arguments[1:])
    if missing := sorted(key for key in om.missing_keys(config) if not _is_interpolation(config, key)):
        raise ValueError(
            f"{arguments[0]} leaves {', '.join(missing)} open. Give a value on the command line: "
            + " ".join(f"{key}=..." for key in missing)
        )
    train(config)


def _is_interpolation(config: DictConfig, key: str) -> bool:
    parent, _, leaf = key.rpartition(".")
    return om.is_interpolation(om.select(config, parent) if parent else config, leaf)


if __name__ == "__main__":
    main(sys.argv[1:])

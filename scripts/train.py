"""Train from an llm-foundry YAML, as llm-foundry's own train script does, with short forms for ``algorithms``.

    composer scripts/train.py yamls/let_125m.yaml variables.data_local=data/pile-mds algorithms.let.weight=0.5

A second YAML is merged into the first, as a cloud's parameters file.

``algorithms: [let]``, ``algorithms: [gradient_clipping: {...}, let]`` and ``let:`` with nothing after it all work, and
so do command-line overrides of a key of any of them. On the command line, and in a second YAML, null removes:
``algorithms.let=null`` trains without LET, ``algorithms=null`` without any algorithm.
"""

import difflib
import os
import sys
from collections.abc import Iterable
from typing import Any

from llmfoundry import registry
from llmfoundry.command_utils.train import train
from omegaconf import DictConfig, ListConfig
from omegaconf import OmegaConf as om

__all__ = ["check_names", "expand_algorithms", "load", "main"]


def expand_algorithms(algorithms: Any) -> dict[str, Any]:
    """Turn any of the accepted forms into llm-foundry's mapping of names to keyword arguments.

    Args:
        algorithms: A mapping, or a list of names and mappings. A name alone stands for no arguments; null after a name
            stays null.

    Raises:
        ValueError: If an item is neither, or a name comes twice.
    """
    if isinstance(algorithms, str):
        algorithms = [algorithms]
    if isinstance(algorithms, (dict, DictConfig)):
        algorithms = [{name: arguments} for name, arguments in algorithms.items()]
    expanded: dict[str, Any] = {}
    for item in algorithms or []:
        if isinstance(item, str):
            item = {item: {}}
        if not isinstance(item, (dict, DictConfig)):
            raise ValueError(f"algorithms must list names or mappings of a name to its arguments, got {item!r}.")
        for name, arguments in item.items():
            if name in expanded:
                raise ValueError(f"algorithms names {name!r} twice. Keep one of them.")
            expanded[str(name)] = arguments
    return expanded


def check_names(algorithms: Iterable[str]) -> None:
    """Check that llm-foundry knows every algorithm.

    Args:
        algorithms: The names.

    Raises:
        ValueError: If one is not registered; the message has the nearest name that is.
    """
    known = set(registry.algorithms.get_all())
    for name in algorithms:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"there is no algorithm {name!r}.{hint} Registered are {', '.join(sorted(known))}.")


def load(path: str, overrides: list[str]) -> DictConfig:
    """Read a YAML and merge further YAMLs and command-line overrides into it.

    Args:
        path: The YAML.
        overrides: ``key=value`` strings; keys may be dotted. What has no ``=`` is a YAML, merged in before them.

    Raises:
        ValueError: If a YAML is not there or holds no mapping, or ``algorithms`` names what is not registered.
    """
    om.clear_resolver("oc.env")  # as llm-foundry does: a config must not read the environment
    paths = [path, *(item for item in overrides if "=" not in item)]
    for name in paths:
        if not os.path.exists(name):
            raise ValueError(f"there is no YAML at {name!r} (looked for {os.path.abspath(name)}). Check the path.")
    configs = [*map(om.load, paths), om.from_cli([item for item in overrides if "=" in item])]
    for config, source in zip(configs, [*paths, "the command line"], strict=True):
        if not isinstance(config, DictConfig):
            raise ValueError(f"expected {source} to hold a mapping, got {type(config).__name__}.")
    first, *others = configs
    merged = om.merge(first, {"algorithms": _with_defaults(first.pop("algorithms", None))})
    for config in others:
        algorithms = expand_algorithms(_listed(config.pop("algorithms"))) if "algorithms" in config else None
        removed = merged.algorithms if algorithms == {} else [n for n, a in (algorithms or {}).items() if a is None]
        kept = {name: arguments for name, arguments in merged.algorithms.items() if name not in removed}
        added = {name: arguments for name, arguments in (algorithms or {}).items() if arguments is not None}
        merged.algorithms = om.merge(kept, added)
        merged = om.merge(merged, config)
    assert isinstance(merged, DictConfig)
    if not merged.get("code_paths"):  # code that registers more, and that llm-foundry has yet to import
        check_names(merged.get("algorithms") or {})
    return merged


def _listed(algorithms: Any) -> Any:
    return list(algorithms) if isinstance(algorithms, ListConfig) else algorithms


def _with_defaults(algorithms: Any) -> dict[str, Any]:
    return {name: arguments or {} for name, arguments in expand_algorithms(_listed(algorithms)).items()}


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

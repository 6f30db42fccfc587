"""An llm-foundry YAML as training reads it: merged with further YAMLs and overrides, algorithms in any form."""

import os
from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig, ListConfig
from omegaconf import OmegaConf as om

from let_composer.options import nearest

__all__ = ["check_names", "expand_algorithms", "load", "refuse_unknown"]


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
    from llmfoundry import registry

    refuse_unknown("algorithms", algorithms, registry.algorithms.get_all())


def refuse_unknown(where: str, names: Iterable[Any], known: Iterable[str]) -> None:
    """Refuse names that nobody reads.

    Args:
        where: What holds the names, for the message.
        names: The names.
        known: Those that somebody reads.

    Raises:
        ValueError: With the nearest name that is known.
    """
    known = sorted(known)
    for name in map(str, names):
        if name not in known:
            raise ValueError(f"{where} has no {name!r}{nearest(name, known)}. There are {', '.join(known)}.")


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

"""An llm-foundry YAML as training reads it: merged with further YAMLs and overrides, algorithms in any form."""

import contextlib
import logging
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig
from omegaconf import OmegaConf as om
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from let_composer.names import refuse_unknown

if TYPE_CHECKING:
    from let_composer.options import Options

__all__ = ["check_names", "load", "quiet", "read_methods", "read_yaml", "require"]


def read_yaml(source: str | list[str]) -> DictConfig:
    """Read a YAML, or ``key=value`` strings of the command line.

    Raises:
        ValueError: If it is not there, no YAML, or holds no mapping.
    """
    name = "the command line" if isinstance(source, list) else source
    if isinstance(source, str) and not Path(source).is_file():
        raise ValueError(f"there is no YAML at {source!r} (looked for {Path(source).absolute()}). Check the path.")
    try:
        config = om.from_cli(source) if isinstance(source, list) else om.load(source)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
    if not isinstance(config, DictConfig):
        raise ValueError(f"expected {name} to hold a mapping, got {type(config).__name__}.")
    return config


def load(path: str, overrides: list[str]) -> DictConfig:
    """Read a YAML and merge further YAMLs and command-line overrides into it.

    Args:
        path: The YAML.
        overrides: ``key=value`` strings; keys may be dotted. What has no ``=`` is a YAML, merged in before them.

    Raises:
        ValueError: If a YAML is not there or holds no mapping, or ``algorithms`` names what is not registered.
    """
    om.clear_resolver("oc.env")  # as llm-foundry does: a config must not read the environment
    further = [read_yaml(item) for item in overrides if "=" not in item]
    merged = read_yaml(path)
    named = {name: arguments or {} for name, arguments in _expand(merged.pop("algorithms", None)).items()}
    merged = om.merge(merged, {"algorithms": named})
    for config in [*further, read_yaml([item for item in overrides if "=" in item])]:
        algorithms = _expand(config.pop("algorithms")) if "algorithms" in config else None
        removed = merged.algorithms if algorithms == {} else [n for n, a in (algorithms or {}).items() if a is None]
        kept = {name: arguments for name, arguments in merged.algorithms.items() if name not in removed}
        added = {name: arguments for name, arguments in (algorithms or {}).items() if arguments is not None}
        merged.algorithms = om.merge(kept, added)
        merged = om.merge(merged, config)
    assert isinstance(merged, DictConfig)
    if not merged.get("code_paths"):  # code that registers more, and that llm-foundry has yet to import
        check_names(merged.get("algorithms") or {})
    return merged


def _expand(algorithms: Any) -> dict[str, Any]:
    """Names to arguments, from a name, a list or a mapping. A name alone has no arguments; null stays null."""
    if isinstance(algorithms, DictConfig):
        algorithms = [{name: arguments} for name, arguments in algorithms.items()]
    expanded: dict[str, Any] = {}
    for item in algorithms or [] if isinstance(algorithms, (list, ListConfig, type(None))) else [algorithms]:
        named = {item: {}} if isinstance(item, str) else item
        if not isinstance(named, (dict, DictConfig)):
            raise ValueError(f"algorithms must list names or mappings of a name to its arguments, got {item!r}.")
        for name, arguments in named.items():
            if name in expanded:
                raise ValueError(f"algorithms names {name!r} twice. Keep one of them.")
            expanded[str(name)] = arguments
    return expanded


def read_methods(config: DictConfig) -> dict[str, "Options"]:
    """The options of LET, RKD and SALT, where a YAML names them.

    Raises:
        ValueError: For an option that is unknown, of another type or out of range.
    """
    from let_composer import LET, RKD, SALT

    given: Any = om.to_container(config.get("algorithms") or om.create(), resolve=True)
    methods = {"let": LET, "rkd": RKD, "salt": SALT}
    try:
        return {name: methods[name](**given[name]).options for name in given if name in methods}
    except TypeError as error:
        raise ValueError(str(error)) from error


def require(config: DictConfig, keys: Iterable[str], reader: str) -> None:
    """Refuse a YAML without keys that somebody reads; keys may be dotted.

    Raises:
        ValueError: With all that are missing.
    """
    if missing := [key for key in keys if om.select(config, key) is None]:
        given = " ".join(f"{key}=..." for key in missing)
        raise ValueError(f"the YAML has no {', '.join(missing)}, which {reader} needs. Give it there, or say {given}")


def check_names(algorithms: Iterable[str]) -> None:
    """Refuse algorithms that llm-foundry does not know."""
    from llmfoundry import registry

    refuse_unknown("algorithms", algorithms, registry.algorithms.get_all())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries say of models while they import and build them."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

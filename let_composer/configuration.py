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

__all__ = ["build_tokenizer", "load", "merge", "quiet", "read_bases", "read_methods", "read_yaml", "require"]


def read_yaml(source: str | list[str]) -> DictConfig:
    """Read a YAML, or ``key=value`` strings of the command line; a ValueError says why it cannot be read."""
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
        path: The YAML. With a ``base`` it is merged over that YAML, whose name is relative to its folder.
        overrides: ``key=value`` strings; keys may be dotted. What has no ``=`` is a YAML, merged in before them.

    Raises:
        ValueError: If a YAML is not there or holds no mapping, or ``algorithms`` names what is not registered.
    """
    om.clear_resolver("oc.env")  # as llm-foundry does: a config must not read the environment
    further = [read_yaml(item) for item in overrides if "=" not in item]
    further.append(read_yaml([item for item in overrides if "=" in item]))
    if any("base" in config for config in further):
        raise ValueError("only the first YAML may have a base. Give that YAML first, or leave base out.")
    merged = merge([*read_bases(path), *further])
    if not merged.get("code_paths"):  # code that registers more, and that llm-foundry has yet to import
        from llmfoundry import registry

        refuse_unknown("algorithms", merged.algorithms, registry.algorithms.get_all())
    return merged


def read_bases(path: str | Path) -> list[DictConfig]:
    """A YAML, behind the one that its ``base`` names, and so on; a ValueError if one is not there or its own base."""
    files, configs = [Path(path).resolve()], [read_yaml(str(path))]
    while base := configs[0].pop("base", None):
        files.append((files[-1].parent / str(base)).resolve())
        if files[-1] in files[:-1]:
            raise ValueError(f"{path} ends up as its own base. Leave base out of {files[-2].name}.")
        if not files[-1].is_file():
            raise ValueError(f"{files[-2]} has base: {base}, and there is no YAML at {files[-1]}. Put it there.")
        configs.insert(0, read_yaml(str(files[-1])))
    return configs


def merge(configs: Iterable[Any]) -> DictConfig:
    """Merge mappings, each over those before it.

    ``algorithms`` may have any form. Null removes one; null, ``[]`` or ``{}`` in the place of all removes all. In the
    first mapping, where there is nothing to remove, one with null has no arguments.

    Raises:
        ValueError: If null is to remove what is not there, or ``algorithms`` has none of its forms.
    """
    merged, algorithms = om.create({}), om.create({})
    for number, config in enumerate(om.create(config) for config in configs):
        if "algorithms" in config:
            given = _expand(config.pop("algorithms"))
            if not given:
                algorithms = om.create({})
            for name, own in given.items():
                if own is not None or number == 0:
                    algorithms.merge_with({name: own or {}})
                elif algorithms.pop(name, None) is None:
                    add = f"To add it, write {name}: {{}}."
                    raise ValueError(f"algorithms has no {name!r} that null could remove. {add}")
        merged.merge_with(config)
    merged.algorithms = algorithms
    return merged


def _expand(algorithms: Any) -> dict[str, Any]:
    """Names to arguments, from a name, a list or a mapping. A name alone has no arguments; null stays null."""
    expanded: dict[str, Any] = {}
    for item in algorithms if isinstance(algorithms, ListConfig) else [algorithms or {}]:
        named = {item: {}} if isinstance(item, str) else item
        if not isinstance(named, (dict, DictConfig)):
            raise ValueError(f"algorithms must list names or mappings of a name to its arguments, got {item!r}.")
        try:
            pairs = list(named.items())
        except OmegaConfBaseException as error:
            raise ValueError(f"algorithms cannot be read: {error}. Interpolate single arguments alone.") from error
        for name, arguments in pairs:
            if name in expanded:
                raise ValueError(f"algorithms names {name!r} twice. Keep one of them.")
            expanded[str(name)] = arguments
    return expanded


def read_methods(config: DictConfig) -> dict[str, "Options"]:
    """The options of LET, RKD and SALT, where a YAML names them; a ValueError if one is unknown or out of range."""
    from let_composer import LET, RKD, SALT

    given: Any = om.to_container(config.get("algorithms") or om.create(), resolve=True)
    methods = {"let": LET, "rkd": RKD, "salt": SALT}
    try:
        return {name: methods[name](**given[name]) for name in given if name in methods}
    except TypeError as error:
        raise ValueError(str(error)) from error


def build_tokenizer(entry: dict[str, Any]) -> Any:
    """The tokenizer of a YAML. llm-foundry's own function for it is a collective of all ranks."""
    from llmfoundry import registry
    from transformers import AutoTokenizer

    name, kwargs = entry["name"], entry.get("kwargs") or {}
    if name in registry.tokenizers:
        return registry.tokenizers.get(name)(**kwargs)
    return AutoTokenizer.from_pretrained(name, **kwargs)


def require(config: DictConfig, keys: Iterable[str], reader: str) -> None:
    """Refuse a YAML without keys that somebody reads, with a ValueError that names all of them; keys may be dotted."""
    if missing := [key for key in keys if om.select(config, key) is None]:
        given = " ".join(f"{key}=..." for key in missing)
        raise ValueError(f"the YAML has no {', '.join(missing)}, which {reader} needs. Give it there, or say {given}")


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

"""Print an example YAML that comes with the package, whole, or list them.

let-composer yaml
let-composer yaml let_1b4 > my.yaml
"""

import argparse
import itertools
from importlib.metadata import files
from pathlib import Path

from omegaconf import OmegaConf as om

from let_composer.configuration import merge, read_bases
from let_composer.names import refuse_unknown

__all__ = ["add_arguments", "examples", "run"]


def examples() -> dict[str, Path]:
    """The example YAMLs by name: of the installed package, or of the repository that it runs from."""
    installed = [Path(str(file.locate())) for file in files("let-composer") or [] if file.match("yamls/*.yaml")]
    found = installed or Path(__file__).parents[1].joinpath("yamls").glob("*.yaml")
    return {path.stem: path for path in sorted(found)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``let-composer yaml``."""
    parser.add_argument("name", nargs="?", help="which one (default: list them)")


def run(args: argparse.Namespace) -> None:
    """Carry out ``let-composer yaml``.

    Raises:
        ValueError: If there is none of that name.
    """
    found = examples()
    if args.name is None:
        for name, path in found.items():
            print(f"{name:24}{path.read_text().splitlines()[0].lstrip('# ')}")
        return
    name = args.name.removesuffix(".yaml")
    refuse_unknown("the package", [name], found)
    text = found[name].read_text()
    if len(configs := read_bases(found[name])) > 1:
        head = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines(keepends=True))
        text = "".join(head) + om.to_yaml(merge(configs))
    print(text, end="")

"""``let-composer VERB ...``: one command for everything but training, which stays llm-foundry's."""

import argparse
import importlib
import sys
from collections.abc import Callable
from typing import Any

import let_composer
from let_composer.names import nearest

__all__ = ["VERBS", "main", "told"]

# Verb -> its module, imported only when it is called, and a line for --help. A module offers ``__doc__``,
# ``add_arguments(parser)`` and ``run(args)``.
VERBS = {
    "prepare": ("let_composer.data.convert", "turn text into streaming shards"),
    "verify": ("let_composer.data.verify", "read shards back and check hashes, counts and token ids"),
    "plan": ("let_composer.planning", "FLOPs, memory, time and price of a run, before it costs anything"),
    "compare": ("let_composer.comparing", "runs by what they logged: verdict, table, picture, page"),
    "eval": ("let_composer.evaluating", "in-context tasks, for Hugging Face models and Composer checkpoints"),
    "yaml": ("let_composer.examples", "print an example YAML"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb with ``argv`` (default: the process's arguments); returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    lines = "\n".join(f"  {verb:10}{line}" for verb, (_, line) in VERBS.items())
    about = f"{str(__doc__).partition(':')[0]} with one of these verbs:\n\n{lines}"
    epilog, raw = "let-composer VERB --help shows what a verb takes.", argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser("let-composer", description=about, epilog=epilog, formatter_class=raw)
    top.add_argument("--version", action="version", version=let_composer.__version__)
    top.add_argument("verb", metavar="VERB")
    verb = top.parse_args(argv[:1]).verb
    if verb not in VERBS:
        top.error(f"there is no verb {verb!r}{nearest(verb, VERBS)}.")
    module = importlib.import_module(VERBS[verb][0])
    parser = argparse.ArgumentParser(f"let-composer {verb}", description=module.__doc__, formatter_class=raw)
    module.add_arguments(parser)
    args = parser.parse_intermixed_args(argv[1:])  # positional arguments may follow options
    return told(f"let-composer {verb}", lambda: module.run(args))


def told(program: str, work: Callable[[], Any]) -> int:
    """Do the work; tell in a line, without a traceback, what the user can put right; returns the exit status."""
    try:
        work()
    except (ValueError, OSError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program}: stopped.", file=sys.stderr)
        return 130
    return 0

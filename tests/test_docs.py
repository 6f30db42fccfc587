"""What the pages say: links, commands, options, metrics and messages are those of the code."""

import argparse
import importlib
import inspect
import re
from pathlib import Path

import pytest
import yaml

from let_composer import LET, RKD, SALT
from let_composer.cli import VERBS

ROOT = Path(__file__).parents[1]
FOLDERS = [ROOT / name / "README.md" for name in ("let_composer", "let_composer/loss", "yamls", "scripts", "tests")]
PAGES = [ROOT / "README.md", *FOLDERS, *sorted((ROOT / "yamls" / "evidence").glob("*.md"))]
CARD = FOLDERS[0].read_text()
SOURCE = "\n".join(path.read_text() for path in sorted((ROOT / "let_composer").rglob("*.py")))

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def commands(page: Path) -> list[str]:
    """The lines of fenced blocks and what stands between backticks; continued lines joined."""
    text = page.read_text().replace("\\\n", " ")
    blocks = re.findall(r"```\w*\n(.*?)```", text, flags=re.S)
    lines = [line.partition(" #")[0] for block in blocks for line in block.splitlines()]
    return lines + re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))


def rows(heading: str) -> list[list[str]]:
    """The cells of a table of the method card."""
    section = CARD.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@each_page
def test_links_resolve(page):
    for link in re.findall(r'(?:\]\(|(?:src|srcset|href)=")([^)"\s]+)', page.read_text()):
        path, _, anchor = link.partition("#")
        if "://" not in link:
            target = page.parent / path if path else page
            assert target.exists(), link
            headings = re.findall(r"(?m)^#+ (.*)$", target.read_text()) if anchor else [""]
            assert anchor in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], link


@each_page
def test_commands_and_paths_exist(page):
    for line in commands(page):
        for path in re.findall(r"(?<![\w/.])(?:scripts|yamls|tests)/[\w./-]+", line):
            assert (ROOT / path).exists(), line
        flags = re.findall(r"(?<!\S)--[a-z][a-z-]*", line)
        if called := re.match(r"let-composer (\w+)", line):
            parser = argparse.ArgumentParser()
            importlib.import_module(VERBS[called[1]][0]).add_arguments(parser)
            assert set(flags) <= set(parser._option_string_actions), line
        elif called := re.match(r"(?:python|bash) (\S+)", line):
            program = ROOT / called[1]
            text = (program / "__main__.py" if program.is_dir() else program).read_text() if called[1] != "-m" else line
            assert all(flag in text for flag in flags), line


@pytest.mark.parametrize(
    ("heading", "methods"), [("Options of `let`", [LET]), ("Options of `rkd` and `salt`", [RKD, SALT])]
)
def test_the_tables_of_options_are_the_signatures(heading, methods):
    for column, method in enumerate(methods, start=1):
        signature = inspect.signature(method).parameters
        expected = {name: parameter.default for name, parameter in signature.items() if name != "unknown"}
        found = {row[0].strip("`"): yaml.safe_load(row[column].strip("`")) for row in rows(heading)}
        assert list(found.items()) == list(expected.items())


def test_metrics_and_messages_are_those_of_the_code():
    for first, *_ in rows("Metrics"):
        for name in re.findall(r"`(?:let|kd)/([^`*]+)", first):
            assert name.rstrip("/") in SOURCE, name
    message = re.compile(r'"([^"]+)"')
    found = [text for first, *_ in rows("Troubleshooting") for text in message.findall(first)]
    source = re.sub(r'"\n\s+f?"', "", SOURCE)  # messages that go over several lines
    assert found and all(part in source for text in found for part in text.split("...") if part)


def test_the_pages_are_short():
    first = (ROOT / "README.md").read_text()
    assert len(first.split()) <= 1300 and len(first.splitlines()) <= 170
    assert sum(len(page.read_text().splitlines()) for page in FOLDERS) <= 350

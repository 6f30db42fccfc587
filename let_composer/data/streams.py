"""The ``streams:`` block of a llm-foundry YAML, and how much of each subset it samples."""

from typing import Any

import yaml

from let_composer.data.manifest import is_remote, join

__all__ = ["PILE_WEIGHTS", "check_proportions", "streams_block"]

# Share of each subset in the Pile, in percent of the bytes that a model sees in one pass (Gao et al. 2020, table 1).
# fmt: off
PILE_WEIGHTS = {
    "Pile-CC": 18.11, "PubMed Central": 14.40, "Books3": 12.07, "OpenWebText2": 10.01, "ArXiv": 8.96, "Github": 7.59,
    "FreeLaw": 6.12, "StackExchange": 5.13, "USPTO Backgrounds": 3.65, "PubMed Abstracts": 3.07,
    "Gutenberg (PG-19)": 2.17, "OpenSubtitles": 1.55, "Wikipedia (en)": 1.53, "DM Mathematics": 1.24,
    "Ubuntu IRC": 0.88, "BookCorpus2": 0.75, "EuroParl": 0.73, "HackerNews": 0.62, "YoutubeSubtitles": 0.60,
    "PhilPapers": 0.38, "NIH ExPorter": 0.30, "Enron Emails": 0.14,
}
# fmt: on


def check_proportions(proportions: dict[str, float] | None, found: set[str], complete: bool = False) -> None:
    """Refuse proportions that do not fit the subsets found so far or, if ``complete``, all of them."""
    if proportions and (missing := sorted(found - set(proportions))):
        raise ValueError(f"No proportion for {', '.join(missing)}, which the input holds. Give one for each subset.")
    if complete and (unknown := sorted(set(proportions or ()) - found)):
        raise ValueError(f"No subset {', '.join(unknown)} in the input, which holds {', '.join(sorted(found))}.")


def streams_block(manifest: dict[str, Any], out: str, proportions: dict[str, float] | None = None) -> str:
    """Write the ``streams:`` block for shards that the training machines see at ``out``.

    ``proportions`` are of the tokens that are trained on. The default is the Pile's published shares, which are of
    bytes, turned into tokens, when all subsets are the Pile's, and else their token counts.
    """
    trains = {name: about["splits"]["train"] for name, about in manifest["streams"].items()}
    trains = {name: train for name, train in sorted(trains.items()) if train["samples"]}
    check_proportions(proportions, set(trains), complete=True)
    weights = dict.fromkeys(trains, 1.0)
    if all(name in PILE_WEIGHTS for name in trains):
        weights = {name: PILE_WEIGHTS[name] / train["bytes"] for name, train in trains.items()}
    shares = proportions or {name: weights[name] * train["tokens"] for name, train in trains.items()}
    text = "# For train_loader.dataset of a llm-foundry YAML, in place of its local, remote and split.\n"
    if is_remote(out):
        text += "# Name a folder on each machine's own disk in variables.cache; cache_limit beside streams bounds it.\n"
    streams = {}
    for name in trains:
        folder = manifest["streams"][name]["folder"]
        where, key = join(out, folder), folder or "all"
        place = {"remote": where, "local": f"${{variables.cache}}/{key}"} if is_remote(out) else {"local": where}
        streams[key] = {**place, "split": "train", "proportion": float(f"{shares[name] / sum(shares.values()):.6g}")}
    return text + yaml.safe_dump({"streams": streams}, sort_keys=False)

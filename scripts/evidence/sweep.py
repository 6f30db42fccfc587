"""Run the arms of an experiment, each with several seeds, and compare them.

    python scripts/evidence/sweep.py yamls/evidence/evidence.yaml                        # what has not run yet
    python scripts/evidence/sweep.py yamls/evidence/evidence.yaml --only "strong-*" --seeds 17
    python scripts/evidence/sweep.py yamls/evidence/evidence.yaml --list                 # what would run
    python scripts/evidence/sweep.py yamls/evidence/evidence_125m.yaml variables.attention=flash   # for all runs

The file names a base YAML, settings for all runs, teachers (trained first, with one seed), arms as differences from
the base, and tables of arms to be compared, the first of which is the baseline. ``overview`` names, for each method,
baselines and their arms, to be set against how far the teacher is ahead of the baseline. Arms have names for people in
both. Interrupt it when you like: the next call goes on with the runs that have not finished. Writes
RUNS/<arm>-s<seed>.yaml (what was trained, to be repeated alone with train.py), .log and .done beside the folder that
Composer logs into, RUNS/<table>.html, .json, .png and .svg, RUNS/overview.png and .svg, and a page: what each arm
reached, and under which conditions. The page lies beside the YAML; what stands in it above the line MARK stays. With
other runs, settings or tables than the YAML's it is RUNS/report.md.
"""

import argparse
import contextlib
import fnmatch
import functools
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout
from omegaconf import DictConfig
from omegaconf import OmegaConf as om

from let_composer import comparing
from let_composer.cli import told
from let_composer.configuration import merge, read_bases, read_yaml
from let_composer.files import replacing
from let_composer.names import nearest

__all__ = ["Job", "against", "draw", "main", "plan", "read", "run", "tables"]

MARK = "<!-- From here on scripts/evidence/sweep.py writes. -->"
TRAIN = Path(__file__).parents[1] / "train.py"
APART = 10  # seconds between two starts: streaming's search for a free name in shared memory is no atomic one
PALETTE = ("#c8442a", "#2a6fc8", "#2f8f46", "#8a52b0", "#b8860b")
KEYS = {"base", "runs", "seeds", "settings", "teachers", "arms", "tables", "overview"}


@dataclass(frozen=True)
class Job:
    """One training run."""

    name: str  # of the run: arm and seed
    arm: str  # "" for a teacher
    config: DictConfig  # what train.py would read
    needs: dict[str, "Job"] = field(default_factory=dict)  # teachers, by the names of their runs

    def done(self, runs: Path) -> bool:
        """Whether an earlier call finished it and its teachers, with the same settings."""
        marker = runs / f"{self.name}.done"
        same = marker.exists() and om.to_container(om.load(marker)) == om.to_container(self.config)
        return same and all(teacher.done(runs) for teacher in self.needs.values())


def read(path: str | Path, overrides: Sequence[str] = (), runs: str | None = None) -> DictConfig:
    """Read an experiment's file.

    Args:
        path: The YAML. ``base`` in it is relative to its folder.
        overrides: ``key=value`` strings, dotted keys, merged into ``settings``.
        runs: Instead of the file's.

    Raises:
        ValueError: If keys are missing or unknown, or a table names an arm that is not there.
    """
    experiment = read_yaml(str(path))
    if (keys := set(experiment)) != KEYS:
        wrong = ", ".join(map(str, sorted(keys ^ KEYS)))
        raise ValueError(f"expected {path} to have the keys {', '.join(sorted(KEYS))}; missing or unknown: {wrong}.")
    experiment.base = str(Path(path).parent / experiment.base)
    experiment.runs = runs or experiment.runs
    experiment.settings = om.merge(experiment.settings, om.from_cli(list(overrides)))
    compared = {f"table {name}": arms.values() for name, arms in experiment.tables.items()}
    for method, pairs in experiment.overview.items():
        compared[f"overview of {method}"] = [*pairs, *(arm for arms in pairs.values() for arm in arms.values())]
    for name, arms in compared.items():
        if missing := [arm for arm in arms if arm not in experiment.arms]:
            raise ValueError(f"the {name} in {path} compares {', '.join(missing)}, which is no arm.")
    return experiment


def plan(experiment: DictConfig, seeds: list[int] | None = None, only: Sequence[str] = ("*",)) -> list[Job]:
    """The runs of an experiment.

    Args:
        experiment: As :func:`read` returns it.
        seeds: Instead of the file's.
        only: Patterns of arms' names.

    Returns:
        The teachers that are needed, then the arms in the patterns' order, all of one seed before the next seed.

    Raises:
        ValueError: If a pattern matches no arm.
    """

    def job(arm: str, settings: Any, seed: int | None = None) -> Job:
        name = arm if seed is None else f"{arm}-s{seed}"
        own = {"run_name": name, "variables": {"runs": experiment.runs}}
        if seed is not None:
            own |= {"seed": seed, "train_loader": {"dataset": {"shuffle_seed": seed}}}
        config = merge([*bases, experiment.settings, settings or {}, own])
        needs = {name: teachers[name] for name in _taught_by(config) if name in teachers}
        return Job(name, "" if seed is None else arm, config, needs)

    bases, teachers = read_bases(experiment.base), dict[str, Job]()
    teachers |= {name: job(name, settings) for name, settings in experiment.teachers.items()}
    chosen = dict.fromkeys(arm for pattern in only for arm in _matching(pattern, experiment.arms, "arm"))
    arms = [job(arm, experiment.arms[arm], seed) for seed in seeds or experiment.seeds for arm in chosen]
    needed = {name for arm in arms for name in arm.needs}
    return [*(teacher for name, teacher in teachers.items() if name in needed), *arms]


def _taught_by(config: Any) -> list[str]:
    given = [str((options or {}).get("teacher")) for options in (config.get("algorithms") or {}).values()]
    folder = f"{om.select(config, 'variables.runs')}/huggingface/"  # a marker that is not ours has none
    return [teacher.removeprefix(folder) for teacher in given if teacher.startswith(folder)]


def _matching(pattern: str, names: Iterable[str], what: str) -> list[str]:
    names = list(map(str, names))
    if not (found := fnmatch.filter(names, pattern)):
        near = nearest(pattern.strip("*"), names)
        raise ValueError(f"no {what} matches {pattern!r}{near}. There are {', '.join(names)}.")
    return found


def run(jobs: list[Job], runs: Path, workers: int) -> list[str]:
    """Run what is not done yet, ``workers`` runs at a time with an equal share of the cores each.

    Returns:
        Names of the runs that failed; what they printed is in their logs. What needs a failed teacher counts as failed.
    """
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads, **os.environ}
    waiting, failed, starting = [job for job in jobs if not job.done(runs)], set[str](), threading.Lock()

    def train(job: Job) -> None:
        if failed & job.needs.keys():
            failed.add(job.name)
            return
        shutil.rmtree(runs / job.name, ignore_errors=True)  # a cut run's events would mix with the new ones
        for marker in runs.glob("*.done"):  # what another teacher of this name taught is not done, in no later call
            if marker.stem == job.name or (job.arm == "" and job.name in _taught_by(om.load(marker))):
                marker.unlink(missing_ok=True)
        path, log = runs / f"{job.name}.yaml", runs / f"{job.name}.log"
        om.save(job.config, path)
        with open(log, "w") as file, starting:
            command = [sys.executable, str(TRAIN), str(path)]
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(APART if workers > 1 else None)
        exit_status = process.wait()
        if exit_status:
            failed.add(job.name)
            print(f"{job.name}: failed ({exit_status}), see {log}", flush=True)
            return
        with replacing(runs / f"{job.name}.done") as partial:
            partial.write_text(om.to_yaml(job.config))
        print(f"{job.name}: done", flush=True)

    for teachers in (True, False):
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(train, [job for job in waiting if teachers == (job.arm == "")]))
    return [job.name for job in waiting if job.name in failed]


Arms = dict[str, dict[int, Job]]  # the runs that are done, by arm and seed


def against(group: str, arm: str, baseline: dict[int, Job], own: dict[int, Job], runs: Path, every: Arms) -> Any:
    """A row: one arm against its baseline, over the seeds that both have done.

    The baseline itself has the teacher of ``every`` arm, if it is one. Shares are of the baseline's tokens.
    """
    seeds = sorted(baseline.keys() & own.keys())
    teacher = _teacher(every if own is baseline else {arm: own})
    found = {str(n): [_read(runs / of[seed].name) for seed in seeds] for n, of in enumerate((baseline, own))}
    summary = comparing.summarize(found, _read(runs / teacher) if teacher else None)
    whole, reached = (row["over_seeds"] for row in summary["arms"])

    def share(key: str) -> dict[str, float] | None:
        return reached[key] and {k: v if k == "n" else v / whole["tokens"]["mean"] for k, v in reached[key].items()}

    is_itself = own is baseline
    ends = [[seed["final_loss"] for seed in row["seeds"]] for row in summary["arms"]]
    gains = [start - end for start, end in zip(*ends, strict=True)]
    return SimpleNamespace(
        group=group,  # table or method
        arm=arm,  # by its name for people
        seeds=len(seeds),
        loss=reached["final_loss"],
        gain=None if is_itself else comparing.spread(gains),  # in final loss, against the same seed
        share=comparing.spread([1.0] * len(seeds)) if is_itself else share("tokens_to_baseline_loss"),
        passes=share("tokens_to_teacher_loss"),
        lead=summary["baseline_final_loss"] - summary["teacher"]["final_loss"] if teacher else None,
    )


_read = functools.cache(comparing.read_run)


def _teacher(arms: Arms) -> str | None:
    """The one teacher of all arms, if it is one."""
    teachers = {teacher for runs in arms.values() for job in runs.values() for teacher in job.needs}
    return teachers.pop() if len(teachers) == 1 else None


def tables(experiment: DictConfig, jobs: list[Job], page: Path, only: str = "*") -> None:
    """Compare the arms of every table and write the page.

    On the page an arm stands beside the baseline's runs with the seeds that both have done; pictures and JSON, with
    times and memory, are of the seeds that all of a table's arms have.

    Args:
        experiment: As :func:`read` returns it.
        jobs: As :func:`plan` returns them.
        page: Where to.
        only: Pattern of the tables' names.
    """
    runs, done = Path(experiment.runs).absolute(), {str(arm): dict[int, Job]() for arm in experiment.arms}
    for job in jobs:
        if job.arm and job.done(runs):
            done[job.arm][job.config.seed] = job

    def rows(group: str, baseline: dict[int, Job], arms: dict[str, str]) -> tuple[list[Any], Arms]:
        beside = {label: done[arm] for label, arm in arms.items() if done[arm].keys() & baseline.keys()}
        return [against(group, label, baseline, own, runs, beside) for label, own in beside.items()], beside

    lines, sections = list[Any](), list[str]()
    for name, arms in experiment.tables.items():
        if not fnmatch.fnmatch(str(name), only):
            continue
        found, beside = rows(str(name), done[next(iter(arms.values()))], arms)
        if len(found) > 1:
            lines += found
            if seeds := sorted(set.intersection(*map(set, beside.values()))):  # like with like
                paths = {label: [runs / own[seed].name for seed in seeds] for label, own in beside.items()}
                teacher = _teacher(beside)
                print(f"\n## {name}\n")
                comparing.compare(paths, teacher and runs / teacher, runs / re.sub(r"\W+", "-", str(name)))
    if fnmatch.fnmatch("overview", only):
        pairs = [(m, baseline, arms) for m, of in experiment.overview.items() for baseline, arms in of.items()]
        points = [row for method, baseline, arms in pairs for row in rows(str(method), done[baseline], arms)[0]]
        points.sort(key=lambda row: (row.group, -float("inf") if row.lead is None else -row.lead))
        if points:
            draw(points, runs / "overview")
            sections += ["## What guidance saves, over the lead of its teacher", "", _markdown(points), ""]
    if lines:
        sections += ["## Every arm", "", _markdown(lines), ""]
    if sections:
        written = page.read_text() if page.exists() else f"# {page.stem}\n\n"
        with replacing(page) as partial:
            partial.write_text("\n".join([written.partition(MARK)[0] + MARK, "", _conditions(), "", *sections]))


def _markdown(rows: list[Any]) -> str:
    groups = pd.Series([row.group for row in rows])
    cells = {
        "": groups.map("**{}**".format).where(~groups.duplicated(), ""),
        "arm": [row.arm for row in rows],
        "seeds": [row.seeds for row in rows],
        "final loss": [comparing.cell(row.loss, row.seeds, ".3f") for row in rows],
        "gain in loss": ["" if row.gain is None else comparing.cell(row.gain, row.seeds, "+.3f") for row in rows],
        "tokens to the baseline's final loss": [comparing.cell(row.share, row.seeds, ".0%") for row in rows],
        "lead of the teacher": ["" if row.lead is None else f"{row.lead:+.2f}" for row in rows],
        "passes it at": ["" if row.lead is None else comparing.cell(row.passes, row.seeds, ".0%") for row in rows],
    }
    return str(pd.DataFrame(cells).to_markdown(index=False, disable_numparse=True))


def draw(points: list[Any], out: Path) -> None:
    """Write OUT.png and OUT.svg: how much of the baseline's tokens is needed, over the teacher's lead."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "sweep"  # the same bytes for the same runs
    figure, axis = plt.subplots(figsize=(9.5, 5.5), constrained_layout=True)
    methods = list(dict.fromkeys(row.group for row in points))
    for number, method in enumerate(methods):
        color = PALETTE[number % len(PALETTE)]
        axis.plot([], [], "o", color=color, ms=8, label=method)
        for row in points:
            if row.group != method or row.lead is None:
                continue
            height, mark, text = 104 + 4 * number, "^", f"{row.arm}: never"  # above, a line for each method
            if row.share:
                height, mark, text = 100 * row.share["mean"], "o", row.arm
                axis.plot([row.lead] * 2, [100 * row.share[end] for end in ("min", "max")], color=color, lw=2)
            axis.plot(row.lead, height, mark, color=color, ms=8)
            axis.annotate(text, (row.lead, height), (6, 5), textcoords="offset points", fontsize=8, color=color)
    axis.axhline(100, color="#666666", lw=1, ls=":")
    axis.axvline(0, color="#666666", lw=1, ls=":")
    axis.set_xlabel("lead of the teacher: the baseline's final loss minus the teacher's [nats/token]")
    axis.set_ylabel("tokens to the baseline's final loss [% of its own]")
    axis.text(0.01, 0.02, "unguided, the student overtakes the teacher", transform=axis.transAxes, color="#666666")
    axis.text(0.99, 0.02, "unguided, it does not", transform=axis.transAxes, ha="right", color="#666666")
    axis.set_ylim(min([30.0, *(100 * row.share["min"] - 5 for row in points if row.share)]), 108 + 4 * len(methods))
    axis.margins(x=0.12)
    title = "What guidance saves, over the lead of its teacher (bars from the best seed to the worst)"
    axis.set_title(title, loc="left", fontsize=11)
    axis.legend(frameon=False, loc="upper right")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    for suffix in ("png", "svg"):
        with replacing(Path(f"{out}.{suffix}")) as partial:
            figure.savefig(partial, format=suffix, dpi=130, metadata={"Date": None} if suffix == "svg" else None)
    plt.close(figure)


def _conditions() -> str:
    import torch

    git = "git describe --always --dirty 2>/dev/null || echo unknown"
    commit = subprocess.run(git, shell=True, capture_output=True, text=True).stdout.strip()
    processors = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    device = f"{os.cpu_count()} cores of {processors[1] if processors else platform.machine()}"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "mosaicml", "llm-foundry"))
    return (
        f"{device}; Python {platform.python_version()}, {versions}; tables made at commit {commit}, "
        f"{time.strftime('%Y-%m-%d')}. Several seeds: mean (min..max); - is never. An arm stands beside the baseline's "
        "runs of the same seeds; shares are of the tokens of the whole run, gains are against the same seed, in nats "
        "per token. A teacher that was not trained here has no lead."
    )


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="merged into the settings of all runs")
    parser.add_argument("--runs", help="folder to write to, instead of the file's")
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of the arms to run (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the file's")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time (default: one a core)")
    parser.add_argument("--list", action="store_true", help="only say what is done and what would run")
    parser.add_argument("--tables", default="*", help="pattern of the tables to make (default: all)")
    options = parser.parse_intermixed_args(arguments)
    experiment = read(options.experiment, options.overrides, options.runs)
    runs = Path(experiment.runs)
    jobs = plan(experiment, options.seeds, options.only)
    _matching(options.tables, [*experiment.tables, "overview"], "table")
    if options.list:
        for job in jobs:
            print(f"{'done   ' if job.done(runs) else 'waiting'} {job.name}")
        return
    runs.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(runs / ".lock", timeout=0):
            failed = run(jobs, runs, options.workers)
    except Timeout:
        raise ValueError(f"another call is at work in {runs}. Wait for it, or stop it.") from None
    own = options.runs or options.overrides or options.tables != "*"
    page = runs / "report.md" if own else Path(options.experiment).with_suffix(".md")
    tables(experiment, plan(experiment, options.seeds), page, options.tables)
    if failed:
        raise ValueError(f"failed: {', '.join(failed)}. The logs are in {runs}.")


if __name__ == "__main__":
    sys.exit(told("sweep", main))

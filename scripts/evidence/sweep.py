"""Run the arms of an experiment, each with several seeds, and compare them.

    python scripts/evidence/sweep.py yamls/evidence/evidence.yaml                        # what has not run yet
    python scripts/evidence/sweep.py yamls/evidence/evidence.yaml --only "strong-*" --seeds 17
    python scripts/evidence/sweep.py yamls/evidence/evidence.yaml --list                 # what would run
    python scripts/evidence/sweep.py yamls/evidence/evidence_125m.yaml variables.attention=flash   # for all runs

The file names a base YAML, settings for all runs, teachers (trained first, with one seed), arms as differences from
the base, and tables of arms to be compared, the first of which is the baseline. ``overview`` names, for each method,
baselines and their arms, to be set against how far the teacher is ahead of the baseline. Arms have names for people in
both. Interrupt it when you like: the next call runs what has not finished with these settings and this teacher. A run
with ``autoresume`` goes on from its last checkpoint. Writes RUNS/<arm>-s<seed>.yaml (what was trained, to be repeated
alone with train.py), .log and .done beside the folder that Composer logs into, RUNS/<table>.html, .json, .png and .svg,
RUNS/overview.png and .svg, and a page: what each arm reached, and under which conditions. The page lies beside the
YAML; what stands in it above the line MARK stays. With other runs or settings than the YAML's it is RUNS/report.md.
"""

import argparse
import contextlib
import fnmatch
import functools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import pandas as pd
import torch
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from omegaconf import DictConfig
from omegaconf import OmegaConf as om

from let_composer import comparing
from let_composer.cli import told
from let_composer.configuration import merge, read_bases, read_yaml
from let_composer.files import replacing
from let_composer.names import nearest

__all__ = ["Job", "draw", "main", "plan", "read", "rows", "run", "tables"]

MARK = "<!-- From here on scripts/evidence/sweep.py writes. -->"
TRAIN = Path(__file__).parents[1] / "train.py"
APART = 10  # seconds between two starts: streaming's search for a free name in shared memory is no atomic one
PALETTE = ("#c8442a", "#2a6fc8", "#2f8f46", "#8a52b0", "#b8860b")
KEYS = {"base", "runs", "seeds", "settings", "teachers", "arms", "tables", "overview"}


@dataclass(frozen=True)
class Job:
    """One training run. RUNS/NAME.begun and RUNS/NAME.done hold the settings that it began and ended with."""

    name: str  # of the run: arm and seed
    arm: str  # "" for a teacher
    config: DictConfig  # what train.py would read
    needs: dict[str, "Job"] = field(default_factory=dict)  # teachers, by the names of their runs

    def done(self, runs: Path) -> bool:
        """Whether an earlier call finished it and its teachers, with the same settings."""
        return self._has(runs, "done") and all(teacher.done(runs) for teacher in self.needs.values())

    def resumes(self, runs: Path) -> bool:
        """Whether an earlier call left a checkpoint of it to go on from, with the same settings."""
        checkpoints = (runs / self.name).rglob("*.pt")
        return bool(self.config.get("autoresume")) and self._has(runs, "begun") and any(checkpoints)

    def _has(self, runs: Path, suffix: str) -> bool:
        path = runs / f"{self.name}.{suffix}"
        return path.exists() and om.to_container(om.load(path)) == om.to_container(self.config)

    def write(self, runs: Path, suffix: str) -> Path:
        """Write its settings to RUNS/NAME.suffix."""
        path = runs / f"{self.name}.{suffix}"
        with replacing(path) as partial:
            partial.write_text(om.to_yaml(self.config))
        return path

    def forget(self, runs: Path) -> None:
        """Remove what the run left, as its events would mix with new ones; of a teacher also the marks of those that it
        taught, whichever arm and seed they are."""
        shutil.rmtree(runs / self.name, ignore_errors=True)
        for mark in [*runs.glob("*.begun"), *runs.glob("*.done")]:
            if mark.stem == self.name or (self.arm == "" and self.name in _taught_by(om.load(mark))):
                mark.unlink(missing_ok=True)


def read(path: str | Path, overrides: Sequence[str] = (), runs: str | None = None) -> DictConfig:
    """Read an experiment's file.

    Args:
        path: The YAML. ``base`` in it is relative to its folder.
        overrides: ``key=value`` strings, dotted keys, merged into ``settings``.
        runs: Instead of the file's.

    Raises:
        ValueError: If keys are missing or unknown, or a table names an arm that is not there.
    """
    experiment = om.create({"settings": {}, "teachers": {}, "overview": {}})
    experiment.merge_with(read_yaml(str(path)))
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
    chosen = dict.fromkeys(arm for pattern in only for arm in _matching(pattern, list(experiment.arms)))
    arms = [job(arm, experiment.arms[arm], seed) for seed in seeds or experiment.seeds for arm in chosen]
    needed = {name for arm in arms for name in arm.needs}
    return [*(teacher for name, teacher in teachers.items() if name in needed), *arms]


def _taught_by(config: Any) -> list[str]:
    given = [str((options or {}).get("teacher")) for options in (om.select(config, "algorithms") or {}).values()]
    folder = f"{om.select(config, 'variables.runs')}/huggingface/"  # a YAML that is not ours has none
    return [teacher.removeprefix(folder) for teacher in given if teacher.startswith(folder)]


def _matching(pattern: str, arms: list[str]) -> list[str]:
    if not (found := fnmatch.filter(arms, pattern)):
        near = nearest(pattern.strip("*"), arms)
        raise ValueError(f"no arm matches {pattern!r}{near}. There are {', '.join(arms)}.")
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
        resumes, log = job.resumes(runs), runs / f"{job.name}.log"
        if not resumes:
            job.forget(runs)
        job.write(runs, "begun")
        command = [sys.executable, str(TRAIN), str(job.write(runs, "yaml"))]
        print(f"{job.name}: {'goes on: ' if resumes else ''}{shlex.join(command)}   (log: {log})", flush=True)
        with open(log, "w") as file, starting:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(APART if workers > 1 else None)
        exit_status, shown = process.wait(), log.read_text(errors="replace")
        if exit_status == 0:
            job.write(runs, "done")
            print(f"{job.name}: done", flush=True)
        elif resumes and "No training would occur" in shown:  # it was stopped between its last checkpoint and its end
            job.forget(runs)
            train(job)
        else:
            failed.add(job.name)
            tail = "\n".join(shown.splitlines()[-30:])
            print(f"{tail}\n{job.name}: failed ({exit_status}), the whole log is {log}", flush=True)

    for teachers in (True, False):
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(train, [job for job in waiting if teachers == (job.arm == "")]))
    return [job.name for job in waiting if job.name in failed]


Arms = dict[str, dict[int, Job]]  # the runs that are done, by arm and seed
_read = functools.cache(comparing.read_run)


def rows(group: str, arms: Arms, runs: Path) -> list[Any]:
    """Each arm against the first, the baseline, over the seeds that both have done. Shares are of its tokens."""
    found, baseline = list[Any](), next(iter(arms.values()))
    for arm, own in arms.items():
        is_itself, seeds = own is baseline, sorted(baseline.keys() & own.keys())
        teacher = _teacher(arms if is_itself else {arm: own})
        both = {str(n): [_read(runs / of[seed].name) for seed in seeds] for n, of in enumerate((baseline, own))}
        summary = comparing.summarize(both, _read(runs / teacher) if teacher else None)
        plain, guided = (row["seeds"] for row in summary["arms"])
        tokens = summary["arms"][0]["over_seeds"]["tokens"]["mean"]
        shares = {
            key: comparing.spread([run[key] and run[key] / tokens for run in guided])
            for key in ("tokens_to_baseline_loss", "tokens_to_teacher_loss")
        }
        ends = [(of["final_loss"], run["final_loss"]) for of, run in zip(plain, guided, strict=True)]
        gains = [None if end is None else start - end for start, end in ends]
        found.append(
            SimpleNamespace(
                group=group,  # table or method
                arm=arm,  # by its name for people
                seeds=len(seeds),
                loss=comparing.spread([end for _, end in ends]),
                gain=None if is_itself else comparing.spread(gains),  # in final loss, against the same seed
                share=comparing.spread([1.0] * len(seeds)) if is_itself else shares["tokens_to_baseline_loss"],
                passes=shares["tokens_to_teacher_loss"],
                lead=summary["baseline_final_loss"] - summary["teacher"]["final_loss"] if teacher else None,
            )
        )
    return found


def _teacher(arms: Arms) -> str | None:
    """The one teacher of all arms, if it is one."""
    teachers = {teacher for runs in arms.values() for job in runs.values() for teacher in job.needs}
    return teachers.pop() if len(teachers) == 1 else None


def tables(experiment: DictConfig, jobs: list[Job], page: Path) -> None:
    """Compare the arms of every table and write the page.

    On the page an arm stands beside the baseline's runs with the seeds that both have done; pictures and JSON, with
    times and memory, are of the seeds that all of a table's arms have.

    Args:
        experiment: As :func:`read` returns it.
        jobs: As :func:`plan` returns them.
        page: Where to.
    """
    runs, done = Path(experiment.runs).absolute(), {arm: dict[int, Job]() for arm in experiment.arms}
    for job in jobs:
        if job.arm and job.done(runs):
            done[job.arm][job.config.seed] = job

    def beside(arms: dict[str, str]) -> Arms:
        """Those that share a seed with the first."""
        baseline = done[next(iter(arms.values()))]
        return {label: done[arm] for label, arm in arms.items() if done[arm].keys() & baseline.keys()}

    lines, points, sections = list[Any](), list[Any](), list[str]()
    for name, arms in experiment.tables.items():
        found = beside(arms)
        if len(found) > 1:
            lines += rows(name, found, runs)
            if seeds := sorted(set.intersection(*map(set, found.values()))):  # like with like
                paths = {label: [runs / own[seed].name for seed in seeds] for label, own in found.items()}
                teacher = _teacher(found)
                print(f"\n## {name}\n")
                comparing.compare(paths, teacher and runs / teacher, runs / re.sub(r"\W+", "-", name))
    for method, pairs in experiment.overview.items():
        for baseline, arms in pairs.items():
            if found := beside({"": baseline, **arms}):
                points += rows(method, found, runs)[1:]
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
    figure = Figure(figsize=(9.5, 5.5), layout="constrained")
    axis = figure.subplots()
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
        same_bytes = matplotlib.rc_context({"svg.hashsalt": "sweep"})  # for the same runs
        with same_bytes, replacing(Path(f"{out}.{suffix}")) as partial:
            figure.savefig(partial, format=suffix, dpi=130, metadata={"Date": None})


def _conditions() -> str:
    git = "git describe --always --dirty 2>/dev/null || echo unknown"
    commit = subprocess.run(git, shell=True, capture_output=True, text=True).stdout.strip()
    cpuinfo = Path("/proc/cpuinfo")
    processor = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    device = f"{os.cpu_count()} cores of {processor[1] if processor else platform.machine()}"
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
    options = parser.parse_intermixed_args(arguments)
    experiment = read(options.experiment, options.overrides, options.runs)
    runs, jobs = Path(experiment.runs), plan(experiment, options.seeds, options.only)
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
    own = options.runs or options.overrides
    page = runs / "report.md" if own else Path(options.experiment).with_suffix(".md")
    tables(experiment, plan(experiment, options.seeds), page)
    if failed:
        raise ValueError(f"failed: {', '.join(failed)}. The logs are in {runs}.")


if __name__ == "__main__":
    sys.exit(told("sweep", main))

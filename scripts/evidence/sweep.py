"""Run the arms of an experiment, each with several seeds, and compare them.

    python scripts/evidence/sweep.py yamls/evidence/evidence.yaml                        # what has not run yet
    python scripts/evidence/sweep.py yamls/evidence/evidence.yaml --only "strong-*" --seeds 17
    python scripts/evidence/sweep.py yamls/evidence/evidence.yaml --list                 # what would run
    python scripts/evidence/sweep.py yamls/evidence/evidence_125m.yaml variables.attention=flash   # for all runs

The YAML names a base, settings for all runs, teachers (trained first, with one seed), arms as differences from the
base, and tables of arms, the first of which is the baseline. ``overview`` picks arms of the tables for a picture over
the lead of their teachers. Interrupt it when you like: the next call runs what has not finished with these settings and
these teachers. With ``autoresume`` a run goes on from its last checkpoint. In RUNS, NAME.yaml is what was trained;
train.py repeats it alone, with another run_name. Pictures go there, too. A page beside the YAML says what each arm
reached, and under which conditions; what stands in it above the line MARK stays. With other runs or settings than the
YAML's it is RUNS/report.md.
"""

import argparse
import contextlib
import fnmatch
import functools
import itertools
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
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

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
from let_composer.picture import PALETTE

__all__ = ["Job", "main", "plan", "read", "run", "tables"]

MARK = "<!-- From here on scripts/evidence/sweep.py writes. -->"
TRAIN = Path(__file__).parents[1] / "train.py"
APART = 10  # seconds between two starts: streaming's search for a free name in shared memory is no atomic one
KEYS = {"base", "runs", "seeds", "settings", "teachers", "arms", "tables", "overview"}


@dataclass(frozen=True)
class Job:
    """One training run. RUNS/NAME.begun and RUNS/NAME.done hold the settings that it began and ended with."""

    name: str  # of the run: arm and seed
    arm: str  # "" for a teacher
    config: DictConfig  # what train.py would read
    needs: dict[str, "Job"]  # teachers, by the names of their runs

    def file(self, suffix: str = "") -> Path:
        """What belongs to it in RUNS. Without a suffix it is the folder that Composer logs into."""
        return Path(f"{self.config.variables.runs}/{self.name}{suffix}")

    def done(self) -> bool:
        """Whether an earlier call finished it and its teachers, with the same settings."""
        return self._holds(".done") and all(teacher.done() for teacher in self.needs.values())

    def resumes(self) -> bool:
        """Whether an earlier call left a checkpoint of it to go on from, with the same settings."""
        return bool(self.config.get("autoresume")) and self._holds(".begun") and any(self.file().rglob("*.pt"))

    def _holds(self, suffix: str) -> bool:
        path = self.file(suffix)
        return path.exists() and om.to_container(om.load(path)) == om.to_container(self.config)

    def write(self, suffix: str) -> None:
        """Write its settings."""
        with replacing(self.file(suffix)) as partial:
            om.save(self.config, partial)

    def forget(self) -> None:
        """Remove what it left, as its events would mix with new ones; and let no run that it taught count as done."""
        shutil.rmtree(self.file(), ignore_errors=True)
        runs = self.file().parent
        for mark in [*runs.glob("*.begun"), *runs.glob("*.done")]:
            if mark.stem == self.name or (self.arm == "" and self.name in _taught_by(om.load(mark))):
                mark.unlink(missing_ok=True)


def read(path: str | Path, overrides: Sequence[str] = (), runs: str | None = None) -> DictConfig:
    """Read an experiment; ``key=value`` overrides go into its settings.

    Raises:
        ValueError: If keys are missing or unknown, or a table names an arm that is not there.
    """
    experiment = om.create({"settings": {}, "teachers": {}, "overview": {}})
    experiment.merge_with({key: value for key, value in read_yaml(str(path)).items() if value is not None})
    if (keys := set(experiment)) != KEYS:
        wrong = ", ".join(map(str, sorted(keys ^ KEYS)))
        raise ValueError(f"expected {path} to have the keys {', '.join(sorted(KEYS))}; missing or unknown: {wrong}.")
    experiment.base = str(Path(path).parent / experiment.base)
    experiment.runs = runs or experiment.runs
    experiment.settings.merge_with(om.from_cli(list(overrides)))
    compared = {arm for arms in experiment.tables.values() for arm in arms.values()}
    for what, known, where in (("tables", set(experiment.arms), "no arm"), ("overview", compared, "in no table")):
        for name, arms in experiment[what].items():
            if missing := sorted(set(arms.values()) - known):
                raise ValueError(f"{what}: {name} in {path} compares {', '.join(missing)}, which is {where}.")
    return experiment


def plan(experiment: DictConfig, seeds: list[int] | None = None, only: Sequence[str] = ("*",)) -> list[Job]:
    """The teachers that are needed, then the arms in the patterns' order, all of one seed before the next seed.

    Args:
        experiment: As :func:`read` returns it.
        seeds: Instead of the file's.
        only: Patterns of arms' names; each must match one.
    """
    bases, teachers = read_bases(experiment.base), dict[str, Job]()

    def job(arm: str, settings: Any, seed: int | None = None) -> Job:
        name = arm if seed is None else f"{arm}-s{seed}"
        own = {"run_name": name, "variables": {"runs": experiment.runs}}
        if seed is not None:
            own |= {"seed": seed, "train_loader": {"dataset": {"shuffle_seed": seed}}}
        config = merge([*bases, experiment.settings, settings or {}, own])
        needs = {name: teachers[name] for name in _taught_by(config) if name in teachers}
        return Job(name, "" if seed is None else arm, config, needs)

    for name, settings in experiment.teachers.items():
        teachers[name] = job(name, settings)
    for pattern in only:
        if not fnmatch.filter(experiment.arms, pattern):
            near = nearest(pattern.strip("*"), experiment.arms)
            raise ValueError(f"no arm matches {pattern!r}{near}. There are {', '.join(experiment.arms)}.")
    chosen = dict.fromkeys(arm for pattern in only for arm in fnmatch.filter(experiment.arms, pattern))
    arms = [job(arm, experiment.arms[arm], seed) for seed in seeds or experiment.seeds for arm in chosen]
    needed = {name for arm in arms for name in arm.needs}
    return [*(teacher for name, teacher in teachers.items() if name in needed), *arms]


def _taught_by(config: Any) -> list[str]:
    given = [str((options or {}).get("teacher")) for options in (config.get("algorithms") or {}).values()]
    folder = f"{om.select(config, 'variables.runs')}/huggingface/"  # a mark that is not ours has none
    return [teacher.removeprefix(folder) for teacher in given if teacher.startswith(folder)]


def run(jobs: list[Job], workers: int) -> list[str]:
    """Run what is not done yet, ``workers`` runs at a time with an equal share of the cores each.

    Returns:
        Names of the runs that failed; what they printed is in their logs. What needs a failed teacher counts as failed.
    """
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": threads, **os.environ}
    waiting, failed, starting = [job for job in jobs if not job.done()], set[str](), threading.Lock()

    def train(job: Job) -> None:
        if failed & job.needs.keys():
            failed.add(job.name)
            return
        if not (resumes := job.resumes()):
            job.forget()
        job.write(".begun")
        job.write(".yaml")
        command, log = [sys.executable, str(TRAIN), str(job.file(".yaml"))], job.file(".log")
        print(f"{job.name}: {'goes on: ' if resumes else ''}{shlex.join(command)}   (log: {log})", flush=True)
        with open(log, "w") as file, starting:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(APART if workers > 1 else None)
        exit_status, shown = process.wait(), log.read_text(errors="replace")
        if exit_status == 0:
            job.write(".done")
            print(f"{job.name}: done", flush=True)
        elif resumes and "No training would occur" in shown:  # it was stopped between its last checkpoint and its end
            job.forget()
            train(job)
        else:
            failed.add(job.name)
            tail = "\n".join(shown.splitlines()[-30:])
            print(f"{tail}\n{job.name}: failed ({exit_status}), the whole log is {log}", flush=True)

    for teachers in (True, False):
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(train, [job for job in waiting if teachers == (job.arm == "")]))
    return [job.name for job in waiting if job.name in failed]


class Row(NamedTuple):
    """What an arm reached, beside the baseline's runs of the same seeds."""

    cells: dict[str, Any]  # of the page
    lead: float | None  # of its teacher: the baseline's final loss minus the teacher's
    share: dict[str, float] | None  # of the baseline's tokens, to its final loss


Arms = dict[str, dict[int, Job]]  # the runs that are done, by arm and seed
Rows = dict[str, dict[str, Row]]  # by table or method, and arm
_read = functools.cache(comparing.read_run)


def _teacher(arms: Arms) -> Job | None:
    """The one teacher of all arms, if it is one."""
    teachers = {name: teacher for runs in arms.values() for job in runs.values() for name, teacher in job.needs.items()}
    return next(iter(teachers.values())) if len(teachers) == 1 else None


def _against_the_first(arms: Arms) -> dict[str, Row]:
    """Each arm beside the first, the baseline, over the seeds that both have done."""
    rows, baseline = dict[str, Row](), next(iter(arms.values()))
    for arm, own in arms.items():
        seeds, is_itself = sorted(baseline.keys() & own.keys()), own is baseline
        teacher, n = _teacher(arms if is_itself else {arm: own}), len(seeds)
        both = {str(i): [_read(of[seed].file().absolute()) for seed in seeds] for i, of in enumerate((baseline, own))}
        summary = comparing.summarize(both, teacher and _read(teacher.file().absolute()))
        whole, reached = (row["over_seeds"] for row in summary["arms"])
        starts, ends = ([seed["final_loss"] for seed in row["seeds"]] for row in summary["arms"])
        gains = [start - end for start, end in zip(starts, ends, strict=True)]
        lead = summary["baseline_final_loss"] - summary["teacher"]["final_loss"] if teacher else None
        tokens, share = whole["tokens"]["mean"], reached["tokens_to_baseline_loss"]
        cells = {
            "seeds": n,
            "final loss": comparing.cell(reached["final_loss"], n, ".3f"),
            "gain in loss": "" if is_itself else comparing.cell(comparing.spread(gains), n, "+.3f"),
            "tokens to the baseline's final loss": "100%" if is_itself else comparing.cell(share, n, ".0%", tokens),
            "lead of the teacher": "" if lead is None else f"{lead:+.2f}",
            "passes it at": "" if lead is None else comparing.cell(reached["tokens_to_teacher_loss"], n, ".0%", tokens),
        }
        rows[arm] = Row(cells, lead, share and {of: share[of] / tokens for of in ("min", "mean", "max")})
    return rows


def tables(experiment: DictConfig, jobs: list[Job], page: Path) -> None:
    """Compare what is done of the jobs, a picture and a JSON for each table, and write the page.

    On the page an arm stands beside the baseline's runs with the seeds that both have done; pictures and JSON, with
    times and memory, are of the seeds that all of a table's arms have.
    """
    done = {arm: {job.config.seed: job for job in jobs if job.arm == arm and job.done()} for arm in experiment.arms}
    runs, every, by_arm = Path(experiment.runs), Rows(), dict[str, Row]()
    for name, arms in experiment.tables.items():
        baseline = done[next(iter(arms.values()))]
        found = {label: done[arm] for label, arm in arms.items() if done[arm].keys() & baseline.keys()}
        if len(found) < 2:
            continue
        every[name] = _against_the_first(found)
        by_arm |= {arms[label]: row for label, row in list(every[name].items())[1:]}
        if seeds := sorted(set.intersection(*map(set, found.values()))):  # like with like
            paths = {label: [own[seed].file() for seed in seeds] for label, own in found.items()}
            teacher = _teacher(found)
            print(f"\n## {name}\n")
            comparing.compare(paths, teacher and teacher.file(), runs / re.sub(r"\W+", "-", name))
    if not every:
        return
    sections = ["## Every arm", "", _markdown(every), ""]
    overview = {
        method: {label: by_arm[arm] for label, arm in arms.items() if arm in by_arm}
        for method, arms in experiment.overview.items()
    }
    if any(overview.values()):
        _draw(overview, runs / "overview")
        sections = ["## What guidance saves, over the lead of its teacher", "", _markdown(overview), "", *sections]
    written = page.read_text() if page.exists() else f"# {page.stem}\n\n"
    with replacing(page) as partial:
        partial.write_text("\n".join([written.partition(MARK)[0] + MARK, "", _conditions(), "", *sections]))


def _markdown(rows: Rows) -> str:
    lines = [
        {"": "" if number else f"**{group}**", "arm": arm, **row.cells}
        for group, arms in rows.items()
        for number, (arm, row) in enumerate(arms.items())
    ]
    return str(pd.DataFrame(lines).to_markdown(index=False, disable_numparse=True))


def _draw(rows: Rows, out: Path) -> None:
    """Write OUT.png and OUT.svg: how much of the baseline's tokens is needed, over the teacher's lead."""
    figure, (gray, *colors) = Figure(figsize=(9.5, 5.5), layout="constrained"), PALETTE
    axis = figure.subplots()
    for number, (color, (method, arms)) in enumerate(zip(itertools.cycle(colors), rows.items(), strict=False)):
        axis.plot([], [], "o", color=color, ms=8, label=method)
        for arm, (_, lead, share) in arms.items():
            if lead is None:
                continue
            height, mark, text = 104 + 4 * number, "^", f"{arm}: never"  # above, a line for each method
            if share:
                height, mark, text = 100 * share["mean"], "o", arm
                axis.plot([lead] * 2, [100 * share["min"], 100 * share["max"]], color=color, lw=2)
            axis.plot(lead, height, mark, color=color, ms=8)
            axis.annotate(text, (lead, height), (6, 5), textcoords="offset points", fontsize=8, color=color)
    axis.axhline(100, color=gray, lw=1, ls=":")
    axis.axvline(0, color=gray, lw=1, ls=":")
    axis.set_title("What guidance saves, over the lead of its teacher (bars from the best seed to the worst)")
    axis.set_xlabel("lead of the teacher: the baseline's final loss minus the teacher's [nats/token]")
    axis.set_ylabel("tokens to the baseline's final loss [% of its own]")
    axis.text(0.01, 0.02, "unguided, the student overtakes the teacher", transform=axis.transAxes, color=gray)
    axis.text(0.99, 0.02, "unguided, it does not", transform=axis.transAxes, ha="right", color=gray)
    axis.margins(x=0.16, y=0.15)
    axis.set_ylim(top=108 + 4 * len(rows))
    axis.legend(frameon=False, loc="upper right")
    axis.grid(alpha=0.25)
    for suffix in ("png", "svg"):
        with replacing(Path(f"{out}.{suffix}")) as partial:
            figure.savefig(partial, format=suffix, dpi=130)


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
            print(f"{'done   ' if job.done() else 'waiting'} {job.name}")
        return
    runs.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(runs / ".lock", timeout=0):
            failed = run(jobs, options.workers)
    except Timeout:
        raise ValueError(f"another call is at work in {runs}. Wait for it, or stop it.") from None
    own = options.runs or options.overrides
    page = runs / "report.md" if own else Path(options.experiment).with_suffix(".md")
    tables(experiment, plan(experiment, options.seeds), page)
    if failed:
        raise ValueError(f"failed: {', '.join(failed)}. The logs are in {runs}.")


if __name__ == "__main__":
    sys.exit(told("sweep", main))

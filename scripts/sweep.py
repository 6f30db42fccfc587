"""Run the arms of an experiment, each with several seeds, and compare them.

    python scripts/sweep.py yamls/evidence/evidence.yaml                          # everything that has not been run yet
    python scripts/sweep.py yamls/evidence/evidence.yaml --only "strong-*" --seeds 17
    python scripts/sweep.py yamls/evidence/evidence.yaml --list                   # what would run
    python scripts/sweep.py yamls/evidence/evidence_125m.yaml variables.attention=flash   # for all runs

The file names a base YAML, settings for all runs, teachers (trained first, with one seed), arms as differences from
the base, and tables of arms to be compared, the first of which is the baseline. ``overview`` names, for each method,
baselines and their arms, to be set against how far the teacher is ahead of the baseline. Arms have names for people in
both. Interrupt it when you like: the next call goes on with the runs that have not finished. Writes
RUNS/<arm>-s<seed>.yaml (what was trained, to be repeated alone with train.py), .log and .done beside the folder that
Composer logs into, RUNS/<table>.html, .json, .png and .svg, the same for the overview, and a page: what each arm
reached, and under which conditions. The page lies beside the YAML; what stands in it above the line MARK stays. With
other runs, settings or tables than the YAML's it is RUNS/report.md.
"""

import argparse
import fcntl
import fnmatch
import functools
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from omegaconf import OmegaConf as om

from let_composer import comparing
from let_composer.cli import told
from let_composer.configuration import read_yaml
from let_composer.options import nearest

__all__ = ["Job", "Point", "draw", "main", "overview", "plan", "read", "run", "tables"]

MARK = "<!-- From here on scripts/sweep.py writes. -->"
APART = 10  # seconds between two starts: streaming's search for a free name in shared memory is no atomic one
PALETTE = ("#c8442a", "#2a6fc8", "#2f8f46", "#8a52b0", "#b8860b")
KEYS = {"base", "runs", "seeds", "settings", "teachers", "arms", "tables", "overview"}


@dataclass(frozen=True)
class Job:
    """One training run."""

    name: str  # of the run: arm and seed
    arm: str  # "" for a teacher
    config: DictConfig  # what train.py would read
    needs: frozenset[str] = frozenset()  # teachers, by the names of their runs

    def done(self, runs: Path) -> bool:
        """Whether an earlier call finished it, with the same settings."""
        marker = runs / f"{self.name}.done"
        return marker.exists() and marker.read_text() == om.to_yaml(self.config)


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

    def job(arm: str, settings: Any, seed: int | None) -> Job:
        name = arm if seed is None else f"{arm}-s{seed}"
        config = om.merge(om.load(experiment.base), experiment.settings, settings or {}, {"run_name": name})
        if seed is not None:
            config = om.merge(config, {"seed": seed, "train_loader": {"dataset": {"shuffle_seed": seed}}})
        config = om.merge(config, {"variables": {"runs": experiment.runs}})
        assert isinstance(config, DictConfig)
        text = om.to_yaml(config)
        needs = frozenset() if seed is None else frozenset(t for t in experiment.teachers if f"/{t}\n" in text)
        return Job(name, "" if seed is None else arm, config, needs)

    chosen = dict.fromkeys(arm for pattern in only for arm in _matching(pattern, experiment.arms, "arm"))
    arms = [job(arm, experiment.arms[arm], seed) for seed in seeds or experiment.seeds for arm in chosen]
    needed = frozenset[str]().union(*(arm.needs for arm in arms))
    return [*(job(name, settings, None) for name, settings in experiment.teachers.items() if name in needed), *arms]


def _matching(pattern: str, names: Iterable[str], what: str) -> list[str]:
    names = list(map(str, names))
    if not (found := fnmatch.filter(names, pattern)):
        near = nearest(pattern.strip("*"), names)
        raise ValueError(f"no {what} matches {pattern!r}{near}. There are {', '.join(names)}.")
    return found


def _train(job: Job, runs: Path, threads: int) -> None:
    import torch
    import train

    sys.stdout = sys.stderr = log = open(runs / f"{job.name}.log", "w", buffering=1)  # noqa: SIM115
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    torch.set_num_threads(threads)
    train.main([str(runs / f"{job.name}.yaml")])


def run(jobs: list[Job], runs: Path, workers: int) -> list[str]:
    """Run what is not done yet, ``workers`` runs at a time with an equal share of the cores each.

    Returns:
        Names of the runs that failed; what they printed is in their logs.
    """
    runs.mkdir(parents=True, exist_ok=True)
    waiting = [job for job in jobs if not job.done(runs)]
    if not waiting:
        return []
    unfinished = {job.name for job in waiting}
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    threads = int(os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers))))
    import train  # noqa: F401  (llm-foundry takes half a minute to import: once, and every run is a fork)

    fork = multiprocessing.get_context("fork")
    running: dict[Any, tuple[Job, float]] = {}
    failed: list[str] = []
    total = len(waiting)
    while waiting or running:
        for job in [job for job in waiting if not job.needs & unfinished][: workers - len(running)]:
            waiting.remove(job)
            if running:
                time.sleep(max(0.0, APART - (time.monotonic() - max(start for _, start in running.values()))))
            shutil.rmtree(runs / job.name, ignore_errors=True)  # a cut run's events would mix with the new ones
            (runs / f"{job.name}.done").unlink(missing_ok=True)
            om.save(job.config, runs / f"{job.name}.yaml")
            process = fork.Process(target=_train, args=(job, runs, threads))
            process.start()
            running[process] = job, time.monotonic()
        if not running:  # what is left waits for a teacher that failed
            return failed + [job.name for job in waiting]
        multiprocessing.connection.wait([process.sentinel for process in running])
        for process in [process for process in running if not process.is_alive()]:
            job, start = running.pop(process)
            count = f"{total - len(waiting) - len(running)}/{total}"
            if process.exitcode == 0:
                partial = runs / f"{job.name}.done.partial"
                partial.write_text(om.to_yaml(job.config))
                partial.replace(runs / f"{job.name}.done")
                unfinished.discard(job.name)
                print(f"{count} {job.name}: {time.monotonic() - start:.0f} s", flush=True)
            else:
                failed.append(job.name)
                print(f"{count} {job.name}: failed ({process.exitcode}), see {runs / job.name}.log", flush=True)
    return failed


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
    runs = Path(experiment.runs)
    read_run = functools.cache(comparing.read_run)
    rows: list[str] = []
    for name, arms in experiment.tables.items():
        if not fnmatch.fnmatch(str(name), only):
            continue
        done = {label: {j.config.seed: j for j in jobs if j.arm == arm and j.done(runs)} for label, arm in arms.items()}
        baseline, *others = done.values()
        done = {label: found for label, found in done.items() if found.keys() & baseline.keys()}
        if not baseline or not any(found.keys() & baseline.keys() for found in others):
            continue
        print(f"\n## {name}\n")
        rows += _rows(str(name), done, runs, read_run)
        if seeds := set.intersection(*(set(found) for found in done.values())):  # like with like
            shown = {label: [found[seed] for seed in sorted(seeds)] for label, found in done.items()}
            paths = {label: [runs / job.name for job in of] for label, of in shown.items()}
            teachers = _teachers(job for found in shown.values() for job in found)
            teacher = runs / next(iter(teachers)) if len(teachers) == 1 else None
            comparing.compare(paths, teacher, runs / re.sub(r"\W+", "-", str(name)))
    sections = ["## Every arm", "", *HEAD, *rows, ""] if rows else []
    if sections:  # before the overview: what is measured must not be lost with it
        _write_page(page, sections)
    if fnmatch.fnmatch("overview", only) and (points := overview(experiment, jobs)):
        lines = ["## What guidance saves, over the lead of its teacher", "", *_overview_table(points), ""]
        _write_page(page, [*lines, *sections])
        draw(points, runs / "overview")


def _write_page(page: Path, sections: list[str]) -> None:
    written = page.read_text() if page.exists() else f"# {page.stem}\n\n"
    partial = page.with_name(f"{page.name}.partial")
    partial.write_text("\n".join([written.partition(MARK)[0] + MARK, "", _conditions(), "", *sections]))
    partial.replace(page)


def _teachers(jobs: Iterable[Job]) -> frozenset[str]:
    return frozenset[str]().union(*(job.needs for job in jobs))


HEAD = [
    "| table | arm | seeds | final loss | gain | tokens to the baseline's final loss | passes its teacher at |",
    "|---|---|---|---|---|---|---|",
]


def _rows(
    name: str, done: dict[str, dict[int, Job]], runs: Path, read_run: Callable[[Path], comparing.Run]
) -> list[str]:
    """The rows of one table: label, seed and run of its arms, the baseline first."""
    baseline, plain = next(iter(done.items()))
    lines = []
    for label, found in done.items():
        seeds = sorted(found.keys() & plain.keys())
        of = {arm: [read_run(runs / done[arm][seed].name) for seed in seeds] for arm in (baseline, label)}
        every = (job for arm in done.values() for job in arm.values())
        teachers = _teachers(every if label == baseline else found.values())
        summary = comparing.summarize(of, read_run(runs / next(iter(teachers))) if len(teachers) == 1 else None)
        whole, own = (summary["arms"][i]["over_seeds"] for i in (0, -1))
        tokens = whole["tokens"]["mean"]
        gain, share = "", "100%"
        if label != baseline:
            gain = f"{whole['final_loss']['mean'] - own['final_loss']['mean']:+.3f}" if own["final_loss"] else "-"
            share = _cell(own["tokens_to_baseline_loss"], tokens, ".0%", len(seeds)) or "never"
        passed = _cell(own["tokens_to_teacher_loss"], tokens, ".0%", len(seeds))
        if not passed and len(teachers) == 1:
            passed = "never"
        lines.append(
            f"| {f'**{name}**' if label == baseline else ''} | {label} | {len(seeds)} "
            f"| {_cell(own['final_loss'], 1, '.3f', len(seeds)) or 'not a number'} | {gain} | {share} | {passed} |"
        )
    return lines


def _cell(values: dict[str, float] | None, scale: float, form: str, seeds: int) -> str:
    if values is None:
        return ""
    mean, low, high = (format(values[key] / scale, form) for key in ("mean", "min", "max"))
    band = f" ({low}..{high})" if seeds > 1 else ""
    return mean + band + ("" if values["n"] == seeds else f", {values['n']:.0f} of {seeds} seeds")


@dataclass(frozen=True)
class Point:
    """One arm against its baseline, over the seeds that both have."""

    method: str
    arm: str  # by its name for people
    lead: float | None  # of the teacher: the baseline's final loss minus its own, in nats; None if not trained here
    gain: float  # the baseline's final loss minus the arm's
    share: dict[str, float] | None  # of the baseline's tokens, until its final loss: over seeds; None if never reached
    seeds: int


def overview(experiment: DictConfig, jobs: list[Job]) -> list[Point]:
    """Every arm of the overview whose runs are done, with its baseline's.

    Args:
        experiment: As :func:`read` returns it.
        jobs: As :func:`plan` returns them.
    """
    runs = Path(experiment.runs)
    done = {(job.arm, job.config.seed): job for job in jobs if job.done(runs)}
    points = []
    for method, pairs in experiment.overview.items():
        for baseline, arms in pairs.items():
            for label, arm in arms.items():
                seeds = [seed for name, seed in done if name == arm and (baseline, seed) in done]
                if not seeds:
                    continue
                needs = done[arm, seeds[0]].needs
                teacher = comparing.read_run(runs / next(iter(needs))) if len(needs) == 1 else None
                found = {
                    name: [comparing.read_run(runs / done[name, seed].name) for seed in seeds]
                    for name in (baseline, arm)
                }
                summary = comparing.summarize(found, teacher)
                plain, guided = (row["over_seeds"] for row in summary["arms"])
                reached, whole = guided["tokens_to_baseline_loss"], plain["tokens"]["mean"]
                points.append(
                    Point(
                        method=str(method),
                        arm=str(label),
                        lead=teacher and summary["baseline_final_loss"] - summary["teacher"]["final_loss"],
                        gain=plain["final_loss"]["mean"] - guided["final_loss"]["mean"],
                        share=reached and {**reached, **{k: reached[k] / whole for k in ("mean", "min", "max")}},
                        seeds=len(seeds),
                    )
                )
    return sorted(points, key=lambda point: (point.method, -math.inf if point.lead is None else -point.lead))


def draw(points: list[Point], out: Path) -> None:
    """Write OUT.json, OUT.png and OUT.svg: how much of the baseline's tokens is needed, over the teacher's lead."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "sweep"  # the same bytes for the same runs
    figure, axis = plt.subplots(figsize=(9.5, 5.5), constrained_layout=True)
    methods = list(dict.fromkeys(point.method for point in points))
    for number, method in enumerate(methods):
        color = PALETTE[number % len(PALETTE)]
        own = [point for point in points if point.method == method]
        axis.plot([], [], "o", color=color, ms=8, label=method)
        for point in own:
            if point.lead is None:
                continue
            height = 100 * point.share["mean"] if point.share else 104 + 4 * number  # above, a row for each method
            axis.plot(point.lead, height, "o" if point.share else "^", color=color, ms=8)
            if point.share:
                axis.plot([point.lead] * 2, [100 * point.share[end] for end in ("min", "max")], color=color, lw=2)
            text = point.arm if point.share else f"{point.arm}: never"
            axis.annotate(
                text, (point.lead, height), xytext=(6, 5), textcoords="offset points", fontsize=8, color=color
            )
    axis.axhline(100, color="#666666", lw=1, ls=":")
    axis.axvline(0, color="#666666", lw=1, ls=":")
    axis.set_xlabel("lead of the teacher: the baseline's final loss minus the teacher's [nats/token]")
    axis.set_ylabel("tokens to the baseline's final loss [% of its own]")
    for side, text, where in (
        (0.01, "unguided, the student overtakes the teacher", "left"),
        (0.99, "unguided, it does not", "right"),
    ):
        axis.text(side, 0.02, text, transform=axis.transAxes, ha=where, color="#666666")
    axis.set_ylim(
        min([30.0, *(100 * point.share["min"] - 5 for point in points if point.share)]), 108 + 4 * len(methods)
    )
    axis.margins(x=0.12)
    counts = " to ".join(map(str, sorted({point.seeds for point in points})))
    axis.set_title(
        f"What guidance saves, over the lead of its teacher (seeds: {counts}; bars from best to worst)",
        loc="left",
        fontsize=11,
    )
    axis.legend(frameon=False, loc="upper right")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    for suffix in ("png", "svg"):
        partial = f"{out}.partial.{suffix}"
        figure.savefig(partial, dpi=130, metadata={"Date": None} if suffix == "svg" else None)
        os.replace(partial, f"{out}.{suffix}")
    plt.close(figure)
    partial = Path(f"{out}.partial.json")
    partial.write_text(json.dumps([asdict(point) for point in points], indent=1))
    partial.replace(f"{out}.json")


def _overview_table(points: list[Point]) -> list[str]:
    lines = ["| method | arm | seeds | lead of the teacher | gain in loss | tokens to the baseline's final loss |"]
    lines.append("|---|---|---|---|---|---|")
    for point in points:
        share = _cell(point.share, 1, ".0%", point.seeds) or "never"
        lead = "not trained here" if point.lead is None else f"{point.lead:+.2f}"
        lines.append(f"| {point.method} | {point.arm} | {point.seeds} | {lead} | {point.gain:+.3f} | {share} |")
    return lines


def _conditions() -> str:
    import torch

    commit = ""
    if shutil.which("git"):
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
        ).stdout.strip()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "mosaicml", "llm-foundry"))
    return (
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu()}; Python "
        f"{platform.python_version()}, {versions}; tables made at commit {commit or 'unknown'}, "
        f"{time.strftime('%Y-%m-%d')}. Several seeds: mean (min..max). "
        "An arm stands beside the baseline's runs of the same seeds; shares are of the tokens of the whole run, gain "
        "is in the mean of the final validation losses, in nats per token."
    )


def _cpu() -> str:
    with open("/proc/cpuinfo") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "CPU")
    return f"{os.cpu_count()} cores of {model}"


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
    with open(runs / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another call is at work in {runs}. Wait for it, or stop it.") from None
        failed = run(jobs, runs, options.workers)
    own = options.runs or options.overrides or options.tables != "*"
    page = runs / "report.md" if own else Path(options.experiment).with_suffix(".md")
    tables(experiment, plan(experiment, options.seeds), page, options.tables)
    if failed:
        raise ValueError(f"failed: {', '.join(failed)}. The logs are in {runs}.")


if __name__ == "__main__":
    sys.exit(told("sweep", main))

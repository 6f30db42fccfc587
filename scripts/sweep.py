"""Run the arms of an experiment, each with several seeds, and compare them.

    python scripts/sweep.py yamls/evidence.yaml                          # everything that has not been run yet
    python scripts/sweep.py yamls/evidence.yaml --only "weight-*" --seeds 17
    python scripts/sweep.py yamls/evidence.yaml --list                   # what would run

The file names a base YAML, settings for all runs, teachers (trained first, with one seed), arms as differences from the
base, and tables of arms to be compared, the first of which is the baseline. Interrupt it when you like: the next call
goes on with the runs that have not finished. Writes RUNS/<arm>-s<seed>.yaml (what was trained, to be repeated alone
with train.py), .log and .done beside the folder that Composer logs into, and RUNS/<table>.json, .png, .svg.
"""

import argparse
import fnmatch
import multiprocessing
import multiprocessing.connection
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from omegaconf import OmegaConf as om

sys.path.insert(0, str(Path(__file__).parent))
import compare  # noqa: E402

__all__ = ["Job", "main", "plan", "read", "run", "tables"]

APART = 10  # seconds between two starts: streaming's search for a free name in shared memory is no atomic one
KEYS = {"base", "runs", "seeds", "settings", "teachers", "arms", "tables"}


@dataclass(frozen=True)
class Job:
    """One training run."""

    name: str  # of the run: arm and seed
    arm: str
    config: DictConfig  # what train.py would read
    needs: frozenset[str] = frozenset()  # teachers, by the names of their runs

    def done(self, runs: Path) -> bool:
        """Whether an earlier call finished it, with the same settings."""
        marker = runs / f"{self.name}.done"
        return marker.exists() and marker.read_text() == om.to_yaml(self.config)


def read(path: str | Path) -> DictConfig:
    """Read an experiment's file.

    Args:
        path: The YAML. ``base`` in it is relative to its folder.

    Raises:
        ValueError: If keys are missing or unknown, or a table names an arm that is not there.
    """
    experiment = om.load(path)
    keys = set(experiment) if isinstance(experiment, DictConfig) else set()
    if not isinstance(experiment, DictConfig) or keys != KEYS:
        wrong = ", ".join(map(str, sorted(keys ^ KEYS)))
        raise ValueError(f"expected {path} to have the keys {', '.join(sorted(KEYS))}; missing or unknown: {wrong}.")
    experiment.base = str(Path(path).parent / experiment.base)
    for name, arms in experiment.tables.items():
        if missing := [arm for arm in arms.values() if arm not in experiment.arms]:
            raise ValueError(f"the table {name} of {path} compares {', '.join(missing)}, which is no arm.")
    return experiment


def plan(experiment: DictConfig, seeds: list[int] | None = None, only: Sequence[str] = ("*",)) -> list[Job]:
    """The runs of an experiment.

    Args:
        experiment: As :func:`read` returns it.
        seeds: Instead of the file's.
        only: Patterns of arms' names.

    Returns:
        The teachers that are needed, then the arms in the patterns' order, all of one seed before the next seed.
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
        return Job(name, arm, config, needs)

    chosen = dict.fromkeys(arm for pattern in only for arm in experiment.arms if fnmatch.fnmatch(arm, pattern))
    arms = [job(arm, experiment.arms[arm], seed) for seed in seeds or experiment.seeds for arm in chosen]
    needed = frozenset[str]().union(*(arm.needs for arm in arms))
    return [*(job(name, settings, None) for name, settings in experiment.teachers.items() if name in needed), *arms]


def _train(job: Job, runs: Path) -> None:
    import torch
    import train

    sys.stdout = sys.stderr = log = open(runs / f"{job.name}.log", "w", buffering=1)  # noqa: SIM115
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    train.main([str(runs / f"{job.name}.yaml")])


def run(jobs: list[Job], runs: Path, workers: int) -> list[str]:
    """Run what is not done yet, ``workers`` runs at a time with a core each.

    Returns:
        Names of the runs that failed; what they printed is in their logs.
    """
    runs.mkdir(parents=True, exist_ok=True)
    waiting = [job for job in jobs if not job.done(runs)]
    if not waiting:
        return []
    unfinished = {job.name for job in waiting}
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
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
            process = fork.Process(target=_train, args=(job, runs))
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
                print(f"{count} {job.name}: failed, see {runs / job.name}.log", flush=True)
    return failed


def tables(experiment: DictConfig, jobs: list[Job], only: str = "*") -> None:
    """Compare the arms of every table, with the seeds that are done."""
    runs = Path(experiment.runs)
    for name, arms in experiment.tables.items():
        if not fnmatch.fnmatch(str(name), only):
            continue
        folders = [
            f"{label}={runs / job.name}"
            for label, arm in arms.items()
            for job in jobs
            if job.arm == arm and job.done(runs)
        ]
        if len({folder.split("=")[0] for folder in folders}) < 2:
            continue
        print(f"\n## {name}\n")
        teacher = next(iter(experiment.teachers), None)
        compare.main([*folders, *(["--teacher", str(runs / teacher)] if teacher else []), "--out", str(runs / name)])


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", help="YAML")
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of the arms to run (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the file's")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time (default: one a core)")
    parser.add_argument("--list", action="store_true", help="only say what is done and what would run")
    parser.add_argument("--tables", default="*", help="pattern of the tables to make (default: all)")
    options = parser.parse_args(arguments)
    experiment = read(options.experiment)
    runs = Path(experiment.runs)
    jobs = plan(experiment, options.seeds, options.only)
    if options.list:
        for job in jobs:
            print(f"{'done   ' if job.done(runs) else 'waiting'} {job.name}")
        return
    failed = run(jobs, runs, options.workers)
    tables(experiment, plan(experiment, options.seeds), options.tables)
    if failed:
        raise ValueError(f"failed: {', '.join(failed)}. The logs are in {runs}.")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"sweep: {error}")

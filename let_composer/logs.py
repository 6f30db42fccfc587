"""What a run logged, as curves: TensorBoard's event files, or CSV as W&B, MLflow and pandas write it."""

import ast
import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from let_composer.names import nearest

__all__ = ["METRIC", "Curve", "Run", "read_log", "read_run", "resolve_metric"]

METRIC = "LanguageCrossEntropy"
Curve = tuple[np.ndarray, np.ndarray]
Log = dict[str, Any]  # a pandas series over steps for each tag


@dataclass
class Run:
    """What one run logged; NaN for what it did not. A curve is a pair of arrays: tokens seen, value."""

    name: str
    metric: str  # the tag of what is compared
    loss: Curve  # that metric, nats per token for cross-entropy
    compute: Curve  # of student and teacher, in the FLOPs of one token of plain training
    train_seconds: Curve  # time in training, evaluation and start-up left out
    guidance: dict[str, Curve]  # the metrics of let/ or kd/
    guided_speed: float  # tokens a second, over guided batches after the first two
    plain_speed: float
    peak_gb: float  # 1e9 bytes, allocated on the device
    flops_per_token: float  # of plain training, as Composer's speed monitor counts
    settings: dict[str, Any]  # what was logged of the run's configuration


def read_run(path: str | Path, metric: str = METRIC) -> Run:
    """Read one run: a folder with TensorBoard's event files or with CSV files, or a CSV file.

    Raises:
        ValueError: If there is no run or more than one, or it was not evaluated with this metric.
    """
    path = Path(path)
    log, settings = read_log(path)
    tag = resolve_metric(metric, log, path)
    if "time/token" not in log:
        raise ValueError(f"{path} has no time/token, by which runs are compared. Export it beside {tag}.")
    # Composer logs under the number of batches done before the event: time/token at the start of a batch, evaluations
    # and the speed monitor after it.
    steps, tokens = log["time/token"].index.to_numpy(dtype=float), log["time/token"].to_numpy(dtype=float)
    batch = float((np.diff(tokens) / np.diff(steps)).max(initial=0))
    end = max(steps[-1] + 1, *(values.index[-1] for values in log.values()))
    steps, tokens = np.append(steps, end), np.append(tokens, tokens[-1] + batch * (end - steps[-1]))
    nothing: Any = pd.Series({0.0: np.nan})

    def curve(tag: str) -> Curve:
        values: Any = log.get(tag, nothing).astype(float).replace([np.inf, -np.inf], np.nan)
        return np.interp(values.index.to_numpy(dtype=float), steps, tokens), values.to_numpy()

    def of_guidance(name: str) -> Any:
        return next((values for tag, values in log.items() if tag in (f"let/{name}", f"kd/{name}")), nothing)

    weight, share = of_guidance("weight"), of_guidance("teacher_flops_share")
    share = share[share.index.isin(weight[weight > 0].index)].reindex(steps[:-1]).fillna(0).to_numpy()
    hours = log.get("time/train", nothing)
    took = hours.diff()[(hours.index.to_series().diff() == 1) & (hours.index > 2)] * 3600
    guided = took.index.isin(weight[weight > 0].index + 1)
    train_tokens, train_hours = curve("time/train")
    rates = [log.get(f"throughput/{what}_per_sec", nothing) for what in ("flops", "tokens")]
    return Run(
        name=path.stem if path.is_file() else path.name,
        metric=tag,
        loss=curve(tag),
        compute=(tokens, np.append(tokens[0], tokens[0] + np.cumsum(np.diff(tokens) / (1 - share)))),
        train_seconds=(train_tokens, train_hours * 3600),
        guidance={tag: curve(tag) for tag in log if tag.startswith(("let/", "kd/"))},
        guided_speed=batch / took[guided].mean(),
        plain_speed=batch / took[~guided].mean(),
        peak_gb=log.get("memory/peak_allocated_mem", nothing).max(),
        flops_per_token=(rates[0] / rates[1]).dropna().median(),
        settings=settings,
    )


def resolve_metric(wanted: str, tags: Iterable[str], source: Any) -> str:
    """The one logged tag that is meant: the whole tag, or the end of one that was logged by an evaluation, such as
    ``LanguageCrossEntropy``, or with several evaluation loaders ``pile/LanguageCrossEntropy``.

    Raises:
        ValueError: If none is, or several are.
    """
    tags = list(tags)
    evaluated = sorted(tag for tag in tags if tag.startswith("metrics/") and not tag.startswith("metrics/train/"))
    found = [wanted] if wanted in tags else [tag for tag in evaluated if tag.endswith(f"/{wanted}")]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{source} has {wanted} of several evaluations. Choose with --metric: {', '.join(found)}.")
    if not evaluated:
        raise ValueError(f"{source} was not evaluated: it has no metrics/. Set eval_loader and eval_interval.")
    near = nearest(wanted, [*tags, *(tag.rpartition("/")[2] for tag in evaluated)])
    raise ValueError(f"{source} has no metric {wanted}{near}. Evaluated were: {', '.join(evaluated)}.")


def read_log(path: Path) -> tuple[Log, dict[str, Any]]:
    """All that one run logged, a series over steps for each tag; and its settings, where they were logged.

    Raises:
        ValueError: If there is no run or more than one.
    """
    if path.is_file():
        return _read_csv(path), {}
    events = sorted({file.parent for file in path.rglob("events.out.tfevents.*")})
    # Composer puts hyperparameters into a folder below the run's own.
    runs = [folder for folder in events if not set(folder.parents) & set(events)]
    if len(runs) > 1:
        names = ", ".join(str(run.relative_to(path)) for run in runs)
        raise ValueError(f"{path} holds {len(runs)} runs: {names}. Give each of them, or a pattern for several.")
    if runs:
        return _read_events(events)
    if files := sorted(path.glob("*.csv")):
        return {tag: values for file in files for tag, values in _read_csv(file).items()}, {}
    raise ValueError(f"there are no TensorBoard event files and no CSV files in {path}. Give the folder of a run.")


def _read_events(folders: list[Path]) -> tuple[Log, dict[str, Any]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    settings: dict[str, Any] = {}
    events = [EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload() for folder in folders]
    scalars = {tag: events[0].Scalars(tag) for tag in events[0].Tags()["scalars"]}
    steps = [event.step for event in scalars.get("time/token", ())]
    if (starts := steps.count(min(steps, default=0))) > 1:  # a resumed run logs some steps twice, but not the first
        raise ValueError(f"{folders[0]} holds {starts} runs, or one that began again. Keep the event files of one.")
    # The later value of a step is the one that training went on from.
    log = {tag: pd.Series({float(e.step): e.value for e in values}).sort_index() for tag, values in scalars.items()}
    for each in events:
        if start := each.summary_metadata.get(metadata.SESSION_START_INFO_TAG):
            hparams = metadata.parse_session_start_info_plugin_data(start.plugin_data.content).hparams
            for name, value in hparams.items():
                settings[name] = getattr(value, str(value.WhichOneof("kind")))
                with contextlib.suppress(ValueError, SyntaxError):  # mappings and lists are logged as their text
                    settings[name] = ast.literal_eval(settings[name])
    return log, pd.json_normalize(settings).to_dict("records")[0] if settings else {}


def _read_csv(path: Path) -> Log:
    try:
        table: Any = pd.read_csv(path, dtype=str, keep_default_na=False)
    except ValueError as error:  # pandas' own errors and those of decoding
        raise ValueError(f"{path} is not a CSV file ({error}).") from error
    columns = {name.lower().lstrip("_"): name for name in table}
    if "step" not in columns:
        raise ValueError(f"{path} has no column Step, _step or step. Its columns are {', '.join(table)}.")
    step, key = columns["step"], columns.get("metric", columns.get("key"))
    if key and "value" in columns:  # MLflow: a row for each value
        long = table.rename(columns={key: "tag", columns["value"]: "value", columns.get("run"): "run"})
    else:  # W&B's charts name columns "run - metric", and add the range of what they averaged
        ranges = [name for name in table if name.endswith(("__MIN", "__MAX"))]
        long = table.drop(columns=ranges).melt(step, var_name="tag")
        if len(long) and long.tag.str.contains(" - ").all():
            long[["run", "tag"]] = long.tag.str.partition(" - ")[[0, 2]]
    if len(runs := sorted(set(long.get("run", ())))) > 1:
        raise ValueError(f"{path} holds {len(runs)} runs: {', '.join(runs)}. Export one file for each run.")
    long = long[long.value != ""].astype({step: float}).drop_duplicates(["tag", step], keep="last").sort_values(step)
    long["value"] = long.value.transform(pd.to_numeric, errors="coerce")
    return {str(tag): rows.set_index(step).value for tag, rows in long.groupby("tag", sort=False)}

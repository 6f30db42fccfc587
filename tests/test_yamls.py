"""The YAMLs that users copy from: complete, right about defaults, and what their commands make of them."""

import inspect
import re
from pathlib import Path

import pytest
import yaml
from llmfoundry import registry
from llmfoundry.utils.config_utils import TRAIN_CONFIG_KEYS, TrainConfig, make_dataclass_and_log_config
from omegaconf import OmegaConf as om

from let_composer import LET
from let_composer.cli import main
from let_composer.configuration import load

YAMLS = Path(__file__).parents[1] / "yamls"
SIZED = sorted(path for path in YAMLS.glob("*_*.yaml") if path.stem.rpartition("_")[2][0].isdigit())


def test_what_is_commented_out_is_every_other_key_with_its_default():
    text = (YAMLS / "let_1b4.yaml").read_text()
    live, whole = yaml.safe_load(text), yaml.safe_load(re.sub(r"(?m)^( +)# (\w+: )", r"\1\2", text))
    defaults = {name: p.default for name, p in inspect.signature(LET).parameters.items() if name != "unknown"}
    assert whole["algorithms"]["let"] == {**defaults, **live["algorithms"]["let"]}
    assert live["algorithms"]["let"].items() >= {"weight": defaults["weight"], "stop": defaults["stop"]}.items()
    assert set(whole["loggers"]) == {"tensorboard", "wandb", "mlflow"} <= set(registry.loggers.get_all())
    assert set(whole["callbacks"]) > set(live["callbacks"])
    assert set(whole["callbacks"]) <= {*registry.callbacks.get_all(), *registry.callbacks_with_config.get_all()}


@pytest.mark.parametrize("path", SIZED, ids=lambda path: path.stem)
def test_llm_foundry_takes_what_is_printed(path, capsys):
    """Without our train script: all keys known, none left open but where the data is."""
    assert main(["yaml", path.stem]) == 0
    printed = om.create(capsys.readouterr().out)
    assert printed == load(str(path), [])
    assert path.stem == "let_1b4" or set(om.load(path)) < {"base", *printed}
    config = om.merge(printed, {"variables": {"data_local": "shards"}})
    _, read = make_dataclass_and_log_config(config, TrainConfig, TRAIN_CONFIG_KEYS, transforms="all")
    assert read.eval_loader["dataset"]["split"] == "val" and not read.eval_loader["dataset"]["shuffle"]

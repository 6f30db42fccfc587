"""The run files for clouds and clusters: schemas, and the commands that they arrive at."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from mcli import RunConfig
from omegaconf import OmegaConf as om

from let_composer.configuration import load

ROOT = Path(__file__).parents[1]
CLOUD = ROOT / "yamls" / "cloud"


def test_the_mosaicml_run_has_the_schema_of_its_client_and_parameters_over_the_yaml(tmp_path):
    run = RunConfig.from_file(CLOUD / "mcli.yaml")  # unknown fields are a warning, so an error here
    assert run.compute["gpus"] == 32 and run.image.startswith("mosaicml/llm-foundry:2.7.0")
    assert run.scheduling["retry_on_system_failure"]
    assert "composer scripts/train.py yamls/let_7b.yaml /mnt/config/parameters.yaml" in run.command
    (tmp_path / "parameters.yaml").write_text(yaml.safe_dump(run.parameters))
    config = load(str(ROOT / "yamls" / "let_7b.yaml"), [str(tmp_path / "parameters.yaml"), "seed=18"])
    assert config.train_loader.dataset.remote == "s3://your-bucket/pile-mds"
    assert config.save_folder == "s3://your-bucket/runs/let-7b/checkpoints"
    assert config.model.d_model == 4096 and config.seed == 18
    assert not om.missing_keys(config)


SLURM = {"JOB_NODELIST": "node-[a-b]", "JOB_ID": "40007", "NNODES": "2", "NODEID": "1", "GPUS_ON_NODE": "8"}
SKYPILOT = {"NUM_GPUS_PER_NODE": "8", "NUM_NODES": "4", "NODE_RANK": "3", "NODE_IPS": "10.0.0.1\n10.0.0.2"}
PROGRAMS = {
    "composer": 'printf "%s\\n" "$@" > arguments',
    "srun": 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"',
    "scontrol": 'printf "node-a\\nnode-b\\n"',
}


@pytest.mark.parametrize(
    ("command", "environment", "place", "given"),
    [
        (
            [str(CLOUD / "slurm.sbatch"), "yamls/let_7b.yaml", "variables.data_remote=s3://bucket/a b"],
            {f"SLURM_{name}": value for name, value in SLURM.items()},
            "--nproc 8 --world_size 16 --node_rank 1 --base_rank 8 --master_addr node-a --master_port 20007",
            ["yamls/let_7b.yaml", "variables.data_remote=s3://bucket/a b"],
        ),
        (
            ["-c", yaml.safe_load((CLOUD / "skypilot.yaml").read_text())["run"]],
            {f"SKYPILOT_{name}": value for name, value in SKYPILOT.items()} | {"DATA": "s3://b/a b", "RUNS": "/runs"},
            "--nproc 8 --world_size 32 --node_rank 3 --base_rank 24 --master_addr 10.0.0.1 --master_port 29400",
            [
                "yamls/let_7b.yaml",
                "variables.data_remote=s3://b/a b",
                "variables.data_local=/data/pile-mds",
                "variables.runs=/runs",
            ],
        ),
    ],
    ids=["slurm", "skypilot"],
)
def test_each_node_starts_one_launcher(tmp_path, command, environment, place, given):
    """With programs that only write down their arguments."""
    for name, body in PROGRAMS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    # The scripts put the environment of this folder first, and here that is none.
    environment = {**environment, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", *command], check=True, cwd=tmp_path, env=environment, timeout=60)
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments == [*place.split(), "scripts/train.py", *given]

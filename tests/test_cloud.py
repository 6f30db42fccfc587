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


@pytest.fixture
def launched(tmp_path):
    """Run a command of a run file with a launcher that only writes down its arguments."""

    def run(command: list[str], **env: str) -> list[str]:
        bin = tmp_path / "bin"
        bin.mkdir(exist_ok=True)
        for name, body in {
            "composer": f'printf "%s\\n" "$@" > {tmp_path}/arguments',
            "srun": 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"',
            "scontrol": 'printf "node-a\\nnode-b\\n"',
        }.items():
            (bin / name).write_text(f"#!/bin/sh\n{body}\n")
            (bin / name).chmod(0o755)
        # The scripts put the environment of this folder first, and here that is none.
        env["PATH"] = f"{bin}:{os.environ['PATH']}"
        subprocess.run(command, check=True, cwd=tmp_path, env=env, timeout=60)
        return (tmp_path / "arguments").read_text().splitlines()

    return run


def options(arguments: list[str]) -> dict[str, str]:
    end = arguments.index("scripts/train.py")
    return dict(zip(arguments[:end:2], arguments[1:end:2], strict=True))


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


@pytest.mark.parametrize("node", ["0", "1"])
def test_slurm_starts_one_launcher_a_node(launched, node):
    slurm = {"JOB_NODELIST": "node-[a-b]", "JOB_ID": "40007", "NNODES": "2", "NODEID": node, "GPUS_ON_NODE": "8"}
    given = ["yamls/let_7b.yaml", "variables.data_remote=s3://bucket/a b"]
    found = launched(
        ["bash", str(CLOUD / "slurm.sbatch"), *given], **{f"SLURM_{name}": value for name, value in slurm.items()}
    )
    assert found[found.index("scripts/train.py") + 1 :] == given
    assert options(found) == {
        "--nproc": "8",
        "--world_size": "16",
        "--node_rank": node,
        "--base_rank": str(8 * int(node)),
        "--master_addr": "node-a",
        "--master_port": "20007",
    }


def test_skypilot_starts_one_launcher_a_node(launched):
    task = yaml.safe_load((CLOUD / "skypilot.yaml").read_text())
    addresses = "\n".join(f"10.0.0.{number}" for number in (1, 2, 3, 4))
    sky = {"NUM_GPUS_PER_NODE": "8", "NUM_NODES": "4", "NODE_RANK": "3", "NODE_IPS": addresses}
    found = launched(
        ["bash", "-c", task["run"]],
        **{f"SKYPILOT_{name}": value for name, value in sky.items()},
        DATA="s3://bucket/pile",
        RUNS="/runs",
    )
    expected = {"data_remote": "s3://bucket/pile", "data_local": "/data/pile-mds", "runs": "/runs"}
    assert found[-3:] == [f"variables.{name}={value}" for name, value in expected.items()]
    assert options(found)["--world_size"] == "32" and options(found)["--base_rank"] == "24"
    assert options(found)["--master_addr"] == "10.0.0.1"

"""What the quickstart asks the sweep for, which decides what is trained again; its steps are tested where they are."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def quickstart(tmp_path):
    """Run the script with programs that only note what they are asked for; returns the last line."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "quickstart.sh", tmp_path / "scripts")
    bin = tmp_path / ".venv" / "bin"
    bin.mkdir(parents=True)
    for path, body in {
        tmp_path / "scripts" / "install.sh": "",
        bin / "let-composer": 'mkdir -p "$4"; echo "$TOKENS" > "$4/manifest.json"',
        bin / "python": '[ "$1" = -c ] && exit ${NO_CUDA:-1}; echo "$OMP_WAIT_POLICY $*" >> calls',
    }.items():
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def run(*arguments: str, **environment: str) -> str:
        command = ["bash", "scripts/quickstart.sh", *arguments]
        subprocess.run(command, cwd=tmp_path, env={**os.environ, **environment}, check=True, timeout=60)
        *before, last = (tmp_path / "calls").read_text().splitlines()
        (tmp_path / "calls").unlink()
        wanted = re.compile(r" scripts/sample_data --tier small (--bpe 2048|--teacher) --out ")
        assert before and all(map(wanted.search, before))
        return last

    return run


@pytest.mark.parametrize("kind", ["quickstart", "pretrained"])
def test_the_data_is_a_setting_of_the_experiment(quickstart, kind):
    option = [] if kind == "quickstart" else ["--pretrained"]
    first, again, other = (quickstart(*option, TOKENS=tokens) for tokens in ("1", "1", "2"))
    assert first == again != other
    start, shards, end = first.partition("variables.shards=sha256:")
    assert start == f"PASSIVE scripts/evidence/sweep.py yamls/quickstart/{kind}.yaml " and shards
    assert end.endswith(" --workers 1") and "precision" not in end
    assert quickstart(*option, NO_CUDA="0").endswith(" precision=amp_bf16 --workers 1")


def test_an_unknown_argument_is_refused(quickstart):
    with pytest.raises(subprocess.CalledProcessError, match="status 2"):
        quickstart("--pretraind")

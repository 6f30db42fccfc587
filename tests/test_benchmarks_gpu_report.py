"""The GPU report's own doing: order, resumption, time limits. Its parts are tested where they are."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import gpu_report as script  # scripts/benchmarks/gpu_report.py
import machine
import pytest
import torch


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Run the report on a made-up machine with parts that only print."""
    monkeypatch.setattr(script, "GRACE", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "test device")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("P", (), {"total_memory": 2**36}))

    def run(codes: dict[str, str], *arguments: str) -> int:
        def plan(*_):
            return [script.Part(name, ["-c", code], 3) for name, code in codes.items()]

        return script.main(["--out", str(tmp_path / "report"), *arguments], plan)

    run.out = tmp_path / "report"
    return run


def test_parts_that_succeeded_are_not_run_again(report, tmp_path):
    counter = f"open({str(report.out)!r} + '/count', 'a').write('x'); print('figures')"
    archive = ["--archive", str(tmp_path / "kept.tar.gz")]
    assert report({"a": counter, "b": "import sys; print('broken'); sys.exit(3)"}, *archive) == 1
    assert report({"a": counter, "b": "print('mended')"}) == 0
    assert (report.out / "count").read_text() == "x"
    assert [entry["exit"] for entry in json.loads((report.out / "report.json").read_text())] == [0, 0]
    shutil.rmtree(report.out)  # on the next machine there is nothing but the archive
    assert report({"a": "raise SystemExit('ran again')", "b": "print('mended')"}, *archive) == 0
    page = (report.out / "report.md").read_text()
    assert "## a: done" in page and "figures" in page and "mended" in page and "device test device" in page
    (report.out / "a.log").write_text("newer than the archive")
    assert report({"a": "raise SystemExit('ran again')"}, *archive) == 0
    assert (report.out / "a.log").read_text() == "newer than the archive"


def test_other_sources_or_another_device_are_measured_anew(report, monkeypatch, tmp_path):
    assert report({"a": "print('of code 1')"}) == 0
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "other device")
    assert report({"a": "print('of device 2')"}) == 0
    assert "of device 2" in (report.out / "report.md").read_text()
    for folder in ("let_composer", "scripts"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    (tmp_path / "scripts" / "x.py").write_text("1")
    first = machine.sources()
    (tmp_path / "scripts" / "x.py").write_text("2")
    assert machine.sources() != first
    assert report({"a": "print('of code 3')"}) == 0
    assert "of code 3" in (report.out / "report.md").read_text()


def test_failures_time_limits_and_the_end_of_time_are_told(report, capsys):
    late = "import time\ntry: time.sleep(30)\nexcept KeyboardInterrupt: print('kept what there was'); raise"
    assert report({"a": late}) == 1
    page = (report.out / "report.md").read_text()
    assert "## a: ran out of time" in page and "kept what there was" in page  # it is asked before it is killed
    assert report({"b": "pass"}, "--minutes", "0.04") == 1
    assert "b: no time left" in capsys.readouterr().out


def test_unknown_parts_and_a_machine_without_a_gpu(report, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        report({"a": "pass"}, "--only", "b")
    assert "no parts b. There are a." in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        report({"a": "pass"})
    assert "no CUDA device here" in capsys.readouterr().err


def test_what_a_part_started_ends_with_it(report):
    child = f"import time; time.sleep(4); open({str(report.out)!r} + '/outlived', 'w')"
    assert report({"a": f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"}) == 1
    time.sleep(4)
    assert not (report.out / "outlived").exists()


@pytest.mark.parametrize("flash", [True, False])
def test_every_part_is_a_command_that_exists(tmp_path, flash, monkeypatch):
    monkeypatch.setattr(script, "DATA", tmp_path / "absent")
    assert "evidence-125m" not in [part.name for part in script.parts(tmp_path, "h200", flash, 139)]
    monkeypatch.setattr(script, "DATA", tmp_path)
    found = script.parts(tmp_path, "h200", flash, 139)
    assert [part.name for part in found][:3] == ["kernel-tests", "loss", "step-1b4"]
    assert found[-1].name == "evidence-125m" and found.pop().command[-1].startswith("variables.attention") == flash
    for part in found:
        for word in part.command:
            assert not word.startswith(("yamls/", "scripts/", "tests/")) or (script.ROOT / word).exists()
        assert part.limit < 600 - script.GRACE


@pytest.mark.slow
def test_a_rehearsal(tmp_path):
    """What shares code with nothing else here; by hand, all parts are rehearsed where the device's packages are."""
    names = ["loss", "toy-data", "evidence-125m"]
    command = [sys.executable, script.__file__, "--rehearse", "--out", str(tmp_path / "report"), "--only", *names]
    tools = [tool for folder in os.environ["PATH"].split(os.pathsep) for tool in Path(folder).glob("*")]
    (tmp_path / "bin").mkdir()
    for name, tool in {tool.name: tool for tool in reversed(tools) if not tool.name.startswith("git")}.items():
        (tmp_path / "bin" / name).symlink_to(tool)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": str(tmp_path / "bin")}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    page = (tmp_path / "report-rehearsal" / "report.md").read_text()
    assert result.returncode == 0, result.stdout + page
    for name in names:
        assert f"## {name}: done" in page
    assert "loss/loss.png)" in page and "evidence-125m/SmolLM2-135M.png)" in page
    assert "## What guidance saves" in (tmp_path / "report-rehearsal" / "evidence-125m" / "report.md").read_text()

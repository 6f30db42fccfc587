"""The GPU report's own doing: order, resumption, time limits. Its parts are tested where they are."""

import json
import shlex
import shutil
import time

import gpu_report as script  # scripts/benchmarks/gpu_report.py
import machine
import pytest
import torch


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Run the report on a made-up machine with parts that only print."""
    assert script.LIMIT + script.GRACE < 600  # a call's own limit where machines are lent
    monkeypatch.setattr(script, "LIMIT", 3)
    monkeypatch.setattr(script, "GRACE", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "test device")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("P", (), {"total_memory": 2**36}))

    def run(codes: dict[str, str], *arguments: str) -> int:
        plan = {name: shlex.join(["-c", code]) for name, code in codes.items()}
        monkeypatch.setattr(script, "parts", lambda *_: plan)
        return script.main(["--out", str(run.out), *arguments])

    run.out = tmp_path / "report"
    run.page = lambda: (run.out / "report.md").read_text()
    return run


def test_parts_that_succeeded_are_not_run_again(report, tmp_path):
    counter = f"open({str(report.out)!r} + '/count', 'a').write('x'); print('figures')"
    archive = ["--archive", str(tmp_path / "kept.tar.gz")]
    assert report({"a": counter, "b": "import sys; print('broken'); sys.exit(3)"}, *archive) == 1
    assert "## b: failed, exit status 3" in report.page() and "broken" in report.page()
    assert report({"a": counter, "b": "print('mended')"}) == 0
    assert (report.out / "count").read_text() == "x"
    assert json.loads((report.out / "report.json").read_text())["parts"]["b"]["exit"] == 0
    shutil.rmtree(report.out)  # on the next machine there is nothing but the archive
    assert report({"a": "raise SystemExit('ran again')", "b": "print('mended')"}, *archive) == 0
    assert "## a: done" in report.page() and "figures" in report.page() and "mended" in report.page()
    (report.out / "a.log").write_text("newer than the archive")
    assert report({"a": "raise SystemExit('ran again')"}, *archive) == 0
    assert (report.out / "a.log").read_text() == "newer than the archive"


def test_other_sources_or_another_device_are_measured_anew(report, monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    (tmp_path / "scripts").mkdir()
    for device, code in (("one", "1"), ("other", "1"), ("other", "2")):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=device: device)
        (tmp_path / "scripts" / "x.py").write_text(code)
        assert report({"a": f"print('measured', '{device}', '{code}')"}) == 0
        assert f"measured {device} {code}" in report.page() and f"device {device}," in report.page()


def test_time_limits_and_the_end_of_time_are_told(report, capsys):
    late = "import time\ntry: time.sleep(30)\nexcept KeyboardInterrupt: print('kept what there was'); raise"
    child = f"import time; time.sleep(4); open({str(report.out)!r} + '/outlived', 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(30)"
    assert report({"late": late, "parent": parent, "deaf": deaf}) == 3
    assert "## late: ran out of time" in report.page() and "## deaf: was killed" in report.page()
    assert "kept what there was\n" in report.page()  # it is asked before it is killed
    assert report({"late": "pass"}, "--minutes", "0.04") == 1
    assert "late: no time left" in capsys.readouterr().out
    time.sleep(4)
    assert not (report.out / "outlived").exists()  # what a part started ends with it


def test_unknown_parts_and_a_machine_without_a_gpu(report, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        report({"a": "pass"}, "--only", "b")
    assert "no parts b. There are a." in capsys.readouterr().err
    assert report({"a": "pass", "b": "pass"}, "--only", "b") == 0
    assert "## a: not run" in report.page() and "## b: done" in report.page()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        report({"a": "pass"})
    assert "no CUDA device here" in capsys.readouterr().err


@pytest.mark.parametrize("flash", [True, False])
def test_every_part_is_a_command_that_exists(tmp_path, flash, monkeypatch):
    monkeypatch.setattr(script, "DATA", tmp_path / "absent")
    assert script.REST not in script.parts(tmp_path, "h200", flash, 139)
    monkeypatch.setattr(script, "DATA", tmp_path)
    found = script.parts(tmp_path, "h200", flash, 139)
    assert list(found)[:3] == ["kernel-tests", "loss", "step-1b4"] and list(found)[-1] == script.REST
    assert ("variables.attention=flash" in found[script.REST]) == flash
    for word in shlex.split(" ".join(found.values())):
        assert not word.startswith(("yamls/", "scripts/", "tests/")) or (script.ROOT / word).exists()


@pytest.mark.slow
def test_a_rehearsal(tmp_path, monkeypatch):
    """What shares code with nothing else here; by hand, all parts are rehearsed where the device's packages are."""
    monkeypatch.setenv("GIT_PYTHON_GIT_EXECUTABLE", "absent")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "report-rehearsal"
    failed = script.main(["--rehearse", "--out", str(tmp_path / "report"), "--only", "loss", "evidence-125m"])
    page = (out / "report.md").read_text()
    assert failed == 0, page
    assert "loss/loss.png)" in page and "evidence-125m/SmolLM2-135M.png)" in page
    assert "## What guidance saves" in (out / "evidence-125m" / "report.md").read_text()

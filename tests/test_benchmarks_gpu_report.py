"""The GPU report's own doing: order, resumption, time limits. Its parts are tested where they are."""

import json
import sys
import time

import gpu_report as script  # scripts/benchmarks/gpu_report.py
import pytest
import torch


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Run the report on a made-up machine with parts that only print."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "test device")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("P", (), {"total_memory": 2**36}))

    def run(codes: dict[str, str], *arguments: str) -> int:
        def plan(*_):
            return [script.Part(name, ["-c", code], 2) for name, code in codes.items()]

        return script.main(["--out", str(tmp_path / "report"), *arguments], plan)

    run.out = tmp_path / "report"
    return run


def test_parts_that_succeeded_are_not_run_again(report):
    counter = f"open({str(report.out)!r} + '/count', 'a').write('x'); print('figures')"
    assert report({"a": counter, "b": "import sys; print('broken'); sys.exit(3)"}) == 1
    assert report({"a": counter, "b": "print('mended')"}) == 0
    assert (report.out / "count").read_text() == "x"
    page = (report.out / "report.md").read_text()
    assert "## a: done" in page and "figures" in page and "mended" in page and "device test device" in page
    assert [entry["exit"] for entry in json.loads((report.out / "report.json").read_text())] == [0, 0]


def test_another_commit_or_device_is_measured_anew(report, monkeypatch):
    assert report({"a": "print(1)"}) == 0
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "other device")
    assert report({"a": "print(2)"}) == 0
    assert "print(2)" in (report.out / "report.md").read_text()


def test_failures_time_limits_and_the_end_of_time_are_told(report, capsys):
    assert report({"a": "import time; time.sleep(30)"}) == 1
    assert "## a: ran out of time" in (report.out / "report.md").read_text()
    assert report({"b": "pass"}, "--minutes", "0") == 1
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
    monkeypatch.setattr(script, "DATA", tmp_path / "manifest.json")
    assert "evidence-125m" not in [part.name for part in script.parts(tmp_path, "h200", flash, 139)]
    script.DATA.touch()
    found = script.parts(tmp_path, "h200", flash, 139)
    assert [part.name for part in found][:3] == ["ceilings", "tests", "steps-1b4"]
    assert found[-1].name == "evidence-125m" and found.pop().command[-1].startswith("variables.attention") == flash
    for part in found:
        assert part.command[0] == "-m" or (script.ROOT / part.command[0]).exists()
        for word in part.command:
            assert not word.startswith("yamls/") or (script.ROOT / word).exists()
    assert sum(part.limit for part in script.parts(tmp_path, "h100", flash, 79)[:-1]) < 45 * 60
    assert sys.executable

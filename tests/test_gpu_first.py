"""Tests of the driver of the first minutes on a GPU: a step that fails or hangs does not cost the others."""

import json
import os
import subprocess
import time

import pytest

from helpers import ROOT

WRITES = "import json, sys; json.dump({'value': 1}, open(sys.argv[1], 'w'))"


@pytest.fixture(scope="module")
def gpu_first():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import gpu_first

        yield gpu_first


@pytest.fixture
def session(gpu_first, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_first, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_first, "LEAST", 0)
    monkeypatch.setattr(gpu_first, "PATIENCE", 1)
    return gpu_first.Session(tmp_path / "results", minutes=1)


def step(gpu_first, session, title, code, limit=30):
    return gpu_first.Step(title, ["-c", code, session.folder / f"{gpu_first.slug(title)}.json"], limit)


def test_steps_that_fail_or_hang_do_not_cost_the_rest(gpu_first, session, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_first, "GRACE", 0.2)
    pid = tmp_path / "pid"
    child = f"import subprocess, sys; open({str(pid)!r}, 'w').write(str(subprocess.Popen(['sleep', '60']).pid))"
    steps = [
        step(gpu_first, session, "fails", "raise SystemExit('the reason')"),
        step(gpu_first, session, "hangs", f"{child}; import time; time.sleep(60)", limit=3),
        step(gpu_first, session, "works", WRITES),
    ]
    begun = time.monotonic()
    session.run(steps)
    assert time.monotonic() - begun < 20
    found = json.loads((session.folder / "summary.json").read_text())
    assert "the reason" in found["fails"]["error"]
    assert "stopped after" in found["hangs"]["error"]
    assert found["works"]["value"] == 1
    with pytest.raises(ProcessLookupError):  # what a hanging step started has ended too
        os.kill(int(pid.read_text()), 0)


def test_second_call_repeats_only_what_has_no_result(gpu_first, session, capsys):
    works = step(gpu_first, session, "works", WRITES)
    failed = step(gpu_first, session, "failed", WRITES)
    session.folder.joinpath("works.json").write_text(json.dumps({"value": 7}))
    session.folder.joinpath("failed.json").write_text(json.dumps({"checks": {"failed": {"passed": False}}}))
    session._attempt(works)
    session._attempt(failed)
    assert session.result(works)["value"] == 7
    assert session.result(failed)["value"] == 1
    assert "works: has a result" in capsys.readouterr().out


def test_no_step_begins_without_time(gpu_first, session):
    session._end = time.monotonic() - 1
    late = step(gpu_first, session, "late", WRITES)
    session.run([late])
    assert session.result(late) is None


def test_missing_images_are_named_before_anything_runs(gpu_first, tmp_path, monkeypatch, capsys):
    (tmp_path / "train-images-idx3-ubyte.gz").touch()
    monkeypatch.setattr("sys.argv", ["gpu_first.py", "--data", str(tmp_path), "--folder", str(tmp_path / "results")])
    with pytest.raises(SystemExit):
        gpu_first.main()
    error = capsys.readouterr().err
    assert "lacks train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte" in error
    assert not (tmp_path / "results").exists()


def test_summary_has_checks_rates_and_accuracies(gpu_first):
    rates = {"median": 0.5, "low": 0.4, "high": 0.6}
    contenders = {"timm": rates | {"median": 1.0}, "deitlt-hf": rates | {"memory_mib": 9000.0}}
    row = dict.fromkeys(("overall", "head", "mid", "tail"), 0.5)
    found = {
        "check bf16": {
            "device": "NVIDIA H200",
            "versions": {"torch": "2.11.0"},
            "checks": {"bf16": {"passed": True, "losses": [2.0, 1.0]}},
            "wall_seconds": 11.0,
        },
        "check fp16": {"checks": {"fp16": {"passed": False, "error": "x\nRuntimeError: y"}}},  # its driver was stopped
        "gpu_vit_b_step": {"gpu_vit_b_step": {"contenders": contenders, "peak_gflops": 7e5, "errors": {"a": "died"}}},
        "gpu_small_step": {"error": "stopped after 120 s"},
        "Fashion-MNIST-LT seed 0": {
            "accuracies": {"ce-sam": {"teacher": row}, "ours": {"mean": row}},
            "steps": {"ce-sam": 1, "ours": 16800},
            "train_seconds": {"ce-sam": 1.0, "ours": 200.0},
        },
    }
    text = "\n".join(gpu_first.summary(found))
    images = gpu_first.GPU_COMPARISONS["gpu_vit_b_step"].images
    for expected in (
        "NVIDIA H200",
        "| bf16 | passed; losses 2 to 1 | 11 |",
        "failed: RuntimeError: y | nan |",
        f"| deitlt-hf | {2 * images:,.0f} |",
        "9,000 | 2.00 |",
        "| a | died |",
        "--gpu h200 --utilisation",
        "stopped after 120 s",
        "| 50.0 | 50.0 | 50.0 | 50.0 | 16,800 | 200 |",
    ):
        assert expected in text


def test_pack_refuses_more_than_can_be_carried(tmp_path):
    """The script does not leave a folder that is too large for the way to the machine without saying so."""
    pip = tmp_path / "python"
    pip.write_text("#!/bin/bash\n[[ $1 == -c ]] && echo x==1 || truncate -s 61M build/gpu_wheels/x.whl\n")
    pip.chmod(0o755)
    (tmp_path / "benchmarks").mkdir()
    script = tmp_path / "benchmarks" / "gpu_first.sh"
    script.write_text((ROOT / "benchmarks" / "gpu_first.sh").read_text())
    done = subprocess.run(
        ["bash", str(script), "--pack"], env=os.environ | {"PYTHON": str(pip)}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "more than 60 MiB" in done.stderr

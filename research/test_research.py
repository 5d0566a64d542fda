"""Tests of the claims of the paper: how they are judged, and that the page agrees with the records."""

import importlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import stats

from deitlt_hf import DeiTLTForImageClassification, FlatTeacherForImageClassification
from deitlt_hf.analysis.attention import attention_distances
from deitlt_hf.cli.distill import main as distill
from deitlt_hf.data.sampling import seed_streams
from deitlt_hf.data.sources.arrays import load_idx
from deitlt_hf.data.transforms import TrainTransform
from deitlt_hf.hub import load_original_student
from deitlt_hf.losses import DistillationLoss
from deitlt_hf.recipes import StudentArguments, parse_arguments
from deitlt_hf.training.recipe import STUDENT, TEACHER

ROOT = Path(__file__).parent.parent


@pytest.fixture
def claims(monkeypatch):
    """Modules of `research`."""
    folder = ROOT / "research"
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))  # because `arms` extends it
    # Other folders have modules of the same names.
    names = {path.stem for path in folder.glob("*.py")} - {"conftest", "test_research"}

    def forget():
        for name in names:
            sys.modules.pop(name, None)

    forget()
    yield importlib.import_module
    forget()


# ---- Verdicts ----


def records(evidence, folder, differences, seeds=(0, 1, 2)):
    """Two arms whose tail accuracies differ by the given values, and otherwise are equal."""
    for seed, difference in zip(seeds, differences, strict=True):
        for arm, tail in (("first", 0.5 + difference), ("second", 0.5)):
            record = {"last": {"accuracies": {"mean": {"overall": 0.5, "head": 0.5, "mid": 0.5, "tail": tail}}}}
            (folder / f"fashion-{arm}-seed{seed}.json").write_text(json.dumps(record))
    return evidence.Check(
        "tail", evidence.accuracy("first", "mean", "tail"), evidence.accuracy("second", "mean", "tail")
    )


@pytest.fixture
def evidence(claims, tmp_path, monkeypatch):
    module = claims("evidence")
    monkeypatch.setattr(sys.modules["arms"], "RESULTS", tmp_path)
    return module


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.10, 0.11, 0.12], "holds"),
        ([-0.10, -0.11, -0.12], "does not hold"),
        ([0.10, 0.01, 0.12], "cannot tell"),
    ],
)
def test_verdict_is_by_the_interval_over_seeds(evidence, tmp_path, differences, verdict):
    check = records(evidence, tmp_path, differences)
    found, (low, high), said = check.judge(evidence.Evidence())
    assert said == verdict
    np.testing.assert_allclose(found, 100 * np.array(differences), atol=1e-9)
    expected = stats.ttest_1samp(100 * np.array(differences), 0).confidence_interval(0.95)
    np.testing.assert_allclose((low, high), expected)


def test_no_verdict_before_all_seeds_have_records(evidence, tmp_path):
    """No verdict is given before all seeds have records: somebody who may stop after any seed can choose the result."""
    check = records(evidence, tmp_path, [0.3, 0.31], seeds=(0, 1))
    assert check.judge(evidence.Evidence())[2] == evidence.NOT_RUN


def test_a_margin_allows_a_smaller_first_measure(evidence, tmp_path):
    check = records(evidence, tmp_path, [-0.004, -0.005, -0.006])
    said = {margin: replace(check, margin=margin).judge(evidence.Evidence())[2] for margin in (0, 0.5, 1)}
    assert said == {0: "does not hold", 0.5: "cannot tell", 1: "holds"}


def test_only_seeds_that_both_have_are_compared(evidence, tmp_path):
    check = records(evidence, tmp_path, [0.1, 0.2, 0.3])
    (tmp_path / "fashion-second-seed1.json").unlink()
    np.testing.assert_allclose(check.judge(evidence.Evidence())[0], [10, 30])


@pytest.mark.parametrize(
    ("one", "other", "verdict"),
    [
        ([0.1, 0.11, 0.12], [0.1, 0.11, 0.12], "holds"),
        ([0.1, 0.11, 0.12], [-0.1, 0.1, 0.2], "holds in part"),
        ([0.1, 0.11, 0.12], [-0.1, -0.11, -0.12], "some parts hold, others do not"),
        ([-0.1, -0.11, -0.12], [-0.1, 0.1, 0.2], "does not hold"),
        ([-0.1, -0.11, -0.12], [-0.1, -0.11, -0.12], "does not hold"),
    ],
)
def test_claim_holds_if_all_its_checks_hold(evidence, one, other, verdict):
    class Given:
        def __init__(self, differences):
            self.is_claimed, self.differences = True, np.array(differences)

        def judge(self, _):
            low, high = evidence.interval(self.differences)
            return self.differences, (low, high), evidence.verdict(low, high)

    ignored = Given([-1, -1.1, -1.2])
    ignored.is_claimed = False
    assert evidence.Claim("", [Given(one), Given(other), ignored], None).verdict(None) == verdict


def test_reach_of_uniform_attention(evidence):
    attentions = np.full((2, 3, 11, 11), 1 / 11)  # two tokens and nine patches
    found = evidence.reach_of_uniform("deit-lt").of({"architecture": {"image_size": 12, "patch_size": 4}})
    np.testing.assert_allclose(attention_distances(attentions, (3, 3), 4), found)


# ---- The page ----


def made_up(generator, is_teacher):
    """A record with every value that the page shows."""

    def row():
        return dict(zip(("overall", "head", "mid", "tail"), generator.uniform(0.2, 0.9, 4), strict=True))

    if is_teacher:
        sharpness = {"overall": {"eigenvalue": generator.uniform(1, 9), "loss_rise": generator.uniform()}}
        return {"last": {"step": 60, "accuracies": {"teacher": row()}}, "sharpness": sharpness}
    return {
        "last": {"step": 600, "accuracies": {"mean": row(), "cls": row(), "distillation": row()}},
        "fusions": {"mean": row(), "fusion_logit_adjustment": row()},
        "tokens": {
            "attention_distances": generator.uniform(4, 20, (6, 4)).tolist(),
            "effective_ranks": {"distillation": row()},
        },
        "architecture": {"image_size": 28, "patch_size": 4},
        "teacher": {"accuracies": row()},
    }


def test_all_records_make_a_complete_page(evidence, claims, tmp_path, monkeypatch):
    report, setting = claims("report"), sys.modules["arms"].SETTINGS["fashion"]
    generator = np.random.default_rng(0)
    for name, arm in {**setting.teachers, **setting.students}.items():
        for path in (report.Evidence().runs.record(seed, name) for seed in setting.seeds):
            path.write_text(json.dumps(made_up(generator, is_teacher=arm.script == sys.modules["arms"].TEACH)))
    seconds = dict.fromkeys(("ce-sam", "labels", "deit-lt", "ours"), 0.5)
    (tmp_path / "prices.json").write_text(json.dumps({"seconds_per_step": seconds}))
    monkeypatch.setattr(sys.modules["evidence"], "PRICES", tmp_path / "prices.json")
    views = {"out of distribution": {name: dict.fromkeys(report.SAID, 0.25) for name in setting.teachers}}
    for seed in setting.seeds:
        labels = {"images": {"head": 0.7, "mid": 0.2, "tail": 0.1}, "views": views}
        report.Evidence().runs.record(seed, report.LABELS).write_text(json.dumps(labels))
    copies = {path: tmp_path / path.name for path in (*report.PAGES, report.README)}
    for path, copy in copies.items():
        copy.write_text(path.read_text())
    monkeypatch.setattr(report, "README", copies[report.README])
    monkeypatch.setattr(report, "PAGES", {copies[path]: claims for path, claims in report.PAGES.items()})
    monkeypatch.setattr(report, "PICTURES", tmp_path)
    monkeypatch.setattr(sys, "argv", ["report.py"])
    report.main()
    page = "".join(path.read_text() for path in report.PAGES)
    assert report.NOT_RUN not in page
    assert len(re.findall(r"^(\d+) of \1 runs are recorded", page, re.MULTILINE)) == len(report.PAGES)
    assert all(f"| {arm.title} |" in page for arm in (*setting.teachers.values(), *setting.students.values()))
    assert re.search(r"^\| DeiT-LT, 120 epochs \| 5\.5 \|", page, re.MULTILINE)  # 660 steps of half a second
    assert re.search(r"^\| the CNN itself, 90 epochs \| 0\.5 \|", page, re.MULTILINE)
    assert "| (classes of the images) |  | 70.0 ± 0.0 | 20.0 ± 0.0 | 10.0 ± 0.0 |" in page
    assert page.count("| out of distribution |") == len(setting.teachers)
    for number, claim in enumerate(report.CLAIMS, 1):
        assert f"![{claim.title}](pictures/claim_{number}.png)" in page
        with Image.open(tmp_path / f"claim_{number}.png") as picture:
            assert len(set(picture.convert("L").tobytes())) > 10


def test_page_and_pictures_agree_with_the_records(claims):
    """Page and pictures agree with the records; after new records without a new report, the page would be wrong."""
    report = claims("report")
    evidence = report.Evidence()
    made = report.parts(evidence)
    for path in (*report.PAGES, report.README):
        page = path.read_text()
        assert report.with_parts(page, made) == page
    for number, claim in enumerate(report.CLAIMS, 1):
        if claim.verdict(evidence) == report.NOT_RUN:
            continue
        with Image.open(report.picture(number)) as picture:
            assert picture.text["records"] == evidence.digest


def test_sections_of_the_pages_are_the_claims(claims):
    report = claims("report")
    assert [claim for page in report.PAGES.values() for claim in page] == report.CLAIMS
    for path, page in report.PAGES.items():
        headings = re.findall(r"^## (\d+)\. (.*)", path.read_text(), re.MULTILINE)
        assert headings == [(str(report.CLAIMS.index(claim) + 1), claim.title) for claim in page]


# ---- Hyperparameters ----


def test_hyperparameters_are_the_best_on_held_out_images(claims):
    report = claims("report")
    arms = sys.modules["arms"]
    evidence = report.Evidence("held_out")
    for loss, rhos in arms.RHOS.items():
        scores = {rho: evidence.accuracies(f"{loss}-{rho:g}", "teacher")[:, 0].mean() / 100 for rho in rhos}
        best = max(scores.values())
        error = (best * (1 - best) / 10_000) ** 0.5
        chosen = arms.TEACHERS[f"{loss}-sam"].arguments
        assert chosen[chosen.index("--sam_rho") + 1] == max(rho for rho in rhos if scores[rho] >= best - error)
    scores = {name: evidence.accuracies(f"labels-{name}", "mean")[:, 0].mean() for name in arms.BATCHES}
    assert max(scores, key=scores.get) == arms.CHOSEN_BATCH


def test_held_out_images_are_from_the_training_split_and_not_trained_on(claims, tmp_path, monkeypatch):
    claims("run")
    arms = sys.modules["arms"]
    monkeypatch.setattr(arms, "ROOT", tmp_path)
    generator = np.random.default_rng(0)
    pixels, labels = generator.integers(256, size=(50, 4, 4), dtype=np.uint8), np.arange(50, dtype=np.uint8) % 10
    for name, magic, rows in (("images-idx3", 3, pixels), ("labels-idx1", 1, labels)):
        header = bytes([0, 0, 8, magic]) + b"".join(size.to_bytes(4, "big") for size in rows.shape)
        (tmp_path / f"train-{name}-ubyte").write_bytes(header + rows.tobytes())
    data = load_idx(arms.hold_out(str(tmp_path), test=20))
    assert (len(data["train"]), len(data["test"])) == (30, 20)
    found = {
        split: {(np.asarray(row["image"])[..., :4].tobytes(), row["label"]) for row in data[split]} for split in data
    }
    assert not found["train"] & found["test"]
    assert found["train"] | found["test"] == {
        (image.tobytes(), label) for image, label in zip(pixels, labels.tolist(), strict=True)
    }
    with pytest.raises(FileNotFoundError):  # images of one folder are not mistaken for another's
        arms.hold_out(str(tmp_path / "another"))


def test_records_of_a_seed_belong_together(claims):
    """Records of a seed belong together.

    With another subset or an unknown teacher, an arm cannot be paired with the others.
    """
    report = claims("report")
    evidence = report.Evidence()
    setting = evidence.runs.setting
    for seed in setting.seeds:
        found = {name: evidence.runs.recorded(seed, name) for name in (*setting.teachers, *setting.students)}
        found = {name: record for name, record in found.items() if record is not None}
        assert len({record["data"]["subset_sha256"] for record in found.values()}) <= 1
        for name, record in found.items():
            teacher = None if name in setting.teachers else setting.students[name].teacher
            if teacher is not None:
                if name not in setting.later:
                    assert record["teacher_sha256"] == found[teacher]["weights_sha256"]
                of_teacher = re.compile(rf"fashion-{teacher}(-[0-9a-f]{{8}})?-seed{seed}\.json")
                folder = evidence.runs.record(seed, teacher).parent
                taught = [json.loads(path.read_text()) for path in folder.iterdir() if of_teacher.fullmatch(path.name)]
                assert record["teacher_sha256"] in {teacher["weights_sha256"] for teacher in taught}
                assert len({tuple(record["arguments"]) for record in taught}) == 1
    for seed, record in evidence.records(report.LABELS).items():
        for name, digest in record["teachers_sha256"].items():
            assert digest == evidence.records(name)[seed]["weights_sha256"]


# ---- The peer ----


def test_peer_has_our_loss_and_gradients(claims, teacher_folder):
    """The peer has our loss and gradients; otherwise it would not be our method without re-weighting."""
    peer = claims("timm_peer")
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    student = peer.make_student(StudentArguments(**sizes, drop_path_rate=0.0), 10)
    ours = load_original_student(student.state_dict(), num_attention_heads=2, drop_path_rate=0.0).train()
    images, targets = torch.randn(6, 3, 8, 8), torch.rand(6, 10).softmax(dim=1)
    expected = peer.make_task(student, str(teacher_folder), 0.5).train()(images, targets)["loss"]
    outputs = ours(images)
    with torch.no_grad():
        taught = FlatTeacherForImageClassification.from_pretrained(teacher_folder).eval()(images).logits
    found = DistillationLoss()(outputs.cls_logits, outputs.distillation_logits, targets, taught).loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    expected.backward()
    found.backward()
    gradient = ours.deit.embeddings.position_embeddings.grad
    torch.testing.assert_close(gradient, student.pos_embed.grad, rtol=1e-4, atol=1e-6)


def test_peer_trains_as_ours_does(claims, teacher_folder, tmp_path, monkeypatch):
    """The peer trains as ours does, from the same weights and random numbers.

    Stochastic depth is left out, because its draws cannot be made equal.
    """
    peer = claims("timm_peer")
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    student = peer.make_student(StudentArguments(**sizes, drop_path_rate=0.0), 10)
    save_file(student.state_dict(), tmp_path / "start.safetensors")
    options = {"num_train_epochs": 4, "warmup_epochs": 1, "drw_start_epoch": 3, "drop_path_rate": 0, "drw_beta": 0}
    options |= {"per_device_train_batch_size": 32, "global_batch_size": 32, "teacher": teacher_folder, **sizes}
    options |= {"eval_strategy": "no", "save_strategy": "no", "dataloader_num_workers": 0}
    options |= {"init_from": tmp_path / "start.safetensors"}
    argv = ["--recipe", "digits_lt", *(str(word) for name, value in options.items() for word in (f"--{name}", value))]
    distill([*argv, "--output_dir", str(tmp_path / "ours")])

    step, trained = itertools.count(), []
    finish, predict = TrainTransform.finish, peer.predict

    def finish_as_ours(view, pixels):
        seed_streams(0, next(step), 0, 0, 1)  # seed, step, micro-batch, process, purpose (1: mixing)
        return finish(view, pixels)

    monkeypatch.setattr(TrainTransform, "finish", finish_as_ours)
    monkeypatch.setattr(peer, "make_student", lambda *_: student)
    monkeypatch.setattr(peer, "predict", lambda model, *rest: trained.append(model) or predict(model, *rest))
    monkeypatch.setattr(sys, "argv", ["timm_peer.py", *argv, "--output_dir", str(tmp_path / "peer")])
    peer.main()

    ours = DeiTLTForImageClassification.from_pretrained(tmp_path / "ours").state_dict()
    theirs = load_original_student(trained[0].state_dict(), num_attention_heads=2).state_dict()
    start = load_original_student(load_file(tmp_path / "start.safetensors"), num_attention_heads=2).state_dict()
    assert ours.keys() == theirs.keys()
    moved = torch.cat([(ours[name] - start[name]).flatten() for name in ours])
    apart = torch.cat([(ours[name] - theirs[name]).flatten() for name in ours])
    assert apart.norm() < 0.01 * moved.norm()


# ---- The driver ----


def tiny_setting(arms):
    """A setting with seconds of training on the embedded digits."""
    short = ("--num_train_epochs", 12, "--warmup_epochs", 2, "--drw_start_epoch", 9)
    teacher = arms.Arm("teacher", ("--learning_rate", 0.05, *short), script="scripts/train_teacher.py")
    brief = ("--num_train_epochs", 2, "--warmup_epochs", 0, "--drw_start_epoch", 1)
    students = {
        "deit-lt": arms.Arm("DeiT-LT", brief, "teacher"),
        "timm": arms.Arm("timm", brief, "teacher", "research/timm_peer.py"),
    }
    return arms.Setting("digits", "digits_lt", (0,), {"teacher": teacher}, students)


def test_runs_leave_records_and_are_not_repeated(claims, tmp_path, monkeypatch, capsys):
    run = claims("run")
    arms = sys.modules["arms"]
    monkeypatch.setattr(arms, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(arms.Runs, "folder", lambda self, seed, arm: tmp_path / "outputs" / f"{arm}{seed}")
    monkeypatch.setitem(arms.SETTINGS, "tiny", tiny_setting(arms))
    monkeypatch.setattr(arms, "SHARPNESS", ("--num_images", 16, "--num_vectors", 1))
    monkeypatch.setattr(sys, "argv", ["run.py", "--setting", "tiny"])
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert ended.value.code == 0, capsys.readouterr().out
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "results").iterdir()}
    assert set(found) == {f"tiny-{name}-seed0" for name in ("teacher", "deit-lt", "timm", "teacher-labels")}
    for name in ("tiny-deit-lt-seed0", "tiny-timm-seed0"):
        experts = found[name]["last"]["accuracies"]
        assert set(experts) == {"mean", "cls", "distillation"}
        assert all(0 <= value <= 1 for row in experts.values() for value in row.values())
    assert found["tiny-teacher-seed0"]["sharpness"]["overall"]["eigenvalue"] > 0
    tokens = found["tiny-deit-lt-seed0"]["tokens"]
    assert 1 <= tokens["effective_ranks"]["distillation"]["overall"] <= len(tokens["singular_values"]["distillation"])
    assert "fusion_logit_adjustment" in found["tiny-deit-lt-seed0"]["fusions"]
    labels = found["tiny-teacher-labels-seed0"]
    said = {view: of_teachers["teacher"] for view, of_teachers in labels["views"].items()}
    for shares in (labels["images"], *said.values()):
        np.testing.assert_allclose(sum(shares[group] for group in ("head", "mid", "tail")), 1)
    assert said["in distribution"]["right"] > said["out of distribution"]["right"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run.main()
    assert capsys.readouterr().out == ""


def test_every_arm_of_the_paper_has_possible_arguments(claims):
    """A run of days must not end at an argument that does not exist."""
    claims("run")
    arms = sys.modules["arms"]
    for setting in arms.PAPER_SETTINGS:
        runs = arms.Runs(setting)
        for name in (*runs.setting.teachers, *runs.setting.students):
            argv = map(str, [*runs.data(0, name), *runs.made_with(name)["arguments"]])
            is_teacher = runs.arm(name).script == arms.TEACH
            kinds = TEACHER if is_teacher else STUDENT
            recipe, *_ = parse_arguments("teacher" if is_teacher else "student", kinds, list(argv))
            assert recipe == (f"{setting}_fast" if name in ("ours", "labels-muon") else setting)


def test_a_rival_can_teach(claims, tmp_path, monkeypatch, capsys):
    run, done = claims("run"), []
    arms = sys.modules["arms"]
    monkeypatch.setattr(arms, "RESULTS", tmp_path)
    for work in ("teach", "study"):
        monkeypatch.setattr(arms.Runs, work, lambda self, seed, name, work=work: done.append((work, name)))
    for named in ([arms.TAUGHT_BY_LONG_CNN], [arms.TAUGHT_BY_LONG_CNN, arms.LONG_CNN]):
        monkeypatch.setattr(sys, "argv", ["run.py", "--seeds", "0", "--jobs", "1", "--arms", *named])
        with pytest.raises(SystemExit) as ended:
            run.main()
        assert ended.value.code == 0, capsys.readouterr().out
        assert done == [("teach", arms.LONG_CNN), ("study", arms.TAUGHT_BY_LONG_CNN)]
        done.clear()


def test_record_of_other_arguments_is_refused(claims, tmp_path, monkeypatch):
    """A record of other arguments is refused; one table would mix old and new hyperparameters."""
    claims("run")
    arms = sys.modules["arms"]
    monkeypatch.setattr(arms, "RESULTS", tmp_path)
    runs = arms.Runs("fashion")
    assert runs.recorded(0, "deit-lt") is None
    runs.record(0, "deit-lt").write_text(json.dumps(runs.made_with("deit-lt")))
    assert runs.recorded(0, "deit-lt") is not None
    with pytest.raises(ValueError, match=r"fashion-deit-lt-seed0.json was made with .* remove it"):
        arms.Runs("fashion", threads=2).recorded(0, "deit-lt")
    runs.record(0, "ood").write_text(json.dumps(runs.made_with("deit-lt")))
    with pytest.raises(ValueError, match=r"not with .*--drw_beta"):
        runs.recorded(0, "ood")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
def test_run_ends_with_its_driver(tmp_path):
    """A run ends with its driver; otherwise it would continue in the folder that the next driver uses."""
    run = "import os, pathlib, time; pathlib.Path({!r}).write_text(str(os.getpid())); time.sleep(100)"
    began = tmp_path / "pid"
    driver = f"import sys; sys.path.append('benchmarks'); import series; series.run('-c', {run.format(str(began))!r})"
    process = subprocess.Popen([sys.executable, "-c", driver], cwd=ROOT)
    wait_for(lambda: began.exists() and began.read_text())
    child = psutil.Process(int(began.read_text()))
    process.kill()
    process.wait()
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_interrupted_driver_starts_no_further_run(claims, tmp_path, monkeypatch):
    run = claims("run")
    arms = sys.modules["arms"]
    monkeypatch.setattr(arms, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", "--arms", "labels", "labels-drw", "--seeds", "4", "--jobs", "1"])
    begun = []
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # workers of pytest-xdist ignore it

    def study(self, seed, name):
        begun.append(name)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)

    monkeypatch.setattr(arms.Runs, "study", study)
    try:
        with pytest.raises(KeyboardInterrupt):
            run.main()
    finally:
        signal.signal(signal.SIGINT, handler)
    time.sleep(1)
    assert begun == ["labels"]


def test_run_of_other_arguments_does_not_resume_from_old_checkpoints(claims, tmp_path, monkeypatch):
    """A run with other arguments does not resume from old checkpoints.

    Runs of days resume automatically; a changed run would continue with the old run's weights.
    """
    claims("run")
    arms = sys.modules["arms"]
    monkeypatch.setattr(arms.Runs, "folder", lambda self, seed, arm: tmp_path / arm)
    found = []

    def interrupted(*_, **__):
        checkpoint = tmp_path / "labels" / "checkpoint-1"
        found.append(checkpoint.exists())
        checkpoint.mkdir(parents=True, exist_ok=True)
        raise RuntimeError("interrupted")

    monkeypatch.setattr(arms, "run", interrupted)
    for threads, error in ((1, "interrupted"), (1, "interrupted"), (2, "move it away"), (1, "interrupted")):
        with pytest.raises((RuntimeError, ValueError), match=error):
            arms.Runs("cifar10_lt_rho100", threads=threads).study(0, "labels")
    assert found == [False, True, True]


def test_teacher_trained_again_with_other_bits_gets_a_separate_record(claims, tmp_path, monkeypatch):
    """A teacher trained again with other bits gets a separate record.

    Models are not committed, and another machine adds in another order; students learned from the first teacher.
    """
    claims("run")
    arms = sys.modules["arms"]
    monkeypatch.setattr(arms, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(arms.Runs, "folder", lambda self, seed, arm: tmp_path / "outputs" / arm)
    monkeypatch.setattr(arms.Runs, "_look", lambda *_: {})
    runs = arms.Runs("fashion")
    for digest in ("first111aa", "second22bb", "second22bb", "first111aa"):
        made = {"weights_sha256": digest} | runs.made_with("ce-sam")
        monkeypatch.setattr(arms.Runs, "_trained", lambda *_, made=made: dict(made))
        runs.teach(0, "ce-sam")
    found = {path.name: json.loads(path.read_text())["weights_sha256"] for path in arms.RESULTS.iterdir()}
    assert found == {
        "fashion-ce-sam-seed0.json": "first111aa",
        "fashion-ce-sam-second22-seed0.json": "second22bb",
    }


def test_failed_run_is_reported_and_the_others_continue(claims, tmp_path, monkeypatch, capsys):
    run = claims("run")
    arms = sys.modules["arms"]
    monkeypatch.setattr(arms, "RESULTS", tmp_path)
    done = []

    def study(self, seed, name):
        if name == "ood":
            raise RuntimeError("out of memory")
        done.append(name)

    monkeypatch.setattr(arms.Runs, "study", study)
    monkeypatch.setattr(arms.Runs, "teach", lambda self, seed, name: done.append(name))
    monkeypatch.setattr(sys, "argv", ["run.py", "--arms", "ood", "labels", "--seeds", "4"])
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert ended.value.code == 1
    assert "seed 4: ood failed: out of memory" in capsys.readouterr().out
    assert sorted(done) == ["ce-sam", "labels"]

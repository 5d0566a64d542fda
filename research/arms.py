"""Trained models for the claims: settings, their teachers and students, and runs with their records."""

import contextlib
import gzip
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from filelock import FileLock

from deitlt_hf.model_folder import weights_digest
from deitlt_hf.records import read_record

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from series import ROOT, run, write_record

RESEARCH = Path(__file__).parent
RESULTS = RESEARCH / "results"
# For runs of minutes: an interrupted run starts again, and test images are not used before the last epoch.
SHORT = ("--overwrite", "--eval_strategy", "no", "--save_strategy", "no", "--dataloader_num_workers", "0")
# For runs of days: the recipe's workers and checkpoints; an interrupted run resumes from the newest checkpoint.
LONG = ("--resume_from_checkpoint", "auto")
DISTILL, TEACH = "scripts/distill.py", "scripts/train_teacher.py"
SHARPNESS = ("--num_images", 256, "--num_vectors", 16)
LABELS = "teacher-labels"  # name of the records with the labels of a seed's teachers
PRICES = RESULTS / "fashion-prices.json"  # time of a training step of each arm


@dataclass(frozen=True)
class Arm:
    """One way to train a teacher or a student.

    Args:
        title: Name in tables.
        arguments: Arguments of the script.
        teacher: For a student, the name of the arm that teaches it; None without a teacher.
        script: The training script.
        recipe: Recipe of the package; None for the setting's.
        pretrained: Start the student from a trunk that masked pre-training made of the same training images.
    """

    title: str
    arguments: tuple = ()
    teacher: str | None = None
    script: str = DISTILL
    recipe: str | None = None
    pretrained: bool = False


def teacher(title: str, loss: str, rho: float) -> Arm:
    return Arm(title, ("--teacher_loss", loss, "--sam_rho", rho), script=TEACH)


TEACHERS = {
    "ce-sam": teacher("CE-DRW, SAM", "ce", 0.1),
    "ce-sgd": teacher("CE-DRW, SGD", "ce", 0),
    "ldam-sam": teacher("LDAM-DRW, SAM", "ldam", 0.1),
    "paco-sam": teacher("PaCo, SAM", "paco", 0.025),
}
PEER = "research/timm_peer.py"
# With beta 0 all class weights are 1. Mixing stops at the DRW epoch in all arms.
NO_DRW = ("--drw_beta", 0)
WEAK = ("--teacher_view", "weak")
ALONE = ("--distillation", "none")
UNMIXED = ("--mixup", 0, "--cutmix", 0)
MUON = ("--optim", "muon", "--learning_rate", 3e-3)
SOFT = ("--distillation", "soft_sum")
BALANCED = ("--cls_loss", "logit_adjusted")
STUDENTS = {
    "labels": Arm("labels only", ALONE + NO_DRW),
    "deit-lt": Arm("DeiT-LT", (), "ce-sam"),
    "ood": Arm("out-of-distribution view, no DRW", NO_DRW, "ce-sam"),
    "id-drw": Arm("in-distribution view, DRW", WEAK, "ce-sam"),
    "deit": Arm("plain DeiT distillation (in-distribution view, no DRW)", WEAK + NO_DRW, "ce-sam"),
    "timm": Arm("timm's token distillation, a bare loop", (), "ce-sam", PEER),
    "deit-lt-sgd": Arm("DeiT-LT, SGD teacher", (), "ce-sgd"),
    "labels-drw": Arm("labels, DIST with DRW", ALONE),
    "deit-lt-ldam": Arm("DeiT-LT, LDAM-SAM teacher", (), "ldam-sam"),
    "deit-lt-paco": Arm("DeiT-LT, PaCo-SAM teacher", (), "paco-sam"),
}
# The authors do not mix where the teacher sees a weak view: its label would describe one image, whatever its share.
STUDENTS["id-unmixed"] = Arm("in-distribution view, DRW, no mixing", (*WEAK, "--mixup", 0, "--cutmix", 0), "ce-sam")
STUDENTS["ood-unmixed"] = Arm("out-of-distribution view, DRW, no mixing", ("--mixup", 0, "--cutmix", 0), "ce-sam")
# Epochs of further students; the schedule is stretched.
LENGTHS = (15, 30, 120)


def length(epochs: int) -> tuple:
    """Arguments for a schedule of the given number of epochs."""
    return "--num_train_epochs", epochs, "--drw_start_epoch", epochs * 4 // 5


STUDENTS |= {f"deit-lt-{epochs}": Arm(f"DeiT-LT, {epochs} epochs", length(epochs), "ce-sam") for epochs in LENGTHS}
# A student on labels only, for comparison with the longest of these.
LONG_LABELS = f"labels-{max(LENGTHS)}"
STUDENTS[LONG_LABELS] = Arm(f"labels only, {max(LENGTHS)} epochs", (*ALONE, *NO_DRW, *length(max(LENGTHS))))
# Beyond the paper, all with Muon and without mixing: the recipes `*_fast`, and the arms for comparison.
BEYOND = {
    "ours": Arm(
        "ours: Muon, soft labels, balanced softmax for CLS",
        (*MUON, *UNMIXED, *SOFT, *BALANCED, "--drw_start_epoch", "inf"),
        "ce-sam",
    ),
    "labels-muon": Arm(
        "labels only, Muon, balanced softmax for CLS",
        (*MUON, *UNMIXED, *ALONE, *BALANCED, "--drw_start_epoch", "inf"),
    ),
    "timm-muon": Arm("timm's token distillation, Muon", (*MUON, *UNMIXED), "ce-sam", PEER),
    "deit-lt-muon": Arm("DeiT-LT, Muon", (*MUON, *UNMIXED), "ce-sam"),
    "ood-muon": Arm("out-of-distribution view, no DRW, Muon", (*MUON, *UNMIXED, *NO_DRW), "ce-sam"),
    "id-drw-muon": Arm("in-distribution view, DRW, Muon", (*MUON, *UNMIXED, *WEAK), "ce-sam"),
}
# The CNN that taught them, trained for as many epochs as CNN and student take together, and ours that learns from it:
# as long as ours, or half as long, which with this teacher costs what ours costs.
LONG_CNN = "ce-sam-90"
TAUGHT_BY_LONG_CNN, SHORT_BY_LONG_CNN = "ours-long-cnn", "ours-long-cnn-30"
BEYOND |= {
    LONG_CNN: Arm("the CNN itself, 90 epochs", (*TEACHERS["ce-sam"].arguments, *length(90)), script=TEACH),
    TAUGHT_BY_LONG_CNN: Arm("ours, taught by the CNN of 90 epochs", BEYOND["ours"].arguments, LONG_CNN),
    SHORT_BY_LONG_CNN: Arm(
        "ours, 30 epochs, taught by the CNN of 90 epochs", (*length(30), *BEYOND["ours"].arguments), LONG_CNN
    ),
}
STUDENTS |= BEYOND
# Arms by number of epochs.
BY_LENGTH = dict(sorted({60: "deit-lt", **{epochs: f"deit-lt-{epochs}" for epochs in LENGTHS}}.items()))
LATER = (
    *("id-unmixed", "ood-unmixed", "deit-lt-ldam", "deit-lt-paco"),
    *(f"deit-lt-{epochs}" for epochs in LENGTHS),
    LONG_LABELS,
    *BEYOND,
)
SEEDS = (0, 1, 2)


# Hyperparameters that are tried on held-out images.
RHOS = {"ce": (0.05, 0.1, 0.2), "ldam": (0.05, 0.1), "paco": (0.025, 0.05)}
CHOSEN_BATCH = "64-1e-3"
BATCHES = {"128-1e-3": (128, 1e-3), "128-2e-3": (128, 2e-3), "64-1e-3": (64, 1e-3), "64-2e-3": (64, 2e-3)}


def batch(size: int, learning_rate: float) -> tuple:
    """Arguments for a batch size and its learning rate."""
    return "--global_batch_size", size, "--per_device_train_batch_size", size, "--learning_rate", learning_rate


CANDIDATE_TEACHERS = {
    f"{loss}-{rho:g}": teacher(f"{loss}, rho {rho:g}", loss, rho) for loss, rhos in RHOS.items() for rho in rhos
}
# Candidates for the arm that ours is compared with.
CANDIDATE_STUDENTS = {
    f"labels-{name}": Arm(f"labels only, batch {values[0]}, {values[1]:g}", (*ALONE, *NO_DRW, *batch(*values)))
    for name, values in BATCHES.items()
}
# Beyond the paper: candidates with Muon, in half the epochs.
PLAIN_VIEW = ("--auto_augment", "none", "--random_erasing", 0)
TRAINED_ON_OURS = "ce-0.1-augmented"
CANDIDATE_TEACHERS[TRAINED_ON_OURS] = Arm(
    "ce, rho 0.1, RandAugment as the student",
    ("--teacher_loss", "ce", "--sam_rho", 0.1, "--auto_augment", "rand-m9-mstd0.5-inc1", "--random_erasing", 0.25),
    script=TEACH,
)


# Few updates: those of `deitlt train` if time is short.
SHORT_TEACHER = (*CANDIDATE_TEACHERS["ce-0.1"].arguments, *length(20))
CANDIDATE_TEACHERS["ce-0.1-20"] = Arm("ce, rho 0.1, 20 epochs", SHORT_TEACHER, script=TEACH)
CANDIDATE_TEACHERS["ce-0.1-20-64"] = Arm(
    "ce, rho 0.1, 20 epochs, batch 64", (*SHORT_TEACHER, *batch(64, 0.1)), script=TEACH
)


def candidate(
    title: str,
    *changed,
    rate: float = 3e-3,
    teacher: str | None = "ce-0.1",
    base: tuple = UNMIXED,
    size: int = 64,
) -> Arm:
    """A student of 30 epochs with Muon, in batches of `size`."""
    return Arm(title, (*batch(size, rate), *length(30), "--optim", "muon", *base, *changed), teacher)


def growing(epoch: int) -> tuple:
    """Arguments for images of 16 pixels until an epoch, and of the full size, 28, from it on."""
    return "--train_sizes", 16, 28, "--train_size_epochs", 0, epoch


OURS = (*SOFT, *NO_DRW, *BALANCED)
BEYOND_CANDIDATES = {
    "adamw": Arm("AdamW, not mixed", (*batch(64, 1e-3), *length(30), *UNMIXED), "ce-0.1"),
    "muon": candidate("Muon, 3e-3, not mixed"),
    "soft": candidate("soft labels", *SOFT),
    "plain-view": candidate("no RandAugment", *PLAIN_VIEW),
    "soft-no-drw-balanced": candidate("soft labels, no DRW, balanced softmax for CLS", *OURS),
    # The best of these with each part removed, and possible improvements.
    "ours-plain-view": candidate("the last, no RandAugment", *OURS, *PLAIN_VIEW),
    "ours-hard": candidate("the same, hard labels", *NO_DRW, *BALANCED),
    "ours-unbalanced": candidate("the same, cross entropy for CLS", *SOFT, *NO_DRW),
    "ours-6e-3": candidate("the same, 6e-3", *OURS, rate=6e-3),
    "ours-128": candidate("the same, batch 128", *OURS, size=128),
    "ours-32": candidate("the same, batch 32", *OURS, size=32),
    "ours-mixed": candidate("the same, mixed", *OURS, base=()),
    "ours-mae": replace(candidate("the same, trunk pre-trained (MAE)", *OURS), pretrained=True),
    "ours-sam": candidate("the same, SAM in the last fifth", *OURS, "--sam_rho", 0, 0.05, "--sam_rho_epochs", 0, 24),
    "ours-growing": candidate("the same, 16 px in the first half", *OURS, *growing(15)),
    "ours-growing-longer": candidate("the same, 16 px in half of 44 epochs", *length(44), *OURS, *growing(22)),
    "ours-ema": candidate("the same, moving average", *OURS, "--ema_decay", 0.999),
    "ours-adamw": Arm("the same, AdamW, 1e-3", (*batch(64, 1e-3), *length(30), *UNMIXED, *OURS), "ce-0.1"),
    "labels-muon": candidate("labels only, balanced softmax for CLS", *ALONE, *NO_DRW, *BALANCED, teacher=None),
}


@dataclass(frozen=True)
class Setting:
    """Data and arms.

    Args:
        title: Name in the docs.
        recipe: Recipe of the package.
        seeds: Seeds of subset, initialisation and augmentation.
        teachers: Arms by name.
        students: Arms by name, with the baselines; the most informative arms come first.
        later: Names of students that are trained after the other students of all seeds.
        common: Arguments of all students that are ViTs.
        running: Arguments of all runs that do not change the results.
        holds_out: Test on images held out of the training split, and train on the others.
        measures_flatness: Measure the flatness of the teachers.
    """

    title: str
    recipe: str
    seeds: tuple[int, ...]
    teachers: Mapping[str, Arm]
    students: Mapping[str, Arm]
    later: tuple[str, ...] = ()
    common: tuple = ()
    running: tuple = SHORT
    holds_out: bool = False
    measures_flatness: bool = True

    @property
    def resumes(self) -> bool:
        """Whether an interrupted run continues from its newest checkpoint."""
        return LONG[0] in self.running


def at_length(title: str, epochs: int, common: tuple, running: tuple = (), teaching: tuple = ()) -> Setting:
    """Fashion-MNIST with one teacher and the three students that the paper's length is most informative for.

    Args:
        title: Name in the docs.
        epochs: Epochs of the students.
        common: Arguments of all students.
        running: Arguments of all runs that do not change the results, beyond those of `LONG`.
        teaching: Further arguments of the teacher.
    """
    taught_by = TEACHERS["ce-sam"]
    students = {
        name: replace(STUDENTS[name], arguments=(*length(epochs), *STUDENTS[name].arguments))
        for name in ("deit-lt", "labels", "ours")
    }
    return Setting(
        title,
        FASHION,
        SEEDS,
        {"ce-sam": replace(taught_by, arguments=(*taught_by.arguments, *teaching))},
        students,
        common=common,
        running=(*LONG, "--eval_strategy", "no", *running),
        measures_flatness=False,
    )


FASHION = "fashion_mnist_lt_tiny"
FEW = ("--max_per_class", 300, "--warmup_epochs", 1)
SETTINGS = {
    "fashion": Setting(
        "Fashion-MNIST, ratio 100, 1,500 to 15 images a class",
        FASHION,
        SEEDS,
        TEACHERS,
        STUDENTS,
        LATER,
        batch(*BATCHES[CHOSEN_BATCH]),
    ),
    "held_out": Setting(
        "images held out of Fashion-MNIST's training split",
        FASHION,
        (10,),
        CANDIDATE_TEACHERS,
        CANDIDATE_STUDENTS | BEYOND_CANDIDATES,
        holds_out=True,
    ),
    # Not used to choose anything: the recipe digits_lt_fast, and the arms for comparison.
    "digits": Setting(
        "scikit-learn's digits, ratio 20, 119 to 5 images a class",
        "digits_lt",
        SEEDS,
        {"ce-sam": TEACHERS["ce-sam"]},
        {
            "deit-lt": STUDENTS["deit-lt"],
            **{
                name: Arm(arm.title, ("--num_train_epochs", 160, *arm.arguments), arm.teacher, arm.script)
                for name, arm in BEYOND.items()
                if name in ("ours", "labels-muon", "timm-muon")
            },
        },
    ),
    # The paper's length, for a GPU. Batches of 256 make 16,800 updates of these images; CIFAR-10-LT has 14,400 in the
    # paper, which also trains in half precision.
    "fashion_long": at_length(
        "Fashion-MNIST, ratio 100, 1,200 epochs, batches of 256 in bfloat16",
        1200,
        (*batch(256, 1e-3), "--bf16", "true"),
        ("--dataloader_num_workers", 4),
    ),
    # Only to try the programs: a few steps on few images. The teacher must know more than chance.
    "fashion_trial": at_length(
        "Fashion-MNIST, 2 epochs of at most 300 images a class",
        2,
        (*batch(64, 1e-3), *FEW),
        ("--dataloader_num_workers", 0),
        (*FEW, *length(10)),
    ),
}


def paper_setting(recipe: str, title: str) -> Setting:
    """A benchmark of the paper, for a GPU: with the paper's values, and with those of the package's own recipe."""
    own = f"{recipe}_fast"
    return Setting(
        title,
        recipe,
        SEEDS,
        {
            "ldam-sam": Arm("LDAM-DRW, SAM", ("--teacher_loss", "ldam"), script=TEACH),
            "paco-sam": Arm("PaCo, SAM", ("--teacher_loss", "paco"), script=TEACH),
        },
        {
            "labels": STUDENTS["labels"],
            "deit-lt": Arm("DeiT-LT, LDAM-SAM teacher", (), "ldam-sam"),
            "deit-lt-paco": STUDENTS["deit-lt-paco"],
            "ours": Arm("ours, LDAM-SAM teacher", (), "ldam-sam", recipe=own),
            "labels-muon": Arm("labels only, as ours", ALONE, recipe=own),
        },
        running=LONG,
    )


PAPER_SETTINGS = {
    "cifar10_lt_rho100": "CIFAR-10-LT, ratio 100",
    "cifar10_lt_rho50": "CIFAR-10-LT, ratio 50",
    "cifar100_lt_rho100": "CIFAR-100-LT, ratio 100",
    "cifar100_lt_rho50": "CIFAR-100-LT, ratio 50",
    "imagenet_lt": "ImageNet-LT",
    "inat18": "iNaturalist 2018",
}
SETTINGS |= {recipe: paper_setting(recipe, title) for recipe, title in PAPER_SETTINGS.items()}


@dataclass(frozen=True)
class Runs:
    """The runs of a setting.

    Args:
        name: Name of the setting.
        data_dir: Folder of its images; with None they come from the Hub.
        threads: Threads of each run; always the same number, because the results depend on it.
        results: Folder of the records; None for the committed ones.
    """

    name: str
    data_dir: str | None = None
    threads: int = 1
    results: Path | None = None

    @property
    def setting(self) -> Setting:
        return SETTINGS[self.name]

    def arm(self, name: str) -> Arm:
        return self.setting.teachers.get(name) or self.setting.students[name]

    def folder(self, seed: int, arm: str) -> Path:
        return ROOT / "outputs" / "claims" / self.name / f"seed{seed}" / arm

    def record(self, seed: int, arm: str) -> Path:
        return (self.results or RESULTS) / f"{self.name}-{arm}-seed{seed}.json"

    def data(self, seed: int, name: str | None = None) -> list:
        """Arguments that select the images, and the recipe of an arm."""
        own = None if name is None else self.arm(name).recipe
        data = ["--recipe", own or self.setting.recipe, "--subset_seed", seed]
        return data + (["--data_dir", self.data_dir] if self.data_dir else [])

    def made_with(self, name: str) -> dict:
        """The values that, with recipe and seed, determine an arm's results, in the form used in records."""
        common = () if self.arm(name).script == TEACH else self.setting.common
        own = self.arm(name).recipe
        return {
            "arguments": [str(argument) for argument in (*common, *self.arm(name).arguments)],
            "threads": self.threads,
        } | ({"arm_recipe": own} if own is not None else {})

    def recorded(self, seed: int, name: str) -> dict | None:
        """The record of a run; None if it does not exist.

        Raises:
            ValueError: If the current arguments or threads differ from those of the record.
        """
        path = self.record(seed, name)
        if not path.exists():
            return None
        record, wanted = json.loads(path.read_text()), self.made_with(name)
        made = {field: record.get(field) for field in wanted}
        if made != wanted:
            raise ValueError(f"{path.name} was made with {made}, not with {wanted}; remove it to make it again.")
        return record

    def teach(self, seed: int, name: str) -> None:
        """Trains a teacher and measures its flatness, unless model and record exist.

        If the record exists without the model (which is not committed), training on another machine gives other bits.
        The first record stays, because students have learned from that teacher. The new teacher gets an additional
        record of its training and of its outputs for the test images.
        """
        with self._alone(seed, name) as folder:
            first, results = self.recorded(seed, name), self._trained(seed, name)
            digest = results["weights_sha256"]
            is_first = first is None or first["weights_sha256"] == digest
            path = self.record(seed, name if is_first else f"{name}-{digest[:8]}")
            if path.exists():
                return
            if is_first and self.setting.measures_flatness and not self.setting.holds_out:
                results["sharpness"] = self._look(seed, folder, "-m", "deitlt_hf.cli", "sharpness", *SHARPNESS)
            write_record(path, results)

    def study(self, seed: int, name: str) -> None:
        """Trains a student, whose teacher exists, and observes its tokens, unless its record exists."""
        with self._alone(seed, name) as folder:
            if self.recorded(seed, name) is not None:
                return
            results = self._trained(seed, name)
            is_ours = self.arm(name).script == DISTILL
            if is_ours and not self.setting.holds_out:
                results["tokens"] = self._look(seed, folder, RESEARCH / "observe_tokens.py")
            if is_ours:
                results["fusions"] = self._look(seed, folder, ROOT / "scripts" / "evaluate.py", "--fusion", "all")
            write_record(self.record(seed, name), results)

    def compare_teachers(self, seed: int) -> None:
        """Records the labels that the existing teachers give a student's images, unless the record exists."""
        folders = {name: self.folder(seed, name) for name in self.setting.teachers}
        made_of = {"arguments": [str(argument) for argument in self.setting.common], "threads": self.threads}
        made_of["teachers_sha256"] = {name: weights_digest(folder) for name, folder in folders.items()}
        path = self.record(seed, LABELS)
        with self._alone(seed, LABELS) as folder:
            if path.exists() and made_of.items() <= json.loads(path.read_text()).items():
                return
            found = folder.with_suffix(".json")
            command = [RESEARCH / "teacher_labels.py", *self.data(seed), "--seed", seed, *made_of["arguments"]]
            teachers = [f"{name}={teacher}" for name, teacher in folders.items()]
            run(*command, "--teachers", *teachers, "--json", found, threads=self.threads)
            write_record(path, json.loads(found.read_text()) | made_of)

    @contextlib.contextmanager
    def _alone(self, seed: int, name: str) -> Iterator[Path]:
        """The folder of a run, locked against other drivers."""
        folder = self.folder(seed, name)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            yield folder

    def _trained(self, seed: int, name: str) -> dict:
        """Results of a run; trains it unless the folder already has this run."""
        arm, folder = self.arm(name), self.folder(seed, name)
        made_of = self.made_with(name)
        command = [
            ROOT / arm.script,
            *self.data(seed, name),
            "--seed",
            seed,
            "--output_dir",
            folder,
            *self.setting.running,
        ]
        command += made_of["arguments"]
        if arm.teacher is not None:
            command += ["--teacher", self.folder(seed, arm.teacher)]
            made_of["teacher_sha256"] = weights_digest(self.folder(seed, arm.teacher))
        if arm.pretrained:
            trunk = self._pretrained(seed)
            command += ["--init_from", trunk]
            made_of["trunk_sha256"] = weights_digest(trunk)
        kept = folder / "trained.json"
        if kept.exists():
            results = json.loads(kept.read_text())
            is_of_it = results.get("weights_sha256") == weights_digest(folder)
            if is_of_it and made_of.items() <= results.items():
                return results
        begun = folder.with_name(f"{folder.name}.begun.json")
        is_of_another = folder.exists() and not (begun.exists() and json.loads(begun.read_text()) == made_of)
        if is_of_another and self.setting.resumes:  # which would resume from its checkpoints
            raise ValueError(f"{folder} has a run with other arguments or teacher; move it away to start again.")
        write_record(begun, made_of)
        run(*command, threads=self.threads)
        results = read_record(folder) | made_of
        write_record(kept, results)
        return results

    def _pretrained(self, seed: int) -> Path:
        """Folder of a seed's pre-trained trunk; pre-trains it, or continues, if it is not finished."""
        with self._alone(seed, "pretrained") as folder:
            where = ["--seed", seed, "--output_dir", folder, "--resume_from_checkpoint", "auto"]
            run("-m", "deitlt_hf.cli", "pretrain", *self.data(seed), *where, threads=self.threads)
        return folder

    def _look(self, seed: int, folder: Path, *command) -> dict:
        """Runs a program on a trained model and returns its output."""
        found = folder / "found.json"
        run(*command, *self.data(seed), "--model", folder, "--json", found, threads=self.threads)
        return json.loads(found.read_text())


def hold_out(data_dir: str, test: int = 10_000) -> Path:
    """Makes a data set of the training images only, with some of them as test images.

    Args:
        data_dir: Folder of IDX files, gzipped or not.
        test: Number of images to hold out.

    Returns:
        The folder of the new data set.
    """
    source = hashlib.sha256(str(Path(data_dir).resolve()).encode()).hexdigest()[:8]
    folder = ROOT / "outputs" / "claims" / f"held_out_images_{source}"
    if folder.exists():
        return folder
    unfinished = folder.with_suffix(".part")
    unfinished.mkdir(parents=True, exist_ok=True)
    for kind, header in (("images-idx3-ubyte", 16), ("labels-idx1-ubyte", 8)):
        path = Path(data_dir) / f"train-{kind}"
        content = path.read_bytes() if path.exists() else gzip.decompress(Path(f"{path}.gz").read_bytes())
        rows = np.frombuffer(content, np.uint8, offset=header)
        rows = rows.reshape(int.from_bytes(content[4:8], "big"), -1)
        rows = rows[np.random.default_rng(0).permutation(len(rows))]
        for stem, part in (("train", rows[test:]), ("t10k", rows[:test])):
            start = content[:4] + len(part).to_bytes(4, "big") + content[8:header]
            (unfinished / f"{stem}-{kind}").write_bytes(start + part.tobytes())
    return unfinished.rename(folder)

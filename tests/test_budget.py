"""Tests of the estimates of `deitlt plan` against the operations and memory that torch counts."""

import re
from types import SimpleNamespace

import pytest
import torch

from deitlt_hf import DeiTLTForImageClassification, FlatTeacherConfig, FlatTeacherForImageClassification, Recipe
from deitlt_hf.analysis.budget import GPUS, PlanArguments, budget, reduce_seconds, training_images
from deitlt_hf.analysis.model_cost import Model, activation_bytes, counted_flops, student_model
from deitlt_hf.cli.plan import main as print_plan
from deitlt_hf.recipes import DataArguments, StudentArguments
from deitlt_hf.training import DeiTLTTrainingArguments
from deitlt_hf.training.trial import START_SECONDS, StepTimes, evaluations
from helpers import TINY, make_student


def test_published_figures_of_known_models():
    """ViT-B/16 at 224 pixels: 17.6 billion multiply-adds, 86 million parameters; ResNet-50: 4.1 billion multiply-adds.

    The last block computes 2 of 198 tokens. Of its 1.47 billion, only the 0.23 for keys and values remain.
    """
    model = student_model(StudentArguments(), 1000, None, DeiTLTTrainingArguments("nowhere", num_train_epochs=1))
    assert model.flops / 2 == pytest.approx(17.6e9 - 1.47e9 + 0.23e9, rel=0.01)
    assert model.parameters == pytest.approx(87.3e6, rel=0.001)
    assert model.training_flops == pytest.approx(3 * 0.95 * model.flops, rel=0.01)
    with torch.device("meta"):
        teacher = FlatTeacherForImageClassification(FlatTeacherConfig(backbone="timm/resnet50", image_size=224))
    assert counted_flops(teacher, 224) / 2 == pytest.approx(4.1e9, rel=0.02)


def test_dropped_paths_are_not_counted():
    """Dropped paths are not counted, by torch's counter and the layers' drop rates.

    The last block costs less, and computing only its class tokens saves less.
    """
    students = [StudentArguments(image_size=32, num_hidden_layers=depth, drop_path_rate=0.3) for depth in (1, 2, 3)]
    with torch.device("meta"):
        models = [DeiTLTForImageClassification(student.config(num_labels=10)) for student in students]
    one, two, three = (counted_flops(model, 32) for model in models)
    around_blocks = 2 * (4 * 3 * 16**2 + 2 * 10) * models[0].config.hidden_size
    _, middle, last = (layer.drop_path.drop_prob for layer in models[-1].deit.layers)
    expected = three - middle * (two - one) - last * (one - around_blocks)
    planned = student_model(students[-1], 10, None, DeiTLTTrainingArguments("nowhere", num_train_epochs=1))
    assert planned.training_flops == pytest.approx(3 * expected, rel=1e-9)


def test_activations_are_the_tensors_of_the_backward_pass():
    """Activations are the tensors that the backward pass needs; for one known layer, its input."""

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3 * 64, 1000)

        def forward(self, pixel_values):
            return self.layer(pixel_values.flatten(1) * 2).tanh()

    assert activation_bytes(Layer(), 8, half=False) == 4 * (3 * 64 + 1000)
    student = make_student(image_size=32, hidden_size=96, intermediate_size=384, drop_path_rate=0.0)
    full, half = (activation_bytes(student, 32, half) for half in (False, True))
    student.gradient_checkpointing_enable()
    assert activation_bytes(student, 32, half=False) < full / 5
    assert full / 2 < half < full


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"dataset": "inat18"}, (8142, 437_513)),
        ({"dataset": "uoft-cs/cifar10", "imbalance_ratio": 100}, (10, 12_406)),
        ({"dataset": "uoft-cs/cifar100", "imbalance_ratio": 100}, (100, 10_847)),
        ({"dataset": "digits", "imbalance_ratio": 20}, (10, 402)),
    ],
)
def test_image_counts_of_the_benchmarks(values, expected):
    assert training_images(DataArguments(**values)) == expected


def plan(gpus, model=None, images=115_846, **values):
    model = model or Model(
        parameters=10**8,
        flops=10**10,
        training_flops=10**11,
        state_bytes=16 * 10**8,
        activation_bytes=10**8,
        trained=10**8,
    )
    defaults = {"num_train_epochs": 10, "global_batch_size": 2048, "per_device_train_batch_size": 128, "max_steps": -1}
    method = {"repeats": 1, "gradients_per_step": 1, "mixes": False, "partial_steps": False}
    return budget(model, GPUS["a100"], gpus, images, 0.5, SimpleNamespace(**{**defaults, **method, **values}))


def test_more_gpus_shorten_a_run_until_communication_limits_it():
    numbers = (1, 4, 16, 128, 1024)
    plans = [plan(gpus) for gpus in numbers]
    assert len({found.steps for found in plans}) == 1
    assert len({found.images_per_epoch for found in plans}) == 1
    shares = zip(plans, numbers, strict=True)
    assert [found.batch_size * found.accumulation * gpus for found, gpus in shares] == [2048] * 5
    assert [found.batch_size for found in plans] == [128, 128, 128, 16, 2]
    assert plans[0].step_seconds == pytest.approx(2048 * 1e11 / (312e12 * 0.5))
    assert plans[1].hours == pytest.approx(plans[0].hours / 4)
    assert plans[0].exposed_seconds == 0
    shares = [found.exposed_seconds / found.step_seconds for found in plans]
    assert shares == sorted(shares)
    assert shares[-1] > 0.5
    # A ring all-reduce sends twice the gradient, whatever the number of GPUs: the time has a lower bound.
    assert plans[-1].step_seconds > 2 * 4 * 10**8 * 0.99 / GPUS["a100"].network


def test_memory_estimate_says_whether_the_run_fits():
    assert plan(4).memory == pytest.approx(16e8 + 128 * 1e8 + 2**30)
    assert plan(4).fits
    assert not plan(1, per_device_train_batch_size=1024).fits
    assert reduce_seconds(10**9, 1, GPUS["h100"]) == 0


def test_repeats_and_steps_match_the_sampler():
    from deitlt_hf.data.sampling import TrainBatches

    found = plan(4, images=12_406, repeats=3, global_batch_size=1024, num_train_epochs=1)
    batches = TrainBatches(12_406, 128, 0, 4, 2, num_repeats=3)
    assert found.images_per_epoch == len(batches) * 128 * 4
    assert found.steps == len(batches) // 2 == 12


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gpu": "tpu"}, "gpu must be one of h100, .*, got 'tpu'"),
        ({"utilisation": 0.0}, r"utilisation must be in \(0, 1\], got 0.0"),
        ({"gpus": [0]}, "gpus must be 1 or more, got 0"),
    ],
)
def test_invalid_plans_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        PlanArguments(**values)
    with pytest.raises(ValueError, match=r"2048 is not a multiple of 3 process\(es\)"):
        plan(3)


def test_plan_refuses_what_a_run_refuses():
    with pytest.raises(ValueError, match="mixing needs an even batch on each GPU, but 2048 GPUs have 1 image"):
        plan(2048, mixes=True)
    with pytest.raises(ValueError, match="96 is not a multiple of"):
        plan(2, global_batch_size=96, per_device_train_batch_size=32)
    assert plan(4, max_steps=7).steps == 7
    assert training_images(DataArguments("uoft-cs/cifar10", imbalance_ratio=10, max_per_class=100))[1] == 403


def test_plan_uses_the_size_of_the_starting_student(tmp_path, capsys):
    make_student(hidden_size=32, num_hidden_layers=2).save_pretrained(tmp_path)
    print_plan(["--recipe", "cifar10_lt_rho100", "--init_from", str(tmp_path)])
    output = capsys.readouterr().out
    assert "student, 8 px" in output
    assert "0.0 M parameters; 0.0" in output
    assert "paper reports" not in output  # of another student


def test_a_recipe_is_planned_without_its_data(capsys):
    print_plan(["--recipe", "cifar100_lt_rho100", "--gpus", "2", "3"])
    output = capsys.readouterr().out
    assert "10,847 training images of 100 classes" in output
    assert "128 x 4" in output
    assert "batch not divisible" in output
    assert "The paper reports 55.6 (72.8, 55.4, 31.4) % overall" in output
    assert "12,000" in output  # updates: 10 in each of 1,200 epochs


@pytest.mark.parametrize(
    ("rho", "starts", "gradients"),
    [
        ([0.0], [0], 1),
        ([0.1], [0], 2),
        ([0.0, 0.1], [0, 8], 1.2),
        ([0.1, 0.2, 0.5], [0, 5, 60], 2),
        ([0, 0.1], [0, 60], 1),
    ],
)
def test_gradients_of_a_step_are_counted_by_phase(rho, starts, gradients):
    args = DeiTLTTrainingArguments(
        use_cpu=True, num_train_epochs=10, sam_rho=rho, sam_rho_epochs=starts, max_steps=20 if starts[-1] > 10 else -1
    )
    assert args.gradients_per_step == pytest.approx(gradients)


def test_smaller_images_in_the_first_phase_cost_less():
    model = StudentArguments(image_size=32, patch_size=4, hidden_size=96, num_hidden_layers=3, num_attention_heads=3)

    def operations(**values):
        args = DeiTLTTrainingArguments(use_cpu=True, num_train_epochs=10, distillation="none", **values)
        return student_model(model, 10, None, args).training_flops

    full = operations()
    assert operations(train_sizes=[32]) == full
    small = operations(train_sizes=[16, 32], train_size_epochs=[0, 9.999])
    assert 0.2 * full < small < 0.27 * full  # a quarter of the patches
    assert operations(train_sizes=[16, 32], train_size_epochs=[0, 5]) == pytest.approx((full + small) / 2, rel=1e-3)


def test_time_on_this_machine_is_measured(capsys):
    measured = ["--recipe", "digits_lt_fast", "--measure", "true", "--use_cpu", "true"]
    print_plan(measured)
    printed = " ".join(capsys.readouterr().out.split())
    found = re.search(r"teacher (\d+) (s|min), student (\d+) (s|min), together", printed)
    assert found is not None, printed
    assert "402 training and 600 test images" in printed
    assert re.search(r"In bfloat16 .* \d+\.\d\d of its time: (add --bf16 true|float32 is the better)", printed)
    others = "--distillation none --bf16 true --train_sizes 8 16 --train_size_epochs 0 9"
    print_plan([*measured, *others.split()])
    printed = capsys.readouterr().out
    assert "teacher" not in printed
    assert "bfloat16" not in printed  # already used


def test_steps_are_counted_in_batches_of_the_measured_size(tmp_path):
    """The trial measures both models with the student's batch, also if the teacher's is larger."""
    recipe, options = Recipe.load(TINY), {"output_dir": str(tmp_path), "use_cpu": True}
    teacher, student = recipe.teacher(**options), recipe.student(**options, per_device_train_batch_size=8)
    seconds = StepTimes(2, 3, 0, 0, 0, 0).seconds(teacher, student, num_images=80, test_images=0, epochs=(1, 1))
    assert seconds == (START_SECONDS + 10 * 2, START_SECONDS + 10 * 3)


@pytest.mark.parametrize(
    ("values", "number"),
    [
        ({"eval_strategy": "no"}, 1),
        ({"eval_strategy": "epoch"}, 7),
        ({"eval_strategy": "steps", "eval_steps": 0.2}, 5),
    ],
)
def test_evaluations_of_a_run_are_counted(values, number):
    assert evaluations(DeiTLTTrainingArguments(use_cpu=True, num_train_epochs=7, **values)) == number

"""Tests of the trainers, with models that train in seconds."""

import copy
import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
from datasets import ClassLabel
from safetensors.torch import load_file
from timm.optim import muon as timm_muon
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, ViTConfig, ViTForImageClassification

from deitlt_hf import (
    DeiTLTForImageClassification,
    DeiTLTTrainer,
    FlatTeacherConfig,
    FlatTeacherForImageClassification,
)
from deitlt_hf.data import class_counts, shot_groups
from deitlt_hf.data.transforms import resize
from deitlt_hf.hub.card_facts import optimizer_name
from deitlt_hf.losses import effective_number_weights
from deitlt_hf.training import SAM
from deitlt_hf.training.optimizers import Muon
from deitlt_hf.training.plan_lines import plan_lines
from helpers import StopAt, fixed_batch, gradients, make_student, student_arguments, student_trainer, teacher_trainer

# ---- Distillation ----


def test_every_student_parameter_learns_and_the_teacher_does_not_change(tmp_path, digits, teacher):
    """Every student parameter learns, and the teacher does not change.

    A frozen DIST head, or a teacher whose batch statistics drift, costs accuracy without any error.
    """
    trainer = student_trainer(tmp_path, digits, teacher, drw_start_epoch=1, save_strategy="epoch")
    before = copy.deepcopy(trainer.model.state_dict())
    teacher_before = copy.deepcopy(teacher.state_dict())
    trainer.train()
    trainer.save_model()
    for name, tensor in trainer.model.state_dict().items():
        assert not torch.equal(tensor, before[name]), name
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, teacher_before[name]), name
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    for folder in (tmp_path, *tmp_path.glob("checkpoint-*")):
        assert not any("backbone" in name for name in load_file(folder / "model.safetensors"))
    loaded = DeiTLTForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.class_counts == class_counts(digits["train"]["label"]).tolist()
    assert loaded.config.class_groups == trainer.groups
    assert loaded.config.id2label == {label: str(label) for label in range(10)}


def test_logs_contain_the_parts_of_the_loss(tmp_path, digits, teacher):
    trainer = student_trainer(tmp_path, digits, teacher, gradient_accumulation_steps=3)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == trainer.state.max_steps
    for entry in logs:
        assert entry["cls_loss"] + entry["distillation_loss"] == pytest.approx(entry["loss"], rel=1e-5)
        assert 0 <= entry["teacher_agreement"] <= 1
        assert -1 <= entry["token_similarity"] <= 1


def test_mixed_precision_and_gradient_checkpointing_train(tmp_path, digits, teacher):
    trainer = student_trainer(
        tmp_path, digits, teacher, num_train_epochs=1, bf16=True, use_cpu=True, gradient_checkpointing=True
    )
    trainer.train()
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


@pytest.mark.parametrize("distillation", ["hard", "soft", "soft_sum", "none"])
def test_gradient_does_not_depend_on_accumulation(tmp_path, digits, teacher, distillation):
    """The gradient does not depend on accumulation.

    With class weights, the mean of the micro-batches' weighted means is another loss.
    """
    batch = fixed_batch(digits)
    model = make_student(drop_path_rate=0.0)
    trainer = student_trainer(
        tmp_path, digits, teacher, model, drw_start_epoch=0, distillation=distillation, reweight_cls=True
    )
    (loss, whole), (split_loss, split) = (gradients(trainer, batch, micro_batches) for micro_batches in (1, 4))
    torch.testing.assert_close(loss, split_loss)
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, atol=1e-6, rtol=1e-4)

    weights = effective_number_weights(trainer.class_counts)
    outputs = model(batch["pixel_values"])
    targets = batch["labels"] if distillation == "none" else trainer.teacher_logits(batch["pixel_values"]).argmax(1)
    expected = F.cross_entropy(outputs.cls_logits, batch["labels"], weights)
    if not distillation.startswith("soft"):
        expected = (expected + F.cross_entropy(outputs.distillation_logits, targets, weights)) / 2
        torch.testing.assert_close(loss, expected.detach())


@pytest.mark.parametrize("kind", ["student", "teacher"])
@pytest.mark.parametrize("epoch", [0, 1])
def test_class_weights_hold_in_both_phases(tmp_path, digits, kind, epoch):
    """Class weights of a user weigh both heads of a student, and multiply the weights of DRW from its start on."""
    batch, make = fixed_batch(digits), student_trainer if kind == "student" else teacher_trainer
    given = {"class_weights": {"3": 5}, "drw_start_epoch": 1, "num_train_epochs": 2}
    if kind == "student":
        given |= {
            "distillation": "none",
            "mixup": 0,
            "cutmix": 0,
            "label_smoothing_factor": 0,
            "model": make_student(drop_path_rate=0.0),
        }
    trainer = make(tmp_path, digits, **given)
    trainer.state.epoch = epoch
    loss, _ = gradients(trainer, dict(batch), 1)
    costs = torch.ones(10).index_fill(0, torch.tensor(3), 5.0)
    reweighted = costs * effective_number_weights(trainer.class_counts)
    outputs = trainer.model(batch["pixel_values"])
    if kind == "teacher":
        expected = F.cross_entropy(outputs.logits, batch["labels"], reweighted if epoch else costs)
    else:
        expected = F.cross_entropy(outputs.cls_logits, batch["labels"], costs) / 2
        expected += F.cross_entropy(outputs.distillation_logits, batch["labels"], reweighted if epoch else costs) / 2
    torch.testing.assert_close(loss, expected.detach())
    assert trainer.drw_weights.mean().item() == pytest.approx(1)
    assert plan_lines(trainer)["class weights"].startswith("3 5, other classes 1")
    with pytest.raises(ValueError, match=r"names the class '11', .* the most similar one is '1'"):
        make(tmp_path, digits, **given | {"class_weights": {"11": 2}})


def test_phases_of_reweighting_and_mixing(tmp_path, digits, teacher):
    trainer = student_trainer(tmp_path, digits, teacher, drw_start_epoch=1)
    assert trainer.state.epoch is None or trainer.state.epoch == 0
    assert trainer.active_criterion is trainer.criterion
    assert trainer.criterion.class_weights is None
    mixed = trainer.prepare_batch(copy.deepcopy(fixed_batch(digits)))
    assert mixed["labels"].shape == (64, 10)
    assert not torch.equal(mixed["pixel_values"], fixed_batch(digits)["pixel_values"])

    trainer.state.epoch = 0.99
    assert not trainer.in_drw
    trainer.state.epoch = 1.0
    assert trainer.active_criterion is trainer.drw_criterion
    torch.testing.assert_close(
        trainer.drw_criterion.class_weights, effective_number_weights(trainer.class_counts, 0.9999)
    )
    plain = trainer.prepare_batch(copy.deepcopy(fixed_batch(digits)))
    assert torch.equal(plain["labels"], fixed_batch(digits)["labels"])
    assert torch.equal(plain["pixel_values"], fixed_batch(digits)["pixel_values"])
    trainer.args.mixing_in_drw = True
    assert trainer.prepare_batch(fixed_batch(digits))["labels"].shape == (64, 10)


def test_smoothing_without_mixing(tmp_path, digits, teacher):
    trainer = student_trainer(tmp_path, digits, teacher, mixup=0.0, cutmix=0.0)
    labels = trainer.prepare_batch(fixed_batch(digits))["labels"]
    assert labels.max().item() == pytest.approx(0.9 + 0.01)
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(64))


class SeenImages(nn.Module):
    """Wraps a teacher and keeps the images that it receives."""

    def __init__(self, teacher):
        super().__init__()
        self.teacher, self.config, self.images = teacher, teacher.config, []

    def forward(self, images):
        self.images.append(images.clone())
        return self.teacher(images)


def test_teacher_receives_the_students_mixed_image(tmp_path, digits, teacher):
    """The teacher receives the student's own mixed image, the out-of-distribution part of the method.

    The clean image is the ablation, and 2 points worse.
    """
    trainer = student_trainer(tmp_path, digits, teacher)
    trainer.teacher = SeenImages(teacher)
    batch = trainer.prepare_batch(fixed_batch(digits))
    assert torch.equal(trainer.teacher.images[0], batch["pixel_values"])


def test_teacher_receives_a_weak_view_in_the_ablation(tmp_path, digits, teacher):
    trainer = student_trainer(tmp_path, digits, teacher, teacher_view="weak")
    batch = next(iter(trainer.get_train_dataloader()))
    weak = trainer.views["teacher_pixel_values"].finish(batch["teacher_pixel_values"].clone())
    trainer.teacher = SeenImages(teacher)
    trainer.training_batch(batch)
    assert torch.equal(trainer.teacher.images[0], weak)
    assert "teacher_pixel_values" not in student_trainer(tmp_path, digits, teacher).train_dataset[0]


def test_teacher_receives_images_in_its_size_and_normalisation(tmp_path, digits, teacher):
    trainer = student_trainer(tmp_path, digits, teacher, model=make_student(image_size=16))
    trainer.teacher = SeenImages(teacher)
    pixel_values = fixed_batch(digits, image_size=16)["pixel_values"]
    trainer.teacher_logits(pixel_values)
    assert trainer.teacher.images[0].shape == (64, 3, 8, 8)
    teacher.config.image_mean, teacher.config.image_std = [0.5] * 3, [0.5] * 3
    trainer.formats = student_trainer(tmp_path, digits, teacher).formats
    trainer.teacher_logits(pixel_values)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    expected = (trainer.teacher.images[0] * std + mean - 0.5) / 0.5
    torch.testing.assert_close(trainer.teacher.images[1], expected)


def test_resizing_to_the_same_size_changes_nothing():
    images = torch.rand(2, 3, 8, 8)
    assert resize(images, (8, 8)) is images
    assert resize(images, (4, 4)).shape == (2, 3, 4, 4)


def test_students_images_grow_by_phase_and_the_teachers_do_not(tmp_path, digits, teacher):
    trainer = student_trainer(tmp_path, digits, teacher, train_sizes=[4, 8], train_size_epochs=[0, 1])
    trainer.teacher = SeenImages(teacher)
    for epoch, side in ((0.0, 4), (0.99, 4), (1.0, 8)):
        trainer.state.epoch = epoch
        batch = trainer.training_batch(fixed_batch(digits))
        assert batch["pixel_values"].shape == (64, 3, side, side)
        trainer.compute_training_loss(trainer.model, batch | {"denominators": torch.full((2,), 64.0)}).backward()
        assert trainer.model.deit.embeddings.position_embeddings.grad.abs().min() > 0
        trainer.model.zero_grad()
    assert {tuple(images.shape) for images in trainer.teacher.images} == {(64, 3, 8, 8)}


@pytest.mark.parametrize("sizes", [[4, 6, 8], [4], [4, 16]])
def test_training_sizes_that_do_not_fit_the_student_are_refused(tmp_path, digits, sizes):
    given = {"train_sizes": sizes, "train_size_epochs": [0, 0.5, 1][: len(sizes)]}
    with pytest.raises(ValueError, match="multiples of the patch size 4 up to the image size 8, got"):
        student_trainer(tmp_path, digits, distillation="none", **given)


def test_a_batch_does_not_pass_through_the_image_processor(tmp_path, digits, teacher, monkeypatch):
    """A batch does not pass through the teacher's image processor, which handles single images.

    Its settings are read before the first step.
    """
    trainer = student_trainer(tmp_path, digits, teacher)
    monkeypatch.setattr(type(trainer.processing_class), "__call__", None)
    assert trainer.teacher_logits(fixed_batch(digits)["pixel_values"]).shape == (64, 10)


def test_teachers_classes_are_matched_by_name(tmp_path, digits, teacher):
    """The teacher's classes are matched by name; another order would give near-zero accuracy and no error."""
    pixel_values = fixed_batch(digits)["pixel_values"]
    expected = student_trainer(tmp_path, digits, teacher).teacher_logits(pixel_values)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        teacher.classifier.weight.copy_(teacher.classifier.weight[order].clone())
        teacher.classifier.bias.copy_(teacher.classifier.bias[order].clone())
    teacher.config.id2label = {position: str(int(label)) for position, label in enumerate(order)}
    shuffled = student_trainer(tmp_path, digits, teacher).teacher_logits(pixel_values)
    torch.testing.assert_close(shuffled, expected)


def test_unusable_teachers_are_refused(tmp_path, digits, teacher):
    with pytest.raises(ValueError, match="distillation='hard' needs a teacher"):
        student_trainer(tmp_path, digits).train()
    with pytest.raises(ValueError, match="the teacher has 5 classes without names, but the data have 10"):
        student_trainer(
            tmp_path, digits, FlatTeacherForImageClassification(FlatTeacherConfig(image_size=8, num_labels=5))
        )
    names = {label: str(label) for label in range(10)}
    untrained = FlatTeacherForImageClassification(FlatTeacherConfig(image_size=8, id2label=names))
    with pytest.raises(ValueError, match=r"no better than chance: .* on 600 test images of 10 classes"):
        student_trainer(tmp_path, digits, untrained).train()
    teacher.config.id2label = {label: f"digit {label}" for label in range(10)}
    with pytest.raises(ValueError, match=r"does not know the classes '0', '1', .* \(10 of 10\)"):
        student_trainer(tmp_path, digits, teacher)


def test_tokens_positions_norms_and_biases_have_no_weight_decay(tmp_path, digits):
    trainer = student_trainer(tmp_path, digits, distillation="none")
    decayed = trainer.get_decay_parameter_names(trainer.model)
    for name, parameter in trainer.model.named_parameters():
        matrix = (parameter.dim() > 1 and not name.startswith("deit.embeddings.")) or "projection.weight" in name
        assert (name in decayed) == matrix, name
    optimizer = trainer.create_optimizer()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]


def test_balanced_softmax_of_cls_uses_the_counts_of_the_data(tmp_path, digits, teacher):
    batch = fixed_batch(digits)
    model = make_student(drop_path_rate=0.0)
    values = {"alpha": 0.0, "drw_start_epoch": 0, "cls_loss": "logit_adjusted"}
    trainer = student_trainer(tmp_path, digits, teacher, model, **values)
    loss, _ = gradients(trainer, batch, 2)
    adjusted = model(batch["pixel_values"]).cls_logits + torch.tensor(trainer.class_counts).log()
    torch.testing.assert_close(loss, F.cross_entropy(adjusted, batch["labels"]).detach())


def test_muon_updates_the_matrices_of_the_blocks_and_adamw_the_rest(tmp_path, digits):
    model = make_student()
    values = {"optim": "muon", "learning_rate": 3e-3, "adam_beta2": 0.99, "weight_decay": 0.1}
    trainer = student_trainer(tmp_path, digits, model=model, distillation="none", **values)
    optimizer = trainer.create_optimizer()
    decayed = trainer.get_decay_parameter_names(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = []
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["momentum"]) == (3e-3, (0.9, 0.99), 0.95)
        for name in (names[id(parameter)] for parameter in group["params"]):
            assert group["use_muon"] == bool(
                re.search(r"layers\.\d+\.(attention\.\w_proj|mlp\.fc\d)\.weight$", name)
            ), name
            assert group["weight_decay"] == (0.1 if name in decayed else 0.0), name
            seen.append(name)
    assert sorted(seen) == sorted(names.values())
    assert sum(len(group["params"]) for group in optimizer.param_groups if group["use_muon"]) == 6 * len(
        model.deit.layers
    )


def test_steps_of_muon_and_adamw_have_the_expected_size(tmp_path, digits):
    """A step of Muon is orthogonal, with singular values near 0.2 * sqrt(longer side) learning rates.

    One schedule therefore serves both optimisers.
    """
    model = make_student()
    values = {"optim": "muon", "learning_rate": 1e-2, "weight_decay": 0.0}
    optimizer = student_trainer(tmp_path, digits, model=model, distillation="none", **values).create_optimizer()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    steps = {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}
    step = steps["deit.layers.0.mlp.fc1.weight"]
    sizes = torch.linalg.svdvals(step) / (1e-2 * 0.2 * max(step.shape) ** 0.5)
    assert sizes.min() > 0.7
    assert sizes.max() < 1.3
    for name in ("cls_classifier.weight", "deit.layers.0.mlp.fc1.bias", "deit.embeddings.position_embeddings"):
        torch.testing.assert_close(steps[name].abs(), torch.full_like(steps[name], 1e-2), atol=1e-5, rtol=0)


def test_muon_multiplies_in_float32_on_a_cpu_and_restores_timm(monkeypatch):
    """On a CPU, Muon multiplies in float32, and timm's functions are not changed.

    timm always uses bfloat16, in which a step of the digits' student takes seconds on some processors.
    """
    seen, original = [], timm_muon.zeropower_via_newtonschulz

    def iterate(*args, **options):
        seen.append(options.get("dtype"))
        return original(*args, **options)

    monkeypatch.setattr(timm_muon, "zeropower_via_newtonschulz", iterate)
    weight = nn.Parameter(torch.randn(4, 6))
    weight.grad = torch.randn(4, 6)
    optimizer = Muon([weight])
    optimizer.step()
    assert seen == [torch.float32]

    def fail():
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        optimizer.step(fail)
    assert timm_muon.zeropower_via_newtonschulz is iterate


def test_a_given_class_of_optimisers_overrides_muon(tmp_path, digits):
    args = student_arguments(tmp_path, distillation="none", optim="muon")
    given = (torch.optim.RMSprop, {"alpha": 0.5})
    trainer = DeiTLTTrainer(make_student(), args, train_dataset=digits["train"], optimizer_cls_and_kwargs=given)
    assert isinstance(trainer.create_optimizer(), torch.optim.RMSprop)


def test_muon_refuses_settings_that_flatten_matrices(tmp_path, digits, monkeypatch):
    make = Trainer.create_accelerator_and_postprocess

    def under_deepspeed(trainer):
        make(trainer)
        trainer.is_deepspeed_enabled = True

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", under_deepspeed)
    with pytest.raises(ValueError, match="optim 'muon' needs whole matrices, which DeepSpeed"):
        student_trainer(tmp_path, digits, distillation="none", optim="muon")


@pytest.mark.parametrize(("size", "smaller"), [(32, 16), (30, 10)])
def test_a_full_memory_says_which_batch_to_make_smaller(tmp_path, digits, monkeypatch, size, smaller):
    def is_full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    values = {"distillation": "none", "global_batch_size": size, "per_device_eval_batch_size": 77}
    trainer = student_trainer(tmp_path, digits, **values)
    monkeypatch.setattr(torch.Tensor, "backward", is_full)
    with pytest.raises(torch.OutOfMemoryError) as error:
        trainer.train()
    (advice,) = error.value.__notes__
    assert f"use --per_device_train_batch_size {smaller} in place of {size} (the global batch of {size} " in advice
    assert "checkpointing true, and resume with --resume_from_checkpoint auto" in advice
    monkeypatch.setattr(trainer.model, "forward", is_full)
    with pytest.raises(torch.OutOfMemoryError) as error:
        trainer.evaluate()
    assert error.value.__notes__ == ["use a --per_device_eval_batch_size below 77"]


# ---- Evaluation and results ----


def test_evaluation_counts_each_expert_on_each_image_once(tmp_path, digits):
    model = make_student().eval()
    trainer = student_trainer(tmp_path, digits, model=model, distillation="none", per_device_eval_batch_size=77)
    metrics = trainer.evaluate()
    images = [image.convert("RGB") for image in digits["test"]["image"]]
    labels = np.asarray(digits["test"]["label"])
    with torch.no_grad():
        outputs = model(trainer.processing_class(images, return_tensors="pt").pixel_values)
    groups = {"head": [0, 1, 2], "mid": [3, 4, 5], "tail": [6, 7, 8, 9]}
    for expert, field in (("mean", "logits"), ("cls", "cls_logits"), ("distillation", "distillation_logits")):
        right = outputs[field].argmax(dim=1).numpy() == labels
        assert metrics[f"eval_{expert}_overall"] == pytest.approx(right.mean())
        for name in groups:
            expected = np.mean([right[labels == label].mean() for label in groups[name]])
            assert metrics[f"eval_{expert}_{name}"] == pytest.approx(expected)
    assert metrics["eval_accuracy"] == metrics["eval_mean_overall"]
    predicted = trainer.predict(digits["test"])
    np.testing.assert_allclose(predicted.predictions, outputs.logits.numpy(), atol=1e-5)
    expected = torch.nn.functional.cross_entropy(outputs.logits, torch.from_numpy(labels))
    assert metrics["eval_loss"] == pytest.approx(expected.item(), abs=1e-5)


def test_evaluation_loss_of_cosines_uses_the_training_scale(tmp_path, digits):
    config = FlatTeacherConfig(backbone="resnet20", classifier="cosine", image_size=8, num_labels=10)
    trainer = teacher_trainer(tmp_path, digits, FlatTeacherForImageClassification(config), teacher_loss="ldam")
    images = [image.convert("RGB") for image in digits["test"]["image"]]
    with torch.no_grad():
        features = trainer.model.eval().backbone(trainer.processing_class(images, return_tensors="pt").pixel_values)
        cosines = trainer.model.classifier(features)
    assert cosines.abs().max() <= 1
    expected = F.cross_entropy(trainer.args.ldam_scale * cosines, torch.tensor(digits["test"]["label"][:]))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_a_teacher_is_evaluated_in_half_precision(tmp_path, digits, teacher):
    trainer = teacher_trainer(tmp_path, digits, copy.deepcopy(teacher))
    expected = trainer.evaluate()["eval_accuracy"]
    half = teacher_trainer(tmp_path, digits, copy.deepcopy(teacher), use_cpu=True, bf16_full_eval=True)
    assert half.evaluate()["eval_accuracy"] == pytest.approx(expected, abs=0.02)


def test_settings_of_transformers_that_change_the_result_are_recorded(tmp_path, digits):
    values = {"data_seed": 5, "label_smoothing_factor": 0.2, "adam_beta2": 0.99}
    args = student_arguments(tmp_path, **values)
    assert values.items() <= args.method_settings().items()
    assert args.method_settings().keys() <= {field.name for field in dataclasses.fields(args)}  # no constants


def test_mixed_precision_of_the_launcher_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    settings = student_arguments(tmp_path).method_settings()
    assert (settings["bf16"], settings["fp16"]) == (True, False)


@pytest.mark.parametrize("method", ["evaluate", "predict"])
def test_other_evaluation_data_must_have_the_models_classes(tmp_path, digits, method):
    names = [str(label) for label in range(10)]
    reversed_names = digits["test"].cast_column("label", ClassLabel(names=names[::-1]))
    for trainer in (student_trainer(tmp_path, digits), teacher_trainer(tmp_path, digits)):
        with pytest.raises(ValueError, match="the model's label 0 is '0' but the data's is '9'"):
            getattr(trainer, method)(reversed_names)
        assert getattr(trainer, method)(digits["test"])


def test_no_step_counts_labels(tmp_path, digits):
    """Training steps do not count labels.

    transformers counts them for models that accept any keyword, which waits for the device and the other processes.
    """
    vit = ViTForImageClassification(
        ViTConfig(image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_labels=10)
    )
    student = student_trainer(tmp_path, digits, distillation="none")
    for trainer in (student, teacher_trainer(tmp_path, digits, vit, sam_rho=[0.0])):
        trainer._get_num_items_in_batch = None  # a call would raise an error
        batches, counted = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
        assert (len(batches), counted) == (1, None)


def test_the_plan_names_the_teacher_also_before_it_was_checked(tmp_path, digits, teacher):
    plan = student_trainer(tmp_path, digits, teacher).plan()
    assert plan["teacher"] == "FlatTeacherForImageClassification, 8 px, sees the student view"


def test_the_plan_reports_a_phase_that_is_not_reached(tmp_path, digits):
    values = {"distillation": "none", "drw_start_epoch": 1}  # an epoch has 7 steps
    assert (
        "(max_steps ends the run before it)"
        in student_trainer(tmp_path, digits, max_steps=7, **values).plan()["phases"]
    )
    assert "max_steps" not in student_trainer(tmp_path, digits, max_steps=8, **values).plan()["phases"]
    assert "max_steps" not in student_trainer(tmp_path, digits, **values).plan()["phases"]


def test_results_name_the_last_and_the_best_epoch(tmp_path, digits, teacher, capsys):
    groups = shot_groups(class_counts(digits["train"]["label"][:]), rule="shots")  # no class has more than 100 images
    trainer = student_trainer(tmp_path, digits, teacher, num_train_epochs=3, eval_strategy="epoch", groups=groups)
    trainer.train()
    results = json.loads((tmp_path / "results.json").read_text())
    history = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert [entry["epoch"] for entry in history] == [1, 2, 3]
    assert results["last"]["epoch"] == 3
    assert results["last"]["accuracies"]["mean"]["overall"] == history[-1]["eval_accuracy"]
    assert results["best"]["accuracies"]["mean"]["overall"] == max(entry["eval_accuracy"] for entry in history)
    assert results["last"]["accuracies"]["cls"]["head"] is None
    assert results["finished"] is True
    assert results["data"]["train_images"] == len(digits["train"])
    assert len(results["data"]["subset_sha256"]) == 64
    output = capsys.readouterr().out
    assert output.count("test images ") == 1 + 3
    for text in (
        "This will run",
        results["data"]["subset_sha256"][:40],
        "1 process(es) x 32 x 1",
        "test accuracy in %",
    ):
        assert text in output


def test_training_ends_with_an_evaluation(tmp_path, digits):
    trainer = student_trainer(tmp_path, digits, distillation="none", num_train_epochs=1)
    trainer.train()
    assert json.loads((tmp_path / "results.json").read_text())["last"]["epoch"] == 1


def test_learning_rate_follows_the_schedule_by_epoch(tmp_path, digits):
    trainer = student_trainer(
        tmp_path, digits, distillation="none", num_train_epochs=4, warmup_epochs=2, min_learning_rate=1e-4
    )
    trainer.train()
    rates = {round(e["epoch"], 3): e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e}
    steps_per_epoch = len(trainer.get_train_dataloader())
    assert len(rates) == 4 * steps_per_epoch
    # The rate logged at the end of a step is the rate that the step used, which is the rate at its start.
    assert rates[round(1 / steps_per_epoch, 3)] == pytest.approx(1e-6)
    assert rates[round(1 + 1 / steps_per_epoch, 3)] == pytest.approx((1e-6 + 1e-3) / 2)
    assert rates[round(2 + 1 / steps_per_epoch, 3)] == pytest.approx(1e-4 + 9e-4 * (1 + math.cos(math.pi / 2)) / 2)


# ---- Output folder, interruption, bad numbers ----


def test_another_run_is_not_overwritten(tmp_path, digits):
    student_trainer(tmp_path, digits, distillation="none", num_train_epochs=1, save_strategy="epoch").train()
    checkpoint = next(tmp_path.glob("checkpoint-*"))
    before = (checkpoint / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"holds another run \(checkpoint-7, results.json\); choose another"):
        student_trainer(tmp_path, digits, distillation="none", num_train_epochs=1).train()
    assert (checkpoint / "model.safetensors").read_bytes() == before
    (tmp_path / "notes.txt").write_text("mine")
    student_trainer(tmp_path, digits, distillation="none", num_train_epochs=1, overwrite=True).train()
    assert not checkpoint.exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_checkpoint_of_another_run_does_not_allow_overwriting(tmp_path, digits):
    values = {"distillation": "none", "num_train_epochs": 1, "save_strategy": "epoch"}
    for run in ("first", "second"):
        student_trainer(tmp_path / run, digits, **values).train()
    checkpoint = str(tmp_path / "first" / "checkpoint-7")
    record = (tmp_path / "second" / "results.json").read_bytes()
    with pytest.raises(FileExistsError, match="second holds another run"):
        student_trainer(tmp_path / "second", digits, **values).train(resume_from_checkpoint=checkpoint)
    assert (tmp_path / "second" / "results.json").read_bytes() == record
    longer = values | {"num_train_epochs": 2}
    student_trainer(tmp_path / "third", digits, **longer).train(resume_from_checkpoint=checkpoint)
    assert json.loads((tmp_path / "third" / "results.json").read_text())["resumed"]


def test_an_interrupted_run_resumes(tmp_path, digits, teacher):
    values = {"num_train_epochs": 4, "save_strategy": "epoch", "eval_strategy": "epoch", "drw_start_epoch": 3}
    with pytest.raises(KeyboardInterrupt):
        student_trainer(tmp_path, digits, teacher, callbacks=[StopAt(17)], **values).train()
    interrupted = json.loads((tmp_path / "results.json").read_text())
    assert interrupted["finished"] is False
    assert interrupted["last"]["epoch"] == 2
    trainer = student_trainer(tmp_path, digits, teacher, model=make_student(seed=1), **values)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == trainer.state.max_steps == 28
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["finished"] is True
    accuracies = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert len(accuracies) == 4
    assert results["best"]["accuracies"]["mean"]["overall"] == max(accuracies)


class Poison(TrainerCallback):
    """Makes a weight infinite after some steps, as a too high learning rate does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            model.cls_classifier.weight.data[0, 0] = math.inf


def test_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, digits):
    trainer = student_trainer(
        tmp_path, digits, distillation="none", save_strategy="steps", save_steps=5, callbacks=[Poison(8)]
    )
    with pytest.raises(FloatingPointError, match=r"not finite at step 8 \(epoch 1\.14, learning rate .*Lower the"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]
    for tensor in load_file(tmp_path / "checkpoint-5" / "model.safetensors").values():
        assert torch.isfinite(tensor).all()


# ---- Arguments ----


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"per_device_train_batch_size": 33}, "must be even, got 33"),
        ({"global_batch_size": 48}, r"48 is not a multiple of .* per_device_train_batch_size 32"),
        ({"global_batch_size": 0}, "global_batch_size must be 1 or more, got 0"),
        ({"train_crop": "middle"}, "train_crop must be one of random_resized, padded, got 'middle'"),
        ({"teacher_view": "clean"}, "teacher_view must be one of student, weak, got 'clean'"),
        ({"distillation": "both"}, "distillation must be one of hard, soft, soft_sum, none, got 'both'"),
        ({"optim": "muone"}, "optim must be one of muon, adamw_torch, .*, got 'muone'"),
        ({"alpha": -0.1}, r"alpha must be in \[0, 1\], got -0.1"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"class_weights": "ant"}, "class_weights must be NAME=WEIGHT"),
        ({"auto_augment": "randaugment"}, "timm does not know the augmentation policy 'randaugment'"),
        ({"hflip": 2.0}, r"hflip must be in \[0, 1\], got 2.0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"drw_start_epoch": -1}, "drw_start_epoch must be 0 or more, got -1"),
        ({"drw_beta": 1.0}, r"drw_beta must be in \[0, 1\), got 1.0"),
        ({"repeated_augmentation": 0}, "repeated_augmentation must be 1 or more, got 0"),
        ({"mixup_switch": 3}, r"mixup_switch must be in \[0, 1\], got 3"),
        ({"mixup_probability": -1}, r"mixup_probability must be in \[0, 1\], got -1"),
        ({"train_sizes": [8, 4], "train_size_epochs": [0, 1]}, r"train_sizes must be positive and increasing, got \[8"),
        ({"train_sizes": [4, 8]}, r"train_sizes \[4, 8\] and train_size_epochs \[0.0\] must have as many values"),
        ({"train_sizes": [4, 8], "train_size_epochs": [1, 2]}, "train_size_epochs must be increasing from 0"),
        ({"cutmix": -1}, "cutmix must be 0 or more, got -1"),
        ({"min_learning_rate": -1}, "min_learning_rate must be 0 or more, got -1"),
        ({"learning_rate": None, "learning_rate_per_512": 0}, "learning_rate_per_512 must be above 0, got 0"),
        (
            {"learning_rate": None, "learning_rate_micro_batches": -4},
            "learning_rate_micro_batches must be 1 or more, got -4",
        ),
    ],
)
def test_invalid_arguments_are_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        student_arguments(tmp_path, **values)


def test_trainer_refuses_unusable_input(tmp_path, digits):
    with pytest.raises(ValueError, match="fewer than one batch of 512"):
        student_trainer(tmp_path, digits, distillation="none", per_device_train_batch_size=512).train()
    with pytest.raises(ValueError, match="the training set has only 240; pass --repeated_augmentation 1"):
        student_trainer(tmp_path, digits, distillation="none", repeated_augmentation=3).train()
    with pytest.raises(ValueError, match="drw_start_epoch 9 is not before the end of training at epoch 2"):
        student_trainer(tmp_path, digits, distillation="none", drw_start_epoch=9).train()
    with pytest.raises(ValueError, match="the model has 4 classes but the data have 10"):
        student_trainer(tmp_path, digits, model=make_student(num_labels=4), distillation="none")
    names = dict(enumerate("abcdefghij"))
    with pytest.raises(ValueError, match="the model's label 0 is 'a' but the data's is '0'"):
        student_trainer(tmp_path, digits, model=make_student(id2label=names), distillation="none")
    with pytest.raises(ValueError, match=r"must each be a datasets.Dataset .* got list"):
        student_trainer(tmp_path, {"train": digits["train"], "test": [1]}, distillation="none")
    assert not list(tmp_path.glob("checkpoint-*"))
    assert not (tmp_path / "results.json").exists()


def test_an_epoch_of_repeated_augmentation_has_fewer_images(tmp_path):
    """An epoch of repeated augmentation has fewer images than the data.

    It uses rounds of 256 images; a batch of 280 is never full, although the data have 300.
    """
    args = student_arguments(tmp_path, repeated_augmentation=3, per_device_train_batch_size=280)
    with pytest.raises(ValueError, match="an epoch has 256 images, fewer than one batch of 280"):
        args.check_data(300)
    args.check_data(512)


def test_copied_arguments_keep_the_token_and_files_have_none(tmp_path, digits):
    trainer = student_trainer(tmp_path, digits, distillation="none", hub_token="hf_secret")
    assert copy.deepcopy(trainer.args).hub_token == "hf_secret"
    trainer.save_model()
    assert trainer.args.hub_token == "hf_secret"
    assert (tmp_path / "training_args.bin").exists()
    assert not any(b"hf_secret" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(("per_device", "accumulation"), [(128, 8), (256, 4), (64, 16), (4096, 1)])
def test_one_global_batch_gives_one_learning_rate(tmp_path, per_device, accumulation):
    """One global batch gives one learning rate.

    In the authors' code, batch and learning rate change silently with the number of GPUs.
    """
    args = student_arguments(
        tmp_path,
        global_batch_size=1024,
        per_device_train_batch_size=per_device,
        learning_rate=None,
        learning_rate_micro_batches=4,
    )
    assert args.gradient_accumulation_steps == accumulation
    assert args.learning_rate == pytest.approx(2.5e-4)


# ---- Teacher and SAM ----


def test_teacher_learns_and_is_saved_with_its_processor(teacher_folder, teacher):
    results = json.loads((teacher_folder / "results.json").read_text())
    assert results["last"]["accuracies"]["teacher"]["overall"] > 0.3  # chance level is 0.1
    assert (teacher_folder / "preprocessor_config.json").is_file()
    assert teacher.config.id2label[7] == "7"


def test_sam_gradient_does_not_depend_on_accumulation(tmp_path, digits):
    """The gradient of SAM does not depend on accumulation.

    Ascending along the last micro-batch's gradient only is another, noisier method.
    """
    results = []
    for micro_batches in (1, 4):
        trainer = teacher_trainer(tmp_path, digits, make_student(drop_path_rate=0.0), sam_rho=[0.5], drw_start_epoch=0)
        trainer.create_optimizer()
        trainer.accelerator.gradient_state._set_sync_gradients(False)
        size = 64 // micro_batches
        batch = fixed_batch(digits)
        parts = [
            {name: value[i * size : (i + 1) * size] for name, value in batch.items()} for i in range(micro_batches)
        ]
        batches, _ = trainer.get_batch_samples(iter(parts), micro_batches, trainer.args.device)
        before = copy.deepcopy(trainer.model.state_dict())
        for index, part in enumerate(batches):
            trainer.accelerator.gradient_state._set_sync_gradients(index == micro_batches - 1)
            trainer.training_step(trainer.model, part)
        for name, tensor in trainer.model.state_dict().items():
            assert torch.equal(tensor, before[name]), "the weights are back after the second pass"
        results.append({name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()})
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, atol=1e-6, rtol=1e-4)

    # The same gradient computed by hand, at the perturbed point.
    model = make_student(drop_path_rate=0.0)
    weights = effective_number_weights(class_counts(digits["train"]["label"]))

    def loss():
        return F.cross_entropy(model(batch["pixel_values"]).logits, batch["labels"], weights)

    loss().backward()
    norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5 * parameter.grad / norm
    model.zero_grad()
    loss().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(results[0][name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_batch_norm_statistics_come_from_the_unperturbed_pass(tmp_path, digits):
    statistics = []
    for rho in (0.0, 2.0):
        trainer = teacher_trainer(tmp_path, digits, sam_rho=[rho], overwrite=True)
        trainer.create_optimizer()
        batches, _ = trainer.get_batch_samples(iter([fixed_batch(digits)]), 1, trainer.args.device)
        trainer.training_step(trainer.model, batches[0])
        layer = trainer.model.backbone.bn1
        statistics.append(layer.running_mean.clone())
        assert layer.num_batches_tracked == 1
        assert layer.track_running_stats
    assert torch.equal(*statistics)


def sam_steps(steps, scaler=None, poisoned=()):
    """Weights after each step of SAM on a linear layer, with losses scaled as in half precision."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    optimizer = SAM(torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9), rho=0.5)
    weights = []
    for step in range(steps):
        for is_second_pass in (False, True):
            loss = F.cross_entropy(layer(torch.eye(4)), torch.tensor([0, 1, 2, 0]))
            if step in poisoned:
                loss = loss * math.inf
            (loss if scaler is None else scaler.scale(loss)).backward()
            if not is_second_pass:
                optimizer.ascend()
        optimizer.restore()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
        weights.append(layer.weight.detach().clone())
    return weights


def test_sam_does_not_depend_on_the_scale_of_the_loss():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for scaled, plain in zip(sam_steps(3, scaler), sam_steps(3), strict=True):
        torch.testing.assert_close(scaled, plain)


def test_sam_skips_a_step_that_overflows():
    """SAM skips a step that overflows.

    A perturbation along an infinite gradient would destroy the weights and the optimiser state.
    """
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    weights = sam_steps(3, scaler, poisoned=[1])
    assert torch.equal(weights[1], weights[0])
    assert scaler.get_scale() == 2.0**15
    torch.testing.assert_close(weights[2], sam_steps(2)[1])


def test_sam_accepts_new_groups_states_of_plain_sgd_and_copies():
    """SAM accepts new parameter groups, the state of plain SGD, and copies, without an error at the next step."""
    first, second = nn.Linear(4, 3), nn.Linear(3, 3)
    sgd = torch.optim.SGD([{"params": first.parameters()}, {"params": second.parameters()}], lr=0.1, momentum=0.9)
    state = sgd.state_dict()
    optimizer = SAM(torch.optim.SGD(first.parameters(), lr=0.1, momentum=0.9), rho=0.3)
    optimizer.add_param_group({"params": list(second.parameters())})
    optimizer.load_state_dict(state)
    assert [group["rho"] for group in optimizer.param_groups] == [0.3, 0.3]
    first_copy, second_copy, copied = copy.deepcopy((first, second, optimizer))
    weights = []
    for one, two, sam in ((first, second, optimizer), (first_copy, second_copy, copied)):
        for _ in range(2):
            two(one(torch.eye(4))).square().sum().backward()
            sam.ascend() if not sam._perturbed else sam.step()
        weights.append(one.weight.detach().clone())
    assert torch.equal(*weights)
    assert not torch.equal(weights[0], torch.zeros(3, 4))


def test_sam_ascends_in_half_precision_and_leaves_out_groups_of_radius_0():
    """SAM ascends in half precision, where the squares of these gradients are infinite in float16.

    It leaves out groups of radius 0.
    """
    layers = [nn.Linear(4, 3, bias=False).half() for _ in range(2)]
    groups = [{"params": list(layer.parameters()), "rho": rho} for layer, rho in zip(layers, (0.5, 0.0), strict=True)]
    optimizer = SAM(torch.optim.SGD(groups, lr=0.1))
    before = [layer.weight.detach().clone() for layer in layers]
    for layer in layers:
        layer.weight.grad = torch.full_like(layer.weight, 4e4)
    optimizer.ascend()
    moved = (layers[0].weight - before[0]).float().norm().item()
    assert moved == pytest.approx(0.5 / math.sqrt(2), rel=2e-2)
    assert torch.equal(layers[1].weight, before[1])
    assert len(optimizer._perturbed) == 1


def test_a_run_stopped_in_the_second_pass_has_unperturbed_weights(tmp_path, digits, monkeypatch):
    trainer = teacher_trainer(tmp_path, digits, sam_rho=[0.5], max_steps=1)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    passes = []
    compute = trainer.compute_training_loss

    def stopping(model, batch):
        passes.append(1)
        if len(passes) == 2:
            raise KeyboardInterrupt
        return compute(model, batch)

    monkeypatch.setattr(trainer, "compute_training_loss", stopping)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_a_second_pass_that_is_not_finite_stops_the_run_before_saving(tmp_path, digits):
    trainer = teacher_trainer(tmp_path, digits, sam_rho=[1e38], max_steps=1, save_strategy="steps", save_steps=1)
    with pytest.raises(FloatingPointError, match="not finite at step 1"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))
    assert json.loads((tmp_path / "results.json").read_text())["finished"] is False


@pytest.mark.parametrize(
    ("make_trainer", "first", "then", "expected"),
    [
        (teacher_trainer, {"sam_rho": [0.0]}, {"sam_rho": [0.5]}, {"rho": 0.5}),
        (
            teacher_trainer,
            {},
            {"weight_decay": 0.3, "momentum": 0.5},
            {"weight_decay": 0.3, "momentum": 0.5, "rho": 0.05},
        ),
        (
            student_trainer,
            {"distillation": "none"},
            {"distillation": "none", "weight_decay": 0.3, "adam_beta2": 0.9},
            {"betas": (0.9, 0.9)},
        ),
    ],
    ids=["radius", "SGD", "AdamW"],
)
def test_a_resumed_run_uses_the_given_values(tmp_path, digits, make_trainer, first, then, expected):
    """A resumed run uses the given values, not those of its checkpoint, which neither plan nor record would show."""
    values = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    make_trainer(tmp_path, digits, **first, **values).train()
    trainer = make_trainer(tmp_path, digits, **then, **values)
    name = next(name for name in then if name != "distillation")
    with pytest.warns(UserWarning, match=rf"resumes with {name} {re.escape(str(then[name]))}; it began with"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for group in trainer.optimizer.param_groups:
        assert expected.items() <= group.items()
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} - {0.0} == {trainer.args.weight_decay}


def test_sam_refuses_to_ascend_twice():
    layer = nn.Linear(4, 3)
    optimizer = SAM(torch.optim.SGD(layer.parameters(), lr=0.1))
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.ascend()
    with pytest.raises(RuntimeError, match="perturbed already"):
        optimizer.ascend()


def test_sam_trains_in_mixed_precision(tmp_path, digits):
    """SAM trains in mixed precision with both passes in bfloat16.

    Otherwise they would be gradients of two functions.
    """
    seen = []
    trainer = teacher_trainer(tmp_path, digits, sam_rho=[0.1], bf16=True, use_cpu=True, max_steps=2)
    handle = trainer.model.backbone.layer1.register_forward_hook(
        lambda module, args, output: seen.append((module.training, output.dtype))
    )
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    handle.remove()
    assert [dtype for training, dtype in seen if training] == [torch.bfloat16] * 4
    for name, parameter in trainer.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert not torch.equal(parameter, before[name]), name


def test_sam_radius_by_phase_of_training(tmp_path, digits, monkeypatch):
    """The radius of SAM depends on the epoch and applies to all weights; a phase of radius 0 is plain SGD."""
    trainer = teacher_trainer(
        tmp_path, digits, num_train_epochs=3, max_steps=16, sam_rho=[0.1, 0.0, 0.5], sam_rho_epochs=[0, 0.5, 2]
    )
    assert trainer.optimizer_plan() == "SGD, SAM with rho 0.1, 0 from epoch 0.5, 0.5 from epoch 2"
    used, ascend = [], SAM.ascend

    def note(optimizer):
        before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        ascend(optimizer)
        moved = [parameter - value for parameter, value in zip(trainer.model.parameters(), before, strict=True)]
        used.append((trainer.state.global_step, torch.linalg.vector_norm(torch.cat([m.flatten() for m in moved]))))

    monkeypatch.setattr(SAM, "ascend", note)
    trainer.train()
    # An epoch has seven steps; the radius is that of the epoch in which a step starts.
    assert [(step, round(length.item(), 3)) for step, length in used] == [
        *((step, 0.1) for step in range(4)),
        *((step, 0.5) for step in range(14, 16)),
    ]


def test_sam_of_a_student(tmp_path, digits):
    """A student under SAM gets the gradient at the perturbed weights, and logs the losses of the unperturbed ones."""
    values = {"distillation": "none", "mixup": 0, "cutmix": 0, "label_smoothing_factor": 0}
    trainer = student_trainer(tmp_path, digits, model=make_student(drop_path_rate=0.0), **values)
    batch = fixed_batch(digits)
    loss, plain = gradients(trainer, batch, 1)
    logged = trainer.logged_means()

    trainer = student_trainer(tmp_path, digits, model=make_student(drop_path_rate=0.0), sam_rho=[0.5], **values)
    trainer.create_optimizer()
    loss_under_sam, found = gradients(trainer, batch, 1)
    assert trainer.logged_means() == pytest.approx(logged)
    assert loss_under_sam.item() == pytest.approx(loss.item())

    model = make_student(drop_path_rate=0.0)
    norm = torch.sqrt(sum(gradient.square().sum() for gradient in plain.values()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.5 * plain[name] / norm
    outputs = model(batch["pixel_values"])
    heads = (outputs.cls_logits, outputs.distillation_logits)
    sum(0.5 * F.cross_entropy(logits, batch["labels"]) for logits in heads).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_sam_in_the_last_phase_of_a_student_is_recorded(tmp_path, digits):
    """The record and the plan name the phases of SAM, not only the radius of the first step."""
    phases = {"sam_rho": [0.0, 0.1], "sam_rho_epochs": [0, 0.5]}
    trainer = student_trainer(tmp_path, digits, distillation="none", optim="muon", max_steps=5, **phases)
    assert trainer.optimizer_plan() == "muon, SAM with rho 0, 0.1 from epoch 0.5"
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["ran"]["optimizer"]["sam"] == {"rho": [0.0, 0.1], "epochs": [0, 0.5], "adaptive": False}
    assert optimizer_name(record["ran"]["optimizer"]) == "Muon, SAM with rho 0, 0.1 from epoch 0.5"
    assert "SAM with rho 0, 0.1 from epoch 0.5" in (tmp_path / "README.md").read_text()


def test_sam_radius_by_group():
    """The radius of SAM depends on the parameter group.

    In each group, the perturbation's length is the group's rho times its share of the gradient.
    """
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    groups = [{"params": list(layers[0].parameters()), "rho": 0.1}, {"params": list(layers[2].parameters())}]
    optimizer = SAM(torch.optim.SGD(groups, lr=0.1), rho=0.5)
    F.cross_entropy(layers(torch.randn(10, 4)), torch.arange(10) % 3).backward()
    norm = torch.sqrt(sum(p.grad.square().sum() for p in layers.parameters()))
    expected = [
        parameter + rho * parameter.grad / norm
        for layer, rho in ((layers[0], 0.1), (layers[2], 0.5))
        for parameter in layer.parameters()
    ]
    before = [parameter.clone() for parameter in layers.parameters()]
    optimizer.ascend()
    for parameter, value in zip(layers.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter, value)
        assert parameter.grad is None
    optimizer.restore()
    assert all(torch.equal(*pair) for pair in zip(layers.parameters(), before, strict=True))


def test_sam_without_ascending_equals_its_base_and_resumes():
    def make():
        torch.manual_seed(0)
        layer = nn.Linear(4, 3)
        return layer, SAM(torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9), rho=0.5, adaptive=True)

    def step(layer, optimizer, ascend=True):
        for _ in range(1 + ascend):
            layer.zero_grad()
            F.cross_entropy(layer(torch.eye(4)), torch.tensor([0, 1, 2, 0])).backward()
            if ascend and not optimizer._perturbed:
                optimizer.ascend()
        optimizer.step()

    layer, optimizer = make()
    plain, _ = make()
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    step(layer, optimizer, ascend=False)
    F.cross_entropy(plain(torch.eye(4)), torch.tensor([0, 1, 2, 0])).backward()
    sgd.step()
    assert torch.equal(layer.weight, plain.weight)

    for _ in range(3):
        step(layer, optimizer)
    copied, resumed = make()
    copied.load_state_dict(layer.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for pair in ((layer, optimizer), (copied, resumed)):
        step(*pair)
    assert torch.equal(layer.weight, copied.weight)


def test_invalid_teacher_arguments_are_refused(tmp_path, digits):
    with pytest.raises(ValueError, match=r"lr_drop_epochs \[160\] and lr_drops \[\]"):
        teacher_trainer(tmp_path, digits, lr_drop_epochs=[160])
    with pytest.raises(ValueError, match="sam_rho must be one or more values, none negative"):
        teacher_trainer(tmp_path, digits, sam_rho=[-1])
    for values, message in (
        ({"lr_drop_epochs": [30, 10], "lr_drops": [0.1, 0.01]}, r"lr_drop_epochs must be increasing, got \[30, 10\]"),
        ({"optim": "sgd"}, r"optim must keep its default \(teachers are trained with SGD\)"),
        ({"adam_beta1": 0.8}, "adam_beta1 must keep its default"),
        ({"optim_args": "foreach=True"}, "optim_args must keep its default"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type must keep its default"),
        ({"warmup_steps": 5}, "warmup_steps must keep its default"),
        ({"ldam_scale": -1}, "ldam_scale must be above 0, got -1"),
        ({"ldam_margin": 0}, "ldam_margin must be above 0, got 0"),
        ({"color_jitter": -1}, "color_jitter must be 0 or more, got -1"),
        ({"color_jitter": 0.4, "auto_augment": "rand-m9"}, "color_jitter must be 0 with auto_augment, got 0.4"),
        ({"sam_rho": [0.1, 0.2]}, r"sam_rho \[0.1, 0.2\] and sam_rho_epochs \[0.0\] must"),
        (
            {"sam_rho": [0.1, 0.2], "sam_rho_epochs": [5, 60]},
            r"sam_rho_epochs must be increasing from 0, got \[5",
        ),
        ({"sam_rho": [0.1, 0.2], "sam_rho_epochs": [0, 0]}, r"sam_rho_epochs must be increasing from 0, got \[0, 0\]"),
        ({"momentum": 5}, r"momentum must be in \[0, 1\), got 5"),
        ({"teacher_loss": "paco", "label_smoothing_factor": 0.1}, "label_smoothing_factor must be 0 with teacher_loss"),
    ):
        with pytest.raises(ValueError, match=message):
            teacher_trainer(tmp_path, digits, **values)
    for values, message in (
        ({"lr_drop_epochs": [3, 5], "lr_drops": [0.1, 0.01]}, r"lr_drop_epochs \[3, 5\] are not all before the end"),
        ({"sam_rho": [0.1, 0.2], "sam_rho_epochs": [0, 5]}, r"sam_rho_epochs \[0, 5\] are not all before the end"),
    ):
        with pytest.raises(ValueError, match=message):
            teacher_trainer(tmp_path, digits, num_train_epochs=5, **values).train()
    with pytest.raises(ValueError, match="'ldam' needs a cosine classifier, the model's is linear"):
        teacher_trainer(tmp_path, digits, teacher_loss="ldam")
    cosine = FlatTeacherConfig(backbone="resnet20", classifier="cosine", image_size=8, num_labels=10)
    with pytest.raises(ValueError, match="'ce' needs a linear classifier, the model's is cosine"):
        teacher_trainer(tmp_path, digits, FlatTeacherForImageClassification(cosine), teacher_loss="ce")


def test_arguments_reach_the_loss(tmp_path, digits):
    model = FlatTeacherForImageClassification(
        FlatTeacherConfig(backbone="resnet20", classifier="cosine", image_size=8, num_labels=10)
    )
    trainer = teacher_trainer(tmp_path, digits, model, teacher_loss="ldam", ldam_margin=0.2, ldam_scale=7.0)
    assert trainer.criterion.margins.max() == pytest.approx(0.2)
    assert trainer.criterion.scale == trainer.model.config.logit_scale == 7.0
    trainer = teacher_trainer(tmp_path, digits, label_smoothing_factor=0.3)
    assert trainer.criterion.label_smoothing == 0.3


def test_ldam_teacher_with_learning_rate_drops_trains(tmp_path, digits):
    torch.manual_seed(0)
    model = FlatTeacherForImageClassification(
        FlatTeacherConfig(backbone="resnet20", classifier="cosine", image_size=8, num_labels=10)
    )
    trainer = teacher_trainer(
        tmp_path,
        digits,
        model,
        num_train_epochs=8,
        teacher_loss="ldam",
        drw_start_epoch=6,
        lr_drop_epochs=[6, 7],
        lr_drops=[0.1, 0.01],
        sam_rho=[0.1, 0.2],
        sam_rho_epochs=[0, 7],
        hflip=0,
        logging_steps=1,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[0]["learning_rate"] == pytest.approx(0.05)
    assert logs[-1]["learning_rate"] == pytest.approx(0.0005)
    assert trainer.last_table.accuracies["teacher"]["overall"] > 0.2

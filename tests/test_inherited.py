"""Tests of what the trainers inherit from transformers: each argument and method works or is refused with a message."""

import copy
import functools
import inspect
import json
import re
from dataclasses import fields

import numpy as np
import PIL
import pytest
import torch
from datasets import ClassLabel
from timm.optim import create_optimizer_v2
from torch.utils.data import TensorDataset
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    EarlyStoppingCallback,
    Trainer,
    TrainingArguments,
)

from deitlt_hf import (
    DeiTLTForImageClassification,
    DeiTLTTrainer,
    DeiTLTTrainingArguments,
    FlatTeacherConfig,
    FlatTeacherForImageClassification,
    FlatTeacherTrainer,
    FlatTeacherTrainingArguments,
)
from deitlt_hf.hub.card_facts import CardFacts
from deitlt_hf.hub.cards import make_card
from deitlt_hf.training import SAM
from deitlt_hf.training.inherited import ARGUMENTS, PARAMETERS, TEACHER_ARGUMENTS
from deitlt_hf.training.runs import begin
from helpers import fixed_batch, make_student, student_arguments

OTHER = torch.optim.SGD([torch.zeros(1)])  # an optimiser of another model's parameters
NAMES = {field.name for field in fields(TrainingArguments)}


def trainer_of(folder, digits, model=None, trainer=None, **values):
    """A student's trainer of two steps on labels; `trainer` holds further parameters of the trainer."""
    values = {"max_steps": 2, "distillation": "none", "report_to": "none", "use_cpu": True, **values}
    parameters = {"train_dataset": digits["train"], "eval_dataset": digits["test"], **(trainer or {})}
    if "model_init" not in parameters:
        parameters["model"] = make_student() if model is None else model
    return DeiTLTTrainer(args=student_arguments(folder, **values), **parameters)


def flat_trainer_of(folder, digits, model=None, optimizers=(None, None), **values):
    defaults = {"per_device_train_batch_size": 32, "eval_strategy": "no", "save_strategy": "no", "warmup_epochs": 0}
    values = {**defaults, "max_steps": 1, "report_to": "none", "use_cpu": True, **values}
    args = FlatTeacherTrainingArguments(output_dir=str(folder), **values)
    model = small_teacher() if model is None else model
    return FlatTeacherTrainer(model=model, args=args, train_dataset=digits["train"], optimizers=optimizers)


def small_teacher():
    torch.manual_seed(0)
    return FlatTeacherForImageClassification(FlatTeacherConfig(backbone="resnet20", image_size=8, num_labels=10))


def record_of(folder):
    return json.loads((folder / "results.json").read_text())


# ---- Tables of arguments and parameters ----


# Arguments and parameters that work. Those of `do_...` are for scripts that read them themselves.
WORKING_ARGUMENTS = """
    output_dir num_train_epochs max_steps per_device_train_batch_size per_device_eval_batch_size learning_rate
    weight_decay optim optim_args adam_beta1 adam_beta2 adam_epsilon max_grad_norm label_smoothing_factor seed data_seed
    gradient_accumulation_steps bf16 fp16 bf16_full_eval fp16_full_eval tf32 torch_compile torch_compile_backend
    torch_compile_mode torch_empty_cache_steps activation_checkpointing activation_checkpointing_kwargs
    gradient_checkpointing gradient_checkpointing_kwargs logging_dir logging_strategy logging_steps logging_first_step
    log_on_each_node log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id
    trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay eval_on_start eval_accumulation_steps
    include_for_metrics save_only_model save_strategy save_steps save_total_limit load_best_model_at_end
    metric_for_best_model greater_is_better resume_from_checkpoint restore_callback_states_from_checkpoint push_to_hub
    hub_token hub_private_repo hub_model_id hub_revision hub_strategy full_determinism use_cpu accelerator_config
    local_rank debug skip_memory_metrics fsdp fsdp_config deepspeed ddp_bucket_cap_mb ddp_broadcast_buffers ddp_backend
    ddp_timeout ddp_find_unused_parameters dataloader_num_workers dataloader_prefetch_factor dataloader_pin_memory
    dataloader_persistent_workers dataloader_multiprocessing_context dataloader_in_order do_train do_eval do_predict
"""
WORKING_PARAMETERS = """
    model args train_dataset eval_dataset processing_class model_init compute_metrics callbacks optimizers
    optimizer_cls_and_kwargs preprocess_logits_for_metrics
"""


def test_every_argument_and_parameter_of_transformers_works_or_is_refused():
    """A new version of transformers must not add a name that nobody has looked at."""
    working, parameters = set(WORKING_ARGUMENTS.split()), set(WORKING_PARAMETERS.split())
    assert working | set(ARGUMENTS) >= NAMES
    of_some_versions = {"warmup_ratio", "logging_dir", "dataloader_in_order", "dataloader_multiprocessing_context"}
    of_some_versions |= {"activation_checkpointing", "activation_checkpointing_kwargs"}
    assert (working | set(ARGUMENTS)) - NAMES <= of_some_versions
    assert not working & set(ARGUMENTS)
    assert set(TEACHER_ARGUMENTS) < working
    assert parameters | set(PARAMETERS) == set(inspect.signature(Trainer.__init__).parameters) - {"self"}


@pytest.mark.parametrize("trainer_class", [DeiTLTTrainer, FlatTeacherTrainer])
def test_public_methods_have_the_signatures_of_transformers(trainer_class):
    for name in ("train", "evaluate", "predict", "save_model", "push_to_hub", "hyperparameter_search"):
        own = inspect.signature(getattr(trainer_class, name)).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in own.values())
        missing = set(inspect.signature(getattr(Trainer, name)).parameters) - set(own)
        assert takes_any or not missing, name


@pytest.mark.parametrize("name", sorted(ARGUMENTS.keys() & NAMES))
def test_refused_arguments_are_refused(tmp_path, name):
    default = next(field.default for field in fields(DeiTLTTrainingArguments) if field.name == name)
    value = {"lr_scheduler_type": "cosine", "train_sampling_strategy": "sequential", "warmup_steps": 5}.get(name)
    with pytest.raises(ValueError, match=f"^{name} must keep its default"):
        student_arguments(tmp_path, **{name: value or (not default if isinstance(default, bool) else "other")})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fp16": True, "use_cpu": True}, "fp16 has no effect on a CPU"),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config: split_batches must keep its default"),
        ({"accelerator_config": {"even_batches": False}}, "accelerator_config: even_batches must keep its default"),
        ({"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}}, "gradient_accumulation_kwargs"),
        ({"optim": "lomo"}, "optim 'lomo' cannot be used: it updates weights"),
        ({"optim": "galore_adamw"}, "optim 'galore_adamw' cannot be used"),
        ({"optim": "schedule_free_adamw"}, "it does not use a learning-rate schedule"),
        # torch 2.8 and newer have fused versions of these.
        ({"optim_args": "momentum=0.9"}, "optim_args 'momentum=0.9' has no effect on optim 'adamw_torch"),
        ({"optim_args": "momentum"}, "optim_args 'momentum' cannot be made"),
        ({"optim": "sgd", "adam_beta2": 0.9}, "adam_beta2 has no effect on optim 'sgd'"),
        ({"optim": "muon", "optim_args": "momentum=0.9"}, "optim_args 'momentum=0.9' has no effect on optim 'muon'"),
        ({"optim": "adamw_bnb_8bit"}, "optim 'adamw_bnb_8bit' with optim_args None cannot be made"),
        ({"dataloader_prefetch_factor": 2}, "has no effect without dataloader_num_workers"),
        ({"gradient_checkpointing_kwargs": {"a": 1}}, "has no effect without gradient_checkpointing"),
        ({"greater_is_better": True}, "has no effect without metric_for_best_model"),
        ({"debug": "tpu_metrics_debug"}, "has no effect without a TPU"),
    ],
)
def test_values_without_effect_are_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        student_arguments(tmp_path, **values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data_collator": list}, "data_collator cannot be given"),
        ({"compute_loss_func": print}, "compute_loss_func cannot be given: the loss is the method's"),
        ({"train_dataset": TensorDataset(torch.zeros(2))}, "must each be a datasets.Dataset .* got TensorDataset"),
        (
            {"model_init": lambda: make_student(), "optimizers": (torch.optim.SGD([torch.zeros(1)]), None)},
            "optimizers belong to one",
        ),
        ({"optimizers": (torch.optim.SGD([torch.zeros(1)]), None)}, "parameters that are not the model's"),
    ],
)
def test_parameters_without_effect_are_refused(tmp_path, digits, values, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, digits, trainer=values)


def test_unusable_settings_are_refused_before_a_run(tmp_path, digits):
    with pytest.raises(ValueError, match="metric_for_best_model 'acuracy' is not measured"):
        trainer_of(tmp_path, digits, metric_for_best_model="acuracy")
    with pytest.raises(ValueError, match=r"include_for_metrics .* has no effect without compute_metrics"):
        trainer_of(tmp_path, digits, include_for_metrics=["inputs"])
    with pytest.raises(ValueError, match="a FlatTeacherForImageClassification cannot checkpoint activations"):
        flat_trainer_of(tmp_path, digits, gradient_checkpointing=True)
    with pytest.raises(ValueError, match="args must be DeiTLTTrainingArguments, got TrainingArguments"):
        DeiTLTTrainer(make_student(), TrainingArguments(str(tmp_path)), train_dataset=digits["train"])
    optimizer = torch.optim.SGD(make_student().parameters())
    with pytest.raises(ValueError, match="the scheduler in optimizers must belong to the optimizer"):
        trainer_of(tmp_path, digits, trainer={"optimizers": (None, torch.optim.lr_scheduler.ConstantLR(optimizer))})


@pytest.mark.parametrize(
    ("kind", "values", "trainer", "message"),
    [
        ("student", {"metric_for_best_model": "acuracy"}, {}, "'acuracy' is not measured"),
        ("student", {}, {"optimizers": (OTHER, None)}, "parameters that are not the model's"),
        ("student", {}, {"eval_dataset": "renamed"}, "the data's is 'a'; model and data need"),
        ("student", {}, {"teacher": make_student(num_labels=5)}, "the teacher has 5 classes without names"),
        ("student", {"eval_strategy": "epoch"}, {"eval_dataset": None}, "you didn't pass an `eval_dataset`"),
        ("student", {"ema_decay": 0.9}, {}, "a moving average needs unsharded weights"),
        ("student", {"bf16_full_eval": True}, {}, "bf16_full_eval and fp16_full_eval need unsharded weights"),
        ("teacher", {"gradient_checkpointing": True}, {}, "cannot checkpoint activations"),
        ("teacher", {"teacher_loss": "ldam"}, {}, "needs a cosine classifier"),
        ("teacher", {}, {}, "SAM needs unsharded gradients"),
    ],
)
def test_a_refused_model_is_unchanged(tmp_path, digits, monkeypatch, kind, values, trainer, message):
    model = (make_student() if kind == "student" else small_teacher()).to(torch.bfloat16)
    before = copy.deepcopy(model.config.to_dict())
    if trainer.get("eval_dataset") == "renamed":
        labels = ClassLabel(names=[*"abcdefghij"])
        trainer = {"eval_dataset": digits["test"].cast_column("label", labels)}
    make = Trainer.create_accelerator_and_postprocess

    def sharded(self):
        make(self)
        self.is_fsdp_enabled = "unsharded" in message

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", sharded)
    build = functools.partial(trainer_of, trainer=trainer) if kind == "student" else flat_trainer_of
    with pytest.raises(ValueError, match=message):
        build(tmp_path, digits, model, **values)
    assert model.config.to_dict() == before
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_values_that_are_set_later_take_effect(tmp_path):
    """Values that are set after the arguments were made take effect.

    transformers' helpers set the batch of a process after the global batch was divided.
    """
    args = student_arguments(tmp_path, learning_rate=None, global_batch_size=64, per_device_train_batch_size=32)
    rate = args.learning_rate
    args.global_batch_size = 128
    assert (args.settle().gradient_accumulation_steps, args.learning_rate) == (4, rate)
    args.per_device_train_batch_size, args.gradient_accumulation_steps = 16, 1
    args.settle()
    assert (args.global_batch_size, args.learning_rate) == (16, rate / 2)
    args = args.set_training(batch_size=8, gradient_accumulation_steps=2, learning_rate=0.1)
    assert (args.global_batch_size, args.learning_rate) == (16, 0.1)
    assert (args.seed, args.data_seed) == (42, 42)  # without a data_seed, the order follows the seed
    assert args.set_dataloader(train_batch_size=4, num_workers=1).global_batch_size == 8
    assert args.set_push_to_hub("me/model").hub_strategy == "end"
    with pytest.raises(ValueError, match="set_lr_scheduler has no effect"):
        args.set_lr_scheduler("cosine")
    with pytest.raises(ValueError, match="prediction_loss_only must keep its default"):
        args.set_evaluate(loss_only=True).settle()


# ---- Precision of the weights ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_trained_and_saved_in_float32(tmp_path, digits, dtype):
    """Weights are trained and saved in float32.

    transformers 5 loads the dtype of the file; in 16 bits, nine of ten weights never change at small learning rates.
    """
    make_student().to(dtype).save_pretrained(tmp_path / "half")
    student = DeiTLTForImageClassification.from_pretrained(tmp_path / "half", dtype="auto")
    assert student.dtype == dtype
    before = {name: weight.float() for name, weight in student.state_dict().items()}
    half = small_teacher().to(dtype)
    values = {"learning_rate": 1e-5, "distillation": "hard", "ema_decay": 0.9, "bf16_full_eval": True}
    trainer = trainer_of(tmp_path / "run", digits, student, {"teacher": half, "eval_dataset": None}, **values)
    trainer.train()
    trainer.save_model()
    moved = {name: (weight != before[name]).float().mean() for name, weight in trainer.model.state_dict().items()}
    assert min(moved.values()) > 0.9
    for folder in (tmp_path / "run", tmp_path / "run/ema"):
        saved = DeiTLTForImageClassification.from_pretrained(folder)
        assert saved.dtype == torch.float32
        assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    ran = record_of(tmp_path / "run")["ran"]
    assert (ran["dtype"], ran["teacher_dtype"], ran["evaluation_dtype"]) == ("float32", "float32", "bfloat16")


@pytest.mark.parametrize("field", ["bf16_full_eval", "fp16_full_eval"])
def test_an_evaluation_changes_no_weight(tmp_path, digits, field):
    trainer = trainer_of(tmp_path, digits, **{field: True})
    tensors = {name: (tensor, tensor.clone()) for name, tensor in trainer.model.state_dict(keep_vars=True).items()}
    whole = trainer_of(tmp_path, digits).predict(digits["test"]).predictions
    half = trainer.predict(digits["test"]).predictions
    trainer.evaluate()
    assert 0 < np.abs(half - whole).max() < 0.02  # the half-precision evaluation did run in another precision
    for name, tensor in trainer.model.state_dict(keep_vars=True).items():
        assert tensor is tensors[name][0]
        assert torch.equal(tensor, tensors[name][1])
        assert tensor.dtype == torch.float32


# ---- Optimisers ----


def test_a_given_optimiser_is_sams_base_and_recorded(tmp_path, digits, capsys):
    model = small_teacher()
    halves = [list(model.parameters())[::2], list(model.parameters())[1::2]]
    optimizer = torch.optim.AdamW([{"params": halves[0]}, {"params": halves[1], "lr": 3e-4}], lr=1e-3)
    trainer = flat_trainer_of(tmp_path, digits, model, (optimizer, None), sam_rho=[0.8], learning_rate=0.1)
    trainer.train()
    trainer.save_model()
    ran = record_of(tmp_path)["ran"]
    assert ran["optimizer"]["class"] == "torch.optim.adamw.AdamW"
    assert ran["optimizer"]["settings"]["lr"] == [1e-3, 3e-4]
    assert ran["optimizer"]["sam"] == {"rho": [0.8], "epochs": [0.0], "adaptive": False}
    assert "momentum" not in record_of(tmp_path)["settings"]
    assert "AdamW, SAM with rho 0.8" in capsys.readouterr().out
    card = make_card(tmp_path)
    assert "AdamW, SAM with rho 0.8" in card.content
    assert "sam" in card.data.tags


def test_optimisers_that_need_no_sam_wrapper_are_used_unchanged(tmp_path, digits):
    model = small_teacher()
    sam = SAM(torch.optim.SGD(model.parameters(), 0.1), rho=0.3)
    trainer = flat_trainer_of(tmp_path, digits, model, (sam, None), max_steps=1)
    trainer.train()
    assert [group["rho"] for group in sam.param_groups] == [0.3]
    plain = torch.optim.SGD(model.parameters(), 0.1)
    trainer = flat_trainer_of(tmp_path / "b", digits, model, (plain, None), sam_rho=[0])
    assert trainer.optimizer is plain
    trainer.train()
    trainer.save_model()
    assert "sam" not in make_card(tmp_path / "b").data.tags


def test_the_used_optimiser_is_recorded_and_resumes_with_its_rates(tmp_path, digits):
    def trainer(**values):
        model = make_student()
        matrices = [weight for weight in model.parameters() if weight.ndim == 2]
        optimizer = create_optimizer_v2(matrices, opt="nadamuon", lr=2e-3)
        values = {"save_strategy": "steps", "save_steps": 1, "warmup_epochs": 0, **values}
        return trainer_of(tmp_path, digits, model, {"optimizers": (optimizer, None)}, **values)

    trainer().train()
    record = record_of(tmp_path)
    assert record["ran"]["image_decoders"]["pillow"] == PIL.__version__
    assert record["ran"]["optimizer"]["class"].startswith("timm.optim.")
    assert "optim" not in record["settings"]
    assert record["ran"]["optimizer"]["settings"]["lr"] == 2e-3
    name = record["ran"]["optimizer"]["class"].rpartition(".")[2]
    rows = dict(row for row in CardFacts(record, {}).setting_rows()[1:])
    assert rows["`optimizer`"] == f"`{name} of timm`"
    assert "`optim`" not in rows
    resumed = trainer(max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.lr_scheduler.base_lrs == [2e-3]


def test_muon_is_recorded_and_another_optimiser_cannot_resume(tmp_path, digits, capsys):
    values = {"optim": "muon", "save_strategy": "steps", "save_steps": 1, "learning_rate": 2e-3}
    trainer_of(tmp_path, digits, **values).train()
    assert "optimiser muon" in re.sub(" +", " ", capsys.readouterr().out)
    record = record_of(tmp_path)
    assert record["settings"]["optim"] == "muon"
    assert record["ran"]["optimizer"]["class"] == "deitlt_hf.training.optimizers.Muon"
    assert record["ran"]["optimizer"]["settings"]["use_muon"].count(True) == 1
    assert ["`optim`", "`muon`"] in CardFacts(record, {}).setting_rows()
    with pytest.raises(ValueError, match="it began with optim muon, not adamw_torch"):
        trainer_of(tmp_path, digits, **{**values, "optim": "adamw_torch", "max_steps": 3}).train("auto")


def test_a_given_scheduler_and_optimiser_class_are_used(tmp_path, digits, capsys):
    model = make_student()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=9)
    trainer = trainer_of(tmp_path / "a", digits, model, {"optimizers": (optimizer, scheduler)})
    trainer.train()
    assert [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry] == [0.25, 0.25]
    assert "by the ConstantLR that was given" in capsys.readouterr().out
    ran = record_of(tmp_path / "a")["ran"]
    assert ran["scheduler"] == {"class": "torch.optim.lr_scheduler.ConstantLR", "of_the_method": False}
    args = FlatTeacherTrainingArguments(
        str(tmp_path / "b"), max_steps=1, eval_strategy="no", save_strategy="no", sam_rho=[0.1], report_to="none",
        warmup_epochs=0, per_device_train_batch_size=32,
    )  # fmt: skip
    chosen = (torch.optim.RMSprop, {"alpha": 0.5})
    FlatTeacherTrainer(small_teacher(), args, train_dataset=digits["train"], optimizer_cls_and_kwargs=chosen).train()
    ran = record_of(tmp_path / "b")["ran"]["optimizer"]
    assert (ran["class"], ran["settings"]["alpha"]) == ("torch.optim.rmsprop.RMSprop", 0.5)
    assert (ran["settings"]["lr"], ran["sam"]["rho"]) == (0.1, [0.1])


# ---- Common uses of a Trainer ----


def test_custom_metrics_and_predictions(tmp_path, digits):
    seen = []

    def compute(prediction):
        seen.append(prediction)
        return {"mine": 7.0}

    extra = {"compute_metrics": compute}
    trainer = trainer_of(tmp_path, digits, trainer=extra, include_for_metrics=["inputs", "loss"])
    trainer.args.per_device_eval_batch_size = 250
    metrics = trainer.evaluate()
    assert metrics["eval_mine"] == 7.0
    assert "eval_cls_overall" in metrics
    batch = trainer.processing_class([im.convert("RGB") for im in digits["test"]["image"]], return_tensors="pt")
    with torch.no_grad():
        expected = trainer.model.eval()(batch.pixel_values).logits.numpy()
    assert np.allclose(seen[0].predictions, expected, atol=1e-5)
    assert seen[0].inputs.shape == batch.pixel_values.shape
    assert len(seen[0].losses) == len(expected)
    trainer.compute_metrics = None
    output = trainer.predict(digits["test"])
    assert np.allclose(output.predictions, expected, atol=1e-5)
    assert output.label_ids.tolist() == digits["test"]["label"][:]
    assert "test_mean_overall" in output.metrics
    logits, cls_logits, *_ = trainer.predict(digits["test"], ignore_keys=["token_features"]).predictions
    assert logits.shape == cls_logits.shape == (len(expected), 10)
    trainer.preprocess_logits_for_metrics = lambda logits, labels: logits.argmax(dim=-1)
    assert trainer.predict(digits["test"]).predictions.tolist() == expected.argmax(axis=1).tolist()
    assert "eval_mine" not in trainer.evaluate()


def test_several_evaluation_sets(tmp_path, digits):
    sets = {"a": digits["test"].select(range(100)), "b": digits["test"].select(range(100, 300))}
    values = {"metric_for_best_model": "b_accuracy", "eval_strategy": "epoch", "num_train_epochs": 1, "max_steps": -1}
    trainer = trainer_of(tmp_path, digits, trainer={"eval_dataset": sets}, **values)
    trainer.train()
    metrics = trainer.evaluate()
    assert {"eval_a_accuracy", "eval_b_mean_overall"} < set(metrics)
    record = record_of(tmp_path)
    assert record["data"]["test_images"] == 300
    assert record["last"]["accuracies"]["mean"]["overall"] == pytest.approx(metrics["eval_a_accuracy"])
    assert record["last"]["sets"]["b"]["mean"]["overall"] == pytest.approx(metrics["eval_b_accuracy"])
    other = trainer.evaluate({"c": digits["test"].select(range(50))})
    assert "eval_c_accuracy" in other


def test_evaluating_other_images_does_not_change_the_runs_results(tmp_path, digits):
    trainer = trainer_of(tmp_path, digits)
    trainer._recording = True
    trainer.evaluate(digits["train"])
    assert "last" not in trainer.results.content


def test_each_trial_of_a_search_has_a_new_model(tmp_path, digits, monkeypatch):
    """Each trial of a hyperparameter search has its own folder and starts with a new model.

    The searched values reach batch, loss and mixing.
    """
    parameters = {"model_init": lambda: make_student()}
    trainer = trainer_of(tmp_path, digits, trainer=parameters, max_steps=1, ema_decay=0.5)
    first = trainer.model
    trainer.hp_search_backend = "wandb"
    monkeypatch.setattr("transformers.integrations.hp_params", dict)  # else it accepts installed backends only
    trainer._get_output_dir = lambda trial: str(tmp_path / f"run-{trial['number']}") if trial else str(tmp_path)
    for number, batch in enumerate((16, 32)):
        trial = {"number": number, "per_device_train_batch_size": batch, "alpha": 0.25, "mixup": 0.0, "cutmix": 0.5}
        trainer.train(trial=trial)
        assert trainer.model is not first
        assert trainer.args.global_batch_size == batch
        assert trainer.criterion.alpha == 0.25
        assert trainer.mixup.cutmix_alpha == 0.5
        assert len(trainer._window[0]["labels"]) == batch
        assert record_of(tmp_path / f"run-{number}")["settings"]["global_batch_size"] == batch
        first, trainer.model, trainer.model_wrapped = trainer.model, None, None  # Optuna's backend does this
    assert not (tmp_path / "results.json").exists()


def test_callbacks_restore_their_state_from_a_checkpoint(tmp_path, digits):
    values = {
        "restore_callback_states_from_checkpoint": True, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3,
        "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "accuracy",
        "save_total_limit": 3,
    }  # fmt: skip
    patient = EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=1.0)
    trainer_of(tmp_path, digits, trainer={"callbacks": [patient]}, **values).train()
    assert (tmp_path / "results.json").exists()
    resumed = trainer_of(tmp_path, digits, trainer={"callbacks": [EarlyStoppingCallback(2)]}, **values)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    restored = next(cb for cb in resumed.callback_handler.callbacks if isinstance(cb, EarlyStoppingCallback))
    assert restored.early_stopping_threshold == 1.0


# ---- Models ----


def test_a_student_of_transformers_is_trained_on_its_own_weights(tmp_path, digits):
    config = {name: getattr(make_student().config, name) for name in ("image_size", "patch_size", "hidden_size")}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 10}
    plain = DeiTForImageClassificationWithTeacher(DeiTConfig(**config)).eval()
    images = fixed_batch(digits)["pixel_values"]
    with torch.no_grad():
        expected = plain(images).logits
    with pytest.warns(UserWarning, match="is converted to a DeiTLTForImageClassification"):
        trainer = trainer_of(tmp_path, digits, plain)
    assert isinstance(trainer.model, DeiTLTForImageClassification)
    with torch.no_grad():
        assert torch.equal(trainer.model.eval()(images).logits, expected)
    trainer.train()
    assert not torch.equal(plain(images).logits, expected)  # both share the parameters


def test_invalid_students_are_refused_before_the_teacher_is_loaded(tmp_path, digits):
    config = DeiTConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    for model in (DeiTForImageClassification(config), small_teacher()):
        with pytest.raises(ValueError, match=f"a student has two heads, but a {type(model).__name__} was given"):
            trainer_of(tmp_path, digits, model, {"teacher": object()})


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_problems_other_than_single_label_are_refused(tmp_path, digits, problem):
    for model in (make_student(problem_type=problem), small_teacher()):
        model.config.problem_type = problem
        images = torch.zeros(2, 3, 8, 8)
        model(images)
        with pytest.raises(ValueError, match=f"problem_type '{problem}' has no loss here"):
            model(images, labels=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=f"problem_type '{problem}', but an image has one class"):
        trainer_of(tmp_path, digits, make_student(problem_type=problem))


@pytest.mark.parametrize("values", [{"return_dict": False}, {"output_hidden_states": True}])
def test_a_config_that_changes_the_output_still_trains(tmp_path, digits, values):
    trainer_of(tmp_path, digits, make_student(**values), max_steps=1).train()


def test_dropouts_of_the_config_are_applied():
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    plain = make_student(drop_path_rate=0.0).train()
    for field in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        dropped = make_student(drop_path_rate=0.0, **{field: 0.5}).train()
        dropped.load_state_dict(plain.state_dict())
        assert not torch.equal(dropped(images, labels).loss, plain(images, labels).loss)


@pytest.mark.parametrize("size", [1, 2])
def test_tensors_from_inference_mode_can_be_used_outside_of_it(size):
    """Tensors made in inference mode can be used outside of it, also for batches of one image."""
    model = small_teacher().eval()
    with torch.inference_mode():
        folded = model.folded()
        copied = copy.deepcopy(model)
        images = torch.randn(size, 3, 8, 8)
        expected = copied(images).logits
        assert torch.allclose(folded(images).logits, expected, atol=1e-4)
    assert not any(tensor.is_inference() for tensor in (*folded.parameters(), *folded.buffers()))
    assert torch.allclose(folded(images.clone()).logits, expected, atol=1e-4)


def test_a_run_logs_losses_by_default(tmp_path, digits):
    args = student_arguments(tmp_path)
    values = {field.name: field.default for field in fields(type(args))}
    trainer = trainer_of(tmp_path, digits, logging_steps=values["logging_steps"], max_steps=5)
    trainer.train()
    assert sum("loss" in entry for entry in trainer.state.log_history) == 5


def test_a_tracker_that_is_assigned_as_text_is_named_in_the_error(tmp_path):
    """transformers makes a list of trackers at construction only."""
    args = student_arguments(tmp_path, use_cpu=True)
    args.report_to = "wandb"
    with pytest.raises(ValueError, match="cannot report to wandb: WandbCallback requires wandb"):
        begin(args, "deit")

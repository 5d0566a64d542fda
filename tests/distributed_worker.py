"""One data-parallel process, run by `test_distributed.py`: its images, and its gradient of a fixed batch."""

import os
import sys

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard

from deitlt_hf import (
    DeiTLTTrainer,
    DeiTLTTrainingArguments,
    FlatTeacherConfig,
    FlatTeacherForImageClassification,
    FlatTeacherTrainer,
    FlatTeacherTrainingArguments,
)
from deitlt_hf.data import load_long_tailed
from deitlt_hf.recipes import DataArguments
from deitlt_hf.training.runs import evaluate
from helpers import make_student

GLOBAL_BATCH = 32


def fixed_batch():
    generator = torch.Generator().manual_seed(3)
    return {
        "pixel_values": torch.randn(GLOBAL_BATCH, 3, 8, 8, generator=generator),
        "labels": torch.randint(0, 10, (GLOBAL_BATCH,), generator=generator),
    }


def make_trainers(folder, accumulation=1):
    data = load_long_tailed("digits", imbalance_ratio=10, max_per_class=60)
    values = {
        "output_dir": folder,
        "use_cpu": True,
        "global_batch_size": GLOBAL_BATCH,
        "per_device_train_batch_size": GLOBAL_BATCH // PartialState(cpu=True).num_processes // accumulation,
        "drw_start_epoch": 0,
        "learning_rate": 1e-3,
    }
    datasets = {"train_dataset": data["train"], "eval_dataset": data["test"]}
    model = make_student(drop_path_rate=0.0)
    student_args = DeiTLTTrainingArguments(
        **values, distillation="none", reweight_cls=True, repeated_augmentation=1, train_crop="padded"
    )
    yield "student", DeiTLTTrainer(model=model, args=student_args, **datasets)
    for name, per_process in (("sam", False), ("sam_per_process", True)):
        model = make_student(drop_path_rate=0.0)
        sam_args = FlatTeacherTrainingArguments(**values, sam_rho=[0.5], sam_per_process=per_process)
        yield name, FlatTeacherTrainer(model=model, args=sam_args, **datasets)


def repeated_augmentation_order(folder):
    """The images that this process receives in epochs 0 and 1 of a run with repeated augmentation."""
    data = load_long_tailed("digits", imbalance_ratio=5)
    args = DeiTLTTrainingArguments(
        output_dir=folder, use_cpu=True, per_device_train_batch_size=32, distillation="none", repeated_augmentation=3
    )
    trainer = DeiTLTTrainer(model=make_student(), args=args, train_dataset=data["train"], eval_dataset=data["test"])
    loader = trainer.get_train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.batch_sampler.set_epoch(epoch)
        epochs.append([index for batch in loader.batch_sampler for index, _ in batch])
    return {"images": len(data["train"]), "epochs": epochs}


def gradients_of_a_step(trainer, wrap=True):
    """Gradients after all micro-batches of one optimiser step, as the optimiser receives them."""
    batch, micro_batches = fixed_batch(), trainer.args.gradient_accumulation_steps
    size = trainer.args.per_device_train_batch_size
    first = trainer.args.process_index * size
    starts = [first + index * size * trainer.args.world_size for index in range(micro_batches)]
    parts = [{name: value[start : start + size] for name, value in batch.items()} for start in starts]
    trainer.create_optimizer()
    model = trainer.accelerator.prepare(trainer.model) if trainer.args.world_size > 1 and wrap else trainer.model
    batches, _ = trainer.get_batch_samples(iter(parts), micro_batches, trainer.args.device)
    for index, part in enumerate(batches):
        last = index == micro_batches - 1
        trainer.accelerator.gradient_state._set_sync_gradients(last)
        if last:
            trainer.training_step(model, part)
        else:
            with trainer.accelerator.no_sync(model):
                trainer.training_step(model, part)
    return {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}


def paco_queue(folder):
    """The queue of a PaCo teacher after three steps, and the model."""
    data = load_long_tailed("digits", imbalance_ratio=10, max_per_class=60)
    config = FlatTeacherConfig(backbone="resnet20", image_size=8, num_labels=10, projection_size=4)
    torch.manual_seed(0)
    args = FlatTeacherTrainingArguments(
        output_dir=f"{folder}/paco",
        use_cpu=True,
        teacher_loss="paco",
        paco_queue=70,
        global_batch_size=GLOBAL_BATCH,
        max_steps=3,
        eval_strategy="no",
        save_strategy="no",
        overwrite=True,
    )
    model = FlatTeacherForImageClassification(config)
    trainer = FlatTeacherTrainer(model=model, args=args, train_dataset=data["train"], eval_dataset=data["test"])
    trainer.train()
    keys, labels = trainer.contrast.queue()
    return {"keys": keys, "labels": labels, "weight": model.classifier.weight.detach().clone()}


def evaluated_statistics(folder):
    """Batch-norm means during evaluation, after a training step on different images in each process."""
    data = load_long_tailed("digits", imbalance_ratio=10, max_per_class=60)
    args = FlatTeacherTrainingArguments(
        output_dir=f"{folder}/statistics", use_cpu=True, per_device_train_batch_size=16, max_steps=1, eval_strategy="no"
    )
    torch.manual_seed(0)
    model = FlatTeacherForImageClassification(FlatTeacherConfig(backbone="resnet20", image_size=8, num_labels=10))
    trainer = FlatTeacherTrainer(model=model, args=args, train_dataset=data["train"], eval_dataset=data["test"])
    seen = {}
    handle = model.backbone.bn1.register_forward_hook(
        lambda module, *_: None if module.training else seen.update(mean=module.running_mean.clone())
    )
    trainer.train()
    handle.remove()
    return seen["mean"]


def sharded_step(folder):
    """Gathered gradients of a student with sharded weights (FSDP2), and its gathered weights after a step of Muon."""
    _, trainer = next(make_trainers(f"{folder}/sharded"))
    for layer in trainer.model.deit.layers:
        fully_shard(layer)
    fully_shard(trainer.model)
    gradients = {name: gradient.full_tensor() for name, gradient in gradients_of_a_step(trainer, wrap=False).items()}
    return {"gradients": gradients, "stepped": weights_after_muon(trainer)}


def weights_after_muon(trainer):
    """Weights after a step of Muon."""
    trainer.optimizer, trainer.args.optim = None, "muon"
    optimizer = trainer.create_optimizer()
    optimizer.step()
    weights = dict(trainer.model.named_parameters()).items()
    return {name: getattr(weight, "full_tensor", weight.clone)().detach() for name, weight in weights}


def uneven_evaluation(folder):
    """Metrics of 101 test images, which the two processes cannot share equally."""
    _, trainer = next(make_trainers(f"{folder}/evaluation"))
    trainer.args.per_device_eval_batch_size = 8
    figures = trainer.evaluate(uneven_test_images())
    figures = {name: value for name, value in figures.items() if not name.endswith(("runtime", "second", "time"))}
    return {"figures": figures, "images": sum(trainer.last_table.test_counts)}


def uneven_test_images():
    return load_long_tailed("digits", imbalance_ratio=10, max_per_class=60)["test"].select(range(101))


def different_images(folder):
    """The errors of a run in which each process has other images: one image less, then another image."""
    data = load_long_tailed("digits", imbalance_ratio=10, max_per_class=60)
    train, rank = data["train"], PartialState().process_index
    rows = list(range(len(train)))
    errors = []
    for number, chosen in enumerate((rows[rank:], [rows[rank], *rows[1:]])):
        args = DeiTLTTrainingArguments(
            output_dir=f"{folder}/different{number}", use_cpu=True, distillation="none", repeated_augmentation=1
        )
        trainer = DeiTLTTrainer(
            model=make_student(), args=args, train_dataset=train.select(chosen), eval_dataset=data["test"]
        )
        try:
            trainer.train()
        except ValueError as error:
            errors.append(str(error))
    return errors


def different_test_images(folder):
    """The error of an evaluation in which each process has other images."""
    data_args = DataArguments(dataset="digits", imbalance_ratio=10, max_per_class=60)
    data, first = data_args.load(), PartialState().process_index
    data_args.load = lambda: {**data, "test": data["test"].select(range(first, 100))}
    try:
        evaluate(folder, data_args, DeiTLTTrainingArguments(use_cpu=True))
    except ValueError as error:
        return str(error)


def start_fsdp_on_cpu():
    """Makes Accelerate start FSDP 2 on a CPU, which it only does on accelerators."""
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "DeiTLTLayer",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    }
    start = AcceleratorState.__init__

    def start_sharded(self, *args, **kwargs):
        state = PartialState(cpu=True)
        if not AcceleratorState._shared_state:
            state.distributed_type = DistributedType.MULTI_GPU
        start(self, *args, **kwargs)

    AcceleratorState.__init__ = start_sharded


def sharded_run(folder):
    """The saved files of a run with FSDP 2, and its last weights: at once, and resumed from the first step."""
    weights = []
    for resumed in (None, f"{folder}/fsdp/checkpoint-1"):
        trainer = run_of_two_steps(f"{folder}/fsdp")
        assert trainer.is_fsdp_enabled
        trainer.train(resume_from_checkpoint=resumed)
        trainer.save_model()
        trainer.accelerator.wait_for_everyone()
        weights.append(load_file(f"{folder}/fsdp/model.safetensors"))
        trainer.accelerator.wait_for_everyone()
    return weights


def refused_resume(folder):
    """The error of a run with FSDP 2 that resumes one without."""
    try:
        run_of_two_steps(folder).train(resume_from_checkpoint=f"{folder}/checkpoint-1")
    except ValueError as error:
        return str(error)


def run_of_two_steps(folder):
    """Trainer of two steps with a checkpoint after each."""
    data = load_long_tailed("digits", imbalance_ratio=10, max_per_class=60)
    args = DeiTLTTrainingArguments(
        output_dir=folder,
        use_cpu=True,
        distillation="none",
        repeated_augmentation=1,
        global_batch_size=GLOBAL_BATCH,
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="no",
        learning_rate=1e-3,
        warmup_epochs=0,
        mixup=0,  # mixing and erasing draw differently in each process
        cutmix=0,
        random_erasing=0,
    )
    torch.manual_seed(0)
    model = make_student(drop_path_rate=0.0)
    return DeiTLTTrainer(model=model, args=args, train_dataset=data["train"], eval_dataset=data["test"])


def main():
    folder = sys.argv[1]
    found = {}
    for name, trainer in make_trainers(folder):
        batches = list(trainer.get_train_dataloader().batch_sampler)
        found[name] = {"gradients": gradients_of_a_step(trainer), "batches": batches}
    accumulated = dict(make_trainers(folder, accumulation=2))["sam"]
    assert accumulated.args.gradient_accumulation_steps == 2
    found["sam, accumulated"] = {"gradients": gradients_of_a_step(accumulated)}
    found["sharded"] = sharded_step(folder)
    found["evaluation"] = uneven_evaluation(folder)
    found["repeated"] = repeated_augmentation_order(folder)
    found["paco"] = paco_queue(folder)
    found["statistics"] = evaluated_statistics(folder)
    found["different"] = different_images(folder)
    whole = run_of_two_steps(f"{folder}/whole")
    whole.train()
    whole.save_model()
    whole.accelerator.wait_for_everyone()
    found["different"].append(different_test_images(f"{folder}/whole"))
    start_fsdp_on_cpu()
    found["fsdp"] = sharded_run(folder)
    found["refused"] = refused_resume(f"{folder}/whole")
    torch.save(found, f"{folder}/rank{trainer.args.process_index}.pt")


if __name__ == "__main__":
    main()

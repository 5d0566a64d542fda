"""Time of a recipe's runs on this machine, from a trial of a few steps of teacher and student."""

from ..console import duration, show
from ..data.loading import training_counts
from ..training.provenance import processor_name
from ..training.recipe import Recipe, StudentRun
from ..training.trial import measure_steps

WORTH_BFLOAT16 = 0.9  # a smaller gain does not outweigh the lower precision


def print_measured_time(run: StudentRun) -> None:
    """Prints the expected time of a student's run, and of its teacher's, on this machine.

    Raises:
        FileNotFoundError: If the data cannot be found.
        ValueError: If the data are streamed, or have fewer images than one batch.
    """
    if run.data.streaming:
        raise ValueError("a trial reads images of the data set; leave out --streaming or --measure.")
    data, args = run.data.load(), run.args
    num_images, num_test = int(training_counts(data["train"]).sum()), len(data["test"])
    overrides = {name: getattr(args, name) for name in ("output_dir", "use_cpu", "dataloader_num_workers")}
    taught_by = Recipe(run.recipe).teacher(run.model.teacher_loss, **overrides)
    times = measure_steps(taught_by, run, data, compare_bfloat16=args.mixed_precision == "no")
    teacher, student = times.seconds(taught_by, run, num_images, num_test)
    device = processor_name() if args.device.type == "cpu" else str(args.device)
    parts = [f"student {duration(student)}"]
    if args.needs_teacher and run.model.teacher is None:
        parts = [f"teacher {duration(teacher)}", *parts, f"together {duration(teacher + student)}"]
    show(f"{run.recipe}: {num_images:,} training and {num_test:,} test images")
    show(f"Expected time on this machine ({device}), from a trial of a few steps: {', '.join(parts)}.")
    if times.student_step_bfloat16 is not None:
        share = times.student_step_bfloat16 / times.student_step
        advice = "add --bf16 true" if share < WORTH_BFLOAT16 else "float32 is the better choice here"
        show(f"In bfloat16 mixed precision a step of the student takes {share:.2f} of its time: {advice}.")

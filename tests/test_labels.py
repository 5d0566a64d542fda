"""Tests that all readers, and the trainers' data sets, interpret labels in the same way."""

import json

import datasets
import numpy as np
import pytest
from PIL import Image

from deitlt_hf import DeiTLTTrainer, DeiTLTTrainingArguments
from deitlt_hf.data import image_processor, load_long_tailed
from deitlt_hf.data.sources.labels import check_class_names, encode_labels, look_alikes
from deitlt_hf.recipes import DataArguments
from deitlt_hf.training.runs import evaluate
from helpers import make_student, save_image

NAN = float("nan")


def write(reader, folder, labels):
    """Writes the same images with the same labels as training and test data."""
    for split in ("train", "test"):
        if reader == "class folders":
            for index, label in enumerate(labels):
                save_image(folder / split / str(label) / f"{index}.png")
            continue
        if reader in ("csv", "jsonl", "parquet of paths", "metadata"):
            place = folder / split if reader == "metadata" else folder
            paths = [save_image(folder / split / f"{index}.png").relative_to(place) for index in range(len(labels))]
            rows = [{"file_name": str(path), "label": label} for path, label in zip(paths, labels, strict=True)]
            if reader == "jsonl":
                (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
            elif reader == "parquet of paths":
                datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
            else:
                name = "metadata.csv" if reader == "metadata" else f"{split}.csv"
                cells = ["" if row["label"] is None else str(row["label"]) for row in rows]
                lines = [f"{row['file_name']},{cell}" for row, cell in zip(rows, cells, strict=True)]
                (place / name).write_text("\n".join(["file_name,label", *lines]))
            continue
        rows = datasets.Dataset.from_dict({"image": [Image.new("RGB", (4, 4))] * len(labels), "label": labels})
        if reader == "named classes":
            feature = datasets.ClassLabel(names=[str(label) for label in dict.fromkeys(labels)])
            indices = [feature.names.index(str(label)) for label in labels]
            rows = rows.remove_columns("label").add_column("label", indices).cast_column("label", feature)
        rows = rows.cast_column("image", datasets.Image())
        if reader in ("parquet", "stream"):
            rows.to_parquet(folder / f"{split}-0.parquet")
        else:
            rows.save_to_disk(folder / split)
    if reader in ("saved", "named classes"):
        (folder / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')


def read(reader, folder):
    return DataArguments(data_dir=str(folder), streaming=reader == "stream").load()["train"]


TABLES = ("csv", "jsonl", "parquet", "saved", "stream")
NAMED = ("class folders", "named classes")


@pytest.mark.parametrize(
    ("reader", "labels"),
    [
        *((reader, ["a", "nan", "b"]) for reader in (*TABLES, "metadata", "parquet of paths", *NAMED)),
        *((reader, labels) for reader in ("csv", "class folders") for labels in (["0", "1", "-1"], ["a", " ", "b"])),
    ],
)
def test_missing_labels_are_refused_by_every_reader(tmp_path, reader, labels):
    write(reader, tmp_path, labels)
    with pytest.raises(ValueError, match=r"have no label|stands for images without a label|empty name"):
        read(reader, tmp_path)


@pytest.mark.parametrize(
    ("reader", "labels", "message"),
    [
        *((reader, [0.0, 1.0, NAN], "1 of 3 images have no label") for reader in TABLES),
        ("jsonl", ["a", None, "b"], "1 of 3 images have no label"),
        ("saved", [-1, 0, 1], r"1 of 3 images have no label \(-1\)"),
        ("parquet", [0.5, 1.0, 2.0], "not whole numbers"),
    ],
)
def test_invalid_labels_are_refused_by_every_reader(tmp_path, reader, labels, message):
    write(reader, tmp_path, labels)
    with pytest.raises(ValueError, match=message):
        read(reader, tmp_path)


@pytest.mark.parametrize(
    ("reader", "labels", "names"),
    [
        *((reader, [10, 2, 0], ["0", "2", "10"]) for reader in (*TABLES, "metadata", "class folders")),
        ("csv", [10.0, 2.0, 0.0], ["0", "2", "10"]),
        ("saved", ["b", "a", "10"], ["10", "a", "b"]),
        ("jsonl", [True, False, True], ["False", "True"]),
    ],
)
def test_classes_have_the_same_order_in_every_reader(tmp_path, reader, labels, names):
    write(reader, tmp_path, labels)
    assert read(reader, tmp_path).features["label"].names == names


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, "cat"], "of several types"),
        ([True, 1, 0], "booleans and others"),
        ([b"a", b"b"], r"a label is b'b' \(bytes\)"),
        ([[1], [2]], r"a label is \[2\] \(list\)"),
        ([1, float("inf")], "not whole numbers"),
        (["1", "1.5"], "not whole numbers"),
    ],
)
def test_other_types_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        encode_labels({"train": labels})


def test_spellings_of_a_number_and_space_around_a_name_are_one_class(caplog):
    """Spellings of a number, and names with surrounding spaces, are one class; as two, they would divide its images."""
    names, labels = encode_labels({"train": ["1", "2.0"], "test": ["1.0", "2"]})
    assert (names, labels["test"].tolist()) == (["1", "2"], [0, 1])
    names, labels = encode_labels({"train": ["cat ", "cat", "dog"]})
    assert (names, labels["train"].tolist()) == (["cat", "dog"], [0, 0, 1])
    assert "differ only by space around them are one class: cat" in caplog.text


def test_messages_about_labels_have_limited_length():
    with pytest.raises(ValueError, match="a label is b") as error:
        encode_labels({"train": [b"x" * 10**6, b"y"]})
    assert len(str(error.value)) < 500


def test_names_that_look_alike_are_reported(tmp_path, caplog):
    assert look_alikes(["Cat", "dog", "cat ", "e\u0301", "\u00e9"]) == ["'Cat' and 'cat '", "'e\u0301' and '\u00e9'"]
    write("named classes", tmp_path, ["Cat", "cat"])
    read("named classes", tmp_path)
    assert "classes whose names look alike: 'Cat' and 'cat'" in caplog.text


def test_a_class_named_like_a_missing_value_can_be_renamed(tmp_path):
    write("named classes", tmp_path, ["None", "some"])
    data = load_long_tailed(data_dir=str(tmp_path), class_names=["nothing", "some"])
    assert data["train"].features["label"].names == ["nothing", "some"]
    with pytest.raises(ValueError, match="class_names has an empty name"):
        check_class_names(["", "a"], "class_names")


def test_labels_beyond_the_classes_are_refused(tmp_path):
    """Labels beyond the number of classes are refused; `datasets` does not check numbers from an Arrow file."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"image": [Image.new("RGB", (4, 4))] * 2, "label": [0, 7]}, features)
    rows._info.features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match="label 7 is beyond its 2 classes"):
        load_long_tailed(data_dir=str(tmp_path))


def test_counts_of_a_streams_decimal_labels_are_read(tmp_path):
    """A file of counts works for a stream of decimal labels; its keys are class names, which are whole numbers."""
    write("stream", tmp_path, [10.0, 2.0, 2.0])
    (tmp_path / "counts.json").write_text('{"2": 2, "10": 1}')
    arguments = DataArguments(data_dir=str(tmp_path), streaming=True, class_counts=str(tmp_path / "counts.json"))
    split = arguments.load()["train"]
    assert [split.label(value) for value in (10.0, 2.0, 3.0)] == [1, 0, None]


def test_a_model_is_evaluated_by_the_names_of_its_classes(tmp_path):
    """A model is evaluated by its class names. Version 0.1.0 put numbered class folders in alphabetical order."""
    write("class folders", tmp_path / "data", [2, 10, 10])
    model = make_student(num_labels=2, num_hidden_layers=1, id2label={0: "10", 1: "2"}, label2id={"10": 0, "2": 1})
    model.save_pretrained(tmp_path / "model")
    image_processor(8).save_pretrained(tmp_path / "model")
    args = DeiTLTTrainingArguments(output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True)
    evaluated = evaluate(str(tmp_path / "model"), DataArguments(data_dir=str(tmp_path / "data")), args)
    assert evaluated.eval_dataset.labels.tolist() == [1, 0, 0]
    assert evaluated.groups == {"head": [0], "mid": [], "tail": [1]}


# ---- Data sets passed to the trainers ----

CLASSES = datasets.ClassLabel(names=["a", "b"])


def rows(labels=(0, 1) * 4, feature=CLASSES, image=True):
    features = {"image": datasets.Image() if image else datasets.Value("string"), "label": feature}
    images = [Image.fromarray(np.full((8, 8, 3), 20 * index, np.uint8)) for index in range(len(labels))]
    content = {"image": images if image else ["a.png"] * len(labels), "label": list(labels)}
    return datasets.Dataset.from_dict(content, datasets.Features(features))


def trainer(folder, train_dataset, eval_dataset):
    args = DeiTLTTrainingArguments(
        output_dir=str(folder),
        distillation="none",
        max_steps=1,
        warmup_epochs=0,
        per_device_train_batch_size=4,
        repeated_augmentation=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    model = make_student(num_labels=2, num_hidden_layers=1)
    return DeiTLTTrainer(model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset)


NUMBERS, TEXTS = rows(feature=datasets.Value("int64")), rows(("a", "b") * 4, datasets.Value("string"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (NUMBERS, r'cast_column\("label", ClassLabel\(num_classes=2\)\)'),
        (TEXTS, r'dataset\.class_encode_column\("label"\)'),
        (datasets.DatasetDict(train=rows(), test=rows()), "a DatasetDict of train, test; give one of these splits"),
        (rows().to_iterable_dataset(), "IterableDataset cannot be used directly: .*StreamedSplit"),
        (rows(image=False), r"0 columns have type Image; .*cast_column\("),
        (rows((0, 1, -1, 1)), r"1 of 4 images have no label \(-1\)"),
        (rows((0, 1, None, 1)), r"1 of 4 images have no label \(None\)"),
        (rows().with_transform(lambda batch: batch), "has a transform"),
    ],
    ids=["numbers", "texts", "dict", "iterable", "paths", "-1", "null", "transform"],
)
def test_unusable_data_sets_are_refused_with_a_clear_message(tmp_path, wrong, message):
    for pair in ((wrong, rows()), (rows(), wrong)):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, *pair)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "given",
    [
        NUMBERS.cast_column("label", datasets.ClassLabel(num_classes=2)),
        TEXTS.class_encode_column("label"),
        *(rows().with_format(kind) for kind in ("torch", "numpy", "pandas", "arrow")),
        rows().rename_column("label", "kind"),
    ],
    ids=["cast", "encoded", "torch", "numpy", "pandas", "arrow", "renamed"],
)
def test_the_advice_of_the_messages_works(tmp_path, given):
    made = trainer(tmp_path, given, given)
    assert made.train_dataset[5]["labels"] == 1
    assert made.eval_dataset[5]["image"][0, 0].tolist() == [100] * 3
    assert made.class_counts == [4, 4]

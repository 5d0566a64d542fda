"""Tests of the supported data layouts: list files, iNaturalist, CIFAR, tables, shards, single folders."""

import functools
import io
import json
import os
import pickle
import re
import threading
import time
from pathlib import Path

import datasets
import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deitlt_hf.data import class_counts, decreasing_count_map, load_long_tailed, shot_groups, stratified_split
from deitlt_hf.data.images import open_image
from deitlt_hf.data.loading import load_source
from deitlt_hf.data.sources.labels import encode_labels
from deitlt_hf.data.streaming import load_streamed
from deitlt_hf.recipes import DataArguments, load_recipe, parse_arguments, recipe_names
from helpers import save_image, shade, write_cifar, write_idx, write_lists, write_shards

RANDOM = np.random.RandomState(0)


# ---- Splitting ----


@given(
    labels=st.lists(st.integers(0, 5), min_size=2, max_size=200),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 3),
)
@settings(deadline=None)
def test_stratified_split(labels, fraction, seed):
    labels = [label for label in labels if labels.count(label) > 1] or [0, 0]
    train, test = stratified_split(labels, fraction, seed)
    assert sorted([*train, *test]) == list(range(len(labels)))
    counts, tested = class_counts(labels, 6), class_counts(np.asarray(labels)[test], 6)
    for count, in_test in zip(counts, tested, strict=True):
        assert count == 0 or 1 <= in_test <= count - 1
        assert count == 0 or abs(in_test - fraction * count) <= 1
    again = stratified_split(labels, fraction, seed)
    assert np.array_equal(again[0], train)


def test_invalid_stratified_splits_are_refused():
    with pytest.raises(ValueError, match=r"test_fraction must be in \(0, 1\), got 1"):
        stratified_split([0, 0], 1)
    with pytest.raises(ValueError, match=r"2 classes have a single image, .* labels 1, 2; add images"):
        stratified_split([0, 0, 1, 2], 0.5)


def test_one_folder_and_a_fraction(tmp_path):
    for name, images in (("cat", 10), ("dog", 5), ("eel", 2)):
        for index in range(images):
            save_image(tmp_path / name / f"{index}.png")
    with pytest.raises(ValueError, match=r"no test .* split; the splits are train.*give test_fraction"):
        load_long_tailed(data_dir=str(tmp_path))
    data = load_long_tailed(data_dir=str(tmp_path), test_fraction=0.2)
    assert class_counts(data["train"]["label"][:]).tolist() == [8, 4, 1]
    assert class_counts(data["test"]["label"][:]).tolist() == [2, 1, 1]
    rows = data["train"]["source_index"][:] + data["test"]["source_index"][:]
    assert sorted(rows) == list(range(17))
    other = load_long_tailed(data_dir=str(tmp_path), test_fraction=0.2, subset_seed=1)
    assert other["test"]["source_index"][:] != data["test"]["source_index"][:]


def test_a_fraction_with_an_existing_test_split_is_refused(tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            save_image(tmp_path / split / name / "0.png")
    with pytest.raises(ValueError, match="the splits train, test; leave out test_fraction"):
        load_long_tailed(data_dir=str(tmp_path), test_fraction=0.2)


def test_class_folders_of_any_case_with_other_files_in_them(tmp_path):
    for split in ("Train", "Val"):
        save_image(tmp_path / split / "cat" / "deep" / "1.JPG")
        save_image(tmp_path / split / "dog" / "1.png")
        (tmp_path / split / "dog" / "notes.txt").write_text("cat 1.png 0")
        (tmp_path / split / "dog" / "._1.png").write_bytes(b"")
        (tmp_path / split / ".cache").mkdir()
        (tmp_path / split / "empty").mkdir()
    data = load_long_tailed(data_dir=str(tmp_path))
    assert data["train"].features["label"].names == ["cat", "dog"]
    assert {name: len(split) for name, split in data.items()} == {"train": 2, "test": 2}
    assert len(load_long_tailed(data_dir=str(tmp_path), test_split="Val")["test"]) == 2


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.md").write_text("nothing")
    with pytest.raises(FileNotFoundError, match="has no folders with images; put them below train/CLASS/"):
        load_long_tailed(data_dir=str(tmp_path))


# ---- List files ----


def test_list_files_keep_their_labels_and_take_names_from_folders(tmp_path):
    write_lists(tmp_path)
    data = load_long_tailed("imagenet_lt", str(tmp_path))
    assert data["train"].features["label"].names == ["n03", "n01", "n02"]
    assert [shade(row) for row in data["train"]] == [0, 1, 2, 3, 4, 40, 41, 42, 80, 81]
    assert [(shade(row), row["label"]) for row in data["test"]] == [(20, 0), (60, 1), (100, 2)]


def test_nested_class_folders_have_their_path_as_name(tmp_path):
    names = ("a/airfield", "a/apartment_building/outdoor", "b/bow_window/outdoor")
    data = load_long_tailed(data_dir=str(write_lists(tmp_path, "Places_LT", names=names)))
    assert data["train"].features["label"].names == list(names)


def test_validation_images_without_class_folders_are_found(tmp_path):
    """Validation images without class folders are found.

    ImageNet's validation archive is flat; its list has val/CLASS/.
    """
    write_lists(tmp_path)
    for path in list(tmp_path.glob("val/*/*.png")):
        path.rename(tmp_path / "val" / path.name)
    assert [shade(row) for row in load_long_tailed(data_dir=str(tmp_path))["test"]] == [20, 60, 100]


def test_given_list_files(tmp_path):
    write_lists(tmp_path)
    write_lists(tmp_path, "Places_LT", counts=(2, 2, 2), test="val")
    with pytest.raises(ValueError, match=r"several training lists .*ImageNet_LT_train\.txt"):
        load_long_tailed(data_dir=str(tmp_path))
    given = {"train_list": "Places_LT_train.txt", "test_list": str(tmp_path / "Places_LT_val.txt")}
    assert len(load_long_tailed(data_dir=str(tmp_path), **given)["train"]) == 6
    with pytest.raises(FileNotFoundError, match=r"no list file 'other.txt'"):
        load_long_tailed(data_dir=str(tmp_path), train_list="other.txt")


def test_missing_images_are_counted_and_named(tmp_path):
    write_lists(tmp_path)
    (tmp_path / "train/n03/1.png").unlink()
    (tmp_path / "val/n01/1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of 13 images are not in .* val/n01/1\.png"):
        load_long_tailed(data_dir=str(tmp_path))


@pytest.mark.parametrize("line", ["train/n03/1.png", "train/n03/1.png one", "7"])
def test_a_broken_list_line_is_named(tmp_path, line):
    write_lists(tmp_path)
    with (tmp_path / "ImageNet_LT_train.txt").open("a") as file:
        file.write(f"\n{line}\n")
    with pytest.raises(ValueError, match=rf"line 12 of .*_train\.txt is not 'relative/path label': '{line}'"):
        load_long_tailed(data_dir=str(tmp_path))


def long_tail_of(classes, images, largest, smallest):
    """Decreasing counts that add up to `images`."""
    counts = np.maximum(largest * (smallest / largest) ** (np.arange(classes) / (classes - 1)), smallest).astype(int)
    counts = np.maximum(counts * images // counts.sum(), smallest)
    counts[: images - counts.sum()] += 1
    while counts.sum() != images:
        counts[0] += images - counts.sum()
    return counts


@pytest.mark.parametrize(
    ("recipe", "stem", "test", "classes", "images"),
    [("imagenet_lt", "ImageNet_LT", "test", 1000, 115_846), ("inat18", "iNaturalist18", "val", 8142, 437_513)],
)
def test_lists_of_the_papers_sizes(tmp_path, recipe, stem, test, classes, images):
    """Lists as long as the paper's are read.

    Every row has a path and a label of its own class; links to one real image a class stand for the images.
    """
    counts = RANDOM.permutation(long_tail_of(classes, images, 1280 if classes == 1000 else 1000, 2))
    original = save_image(tmp_path / "original.png")
    train, tests = [], []
    for label, count in enumerate(counts.tolist()):
        folder = tmp_path / "train_val2018" / f"{label % 14}" / f"{label}"
        folder.mkdir(parents=True)
        os.link(original, folder / "3b60c9486db1d2ee875f11a669fbde4a.png")
        line = f"train_val2018/{label % 14}/{label}/3b60c9486db1d2ee875f11a669fbde4a.png {label}\n"
        train += [line] * count
        tests.append(line)
    (tmp_path / f"{stem}_train.txt").write_text("".join(RANDOM.permutation(train).tolist()))
    (tmp_path / f"{stem}_{test}.txt").write_text("".join(tests))

    process, peak, done = psutil.Process(), [0], threading.Event()
    before = process.memory_info().rss

    def watch():
        while not done.wait(0.02):
            peak[0] = max(peak[0], process.memory_info().rss - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    arguments = DataArguments(dataset=recipe, data_dir=str(tmp_path), group_boundaries=[classes // 10, classes // 2])
    data = arguments.load()
    groups = arguments.groups(data)
    print(f"{recipe}: {time.perf_counter() - started:.1f} s, {peak[0] / 2**20:.0f} MiB more at the peak")
    done.set()
    watcher.join()
    assert len(data["train"]) == images
    assert np.array_equal(class_counts(data["train"]["label"][:]), counts)
    assert [len(group) for group in groups.values()] == [classes // 10, classes // 2 - classes // 10, classes // 2]
    assert data["train"][images // 2]["image"].size == (6, 8)
    assert peak[0] < 2**30
    class_map = decreasing_count_map(counts)
    assert np.all(np.diff(counts[np.argsort(class_map)]) <= 0)


# ---- iNaturalist's annotations ----


def write_competition(folder, split_names=("train2018", "val2018"), categories=None):
    names = ["Aves one", "Aves two", "Plantae three"]
    kingdom = ["Aves", "Aves", "Plantae"]
    image_id = 0
    for split, counts in zip(split_names, ((4, 2, 1), (1, 1, 1)), strict=True):
        images, annotations = [], []
        for category, count in reversed(list(enumerate(counts))):
            for _ in range(count):
                path = f"train_val2018/{kingdom[category]}/{category}/{image_id}.png"
                save_image(folder / path, 10 * image_id)
                images.append({"id": image_id, "file_name": path, "width": 6, "height": 8})
                annotations.append({"id": 100 + image_id, "image_id": image_id, "category_id": category})
                image_id += 1
        content = {"info": {}, "images": images, "annotations": annotations[::-1], "categories": []}
        (folder / f"{split}.json").write_text(json.dumps(content))
    categories = [{"id": i, "name": name, "kingdom": kingdom[i]} for i, name in enumerate(names)]
    (folder / "categories.json").write_text(json.dumps(categories))
    return folder


def test_competition_files(tmp_path):
    data = load_long_tailed("inat18", str(write_competition(tmp_path)))
    assert data["train"].features["label"].names == ["Aves one", "Aves two", "Plantae three"]
    assert [(shade(row), row["label"]) for row in data["train"]] == [
        (0, 2), (10, 1), (20, 1), (30, 0), (40, 0), (50, 0), (60, 0),
    ]  # fmt: skip
    assert data["test"]["label"][:] == [2, 1, 0]


def test_list_files_take_species_names(tmp_path):
    write_competition(tmp_path)
    for split, stem in (("train2018", "train"), ("val2018", "val")):
        content = json.loads((tmp_path / f"{split}.json").read_text())
        category = {row["image_id"]: row["category_id"] for row in content["annotations"]}
        lines = [f"{row['file_name']} {category[row['id']]}" for row in content["images"]]
        (tmp_path / f"iNaturalist18_{stem}.txt").write_text("\n".join(lines))
    assert load_source(data_dir=str(tmp_path))[0].startswith("list files (iNaturalist18_train.txt")
    data = load_long_tailed("inat18", str(tmp_path))
    assert data["train"].features["label"].names == ["Aves one", "Aves two", "Plantae three"]
    assert class_counts(data["train"]["label"][:]).tolist() == [4, 2, 1]


def test_broken_competition_files_are_refused(tmp_path):
    write_competition(tmp_path)
    (tmp_path / "categories.json").unlink()
    assert load_long_tailed("inat18", str(tmp_path))["train"].features["label"].names == ["0", "1", "2"]
    (tmp_path / "val2018.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "a.png"}]}))
    with pytest.raises(ValueError, match=r"val2018\.json is not .* lacks 'annotations'"):
        load_long_tailed("inat18", str(tmp_path))
    (tmp_path / "val2018.json").write_text("{")
    with pytest.raises(ValueError, match=r"val2018\.json cannot be read: "):
        load_long_tailed("inat18", str(tmp_path))


@pytest.mark.parametrize("name", ["imagenet_lt", "inat18", "imagefolder"])
def test_names_without_a_folder(name):
    with pytest.raises(ValueError, match=f"{name} has no public copy to load; give data_dir"):
        load_long_tailed(name)


# ---- CIFAR's python version ----


@pytest.mark.parametrize("kind", [10, 100])
@pytest.mark.parametrize("inside", [True, False])
def test_cifar_pickles(tmp_path, kind, inside):
    labels, images = write_cifar(tmp_path, kind)
    folder = next(tmp_path.iterdir()) if inside else tmp_path
    data = load_long_tailed(f"cifar{kind}", str(folder))
    assert data["train"]["label"][:] == labels.tolist()
    assert data["train"].features["label"].names[3] == "class 3"
    first = next(iter(images.values()))
    assert np.array_equal(np.asarray(data["train"][1]["image"]), first[1].reshape(3, 32, 32).transpose(1, 2, 0))
    counts = class_counts(load_long_tailed(f"cifar{kind}", str(folder), imbalance_ratio=5)["train"]["label"][:])
    assert (counts[0], counts[-1]) == (5, 1)


CIFAR_RECIPES = [name for name in recipe_names() if re.fullmatch(r"cifar.*\d", name)]


@pytest.mark.parametrize("layout", ["pickles", "class folders", "list files", "IDX files", "Hub parquet", "saved"])
@pytest.mark.parametrize("recipe", CIFAR_RECIPES)
def test_every_recipe_of_cifar_works_with_every_layout(tmp_path, recipe, layout):
    """Every CIFAR recipe works with every layout, although those of CIFAR-100 name the label column of the Hub."""
    kind = int(re.search(r"\d+", recipe).group())
    labels = np.repeat(np.arange(kind), 2)
    if layout == "pickles":
        write_cifar(tmp_path, kind)
    elif layout == "class folders":
        for split in ("train", "test"):
            for label in range(kind):
                save_image(tmp_path / split / f"{label:02d}" / "0.png", label)
    elif layout == "list files":
        for split in ("train", "test"):
            paths = [save_image(tmp_path / split / f"{label}.png", label) for label in range(kind)]
            lines = [f"{path.relative_to(tmp_path)} {label}" for label, path in enumerate(paths)]
            (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    elif layout == "IDX files":
        write_idx(tmp_path, compress=False, images=2 * kind, classes=kind)
    else:
        names = datasets.ClassLabel(names=[f"class {label}" for label in range(kind)])
        features = {"img": datasets.Image(), "label": names}
        rows = {"img": [Image.new("RGB", (4, 4))] * (2 * kind), "label": labels}
        if kind == 100:
            features = {"img": datasets.Image(), "fine_label": names, "coarse_label": names}
            rows = {"img": rows["img"], "fine_label": labels, "coarse_label": labels // 5}
        data = datasets.Dataset.from_dict(rows, datasets.Features(features))
        if layout == "saved":
            datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path)
        else:
            for split in ("train", "test"):
                data.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    words = ["--recipe", recipe, "--data_dir", str(tmp_path), "--imbalance_ratio", "1"]
    data = parse_arguments("data", (DataArguments,), words)[1].load()
    assert data["train"].column_names == ["image", "label", "source_index"]
    assert np.array_equal(np.unique(data["train"]["label"][:]), np.arange(kind))


def test_malicious_and_broken_cifar_files_are_refused(tmp_path):
    write_cifar(tmp_path)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    marker = tmp_path / "marker"

    class Hostile:
        def __reduce__(self):
            return Path.touch, (marker,)

    path.write_bytes(pickle.dumps({b"data": Hostile()}, protocol=2))
    with pytest.raises(ValueError, match=r"data_batch_2 cannot be loaded: it refers to \S+, which could run"):
        load_long_tailed("cifar10", str(tmp_path))
    assert not marker.exists()
    path.write_bytes(pickle.dumps({b"labels": [1]}, protocol=2))
    with pytest.raises(ValueError, match="data_batch_2 has no 'data'; it is not"):
        load_long_tailed("cifar10", str(tmp_path))
    path.write_bytes(b"not a pickle")
    with pytest.raises(ValueError, match="data_batch_2 cannot be loaded"):
        load_long_tailed("cifar10", str(tmp_path))
    path.unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_2"):
        load_long_tailed("cifar10", str(tmp_path))


# ---- Tables and shards ----


def write_table_images(folder):
    for label, name in enumerate(("cat", "dog", "eel")):
        for index in range(3):
            save_image(folder / "images" / f"{name}_{index}.png", 40 * label + index)


def test_csv_with_a_split_column(tmp_path):
    write_table_images(tmp_path)
    lines = ["file_name,Species,split"]
    for name in ("eel", "cat", "dog"):
        lines += [f"images/{name}_{index}.png,{name},{'val' if index == 2 else 'train'}" for index in range(3)]
    (tmp_path / "metadata.csv").write_text("\ufeff" + "\n".join(lines))
    data = load_long_tailed(data_dir=str(tmp_path))
    assert data["train"].features["label"].names == ["cat", "dog", "eel"]
    assert [(shade(row), row["label"]) for row in data["train"]] == [
        (80, 2), (81, 2), (0, 0), (1, 0), (40, 1), (41, 1),
    ]  # fmt: skip
    assert data["test"]["label"][:] == [2, 0, 1]


def test_columns_with_unusual_names(tmp_path):
    write_table_images(tmp_path)
    rows = [f"{name},images/{name}_0.png,x" for name in ("cat", "dog")] + ["cat,images/cat_1.png,x"]
    for split in ("train", "val"):
        (tmp_path / f"{split}.tsv").write_text("\n".join(["kind,where,label", *rows]).replace(",", "\t"))
    data = load_long_tailed(data_dir=str(tmp_path), image_column="where", label_column="kind")
    assert data["train"].features["label"].names == ["cat", "dog"]
    assert [shade(row) for row in data["test"]] == [0, 40, 1]


@pytest.mark.parametrize("named", [{"label_column": "kinds"}, {"image_column": "were", "label_column": "kind"}])
def test_a_wrong_column_is_refused_even_with_class_folders(tmp_path, named):
    """A wrong column name is refused even if class folders exist, because their labels would be different."""
    for place in ("train/a", "train/b", "test/a", "test/b"):
        save_image(tmp_path / place / "0.png")
    rows = ["where,kind", "train/a/0.png,cat", "train/b/0.png,dog"]
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("\n".join(rows))
    name, value = next(iter(named.items()))
    message = f"no {name.removesuffix('_column')} column '{value}'; .* are where, kind.*--{name} none"
    with pytest.raises(ValueError, match=message):
        load_long_tailed(data_dir=str(tmp_path), **named)
    data = load_long_tailed(data_dir=str(tmp_path), image_column="where", label_column="kind")
    assert data["train"].features["label"].names == ["cat", "dog"]


def test_a_named_column_of_a_table_overrides_lists(tmp_path):
    write_lists(tmp_path)
    (tmp_path / "all.csv").write_text("path,species,split\ntrain/n01/0.png,owl,train\nval/n03/0.png,owl,test\n")
    _, splits = load_source(data_dir=str(tmp_path), label_column="species")
    assert splits["train"].features["species"].names == ["owl"]


def test_a_recipes_column_can_be_unset(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    data = datasets.Dataset.from_dict({"image": [Image.new("RGB", (4, 4))] * 2, "label": [1, 0]}, features)
    datasets.DatasetDict(train=data, test=data).save_to_disk(tmp_path)
    words = ["--recipe", "cifar100_lt_rho50", "--data_dir", str(tmp_path), "--imbalance_ratio", "none"]
    with pytest.raises(ValueError, match=r"no label column 'fine_label'; .* with label_column"):
        parse_arguments("data", (DataArguments,), words)[1].load()
    data = parse_arguments("data", (DataArguments,), [*words, "--label_column", "none"])[1].load()
    assert data["train"]["label"][:] == [1, 0]


def test_numbers_in_a_table_keep_their_value(tmp_path):
    """Numbers in a table are sorted by value; as text, class 10 would come before class 2."""
    for label in range(12):
        save_image(tmp_path / f"{label}.png", label)
    for split in ("train", "test"):
        rows = [f"{label}.png,{label}" for label in range(12) if split == "train" or label != 3]
        (tmp_path / f"{split}.csv").write_text("\n".join(["path,label", *rows]))
    data = load_long_tailed(data_dir=str(tmp_path))
    assert data["train"].features["label"].names == [str(label) for label in range(12)]
    for split in data.values():
        assert all(shade(row) == row["label"] for row in split)


@pytest.mark.parametrize(
    ("content", "values", "message"),
    [
        ("where,label\na.png,1", {}, "cannot determine the image column .* are where, label"),
        ("path,what\na.png,1", {}, "cannot determine the label column"),
        ("path,label\na.png,1", {"label_column": "kind"}, "no label column 'kind'; the columns of .* are path, label"),
        ("path,label\na.png,1,2", {}, r"line 2 of .*train\.csv has 3 fields, but the header has 2"),
        ("path,label\na.png,1", {}, "1 of 1 images are not in"),
    ],
)
def test_unusable_tables_are_refused(tmp_path, content, values, message):
    (tmp_path / "train.csv").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_long_tailed(data_dir=str(tmp_path), **values)


def test_parquet_with_paths(tmp_path):
    write_table_images(tmp_path)
    rows = {
        "image_path": [f"images/{name}_{index}.png" for name in ("cat", "dog") for index in range(3)],
        "label": ["cat"] * 3 + ["dog"] * 3,
    }
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "all.parquet")
    data = load_long_tailed(data_dir=str(tmp_path), test_fraction=0.3)
    assert {name: len(split) for name, split in data.items()} == {"train": 4, "test": 2}
    assert all(shade(row) // 40 == row["label"] for row in data["train"])


def test_parquet_shards_with_images(tmp_path):
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    for shard in range(2):
        rows = {"img": [Image.new("RGB", (4, 4), (label,) * 3) for label in (2, 10, 0)], "label": [2, 10, 0]}
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / f"train-{shard:05d}-of-00002.parquet")
    rows = {"img": [Image.new("RGB", (4, 4), (10,) * 3)], "label": [10]}
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "test-00000-of-00001.parquet")
    data = load_long_tailed(data_dir=str(tmp_path))
    assert data["train"].features["label"].names == ["0", "2", "10"]
    assert [(shade(row), row["label"]) for row in data["train"]] == [(2, 1), (10, 2), (0, 0)] * 2
    assert data["test"]["label"][:] == [2]


def test_the_hubs_folder_of_parquet_files(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("a card")
    for split in ("train", "validation"):
        rows = {"image": [Image.new("RGB", (4, 4), (label,) * 3) for label in (1, 0)], "label": [1, 0]}
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    data = load_long_tailed(data_dir=str(tmp_path))
    assert [(shade(row), row["label"]) for row in data["test"]] == [(1, 1), (0, 0)]


def test_text_and_json_files_next_to_class_folders_are_ignored(tmp_path):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            save_image(tmp_path / split / name / "0.png")
    (tmp_path / "train_log.txt").write_text("epoch 1: loss 0.5 7")
    (tmp_path / "train_config.json").write_text("{}")
    assert load_source(data_dir=str(tmp_path))[0] == "class folders"


def test_webdataset_shards(tmp_path):
    data = load_long_tailed(data_dir=str(write_shards(tmp_path)))
    assert {name: len(split) for name, split in data.items()} == {"train": 18, "test": 9}
    assert data["train"].features["label"].names == ["0", "1", "2"]
    assert all(shade(row) // 40 == row["label"] for row in data["train"])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("file", "length"),
    [
        ("data-train-000000.tar", 3000),  # within the first header or image
        ("data-train-000001.tar", 5 * 512 + 100),  # within a header
        ("data-train-000001.tar", 8 * 512),
        ("data-test-000000.tar", 0),
    ],
)
def test_truncated_shards_are_refused(tmp_path, file, length, streaming):
    path = write_shards(tmp_path) / file
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=rf"{path} is not a whole tar file: .*; copy it again\."):
        DataArguments(data_dir=str(tmp_path), streaming=streaming).load()


def test_files_that_datasets_cannot_read_are_named(tmp_path):
    path = write_shards(tmp_path, shards=1) / "data-train-000000.tar"
    path.write_bytes(b"text" * 128 + bytes(1024))
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be read: "):
        load_source(data_dir=str(tmp_path))
    path.unlink()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = datasets.Dataset.from_dict({"image": [Image.new("RGB", (64, 64))] * 20, "label": [0, 1] * 10}, features)
    rows.to_parquet(tmp_path / "train.parquet")
    content = (tmp_path / "train.parquet").read_bytes()
    (tmp_path / "train.parquet").write_bytes(b"PAR1" + bytes(len(content) // 2) + content[len(content) // 2 + 4 :])
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be read: "):
        load_source(data_dir=str(tmp_path))
    (tmp_path / "train.parquet").write_bytes(content[:-9])
    with pytest.raises(ValueError, match=r"train\.parquet cannot be read: "):
        load_source(data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("all.csv", "path,label\nimages/cat_0.png,été\n"),
        ("train.txt", "images/cat_0.png 0\nimages/été.png 1\n"),
        ("recipe.yaml", "description: été\ndata: {}\n"),
        ("counts.json", '{"été": 3}'),
    ],
)
def test_text_that_is_not_utf8_is_named(tmp_path, file, text):
    write_table_images(tmp_path)
    (tmp_path / file).write_bytes(text.encode("latin-1"))
    options = {"data_dir": str(tmp_path)}
    if file == "counts.json":
        write_shards(tmp_path)
        options |= {"streaming": True, "class_counts": str(tmp_path / file)}
    read = (
        functools.partial(load_recipe, str(tmp_path / file)) if file == "recipe.yaml" else DataArguments(**options).load
    )
    with pytest.raises(ValueError, match=rf"{file} is not text in UTF-8; save it as UTF-8 \("):
        read()


def test_single_saved_data_set(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    rows = {"image": [Image.new("RGB", (4, 4))] * 6, "label": ["b", "a", "b", "a", "b", "a"]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "disk")
    data = load_long_tailed(data_dir=str(tmp_path / "disk"), test_fraction=0.34)
    assert data["train"].features["label"].names == ["a", "b"]
    assert len(data["test"]) == 2


def test_missing_labels_are_refused(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    rows = {"image": [Image.new("RGB", (4, 4))] * 3, "label": ["b", None, "a"]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "disk")
    with pytest.raises(ValueError, match=r"the train split: 1 of 3 images have no label \(None\)"):
        load_long_tailed(data_dir=str(tmp_path / "disk"), test_fraction=0.34)


def test_class_names_from_a_file(tmp_path):
    for split in ("train", "test"):
        for name in ("0", "1"):
            save_image(tmp_path / split / name / "0.png")
    (tmp_path / "names.json").write_text('["cat", "dog"]')
    arguments = DataArguments(data_dir=str(tmp_path), class_names=[str(tmp_path / "names.json")])
    assert arguments.load()["train"].features["label"].names == ["cat", "dog"]


def test_rule_of_the_groups_is_described():
    assert shot_groups([200, 50, 3]).rule == "more than 100 training images, 20 to 100, fewer"
    assert shot_groups([90, 50, 3]).rule == "thirds of the classes sorted by count"
    assert shot_groups([90, 50, 3], rule="shots")["head"].tolist() == []
    assert shot_groups([90, 50, 3], (1, 1)).rule == "classes sorted by count, cut at [1, 1]"


def test_a_student_trained_from_list_files_exports_in_the_authors_order(tmp_path):
    """A student trained from list files exports in the authors' order: decreasing training counts for ImageNet-LT."""
    from deitlt_hf.hub import export_original_student
    from deitlt_hf.recipes import StudentArguments
    from deitlt_hf.training import DeiTLTTrainingArguments
    from deitlt_hf.training.runs import distill

    write_lists(tmp_path / "data", counts=(2, 5, 3))
    trainer = distill(
        "imagenet_lt",
        DataArguments(dataset="imagenet_lt", data_dir=str(tmp_path / "data")),
        StudentArguments(
            image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        ),
        DeiTLTTrainingArguments(
            output_dir=str(tmp_path / "out"),
            distillation="none",
            num_train_epochs=1,
            warmup_epochs=0,
            per_device_train_batch_size=4,
            repeated_augmentation=1,
            save_strategy="no",
            use_cpu=True,
        ),
    )
    assert trainer.model.config.class_map == [2, 0, 1]
    export_original_student(trainer.model, tmp_path / "student.pth")
    content = torch.load(tmp_path / "student.pth", weights_only=True)
    assert content["cls_num_list"] == [5, 3, 2]
    assert torch.equal(content["model"]["head.bias"], trainer.model.cls_classifier.bias[[1, 2, 0]])


# ---- Unusual files ----


def test_the_test_list_is_never_the_training_list(tmp_path):
    write_lists(tmp_path)
    (tmp_path / "ImageNet_LT_train.txt").rename(tmp_path / "trainval.txt")
    (tmp_path / "ImageNet_LT_test.txt").rename(tmp_path / "val.txt")
    assert len(load_long_tailed(data_dir=str(tmp_path))["test"]) == 3
    (tmp_path / "val.txt").unlink()
    assert len(load_long_tailed(data_dir=str(tmp_path), test_fraction=0.4)["test"]) == 4


def test_equivalent_values_of_a_split_column(tmp_path):
    write_table_images(tmp_path)
    rows = ["path,label,Split"]
    for name in ("cat", "dog"):
        rows += [
            f"images/{name}_{index}.png,{name},{split}" for index, split in enumerate(("train_a", "Train b", "test"))
        ]
    (tmp_path / "all.csv").write_text("\n".join(rows))
    data = load_long_tailed(data_dir=str(tmp_path))
    assert {name: len(split) for name, split in data.items()} == {"train": 4, "test": 2}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["images/cat_0.png,1", "images/cat_1.png,"], r"all\.csv: 1 of 2 images have no label"),
        (["images/cat_0.png,1", "", "images/cat_1.png,2"], None),
        (["images/cat_0.png,1.0", "images/cat_1.png,10.0", "images/cat_2.png,2.0"], None),
    ],
)
def test_empty_cells_blank_lines_and_decimal_labels(tmp_path, rows, message):
    write_table_images(tmp_path)
    (tmp_path / "all.csv").write_text("\n".join(["path,label", *rows]))
    if message is not None:
        with pytest.raises(ValueError, match=message):
            load_source(data_dir=str(tmp_path))
    else:
        names = load_source(data_dir=str(tmp_path))[1]["train"].features["label"].names
        assert names == sorted(names, key=int)


def test_duplicate_column_names_are_refused(tmp_path):
    (tmp_path / "train.csv").write_text("path,label,label\na.png,1,2")
    with pytest.raises(ValueError, match=r"has two columns of the same name: path, label, label"):
        load_long_tailed(data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("name", "unrelated", "related"),
    [
        ("sample_submission.csv", "id,guess\n1,2", "path,label\ncat/0.png,eel\ndog/0.png,fox"),
        ("train.csv", "id,guess\n1,2", "path,label\ncat/0.png,eel\ndog/0.png,fox"),
        ("train.tsv", "id\tguess\n1\t2", "path\tlabel\ncat/0.png\teel\ndog/0.png\tfox"),
        ("train.jsonl", '{"id": 1}', '{"path": "cat/0.png", "label": "eel"}\n{"path": "dog/0.png", "label": "fox"}'),
    ],
)
def test_unrelated_tables_are_ignored(tmp_path, name, unrelated, related):
    """A table without paths and labels does not hide the class folders; one with them is read instead."""
    for label in ("cat", "dog"):
        for index in range(3):
            save_image(tmp_path / label / f"{index}.png")
    (tmp_path / name).write_text(unrelated)
    kind, splits = load_source(data_dir=str(tmp_path))
    assert kind == "class folders"
    assert splits["train"].features["label"].names == ["cat", "dog"]
    assert len(splits["train"]) == 6
    (tmp_path / name).write_text(related)
    kind, splits = load_source(data_dir=str(tmp_path))
    assert kind == f"tables ({name})"
    assert splits["train"].features["label"].names == ["eel", "fox"]


def test_missing_training_images_are_not_taken_from_the_parent_folder(tmp_path):
    """Missing training images are not taken from the parent folder.

    Only test images may lie outside their class folder; otherwise one image could get three labels.
    """
    write_lists(tmp_path)
    for name in ("n01", "n02", "n03"):
        (tmp_path / "train" / name / "0.png").unlink()
    save_image(tmp_path / "train" / "0.png")
    with pytest.raises(FileNotFoundError, match="3 of 13 images are not in"):
        load_long_tailed(data_dir=str(tmp_path))


def test_paths_are_compared_as_files(tmp_path):
    write_lists(tmp_path)
    text = (tmp_path / "ImageNet_LT_train.txt").read_text()
    (tmp_path / "ImageNet_LT_train.txt").write_text(text.replace("train/", "./train/"))
    rows = load_long_tailed(data_dir=str(tmp_path))["train"].cast_column("image", datasets.Image(decode=False))
    assert not any("/./" in row["image"]["path"] for row in rows)


def test_split_folders_by_a_word_in_their_name_and_all_test_splits(tmp_path):
    for place in ("train_images/cat", "train_images/dog", "val_images/cat", "val_images/dog", "test/cat", "test/dog"):
        save_image(tmp_path / place / "0.png", len(place))
    data = load_long_tailed(data_dir=str(tmp_path))
    assert data["train"].features["label"].names == ["cat", "dog"]
    assert shade(data["test"][0]) == len("test/cat")
    assert shade(load_long_tailed(data_dir=str(tmp_path), test_split="val")["test"][0]) == len("val_images/cat")


def test_a_flat_test_folder_is_not_a_split_and_a_class_may_be_named_train(tmp_path):
    for place in ("train/cat", "train/dog"):
        for index in range(4):
            save_image(tmp_path / "flat" / place / f"{index}.png")
    save_image(tmp_path / "flat" / "test" / "0.png")
    data = load_long_tailed(data_dir=str(tmp_path / "flat"), test_fraction=0.25)
    assert {name: len(split) for name, split in data.items()} == {"train": 6, "test": 2}
    for name in ("car", "plane", "train"):
        for index in range(2):
            save_image(tmp_path / "traffic" / name / f"{index}.png")
    data = load_long_tailed(data_dir=str(tmp_path / "traffic"), test_fraction=0.5)
    assert data["train"].features["label"].names == ["car", "plane", "train"]


def test_a_class_whose_name_begins_like_a_split_is_a_class(tmp_path):
    """Trainers are shoes if the folders beside them are classes, too; such a folder was the training split."""
    for place in ("boots/adi", "boots/nik", "trainers/adi", "trainers/nik"):
        save_image(tmp_path / place / "0.png")
    data = load_long_tailed(data_dir=str(tmp_path), test_fraction=0.5)
    assert data["train"].features["label"].names == ["boots", "trainers"]


def test_folders_without_images_are_reported(tmp_path, caplog):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            save_image(tmp_path / split / name / "0.png")
        (tmp_path / split / "bat").mkdir()
        (tmp_path / split / "bat" / "0.psd").write_bytes(b"x")
    load_long_tailed(data_dir=str(tmp_path))
    assert "1 folders of" in caplog.text
    assert "have files but no images, left out: bat" in caplog.text


def test_images_next_to_class_folders_are_reported(tmp_path, caplog):
    for path in ("a/0.png", "a/1.png", "b/0.png", "b/1.png", "loose.png"):
        save_image(tmp_path / path)
    assert len(load_long_tailed(data_dir=str(tmp_path), test_fraction=0.5)["train"]) == 2
    assert "1 images are in" in caplog.text
    assert "beside its class folders, and left out: loose.png" in caplog.text


def test_splits_whose_classes_are_named_or_ordered_differently(tmp_path):
    def split(feature, labels):
        features = datasets.Features({"image": datasets.Image(), "label": feature})
        rows = {"image": [Image.new("RGB", (4, 4))] * len(labels), "label": labels}
        return datasets.Dataset.from_dict(rows, features)

    train = split(datasets.ClassLabel(names=["b", "a"]), [0, 1, 1])
    for kind, test in (
        ("text", split(datasets.Value("string"), ["a", "b"])),
        ("order", split(datasets.ClassLabel(names=["a", "b"]), [0, 1])),
    ):
        datasets.DatasetDict({"Train": train, "Test": test}).save_to_disk(tmp_path / kind)
        data = load_long_tailed(data_dir=str(tmp_path / kind))
        names = data["train"].features["label"].names
        assert data["test"].features["label"].names == names
        assert [names[label] for label in data["train"]["label"]] == ["b", "a", "a"]
        assert [names[label] for label in data["test"]["label"]] == ["a", "b"]


def test_max_per_class_alone_is_refused():
    with pytest.raises(ValueError, match="max_per_class needs an imbalance_ratio"):
        load_long_tailed("digits", max_per_class=20)


def test_shards_named_after_a_word_that_begins_like_a_split(tmp_path):
    folder = write_shards(tmp_path, shards=1)
    (folder / "data-test-000000.tar").rename(folder / "testset-0.tar")
    dev = tmp_path / "dev"
    dev.mkdir()
    for path in folder.glob("*.tar"):
        path.rename(dev / path.name)
    data = load_long_tailed(data_dir=str(dev))
    assert {name: len(split) for name, split in data.items()} == {"train": 9, "test": 9}


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["10", "2", "2"], ["2", "10"]),
        ([10.0, 2.0], ["2", "10"]),
        (["010", "002", "02"], ["002", "010", "02"]),
        (["9007199254740993", "9007199254740992"], ["9007199254740992", "9007199254740993"]),
        (["b", "a", "10"], ["10", "a", "b"]),
    ],
    ids=["text", "floats", "codes", "long", "names"],
)
def test_similar_labels_stay_different_classes(labels, names):
    """Different labels stay different classes: codes with leading zeros, and numbers beyond 2 ** 53."""
    found, indices = encode_labels({"train": labels})
    assert found == names
    texts = [str(int(label)) if isinstance(label, float) else label for label in labels]
    assert [found[index] for index in indices["train"]] == texts


# ---- Layouts that are easily confused ----


def write_metadata(folder, kind="csv", splits=("train", "validation"), column="file_name", labels=("b", "a")):
    """Writes Hugging Face's documented layout of image folders: images, and a metadata file with a row for each."""
    for number, split in enumerate(splits):
        rows = []
        for index in range(4):
            save_image(folder / split / f"{index:04d}.png", 100 * number + index)
            rows.append({column: f"{index:04d}.png", "label": labels[index % 2]})
        path = folder / split / f"metadata.{kind}"
        if kind == "parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)
        elif kind == "jsonl":
            path.write_text("\n".join(map(json.dumps, rows)))
        else:
            path.write_text("\n".join([f"{column},label", *(",".join(map(str, row.values())) for row in rows)]))
    return folder


@pytest.mark.parametrize(
    ("kind", "column", "labels"),
    [
        ("csv", "file_name", ("b", "a")),
        ("jsonl", "image_file_name", (1, 0)),
        ("parquet", "photo_file_name", (1, 0)),
    ],
)
def test_hugging_faces_image_folder_is_read(tmp_path, kind, column, labels):
    """Hugging Face's image folder is read; its split folders "train" and "validation" are not classes."""
    write_metadata(tmp_path, kind, column=column, labels=labels)
    name, _ = load_source(data_dir=str(tmp_path))
    assert name == f"tables (train/metadata.{kind}, validation/metadata.{kind})"
    data = load_long_tailed(data_dir=str(tmp_path))
    assert data["train"].features["label"].names == sorted(map(str, labels))
    assert [(shade(row), row["label"]) for row in data["train"]] == [(0, 1), (1, 0), (2, 1), (3, 0)]
    assert [shade(row) for row in data["test"]] == [100, 101, 102, 103]
    with pytest.raises(ValueError, match="the splits train, validation; leave out test_fraction"):
        load_long_tailed(data_dir=str(tmp_path), test_fraction=0.2)


def test_the_test_folder_of_an_image_folder_overrides_its_validation(tmp_path):
    write_metadata(tmp_path, splits=("train", "validation", "test"))
    assert shade(load_long_tailed(data_dir=str(tmp_path))["test"][0]) == 200


def test_metadata_and_images_that_do_not_match_are_refused(tmp_path):
    write_metadata(tmp_path)
    save_image(tmp_path / "train" / "more" / "5.png")
    with pytest.raises(ValueError, match=r"train/metadata\.csv has no row for 1 of the images .*more/5\.png"):
        load_long_tailed(data_dir=str(tmp_path))
    (tmp_path / "train" / "more" / "5.png").unlink()
    (tmp_path / "train" / "0001.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 8 images are not in .*: train/0001\.png"):
        load_long_tailed(data_dir=str(tmp_path))


@pytest.mark.parametrize("name", ["metadata.csv", "labels.csv"])
def test_one_metadata_file_for_all_splits(tmp_path, name):
    """One metadata file for all splits keeps the splits; test_fraction must not mix test images into training."""
    lines = ["file_name,label"]
    for split in ("train", "test"):
        for index in range(4):
            save_image(tmp_path / split / f"{index}.png", index + 100 * (split == "test"))
            lines.append(f"{split}/{index}.png,{'ab'[index % 2]}")
    (tmp_path / name).write_text("\n".join(lines))
    data = load_long_tailed(data_dir=str(tmp_path))
    assert [[shade(row) for row in data[split]] for split in ("train", "test")] == [[0, 1, 2, 3], [100, 101, 102, 103]]
    with pytest.raises(ValueError, match="the splits train, test; leave out test_fraction"):
        load_long_tailed(data_dir=str(tmp_path), test_fraction=0.5)


def test_metadata_next_to_class_folders(tmp_path):
    """Labels in the metadata override class folders, as in `datasets`; without labels, the folders give the classes."""
    for split in ("train", "test"):
        for name in ("a", "b"):
            save_image(tmp_path / split / name / "0.png")
        (tmp_path / split / "metadata.csv").write_text("file_name,caption\na/0.png,x\nb/0.png,y")
    assert load_long_tailed(data_dir=str(tmp_path))["train"].features["label"].names == ["a", "b"]
    for split in ("train", "test"):
        (tmp_path / split / "metadata.csv").write_text("file_name,label\na/0.png,cat\nb/0.png,dog")
    assert load_long_tailed(data_dir=str(tmp_path))["train"].features["label"].names == ["cat", "dog"]


@pytest.mark.parametrize(
    "images",
    [
        ["train/0.png", "train/1.png", "validation/0.png", "validation/1.png"],
        ["cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png", "val/cat/0.png", "val/dog/0.png"],
        ["train/0.png", "train/1.png"],
        ["Train_images/0.png", "test_images/1.png"],
    ],
    ids=["flat", "classes and val", "train alone", "words"],
)
def test_folders_of_splits_do_not_become_classes(tmp_path, images):
    """Split folders do not become classes, and the layout that the error recommends can be read."""
    for index, path in enumerate(images):
        save_image(tmp_path / path, index)
    for options in ({}, {"test_fraction": 0.4}):
        with pytest.raises(ValueError, match="would be read as a class, but is named like a split"):
            load_long_tailed(data_dir=str(tmp_path), **options)


@pytest.mark.parametrize("layout", ["folders", "list", "table", "column"])
def test_a_given_split_is_kept(tmp_path, layout):
    """A split given by folders in paths or by a column is kept; a fraction must not mix test images into training."""
    paths = []
    for number, split in enumerate(("train", "val")):
        for index in range(4):
            place = f"{'ab'[index % 2]}/{split}" if layout == "folders" else split
            paths.append(f"{place}/{index}.png")
            save_image(tmp_path / paths[-1], 100 * number + index)
    if layout == "list":
        (tmp_path / "train.txt").write_text("\n".join(f"{path} {index % 2}" for index, path in enumerate(paths)))
    elif layout == "table":
        lines = [f"{path};{'ab'[index % 2]}" for index, path in enumerate(paths)]
        (tmp_path / "train.csv").write_text("\n".join(["path;label", *lines]))
    elif layout == "column":
        images = datasets.Dataset.from_dict({"image": [str(tmp_path / path) for path in paths]})
        images = images.cast_column("image", datasets.Image()).add_column("label", list("abab" * 2))
        images.add_column("split", [path.split("/")[0] for path in paths]).save_to_disk(tmp_path / "saved")
    folder = str(tmp_path / "saved" if layout == "column" else tmp_path)
    data = load_long_tailed(data_dir=folder)
    assert sorted(map(shade, data["train"])) == [0, 1, 2, 3]
    assert sorted(map(shade, data["test"])) == [100, 101, 102, 103]
    with pytest.raises(ValueError, match="leave out test_fraction"):
        load_long_tailed(data_dir=folder, test_fraction=0.5)


def test_paths_of_a_list_below_a_test_folder_are_refused(tmp_path):
    for path in ("a/0.png", "b/0.png", "a/test/1.png"):
        save_image(tmp_path / path)
    (tmp_path / "all.csv").write_text("path,label\na/0.png,a\nb/0.png,b\na/test/1.png,a")
    with pytest.raises(ValueError, match="some images are below a folder that is named like a test split"):
        load_long_tailed(data_dir=str(tmp_path), test_fraction=0.5)


# ---- Images inside parquet files of any library ----


def encoded(value):
    stream = io.BytesIO()
    Image.new("RGB", (5, 4), (value,) * 3).save(stream, "PNG")
    return stream.getvalue()


STRUCTURE = pyarrow.struct([("path", pyarrow.large_string()), ("bytes", pyarrow.large_binary())])


@pytest.mark.parametrize(
    "column",
    [
        [{"bytes": encoded(value), "path": None} for value in range(4)],
        pyarrow.array([{"bytes": encoded(value), "path": "a.png"} for value in range(4)], STRUCTURE),
        [{"bytes": encoded(value)} for value in range(4)],
        [encoded(value) for value in range(4)],
        pyarrow.array([encoded(value) for value in range(4)], pyarrow.large_binary()),
    ],
    ids=["pandas", "polars", "bytes alone", "binary", "large binary"],
)
@pytest.mark.parametrize("name", ["image", "pixels"])
def test_parquet_with_images_of_other_libraries(tmp_path, column, name):
    """Parquet files written by other libraries are read, although no metadata mark the column as images."""
    for split in ("train", "test"):
        table = pyarrow.table({name: column, "label": list("abab")})
        pyarrow.parquet.write_table(table, tmp_path / f"{split}.parquet")
    for options in ({}, {"image_column": name}):
        data = load_long_tailed(data_dir=str(tmp_path), **options)
        assert [(shade(row), row["label"]) for row in data["test"]] == [(0, 0), (1, 1), (2, 0), (3, 1)]
    streamed = load_streamed("any", str(tmp_path))[1]["train"]
    assert streamed.class_counts.tolist() == [2, 2]
    assert open_image(next(iter(streamed.stream))[name]).decode().shape == (4, 5, 3)


def test_bytes_in_messages_have_limited_length(tmp_path):
    """Messages do not print a column's bytes completely, which could take a megabyte."""
    rows = {"file": [b"x" * 10**6] * 2, "label": [0, 1], "words": [["a"], ["b"]]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "train.parquet")
    for options in ({"label_column": "words"}, {"image_column": "label"}, {"label_column": "file"}, {}):
        with pytest.raises((ValueError, OSError)) as error:
            load_long_tailed(data_dir=str(tmp_path), **options)
        assert len(str(error.value)) < 500


# ---- Links, pipes and special files ----


def test_loops_of_links_give_every_image_once(tmp_path):
    """Loops of links give every image once; followed further, a loop below a class gives 492 images instead of 12."""
    for split in ("train", "test"):
        for name in ("a", "b"):
            for index in range(3):
                save_image(tmp_path / split / name / f"{index}.png", index)
    place = tmp_path / "train" / "a"
    (place / "self").symlink_to(place)
    (place / "deep").mkdir()
    (place / "deep" / "up").symlink_to(tmp_path)
    (place / "again.png").symlink_to(place / "0.png")
    (tmp_path / "train" / "round").symlink_to(tmp_path / "train")
    elsewhere = save_image(tmp_path.parent / f"{tmp_path.name} elsewhere" / "9.png", 9)
    for name in ("in.png", "once more.png"):
        (tmp_path / "train" / "b" / name).symlink_to(elsewhere)
    data = load_long_tailed(data_dir=str(tmp_path))
    assert data["train"].features["label"].names == ["a", "b"]
    assert sorted(map(shade, data["train"])) == [0, 0, 1, 1, 2, 2, 9]


def test_pipes_do_not_stop_the_reader(tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b"):
            save_image(tmp_path / split / name / "0.png")
    os.mkfifo(tmp_path / "train.txt")
    os.mkfifo(tmp_path / "train.csv")
    os.mkfifo(tmp_path / "train" / "metadata.csv")
    assert load_source(data_dir=str(tmp_path))[0] == "class folders"
    os.mkfifo(tmp_path / "train" / "a" / "pipe.png")
    with pytest.raises(ValueError, match=r"a/pipe\.png is not a file"):
        load_source(data_dir=str(tmp_path))
    (tmp_path / "train.txt").unlink()
    (tmp_path / "train.txt").write_text("train/a/0.png 0\ntrain/b/0.png 1\ntrain/a/pipe.png 0")
    with pytest.raises(FileNotFoundError, match="1 of 3 images are not in"):
        load_source(data_dir=str(tmp_path))


def test_names_that_are_not_valid_text(tmp_path):
    for name in ("a", "b"):
        save_image(tmp_path / name / "0.png")
    Path(os.fsdecode(os.fsencode(tmp_path / "a") + b"/\xff.png")).touch()
    with pytest.raises(ValueError, match=r"udcff\.png' is not valid UTF-8; rename"):
        load_source(data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("all.csv", "path,label\na.png,1".encode("utf-16"), "all.csv is not text in UTF-8"),
        ("all.csv", "path,label\na.png,1".encode("utf-16-le"), "all.csv is not text in UTF-8.*NUL bytes"),
        ("all.csv", b'path,label\na.png,"a\nb.png,b', "line 3 of .*all.csv cannot be read: .*quote"),
        ("all.csv", b"path,label\na.png," + b"x" * 140_000, "line 2 of .*all.csv cannot be read: field larger"),
        ("all.csv", b"a.png,1\nb.png,2", r"the columns are a\.png, 1 \(its first line is the header\)"),
        ("all.csv", b"path,label\n", "all.csv has no rows"),
        ("all.csv", b"", "all.csv is empty"),
        ("all.csv", b"path,label,split\na.png,a,train\nb.png,b,", "1 of 2 rows have no split"),
        ("all.csv", b"path,label\n,a", "1 of 1 rows name no image"),
        (
            "all.csv",
            b"path," + b",".join(b"c%d" % index for index in range(9000)) + b"\n" + b"," * 9000,
            "cannot determine the label column",
        ),
        ("all.jsonl", b'{"path": "a.png", "label": 1}\n["a.png", 1]', "line 2 of .*all.jsonl is a list"),
        ("all.jsonl", b'{"path": "a.png", "label": 1}\n{"path"', "line 2 of .*all.jsonl is not valid JSON"),
        ("all.jsonl", b'{"path": "a.png", "label": 1}\n' + b"[" * 10**5, "all.jsonl cannot be read: .*too deeply"),
        ("train2018.json", b"[" * 10**5, "train2018.json cannot be read: .*too deeply"),
        ("train2018.json", b"[1]", "train2018.json is not an iNaturalist annotation file"),
        ("train.txt", b"a.png 0\nb.png 10000000", "9,999,999 classes without images, 1 the first"),
        ("train.txt", b"a.png 1\nb.png 2", "1 classes without images, 0 the first"),
        ("train.txt", b"a.png 0\nb.png 99999999999999999999", "line 2 of .*train.txt is not"),
        ("train.txt", b"a.png 0\nb\0.png 1", "train.txt is not text in UTF-8"),
        ("train.tar", bytes(10240), "train.tar is an empty tar file"),
    ],
)
def test_files_of_another_kind_give_a_clear_message(tmp_path, file, content, message):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_long_tailed(data_dir=str(tmp_path))
    assert len(str(error.value)) < 700


@pytest.mark.parametrize("form", ["semicolons", "tabs", "CRLF", "absolute", "dots"])
def test_tables_and_lists_of_other_programs_are_read(tmp_path, form):
    write_table_images(tmp_path)
    paths = [f"images/{name}_{index}.png" for name in ("cat", "dog") for index in range(3)]
    if form in ("absolute", "dots"):
        other = tmp_path if form == "absolute" else f"../{tmp_path.name}"
        lines = [f"{other}/{path} {row // 3}" if row % 2 else f"{path} {row // 3}" for row, path in enumerate(paths)]
        (tmp_path / "train.txt").write_text("\n".join(lines))
    else:
        mark, end = {"semicolons": (";", "\n"), "tabs": ("\t", "\n"), "CRLF": (",", "\r\n")}[form]
        lines = ["path,label", *(f"{path},{['cat', 'dog'][row // 3]}" for row, path in enumerate(paths))]
        (tmp_path / "all.csv").write_bytes(end.join(lines).replace(",", mark).encode())
    data = load_long_tailed(data_dir=str(tmp_path), test_fraction=0.34)
    assert len(data["train"]) == 4
    assert all(shade(row) // 40 == row["label"] for row in data["train"])


def test_a_recipe_inherits_from_the_one_that_it_extends(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: digits_lt\nstudent: {optim: muon, num_train_epochs: 30}")
    (tmp_path / "shorter.yaml").write_text(
        "extends: mine.yaml\nstudent: {num_train_epochs: 20}\nteacher_losses: {paco: {learning_rate: 0.1}}"
    )
    base, recipe = load_recipe("digits_lt"), load_recipe(str(tmp_path / "shorter.yaml"))
    assert recipe["student"] == base["student"] | {"optim": "muon", "num_train_epochs": 20}
    assert (recipe["data"], recipe["teacher"]) == (base["data"], base["teacher"])
    paco = base["teacher_losses"]["paco"] | {"learning_rate": 0.1}
    assert recipe["teacher_losses"] == base["teacher_losses"] | {"paco": paco}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- data", "has the sections"),
        ("data: {dataset: a, dataset: b}", "'dataset' occurs twice"),
        ("data: " + "[" * 5000, "nested too deeply"),
        ("data: {a: &a [x, x], b: &b [*a, *a], dataset: [*b, *b]}", "b of data must be a number"),
        ("data: {1: 2}", "1 of data must be a number"),
        ("teacher_losses: {ldam: 5}", "ldam must have fields"),
        ("data: {dataset: a\0}", "is not text in UTF-8"),
        ("extends: recipe.yaml", "recipe.yaml' must extend another recipe, got 'recipe.yaml'"),
        ("extends: [digits_lt]", "must extend another recipe"),
        ("extends: digits", r"no recipe 'digits' \(did you mean 'digits_lt'\?\); give the path"),
    ],
)
def test_invalid_recipes_are_refused(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_recipe(str(tmp_path / "recipe.yaml"))
    assert len(str(error.value)) < 700

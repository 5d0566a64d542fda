"""Tests of model cards: they contain exactly the run's measurements and settings."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, metadata_load
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageClassification

from deitlt_hf import (
    DeiTLTConfig,
    DeiTLTForImageClassification,
    DeiTLTTrainer,
    DeiTLTTrainingArguments,
    FlatTeacherConfig,
    FlatTeacherForImageClassification,
)
from deitlt_hf.cli.distill import main as distill
from deitlt_hf.cli.model_cards import CARDS
from deitlt_hf.cli.model_cards import main as make_model_cards
from deitlt_hf.hub.card_facts import CardFacts
from deitlt_hf.hub.cards import is_generated, make_card, recipe_card, write_card
from deitlt_hf.recipes import load_recipe, recipe_names
from deitlt_hf.training.provenance import license_of_start, started_from
from deitlt_hf.training.results import read_emissions
from helpers import ROOT, make_student, results

CHANGED = ["--max_per_class", "50", "--num_train_epochs", "2", "--drw_start_epoch", "1"]
# Overall, head, medium and tail accuracy in the paper's tables.
PAPER = {
    "cifar10_lt_rho100": (87.5, 94.5, 84.1, 85.0),
    "cifar10_lt_rho50": (89.8, 94.9, 87.0, 88.6),
    "cifar100_lt_rho100": (55.6, 72.8, 55.4, 31.4),
    "cifar100_lt_rho50": (60.5, 74.8, 60.3, 43.1),
    "imagenet_lt": (59.1, 66.6, 58.3, 40.0),
    "inat18": (75.1, 70.3, 75.2, 76.2),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A student with non-default settings and its teacher, both trained by the command."""
    folder = tmp_path_factory.mktemp("run")
    recipe = yaml.safe_load((ROOT / "tests" / "fixtures" / "tiny.yaml").read_text())
    recipe["teacher"]["num_train_epochs"] = 8
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["--recipe", str(folder / "tiny.yaml"), "--output_dir", str(folder / "student"), *CHANGED]
    distill([*arguments, "--hub_token", "hf_secret"])
    return folder


@pytest.fixture
def student_folder(trained, tmp_path):
    """A copy of the student's folder that a test may change."""
    ignored = shutil.ignore_patterns("checkpoint-*")
    return Path(shutil.copytree(trained / "student", tmp_path / "student", ignore=ignored))


def change_results(folder, **values):
    (folder / "results.json").write_text(json.dumps(results(folder) | values))


def section(card, title):
    """The text below a heading."""
    return str(card).partition(f"\n{title}\n")[2].partition("\n## ")[0]


def tables(text):
    """The rows of all tables, as lists of cells."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.replace("\\|", "").strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_training_writes_a_card_with_the_last_epochs_numbers(trained, kind):
    accuracies = results(trained / kind)["last"]["accuracies"]
    card = ModelCard.load(trained / kind / "README.md")
    measured = {(entry.metric_name, entry.metric_value) for entry in card.data.eval_results}
    assert measured == {
        (f"{expert}, {group}", value) for expert, row in accuracies.items() for group, value in row.items()
    }
    assert {entry.dataset_type for entry in card.data.eval_results} == {"digits"}
    head, _, *rows = tables(section(card, "## Accuracy"))
    assert head == ["expert", "overall", "head", "mid", "tail"]
    assert [row[1:] for row in rows] == [
        [f"{100 * value:.1f}" for value in row.values()] for row in accuracies.values()
    ]


def test_metadata_use_the_hubs_fields(trained):
    metadata = metadata_load(trained / "student" / "README.md")
    assert metadata["pipeline_tag"] == "image-classification"
    assert metadata["library_name"] == "transformers"
    assert "license" not in metadata, "the trainer of a model names its licence"
    assert {"deit-lt", "long-tailed", "vision"} <= set(metadata["tags"])
    assert metadata["metrics"] == ["accuracy"]
    assert "datasets" not in metadata  # the embedded digits are not on the Hub
    card = ModelCard.load(trained / "student" / "README.md")
    assert card.data.to_dict() == metadata
    assert str(ModelCard(str(card))) == (trained / "student" / "README.md").read_text()


def test_card_lists_only_the_changed_recipe_values(trained):
    text = section(ModelCard.load(trained / "student" / "README.md"), "## Training")
    changed = "`tiny.yaml`, a custom file, with changes: `max_per_class` `50`, `num_train_epochs` `2.0`"
    assert changed in text
    line = next(line for line in text.splitlines() if line.startswith("- Recipe"))
    assert "learning_rate" not in line
    assert "deitlt distill --recipe tiny.yaml --max_per_class 50 --num_train_epochs 2.0 --drw_start_epoch 1.0" in text
    teacher = section(ModelCard.load(trained / "teacher" / "README.md"), "## Training")
    assert "with changes: `max_per_class` `50`.\n" in teacher, "the teacher's images are the student's"
    assert "deitlt train-teacher --recipe tiny.yaml --max_per_class 50\n" in teacher


def test_card_describes_data_hardware_and_versions(trained):
    record = results(trained / "student")
    text = str(ModelCard.load(trained / "student" / "README.md"))
    assert "digits, long-tailed at ratio 10 (exp, subset seed 0)" in text
    assert record["data"]["subset_sha256"] in text
    rows = tables(section(text, "## Training data"))
    assert rows[2][:3] == ["head", "0, 1, 2", "3"]
    assert sum(int(row[3]) for row in rows[2:]) == record["data"]["train_images"]
    assert f"on {record['data']['test_images']} test images" in text
    for name, number in record["versions"].items():
        assert f"{name} {number}" in text
    assert f"- Hardware: {record['hardware']['device']}".split("(")[0] in text
    assert record["hardware"]["threads"] >= 1


def test_card_describes_the_teachers_training_and_accuracy(trained):
    record = results(trained / "student")["teacher"]
    own = results(trained / "teacher")
    assert record["source"] == "teacher", "of an absolute path only the last part is published"
    assert record["training"]["settings"]["sam_rho"] == own["settings"]["sam_rho"]
    # The teacher's evaluation uses the same images at the same size, through the student's pipeline.
    assert record["accuracies"] == pytest.approx(own["last"]["accuracies"]["teacher"], abs=2e-3)
    text = section(ModelCard.load(trained / "student" / "README.md"), "## Training")
    assert (
        "- Teacher: resnet20 (`teacher`), loss `ce`, SGD, SAM with rho 0.05, 8 epochs, trained on the same images."
        in text
    )
    assert f"overall {100 * record['accuracies']['overall']:.1f}" in text


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sam_rho": [0.05]}, "rho 0.05,"),
        ({"sam_rho": [0.05], "sam_rho_epochs": [0.0]}, "rho 0.05,"),
        ({"sam_rho": [0.05, 0.1], "sam_rho_epochs": [0.0, 5.0]}, "rho 0.05, 0.1 from epoch 5,"),
    ],
)
def test_card_says_when_each_rho_applies(settings, words):
    record = {"backbone": "resnet20", "training": {"settings": settings | {"num_train_epochs": 9}}}
    assert f"SAM with {words} 9 epochs" in CardFacts({"teacher": record}, {}).teacher()


def test_no_token_or_path_of_the_user_is_in_card_or_record(trained):
    for path in (*trained.glob("*/README.md"), *trained.glob("*/results.json")):
        assert "hf_secret" not in path.read_text()
        assert str(trained) not in path.read_text()


def test_card_for_a_repository_names_it_in_its_code(trained):
    card = make_card(trained / "student", "org/deitlt-tiny", license="mit", tags="digits")
    assert "# deitlt-tiny\n" in card.text
    assert card.text.count('"org/deitlt-tiny"') == 3
    assert (card.data.license, card.data.model_name) == ("mit", "deitlt-tiny")
    assert "licence `mit`" in card.text
    assert {"digits", "deit-lt"} <= set(card.data.tags)
    with pytest.raises(ValueError, match="org/a/b"):
        make_card(trained / "student", "org/a/b")


def test_a_better_earlier_epoch_is_only_mentioned(student_folder):
    record = results(student_folder)
    change_results(student_folder, settings=record["settings"] | {"drw_start_epoch": 1.5})
    assert "weighted up late" in str(make_card(student_folder))
    best = {"epoch": 1.0, "step": 3, "accuracies": {"mean": {"overall": 0.987, "head": 0.9, "mid": 0.9, "tail": 0.9}}}
    change_results(student_folder, best=best)
    card = make_card(student_folder)
    assert "was 1, with 98.7 overall; its weights were not kept" in card.text
    assert 0.987 not in [entry.metric_value for entry in card.data.eval_results]
    # With load_best_model_at_end, the weights are those of the best checkpoint; the card gives their numbers.
    change_results(student_folder, saved_step=3)
    card = make_card(student_folder)
    assert "at epoch 1, whose weights were kept because they were the best" in card.text
    assert [entry.metric_value for entry in card.data.eval_results] == [0.987, 0.9, 0.9, 0.9]
    assert "weighted up late" not in str(card)
    # Weights that were not evaluated have no numbers.
    change_results(student_folder, saved_step=4)
    card = make_card(student_folder)
    assert card.data.eval_results is None
    expected = "These weights are from step 4; the run did not record their accuracies."
    assert section(card, "## Accuracy").strip() == expected
    assert record["saved_step"] == record["last"]["step"]


def test_metadata_of_an_unfinished_run_have_no_results(student_folder):
    change_results(student_folder, finished=False)
    card = make_card(student_folder)
    assert card.data.eval_results is None
    assert "of an unfinished run" in section(card, "## Accuracy")


def test_groups_without_test_images_have_no_accuracy(student_folder):
    record = results(student_folder)
    record["last"]["accuracies"]["mean"]["tail"] = None
    change_results(student_folder, **record)
    card = make_card(student_folder)
    assert tables(section(card, "## Accuracy"))[2][-1] == "-"
    assert "mean, tail" not in [entry.metric_name for entry in card.data.eval_results]


@pytest.mark.parametrize("change", ["weights", "no digest", "not ours"])
def test_numbers_of_other_weights_are_left_out(student_folder, change):
    if change == "weights":
        model = DeiTLTForImageClassification.from_pretrained(student_folder)
        torch.nn.init.normal_(model.cls_classifier.weight)
        model.save_pretrained(student_folder)
    elif change == "no digest":
        record = results(student_folder)
        del record["weights_sha256"]
        (student_folder / "results.json").write_text(json.dumps(record))
    else:
        (student_folder / "results.json").write_text("[1]")
    card = make_card(student_folder)
    assert card.data.eval_results is None
    assert "metrics" not in card.data.to_dict()
    assert tables(section(card, "## Accuracy")) == []
    assert "belongs to other weights, or does not name its weights" in section(card, "## Accuracy")
    assert "The training of the model is not recorded." in section(card, "## Training")
    assert "training_curves.png" not in card.text


@pytest.mark.parametrize("num_labels", [2, 3])
def test_class_counts_of_an_earlier_head_are_left_out(tmp_path, num_labels):
    """Class counts of an earlier head are left out.

    When plain transformers changes the head, it keeps every other field of the configuration, and it writes no names
    for two unnamed classes.
    """
    groups = {"head": [0, 1, 2], "tail": [3]}
    make_student(num_labels=4, class_counts=[90, 30, 9, 5], class_groups=groups).save_pretrained(tmp_path / "four")
    model = AutoModelForImageClassification.from_pretrained(
        tmp_path / "four", num_labels=num_labels, ignore_mismatched_sizes=True
    )
    model.save_pretrained(tmp_path / "other")
    assert json.loads((tmp_path / "other" / "config.json").read_text())["class_counts"] == [90, 30, 9, 5]
    assert section(make_card(tmp_path / "other"), "## Training data").strip() == "Not recorded."
    assert "| tail | 3 | 1 | 5 | 5 to 5 |" in str(make_card(tmp_path / "four")).replace("LABEL\\_", "")


def test_card_does_not_claim_re_weighting_that_was_not_reached(student_folder):
    record = results(student_folder)
    text = str(make_card(student_folder))
    assert "weighted up late" in text
    assert "classes re-weighted from epoch 1" in text
    change_results(student_folder, settings=record["settings"] | {"max_steps": 3}, last=record["last"] | {"epoch": 1.0})
    text = str(make_card(student_folder))
    assert "weighted up late" not in text
    assert "re-weighted" not in text.partition("<details>")[0]


def test_local_files_are_not_named_as_a_hub_data_set(student_folder):
    data = results(student_folder)["data"] | {"dataset": "data/photos"}
    change_results(student_folder, data=data | {"local_files": True})
    assert make_card(student_folder).data.datasets is None
    change_results(student_folder, data=data | {"local_files": False})
    assert make_card(student_folder).data.datasets == ["data/photos"]


def test_hub_models_that_a_student_started_from_are_linked(student_folder):
    base = {"name": "inat18", "overrides": {"init_from": "facebook/deit-base-distilled-patch16-224"}}
    teacher = results(student_folder)["teacher"] | {"source": "zoo/flat-teacher"}
    change_results(student_folder, recipe=base, teacher=teacher)
    card = make_card(student_folder)
    assert card.data.base_model == "facebook/deit-base-distilled-patch16-224"
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    assert "[zoo/flat-teacher](https://huggingface.co/zoo/flat-teacher)" in str(card)
    change_results(student_folder, recipe={"name": "inat18", "overrides": {"init_from": "student"}})
    assert make_card(student_folder).data.base_model is None
    change_results(student_folder, recipe=None, started_from="zoo/deit")  # started from Python
    assert make_card(student_folder).data.base_model == "zoo/deit"


def test_hub_id_of_a_loaded_model_is_found(tmp_path, monkeypatch):
    model = make_student()
    assert started_from(model) is None
    model.name_or_path = "zoo/deit"  # set by from_pretrained
    assert started_from(model) == "zoo/deit"
    assert started_from(get_peft_model(model, LoraConfig(target_modules=["q_proj"]))) == "zoo/deit"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zoo" / "deit").mkdir(parents=True)
    assert started_from(model) is None


def test_card_says_that_the_teachers_training_did_not_finish(student_folder):
    assert "not finished" not in str(make_card(student_folder))
    teacher = results(student_folder)["teacher"]
    change_results(student_folder, teacher=teacher | {"training": teacher["training"] | {"finished": False}})
    assert "whose training was not finished" in section(make_card(student_folder), "## Training")


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_without_a_record_there_are_no_numbers(tmp_path, kind):
    """A card without a record has no numbers: a converted checkpoint, or a folder of plain transformers."""
    if kind == "student":
        make_student(num_labels=3, class_counts=[90, 30, 5]).save_pretrained(tmp_path)
    else:
        FlatTeacherForImageClassification(FlatTeacherConfig(num_labels=3)).save_pretrained(tmp_path)
    card = ModelCard.load(write_card(tmp_path))
    assert card.data.eval_results is None
    assert "metrics" not in card.data.to_dict()
    assert "no record of a run" in section(card, "## Accuracy")
    assert tables(card.text) == []
    assert ("125 images, 90 to 5 per class" in card.text) == (kind == "student")
    loader = "DeiTLTForImageClassification" if kind == "student" else "FlatTeacherForImageClassification"
    assert f"{loader}.from_pretrained" in card.text


def test_without_test_images_there_is_no_table(tmp_path, digits):
    """A run without test images has no table of accuracies; a run from Python without a recipe lists its settings."""
    trainer = DeiTLTTrainer(
        model=make_student(),
        args=DeiTLTTrainingArguments(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=32,
            repeated_augmentation=1,
            distillation="none",
            alpha=0.25,
            warmup_epochs=0,
            eval_strategy="no",
            save_strategy="no",
        ),
        train_dataset=digits["train"],
    )
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(tags=["mine"])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.eval_results is None
    assert tables(section(card, "## Accuracy")) == []
    assert "nothing was measured" in section(card, "## Accuracy")
    assert "without a teacher" in card.text
    assert ["`alpha`", "`0.25`"] in tables(section(card, "## Training"))
    assert "- Recipe" not in card.text
    assert "mine" in card.data.tags


def test_a_card_written_by_the_user_is_not_overwritten(student_folder):
    readme = student_folder / "README.md"
    readme.write_text("# Mine\n")
    with pytest.warns(UserWarning, match="edited or not written by deitlt-hf"):
        write_card(student_folder)
    assert readme.read_text() == "# Mine\n"


def test_a_card_is_not_written_through_a_link(tmp_path):
    """A card that is a link, as in the Hub's cache, is replaced; the file that it points to stays unchanged."""
    make_student().save_pretrained(tmp_path)
    earlier = str(make_card(tmp_path))
    (tmp_path / "blob").write_text(earlier)
    (tmp_path / "README.md").symlink_to(tmp_path / "blob")
    assert "# name" in write_card(tmp_path, "org/name").read_text()
    assert (tmp_path / "blob").read_text() == earlier


def test_only_an_unedited_card_is_rewritten(student_folder):
    readme = write_card(student_folder, license="apache-2.0")
    change_results(student_folder, train_seconds=7)
    assert "0:00:07" in write_card(student_folder).read_text()
    assert is_generated(readme.read_text())
    edited = readme.read_text().replace("license: apache-2.0", "license: mit")
    readme.write_text(edited)
    with pytest.warns(UserWarning, match="is kept"):
        write_card(student_folder, "org/name")
    assert readme.read_text() == edited


def test_given_licence_and_tags_stay_in_a_rewritten_card(student_folder):
    change_results(student_folder, data=results(student_folder)["data"] | {"dataset": "zoo/photos"})
    write_card(student_folder, license="cc-by-nc-4.0", tags=["mine"], language="en")
    change_results(student_folder, data=results(student_folder)["data"] | {"dataset": "digits"}, finished=False)
    card = ModelCard.load(write_card(student_folder, "org/name"))
    assert (card.data.license, card.data.language) == ("cc-by-nc-4.0", "en")
    assert card.data.tags == ["vision", "deit-lt", "long-tailed", "distillation", "mine"]
    assert "The weights are under the licence `cc-by-nc-4.0`." in card.text
    assert (card.data.datasets, card.data.eval_results) == (None, None), "of the weights only what is so of these"
    card = ModelCard.load(write_card(student_folder, license="mit", tags=["mine", "new"]))
    assert (card.data.license, card.data.tags[4:]) == ("mit", ["mine", "new"])
    card = ModelCard.load(write_card(student_folder, license=None))
    assert card.data.license is None


def test_the_licence_of_the_start_is_that_of_the_model(student_folder, tmp_path, recwarn):
    """A derived model has the licence of its base; another one is named beside it, with a warning."""
    base = tmp_path / "base"
    make_student().save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n# A model\n")
    found = license_of_start(DeiTLTForImageClassification.from_pretrained(base))
    assert found == {"license": "other", "license_name": "mine", "license_link": "LICENSE"}
    change_results(student_folder, started_from_license=found, started_from="zoo/vit")
    card = ModelCard.load(write_card(student_folder))
    assert {name: card.data.to_dict()[name] for name in found} == found
    assert "model from which the training started, zoo/vit." in section(card, "## Licence")
    assert not recwarn.list
    with pytest.warns(UserWarning, match="the licence 'mit', but the training started from a model under 'other'"):
        card = make_card(student_folder, license="mit")
    assert card.data.license == "mit"
    assert "started from zoo/vit under the licence `other`, whose terms" in section(card, "## Licence")
    change_results(student_folder, started_from_license=None, started_from=None)
    assert ModelCard.load(write_card(student_folder)).data.license is None, "the licence was that of the former start"
    (base / "README.md").write_text("---\nlicense: [mit, gpl]\n---\n")
    assert license_of_start(DeiTLTForImageClassification.from_pretrained(base)) is None


def test_card_has_no_licence_unless_one_was_given(trained):
    for kind in ("student", "teacher"):
        card = ModelCard.load(trained / kind / "README.md")
        assert card.data.license is None
        assert "No licence is named for these weights" in section(card, "## Licence")
        assert "apache" not in str(card)


def test_class_names_are_printed_literally(tmp_path):
    names = ["<script>alert(1)</script>", "a | b", "*bold* _x_ `y`", "line\nbreak", "[link](http://x)", "A & B"]
    groups = {"head": [0, 1], "mid": [2, 3], "tail": [4, 5]}
    config = DeiTLTConfig(
        **make_student().config.to_diff_dict()
        | {"id2label": dict(enumerate(names)), "class_counts": [9, 8, 7, 6, 5, 4], "class_groups": groups}
    )
    DeiTLTForImageClassification(config).save_pretrained(tmp_path)
    card = ModelCard.load(write_card(tmp_path))
    _, _, head, mid, tail = tables(card.text)
    assert head[1:3] == ["&lt;script&gt;alert(1)&lt;/script&gt;, a  b", "2"]
    assert mid[1] == r"\*bold\* \_x\_ \`y\`, line break"
    assert tail[1] == r"\[link\](http://x), A &amp; B"


def test_a_card_with_thousands_of_classes_does_not_list_them(tmp_path):
    names = {label: f"species {label}" for label in range(2000)}
    groups = {"head": list(range(200)), "mid": list(range(200, 1000)), "tail": list(range(1000, 2000))}
    make_student(num_labels=2000, id2label=names, class_counts=[7] * 2000, class_groups=groups).save_pretrained(
        tmp_path
    )
    text = write_card(tmp_path).read_text()
    assert "species" not in text
    assert "| tail | 1,000 | 7,000 | 7 to 7 |" in text
    assert len(text.splitlines()) < 120


@pytest.mark.parametrize("kind", ["student", "teacher"])
def test_cards_do_not_install_from_pypi(trained, kind):
    """No card tells readers to install the package from PyPI. The name is free there, and anybody could register it."""
    text = section(ModelCard.load(trained / kind / "README.md"), "## Use")
    assert "pip install" not in text
    assert text.index("from transformers import") < text.index("from deitlt_hf import")
    assert "`deitlt_hf`, installed from its repository" in text


def test_invalid_input_raises_a_clear_message(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config.json; give the folder of a saved model."):
        make_card(tmp_path)
    make_student().save_pretrained(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match=r"results.json cannot be read"):
        make_card(tmp_path)


HOSTILE = "a|b `c` <script>alert(1)</script> *d* {{ 7*7 }} {% raw %}\n\n---\nlicense: mine\n# Owned\n```\n\x00\u202e"


@pytest.mark.parametrize("text", [HOSTILE, "x" * 100_000, "Käfer 🪲", "", "]( http://a )[", "$$x$$"])
def test_foreign_text_is_escaped(student_folder, text):
    """Names from data, recipes and external teachers are escaped for Markdown, HTML, YAML and the card's template."""
    record = results(student_folder)
    teacher = record["teacher"] | {"backbone": text, "source": text, "accuracies": {text: 0.5}}
    names = [f"{label} {text}" for label in range(10)]
    change_results(
        student_folder,
        recipe={"name": text, "overrides": {"data_dir": text}},
        data=record["data"] | {"dataset": text, "group_rule": text, "imbalance_type": text, "subset_sha256": text},
        teacher=teacher,
        settings=record["settings"] | {"auto_augment": text, text: text},
        hardware=record["hardware"] | {"device": text},
        versions={text: text},
        last=record["last"] | {"accuracies": {text: {"overall": 0.5, text: 0.25}}},
    )
    config = json.loads((student_folder / "config.json").read_text()) | {"hidden_size": text}
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}
    (student_folder / "config.json").write_text(json.dumps(config))
    (student_folder / "README.md").unlink(missing_ok=True)
    path = write_card(student_folder, license=text or "mit", tags=[text])
    card = path.read_text(encoding="utf-8")
    assert metadata_load(path)["license"] == (text or "mit")
    body = card.partition("\n---\n")[2]
    assert len(body) < 30_000
    prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "", body.replace("\\`", ""), flags=re.DOTALL | re.MULTILINE)
    for forbidden in ("<script", "\n# Owned", "\nlicense:", "\n---\n", " 49 "):
        assert forbidden not in prose
    assert not {"\x00", "\u202e"} & set(body)
    headings = [line for line in body.splitlines() if re.match("#{1,2} ", line)]
    assert headings[0].startswith("# DeiT-LT student")
    assert not any("Owned" in line for line in headings[1:])
    assert {len(row) for row in tables(section(card, "## Training"))} == {2}
    assert is_generated(card)
    older = card.replace("which regenerates it unless", "which writes it again unless")  # as an earlier version did
    assert older != card
    assert is_generated(older)
    assert not is_generated(older.replace("deitlt", "deit", 1))


@pytest.mark.parametrize(
    "config",
    [
        [1],
        None,
        "text",
        {"model_type": None},
        {"id2label": ["a"]},
        {"id2label": {"a": "b"}},
        {"class_counts": "many"},
        {"class_counts": [1, None]},
        {"class_groups": [1]},
        {"class_groups": {"head": ["a"]}},
        {"architectures": "x"},
    ],
)
def test_a_configuration_with_wrong_types_is_refused(tmp_path, config):
    content = {"model_type": "deit"} | config if isinstance(config, dict) else config
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"config\.json (cannot be read|has a \w+ that is not valid)"):
        make_card(tmp_path)


def test_command_writes_the_card_of_a_folder(student_folder, capsys):
    make_model_cards(["--model", str(student_folder), "--repo_id", "org/deitlt-tiny"])
    assert capsys.readouterr().out.strip() == str(student_folder / "README.md")
    assert "# deitlt-tiny" in (student_folder / "README.md").read_text()
    make_model_cards(["--model", str(student_folder), "--license", "cc-by-4.0", "--tags", "digits", "tiny"])
    metadata = metadata_load(student_folder / "README.md")
    assert (metadata["license"], metadata["tags"][-2:]) == ("cc-by-4.0", ["digits", "tiny"])
    with pytest.raises(ValueError, match=r"^--license needs --model, the folder"):
        make_model_cards(["--license", "mit"])
    with pytest.raises(ValueError, match="needs --model"):
        make_model_cards(["--repo_id", "org/deitlt-tiny"])
    with pytest.raises(ValueError, match=r"^--folder cards is for the recipes' cards"):
        make_model_cards(["--model", str(student_folder), "--folder", "cards"])


def test_command_does_not_report_a_card_that_it_did_not_write(student_folder, capsys):
    (student_folder / "README.md").write_text("# Mine\n")
    with pytest.warns(UserWarning, match="it is kept; move it"):
        make_model_cards(["--model", str(student_folder)])
    assert capsys.readouterr().out == ""


# ---- The repository's cards ----


def test_every_recipe_of_the_paper_has_a_card():
    of_the_paper = {name for name in recipe_names() if not name.endswith("_fast")}
    assert set(CARDS.values()) == of_the_paper - {"image_folder", "image_folder_small"}


@pytest.mark.parametrize("name", CARDS)
def test_the_papers_numbers_are_not_presented_as_measured(name):
    recipe = CARDS[name]
    card = recipe_card(recipe, name)
    assert card.data.eval_results is None
    assert "Not measured yet" in section(card, "### Measured")
    assert f"deitlt distill --recipe {recipe}" in card.text
    assert ("### Reported by the paper" in card.text) == (recipe in PAPER)
    if recipe in PAPER:
        assert tables(section(card, "## Accuracy"))[-1] == [f"{value:.1f}" for value in PAPER[recipe]]
        assert "with a PaCo + SAM teacher, at the best epoch on the test set" in section(card, "## Accuracy")
        assert "loss `paco`, SAM with rho 0.05, 400 epochs" in section(card, "## Training")
    student = load_recipe(recipe)["student"]
    assert f"{student['num_train_epochs']} epochs" in card.text


def test_measured_numbers_stand_next_to_the_papers(student_folder):
    record = results(student_folder)
    card = recipe_card("cifar10_lt_rho100", "deitlt-cifar10-lt-rho100", record)
    overall = record["last"]["accuracies"]["mean"]["overall"]
    assert card.data.eval_results[0].metric_value == overall
    assert 87.5 not in [entry.metric_value for entry in card.data.eval_results]
    rows = tables(section(card, "## Accuracy"))
    assert rows[2][0] == "87.5"
    assert rows[5][1] == f"{100 * overall:.1f}"


def test_codecarbons_energy_is_in_record_and_card(trained, student_folder):
    """Record and card contain the energy that codecarbon estimated.

    The file is from codecarbon 3.3; a resumed run has a row for each part.
    """
    header = "timestamp,run_id,duration,emissions,energy_consumed,country_name,country_iso_code,cpu_model\n"
    rows = (
        "2026-11-28T19:36:34,a,3.1,0.0012,0.02,Canada,CAN,EPYC\n2026-11-28T20:36:34,b,3.1,0.0003,0.01,Canada,CAN,EPYC\n"
    )
    (student_folder / "emissions.csv").write_text(header + rows)
    found = read_emissions(student_folder)
    assert found == {"energy_kwh": 0.03, "grams_co2eq": 1.5, "country": "Canada"}
    assert results(student_folder)["emissions"] is None
    assert "co2_eq_emissions" not in make_card(student_folder).data.to_dict()
    change_results(student_folder, emissions=found)
    card = ModelCard.load(write_card(student_folder))
    emissions = card.data.to_dict()["co2_eq_emissions"]
    assert (emissions["emissions"], emissions["source"], emissions["training_type"]) == (
        1.5,
        "codecarbon",
        "pre-training",
    )
    assert "0.03 kWh, 1.5 g CO2eq in Canada, as codecarbon estimates" in card.text
    change_results(student_folder, emissions=None)
    assert "co2_eq_emissions" not in make_card(student_folder).data.to_dict()


@pytest.mark.parametrize(
    "content", [b"", b"emissions\n1\n", b"energy_consumed,emissions,country_name\nx,1,A\n", b"\xff\xfe"]
)
def test_a_damaged_codecarbon_log_does_not_stop_a_run(tmp_path, content):
    (tmp_path / "emissions.csv").write_bytes(content)
    with pytest.warns(UserWarning, match="cannot be read"):
        assert read_emissions(tmp_path) is None

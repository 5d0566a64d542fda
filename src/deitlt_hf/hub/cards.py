"""Writes model cards: the `README.md` of a model folder, from the record of its run, and the cards of recipes."""

import hashlib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.utils import validate_repo_id

from ..io import atomic_write, one_line, read_json
from ..model_folder import CURVES_FILE, weights_digest
from ..recipes import DataArguments, StudentArguments, load_recipe, paper_accuracies
from ..records import RESULTS_FILE, RunRecord, find_record
from ..serving.classifiers import check_config
from .card_facts import LICENSE_FIELDS, CardFacts
from .markdown import code, plain, quoted, table

CARD_FILE = "README.md"
# The last line of a card holds the digest of the text before it. Earlier versions worded the rest differently.
_MARKER = "<!-- Written by deitlt-hf, which regenerates it unless somebody edits it:"
_LAST_LINE = re.compile(r"<!-- Written by deitlt-hf, [^:\n]*: (\w+) -->\n\Z")
_TAGS = ("vision", "deit-lt", "long-tailed")
_KIND_TAGS = {"teacher": "sam", "student": "distillation"}
# Also identifies a licence that an earlier card took over, see given_metadata.
_OF_START = "This is the licence of the model from which the training started"
# Metadata about the weights: in an earlier card they may describe other weights, so they are not kept.
_OF_WEIGHTS = ("base_model", "base_model_relation", "co2_eq_emissions", "datasets", "metrics", "model-index")


def make_card(folder: str | Path, repo_id: str | None = None, name: str | None = None, **metadata: Any) -> ModelCard:
    """Makes the card of a saved student or teacher.

    The numbers are from `results.json`. The card has no numbers if that file is missing, or does not belong to the
    weights in the folder.

    Args:
        folder: The model folder.
        repo_id: Hub repository of the model; the code in the card loads the model from there.
        name: The heading; by default the name of the repository.
        **metadata: Fields of [`~huggingface_hub.ModelCardData`], such as `license` or `tags`. Tags are added to the
            card's default tags. Without a `license`, the card has that of the model from which the training started,
            if it is known, and otherwise says that no licence is named. With another one, it names both, and warns.

    Raises:
        FileNotFoundError: If the folder has no model.
        ValueError: If `repo_id` is not a valid repository name, or a file is corrupt.
    """
    folder = Path(folder)
    if repo_id is not None:
        validate_repo_id(repo_id)
    config = read_config(folder)
    record = _own_record(folder)
    is_recorded = record is not None
    facts = CardFacts(record or {}, config)
    if name is None:
        name = repo_id.split("/")[-1] if repo_id else _title(facts)
    return _render(
        facts,
        name,
        metadata,
        location=repo_id or (folder.name if folder.is_absolute() else folder.as_posix()),
        is_recorded=is_recorded,
        has_other_record=(folder / RESULTS_FILE).is_file() and not is_recorded,
        curves=CURVES_FILE if is_recorded and (folder / CURVES_FILE).is_file() else None,
    )


def eval_results_file(folder: str | Path) -> bytes | None:
    """Makes a file for `.eval_results` with the accuracy; the Hub shows it on the pages of the model and the data set.

    Returns YAML; None unless a finished run measured the accuracy of these weights on a data set from the Hub.
    """
    folder = Path(folder)
    facts = CardFacts(_own_record(folder) or {}, read_config(folder))
    accuracy = facts.prediction.get("overall")
    if not (facts.is_finished and facts.hub_dataset) or accuracy is None:
        return None
    entry = EvalResultEntry(
        dataset_id=facts.hub_dataset,
        task_id="image_classification",
        value=round(100 * accuracy, 2),
        notes=one_line(f"accuracy in % on the test images; trained on {facts.dataset}, one run, one seed"),
    )
    return yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True).encode()


def recipe_card(recipe: str, name: str, results: Mapping[str, Any] | None = None) -> ModelCard:
    """Makes the card of the student that a recipe trains. Numbers of the paper and measured numbers are separate.

    `results` is the content of the student's `results.json`; None if the student was not measured.
    """
    paper = paper_accuracies(recipe)
    planned, results = _planned(recipe), results or {}
    recorded = {**planned, **results, "data": planned["data"] | results.get("data", {})}
    return _render(
        CardFacts(recorded, {}),
        name,
        {"license": "apache-2.0"},
        location=f"outputs/{recipe}/student",
        is_recorded=True,
        is_recipe=True,
        paper=paper and table(paper.rows()),
    )


def write_card(folder: str | Path, repo_id: str | None = None, name: str | None = None, **metadata: Any) -> Path | None:
    """Writes the card of [`make_card`] into the folder, unless a user wrote or edited the card there.

    Metadata that were given for an earlier card, such as licence and tags, stay unless other values are given; a
    `license` of None removes the licence, except that of the model from which the training started.

    Returns:
        Path of the card; None if the existing card was kept.
    """
    path = Path(folder) / CARD_FILE
    before = given_metadata(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return save_card(make_card(folder, repo_id, name, **join_metadata(before, metadata)), path)


def given_metadata(text: str) -> dict[str, Any]:
    """Returns the metadata that a user gave for a generated card; empty if the card was edited.

    Metadata about the weights, default tags, and the licence of the model to start from are left out.
    """
    if not is_generated(text):
        return {}
    others = (*_OF_WEIGHTS, *(LICENSE_FIELDS if _OF_START in text else ()))
    given = {name: value for name, value in ModelCard(text).data.to_dict().items() if name not in others}
    own = {*_TAGS, *_KIND_TAGS.values()}
    return given | {"tags": [tag for tag in given.get("tags", []) if tag not in own]}


def join_metadata(*several: Mapping[str, Any]) -> dict[str, Any]:
    """Merges metadata. A later value overrides an earlier one, but tags are joined."""
    tags = [tag for metadata in several for tag in _listed(metadata.get("tags"))]
    joined = {name: value for metadata in several for name, value in metadata.items()}
    return joined | {"tags": list(dict.fromkeys(tags))}


def save_card(card: ModelCard, path: Path) -> Path | None:
    """Writes a card and returns its path. If a user wrote or edited the file, warns, keeps it and returns None."""
    if path.is_file() and not is_generated(path.read_text(encoding="utf-8")):
        warnings.warn(
            f"{path} was edited or not written by deitlt-hf, so it is kept; move it to generate a new card.",
            stacklevel=2,
        )
        return None
    with atomic_write(path) as part:
        card.save(part)
    return path


def is_generated(text: str) -> bool:
    """Whether a card is exactly as this package wrote it: its last line holds the digest of the text before it."""
    last = _LAST_LINE.search(text)
    return last is not None and last[1] == _digest(text[: last.start()])


def _render(facts: CardFacts, name: str, metadata: Mapping[str, Any], **about: Any) -> ModelCard:
    template = files(__package__).joinpath("model_card_template.md").read_text(encoding="utf-8")
    words = {"plain": plain, "code": code, "quoted": quoted, "table": table}
    values = {"facts": facts, "heading": plain(name), "is_recipe": False, **words, **about}
    base = facts.base_license.get("license")
    if base is not None and metadata.get("license") in (None, base):
        metadata = {**metadata, **facts.base_license}
        values["of_start"] = _OF_START
    elif base is not None:
        warnings.warn(
            f"the card names the licence {one_line(metadata['license'], 60)!r}, but the training started from a model "
            f"under {base!r}, whose terms also hold for these weights; check that both allow it.",
            stacklevel=2,
        )
    card = ModelCard.from_template(_metadata(facts, name, metadata), template_str=template, **values)
    card.text = re.sub(r"\n{3,}", "\n\n", card.text)
    card.text += _signature(str(card))
    return card


def _metadata(facts: CardFacts, name: str, given: Mapping[str, Any]) -> ModelCardData:
    own: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "datasets": facts.hub_dataset and [facts.hub_dataset],
        "metrics": ["accuracy"] if facts.evaluation else None,
    }
    if facts.base_model:
        own |= {"base_model": facts.base_model, "base_model_relation": "finetune"}
    emissions = facts.results.get("emissions")
    if emissions:
        own["co2_eq_emissions"] = {
            "emissions": emissions["grams_co2eq"],
            "source": "codecarbon",
            "training_type": "fine-tuning" if facts.base_model or facts.overrides.get("init_from") else "pre-training",
            "geographical_location": one_line(emissions["country"]),
            **({"hardware_used": one_line(facts.results["hardware"]["device"])} if facts.hardware else {}),
        }
    results = _eval_results(facts) if facts.is_finished else []
    if results:
        own |= {"model_name": name, "eval_results": results}
    kind = [_KIND_TAGS["student"]] if not facts.is_teacher else [_KIND_TAGS["teacher"]] * facts.is_flat
    tags = {"tags": [*_TAGS, *kind]}
    return ModelCardData(**own | join_metadata(tags, given))


def _listed(tags: str | Sequence[str] | None) -> Sequence[str]:
    return [tags] if isinstance(tags, str) else tags or []


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    """Returns all measured accuracies, for the `model-index` that the Hub reads."""
    dataset = facts.data.get("dataset") or "custom"
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset,
            dataset_name=one_line(facts.dataset or dataset),
            dataset_split="test",
            metric_type="accuracy",
            metric_name=f"{expert}, {group}",
            metric_value=accuracy,
        )
        for expert, row in facts.accuracies.items()
        for group, accuracy in row.items()
        if accuracy is not None
    ]


def _planned(recipe: str) -> dict[str, Any]:
    """Returns the record that a run of a recipe will have before its first evaluation."""
    content = load_recipe(recipe)
    data = DataArguments(**content["data"])
    sizes = {field.name for field in fields(StudentArguments)}
    student, teacher = content["student"], content["teacher"]
    is_at_hand = data.dataset == DataArguments.dataset or "/" in data.dataset
    rule = data.group_boundaries and f"classes sorted by count, cut at {list(data.group_boundaries)}"
    return {
        "recipe": {"name": recipe, "overrides": {}},
        "data": data.record() | {"local_files": not is_at_hand, "group_rule": rule},
        "architecture": asdict(StudentArguments(**{name: student[name] for name in student if name in sizes})),
        "settings": {name: value for name, value in student.items() if name not in sizes},
        "teacher": {"backbone": teacher["backbone"], "training": {"settings": teacher}},
    }


def _title(facts: CardFacts) -> str:
    kind = "DeiT-LT student"
    if facts.is_teacher:
        kind = "Teacher of DeiT-LT" if facts.is_frozen else "Flat teacher of DeiT-LT"
    return f"{kind}, {facts.dataset}" if facts.dataset else kind


def _own_record(folder: Path) -> RunRecord | None:
    """Reads the record of the run in a folder; None if there is none, or it belongs to other weights."""
    record = find_record(folder)
    digest = None if record is None else record.get("weights_sha256")
    return record if digest is not None and digest == weights_digest(folder) else None


def read_config(folder: Path) -> dict[str, Any]:
    """Reads and checks the configuration of a model folder.

    Raises:
        FileNotFoundError: If the folder has no configuration.
        ValueError: If the configuration cannot be read, or a field for the card has a type that no saved model has.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json; give the folder of a saved model.")
    config = read_json(path)
    check_config(config, str(path))
    return config


def _signature(body: str) -> str:
    return f"{_MARKER} {_digest(body)} -->\n"


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]

"""Pushes model folders to the Hugging Face Hub: checks the folder, selects its files, and commits them."""

import contextlib
import json
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token, hf_hub_url

# HTTPError is the base class of the exceptions of httpx (huggingface_hub 1.x) or httpx2 (2.x).
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RemoteEntryNotFoundError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id
from safetensors import SafetensorError, safe_open

from ..io import one_line, read_json
from ..model_folder import CURVES_FILE, EMA_FOLDER, LOG_FILE, STAGING, check_link, weight_files, weights_digest
from ..records import RESULTS_FILE, find_record
from ..serving.onnx import MODEL_FILE, QUANTIZED_FILE
from .cards import (
    CARD_FILE,
    eval_results_file,
    given_metadata,
    is_generated,
    join_metadata,
    read_config,
    write_card,
)
from .handler_file import add_handler, check_handler

_MODEL = ("config.json", "preprocessor_config.json")
_HEAD = "classifier.weight"
_INDEX = "model.safetensors.index.json"
_WEIGHTS = ("model.safetensors", _INDEX, "model-*-of-*.safetensors")
_CODE = ("configuration_*.py", "modeling_*.py")
_OWN_CODE = tuple(pattern.replace("*", name) for pattern in _CODE for name in ("deitlt", "flat_teacher"))
EVAL_FILE = ".eval_results/deitlt-hf.yaml"
_RUN = (RESULTS_FILE, LOG_FILE, CURVES_FILE)
_REPORT = ("report/index.html", "report/report.json", "report/*.png")
# The only files that are pushed, in addition to the weights that the model loads. Checkpoints, optimiser states,
# pickles and hidden files are not in this list, so they are never uploaded.
PUBLISHED = (
    *(place + name for place in ("", f"{EMA_FOLDER}/") for name in _MODEL + _CODE),
    CARD_FILE,
    *_RUN,
    "handler.py",
    "onnx/*.onnx",
    *_REPORT,
)
# Files that a push removes from the repository if the folder does not have them. The list has only names that this
# package writes: such a file is left from a push of another model.
_REPLACED = (
    *(place + name for place in ("", f"{EMA_FOLDER}/") for name in _MODEL + _WEIGHTS + _OWN_CODE),
    CARD_FILE,
    *_RUN,
    MODEL_FILE,
    QUANTIZED_FILE,
    *_REPORT,
    EVAL_FILE,
)
_TOKENS = "https://huggingface.co/settings/tokens"


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload model",
    card: bool = True,
    overwrite_card: bool = False,
    handler: bool = False,
    **metadata: Any,
) -> CommitInfo:
    """Pushes a model folder to the Hub in one commit: if the push fails, the repository is not changed.

    The push includes the weights, the files in `PUBLISHED`, and the accuracy in the Hub's format
    ([`eval_results_file`]). It leaves out a record, ONNX files and a report that belong to other weights.

    A file in the repository with a name in `_REPLACED` that the folder does not have is deleted: it is from an earlier
    push, and would belong to another model. All other files stay. A push can be repeated: weights that are already on
    the Hub are not sent again, and without changes there is no commit.

    Args:
        folder: A student or teacher with its image processor, as the trainers and `convert` save them.
        repo_id: Repository, ORG/NAME; it is created if it does not exist.
        private: Make a new repository private. None uses the default of the organisation.
        revision: Branch to push to; it is created if it does not exist. By default `main`.
        token: A token with write access. By default HF_TOKEN, or the token of `hf auth login`.
        commit_message: First line of the commit.
        card: Write the card of the folder first, with [`write_card`].
        overwrite_card: Replace a card in the repository that a user wrote or edited there. By default it stays.
        handler: Write `handler.py` first, with [`add_handler`].
        **metadata: Metadata of the card, such as `license` or `tags`. Values that are not given are taken from the card
            in the folder, or else from the card in the repository.

    Raises:
        FileNotFoundError: If the folder or a file of the model is missing.
        FileExistsError: If a handler is requested, and the folder has another one.
        ValueError: If a file is corrupt or a link to a file elsewhere, the run is not finished, the folder is being
            written, `repo_id` is not valid, the repository has a model of another type, no handler could load the
            model, or metadata are given without a card to write.
        OSError: If the Hub cannot be reached, or the token has no write access.
    """
    folder = Path(folder)
    check_folder(folder)
    if metadata and not card:
        raise ValueError(f"card=False writes no card, so leave {', '.join(metadata)} out.")
    if handler:
        check_handler(folder)
    model_type = read_config(folder)["model_type"]
    repo_id = prepare_repository(repo_id, private=private, revision=revision, token=token, model_type=model_type)
    if handler:
        add_handler(folder)
    api = _api(token)
    with _one_sentence(repo_id):
        there = _text(api, repo_id, CARD_FILE, revision)
    if card:
        # The metadata of both cards stay: a user may have set the licence or tags on the Hub or here.
        before = [given_metadata(text) for text in (there, _own_card(folder)) if text is not None]
        write_card(folder, repo_id, **join_metadata(*before, metadata))
    contents = _contents_to_push(folder)
    is_of_others = there is not None and not is_generated(there) and there != _own_card(folder)
    kept = {CARD_FILE} if is_of_others and not overwrite_card else set()
    if kept:
        warnings.warn(
            f"the card of {repo_id} was written or edited there, so it is kept; --overwrite_card replaces it.",
            stacklevel=2,
        )
    with _one_sentence(repo_id):
        stale = {name for name in api.list_repo_files(repo_id, revision=revision) if _matches(name, _REPLACED)}
        # upload_folder with hf_xet would split a large folder into several commits.
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationDelete(name) for name in sorted(stale - contents.keys() - kept)),
                *(CommitOperationAdd(name, contents[name]) for name in sorted(contents.keys() - kept)),
            ],
            commit_message=commit_message,
            revision=revision,
        )


def prepare_repository(
    repo_id: str | None,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    model_type: str | None = None,
) -> str:
    """Creates a repository and its branch if they do not exist, and checks that a push to them will be accepted.

    The arguments are those of [`push_folder`], and the `model_type` of the configuration to push, if it is known.

    Returns:
        The full name of the repository. A name without an organisation becomes a repository of the user.

    Raises:
        ValueError: If `repo_id` is not a valid repository name, `private` is given but the repository is public, or the
            repository has a model of another type.
        OSError: If there is no token, the token has no write access, or the Hub cannot be reached.
    """
    if not repo_id:
        raise ValueError("no repository is given to push to; name it as ORG/NAME (in training, --hub_model_id).")
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"{repo_id!r} is not a valid repository name; give it as ORG/NAME.") from error
    api = _api(token)
    if api.token is None:
        raise PermissionError(f"there is no token for a push to {repo_id}; run 'hf auth login' or set HF_TOKEN.")
    with _one_sentence(repo_id):
        api.whoami()  # fails for an invalid token, so a failure below means that write access is missing
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)
        # `exist_ok` also accepts a repository that is public although `private` is requested.
        is_public = not api.repo_info(repo_id).private
        has_branch = revision is None or api.revision_exists(repo_id, revision)
        config = json.loads(_text(api, repo_id, "config.json", revision if has_branch else None) or "null")
    other = config.get("model_type") if isinstance(config, dict) else None
    if private and is_public:
        raise ValueError(f"{repo_id} is public; make it private in its settings on the Hub, or push to another.")
    if model_type and other and model_type != other:
        raise ValueError(
            f"{repo_id} has a model of type {other!r}, but this is a {model_type!r}; push it to another repository."
        )
    if revision is not None and not has_branch:
        with _one_sentence(repo_id):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def check_folder(folder: str | Path) -> None:
    """Checks that a folder holds a complete model that can be loaded, from a finished run, without links to outside.

    Raises:
        FileNotFoundError: If the folder or a file is missing.
        ValueError: If a file is corrupt or a link to a file elsewhere, the run in the folder is not finished, or the
            model is being written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no model folder {str(folder)!r}.")
    for place in _places(folder):
        _check_model(place)
    for name in sorted(_published(folder)):
        check_link(folder / name, folder)
    record = find_record(folder)
    if record is not None and record.get("finished") is False:
        raise ValueError(
            f"the run in {folder} is not finished; resume it with --resume_from_checkpoint auto, and then push it."
        )


def _places(folder: Path) -> list[Path]:
    """Returns the folders with a model: the folder itself, and [`EMA_FOLDER`] in it if it holds the moving average."""
    average = folder / EMA_FOLDER
    return [folder, average] if (average / "config.json").exists() or weight_files(average) else [folder]


def _check_model(folder: Path) -> None:
    # While files are replaced, or after a process was killed meanwhile, the folder mixes files of two models.
    staged = folder / STAGING / "model"
    if staged.exists():
        raise ValueError(
            f"a model is being saved in {folder}, or its saving was interrupted; wait for it, or save the model there "
            f"again. If the other files there are complete, remove {staged.parent}."
        )
    for name in _MODEL:
        if not (folder / name).is_file():
            raise _incomplete(folder, name)
    config = read_config(folder)
    named = len(config.get("id2label") or range(2))  # transformers does not save its default of two classes
    for name, number in _head_sizes(folder).items():
        if number != named:
            raise ValueError(f"{folder} names {named} classes, but {name} has {number}; save the model again.")
    references = config.get("auto_map") or {}
    if not isinstance(references, dict):
        raise ValueError(f"auto_map in {folder / 'config.json'} is not a JSON object; save the model again.")
    for reference in references.values():
        if isinstance(reference, str) and "--" not in reference:  # else the code is in another repository
            name = f"{reference.partition('.')[0]}.py"
            if not (folder / name).is_file():
                raise _incomplete(folder, name)


def _head_sizes(folder: Path) -> dict[str, int]:
    """Number of classes of each head, by the name of its weight; checks that all files of the weights are complete."""
    sizes: dict[str, int] = {}
    for path in weight_files(folder) or [folder / "model.safetensors"]:
        if path.suffix != ".safetensors":
            raise ValueError(
                f"{path} is a pickle, which could run code where it is loaded; load the model and save it again, as "
                "safetensors."
            )
        if not path.is_file():
            raise _incomplete(folder, path.name)
        try:
            with safe_open(path, "np") as file:
                found = set(file.keys())
                sizes |= {name: file.get_slice(name).get_shape()[0] for name in found if name.endswith(_HEAD)}
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}); save the model again.") from error
        lacking = sorted(_indexed(folder, path.name) - found)
        if lacking:
            raise ValueError(f"{path} lacks {lacking[0]!r}, which {_INDEX} lists for it; save the model again.")
    return sizes


def _incomplete(folder: Path, name: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"{folder} is not a complete model folder: {name} is missing; save model and image processor there again."
    )


def _indexed(folder: Path, shard: str) -> set[str]:
    """Returns the tensors that the index lists for a shard; empty for a model in one file."""
    if shard == "model.safetensors":
        return set()
    return {name for name, file in read_json(folder / _INDEX)["weight_map"].items() if file == shard}


def _published(folder: Path) -> set[str]:
    """Returns the names of the existing files that match `PUBLISHED`, and of the weights.

    The weights are not a pattern: shards of an earlier model, which the index does not name, must not be published.
    """
    paths = [path for pattern in PUBLISHED for path in folder.glob(pattern)]
    for place in _places(folder):
        weights = weight_files(place)
        paths += weights
        if [path.name for path in weights] != ["model.safetensors"]:
            paths.append(place / _INDEX)
    return {path.relative_to(folder).as_posix() for path in paths if path.is_file() and path.name[0] != "."}


def _contents_to_push(folder: Path) -> dict[str, Path | bytes]:
    """Contents by their name in the repository; warns about files that are left out because of other weights."""
    found = _published(folder)
    digest = weights_digest(folder)
    digest_files = {name: _digest_file(name) for name in found}
    of_others = {
        file
        for file in set(digest_files.values())
        if file is not None
        and not (digest and (folder / file).is_file() and digest.encode() in (folder / file).read_bytes())
    }
    left_out = {name for name in found if digest_files[name] in of_others}
    if left_out:
        shown = sorted({"report/" if name.startswith("report/") else name for name in left_out})
        warnings.warn(
            f"left out, because they may belong to other weights than those in {folder}: {', '.join(shown)}; train, "
            "export or analyze again.",
            stacklevel=3,
        )
    evaluated = eval_results_file(folder)
    return {name: folder / name for name in found - left_out} | ({} if evaluated is None else {EVAL_FILE: evaluated})


def _digest_file(name: str) -> str | None:
    """Returns the file with the digest of the weights to which a file belongs; None if it belongs to no weights."""
    if _matches(name, _RUN):
        return RESULTS_FILE
    return {"onnx": name, "report": "report/report.json"}.get(name.partition("/")[0])


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a path matches one of the patterns; unlike in fnmatch, a star does not match a slash."""
    return any(PurePosixPath("/", name).match(f"/{pattern}") for pattern in patterns)


def _own_card(folder: Path) -> str | None:
    """Returns the text of a folder's card; None if there is no card."""
    path = folder / CARD_FILE
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _text(api: HfApi, repo_id: str, name: str, revision: str | None) -> str | None:
    """Reads a text file of a repository; None if the file does not exist."""
    # hf_hub_download would return its cached file if the Hub cannot be reached.
    url = hf_hub_url(repo_id, name, revision=revision)
    response = get_session().get(url, headers=build_hf_headers(token=api.token))
    try:
        hf_raise_for_status(response)
    except RemoteEntryNotFoundError:
        return None
    return response.content.decode(errors="replace")


def _api(token: str | None) -> HfApi:
    return HfApi(token=token or get_token(), library_name="deitlt-hf", library_version=version("deitlt-hf"))


@contextlib.contextmanager
def _one_sentence(repo_id: str) -> Iterator[None]:
    """Reports a failed request to the Hub in one sentence.

    Raises:
        OSError: Instead of the exceptions of huggingface_hub.
    """
    try:
        yield
    # ValueError: huggingface_hub raises it for answers that it cannot use (its `lfs.py`), json for a proxy's page.
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        cause: BaseException = error
        # huggingface_hub wraps the cause in a RuntimeError, "Error while uploading ...".
        while isinstance(cause, RuntimeError) and cause.__cause__ is not None:
            cause = cause.__cause__
        raise OSError(f"{repo_id} was not pushed: {_reason(cause)}.") from cause


def _reason(error: BaseException) -> str:
    words = one_line(getattr(error, "server_message", None) or error).rstrip(".")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return f"the token is not valid; create one at {_TOKENS}, and give it to 'hf auth login' or set HF_TOKEN"
        if status == 403:
            return f"the token has no write access ({words}); change that at {_TOKENS}, or push elsewhere"
        return f"the Hub answered {status} ({words}); uploaded files are not sent again if you repeat the push"
    if isinstance(error, HTTPError):
        return f"the Hub was not reached ({words}); uploaded files are not sent again if you repeat the push"
    return words

"""Model folders on the Hugging Face Hub: what of a folder goes up, and what must be in order first."""

import contextlib
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, get_token

# The base of what httpx raises (huggingface_hub 1.x), or httpx2 (2.x).
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from .cards import write_card

_MODEL = (
    "config.json",
    "preprocessor_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    "configuration_*.py",
    "modeling_*.py",
)
# All that is ever pushed. Checkpoints, optimiser states, pickles and hidden files are not in this list, so they stay.
PUBLISHED = (
    *_MODEL,
    *(f"ema/{name}" for name in _MODEL),
    "README.md",
    "results.json",
    "log.jsonl",
    "training_curves.png",
    "handler.py",
    "onnx/*.onnx",
    "onnx/*.onnx.data",
    "onnx/*.onnx_data",
    "onnx/*.json",
    "report/*.html",
    "report/*.json",
    "report/*.png",
)
_NEVER = (".*", "*/.*", "checkpoint-*")
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
) -> CommitInfo:
    """Puts a model folder on the Hub in one commit: the repository then has all of it, or else what it had.

    What goes up is in `PUBLISHED`; such files that the folder has not are removed from the repository, where they would
    belong to another model. A push that was interrupted, or is not needed, can be repeated: weights that are on the Hub
    are not sent again, and without a change there is no commit.

    Args:
        folder: A student or teacher with its image processor, as the trainers and `convert` save them.
        repo_id: Repository, ORG/NAME; it is made if there is none.
        private: Make a new repository private. None: as is usual for the organisation.
        revision: Branch to push to; it is made if there is none. By default `main`.
        token: A token that may write there. By default HF_TOKEN, or the one of `hf auth login`.
        commit_message: First line of the commit.
        card: Write the folder's card first, as [`write_card`] does.

    Raises:
        FileNotFoundError: If the folder or a file of the model is missing.
        ValueError: If a file is damaged, its run is not finished, or `repo_id` is none.
        OSError: If the Hub cannot be reached, or the token may not write there.
    """
    check_folder(folder)
    repo_id = prepare_repository(repo_id, private=private, revision=revision, token=token)
    if card:
        write_card(folder, repo_id)
    with _one_sentence(repo_id):
        return _api(token).upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            revision=revision,
            allow_patterns=list(PUBLISHED),
            ignore_patterns=list(_NEVER),
            delete_patterns=list(PUBLISHED),
        )


def prepare_repository(
    repo_id: str | None, *, private: bool | None = None, revision: str | None = None, token: str | None = None
) -> str:
    """Makes a repository and its branch if they are missing, and makes sure that a push to them will be let in.

    Takes what [`push_folder`] takes.

    Returns:
        The full name of the repository; one without an organisation is the user's own.

    Raises:
        ValueError: If `repo_id` is no name of a repository, or `private` is wanted of one that is public.
        OSError: If there is no token, it may not write there, or the Hub cannot be reached.
    """
    if not repo_id:
        raise ValueError("no repository is given to push to; name it as ORG/NAME (in training, --hub_model_id).")
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(f"{repo_id!r} is no name of a repository; give it as ORG/NAME.") from error
    api = _api(token)
    if api.token is None:
        raise PermissionError(f"there is no token to push to {repo_id} with; run 'hf auth login' or set HF_TOKEN.")
    with _one_sentence(repo_id):
        api.whoami()  # tells a token that is not valid from one that may not write
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)
        is_public = not api.repo_info(repo_id).private
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    if private and is_public:
        raise ValueError(f"{repo_id} is public; make it private in its settings on the Hub, or push to another.")
    return repo_id


def check_folder(folder: str | Path) -> None:
    """Checks that a folder holds a whole model that loads in all ways, and the results of no other.

    Raises:
        FileNotFoundError: If the folder or a file is missing.
        ValueError: If weights are damaged, or the run in the folder is not finished.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no model folder {str(folder)!r}.")
    for name in _needed_files(folder):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} is no whole model folder: {name} is missing; save model and image processor there again."
            )
    for path in folder.glob("model*.safetensors"):
        try:
            with safe_open(path, "np"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}); save the model again.") from error
    results = folder / "results.json"
    if results.is_file() and json.loads(results.read_text()).get("finished") is False:
        raise ValueError(
            f"the run in {folder} is not finished; go on with --resume_from_checkpoint auto, and push its end."
        )


def _needed_files(folder: Path) -> Iterator[str]:
    yield "config.json"
    yield "preprocessor_config.json"
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        yield from sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        yield "model.safetensors"
    for reference in PreTrainedConfig.get_config_dict(folder)[0].get("auto_map", {}).values():
        if "--" not in reference:  # else the code is in another repository
            yield f"{reference.partition('.')[0]}.py"


def _api(token: str | None) -> HfApi:
    return HfApi(token=token or get_token(), library_name="deitlt-hf", library_version=version("deitlt-hf"))


@contextlib.contextmanager
def _one_sentence(repo_id: str) -> Iterator[None]:
    """Says in one sentence what went wrong on the way to the Hub.

    Raises:
        OSError: In place of what huggingface_hub raises.
    """
    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        while isinstance(error, RuntimeError) and error.__cause__ is not None:  # "Error while uploading ..."
            error = error.__cause__
        raise OSError(f"{repo_id} was not pushed: {_reason(error)}.") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        words = _line(error.server_message or str(error))
        if status == 401:
            return f"the token is not valid; make one at {_TOKENS}, and give it to 'hf auth login' or set HF_TOKEN"
        if status == 403:
            return f"the token may not write there ({words}); give it write access at {_TOKENS}, or push elsewhere"
        return f"the Hub answered {status} ({words}); what it has got is not sent again if you repeat the push"
    if isinstance(error, HTTPError):
        return f"the Hub was not reached ({_line(error)}); what it has got is not sent again if you repeat the push"
    return _line(error)


def _line(message: object) -> str:
    return " ".join(str(message).split()).rstrip(".")

"""Pushes the finished model of a training run to the Hugging Face Hub."""

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo

from ..hub.pushing import push_folder
from .arguments import LongTailTrainingArguments
from .output_folder import run_files

if TYPE_CHECKING:
    from .trainer import LongTailTrainer


def push_trained(
    trainer: "LongTailTrainer", message: str, options: Mapping[str, Any], card: Mapping[str, Any]
) -> CommitInfo | None:
    """Saves the model of a trainer, and pushes it in one commit with its card, without checkpoints.

    Every process must call it; see [`LongTailTrainer.push_to_hub`] for results and errors. `options` are those of
    [`hub_options`], `card` has the parameters of `create_model_card`.
    """
    args = trainer.args
    if trainer.state.global_step == 0 and run_files(args.output_dir):
        raise FileExistsError(
            f"{args.output_dir} holds a model, and this trainer trained no new one; push the existing model "
            f"with: {_command(args, options)}"
        )
    trainer.accelerator.wait_for_everyone()  # otherwise another process could find the model that the first one saves
    trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
    trainer.save_model(_internal_call=True)
    if not trainer.is_world_process_zero():
        return None
    try:
        if trainer.hub_model_id is None:
            trainer.init_hf_repo(options["token"], options["private"])
        assert trainer.hub_model_id is not None  # set by `init_hf_repo`
        trainer.create_model_card(**card)
        # `push_folder` writes the card again, with the licence and tags of the card in the repository.
        name = card.get("model_name")
        commit = push_folder(args.output_dir, trainer.hub_model_id, commit_message=message, name=name, **options)
    except OSError as error:
        raise OSError(
            f"{error} The model is saved in {args.output_dir}; to push it later: {_command(args, options)}"
        ) from error
    print(f"The model is on the Hub: {commit.repo_url}", flush=True)
    return commit


def hub_options(
    args: LongTailTrainingArguments, token: str | None = None, private: bool | None = None, revision: str | None = None
) -> dict[str, Any]:
    """Options of a push: the given values, or those of the training arguments."""
    return {
        "private": args.hub_private_repo if private is None else private,
        "revision": revision or args.hub_revision,
        "token": token or args.hub_token,
    }


def _command(args: LongTailTrainingArguments, options: Mapping[str, Any]) -> str:
    """Command line that pushes to the same repository, without the token."""
    words = ["deitlt", "push", args.output_dir, args.hub_model_id or "ORG/NAME"]
    if options["private"]:
        words.append("--private")
    if options["revision"] is not None:
        words += ["--revision", options["revision"]]
    return shlex.join(words)

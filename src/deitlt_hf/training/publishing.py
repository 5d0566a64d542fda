"""Pushes the finished model of a training run to the Hugging Face Hub."""

import shlex
from collections.abc import Mapping
from typing import Any

from huggingface_hub import CommitInfo
from transformers import PreTrainedModel, Trainer

from ..hub.pushing import prepare_repository, push_folder
from .arguments import LongTailTrainingArguments
from .output_folder import run_files


class PublishingTrainer(Trainer):
    """A [`~transformers.Trainer`] that pushes its model in one commit with [`push_folder`], without checkpoints.

    With `push_to_hub` in its arguments, it creates the repository and checks the write permission before training.
    """

    args: LongTailTrainingArguments
    model: PreTrainedModel
    hub_model_id: str | None  # type: ignore[assignment]

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Creates the repository `args.hub_model_id` if it does not exist, and checks that it can be pushed to.

        Raises:
            ValueError: If `hub_model_id` is not a valid repository name, or the repository holds a model of another
                type.
            OSError: If the repository cannot be pushed to.
        """
        if self.is_world_process_zero():
            self._make_repository(token, private)

    def _make_repository(self, token: str | None, private: bool | None) -> str:
        options = hub_options(self.args, token, private)
        model_type = self.model.config.model_type
        self.hub_model_id = prepare_repository(self.args.hub_model_id, model_type=model_type, **options)
        return self.hub_model_id

    def push_to_hub(  # type: ignore[override]  # only the main process has a commit
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card,
    ) -> CommitInfo | None:
        """Saves the model in `args.output_dir`, and pushes it with its card, results and curves.

        All processes must call it; only the main process pushes. Parameters that are None use the training arguments.

        Args:
            commit_message: First line of the commit message.
            blocking: Must be True: the folder must not change while it is pushed.
            token: Access token with write permission.
            revision: Branch to push to.
            private: Whether a new repository is private.
            **card: Parameters of `create_model_card`.

        Returns:
            The commit in the main process; None in other processes.

        Raises:
            FileExistsError: If this trainer did not train, and the folder already holds a run or a model.
            ValueError: If `hub_model_id` is not a valid repository name.
            OSError: If the push fails. The model is saved, and the message gives the command to push it later.
        """
        if not blocking:
            raise ValueError("push_to_hub does not support blocking=False; leave it at True.")
        args = self.args
        options = hub_options(args, token, private, revision)
        if self.state.global_step == 0 and run_files(args.output_dir):
            raise FileExistsError(
                f"{args.output_dir} holds a model, and this trainer has not trained a new one; push the existing model "
                f"with: {_command(args, options)}"
            )
        self.accelerator.wait_for_everyone()  # otherwise another process could find the model that the first one saves
        self.callback_handler.on_push_begin(args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        try:
            repo_id = self.hub_model_id or self._make_repository(token, private)
            self.create_model_card(**card)
            # `push_folder` writes the card again, with the licence and tags of the card in the repository.
            name = card.get("model_name")
            commit = push_folder(
                args.output_dir, repo_id, commit_message=commit_message or "End of training", name=name, **options
            )
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

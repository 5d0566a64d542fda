"""Pushing a finished model, and nothing before it is finished."""

import shlex
from collections.abc import Mapping
from typing import Any

from huggingface_hub import CommitInfo
from transformers import PreTrainedModel, Trainer

from ..hub.push import prepare_repository, push_folder
from .arguments import LongTailTrainingArguments
from .output_folder import run_files


class PublishingTrainer(Trainer):
    """A [`~transformers.Trainer`] that pushes what [`push_folder`] does, in one commit, and no checkpoints.

    With `push_to_hub` in its arguments, the repository and the right to write there are made sure of before training.
    """

    args: LongTailTrainingArguments
    model: PreTrainedModel
    hub_model_id: str | None  # type: ignore[assignment]

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes the repository `args.hub_model_id`, if there is none, and makes sure that it can be pushed to.

        Raises:
            ValueError: If `hub_model_id` is no name of a repository, or of one with a model of another type.
            OSError: If it cannot be pushed to.
        """
        if self.is_world_process_zero():
            self._make_repository(token, private)

    def _make_repository(self, token: str | None, private: bool | None) -> str:
        options = hub_options(self.args, token, private)
        model_type = self.model.config.model_type
        self.hub_model_id = prepare_repository(self.args.hub_model_id, model_type=model_type, **options)
        return self.hub_model_id

    def push_to_hub(  # type: ignore[override]  # the others than the first process have no commit
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card,
    ) -> CommitInfo | None:
        """Saves the model in `args.output_dir`, and pushes it with its card, results and curves.

        All processes call it, and the first one pushes. What is not given is as in the arguments.

        Args:
            commit_message: First line of the commit.
            blocking: Left at True: the folder must not change while it is pushed.
            token: A token that may write there.
            revision: Branch to push to.
            private: Make a new repository private.
            **card: As for `create_model_card`.

        Returns:
            The commit, in the first process.

        Raises:
            FileExistsError: If this trainer has not trained, and the folder holds a run or a model already.
            ValueError: If `hub_model_id` is no name of a repository.
            OSError: If it cannot be pushed. The model is saved, and the message says how to push it later.
        """
        if not blocking:
            raise ValueError("push_to_hub cannot be done with blocking=False; leave it at True.")
        args = self.args
        options = hub_options(args, token, private, revision)
        if self.state.global_step == 0 and run_files(args.output_dir):
            raise FileExistsError(
                f"{args.output_dir} holds a model, and this trainer has not trained one to replace it; push what is "
                f"there with: {_command(args, options)}"
            )
        self.accelerator.wait_for_everyone()  # else one process would find what another one saves
        self.callback_handler.on_push_begin(args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        try:
            repo_id = self.hub_model_id or self._make_repository(token, private)
            self.create_model_card(**card)
            # It writes the card once more, with the licence and tags that the repository's has.
            name = card.get("model_name")
            commit = push_folder(
                args.output_dir, repo_id, commit_message=commit_message or "End of training", name=name, **options
            )
        except OSError as error:
            raise OSError(
                f"{error} The model is whole in {args.output_dir}; to push it later: {_command(args, options)}"
            ) from error
        print(f"The model is on the Hub: {commit.repo_url}", flush=True)
        return commit


def hub_options(
    args: LongTailTrainingArguments, token: str | None = None, private: bool | None = None, revision: str | None = None
) -> dict[str, Any]:
    """How to push: what is given, or else as the arguments say."""
    return {
        "private": args.hub_private_repo if private is None else private,
        "revision": revision or args.hub_revision,
        "token": token or args.hub_token,
    }


def _command(args: LongTailTrainingArguments, options: Mapping[str, Any]) -> str:
    """The command line that pushes to the same place; a token is not in it."""
    words = ["deitlt", "push", args.output_dir, args.hub_model_id or "ORG/NAME"]
    if options["private"]:
        words.append("--private")
    if options["revision"] is not None:
        words += ["--revision", options["revision"]]
    return shlex.join(words)

"""Pushes a model folder to the Hugging Face Hub: weights, processor, code, card and results, never checkpoints.

deitlt push outputs/digits_lt_fast/student ORG/deitlt-digits
deitlt push outputs/digits_lt_fast/student ORG/deitlt-digits --private --revision second-try --handler
deitlt push outputs/digits_lt_fast/student ORG/deitlt-digits --license cc-by-4.0 --tags digits
"""

from collections.abc import Sequence

from .parser import add_card_options, card_metadata, command_parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser(__doc__)
    parser.add_argument("folder", help="a model folder, as training or convert writes it")
    parser.add_argument("repo_id", metavar="ORG/NAME", help="the repository; it is created if it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch to push to; it is created if it does not exist (default: main)")
    parser.add_argument(
        "--handler", action="store_true", help="add handler.py, with which endpoints return the scores of both experts"
    )
    parser.add_argument(
        "--overwrite_card", action="store_true", help="replace a card that a user wrote or edited on the Hub"
    )
    add_card_options(parser)
    parser.add_argument("--commit_message", default="Upload model", help="first line of the commit")
    args = parser.parse_args(arguments)
    from ..console import quiet_log
    from ..hub.pushing import push_folder

    quiet_log()
    commit = push_folder(
        args.folder,
        args.repo_id,
        private=args.private or None,
        revision=args.revision,
        commit_message=args.commit_message,
        overwrite_card=args.overwrite_card,
        handler=args.handler,
        **card_metadata(args),
    )
    print(f"The model is on the Hub: {commit.repo_url}")

"""Writes model cards: the repository's, from recipes and measured results, or that of a saved folder.

deitlt model-cards
deitlt model-cards --model outputs/digits_lt_fast/student --repo_id ORG/deitlt-digits --license cc-by-4.0
"""

from collections.abc import Sequence
from pathlib import Path

from ..hub.cards import recipe_card, save_card, write_card
from ..records import read_record
from .parser import add_card_options, card_metadata, command_parser

CARDS = {  # recipe by card
    "deitlt-cifar10-lt-rho100": "cifar10_lt_rho100",
    "deitlt-cifar10-lt-rho50": "cifar10_lt_rho50",
    "deitlt-cifar100-lt-rho100": "cifar100_lt_rho100",
    "deitlt-cifar100-lt-rho50": "cifar100_lt_rho50",
    "deitlt-imagenet-lt": "imagenet_lt",
    "deitlt-inat18": "inat18",
    "deitlt-digits": "digits_lt",
    "deitlt-fashion-mnist-lt": "fashion_mnist_lt_tiny",
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--model", help="write README.md into this folder of a saved student or teacher")
    parser.add_argument("--repo_id", help="with --model: the Hub repository that its code loads it from")
    parser.add_argument(
        "--folder",
        help="without --model: write the recipes' cards here; results/NAME.json below it, the results.json of a run, "
        "is what was measured (default: model_cards)",
    )
    add_card_options(parser)
    args = parser.parse_args(arguments)
    metadata = card_metadata(args)
    if args.model is not None:
        if args.folder is not None:
            raise ValueError(f"--folder {args.folder} is for the recipes' cards; that of --model goes into its folder.")
        _tell(write_card(args.model, args.repo_id, **metadata))
    elif args.repo_id is not None:
        raise ValueError(f"--repo_id {args.repo_id} needs --model, the folder that is to be there.")
    elif metadata:
        raise ValueError(f"--{next(iter(metadata))} needs --model, the folder whose card is to have it.")
    else:
        write_recipe_cards(Path("model_cards" if args.folder is None else args.folder))


def write_recipe_cards(folder: Path) -> None:
    """Writes the card of every model in [`CARDS`], with what was measured of it."""
    for name, recipe in CARDS.items():
        measured = folder / "results" / f"{name}.json"
        results = read_record(measured) if measured.is_file() else None
        _tell(save_card(recipe_card(recipe, name, results), folder / f"{name}.md"))


def _tell(card: Path | None) -> None:
    if card is not None:  # else a warning has told why it was not written
        print(card)

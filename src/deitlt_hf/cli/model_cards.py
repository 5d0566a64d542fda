"""Writes model cards: the cards of this repository's recipes with measured results, or the card of a model folder.

deitlt model-cards
deitlt model-cards --model outputs/digits_lt_fast/student --repo_id ORG/deitlt-digits --license cc-by-4.0
"""

from collections.abc import Sequence
from pathlib import Path

from ..hub.cards import recipe_card, save_card, write_card
from ..records import read_record
from .parser import add_card_options, card_metadata, command_parser

CARDS = {  # recipe by name of the card
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
    parser.add_argument("--model", help="folder of a saved student or teacher; its card is written to README.md there")
    parser.add_argument("--repo_id", help="with --model: the Hub repository from which the card's code loads the model")
    parser.add_argument(
        "--folder",
        help="without --model: folder for the recipes' cards (default: model_cards). The measured results of a card "
        "are read from results/NAME.json in it, a copy of a run's results.json",
    )
    add_card_options(parser)
    args = parser.parse_args(arguments)
    metadata = card_metadata(args)
    if args.model is not None:
        if args.folder is not None:
            raise ValueError(f"--folder {args.folder} is for the recipes' cards; leave it out with --model.")
        _print_path(write_card(args.model, args.repo_id, **metadata))
    elif args.repo_id is not None:
        raise ValueError(f"--repo_id {args.repo_id} needs --model, the folder of the model in that repository.")
    elif metadata:
        raise ValueError(f"--{next(iter(metadata))} needs --model, the folder of the model whose card has it.")
    else:
        write_recipe_cards(Path("model_cards" if args.folder is None else args.folder))


def write_recipe_cards(folder: Path) -> None:
    """Writes the card of every model in [`CARDS`], with measured results if there are any."""
    for name, recipe in CARDS.items():
        measured = folder / "results" / f"{name}.json"
        results = read_record(measured) if measured.is_file() else None
        _print_path(save_card(recipe_card(recipe, name, results), folder / f"{name}.md"))


def _print_path(card: Path | None) -> None:
    if card is not None:  # else a warning has said why the card was not written
        print(card)

"""Attention and features of a student's tokens, on test images.

python research/observe_tokens.py --recipe R --model DIR --json FILE
"""

import argparse
import json

import numpy as np
import torch
from transformers import AutoImageProcessor

from deitlt_hf.analysis.features import effective_rank, singular_values
from deitlt_hf.analysis.observe import observe, spread_rows
from deitlt_hf.data.images import ImageCollator, ImageDataset
from deitlt_hf.recipes import DataArguments, parse_arguments
from deitlt_hf.serving.classifiers import load_model

IMAGES = 2000


def rounded(values: np.ndarray) -> list:
    """Rounds each value to four digits."""
    return [float(f"{value:.4g}") for value in values]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--json", required=True)
    args, rest = parser.parse_known_args()
    _, data_args = parse_arguments("data", (DataArguments,), rest)
    data = data_args.load()
    chosen = data["test"].select(spread_rows(len(data["test"]), IMAGES))
    collate = ImageCollator(AutoImageProcessor.from_pretrained(args.model))
    model = load_model(args.model)
    seen = observe(model, ImageDataset(chosen, "image", "label"), collate, IMAGES)
    groups = {"overall": range(len(data["test"].features["label"].names)), **data_args.groups(data)}
    with torch.no_grad():  # the heads' input: the last block's tokens, normalised
        features = model.deit.layernorm(torch.from_numpy(seen.features[-1])).numpy()
    last = dict(zip(seen.tokens, features.transpose(1, 0, 2), strict=True))
    found = {
        "images": len(chosen),
        "attention_distances": [rounded(heads) for heads in seen.distances],
        "token_spreads": [[rounded(heads) for heads in tokens] for tokens in seen.spreads],
        "singular_values": {token: rounded(singular_values(features)) for token, features in last.items()},
        "effective_ranks": {
            token: {
                group: effective_rank(features[np.isin(seen.labels, list(classes))])
                for group, classes in groups.items()
            }
            for token, features in last.items()
        },
    }
    with open(args.json, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()

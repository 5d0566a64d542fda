"""From a folder of images to a model: `deitlt train`, and the recipe that it fits to the folder."""

from .folder_training import train

__all__ = ["train"]

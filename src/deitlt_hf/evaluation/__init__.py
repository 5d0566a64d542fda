"""Accuracy on head, mid and tail classes, for each expert of a model."""

from pathlib import Path

from .accuracy import group_accuracies
from .expert_table import ExpertTable

METRIC_PATH = str(Path(__file__).parent / "long_tail_metric.py")

__all__ = ["METRIC_PATH", "ExpertTable", "group_accuracies"]

"""Accuracy on head, mid and tail classes, for each expert."""

from .accuracy import ExpertTable, group_accuracies

__all__ = ["ExpertTable", "group_accuracies"]

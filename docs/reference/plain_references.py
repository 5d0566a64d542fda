"""Griffe extension: docstrings name other objects as [`Name`], which Markdown would show with the brackets."""

import re

import griffe


class PlainReferences(griffe.Extension):
    """Shows [`Name`] and [`~module.Name`] as `Name`."""

    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"\[`~?(?:[\w.]+\.)?(\w+)`\]", r"`\1`", obj.docstring.value)

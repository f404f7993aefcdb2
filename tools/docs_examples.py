"""For the documentation site: "Example:" in a docstring is a section of code, as "Examples:" is."""

from __future__ import annotations

from typing import Any

import griffe


class Examples(griffe.Extension):
    """Renames the sections before they are parsed."""

    def on_instance(self, *, obj: griffe.Object, **arguments: Any) -> None:
        """Is called for every object that was found in the source."""
        if obj.docstring is not None:
            lines = obj.docstring.value.split("\n")
            renamed = ["Examples:" if line.strip() == "Example:" else line for line in lines]
            obj.docstring.value = "\n".join(renamed)

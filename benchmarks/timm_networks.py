"""Models of the package `timm`, without the packages that it needs for more.

Its packages import torchvision, whose usual build does not load beside the CPU build of torch. The
models here take from it one class, to recognise modules that they do not have.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Lets modules of `timm.models` be imported; takes them out of `sys.modules` in the end."""
    (folder,) = importlib.util.find_spec("timm").submodule_search_locations
    before = set(sys.modules)

    def package(name: str, path: Path | None = None, **contents: Any) -> types.ModuleType:
        module = types.ModuleType(name)
        module.__path__ = [] if path is None else [str(path)]
        vars(module).update(contents)
        sys.modules[name] = module
        return module

    absent = type("FrozenBatchNorm2d", (nn.Module,), {})
    try:
        package("torchvision")
        package("torchvision.ops")
        package("torchvision.ops.misc", FrozenBatchNorm2d=absent)
        package("timm", Path(folder), __version__=importlib.metadata.version("timm"))
        package("timm.models", Path(folder) / "models")
        data = package("timm.data", Path(folder) / "data")
        constants = vars(importlib.import_module("timm.data.constants"))
        vars(data).update({name: each for name, each in constants.items() if name.isupper()})
        yield
    finally:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in ("timm", "torchvision"):
                del sys.modules[name]


# (module of timm.models, function in it, separable convolutions)
NETWORKS = {
    "timm legacy_xception": ("xception", "legacy_xception", 34),
    "timm mobilenetv1_100": ("efficientnet", "mobilenetv1_100", 13),
}


def network(name: str, **arguments: Any) -> nn.Module:
    """Returns one of `NETWORKS`, with random weights.

    Args:
        name: Its name there.
        **arguments: Of the function that makes it.
    """
    module, function, _ = NETWORKS[name]
    with stand_ins():
        make = getattr(importlib.import_module(f"timm.models.{module}"), function)
        return make(**arguments)

"""A torch model as calls of modules and the data flow between them, read by torch.fx.

What is said of a module holds for all its calls, so a pair that several places share is swapped in
all of them or in none.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, fx, nn

from sepconv.torch import SeparableConv2d

__all__ = ["Absorbed", "Function", "Reading", "defaults_of", "hooked", "replaced"]

Pair = tuple[int, int]
_SIZES = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")


class Absorbed(nn.Module):
    """Stands where a module stood that is part of a fused layer now, and returns its input.

    Args:
        layer: The layer that it is part of.
        role: `"pointwise"`, `"depthwise_activation"`, ...: which part.
        amounts: Of a padding: rows above and below, columns left and right.
    """

    def __init__(
        self, layer: SeparableConv2d, role: str, amounts: tuple[Pair, Pair] = ((0, 0), (0, 0))
    ) -> None:
        super().__init__()
        # In a tuple, so that it is no submodule: the layer stands elsewhere in the model.
        self.source = (layer, role)
        self.amounts = amounts

    def forward(self, x: Tensor) -> Tensor:
        """Returns `x`."""
        return x

    def extra_repr(self) -> str:
        """Returns the role, for `repr`."""
        return self.source[1]

    def __getattr__(self, name: str) -> Any:
        # The code of a model may ask its pointwise convolution for these.
        if name in _SIZES and self.source[1] == "pointwise":
            return getattr(self.source[0].pointwise, name)
        return super().__getattr__(name)


class Function(nn.Module):
    """A call of a function in the code of a module, as a module of its own.

    Args:
        node: The call; its first argument is the input, and no other one is computed.
    """

    def __init__(self, node: fx.Node) -> None:
        super().__init__()
        self.is_method = node.op == "call_method"
        self.target: Any = node.target
        self.arguments = node.args[1:]
        self.keywords = dict(node.kwargs)

    @property
    def name(self) -> str:
        """What the function is called."""
        return str(self.target if self.is_method else self.target.__name__)

    @property
    def inplace(self) -> bool:
        """Whether it changes its input."""
        return self.name.endswith("_") or bool(self.keywords.get("inplace", False))

    def forward(self, x: Tensor) -> Any:
        """Calls the function."""
        function = getattr(x, self.target) if self.is_method else self.target
        inputs = () if self.is_method else (x,)
        return function(*inputs, *self.arguments, **self.keywords)

    def extra_repr(self) -> str:
        """Returns the name, for `repr`."""
        return self.name


class _Tracer(fx.Tracer):
    """Keeps whole what is understood whole, what a hook watches, and what cannot be followed.

    Args:
        opaque: Modules whose code cannot be followed, by id.
    """

    def __init__(self, opaque: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self._opaque = opaque

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = isinstance(m, (nn.Conv2d, nn.BatchNorm2d, SeparableConv2d, Absorbed, Function))
        whole = whole or id(m) in self._opaque or hooked(m)
        return whole or super().is_leaf_module(m, module_qualified_name)


class Reading:
    """Calls of modules and the data flow between them, by the names of the modules."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {id(module): name for name, module in model.named_modules()}
        self.modules = dict(model.named_modules())
        self.calls: dict[str, list[fx.Node]] = {}
        self._opaque: dict[int, nn.Module] = {}
        self.read: set[str] = set()
        """Modules whose weights the code of others uses."""
        self.taken: set[str] = set()
        """Modules that are part of a layer already."""
        self._find_opaque(model)
        self._read(model)
        for module in self._opaque.values():
            for child in module.children():
                self._read(child)
        self.found_by = "torch.fx"
        names = [
            self.names[number] or "the model"
            for number, module in self._opaque.items()
            if not isinstance(module, (nn.ModuleList, nn.ModuleDict))  # They have no code.
        ]
        if names:
            self.found_by += f", not through the code of: {', '.join(names)}"

    def candidates(self, *, ours: bool) -> Iterator[str]:
        """Names of all depthwise convolutions, in the order of their calls.

        Args:
            ours: Whether to name layers of ours as well.
        """
        inside = {
            id(each)
            for module in self.modules.values()
            if isinstance(module, SeparableConv2d)
            for each in module.children()
        }

        def is_one(module: nn.Module) -> bool:
            if isinstance(module, nn.Conv2d):
                is_depthwise = module.groups == module.in_channels > 1
                return is_depthwise and id(module) not in inside
            return ours and type(module) is SeparableConv2d

        seen = [name for name in self.calls if is_one(self.modules[name])]
        yield from seen
        yield from (
            name for name, module in self.modules.items() if name not in seen and is_one(module)
        )

    def _find_opaque(self, module: nn.Module) -> None:
        """Finds the modules whose own code torch.fx cannot follow."""
        if id(module) in self._opaque or self._trace(module) is not None:
            return
        before = len(self._opaque)
        for child in module.children():
            self._find_opaque(child)
        if len(self._opaque) == before or self._trace(module) is None:
            self._opaque[id(module)] = module

    def _trace(self, module: nn.Module) -> fx.Graph | None:
        try:
            # Arguments with a default value have it: a test of one is code, not data.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _Tracer(self._opaque).trace(module, defaults_of(module))
        except Exception:  # Whatever the code of a model raises when it meets a proxy.
            return None

    def _read(self, module: nn.Module) -> None:
        graph = None if id(module) in self._opaque else self._trace(module)
        for node in () if graph is None else graph.nodes:
            if node.op == "call_module":
                own = module.get_submodule(str(node.target))
                self.calls.setdefault(self.names[id(own)], []).append(node)
                node.meta["module"] = self.names[id(own)]
            elif node.op == "get_attr":
                owner = module.get_submodule(str(node.target).rpartition(".")[0])
                self.read.add(self.names[id(owner)])

    def why_hidden(self, name: str) -> str | None:
        """Tells why there may be more calls of a module than were found, or `None`."""
        for number, module in self._opaque.items():
            if any(child is self.modules[name] for child in module.children()):
                holder = self.names[number] or "the model"
                return f"{holder}, whose code torch.fx cannot follow, holds {name} as well"
        return None

    def after(self, name: str) -> tuple[str | None, str]:
        """The only module that takes what this one gives, in all its calls; or `None`, and why."""
        found = set()
        for node in self.calls[name]:
            users = list(node.users)
            if len(users) != 1:
                return None, f"{len(users)} consumers of its output"
            user = users[0]
            if user.op == "output":
                return None, "its output leaves the traced part"
            if user.op != "call_module":
                target = getattr(user.target, "__name__", str(user.target))
                return None, f"followed by {target}, not by a module"
            if user.args != (node,) or user.kwargs:
                return None, f"{user.meta['module']} takes more than its output"
            found.add(user.meta["module"])
        if len(found) != 1:
            return None, f"followed by different modules: {', '.join(sorted(found))}"
        (only,) = found
        if len(self.calls[only]) != len(self.calls[name]):
            return None, f"{only} is also called on something else"
        hidden = self.why_hidden(only)
        return (only, "") if hidden is None else (None, hidden)

    def before(self, name: str) -> str | None:
        """The module whose output this one takes, in all its calls, if nothing else does."""
        found = set()
        for node in self.calls[name]:
            source = node.args[0] if node.args else None
            if not isinstance(source, fx.Node) or source.op != "call_module":
                return None
            found.add(source.meta["module"])
        if len(found) != 1:
            return None
        (only,) = found
        return only if self.after(only)[0] == name else None


def defaults_of(module: nn.Module) -> dict[str, Any]:
    """Returns the arguments of a module that have default values, with these."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.default is not parameter.empty
    }


def hooked(module: nn.Module) -> bool:
    """Whether somebody watches the calls of a module."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def replaced(model: nn.Module, stand_ins: dict[int, nn.Module]) -> nn.Module:
    """Returns the model with modules replaced, wherever they stand in it.

    Args:
        model: Is changed, unless it is replaced itself.
        stand_ins: New modules by the ids of the old ones.
    """
    if id(model) in stand_ins:
        return stand_ins[id(model)]
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if id(child) in stand_ins:
                module._modules[name] = stand_ins[id(child)]
    return model

"""Functions in the code of torch modules, as modules: they can be named, watched and taken away.

`F.relu` in the code of a module cannot be removed, as an `nn.ReLU` can. A module whose code calls
such functions gets a class of its own, below that which it had, whose `forward` is the graph of
`torch.fx` of its own code: with modules in place of some calls, and all else as it was.
"""

from __future__ import annotations

import copyreg
import importlib
import inspect
import types
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional

from sepconv.models.torch_graph import Function, defaults_of, hooked

__all__ = ["Place", "called_as_traced", "functions_as_modules", "restore", "rewrite"]

# Of one tensor, number by number, or a padding; with an underscore, those that change it. What they
# compute is found out where it matters.
_NAMES = {
    *("clamp", "clamp_min", "clip", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh"),
    *("leaky_relu", "pad", "relu", "relu6", "sigmoid", "silu", "tanh"),
}
_CONSTANTS = (type(None), bool, int, float, str)


class Place(NamedTuple):
    """Where a function is called."""

    owner: str
    """Name of the module whose code calls it."""
    number: int
    """Of the call among those in this code."""


class _Leaves(fx.Tracer):
    """Follows the code of one module, and none of the modules in it."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def functions_as_modules(model: nn.Module, answers: Mapping[str, bool]) -> dict[str, Place]:
    """Makes the functions in the code of a model modules, and returns where each one was.

    Args:
        model: Is changed.
        answers: Of `called_as_traced`.

    Returns:
        The places, by the names of the new modules.
    """
    places: dict[str, Place] = {}
    for name, owner in list(model.named_modules()):
        if not answers.get(name) or (graph := _graph(owner)) is None:
            continue
        functions = {number: Function(node) for number, node in enumerate(_function_nodes(graph))}
        if functions:
            for number, word in enumerate(rewrite(owner, functions)):
                places[f"{name}.{word}" if name else word] = Place(name, number)
    return places


def called_as_traced(model: nn.Module) -> tuple[dict[str, bool], list[Any]]:
    """Watches whether modules are called with the default values of their arguments, and no others.

    Only then is the graph of `rewrite` what runs.

    Args:
        model: To be called once.

    Returns:
        The answers by name, to which calls of the model add; and the hooks, to be removed.
    """
    answers: dict[str, bool] = {}
    hooks = []
    for name, module in model.named_modules():
        kind, _ = _written(type(module))
        if kind.__module__.startswith("torch.") or hooked(module) or not _is_copied_plainly(kind):
            continue
        try:
            signature, defaults = inspect.signature(module.forward), defaults_of(module)
        except (TypeError, ValueError):  # Not written in Python.
            continue
        if not all(isinstance(each, _CONSTANTS) for each in defaults.values()):
            continue

        def watch(
            module: nn.Module,
            arguments: tuple[Any, ...],
            keywords: dict[str, Any],
            name: str = name,
            signature: inspect.Signature = signature,
            defaults: Mapping[str, Any] = defaults,
        ) -> None:
            given = signature.bind(*arguments, **keywords).arguments
            answers[name] = answers.get(name, True) and all(
                type(value) is type(defaults[word]) and value == defaults[word]
                if word in defaults
                # A number or a word may decide what the code does.
                else not isinstance(value, _CONSTANTS)
                for word, value in given.items()
            )

        hooks.append(module.register_forward_pre_hook(watch, with_kwargs=True))
    return answers, hooks


def rewrite(owner: nn.Module, modules: Mapping[int, nn.Module]) -> list[str]:
    """Puts modules in place of calls of functions in the code of a module.

    Args:
        owner: The module; its class becomes another one, below the one that it has.
        modules: The new modules, by the number of the call that each replaces.

    Returns:
        Their names in the owner.
    """
    graph = _graph(owner)
    assert graph is not None  # Who asks has found functions in it.
    nodes = list(_function_nodes(graph))
    words = []
    for number, module in modules.items():
        node = nodes[number]
        word = node.name
        while hasattr(owner, word):
            word += "_function"
        words.append(word)
        owner.add_module(word, module)
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.call_module(word, node.args[:1]))
        graph.erase_node(node)
    code = graph.python_code("self")
    names = {
        name: _Imported(value.__name__) if isinstance(value, types.ModuleType) else value
        for name, value in code.globals.items()
    }
    kind, before = _written(type(owner))
    owner.__class__ = _class(kind, code.src, names, [*before, *words])
    return words


def restore(owner: nn.Module) -> None:
    """Gives a module the class and the code back that it had before `rewrite`, if that was called.

    Args:
        owner: The module, which loses the modules in place of calls.
    """
    kind, words = _written(type(owner))
    for word in words:
        delattr(owner, word)
    if words:
        owner.__class__ = kind


def _written(kind: type) -> tuple[Any, list[str]]:
    """The class that a class of `rewrite` is of, and the modules in place of calls; else itself."""
    written: tuple[Any, list[str]] = vars(kind).get("_sepconv_written", (kind, []))
    return written


def _is_copied_plainly(kind: Any) -> bool:
    """Whether copies and pickles of modules ask their class nothing, so that another one may be."""
    plain = kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__
    return plain and not hasattr(kind, "__deepcopy__")


class _Imported(NamedTuple):
    """Stands for a module of Python, which cannot be pickled."""

    name: str


def _class(kind: Any, source: str, names: dict[str, Any], words: list[str]) -> type:
    """A class below another one, with a `forward` that torch.fx has written."""
    scope = {
        name: importlib.import_module(value.name) if isinstance(value, _Imported) else value
        for name, value in names.items()
    }
    exec(source, scope)

    def reduce(self: Any, protocol: Any) -> Any:
        # Copies and pickles make the class again.
        make, arguments, *state = kind.__reduce_ex__(self, protocol)
        if make is copyreg.__newobj__:  # type: ignore[attr-defined]
            return _made_again, (kind, source, names, words, *arguments[1:]), *state
        return make, arguments, *state

    body = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__reduce_ex__": reduce,
        "_sepconv_written": (kind, words),
        "forward": scope["forward"],
    }
    return types.new_class(kind.__name__, (kind,), {}, lambda space: space.update(body))


def _made_again(
    kind: type, source: str, names: dict[str, Any], words: list[str], *arguments: Any
) -> Any:
    made = _class(kind, source, names, words)
    return made.__new__(made, *arguments)


def _graph(owner: nn.Module) -> fx.Graph | None:
    """The graph of a module's own code, with the names of its arguments, if there is one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = _Leaves().trace(owner, defaults_of(owner))
        parameters = list(inspect.signature(owner.forward).parameters.values())
    except Exception:  # Whatever the code of a model raises when it meets a proxy.
        return None
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    kinds = {parameter.kind for parameter in parameters}
    if len(inputs) != len(parameters) or inspect.Parameter.VAR_POSITIONAL in kinds:
        return None
    for node, parameter in zip(inputs, parameters, strict=True):
        if parameter.kind is not parameter.VAR_KEYWORD:
            node.target = parameter.name
    return graph


def _function_nodes(graph: fx.Graph) -> Iterator[fx.Node]:
    """The calls of functions that may become modules, in the order of the code."""
    for node in graph.nodes:
        if node.op == "call_method":
            name = str(node.target)
        elif node.op == "call_function":
            name = getattr(node.target, "__name__", "")
            if node.target not in (getattr(functional, name, None), getattr(torch, name, None)):
                continue
        else:
            continue
        rest: list[Any] = []
        fx.node.map_arg((node.args[1:], node.kwargs), rest.append)
        if (
            name.removesuffix("_") in _NAMES
            and node.args
            and isinstance(node.args[0], fx.Node)
            and not rest
        ):
            yield node

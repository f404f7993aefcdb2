"""Fusion of torch models: the data flow between modules, what may become one, the new model.

The new model keeps its classes and their code. Our layer stands in the place of the depthwise
convolution, and modules that hand on what they get stand where the other parts of it stood. What is
said of a module holds for all its calls, so a pair that several places share is swapped in all of
them or in none.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from sepconv.models.exclusion import Exclusion
from sepconv.models.report import Candidate, Report
from sepconv.spec import ACTIVATIONS
from sepconv.torch import SeparableConv2d
from sepconv.torch.composition import ACTIVATION_FUNCTIONS

__all__ = ["Absorbed", "fuse", "to_stock"]

_LINEAR = ACTIVATIONS[0]
# Exact classes. Whether the function is ours as well, slope and all, is tried on numbers.
_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Hardsigmoid: "hard_sigmoid",
    nn.Hardswish: "hard_silu",
    nn.ELU: "elu",
}
_IMAGE_SIZES = (224, 64, 32, 299)
"""Rows and columns of random images; the first that the model takes."""


class Absorbed(nn.Module):
    """Stands where a module stood that is part of a fused layer now, and returns its input.

    Args:
        layer: The layer that it is part of.
        role: `"pointwise"`, `"depthwise_activation"`, ...: which part.
    """

    def __init__(self, layer: SeparableConv2d, role: str) -> None:
        super().__init__()
        # In a tuple, so that it is no submodule: the layer stands elsewhere in the model.
        self.source = (layer, role)

    def forward(self, x: Tensor) -> Tensor:
        """Returns `x`."""
        return x

    def extra_repr(self) -> str:
        """Returns the role, for `repr`."""
        return self.source[1]


def fuse(
    model: nn.Module,
    *,
    inference: bool,
    inputs: Any,
    excluded: Exclusion,
    tolerance: float | None,
) -> tuple[nn.Module, Report]:
    """Does what `sepconv.fuse` does, for a torch model.

    Args:
        model: Any module.
        inference: Whether to fold batch norms and activations.
        inputs: A tensor or the tuple of arguments; `None` for random images.
        excluded: Which modules have to stay as they are.
        tolerance: Of `Report.check`, which the caller calls.

    Returns:
        The new model and the report.

    Raises:
        ValueError: the model cannot be copied, or random images do not fit it.
    """
    excluded.check(name for name, _ in model.named_modules())
    base, new = _copied(model), _copied(model)
    if inference:
        base.eval()
        new.eval()
    reading = _Reading(new)
    originals = dict(model.named_modules())
    chains = []
    for name in reading.depthwise():
        chains.append(_chain(reading, name, inference, excluded, originals))
        if chains[-1].reason is None:
            reading.taken.update(chains[-1].absorbed)
    arguments = _arguments(base, inputs)
    made = {chain.name: chain.make() for chain in chains if chain.reason is None}
    facts = _measured(base, chains, made, arguments)
    renamed: dict[str, str] = {}
    for chain in chains:
        if chain.reason is None:
            _swap(new, chain, made[chain.name], renamed, inference)
    difference, largest = _compared(base, new, arguments)
    notes = ["modules that were taken into a layer hand on their input"] if made else []
    if inference:
        notes.append("for inference: folded batch norms do not follow the data any more")
    return new, Report(
        candidates=tuple(facts),
        inference=inference,
        found_by=reading.found_by,
        output_difference=difference,
        output_largest=largest,
        tolerance=tolerance,
        renamed=renamed,
        notes=tuple(notes),
    )


def to_stock(model: nn.Module) -> nn.Module:
    """Does what `sepconv.to_stock` does, for a torch model.

    Args:
        model: Any module.

    Returns:
        The new model.

    Raises:
        ValueError: the model cannot be copied, or a layer pads as no convolution of torch does.
    """
    new = _copied(model)
    modules = list(new.named_modules())
    absorbed = [(name, module) for name, module in modules if isinstance(module, Absorbed)]
    placed: dict[int, set[str]] = {}
    for _, module in absorbed:
        placed.setdefault(id(module.source[0]), set()).add(module.source[1])
    stock: dict[int, nn.Module] = {}
    pointwise: dict[int, nn.Module] = {}
    for _, layer in modules:
        if not isinstance(layer, SeparableConv2d):
            continue
        conv_dw, conv_pw = layer.to_pair()
        pointwise[id(layer)] = conv_pw
        roles = placed.get(id(layer), set())
        if "pointwise" in roles:
            stock[id(layer)] = conv_dw
            continue
        stages = [
            _activation_module(layer.input_activation),
            conv_dw,
            _activation_module(layer.depthwise_activation),
            conv_pw,
            _activation_module(layer.activation),
        ]
        stock[id(layer)] = nn.Sequential(
            *(stage for stage in stages if not isinstance(stage, nn.Identity))
        )
    for _, module in absorbed:
        layer, role = module.source
        if role == "pointwise":
            stock[id(module)] = pointwise[id(layer)]
        else:
            stock[id(module)] = _activation_module(getattr(layer, role, _LINEAR))
    return _replaced(new, stock)


def _activation_module(name: str) -> nn.Module:
    for cls, known in _MODULES.items():
        if known == name:
            return cls(0.2) if cls is nn.LeakyReLU else cls()
    return nn.Identity()


# ------------------------------------------------------------------------------- reading a model


class _Tracer(fx.Tracer):
    """Keeps whole what is understood whole, and what a hook watches."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = isinstance(m, (nn.Conv2d, nn.BatchNorm2d, SeparableConv2d, Absorbed))
        return whole or _hooked(m) or super().is_leaf_module(m, module_qualified_name)


class _Reading:
    """Calls of modules and the data flow between them, by the names of the modules."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {id(module): name for name, module in model.named_modules()}
        self.modules = dict(model.named_modules())
        self.calls: dict[str, list[fx.Node]] = {}
        self.failures: list[str] = []
        self.taken: set[str] = set()
        """Modules that are part of a layer already."""
        self._read(model, "")
        self.found_by = "torch.fx"
        if self.failures:
            self.found_by = "torch.fx of parts; not traced as a whole: " + ", ".join(
                f"{name or 'the model'}" for name in self.failures
            )

    def depthwise(self) -> Iterator[str]:
        """Names of all depthwise convolutions, in the order of their calls."""
        seen = [name for name in self.calls if _is_depthwise(self.modules[name])]
        yield from seen
        yield from (
            name
            for name, module in self.modules.items()
            if name not in seen and _is_depthwise(module)
        )

    def _read(self, module: nn.Module, prefix: str) -> None:
        try:
            # Arguments with a default value have it: a test of one is code, not data.
            defaults = {
                name: parameter.default
                for name, parameter in inspect.signature(module.forward).parameters.items()
                if parameter.default is not parameter.empty
            }
            graph = _Tracer().trace(module, defaults)
        except Exception:  # Whatever the code of a model raises when it meets a proxy.
            self.failures.append(prefix)
            for name, child in module.named_children():
                self._read(child, f"{prefix}.{name}" if prefix else name)
            return
        for node in graph.nodes:
            if node.op == "call_module":
                own = module.get_submodule(str(node.target))
                self.calls.setdefault(self.names[id(own)], []).append(node)
                node.meta["module"] = self.names[id(own)]

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
        return only, ""

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


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ValueError(
            f"`model` must be one that copy.deepcopy takes. It says: {error}"
        ) from error


def _hooked(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


# --------------------------------------------------------------------------- what may become one


@dataclass
class _Chain:
    """A depthwise convolution and what becomes one layer with it, or why it does not."""

    name: str
    reading: _Reading
    reason: str | None = None
    pointwise: str = ""
    activations: dict[str, str] = field(default_factory=dict)
    """By stage: "input_activation", "depthwise_activation", "activation"."""
    norms: dict[str, nn.BatchNorm2d] = field(default_factory=dict)
    """By the stage that they follow: "depthwise", "pointwise"."""
    absorbed: dict[str, str] = field(default_factory=dict)
    """Names of the other modules, and the role of each."""
    first: str = ""
    last: str = ""

    def make(self) -> SeparableConv2d:
        """The layer, on the parameters themselves unless a batch norm changes them."""
        modules = self.reading.modules
        pair: list[Any] = [modules[self.name], modules[self.pointwise]]
        for position, stage in enumerate(("depthwise", "pointwise")):
            if stage in self.norms:
                pair[position] = _folded(pair[position], self.norms[stage])
        return SeparableConv2d.from_pair(pair[0], pair[1], **self.activations)


def _chain(
    reading: _Reading,
    name: str,
    inference: bool,
    excluded: Exclusion,
    originals: dict[str, nn.Module],
) -> _Chain:
    chain = _Chain(name, reading, first=name)
    modules = reading.modules

    def own(each: str) -> str | None:
        if excluded(each, originals[each]):
            return f"{each} is excluded"
        return _why_no_convolution(each, modules[each])

    chain.reason = own(name)
    if chain.reason is None and name not in reading.calls:
        chain.reason = "no call of it was found in the data flow"
    if chain.reason is not None:
        return chain
    here = name
    while True:
        following, why = reading.after(here)
        if following is None:
            chain.reason = why
            return chain
        module = modules[following]
        if isinstance(module, nn.Conv2d):
            break
        if type(module) is not nn.Identity:
            why = _take(chain, following, module, "depthwise", inference, excluded, originals) or ""
        if why:
            chain.reason = f"between the stages: {why}"
            return chain
        here = following
    chain.pointwise = chain.last = following
    conv: Any = modules[following]
    chain.reason = own(following) or _why_no_pointwise(following, conv, modules[name])
    if chain.reason is not None or not inference:
        return chain
    here = following
    while (found := reading.after(here)[0]) is not None:
        module = modules[found]
        if type(module) is not nn.Identity and _take(
            chain, found, module, "pointwise", inference, excluded, originals
        ):
            break
        here = chain.last = found
    previous = reading.before(name)
    excepted = previous is None or excluded(previous, originals[previous])
    if previous is not None and not excepted and previous not in reading.taken:
        module = modules[previous]
        activation = _activation_name(module)
        source = reading.before(previous)
        # One that works in place changes what others may still read, unless that is a fresh output.
        fresh = source is not None and isinstance(modules[source], (nn.Conv2d, nn.BatchNorm2d))
        if activation and not _hooked(module) and (fresh or not getattr(module, "inplace", False)):
            chain.activations["input_activation"] = activation
            chain.absorbed[previous] = "input_activation"
            chain.first = previous
    return chain


def _take(
    chain: _Chain,
    name: str,
    module: nn.Module,
    stage: str,
    inference: bool,
    excluded: Exclusion,
    originals: dict[str, nn.Module],
) -> str | None:
    """Takes a batch norm or an activation behind a stage into the chain, or tells why not."""
    role = "activation" if stage == "pointwise" else "depthwise_activation"
    kind = f"{name} ({type(module).__name__})"
    if excluded(name, originals[name]):
        return f"{name} is excluded"
    if _hooked(module):
        return f"{kind} has hooks"
    if name in chain.reading.taken:
        return f"{kind} is part of another layer"
    activation = _activation_name(module)
    norm = isinstance(module, nn.BatchNorm2d)
    if activation is None and not norm:
        return kind
    if not inference:
        what = "a batch norm in training" if norm else "an activation"
        return f"{kind} is {what}; inference=True folds it"
    if role in chain.activations or (norm and stage in chain.norms):
        return f"{kind} comes after another activation or batch norm"
    if isinstance(module, nn.BatchNorm2d):
        follows = _after_norm(module)
        if follows is None:
            return f"{kind} computes more than a batch norm and a known activation"
        chain.norms[stage] = module
        activation = follows
    chain.absorbed[name] = role if activation != _LINEAR else "folded"
    if activation is not None and activation != _LINEAR:
        chain.activations[role] = activation
    return None


def _why_no_convolution(name: str, module: nn.Module) -> str | None:
    if _hooked(module):
        return f"{name} has hooks"
    if "weight" not in module._parameters or hasattr(module, "parametrizations"):
        return f"the weight of {name} is computed (weight norm, a parametrization, pruning)"
    conv: Any = type(module)
    if conv.forward is not nn.Conv2d.forward or conv._conv_forward is not nn.Conv2d._conv_forward:
        return f"{name} is a {conv.__name__}, which computes in its own way"
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return f"{name} pads with padding_mode={module.padding_mode!r}"
    return None


def _why_no_pointwise(name: str, conv: nn.Conv2d, depthwise: Any) -> str | None:
    plain = isinstance(conv.padding, str) or not any(conv.padding)
    if conv.kernel_size != (1, 1) or conv.stride != (1, 1) or not plain:
        return f"{name} is no convolution of 1x1 pixels without stride and padding"
    if conv.groups != 1:
        return f"{name} has {conv.groups} groups"
    if conv.weight.dtype != depthwise.weight.dtype or conv.weight.device != depthwise.weight.device:
        return f"{name} has another dtype or device"
    return None


def _activation_name(module: nn.Module) -> str | None:
    """The name that an activation has here, or `None`."""
    name = _MODULES.get(type(module))
    if name is None:
        return None
    x = torch.linspace(-8.0, 8.0, 97, dtype=torch.float64)
    return (
        name
        if torch.allclose(module(x.clone()), ACTIVATION_FUNCTIONS[name](x), atol=1e-9)
        else None
    )


def _after_norm(norm: nn.BatchNorm2d) -> str | None:
    """The activation in a batch norm module (timm's have one), "linear", or `None`: unknown."""
    if norm.running_mean is None or norm.running_var is None or norm.training:
        return None
    if type(norm) is nn.BatchNorm2d:
        return _LINEAR
    parts = [each for each in norm.children() if type(each) not in (nn.Identity, nn.Dropout)]
    names = [_activation_name(each) for each in parts]
    name = names[0] if names else _LINEAR
    if len(names) > 1 or name is None:
        return None
    x = torch.linspace(-8.0, 8.0, 97, dtype=norm.running_var.dtype, device=norm.running_var.device)
    x = x[None, None, :, None].expand(1, norm.num_features, -1, 1).clone()
    mean, var, epsilon = norm.running_mean, norm.running_var, norm.eps
    plain = nn.functional.batch_norm(x, mean, var, norm.weight, norm.bias, eps=epsilon)
    with torch.no_grad():
        same = torch.allclose(
            norm(x.clone()), ACTIVATION_FUNCTIONS[name](plain), rtol=1e-4, atol=1e-5
        )
    return name if same else None


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """A convolution that computes both, folded in float64."""
    weight = conv.weight.detach()
    zero = torch.zeros(conv.out_channels, dtype=torch.float64, device=weight.device)
    assert norm.running_mean is not None  # _after_norm has looked.
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = zero if norm.bias is None else norm.bias.detach().double()
    bias = zero if conv.bias is None else conv.bias.detach().double()
    new = copy.deepcopy(conv)
    new.weight = nn.Parameter((weight.double() * scale[:, None, None, None]).to(weight.dtype))
    folded = (bias - norm.running_mean.double()) * scale + shift
    new.bias = nn.Parameter(folded.to(weight.dtype))
    return new


# --------------------------------------------------------------------------------- the new model


def _swap(
    new: nn.Module,
    chain: _Chain,
    layer: SeparableConv2d,
    renamed: dict[str, str],
    inference: bool,
) -> None:
    modules = chain.reading.modules
    stand_ins: dict[int, nn.Module] = {id(modules[chain.name]): layer}
    for name, role in {chain.pointwise: "pointwise", **chain.absorbed}.items():
        stand_ins[id(modules[name])] = Absorbed(layer, role).train(modules[name].training)
    paths = [(path, module) for path, module in new.named_modules(remove_duplicate=False)]
    for stage, own in (("depthwise", chain.name), ("pointwise", chain.pointwise)):
        if stage in chain.norms:
            continue
        for path, module in paths:
            if module is modules[own]:
                for parameter, _ in module.named_parameters():
                    renamed[f"{path}.{parameter}"] = f"{chain.name}.{stage}.{parameter}"
    _replaced(new, stand_ins)


def _replaced(model: nn.Module, stand_ins: dict[int, nn.Module]) -> nn.Module:
    """The model with modules replaced, wherever they stand in it."""
    if id(model) in stand_ins:
        return stand_ins[id(model)]
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if id(child) in stand_ins:
                module._modules[name] = stand_ins[id(child)]
    return model


# ------------------------------------------------------------------------------------- measuring


def _arguments(base: nn.Module, inputs: Any) -> tuple[Any, ...]:
    if isinstance(inputs, tuple):
        return inputs
    if inputs is not None:
        return (inputs,)
    conv = next((each for each in base.modules() if isinstance(each, nn.Conv2d)), None)
    if conv is None:
        raise ValueError("`inputs` must be given for a model without a Conv2d. Received: None")
    generator = torch.Generator().manual_seed(0)
    refusal: Exception | None = None
    for size in _IMAGE_SIZES:
        x = torch.randn(1, conv.in_channels, size, size, generator=generator)
        x = x.to(conv.weight.device, conv.weight.dtype)
        try:
            _called(base, (x,))
        except Exception as error:  # Whatever the code of a model raises.
            refusal = refusal or error
        else:
            return (x,)
    raise ValueError(
        "`inputs` must be given: the model takes no random images of "
        f"{conv.in_channels} channels. Received: None. It says: {refusal}"
    ) from refusal


def _called(model: nn.Module, arguments: tuple[Any, ...]) -> Any:
    """Calls a model in eval mode, and leaves every module in the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return model(*copy.deepcopy(arguments))
    finally:
        for module, mode in modes:
            module.training = mode


def _measured(
    base: nn.Module,
    chains: list[_Chain],
    made: dict[str, SeparableConv2d],
    arguments: tuple[Any, ...],
) -> list[Candidate]:
    """Runs the original, and every new layer on what it gets there."""
    modules = dict(base.named_modules())
    found: dict[str, dict[str, Any]] = {chain.name: {"calls": 0} for chain in chains}
    hooks = [hook for chain in chains for hook in _observed(chain, made, modules, found)]
    try:
        _called(base, arguments)
    finally:
        for hook in hooks:
            hook.remove()
    records = []
    for chain in chains:
        convs: list[Any] = [modules[name] for name in (chain.name, chain.pointwise) if name]
        parameters = [each for conv in convs for each in conv.parameters()]
        facts = found[chain.name]
        records.append(
            Candidate(
                " + ".join(filter(None, (chain.name, chain.pointwise))),
                " + ".join(type(conv).__name__ for conv in convs),
                chain.reason,
                tuple(chain.absorbed) if chain.reason is None else (),
                parameters=sum(each.numel() for each in parameters),
                epsilon=torch.finfo(parameters[0].dtype).eps,
                **facts if facts["calls"] else {"calls": 0},
            )
        )
    return records


def _observed(
    chain: _Chain,
    made: dict[str, SeparableConv2d],
    modules: dict[str, Any],
    found: dict[str, dict[str, Any]],
) -> Iterator[Any]:
    facts = found[chain.name]
    depthwise = modules[chain.name]
    pointwise = modules[chain.pointwise] if chain.pointwise else None

    def count(module: Any, given: Any, output: Tensor) -> None:
        images = output.shape[0] if output.dim() == 4 else 1
        values = output.numel() // max(images, 1)
        height, width = depthwise.kernel_size
        filters = pointwise.out_channels if pointwise is not None else 0
        facts["calls"] += 1
        facts["macs"] = facts.get("macs", 0) + values * (height * width + filters)
        saved = values * output.element_size() if chain.name in made else 0
        facts["hidden_bytes"] = facts.get("hidden_bytes", 0) + saved

    yield depthwise.register_forward_hook(count)
    if chain.name not in made:
        return
    layer = made[chain.name]
    kept: list[Tensor] = []

    def keep(module: Any, given: tuple[Tensor, ...]) -> None:
        kept.append(given[0].clone())

    def compare(module: Any, given: Any, output: Tensor) -> None:
        y = layer(kept.pop())
        facts["difference"] = max(facts.get("difference", 0.0), _largest(y.double() - output))
        facts["largest"] = max(facts.get("largest", 0.0), _largest(output))

    yield modules[chain.first].register_forward_pre_hook(keep)
    yield modules[chain.last].register_forward_hook(compare)


def _compared(base: nn.Module, new: nn.Module, arguments: tuple[Any, ...]) -> tuple[float, float]:
    old = list(_tensors(_called(base, arguments)))
    pairs = list(zip(old, _tensors(_called(new, arguments)), strict=True))
    difference = max((_largest(b.double() - a.double()) for a, b in pairs), default=0.0)
    return difference, max(map(_largest, old), default=0.0)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0

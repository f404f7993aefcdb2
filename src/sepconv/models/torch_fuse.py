"""Fusion of torch models: what may become one, the new model, and its undoing.

The new model keeps its classes and their code. Our layer stands in the place of the depthwise
convolution, and modules that hand on what they get stand where the other parts of it stood. Where
such a part is a function in the code of a module, this module gets that code without it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sepconv.models.exclusion import Exclusion
from sepconv.models.report import Candidate, Report
from sepconv.models.torch_functions import (
    Place,
    called_as_traced,
    functions_as_modules,
    restore,
    rewrite,
)
from sepconv.models.torch_graph import Absorbed, Function, Pair, Reading, hooked, replaced
from sepconv.spec import ACTIVATIONS, ConvSpec
from sepconv.torch import SeparableConv2d
from sepconv.torch.composition import ACTIVATION_FUNCTIONS

__all__ = ["Absorbed", "fuse", "to_stock"]

_LINEAR = ACTIVATIONS[0]
# Exact classes. Whether the function is ours as well, slope and all, is tried on numbers.
_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardtanh: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Hardsigmoid: "hard_sigmoid",
    nn.Hardswish: "hard_silu",
    nn.ELU: "elu",
}
_PASSING = (nn.Identity, Absorbed)
"""Hand on what they get."""
_MAKING = (nn.Conv2d, nn.BatchNorm2d, SeparableConv2d, Absorbed)
"""Give what nobody else sees."""
_NONE = ((0, 0), (0, 0))
"""No padding."""
_IMAGE_SIZES = (224, 64, 32, 299)
"""Rows and columns of random images; the first that the model takes."""


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
        ValueError: the model cannot be copied; random images do not fit it; or its code does more
            with what is swapped than to call it.
    """
    base, new = _copied(model), _copied(model)
    if inference:
        base.eval()
        new.eval()
    arguments = _arguments(base, inputs)
    answers, hooks = called_as_traced(base)
    outputs = list(_tensors(_called(base, arguments)))
    for hook in hooks:
        hook.remove()
    # From here on the copy is for reading and measuring: all that may be part of a layer is a
    # module.
    places = functions_as_modules(base, answers)
    reading = Reading(base)
    originals = dict(model.named_modules())
    originals |= {name: originals[place.owner] for name, place in places.items()}
    excluded.check(originals)

    def is_excluded(name: str) -> bool:
        return excluded(name, originals[name])

    chains = []
    for name in reading.candidates(ours=inference):
        chain = _chain(reading, name, inference, is_excluded)
        if chain.is_pair or chain.absorbed:  # Else it is one of ours that nothing is folded into.
            chains.append(chain)
        if chain.reason is None:
            reading.taken.update(chain.absorbed)
    modules = dict(new.named_modules())
    made = {chain.name: chain.make(modules) for chain in chains if chain.reason is None}
    facts = _measured(base, chains, made, arguments)
    swapped = [chain for chain in chains if chain.reason is None]
    _take_functions(modules, swapped, made, places)
    renamed: dict[str, str] = {}
    for chain in swapped:
        _swap(new, chain, modules, made[chain.name], renamed)
    try:
        answer = _called(new, arguments)
    except Exception as error:  # Whatever the code of a model raises.
        raise ValueError(
            "`model` must not use what is swapped for more than to call it; `exclude` leaves "
            f"modules as they are. The new model says: {error}"
        ) from error
    difference, largest = _compared(outputs, answer)
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
    # What the layers took in, also out of the code of others, which is to be that which it was.
    placed: dict[int, dict[str, Absorbed]] = {}
    for module in new.modules():
        if isinstance(module, Absorbed):
            layer, role = module.source
            placed.setdefault(id(layer), {})[role] = module
    for module in new.modules():
        restore(module)
    stock: dict[int, nn.Module] = {}
    pointwise: dict[int, nn.Module] = {}
    for module in new.modules():
        if isinstance(module, SeparableConv2d):
            stages, pointwise[id(module)] = _stages(module, placed.get(id(module), {}))
            stock[id(module)] = stages[0] if len(stages) == 1 else nn.Sequential(*stages)
    for module in new.modules():
        if isinstance(module, Absorbed):
            layer, role = module.source
            if role == "pointwise":
                stock[id(module)] = pointwise[id(layer)]
            elif role == "padding":
                stock[id(module)] = _padding_module(module.amounts)
            else:
                stock[id(module)] = _activation_module(getattr(layer, role, _LINEAR))
    return replaced(new, stock)


def _stages(
    layer: SeparableConv2d, placed: dict[str, Absorbed]
) -> tuple[list[nn.Module], nn.Module]:
    """The modules of torch in place of a layer, without those placed elsewhere; the last one too.

    Args:
        layer: Of ours.
        placed: What stands in the model for its other parts, by role.
    """
    taken = placed["padding"].amounts if "padding" in placed else _NONE
    added = _NONE
    bare = copy.copy(layer)
    if not isinstance(layer.padding, str):
        rows, columns = _sum(layer.padding, taken, -1)
        if rows[0] != rows[1] or columns[0] != columns[1]:
            added, rows, columns = (rows, columns), *_NONE
        bare.padding = (rows, columns)
    conv_dw, conv_pw = bare.to_pair()
    stages = {
        "input_activation": _activation_module(layer.input_activation),
        "padding": _padding_module(added),
        "depthwise": conv_dw,
        "depthwise_activation": _activation_module(layer.depthwise_activation),
        "pointwise": conv_pw,
        "activation": _activation_module(layer.activation),
    }
    here = [
        stage
        for role, stage in stages.items()
        if (role == "padding" or role not in placed) and not isinstance(stage, nn.Identity)
    ]
    return here, conv_pw


def _sum(one: tuple[Pair, Pair], other: tuple[Pair, Pair], sign: int = 1) -> tuple[Pair, Pair]:
    (top, bottom), (left, right) = (
        (before + sign * more, after + sign * further)
        for (before, after), (more, further) in zip(one, other, strict=True)
    )
    return (top, bottom), (left, right)


def _padding_module(amounts: tuple[Pair, Pair]) -> nn.Module:
    rows, columns = amounts
    return nn.Identity() if amounts == _NONE else nn.ZeroPad2d((*columns, *rows))


def _activation_module(name: str) -> nn.Module:
    for cls, known in _MODULES.items():
        if known == name:
            return cls(0.2) if cls is nn.LeakyReLU else cls()
    return nn.Identity()


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ValueError(
            f"`model` must be one that copy.deepcopy takes. It says: {error}"
        ) from error


# --------------------------------------------------------------------------- what may become one


@dataclass
class _Chain:
    """A depthwise convolution and what becomes one layer with it, or why it does not."""

    name: str
    reading: Reading
    inference: bool
    is_excluded: Callable[[str], bool]
    reason: str | None = None
    pointwise: str = ""
    activations: dict[str, str] = field(default_factory=dict)
    """By stage: "input_activation", "depthwise_activation", "activation"."""
    norms: dict[str, nn.BatchNorm2d] = field(default_factory=dict)
    """By the stage that they follow: "depthwise", "pointwise"."""
    absorbed: dict[str, str] = field(default_factory=dict)
    """Names of the other modules, and the role of each."""
    amounts: tuple[Pair, Pair] = _NONE
    """Of a padding before the depthwise stage."""
    first: str = ""
    last: str = ""

    @property
    def is_pair(self) -> bool:
        """Whether it is made of two convolutions of torch, and not a layer of ours already."""
        return isinstance(self.reading.modules[self.name], nn.Conv2d)

    def make(self, modules: dict[str, nn.Module]) -> SeparableConv2d:
        """The layer, on the parameters themselves unless a batch norm changes them."""
        if self.is_pair:
            convs: list[Any] = [modules[self.name], modules[self.pointwise]]
            for position, stage in enumerate(("depthwise", "pointwise")):
                if stage in self.norms:
                    convs[position] = _folded(convs[position], self.norms[stage])
            layer = SeparableConv2d.from_pair(convs[0], convs[1], **self.activations)
        else:
            # The very one: what was taken into it before knows it.
            own: Any = modules[self.name]
            layer = own
            if self.norms:
                layer.pointwise = _folded(layer.pointwise, self.norms["pointwise"])
            for stage, activation in self.activations.items():
                setattr(layer, stage, activation)
        if self.amounts != _NONE:
            padding = _padding_of(layer)
            assert padding is not None  # _take_before has looked.
            layer.padding = _sum(padding, self.amounts)
        return layer

    def stand_in(self, name: str, layer: SeparableConv2d) -> Absorbed:
        """What stands where a part of the layer was."""
        role = "pointwise" if name == self.pointwise else self.absorbed[name]
        return Absorbed(layer, role, self.amounts if role == "padding" else _NONE)


def _chain(
    reading: Reading, name: str, inference: bool, is_excluded: Callable[[str], bool]
) -> _Chain:
    chain = _Chain(name, reading, inference, is_excluded, first=name, last=name)
    if name not in reading.calls:
        chain.reason = "no call of it was found in the data flow"
    elif (hidden := reading.why_hidden(name)) is not None:
        chain.reason = hidden
    elif chain.is_pair:
        chain.reason = _why_no_convolution(chain, name) or _take_between(chain)
    else:
        layer: Any = reading.modules[name]
        chain.reason = next(
            filter(
                None,
                (
                    _why_no_convolution(chain, each)
                    for each in (name, f"{name}.depthwise", f"{name}.pointwise")
                ),
            ),
            None,
        )
        stages = ("input_activation", "depthwise_activation", "activation")
        chain.activations |= {
            stage: getattr(layer, stage) for stage in stages if getattr(layer, stage) != _LINEAR
        }
    if chain.reason is None and inference:
        _take_after(chain)
        _take_before(chain)
    return chain


def _take_between(chain: _Chain) -> str | None:
    """Takes all up to the pointwise convolution into the chain, or tells why not."""
    reading = chain.reading
    while True:
        following, why = reading.after(chain.last)
        if following is None:
            return why
        module = reading.modules[following]
        chain.last = following
        if isinstance(module, nn.Conv2d):
            chain.pointwise = following
            depthwise = reading.modules[chain.name]
            return _why_no_convolution(chain, following) or _why_no_pointwise(
                following, module, depthwise
            )
        refusal = None if type(module) in _PASSING else _take(chain, following, "depthwise")
        if refusal is not None:
            return f"between the stages: {refusal}"


def _take_after(chain: _Chain) -> None:
    """Takes batch norms and an activation behind the stages into the chain."""
    while (found := chain.reading.after(chain.last)[0]) is not None:
        passes = type(chain.reading.modules[found]) in _PASSING
        if not passes and _take(chain, found, "pointwise"):
            return
        chain.last = found


def _take_before(chain: _Chain) -> None:
    """Takes a padding and an activation before the stages into the chain."""
    reading = chain.reading

    def previous(name: str) -> str | None:
        found = reading.before(name)
        if found is None or found in reading.taken or chain.is_excluded(found):
            return None
        return None if hooked(reading.modules[found]) else found

    found = previous(chain.name)
    if found is None or "input_activation" in chain.activations:
        return
    amounts = _amounts_of(reading.modules[found])
    if amounts is not None and _padding_of(reading.modules[chain.name]) is not None:
        chain.amounts = amounts
        chain.absorbed[found] = "padding"
        chain.first = found
        found = previous(found)
    if found is None or not (activation := _activation_name(reading.modules[found])):
        return
    # One that works in place changes what others may still read, unless that is a fresh output.
    source = reading.before(found)
    fresh = source is not None and isinstance(reading.modules[source], _MAKING)
    if fresh or not getattr(reading.modules[found], "inplace", False):
        chain.activations["input_activation"] = activation
        chain.absorbed[found] = "input_activation"
        chain.first = found


def _take(chain: _Chain, name: str, stage: str) -> str | None:
    """Takes a batch norm or an activation behind a stage into the chain, or tells why not."""
    module = chain.reading.modules[name]
    role = "activation" if stage == "pointwise" else "depthwise_activation"
    kind = f"{name} ({module.name if isinstance(module, Function) else type(module).__name__})"
    if chain.is_excluded(name):
        return f"{name} is excluded"
    if hooked(module):
        return f"{kind} has hooks"
    if name in chain.reading.taken:
        return f"{kind} is part of another layer"
    activation = _activation_name(module)
    norm = isinstance(module, nn.BatchNorm2d)
    if activation is None and not norm:
        return kind
    if not chain.inference:
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


def _why_no_convolution(chain: _Chain, name: str) -> str | None:
    module = chain.reading.modules[name]
    if chain.is_excluded(name):
        return f"{name} is excluded"
    if hooked(module):
        return f"{name} has hooks"
    if name in chain.reading.read:
        return f"the weights of {name} are used in the code of the model as well"
    if isinstance(module, SeparableConv2d):
        return None
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
    if isinstance(module, Function):
        names = [] if module.name == "pad" else list(ACTIVATIONS[1:])
    else:
        names = [name for kind, name in _MODULES.items() if kind is type(module)]
    # Far numbers as well: a bound may be anywhere.
    x = torch.linspace(-8.0, 8.0, 97, dtype=torch.float64)
    x = torch.cat([x, torch.tensor([-1e30, 1e30], dtype=torch.float64)])
    y = module(x.clone()) if names else x
    for name in names:
        if torch.allclose(y, ACTIVATION_FUNCTIONS[name](x), atol=1e-9):
            return name
    return None


def _amounts_of(module: nn.Module) -> tuple[Pair, Pair] | None:
    """Rows and columns of zeros that a module adds; `None` if it does something else."""
    if type(module) is nn.ZeroPad2d or (type(module) is nn.ConstantPad2d and module.value == 0):
        amounts: Any = module.padding
    elif isinstance(module, Function) and module.name == "pad":
        call = inspect.signature(nn.functional.pad).bind(None, *module.arguments, **module.keywords)
        call.apply_defaults()
        if call.arguments["mode"] != "constant" or call.arguments["value"] not in (None, 0):
            return None
        amounts = call.arguments["pad"]
    else:
        return None
    amounts = (*amounts, 0, 0, 0, 0)[: max(4, len(amounts))]
    if len(amounts) > 4 or min(amounts) < 0:
        return None
    left, right, top, bottom = amounts
    return (top, bottom), (left, right)


def _padding_of(conv: Any) -> tuple[Pair, Pair] | None:
    """What a convolution, or a layer of ours, pads rows and columns with, if that is in numbers."""
    if isinstance(conv.padding, str):
        return _NONE if conv.padding == ConvSpec().padding else None
    rows, columns = (size if isinstance(size, tuple) else (size, size) for size in conv.padding)
    return rows, columns


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


def _take_functions(
    modules: dict[str, nn.Module],
    chains: list[_Chain],
    made: dict[str, SeparableConv2d],
    places: dict[str, Place],
) -> None:
    """Takes the functions that are part of a layer out of the code that calls them."""
    taken: dict[str, dict[int, nn.Module]] = {}
    for chain in chains:
        for name in chain.absorbed:
            if name in places:
                owner, number = places[name]
                stand_in = chain.stand_in(name, made[chain.name])
                taken.setdefault(owner, {})[number] = stand_in.train(modules[owner].training)
    for owner, stand_ins in taken.items():
        rewrite(modules[owner], stand_ins)


def _swap(
    new: nn.Module,
    chain: _Chain,
    modules: dict[str, nn.Module],
    layer: SeparableConv2d,
    renamed: dict[str, str],
) -> None:
    stand_ins: dict[int, nn.Module] = {id(modules[chain.name]): layer}
    for name in (chain.pointwise, *chain.absorbed):
        # Else it is a function, which is out of the code already; or the layer has no such part.
        if name and name in modules:
            stand_in = chain.stand_in(name, layer)
            stand_ins[id(modules[name])] = stand_in.train(modules[name].training)
    paths = [(path, module) for path, module in new.named_modules(remove_duplicate=False)]
    for stage, own in (("depthwise", chain.name), ("pointwise", chain.pointwise)):
        if stage in chain.norms or not chain.is_pair:
            continue
        for path, module in paths:
            if module is modules[own]:
                for parameter, _ in module.named_parameters():
                    renamed[f"{path}.{parameter}"] = f"{chain.name}.{stage}.{parameter}"
    replaced(new, stand_ins)


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
    pointwise = modules[chain.pointwise] if chain.pointwise else None

    def count(module: Any, given: Any, output: Tensor) -> None:
        positions = output.shape[-2] * output.shape[-1]
        if isinstance(module, SeparableConv2d):
            values = positions * module.depthwise.out_channels
            filters, saved = module.out_channels, 0  # Nothing more than before.
        else:
            values = positions * module.out_channels
            filters = pointwise.out_channels if pointwise is not None else 0
            saved = values * output.element_size() if chain.name in made else 0
        height, width = module.kernel_size
        facts["calls"] += 1
        facts["macs"] = facts.get("macs", 0) + values * (height * width + filters)
        facts["hidden_bytes"] = facts.get("hidden_bytes", 0) + saved

    yield modules[chain.name].register_forward_hook(count)
    if chain.name not in made:
        return
    layer = made[chain.name]
    kept: list[Tensor] = []

    def keep(module: Any, given: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> None:
        (x,) = (*given, *keywords.values())
        kept.append(x.clone())

    def compare(module: Any, given: Any, output: Tensor) -> None:
        y = layer(kept.pop())
        facts["difference"] = max(facts.get("difference", 0.0), _largest(y.double() - output))
        facts["largest"] = max(facts.get("largest", 0.0), _largest(output))

    yield modules[chain.first].register_forward_pre_hook(keep, with_kwargs=True)
    yield modules[chain.last].register_forward_hook(compare)


def _compared(old: list[Tensor], new: Any) -> tuple[float, float]:
    pairs = list(zip(old, _tensors(new), strict=True))
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

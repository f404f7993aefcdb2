"""How the operators differentiate, and how one calls them so that they do.

Reverse mode is one `backward`. Without activations and biases `forward` is linear in each of x,
depthwise_kernel and pointwise_kernel, and the derivatives of both operators are again calls of them
with one operand replaced. With activations, gradients that shall be differentiated themselves, and
forward mode, are computed in parts: such multilinear calls, and activations, slopes and biases
around them by torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sepconv.spec import Geometry
from sepconv.torch import operators
from sepconv.torch.composition import activate, times_slope
from sepconv.torch.operators import Operands, Positions
from sepconv.torch.quiet import are_plain, is_quiet, is_wrapped


def _has_kernels(tensor: Tensor) -> bool:
    return tensor.is_cpu or tensor.is_cuda


def _forward_below_autograd(geometry: Geometry, operands: Sequence[Any]) -> Tensor:
    if is_quiet() and are_plain(operands) and _has_kernels(operands[0]):
        arguments: Any = (*operands, geometry)
        return operators.run_forward(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.sepconv.forward.default(*operands, geometry)


def _backward_below_autograd(
    geometry: Geometry, wrt: Positions, dy: Tensor, operands: Sequence[Any], y: Tensor | None
) -> list[Tensor]:
    if is_quiet() and are_plain((dy, *operands, y)) and _has_kernels(dy):
        arguments: Any = (*operands, y, geometry, wrt)
        return operators.run_backward(dy, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.sepconv.backward.default(dy, *operands, y, geometry, wrt)


def autograd_forward(*arguments: Any) -> Tensor:
    """The operator `forward` under autograd."""
    return _Forward.apply(Geometry(*arguments[-1]), *arguments[:-1])


def autograd_backward(*arguments: Any) -> list[Tensor]:
    """The operator `backward` under autograd."""
    *tensors, geometry, wrt = arguments
    return list(_Backward.apply(Geometry(*geometry), tuple(wrt), *tensors))


def call_forward(geometry: Geometry, *operands: Any) -> Tensor:
    """`sepconv::forward`, on the shortest way that whoever listens allows."""
    if is_quiet():
        return applied(_Forward, geometry, *operands)
    if torch._C._are_functorch_transforms_active():
        return _Forward.apply(geometry, *operands)
    return torch.ops.sepconv.forward.default(*operands, geometry)


def call_backward(
    geometry: Geometry, wrt: Positions, dy: Tensor, operands: Operands, y: Tensor | None
) -> Sequence[Tensor]:
    """`y` is the output or None; with it, the kernel need not compute it again."""
    if is_quiet():
        return applied(_Backward, geometry, wrt, dy, *operands, y)
    if torch._C._are_functorch_transforms_active():
        return _Backward.apply(geometry, wrt, dy, *operands, y)
    return torch.ops.sepconv.backward.default(dy, *operands, y, geometry, wrt)


def applied(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """What `function.apply` does outside of transforms, without binding arguments to names."""
    if any(isinstance(argument, Tensor) and is_wrapped(argument) for argument in arguments):
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def saves_output(geometry: Geometry) -> bool:
    """Whether the slope of the activation follows from the output, which is then saved."""
    return geometry.activation != 0 and _slope_follows_from_output(geometry.activation)


@functools.cache
def _slope_follows_from_output(activation: int) -> bool:
    from sepconv import _native  # Not before: GPU kernels run without it.

    return _native.slope_follows_from_output(activation)


def _is_multilinear(geometry: Geometry) -> bool:
    g = geometry
    activations = g.input_activation, g.depthwise_activation, g.activation
    return not any((*activations, g.has_depthwise_bias, g.has_bias))


def _replaced(values: Sequence[Any], positions: Sequence[int], others: Sequence[Any]) -> list[Any]:
    result = list(values)
    for position, other in zip(positions, others, strict=True):
        result[position] = other
    return result


def _sum(terms: Sequence[Tensor]) -> Tensor | None:
    return functools.reduce(torch.add, terms) if terms else None


def _primals(tensors: Sequence[Any]) -> list[Any]:
    """What a context saved for forward mode, without the tangents that it carries."""
    unpack = torch.autograd.forward_ad.unpack_dual
    return [None if tensor is None else unpack(tensor).primal for tensor in tensors]


def operand_gradients(
    geometry: Geometry,
    needed: Sequence[bool],
    dy: Tensor,
    operands: Sequence[Any],
    y: Tensor | None,
) -> list[Any]:
    """Gradients by the operands, None for those not needed; they can be differentiated again."""
    wrt = tuple(position for position, wanted in enumerate(needed) if wanted)
    differentiated = torch.is_grad_enabled() or torch.autograd.forward_ad._current_level >= 0
    gradients: Sequence[Tensor]
    if differentiated and not _is_multilinear(geometry):
        gradients = _backward_in_parts(geometry, wrt, dy, operands)
    else:
        gradients = call_backward(geometry, wrt, dy, operands, y)
    return _replaced([None] * 5, wrt, gradients)


class _Forward(torch.autograd.Function):
    """(geometry, five operands) -> y."""

    @staticmethod
    def forward(geometry: Geometry, *operands: Any) -> Tensor:
        return _forward_below_autograd(geometry, operands)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        geometry, *operands = inputs
        ctx.geometry = geometry
        saved = (*operands, output if saves_output(geometry) else None)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        *operands, y = ctx.saved_tensors
        return None, *operand_gradients(ctx.geometry, ctx.needs_input_grad[-5:], dy, operands, y)

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Any) -> Tensor:
        *operands, _ = _primals(ctx.saved_tensors)
        return _tangent_in_parts(ctx.geometry, operands, tangents)

    @staticmethod
    def vmap(info: Any, in_dims: Any, geometry: Geometry, *operands: Any) -> tuple[Any, Any]:
        def call(geometry: Geometry, *operands: Any) -> Tensor:
            return call_forward(geometry, *operands)

        return _mapped(call, {0}, True, info.batch_size, in_dims[-5:], geometry, operands)


class _Backward(torch.autograd.Function):
    """(geometry, wrt, dy, five operands, y or None) -> gradients by the operands in `wrt`."""

    @staticmethod
    def forward(geometry: Geometry, wrt: Positions, dy: Tensor, *others: Any) -> tuple[Any, ...]:
        *operands, y = others
        return tuple(_backward_below_autograd(geometry, wrt, dy, operands, y))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.geometry, ctx.wrt, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        dy, *operands, _ = ctx.saved_tensors
        g, wrt = ctx.geometry, ctx.wrt
        needed = [i for i, needs in enumerate(ctx.needs_input_grad[-7:-1]) if needs]
        live = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]
        positions = tuple(wrt[i] for i in live)
        values = [cotangents[i] for i in live]
        gradients: list[Any] = [None] * 6  # Of dy and the operands.
        if not live or not needed:
            pass
        elif _is_multilinear(g):
            replaced = [
                _replaced(operands, [p], [v]) for p, v in zip(positions, values, strict=True)
            ]
            if 0 in needed:
                gradients[0] = _sum([call_forward(g, *operands) for operands in replaced])
            # <v, gradient by p> = <dy, forward with p replaced by v>, which operand p is not in.
            for i in (position - 1 for position in needed if position > 0):
                terms = zip(positions, replaced, strict=True)
                gradients[1 + i] = _sum(
                    [call_backward(g, (i,), dy, other, None)[0] for p, other in terms if p != i]
                )
        else:
            # Only for who calls the operator itself. `y` is a function of the operands, and what
            # follows accounts for every use of those.
            point: list[Any] = [
                None if t is None else t.detach().requires_grad_() for t in (dy, *operands)
            ]
            with torch.enable_grad():
                parts = _backward_in_parts(g, positions, point[0], point[1:])
            chosen = [point[i] for i in needed]
            pulled = torch.autograd.grad(parts, chosen, values, allow_unused=True)
            gradients = _replaced(gradients, needed, pulled)
        return None, None, *gradients, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Any, ...]:
        g, wrt = ctx.geometry, ctx.wrt
        if not _is_multilinear(g):
            raise NotImplementedError(
                "`sepconv::backward` with an activation or a bias has no forward derivative; "
                "`separable_conv2d` differentiates it in parts"
            )
        dy, *operands = _primals(ctx.saved_tensors[:6])
        dy_tangent, *operand_tangents = tangents[-7:-1]
        terms: dict[int, list[Tensor]] = {position: [] for position in wrt}

        def collect(positions: Positions, dy: Tensor, operands: Operands) -> None:
            gradients = call_backward(g, positions, dy, operands, None)
            for position, gradient in zip(positions, gradients, strict=True):
                terms[position].append(gradient)

        if dy_tangent is not None:
            collect(wrt, dy_tangent, operands)
        for i, tangent in enumerate(operand_tangents):
            others = tuple(position for position in wrt if position != i)
            if tangent is not None and others:
                collect(others, dy, _replaced(operands, [i], [tangent]))
        sums = [_sum(terms[position]) for position in wrt]
        return tuple(
            torch.zeros_like(operands[position]) if total is None else total
            for position, total in zip(wrt, sums, strict=True)
        )

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, geometry: Geometry, wrt: Positions, *tensors: Any
    ) -> tuple[Any, Any]:
        def call(geometry: Geometry, dy: Tensor, *others: Any) -> tuple[Tensor, ...]:
            *operands, y = others
            return tuple(call_backward(geometry, wrt, dy, operands, y))

        foldable = wrt == (0,)
        return _mapped(call, {0, 1, 6}, foldable, info.batch_size, in_dims[-7:], geometry, tensors)


def _mapped(
    call: Callable[..., Any],
    images: set[int],
    foldable: bool,
    size: int,
    dims: Sequence[Any],
    geometry: Geometry,
    tensors: Sequence[Any],
) -> tuple[Any, Any]:
    """Folds a mapped axis into the batch; where a kernel or its gradient is mapped, loops.

    `images` are the positions of tensors that have a batch, where there is such a tensor.
    """
    mapped = [i for i, dim in enumerate(dims) if dim is not None]
    tensors = _replaced(tensors, mapped, [tensors[i].movedim(dims[i], 0) for i in mapped])
    if foldable and images.issuperset(mapped):
        images = {i for i in images if tensors[i] is not None}
        whole = {
            i: tensors[i] if i in mapped else tensors[i].expand(size, *tensors[i].shape)
            for i in images
        }
        folded = _replaced(tensors, list(whole), [t.flatten(0, 1) for t in whole.values()])
        out = call(geometry._replace(batch=size * geometry.batch), *folded)
        sizes = (size, geometry.batch)
        if isinstance(out, Tensor):
            return out.unflatten(0, sizes), 0
        return tuple(t.unflatten(0, sizes) for t in out), (0,) * len(out)
    outs = [
        call(geometry, *_replaced(tensors, mapped, [tensors[i][k] for i in mapped]))
        for k in range(size)
    ]
    if isinstance(outs[0], Tensor):
        return torch.stack(outs), 0
    stacked = tuple(torch.stack(each) for each in zip(*outs, strict=True))
    return stacked, (0,) * len(stacked)


def _along_channels(geometry: Geometry, vector: Tensor) -> Tensor:
    return vector if geometry.layout == 0 else vector[:, None, None]


def _over_pixels(geometry: Geometry, image: Tensor) -> Tensor:
    return image.sum((0, 1, 2) if geometry.layout == 0 else (0, 2, 3))


class _Part(NamedTuple):
    """A multilinear call: some operands of the whole one, and constants for the others."""

    geometry: Geometry
    constants: dict[int, Tensor]

    def forward(self, *given: Tensor) -> Tensor:
        return call_forward(self.geometry, *self._operands(given))

    def backward(self, dy: Tensor, *given: Tensor) -> Sequence[Tensor]:
        """The gradients by what was given."""
        wrt = tuple(i for i in range(3) if i not in self.constants)
        return call_backward(self.geometry, wrt, dy, self._operands(given), None)

    def tangent(self, given: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Tensor | None:
        return _sum(
            [
                self.forward(*_replaced(given, [i], [tangent]))
                for i, tangent in enumerate(tangents)
                if tangent is not None
            ]
        )

    def _operands(self, given: Sequence[Tensor]) -> list[Any]:
        rest = iter(given)
        first = [self.constants[i] if i in self.constants else next(rest) for i in range(3)]
        return [*first, None, None]


def _parts(geometry: Geometry, like: Tensor) -> tuple[_Part, _Part]:
    """Both stages, each as a call of its own.

    The depthwise one has an identity for the pointwise kernel, the other one ones for the depthwise
    kernel.
    """
    g = _linear(geometry)
    between = g.depthwise_channels
    identity = torch.eye(between, dtype=like.dtype, device=like.device)[None, None]
    ones = torch.ones((1, 1, between, 1), dtype=like.dtype, device=like.device)
    pointwise = g._replace(
        in_height=g.out_height,
        in_width=g.out_width,
        in_channels=between,
        depth_multiplier=1,
        kernel_height=1,
        kernel_width=1,
        stride_height=1,
        stride_width=1,
        dilation_height=1,
        dilation_width=1,
        pad_top=0,
        pad_left=0,
    )
    return _Part(g._replace(out_channels=between), {2: identity}), _Part(pointwise, {1: ones})


def _linear(geometry: Geometry) -> Geometry:
    """The call without activations and biases."""
    return geometry._replace(
        input_activation=0, depthwise_activation=0, activation=0, has_depthwise_bias=0, has_bias=0
    )


def _plus(geometry: Geometry, image: Tensor | None, vector: Tensor | None) -> Any:
    if vector is None:
        return image
    along = _along_channels(geometry, vector)
    return along.expand(geometry.y_shape) if image is None else image + along


def _backward_in_parts(
    geometry: Geometry, wrt: Positions, dy: Tensor, operands: Sequence[Any]
) -> list[Tensor]:
    """What `backward` computes, of functions that torch can differentiate."""
    g = geometry
    x, kernel, pointwise, depthwise_bias, bias = operands
    a = activate(g.input_activation, x)
    if g.depthwise_activation:
        first, second = _parts(g, x)
        u = _plus(g, first.forward(a, kernel), depthwise_bias)
        v = activate(g.depthwise_activation, u)
        z = _plus(g, second.forward(v, pointwise), bias)
        dz = times_slope(g.activation, z, dy)
        dv, d_pointwise = second.backward(dz, v, pointwise)
        du = times_slope(g.depthwise_activation, u, dv)
        da, d_kernel = first.backward(du, a, kernel)
        d_depthwise_bias = _over_pixels(g, du)
    else:
        whole = _Part(_linear(g), {})
        z = whole.forward(a, kernel, pointwise)
        if depthwise_bias is not None:
            z = _plus(g, z, depthwise_bias @ pointwise[0, 0])
        dz = times_slope(g.activation, _plus(g, z, bias), dy)
        da, d_kernel, d_pointwise = whole.backward(dz, a, kernel, pointwise)
        sums = _over_pixels(g, dz)
        d_depthwise_bias = pointwise[0, 0] @ sums
        if depthwise_bias is not None:
            d_pointwise = d_pointwise + depthwise_bias[:, None] * sums
    dx = times_slope(g.input_activation, x, da)
    gradients = (dx, d_kernel, d_pointwise, d_depthwise_bias, _over_pixels(g, dz))
    return [gradients[position] for position in wrt]


def _tangent_in_parts(geometry: Geometry, operands: Sequence[Any], tangents: Sequence[Any]) -> Any:
    """The tangent of the output; a tangent of `None` is zero."""
    g = geometry
    x, kernel, pointwise, depthwise_bias, bias = operands
    x_, kernel_, pointwise_, depthwise_bias_, bias_ = tangents
    a = activate(g.input_activation, x)
    a_ = None if x_ is None else times_slope(g.input_activation, x, x_)
    if g.depthwise_activation:
        first, second = _parts(g, x)
        u = _plus(g, first.forward(a, kernel), depthwise_bias)
        between = first.geometry
        u_ = _plus(between, first.tangent((a, kernel), (a_, kernel_)), depthwise_bias_)
        v = activate(g.depthwise_activation, u)
        v_ = None if u_ is None else times_slope(g.depthwise_activation, u, u_)
        z = second.forward(v, pointwise)
        z_ = second.tangent((v, pointwise), (v_, pointwise_))
    else:
        whole = _Part(_linear(g), {})
        z = whole.forward(a, kernel, pointwise)
        z_ = whole.tangent((a, kernel, pointwise), (a_, kernel_, pointwise_))
        if depthwise_bias is not None:
            z = _plus(g, z, depthwise_bias @ pointwise[0, 0])
            if depthwise_bias_ is not None:
                z_ = _plus(g, z_, depthwise_bias_ @ pointwise[0, 0])
            if pointwise_ is not None:
                z_ = _plus(g, z_, depthwise_bias @ pointwise_[0, 0])
    z_ = _plus(g, z_, bias_)
    return times_slope(g.activation, _plus(g, z, bias), z_)

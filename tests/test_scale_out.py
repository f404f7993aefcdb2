"""Several devices and several processes, with the engines of the frameworks.

Each scene plays in processes of its own: the number of devices and the group of processes belong to
a process. JAX must keep what is spread over devices where it is, which the compiled program shows;
torch must get the bits of one process that does the same sums.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SECONDS = 300


def play(scene: str, processes: int = 1, **variables: str) -> None:
    """Runs a function of this file with the rank of the process as its argument."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        environment |= {
            "SCENE_FILE": str(Path(folder, "rendezvous")),
            "SCENE_PORT": str(port),
            "KERAS_HOME": folder,
            **variables,
        }
        running = [
            subprocess.Popen(
                [sys.executable, "-c", f"import test_scale_out as t; t.{scene}({rank})"],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(processes)
        ]
        try:
            outputs = [process.communicate(timeout=SECONDS)[0] for process in running]
        finally:
            for process in running:
                process.kill()
    codes = [process.returncode for process in running]
    assert not any(codes), f"exit codes {codes}\n" + "\n".join(outputs)


# -------------------------------------------------------------------------------------------- JAX

COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)
SHAPE = re.compile(r"\[([\d,]*)\]")


def collectives(compiled: Any) -> list[tuple[str, tuple[int, ...]]]:
    """What the devices exchange: (operation, shape), one for each array, sorted."""
    found = []
    for shapes, operation in COLLECTIVE.findall(compiled.as_text()):
        for shape in SHAPE.findall(shapes):
            found.append((operation, tuple(int(size) for size in shape.split(",") if size)))
    return sorted(found)


def own_calls(compiled: Any) -> set[str]:
    text = compiled.as_text()
    assert "convolution(" not in text
    return set(re.findall(r'custom_call_target="(sepconv_\w+)"', text))


def jax_problem(data_format: str = "channels_last") -> tuple[Any, Any, list[Any]]:
    """(layer, loss, arguments): x, both kernels, depthwise bias, bias."""
    import jax.numpy as jnp

    from sepconv.jax import separable_conv2d

    rng = np.random.default_rng(0)
    shapes = [(8, 9, 10, 6), (3, 3, 6, 2), (1, 1, 12, 8), (12,), (8,)]
    args = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]
    if data_format == "channels_first":
        args[0] = jnp.moveaxis(args[0], 3, 1)

    def layer(x: Any, depthwise: Any, pointwise: Any, depthwise_bias: Any, bias: Any) -> Any:
        return separable_conv2d(
            x,
            depthwise,
            pointwise,
            bias,
            padding="same",
            data_format=data_format,
            activation="tanh",
            depthwise_bias=depthwise_bias,
            depthwise_activation="relu",
        )

    def loss(*args: Any) -> Any:
        return jnp.sum(layer(*args) ** 2)

    return layer, loss, args


def assert_close(actual: Any, expected: Any) -> None:
    """Sums over devices have another order: roundings of the largest terms."""
    import jax

    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        scale = float(np.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * scale)


def place(mesh: Any, args: list[Any], *specs: tuple[Any, ...]) -> list[Any]:
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    return [
        jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
        for array, spec in zip(args, specs, strict=True)
    ]


def jax_mesh(rank: int) -> None:
    """Batch and filters over a mesh of 2 x 2 devices."""
    import jax
    from jax.sharding import Mesh, PartitionSpec

    assert jax.device_count() == 4
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
    every = tuple(range(5))
    by_filters = (None, None, None, "model"), (), ("model",)
    for data_format in ("channels_first", "channels_last"):
        layer, loss, args = jax_problem(data_format)
        y, gradients = layer(*args), jax.grad(loss, every)(*args)
        spread = place(mesh, args, ("data",), (), *by_filters)
        forward, backward = jax.jit(layer), jax.jit(jax.grad(loss, every))

        # Each device computes its images and its filters, from what it has: the same bits.
        compiled = forward.lower(*spread).compile()
        assert collectives(compiled) == []
        assert own_calls(compiled) == {"sepconv_forward"}
        result = forward(*spread)
        filters = 3 if data_format == "channels_last" else 1
        expected = ["data", None, None, None]
        expected[filters] = "model"
        assert result.sharding.is_equivalent_to(
            jax.sharding.NamedSharding(mesh, PartitionSpec(*expected)), 4
        )
        assert np.array_equal(result, y)

        # Gradients are summed over those that share an array; no array is gathered.
        compiled = backward.lower(*spread).compile()
        part_of_x = (4, *args[0].shape[1:])
        assert collectives(compiled) == sorted(
            ("all-reduce", shape) for shape in [part_of_x, (3, 3, 6, 2), (1, 1, 12, 4), (12,), (4,)]
        )
        assert own_calls(compiled) == {"sepconv_forward", "sepconv_backward"}
        assert_close(backward(*spread), gradients)

        # Images alone, over all devices: activations and their gradients stay; weights are summed.
        spread = place(mesh, args, (("data", "model"),), (), (), (), ())
        compiled = backward.lower(*spread).compile()
        assert collectives(compiled) == sorted(("all-reduce", array.shape) for array in args[1:])
        assert_close(backward(*spread), gradients)

        if data_format == "channels_first":
            continue

        # Weights stored in parts over the axis of the images are gathered; activations are not.
        spread = place(mesh, args, ("data",), (None, None, "data"), (None, None, "data"), (), ())
        compiled = forward.lower(*spread).compile()
        assert collectives(compiled) == sorted(
            ("all-gather", shape) for shape in [(3, 3, 6, 2), (1, 1, 12, 8)]
        )
        assert_close(backward(*spread), gradients)

        # Filters over the axis that images have taken.
        spread = place(mesh, args, ("data",), (), (None, None, None, "data"), (), ("data",))
        assert set(collectives(forward.lower(*spread).compile())) == {
            ("all-gather", (1, 1, 12, 8)),
            ("all-gather", (8,)),
        }
        assert_close(backward(*spread), gradients)

        # Rows and channels are neighbours of each other: they come together, and all is right.
        for axis in (2, 3):
            spread = place(mesh, args, (*[None] * axis, "data"), (), (), (), ())
            assert_close(backward(*spread), gradients)

    # Further transformations.
    spread = place(mesh, args, ("data",), (), *by_filters)
    assert_close(
        jax.jit(lambda *args: jax.jvp(layer, args, args))(*spread), jax.jvp(layer, args, args)
    )
    mapped = jax.vmap(layer, in_axes=(0, None, None, None, None))
    images = place(mesh, [args[0].reshape(4, 2, *args[0].shape[1:])], ("data",))
    compiled = jax.jit(mapped).lower(*images, *spread[1:]).compile()
    assert collectives(compiled) == []
    assert np.array_equal(mapped(*images, *spread[1:]).reshape(y.shape), y)


def jax_mesh_of_explicit_axes(rank: int) -> None:
    import jax
    from jax.sharding import AxisType, PartitionSpec

    layer, loss, args = jax_problem()
    every = tuple(range(5))
    y, gradients = layer(*args), jax.grad(loss, every)(*args)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        spread = place(mesh, args, ("data",), (), (None, None, None, "model"), (), ("model",))
        forward, backward = jax.jit(layer), jax.jit(jax.grad(loss, every))
        assert collectives(forward.lower(*spread).compile()) == []
        assert jax.typeof(forward(*spread)).sharding.spec == PartitionSpec(
            "data", None, None, "model"
        )
        assert np.array_equal(forward(*spread), y)
        operations = collectives(backward.lower(*spread).compile())
        assert {operation for operation, _ in operations} == {"all-reduce"}
        assert_close(backward(*spread), gradients)


def jax_depthwise_gradients_of_a_partly_replicated_batch(rank: int) -> None:
    """Where JAX's own convolutions run, too.

    Of a depthwise convolution whose images are spread over one axis of a mesh of two, XLA of jaxlib
    0.10.2 returns twice the gradient by the kernel: it also sums over the axis that has copies.
    """
    import jax
    from jax.sharding import Mesh

    import sepconv.jax

    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
    _, loss, args = jax_problem()
    every = tuple(range(5))

    def second(*args: Any) -> Any:
        return sum(jax.numpy.sum(gradient**2) for gradient in jax.grad(loss, every)(*args))

    derivatives = jax.grad(loss, every), jax.grad(second, every)
    expected = [derivative(*args) for derivative in derivatives]
    spread = place(mesh, args, ("data",), (), (), (), ())
    for fault in (None, "as if the kernel could not be called"):
        sepconv.jax._REGISTRATION_FAULT = fault
        jax.clear_caches()
        for derivative, values in zip(derivatives, expected, strict=True):
            assert_close(jax.jit(derivative)(*spread), values)


def jax_uneven_parts(rank: int) -> None:
    """8 images on 3 devices: XLA would fill the third part up, and sum what it filled in."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices())[:3], ("data",))
    _, loss, args = jax_problem()
    every = tuple(range(5))

    def spread_loss(x: Any, *rest: Any) -> Any:
        sharding = NamedSharding(mesh, PartitionSpec("data"))
        return loss(jax.lax.with_sharding_constraint(x, sharding), *rest)

    spread = place(mesh, args, (), (), (), (), ())
    assert_close(jax.jit(jax.grad(spread_loss, every))(*spread), jax.grad(loss, every)(*args))


@pytest.mark.parametrize(
    "scene",
    [
        "jax_mesh",
        "jax_mesh_of_explicit_axes",
        "jax_depthwise_gradients_of_a_partly_replicated_batch",
        "jax_uneven_parts",
    ],
)
def test_jax_over_four_devices(scene):
    play(scene, XLA_FLAGS="--xla_force_host_platform_device_count=4")


def jax_two_processes(rank: int) -> None:
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    jax.distributed.initialize(
        f"127.0.0.1:{os.environ['SCENE_PORT']}", num_processes=2, process_id=rank
    )
    assert jax.process_count() == 2
    assert jax.device_count() == 2 * jax.local_device_count() == 2
    mesh = Mesh(np.array(jax.devices()), ("data",))
    layer, loss, args = jax_problem()
    every = tuple(range(5))
    y, gradients = layer(*args), jax.grad(loss, every)(*args)

    half = slice(4 * rank, 4 * rank + 4)
    x = jax.make_array_from_process_local_data(
        NamedSharding(mesh, PartitionSpec("data")), np.asarray(args[0][half])
    )
    weights = [
        jax.make_array_from_process_local_data(
            NamedSharding(mesh, PartitionSpec()), np.asarray(array)
        )
        for array in args[1:]
    ]
    forward, backward = jax.jit(layer), jax.jit(jax.grad(loss, every))
    assert collectives(forward.lower(x, *weights).compile()) == []
    (part,) = forward(x, *weights).addressable_shards
    assert np.array_equal(part.data, y[half])
    assert {operation for operation, _ in collectives(backward.lower(x, *weights).compile())} == {
        "all-reduce"
    }
    found = backward(x, *weights)
    assert_close(found[0].addressable_shards[0].data, gradients[0][half])
    assert_close([g.addressable_shards[0].data for g in found[1:]], list(gradients[1:]))
    jax.distributed.shutdown()


def test_jax_over_two_processes():
    play("jax_two_processes", processes=2, XLA_FLAGS="")


# ------------------------------------------------------------------------------------------ Keras


def keras_model(backend: str) -> Any:
    import keras

    import sepconv.keras

    assert keras.backend.backend() == backend
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((12, 10, 3)),
            sepconv.keras.SeparableConv2D(8, 3, padding="same", activation="relu"),
            sepconv.keras.SeparableConv2D(16, 3, strides=2, depth_multiplier=2),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(4),
        ]
    )


def keras_data_parallel(rank: int) -> None:
    """Training over four devices is training on one; activations stay on their device."""
    import jax
    import keras

    rng = np.random.default_rng(1)
    x = rng.standard_normal((32, 12, 10, 3)).astype(np.float32)
    labels = rng.integers(0, 4, 32)

    def trained() -> tuple[Any, list[np.ndarray]]:
        model = keras_model("jax")
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1), loss)
        model.fit(x, labels, batch_size=16, epochs=2, shuffle=False, verbose=0)
        return model, [np.asarray(value) for value in model.get_weights()]

    _, alone = trained()
    assert jax.device_count() == 4
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    model, together = trained()
    assert_close(together, alone)

    layout = keras.distribution.distribution().get_data_layout(x.shape)
    images = jax.device_put(x, layout.backend_layout)
    variables = [v.value for v in model.trainable_variables]

    def predict(variables: Any, images: Any) -> Any:
        return model.stateless_call(variables, [], images)[0]

    compiled = jax.jit(predict).lower(variables, images).compile()
    assert collectives(compiled) == []
    assert own_calls(compiled) == {"sepconv_forward"}


def test_keras_data_parallel_on_jax():
    play(
        "keras_data_parallel",
        KERAS_BACKEND="jax",
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
    )


# ------------------------------------------------------------------------------------------ torch


def torch_model(ours: bool) -> Any:
    """Two layers, ours or torch's pairs of convolutions, with the same weights."""
    import torch
    from torch import nn

    from sepconv.torch import SeparableConv2d

    torch.manual_seed(0)
    layers = [
        SeparableConv2d(6, 24, 3, padding=1, activation="relu"),
        SeparableConv2d(24, 16, 3, stride=2, depth_multiplier=2),
    ]
    if not ours:
        first, second = (layer.to_pair() for layer in layers)
        layers = [*first, nn.ReLU(), *second]
    return nn.Sequential(*layers)


def torch_batch(step: int) -> Any:
    import torch

    return torch.randn(8, 6, 14, 12, generator=torch.Generator().manual_seed(step))


def join(rank: int) -> None:
    import torch.distributed

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{os.environ['SCENE_FILE']}", rank=rank, world_size=2
    )


def half_loss(model: Any, step: int, rank: int) -> Any:
    return (model(torch_batch(step)[4 * rank : 4 * rank + 4]) ** 2).mean()


STEPS = 3


def trained_by_one_process(ours: bool) -> list[Any]:
    """What two processes compute: a gradient for each half of the batch, then their mean."""
    import torch

    model = torch_model(ours)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for step in range(STEPS):
        halves = [
            torch.autograd.grad(half_loss(model, step, rank), list(model.parameters()))
            for rank in range(2)
        ]
        for parameter, *gradients in zip(model.parameters(), *halves, strict=True):
            parameter.grad = gradients[0] / 2 + gradients[1] / 2
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def leave() -> None:
    """Ends the group after its last exchange, and the process with it.

    A thread of torch that lets go of a tensor of Python while the interpreter ends aborts the
    process, with torch's own layers as well, now and then and in spite of the barrier.
    """
    import torch

    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def torch_ddp(rank: int) -> None:
    """DDP on two processes gives the bits of one process, as it does for torch's own layers."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    join(rank)
    for ours in (True, False):
        model = torch_model(ours)
        parallel = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(parallel.parameters(), 0.05, momentum=0.9)
        for step in range(STEPS):
            optimizer.zero_grad()
            half_loss(parallel, step, rank).backward()
            optimizer.step()
        for parameter, expected in zip(
            model.parameters(), trained_by_one_process(ours), strict=True
        ):
            assert torch.equal(parameter, expected), (ours, parameter.shape)
    leave()


def torch_fsdp2(rank: int) -> None:
    """Weights in parts on two processes: the training of one process."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    join(rank)
    mesh = init_device_mesh("cpu", (2,))
    model = torch_model(ours=True)
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    model.to(torch.float32)  # does not lay them out anew
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    parts = {type(parameter).__name__ for parameter in model.parameters()}
    assert parts == {"DTensor"}
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        half_loss(model, step, rank).backward()
        optimizer.step()
    for parameter, expected in zip(model.parameters(), trained_by_one_process(True), strict=True):
        torch.testing.assert_close(parameter.full_tensor(), expected)
    leave()


@pytest.mark.parametrize("scene", ["torch_ddp", "torch_fsdp2"])
def test_torch_over_two_processes(scene):
    play(scene, processes=2)

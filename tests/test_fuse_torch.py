"""Fusion of torch models: what is swapped, what is not and why, and that nothing else changes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from sepconv.models.fuse import fuse, to_stock
from sepconv.torch import SeparableConv2d


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(1)


def conv_dw(channels, stride=1, **options):
    return nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False, **options)


def warmed(model):
    """With batch norms that have seen data, so that folding them wrongly shows."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model


class MobileNet(nn.Module):
    """The blocks of MobileNetV1, narrow."""

    SIZES = ((8, 1), (16, 2), (16, 1), (32, 2), (32, 1))

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()]
        channels = 8
        for filters, stride in self.SIZES:
            layers += [conv_dw(channels, stride), nn.BatchNorm2d(channels), nn.ReLU6(inplace=True)]
            layers += [nn.Conv2d(channels, filters, 1, bias=False)]
            layers += [nn.BatchNorm2d(filters), nn.ReLU6(inplace=True)]
            channels = filters
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels, 10)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


class SeparableConv(nn.Module):
    """As in timm's xception: a pair without anything between."""

    def __init__(self, channels, filters, stride=1):
        super().__init__()
        self.conv1 = conv_dw(channels, stride)
        self.pointwise = nn.Conv2d(channels, filters, 1, bias=False)

    def forward(self, x):
        return self.pointwise(self.conv1(x))


class XceptionBlock(nn.Module):
    """As in timm's xception: relu, pair, batch norm, twice, beside a skip."""

    def __init__(self, channels, filters):
        super().__init__()
        self.skip = nn.Conv2d(channels, filters, 1, 2, bias=False)
        self.rep = nn.Sequential(
            nn.ReLU(inplace=False),
            SeparableConv(channels, filters),
            nn.BatchNorm2d(filters),
            nn.ReLU(inplace=True),
            SeparableConv(filters, filters),
            nn.BatchNorm2d(filters),
            nn.MaxPool2d(3, 2, 1),
        )

    def forward(self, x):
        return self.rep(x) + self.skip(x)


class ConvModule(nn.Module):
    """As in mmcv: convolution, norm and activation in an order that is an attribute."""

    def __init__(self, conv, filters):
        super().__init__()
        self.conv = conv
        self.bn = nn.BatchNorm2d(filters)
        self.activate = nn.ReLU(inplace=True)
        self.order = ("conv", "norm", "act")

    def forward(self, x, activate=True, norm=True):
        for layer in self.order:
            if layer == "conv":
                x = self.conv(x)
            elif layer == "norm" and norm:
                x = self.bn(x)
            elif layer == "act" and activate:
                x = self.activate(x)
        return x


class DepthwiseSeparableConvModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.depthwise_conv = ConvModule(conv_dw(6), 6)
        self.pointwise_conv = ConvModule(nn.Conv2d(6, 9, 1, bias=False), 9)

    def forward(self, x):
        return self.pointwise_conv(self.depthwise_conv(x))


class BatchNormAct2d(nn.BatchNorm2d):
    """As in timm: a batch norm with dropout and activation in it."""

    def __init__(self, channels, act):
        super().__init__(channels)
        self.drop = nn.Identity()
        self.act = act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class SharedHead(nn.Module):
    """As in EfficientDet: convolutions of all levels, batch norms of each."""

    def __init__(self):
        super().__init__()
        self.pair = SeparableConv(4, 4)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(5))
        self.act = nn.SiLU()

    def forward(self, x):
        levels = [x[:, :, i:, i:] for i in range(5)]
        return [self.act(bn(self.pair(y))) for bn, y in zip(self.norms, levels, strict=True)]


def is_close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_mobilenet_is_folded_whole():
    model = warmed(MobileNet()).eval()
    x = torch.randn(2, 3, 64, 64)
    new, report = fuse(model, inference=True, inputs=x)
    assert len(report.swapped) == len(report.candidates) == 5
    assert report.output_difference < 1e-5 * max(report.output_largest, 1)
    assert type(new) is MobileNet
    assert not any(isinstance(m, nn.BatchNorm2d) for m in list(new.features)[3:])
    layers = [m for m in new.modules() if isinstance(m, SeparableConv2d)]
    assert {(m.depthwise_activation, m.activation) for m in layers} == {("relu6", "relu6")}
    is_close(new(x), model(x))
    first = report.candidates[0]
    assert first.name == "features.3 + features.6"
    assert first.macs == 32 * 32 * 8 * (9 + 8)
    assert first.parameters == 8 * 9 + 8 * 8
    assert first.hidden_bytes == 32 * 32 * 8 * 4
    assert all(c.difference is not None and c.difference < 1e-4 for c in report.swapped)


def test_without_inference_a_batch_norm_between_is_the_reason():
    _, report = fuse(MobileNet())
    assert not report.swapped
    assert "batch norm in training" in report.candidates[0].reason


def test_the_original_stays_as_it_was():
    model = warmed(MobileNet()).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    fuse(model, inference=True)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("inference", [False, True])
def test_xception_blocks(inference):
    model = warmed(nn.Sequential(XceptionBlock(3, 8), XceptionBlock(8, 12))).eval()
    x = torch.randn(2, 3, 33, 33)
    new, report = fuse(model, inference=inference, inputs=x)
    assert len(report.swapped) == len(report.candidates) == 4
    is_close(new(x), model(x))
    activations = [m.input_activation for m in new.modules() if isinstance(m, SeparableConv2d)]
    # The first relu of a block does not stand alone on its input, and is not in place.
    expected = ["relu", "linear", "relu", "linear"] if inference else ["linear"] * 4
    assert activations == expected


def test_an_mmcv_block():
    model = warmed(DepthwiseSeparableConvModule()).eval()
    new, report = fuse(model, inference=True)
    assert [c.name for c in report.swapped] == ["depthwise_conv.conv + pointwise_conv.conv"]
    x = torch.randn(1, 6, 9, 9)
    is_close(new(x), model(x))


def test_batch_norms_with_an_activation_in_them():
    model = nn.Sequential(
        conv_dw(4), BatchNormAct2d(4, nn.SiLU()), nn.Conv2d(4, 5, 1), BatchNormAct2d(5, nn.ReLU())
    )
    model = warmed(model).eval()
    new, report = fuse(model, inference=True)
    assert report.swapped[0].absorbed == ("1", "3")
    assert (new[0].depthwise_activation, new[0].activation) == ("silu", "relu")
    x = torch.randn(1, 4, 7, 7)
    is_close(new(x), model(x))


def test_a_shared_pair_stays_shared():
    model = warmed(SharedHead()).eval()
    x = torch.randn(1, 4, 16, 16)
    new, report = fuse(model, inference=True, inputs=x)
    assert [c.calls for c in report.swapped] == [5]
    assert sum(isinstance(m, SeparableConv2d) for m in new.modules()) == 1
    for a, b in zip(new(x), model(x), strict=True):
        is_close(a, b)


def test_activations_between_two_pairs_are_taken_once():
    model = nn.Sequential(SeparableConv(3, 4), nn.SiLU(), SeparableConv(4, 4))
    new, report = fuse(model, inference=True)
    assert [c.absorbed for c in report.swapped] == [("1",), ()]
    x = torch.randn(1, 3, 8, 8)
    is_close(new(x), model(x))


class Functions(nn.Module):
    """A block whose activations and padding are functions in its code."""

    def __init__(self, between=functional.relu, after=functional.relu):
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, 2, groups=4, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 4, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.between, self.after, self.scale = between, after, 2.0

    def forward(self, x, scaled=True):
        y = self.conv1(functional.pad(functional.relu(x), (1, 1, 1, 2)))
        y = self.after(self.bn2(self.conv2(self.between(self.bn1(y)))))
        return y * self.scale if scaled else y


FUNCTIONS = {
    "relu": [functional.relu, torch.relu, lambda x: x.relu(), lambda x: x.clamp(min=0)],
    "relu6": [functional.relu6, lambda x: functional.hardtanh(x, 0, 6), lambda x: x.clamp(0, 6)],
    "leaky_relu": [lambda x: functional.leaky_relu(x, 0.2)],
    "silu": [functional.silu, lambda x: functional.silu(x, inplace=True)],
    "gelu": [functional.gelu],
    "sigmoid": [torch.sigmoid, functional.sigmoid, lambda x: x.sigmoid_()],
    "tanh": [torch.tanh, lambda x: x.tanh()],
    "hard_sigmoid": [functional.hardsigmoid],
    "hard_silu": [functional.hardswish],
    "elu": [functional.elu],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_become_stages_as_modules_do(name):
    for function in FUNCTIONS[name]:
        model = warmed(Functions(function, function)).eval()
        x = torch.randn(2, 4, 9, 9)
        new, report = fuse(model, inference=True, inputs=x)
        (swapped,) = report.swapped
        assert {"bn1", "bn2", "relu", "pad"} < set(swapped.absorbed)
        assert len(swapped.absorbed) == 6
        layer = new.conv1
        assert layer.padding == ((1, 2), (1, 1))
        stages = (layer.input_activation, layer.depthwise_activation, layer.activation)
        assert stages == ("relu", name, name)
        # Measured against the original, and the code of it has not changed.
        assert swapped.difference < 1e-5
        assert report.output_difference < 1e-5
        is_close(new(x), model(x))


class Body(nn.Module):
    """Two blocks, one of them twice, and functions around them in code of its own."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.blocks = nn.ModuleList([Functions(), Functions()])
        self.pair = SeparableConv(4, 6)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("offset", torch.ones(1), persistent=False)

    def features(self, x):
        return functional.relu6(self.stem(x))

    def forward(self, x):
        x = self.features(x)
        x = self.blocks[1](self.blocks[0](self.blocks[0](x)))
        return functional.silu(self.pair(x)) + self.offset


def test_code_without_its_functions_is_of_the_same_class_and_comes_back():
    model = warmed(Body()).eval()
    x = torch.randn(1, 3, 20, 20)
    new, report = fuse(model, inference=True, inputs=x)
    assert [c.calls for c in report.swapped] == [2, 1, 1]
    assert report.swapped[-1].absorbed == ("silu",)
    assert report.swapped[1].absorbed[-2:] == ("blocks.1.pad", "blocks.1.relu")
    assert isinstance(new, Body)
    assert all(isinstance(block, Functions) for block in new.blocks)
    assert new.blocks[0].scale == 2.0
    assert "unused.weight" in new.state_dict()
    assert "offset" not in new.state_dict()
    is_close(new.features(x), model.features(x))
    copies = [new, copy.deepcopy(new), pickle.loads(pickle.dumps(new))]
    copies += [torch.export.export(new, (x,)).module(), torch.compile(new, backend="eager")]
    for each in copies:
        is_close(each(x), model(x))
    # Fused once more, there is nothing to do; undone, the code is that which it was.
    again, report = fuse(new, inference=True, inputs=x)
    assert not report.candidates
    for each in (new, again, copies[1], copies[2]):
        stock = to_stock(each)
        assert {type(module) for module in (stock, *stock.blocks)} == {Body, Functions}
        assert list(stock.blocks[0]._modules) == list(model.blocks[0]._modules)
        is_close(stock(x), model(x))


def test_functions_stay_without_inference_and_where_they_are_excluded():
    model = warmed(Functions()).eval()
    for arguments in ({}, {"inference": True, "exclude": ["relu_1"]}):
        new, report = fuse(model, **arguments)
        assert type(new) is Functions
        assert not report.swapped
        assert "between the stages" in report.candidates[0].reason
    _, report = fuse(model, inference=True, exclude=["relu_2", "pad"])
    assert report.swapped[0].absorbed == ("bn1", "relu_1", "bn2")
    model.register_forward_hook(lambda module, given, output: None)
    _, report = fuse(model, inference=True)
    assert "followed by relu, not by a module" in report.candidates[0].reason


def test_code_that_was_read_for_other_arguments_refuses_them():
    x = torch.randn(1, 4, 9, 9)
    new, _ = fuse(warmed(Functions()).eval(), inference=True, inputs=x)
    is_close(new(x, scaled=True), new(x))
    with pytest.raises(AssertionError, match="specialized"):
        new(x, scaled=False)


def test_a_change_in_place_before_a_pair_stays_where_others_see_it():
    class Block(SeparableConv):
        def forward(self, x):
            return self.pointwise(self.conv1(functional.relu(x, inplace=True))) + 0

    for model in (Block(4, 4), nn.Sequential(nn.ReLU(inplace=True), SeparableConv(4, 4))):
        x, y = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
        new, report = fuse(model.eval(), inference=True, inputs=x)
        assert len(report.swapped) == 1
        assert not report.swapped[0].absorbed
        new(y)
        assert y.min() == 0


def test_paddings_before_a_pair_become_its_padding_and_come_back():
    conv = nn.Conv2d(4, 4, 3, 2, 1, groups=4)
    unpadded = nn.Conv2d(4, 4, 3, padding="valid", groups=4)
    _, report = fuse(nn.Sequential(nn.ZeroPad2d(1), unpadded, nn.Conv2d(4, 4, 1)), inference=True)
    assert report.swapped[0].absorbed == ("0",)
    pads = {nn.ZeroPad2d((0, 1, 2, 3)): 1, nn.ConstantPad2d(1, 0.0): 1, nn.ConstantPad2d(1, 2.0): 0}
    for pad, taken in pads.items():
        model = nn.Sequential(nn.ReLU(), pad, conv, nn.Conv2d(4, 4, 1)).eval()
        x = torch.randn(1, 4, 8, 9)
        new, report = fuse(model, inference=True, inputs=x)
        assert report.swapped[0].absorbed == (("1", "0") if taken else ())
        is_close(new(x), model(x))
        stock = to_stock(new)
        assert stock[2].padding == (1, 1)
        is_close(stock(x), model(x))
    alone = SeparableConv2d(4, 5, 3, padding=((0, 1), (2, 3)), input_activation="relu")
    stock = to_stock(alone)
    assert [type(m) for m in stock] == [nn.ReLU, nn.ZeroPad2d, nn.Conv2d, nn.Conv2d]
    is_close(stock(x), alone(x))


def test_layers_of_ours_take_what_is_around_them_for_inference():
    """A model that was trained with our layers becomes one for inference."""
    blocks = [SeparableConv(4, 6), nn.BatchNorm2d(6), nn.ReLU(), SeparableConv(6, 6), nn.SiLU()]
    model = warmed(nn.Sequential(nn.ZeroPad2d((1, 0, 1, 0)), *blocks)).eval()
    x = torch.randn(2, 4, 9, 9)
    trained, report = fuse(model, inputs=x)
    assert len(report.swapped) == 2
    _, report = fuse(trained, inputs=x)
    assert not report.candidates
    new, report = fuse(trained, inference=True, inputs=x)
    assert [c.kind for c in report.swapped] == ["SeparableConv2d"] * 2
    assert [c.absorbed for c in report.swapped] == [("2", "3", "0"), ("5",)]
    assert report.swapped[0].macs == 10 * 10 * 4 * (9 + 6)
    assert report.swapped[0].hidden_bytes == 0
    is_close(new(x), model(x))
    stock = to_stock(new)
    assert not any(type(m).__module__.startswith("sepconv") for m in stock.modules())
    is_close(stock(x), model(x))
    _, report = fuse(trained, inference=True, exclude=["1.conv1", "3", "5"])
    assert not report.candidates


def test_what_a_layer_of_ours_took_in_comes_back_once():
    layer = SeparableConv2d(4, 4, 3, padding=((0, 1), (1, 1)), bias=False)
    model = nn.Sequential(nn.SiLU(), nn.ZeroPad2d(2), layer, nn.BatchNorm2d(4), nn.SiLU())
    model = warmed(model).eval()
    x = torch.randn(2, 4, 9, 9)
    new, report = fuse(model, inference=True, inputs=x)
    assert report.swapped[0].absorbed == ("3", "4", "1", "0")
    is_close(new(x), model(x))
    stock = to_stock(new)
    assert [type(m) for m in stock[2]] == [nn.ZeroPad2d, nn.Conv2d, nn.Conv2d]
    is_close(stock(x), model(x))


class TwoConsumers(SeparableConv):
    def forward(self, x):
        u = self.conv1(x)
        return self.pointwise(u) + u


class Gated(SeparableConv):
    def forward(self, x):
        u = self.conv1(x)
        return self.pointwise(u * u.mean((2, 3), keepdim=True).sigmoid())


class Sizes(SeparableConv):
    def forward(self, x):
        return self.pointwise(functional.max_pool2d(self.conv1(x), 2))


class Bounded(SeparableConv):
    def forward(self, x):
        return self.pointwise(self.conv1(x).clamp(0, 20))


class Switched(SeparableConv):
    def forward(self, x, activate=False):
        x = self.conv1(x)
        return self.pointwise(functional.relu(x) if activate else functional.silu(x))


class Tied(SeparableConv):
    def forward(self, x):
        return super().forward(x) * self.pointwise.weight.mean()


class Called(nn.Module):
    def __init__(self, inner, *arguments):
        super().__init__()
        self.inner, self.arguments = inner, arguments

    def forward(self, x):
        return self.inner(x, *self.arguments)


class OwnConv2d(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Branching(SeparableConv):
    def forward(self, x):
        return super().forward(x) if x.sum() < 1e9 else x


class SharedPointwise(SeparableConv):
    def forward(self, x):
        return self.pointwise(self.conv1(x)) + self.pointwise(x)


def hooked():
    model = SeparableConv(4, 4)
    model.conv1.register_forward_hook(lambda module, given, output: None)
    return model


def normed():
    model = SeparableConv(4, 4)
    nn.utils.parametrizations.weight_norm(model.conv1)
    return model


REFUSALS = {
    "two consumers": (lambda: TwoConsumers(4, 4), "2 consumers"),
    "squeeze-excite": (lambda: Gated(4, 4), "2 consumers"),
    "function between": (lambda: Sizes(4, 4), "followed by max_pool2d"),
    "weights in the code": (lambda: Tied(4, 4), "weights of pointwise are used in the code"),
    "bounds that no activation has": (lambda: Bounded(4, 4), "clamp (clamp)"),
    "other arguments": (lambda: Called(Switched(4, 4), True), "followed by relu, not by a module"),
    "hooks": (hooked, "has hooks"),
    "weight norm": (normed, "is computed"),
    "padding mode": (
        lambda: nn.Sequential(conv_dw(4, padding_mode="reflect"), nn.Conv2d(4, 4, 1)),
        "padding_mode='reflect'",
    ),
    "own forward": (
        lambda: nn.Sequential(OwnConv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 1)),
        "computes in its own way",
    ),
    "groups": (
        lambda: nn.Sequential(conv_dw(4), nn.Conv2d(4, 4, 1, groups=2)),
        "has 2 groups",
    ),
    "shared pointwise": (lambda: SharedPointwise(4, 4), "also called on something else"),
    "pooling between": (
        lambda: nn.Sequential(conv_dw(4), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1)),
        "MaxPool2d",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_swapped_says_why(case):
    make, reason = REFUSALS[case]
    model = make().eval()
    new, report = fuse(model, inference=True)
    assert len(report.candidates) == 1
    assert reason in report.candidates[0].reason
    assert not any(isinstance(m, SeparableConv2d) for m in new.modules())
    assert report.output_difference == 0


def test_code_may_ask_for_sizes_of_what_was_swapped_and_no_more():
    class Sized(SeparableConv):
        def forward(self, x):
            y = super().forward(x)
            return y + self.pointwise.out_channels if self.conv1.stride[0] == 1 else y

    class Looking(SeparableConv):
        def forward(self, x):
            return super().forward(x) if hasattr(self.conv1, "groups") else self.none(x)

    x = torch.randn(1, 4, 8, 8)
    model = Sized(4, 5)
    new, report = fuse(model, inputs=x)
    assert len(report.swapped) == 1
    is_close(new(x), model(x))
    with pytest.raises(ValueError, match="`model` must not use what is swapped"):
        fuse(Looking(4, 5), inputs=x)


def test_what_cannot_be_traced_is_read_in_parts():
    """Pairs are found around code that cannot be followed, and inside of what it calls."""
    around = nn.Sequential(nn.SiLU(), conv_dw(4), Branching(4, 4), nn.ReLU())
    around[2].blocks = nn.ModuleList([SeparableConv(4, 4), nn.Sequential(conv_dw(4))])
    model = nn.Sequential(SeparableConv(3, 4), around, conv_dw(4), nn.Conv2d(4, 5, 1)).eval()
    x = torch.randn(1, 3, 8, 8)
    new, report = fuse(model, inference=True, inputs=x)
    assert report.found_by == "torch.fx, not through the code of: 1.2"
    assert {c.name: c.reason for c in report.candidates} == {
        "0.conv1 + 0.pointwise": None,
        "1.1": "between the stages: 1.2 (Branching)",
        "2 + 3": None,
        "1.2.conv1": "no call of it was found in the data flow",
        "1.2.blocks.0.conv1 + 1.2.blocks.0.pointwise": None,
        "1.2.blocks.1.0": "its output leaves the traced part",
    }
    is_close(new(x), model(x))


def test_what_code_that_cannot_be_followed_may_call_stays():
    model = nn.Sequential(SeparableConv(4, 4), Branching(4, 4)).eval()
    for name in ("conv1", "pointwise"):
        setattr(model[1], name, getattr(model[0], name))
        _, report = fuse(model)
        assert not report.swapped
        assert "1, whose code torch.fx cannot follow, holds 0." in report.candidates[0].reason
        setattr(model[1], name, conv_dw(4))


def test_renamed_parameters_are_the_same_numbers():
    model = SeparableConv(3, 4)
    new, report = fuse(model)
    assert report.renamed == {
        "conv1.weight": "conv1.depthwise.weight",
        "pointwise.weight": "conv1.pointwise.weight",
    }
    state = new.state_dict()
    for old, name in report.renamed.items():
        assert torch.equal(model.state_dict()[old], state[name])


def test_exclusion_and_tolerance():
    model = nn.Sequential(SeparableConv(3, 4), SeparableConv(4, 4))
    _, report = fuse(model, exclude=model[0].conv1)
    assert [c.swapped for c in report.candidates] == [False, True]
    with pytest.raises(ValueError, match="`exclude` must name"):
        fuse(model, exclude="nothing")
    with pytest.raises(ValueError, match="`inputs` must be given"):
        fuse(nn.Linear(3, 4))


def test_a_step_of_training_is_that_of_the_pair():
    model = nn.Sequential(SeparableConv(3, 6), nn.BatchNorm2d(6), nn.ReLU(), SeparableConv(6, 4))
    new, report = fuse(model)
    x = torch.randn(4, 3, 12, 12)
    for each in (model, new):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        each(x).square().mean().backward()
        optimizer.step()
    state = new.state_dict()
    for name, tensor in model.state_dict().items():
        is_close(state[report.renamed.get(name, name)], tensor)


def test_the_new_model_is_copied_pickled_and_exported():
    model = warmed(MobileNet()).eval()
    new, _ = fuse(model, inference=True)
    x = torch.randn(1, 3, 64, 64)
    copies = [copy.deepcopy(new), pickle.loads(pickle.dumps(new))]
    copies.append(torch.export.export(new, (x,)).module())
    for each in copies:
        is_close(each(x), new(x))


@pytest.mark.parametrize("inference", [False, True])
def test_stock_modules_come_back(inference):
    model = warmed(nn.Sequential(XceptionBlock(3, 8), XceptionBlock(8, 12))).eval()
    x = torch.randn(2, 3, 33, 33)
    new, _ = fuse(model, inference=inference, inputs=x)
    stock = to_stock(new)
    assert not any(type(m).__module__.startswith("sepconv") for m in stock.modules())
    is_close(stock(x), model(x))
    if not inference:
        assert list(stock.state_dict()) == list(model.state_dict())
    alone = to_stock(SeparableConv2d(3, 4, 3, padding=1, activation="relu"))
    assert [type(m) for m in alone] == [nn.Conv2d, nn.Conv2d, nn.ReLU]

"""Checklist 29 to 49: names and scopes."""

from __future__ import annotations

import warnings

import pytest
from support_tf1 import SepConv, images, names, parts, sep

import sepconv.tf1 as tf


def called(*args, **kwargs):
    layer = SepConv(4, 3, *args, **kwargs)
    layer(images())
    return layer


def test_c029_the_first_unnamed_layer(mode):
    layer = called()
    assert (layer.name, layer.scope_name) == ("separable_conv2d_1", "separable_conv2d")
    assert SepConv(4, 3, name="").name == "separable_conv2d_2"


def test_c030_layer_names_follow_construction_and_scopes_first_calls(mode):
    first, second = SepConv(4, 3), SepConv(4, 3)
    second(images())
    first(images())
    assert (first.name, second.name) == ("separable_conv2d_1", "separable_conv2d_2")
    assert (first.scope_name, second.scope_name) == ("separable_conv2d_1", "separable_conv2d")
    assert called(name="separable_conv2d_3").name == "separable_conv2d_3"
    assert SepConv(4, 3).name == "separable_conv2d_3"


@pytest.mark.parametrize(
    ("class_name", "expected"),
    [
        ("MySep", "my_sep"),
        ("HTTPNet", "http_net"),
        ("ABCdef2D", "ab_cdef2d"),
        ("_Own", "private__own"),
    ],
)
def test_c031_a_subclass_takes_its_own_name(mode, class_name, expected):
    layer = type(class_name, (SepConv,), {})(4, 3)
    assert layer.name == f"{expected}_1"
    layer(images())
    assert layer.scope_name == expected


def test_c032_scope_name_before_use(mode):
    layer = SepConv(4, 3, name="unused")
    with pytest.raises(ValueError, match="No name available for layer scope") as error:
        layer.scope_name  # noqa: B018
    assert '"unused" has not been used yet' in str(error.value)


def test_c033_two_classes_with_one_name(mode):
    first, second = called(name="foo"), called(name="foo")
    assert (first.name, second.name) == ("foo", "foo")
    assert (first.scope_name, second.scope_name) == ("foo", "foo_1")


def test_c034_two_functions_with_one_name(mode):
    sep(images(), 4, 3, name="foo")
    with pytest.raises(ValueError, match="already exists, disallowed"):
        sep(images(), 4, 3, name="foo")


def test_c035_the_function_then_the_class(mode):
    sep(images(), 4, 3, name="foo")
    assert called(name="foo").scope_name == "foo_1"


def test_c036_enclosing_scopes_prefix_names_and_name_scopes_do_not(graph):
    with tf.variable_scope("outer"), tf.name_scope("ignored"), tf.variable_scope("inner"):
        layer = called(name="sep")
    assert layer.scope_name == "outer/inner/sep"
    assert names(tf.global_variables()) == parts("outer/inner/sep")
    with tf.name_scope("ignored"):
        assert called(name="top").scope_name == "top"


def test_c037_the_scope_of_the_first_call_counts(mode):
    with tf.variable_scope("A"):
        layer = SepConv(4, 3, name="n")
    with tf.variable_scope("B"):
        layer(images())
    with tf.variable_scope("C"):
        layer(images())
    assert layer.scope_name == "B/n"
    assert names(layer.weights) == parts("B/n")


def test_c038_underscore_scope_fixes_the_scope_at_construction(mode):
    with tf.variable_scope("A"):
        layer = SepConv(4, 3, name="other", _scope="s")
    assert layer.scope_name == "A/s"
    with tf.variable_scope("B"):
        layer(images())
    assert names(layer.weights) == parts("A/s")
    with pytest.raises(ValueError, match="already exists"), tf.variable_scope("A"):
        called(_scope="s")


def test_c039_scope_at_the_first_call_decides(mode):
    layer = SepConv(4, 3, name="n")
    layer(images(), scope="z")
    assert layer.scope_name == "z"
    layer(images(), scope="y")
    assert layer.scope_name == "z"
    fixed = SepConv(4, 3, _scope="s")
    fixed(images(), scope="ignored")
    assert fixed.scope_name == "s"
    again = SepConv(4, 3, _reuse=True)
    again(images(), scope="z")
    assert again.weights[0] is layer.weights[0]


def test_c040_a_scope_object_is_used_itself(mode):
    with tf.variable_scope("A") as first:
        pass
    with tf.variable_scope("B") as second, tf.variable_scope("b") as third:
        pass
    with tf.variable_scope("elsewhere"):
        layer = SepConv(4, 3)
        layer(images(), scope=first)
        assert layer.scope_name == "A"
        assert called(_scope=second).scope_name == "B"
        sep(images(), 4, 3, name=third)
    with tf.variable_scope("B/b", reuse=True):
        assert tf.get_variable("bias", [4]).op.name == "B/b/bias"


def test_c041_a_scope_object_as_name_of_the_class(mode):
    with tf.variable_scope("A") as scope:
        pass
    layer = called(name=scope)
    assert layer.scope_name == "A_1"
    assert layer.name == "separable_conv2d_1"


@pytest.mark.parametrize("name", ["a b", "_x", "a:0", "/x"])
def test_c042_invalid_root_names(mode, name):
    layer = SepConv(4, 3, name=name)
    assert layer.name == name
    with pytest.raises(ValueError, match="is not a valid root scope name"):
        layer(images())
    assert layer.weights == []


@pytest.mark.parametrize("name", ["a/b", "1x", ".x", "x/"])
def test_c042_valid_names(mode, name):
    layer = called(name=name)
    assert (layer.name, layer.scope_name) == (name, name)
    with tf.variable_scope("in"):
        assert called(name="_x").scope_name == "in/_x"
    with pytest.raises(TypeError):
        called(name=3)


def test_c043_a_failed_first_call_sets_the_scope(mode):
    layer = SepConv(4, 3, name="n")
    with tf.variable_scope("A"), pytest.raises(ValueError, match="ndim"):
        layer(images((8, 8, 3)))
    assert layer.scope_name == "A/n"
    with tf.variable_scope("B"):
        layer(images())
    assert names(layer.weights) == parts("A/n")


def opened(default=None, text=None):
    with tf.variable_scope(text, default_name=default) as scope:
        return scope.name


def test_c044_unique_names(mode):
    assert [opened("x"), opened("x"), opened("x")] == ["x", "x_1", "x_2"]
    assert opened(text="x") == "x"
    assert opened("x") == "x_3"
    opened(text="x_5")
    assert [opened("x"), opened("x")] == ["x_4", "x_6"]


def test_c045_a_reopened_scope_gives_the_same_names_again(mode):
    with tf.variable_scope("A"):
        first = called()
    with pytest.raises(ValueError, match="already exists"), tf.variable_scope("A"):
        called()
    with tf.variable_scope("A", reuse=True):
        second = called()
    assert first.scope_name == second.scope_name == "A/separable_conv2d"
    assert all(a is b for a, b in zip(first.weights, second.weights, strict=True))


def test_c046_reuse_is_inherited(mode):
    with tf.variable_scope("A"), tf.variable_scope("B"):
        first = called(name="n")
    with tf.variable_scope("A", reuse=True), tf.variable_scope("B", reuse=False):
        assert tf.get_variable_scope().reuse is True
        second = called(name="n", _reuse=False)
        with tf.variable_scope("C", reuse=tf.AUTO_REUSE) as scope:
            assert scope.reuse is tf.AUTO_REUSE
    assert second.weights[0] is first.weights[0]


def test_c047_reuse_needs_a_name(mode):
    for reuse in (True, tf.AUTO_REUSE):
        with (
            pytest.raises(ValueError, match="cannot be used without a name_or_scope"),
            tf.variable_scope(None, default_name="d", reuse=reuse),
        ):
            pass
    with pytest.raises(TypeError):
        tf.variable_scope(None)


def test_c048_two_graphs_do_not_see_each_other():
    graphs = tf.Graph(), tf.Graph()
    layers = []
    for graph in graphs:
        with graph.as_default():
            assert tf.get_default_graph() is graph
            layers.append(called())
            assert names(tf.global_variables()) == parts("separable_conv2d")
            sep(images(), 4, 3, name="f")
    assert [layer.name for layer in layers] == ["separable_conv2d_1"] * 2
    assert layers[0].weights[0] is not layers[1].weights[0]
    with graphs[1].as_default(), pytest.raises(ValueError, match="belongs to") as error:
        layers[0](images())
    assert graphs[0].label in str(error.value)
    assert graphs[1].label in str(error.value)
    with pytest.raises(ValueError, match="no graph is current"):
        layers[0](images())


def test_c048_layers_made_without_a_graph_keep_working():
    layer = called()
    with tf.Graph().as_default():
        called()
        layer(images())
    assert layer(images()).shape == (2, 6, 6, 4)


def test_c049_graph_warns_and_answers_by_mode(mode):
    layer = SepConv(4, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if mode == "graph":
            assert layer.graph is None
        else:
            with pytest.raises(RuntimeError, match="not supported when executing eagerly"):
                layer.graph  # noqa: B018
    assert len(caught) == 1
    assert "deprecated" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert issubclass(caught[0].category, DeprecationWarning)

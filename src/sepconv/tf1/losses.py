"""`tf.losses`: the collections of losses, and the losses that legacy code trains on."""

from __future__ import annotations

from typing import Any

from keras import ops

from sepconv.tf1 import graphs, nn
from sepconv.tf1.graphs import GraphKeys
from sepconv.tf1.provided import not_provided
from sepconv.tf1.tensors import add_n, cast, constant, float32, operand

__all__ = [
    "add_loss",
    "get_losses",
    "get_regularization_loss",
    "get_regularization_losses",
    "get_total_loss",
    "mean_squared_error",
    "softmax_cross_entropy",
    "sparse_softmax_cross_entropy",
]


def add_loss(loss: Any, loss_collection: str | None = GraphKeys.LOSSES) -> None:
    """Adds a loss to a collection of the current graph; without one, does nothing.

    Args:
        loss: A tensor.
        loss_collection: Key of the collection.
    """
    graph = graphs.graph_mode()
    if graph is not None and loss_collection:
        graph.add_call_loss(loss_collection, loss)


def get_losses(scope: str | None = None, loss_collection: str = GraphKeys.LOSSES) -> list[Any]:
    """Returns the losses of a collection, without those of regularizers.

    Args:
        scope: If given, only those whose name it matches at the front.
        loss_collection: Key of the collection.
    """
    return graphs.get_collection(loss_collection, scope)


def get_regularization_losses(scope: str | None = None) -> list[Any]:
    """Returns the losses of regularizers, computed from the values that the variables have now.

    Args:
        scope: If given, only those of variables whose name it matches at the front.

    Example:
        >>> import sepconv.tf1 as tf
        >>> with tf.Graph().as_default():
        ...     v = tf.get_variable("v", [2], initializer=tf.ones_initializer(),
        ...                         regularizer=lambda v: tf.reduce_sum(v))
        ...     loss = tf.losses.get_regularization_losses()[0]
        ...     float(tf.stop_gradient(loss))
        2.0
    """
    return graphs.get_collection(GraphKeys.REGULARIZATION_LOSSES, scope)


def get_regularization_loss(scope: str | None = None, name: str = "") -> Any:
    """Returns the sum of the losses of regularizers; 0 if there are none.

    Args:
        scope: As in `get_regularization_losses`.
        name: Not used.
    """
    losses = get_regularization_losses(scope)
    return add_n(losses) if losses else constant(0.0)


def get_total_loss(
    add_regularization_losses: bool = True, name: str = "", scope: str | None = None
) -> Any:
    """Returns the sum of all losses.

    Args:
        add_regularization_losses: Whether those of regularizers count.
        name: Not used.
        scope: If given, only those whose name it matches at the front.

    Raises:
        ValueError: there are none.
    """
    losses = get_losses(scope)
    if add_regularization_losses:
        losses = losses + get_regularization_losses(scope)
    return add_n(losses)


def _weighted_mean(losses: Any, weights: Any, loss_collection: str | None) -> Any:
    """Sum of the weighted losses over the number of those whose weight is not zero."""
    weights = ops.convert_to_tensor(weights, dtype=losses.dtype)
    while len(weights.shape) < len(losses.shape) and len(weights.shape) > 0:
        weights = ops.expand_dims(weights, -1)
    weights = ops.broadcast_to(weights, ops.shape(losses))
    count = ops.sum(ops.cast(ops.not_equal(weights, 0), losses.dtype))
    loss = ops.divide_no_nan(ops.sum(losses * weights), count)
    add_loss(loss, loss_collection)
    return loss


def sparse_softmax_cross_entropy(
    labels: Any,
    logits: Any,
    weights: Any = 1.0,
    scope: str | None = None,
    loss_collection: str | None = GraphKeys.LOSSES,
) -> Any:
    """Computes the mean cross entropy of class numbers and logits, and adds it to a collection.

    Args:
        labels: Class numbers, (batch,).
        logits: (batch, classes).
        weights: A number, or one per example.
        scope: Not used.
        loss_collection: Key of the collection, or `None`.
    """
    losses = nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
    return _weighted_mean(losses, weights, loss_collection)


def softmax_cross_entropy(
    onehot_labels: Any,
    logits: Any,
    weights: Any = 1.0,
    label_smoothing: float = 0,
    scope: str | None = None,
    loss_collection: str | None = GraphKeys.LOSSES,
) -> Any:
    """Computes the mean cross entropy of probabilities and logits, and adds it to a collection.

    Args:
        onehot_labels: (batch, classes).
        logits: (batch, classes).
        weights: A number, or one per example.
        label_smoothing: Part of the probability that is spread over all classes.
        scope: Not used.
        loss_collection: Key of the collection, or `None`.
    """
    logits = operand(logits)
    labels = ops.cast(operand(onehot_labels), logits.dtype)
    labels = labels * (1 - label_smoothing) + label_smoothing / logits.shape[-1]
    losses = nn.softmax_cross_entropy_with_logits(labels=labels, logits=logits)
    return _weighted_mean(losses, weights, loss_collection)


def mean_squared_error(
    labels: Any,
    predictions: Any,
    weights: Any = 1.0,
    scope: str | None = None,
    loss_collection: str | None = GraphKeys.LOSSES,
) -> Any:
    """Computes the mean of squared differences, and adds it to a collection.

    Args:
        labels: A tensor.
        predictions: A tensor of the same shape.
        weights: A number, or one per element, row, ...
        scope: Not used.
        loss_collection: Key of the collection, or `None`.
    """
    difference = cast(predictions, float32) - cast(labels, float32)
    return _weighted_mean(ops.square(difference), weights, loss_collection)


def __getattr__(name: str) -> Any:
    return not_provided(name, "losses")

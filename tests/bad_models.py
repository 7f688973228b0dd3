"""Factories of models and data that cannot work, by what is wrong with them."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from tests.own_models import Functions, Plain, ResNet, Source, digits

NUMBER = 3


def raises(num_classes):
    raise FileNotFoundError("no weights here")


def returns_params(num_classes):
    return {"params": {}}


def returns_a_class(num_classes):
    return Plain


def without_head(num_classes):
    return ResNet(num_classes, (4,), head="top")


def of_another_width(num_classes):
    return Plain(num_classes + 1)


class Narrow(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.num_classes, name="head")(x.reshape(x.shape[0], -1))[:, 0]


def without_logits(num_classes):
    return Narrow(num_classes)


class Restless(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.5, deterministic=False)(x.reshape(x.shape[0], -1))
        return nn.Dense(self.num_classes, name="head")(x)


def always_random(num_classes):
    return Restless(num_classes)


class Forgetful(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x):
        x = nn.remat(nn.Dense)(4, name="again")(x.reshape(x.shape[0], -1))
        return nn.Dense(self.num_classes, name="head")(nn.relu(x))


def computed_again(num_classes):
    return Forgetful(num_classes)


class WeightNormalised(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x):
        x = nn.WeightNorm(nn.Dense(4, name="hidden"))(x.reshape(x.shape[0], -1))
        return nn.Dense(self.num_classes, name="head")(x)


def with_normalised_kernels(num_classes):
    return WeightNormalised(num_classes)


class Unsound(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x):
        scale = self.variable("constants", "scale", lambda: jnp.full((), jnp.nan)).value
        return nn.Dense(self.num_classes, name="head")(x.reshape(x.shape[0], -1) * scale)


def with_nan_in_its_state(num_classes):
    return Unsound(num_classes)


class Growing(Functions):
    def apply(self, params, state, inputs, *, key=None, train=False):
        logits, _ = super().apply(params, state, inputs)
        return logits, {"calls": jnp.zeros(2)}


def changing_its_state(num_classes):
    return Growing(num_classes)


class Averaging(Functions):
    def init(self, key, inputs):
        params, _ = super().init(key, inputs)
        return params, {"mean": jnp.zeros(3)}

    def apply(self, params, state, inputs, *, key=None, train=False):
        logits, _ = super().apply(params, {"calls": 0}, inputs)
        return logits, state


def with_averages_of_its_own(num_classes):
    return Averaging(num_classes)


class Alone(Functions):
    def init(self, key, inputs):
        return super().init(key, inputs)[0]


def without_a_pair(num_classes):
    return Alone(num_classes)


def _with(change):
    """Two tasks, of which `change` makes the first one's training examples anew."""
    first, second = digits()
    (inputs, labels), test = first
    return [(change(inputs, labels), test), second]


def _several(x):
    return {"left": x[..., :4, :], "right": x[..., 4:, :]}


def with_several_inputs():
    return _with(lambda x, y: Source([_several(image) for image in x], y))


def with_several_arrays():
    return _with(lambda x, y: (_several(x), y))


def longer_than_it_is():
    return _with(lambda x, y: Source(list(x[:50]), y, says=60))


def of_several_shapes():
    return _with(lambda x, y: Source([*x[:50], x[0][:4]], y[:51]))


def with_nan():
    return _with(lambda x, y: (np.where(np.arange(len(x)) == 7, np.nan, x.T).T, y))


def with_one_hot_labels():
    return _with(lambda x, y: (x, np.eye(10)[y]))


class Mapped(Source):
    def __getitem__(self, index):
        return {"picture": self.inputs[index], "kind": 1, "class": self.labels[index]}


def with_other_fields():
    return _with(Mapped)


def with_a_generator():
    return _with(lambda x, y: zip(x, y, strict=True))


def of_two_kinds_of_inputs():
    first, second = digits()
    (inputs, labels), (others, more) = second
    return [first, ((inputs[:, :4], labels), (others[:, :4], more))]


def as_one_data_set():
    return digits()[0]


def as_numbers():
    return 3

"""Models and data of one's own, as users name them: `--model=tests.own_models:resnet`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pm_jax import data


class Residual(nn.Module):
    """Two convolutions with batch norm, and the way around them."""

    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x, train):
        def norm(y):
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(y)

        strides = (self.stride, self.stride)
        y = nn.relu(norm(nn.Conv(self.width, (3, 3), strides, use_bias=False)(x)))
        y = norm(nn.Conv(self.width, (3, 3), use_bias=False)(y))
        if x.shape != y.shape:
            x = norm(nn.Conv(self.width, (1, 1), strides, use_bias=False)(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A small residual network for images of any size."""

    num_classes: int
    widths: tuple[int, ...] = (16, 32)
    dropout: float = 0.0
    head: str = "head"

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(self.widths[0], (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        for number, width in enumerate(self.widths):
            x = Residual(width, 1 if number == 0 else 2)(x, train)
        x = nn.Dropout(self.dropout, deterministic=not train)(x.mean(axis=(1, 2)))
        return nn.Dense(self.num_classes, name=self.head)(x)


def resnet(num_classes, **settings):
    return ResNet(num_classes, **settings)


class Convolution(nn.Module):
    """The least model with batch norm and dropout, which compiles fast."""

    num_classes: int
    width: int = 4
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(self.width, (3, 3), strides=(2, 2))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x.reshape(x.shape[0], -1))
        return nn.Dense(self.num_classes, name="head")(x)


def convolution(num_classes, **settings):
    return Convolution(num_classes, **settings)


class Plain(nn.Module):
    """The built-in MLP, written anew."""

    num_classes: int
    width: int = 16

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.width, name="hidden_0")(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.num_classes, name="head")(x)


def plain(num_classes, width=16):
    return Plain(num_classes, width)


class Layer(nn.Module):
    """A layer for `nn.scan`, which calls it with a carry."""

    width: int

    @nn.compact
    def __call__(self, x, _):
        return x + nn.relu(nn.Dense(self.width)(x)), None


class Scanned(nn.Module):
    """A stack of equal layers as one loop, each computed again on the way back."""

    num_classes: int
    width: int = 8

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width, name="stem")(x.reshape(x.shape[0], -1))
        layers = nn.scan(
            nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        x, _ = layers(self.width, name="layers")(x, None)
        return nn.Dense(self.num_classes, name="head")(x)


def scanned(num_classes):
    return Scanned(num_classes)


class Network(nnx.Module):
    """An nnx module with a list of layers, batch norm and dropout."""

    def __init__(self, num_classes, rngs, size=64, width=16):
        self.layers = nnx.List([nnx.Linear(size, width, rngs=rngs)])
        self.norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.dropout(nnx.relu(self.norm(x))))


def network(num_classes):
    return lambda rngs: Network(num_classes, rngs)


class Functions:
    """A model that is a few functions and no module, with a counter for a state."""

    classifier = "top"

    def __init__(self, num_classes):
        self.num_classes = num_classes

    def init(self, key, inputs):
        size = int(np.prod(inputs.shape[1:]))
        kernel = 0.1 * jax.random.normal(key, (size, self.num_classes))
        params = {"scale": jnp.ones(size), "top": {"kernel": kernel}}
        return params, {"calls": jnp.zeros((), jnp.int32)}

    def apply(self, params, state, inputs, *, key=None, train=False):
        x = inputs.reshape(inputs.shape[0], -1) * params["scale"][None]
        return x @ params["top"]["kernel"], {"calls": state["calls"] + train}


def functions(num_classes):
    return Functions(num_classes)


class Source:
    """Examples by number, in the protocol of grain and PyTorch."""

    def __init__(self, inputs, labels, *, says=None, as_mapping=False):
        self.inputs, self.labels, self.as_mapping = inputs, labels, as_mapping
        self.says = len(inputs) if says is None else says

    def __len__(self):
        return self.says

    def __getitem__(self, index):
        image, label = self.inputs[index], self.labels[index]
        return {"image": image, "label": label} if self.as_mapping else (image, label)


def digits(turn=60.0, tasks=2):
    """Digits as float32 images, each task turned further than the one before."""
    upright = data.load_digits()
    domains = [data.rotated(upright, turn * task) for task in range(tasks)]
    return [
        (
            (task.train_inputs.astype(np.float32) / 255, task.train_labels),
            (task.test_inputs.astype(np.float32) / 255, task.test_labels),
        )
        for task in domains
    ]


def sources(turn=60.0):
    """The same as uint8 images of sources."""
    upright = data.load_digits()
    domains = [upright, data.rotated(upright, turn)]
    return [
        {
            "train": Source(task.train_inputs, task.train_labels),
            "test": Source(task.test_inputs, task.test_labels, as_mapping=True),
        }
        for task in domains
    ]

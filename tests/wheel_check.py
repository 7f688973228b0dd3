"""What an installed pm_jax must have and do with its required packages alone.

pip install dist/pm_jax-*.whl && python -I tests/wheel_check.py    # in a clean environment

The test of the wheel passes the names of modules that count as not installed.
"""

import importlib
import importlib.metadata
import importlib.resources
import json
import pkgutil
import sys


class NotInstalled:
    """A finder of modules that are as if they were not installed."""

    def __init__(self, names):
        self.names = frozenset(names)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def check_files():
    import pm_jax

    files = importlib.resources.files(pm_jax)
    pages = ("page", "parts", "report", "comparison")
    templates = (f"continual/report/{page}.html.jinja" for page in pages)
    for name in ("py.typed", *templates, "data/digits_order.npy"):
        assert files.joinpath(name).is_file(), name
    distribution = importlib.metadata.distribution("pm_jax")
    assert distribution.version == pm_jax.__version__
    assert any(file.name == "LICENSE" for file in distribution.files)
    assert not any(file.parts[0] in ("tests", "experiments") for file in distribution.files)
    for module in pkgutil.walk_packages(pm_jax.__path__, "pm_jax."):
        importlib.import_module(module.name)


def check_functional_core():
    """One task is trained, measured and merged; a data set by name is refused in one line."""
    import jax
    import jax.numpy as jnp
    import optax

    import pm_jax
    from pm_jax import data

    def logits_fn(params, inputs):
        return inputs @ params["kernel"]

    loss_fn = pm_jax.losses.mean(pm_jax.losses.cross_entropy(logits_fn))
    batch = pm_jax.Batch(jnp.eye(3), jnp.arange(3))
    loss = pm_jax.perturbed(loss_fn, pm_jax.perturbation.symmetric())
    merger = pm_jax.merger(pm_jax.rules.perturb_and_merge(), pm_jax.fisher_exact(logits_fn))
    params = {"kernel": jnp.zeros((3, 3))}
    state, optimizer = merger.init(params), optax.sgd(0.1)
    for task in range(2):
        gradients = jax.grad(loss, argnums=1)(jax.random.key(task), params, state.start, batch)
        updates, _ = optimizer.update(gradients, optimizer.init(params))
        trained = optax.apply_updates(params, updates)
        params, state, info = merger.finish_task(state, trained, batch, jax.random.key(2 + task))
    assert 0 < float(info.alpha) <= 1 and float(jnp.trace(params["kernel"])) > 0
    try:
        data.load("cifar100", data_dir="")
    except pm_jax.InvalidInput as error:
        assert "pip install 'pm_jax[data]'" in str(error), error
    else:
        raise AssertionError("a package of the extra `data` is installed")


if __name__ == "__main__":
    sys.meta_path.insert(0, NotInstalled(json.loads(sys.argv[1]) if sys.argv[1:] else ()))
    check_files()
    check_functional_core()
    print(importlib.import_module("pm_jax").__file__)

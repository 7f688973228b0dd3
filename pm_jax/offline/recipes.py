"""Recipes: a merge written down in TOML, as the user gives it and as an output keeps it."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pm_jax import files
from pm_jax.types import InvalidInput, cause

_FORMS: dict[str, Any] = {
    **dict.fromkeys(("base", "run", "output", "rule", "layout", "dtype", "shard_size"), str),
    **dict.fromkeys(("models", "fishers", "leave"), [str]),
    "weights": [(int, float, str)],
    "rule_settings": (str, dict),
    "settings": (list, dict),
    **dict.fromkeys(("seed", "rank"), int),
}
"""Forms of the values in a recipe, for `files.fits`; the keys are flags of experiments.merge."""


def read(path: Path) -> dict[str, Any]:
    """Read a recipe as `{flag: value}`; lists and tables become what the flags take.

    Raises:
        InvalidInput: it cannot be read, or has an unknown key or a value of another kind.
    """
    given = f"recipe={path}"
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{given}: cannot be read ({cause(error)}); give a TOML file") from error
    for key, value in content.items():
        if key not in _FORMS:
            raise InvalidInput(
                f"{given}: {key} is not a key of a recipe; it has {', '.join(_FORMS)}"
            )
        if not files.fits(value, _FORMS[key]):
            raise InvalidInput(f"{given}: {key} = {value!r} is not of the kind that a recipe has")
    content["rule_settings"] = _line(content.get("rule_settings", ""))
    if isinstance(table := content.get("settings"), dict):
        content["settings"] = [f"{pattern}:{_line(value)}" for pattern, value in table.items()]
    if "weights" in content:
        content["weights"] = [str(weight) for weight in content["weights"]]
    return {key: value for key, value in content.items() if value != ""}


def written(merge: Mapping[str, Any]) -> str:
    """Write a merge as a recipe; values that are empty are left out."""
    lines = [f"{key} = {_toml(value)}" for key, value in merge.items() if value not in ("", (), [])]
    return "\n".join(lines) + "\n"


def _line(settings: Any) -> str:
    """Write a table of settings as the line "name=value,name=value" that rules take."""
    if not isinstance(settings, dict):
        return str(settings)
    return ",".join(f"{name}={_setting(value)}" for name, value in settings.items())


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ":".join(map(str, value)) if isinstance(value, list) else str(value)


def _toml(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    # TOML's strings, numbers and truth values are those of JSON.
    return json.dumps(value, ensure_ascii=False)


def card(name: str, recipe: str) -> str:
    """Write the model card of a merged model, in the form that the Hugging Face Hub reads."""
    return (
        f"---\ntags:\n- merge\n- pm_jax\n---\n\n# {name}\n\nThis model was merged by pm_jax. Its "
        "recipe, saved as merge.toml beside the models, is followed again by `python -m "
        f"experiments.merge --recipe=merge.toml --output=NEW`:\n\n```toml\n{recipe}```\n"
    )

"""Find, read and check recipes: training runs described in YAML, with `key=value` overrides. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from uptrain.data.sources import TEXT_SOURCES, Strict
from uptrain.errors import UsageError, did_you_mean
from uptrain.training.recipe import Distill, Lora, Recipe, TokenizerSpec

LIMIT = 2**18
"""The largest recipe, in bytes."""
NESTED = 64
"""The most lists and mappings in brackets that may stand one inside the other."""


def shipped_folder() -> Path:
    """Return the folder of the shipped recipes, in a checkout or in an installed wheel."""
    package = Path(__file__).parent.parent
    installed = package / "recipes_shipped"
    return installed if installed.is_dir() else package.parent / "recipes"


def shipped() -> dict[str, Path]:
    """Return the shipped recipes by name."""
    return {path.stem: path for path in sorted(shipped_folder().glob("*.yaml"))}


def find_recipe(recipe: str) -> Path:
    """Return the path of a recipe: a file, or a shipped recipe called `NAME` or `recipes/NAME.yaml`.

    Raises:
        UsageError: there is no such file and no such shipped recipe.
    """
    try:
        path = Path(recipe).expanduser()
        if path.is_file():
            return path
    except (OSError, RuntimeError, ValueError):  # too long, an unknown user's home, or a NUL
        raise UsageError(f"{recipe!r} can't be the name of a recipe.") from None
    name = path.name.removesuffix(".yaml")
    if name in shipped() and str(path.parent) in (".", "recipes"):
        return shipped()[name]
    known = ", ".join(shipped())
    raise UsageError(f"There is no recipe {recipe}.", f"{did_you_mean(name, shipped())} Shipped: {known}.".strip())


def summary(path: Path) -> str:
    """Return the first comment line of a recipe, which describes it."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").rstrip()


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides.

    - `recipe`: a file, or the name of a shipped recipe.
    - `overrides`: such as `learning_rate=1e-4` or `distill.weight=0.5`; each value is YAML.

    Raises:
        UsageError: the recipe does not exist, is not YAML, or has a key or value that the schema does not allow.
    """
    path = find_recipe(recipe)
    try:
        if path.stat().st_size > LIMIT:
            raise UsageError(f"{path} is larger than {LIMIT >> 10} KiB, which no recipe is.")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not YAML: {error}.") from None
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}.") from None
    try:
        values = read_yaml(text)
    except ValueError as error:
        raise UsageError(f"{path} is not YAML: {error}.") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path} must hold keys and values, such as `model: demo`.")
    for override in overrides:
        _override(values, override)
    return parse_recipe(values, str(path))


def check_model(recipe: Recipe) -> None:
    """Refuse the `model` of a shipped recipe where no such folder exists.

    A shipped recipe names a folder that the user makes with `uptrain convert`. The name must not be taken for a Hub id.

    Raises:
        UsageError: the user did not replace it.
    """
    model = recipe.model
    if model is None or Path(model).is_dir():
        return
    if any(read_yaml(path.read_text(encoding="utf-8")).get("model") == model for path in shipped().values()):
        raise UsageError(
            f"The recipe's model is not a folder: {model}.",
            "Make it with `uptrain convert`, or name your own: model=CHECKPOINT.",
        )


class _Loader(yaml.SafeLoader):
    """Loads plain values without aliases: a few lines of aliases can expand to more than memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node as the base class does, but refuse an alias."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias (*), which recipes don't need")
        return super().compose_node(parent, index)

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        """Begin a list or mapping as the base class does, but refuse one inside many others.

        The scanner looks at all open ones for each character, so that 2 KB of brackets would take seconds.
        """
        if self.flow_level >= NESTED:
            raise yaml.YAMLError("it is nested too deep")
        super().fetch_flow_collection_start(TokenClass)


def read_yaml(text: str) -> Any:
    """Return the values of one YAML document; tags for Python objects and aliases are refused.

    Raises:
        ValueError: the text is not such a document. The message is one line.
    """
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except (yaml.YAMLError, ValueError, OverflowError, AttributeError, TypeError, KeyError) as error:
        # The YAML reader also raises the errors of dates and numbers that it can't convert.
        raise ValueError(" ".join(str(error).split()).removesuffix(".") or "it is empty") from None


def parse_recipe(values: Mapping[str, Any], where: str = "The recipe") -> Recipe:
    """Check plain values against the schema; `where` names the recipe in errors.

    Raises:
        UsageError: a key is unknown (the error names the nearest known key), or a value is not allowed.
    """
    try:
        return Recipe.model_validate(_numbers(values))
    except ValidationError as error:
        raise UsageError(*_sentence(error, where)) from None
    except (RecursionError, OverflowError) as error:
        raise UsageError(f"{where} holds values that can't be read: {error}.") from None


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    # YAML 1.1 reads 1e-3, which has no dot, as text. In a recipe it is a number.
    def read(value: Any) -> Any:
        if isinstance(value, str) and "e" in value.lower() and value[:1] in "+-.0123456789":
            try:
                return float(value)
            except ValueError:
                return value
        return value

    return {
        key: {inner: read(item) for inner, item in value.items()} if isinstance(value, dict) else read(value)
        for key, value in values.items()
    }


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"{override!r} is not an override.", "Write key=value, such as learning_rate=1e-4.")
    *sections, last = key.split(".")
    inner: Any = values
    for section in sections:
        inner = inner.setdefault(section, {}) if isinstance(inner, dict) else None
    if not isinstance(inner, dict):
        raise UsageError(f"{key} names no section of the recipe.", did_you_mean(key, Recipe.model_fields))
    try:
        inner[last] = read_yaml(text)
    except ValueError:
        raise UsageError(f"The value of {override!r} is not YAML.", "Quote it.") from None
    # Some keys exclude each other; an override replaces the recipe's other key.
    for group in (("tokens", "steps", "alpha"), ("model", "config"), ("eval_every", "eval_every_tokens")):
        if key in group and inner[last] is not None:
            for other in group:
                if other != key:
                    values.pop(other, None)
            if "alpha" in group and key != "alpha":
                values.pop("pretraining_tokens", None)


def _sentence(error: ValidationError, where: str) -> tuple[str, str]:
    first = error.errors()[0]
    sections = {"TokenizerSpec", "Distill", "Lora", *(source.__name__ for source in TEXT_SOURCES.values())}
    place = [part for part in map(str, first["loc"]) if part not in sections and not part.startswith("function-")]
    key = ".".join(place)
    if first["type"] == "extra_forbidden":
        known = _keys_of_section(place)
        return f"{where} has an unknown key {key}.", did_you_mean(place[-1], known) or f"Known: {', '.join(known)}."
    if first["type"] == "missing":
        return f"{where} lacks the key {key}.", ""
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if not key:
        return f"{where}: {message}.", ""
    return f"{where}: {key} {first['input']!r} won't do: {message}.", ""


def _keys_of_section(place: Sequence[str]) -> list[str]:
    if len(place) == 1:
        return list(Recipe.model_fields)
    named: dict[str, list[type[Strict]]] = {"tokenizer": [TokenizerSpec], "distill": [Distill], "lora": [Lora]}
    sections = named.get(place[0], list(TEXT_SOURCES.values()))
    return list(dict.fromkeys(name for section in sections for name in section.model_fields))

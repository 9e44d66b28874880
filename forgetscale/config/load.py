"""Read a recipe: YAML, ``--set`` overrides, strict validation with a sentence per mistake."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from forgetscale.config.generate import GenerateRecipe
from forgetscale.config.losses import SHORTHANDS, resolve_shorthand
from forgetscale.config.recipe import Recipe
from forgetscale.config.yaml_files import parse_yaml
from forgetscale.errors import ConfigError


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; ConfigError if there is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"recipe {path} cannot be read ({error.strerror}); check the path."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"recipe {path} is not UTF-8 text ({error.reason}); check the file."
        ) from error
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"recipe {path} is not valid YAML: {' '.join(str(error).split())}."
        ) from error
    except ConfigError as error:
        raise ConfigError(f"recipe {path}: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(
            f"recipe {path} holds {type(value).__name__}, expected sections (a mapping)."
        )
    return value


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a copy of ``values`` with ``path=value`` overrides applied.

    Args:
        values: Nested mapping from YAML.
        overrides: Items such as ``method.frozen_fraction=0.4``; the value is read as YAML.

    Raises:
        ConfigError: An item has no ``=`` or its path runs through a value that is no section.
    """
    result: dict[str, Any] = json.loads(json.dumps(values, default=str))
    for item in overrides:
        path, separator, text = item.partition("=")
        if not separator or not path:
            raise ConfigError(f"--set {item!r} is not of the form path=value.")
        *sections, last = path.split(".")
        target = result
        for depth, section in enumerate(sections):
            inner = target.setdefault(section, {})
            if not isinstance(inner, dict):
                where = ".".join(sections[: depth + 1])
                raise ConfigError(f"--set {item!r}: {where} is a value, not a section.")
            target = inner
        try:
            target[last] = parse_yaml(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {item!r}: the value is not valid YAML.") from error
        except ConfigError as error:
            raise ConfigError(f"--set {item!r}: {error}") from error
    return result


def _walk(location: tuple[Any, ...], root: Any) -> tuple[str, list[Any]]:
    """Return the path a user wrote for a location of pydantic's, and what sections stand there.

    Pydantic names the kind of a section behind its name; in a recipe that is a value.
    """
    candidates: list[Any] = [root]
    shown: list[str] = []
    for part in location:
        matching = [item for item in candidates if part in _kinds(item)]
        fields = [typing.get_type_hints(item).get(part) for item in candidates]
        if matching and not any(fields):
            candidates = matching
            continue
        shown.append(str(part))
        candidates = [found for hint in fields if hint for found in _dataclasses_in(hint)]
    return ".".join(shown), candidates


def _kinds(candidate: Any) -> tuple[Any, ...]:
    hint = typing.get_type_hints(candidate).get("kind")
    return typing.get_args(hint) if hint is not None else ()


def _dataclasses_in(hint: Any) -> list[Any]:
    if dataclasses.is_dataclass(hint):
        return [hint]
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType, typing.Annotated, tuple):
        return [found for part in typing.get_args(hint) for found in _dataclasses_in(part)]
    return []


def _sentence(error: Mapping[str, Any], root: Any) -> str:
    location = tuple(error["loc"])
    shown, sections = _walk(location, root)
    kinds = sorted({kind for item in sections for kind in _kinds(item)})
    kind, value = error["type"], error.get("input")
    if kind == "unexpected_keyword_argument":
        beside = _walk(location[:-1], root)[1]
        names = sorted({item.name for section in beside for item in dataclasses.fields(section)})
        near = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.5)
        hint = f"nearest valid name: {near[0]}" if near else f"valid names: {', '.join(names)}"
        return f"{shown} is not a recipe field (value {value!r}; {hint})."
    if kind in ("missing", "missing_keyword_only_argument"):
        return f"{shown} is missing; add it to the recipe or give --set {shown}=VALUE."
    if kind in ("union_tag_invalid", "literal_error"):
        context = error.get("ctx", {})
        allowed = context.get("expected_tags") or context.get("expected") or ""
        found = context.get("tag", value)
        names = [name.strip(" '") for name in allowed.replace(" or ", ",").split(",")]
        names += SHORTHANDS if shown == "method" else ()
        near = difflib.get_close_matches(str(found), names, n=1, cutoff=0.5)
        name = shown if kind == "literal_error" else f"{shown}.kind"
        hint = f"; nearest: {near[0]}" if near else ""
        return f"{name} is {found!r}, expected one of {', '.join(names)}{hint}."
    if kind == "union_tag_not_found":
        return f"{shown}.kind is missing; expected one of {', '.join(kinds)}."
    message = str(error["msg"]).removeprefix("Value error, ")
    if kind == "value_error":
        return f"{shown}: {message}."
    return f"{shown} is {value!r}: {message[0].lower() + message[1:]}."


_ADAPTER: TypeAdapter[Recipe] = TypeAdapter(Recipe)


def validate_recipe(values: Mapping[str, Any]) -> Recipe:
    """Turn a nested mapping into a ``Recipe``.

    Raises:
        ConfigError: One sentence per mistake, each with path, value and nearest valid name.
    """
    try:
        return _ADAPTER.validate_python(dict(resolve_shorthand(values)))
    except ValidationError as error:
        sentences = [_sentence(item, Recipe) for item in error.errors(include_url=False)]
        raise ConfigError("\n".join(dict.fromkeys(sentences))) from error


_GENERATE_ADAPTER: TypeAdapter[GenerateRecipe] = TypeAdapter(GenerateRecipe)


def validate_generate_recipe(values: Mapping[str, Any]) -> GenerateRecipe:
    """Turn a nested mapping into the recipe of ``forgetscale generate``.

    Raises:
        ConfigError: One sentence per mistake, each with path, value and nearest valid name.
    """
    try:
        return _GENERATE_ADAPTER.validate_python(dict(values))
    except ValidationError as error:
        found = error.errors(include_url=False)
        sentences = [_sentence(item, GenerateRecipe) for item in found]
        raise ConfigError("\n".join(dict.fromkeys(sentences))) from error


def load_generate_recipe(path: Path, overrides: Iterable[str] = ()) -> GenerateRecipe:
    """Read, override and validate the recipe of ``forgetscale generate``.

    Args:
        path: YAML file. Relative paths inside it are relative to the working folder.
        overrides: ``path=value`` items, applied in order.

    Raises:
        ConfigError: The file, an override or a value is wrong.
    """
    return validate_generate_recipe(apply_overrides(read_yaml(Path(path)), overrides))


def generate_recipe_dict(recipe: GenerateRecipe) -> dict[str, Any]:
    """Return the resolved recipe as plain JSON values, every default written out."""
    value = _GENERATE_ADAPTER.dump_python(recipe, mode="json")
    assert isinstance(value, dict)
    return value


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read, override and validate a recipe.

    Args:
        path: YAML file. Relative paths inside it are relative to the working folder.
        overrides: ``path=value`` items, applied in order.

    Raises:
        ConfigError: The file, an override or a value is wrong.
    """
    return validate_recipe(apply_overrides(read_yaml(Path(path)), overrides))


def recipe_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the resolved recipe as plain JSON values, every default written out."""
    value = _ADAPTER.dump_python(recipe, mode="json")
    assert isinstance(value, dict)
    return value


def dump_recipe(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML text that ``load_recipe`` reads back."""
    return yaml.safe_dump(recipe_dict(recipe), sort_keys=False, allow_unicode=True)

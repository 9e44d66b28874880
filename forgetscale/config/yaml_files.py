"""YAML without surprises: plain values only, and no key written twice."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

from forgetscale.errors import ConfigError


class UniqueKeyLoader(yaml.SafeLoader):
    """Safe loader that refuses a key written twice (plain YAML keeps the last one silently).

    Like every safe loader it makes numbers, texts, lists and mappings; a tag that names a Python
    object is an error.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping, refusing duplicates."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise ConfigError(
                    f"a key is a list or mapping (line {key_node.start_mark.line + 1}); keys must"
                    " be plain values."
                )
            if key in seen:
                raise ConfigError(
                    f"key {key!r} stands twice (line {key_node.start_mark.line + 1}); keep one."
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Return the value in a YAML text.

    Raises:
        ConfigError: A key stands twice.
        yaml.YAMLError: It is not YAML, or asks for a Python object.
    """
    return yaml.load(text, UniqueKeyLoader)

"""YAML as configurations use it: duplicate keys refused, and 1e-3 a number."""

import re
from collections.abc import Hashable
from typing import Any

import yaml
from yaml import YAMLError

from seq2expr.errors import UserError

__all__ = ["YAMLError", "format_yaml", "parse_yaml"]


def parse_yaml(text: str | bytes) -> Any:
    """Read YAML text.

    Raises
    ------
    YAMLError
        When the text is no YAML.
    UserError
        When a mapping holds a key twice, or a key that cannot be one.
    """
    return yaml.load(text, Loader=_StrictLoader)


def format_yaml(tree: Any) -> str:
    """Write plain values as YAML that :func:`parse_yaml` reads back, keys in their order."""
    return yaml.dump(tree, Dumper=_StrictDumper, sort_keys=False)


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads 1e-3 as a number."""


class _StrictDumper(yaml.SafeDumper):
    """SafeDumper that quotes the text 1e3, which the loader would read as a number."""


def _unique_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":  # "<<": what it brings may be overridden
            continue
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise UserError(f"Line {key_node.start_mark.line + 1}: {key!r} cannot be a key.")
        if key in seen:
            raise UserError(
                f"Duplicate key {key!r} in line {key_node.start_mark.line + 1} of the "
                "configuration; keep one of them."
            )
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _unique_mapping)
# YAML 1.1 wants a dot in "1e-3" and reads it as text otherwise.
for _class in (_StrictLoader, _StrictDumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )

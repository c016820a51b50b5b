"""Parse Python configuration text into plain values, never executing it.

Text, or containers that were stored as such, in; dictionaries, tuples and literals out, with an
`Unreadable` for whatever is no literal. Knows no key's meaning.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


class TextError(Exception):
    """The text is not Python."""


@dataclass(frozen=True)
class Unreadable:
    """The place of a value that is no literal; `source` is how it was written."""

    source: str

    def __repr__(self) -> str:
        return self.source


def parse_config(text: str) -> dict[str, object]:
    """Read the top-level assignments of a configuration; lists come as tuples.

    Raises:
        TextError: not Python; says where.
    """
    try:
        body = ast.parse(text).body
    except SyntaxError as error:
        raise TextError(f"{error.msg}, line {error.lineno}") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise TextError(str(error) or type(error).__name__) from error
    names: dict[str, object] = {}
    for node in body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                names[name] = _value(value, names)
            case ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant()):
                pass
            case _:  # a statement may change whatever it mentions
                mentioned = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
                names |= {name.id: Unreadable(_source(node)) for name in mentioned}
    return names


def plain(value: object) -> object:
    """Return stored containers in the form that `parse_config` gives: lists as tuples."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return tuple(plain(item) for item in value) if isinstance(value, (list, tuple)) else value


def unreadable_parts(value: object) -> Iterator[Unreadable]:
    """Yield everything in a value that could not be read."""
    if isinstance(value, Unreadable):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from unreadable_parts(item)
    elif isinstance(value, tuple):
        for item in value:
            yield from unreadable_parts(item)


def _value(node: ast.expr, names: Mapping[str, object]) -> object:
    match node:
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords):
            return _merge([(keyword.arg, keyword.value) for keyword in keywords], names)
        case ast.Dict(keys=keys, values=values):
            items = zip(map(_key, keys), values, strict=True)
            return _merge(list(items), names)
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return tuple(_value(element, names) for element in elements)
        case ast.Constant(value=value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.Name(id=name) if name in names:
            return names[name]
    return Unreadable(_source(node))


def _merge(
    items: list[tuple[str | None, ast.expr]], names: Mapping[str, object]
) -> dict[str, object]:
    """Return the dictionary of keys and values, in which the key None stands for `**value`."""
    merged: dict[str, object] = {}
    for key, node in items:
        value = _value(node, names)
        if key is not None:
            merged[key] = value
        elif isinstance(value, Mapping):
            merged |= value
        else:
            merged[f"**{_source(node)}"] = Unreadable(_source(node))
    return merged


def _key(node: ast.expr | None) -> str | None:
    if node is None:
        return None
    return str(node.value) if isinstance(node, ast.Constant) else _source(node)


def _source(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 60 else f"{text[:57]}..."

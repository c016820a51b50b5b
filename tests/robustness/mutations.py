"""Seeded mutations of bytes, JSON trees and lines: one seed always gives the same mutation."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

BytesMutation = Callable[[bytearray, random.Random, bytes], bytes]
BLOCKS = (1, 2, 16, 256, 4096)


def flip_bits(data: bytearray, chance: random.Random, _: bytes) -> bytes:
    for _flip in range(chance.choice((1, 1, 2, 8, 64))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def cut(data: bytearray, chance: random.Random, _: bytes) -> bytes:
    return bytes(data[: chance.randrange(len(data))])


def cut_end(data: bytearray, chance: random.Random, _: bytes) -> bytes:
    return bytes(data[: -chance.choice(BLOCKS)])


def keep_start(data: bytearray, chance: random.Random, _: bytes) -> bytes:
    return bytes(data[: chance.randrange(65)])


def splice(data: bytearray, chance: random.Random, other: bytes) -> bytes:
    return bytes(data[: chance.randrange(len(data))]) + other[chance.randrange(len(other)) :]


def remove_block(data: bytearray, chance: random.Random, _: bytes) -> bytes:
    start = chance.randrange(len(data))
    return bytes(data[:start] + data[start + chance.choice(BLOCKS) :])


def repeat_block(data: bytearray, chance: random.Random, _: bytes) -> bytes:
    start = chance.randrange(len(data))
    block = data[start : start + chance.choice(BLOCKS)] * chance.choice((1, 3))
    return bytes(data[:start] + block + data[start:])


def zero_block(data: bytearray, chance: random.Random, _: bytes) -> bytes:
    start = chance.randrange(len(data))
    block = data[start : start + chance.choice(BLOCKS)]
    return bytes(data[:start]) + bytes(len(block)) + bytes(data[start + len(block) :])


def edit_header(data: bytearray, chance: random.Random, _: bytes) -> bytes:
    for _edit in range(chance.choice((1, 2, 4))):
        value = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        data[chance.randrange(min(96, len(data)))] = value
    return bytes(data)


def edit_size(data: bytearray, chance: random.Random, _: bytes) -> bytes:
    """Put an extreme number where a header may have a size."""
    width, code = chance.choice(((2, "H"), (4, "I"), (8, "Q")))
    start = chance.randrange(max(1, min(512, len(data)) - width))
    value = chance.choice((0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1))
    data[start : start + width] = struct.pack(chance.choice("<>") + code, value % 2 ** (8 * width))
    return bytes(data)


def noise_after_header(data: bytearray, chance: random.Random, _: bytes) -> bytes:
    return bytes(data[: chance.choice((0, 4, 8, 16, 64))]) + chance.randbytes(
        chance.choice((0, 16, 1000, 20_000))
    )


def append(data: bytearray, chance: random.Random, _: bytes) -> bytes:
    return bytes(data) + chance.randbytes(chance.choice((1, 100)))


WEIGHTS: dict[BytesMutation, float] = {
    flip_bits: 5,
    edit_header: 4,
    edit_size: 4,
    cut: 2,
    cut_end: 1,
    keep_start: 0.6,
    splice: 1,
    remove_block: 1,
    repeat_block: 1,
    zero_block: 1,
    noise_after_header: 0.6,
    append: 1,
}


def mutate_bytes(data: bytes, chance: random.Random, other: bytes) -> tuple[bytes, str]:
    """Return changed bytes and the name of the change; `other` is a file of the same kind."""
    (mutation,) = chance.choices(list(WEIGHTS), list(WEIGHTS.values()))
    return mutation(bytearray(data), chance, other), mutation.__name__


ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, -5, 60_000, 2**31, 2**53 + 1, 10**30, -(10**30), 10**400),
    *(0.5, -0.0, 1e308, float("inf"), float("-inf"), float("nan")),
    *("", "x", "12", "x" * 5000, "../../../etc/passwd", "/etc/passwd", "a\x00b", "\ud800", "a\nb"),
    *("\x1b[31mred", "{0}{x}%s", "$\\alfa{$", "[/]", "\ufeffa", "\u202ea"),
    *([], {}, [[]], [None], {"a": 1}, [1, 2, 3], ["a", "a"]),
)


def mutate_tree(tree: Any, chance: random.Random) -> tuple[Any, str]:
    """Return a JSON tree with one to three places changed, and what was done where."""
    tree, said = copy.deepcopy(tree), []
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        path = chance.choice(_places(tree))
        change = chance.choice(("replace", "replace", "replace", "remove", "double", "nest"))
        said.append(f"{change} {'/'.join(map(str, path)) or 'all'}")
        if not path:
            return chance.choice(ODD_VALUES), said[-1]
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        _change(parent, path[-1], change, chance)
    return tree, ", ".join(said)


def _change(parent: Any, key: Any, change: str, chance: random.Random) -> None:
    if change == "remove":
        del parent[key]
    elif change == "double" and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(parent[key]))
    elif change == "nest":
        parent[key] = chance.choice(([parent[key]], {"a": parent[key]}, [parent[key]] * 2))
    else:
        parent[key] = copy.deepcopy(chance.choice(ODD_VALUES))


def _places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the ways to all values; of long lists to those of the first entries."""
    places = [path]
    if isinstance(tree, dict):
        for key in list(tree)[:200]:
            places += _places(tree[key], (*path, key))
    elif isinstance(tree, list):
        for position in range(min(len(tree), 6)):
            places += _places(tree[position], (*path, position))
    return places


def json_bytes(tree: Any, chance: random.Random) -> bytes:
    """Return a tree as JSON, now and then with damage that no tree can have."""
    text = json.dumps(tree)
    kind = chance.random()
    if kind < 0.02:
        return b"[" * 100_000
    if kind < 0.06:
        return mutate_bytes(text.encode(), chance, text.encode())[0]
    if kind < 0.08:
        return b"\xef\xbb\xbf" + text.encode()
    if kind < 0.1:
        return text.encode("utf-16")
    return text.encode()


def mutate_lines(lines: list[bytes], chance: random.Random) -> tuple[bytes, str]:
    """Return lines of text with one of them changed to what editors and programs leave there."""
    odd = (
        b"",
        b" ",
        b"x" * 300,
        b"a\0b",
        b"caf\xe9",
        b"\xff\xfe",
        b"../..",
        b"/",
        b"#",
        b"\x1b[31m",
    )
    position, value = chance.randrange(len(lines) + 1), chance.choice(odd)
    changed = [*lines[:position], value, *lines[position + 1 :]]
    end = chance.choice((b"\n", b"\r\n", b"\r"))
    start = chance.choice((b"", b"", b"\xef\xbb\xbf", b"\xff\xfe"))
    return start + end.join(changed), f"line {position} is {value[:12]!r}"

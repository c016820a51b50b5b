"""Triton's own schema of a model's configuration, and `config.pbtxt` by it: no field is misspelt, no value of a wrong type.

The schema lies in `schemas` as a descriptor: NVIDIA's own package, tritonclient, which holds it too, ties protobuf and ml_dtypes down.
"""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import Message

DESCRIPTOR = "triton_model_config.binpb"


@cache
def _message_class() -> type[Message]:
    file = descriptor_pb2.FileDescriptorProto.FromString(
        resources.files("tood_deploy.export.triton").joinpath("schemas", DESCRIPTOR).read_bytes()
    )
    pool = descriptor_pool.DescriptorPool()  # its own: tritonclient, in the same process, registers the same names
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


def new_config(**fields: Any) -> Any:
    """A `ModelConfig` with these fields; nested messages as dictionaries, enumerations by name.

    Raises:
        ValueError, TypeError: the schema has no such field, or it takes no such value.
    """
    return _message_class()(**fields)


def config_text(config: Message) -> str:
    """The text of `config.pbtxt`."""
    return text_format.MessageToString(config, as_utf8=True)


def read_config(text: str) -> Any:
    """The `ModelConfig` in the text of a `config.pbtxt`.

    Raises:
        google.protobuf.text_format.ParseError: it is none by Triton's schema.
    """
    return text_format.Parse(text, _message_class()())

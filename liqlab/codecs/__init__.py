"""Event table <-> bytes."""

from __future__ import annotations

from typing import Final

from liqlab.codecs.base import Codec, CodecError
from liqlab.codecs.blocks import Block, MsgpackZlib, block_span
from liqlab.codecs.entries import JSON, MSGPACK, Fields, Integers, Struct19
from liqlab.codecs.names import Names

CODECS: Final[dict[str, Codec]] = {
    codec.name: codec for codec in (JSON, MSGPACK, Fields(), Integers(), Struct19(), MsgpackZlib(), Block())
}
BY_FIELD: Final[dict[str, Codec]] = {codec.fields[0]: codec for codec in CODECS.values()}

__all__ = ["BY_FIELD", "CODECS", "Codec", "CodecError", "Names", "block_span"]

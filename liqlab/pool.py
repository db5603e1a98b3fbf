"""Connections that pack commands in C: redis-py 8 has hiredis do that for its blocking client, not for asyncio's.

A batch of the writer names a thousand keys and more; packed in Python they take longer than all else that sends it.
"""

from __future__ import annotations

from typing import Any, Final

import hiredis
from redis.asyncio import BlockingConnectionPool
from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection
from redis.connection import HiredisRespSerializer

_SERIALIZER: Final = HiredisRespSerializer()


class _Packing(AbstractConnection):
    def pack_command(self, *args: Any) -> list[bytes]:
        name = args[0].encode() if isinstance(args[0], str) else args[0]
        try:
            return [hiredis.pack_command((*name.split(), *args[1:]))]
        except TypeError:  # bytearrays, or what cannot be sent at all: looked for in each argument only then
            packed: list[bytes] = _SERIALIZER.pack(*args)
            return packed


_PACKING: Final[dict[type[AbstractConnection], type[AbstractConnection]]] = {
    kind: type(kind.__name__, (_Packing, kind), {}) for kind in (Connection, SSLConnection, UnixDomainSocketConnection)
}


def pool(url: str, **options: Any) -> BlockingConnectionPool:
    """Return a pool for a URL that redis-py knows; nothing is connected yet.

    Raises
    ------
    ValueError
        The URL cannot be used; its text may quote the password.
    """
    made = BlockingConnectionPool.from_url(url, **options)
    made.connection_class = _PACKING.get(made.connection_class, made.connection_class)  # by the URL's scheme
    return made

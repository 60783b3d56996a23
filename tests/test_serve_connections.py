"""Connections that send nothing: each holds an open file, of which a process may have few."""

import asyncio
from unittest.mock import Mock

import uvicorn
from uvicorn.server import ServerState

from varedit_serve.server import SPARE, protocol


def test_connections_beyond_the_limit_are_closed_before_anything_is_sent() -> None:
    async def test() -> None:
        config = uvicorn.Config(Mock(), log_config=None, limit_concurrency=3, lifespan="off")
        config.load()
        state, kind = ServerState(), protocol(30.0)
        transports = [Mock() for _ in range(3 + SPARE + 2)]
        for transport in transports:
            transport.get_extra_info.return_value = None
            kind(config, state, {}).connection_made(transport)
        closed = [transport.abort.called for transport in transports]
        assert closed == [False] * (3 + SPARE) + [True] * 2

    asyncio.run(test())

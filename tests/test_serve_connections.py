"""Where a server listens, and connections that send nothing: each holds an open file."""

import asyncio
from unittest.mock import Mock

import pytest
import uvicorn
from click.testing import CliRunner
from uvicorn.server import ServerState

from varedit_runtime.errors import ConfigError
from varedit_serve.cli import main
from varedit_serve.server import SPARE, listen, protocol


@pytest.mark.parametrize("host", ["256.1.1.1", "a\0b", "é" * 70])
def test_an_address_that_cannot_be_used_is_one_line(host: str) -> None:
    with pytest.raises(ConfigError, match="cannot be listened at") as refused:
        listen(host, 0)
    assert "Unknown error" not in str(refused.value)


def test_a_port_in_use_says_what_to_do() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match=r"in use.*--port"):
        listen("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize("port", ["65536", "-1"])
def test_a_port_that_there_is_not_is_wrong_usage(port: str) -> None:
    done = CliRunner().invoke(main, ["nano", "--port", port])
    assert done.exit_code == 2 and "65535" in done.output


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

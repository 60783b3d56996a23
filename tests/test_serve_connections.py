"""Where a server listens, and connections that send nothing: each holds an open file."""

import asyncio
import socket
from unittest.mock import Mock

import pytest
import uvicorn
from click.testing import CliRunner
from uvicorn.server import ServerState

from varedit_runtime.errors import ConfigError
from varedit_serve.cli import _address, main
from varedit_serve.server import SPARE, listen, protocol


@pytest.mark.parametrize("host", ["256.1.1.1", "a\0b", "é" * 70])
def test_an_address_that_cannot_be_used_is_one_line(host: str) -> None:
    with pytest.raises(ConfigError, match="cannot be listened at") as refused:
        listen(host, 0)
    assert "Unknown error" not in str(refused.value)


def test_a_port_in_use_says_what_to_do() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as refused:
            listen("127.0.0.1", port)
    assert str(refused.value) == (
        f"127.0.0.1, port {port}, cannot be listened at (Address already in use): "
        "choose another --port, or a --host of this machine"
    )


def test_small_parts_of_an_answer_do_not_wait_for_each_other() -> None:
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("port", ["65536", "-1"])
def test_a_port_that_there_is_not_is_wrong_usage(port: str) -> None:
    done = CliRunner().invoke(main, ["nano", "--port", port])
    assert done.exit_code == 2 and "65535" in done.output


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--max-n 0", "--max-n is 0; give a number over 0"),
        ("--upload-seconds nan", "--upload-seconds is nan; give a number over 0"),
        ("--deadline inf", "--deadline is inf; give a number over 0"),
        ("--batch 0", "--batch is 0; the bundle takes 1 to 1"),
        ("--batch 99", "--batch is 99; the bundle takes 1 to 1"),
        ("--name=", "--name is empty"),
        ("--allow-host http://x", "--allow-host is 'http://x'; give a name alone"),
        ("--allow-host x:80", "--allow-host is 'x:80'; give a name alone"),
        ("--allow-origin evil.example", "--allow-origin is 'evil.example'; give https://"),
        ("--allow-origin https://a/b", "--allow-origin is 'https://a/b'; give https://"),
        ("--metrics x", "--metrics is 'x'; give PORT, or HOST:PORT"),
        ("--metrics 127.0.0.1:99999", "--metrics is '127.0.0.1:99999'; give PORT, or HOST:PORT"),
        ("--keys nofile", "nofile cannot be read: No such file"),
    ],
)
def test_an_option_that_cannot_be_used_is_named(options: str, told: str) -> None:
    done = CliRunner().invoke(main, ["nano", *options.split()])
    assert done.exit_code == 1 and f"Error: {told}" in done.output


def test_numbers_have_an_address_as_people_write_it() -> None:
    assert _address("9000") == ("127.0.0.1", 9000)
    assert _address("0.0.0.0:9000") == ("0.0.0.0", 9000)
    assert _address("[::1]:0") == ("::1", 0)


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

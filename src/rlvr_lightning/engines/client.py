"""JSON over HTTP to one or several servers, from a thread of its own; every wait has a deadline."""

import asyncio
import json as json_
import queue
import threading
from collections.abc import Coroutine, Generator, Sequence
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import aiohttp

from rlvr_lightning.engines import EngineDiedError, ReplyError

T = TypeVar("T")
KEEP_ALIVE_S = 2.0
"""Unused connections are given up after so long. vLLM's server does it after 5 s, and who writes to one at that moment takes it
for dead."""


class Client:
    """Talks to servers; index ``i`` below is the place of a server in ``addresses``.

    Args:
        addresses: a URL each, or the path of a Unix socket.
        connections: most of them to each server.
    """

    def __init__(self, addresses: Sequence[str | Path], connections: int) -> None:
        self.addresses = list(addresses)
        self.connections = connections
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rlvr-http", daemon=True)
        self._thread.start()
        self._sessions = self._run(self._open(), 10)

    async def _open(self) -> list[aiohttp.ClientSession]:
        return [
            aiohttp.ClientSession(
                "http://localhost", connector=aiohttp.UnixConnector(str(address), limit=0, keepalive_timeout=KEEP_ALIVE_S)
            )
            if isinstance(address, Path)
            else aiohttp.ClientSession(address, connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S))
            for address in self.addresses
        ]

    def _run(self, coroutine: "Coroutine[Any, Any, T]", timeout: float) -> T:
        if self._closed:
            coroutine.close()
            raise EngineDiedError("the connection is closed")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(timeout)
        except FutureTimeout:
            future.cancel()
            raise EngineDiedError(f"no answer within {timeout:g} s") from None

    async def _request(self, server: int, method: str, path: str, json: Any, timeout: float | None) -> Any:
        limits = aiohttp.ClientTimeout(total=timeout, sock_connect=min(timeout or 10, 10))
        try:
            async with self._sessions[server].request(method, path, json=json, timeout=limits) as reply:
                content = await reply.read()
                if reply.status != 200:
                    raise ReplyError(reply.status, content.decode(errors="replace"))
                return json_.loads(content) if content else None
        except TimeoutError:
            raise EngineDiedError(f"the server at {self.addresses[server]} did not answer {path} within {timeout} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise EngineDiedError(f"the server at {self.addresses[server]} is gone: {error!r}") from error

    def call(self, server: int, path: str, json: Any = None, *, timeout: float) -> Any:
        """Return the answer to one request; GET without ``json``.

        Raises:
            EngineDiedError: if the server is gone or does not answer in time.
            ReplyError: if it answers with a status other than 200.
        """
        method = "GET" if json is None else "POST"
        return self._run(self._request(server, method, path, json, timeout), timeout + 5)

    def call_all(self, path: str, json: Any = None, *, timeout: float) -> list[Any]:
        """Return the answers of all servers, asked at the same time; raises as :meth:`call`."""
        return self.gather(path, [json] * len(self.addresses), timeout=timeout)

    def gather(self, path: str, jsons: Sequence[Any], *, timeout: float) -> list[Any]:
        """Return the answers to one request for each server, all at the same time; raises as :meth:`call`.

        A server whose engine has died may keep a request for ever, so each one's health is asked for every second.
        """

        async def ask() -> list[Any]:
            requests = [self._request(i, "GET" if j is None else "POST", path, j, timeout) for i, j in enumerate(jsons)]
            answers, death = asyncio.gather(*requests), asyncio.ensure_future(self._until_one_is_ill())
            try:
                await asyncio.wait({answers, death}, return_when=asyncio.FIRST_COMPLETED)
                return await (answers if answers.done() else death)
            finally:
                answers.cancel()
                death.cancel()

        return self._run(ask(), timeout + 5)

    async def _until_one_is_ill(self) -> list[Any]:
        while True:
            await asyncio.sleep(1)
            for server in range(len(self.addresses)):
                with suppress(EngineDiedError):  # slow, or gone: the request itself notices
                    await self._request(server, "GET", "/health", None, 5)

    def answers(self, path: str, jsons: Sequence[Any], *, silence: float) -> Generator[tuple[int, Any], None, None]:
        """Yield (index, answer) of many requests as they come in; a server gets the next one as soon as it has room.

        Args:
            path: of all requests.
            jsons: their contents.
            silence: seconds without any answer after which all is given up.

        Raises:
            EngineDiedError: if a server is gone, or none answers for so long.
            ReplyError: if one answers with a status other than 200.
        """
        done: queue.SimpleQueue[tuple[int, Any] | Exception] = queue.SimpleQueue()
        left, missing = iter(range(len(jsons))), dict.fromkeys(self.addresses, 0)

        async def work(server: int) -> None:
            try:
                for i in left:
                    missing[self.addresses[server]] += 1
                    done.put((i, await self._request(server, "POST", path, jsons[i], None)))
                    missing[self.addresses[server]] -= 1
            except Exception as error:
                done.put(error)

        async def work_all() -> None:
            workers = min(self.connections, len(jsons))
            try:
                await asyncio.gather(*(work(server) for _ in range(workers) for server in range(len(self.addresses))))
            finally:  # cancelled by close(): whoever waits for answers is told
                done.put(EngineDiedError("the connection was closed while requests waited"))

        future = asyncio.run_coroutine_threadsafe(work_all(), self._loop)
        try:
            for count in range(len(jsons)):
                try:
                    answer = done.get(timeout=silence)
                except queue.Empty:
                    waiting = ", ".join(f"{n} at {address}" for address, n in missing.items() if n)
                    raise EngineDiedError(
                        f"no request was finished for {silence:g} s and {len(jsons) - count} are missing: {waiting}"
                    ) from None
                if isinstance(answer, Exception):
                    raise answer
                yield answer
        finally:
            future.cancel()

    def close(self) -> None:
        """Close all connections. Idempotent."""
        if self._closed:
            return
        self._closed = True
        with suppress(FutureTimeout):
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _close(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for session in self._sessions:
            await session.close()

"""A runtime in a thread of its own, for callers in many threads or in asyncio.

callers --commands--> the thread: [commands] -> step -> [new text] --> each caller's own stream
"""

from __future__ import annotations

import itertools
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from l2a_compress.errors import SessionError
from l2a_compress.runtime.request import Limits, Request
from l2a_compress.runtime.runtime import Answer, Asked, Runtime
from l2a_compress.runtime.sampling import Sampling

log = logging.getLogger(__name__)
Result = TypeVar("Result")
_IDLE = 0.1  # seconds between two looks at the signals where nothing runs


class Stream:
    """The text of one request as it is written. Iterate it, in a thread or in asyncio, or ask for the answer.

    Its items are pieces of text, tags included, and the :class:`~l2a_compress.runtime.runtime.Answer` at the end. What
    went wrong is raised in its place.
    """

    def __init__(self, server: Server, request: Request, tier: str) -> None:
        self.request, self._tier = request, tier
        self._server, self._told = server, ""
        self._items: list[str | Answer | Exception] = []
        self._wake: list[Callable[[], object]] = []
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[str | Answer]:
        for place in itertools.count():
            event = threading.Event()
            if not self._ready(place, event.set):
                event.wait()
            yield self._item(place)
            if self._last(place):
                return

    async def __aiter__(self) -> AsyncIterator[str | Answer]:
        import asyncio  # whose callers have imported it: others need not wait for it

        loop = asyncio.get_running_loop()
        for place in itertools.count():
            event = asyncio.Event()
            if not self._ready(place, lambda event=event: loop.call_soon_threadsafe(event.set)):  # type: ignore[misc]
                await event.wait()
            yield self._item(place)
            if self._last(place):
                return

    def answer(self) -> Answer:
        """Waits for the end. Raises what went wrong."""
        return next(item for item in self if isinstance(item, Answer))

    def set_budget(self, budget: Asked) -> None:
        """Changes what the request may spend from its next token on; ``"auto"`` leaves it to the selector.

        Raises:
            BudgetError: the model cannot keep to the budget; the old one stays.
        """
        tier = self._tier
        self._server.call(lambda: self._server.runtime.set_budget(self.request, budget, tier=tier))

    def cancel(self) -> None:
        """Ends the request with what is written."""
        self._server.call(lambda: self._server.runtime.engine.cancel(self.request))

    def push(self, runtime: Runtime) -> None:
        """Adds what is new; called by the server's thread."""
        text = runtime.text(self.request)
        if len(text) > len(self._told):
            self._add(text[len(self._told) :])
            self._told = text
        if self.request.done:
            self.end(self.request.error)

    def end(self, error: Exception | None = None) -> None:
        """Adds the last item; called by the server's thread."""
        try:
            self._add(error or self._server.runtime.answer(self.request))
        except Exception as failure:
            self._add(failure)

    def _add(self, item: str | Answer | Exception) -> None:
        with self._lock:
            self._items.append(item)
            wake, self._wake = self._wake, []
        for call in wake:
            try:
                call()
            except RuntimeError:  # the caller's event loop is closed: nobody listens
                log.debug("nobody listens to request %d any more", self.request.number)

    def _ready(self, place: int, wake: Callable[[], object]) -> bool:
        with self._lock:
            if place < len(self._items):
                return True
            self._wake.append(wake)
            return False

    def _item(self, place: int) -> str | Answer:
        item = self._items[place]
        if isinstance(item, Exception):
            raise item
        return item

    def _last(self, place: int) -> bool:
        return isinstance(self._items[place], Answer)


class Server:
    """Serves a runtime to many callers at once, by continuous batching. A context manager.

    Args:
        runtime: that nobody else calls any more.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._streams: list[Stream] = []
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="l2a-server", daemon=True)
        self._thread.start()

    def stream(
        self,
        prompt: str | Sequence[int],
        budget: Asked = None,
        *,
        limits: Limits | None = None,
        sampling: Sampling | None = None,
        tier: str = "default",
        seconds: float | None = None,
    ) -> Stream:
        """Queues a prompt. Arguments and errors are those of :meth:`Runtime.generate`."""

        def submit() -> Stream:
            (request,) = self.runtime.submit(
                [prompt], [budget], limits=limits, sampling=sampling, tier=tier, seconds=seconds
            )
            self._streams.append(stream := Stream(self, request, tier))
            return stream

        return self.call(submit)

    def call(self, action: Callable[[], Result]) -> Result:
        """Does something between two steps, in the thread that the runtime belongs to, and waits for it.

        Raises:
            SessionError: the server is closed.
        """
        future: Future[Result] = Future()

        def command() -> None:
            try:
                future.set_result(action())
            except Exception as error:
                future.set_exception(error)

        if self._closed.is_set():
            raise SessionError("the server is closed; open another one")
        self._commands.put(command)
        while True:
            try:
                return future.result(timeout=_IDLE)
            except TimeoutError:
                if future.done():  # in between; or the error is the action's own
                    return future.result()
                if not self._thread.is_alive():
                    raise SessionError("the server is closed; open another one") from None

    def close(self) -> None:
        """Ends all requests, with what they have written, and the thread."""
        self._closed.set()
        self._commands.put(None)
        self._thread.join()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _run(self) -> None:
        while not self._closed.is_set():
            self._obey()
            if self._closed.is_set():
                break
            try:
                self.runtime.step()
            except Exception as error:  # a mistake of ours must not leave callers waiting
                log.exception("a step failed")
                self._end(SessionError(f"a step failed: {error}"))
            for stream in self._streams:
                stream.push(self.runtime)
            self._streams = [stream for stream in self._streams if not stream.request.done]
        self._end(None)
        self.runtime.engine.close()

    def _obey(self) -> None:
        """Does what callers asked for; waits a little for it where nothing runs."""
        wait = not self.runtime.engine.busy
        while True:
            try:
                command = self._commands.get(timeout=_IDLE) if wait else self._commands.get_nowait()
            except queue.Empty:
                return
            if command is None:
                return
            command()
            wait = False

    def _end(self, error: Exception | None) -> None:
        for stream in self._streams:
            self.runtime.engine.cancel(stream.request)
            stream.end(error)
        self._streams = []

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
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from l2a_compress.errors import SessionError
from l2a_compress.runtime.request import Limits, Request
from l2a_compress.runtime.runtime import Answer, Asked, Runtime
from l2a_compress.runtime.sampling import Sampling

log = logging.getLogger(__name__)
Result = TypeVar("Result")
_IDLE = 0.1  # seconds between two looks at the signals where nothing runs
_ALIVE = 1.0  # seconds between two looks at whether the thread runs


class Stream:
    """The text of one request as it is written. Iterate it, in a thread or in asyncio, or ask for the answer.

    Its items are pieces of text, tags included, and the :class:`~l2a_compress.runtime.runtime.Answer` at the end. What
    went wrong is raised in its place. A task that is cancelled while it iterates cancels the request; who only leaves
    the loop may come back, or calls :meth:`cancel`. Coroutines use :meth:`aset_budget` and :meth:`acancel`, as the
    other methods wait for the server's thread.
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
                while not event.wait(_ALIVE):
                    self._check(place)
            yield self._item(place)
            if self._last(place):
                return

    async def __aiter__(self) -> AsyncIterator[str | Answer]:
        import asyncio  # whose callers have imported it: others need not wait for it

        task, waits = asyncio.current_task(), False
        try:
            for place in itertools.count():
                waits = True
                await self._wait(place)
                waits = False
                yield self._item(place)
                if self._last(place):
                    return
        except (asyncio.CancelledError, GeneratorExit):  # the latter where the task did something with a piece
            if waits or (task is not None and task.cancelling()):
                self.forget()
            raise

    def answer(self) -> Answer:
        """Waits for the end. Raises what went wrong."""
        return next(item for item in self if isinstance(item, Answer))

    def set_budget(self, budget: Asked) -> None:
        """Changes what the request may spend from its next token on; ``"auto"`` leaves it to the selector.

        Raises:
            BudgetError: the model cannot keep to the budget; the old one stays.
        """
        self._server.call(partial(self._server.runtime.set_budget, self.request, budget, tier=self._tier))

    async def aset_budget(self, budget: Asked) -> None:
        """As :meth:`set_budget`, in asyncio."""
        change = partial(self._server.runtime.set_budget, self.request, budget, tier=self._tier)
        await _awaited(self._server.post(change))

    def cancel(self) -> None:
        """Ends the request with what is written."""
        self._server.call(self._cancel)

    async def acancel(self) -> None:
        """As :meth:`cancel`, in asyncio."""
        await _awaited(self._server.post(self._cancel))

    def forget(self) -> None:
        """As :meth:`cancel`, without waiting for it."""
        with suppress(SessionError):  # the server is closed, and the request with it
            self._server.post(self._cancel)

    def push(self, runtime: Runtime) -> None:
        """Adds what is new; called by the server's thread. Never raises: what goes wrong ends this request alone."""
        try:
            text = runtime.text(self.request)
            if len(text) > len(self._told):
                self._add(text[len(self._told) :])
                self._told = text
        except Exception as error:
            log.exception("the text of request %d cannot be told", self.request.number)
            runtime.engine.cancel(self.request, SessionError(f"its text cannot be told: {error}"))
        if self.request.done:
            self.end(self.request.error)

    def end(self, error: Exception | None = None) -> None:
        """Adds the last item; called by the server's thread."""
        try:
            self._add(error or self._server.runtime.answer(self.request))
        except Exception as failure:
            self._add(failure)

    def _cancel(self) -> None:
        self._server.runtime.engine.cancel(self.request)

    async def _wait(self, place: int) -> None:
        """Until an item is there."""
        import asyncio

        event, loop = asyncio.Event(), asyncio.get_running_loop()
        if self._ready(place, lambda: loop.call_soon_threadsafe(event.set)):
            return
        while not event.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(_ALIVE):  # wait_for loses a cancellation that comes with the event
                    await event.wait()
            self._check(place)

    def _check(self, place: int) -> None:
        """Raises where an item is not there and nobody will add it any more."""
        if not self._server.alive and place >= len(self._items):
            raise SessionError(f"request {self.request.number}: the server's thread has ended; open another one")

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
        self._closed, self._lock = threading.Event(), threading.Lock()
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
        return self.call(self._submit(prompt, budget, limits=limits, sampling=sampling, tier=tier, seconds=seconds))

    async def astream(
        self,
        prompt: str | Sequence[int],
        budget: Asked = None,
        *,
        limits: Limits | None = None,
        sampling: Sampling | None = None,
        tier: str = "default",
        seconds: float | None = None,
    ) -> Stream:
        """As :meth:`stream`, in asyncio. Who is cancelled meanwhile leaves no request behind."""
        import asyncio

        future = self.post(self._submit(prompt, budget, limits=limits, sampling=sampling, tier=tier, seconds=seconds))
        try:
            return await _awaited(future)
        except asyncio.CancelledError:
            future.add_done_callback(_forgotten)
            raise

    def _submit(
        self, prompt: str | Sequence[int], budget: Asked, *, tier: str, **settings: Any
    ) -> Callable[[], Stream]:
        def submit() -> Stream:
            (request,) = self.runtime.submit([prompt], [budget], tier=tier, **settings)
            self._streams.append(stream := Stream(self, request, tier))
            return stream

        return submit

    def call(self, action: Callable[[], Result]) -> Result:
        """Does something between two steps, in the thread that the runtime belongs to, and waits for it.

        Raises:
            SessionError: the server is closed.
        """
        return self.post(action).result()

    def post(self, action: Callable[[], Result]) -> Future[Result]:
        """As :meth:`call`, without waiting; ``asyncio.wrap_future`` makes it one to await."""
        future: Future[Result] = Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(self._open(action))
            except BaseException as error:
                future.set_exception(error)
                if not isinstance(error, Exception):
                    raise

        with self._lock:  # the thread does all that it was sent before it ended
            self._check()
            self._commands.put(command)
        return future

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Ends all requests, with what they have written, and the thread."""
        self._closed.set()
        self._commands.put(None)
        self._thread.join()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _check(self) -> None:
        if self._closed.is_set():
            raise SessionError("the server is closed; open another one")
        if not self.alive:  # as in a child of a fork, which has none of the threads
            raise SessionError("the server's thread does not run in this process; open another one, behind the fork")

    def _open(self, action: Callable[[], Result]) -> Result:
        self._check()
        return action()

    def _run(self) -> None:
        error: Exception | None = SessionError("the server's thread has ended; open another one")
        try:
            self._serve()
            error = None
        finally:  # whatever happens, nobody is left waiting
            with self._lock:
                self._closed.set()
            self._end(error)
            while not self._commands.empty():
                if (command := self._commands.get()) is not None:
                    command()  # tells that the server is closed
            self.runtime.engine.close()

    def _serve(self) -> None:
        while True:
            self._obey()
            if self._closed.is_set():
                return
            try:
                self.runtime.step()
            except Exception as error:  # a mistake of ours must not leave callers waiting
                log.exception("a step failed")
                self._end(SessionError(f"a step failed: {error}"))
            for stream in self._streams:
                stream.push(self.runtime)
            self._streams = [stream for stream in self._streams if not stream.request.done]

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
            try:
                self.runtime.engine.cancel(stream.request)
            except Exception as failure:  # the others must be told all the same
                log.exception("request %d cannot be ended", stream.request.number)
                error = error or failure
            stream.end(error)
        self._streams = []


async def _awaited(future: Future[Result]) -> Result:
    import asyncio

    return await asyncio.wrap_future(future)


def _forgotten(future: Future[Stream]) -> None:
    """Ends a request that was made for a task that is gone."""
    if not future.cancelled() and future.exception() is None:
        future.result().forget()

"""Who gets the next row, and who must leave one: the queue, deadlines, and the memory that is left."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from l2a_compress.errors import OutOfMemoryError
from l2a_compress.runtime.engine_lane import EngineLane
from l2a_compress.runtime.lane import Lane
from l2a_compress.runtime.lanes import Lanes
from l2a_compress.runtime.request import Request

Array = np.ndarray[Any, np.dtype[Any]]
_SLOW = 0.1  # weight of the newest request in what requests have taken lately
_AGAIN = 2.0  # seconds until it is tried again whether there is room for a row more
_LOOK = 0.2  # seconds between two looks at the memory that is left for rows that run


class Scheduler:
    """Orders requests that wait, makes room for the next one, and takes rows from those that there is no room for.

    Args:
        lanes: the rows.
        memory_left: Bytes that may still be taken; None from it where nobody knows.
        clock: in seconds.

    Attributes:
        waiting: For a row, and can still be in time; the next one first.
        late: Cannot be in time any more; they run when no other waits.
        held: Keys and values of those that wait for another graph, by the request's number.
        service: Seconds that requests have taken lately, from the first token to the last.
    """

    def __init__(self, lanes: Lanes, *, memory_left: Callable[[], float | None], clock: Callable[[], float]) -> None:
        self.memory_left, self._lanes, self._clock = memory_left, lanes, clock
        self.waiting: deque[Request] = deque()
        self.late: deque[Request] = deque()
        self.held: dict[int, dict[str, Array]] = {}
        self.service = 0.0
        self._looked = float("-inf")  # at the memory that is left
        self._full: int | None = None  # so many rows were too many
        self._since = 0.0  # when they were

    def queue(self) -> deque[Request]:
        """Where the next one comes from; empty where nobody waits, or there is no room.

        Who will be late gives way to those that can still be in time.
        """
        waiting, ends = self.waiting, self._clock() + self.service
        while waiting and waiting[0].started is None and (end := waiting[0].deadline) is not None and end <= ends:
            self.late.append(waiting.popleft())
            self._full = None  # what it waited for is nothing to the next one
        if self._full is not None and self._lanes.rows >= self._full and self._clock() - self._since < _AGAIN:
            return deque()
        self._full = None
        return waiting or self.late

    def reserve(self, lane: Lane | EngineLane, request: Request, max_rows: int) -> bool:
        """Makes room for a request behind the rows of a lane. False where it must wait until one of them ends.

        Raises:
            OutOfMemoryError: there is none, and no row is there that could end.
        """
        self._lanes.free()  # what others needed does not count
        need, left = self._lanes.unwritten(lane, request) + self.scratch(lane, request), self.memory_left()
        if left is not None and need > left:
            if self._lanes.rows:
                return False
            raise OutOfMemoryError(
                f"request {request.number}: {need} bytes for its keys and values and to compute its prompt, of "
                f"which {left:g} are left; free some, shorten the prompt, or lower its limits"
            )
        least = len(lane.requests) + 1
        many = least if least <= lane.caches.rows else min(max_rows, 2 * least - 1)  # to grow seldom
        fits = left is None or lane.caches.growth(many, request.most_tokens) <= left
        lane.reserve(many if fits else least, request.most_tokens)
        return True

    def scratch(self, lane: Lane | EngineLane, request: Request) -> int:
        """Bytes that computing a request's tokens takes for a while: twice what one layer makes of them, at fp32.

        As measured, within a fifth from a thousand tokens on. Attention keeps no scores of all pairs of tokens.
        """
        if request.number in self.held or not isinstance(lane, Lane):
            return 0
        shape, tokens = self._lanes.bundle.shape, len(request.prompt) + len(request.written)
        return 2 * 4 * tokens * (4 * shape.hidden_size + 3 * shape.intermediate_size)

    def crowded(self) -> None:
        """Says that memory is too short for a row more: the next one waits until a row ends, or for a while.

        What rows of before took is given back.
        """
        self._full, self._since = self._lanes.rows, self._clock()
        with suppress(MemoryError):  # not even for that
            for lane in self._lanes:
                lane.trim()

    def changed(self) -> None:
        """Says that those that wait are not those there was no room for."""
        self._full = None

    def squeeze(self) -> None:
        """Preempts the newest rows, where what all rows may still write does not fit any more."""
        if self._lanes.rows < 2 or self._clock() - self._looked < _LOOK:
            return
        self._looked = self._clock()
        while len(running := self._lanes.running) > 1 and not self._fits():
            self.preempt(max(running, key=lambda request: request.number), keep=False)
            self.crowded()

    def grow(self, lane: Lane | EngineLane) -> bool:
        """Makes room for a token more of every row of a lane: a cap may have been raised since a request came.

        Where there is none the longest leaves its row, and False is returned. It gets a row again where all that it may
        write fits, in new caches once it is alone, or its error.
        """
        longest = max(lane.requests, key=lambda request: request.length)
        if not isinstance(lane, Lane) or longest.length < lane.caches.capacity:  # an engine makes room as it runs
            return True
        if self._fits():
            with suppress(OutOfMemoryError):  # the system has no more
                lane.reserve(len(lane.requests), longest.length + 1)
                return True
        self.preempt(longest, keep=False)
        self.crowded()
        return False

    def _fits(self) -> bool:
        """Whether there is memory for what all rows may still write."""
        left = self.memory_left()
        return left is None or self._lanes.unwritten() <= left

    def preempt(self, request: Request, *, keep: bool) -> None:
        """Takes a request out of its row to the head of the queue, with its keys and values or without."""
        lane = self._lanes.of(request)
        if lane is None:
            return
        left = self.memory_left() if keep else None
        if keep and isinstance(lane, Lane) and (left is None or request.length * lane.caches.token_bytes <= left):
            with suppress(MemoryError):  # without them it is computed again
                self.held[request.number] = lane.held(request)
        lane.remove(request)
        request.failures = 0
        self.waiting.appendleft(request)

    def retire(self) -> None:
        """Rows that are done leave."""
        for lane in self._lanes:
            for request in [request for request in lane.requests if request.done]:
                lane.remove(request)
        if not self._lanes.rows:
            self._full = None

    def ended(self, seconds: float) -> None:
        """Notes how long a request has taken from its first token to its last."""
        self.service += _SLOW * (seconds - self.service)

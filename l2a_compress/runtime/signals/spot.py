"""Notices that a cloud will take this machine away, from its instance metadata service.

One reading each, ``spot.seconds_left``: seconds until the machine ends, infinite where no end is announced, not
available where the service does not answer. Each answer costs an HTTP round trip: read them by a
:class:`~l2a_compress.runtime.signals.reading.Background`.
"""

from __future__ import annotations

import functools
import json
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import TYPE_CHECKING

from l2a_compress.runtime.signals.reading import Source

if TYPE_CHECKING:
    from urllib.request import OpenerDirector

# The standard library's HTTP client and mail dates are imported where they are used: most machines read no such notice,
# and these would be a tenth of what importing the runtime takes.


class _Spot(Source):
    units = MappingProxyType({"spot.seconds_left": "seconds"})
    until = ("spot.seconds_left",)
    endpoint: str

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        timeout: float = 0.5,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """``endpoint`` and ``clock`` are for tests; ``timeout`` in seconds, of each request."""
        self._endpoint, self._timeout, self._clock = endpoint or self.endpoint, timeout, clock

    def _values(self) -> dict[str, float | str]:
        end = self._end()
        left = math.inf if end is None else max(0.0, (end - self._clock()).total_seconds())
        return {"spot.seconds_left": left}

    @abstractmethod
    def _end(self) -> datetime | None:
        """When the machine ends; None where no end is announced."""

    def _ask(self, path: str, headers: Mapping[str, str], method: str = "GET") -> str | None:
        """The body of the answer; None where there is nothing by that name."""
        from urllib.error import HTTPError
        from urllib.request import Request

        request = Request(self._endpoint + path, headers=dict(headers), method=method)
        try:
            with _direct().open(request, timeout=self._timeout) as answer:
                return str(answer.read(1 << 20).decode())
        except HTTPError as error:
            if error.code == 404:
                return None
            raise


class AwsSpot(_Spot):
    """EC2: two minutes before a spot instance is stopped or terminated, by IMDSv2.

    Source: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
    """

    endpoint = "http://169.254.169.254"

    def _end(self) -> datetime | None:
        token = self._ask("/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT")
        if token is None:
            raise ValueError("the service gives no IMDSv2 token")
        text = self._ask("/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
        return None if text is None else datetime.fromisoformat(json.loads(text)["time"])


class GcpSpot(_Spot):
    """Compute Engine: a preempted instance has 30 seconds from the notice, which does not say when they began.

    Counted from the first reading that saw it. Source: https://cloud.google.com/compute/docs/instances/preemptible
    """

    endpoint = "http://169.254.169.254"
    _SECONDS = 30
    _seen: datetime | None = None

    def _end(self) -> datetime | None:
        text = self._ask("/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
        if text is None or text.strip() not in ("TRUE", "FALSE"):
            raise ValueError(f"preempted is {text!r}, neither TRUE nor FALSE")
        if text.strip() == "FALSE":
            return None
        self._seen = self._seen or self._clock()
        return datetime.fromtimestamp(self._seen.timestamp() + self._SECONDS, UTC)


class AzureSpot(_Spot):
    """Azure: scheduled events that take the machine away, at least 30 seconds before.

    Source: https://learn.microsoft.com/azure/virtual-machines/linux/scheduled-events
    """

    endpoint = "http://169.254.169.254"
    _ENDS = ("Preempt", "Terminate", "Reboot", "Redeploy")
    _HEADERS = MappingProxyType({"Metadata": "true"})
    _name: str | None = None

    def _end(self) -> datetime | None:
        text = self._ask("/metadata/scheduledevents?api-version=2020-07-01", self._HEADERS)
        if text is None:
            raise ValueError("the service has no scheduled events")
        events = [event for event in json.loads(text)["Events"] if event["EventType"] in self._ENDS]
        if not events:
            return None
        if self._name is None:  # events of a whole scale set come to each of its machines
            self._name = self._ask("/metadata/instance/compute/name?api-version=2021-02-01&format=text", self._HEADERS)
        events = [event for event in events if self._name is None or self._name in event["Resources"]]
        # An event that has started has no time any more.
        return min((_http_date(event["NotBefore"]) or self._clock() for event in events), default=None)


@functools.cache  # one for all requests
def _direct() -> OpenerDirector:
    """What opens these addresses, which never go through a proxy."""
    from urllib.request import ProxyHandler, build_opener

    return build_opener(ProxyHandler({}))


def _http_date(text: str) -> datetime | None:
    from email.utils import parsedate_to_datetime

    return parsedate_to_datetime(text) if text else None

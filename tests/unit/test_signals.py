"""Signals: real files, a real HTTP service on loopback, other machines' control groups as folders, a fake NVML."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from l2a_compress.gpu import capability
from l2a_compress.runtime.signals import (
    AwsSpot,
    AzureSpot,
    Background,
    Cgroup,
    GcpSpot,
    Gpu,
    Host,
    Pressure,
    Reading,
    Signals,
    Source,
)

NOW = datetime(2026, 5, 4, 12, 0, 0, tzinfo=UTC)


def values(source: Source) -> dict[str, float | None]:
    return {name.partition(".")[2]: reading.value for name, reading in source.read().items()}


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")


def test_the_host_says_what_psutil_says() -> None:
    found = values(Host())
    assert found["memory_total"] == psutil.virtual_memory().total
    assert found["memory_available"] == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    assert found["load"] is not None
    assert found["load"] >= 0


def test_pressure_is_the_share_of_the_last_ten_seconds(tmp_path: Path) -> None:
    line = "avg10={} avg60=0.00 avg300=0.00 total=1"
    write(
        tmp_path,
        {
            "cpu": f"some {line.format('12.50')}",
            "memory": f"some {line.format('1.00')}\nfull {line.format('0.25')}",
            "io": f"some {line.format('0.00')}",
        },
    )
    readings = Pressure(tmp_path).read()
    assert [reading.value for reading in readings.values()] == [0.125, 0.01, 0.0025, 0.0, None]
    assert "no line 'full'" in readings["pressure.io_full"].why


def test_behind_a_pause_pressure_is_not_the_average_of_the_pause(tmp_path: Path) -> None:
    times = iter([100.0, 100.5, 400.5, 401.0])
    pressure = Pressure(tmp_path, clock=lambda: next(times))

    def read(total: int) -> float | None:
        (tmp_path / "cpu").write_text(f"some avg10=90.00 avg60=0.00 avg300=0.00 total={total}\n")
        return pressure.read()["pressure.cpu_some"].value

    assert read(0) == 0.9
    assert read(100_000) == pytest.approx(0.2)
    assert read(9_100_000) == 0.9  # 9 s of waiting in 300 s would be 0.03
    assert read(9_200_000) == pytest.approx(0.2)


V2 = "sys/fs/cgroup/"
UNIFIED = {
    "proc/self/cgroup": "0::/pod/box",
    V2 + "cgroup.controllers": "cpu memory",
    V2 + "pod/memory.max": "3000",
    V2 + "pod/memory.current": "2900",
    V2 + "pod/memory.stat": "anon 1\ninactive_file 400",
    V2 + "pod/box/memory.max": "2000",
    V2 + "pod/box/memory.high": "1800",
    V2 + "pod/box/memory.current": "1500",
    V2 + "pod/box/memory.stat": "anon 900\ninactive_file 600",
    V2 + "pod/box/memory.events": "low 0\nhigh 3\nmax 2\noom 1\noom_kill 1",
    V2 + "pod/box/cpu.max": "max 100000",
    V2 + "pod/cpu.max": "150000 100000",
    V2 + "pod/box/cpu.stat": "usage_usec 9\nthrottled_usec 2500000",
}


def test_version_2_of_control_groups_counts_the_tightest_level(tmp_path: Path) -> None:
    write(tmp_path, UNIFIED)
    assert values(Cgroup(tmp_path)) == {
        "memory_limit": 2000,
        "memory_high": 1800,
        "memory_used": 900,
        "memory_available": 500,  # of the pod: 3000 - (2900 - 400)
        "memory_hits": 5,
        "oom_kills": 1,
        "cpu_limit": 1.5,
        "cpu_throttled": 2.5,
    }


def test_a_high_mark_of_version_2_is_a_limit_and_pages_that_nobody_maps_can_go(tmp_path: Path) -> None:
    write(tmp_path, UNIFIED | {V2 + "pod/box/memory.high": "1300"})
    assert values(Cgroup(tmp_path))["memory_available"] == 400  # of the box: 1300 - (1500 - 600)
    for mapped, used in ((50, 500), (900, 900)):  # of 600 inactive and 450 active ones
        stat = f"anon 450\ninactive_file 600\nactive_file 450\nfile_mapped {mapped}"
        write(tmp_path, {V2 + "pod/box/memory.stat": stat})
        found = values(Cgroup(tmp_path))
        assert (found["memory_used"], found["memory_available"]) == (used, min(500, 1300 - used))


def test_version_1_of_control_groups(tmp_path: Path) -> None:
    memory, cpu = "sys/fs/cgroup/memory/box/", "sys/fs/cgroup/cpu/box/"
    write(
        tmp_path,
        {
            "proc/self/cgroup": "5:memory:/box\n4:cpu,cpuacct:/box\n0::/",
            memory + "memory.limit_in_bytes": "2000",
            memory + "memory.soft_limit_in_bytes": "9223372036854771712",
            memory + "memory.usage_in_bytes": "1500",
            memory + "memory.stat": "cache 1\ntotal_inactive_file 60\ntotal_active_file 70\ntotal_mapped_file 30",
            memory + "memory.failcnt": "7",
            memory + "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2",
            cpu + "cpu.cfs_quota_us": "50000",
            cpu + "cpu.cfs_period_us": "100000",
            cpu + "cpu.stat": "nr_periods 1\nnr_throttled 1\nthrottled_time 3000000000",
        },
    )
    assert values(Cgroup(tmp_path)) == {
        "memory_limit": 2000,
        "memory_high": math.inf,
        "memory_used": 1400,
        "memory_available": 600,
        "memory_hits": 7,
        "oom_kills": 2,
        "cpu_limit": 0.5,
        "cpu_throttled": 3,
    }


def test_a_container_that_sees_its_group_as_the_root(tmp_path: Path) -> None:
    root = {V2 + name.rpartition("/")[2]: text for name, text in UNIFIED.items() if "/box/" in name}
    write(tmp_path, {"proc/self/cgroup": "0::/../../kubepods/x", V2 + "cgroup.controllers": "", **root})
    assert values(Cgroup(tmp_path))["memory_limit"] == 2000


def test_what_a_group_does_not_have_is_not_available_and_leaves_the_rest(tmp_path: Path) -> None:
    write(tmp_path, {name: text for name, text in UNIFIED.items() if "memory.max" not in name})
    readings = Cgroup(tmp_path).read()
    assert readings["cgroup.memory_limit"].value is None
    assert "memory.max" in readings["cgroup.memory_limit"].why
    assert readings["cgroup.memory_used"].value == 900
    nothing = Cgroup(tmp_path / "missing").read()
    assert {reading.value for reading in nothing.values()} == {None}
    assert "No such file" in nothing["cgroup.cpu_limit"].why


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
def test_this_machine_is_read_without_an_error() -> None:
    found = Signals([Host(), Pressure(), Cgroup(), Gpu()]).read()
    assert len(found) == len(Host.units) + len(Pressure.units) + len(Cgroup.units) + len(Gpu.units)
    assert all((reading.value is None) == bool(reading.why) for reading in found.values())
    assert all(reading.age() < 5 for reading in found.values())


class FakeNvml:
    """A device that does not know utilization, as a MIG instance."""

    nvmlClocksThrottleReasonGpuIdle = 1
    nvmlClocksThrottleReasonSwPowerCap = 4
    reasons = 1

    def __init__(self) -> None:
        self.opened: list[Any] = []

    def nvmlInit(self) -> None:
        self.opened.append("init")

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        self.opened.append(index)
        return "handle"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.opened.append(uuid)
        return "handle"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(free=4 << 30, total=10 << 30)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        raise RuntimeError("Not Supported")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:
        return self.reasons


@pytest.mark.parametrize("device", [0, "MIG-1234"])
def test_a_gpu_is_read_value_by_value(device: int | str) -> None:
    nvml = FakeNvml()
    gpu = Gpu(device, nvml)
    first = gpu.read()
    assert values(gpu) == {"memory_free": 4 << 30, "memory_total": 10 << 30, "utilization": None, "throttled": 0}
    assert first["gpu.utilization"].why == "RuntimeError: Not Supported"
    assert nvml.opened == ["init", device]
    nvml.reasons = 1 | 4 | 0x10 | 0x100 | 0x800  # a power limit is what a busy GPU runs at; the others are settings
    assert values(gpu)["throttled"] == 0
    for reason in (0x8, 0x20, 0x40, 0x80):
        nvml.reasons = 4 | reason
        assert values(gpu)["throttled"] == 1


def test_of_a_gpu_that_is_cut_the_first_instance_is_read() -> None:
    class Cut(FakeNvml):
        mode, places = 1, {1: "instance"}

        def nvmlDeviceGetMigMode(self, gpu: str) -> tuple[int, int]:
            assert gpu == "handle"
            return self.mode, self.mode

        def nvmlDeviceGetMaxMigDeviceCount(self, gpu: str) -> int:
            return 3

        def nvmlDeviceGetMigDeviceHandleByIndex(self, gpu: str, place: int) -> str:
            return self.places[place]

        def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
            return SimpleNamespace(free=1 if handle == "instance" else 7, total=10)

    nvml = Cut()
    assert values(Gpu(0, nvml))["memory_free"] == 1
    nvml.mode = 0
    assert values(Gpu(0, nvml))["memory_free"] == 7
    nvml.mode, nvml.places = 1, {}
    assert values(Gpu(0, nvml))["memory_free"] == 7


class TwoGpus(FakeNvml):
    """A machine of two."""

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return f"handle {index}"

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return f"GPU-{handle[-1]}abc-def"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(free=int(handle[-1]), total=10 << 30)

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, handle: str) -> str:
        return "handle 1"

    def nvmlDeviceGetCudaComputeCapability(self, handle: str) -> tuple[int, int]:
        return (8, int(handle[-1]))


@pytest.mark.parametrize(
    ("shown", "index"),
    [
        (None, 0),
        ("1", 1),
        ("1,0", 1),
        ("GPU-1ab", 1),
        ("GPU-0abc-def, 1", 0),
        ("GPU-2", None),
        ("", None),
        ("-1", None),
    ],
)
def test_the_gpu_is_the_first_that_cuda_shows(shown: str | None, index: int | None, monkeypatch: Any) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    reading = Gpu(nvml=TwoGpus()).read()["gpu.memory_free"]
    assert reading.value == index
    assert capability(nvml=TwoGpus()) == (None if index is None else f"8.{index}")
    if shown is not None and index is None:
        assert ("no GPU has" if shown else "shows no GPU") in reading.why or shown == "-1"


def test_a_mig_instance_has_the_capability_of_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1234")
    assert capability(nvml=TwoGpus()) == "8.1"


@pytest.fixture
def service() -> Iterator[tuple[str, dict[tuple[str, str], Callable[[Any], tuple[int, str]]]]]:
    """(address, answers by method and path) of a metadata service on loopback."""
    answers: dict[tuple[str, str], Callable[[Any], tuple[int, str]]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            code, text = answers.get((self.command, self.path), lambda _: (404, ""))(self.headers)
            self.send_response(code)
            self.end_headers()
            self.wfile.write(text.encode())

        do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", answers
    server.shutdown()
    thread.join()
    server.server_close()


def left(source: Source) -> float | None:
    return source.read()["spot.seconds_left"].value


def test_aws_tells_when_a_spot_instance_ends(service: Any) -> None:
    address, answers = service
    spot = AwsSpot(address, clock=lambda: NOW)
    assert left(spot) is None  # no token
    answers["PUT", "/latest/api/token"] = lambda headers: (
        (200, "secret") if headers["X-aws-ec2-metadata-token-ttl-seconds"] else (400, "")
    )
    assert left(spot) == math.inf
    action = json.dumps({"action": "terminate", "time": "2026-05-04T12:02:00Z"})
    answers["GET", "/latest/meta-data/spot/instance-action"] = lambda headers: (
        (200, action) if headers["X-aws-ec2-metadata-token"] == "secret" else (401, "")
    )
    assert left(spot) == 120
    answers["PUT", "/latest/api/token"] = lambda _: (200, "wrong")
    reading = spot.read()["spot.seconds_left"]
    assert (reading.value, "401" in reading.why) == (None, True)


def test_gcp_gives_thirty_seconds_from_the_notice(service: Any) -> None:
    address, answers = service
    now = [NOW]
    spot = GcpSpot(address, clock=lambda: now[0])
    assert left(spot) is None
    state = ["FALSE"]
    answers["GET", "/computeMetadata/v1/instance/preempted"] = lambda headers: (
        (200, state[0]) if headers["Metadata-Flavor"] == "Google" else (403, "")
    )
    assert left(spot) == math.inf
    state[0] = "TRUE"
    assert left(spot) == 30
    now[0] += timedelta(seconds=12)
    assert left(spot) == 18
    now[0] += timedelta(seconds=60)
    assert left(spot) == 0


def test_azure_takes_the_first_event_that_ends_the_machine(service: Any) -> None:
    address, answers = service
    events: list[dict[str, Any]] = []
    answers["GET", "/metadata/scheduledevents?api-version=2020-07-01"] = lambda headers: (
        (200, json.dumps({"DocumentIncarnation": 1, "Events": events})) if headers["Metadata"] == "true" else (400, "")
    )
    spot = AzureSpot(address, clock=lambda: NOW)
    assert left(spot) == math.inf
    for kind, seconds in (("Freeze", 5), ("Preempt", 30), ("Reboot", 900)):
        at = format_datetime(NOW + timedelta(seconds=seconds), usegmt=True)
        events.append({"EventType": kind, "NotBefore": at, "Resources": ["vm"]})
    assert left(spot) == 30
    events.append({"EventType": "Terminate", "NotBefore": "", "Resources": ["vm"]})
    assert left(spot) == 0


def test_azure_leaves_out_what_ends_other_machines(service: Any) -> None:
    address, answers = service
    at = format_datetime(NOW + timedelta(seconds=30), usegmt=True)
    events = [{"EventType": "Preempt", "NotBefore": at, "Resources": ["set_3"]}]
    answers["GET", "/metadata/scheduledevents?api-version=2020-07-01"] = lambda _: (200, json.dumps({"Events": events}))
    answers["GET", "/metadata/instance/compute/name?api-version=2021-02-01&format=text"] = lambda _: (200, "set_1")
    spot = AzureSpot(address, clock=lambda: NOW)
    assert left(spot) == math.inf
    events[0]["Resources"] = ["set_3", "set_1"]
    assert left(spot) == 30


@pytest.mark.parametrize("kind", [AwsSpot, GcpSpot, AzureSpot])
def test_nobody_answers_outside_that_cloud(kind: type[AwsSpot]) -> None:
    reading = kind("http://127.0.0.1:9", timeout=0.2).read()["spot.seconds_left"]
    assert reading.value is None
    assert "refused" in reading.why


@pytest.mark.parametrize("text", ["not json", "{}", '{"time": 5}'])
def test_an_answer_that_makes_no_sense_is_not_available(text: str, service: Any) -> None:
    address, answers = service
    answers["PUT", "/latest/api/token"] = lambda _: (200, "secret")
    answers["GET", "/latest/meta-data/spot/instance-action"] = lambda _: (200, text)
    assert left(AwsSpot(address)) is None


class Slow(Source):
    """Answers once it may, with how often it was asked."""

    units = {"slow.count": "count"}  # noqa: RUF012

    def __init__(self) -> None:
        self.count, self.may = 0, threading.Event()

    def _values(self) -> dict[str, float | str]:
        assert self.may.wait(60)
        time.sleep(0.01)
        self.count += 1
        return {"slow.count": self.count}


def test_a_slow_source_never_makes_its_reader_wait() -> None:
    slow = Slow()
    with Background(slow, 0.0) as source:
        first = source.read()["slow.count"]  # while the source waits for us
        assert (first.value, first.why) == (None, "not read yet")
        slow.may.set()
        deadline = time.monotonic() + 10
        while (source.read()["slow.count"].value or 0) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        reading = source.read()["slow.count"]
        assert (reading.value or 0) >= 2
        assert reading.age(reading.at + 3) == 3
    ended = source.read()["slow.count"].value
    time.sleep(0.05)
    assert source.read()["slow.count"].value == ended


class Notice(Source):
    """Announces an end once, and then does not answer."""

    units = {"spot.seconds_left": "seconds"}  # noqa: RUF012
    until = ("spot.seconds_left",)

    def __init__(self, *answers: float) -> None:
        self.answers = list(answers)

    def _values(self) -> dict[str, float | str]:
        return {"spot.seconds_left": self.answers.pop(0)}


def test_an_end_that_was_announced_stays_known(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Notice(math.inf, 30.0)
    with Background(source, 1e-3) as background:
        deadline = time.monotonic() + 10
        while source.answers and time.monotonic() < deadline:
            time.sleep(1e-3)
        time.sleep(0.1)  # no answers from here on
        reading = background.read()["spot.seconds_left"]
    assert reading.value == pytest.approx(30.0, abs=5.0)
    assert reading.value < 30.0 - 0.02
    assert reading.why == ""
    with Background(Notice(math.inf), 1e-3) as background:
        time.sleep(0.1)
        assert background.read()["spot.seconds_left"].value is None  # that nothing ends is not known any more


def test_a_name_has_one_source() -> None:
    with pytest.raises(ValueError, match=r"slow\.count"):
        Signals([Slow(), Slow()])


def test_a_reading_tells_its_age() -> None:
    assert Reading(value=1.0, unit="count", at=10.0).age(12.5) == 2.5

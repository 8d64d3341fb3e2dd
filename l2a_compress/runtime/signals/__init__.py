"""What the machine has left: one small class per source, all behind :class:`Source`.

Reading never raises. What cannot be read is a :class:`Reading` without a value that says why, so that a selector
decides with what there is. Sources are read on demand (:class:`Signals`); slow ones keep a reading of their own thread.
"""

from importlib.util import find_spec

from l2a_compress.runtime.signals.cgroup import Cgroup
from l2a_compress.runtime.signals.host import Host, Pressure
from l2a_compress.runtime.signals.nvml import Gpu
from l2a_compress.runtime.signals.reading import Background, Reading, Signals, Source
from l2a_compress.runtime.signals.spot import AwsSpot, AzureSpot, GcpSpot


def machine(*, gpu: bool = True) -> list[Source]:
    """Sources of this machine: host, pressure, control group, and the first GPU where NVML's package is installed.

    Args:
        gpu: whether a GPU is to be watched; not where it does not serve, as what others do on it is of no account then.
    """
    found: list[Source] = [Host(), Pressure(), Cgroup()]
    return [*found, Gpu()] if gpu and find_spec("pynvml") else found


__all__ = [
    "AwsSpot",
    "AzureSpot",
    "Background",
    "Cgroup",
    "GcpSpot",
    "Gpu",
    "Host",
    "Pressure",
    "Reading",
    "Signals",
    "Source",
    "machine",
]

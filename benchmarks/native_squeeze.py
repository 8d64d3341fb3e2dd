"""The C++ runtime where memory is short: requests inside a control group, of which others take their part.

    cpp/prepare && python benchmarks/native_squeeze.py      (root: it makes a control group, version 1 or 2)

A process of its own serves ``--requests`` prompts at once by the If graph at int8, from the bundle of native.py. There
are scenes, each with huge pages and without:

- ``small``: the group has room for some of the rows.
- ``taken``: it has room for all of them, until another process takes memory while prompts are computed.
- ``taken late``: the same while all rows write.

Each scene also runs with admission turned off (``blind``): where that is not killed, the scene shows nothing, which is
said. Texts are compared with those written outside of any group; rows that are computed again read their text as a
prompt, whose sums round otherwise. Figures go to benchmarks/results/native_squeeze.json.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fetch_models import DEFAULT_CACHE
from groups import MEGABYTE, eat, enter, group
from measure import RESULTS, Peer, Results, verdict
from native import BUILD, build_bench, export_bundles
from untrained import CHECKPOINT

NO_HUGE_PAGES = 41  # PR_SET_THP_DISABLE
PROMPTS = {"length": 512, "tokens": 120}  # tokens of each prompt, and of reasoning
TEXTS = {"length": 256, "tokens": 300}
LEFT = 60  # megabytes that others leave


@dataclass(frozen=True)
class Scene:
    """Megabytes of the group, what each request is, and when others take memory, as a share of the time of all."""

    name: str
    megabytes: int
    asked: dict[str, int]
    others: float | None


SCENES = (
    Scene("small", 400, PROMPTS, None),
    Scene("taken", 900, PROMPTS, 0.5),
    Scene("taken late", 700, TEXTS, 0.5),
)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=8, help="all at once (%(default)s)")
    parser.add_argument("--models", type=Path, default=DEFAULT_CACHE, help="cache of checkpoints (%(default)s)")
    parser.add_argument("--work", type=Path, default=DEFAULT_CACHE.parent / "native", help="bundles (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "native_squeeze.json", help="figures (%(default)s)")
    options = parser.parse_args()
    options.checkpoint, options.work = CHECKPOINT, options.work / CHECKPOINT
    build_bench()
    export_bundles(options)
    found: dict[str, Any] = {}
    for huge, pages in ((True, "huge pages"), (False, "no huge pages")):
        free: dict[int, dict[str, Any]] = {}  # by the length of the prompts
        for scene in SCENES:
            task = {"task": "serve", "rows": options.requests, "requests": options.requests, **scene.asked}
            if scene.asked["length"] not in free:
                peer = _start(options, huge=huge)
                free[scene.asked["length"]] = peer.ask(**task, blind=False)
                peer.close()
            alone, name = free[scene.asked["length"]], f"{scene.name}, {pages}"
            for blind in (True, False):
                one = _played(options, scene, {**task, "blind": blind}, seconds=alone["seconds"], huge=huge)
                one["as_alone"] = sum(a == b for a, b in zip(one.pop("tokens", []), alone["tokens"], strict=False))
                one["seconds_alone"] = alone["seconds"]
                found[f"{name}, blind" if blind else name] = one
                _judge(name, one, options.requests, blind=blind)
    settings = {"requests": options.requests, "left": LEFT, "scenes": [asdict(scene) for scene in SCENES]}
    Results(options.out).put("squeeze", found, settings, threads=1)
    print(f"figures: {options.out}")


def _start(options: argparse.Namespace, *, huge: bool, inside: Path | None = None) -> Peer:
    def begin() -> None:
        if inside is not None:
            enter(inside)
        if not huge and ctypes.CDLL(None, use_errno=True).prctl(NO_HUGE_PAGES, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "the system does not turn huge pages off for a process")

    bundle = options.work / "layers-int8"
    return Peer(BUILD / "bench" / "l2a_bench", bundle, "1", "1", threads=1, begin=begin)  # 1: the If graph


def _played(
    options: argparse.Namespace, scene: Scene, task: dict[str, Any], *, seconds: float, huge: bool
) -> dict[str, Any]:
    """What the process said, or that it was ended."""
    limit = scene.megabytes * MEGABYTE
    with group("l2a_native_squeeze", limit) as inside, ThreadPoolExecutor(1) as pool:
        peer = _start(options, huge=huge, inside=inside)
        answer: Future[dict[str, Any]] = pool.submit(functools.partial(peer.ask, **task))
        other = None
        try:
            if scene.others is not None:
                wait([answer], timeout=scene.others * seconds)
                other = None if answer.done() else eat(inside, limit, LEFT * MEGABYTE)
            error = answer.exception()
        finally:
            if other is not None:
                if other.poll() is not None:
                    raise SystemExit(f"the process that takes memory ended with {other.poll()}: nothing is shown")
                other.kill()
                other.wait()
        if error is not None and not isinstance(error, SystemExit):
            raise error
        if error is None:
            peer.close()
        found = {"exit": peer.process.wait(), **({} if error else answer.result())}
    early = scene.others is not None and other is None
    return found | {"others": "came too late"} if early else found


def _judge(scene: str, found: dict[str, Any], requests: int, *, blind: bool) -> None:
    if blind:
        ended = found["exit"] != 0
        print(f"{scene}: with admission off {'it is killed' if ended else 'NOT killed: the scene shows nothing'}")
        return
    served = sum(error == 0 for error in found.get("errors", []))
    verdict(f"{scene}: the process ended with {found['exit']}", abs(found["exit"]), 0, at_most=True)
    verdict(f"{scene}: {served} of {requests} requests served", served, requests, at_most=False)
    if found["exit"] == 0:
        print(
            f"  {found['seconds']:.0f} s, at most {found['most_rows']} rows, {found['again']} computed again, "
            f"{found['as_alone']} texts as outside of the group{'; ' + found['others'] if 'others' in found else ''}"
        )


if __name__ == "__main__":
    main()

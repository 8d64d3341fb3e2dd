"""The C++ runtime where memory is short: requests inside a control group, of which others take their part.

    cpp/prepare && python benchmarks/native_squeeze.py      (root: it makes a control group, version 1 or 2)

A process of its own serves ``--requests`` prompts of ``--length`` tokens at once by the If graph at int8, from the
bundle of native.py. Two scenes, each with huge pages and without:

- ``small``: the group has room for some of the rows.
- ``taken``: it has room for all of them, until another process takes memory in the middle and leaves ``--left`` MB.

Each scene also runs with admission turned off (``blind``): where that is not killed, the scene shows nothing, which is
said. Texts are compared with those written outside of any group; rows that are computed again read their text as a
prompt, whose sums round otherwise. Figures go to benchmarks/results/native_squeeze.json.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fetch_models import DEFAULT_CACHE
from groups import MEGABYTE, eat, enter, group
from measure import RESULTS, Peer, Results, verdict
from native import BUILD, build_bench, export_bundles
from untrained import CHECKPOINT

NO_HUGE_PAGES = 41  # PR_SET_THP_DISABLE


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=8, help="all at once (%(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of each prompt (%(default)s)")
    parser.add_argument("--tokens", type=int, default=120, help="of reasoning of each (%(default)s)")
    parser.add_argument("--small", type=int, default=400, help="megabytes of the small group (%(default)s)")
    parser.add_argument("--large", type=int, default=900, help="megabytes of the other (%(default)s)")
    parser.add_argument("--left", type=int, default=60, help="megabytes that are left of it (%(default)s)")
    parser.add_argument("--after", type=float, default=0.5, help="of the time that all take, until then (%(default)s)")
    parser.add_argument("--models", type=Path, default=DEFAULT_CACHE, help="cache of checkpoints (%(default)s)")
    parser.add_argument("--work", type=Path, default=DEFAULT_CACHE.parent / "native", help="bundles (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS / "native_squeeze.json", help="figures (%(default)s)")
    options = parser.parse_args()
    options.checkpoint, options.work = CHECKPOINT, options.work / CHECKPOINT
    build_bench()
    export_bundles(options)
    found: dict[str, Any] = {}
    for huge in (True, False):
        peer = _start(options, huge=huge)
        free = peer.ask(**_task(options, blind=False))
        peer.close()
        pages = "huge pages" if huge else "no huge pages"
        print(f"outside of a group, {pages}: {free['seconds']:.0f} s", flush=True)
        for scene, megabytes in (("small", options.small), ("taken", options.large)):
            for blind in (True, False):
                after = options.after * free["seconds"] if scene == "taken" else None
                one = _scene(options, megabytes * MEGABYTE, huge=huge, blind=blind, after=after)
                one["as_alone"] = sum(a == b for a, b in zip(one.pop("tokens", []), free["tokens"], strict=False))
                found[f"{scene}, {pages}{', blind' if blind else ''}"] = one
                _judge(f"{scene}, {pages}", one, options.requests, blind=blind)
        found[f"free, {pages}"] = {"seconds": free["seconds"]}
    names = ("requests", "length", "tokens", "small", "large", "left", "after")
    Results(options.out).put("squeeze", found, {name: getattr(options, name) for name in names}, threads=1)
    print(f"figures: {options.out}")


def _task(options: argparse.Namespace, *, blind: bool) -> dict[str, Any]:
    names = {name: getattr(options, name) for name in ("requests", "length", "tokens")}
    return {"task": "serve", "rows": options.requests, "blind": blind, **names}


def _start(options: argparse.Namespace, *, huge: bool, inside: Path | None = None) -> Peer:
    def begin() -> None:
        if inside is not None:
            enter(inside)
        if not huge and ctypes.CDLL(None, use_errno=True).prctl(NO_HUGE_PAGES, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "the system does not turn huge pages off for a process")

    bundle = options.work / "layers-int8"
    return Peer(BUILD / "bench" / "l2a_bench", bundle, "1", "1", threads=1, begin=begin)  # 1: the If graph


def _scene(options: argparse.Namespace, limit: int, *, huge: bool, blind: bool, after: float | None) -> dict[str, Any]:
    """What the process said, or that it was ended; another takes memory after so many seconds."""
    with group("l2a_native_squeeze", limit) as inside, ThreadPoolExecutor(1) as pool:
        peer = _start(options, huge=huge, inside=inside)
        answer: Future[dict[str, Any]] = pool.submit(functools.partial(peer.ask, **_task(options, blind=blind)))
        other = None
        try:
            if after is not None:
                time.sleep(after)
                other = None if answer.done() else eat(inside, limit, options.left * MEGABYTE)
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
    return found | {"others": "came too late"} if after is not None and other is None else found


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

"""The arena that onnxruntime computes in on the processor: one for all sessions of the process, and given back.

By default each session has its own, which keeps the most that a run ever took. A bundle is several sessions, of which
only some run at a time, and a long prompt takes hundreds of times what the steps behind it do.
"""

from __future__ import annotations

from functools import cache

import onnxruntime as ort


def share_arena(options: ort.SessionOptions) -> None:
    """Has a session compute in the arena of the process, the one that somebody else registered where there is one."""
    _register()
    options.add_session_config_entry("session.use_env_allocators", "1")


@cache
def _register() -> None:
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    try:
        ort.create_and_register_allocator(memory, None)
    except Exception as error:  # onnxruntime's exceptions have no class in common
        if "already" not in str(error):
            raise


@cache
def giving_back() -> ort.RunOptions:
    """Options of a run behind which the arena gives back to the system what is free."""
    options = ort.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options

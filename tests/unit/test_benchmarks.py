"""Benchmarks measure what they say."""

from __future__ import annotations

import numpy as np
from onnx_quality import until_the_end


def test_what_stands_behind_the_end_of_an_answer_is_not_scored() -> None:
    written = np.array([[5, 6, 9, 9, 5], [5, 6, 7, 8, 5], [9, 5, 3, 5, 9], [4, 3, 9, 4, 4]])
    assert until_the_end(written, (9, 3)).astype(int).tolist() == [
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1],
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
    ]

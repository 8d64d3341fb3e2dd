"""Symmetric quantization: of the decoder's matrices in blocks or by output, of the allocator's by column.

In the dialect ``standard`` (:func:`quantize_linear`) they are ONNX's own numbers, for DequantizeLinear. In ``ort`` the
blocks have 4 or 8 bits and the layout of onnxruntime's ``MatMulNBits``. A matrix [out, in] is cut along ``in``
into blocks that share one scale. The rows stand one after another, so the first rows of a matrix are a prefix of its
bytes, as in 32 bits; its first columns are not.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from l2a_compress.exporters.weights import Array

BITS = {"int8": 8, "int4": 4}
LINEAR = {"int8": (np.int8, 127), "fp8": (ml_dtypes.float8_e4m3fn, 448), "int4": (ml_dtypes.int4, 7)}
BLOCKS = {"int8": 128, "int4": 32}  # numbers that share a scale, where nothing else is asked for
SIZES = (32, 64, 128)
_CHUNK = 4096  # rows at a time, so that a large embedding table costs no second copy


def quantize(matrix: Array, bits: int, block: int) -> tuple[Array, Array]:
    """[out, in], float32 -> (values [out, blocks, block * bits / 8], uint8; scales [out, blocks], float32).

    A value is (stored - 2^(bits-1)) * scale. Of the two ends of the range the one that is one larger is given to the
    sign of the block's largest number. The last block is filled with zeros.
    """
    rows, columns = matrix.shape
    count = -(-columns // block)
    values = np.empty((rows, count, block * bits // 8), dtype=np.uint8)
    scales = np.empty((rows, count), dtype=np.float32)
    for start in range(0, rows, _CHUNK):
        part = slice(start, start + _CHUNK)
        padded = np.pad(matrix[part], ((0, 0), (0, count * block - columns)))
        values[part], scales[part] = _quantize(padded.reshape(-1, count, block), bits)
    return values, scales


def _quantize(blocks: Array, bits: int) -> tuple[Array, Array]:
    middle = 1 << (bits - 1)
    places = np.abs(blocks).argmax(-1)[..., None]
    largest = np.take_along_axis(blocks, places, -1)
    scales = np.where(largest == 0, 1, largest / -middle).astype(np.float32)
    values = np.clip(np.rint(blocks / scales) + middle, 0, 2 * middle - 1).astype(np.uint8)
    if bits == 4:
        values = values[..., 0::2] | (values[..., 1::2] << 4)
    return values, scales[..., 0]


def quantize_linear(
    matrix: Array, precision: str, inputs: int, block: int, scale: str = "float16"
) -> tuple[Array, Array]:
    """Values and scales of a matrix [in, out] or [out, in], float32; a number is value * scale.

    Args:
        matrix: what is quantized.
        precision: a name of ``LINEAR``.
        inputs: the axis that is summed over.
        block: numbers along it that share a scale; 0: all of them, so one scale an output.
        scale: type of the scales, by NumPy's name. Values are found for scales that are rounded to it.

    Returns:
        Values of the matrix's shape, in the type of the precision; scales of [out], or of the matrix's shape with
        ``inputs`` shortened to the blocks.
    """
    dtype, most = LINEAR[precision]
    parts = matrix.shape[inputs] // block if block else 1
    split = (*matrix.shape[:inputs], parts, -1, *matrix.shape[inputs + 1 :])
    blocks = matrix.reshape(split)
    largest = np.abs(blocks).max(axis=inputs + 1, keepdims=True)
    scales = (largest / most).astype(scale)
    scales = np.where(scales == 0, np.ones_like(scales), scales)
    numbers = np.clip(blocks / scales.astype(np.float32), -most, most)
    values = numbers.astype(dtype) if precision == "fp8" else np.rint(numbers).astype(np.int8).astype(dtype)
    scales = scales.squeeze(inputs + 1)
    return values.reshape(matrix.shape), scales if block else scales.squeeze(inputs)


def quantize_columns(matrix: Array) -> tuple[Array, Array]:
    """[in, out], float32 -> (values [in, out], int8; scales [out], float32); a number is value * scale."""
    largest = np.abs(matrix).max(axis=0)
    scales = np.where(largest == 0, 1, largest / 127).astype(np.float32)
    return np.rint(matrix / scales).astype(np.int8), scales


def rounded_columns(matrix: Array) -> Array:
    """What is left of a matrix that :func:`quantize_columns` has stored; storing it again changes nothing."""
    values, scales = quantize_columns(matrix)
    return values * scales

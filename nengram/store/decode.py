"""Compiled decoding of rows, for the CPU: one pass over the bytes, straight into the vectors; imported at first use.

An e4m3 value has 256 cases, so it is looked up; a power of two times it is exact, as is an integer of 8 bits times a
bfloat16. Nothing here rounds but the one scale of `fp8_tensor`, and that once: every form gives the same bits.
All take uint8 [N, B] and float32 [N, E], C-contiguous, and hold no lock.
"""

from collections.abc import Callable

import numba
import numpy as np

from nengram.store.codecs_reference import BLOCK, E4M3_VALUES, UE8M0_VALUES

VALUES = np.array(E4M3_VALUES, dtype=np.float32)
SCALES = np.array(UE8M0_VALUES, dtype=np.float32)
BLOCK_WIDTH = np.uint64(BLOCK)  # unsigned places spare the check for negative indices


def compiled(function: Callable) -> Callable:
    try:
        return numba.njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # neither the package's folder nor the user's cache folder can be written
        return numba.njit(nogil=True, error_model="numpy")(function)


@compiled
def fp8(bytes_NB, out_NE):
    width = np.uint64(out_NE.shape[1])
    whole_blocks = width // BLOCK_WIDTH
    for n in range(out_NE.shape[0]):
        bytes_B, out_E = bytes_NB[n], out_NE[n]
        for block in range(whole_blocks):
            begin, scale = block * BLOCK_WIDTH, SCALES[bytes_B[width + block]]
            for e in range(BLOCK_WIDTH):
                out_E[begin + e] = VALUES[bytes_B[begin + e]] * scale
        for e in range(whole_blocks * BLOCK_WIDTH, width):
            out_E[e] = VALUES[bytes_B[e]] * SCALES[bytes_B[width + whole_blocks]]


@compiled
def _fp8_tensor(bytes_NB, scale, out_NE):
    for n in range(out_NE.shape[0]):
        bytes_B, out_E = bytes_NB[n], out_NE[n]
        for e in range(np.uint64(out_E.size)):
            out_E[e] = VALUES[bytes_B[e]] * scale


def fp8_tensor(bytes_NB: np.ndarray, scale: float, out_NE: np.ndarray) -> None:
    _fp8_tensor(bytes_NB, np.float32(scale), out_NE)


@compiled
def _row_scale(bytes_B):
    pair = bytes_B[bytes_B.size - 2 :]
    return np.uint32(np.uint32(pair[0]) << 16 | np.uint32(pair[1]) << 24)


@compiled
def int8(bytes_NB, out_NE):
    scale_bits = np.empty(1, np.uint32)
    scale = scale_bits.view(np.float32)
    for n in range(out_NE.shape[0]):
        scale_bits[0] = _row_scale(bytes_NB[n])
        for e in range(out_NE.shape[1]):
            out_NE[n, e] = np.float32(np.int8(bytes_NB[n, e])) * scale[0]


@compiled
def int4(bytes_NB, out_NE):
    scale_bits = np.empty(1, np.uint32)
    scale = scale_bits.view(np.float32)
    width = out_NE.shape[1]
    for n in range(out_NE.shape[0]):
        scale_bits[0] = _row_scale(bytes_NB[n])
        for pair in range(width // 2):
            both = np.int8(bytes_NB[n, pair])
            out_NE[n, 2 * pair] = np.float32(np.int8(both << 4) >> 4) * scale[0]
            out_NE[n, 2 * pair + 1] = np.float32(both >> 4) * scale[0]
        if width % 2:
            both = np.int8(bytes_NB[n, width // 2])
            out_NE[n, width - 1] = np.float32(np.int8(both << 4) >> 4) * scale[0]

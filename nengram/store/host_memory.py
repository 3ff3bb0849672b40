"""Memory for a table that stays on the host: huge pages where they help, page-locked where a GPU copies from it.

A random row costs a page-table walk before it costs a cache miss: on 4 KiB pages a third of the latency of a gather
from gigabytes is that walk (458 against 302 ns a dependent read). Pages of 2 MiB must be asked for, and asking for
the table alone leaves every small allocation as it was.
"""

import math
import mmap
from contextlib import suppress

import torch

HUGE_PAGE_BYTES = 2 << 20
ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux; elsewhere ordinary pages serve


def host_zeros(shape: tuple[int, ...], dtype: torch.dtype, *, pinned: bool = False) -> torch.Tensor:
    """Zeros on the CPU. Large ones lie on huge pages if the system gives any; `pinned` ones are page-locked.

    Only the unpinned kind was tried.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if pinned:
        return torch.zeros(shape, dtype=dtype, pin_memory=True)
    if ADVICE is None or num_bytes < HUGE_PAGE_BYTES:
        return torch.zeros(shape, dtype=dtype)
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(ADVICE)
    with torch.inference_mode(False):
        whole = torch.frombuffer(memory, dtype=torch.uint8)
    skipped = -whole.data_ptr() % HUGE_PAGE_BYTES
    return whole[skipped : skipped + num_bytes].view(dtype).view(shape)

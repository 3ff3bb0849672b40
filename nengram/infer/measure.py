"""This machine's ceilings, for `nengram plan --measure`: a few seconds, at the row size in question.

- RAM: rows a second that one thread gathers, by the kernel the stores use, from a buffer far larger than any cache.
- Disk: random 4 KiB reads a second by a pool of threads, from a scratch file that is not in the page cache: no page is read twice, and
  what the system still holds of the file is dropped first. The file has no name once it is open, so nothing of it can be left behind.
- Device and link: on a CUDA machine only, one thread's copies from pinned memory and random rows from device memory.

These are what this machine does now, beside whatever else runs on it; take them when it is quiet.
"""

import mmap
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from nengram.errors import ConfigError
from nengram.infer.plan_rates import Ceiling
from nengram.infer.plan_sizes import GIB, PAGE_BYTES

RAM_BYTES = GIB  # of the buffer that rows are gathered from
DISK_BYTES = GIB  # of the scratch file
LEAST_BYTES = 64 * 2**20  # below this a measurement says nothing
SECONDS = 1.0  # of each measurement
BATCH_ROWS = 4096
THREADS = 32  # that read the disk
PIECE_BYTES = 4 * 2**20  # of the scratch file, written at once

Progress = Callable[[str], None]


def measure(
    row_bytes: int, *, disk_folder: Path | None, disk: bool = True, progress: Progress = print
) -> dict[str, Ceiling]:
    """The ceilings that can be measured here, by the names of `plan_rates.ASSUMED`.

    disk_folder: where the scratch file is made; the system's temporary folder if None. disk: False leaves it out.
    Raises: ConfigError for a folder that is missing, not writable or full.
    """
    progress(f"gathering rows of {row_bytes} bytes from RAM")
    found = {"host_rows_per_s": gather_rate(row_bytes)}
    if disk:
        folder = Path(disk_folder or tempfile.gettempdir())
        progress(f"reading {PAGE_BYTES} byte pages at random from a scratch file in {folder}")
        found["disk_iops"] = disk_rate(folder)
    if torch.cuda.is_available():
        progress("copying to the device, and rows within it")
        found |= device_rates(row_bytes)
    return found


def gather_rate(row_bytes: int) -> Ceiling:
    """Rows a second of one thread; each call gathers rows that no call before it did."""
    from nengram.store.gather import gather_rows  # compiles at first use

    num_rows = max(BATCH_ROWS, (min(RAM_BYTES, free_ram() // 4)) // row_bytes)
    memory = mmap.mmap(-1, num_rows * row_bytes)
    if (huge_pages := getattr(mmap, "MADV_HUGEPAGE", None)) is not None:
        memory.madvise(huge_pages)
    table_RB = np.frombuffer(memory, np.uint8).reshape(num_rows, row_bytes)
    table_RB.fill(1)  # untouched pages are all the same page
    out_NB = np.empty((BATCH_ROWS, row_bytes), np.uint8)
    rng, rates, until = np.random.default_rng(0), [], time.perf_counter() + SECONDS
    gather_rows(table_RB, np.arange(BATCH_ROWS), out_NB)
    while len(rates) < 3 or time.perf_counter() < until:
        rows_N = rng.integers(0, num_rows, BATCH_ROWS)
        began = time.perf_counter()
        gather_rows(table_RB, rows_N, out_NB)
        rates.append(BATCH_ROWS / (time.perf_counter() - began))
    return Ceiling(float(np.median(rates)), "measured", f"one thread, a buffer of {num_rows * row_bytes / GIB:.2g} GiB")


def disk_rate(folder: Path, *, threads: int = THREADS) -> Ceiling:
    """Random reads a second of 4 KiB, none from the page cache where the system can drop it. Raises: ConfigError."""
    if getattr(os, "preadv", None) is None:
        raise ConfigError("--measure cannot read a disk at random on this system; give --disk-iops")
    try:
        file_bytes = min(DISK_BYTES, shutil.disk_usage(folder).free // 4) // PIECE_BYTES * PIECE_BYTES
        if file_bytes < min(LEAST_BYTES, DISK_BYTES):
            raise ConfigError(f"--disk-folder {folder}: too little space for a scratch file of {LEAST_BYTES >> 20} MiB")
        with tempfile.TemporaryFile(dir=folder) as file:  # has no name on Linux, and loses it at once elsewhere
            _fill(file, file_bytes)
            dropped = _drop_from_cache(file.fileno())
            rate = _read_pages(file.fileno(), file_bytes // PAGE_BYTES, threads)
    except OSError as error:
        raise ConfigError(f"--disk-folder {folder}: {error.strerror or error}") from None
    cache = "page cache dropped" if dropped else "PAGE CACHE NOT DROPPED: this system cannot, so the figure is too high"
    return Ceiling(rate, "measured", f"{threads} threads, {file_bytes / GIB:.2g} GiB file in {folder}, {cache}")


def device_rates(row_bytes: int) -> dict[str, Ceiling]:
    """GiB/s of copies from pinned memory to the device, and of random rows within its memory. Needs CUDA."""
    name = torch.cuda.get_device_name()
    pinned = torch.empty(64 << 20, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(pinned, device="cuda")
    link = _cuda_rate(lambda: there.copy_(pinned, non_blocking=True), pinned.nbytes)
    num_rows = min(RAM_BYTES, torch.cuda.mem_get_info()[0] // 4) // row_bytes
    table_RB = torch.ones(num_rows, row_bytes, dtype=torch.uint8, device="cuda")
    rows_N = torch.randint(num_rows, (1 << 18,), device="cuda")
    out_NB = table_RB.new_empty(len(rows_N), row_bytes)
    gather = _cuda_rate(lambda: torch.index_select(table_RB, 0, rows_N, out=out_NB), out_NB.nbytes)
    return {
        "link_gib_per_s": Ceiling(link / GIB, "measured", f"pinned memory to {name}"),
        "device_gib_per_s": Ceiling(gather / GIB, "measured", f"random rows in {name}"),
    }


def _fill(file, file_bytes: int) -> None:
    """Write bytes that no disk can compress or share."""
    rng = np.random.default_rng()
    for _ in range(0, file_bytes, PIECE_BYTES):
        file.write(rng.bytes(PIECE_BYTES))
    file.flush()
    os.fsync(file.fileno())


def _drop_from_cache(fd: int) -> bool:
    advise = getattr(os, "posix_fadvise", None)
    if advise is None:
        return False
    advise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    advise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    return True


def _read_pages(fd: int, pages: int, threads: int) -> float:
    """Pages a second: every thread has its own part of one random order, and stops when time or its part is up."""
    order = np.random.default_rng().permutation(pages) * PAGE_BYTES
    read, began = [0] * threads, time.perf_counter()

    def reader(number: int) -> None:
        buffers = [bytearray(PAGE_BYTES)]
        for offset in order[number::threads].tolist():
            read[number] += os.preadv(fd, buffers, offset) == PAGE_BYTES
            if time.perf_counter() - began > SECONDS:
                return

    readers = [threading.Thread(target=reader, args=(number,)) for number in range(threads)]
    for thread in readers:
        thread.start()
    for thread in readers:
        thread.join()
    return sum(read) / (time.perf_counter() - began)


def _cuda_rate(work: Callable[[], object], amount: int) -> float:
    work()
    torch.cuda.synchronize()
    times, began = 0, time.perf_counter()
    while times < 3 or time.perf_counter() - began < SECONDS:
        work()
        torch.cuda.synchronize()
        times += 1
    return times * amount / (time.perf_counter() - began)


def free_ram() -> int:
    """Bytes of memory that could be taken now; where the system does not say, half of all there is."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2

"""The allocator's share of the peak: freed memory goes back to the system at once.

glibc lets the size from which on arrays get pages of their own grow to that of the largest array freed so far, up to
32 MiB. Later arrays then lie in the heap, between small objects that stay, and what they leave behind fits the next
part only by chance: a decoder of 80 million weights took 481 MB at most, 418 MB with a fixed size.
"""

from __future__ import annotations

import ctypes
import gc
import sys

# M_MMAP_THRESHOLD of malloc.h. It cannot be made to move again, so arrays of this size get pages of their own for
# the rest of the process; page faults are next to nothing beside what is computed with such arrays.
_MMAP_THRESHOLD = -3
_OWN_PAGES_BYTES = 4 << 20


def keep_heap_small() -> None:
    """Let large arrays have pages of their own, which are gone with them; nothing happens without glibc."""
    library = _glibc()
    if library is not None:
        library.mallopt(_MMAP_THRESHOLD, _OWN_PAGES_BYTES)


def give_back() -> None:
    """Free what only rings of references keep (graphs are such rings, weights hang on them), and unused pages."""
    gc.collect()
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """Return the C library if it is glibc: others have no such calls, or calls of other meaning."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None

"""What an engine and a machine say about themselves: numbers and names, as the C core fills them in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    isa: str
    n_threads: int


@dataclass(frozen=True)
class Allowance:
    """What the system lets this process have; the names are those of the files that say so."""

    n_threads: int  # by all limits, at least 1
    n_affinity: int
    cpus: float | None  # at a time, by the tightest quota or set of a cgroup; None: no limit
    cpus_file: str
    total: int  # bytes of memory of the machine
    available: int  # the pages of files counted as free
    limit: int | None  # of the cgroup with the least room
    used: int  # of it, without the pages of files
    limit_file: str
    room: int | None  # bytes that this process may still take


@dataclass(frozen=True)
class Limits:
    """What the machine can do at most: bytes read from memory, multiply-adds of 8 bits and of floats, per second."""

    read_bytes_per_s: float
    int8_macs_per_s: float
    float_macs_per_s: float
    vram_bytes_per_s: float = 0.0  # of a GPU: its own memory; 0: there is none
    bus_bytes_per_s: float = 0.0  # from pinned memory to it


@dataclass(frozen=True)
class Stats:
    """Counters since the engine opened; times in nanoseconds."""

    tokens_prefill: int
    tokens_decode: int
    ns_prefill: int
    ns_decode: int
    bytes_prefill: int
    bytes_decode: int
    n_steps: int
    experts_used: int
    bytes_weights: int
    kv_blocks: int  # of all sessions; what several share counts once
    kv_bytes: int
    experts_wanted: int  # by the layers of steps, of experts that stay on the disk; the rest is 0 where none do
    experts_there: int  # of these, in memory at that time
    experts_read: int
    bytes_disk: int
    ns_disk: int  # while at least one read was under way
    ns_waited: int  # that steps waited for the disk
    ns_waiting: int  # that the running one waits now
    slots: int  # experts in memory after the last step, and their bytes
    slot_bytes: int
    slot_bytes_most: int  # that they may have
    ram: int  # bytes that the process may have, all in all
    direct: int  # 1: the disk is read past the page cache
    n_threads: int
    n_batch: int
    load: str
    isa: str
    device: str  # "cpu" or "cuda"
    note: str  # what is not as it might be, and why
    vram_bytes: int  # of the GPU's memory, taken
    experts: int  # of the model, where there is a GPU
    vram_slots: int  # places for experts there
    vram_experts: int  # those that hold one
    pairs_on_gpu: int  # of experts_used
    uploads: int  # experts brought to the GPU since opening
    bytes_uploaded: int
    bytes_streamed: int  # of experts brought for one layer of a prompt
    pinned_bytes: int  # of host memory for copies to the GPU
    unpinned_bytes: int  # of it that the system would not pin
    bytes_on_gpu: int  # of bytes_prefill and bytes_decode, what the GPU read in its own memory
    bytes_fetched: int  # copied from it to host memory: logits, choices, rows for other experts, caches
    evictions: int  # experts that lost their place there to another
    downloads: int  # of them, those that came down into RAM, where that is short
    bytes_downloaded: int
    uploads_failed: int  # experts that could not be brought
    slots_given_up: int  # places for experts there, for want of memory
    bytes_allowed: int  # of uploads beside the last step
    bus_bytes_per_s: float  # as uploads have gone so far; 0: none has
    stream_from: int  # rows of a step from which an expert without a place is brought for its layer


@dataclass(frozen=True)
class Gpu:
    """The first GPU, as its driver describes it."""

    name: str
    bus: str  # its address, as in /sys/bus/pci/devices
    driver: str  # CUDA version
    capability: str  # such as 8.6
    n_multiprocessors: int
    total: int  # bytes of its memory
    free: int

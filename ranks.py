"""Several processes of one run: `torchrun --nproc-per-node 4 run.py ...`.

torchrun starts a rank (process) per GPU or share of cores; without it there is one.  All ranks hold
the same state.  Whatever one rank does for all passes through on_rank: reading files, training,
predictions.  The first rank alone prints and writes.
"""

import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Hashable, Mapping
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from data import first_line
from models import on_device

PATIENCE = timedelta(days=30)  # longest wait for the work of another rank
ENDED = "another process of this run has ended, or all were told to"
_store: dist.Store | None = None  # the ranks' common memory; it outlives each of them

# ---------------------------------------------------------------------------------- start and ranks

def count() -> int:
    """Number of ranks of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def number() -> int:
    """Number of this rank, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this rank prints and writes."""
    return number() == 0


def join() -> None:
    """Meet the other ranks, if torchrun has started this process; all but the first fall silent."""
    # WORLD_SIZE alone may be left over from something else.
    if not dist.is_torchelastic_launched() or int(os.environ["WORLD_SIZE"]) < 2:
        return
    global _store
    # A GPU per rank of this machine
    _store, rank, size = next(dist.rendezvous("env://"))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    # gloo on GPUs too: NCCL would block the GPU of a waiting rank, whose threads train clients.
    dist.init_process_group("gloo", store=_store, rank=rank, world_size=size, timeout=PATIENCE)
    signal.signal(signal.SIGTERM, end)
    if rank > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")


def find_device(name: str | None) -> torch.device:
    """A device by name; None: a GPU where one exists.  Raises ValueError if it cannot be used."""
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(usual if name is None else name)
        torch.ones(1, dtype=torch.float64, device=device).cpu()  # averages need float64
    # torch raises each of these, by device.
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"--device {name} cannot be used ({first_line(error)}): "
                         f"try --device {usual}") from error
    return torch.device("cpu") if device.type == "cpu" else device  # cpu:0 is the same


def num_cores() -> int:
    """Number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def share_of_cores() -> int:
    """Number of cores per rank of this machine."""
    return max(1, num_cores() // (int(os.environ["LOCAL_WORLD_SIZE"]) if count() > 1 else 1))


def own_device(device: str) -> str:
    """A device as --device names it, but of several GPUs the one of this rank."""
    is_gpu = count() > 1 and torch.device(device).type == "cuda"
    return f"cuda:{torch.cuda.current_device()}" if is_gpu else device


# --------------------------------------------------------------------------------------------- work

def deal_out(costs: Mapping[Hashable, float]) -> dict[Hashable, int]:
    """Assign items to ranks, item -> rank: the costliest first, each to the least loaded rank."""
    load, owner = [0.0] * count(), {}
    for item in sorted(costs, key=costs.get, reverse=True):
        owner[item] = load.index(min(load))
        load[owner[item]] += costs[item]
    return owner


def on_rank(rank: int, work: Callable[[], Any], device: str = "cpu") -> Any:
    """Call work() on one rank alone, and return or raise its outcome on all ranks.

    device: device of the tensors in the outcome on this rank
    Every rank makes the same calls in the same order.  Raises ConnectionError if one has ended.
    """
    if count() == 1:
        return work()

    # The work
    outcome = [None]
    if number() == rank:
        try:
            result = work()
            outcome = [on_device(result, "cpu")]
        except Exception as error:
            # Told to end: no other rank still listens.
            if isinstance(error, ConnectionError):
                raise
            outcome = [portable(error)]

    # Its outcome, for the other ranks
    try:
        dist.broadcast_object_list(outcome, src=rank)
    except RuntimeError as error:
        raise ConnectionError(f"{ENDED} ({first_line(error)})") from error
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return result if number() == rank else on_device(outcome[0], device)


# ---------------------------------------------------------------------------------- errors and ends

def portable(error: Exception) -> Exception:
    """Copy of an error for other ranks, with its traceback, and of a class that can be pickled."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = RuntimeError(f"{type(error).__name__}: {error}")
        copy.__notes__ = getattr(error, "__notes__", [])
    copy.traceback = traceback_of(error)
    return copy


def traceback_of(error: BaseException) -> str:
    """Traceback of an error, from the rank that raised it."""
    return getattr(error, "traceback", None) or "".join(traceback.format_exception(error))


def leave() -> None:
    """Part from the other ranks, once all have finished."""
    on_rank(0, lambda: None)
    if count() > 1:
        dist.destroy_process_group()


def end(*_: object) -> NoReturn:
    """Handle SIGTERM: end as by Ctrl-C, or as other ranks do if one of them dies.

    A cluster sends it before it takes a machine away, torchrun if a rank dies.  Between ranks the
    handler waits during a broadcast, which fails once the rank that works for it has ended.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise ConnectionError(f"{ENDED} (SIGTERM)") if count() > 1 else KeyboardInterrupt


def is_speaker() -> bool:
    """Whether this rank prints why the run ends: the first rank that asks."""
    try:
        return _store is None or _store.add("speaker", 1) == 1
    except RuntimeError:  # the store's process has ended
        return True

"""The processes of a run, if there are several: `torchrun --nproc-per-node 4 run.py ...`.

torchrun starts them, on one machine or on many, and each, a rank, runs the same script.  All ranks
hold the same state and do the same with it, so they need to tell each other only what one of them
has done for all: the work of a client, the predictions of a model, reading files.  The first rank
alone prints and writes.  Without torchrun there is one rank, and everything here costs nothing.
"""

import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Hashable, Mapping
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from data import first_line, on_device

PATIENCE = timedelta(days=30)  # that a rank has with another one's work
GRACE = 20  # seconds that it has to end in an orderly way; torchrun gives it 30
_store: dist.Store | None = None  # where the ranks met, which outlives each of them


def count() -> int:
    """How many ranks the run has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def number() -> int:
    """Which of them this one is."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the rank that prints and writes."""
    return number() == 0


def join() -> None:
    """Meet the other ranks, if torchrun has started this process; all but the first fall silent.

    On a machine with GPUs each rank uses one, by its number on that machine.  What ranks tell each
    other goes by gloo there too: it is on the CPU anyway, and NCCL would have the GPU of a rank
    that waits for news stand still, though its other threads have clients to train.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        return
    global _store
    _store, rank, world_size = next(dist.rendezvous("env://"))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("gloo", store=_store, rank=rank, world_size=world_size,
                            timeout=PATIENCE)
    signal.signal(signal.SIGTERM, end)  # which torchrun sends if another one dies
    # That runs once the main thread is back from what it waits for, which it may never be.
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)
    threading.Thread(target=end_at_last, args=(told,), daemon=True).start()
    if rank > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")


def leave() -> None:
    """Part from the other ranks, when all are done."""
    done_by(0, lambda: None)
    if count() > 1:
        dist.destroy_process_group()


def raise_loss(why: str) -> NoReturn:
    """What a rank does that finds another one gone, or is told to go, as torchrun then does."""
    raise ConnectionError(f"another process of this run has ended, or all were told to ({why})")


def end(*_: object) -> NoReturn:
    """End in an orderly way, when told to by SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise_loss("told to end")


def end_at_last(told: int) -> None:
    """End this process some time after SIGTERM, and say so in one line if nobody else has.

    told: a file that gets the numbers of signals as they come
    """
    while signal.SIGTERM not in os.read(told, 100):
        pass
    time.sleep(GRACE)
    if is_speaker():
        print("error: another process of this run has ended, or all were told to; go on with "
              "--resume", file=sys.stderr, flush=True)
    os._exit(2)


def is_speaker() -> bool:
    """Whether this rank is to say why the run ends: the first one to ask, whichever that is."""
    try:
        return _store is None or _store.add("speaker", 1) == 1
    except RuntimeError:  # the place where they met is gone too
        return True


def find_device(name: str | None) -> torch.device:
    """The device of a name; None: a GPU where there is one.  Raises ValueError if there is none."""
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(usual if name is None else name)
        torch.ones(1, dtype=torch.float64, device=device).cpu()  # what averaging needs
    except (RuntimeError, AssertionError, TypeError) as error:  # torch raises each, by device
        raise ValueError(f"--device {name} cannot be used ({first_line(error)}): "
                         f"try --device {usual}") from error
    return torch.device("cpu") if device.type == "cpu" else device  # cpu:0 is the same


def share_of_cores(cores: int) -> int:
    """Of the cores of this machine, how many each of its ranks can have."""
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def own_device(device: str) -> str:
    """A device as --device names it, for this rank: of GPUs its own."""
    if count() > 1 and torch.device(device).type == "cuda":
        return f"cuda:{torch.cuda.current_device()}"
    return device


def traceback_of(error: BaseException) -> str:
    """Where an error was raised, on whichever rank that was."""
    return getattr(error, "traceback", None) or "".join(traceback.format_exception(error))


def portable(error: Exception) -> Exception:
    """An error as other ranks can have it: with its traceback, and of a type that travels."""
    where = traceback_of(error)
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # of a class that cannot be pickled, or not be made again
        copy = RuntimeError(f"{type(error).__name__}: {error}")
        copy.__notes__ = getattr(error, "__notes__", [])
    copy.traceback = where
    return copy


def share_out(costs: Mapping[Hashable, float]) -> dict[Hashable, int]:
    """Deal work out to the ranks: item -> rank, the costliest first, to who has the least to do."""
    load, owner = [0.0] * count(), {}
    for item in sorted(costs, key=costs.get, reverse=True):
        owner[item] = load.index(min(load))
        load[owner[item]] += costs[item]
    return owner


def done_by(rank: int, work: Callable[[], Any], device: str = "cpu") -> Any:
    """What work() returns or raises on one rank, which alone calls it, on all of them.

    device: where tensors in it are on this rank
    Every rank has to call this, in the same order.  Raises ConnectionError if another rank is no
    longer there.
    """
    if count() == 1:
        return work()
    outcome = [None]
    if number() == rank:
        try:
            result = work()
            outcome = [on_device(result, "cpu")]
        except ConnectionError:  # told to end while it waited for the work: nobody is there to tell
            raise
        except Exception as error:
            outcome = [portable(error)]
    try:
        dist.broadcast_object_list(outcome, src=rank)
    except RuntimeError as error:
        raise_loss(first_line(error))
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return result if number() == rank else on_device(outcome[0], device)

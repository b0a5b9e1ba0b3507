"""Training steps on a GPU: each is captured as a CUDA graph once, and replayed from then on.

    take = replayed(step, model, optimizer, fixed=(start,), key=(step,))
    loss = take(rows)  # what step(rows, start) does; on a CPU it is that call

A training step of these networks is hundreds of kernels of a few microseconds.  Python starts them
one by one and needs several times as long as the GPU.  A graph holds the kernels of a whole step,
and one call starts them all.

A graph knows addresses, not values, so everything that a step reads or writes stays where it is:
- The network and its optimiser are scratch.  federation.reset copies weights into them.
- The images are read in place (in_place).
- All else is copied into tensors that belong to the graph: what stays equal for a client (fixed)
  once, what comes with a batch before every replay.
There is one graph per network, kind of step and shape of a batch.

A step to be captured
- reads no number from the device (float(loss), .item(), nonzero, a branch on a tensor's value);
- draws nothing on the CPU: what is drawn for a batch comes with the batch;
- uses no Python number that changes: numbers belong to its key, and other numbers are other graphs.
Nothing can find a broken rule of the last two.  For the rest, every graph is compared with the step
itself when it is captured.  A step that fails is run as on a CPU, and one line says so.
"""

import copy
import os
import threading
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from data import first_line
from models import tensors_in

WORKERS = 10  # clients at a time; on an H200 ten take 1.0 ms per step and client, one 2.6, 20 0.94
WORKER_MEMORY = 2**30  # bytes of free memory per worker, at least
STREAMS = 32  # torch hands out as many different streams per GPU
PROOF_STEPS = 3  # steps before a capture, as torch asks for, and by the graph after it, to compare
TOLERANCE = 1e-3  # relative difference of losses between a step and its graph

enabled = True  # False by --no-graphs
_here = threading.local()  # .place: where this thread works
_one_at_a_time = threading.Lock()  # two captures at a time would disturb each other
_uncapturable: set[Callable] = set()  # steps that failed
# torch warns about the first steps, which it expects in a graph.
warnings.filterwarnings("ignore", message=".*capturable=True.*", category=UserWarning)


class Graph(NamedTuple):
    """A captured step."""

    inputs: tuple  # tensors to copy a batch into
    replay: Callable[[], None]
    loss: Tensor  # holds the loss after a replay


def default_workers(device: str) -> int:
    """Number of clients to train at a time on a GPU; 1 on another accelerator."""
    if torch.device(device).type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(WORKERS, free // WORKER_MEMORY))


# ----------------------------------------------------------------------------------- places of work

class Place:
    """A place where a thread trains: its stream on a GPU, its scratch networks and graphs.

    A place is used by one thread at a time.  Its graphs share memory, since none run together.
    """

    def __init__(self, device: torch.device):
        self.device, self.networks = device, {}  # architecture -> scratch network and optimiser
        self.captures = enabled and device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.forget()

    def forget(self) -> None:
        """Free all graphs."""
        # cuBLAS has a workspace per stream, known to all graphs of the stream.  torch frees it with
        # the first of them, so none may outlive another, or work on another stream.
        self.in_place = ()  # tensors and functions that the graphs use where they are
        self.kept = {}  # (network, key, layout) -> fixed tensors, and layout of a batch -> Graph
        self.pool = torch.cuda.graph_pool_handle() if self.captures else None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Let this thread train here: after all that the main thread has begun, up to the end."""
        _here.place = self
        try:
            if self.stream is None:
                yield
                return
            self.stream.wait_stream(torch.cuda.default_stream(self.device))
            with torch.cuda.stream(self.stream):
                yield
            self.stream.synchronize()
        finally:
            _here.place = None


# ---------------------------------------------------------------------------------------- replaying

def replayed(step: Callable, model: nn.Module, optimizer: Optimizer, *, fixed: tuple = (),
             in_place: tuple = (), key: tuple[Hashable, ...]) -> Callable[..., Tensor]:
    """The step as a function of a batch alone: replayed on a GPU, called elsewhere.

    step: (*batch, *fixed) -> loss, detached; trains model by optimizer
    fixed: nests of tensors and networks that stay equal from call to call
    in_place: whatever else the step reads, if it may differ from that of an earlier step
    key: the method's step and its numbers; equal keys are equal steps
    The loss is overwritten by the next call.
    """
    place = getattr(_here, "place", None)
    if place is None or not place.captures or key[0] in _uncapturable:
        return lambda *batch: step(*batch, *fixed)

    # Graphs that read other images are of no further use.
    if [*map(id, in_place)] != [*map(id, place.in_place)]:
        place.forget()
        place.in_place = in_place
    found = model, key, layout(fixed)
    if found not in place.kept:
        place.kept[found] = copy.deepcopy(fixed), {}
    kept, graphs = place.kept[found]
    copy_into(kept, fixed)

    def take(*batch: object) -> Tensor:
        shape = layout(batch)
        if shape not in graphs and key[0] not in _uncapturable:
            try:
                graphs[shape] = captured(step, model, optimizer, batch, kept, place)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                _uncapturable.add(key[0])
                print(f"note: {key[0].__name__} runs without CUDA graphs "
                      f"({first_line(error)[:100]})", flush=True)
        if shape not in graphs:
            return step(*batch, *fixed)
        copy_into(graphs[shape].inputs, batch)
        graphs[shape].replay()
        return graphs[shape].loss

    return take


def layout(payload: object) -> Hashable:
    """Structure of a nest, with types and shapes of its tensors and networks."""
    if isinstance(payload, Tensor):
        return payload.dtype, payload.shape
    if isinstance(payload, nn.Module):
        return type(payload), layout(list(tensors_in(payload)))
    if isinstance(payload, dict):
        return tuple(payload), layout(list(payload.values()))
    return tuple(map(layout, payload)) if isinstance(payload, (list, tuple)) else payload


@torch.no_grad()
def copy_into(kept: object, given: object) -> None:
    """Copy the tensors of a nest, networks included, into those of another."""
    old, new = list(tensors_in(kept)), list(tensors_in(given))
    if old:
        torch._foreach_copy_(old, new)


# ---------------------------------------------------------------------------------------- capturing

def captured(step: Callable, model: nn.Module, optimizer: Optimizer, batch: tuple, fixed: tuple,
             place: Place) -> Graph:
    """Capture a step, and compare it with the step itself; network and optimiser do not change.

    Raises RuntimeError if the step cannot be captured, or if the losses differ.
    """
    inputs, before = copy.deepcopy(batch), [tensor.clone() for tensor in state_of(model, optimizer)]
    function, layers = partial(step, *inputs, *fixed), counting_layers(model)
    first_counts = [layer.num_batches_tracked.clone() for layer in layers]
    try:
        by_step = torch.stack([function().clone() for _ in range(PROOF_STEPS)])
        counts = [(layer.num_batches_tracked - first).item() // PROOF_STEPS
                  for layer, first in zip(layers, first_counts)]
        restore(model, optimizer, before)
        with _one_at_a_time:
            replay, loss = capture(partial(counted_at_once, function, layers, counts), place)
        by_graph = []
        for _ in range(PROOF_STEPS):
            replay()
            by_graph.append(loss.clone())
    finally:
        restore(model, optimizer, before)
    if not torch.allclose(torch.stack(by_graph), by_step, TOLERANCE, TOLERANCE, equal_nan=True):
        raise RuntimeError("the losses of its graph differ from its own")
    return Graph(inputs, replay, loss)


def capture(function: Callable[[], Tensor], place: Place) -> tuple[Callable[[], None], Tensor]:
    """Capture a function of tensors that stay: a function that replays it, and its result."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, place.pool, place.stream, capture_error_mode="thread_local"):
        result = function()
    return graph.replay, result


def state_of(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """Tensors that a training step changes: weights, buffers, then the optimiser's state."""
    return [*tensors_in(model), *tensors_in(list(optimizer.state.values()))]


@torch.no_grad()
def restore(model: nn.Module, optimizer: Optimizer, before: list[Tensor]) -> None:
    """Copy an earlier state_of back; state that the optimiser has made since becomes zero."""
    for tensor, old in zip_longest(state_of(model, optimizer), before):
        tensor.zero_() if old is None else tensor.copy_(old)


def counting_layers(model: nn.Module) -> list[nn.Module]:
    """Layers of batch normalisation that count the batches that they see."""
    return [layer for layer in model.modules()
            if getattr(layer, "num_batches_tracked", None) is not None]


def counted_at_once(function: Callable, layers: list[nn.Module], counts: list[int]) -> Tensor:
    """Call a function in which each layer sees count batches; one kernel counts for all layers."""
    counters = [layer.num_batches_tracked for layer in layers]
    for layer in layers:
        layer.num_batches_tracked = None
    try:
        result = function()
    finally:
        for layer, counter in zip(layers, counters):
            layer.num_batches_tracked = counter
    if counters:
        torch._foreach_add_(counters, counts)
    return result


# --------------------------------------------------------------------------------------- equal bits

def make_deterministic() -> None:
    """Have a GPU compute the same bits every time, from the first kernel on."""
    # The larger workspace that cuBLAS could have gains nothing for matrices this small.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False

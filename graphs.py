"""Training steps on a GPU: each is captured as a CUDA graph once, and replayed from then on.

    with place.entered():                                # a thread's stream and graphs
        take = replayed(step, model, optimizer, fixed=(start,), key=(step,))
        loss = take(rows)                                # what step(rows, start) does

A training step of these networks is hundreds of kernels of a few microseconds.  Python starts them
one by one and needs several times as long as the GPU.  A graph holds the kernels of a whole step,
and one call starts them all.  On a CPU, and outside of a place, take(rows) is step(rows, start).

A graph knows addresses, not values, so everything that a step reads or writes stays where it is:
- The network and its optimiser are the same for all clients, whose weights federation.reset copies
  into them.
- The images are read where they are (reads).
- All else is copied: what stays equal for a client (fixed) once, what comes with a batch before
  every replay.
A place has one graph per network, kind of step and layout of a batch.

A step to be captured
- reads no number from the device (float(loss), .item(), nonzero, a branch on a tensor's value);
- draws nothing on the CPU: what is drawn for a batch comes with the batch;
- uses no Python number that changes: numbers belong to its key, and other numbers are other graphs;
- calls zero_grad itself, returns a detached loss, and keeps no tensor for the next step.
Nothing notices a number that changes without being in the key.  Otherwise a step that breaks a
rule cannot be captured, or its graph differs from it: every graph is compared with the step itself
before it is used.  Such a step runs without a graph, kernel by kernel, and one line says so.
"""

import copy
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from data import first_line
from models import tensors_in

# Clients at a time.  In a prototype on an H200 a step of FedIN took 1.0 ms with ten, 2.6 with one.
WORKERS = 10
WORKER_MEMORY = 2**30  # bytes of free memory per worker, at least
STREAMS = 32  # torch hands out as many different streams per GPU
PROOF_STEPS = 3  # steps before a capture, as torch asks for, and by the graph after it, to compare
TOLERANCE = 1e-3  # largest relative difference of a loss between a step and its graph
DRIFT = 0.1  # largest difference of the weights between them, as a share of their change (L2 norms)

enabled = True  # False by --no-graphs
_here = threading.local()  # .place: where this thread works
_one_at_a_time = threading.Lock()  # two captures at a time would disturb each other
_uncapturable: set[Callable] = set()  # steps that failed


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
        self.uses_graphs = enabled and device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # (network, optimiser, key, layout of fixed) -> fixed, and layout of a batch -> Graph
        self.kept: dict[tuple, tuple[tuple, dict]] = {}
        self.forget()

    def forget(self) -> None:
        """Free all graphs at once."""
        # Graphs of one stream compute in one workspace of cuBLAS.  torch frees it with the first
        # graph that it destroys, and those left would write into memory of others.
        with _one_at_a_time:
            for _, graphs in self.kept.values():
                graphs.clear()
            self.kept.clear()
            self.reads = ()  # whatever the graphs read where it is
            self.pool = torch.cuda.graph_pool_handle() if self.uses_graphs else None

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Run this thread's work on the place's stream.

        It waits for what the main thread has begun, and has ended on return.
        """
        _here.place = self
        try:
            if self.stream is None:
                yield
                return
            self.stream.wait_stream(torch.cuda.default_stream(self.device))
            try:
                with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
                    yield
            finally:
                self.stream.synchronize()
        finally:
            _here.place = None


# ---------------------------------------------------------------------------------------- replaying

def replayed(step: Callable, model: nn.Module, optimizer: Optimizer, *, fixed: tuple = (),
             reads: tuple = (), key: tuple[Hashable, ...]) -> Callable[..., Tensor]:
    """The step as a function of a batch alone: a replay of its graph, or without graphs a call.

    step: (*batch, *fixed) -> loss, detached; trains model by optimizer
    fixed: nests of tensors and networks that stay equal from call to call
    reads: objects that the step reads where they are; if others than before, all graphs are freed
    key: the method's step and its numbers; equal keys are equal steps
    The loss is overwritten by the next call.
    """
    place = getattr(_here, "place", None)
    if place is None or not place.uses_graphs or key[0] in _uncapturable:
        return lambda *batch: step(*batch, *fixed)

    # Things that all graphs of this step share
    if [*map(id, reads)] != [*map(id, place.reads)]:
        place.forget()
        place.reads = reads
    kind = model, optimizer, key, layout(fixed)
    if kind not in place.kept:
        place.kept[kind] = copy.deepcopy(fixed), {}
    kept, graphs = place.kept[kind]
    copy_into(kept, fixed)

    def take(*batch: object) -> Tensor:
        shape = layout(batch)
        if shape not in graphs and key[0] not in _uncapturable:
            try:
                graphs[shape] = checked_graph(step, model, optimizer, batch, kept, place)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                place.forget()
                give_up(key[0], error)
        if shape not in graphs:
            return step(*batch, *fixed)
        copy_into(graphs[shape].inputs, batch)
        graphs[shape].replay()
        return graphs[shape].loss

    return take


def give_up(step: Callable, error: BaseException) -> None:
    """Run a step without graphs from now on, and say so once, with the first cause."""
    if step not in _uncapturable:
        _uncapturable.add(step)
        while error.__context__ is not None:
            error = error.__context__
        print(f"note: {step.__name__} runs without CUDA graphs ({first_line(error)[:100]})",
              flush=True)


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

def checked_graph(step: Callable, model: nn.Module, optimizer: Optimizer, batch: tuple,
                  fixed: tuple, place: Place) -> Graph:
    """Capture a step, and compare it with the step itself; network and optimiser do not change.

    Raises RuntimeError if the step cannot be captured, or if losses or weights differ.
    """
    inputs, before = copy.deepcopy(batch), copies(state_of(model, optimizer))
    function, layers = partial(step, *inputs, *fixed), counting_layers(model)
    first_counts = copies([layer.num_batches_tracked for layer in layers])
    try:
        # Steps, which also prepare the libraries for the capture
        losses = torch.stack([function().clone() for _ in range(PROOF_STEPS)])
        weights = copies(model.parameters())
        counts = [(layer.num_batches_tracked - first).item() // PROOF_STEPS
                  for layer, first in zip(layers, first_counts)]
        restore(model, optimizer, before)

        # The graph, and as many steps by it
        with _one_at_a_time:
            replay, loss = capture(partial(counted_at_once, function, layers, counts), place)
        replayed_losses = []
        for _ in range(PROOF_STEPS):
            replay()
            replayed_losses.append(loss.clone())
        replayed_weights = copies(model.parameters())
    finally:
        restore(model, optimizer, before)

    # Comparison, unless training diverges
    if losses.isfinite().all():
        if not torch.allclose(torch.stack(replayed_losses), losses, rtol=TOLERANCE, atol=1e-6):
            raise RuntimeError("the losses of its graph differ from its own")
        if distance(replayed_weights, weights) > DRIFT * distance(before, weights):
            raise RuntimeError("its graph trains other weights")
    return Graph(inputs, replay, loss)


def capture(function: Callable[[], Tensor], place: Place) -> tuple[Callable[[], None], Tensor]:
    """Capture a function of tensors that stay: a function that replays it, and its result."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, place.pool, place.stream, capture_error_mode="thread_local"):
        result = function()
    return graph.replay, result


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copy tensors, without their gradients."""
    return [tensor.detach().clone() for tensor in tensors]


def distance(some: list[Tensor], others: list[Tensor]) -> float:
    """L2 norm of the difference of the tensors that both lists begin with."""
    return sum((a - b).double().square().sum() for a, b in zip(some, others)).sqrt().item()


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
    # cuBLAS has a workspace per thread and stream.  For matrices this small 128 KiB do.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "128")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False

"""Federated training, whatever the method: the values of a round, methods, runs, local training.

In reading order: the values that pass between server and clients; a method as a row of functions;
a run (Experiment); local training (run_steps is the one loop over batches); clients in parallel.

Values are kept apart by place.  received and Result.update cross the network; their bytes are the
traffic.  kept stays on a client between rounds.  server stays on the server.  kept and server are
saved: nests of dicts, lists, tensors and numbers.
"""

import inspect
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import graphs
import pictures
import ranks
from data import (AUGMENTATION, INITIAL_WEIGHTS, PARTICIPANTS, SPEEDS, ClientData, Dataset,
                  numpy_stream, preparation, streams, torch_stream)
from files import error_context
from models import (Make, State, all_finite, architecture_of, initial_weights, is_parameter,
                    load_network, num_bytes, scratch_network, shapes, tensors_in)
from partitions import Split, server_images

SPEED_SPREAD = 4.0  # speed ratio of the fastest to the slowest client; not given in the papers


# ------------------------------------------------------------------------------ values of a round

class Client(NamedTuple):
    """A client: its id, its training images and its architecture."""

    id: int
    indices: Tensor  # (n_k,) int64, into the training images
    arch: str


class Update(NamedTuple):
    """Upload of a client to the server."""

    weights: State
    num_samples: int  # n_k, its number of training images


class LabelledUpdate(NamedTuple):
    """Upload of a client whose server has to know its classes (FedGen, AP-FL)."""

    weights: State
    num_samples: int  # n_k
    class_counts: Tensor  # (C,) int64, n_k^y, its training images per class


class Result(NamedTuple):
    """Outcome of a client update."""

    update: Any  # sent to the server
    loss: float  # training cross entropy, summed over samples
    samples: int  # training images processed
    kept: Any = None  # a stateful method's memory of this client


class Task(NamedTuple):
    """A client update to be done."""

    client: Client
    number: int  # the round, or another number that seeds its random streams
    received: Any
    kept: tuple = ()  # (kept,) of a stateful method; empty otherwise


class Ending(NamedTuple):
    """Outcome of the stages after the last round."""

    models: dict[str, dict[int, State]]  # kind -> client -> weights; clients use the last kind
    download: int  # bytes that the stages send to clients
    pictures: dict[str, Callable]  # file name -> draw(file)
    upload: int = 0  # bytes that clients send in the stages


# ---------------------------------------------------------------------------------------- a method

class Method(NamedTuple):
    """A method: functions in the order of a round, and its settings; see bind."""

    init: Callable  # (weights, *, ...) -> server, before round 1
    download: Callable  # (server, client, stream, *, ...) -> received
    client_update: Callable  # (model, optimizer, received, data, stream[, kept], *, ...) -> Result
    server_update: Callable | None  # (server, updates, *, ...) -> server; None: there is no server
    deploy: Callable  # (server, client, kept) -> (key, weights) in use; equal keys, equal weights
    networks: Mapping[str, Mapping[str, Callable]]  # --model -> architecture -> constructor
    averages: Sequence[str]  # values of --aggregation
    defaults: Mapping[str, Any]  # flags that not every method reads, and "setting" -> default
    in_setting: Mapping[str, Mapping[str, Any]] = {}  # --setting -> other defaults

    # Hooks of some methods alone
    initial_memory: Callable | None = None  # (server, client) -> kept, before its first round
    assign: Callable | None = None  # (client, architectures, stream) -> client, for one round
    distil: Callable | None = None  # (server, updates, network, stream, *, ...) -> server, trained
    finish: Callable | None = None  # (experiment, server, done, save, *, ...) -> Ending


def bind(method: Method, settings: Mapping[str, Any], **others: Any) -> Method:
    """Fill the keyword-only arguments of a method's functions from values of the same names."""
    values = {**settings, **others}
    return method._replace(**{name: fill_in_flags(function, values)
                              for name, function in method._asdict().items() if callable(function)})


def fill_in_flags(function: Callable, values: Mapping[str, Any]) -> Callable:
    """Fill the keyword-only arguments of a function from values of the same names.

    Raises TypeError if one that has no default stays unfilled.
    """
    arguments = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        if name in values:
            arguments[name] = values[name]
        elif parameter.default is parameter.empty:
            raise TypeError(f"{function} needs {name}, and no flag has this name")
    return partial(function, **arguments)


# ------------------------------------------------------------------------------------------- a run

class Experiment(NamedTuple):
    """Everything that stays equal through a run, and the places where clients and server train."""

    settings: dict
    method: Method  # bound to the settings
    data: Dataset
    clients: list[Client]
    available: list[int]  # ids of the clients that take part in rounds
    dropouts: list[int]  # ids of the clients that dropped out before round 1
    seen: list[int]  # classes that participants hold
    unseen: list[int]  # classes that dropout clients alone hold
    test_shares: list[Tensor]  # client -> indices of its test images
    statistics: tuple[Tensor, Tensor]  # mean and standard deviation of the training images
    prepare: Callable[[Tensor], Tensor]  # uint8 images -> network input, by these statistics
    speeds: list[float]  # training images per unit of virtual time, per client
    networks: dict[str, Make]  # architecture -> its builder, small to large
    places: list[graphs.Place]  # those not in use; clients are trained there
    server_place: graphs.Place

    def network(self, arch: str, weights: State) -> nn.Module:
        """Build a network of these weights, to predict with."""
        return load_network(self.networks[arch], weights)


def prepare_experiment(method: Method, settings: dict, split: Split) -> Experiment:
    """Set up a run: its clients, its networks, and the method bound to the settings."""
    # Clients, in even groups by architecture
    constructors, num_clients = method.networks[settings["model"]], settings["clients"]
    clients = [Client(k, part, architecture_of(k, num_clients, list(constructors)))
               for k, part in enumerate(split.parts)]
    remaining = [client for client in clients if client.id not in split.dropouts]
    available = [client.id for client in (remaining if method.server_update else clients)]
    spread = settings.get("speed_spread", SPEED_SPREAD)
    speeds = spread ** numpy_stream(settings["seed"], SPEEDS).uniform(size=num_clients)

    # The method, and builders of its networks.  Functions say balance for lambda, a word of Python.
    bound = bind(method, settings, owners={client.id: client for client in remaining},
                 class_names=split.data.classes, balance=settings.get("lambda"),
                 **server_images(split))
    shape = split.data.x_train.shape[1], len(split.data.classes)
    networks = {arch: partial(constructor, *shape) for arch, constructor in constructors.items()}
    return Experiment(
        settings, bound, split.data, clients, available, dropouts=split.dropouts, seen=split.seen,
        unseen=split.unseen, test_shares=split.test_shares, statistics=split.statistics,
        prepare=preparation(split.statistics), speeds=speeds.tolist(), networks=networks,
        places=[], server_place=graphs.Place(split.data.x_train.device))


def first_server(experiment: Experiment) -> dict:
    """Server state before round 1, on the CPU."""
    rng = torch_stream(experiment.settings["seed"], INITIAL_WEIGHTS)
    return experiment.method.init(initial_weights(experiment.networks, rng))


def num_participants(settings: Mapping[str, Any]) -> int:
    """Clients drawn per round, at most; in asynchronous runs all of them."""
    return max(1, round(settings.get("participation", 1.0) * settings["clients"]))


def draw_participants(experiment: Experiment, t: int) -> list[int]:
    """Draw the clients of round t, ascending; equal for all methods with equal available ones."""
    rng = numpy_stream(experiment.settings["seed"], PARTICIPANTS, t)
    count = min(num_participants(experiment.settings), len(experiment.available))
    return sorted(rng.choice(experiment.available, count, replace=False).tolist())


def describe(experiment: Experiment, server: dict) -> str:
    """Text on the run that is about to start: data, settings, clients, networks, traffic."""
    settings, dataset, method = experiment.settings, experiment.data, experiment.method
    channels, height, width = dataset.x_train.shape[1:]
    participants = len(draw_participants(experiment, 1))
    lines = [f"{settings['method']} on {settings['dataset']}: {len(dataset.y_train):,} training "
             f"and {len(dataset.y_test):,} test images of {height}x{width}x{channels}, "
             f"{len(dataset.classes)} classes",
             f"rounds: {settings['rounds']}; clients per round: {participants} of "
             f"{settings['clients']}; workers: {settings['workers']} on {settings['device']}"
             + (f" in each of {ranks.count()} processes" if ranks.count() > 1 else "")]
    shown = [f"{name} {value}" for name, value in settings.items()
             if value is not None and not isinstance(value, dict)]
    lines.append(textwrap.fill(", ".join(shown), 100, break_on_hyphens=False))

    # Images per client and class, and the server's images
    counts = [dataset.y_train[client.indices].bincount(minlength=len(dataset.classes)).tolist()
              for client in experiment.clients]
    lines.append(pictures.partition_table(
        counts, [client.arch for client in experiment.clients], dataset.classes,
        [dataset.classes[label] for label in experiment.unseen], experiment.dropouts))
    if settings.get("proxy"):
        held = method.distil.keywords
        lines.append(f"the server holds {len(held['proxy'].images):,} unlabelled images "
                     f"({settings['proxy']}) and {len(held['validation'].images):,} labelled ones")

    # Networks and traffic
    for arch, make in experiment.networks.items():
        state = shapes(make)
        size = sum(tensor.numel() for name, tensor in state.items() if is_parameter(name))
        lines.append(f"{arch}: {size:,} parameters, {num_bytes(state) / 1e6:.2f} MB with buffers")
    sent = [num_bytes(method.download(server, client, streams(settings["seed"], 0, client.id)))
            for client in experiment.clients]
    mean = sum(sent) / len(sent) * participants / 1e6
    return "\n".join([*lines, f"traffic: about {mean:.0f} MB downloaded per round"])


def traffic(results: Iterable[tuple[object, Result]]) -> dict[str, float]:
    """Figures of client updates, each (received, result), for the log."""
    loss = upload = download = samples = 0
    for received, result in results:
        loss, samples = loss + result.loss, samples + result.samples
        upload, download = upload + num_bytes(result.update), download + num_bytes(received)
    return {"loss": loss / max(1, samples), "upload_mb": upload / 1e6,
            "download_mb": download / 1e6, "samples": samples}


# ---------------------------------------------------------------------------------- local training

def reset(model: nn.Module, optimizer: Optimizer, weights: State) -> None:
    """Load weights into the scratch model, in training mode, and clear the optimiser's state."""
    model.load_state_dict(weights)
    model.train()
    # Zeros equal the state of a new optimiser, and spare its allocation.
    for tensor in tensors_in(list(optimizer.state.values())):
        tensor.zero_()


def run_steps(step: Callable, model: nn.Module, optimizer: Optimizer, data: ClientData,
              batches: Iterable[tuple], *fixed: object, **numbers: object) -> tuple[float, int]:
    """Run a method's step on every batch; return the sum of losses over samples, and their number.

    step: (model, optimizer, x, y, *others, *fixed, **numbers) -> detached mean loss of the batch;
        one whole optimiser step.  On a GPU it is captured, see graphs.py for what it must not do
    batches: (rows, *others), see data.batches;  (x, y) are the images and labels of the rows
    fixed: nests of tensors and networks, equal for all batches, such as the weights at the start
    """
    def on_rows(rows: Tensor, *others: object) -> Tensor:
        return step(model, optimizer, *data.batch(rows), *others, **numbers)

    # Augmentation draws numbers, so augmented images are made outside of the step.
    if data.augmented:
        on_rows = partial(step, model, optimizer, **numbers)
        batches = ((*data.batch(rows), *others) for rows, *others in batches)
    reads = () if data.augmented else (data.images, data.labels, data.prepare)
    take = graphs.replayed(on_rows, model, optimizer, fixed=fixed, key=(step, *numbers.items()),
                           reads=reads)

    loss_sum, samples = 0.0, 0
    for first, *others in batches:
        loss = take(first, *others)
        loss_sum, samples = loss_sum + loss * len(first), samples + len(first)
    return float(loss_sum), samples


# ------------------------------------------------------------------------------ clients in parallel

def train_clients(experiment: Experiment, update: Callable, tasks: Sequence[Task],
                  title: str = "") -> dict[int, Result]:
    """Run update for each task, on all processes of the run and their threads: client id -> result.

    update: (model, optimizer, received, data, stream[, kept]) -> Result
    title: name of a progress bar; "": no bar
    """
    settings, ids = experiment.settings, [task.client.id for task in tasks]

    # The costliest start first, so that no worker finishes long after the others.  Local downloads
    # nothing, and costs what its memory does.
    cost = {task.client.id: len(task.client.indices) * num_bytes(task.received or task.kept)
            for task in tasks}
    owner = ranks.deal_out(cost)
    work = sorted((task for task in tasks if owner[task.client.id] == ranks.number()),
                  key=lambda task: cost[task.client.id], reverse=True)

    # On a GPU every worker has a stream of its own, and there are not more.
    on_gpu = experiment.server_place.stream is not None
    workers = min(settings["workers"], graphs.STREAMS - 1) if on_gpu else settings["workers"]
    pool, results = worker_threads(workers, settings["threads"]), {}
    futures = {task.client.id: pool.submit(train_client, experiment, update, task)
               for task in work}
    try:
        for k in (pictures.progress_bar(ids, title, "client") if title and ids else ids):
            with error_context(title), error_context(f"client {k}"):
                results[k] = ranks.on_rank(owner[k], futures[k].result if k in futures else None,
                                           settings["device"])
    finally:
        for future in futures.values():  # those that have not begun, after an error or Ctrl-C
            future.cancel()
    return results


@cache
def worker_threads(workers: int, threads: int) -> ThreadPoolExecutor:
    """Worker threads of this process, each with intra-op threads of its own."""
    # They last, since on a GPU a thread holds what its graphs need.
    return ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads,))


def train_client(experiment: Experiment, update: Callable, task: Task) -> Result:
    """Run update for one task, in a worker thread.  Raises FloatingPointError if it diverges."""
    settings, client, images = experiment.settings, task.client, experiment.data.x_train

    # The client's images and random streams
    stream = streams(settings["seed"], task.number, client.id)
    client_data = ClientData(images, experiment.data.y_train, client.indices, experiment.prepare)
    if settings["augment"]:
        client_data = client_data._replace(augmented=True, prepare=preparation(
            experiment.statistics, settings["dataset"], stream(AUGMENTATION)))

    # A scratch network without meaningful weights; the client update loads them (reset).
    try:
        place = experiment.places.pop()
    except IndexError:
        place = graphs.Place(images.device)
    if client.arch not in place.networks:
        place.networks[client.arch] = scratch_network(
            experiment.networks[client.arch], images.shape[1:], images.device,
            optimizer=settings["optimizer"], lr=settings["lr"],
            momentum=settings.get("momentum", 0.0), weight_decay=settings.get("weight_decay", 0.0))
    model, optimizer = place.networks[client.arch]

    # autocast's cache would keep the weights of the first step for all others.
    with place.entered(), torch.autocast(images.device.type, torch.bfloat16, settings["amp"],
                                         cache_enabled=False):
        result = update(model, optimizer, task.received, client_data, stream, *task.kept)
    optimizer.zero_grad()  # frees the gradients while the network waits for its next client
    experiment.places.append(place)

    if not (math.isfinite(result.loss) and all_finite((result.update, result.kept))):
        raise FloatingPointError(f"client {client.id}: the loss or a weight is no longer finite; "
                                 "a smaller --lr may help")
    return result


def train_server(experiment: Experiment, work: Callable[[], Any]) -> Any:
    """Do the server's training on the first process.  Raises FloatingPointError if it diverges."""
    with experiment.server_place.entered():
        outcome = ranks.on_rank(0, work, experiment.settings["device"])
    experiment.server_place.forget()
    if not all_finite(outcome):
        raise FloatingPointError("the server's training: a weight is no longer finite")
    return outcome

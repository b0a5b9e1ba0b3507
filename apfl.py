"""AP-FL: asynchronous personalised federated learning through global memorisation.

Wan et al., Asynchronous Personalized Federated Learning through Global Memorization.  Equation and
section numbers below are this paper's.  What others call APFL (Deng et al., Adaptive Personalized
Federated Learning, arxiv.org/abs/2003.13461) is another method.

In reading order, as it happens: federated training of the global model, in rounds or with updates
that are mixed in as they arrive; after the last round late training (of clients that dropped out),
memorisation (the server trains the generator of generator.py under the global model), friend
models (each client trains one on synthetic samples), and decoupled interpolation of the two.

symbol       name                  what it is
theta*       server["weights"]     the global model
theta_k      server["teachers"]    client k's last upload; its owner has it too
theta_k^l    own                   of clients that never took part: the localised global model
theta_k^f    friend                its friend model
theta_k^p    personalise(...)      its personalised model
S_n, S_d                           clients that take part, and those that dropped out before round 1
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from baselines import (APFL_SETTINGS, FEDAVG, By, Experiment, Flag, LabelledUpdate, Method, Result,
                       Stream, Task, Update, fedavg_client_update, fedavg_init,
                       fedavg_server_update, figures, predicted_right, round_figures, train_late,
                       with_class_counts)
from data import (BATCHES, FRIEND_BATCHES, GENERATOR_NOISE, GENERATOR_WEIGHTS, SYNTHETIC,
                  ClientData, samples_per_epoch)
from generator import (BALANCE, DISTANCE, NOISE_DIM, SEMANTICS, SemanticGenerator, class_weights,
                       initial_generator, load_generator, sample, train_generator)
from models import (State, all_finite, copy_state, interpolate, layerwise_average, num_bytes,
                    share_accuracies)

TEACHER, FRIEND_LABELS = "global", "all"  # readings of Sec. 3.2, see PAPERS.md
SYNTHETIC_PER_CLASS = 600  # AP-FL Sec. 4.1
GENERATOR_STEPS = 1000  # not stated
GENERATOR_BATCH = 16  # n_s, samples a class in a step; 600 are fed in Sec. 4.1
FRIEND_EPOCHS = 20  # Sec. 4.1, "20 local training epochs"
BETA_COLOUR, BETA_GRAY = 0.01, 0.1  # beta, Sec. 4.1: CIFAR, and EMNIST and Fashion-MNIST
MIXING = 0.6  # alpha of Xie et al., Asynchronous Federated Optimization, arxiv.org/abs/1903.03934
SPEED_SPREAD = 4.0  # the fastest client over the slowest, in virtual time; not stated
SHEET = 10  # samples of each class in the sheet that shows them
BETA_TEST_IMAGES = 2000  # test images that the curve over beta is drawn from


# ------------------------------------------------------ federated training of the global model

def apfl_init(weights: dict[str, State]) -> dict:
    """The server's state: global weights, and of each client its last upload, theta_k.

    Uploads are called teachers, which they are of the generator in the reading of Eq. 6.
    """
    return {**fedavg_init(weights), "teachers": {}}


def apfl_client_update(model: nn.Module, optimizer: Optimizer, received: State, data: ClientData,
                       stream: Stream, *, local_epochs: int, batch_size: int) -> Result:
    """FedAvg's update; what is sent tells besides how many images of each class the client has."""
    result = fedavg_client_update(model, optimizer, received, data, stream,
                                  local_epochs=local_epochs, batch_size=batch_size)
    return with_class_counts(result, data)


def apfl_server_update(server: dict, updates: Mapping[int, LabelledUpdate], *,
                       aggregation=layerwise_average) -> dict:
    """FedAvg's average; each upload is kept until the client's next one."""
    server = fedavg_server_update(server, updates, aggregation=aggregation)
    uploads = {k: {"weights": update.weights, "class_counts": update.class_counts}
               for k, update in updates.items()}
    return {**server, "teachers": server["teachers"] | uploads}


# -------------------------------------------------------------------- asynchronous aggregation

def staleness_weight(staleness: int, kind: str, *, exponent: float = 0.5, slope: float = 10.0,
                     patience: int = 4) -> float:
    """s(d), what an update counts for that is d updates of the server behind; s(0) = 1.

    constant: 1;  polynomial: (d + 1)^-exponent;  hinge: 1 up to patience, then
    1 / (slope (d - patience) + 1).  Source: Xie et al., Asynchronous Federated Optimization,
    arxiv.org/abs/1903.03934, Sec. 5.2 (AP-FL gives no rule).
    """
    if kind == "polynomial":
        return (staleness + 1) ** -exponent
    if kind == "hinge" and staleness > patience:
        return 1 / (slope * (staleness - patience) + 1)
    return 1.0


def mix(weights: Mapping[str, State], uploads: Mapping[int, State],
        share: float) -> dict[str, State]:
    """(1 - share) x + share x_k: one arriving upload mixed into the global model.

    weights: the one architecture and its weights x;  uploads: the client and its weights x_k
    share: mixing x s(staleness); the client's number of images has no part in it
    """
    (arch, old), = weights.items()
    (upload,) = uploads.values()
    return {arch: interpolate(old, upload, share)}


def next_arrivals(arrivals: Mapping[int, float], durations: Mapping[int, float],
                  count: int) -> list[tuple[float, int]]:
    """The next count events (time, client) if each client starts anew as soon as it has arrived.

    arrivals: client -> the virtual time at which the work that it has begun arrives
    durations: client -> the virtual time that a piece of its work takes
    At equal times the lower id arrives first.
    """
    queue = [(time, k) for k, time in arrivals.items()]
    heapq.heapify(queue)
    events = []
    for _ in range(count):
        time, k = queue[0]
        events.append((time, k))
        heapq.heapreplace(queue, (time + durations[k], k))
    return events


def asynchronous_round(experiment: Experiment, t: int, server: dict, memory: dict, *,
                       local_epochs: int, batch_size: int, mixing: float,
                       staleness: str) -> tuple[dict, dict, dict]:
    """As many arrivals as clients that take part, each mixed in at once (Sec. 3.2).

    Every client always works on the model that it received when its last update arrived.
    server["flights"] holds that work: client -> the weights received, the server's version at that
    time, the how many-th work of the client it is, the virtual time at which it arrives.
    Takes and returns what run.train_round does; t and memory have no part in it.
    Since work takes a time that is known, the order of arrivals is known before; all work that has
    begun and arrives in this round is trained together.
    """
    clients, method = experiment.clients, experiment.method
    durations = {k: local_epochs / experiment.speeds[k] * samples_per_epoch(
        len(clients[k].indices), batch_size) for k in experiment.available}

    def depart(k: int, work: int, now: float) -> dict:
        return {"received": method.download(server, clients[k], experiment.stream(work, k)),
                "version": version, "work": work, "arrival": now + durations[k]}

    version, started = server.get("version", 0), server.get("time", 0.0)
    flights = dict(server.get("flights") or {k: depart(k, 1, 0.0) for k in durations})
    events = next_arrivals({k: flight["arrival"] for k, flight in flights.items()}, durations,
                           len(durations))
    due = Counter(k for _, k in events)
    results, total, behind = {}, Counter(), []
    for now, k in events:
        if k not in results:
            results |= experiment.train(method.client_update, [
                Task(clients[j], flights[j]["work"], flights[j]["received"])
                for j in due if due[j] > 0 and j not in results])
        result, flight = results.pop(k), flights[k]
        total.update(figures(result, flight["received"]))
        behind.append(version - flight["version"])
        share = mixing * staleness_weight(behind[-1], staleness)
        server = method.server_update(
            server, {k: result.update},
            aggregation=lambda weights, uploads, counts, **_: mix(weights, uploads, share))
        version += 1
        flights[k] = depart(k, flight["work"] + 1, now)
        due[k] -= 1
    server = {**server, "version": version, "flights": flights, "time": now}
    return server, memory, {**round_figures(total), "clock": now - started,
                            "staleness_mean": sum(behind) / len(behind)}


# ---------------------------------------------------------------------------------- late training

def apfl_late(experiment: Experiment, server: dict, after: Mapping, *, local_epochs: int,
              batch_size: int) -> dict[int, State]:
    """Clients without an upload train now: dropouts localise the global model (Eq. 12), theta_k^l.

    A client whose first work is under way when an asynchronous run ends has taken part: it ends
    that work, and what comes out is its theta_k.
    """
    flights = server.get("flights", {})
    tasks = [Task(client, 1, flights[client.id]["received"]) if client.id in flights else
             Task(client, 0, server["weights"][client.arch])
             for client in experiment.clients if client.id not in server["teachers"]]
    return train_late(experiment, tasks, local_epochs=local_epochs, batch_size=batch_size)


# ---------------------------------------------------------------------------------- memorisation

def apfl_memorise(server: dict, generator: SemanticGenerator, build: Callable[[State], nn.Module],
                  rng: torch.Generator, *, generator_steps: int, generator_batch: int,
                  balance: float = BALANCE, teacher: str = TEACHER, distance: str = DISTANCE,
                  of_all: bool = False) -> Iterator[Tensor]:
    """Train the generator under the models' supervision (Eq. 6-9); yields its two losses by step.

    build: makes a network of weights
    teacher: "global", the global model (Abstract, Sec. 3.2), for every class that a client holds
        who took part; or "clients", the last uploads of those clients (S_n, Eq. 6 and 7)
    distance, of_all: see generator.diversity_loss and generator.class_weights
    """
    uploads = [server["teachers"][k] for k in sorted(server["teachers"])]
    states = [upload["weights"] for upload in uploads]
    counts = torch.stack([upload["class_counts"] for upload in uploads])
    states, counts = {"clients": (states, counts), "global": (
        list(server["weights"].values()), counts.sum(dim=0, keepdim=True))}[teacher]
    return train_generator(generator, [build(state) for state in states],
                           class_weights(counts, of_all=of_all), rng,
                           generator_steps=generator_steps, generator_batch=generator_batch,
                           balance=balance, distance=distance)


def apfl_generator(experiment: Experiment, server: dict, after: Mapping, *, noise_dim: int,
                   generator_steps: int, generator_batch: int, balance: float = BALANCE,
                   teacher: str = TEACHER, distance: str = DISTANCE) -> State:
    """The server trains a new generator: its weights, with the semantics in them.

    Raises FloatingPointError if a weight is no longer finite at the end.
    """
    stream, semantics = experiment.stream(0, 0), experiment.semantics
    net = initial_generator(semantics, experiment.shape[0], noise_dim,
                            stream(GENERATOR_WEIGHTS)).to(semantics.device)
    build = partial(experiment.network, experiment.clients[0].arch)
    losses = apfl_memorise(server, net, build, stream(GENERATOR_NOISE),
                           generator_steps=generator_steps, generator_batch=generator_batch,
                           balance=balance, teacher=teacher, distance=distance)
    bar = experiment.watch(losses, "generator", "step", generator_steps)
    for step, losses in enumerate(bar):
        if step % 10 == 0:  # since reading them waits for the device
            bar.set_postfix_str("L_cls {:.3f}, L_diversity {:.3f}".format(*losses.tolist()),
                                refresh=False)
    if not all_finite(net.state_dict()):
        raise FloatingPointError("generator: a weight is not finite any more")
    return copy_state(net)


def sample_sheet(experiment: Experiment, after: Mapping) -> Tensor:
    """Samples of the generator to look at, (classes, SHEET, C, 32, 32) uint8."""
    net = load_generator(after["generator"], experiment.shape[0], experiment.settings["noise_dim"])
    num_classes, (mean, deviation) = len(net.semantics), experiment.statistics
    labels = torch.arange(num_classes, device=mean.device).repeat_interleave(SHEET)
    images = sample(net, labels, experiment.stream(1, 0)(GENERATOR_NOISE)) * deviation + mean
    return images.clamp(0, 255).byte().unflatten(0, (num_classes, SHEET))


# --------------------------------------------------------------------------------- friend models

def friend_label_shares(labels: Tensor, num_classes: int, friend_labels: str) -> Tensor:
    """What share of the synthetic samples each class gets, (classes,).

    labels: the client's own training labels
    friend_labels: "all", every class alike, or "local", the client's distribution P_k (Sec. 3.2)
    """
    if friend_labels == "all":
        return torch.full((num_classes,), 1 / num_classes)
    return labels.bincount(minlength=num_classes) / len(labels)


def apfl_friend_update(model: nn.Module, optimizer: Optimizer,
                       received: tuple[State, SemanticGenerator], data: ClientData, stream: Stream,
                       *, friend_epochs: int, batch_size: int,
                       synthetic_per_class: int = SYNTHETIC_PER_CLASS,
                       friend_labels: str = FRIEND_LABELS) -> Result:
    """Train the global model on synthetic samples alone: the friend model, which stays here.

    received: global weights and the generator
    synthetic_per_class: on average over all classes; how they are divided among the classes,
        friend_labels says
    Of the client's own data only the labels are read.
    """
    weights, generator = received
    num_classes = len(generator.semantics)
    own_labels = data.labels[data.indices]
    shares = friend_label_shares(own_labels, num_classes, friend_labels)
    rng = stream(SYNTHETIC)
    y = torch.multinomial(shares.cpu(), synthetic_per_class * num_classes, replacement=True,
                          generator=rng).to(own_labels.device)
    synthetic = ClientData(sample(generator, y, rng), y, torch.arange(len(y), device=y.device),
                           prepare=lambda x: x)
    streams = {BATCHES: FRIEND_BATCHES}
    result = fedavg_client_update(model, optimizer, weights, synthetic,
                                  lambda purpose: stream(streams[purpose]),
                                  local_epochs=friend_epochs, batch_size=batch_size)
    return result._replace(update=Update({}, 0), kept=result.update.weights)


def apfl_friends(experiment: Experiment, server: dict, after: Mapping, *, noise_dim: int,
                 friend_epochs: int, batch_size: int, synthetic_per_class: int,
                 friend_labels: str) -> dict[int, State]:
    """Every client trains its friend model: theta_k^f by client."""
    net = load_generator(after["generator"], experiment.shape[0], noise_dim)
    update = partial(apfl_friend_update, friend_epochs=friend_epochs, batch_size=batch_size,
                     synthetic_per_class=synthetic_per_class, friend_labels=friend_labels)
    tasks = [Task(client, 0, (server["weights"][client.arch], net))
             for client in experiment.clients]
    results = experiment.train(update, tasks, "friend models")
    return {k: result.kept for k, result in results.items()}


# ----------------------------------------------------------------------- decoupled interpolation

def personalise(own: State, friend: State, *, beta: float, beta_on: str = "client") -> State:
    """theta_k^p = beta theta_k + (1 - beta) theta_k^f, Eq. 10 and 12.

    own: theta_k, or for a client that never took part theta_k^l
    beta_on: "client", the equation as printed, or "friend", as the sentence below it has it: beta
        is the weight of the friend model
    """
    start, end = (friend, own) if beta_on == "client" else (own, friend)
    return interpolate(start, end, beta)


def final_models(method: Method, server: dict,
                 after: Mapping) -> dict[str, dict[int, State]]:
    """After the stages, by client: its own model and, of AP-FL, its friend and personalised one.

    The last of them is the one that it uses.  Its own is its last upload, or what it trained late.
    """
    own = {k: teacher["weights"] for k, teacher in server.get("teachers", {}).items()}
    kinds = {"client": dict(sorted((own | after["late"]).items()))}
    if "friends" in after:
        kinds |= {"friend": after["friends"], "personalised": {
            k: method.personalise(weights, after["friends"][k])
            for k, weights in kinds["client"].items()}}
    return kinds


def stage_traffic(experiment: Experiment, server: dict, after: Mapping) -> float:
    """Megabytes that the stages send: to a client the global weights, and the generator."""
    friends = after.get("friends", {})
    total = sum(num_bytes(server["weights"][experiment.clients[k].arch])
                for k in after.get("late", {}).keys() | friends.keys())
    return (total + len(friends) * num_bytes(after.get("generator", {}))) / 1e6


# ------------------------------------------------------------- accuracies, of dropout clients apart

def accuracies(experiment: Experiment, right: Mapping[int, Tensor]) -> dict:
    """Accuracies in percent over all clients, and of dropout clients; see share_accuracies."""
    entry = share_accuracies(right, experiment.test_shares)
    if experiment.dropouts:
        of_dropouts = {k: right[k] for k in experiment.dropouts}
        own = share_accuracies(of_dropouts, experiment.test_shares)
        entry |= {f"dropout_{name}": value for name, value in own.items()}
        entry |= zero_shot_accuracies(torch.stack(list(of_dropouts.values())),
                                      experiment.data.y_test, experiment.seen, experiment.unseen)
    return entry


def zero_shot_accuracies(right: Tensor, labels: Tensor, seen: Sequence[int],
                         unseen: Sequence[int]) -> dict[str, float]:
    """Accuracies as in generalised zero-shot learning, in percent; predictions are of all classes.

    right: (clients, N) bool, which test images a client's model gets right;  labels: (N,)
    Means over the classes that rounds have seen, over the others, and their harmonic mean.
    """
    def mean_of_classes(classes: Sequence[int]) -> float:
        each = [right[:, labels == label].double().mean() for label in classes
                if (labels == label).any()]
        return 100 * float(sum(each) / max(1, len(each)))

    of_seen, of_unseen = mean_of_classes(seen), mean_of_classes(unseen)
    return {"seen_accuracy": of_seen, "unseen_accuracy": of_unseen,
            "harmonic_accuracy": 2 * of_seen * of_unseen / max(1e-9, of_seen + of_unseen)}


def group_accuracies(experiment: Experiment, right: Mapping[int, Tensor]) -> dict:
    """(Whose, which) -> accuracy: of the clients that take part, "", and of "dropout" clients."""
    groups = {"": experiment.available, "dropout": experiment.dropouts}
    return {(group, name): value for group, ids in groups.items() if ids for name, value in
            share_accuracies({k: right[k] for k in ids}, experiment.test_shares).items()}


def final_line(experiment: Experiment, line: dict, server: dict, after: Mapping) -> dict:
    """The last line of the log, with the accuracies of the models that clients use in the end.

    AP-FL adds those of every kind of model.
    """
    sent = stage_traffic(experiment, server, after)
    kinds = final_models(experiment.method, server, after)
    entry = {**line, "download_mb": line["download_mb"] + sent}
    for kind, by_client in experiment.watch(kinds.items(), "evaluation", "kind"):
        in_use = ((k, client.arch, k, by_client[k]) for k, client in enumerate(experiment.clients))
        right = predicted_right(experiment, in_use)
        entry |= accuracies(experiment, right)  # the last kind is the one in use
        if len(kinds) > 1:
            for (group, name), value in group_accuracies(experiment, right).items():
                entry["_".join(filter(None, (group, kind, name)))] = value
    return entry | {f"global_{name}": line[name] for name in ("accuracy", "personal_accuracy")}


def beta_curves(experiment: Experiment, server: dict, after: Mapping,
                betas: Sequence[float]) -> dict[tuple[str, str], list[float]]:
    """(Whose, which) -> accuracy of interpolated models, beta by beta; see group_accuracies.

    On BETA_TEST_IMAGES evenly spaced test images.
    """
    data, shares = experiment.data, experiment.test_shares
    rows = torch.linspace(0, len(data.y_test) - 1, min(BETA_TEST_IMAGES, len(data.y_test))).long()
    rows = rows.to(data.y_test.device)
    few = experiment._replace(
        data=data._replace(x_test=data.x_test[rows], y_test=data.y_test[rows]),
        test_shares=[torch.isin(rows, share).nonzero().flatten() for share in shares])
    own, curves = final_models(experiment.method, server, after)["client"], {}
    for beta in experiment.watch(betas, "beta curve", "beta"):
        in_use = ((k, few.clients[k].arch, k, personalise(weights, after["friends"][k], beta=beta))
                  for k, weights in own.items())
        for key, value in group_accuracies(few, predicted_right(few, in_use)).items():
            curves.setdefault(key, []).append(value)
    return curves


# ------------------------------------------------------------------------------- method and flags

METHODS = {"apfl": FEDAVG._replace(
    paper="AP-FL", sends="weights, class counts", keeps="its models, at the end", init=apfl_init,
    client_update=apfl_client_update, server_update=apfl_server_update, personalise=personalise,
    stages={"late": apfl_late, "generator": apfl_generator, "friends": apfl_friends},
    networks="cnn, one ResNet", defaults=FEDAVG.defaults | APFL_SETTINGS | {
        "beta": None, "beta_on": "client", "lambda": BALANCE,
        "semantics": By("dataset", {"digits": "segments", "svhn": "segments"}, "clip"),
        "word_vectors": None, "teacher": TEACHER, "distance": DISTANCE,
        "friend_labels": FRIEND_LABELS, "noise_dim": NOISE_DIM,
        "synthetic_per_class": By("setting", {"quick": 50}, SYNTHETIC_PER_CLASS),
        "generator_steps": By("setting", {"quick": 40}, GENERATOR_STEPS),
        "generator_batch": By("setting", {"quick": 10}, GENERATOR_BATCH),
        "friend_epochs": By("setting", {"quick": 5}, FRIEND_EPOCHS)})}

FLAGS = [
    Flag("beta", float, "weight of the client's model in the interpolation, Eq. 10 and 12; "
         f"{BETA_COLOUR} for colour images, else {BETA_GRAY}", low=0, high=1),
    Flag("beta_on", str, "whose weight beta is: as Eq. 10 is printed, or as its next sentence says",
         choices=("client", "friend")),
    Flag("lambda", float, "weight of L_cls against L_diversity, Eq. 9", low=0, high=1),
    Flag("semantics", str, "A(y), Eq. 11: an encoder's, or classes and embeddings of an .npz",
         choices=SEMANTICS, file=".npz"),
    Flag("word_vectors", str, "of --semantics word2vec: a text file, a word and its numbers a line",
         file=".txt", when={"semantics": ["word2vec"]}),
    Flag("teacher", str, "who supervises the generator: the global model (Abstract, Sec. 3.2), or "
         "the clients' (Eq. 6)", choices=("global", "clients")),
    Flag("distance", str, "between samples in Eq. 8: a pixel's root mean square, or L2 as printed",
         choices=("rms", "l2")),
    Flag("friend_labels", str, "labels of synthetic samples: every class alike, or as the client's "
         "own are distributed (Sec. 3.2)", choices=("all", "local")),
    Flag("noise_dim", int, "length of z, Fig. 5", low=1),
    Flag("synthetic_per_class", int, "samples of a friend model, a class on average", low=1),
    Flag("generator_steps", int, "steps of generator training (not stated)", low=1),
    Flag("generator_batch", int, "n_s, samples of each class in such a step: 600", low=2),
    Flag("friend_epochs", int, "epochs of a friend model (Sec. 4.1: 20 local epochs)", low=1),
]

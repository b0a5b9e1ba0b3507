"""AP-FL: asynchronous personalised federated learning through global memorisation.

Wan et al., Asynchronous Personalized Federated Learning through Global Memorization.  Equation and
section numbers below are this paper's.  APFL of Deng et al. (Adaptive Personalized Federated
Learning, arxiv.org/abs/2003.13461) is another method.

In reading order, which is the order of a run: federated training of the global model, in rounds or
with updates mixed in as they arrive; after the last round late training (of clients that dropped
out), memorisation (the server trains the generator of generator.py), friend models (each client
trains one on synthetic samples), and decoupled interpolation of friend and own model.

symbol       name                  meaning
theta*       server["weights"]     the global model
theta_k      server["teachers"]    last upload of client k, which keeps a copy
theta_k^l    done["late"]          the localised global model of a client without an upload
theta_k^f    friend                its friend model
theta_k^p    personalise(...)      its personalised model
S_n, S_d                           clients that take part, and those that dropped out before round 1
"""

import heapq
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import pictures
from baselines import (APFL_SETTING, FEDAVG, QUICK_APFL, fedavg_client_update, fedavg_init,
                       fedavg_server_update, train_late, with_class_counts)
from ccvr import CALIBRATION_EPOCHS, VIRTUAL_PER_CLASS, ccvr_finish
from data import (BATCHES, FRIEND_BATCHES, GENERATOR_NOISE, GENERATOR_WEIGHTS, SYNTHETIC,
                  ClientData, Stream, samples_per_epoch, streams)
from evaluation import group_accuracies, predicted_right
from federation import (SPEED_SPREAD, Ending, Experiment, LabelledUpdate, Result, Task, Update,
                        traffic, train_clients, train_server)
from generator import (BALANCE, DISTANCE, NOISE_DIM, SemanticGenerator, class_weights,
                       initial_generator, load_generator, sample, train_generator)
from models import MODELS, State, average, copy_state, interpolate, num_bytes
from semantics import SEMANTICS, load_semantics

TEACHER, FRIEND_LABELS = "global", "all"  # readings of Sec. 3.2, see PAPERS.md
FRIEND = "synthetic"  # the paper's
SYNTHETIC_PER_CLASS = 600  # AP-FL Sec. 4.1
GENERATOR_STEPS = 1000  # not given in the paper
GENERATOR_BATCH = 16  # n_s, samples per class in a step; 600 are fed in Sec. 4.1
FRIEND_EPOCHS = 20  # Sec. 4.1, "20 local training epochs"
BETA_COLOUR, BETA_GRAY = 0.01, 0.1  # beta, Sec. 4.1: CIFAR, and EMNIST and Fashion-MNIST
MIXING = 0.6  # alpha of Xie et al., Asynchronous Federated Optimization, arxiv.org/abs/1903.03934
SHEET = 10  # samples per class in samples.png
BETAS = [step / 10 for step in range(11)]  # values of beta in beta.png
BETA_TEST_IMAGES = 2000  # test images behind beta.png


# ------------------------------------------------------ federated training of the global model

def apfl_init(weights: dict[str, State], *, class_names: Sequence[str], dataset: str,
              semantics: str | None = None, data_dir: str = "",
              word_vectors: str | None = None) -> dict:
    """Server state: global weights, each client's last upload theta_k, and A(y) of Eq. 11.

    Uploads are called teachers, their role in Eq. 6.  A(y) is loaded here, so that missing
    embeddings are an error before the rounds and not after them; see semantics.load_semantics.
    semantics: None if there is to be no generator
    """
    server = {**fedavg_init(weights), "teachers": {}}
    if semantics is None:
        return server
    return server | {"semantics": load_semantics(
        class_names, semantics=semantics, dataset=dataset, data_dir=data_dir,
        word_vectors=word_vectors)}


def apfl_client_update(model: nn.Module, optimizer: Optimizer, received: State, data: ClientData,
                       stream: Stream, *, local_epochs: int, batch_size: int) -> Result:
    """FedAvg's update; the upload also has the client's class counts."""
    result = fedavg_client_update(model, optimizer, received, data, stream,
                                  local_epochs=local_epochs, batch_size=batch_size)
    return with_class_counts(result, data)


def apfl_server_update(server: dict, updates: Mapping[int, LabelledUpdate], *,
                       aggregation: str = "layerwise", rule: Callable = average) -> dict:
    """FedAvg's average; each upload is kept until the client's next one."""
    server = fedavg_server_update(server, updates, aggregation=aggregation, rule=rule)
    uploads = {k: {"weights": update.weights, "class_counts": update.class_counts}
               for k, update in updates.items()}
    return {**server, "teachers": server["teachers"] | uploads}


# -------------------------------------------------------------------- asynchronous aggregation

class Flight(NamedTuple):
    """Work of a client that is under way."""

    received: State
    version: int  # the server's version at departure
    work: int  # 1 for the client's first piece of work, 2 for the second, ...
    arrival: float  # virtual time


def staleness_weight(staleness: int, kind: str, *, exponent: float = 0.5, slope: float = 10.0,
                     patience: int = 4) -> float:
    """s(d), weight of an update that is d updates of the server behind; s(0) = 1.

    constant: 1;  polynomial: (d + 1)^-exponent;  hinge: 1 up to patience, then
    1 / (slope (d - patience) + 1).  Source: Xie et al., Asynchronous Federated Optimization,
    arxiv.org/abs/1903.03934, Sec. 5.2 (AP-FL gives no rule).
    """
    hinge = 1 / (slope * max(0, staleness - patience) + 1)
    return {"constant": 1.0, "polynomial": (staleness + 1) ** -exponent, "hinge": hinge}[kind]


def mix(old: State, uploads: Mapping[int, State], counts: Mapping[int, int], *,
        share: float) -> State:
    """(1 - share) x + share x_k: mix the one upload x_k into the global weights x.

    share: mixing weight times s(staleness);  counts: not read
    """
    (upload,) = uploads.values()
    return interpolate(old, upload, share)


def next_arrivals(arrivals: Mapping[int, float], durations: Mapping[int, float],
                  count: int) -> list[tuple[float, int]]:
    """Find the next count events (time, client), if each client starts anew as soon as it arrives.

    arrivals: client -> virtual time at which its work under way arrives
    durations: client -> virtual time of a piece of its work, above 0
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


def depart(experiment: Experiment, server: dict, k: int, work: int, arrival: float) -> Flight:
    """Let client k download the global model and begin a piece of work."""
    stream = streams(experiment.settings["seed"], work, k)
    received = experiment.method.download(server, experiment.clients[k], stream)
    return Flight(received, server["version"], work, arrival)


def asynchronous_round(experiment: Experiment, server: dict, *, local_epochs: int, batch_size: int,
                       mixing: float, staleness: str) -> tuple[dict, dict]:
    """Mix in as many arrivals as clients take part, each as it arrives (Sec. 3.2).

    Every client works on the model that it received when its last update arrived.  Returns the new
    server state, with all work under way in "flights", and the round's figures for the log.
    """
    method, clients = experiment.method, experiment.clients
    server = {"version": 0, "time": 0.0, **server}
    started = server["time"]

    # Every piece of work takes a known time, so the order of arrivals is known before.
    durations = {k: local_epochs / experiment.speeds[k] * samples_per_epoch(
        len(clients[k].indices), batch_size) for k in experiment.available}
    if "flights" in server:
        flights = {k: Flight(**flight) for k, flight in server["flights"].items()}
    else:
        flights = {k: depart(experiment, server, k, 1, durations[k]) for k in durations}
    events = next_arrivals({k: flight.arrival for k, flight in flights.items()}, durations,
                           len(durations))
    left = Counter(k for _, k in events)

    results, landed, behind = {}, [], []
    for now, k in events:
        # All work that has begun and arrives in this round is trained together.
        if k not in results:
            begun = [j for j in left if left[j] > 0 and j not in results]
            results |= train_clients(experiment, method.client_update, [
                Task(clients[j], flights[j].work, flights[j].received) for j in begun])

        # Arrival: the older the client's model, the smaller its share.
        result, flight = results.pop(k), flights[k]
        landed.append((flight.received, result))
        behind.append(server["version"] - flight.version)
        share = mixing * staleness_weight(behind[-1], staleness)
        server = method.server_update(server, {k: result.update}, rule=partial(mix, share=share))
        server = {**server, "version": server["version"] + 1}

        # Departure with the new global model
        flights[k] = depart(experiment, server, k, flight.work + 1, now + durations[k])
        left[k] -= 1

    flying = {k: flight._asdict() for k, flight in flights.items()}
    server = {**server, "flights": flying, "time": now}
    return server, {**traffic(landed), "clock": now - started,
                    "staleness_mean": sum(behind) / len(behind)}


# ---------------------------------------------------------------------------------- late training

def apfl_late(experiment: Experiment, server: dict, *, local_epochs: int,
              batch_size: int) -> dict[int, State]:
    """Localise the global model on clients without an upload (Eq. 12), theta_k^l.

    A client whose first work is under way at the end of an asynchronous run completes theta_k.
    """
    flights, tasks = server.get("flights", {}), []
    for client in experiment.clients:
        if client.id in flights and client.id not in server["teachers"]:
            tasks.append(Task(client, 1, flights[client.id]["received"]))
        elif client.id not in server["teachers"]:
            tasks.append(Task(client, 0, server["weights"][client.arch]))
    return train_late(experiment, tasks, local_epochs=local_epochs, batch_size=batch_size)


# ---------------------------------------------------------------------------------- memorisation

def teachers_of(server: dict, teacher: str) -> tuple[list[State], Tensor]:
    """Weights of the generator's teachers, and their class weights alpha (teachers, classes).

    teacher: "global", the global model for all classes of participants (Abstract, Sec. 3.2), or
        "clients", the participants' last uploads (S_n, Eq. 6 and 7)
    """
    uploads = [server["teachers"][k] for k in sorted(server["teachers"])]
    counts = torch.stack([upload["class_counts"] for upload in uploads])
    if teacher == "clients":
        return [upload["weights"] for upload in uploads], class_weights(counts)
    return list(server["weights"].values()), class_weights(counts.sum(dim=0, keepdim=True))


def apfl_generator(experiment: Experiment, server: dict, *, noise_dim: int, generator_steps: int,
                   generator_batch: int, balance: float, teacher: str, distance: str) -> State:
    """Train a new generator under the teachers' supervision (Eq. 6-9); return its weights.

    teacher: see teachers_of;  balance: lambda of Eq. 9;  distance: see generator.diversity_loss
    """
    # The generator and its teachers
    stream = streams(experiment.settings["seed"], 0, 0)
    semantics = server["semantics"]
    net = initial_generator(semantics.cpu(), experiment.data.x_train.shape[1], noise_dim,
                            stream(GENERATOR_WEIGHTS)).to(semantics.device)
    states, alpha = teachers_of(server, teacher)
    teachers = [experiment.network(experiment.clients[0].arch, state) for state in states]

    # Training with a progress bar
    bar = pictures.progress_bar(None, "generator", "step", generator_steps)

    def report(losses: Tensor) -> None:
        if bar.n % 10 == 0:  # since reading them waits for the device
            bar.set_postfix_str("L_cls {:.3f}, L_diversity {:.3f}".format(*losses.tolist()),
                                refresh=False)
        bar.update()

    with bar:
        train_generator(net, teachers, alpha, stream(GENERATOR_NOISE), report=report,
                        generator_steps=generator_steps, generator_batch=generator_batch,
                        balance=balance, distance=distance)
    return copy_state(net)


def sample_sheet(experiment: Experiment, net: SemanticGenerator) -> Tensor:
    """Samples of the generator to look at, (classes, SHEET, C, 32, 32) uint8."""
    num_classes, (mean, deviation) = len(net.semantics), experiment.statistics
    labels = torch.arange(num_classes, device=mean.device).repeat_interleave(SHEET)
    rng = streams(experiment.settings["seed"], 1, 0)(GENERATOR_NOISE)  # round 0 is training's
    images = sample(net, labels, rng) * deviation + mean
    return images.clamp(0, 255).byte().unflatten(0, (num_classes, SHEET))


# --------------------------------------------------------------------------------- friend models

def friend_label_shares(labels: Tensor, num_classes: int, friend_labels: str) -> Tensor:
    """Share of the synthetic samples for each class, (classes,).

    labels: the client's own training labels
    friend_labels: "all", every class alike, or "local", the client's distribution P_k (Sec. 3.2)
    """
    if friend_labels == "all":
        return torch.full((num_classes,), 1 / num_classes)
    return labels.bincount(minlength=num_classes) / len(labels)


def apfl_friend_update(model: nn.Module, optimizer: Optimizer,
                       received: tuple[State, SemanticGenerator], data: ClientData, stream: Stream,
                       *, friend_epochs: int, batch_size: int, synthetic_per_class: int,
                       friend_labels: str) -> Result:
    """Train the global model on synthetic samples alone: the friend model, which stays here.

    received: global weights and the generator.  Only the labels of the client's data are read
    synthetic_per_class: mean number over all classes; friend_labels gives each class's share
    """
    # Synthetic samples
    weights, generator = received
    num_classes = len(generator.semantics)
    own_labels = data.labels[data.indices]
    shares = friend_label_shares(own_labels, num_classes, friend_labels)
    rng = stream(SYNTHETIC)
    y = torch.multinomial(shares.cpu(), synthetic_per_class * num_classes, replacement=True,
                          generator=rng).to(own_labels.device)
    synthetic = ClientData(sample(generator, y, rng), y, torch.arange(len(y), device=y.device),
                           prepare=lambda x: x)

    # FedAvg's training on them, in another order of batches than the client's own images had
    renamed = {BATCHES: FRIEND_BATCHES}
    result = fedavg_client_update(model, optimizer, weights, synthetic,
                                  lambda purpose: stream(renamed[purpose]),
                                  local_epochs=friend_epochs, batch_size=batch_size)
    return result._replace(update=Update({}, 0), kept=result.update.weights)


# ----------------------------------------------------------------------- decoupled interpolation

def personalise(own: State, friend: State, *, beta: float, beta_on: str = "client") -> State:
    """theta_k^p = beta theta_k + (1 - beta) theta_k^f, Eq. 10 and 12.

    own: theta_k, or for a client that never took part theta_k^l
    beta_on: model weighted by beta, "client" (Eq. 10) or "friend" (the sentence after Eq. 10)
    """
    start, end = (friend, own) if beta_on == "client" else (own, friend)
    return interpolate(start, end, beta)


def final_models(server: dict, done: Mapping, *, beta: float,
                 beta_on: str) -> dict[str, dict[int, State]]:
    """Kind -> client -> weights after all stages.  "client": last upload, or late training."""
    own = {k: upload["weights"] for k, upload in server["teachers"].items()} | done["late"]
    own, friends = dict(sorted(own.items())), done["friends"]
    return {"client": own, "friend": friends, "personalised": {
        k: personalise(state, friends[k], beta=beta, beta_on=beta_on) for k, state in own.items()}}


def beta_curves(experiment: Experiment, own: Mapping[int, State],
                friends: Mapping[int, State]) -> dict[tuple[str, str], list[float]]:
    """(group, name) -> accuracy of interpolated models on some test images, per value of BETAS."""
    # The run on fewer test images, evenly spaced
    data, curves = experiment.data, {}
    rows = torch.linspace(0, len(data.y_test) - 1, min(BETA_TEST_IMAGES, len(data.y_test)))
    rows = rows.long().to(data.y_test.device)
    smaller = experiment._replace(
        data=data._replace(x_test=data.x_test[rows], y_test=data.y_test[rows]),
        test_shares=[torch.isin(rows, share).nonzero().flatten()
                     for share in experiment.test_shares])

    for beta in pictures.progress_bar(BETAS, "beta curve", "beta"):
        in_use = ((k, smaller.clients[k].arch, k, personalise(weights, friends[k], beta=beta))
                  for k, weights in own.items())
        right = predicted_right(smaller, in_use)
        for key, value in group_accuracies(smaller, right).items():
            curves.setdefault(key, []).append(value)
    return curves


# ----------------------------------------------------------------- everything after the last round

def apfl_finish(experiment: Experiment, server: dict, done: dict, save: Callable, *,
                local_epochs: int, batch_size: int, beta: float, beta_on: str,
                friend: str = FRIEND, noise_dim: int = NOISE_DIM,
                generator_steps: int = GENERATOR_STEPS, generator_batch: int = GENERATOR_BATCH,
                balance: float = BALANCE, teacher: str = TEACHER, distance: str = DISTANCE,
                friend_epochs: int = FRIEND_EPOCHS,
                synthetic_per_class: int = SYNTHETIC_PER_CLASS,
                friend_labels: str = FRIEND_LABELS,
                virtual_per_class: int = VIRTUAL_PER_CLASS,
                calibration_epochs: int = CALIBRATION_EPOCHS) -> Ending:
    """Late training, memorisation, friend models, interpolation (Sec. 3.2).

    friend: "synthetic", or "calibrated" for ccvr's global model (not in the paper; no generator)
    done: finished stage -> its outcome;  save(done): stores the outcomes and returns done
    """
    # Localised models of clients that never took part
    if "late" not in done:
        late = apfl_late(experiment, server, local_epochs=local_epochs, batch_size=batch_size)
        done = save(done | {"late": late})

    # Friend models without a generator: one for all
    num_clients, (weights,) = len(experiment.clients), server["weights"].values()
    if friend == "calibrated":
        ending = ccvr_finish(experiment, server, done, save, virtual_per_class=virtual_per_class,
                             calibration_epochs=calibration_epochs)
        kinds = final_models(server, done | {"friends": ending.models["client"]}, beta=beta,
                             beta_on=beta_on)
        return ending._replace(models=kinds)

    # Global memorisation
    if "generator" not in done:
        train = partial(apfl_generator, experiment, server, noise_dim=noise_dim,
                        generator_steps=generator_steps, generator_batch=generator_batch,
                        balance=balance, teacher=teacher, distance=distance)
        done = save(done | {"generator": train_server(experiment, train)})
    net = load_generator(done["generator"], experiment.data.x_train.shape[1], noise_dim)

    # Friend models
    if "friends" not in done:
        update = partial(apfl_friend_update, friend_epochs=friend_epochs, batch_size=batch_size,
                         synthetic_per_class=synthetic_per_class, friend_labels=friend_labels)
        tasks = [Task(client, 0, (server["weights"][client.arch], net))
                 for client in experiment.clients]
        count = synthetic_per_class * len(net.semantics)
        print(f"each friend model trains on {count:,} synthetic images, which it samples first")
        results = train_clients(experiment, update, tasks, "friend models")
        done = save(done | {"friends": {k: result.kept for k, result in results.items()}})

    # Decoupled interpolation.  Every client has downloaded the global weights and the generator.
    kinds = final_models(server, done, beta=beta, beta_on=beta_on)
    download = num_clients * (num_bytes(weights) + num_bytes(done["generator"]))
    curves = beta_curves(experiment, kinds["client"], kinds["friend"])
    return Ending(kinds, download, apfl_pictures(experiment, server, net, curves,
                                                 beta if beta_on == "client" else 1 - beta))


def apfl_pictures(experiment: Experiment, server: dict, net: SemanticGenerator, curves: Mapping,
                  used: float) -> dict[str, Callable]:
    """File name -> function that draws it: samples of the generator, accuracy against beta.

    used: weight of the client model in this run
    """
    counts = sum(upload["class_counts"] for upload in server["teachers"].values())
    name = Path(experiment.settings["dataset"]).stem
    return {"samples.png": partial(pictures.draw_samples, seen=(counts > 0).tolist(),
                                   images=sample_sheet(experiment, net).cpu(),
                                   names=experiment.data.classes,
                                   title=f"synthetic samples, {name}"),
            "beta.png": partial(pictures.draw_beta, betas=BETAS, curves=curves, used=used,
                                title=f"apfl on {name}")}


# ------------------------------------------------------------------------------- method and flags

# A client sends weights and class counts, and keeps its models in the end.
METHODS = {"apfl": FEDAVG._replace(
    init=apfl_init, client_update=apfl_client_update, server_update=apfl_server_update,
    finish=apfl_finish, networks={name: net for name, net in MODELS.items() if len(net) == 1},
    defaults=FEDAVG.defaults | APFL_SETTING | {
        "beta": None, "beta_on": "client", "lambda": BALANCE, "semantics": None,
        "word_vectors": None, "teacher": TEACHER, "distance": DISTANCE,
        "friend_labels": FRIEND_LABELS, "noise_dim": NOISE_DIM, "friend": FRIEND,
        "virtual_per_class": VIRTUAL_PER_CLASS, "calibration_epochs": CALIBRATION_EPOCHS,
        "synthetic_per_class": SYNTHETIC_PER_CLASS, "generator_steps": GENERATOR_STEPS,
        "generator_batch": GENERATOR_BATCH, "friend_epochs": FRIEND_EPOCHS},
    in_setting={"quick": QUICK_APFL | {"synthetic_per_class": 50, "generator_steps": 40,
                                       "generator_batch": 10, "friend_epochs": 5}})}


def add_arguments(add: Callable, number: Callable) -> None:
    """Add AP-FL's own flags; see run.parser for add and number."""
    # Asynchronous aggregation
    add("--mixing", type=number(float, 0, 1), help="async: mixing weight of a fresh update "
        f"(default: {MIXING}, not given in the paper)")
    add("--staleness", choices=["constant", "polynomial", "hinge"], help="async: decrease of the "
        "mixing weight with staleness (default: polynomial, not given in the paper)")
    add("--speed-spread", type=number(float, 1), help="async: speed ratio of the fastest to the "
        f"slowest client (default: {SPEED_SPREAD:g}, not given in the paper)")

    # Interpolation
    add("--beta", type=number(float, 0, 1), help="weight of the client's model, Eq. 10 and 12 "
        f"(default: {BETA_COLOUR} for colour images, else {BETA_GRAY})")
    add("--beta-on", choices=["client", "friend"], help="model weighted by beta (Eq. 10: client, "
        "default; the sentence after it: friend)")

    # Generator and friend models
    add("--lambda", type=number(float, 0, 1), help="weight of L_cls against L_diversity, Eq. 9 "
        f"(default: {BALANCE})")
    add("--semantics", metavar=f"{{{','.join(SEMANTICS)}}}|FILE.npz", help="A(y), Eq. 11 (default: "
        "segments for digits and svhn, else clip)")
    add("--word-vectors", metavar="FILE.txt", help="text file for --semantics word2vec: a word and "
        "its numbers per line")
    add("--teacher", choices=["global", "clients"], help="models that supervise the generator "
        "(Abstract, Sec. 3.2: global, default; Eq. 6: clients)")
    add("--distance", choices=["rms", "l2"], help="distance between samples in Eq. 8: a pixel's "
        "root mean square (default), or L2 as printed")
    add("--friend", choices=["synthetic", "calibrated"], help="friend models: trained on synthetic "
        "samples (default), or the global model with ccvr's last layer (not in the paper)")
    add("--friend-labels", choices=["all", "local"], help="labels of synthetic samples: all "
        "classes alike (default), or the client's own distribution (Sec. 3.2)")
    add("--noise-dim", type=number(int, 1), help=f"length of z, Fig. 5 (default: {NOISE_DIM})")
    add("--synthetic-per-class", type=number(int, 1), help="samples per class of a friend model, "
        f"on average (default: {SYNTHETIC_PER_CLASS}; quick: 50)")
    add("--generator-steps", type=number(int, 1), help="steps of generator training, not given in "
        f"the paper (default: {GENERATOR_STEPS}; quick: 40)")
    add("--generator-batch", type=number(int, 2), help="n_s, samples per class in such a step "
        f"(default: {GENERATOR_BATCH}; quick: 10; Sec. 4.1: 600)")
    add("--friend-epochs", type=number(int, 1), help="epochs of a friend model (default: "
        f"{FRIEND_EPOCHS}, Sec. 4.1; quick: 5)")

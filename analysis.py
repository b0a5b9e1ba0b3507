"""Analyses of the papers, and questions to a finished run.

In reading order: how alike networks see images (linear CKA, t-SNE; FedIN, Sec. 5.3); an attack on
the features that a client sends (FedIN, Sec. 4.3 and 5.5); cost of a method (FedIN, Table 4);
curves over rounds (FedIN, Table 1 and Fig. 5).  These are functions of tensors and numbers, and
each can be copied alone.  Then the questions: a run's trained networks; its clients after one more
round, before any average; an attack on its features; the figures of several runs (report.py).
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from itertools import accumulate, combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import apfl
import data
import evaluation
import fedin
import files
import models
import pictures
import run
import widths
from federation import Client, Experiment, train_clients
from models import State

# --------------------------------------------------------------------------- similarity of networks

def stage_features(net: nn.Module, batches: Iterable[Tensor]) -> list[Tensor]:
    """Outputs of each stage of a ResNet, averaged over the map: stage -> (N, width).

    net: in evaluation mode;  batches: inputs of the network, (B, C, H, W)
    Stages count from 0, so stage 3 is the deepest (FedIN, Sec. 5.3).  Averages have few features
    against the number of images, as linear CKA needs.
    """
    by_batch = []
    with torch.inference_mode():
        for x in batches:
            outputs = [net.extractor(x)]
            for stage in net.intermediate.children():
                outputs.append(stage(outputs[-1]))
            by_batch.append([output.mean(dim=(2, 3)) for output in outputs[1:]])
    return [torch.cat(parts).cpu() for parts in zip(*by_batch)]


def cka_map(representations: Sequence[Tensor], *, unbiased: bool = False) -> Tensor:
    """Linear CKA of each with each, HSIC(x, y) / sqrt(HSIC(x, x) HSIC(y, y)): (K, K).

    It is 1 for representations that are equal up to rotation, reflection, scale and shift, and 0
    for one that is constant.
    representations: (N, p_k) per client, of the same N images;  unbiased: see hsic
    Source: Kornblith et al. 2019, arxiv.org/abs/1905.00414, Sec. 3; FedIN, Fig. 7.
    """
    centred = [x.double() - x.double().mean(dim=0) for x in representations]
    pairs = torch.zeros(len(centred), len(centred), dtype=torch.float64)
    for i, x in enumerate(centred):
        for j in range(i + 1):
            pairs[i, j] = pairs[j, i] = hsic(x, centred[j], unbiased=unbiased)
    with_itself = pairs.diagonal()
    return pairs / (with_itself[:, None] * with_itself).sqrt().clamp(min=1e-300)


def hsic(x: Tensor, y: Tensor, *, unbiased: bool) -> Tensor:
    """HSIC of linear kernels, without a factor that CKA cancels: ||y^T x||^2, Frobenius norm.

    x: (N, p), y: (N, q), both with columns of mean 0.  If they are independent, of p = q features,
        biased CKA is near p / (N + p) and unbiased CKA near 0 (FedIN names neither)
    unbiased: (tr(KL) + 1'K1 1'L1 / ((N-1)(N-2)) - 2/(N-2) 1'KL1) / (N (N-3)), where K and L are
        x x^T and y y^T with zeros on their diagonals, N > 3 (Song et al. 2012, Feature Selection
        via Dependence Maximization, Eq. 5)
    """
    n, total = len(x), (y.T @ x).square().sum()
    if not unbiased:
        return total

    # Rows of centred kernels add up to 0, and rows of K and L to minus the missing diagonals.
    # So nothing of N x N numbers is left in the formula.
    diagonal_x, diagonal_y = x.square().sum(dim=1), y.square().sum(dim=1)
    total = (total + diagonal_x.sum() * diagonal_y.sum() / ((n - 1) * (n - 2))
             - n / (n - 2) * (diagonal_x @ diagonal_y))
    return total / (n * (n - 3))


def mean_similarity(similar: Tensor) -> float:
    """Mean of a map (K, K) over pairs of different clients: FedIN's Fig. 6a and 6b."""
    return float(similar[~torch.eye(len(similar), dtype=torch.bool)].mean())


def tsne(features: Mapping[str, Tensor], *, perplexity: float = 30.0) -> dict[str, Tensor]:
    """Points in the plane (N, 2) per set of features (N, p), by one t-SNE of all sets together.

    scikit-learn's t-SNE (van der Maaten & Hinton 2008) of standardised features, begun with their
    principal components.  Its settings are not given in the papers.
    perplexity: at most a third of the number of points, which replaces a larger one
    Features that are all equal, as those of dead networks, lie in the origin.
    Raises ValueError for features that are not finite.
    """
    from sklearn.manifold import TSNE

    x = standardised(torch.cat(list(features.values())))
    if not x.isfinite().all():
        raise ValueError("features hold NaN or infinite values: has the run diverged?")
    if not x.any():  # scikit-learn's process would end by a segmentation fault
        return {name: torch.zeros(len(part), 2) for name, part in features.items()}
    fit = TSNE(perplexity=min(perplexity, (len(x) - 1) / 3), init="pca", random_state=0)
    points = torch.from_numpy(fit.fit_transform(x.numpy()))
    return dict(zip(features, points.split([len(part) for part in features.values()])))


def own_neighbours(features: Mapping[str, Tensor]) -> float:
    """Share of features (N, p) whose nearest neighbour among all sets is of their own set.

    1 for sets that lie apart, about 1 / K for K equal clouds.  Sets hold equal images in equal
    order.  An image is not compared with itself in another set, which would be nearest just where
    networks agree.  Distances are of standardised features, as for t-SNE.
    """
    x = standardised(torch.cat(list(features.values())))
    owner = torch.arange(len(features)).repeat_interleave(len(x) // len(features))
    image = torch.arange(len(x) // len(features)).repeat(len(features))
    distance = torch.cdist(x, x).masked_fill(image[:, None] == image, torch.inf)
    return float((owner[distance.argmin(dim=1)] == owner).double().mean())


def standardised(features: Tensor) -> Tensor:
    """Features (N, p) scaled to mean 0 and standard deviation 1 each."""
    x = features.double()
    return (x - x.mean(dim=0)) / x.std(dim=0).clamp(min=1e-12)


# ----------------------------------------------------------------------- an attack on sent features

def reconstruct(extractor: nn.Module, s_in: Tensor, shape: Sequence[int], rng: torch.Generator, *,
                steps: int, lr: float = 0.1) -> tuple[Tensor, list[float]]:
    """Find images with the features that a client sent: min over x of MSE(extractor(x), s_in).

    shape: of x, (N, C, H, W), which begins as noise
    steps, lr: of Adam, with cosine decay (not given in the paper)
    The extractor is frozen, and in evaluation mode as the client's was for s_in (FedIN, Sec. 4.3).
    Returns the images, as the network's input, and the loss before every step.
    """
    x = torch.randn(*shape, generator=rng).to(s_in.device).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        loss = F.mse_loss(extractor(x), s_in)
        losses.append(loss.detach())
        # Gradients of x alone, none of the extractor's weights
        x.grad, = torch.autograd.grad(loss, x)
        optimizer.step()
        schedule.step()
    return x.detach(), torch.stack(losses).tolist()


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio per image in dB, 10 log10(1 / MSE), for values from 0 to 1."""
    return 10 * torch.log10(1 / (images.double() - truth.double()).square().mean(dim=(1, 2, 3)))


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity per image (N, C, H, W), values being from 0 to 1: (N,), at most 1.

    Moments are under a Gaussian window of 11 pixels and standard deviation 1.5, constants 0.01^2
    and 0.03^2.  Similarities of all whole windows and channels are averaged.
    Source: Wang et al. 2004, Image Quality Assessment: From Error Visibility to Structural
    Similarity.
    """
    # Gaussian window
    x, y = images.double(), truth.double()
    line = torch.exp(-torch.arange(-5, 6, dtype=torch.float64, device=x.device) ** 2 / (2 * 1.5**2))
    window = torch.outer(line, line) / line.sum() ** 2
    channels = x.shape[1]
    local_mean = partial(F.conv2d, weight=window.expand(channels, 1, 11, 11), groups=channels)

    # Local moments
    mean_x, mean_y = local_mean(x), local_mean(y)
    variance_x, variance_y = local_mean(x * x) - mean_x**2, local_mean(y * y) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y

    # Similarity per window
    c1, c2 = 0.01**2, 0.03**2
    similar = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)
               / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)))
    return similar.mean(dim=(1, 2, 3))


# --------------------------------------------------------------------------------- cost of a method

def mean_millions(states: Sequence[State], is_counted: Callable[[str], bool],
                  further: int = 0, copies: int = 1) -> float:
    """Millions of numbers that a client sends, mean over networks: FedIN's Table 4, "Params (M)".

    is_counted: name of a weight -> whether it counts;  copies: 2 with control variates
    further: other numbers that a client sends, as features
    """
    sizes = [sum(tensor.numel() for name, tensor in state.items() if is_counted(name))
             for state in states]
    return (copies * sum(sizes) / len(sizes) + further) / 1e6


def memory_mib(states: Iterable[State], copies: int = 1, further: int = 0) -> float:
    """Memory in MiB by the rule that fits FedIN's Table 4, "Memory (MB)": one client per network.

    It is no measurement, since gradients and Adam's state are not in it.
    copies: copies of a network that a method keeps (SCAFFOLD 2, MOON 3)
    further: other numbers of four bytes (FedIN: a batch of features)
    """
    return (copies * models.num_bytes(list(states)) + 4 * further) / 2**20


def costs_by_rule() -> dict[str, tuple[float, float]]:
    """Row of Table 4 -> parameters sent in millions, memory in MiB, for the paper's networks.

    Ten classes, colour images.  A client may send part of a network, but keeps the whole.
    """
    resnets, cut = ([models.shapes(partial(make, 3, 10)) for make in networks.values()]
                    for networks in (models.RESNETS, widths.MODELS["resnet152-widths"]))
    features = {"further": 16 * (64 * 8 * 8 + 512)}  # |S| times the sizes of s_in and s_out
    rules = {"FedAvg": (resnets, {}, {}), "Scaffold": (resnets, {"copies": 2}, {"copies": 2}),
             "MOON": (resnets, {}, {"copies": 3}), "HeteroFL": (cut, {}, {"copies": 2}),
             "FedRolex": (cut, {}, {"copies": 2}), "FedIN": (resnets, features, features)}
    return {row: (mean_millions(networks, models.is_parameter, **upload),
                  memory_mib(networks[-1:] if networks is cut else networks, **memory))
            for row, (networks, upload, memory) in rules.items()}


# ------------------------------------------------------------------------------- curves over rounds

SMOOTHING = 0.6  # weight of earlier values; not given in the papers


def smoothed(values: Sequence[float], weight: float = SMOOTHING) -> list[float]:
    """Smooth as in FedIN's Fig. 5 and 9: s_1 = v_1, s_t = weight s_(t-1) + (1 - weight) v_t."""
    return list(accumulate(values, lambda before, value: weight * before + (1 - weight) * value))


def rounds_to_target(rounds: Sequence[int], accuracies: Sequence[float],
                     target: float) -> int | None:
    """First round whose accuracy is at least the target, None if there is none (Table 1)."""
    return next((t for t, value in zip(rounds, accuracies) if value >= target), None)


def speed_up(base: float | None, rounds: float | None) -> float | None:
    """Ratio of rounds that a base and a method need; None if one never gets there."""
    return base / rounds if base and rounds else None


def in_order(paper: Sequence[float], ours: Sequence[float]) -> tuple[int, int]:
    """Pairs of methods in the paper's order here, and pairs that differ in the paper.

    paper, ours: one number per method;  a pair that is equal in ours is not in order
    """
    pairs = [(paper[i] - paper[j]) * (ours[i] - ours[j])
             for i in range(len(paper)) for j in range(i) if paper[i] != paper[j]]
    return sum(product > 0 for product in pairs), len(pairs)


# --------------------------------------------------------------------------- numbers over the seeds

Key = tuple[str, str]  # row and column of a table
Values = dict[Key, list]  # a value per seed, None for a seed without one
Papers = Mapping[Key, tuple]  # a paper's number, its standard deviation or None, its text


def mean_and_spread(values: Sequence) -> tuple[Any, float | None]:
    """Mean and standard deviation over the seeds that have a value.  Words stay as they are."""
    present = [value for value in values if value is not None]
    if not present or isinstance(present[0], str):
        return (present[0] if present else None), None
    return statistics.mean(present), statistics.stdev(present) if len(present) > 1 else None


def of_common_seeds(by_key: Mapping[Key, Sequence]) -> dict[Key, Sequence]:
    """Cells with runs (or values), each cut to the seeds that all of them in its column have."""
    fewest: dict[str, int] = {}
    for (_, column), per_seed in by_key.items():
        if per_seed:
            fewest[column] = min(len(per_seed), fewest.get(column, len(per_seed)))
    return {key: per_seed[:fewest[key[1]]] for key, per_seed in by_key.items() if per_seed}


def agreement(values: Values, papers: Papers) -> dict[str, tuple[int, int]]:
    """Column -> number of pairs of rows in the paper's order, number of pairs to compare."""
    columns: dict[str, tuple[int, int]] = {}
    keys = [key for key in values if values[key] and key in papers]
    for pair in combinations(keys, 2):
        column = pair[0][1]
        if pair[1][1] != column:
            continue

        # Means over the seeds of both.  A row that misses a target with one of them comes last
        means, seeds = [], min(len(values[key]) for key in pair)
        for key in pair:
            missed = column.endswith(", round") and None in values[key][:seeds]
            means.append(float("inf") if missed else mean_and_spread(values[key][:seeds])[0])
        printed = [papers[key][0] for key in pair]
        if all(isinstance(number, (int, float)) for number in means + printed):
            counts = columns.get(column, (0, 0)), in_order(printed, means)
            columns[column] = tuple(map(sum, zip(*counts)))
    return {column: counts for column, counts in columns.items() if counts[1]}


# ------------------------------------------------------------------------ trained networks of a run

class TrainedNetwork(nn.Module):
    """A network that takes uint8 images (N, C, 32, 32), as from data.to_images, and gives logits.

    classes: name of each logit
    """

    def __init__(self, net: nn.Module, mean: Sequence[float], deviation: Sequence[float],
                 classes: Sequence[str]):
        super().__init__()
        self.net, self.classes = net, list(classes)
        for name, values in (("mean", mean), ("deviation", deviation)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1))

    def prepare(self, images: Tensor) -> Tensor:
        """Standardise images as in training."""
        return data.standardise(images, self.mean, self.deviation)

    def forward(self, images: Tensor) -> Tensor:
        if not isinstance(images, Tensor):
            raise ValueError(f"images must be a tensor, not {type(images).__name__}: "
                             "torch.from_numpy makes one")
        expected = (len(images), len(self.mean), data.IMAGE_SIZE, data.IMAGE_SIZE)
        if images.dtype != torch.uint8 or images.shape != expected or not len(images):
            raise ValueError(f"images must be uint8 of shape (N, {len(self.mean)}, 32, 32), N > 0, "
                             f"not {images.dtype} of shape {tuple(images.shape)}")
        return models.predict_logits(self.net, images, self.prepare)


def trained_network(folder: str | Path, arch: str | None = None, client: int | None = None, *,
                    dataset: str | Path | None = None,
                    data_dir: str | Path | None = None) -> TrainedNetwork:
    """Load a network that a run has trained.

    arch: the server's network of an architecture, of --model resnet18-widths for instance
        "resnet18-1/4"; None: of the largest
    client: id of a client, for the network that it uses after all stages, in place of the server's
    dataset, data_dir: place of the run's data if they have moved; networks cut by width need them,
        for the statistics of batch normalisation
    Raises ValueError if the folder has no such network.
    """
    # Files
    settings = files.read_config(Path(folder))
    saved = files.load_checkpoint(Path(folder), "cpu")
    constructors = run.METHODS[settings["method"]].networks[settings["model"]]
    arch = chosen_architecture(settings, arch, client)
    weights = saved and weights_in_use(settings, saved, arch, client)
    if weights is None:
        raise ValueError(f"{folder} is not at its end: resume its run by --resume")

    # Network
    known = settings["input"]
    make = partial(constructors[arch], known["channels"], len(known["classes"]))
    trained = TrainedNetwork(models.load_network(make, weights), known["mean"],
                             known["deviation"], known["classes"])

    # Statistics of a network cut by width
    if len(saved.server["weights"]) < len(constructors):
        moved = {"dataset": dataset, "data_dir": data_dir}
        moved = {name: str(value) for name, value in moved.items() if value is not None}
        _, split = run.read_data(settings | moved, download=False)
        participants = [part for k, part in enumerate(split.parts) if k not in split.dropouts]
        models.collect_statistics(trained.net, evaluation.spread_batches(
            split.data.x_train, torch.cat(participants), trained.prepare))
    return trained


def chosen_architecture(settings: dict, arch: str | None, client: int | None) -> str:
    """Architecture of the network that trained_network's arguments choose."""
    method = run.METHODS[settings["method"]]
    architectures = list(method.networks[settings["model"]])
    if client is not None:
        if arch is not None or not 0 <= client < settings["clients"]:
            raise ValueError(f"arch={arch} and client={client} choose no network: pass an "
                             f"architecture alone, or one of {settings['clients']} clients")
        return models.architecture_of(client, settings["clients"], architectures)
    if method.server_update is None:
        raise ValueError("the run has networks of clients alone: pass client=, an id")
    if arch not in (None, *architectures):
        raise ValueError(f"the run has no {arch}: choose one of {', '.join(architectures)}")
    return arch or architectures[-1]


def weights_in_use(settings: dict, saved: files.Progress, arch: str,
                   client: int | None) -> State | None:
    """Weights that a client uses after all stages, or the server's; None if a stage is left."""
    method, done = run.METHODS[settings["method"]], saved.stage_results
    if settings["method"] == "ccvr":  # one network for all
        return done["calibrated"][0] if "calibrated" in done else None
    if client is None or method.finish is None:
        user = Client(client, torch.empty(0, dtype=torch.int64), arch)
        return method.deploy(saved.server, user, saved.memory.get(client))[1]
    if "calibrated" in done:
        weights, _ = done["calibrated"]
        done = done | {"friends": dict.fromkeys(range(settings["clients"]), weights)}
    if "friends" in done:
        kinds = apfl.final_models(saved.server, done, beta=settings["beta"],
                                  beta_on=settings["beta_on"])
        return kinds["personalised"][client]
    return None if settings["method"] == "apfl" else done.get("late", {}).get(client)


# ------------------------------------------------------------------------ clients before an average

def one_more_round(folder: str | Path,
                   **moved: str | Path | None) -> tuple[Experiment, dict[int, Any]]:
    """Train all clients of a finished run for another round, and average nothing.

    moved: dataset=, data_dir= and device=, see run.open_run
    Returns the run's experiment, and each client's upload by its id.  The folder stays as it is.
    Raises ValueError if the folder holds no run, or the run of a method without uploads.
    """
    experiment, progress = run.open_run(folder, **moved)
    if experiment.method.server_update is None:
        raise ValueError(f"clients send nothing in {folder}: choose a run of another --method")
    tasks = run.make_tasks(experiment, progress.round + 1, progress.server, progress.memory,
                           experiment.available)
    results = train_clients(experiment, experiment.method.client_update, tasks)
    return experiment, {k: result.update for k, result in results.items()}


class ClientComparison(NamedTuple):
    """Features of test images by a run's clients, compared after one more round of training."""

    maps: list[Tensor]  # stage -> CKA (K, K), clients by id, which sorts them by network
    unbiased: list[Tensor]  # the maps by the unbiased estimate
    names: list[str]  # id and network of each client
    features: dict[str, Tensor]  # network -> pooled stage 3 features (N, 512) of its first client
    labels: Tensor  # (N,)


def compare_clients(folder: str | Path, *, images: int = 2000,
                    **moved: str | Path | None) -> ClientComparison:
    """Compare the features of a finished run's clients on test images (FedIN, Sec. 5.3).

    Clients are compared after one more round of local training, since an average makes all clients
    of an architecture equal.  The networks have to be ResNets.
    images: number of test images, evenly spaced in the whole test set, not in the run's subset
    moved: dataset=, data_dir= and device=, see run.open_run
    """
    # One more round
    model = files.read_config(Path(folder)).get("model", "")
    if not model.startswith("resnet"):
        raise ValueError(f"{folder} has the network {model!r}: only ResNets have stages")
    experiment, updates = one_more_round(folder, **moved)
    settings = experiment.settings
    dataset = data.load(settings["dataset"], settings.get("data_dir", "data"), download=False)

    # Test images
    rows = torch.linspace(0, len(dataset.y_test) - 1, min(images, len(dataset.y_test))).long()
    x_test = dataset.x_test[rows].to(experiment.data.x_test.device).split(models.TEST_BATCH)

    # Features
    by_client, names, first = [], [], {}
    for k in sorted(updates):
        arch = experiment.clients[k].arch
        net = experiment.network(arch, updates[k].weights).eval()
        by_client.append(stage_features(net, map(experiment.prepare, x_test)))
        names.append(f"{k}: {arch}")
        first.setdefault(arch, by_client[-1][3])

    # CKA
    biased, unbiased = ([cka_map(stage, unbiased=flag) for stage in zip(*by_client)]
                        for flag in (False, True))
    return ClientComparison(biased, unbiased, names, first, dataset.y_test[rows])


# -------------------------------------------------------------------- an attack on a run's features

class Attack(NamedTuple):
    """Outcome of an attack on features."""

    images: Tensor  # reconstructions, (N, C, H, W) uint8
    losses: list[float]  # per step; noise outside the extractor's range stays in them
    noise: float  # variance of the noise, (level sigma)^2, which bounds that
    psnr: float  # decibels, mean over the images
    ssim: float  # mean over the images


def attack(folder: str | Path, *, steps: int = 100_000, level: float | None = None, count: int = 8,
           dataset: str | Path | None = None,
           data_dir: str | Path | None = None) -> tuple[Tensor, Attack]:
    """Reconstruct images from the features that a finished run's ResNet18 makes of them.

    steps: in the paper a million
    level: noise on the features (FedIN, Sec. 4.3), in standard deviations of the features; None:
        the run's own --noise
    count: number of images; the first test images, which the network was not trained on
    dataset, data_dir: place of the run's data if they have moved
    Returns the true images (count, C, H, W) uint8, and the outcome.
    """
    # Features as a client sends them
    settings = files.read_config(Path(folder))
    trained = trained_network(folder, "resnet18")
    loaded = data.load(dataset or settings["dataset"],
                       data_dir or settings.get("data_dir", "data"), download=False)
    files.check_same(settings, {"dataset": loaded.digest})
    images = loaded.x_test[:count]
    level = settings.get("noise", 0.0) if level is None else level
    noise, start = (data.torch_stream(settings["seed"], purpose)
                    for purpose in (data.FEATURE_NOISE, data.NOISE))
    with torch.no_grad():
        s_in = trained.net.extractor(trained.prepare(images))
        sent = fedin.add_noise(s_in, level, torch.randn(s_in.shape, generator=noise))

    # Attack
    x, losses = reconstruct(trained.net.extractor, sent, images.shape, start, steps=steps)
    rebuilt, truth = ((x * trained.deviation + trained.mean) / 255).clamp(0, 1), images / 255
    return images, Attack((rebuilt * 255).round().byte(), losses,
                          float(level * s_in.std()) ** 2, float(psnr(rebuilt, truth).mean()),
                          float(ssim(rebuilt, truth).mean()))


# -------------------------------------------------------------------------- figures of several runs

class Measured(NamedTuple):
    """Numbers of a table or figure."""

    values: Values
    notes: Sequence[str] = ()  # sentences to print with them
    draw: Callable | None = None  # (file, title=); None: values beside the paper's


# Each run is compared and attacked once for all figures.
_compared, _attacked = cache(compare_clients), cache(attack)


def similarity(folders: Mapping[Key, Path], *, shown: str,
               data_dir: str | None = None) -> Measured:
    """Mean CKA between different clients of runs, drawn as "stages" or "maps" (Fig. 6a, 6b, 7)."""
    draw = {"stages": draw_stages, "maps": draw_maps}[shown]
    values, comparisons = {}, {key: _compared(folder, data_dir=data_dir)
                               for key, folder in folders.items()}
    for (row, column), seen in comparisons.items():
        stages = {f"stage {number}": cka for number, cka in enumerate(seen.maps)}
        for stage, cka in (stages | {"stage 3, unbiased": seen.unbiased[3]}).items():
            values[row, f"{column}, {stage}"] = [mean_similarity(cka)]
    images = len(seen.labels)
    return Measured(values, [
        f"Clients after one more round of local training, {images:,} test images. CKA is between "
        "different clients, by the biased estimate (not given in the paper). In stage 3, of 512 "
        f"features, it is up to {512 / (512 + images):.2f} for unrelated features, and 0 by the "
        "unbiased estimate."], partial(draw, comparisons))


def draw_stages(comparisons: Mapping[Key, ClientComparison], path: Any, title: str) -> None:
    """Draw mean CKA over stages, a panel per split."""
    panels: dict[str, dict] = {}
    for (row, column), seen in comparisons.items():
        means = [mean_similarity(cka) for cka in seen.maps]
        panels.setdefault(column, {})[row] = list(map(str, range(len(means)))), means, None
    pictures.draw_lines(path, panels, ("stage", "mean CKA between clients"), title)


def draw_maps(comparisons: Mapping[Key, ClientComparison], path: Any, title: str) -> None:
    """Draw CKA of each client with each, by method, stages 2 and 3."""
    maps = {f"{row}, stage {stage}": seen.maps[stage] for stage in (2, 3)
            for (row, _), seen in comparisons.items()}
    names = next(iter(comparisons.values())).names
    if len(names) > 25:  # too many to write: networks alone, each at its first client
        archs = [name.split(": ")[1] for name in names]
        names = [arch if arch != before else "" for before, arch in zip(["", *archs], archs)]
    pictures.draw_maps(path, maps, names, ("client", "client, network", "CKA"), title,
                       columns=len(comparisons), limits=(0, 1))


def scattered(folders: Mapping[Key, Path], *, archs: Sequence[str], count: int, label: int | None,
              data_dir: str | None = None) -> Measured:
    """t-SNE of stage 3 features of some networks, of test images of a class (None: of all)."""
    for folder in folders.values():  # checked first, since each run then trains for a round
        settings = files.read_config(folder)
        made = list(run.METHODS[settings["method"]].networks[settings["model"]])
        here = {models.architecture_of(k, settings["clients"], made)
                for k in range(settings["clients"])}
        if lacking := set(archs) - here:
            raise ValueError(f"no client of {folder} has {', '.join(sorted(lacking))}")

    values, panels = {}, {}
    for (row, _), folder in folders.items():
        seen = _compared(folder, data_dir=data_dir)
        wanted = torch.ones_like(seen.labels) if label is None else seen.labels == label
        images = wanted.nonzero()[:count, 0]
        features = {arch: seen.features[arch][images] for arch in archs}
        panels[row] = tsne(features)
        values[row, "nearest neighbours of the same network, share"] = [own_neighbours(features)]

    class_text = "" if label is None else f" of class {label} (not given in the paper)"
    return Measured(values, [
        f"Clients after one more round of local training, {len(images)} test images{class_text}. "
        "The nearest neighbour among features of other images is of the same network with a share "
        f"of {1 / len(archs):.2f} if networks see alike, and of 1 if they lie apart."],
                    partial(pictures.draw_points, points=panels))


def attacked(folders: Mapping[Key, Path], *, steps: int = 100_000, with_losses: bool,
             data_dir: str | None = None) -> Measured:
    """Attack on features of each run's ResNet18, with the noise of its training (Fig. 4, 10)."""
    images, losses, values = {}, {}, {}
    for (row, _), folder in folders.items():
        images["true images"], outcome = _attacked(folder, steps=steps, data_dir=data_dir)
        images[row], losses[row] = outcome.images, outcome.losses
        values[row, "loss at the end"] = [outcome.losses[-1]]
        values[row, "variance of the noise"] = [outcome.noise]
        values[row, "PSNR, dB"], values[row, "SSIM"] = [outcome.psnr], [outcome.ssim]
    return Measured(values, [f"The attack takes {steps:,} steps. PSNR and SSIM are means over "
                             f"{len(images['true images'])} images."], partial(
        pictures.draw_reconstruction, images=images, losses=losses if with_losses else {}))

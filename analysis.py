"""What the papers' analyses compute: plain functions of tensors, each of which can be copied alone.

In reading order: how alike networks see (linear CKA, t-SNE; FedIN, Sec. 5.3); what an attacker
makes of the features that a client sends (FedIN, Sec. 4.3 and 5.5); what a method costs (FedIN,
Table 4); curves over rounds (FedIN, Table 1 and Fig. 5).  Last, what a finished run can be asked
for: one more round, for models as clients have them before the server averages; how alike these
see; an attack on its features.  tables.py makes the papers' tables and figures of all this.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import fedin
import files
import models
import pictures
import run
from baselines import Experiment

# ----------------------------------------------------------------- how alike networks see images

def stage_features(net: nn.Module, batches: Iterable[Tensor]) -> list[Tensor]:
    """What each stage of a ResNet makes of images, averaged over the map: (N, width) a stage.

    net: has the parts extractor and intermediate, whose children are the stages, in evaluation mode
    batches: of the network's input.  Stages count from 0, as in FedIN's Sec. 5.3: stage 3 is the
        deepest, layer4.  Pooled, since of linear CKA the number of features should be small against
        that of images.
    """
    by_batch = []
    with torch.inference_mode():
        for x in batches:
            out = [net.extractor(x)]
            for stage in net.intermediate.children():
                out.append(stage(out[-1]))
            by_batch.append([stage.mean(dim=(2, 3)) for stage in out[1:]])
    return [torch.cat(batches).cpu() for batches in zip(*by_batch)]


def linear_cka(x: Tensor, y: Tensor, *, unbiased: bool = False) -> float:
    """Linear centred kernel alignment of two representations of the same N images, at most 1.

    x: (N, p), y: (N, q).  HSIC(x, y) / sqrt(HSIC(x, x) HSIC(y, y)) (Kornblith et al. 2019,
    arxiv.org/abs/1905.00414, Sec. 3): 1 for equal representations, up to rotation, reflection,
    scale and shift.  The biased one (FedIN's Sec. 5.3 names neither) is near p / (N + p) for
    independent representations of equal width.
    unbiased: with the estimate of HSIC whose mean is 0 for these; needs N > 3
    Raises ValueError if the two are not of the same number of images.
    """
    return float(cka_map([x, y], unbiased=unbiased)[0, 1])


def cka_map(representations: Sequence[Tensor], *, unbiased: bool = False) -> Tensor:
    """Linear CKA of each with each, (K, K): FedIN's Fig. 7.

    representations: of client k (N, p_k);  unbiased: see linear_cka
    """
    if len({len(x) for x in representations}) > 1:
        raise ValueError(f"of {[len(x) for x in representations]} images, not of the same ones")
    centred = [x.double() - x.double().mean(dim=0) for x in representations]
    estimate = unbiased_hsic if unbiased else biased_hsic
    hsic = torch.zeros(len(centred), len(centred), dtype=torch.float64)
    for i, x in enumerate(centred):
        for j in range(i + 1):
            hsic[i, j] = hsic[j, i] = estimate(x, centred[j])
    own = hsic.diagonal()
    return hsic / (own[:, None] * own).sqrt()


def biased_hsic(x: Tensor, y: Tensor) -> Tensor:
    """||y^T x||^2, Frobenius norm: HSIC of linear kernels but for a factor.

    x: (N, p), y: (N, q), both with columns of mean 0
    """
    return (y.T @ x).square().sum()


def unbiased_hsic(x: Tensor, y: Tensor) -> Tensor:
    """HSIC_1 of Song et al. 2012 (Feature Selection via Dependence Maximization, Eq. 5), linear.

    x: (N, p), y: (N, q), both with columns of mean 0, N > 3.  Of the kernels K = x x^T and
    L = y y^T, with diagonals of zeros, it is
    (tr(KL) + 1'K1 1'L1 / ((N-1)(N-2)) - 2/(N-2) 1'KL1) / (N (N-3)).
    Centred as they are, the rows of K and of L add up to minus the diagonals that were taken out,
    which leaves nothing of N x N numbers.
    """
    n = len(x)
    k, l = x.square().sum(dim=1), y.square().sum(dim=1)  # the diagonals
    total = biased_hsic(x, y) + k.sum() * l.sum() / ((n - 1) * (n - 2)) - n / (n - 2) * (k @ l)
    return total / (n * (n - 3))


def mean_similarity(similar: Tensor) -> float:
    """The mean of a map (K, K) over pairs of different clients: FedIN's Fig. 6a and 6b."""
    off = ~torch.eye(len(similar), dtype=torch.bool)
    return float(similar[off].mean())


def tsne(features: Tensor, *, perplexity: float = 30.0, seed: int = 0) -> Tensor:
    """Points in the plane (N, 2) for features (N, p), near each other where these are.

    scikit-learn's t-SNE (van der Maaten & Hinton 2008) of standardised features, begun with their
    principal components; perplexity is at most a third of N.  The papers state no settings.
    """
    from sklearn.manifold import TSNE

    fit = TSNE(perplexity=min(perplexity, (len(features) - 1) / 3), init="pca", random_state=seed)
    return torch.from_numpy(fit.fit_transform(standardised(features).numpy()))


def scatter(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """t-SNE of several sets of features (N, p) together: points (N, 2) by set."""
    placed = tsne(torch.cat(list(features.values())))
    return dict(zip(features, placed.split([len(part) for part in features.values()])))


def own_neighbours(features: Mapping[str, Tensor]) -> float:
    """The share of features (N, p) whose nearest neighbour, of all sets', is of their own set.

    1 where sets lie apart; of K equal clouds about 1 / K.  Each set holds the same images in the
    same order, and an image is not compared with itself in another set: it would be nearest of all
    just where networks agree.  Distances are of standardised features, as for t-SNE.
    """
    x = standardised(torch.cat(list(features.values())))
    owner = torch.arange(len(features)).repeat_interleave(len(x) // len(features))
    image = torch.arange(len(x) // len(features)).repeat(len(features))
    distance = torch.cdist(x, x).masked_fill(image[:, None] == image, torch.inf)
    return float((owner[distance.argmin(dim=1)] == owner).double().mean())


def standardised(features: Tensor) -> Tensor:
    """Features (N, p) with mean 0 and deviation 1 each."""
    x = features.double()
    return (x - x.mean(dim=0)) / x.std(dim=0).clamp(min=1e-12)


# ------------------------------------------------------- what an attacker makes of sent features

def reconstruct(extractor: nn.Module, s_in: Tensor, shape: Sequence[int], rng: torch.Generator, *,
                steps: int, lr: float = 0.1, total_variation: float = 0.0
                ) -> tuple[Tensor, list[float]]:
    """Images whose features are those that a client sent: min over x of MSE(extractor(x), s_in).

    FedIN, Sec. 4.3: x (N, C, H, W) begins as noise, the extractor's weights are frozen; it is in
    evaluation mode, as the client's was when it made s_in (N, ...).
    shape: of x;  steps, lr: of Adam, with cosine decay (not stated; Fig. 10 counts to a million)
    total_variation: weight of the mean absolute difference of neighbouring pixels, a prior for
        smooth images (not in the paper)
    Returns the images, as the network takes them in, and the loss before every step.
    """
    x = torch.randn(*shape, generator=rng).to(s_in.device).requires_grad_()
    optimizer = torch.optim.Adam([x], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        loss = F.mse_loss(extractor(x), s_in)
        losses.append(loss.detach())
        if total_variation > 0:
            rough = x.diff(dim=2).abs().mean() + x.diff(dim=3).abs().mean()
            loss = loss + total_variation * rough
        x.grad, = torch.autograd.grad(loss, x)  # of x alone: the weights stay without gradients
        optimizer.step()
        schedule.step()
    return x.detach(), torch.stack(losses).tolist()


def psnr(images: Tensor, truth: Tensor, peak: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio in decibels, 10 log10(peak^2 / MSE), image by image: (N,).

    images, truth: (N, C, H, W) with values from 0 to peak
    """
    error = (images.double() - truth.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(peak ** 2 / error)


def ssim(images: Tensor, truth: Tensor, peak: float = 1.0) -> Tensor:
    """Structural similarity, image by image: (N,), at most 1, which equal images have.

    Wang et al. 2004 (Image Quality Assessment: From Error Visibility to Structural Similarity):
    local means, variances and covariance under a Gaussian window of 11 pixels and deviation 1.5,
    constants (0.01 peak)^2 and (0.03 peak)^2, mean over all whole windows and over channels.
    images, truth: (N, C, H, W) with values from 0 to peak, H and W at least 11
    """
    x, y = images.double(), truth.double()
    line = torch.exp(-torch.arange(-5, 6, dtype=torch.float64, device=x.device) ** 2 / (2 * 1.5**2))
    window = torch.outer(line, line) / line.sum() ** 2

    def local_mean(values: Tensor) -> Tensor:
        kernel = window.expand(values.shape[1], 1, 11, 11)
        return F.conv2d(values, kernel, groups=values.shape[1])

    mean_x, mean_y = local_mean(x), local_mean(y)
    variance_x, variance_y = local_mean(x * x) - mean_x**2, local_mean(y * y) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    similar = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)
               / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)))
    return similar.mean(dim=(1, 2, 3))


# ---------------------------------------------------------------------------- what a method costs

def mean_millions(states: Sequence[Mapping[str, Tensor]], is_counted: Callable[[str], bool],
                  further: int = 0, copies: int = 1) -> float:
    """"Params (M)" of FedIN's Table 4: what a client of each of these networks sends, on average.

    is_counted: whether an entry of a state counts (parameters do, buffers do not)
    further: other numbers that it sends, as features;  copies: 2 where control variates go along
    """
    sizes = [sum(tensor.numel() for name, tensor in state.items() if is_counted(name))
             for state in states]
    return (copies * sum(sizes) / len(sizes) + further) / 1e6


def memory_mib(states: Iterable[Mapping[str, Tensor]], copies: int = 1, further: int = 0) -> float:
    """"Memory (MB)" of FedIN's Table 4 by the rule that fits its numbers, in MiB (2^20 bytes).

    The states of one client of each architecture, all together, times the copies that a method
    keeps of them (SCAFFOLD 2, MOON 3), and further numbers of four bytes (FedIN: a batch of
    features).  It is no measurement: gradients and Adam's state are not in it.
    """
    total = sum(tensor.numel() * tensor.element_size()
                for state in states for tensor in state.values())
    return (copies * total + 4 * further) / 2**20


# ----------------------------------------------------------------------------- curves over rounds

SMOOTHING = 0.6  # the weight of what was before; not stated


def smoothed(values: Sequence[float], weight: float = SMOOTHING) -> list[float]:
    """Exponential smoothing: s_1 = v_1, s_t = weight s_(t-1) + (1 - weight) v_t.

    FedIN's Fig. 5 and 9 show smoothed curves.
    """
    return list(accumulate(values, lambda s, v: weight * s + (1 - weight) * v))


def rounds_to_target(rounds: Sequence[int], accuracies: Sequence[float],
                     target: float) -> int | None:
    """The first round whose accuracy is at least the target, None if there is none (Table 1)."""
    return next((t for t, value in zip(rounds, accuracies) if value >= target), None)


def speed_up(base: float | None, own: float | None) -> float | None:
    """How many times fewer rounds than the base a method needs; None if one does not get there."""
    return base / own if base and own else None


def in_order(paper: Sequence[float], ours: Sequence[float]) -> tuple[int, int]:
    """Of pairs of methods that differ in the paper, how many are alike in order here, of how many.

    paper, ours: one number a method.  A pair that is equal in ours counts as not alike.
    """
    pairs = [(paper[i] - paper[j], ours[i] - ours[j]) for i in range(len(paper)) for j in range(i)]
    pairs = [(theirs, own) for theirs, own in pairs if theirs != 0]
    return sum(theirs * own > 0 for theirs, own in pairs), len(pairs)


# ------------------------------------------------------------- what a finished run can be asked for

def one_more_round(folder: str | Path) -> tuple[Experiment, dict[int, Any]]:
    """Train all clients of a finished run for another round: as they are before any average.

    Returns the run's experiment, and what each client would send, by its id.  Nothing is kept.
    Raises ValueError if the folder holds no run, or that of a method without updates to average.
    """
    try:
        experiment, progress, _, _ = run.set_up(["--resume", "--out", str(folder)])
        if not experiment.method.has_server:
            raise ValueError(f"{folder} is of a method whose clients send nothing")
        settings = experiment.settings | {"participation": 1.0}
        method = experiment.method._replace(
            server_update=lambda server, updates: updates, distil=None)
        experiment = experiment._replace(settings=settings, method=method)
        pool = ThreadPoolExecutor(settings["workers"], initializer=torch.set_num_threads,
                                  initargs=(settings["threads"],))
        try:
            experiment = experiment._replace(train=partial(run.train_clients, experiment, pool))
            updates, _, _ = run.train_round(experiment, progress.round + 1, progress.server,
                                            progress.memory)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C does not wait for clients
    finally:
        files.leave()
    return experiment, updates


class Look(NamedTuple):
    """What the clients of a run make of test images, after one more round of local training."""

    maps: list[Tensor]  # stage -> CKA (K, K), clients in the order of their networks
    unbiased: list[Tensor]  # the same by the unbiased estimate
    names: list[str]  # of the clients in this order: id and network
    features: dict[str, Tensor]  # network -> pooled stage 3 features (N, 512) of its first client
    labels: Tensor  # (N,)


def look(folder: str | Path, *, images: int = 2000) -> Look:
    """Compare how the clients of a finished run see test images (FedIN, Sec. 5.3).

    As they are after one more round of local training, since after an average all clients of an
    architecture are equal.  The networks have to be ResNets.
    images: how many, evenly spaced in the whole test set, whatever the run was tested on
    """
    with redirect_stdout(pictures.nowhere()):
        experiment, updates = one_more_round(folder)
        settings = experiment.settings
        dataset = data.load(settings["dataset"], settings.get("data_dir", "data"))
    rows = torch.linspace(0, len(dataset.y_test) - 1, min(images, len(dataset.y_test))).long()
    x_test = dataset.x_test[rows].to(experiment.data.x_test.device)
    prepare = data.preparation(experiment.statistics)
    order = sorted(updates, key=lambda k: (experiment.architectures.index(
        experiment.clients[k].arch), k))
    by_client = {}
    for k in order:
        net = experiment.network(experiment.clients[k].arch, updates[k].weights).eval()
        by_client[k] = stage_features(net, map(prepare, x_test.split(models.TEST_BATCH)))
    biased, unbiased = ([cka_map(stage, unbiased=without) for stage in zip(*by_client.values())]
                        for without in (False, True))
    first = {arch: next(k for k in order if experiment.clients[k].arch == arch)
             for arch in experiment.architectures}
    return Look(biased, unbiased, [f"{k}: {experiment.clients[k].arch}" for k in order],
                {arch: by_client[k][3] for arch, k in first.items()}, dataset.y_test[rows])


class Attack(NamedTuple):
    """What came of an attack on features."""

    images: Tensor  # as reconstructed, (N, C, H, W) uint8
    losses: list[float]  # by step; what lies outside the extractor's range stays in them:
    noise: float  # its variance, (level sigma)^2, bounds that
    psnr: float  # in decibels, mean over the images
    ssim: float


def attack(folder: str | Path, data_dir: str, *, steps: int, level: float,
           count: int = 8) -> tuple[Tensor, Attack]:
    """Reconstruct images from the features that a finished run's ResNet18 makes of them.

    level: of FedIN's noise on the features (Sec. 4.3), in their standard deviations
    count: how many; the first test images, which the network has not been trained on
    Returns the true images (count, C, H, W) uint8 besides.
    """
    settings = files.read_config(Path(folder))
    trained = files.trained_network(folder, "resnet18")
    images = data.load(settings["dataset"], data_dir).x_test[:count]
    noise, start = (data.torch_stream(settings["seed"], purpose)
                    for purpose in (data.FEATURE_NOISE, data.NOISE))
    with torch.no_grad():
        s_in = trained.net.extractor(trained.prepare(images))
        sent = fedin.add_noise(s_in, level, noise)
    found, losses = reconstruct(trained.net.extractor, sent, images.shape, start, steps=steps)
    found, truth = ((found * trained.deviation + trained.mean) / 255).clamp(0, 1), images / 255
    return images, Attack((found * 255).round().byte(), losses, float(level * s_in.std()) ** 2,
                          float(psnr(found, truth).mean()), float(ssim(found, truth).mean()))

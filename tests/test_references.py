"""The other methods against their equations, which numpy computes here a second time."""

import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

import baselines
import data
import fedgen
import models
import widths
from federation import Client, Update
from widths import WidthUpdate

LR, BATCH, EPOCHS, CLASSES = 0.5, 4, 2, 3
SIZES = (6, 9, 12, 7)  # images per client; of nine, the last batch would be a single image
TRAINING = {"local_epochs": EPOCHS, "batch_size": BATCH}
ONE_STEP = {"local_epochs": 1, "batch_size": 64}


@pytest.fixture(autouse=True)
def double_precision():
    """Compute everything in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def agree(ours, expected, atol: float = 1e-8) -> None:
    """Check that two arrays, or two dicts of them with equal names, are equal up to rounding."""
    if isinstance(expected, dict):
        assert ours.keys() == expected.keys()
        for name in expected:
            np.testing.assert_allclose(ours[name], expected[name], rtol=0, atol=atol, err_msg=name)
    else:
        np.testing.assert_allclose(ours, expected, rtol=0, atol=atol)


def arrays(state: dict) -> dict:
    return {name: tensor.detach().numpy().copy() for name, tensor in state.items()}


def tensors(state: dict) -> dict:
    return {name: torch.from_numpy(array.copy()) for name, array in state.items()}


def weighted(values: dict, counts):
    """sum_k n_k v_k / sum_k n_k over the clients in values."""
    return sum(counts[k] * value for k, value in values.items()) / sum(counts[k] for k in values)


# ----------------------------------------------- linear networks, whose gradients are one line each

def network(arch: str = "deep", seed: int = 0) -> nn.Module:
    """Softmax regression; "deep" has a linear layer before, which is all that "plain" lacks."""
    with models.drawing_from(torch.Generator().manual_seed(seed)):
        return nn.Sequential(OrderedDict(
            extractor=nn.Linear(4, 4) if arch == "deep" else nn.Identity(),
            intermediate=nn.Identity(),
            classifier=nn.Sequential(OrderedDict(fc=nn.Linear(4, CLASSES)))))


def load(arch: str, weights: dict) -> nn.Module:
    model = network(arch)
    model.load_state_dict(weights)
    return model


def sgd(model: nn.Module, lr: float = LR, **options):
    """Scratch network and optimiser of a client update."""
    return model, torch.optim.SGD(model.parameters(), lr=lr, **options)


def common_weights(archs) -> dict:
    """Architecture -> its weights, equal where the names are."""
    whole = models.copy_state(network("deep"))
    return {arch: {name: whole[name] for name in network(arch).state_dict()} for arch in archs}


def arch_of(k: int, archs) -> str:
    """The first half of four clients has the first architecture, the second half the last."""
    return archs[0] if k < 2 else archs[-1]


def features(weights: dict, x):
    if "extractor.weight" not in weights:
        return x
    return x @ weights["extractor.weight"].T + weights["extractor.bias"]


def head(weights: dict, z):
    return z @ weights["classifier.fc.weight"].T + weights["classifier.fc.bias"]


def logits(weights: dict, x):
    return head(weights, features(weights, x))


def softmax(z):
    exponentials = np.exp(z - z.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def cross_entropy(z, y) -> float:
    return -np.log(softmax(z)[np.arange(len(y)), y]).mean()


def one_hot(y):
    return np.eye(CLASSES)[y]


def backward(weights: dict, x, at_logits) -> dict:
    """Gradient of a loss whose gradient with respect to the logits is given."""
    gradient = {"classifier.fc.weight": at_logits.T @ features(weights, x),
                "classifier.fc.bias": at_logits.sum(axis=0)}
    if "extractor.weight" in weights:
        at_features = at_logits @ weights["classifier.fc.weight"]
        gradient |= {"extractor.weight": at_features.T @ x,
                     "extractor.bias": at_features.sum(axis=0)}
    return gradient


def entropy_gradient(weights: dict, x, y) -> dict:
    """Gradient of the mean cross entropy."""
    return backward(weights, x, (softmax(logits(weights, x)) - one_hot(y)) / len(y))


def finite_differences(loss, weights: dict, step: float = 1e-5) -> dict:
    """Gradient of loss(weights), by central differences."""
    gradient = {}
    for name, array in weights.items():
        gradient[name] = np.empty_like(array)
        for place in np.ndindex(array.shape):
            ends = []
            for sign in (1, -1):
                shifted = array.copy()
                shifted[place] += sign * step
                ends.append(loss(weights | {name: shifted}))
            gradient[name][place] = (ends[0] - ends[1]) / (2 * step)
    return gradient


def descend(weights: dict, gradient: dict, lr: float = LR) -> dict:
    return {name: array - lr * gradient[name] for name, array in weights.items()}


def length(gradient: dict) -> float:
    return math.sqrt(sum((array ** 2).sum() for array in gradient.values()))


def clipped(gradient: dict, clip: float) -> dict:
    """Gradient cut to a length as by torch's clip_grad_norm_, with 1e-6 in the denominator."""
    factor = min(1, clip / (length(gradient) + 1e-6))
    return {name: factor * array for name, array in gradient.items()}


class Adam:
    """Adam, written out."""

    def __init__(self):
        self.mean, self.square, self.t = {}, {}, 0

    def step(self, weights: dict, gradient: dict, lr: float) -> dict:
        self.t, after = self.t + 1, {}
        for name, array in weights.items():
            self.mean[name] = 0.9 * self.mean.get(name, 0.0) + 0.1 * gradient[name]
            self.square[name] = 0.999 * self.square.get(name, 0.0) + 0.001 * gradient[name] ** 2
            mean = self.mean[name] / (1 - 0.9 ** self.t)
            square = self.square[name] / (1 - 0.999 ** self.t)
            after[name] = array - lr * mean / (np.sqrt(square) + 1e-8)
        return after


# ------------------------------------------------------------------------------ data of the clients

def data_of(k: int, contrast: float = 1.0) -> data.ClientData:
    """Client k's part of 34 random images of four pixels."""
    rng = torch.Generator().manual_seed(7)
    images = torch.randint(256, (sum(SIZES), 4), dtype=torch.uint8, generator=rng)
    labels = torch.randint(CLASSES, (sum(SIZES),), generator=rng)
    first = sum(SIZES[:k])
    return data.ClientData(images, labels, torch.arange(first, first + SIZES[k]),
                           lambda x: contrast * (x / 255 - 0.5))


def stream_of(k: int, t: int = 0) -> data.Stream:
    return data.streams(0, t, k)


def inputs(images: data.ClientData, rows=None):
    """Network input and labels of some rows, all of the client's if None."""
    rows = images.indices if rows is None else rows
    return images.prepare(images.images[rows]).numpy(), images.labels[rows].numpy()


def batches_of(k: int, t: int = 0):
    """Batches in the order of client k's stream, single images left out."""
    images, rng = data_of(k), stream_of(k, t)(data.BATCHES)
    for _ in range(EPOCHS):
        for rows in images.indices[torch.randperm(SIZES[k], generator=rng)].split(BATCH):
            if len(rows) > 1:
                yield inputs(images, rows)


# ----------------------------------------------------------------------------------------- SCAFFOLD

PARTIAL_ROUNDS = [(0, 2), (1, 2), (0, 3), (0, 1)]  # in the last one nobody has the extractor


@pytest.mark.parametrize("archs", [["plain"], ["plain", "deep"]])
def test_scaffold_is_algorithm_1_written_out(archs):
    server = baselines.scaffold_init(common_weights(archs))
    clients = [Client(k, data_of(k).indices, arch_of(k, archs)) for k in range(4)]
    kept = {k: baselines.scaffold_initial_memory(server, clients[k]) for k in range(4)}

    x = arrays(common_weights(archs)[archs[-1]])
    names = {k: server["weights"][clients[k].arch].keys() for k in range(4)}
    variate = {name: np.zeros_like(array) for name, array in x.items()}
    variates = {k: {name: np.zeros_like(x[name]) for name in names[k]} for k in range(4)}

    for t, drawn in enumerate(PARTIAL_ROUNDS):
        updates, moves, changes = {}, {}, {}
        for k in drawn:
            received = baselines.scaffold_download(server, clients[k], stream_of(k, t))
            result = baselines.scaffold_client_update(
                *sgd(network(clients[k].arch, 99)), received, data_of(k), stream_of(k, t), kept[k],
                lr=LR, **TRAINING)
            updates[k], kept[k] = result.update, result.kept

            # Lines 7 to 14 of the algorithm
            y = {name: x[name] for name in names[k]}
            for steps, batch in enumerate(batches_of(k, t), start=1):
                gradient = entropy_gradient(y, *batch)
                y = descend(y, {name: gradient[name] + variate[name] - variates[k][name]
                                for name in y})
            moves[k] = {name: y[name] - x[name] for name in y}
            after = {name: variates[k][name] - variate[name] - moves[k][name] / (steps * LR)
                     for name in y}
            changes[k] = {name: after[name] - variates[k][name] for name in y}
            variates[k] = after
            agree(result.update.weights, y)
            agree(kept[k], after)

        # Lines 16 and 17
        server = baselines.scaffold_server_update(server, updates, owners=dict(enumerate(clients)))
        for name in x:
            holders = [k for k in drawn if name in names[k]]
            if holders:
                x[name] = x[name] + weighted({k: moves[k][name] for k in holders}, SIZES)
            total = sum(SIZES[k] for k in range(4) if name in names[k])
            moved_by = sum(SIZES[k] * changes[k][name] for k in holders)
            variate[name] = variate[name] + moved_by / total
            agree(variate[name], weighted({k: kept[k][name].numpy() for k in range(4)
                                           if name in kept[k]}, SIZES))
        for k in range(4):
            sent = baselines.scaffold_download(server, clients[k], stream_of(k, t))
            agree(sent.weights, {name: x[name] for name in names[k]})
            agree(sent.variate, {name: variate[name] for name in names[k]})


class Odds(nn.Module):
    """Logits that do not depend on the image, so that the optimum is the share of each class."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.ModuleDict({"fc": nn.ParameterDict({"bias": torch.zeros(2)})})

    def forward(self, x):
        return self.classifier["fc"]["bias"].expand(len(x), 2)


@pytest.mark.parametrize("batch_size, accuracy", [(200, 1e-6), (60, 0.01)])  # 60: 2 and 6 steps
def test_scaffold_finds_the_optimum_of_all_images_together(batch_size, accuracy):
    labels = torch.tensor(([1] * 18 + [0] * 2) + ([1] * 18 + [0] * 162))
    owners = {0: Client(0, torch.arange(20), "odds"), 1: Client(1, torch.arange(20, 200), "odds")}
    server = baselines.scaffold_init({"odds": models.copy_state(Odds())})
    kept = {k: baselines.scaffold_initial_memory(server, client) for k, client in owners.items()}
    for t in range(15):
        updates = {}
        for k, client in owners.items():
            images = data.ClientData(torch.zeros(200, 1), labels, client.indices, lambda x: x)
            received = baselines.scaffold_download(server, client, stream_of(k, t))
            result = baselines.scaffold_client_update(
                *sgd(Odds(), 1.5), received, images, stream_of(k, t), kept[k], local_epochs=2,
                batch_size=batch_size, lr=1.5)
            updates[k], kept[k] = result.update, result.kept
        server = baselines.scaffold_server_update(server, updates, owners=owners)
    share = server["weights"]["odds"]["classifier.fc.bias"].softmax(dim=0)[1].item()
    assert share == pytest.approx(36 / 200, abs=accuracy)


# ------------------------------------------------------------------------------------------ FedNova

@pytest.mark.parametrize("archs, momentum", [(["deep"], 0.9), (["plain", "deep"], 0.0)])
def test_fednova_is_the_normalised_average_written_out(archs, momentum):
    server = baselines.fedavg_init(common_weights(archs))
    x = arrays(common_weights(archs)[archs[-1]])
    updates, direction, norm = {}, {}, {}
    for k in range(4):
        arch = arch_of(k, archs)
        updates[k] = baselines.fednova_client_update(
            *sgd(network(arch, 99), momentum=momentum), server["weights"][arch], data_of(k),
            stream_of(k), momentum=momentum, **TRAINING).update
        y = {name: x[name] for name in server["weights"][arch]}
        buffer, count, norm[k] = dict.fromkeys(y, 0.0), 0.0, 0.0
        for batch in batches_of(k):
            gradient = entropy_gradient(y, *batch)
            buffer = {name: momentum * buffer[name] + gradient[name] for name in y}
            y = descend(y, buffer)
            count = momentum * count + 1
            norm[k] += count
        direction[k] = {name: (x[name] - y[name]) / norm[k] for name in y}
        assert updates[k].norm == pytest.approx(norm[k], rel=1e-12)
    assert len(set(norm.values())) > 1

    after = baselines.fednova_server_update(server, updates)["weights"][archs[-1]]
    for name in x:
        holders = [k for k in range(4) if name in direction[k]]
        effective = weighted({k: norm[k] for k in holders}, SIZES)
        agree(after[name],
              x[name] - effective * weighted({k: direction[k][name] for k in holders}, SIZES))


# --------------------------------------------------------------------------------------------- MOON

def cosine(a, b):
    return (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))


def contrastive(z, z_global, z_previous, temperature: float) -> float:
    near, far = (np.exp(cosine(z, other) / temperature) for other in (z_global, z_previous))
    return -np.log(near / (near + far)).mean()


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_moons_contrastive_loss_is_the_equation_and_ignores_lengths(temperature):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(3, 6, 4))
    expected = pytest.approx(contrastive(*z, temperature), abs=1e-12)
    for scale in (1.0, rng.uniform(0.1, 10, size=(3, 6, 1))):
        scaled = torch.from_numpy(scale * z)
        assert baselines.contrastive_loss(*scaled, temperature).item() == expected


def test_steps_of_moon_descend_its_whole_loss():
    mu, temperature = 2.0, 0.5
    received, previous = (models.copy_state(network("deep", seed)) for seed in (5, 8))
    result = baselines.moon_client_update(
        *sgd(network(seed=99)), received, data_of(2), stream_of(2), previous, local_epochs=2,
        batch_size=64, mu=mu)

    x, y = inputs(data_of(2))
    z_global, z_previous = (features(arrays(weights), x) for weights in (received, previous))

    def objective(weights):
        z = features(weights, x)
        return (cross_entropy(head(weights, z), y)
                + mu * contrastive(z, z_global, z_previous, temperature))

    weights, loss = arrays(received), 0.0
    for _ in range(2):  # the first step begins at the global model, the second does not
        loss += cross_entropy(logits(weights, x), y) * len(y)
        weights = descend(weights, finite_differences(objective, weights))
    agree(result.update.weights, weights)
    agree(result.kept, weights)
    assert result.loss == pytest.approx(loss)


# --------------------------------------------------------------------------------------------- InCo

def combined(update, reference, step_limit: float = 5.0, limit: float = 0.1):
    """Combined update, kernel by kernel, with the released code's 1e-7 in the denominators."""
    out = np.empty_like(update)
    for place in np.ndindex(update.shape[:2]):
        a, b = update[place], reference[place]
        norm_a, norm_b = np.sqrt((a * a).sum()), np.sqrt((b * b).sum())
        theta = min(abs(np.trace(b.T @ a)) / (np.trace(b.T @ b) + 1e-7), step_limit)
        direction = a / (norm_a + 1e-7) + theta * b / (norm_b + 1e-7)
        out[place] = np.clip(direction * (norm_a + norm_b) / 2, -limit, limit)
    return out


def kernels(scale: float, seed: int):
    return np.random.default_rng(seed).normal(scale=scale, size=(5, 4, 3, 3))


@pytest.mark.parametrize("scale, reference_scale, limited", [
    (0.03, 0.03, False), (0.05, 0.001, True), (0.3, 0.3, True)])  # no limit; theta's; entries'
def test_incos_rule_is_a_loop_over_kernels(scale, reference_scale, limited):
    update, reference = kernels(scale, 1), kernels(reference_scale, 2)
    expected = combined(update, reference)
    unlimited = combined(update, reference, step_limit=math.inf, limit=math.inf)
    assert (np.abs(expected - unlimited).max() > 0.01) == limited
    ours = baselines.cross_layer_update(torch.from_numpy(update), torch.from_numpy(reference))
    agree(ours, expected)


def resnet_like(depths: dict, channels: int = 4) -> dict:
    """Name -> shape of a small ResNet's weights; stages after the first double the channels."""
    shapes = {"extractor.conv1.weight": (channels, 1, 3, 3)}
    before = channels
    for stage, depth in depths.items():
        for block in range(depth):
            place = f"intermediate.{stage}.{block}."
            shapes |= {place + "conv1.weight": (channels, before, 3, 3),
                       place + "bn1.weight": (channels,), place + "bn1.running_mean": (channels,),
                       place + "conv2.weight": (channels, channels, 3, 3)}
            if before != channels:
                shapes[place + "downsample.0.weight"] = (channels, before, 1, 1)
            before = channels
        channels *= 2
    return shapes | {"classifier.fc.weight": (CLASSES, before), "classifier.fc.bias": (CLASSES,)}


def resnet_weights(depths_of: dict) -> dict:
    """Architecture -> random weights, equal where the names are."""
    rng, whole = np.random.default_rng(0), {}
    for depths in depths_of.values():
        for name, shape in resnet_like(depths).items():
            whole.setdefault(name, rng.normal(scale=0.1, size=shape))
    return {arch: {name: whole[name] for name in resnet_like(depths)}
            for arch, depths in depths_of.items()}


def moved(state: dict, rng, scale: float) -> dict:
    return {name: array + rng.normal(scale=scale, size=array.shape)
            for name, array in state.items()}


def sent_by(uploads: dict, counts: dict) -> dict:
    return {k: Update(tensors(upload), counts[k]) for k, upload in uploads.items()}


def test_inco_combines_only_deeper_convolutions_with_the_second_one_of_block_0():
    x = resnet_weights({"small": {"layer1": 1, "layer2": 1}, "large": {"layer1": 3, "layer2": 2}})
    rng, counts = np.random.default_rng(1), {0: 5, 1: 7, 2: 11}
    archs = {0: "small", 1: "large", 2: "large"}
    sent = {k: moved(x[arch], rng, 0.04) for k, arch in archs.items()}
    server = baselines.fedavg_init({arch: tensors(state) for arch, state in x.items()})
    after = baselines.inco_server_update(server, sent_by(sent, counts))["weights"]

    old = x["large"]
    change = {name: weighted({k: y[name] - old[name] for k, y in sent.items() if name in y}, counts)
              for name in old}
    expected = {name: old[name] + change[name] for name in old}
    for block in ("layer1.1", "layer1.2", "layer2.1"):
        reference = change[f"intermediate.{block.split('.')[0]}.0.conv2.weight"]
        for conv in ("conv1", "conv2"):
            name = f"intermediate.{block}.{conv}.weight"
            expected[name] = old[name] + combined(change[name], reference)
            assert np.abs(expected[name] - old[name] - change[name]).max() > 1e-3
    agree(after["large"], expected)
    agree(after["small"], {name: expected[name] for name in x["small"]})


# -------------------------------------------------------------------------------------- InclusiveFL

DEPTHS = {"small": {"layer1": 1, "layer2": 1, "layer3": 1},
          "middle": {"layer1": 2, "layer2": 1, "layer3": 2},
          "large": {"layer1": 4, "layer2": 2, "layer3": 2}}
LARGER = {"small": "middle", "middle": "large"}
BETA = 0.2  # weight of the momentum in the released code


def inclusive(x: dict, sent: dict, counts: dict, archs: dict) -> dict:
    """Server's update, architecture -> weights; x, sent: by architecture, by client."""
    def depth(arch):
        return DEPTHS[arch]["layer3"]

    def is_private(arch, name):
        return name.startswith((f"intermediate.layer3.{depth(arch) - 1}.", "classifier."))

    def mean(arch, name):
        return weighted({k: y[name] for k, y in sent.items() if archs[k] == arch}, counts)

    def shared_weight(name, old):
        values = {k: y[name] for k, y in sent.items()
                  if name in y and not is_private(archs[k], name)}
        return weighted(values, counts) if values else old

    def private_weight(arch, name, old):
        larger, present = LARGER.get(arch), {archs[k] for k in sent}
        if arch not in present:
            return old
        if (larger not in present or name.startswith("classifier.")
                or name.endswith("running_mean")):
            return mean(arch, name)
        names = [f"intermediate.layer3.{block}.{name.split('.', 3)[3]}"
                 for block in range(depth(arch) - 1, depth(larger))]
        if any(other not in x[larger] or x[larger][other].shape != old.shape for other in names):
            return mean(arch, name)
        momentum = sum(x[larger][other] - mean(larger, other) for other in names) / len(names)
        return old - (BETA * momentum + (1 - BETA) * (old - mean(arch, name)))

    return {arch: {name: private_weight(arch, name, old) if is_private(arch, name)
                   else shared_weight(name, old) for name, old in state.items()}
            for arch, state in x.items()}


def test_inclusivefl_is_its_momentum_rule_written_out():
    x = resnet_weights(DEPTHS)
    server = baselines.fedavg_init({arch: tensors(state) for arch, state in x.items()})
    rng, counts = np.random.default_rng(2), {0: 3, 1: 8, 2: 5, 3: 7, 4: 2, 5: 9}
    archs = dict(enumerate(["small", "small", "middle", "middle", "large", "large"]))
    everybody, nobody_large, nobody_small = range(6), (0, 2, 3), (2, 5)
    for drawn in (everybody, everybody, nobody_large, nobody_small):
        sent = {k: moved(x[archs[k]], rng, 0.3) for k in drawn}
        server = baselines.inclusivefl_server_update(server, sent_by(sent, counts))
        x = inclusive(x, sent, counts, archs)
        for arch in DEPTHS:
            agree(server["weights"][arch], x[arch])
    for name in ("intermediate.layer3.0.conv1.weight", "classifier.fc.weight"):
        assert np.abs(x["small"][name] - x["large"][name]).max() > 0.1


# ---------------------------------------------------------------------------- HeteroFL and FedRolex

def width_net(rate: float, bottleneck: bool = False, exits=None) -> nn.Module:
    """Stages of 4, 8, 16 and 32 channels at the rate 1/16, for three colours and three classes."""
    with models.drawing_from(torch.Generator().manual_seed(0)):
        net = widths.WidthResNet(3, CLASSES, blocks=(1, 1, 1, 1), bottleneck=bottleneck,
                                 stem_stride=1, rate=rate, exits=exits)
        for parameter in net.parameters():  # normalisation does not begin with ones and zeros
            nn.init.normal_(parameter, std=0.5)
    return net


def window(name: str, whole_shape, part_shape, start: int, classes=None) -> list:
    """Index sets of the first two dimensions: {(start + j) mod C}; colours and classes in order."""
    sets = [(start + np.arange(n)) % size for n, size in zip(part_shape[:2], whole_shape[:2])]
    if ".fc." in name:
        sets[0] = np.arange(CLASSES) if classes is None else np.array(classes)
    if name == "extractor.conv1.weight":
        sets[1] = np.arange(3)
    return sets


def windows(whole: dict, part: dict, start: int, classes=None) -> dict:
    return {name: window(name, whole[name].shape, part[name].shape, start, classes)
            for name in part}


def cut(whole: dict, places: dict) -> dict:
    return {name: np.asarray(whole[name])[np.ix_(*sets)] for name, sets in places.items()}


@pytest.mark.parametrize("bottleneck, start", [(False, 0), (True, 1), (False, 6), (True, 37)])
def test_index_sets_are_consecutive_channels_modulo_the_layers_own(bottleneck, start):
    whole = models.copy_state(width_net(1 / 16, bottleneck))
    part = width_net(3 / 64, bottleneck).state_dict()  # 3, 6, 12 and 24 channels
    ours = widths.index_sets(whole, part, start=start, classes=torch.tensor([0, 2]))
    expected = windows(whole, part, start, [0, 2])
    assert ours.keys() == expected.keys()
    for name in expected:
        assert [s.tolist() for s in ours[name]] == [s.tolist() for s in expected[name]], name


@pytest.mark.parametrize("rate, bottleneck, start", [
    (1 / 16, False, 6), (3 / 64, True, 0), (3 / 64, False, 1), (1 / 64, True, 6)])
def test_a_submodel_computes_what_the_whole_network_does_with_zeros_elsewhere(rate, bottleneck,
                                                                              start):
    whole, part = width_net(1 / 16, bottleneck), width_net(rate, bottleneck)
    state = models.copy_state(whole)
    part.load_state_dict(widths.extract(state, widths.index_sets(state, part.state_dict(),
                                                                 start=start)))
    masked = {}
    for name, sets in windows(state, part.state_dict(), start).items():
        masked[name] = np.zeros(state[name].shape)
        masked[name][np.ix_(*sets)] = state[name].numpy()[np.ix_(*sets)]
    whole.load_state_dict(tensors(masked))
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    agree(part.eval()(x).detach(), whole.eval()(x).detach().numpy())


def coordinate_means(whole: dict, sent: dict, places: dict, counts: dict) -> dict:
    after = {}
    for name, old in whole.items():
        total, count = np.zeros(old.shape), np.zeros(old.shape)
        for k, y in sent.items():
            if name in y:
                total[np.ix_(*places[k][name])] += counts[k] * y[name]
                count[np.ix_(*places[k][name])] += counts[k]
        after[name] = np.where(count > 0, total / np.maximum(count, 1), old)
    return after


EXITS = (1, 2, 3, 4)  # blocks before each exit of width_net


@pytest.mark.parametrize("init, update, rolls, parts", [
    (widths.heterofl_init, widths.heterofl_server_update, 0, {}),
    (widths.heterofl_init, widths.fedrolex_server_update, 1, {}),
    (widths.scalefl_init, widths.scalefl_server_update, 0, {0: 3, 1: 2, 2: 1, 3: 2})])
def test_every_coordinate_is_the_mean_over_the_clients_that_hold_it(init, update, rolls, parts):
    """parts: client -> number of its exits, in ScaleFL."""
    rates, counts = {0: 3 / 64, 1: 1 / 32, 2: 1 / 64, 3: 1 / 32}, {0: 4, 1: 7, 2: 9, 3: 5}
    classes = dict.fromkeys(rates) if parts else {0: [0, 1], 1: [1], 2: None, 3: [0, 1]}
    part = {k: width_net(rate, exits=EXITS[:parts[k]] if parts else None).state_dict()
            for k, rate in rates.items()}
    whole = arrays(models.copy_state(width_net(1 / 16, exits=EXITS if parts else None)))
    server, rng = init({"whole": tensors(whole)}), np.random.default_rng(4)
    for t, drawn in enumerate([(0, 1, 2), (0, 1, 3), (1, 2), (0, 3)]):
        places = {k: windows(whole, part[k], rolls * t, classes[k]) for k in drawn}
        sent = {k: moved(cut(whole, places[k]), rng, 1.0) for k in drawn}
        server = update(server, {
            k: WidthUpdate(tensors(y), counts[k],
                           None if classes[k] is None else torch.tensor(classes[k]))
            for k, y in sent.items()})
        before, whole = whole, coordinate_means(whole, sent, places, counts)
        (ours,) = server["weights"].values()
        agree(ours, whole)
        unmoved = np.mean([np.mean(whole[name] == before[name]) for name in whole])
        assert 0.1 < unmoved < 0.9


@pytest.mark.parametrize("contrast", [1, 30])  # with 30 the gradient is cut to length 1
def test_a_step_of_heterofl_descends_the_cross_entropy_with_zeros_for_absent_classes(contrast):
    images = data_of(2, contrast)
    images = images._replace(labels=images.labels % 2 * 2)  # class 1 is absent
    model = network(seed=99)
    model.classifier = nn.Sequential(model.classifier)  # weights named as of a first exit
    received = {name.replace("classifier", "classifier.0"): tensor
                for name, tensor in common_weights(["deep"])["deep"].items()}
    result = widths.heterofl_client_update(*sgd(model), received, images, stream_of(2), **ONE_STEP)

    x, y = inputs(images)
    weights, present = arrays(common_weights(["deep"])["deep"]), np.array([1.0, 0.0, 1.0])
    z = logits(weights, x) * present
    gradient = backward(weights, x, (softmax(z) - one_hot(y)) * present / len(y))
    assert (length(gradient) > 1) == (contrast == 30)
    expected = {name.replace("classifier", "classifier.0"):
                array[[0, 2]] if "fc" in name else array
                for name, array in descend(weights, clipped(gradient, 1.0)).items()}
    agree(result.update.weights, expected)
    assert result.update.classes.tolist() == [0, 2]
    assert result.loss == pytest.approx(cross_entropy(z, y) * len(y))


# ------------------------------------------------------------------------------------------ ScaleFL

@pytest.mark.parametrize("exits, gamma", [(1, 0.4), (2, 0.0), (4, 0.4)])
def test_scalefls_loss_is_a_weighted_sum_over_exits_that_the_last_one_teaches(exits, gamma):
    rng, temperature, expected = np.random.default_rng(6), 3.0, 0.0
    z, y = rng.normal(scale=2, size=(exits, 5, CLASSES)), rng.integers(CLASSES, size=5)
    teacher = softmax(z[-1] / temperature)
    for number, student in enumerate(z, start=1):
        divergence = (teacher * np.log(teacher / softmax(student / temperature))).sum(axis=1).mean()
        taught = gamma * temperature ** 2 * divergence if number < exits else 0
        expected += number * (cross_entropy(student, y) + taught) / (exits * (exits + 1) / 2)
    loss = widths.exits_loss(list(torch.from_numpy(z)), torch.from_numpy(y), gamma, temperature)
    assert loss.item() == pytest.approx(expected, abs=1e-12)


class TwoExits(nn.Module):
    """The linear networks as one with two exits, "plain" before "deep"."""

    def __init__(self, seed: int):
        super().__init__()
        self.first, self.last = network("plain", seed), network("deep", seed + 1)

    def exit_logits(self, x):
        return [self.first(x), self.last(x)]


@pytest.mark.parametrize("distils, contrast", [(False, 1), (True, 1), (True, 30)])
def test_a_step_of_scalefl_trains_both_exits_and_distils_only_when_told(distils, contrast):
    gamma, temperature, images = 0.8, 3.0, data_of(2, contrast)
    received = models.copy_state(TwoExits(seed=5))
    result = widths.scalefl_client_update(
        *sgd(TwoExits(seed=99)), widths.ScaledDownload(received, distils), images, stream_of(2),
        self_distillation=gamma, **ONE_STEP)

    (x, y), start, gradient = inputs(images), arrays(received), {}
    exits = {part: {name.removeprefix(part): array for name, array in start.items()
                    if name.startswith(part)} for part in ("first.", "last.")}
    z = {part: logits(weights, x) for part, weights in exits.items()}
    for part, share in {"first.": 1 / 3, "last.": 2 / 3}.items():
        at_logits = softmax(z[part]) - one_hot(y)
        if distils and part == "first.":
            at_logits += gamma * temperature * (softmax(z["first."] / temperature)
                                                - softmax(z["last."] / temperature))
        gradient |= {part + name: array for name, array in
                     backward(exits[part], x, share * at_logits / len(y)).items()}
    assert (length(gradient) > 1) == (contrast == 30)
    agree(result.update.weights, descend(start, clipped(gradient, 1.0)))
    assert result.loss == pytest.approx(cross_entropy(z["last."], y) * len(y))


# -------------------------------------------------------------------------------------------- FedDF

@pytest.mark.parametrize("contrast, speed", [(1, 1), (40, 100)])  # with 40 some steps are clipped
def test_feddf_distils_all_clients_mean_logits_into_every_network(contrast, speed, monkeypatch):
    monkeypatch.setattr(baselines, "DISTILLATION_LR", speed * baselines.DISTILLATION_LR)
    archs, steps, proxy = ("plain", "deep"), 4, data_of(2, contrast)
    averages = {arch: models.copy_state(network(arch, seed=10)) for arch in archs}
    sent = {k: models.copy_state(network(arch_of(k, archs), seed=k)) for k in range(4)}
    server = baselines.feddf_distil(
        baselines.fedavg_init(averages), {k: Update(y, SIZES[k]) for k, y in sent.items()}, load,
        stream_of(0), proxy=proxy, distillation_steps=steps)

    x, _ = inputs(proxy)
    teacher = softmax(sum(logits(arrays(y), x) for y in sent.values()) / 4)
    for arch in archs:
        student, optimizer, lengths = arrays(averages[arch]), Adam(), []
        for step in range(steps):  # a batch is all twelve proxy images, in whatever order
            gradient = backward(student, x, (softmax(logits(student, x)) - teacher) / len(x))
            lengths.append(length(gradient))
            student = optimizer.step(student, clipped(gradient, 5.0),
                                     speed * 1e-3 * (1 + math.cos(math.pi * step / steps)) / 2)
        agree(server["weights"][arch], student)
        assert min(lengths) < 5 and (max(lengths) > 5) == (contrast == 40)


# ------------------------------------------------------------------------------------------- FedGen

def latents_of(weights: dict, noise, y):
    """Linear, batch normalisation in evaluation mode, ReLU, linear."""
    x = np.concatenate([noise, one_hot(y)], axis=1)
    z = x @ weights["network.0.weight"].T + weights["network.0.bias"]
    z = (z - weights["network.1.running_mean"]) / np.sqrt(weights["network.1.running_var"] + 1e-5)
    z = np.maximum(z * weights["network.1.weight"] + weights["network.1.bias"], 0)
    return z @ weights["network.3.weight"].T + weights["network.3.bias"]


@pytest.mark.parametrize("t", [3, 2000])  # by round 2,000 the weights are as low as they go
def test_steps_of_a_fedgen_client_descend_its_three_terms(t):
    lr, random, known, k = 0.05, 32, np.array([0, 2]), 2
    state = models.copy_state(fedgen.initial_latent_generator(CLASSES, 4,
                                                              torch.Generator().manual_seed(4)))
    rng = torch.Generator().manual_seed(5)
    for name in ("network.1.running_mean", "network.1.running_var"):
        state[name] = torch.rand(state[name].shape, generator=rng) + 0.5
    received = common_weights(["deep"])["deep"]
    result = fedgen.fedgen_client_update(
        *sgd(network(seed=99), lr),
        fedgen.FedGenDownload(received, state, torch.from_numpy(known), t), data_of(k),
        stream_of(k, t), **TRAINING)

    factor = max(1e-4, 10.0 * 0.98 ** t)
    weights, latent_rng, loss = arrays(received), stream_of(k, t)(data.LATENT), 0.0
    for x, y in batches_of(k, t):
        random_y = known[torch.randint(2, (random,), generator=latent_rng).numpy()]
        all_y = np.concatenate([random_y, y])
        noise = torch.rand(len(all_y), 64, generator=latent_rng).numpy()
        latents = latents_of(arrays(state), noise, all_y)
        ours, theirs = softmax(logits(weights, x)), softmax(head(weights, latents[random:]))
        loss += cross_entropy(logits(weights, x), y) * len(y)
        gradient = backward(weights, x, (ours - one_hot(y) + factor * (ours - theirs)) / len(y))
        wrong = softmax(head(weights, latents[:random])) - one_hot(random_y)
        gradient["classifier.fc.weight"] += factor / BATCH * wrong.T @ latents[:random]
        gradient["classifier.fc.bias"] += factor / BATCH * wrong.sum(axis=0)
        weights = descend(weights, gradient, lr)
    agree(result.update.weights, weights)
    assert result.loss == pytest.approx(loss)
    assert result.update.class_counts.tolist() == np.bincount(inputs(data_of(k))[1]).tolist()

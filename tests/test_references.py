"""The other methods against their equations, which are written out here a second time in numpy."""

import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

import baselines
import data
import generator
import models
from baselines import Client, Update, WidthUpdate

LR, BATCH, EPOCHS, CLASSES = 0.5, 4, 2, 3
SIZES = (6, 9, 12, 7)  # images of the clients; of nine, the last batch would be a single image
TRAINING = {"local_epochs": EPOCHS, "batch_size": BATCH}
ALL_AT_ONCE = {"local_epochs": 1, "batch_size": 64}  # one step


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def agree(ours, expected, atol: float = 1e-8) -> None:
    """Two arrays, or two dicts of them with the same names, are equal up to rounding."""
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
    """sum_k n_k v_k / sum_k n_k over the clients in `values`."""
    return (sum(counts[k] * value for k, value in values.items())
            / sum(counts[k] for k in values))


# ---------------------------------------------------- linear networks, whose gradients are one line


def network(arch: str = "deep", seed: int = 0) -> nn.Module:
    """Softmax regression; "deep" has a linear layer before, which is all that "plain" lacks."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(OrderedDict(
            extractor=nn.Linear(4, 4) if arch == "deep" else nn.Identity(),
            intermediate=nn.Identity(),
            classifier=nn.Sequential(OrderedDict(fc=nn.Linear(4, CLASSES)))))


def features(weights: dict, x):
    if "extractor.weight" not in weights:
        return x
    return x @ weights["extractor.weight"].T + weights["extractor.bias"]


def head(weights: dict, z):
    return z @ weights["classifier.fc.weight"].T + weights["classifier.fc.bias"]


def logits(weights: dict, x):
    return head(weights, features(weights, x))


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def cross_entropy(z, y) -> float:
    return -np.log(softmax(z)[np.arange(len(y)), y]).mean()


def one_hot(y):
    return np.eye(CLASSES)[y]


def backward(weights: dict, x, at_logits) -> dict:
    """The gradient of a loss whose gradient with respect to the logits is given."""
    grad = {"classifier.fc.weight": at_logits.T @ features(weights, x),
            "classifier.fc.bias": at_logits.sum(axis=0)}
    if "extractor.weight" in weights:
        at_features = at_logits @ weights["classifier.fc.weight"]
        grad |= {"extractor.weight": at_features.T @ x, "extractor.bias": at_features.sum(axis=0)}
    return grad


def length(g: dict) -> float:
    return math.sqrt(sum((array ** 2).sum() for array in g.values()))


def shortened(g: dict, clip: float | None) -> dict:
    """As torch's clip_grad_norm_ does it, with 1e-6 in the denominator."""
    factor = 1 if clip is None else min(1, clip / (length(g) + 1e-6))
    return {name: factor * array for name, array in g.items()}


def gradient(weights: dict, x, y) -> dict:
    """Of the mean cross entropy."""
    return backward(weights, x, (softmax(logits(weights, x)) - one_hot(y)) / len(y))


def finite_differences(loss, weights: dict, h: float = 1e-5) -> dict:
    """The gradient of loss(weights), by central differences."""
    grad = {}
    for name, array in weights.items():
        grad[name] = np.empty_like(array)
        for at in np.ndindex(array.shape):
            ends = []
            for sign in (1, -1):
                moved = array.copy()
                moved[at] += sign * h
                ends.append(loss(weights | {name: moved}))
            grad[name][at] = (ends[0] - ends[1]) / (2 * h)
    return grad


def own_data(k: int) -> data.ClientData:
    """Client k's part of 34 random images of four pixels."""
    rng = torch.Generator().manual_seed(7)
    images = torch.randint(256, (sum(SIZES), 4), dtype=torch.uint8, generator=rng)
    labels = torch.randint(CLASSES, (sum(SIZES),), generator=rng)
    first = sum(SIZES[:k])
    return data.ClientData(images, labels, torch.arange(first, first + SIZES[k]),
                           lambda x: x / 255 - 0.5)


def stream_of(k: int, round: int):
    return lambda purpose: data.torch_stream(0, purpose, round, k)


def whole_set(own: data.ClientData):
    return own.images[own.indices].numpy() / 255 - 0.5, own.labels[own.indices].numpy()


def batches_of(k: int, round: int):
    """The batches that client k's stream says, single images left out."""
    own, rng = own_data(k), stream_of(k, round)(data.BATCHES)
    for _ in range(EPOCHS):
        for rows in own.indices[torch.randperm(SIZES[k], generator=rng)].split(BATCH):
            if len(rows) > 1:
                yield own.images[rows].numpy() / 255 - 0.5, own.labels[rows].numpy()


def scratch(arch: str, lr: float = LR, **options):
    model = network(arch, seed=99)
    return model, torch.optim.SGD(model.parameters(), lr=lr, **options)


def shared_weights(archs) -> dict:
    """Architecture -> its weights, equal where the names are."""
    whole = models.copy_state(network("deep"))
    return {arch: {name: whole[name] for name in network(arch).state_dict()} for arch in archs}


def arch_of(k: int, archs) -> str:
    """The first half of four clients has the first architecture, the second half the last."""
    return archs[0] if k < 2 else archs[-1]


# -------------------------------------------------------------------------------------- SCAFFOLD


PARTIAL_ROUNDS = [(0, 2), (1, 2), (0, 3), (0, 1)]  # in the last one nobody has the extractor


@pytest.mark.parametrize("server_lr, uniform", [(1.0, False), (0.5, False), (1.0, True)])
@pytest.mark.parametrize("archs", [["plain"], ["plain", "deep"]])
def test_scaffold_is_algorithm_1_written_out(archs, server_lr, uniform):
    n = [1] * 4 if uniform else SIZES
    server = baselines.scaffold_init(shared_weights(archs))
    clients = [Client(k, own_data(k).indices, arch_of(k, archs)) for k in range(4)]
    kept = {k: baselines.scaffold_initial_memory(server, clients[k]) for k in range(4)}

    x = arrays(shared_weights(archs)[archs[-1]])
    owned = {k: arrays(shared_weights(archs)[clients[k].arch]).keys() for k in range(4)}
    c = {name: np.zeros_like(array) for name, array in x.items()}
    c_own = {k: {name: np.zeros_like(x[name]) for name in owned[k]} for k in range(4)}

    for round, drawn in enumerate(PARTIAL_ROUNDS):
        updates, moves, changes = {}, {}, {}
        for k in drawn:
            received = baselines.scaffold_download(server, clients[k], stream_of(k, round))
            result = baselines.scaffold_client_update(
                *scratch(clients[k].arch), received, own_data(k), stream_of(k, round), kept[k],
                **TRAINING)
            updates[k], kept[k] = result.update, result.kept

            y, steps = {name: x[name] for name in owned[k]}, 0
            for batch in batches_of(k, round):
                g = gradient(y, *batch)
                y = {name: y[name] - LR * (g[name] + c[name] - c_own[k][name]) for name in y}
                steps += 1
            moves[k] = {name: y[name] - x[name] for name in y}
            after = {name: c_own[k][name] - c[name] - moves[k][name] / (steps * LR) for name in y}
            changes[k] = {name: after[name] - c_own[k][name] for name in y}
            c_own[k] = after
            agree(result.update.weights, y)
            agree(kept[k], after)
        server = baselines.scaffold_server_update(
            server, updates, owners=dict(enumerate(clients)), server_lr=server_lr, uniform=uniform)
        for name in x:
            holders = [k for k in drawn if name in owned[k]]
            if holders:
                x[name] = x[name] + server_lr * weighted({k: moves[k][name] for k in holders}, n)
            owners = sum(n[k] for k in range(4) if name in owned[k])
            c[name] = c[name] + sum(n[k] * changes[k][name] for k in holders) / owners
        for k in range(4):
            sent = baselines.scaffold_download(server, clients[k], stream_of(k, round))
            agree(sent.weights, {name: x[name] for name in owned[k]})
            agree(sent.variate, {name: c[name] for name in owned[k]})
        for name in x:
            agree(c[name], weighted({k: kept[k][name].numpy() for k in range(4)
                                     if name in kept[k]}, n))


class Odds(nn.Module):
    """Logits that do not depend on the image, so that the optimum is the share of each class."""

    def __init__(self):
        super().__init__()
        self.classifier = nn.ModuleDict({"fc": nn.ParameterDict({"bias": torch.zeros(2)})})

    def forward(self, x):
        return self.classifier["fc"]["bias"].expand(len(x), 2)


POOLED, ALIKE = 36 / 200, (18 / 20 + 18 / 180) / 2  # 18 of 20 and 18 of 180 images are of class 1


@pytest.mark.parametrize("uniform, batch_size, optimum, accuracy", [
    (False, 200, POOLED, 1e-6), (True, 200, ALIKE, 1e-6),
    (False, 20, POOLED, 0.01), (True, 20, ALIKE, 0.01)])  # 4 and 36 steps, of batches by chance
def test_scaffold_finds_the_optimum_of_its_average(uniform, batch_size, optimum, accuracy):
    labels = torch.tensor(([1] * 18 + [0] * 2) + ([1] * 18 + [0] * 162))
    indices = {0: torch.arange(20), 1: torch.arange(20, 200)}
    owners = {k: Client(k, rows, "odds") for k, rows in indices.items()}
    server = baselines.scaffold_init({"odds": models.copy_state(Odds())})
    kept = {k: baselines.scaffold_initial_memory(server, client) for k, client in owners.items()}
    for round in range(200 if batch_size == 200 else 30):
        updates = {}
        for k, client in owners.items():
            model, stream = Odds(), stream_of(k, round)
            own = data.ClientData(torch.zeros(200, 1), labels, client.indices, lambda x: x)
            result = baselines.scaffold_client_update(
                model, torch.optim.SGD(model.parameters(), lr=0.1),
                baselines.scaffold_download(server, client, stream), own, stream, kept[k],
                local_epochs=4, batch_size=batch_size)
            updates[k], kept[k] = result.update, result.kept
        server = baselines.scaffold_server_update(server, updates, owners=owners, uniform=uniform)
    share = server["weights"]["odds"]["classifier.fc.bias"].softmax(dim=0)[1].item()
    assert share == pytest.approx(optimum, abs=accuracy)


def test_scaffold_of_a_single_client_is_gradient_descent():
    server = baselines.scaffold_init(shared_weights(["deep"]))
    one = Client(2, own_data(2).indices, "deep")
    kept = baselines.scaffold_initial_memory(server, one)
    y = arrays(shared_weights(["deep"])["deep"])
    for round in range(3):
        stream = stream_of(2, round)
        received = baselines.scaffold_download(server, one, stream)
        result = baselines.scaffold_client_update(*scratch("deep"), received, own_data(2), stream,
                                                  kept, **TRAINING)
        kept = result.kept
        server = baselines.scaffold_server_update(server, {2: result.update}, owners={2: one})
        for batch in batches_of(2, round):
            g = gradient(y, *batch)
            y = {name: y[name] - LR * g[name] for name in y}
        agree(server["weights"]["deep"], y)
        agree(baselines.scaffold_download(server, one, stream).variate, arrays(kept), atol=1e-12)


def test_after_a_single_step_scaffolds_variate_is_the_gradient_at_the_received_weights():
    received = shared_weights(["deep"])["deep"]
    c, c_own = (models.copy_state(network("deep", seed)) for seed in (3, 4))
    result = baselines.scaffold_client_update(
        *scratch("deep"), baselines.Scaffolded(received, c), own_data(1), stream_of(1, 0), c_own,
        **ALL_AT_ONCE)
    expected = gradient(arrays(received), *whole_set(own_data(1)))
    agree(result.kept, {name: expected[name] for name in received}, atol=1e-12)
    agree(result.update.change, {name: expected[name] - c_own[name].numpy() for name in received},
          atol=1e-12)


# --------------------------------------------------------------------------------------- FedNova


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("archs", [["deep"], ["plain", "deep"]])
def test_fednova_is_the_normalised_average_written_out(archs, momentum):
    server = baselines.fedavg_init(shared_weights(archs))
    x = arrays(shared_weights(archs)[archs[-1]])
    updates, direction, a = {}, {}, {}
    for k in range(4):
        arch = arch_of(k, archs)
        updates[k] = baselines.fednova_client_update(
            *scratch(arch, momentum=momentum), server["weights"][arch], own_data(k),
            stream_of(k, 0), **TRAINING).update
        y = {name: x[name] for name in server["weights"][arch]}
        buffer = {name: 0.0 for name in y}
        count, a[k] = 0.0, 0.0
        for batch in batches_of(k, 0):
            g = gradient(y, *batch)
            buffer = {name: momentum * buffer[name] + g[name] for name in y}
            y = {name: y[name] - LR * buffer[name] for name in y}
            count = momentum * count + 1
            a[k] += count
        direction[k] = {name: (x[name] - y[name]) / a[k] for name in y}
        assert updates[k].norm == pytest.approx(a[k], rel=1e-12)
    assert len(set(a.values())) > 1

    after = baselines.fednova_server_update(server, updates)["weights"][archs[-1]]
    for name in x:
        holders = {k: SIZES[k] for k in range(4) if name in direction[k]}
        share = {k: n / sum(holders.values()) for k, n in holders.items()}
        effective = sum(share[k] * a[k] for k in holders)
        agree(after[name], x[name] - effective * sum(share[k] * direction[k][name]
                                                     for k in holders))


def test_fednova_averages_buffers_as_they_are_and_leaves_what_nobody_holds():
    old = {"norm.weight": torch.ones(2), "norm.running_mean": torch.zeros(2),
           "classifier.weight": torch.ones(1)}
    small = {name: old[name] for name in list(old)[:2]}
    server = baselines.fedavg_init({"small": small, "large": old})
    one = {"norm.weight": torch.tensor([1.0, 2.0]), "norm.running_mean": torch.tensor([4.0, 8.0])}
    two = {"norm.weight": torch.tensor([3.0, 0.0]), "norm.running_mean": torch.tensor([8.0, 0.0])}
    updates = {0: baselines.NovaUpdate(one, 30, 2.0), 1: baselines.NovaUpdate(two, 10, 6.0)}
    after = baselines.fednova_server_update(server, updates)["weights"]["large"]
    # p = 3/4 and 1/4, tau_eff = 3, d = (0, -1/2) and (-1/3, 1/6)
    agree(after["norm.weight"], [1 + 3 / 12, 1 + 3 * (3 / 8 - 1 / 24)], atol=1e-12)
    agree(after["norm.running_mean"], [5.0, 6.0], atol=1e-12)
    assert torch.equal(after["classifier.weight"], old["classifier.weight"])


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9])
def test_the_accumulated_norm_is_nova_codes_recursion(momentum):
    count = norm = 0.0
    for steps in range(1, 30):
        count = momentum * count + 1
        norm += count
        assert baselines.accumulated_norm(steps, momentum) == pytest.approx(norm, rel=1e-12)


@pytest.mark.parametrize("norm", [1.0, 7.3])
def test_fednova_takes_over_a_single_client(norm):
    server = baselines.fedavg_init(shared_weights(["deep"]))
    sent = models.copy_state(network("deep", seed=3))
    after = baselines.fednova_server_update(server, {4: baselines.NovaUpdate(sent, 9, norm)})
    agree(after["weights"]["deep"], arrays(sent), atol=1e-12)


# ------------------------------------------------------------------------------------------ MOON


def cosine(a, b):
    return (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))


def contrast(z, z_global, z_previous, temperature: float) -> float:
    near, far = (np.exp(cosine(z, other) / temperature) for other in (z_global, z_previous))
    return -np.log(near / (near + far)).mean()


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_moons_contrastive_loss_is_the_equation_and_ignores_lengths(temperature):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(3, 6, 4))
    loss = baselines.contrastive_loss(*torch.from_numpy(z), temperature).item()
    assert loss == pytest.approx(contrast(*z, temperature), abs=1e-12)
    longer = z * rng.uniform(0.1, 10, size=(3, 6, 1))
    again = baselines.contrastive_loss(*torch.from_numpy(longer), temperature).item()
    assert again == pytest.approx(loss, abs=1e-12)


def test_moons_loss_is_log_two_without_gradient_where_the_last_model_is_the_global_one():
    z, other = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(1))
    z.requires_grad_()
    loss = baselines.contrastive_loss(z, other, other.clone(), baselines.MOON_TEMPERATURE)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), abs=1e-12)
    agree(z.grad, np.zeros((5, 4)), atol=1e-12)


def test_steps_of_moon_descend_its_whole_loss():
    mu, temperature = 2.0, 0.5
    received, previous = (models.copy_state(network("deep", seed)) for seed in (5, 8))
    result = baselines.moon_client_update(
        *scratch("deep"), received, own_data(2), stream_of(2, 0), previous, local_epochs=2,
        batch_size=64, mu=mu, temperature=temperature)

    x, y = whole_set(own_data(2))
    z_global, z_previous = (features(arrays(weights), x) for weights in (received, previous))

    def objective(weights):
        z = features(weights, x)
        return (cross_entropy(head(weights, z), y)
                + mu * contrast(z, z_global, z_previous, temperature))

    weights, entropy = arrays(received), 0.0
    for _ in range(2):  # the first step begins where the global model is, the second does not
        entropy += cross_entropy(logits(weights, x), y) * len(y)
        g = finite_differences(objective, weights)
        weights = {name: weights[name] - LR * g[name] for name in weights}
    agree(result.update.weights, weights)
    agree(result.kept, weights)
    assert result.loss == pytest.approx(entropy)


# ------------------------------------------------------------------------------------------ InCo


def combined(g, g0, step_limit: float = 5.0, limit: float = 0.1):
    """g', kernel by kernel, with the released code's 1e-7 in the denominators."""
    out = np.empty_like(g)
    for at in np.ndindex(g.shape[:2]):
        a, b = g[at], g0[at]
        n, n0 = np.sqrt((a * a).sum()), np.sqrt((b * b).sum())
        theta = min(abs(np.trace(b.T @ a)) / (np.trace(b.T @ b) + 1e-7), step_limit)
        out[at] = np.clip((a / (n + 1e-7) + theta * b / (n0 + 1e-7)) * (n + n0) / 2, -limit, limit)
    return out


def kernels(scale: float, seed: int, shape=(5, 4, 3, 3)):
    return np.random.default_rng(seed).normal(scale=scale, size=shape)


@pytest.mark.parametrize("scale, reference_scale", [
    (0.03, 0.03),
    (0.05, 0.001),  # theta is at its limit
    (0.3, 0.3),  # entries are at theirs
])
def test_incos_rule_is_a_loop_over_kernels(scale, reference_scale):
    g, g0 = kernels(scale, 1), kernels(reference_scale, 2)
    if reference_scale < 0.01 or scale > 0.1:
        unlimited = combined(g, g0, step_limit=math.inf, limit=math.inf)
        assert np.abs(combined(g, g0) - unlimited).max() > 0.01
    ours = baselines.cross_layer_update(torch.from_numpy(g), torch.from_numpy(g0))
    agree(ours, combined(g, g0))


@pytest.mark.parametrize("reference, factor", [(0, 0.5), (1, 2), (2, 2.25), (-1, 0)])
def test_incos_rule_has_its_closed_forms(reference, factor):
    g = kernels(1000, 3)
    ours = baselines.cross_layer_update(torch.from_numpy(g), torch.from_numpy(reference * g),
                                        limit=math.inf)
    agree(ours, factor * g, atol=1e-4)  # of 1,000: the code's 1e-7 beside norms of 3,000


def resnet_like(depths: dict, channels: int = 4) -> dict:
    """Name -> shape of a small ResNet's weights; stages after the first double the channels."""
    shapes = {"extractor.conv1.weight": (channels, 1, 3, 3)}
    before = channels
    for stage, depth in depths.items():
        for block in range(depth):
            at = f"intermediate.{stage}.{block}."
            shapes |= {at + "conv1.weight": (channels, before, 3, 3),
                       at + "bn1.weight": (channels,), at + "bn1.running_mean": (channels,),
                       at + "conv2.weight": (channels, channels, 3, 3)}
            if before != channels:
                shapes[at + "downsample.0.weight"] = (channels, before, 1, 1)
            before = channels
        channels *= 2
    return shapes | {"classifier.fc.weight": (CLASSES, before), "classifier.fc.bias": (CLASSES,)}


def resnet_weights(depths_of: dict, scale: float = 0.1) -> dict:
    """Architecture -> random weights, equal where the names are."""
    rng, whole = np.random.default_rng(0), {}
    for depths in depths_of.values():
        for name, shape in resnet_like(depths).items():
            whole.setdefault(name, rng.normal(scale=scale, size=shape))
    return {arch: {name: whole[name] for name in resnet_like(depths)}
            for arch, depths in depths_of.items()}


def moved(state: dict, rng, scale: float) -> dict:
    return {name: array + rng.normal(scale=scale, size=array.shape)
            for name, array in state.items()}


def test_inco_combines_only_deeper_convolutions_with_the_second_one_of_block_0():
    x = resnet_weights({"small": {"layer1": 1, "layer2": 1}, "large": {"layer1": 3, "layer2": 2}})
    rng, counts = np.random.default_rng(1), {0: 5, 1: 7, 2: 11}
    archs = {0: "small", 1: "large", 2: "large"}
    sent = {k: moved(x[arch], rng, 0.04) for k, arch in archs.items()}
    server = baselines.fedavg_init({arch: tensors(state) for arch, state in x.items()})
    after = baselines.inco_server_update(
        server, {k: Update(tensors(y), counts[k]) for k, y in sent.items()})["weights"]

    old = x["large"]
    g = {name: weighted({k: y[name] - old[name] for k, y in sent.items() if name in y}, counts)
         for name in old}
    expected = {name: old[name] + g[name] for name in old}
    for block in ("layer1.1", "layer1.2", "layer2.1"):
        g0 = g[f"intermediate.{block.split('.')[0]}.0.conv2.weight"]
        for conv in ("conv1", "conv2"):
            name = f"intermediate.{block}.{conv}.weight"
            expected[name] = old[name] + combined(g[name], g0)
            assert np.abs(expected[name] - old[name] - g[name]).max() > 1e-3
    agree(after["large"], expected)
    agree(after["small"], {name: expected[name] for name in x["small"]})


# ----------------------------------------------------------------------------------- InclusiveFL


DEPTHS = {"small": {"layer1": 1, "layer2": 1, "layer3": 1},
          "middle": {"layer1": 2, "layer2": 1, "layer3": 2},
          "large": {"layer1": 4, "layer2": 2, "layer3": 2}}
LARGER = {"small": "middle", "middle": "large"}


def inclusive(x: dict, sent: dict, counts: dict, archs: dict, beta: float) -> dict:
    """The server's update, architecture -> weights; x, sent: by architecture, by client."""
    def depth(arch):
        return DEPTHS[arch]["layer3"]

    def is_own(arch, name):
        return name.startswith((f"intermediate.layer3.{depth(arch) - 1}.", "classifier."))

    def mean(arch, name):
        mine = {k: y[name] for k, y in sent.items() if archs[k] == arch}
        return weighted(mine, counts) if mine else None

    after = {}
    for arch, state in x.items():
        after[arch] = {}
        for name, old in state.items():
            if not is_own(arch, name):
                shared = {k: y[name] for k, y in sent.items()
                          if name in y and not is_own(archs[k], name)}
                after[arch][name] = weighted(shared, counts) if shared else old
                continue
            own = mean(arch, name)
            if (own is None or name.endswith("running_mean") or arch not in LARGER
                    or name.startswith("classifier.")):
                after[arch][name] = old if own is None else own
                continue
            larger = LARGER[arch]
            rest = name.split(".", 3)[3]
            names = [f"intermediate.layer3.{block}.{rest}"
                     for block in range(depth(arch) - 1, depth(larger))]
            compatible = all(other in x[larger] and x[larger][other].shape == old.shape
                             for other in names)
            step = old - own
            if compatible and larger in (archs[k] for k in sent):
                m = sum(x[larger][other] - mean(larger, other) for other in names) / len(names)
                step = beta * m + (1 - beta) * step
            after[arch][name] = old - step
    return after


@pytest.mark.parametrize("beta", [0.2, 0.7])
def test_inclusivefl_is_its_momentum_rule_written_out(beta):
    x = resnet_weights(DEPTHS)
    server = baselines.fedavg_init({arch: tensors(state) for arch, state in x.items()})
    rng, counts = np.random.default_rng(2), {0: 3, 1: 8, 2: 5, 3: 7, 4: 2, 5: 9}
    archs = dict(enumerate(["small", "small", "middle", "middle", "large", "large"]))
    everybody, nobody_large, nobody_small = range(6), (0, 2, 3), (2, 5)
    for drawn in (everybody, everybody, nobody_large, nobody_small):
        sent = {k: moved(x[archs[k]], rng, 0.3) for k in drawn}
        server = baselines.inclusivefl_server_update(
            server, {k: Update(tensors(y), counts[k]) for k, y in sent.items()}, momentum=beta)
        x = inclusive(x, sent, counts, archs, beta)
        for arch in DEPTHS:
            agree(server["weights"][arch], x[arch])
    for name in ("intermediate.layer3.0.conv1.weight", "classifier.fc.weight"):
        assert np.abs(x["small"][name] - x["large"][name]).max() > 0.1


# --------------------------------------------------------------------------- HeteroFL and FedRolex


def width_net(rate: float, bottleneck: bool = False, exits=None) -> nn.Module:
    """Stages of 4, 8, 16 and 32 channels at the rate 1/16, for three colours and three classes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = models.WidthResNet((1, 1, 1, 1), 3, CLASSES, bottleneck=bottleneck, stem_stride=1,
                                 rate=rate, exits=exits)
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


def windows(whole: dict, rate: float, start: int, classes=None, **options) -> dict:
    part = width_net(rate, **options).state_dict()
    return {name: window(name, whole[name].shape, part[name].shape, start, classes)
            for name in part}


@pytest.mark.parametrize("start", [0, 1, 6, 37])
@pytest.mark.parametrize("bottleneck", [False, True])
def test_index_sets_are_consecutive_channels_modulo_the_layers_own(bottleneck, start):
    whole = models.copy_state(width_net(1 / 16, bottleneck))
    part = width_net(3 / 64, bottleneck).state_dict()  # 3, 6, 12 and 24 channels
    classes = torch.tensor([0, 2])
    sets = models.index_sets(whole, part, start=start, classes=classes)
    expected = windows(whole, 3 / 64, start, [0, 2], bottleneck=bottleneck)
    assert sets.keys() == expected.keys()
    for name in expected:
        assert [s.tolist() for s in sets[name]] == [s.tolist() for s in expected[name]], name


@pytest.mark.parametrize("start", [0, 1, 6])
@pytest.mark.parametrize("bottleneck", [False, True])
@pytest.mark.parametrize("rate", [1 / 16, 3 / 64, 1 / 64])
def test_a_submodel_computes_what_the_whole_network_does_with_zeros_elsewhere(
        rate, bottleneck, start):
    whole, part = width_net(1 / 16, bottleneck), width_net(rate, bottleneck)
    state = models.copy_state(whole)
    part.load_state_dict(models.extract(state, models.index_sets(state, part.state_dict(),
                                                                 start=start)))
    masked = {}
    for name, sets in windows(state, rate, start, bottleneck=bottleneck).items():
        masked[name] = np.zeros(state[name].shape)
        masked[name][np.ix_(*sets)] = state[name].numpy()[np.ix_(*sets)]
    whole.load_state_dict(tensors(masked))
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    agree(part.eval()(x).detach(), whole.eval()(x).detach().numpy())


def test_a_rolling_window_covers_every_channel_equally_often():
    whole, part = models.copy_state(width_net(1 / 16)), width_net(3 / 64).state_dict()
    for name, dim in {"extractor.conv1.weight": 0, "classifier.0.fc.weight": 1}.items():
        size, n = whole[name].shape[dim], part[name].shape[dim]
        counts = np.zeros(size, dtype=int)
        for start in range(size):
            np.add.at(counts, models.index_sets(whole, part, start=start)[name][dim].numpy(), 1)
        assert n < size and counts.tolist() == [n] * size


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


@pytest.mark.parametrize("update, rolls", [(baselines.heterofl_server_update, 0),
                                           (baselines.fedrolex_server_update, 1)])
def test_every_coordinate_is_the_mean_over_the_clients_that_hold_it(update, rolls):
    whole = arrays(models.copy_state(width_net(1 / 16)))
    server = baselines.heterofl_init({"whole": tensors(whole)})
    rates, counts = {0: 3 / 64, 1: 1 / 32, 2: 1 / 64, 3: 1 / 32}, {0: 4, 1: 7, 2: 9, 3: 5}
    classes = {0: [0, 1], 1: [1], 2: None, 3: [0, 1]}
    rng = np.random.default_rng(4)
    for round, drawn in enumerate([(0, 1, 2), (0, 1, 3), (1, 2), (0, 3)]):
        places = {k: windows(whole, rates[k], rolls * round, classes[k]) for k in drawn}
        sent = {k: moved({name: whole[name][np.ix_(*sets)] for name, sets in places[k].items()},
                         rng, 1.0) for k in drawn}
        server = update(server, {
            k: WidthUpdate(tensors(y), counts[k],
                           None if classes[k] is None else torch.tensor(classes[k]))
            for k, y in sent.items()})
        before, whole = whole, coordinate_means(whole, sent, places, counts)
        (ours,) = server["weights"].values()
        agree(ours, whole)
        kept = np.mean([np.mean(whole[name] == before[name]) for name in whole])
        assert 0.1 < kept < 0.9


@pytest.mark.parametrize("update", [baselines.heterofl_server_update,
                                    baselines.fedrolex_server_update])
def test_unchanged_submodels_leave_the_whole_network_as_it_is_bit_for_bit(update):
    # In single precision, whose products with counts the double-precision sum holds exactly.
    whole = models.copy_state(width_net(1 / 16).float())
    server = baselines.heterofl_init({"whole": whole})
    for round in range(3):
        start = round if update is baselines.fedrolex_server_update else 0
        updates = {}
        for k, rate in enumerate((1 / 16, 3 / 64, 1 / 64)):
            sets = models.index_sets(whole, width_net(rate).state_dict(), start=start)
            updates[k] = WidthUpdate(models.extract(whole, sets), 3 + 4 * k, None)
        server = update(server, updates)
        (ours,) = server["weights"].values()
        assert all(torch.equal(ours[name], whole[name]) for name in whole)


def test_downloads_of_fedrolex_begin_one_channel_further_in_every_round():
    whole = models.copy_state(models.build("resnet18-1/8", 3, CLASSES))
    server = baselines.heterofl_init({"resnet18-1/8": whole})
    client = Client(0, None, "resnet18-1/16")
    part = models.shapes("resnet18-1/16", 3, CLASSES)
    for round in range(3):
        received = baselines.heterofl_download(server, client, stream_of(0, round))
        agree(received, {name: whole[name].numpy()[
            np.ix_(*window(name, whole[name].shape, part[name].shape, round))] for name in part})
        server = baselines.fedrolex_server_update(server, {0: WidthUpdate(received, 5, None)})


def test_the_masked_cross_entropy_has_zeros_for_absent_classes():
    z, own = np.random.default_rng(5).normal(size=(6, 5)), [1, 3]
    zeroed = np.zeros_like(z)
    zeroed[:, own] = z[:, own]
    agree(baselines.mask_absent(torch.from_numpy(z), torch.tensor(own)), zeroed, atol=0)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_step_of_heterofl_descends_the_masked_cross_entropy(clip):
    own = own_data(2)
    own = own._replace(labels=own.labels % 2 * 2)  # the class 1 is absent
    received = shared_weights(["deep"])["deep"]
    result = baselines.heterofl_client_update(*scratch("deep"), received, own, stream_of(2, 0),
                                              clip=clip, **ALL_AT_ONCE)
    x, y = whole_set(own)
    start, present = arrays(received), np.array([1.0, 0.0, 1.0])
    z = logits(start, x) * present
    g = backward(start, x, (softmax(z) - one_hot(y)) * present / len(y))
    assert length(g) > 0.05
    g = shortened(g, clip)
    expected = {name: start[name] - LR * g[name] for name in start}
    for name in ("classifier.fc.weight", "classifier.fc.bias"):
        expected[name] = expected[name][[0, 2]]
    agree(result.update.weights, expected)
    assert result.update.classes.tolist() == [0, 2]
    assert result.loss == pytest.approx(cross_entropy(z, y) * len(y))


# --------------------------------------------------------------------------------------- ScaleFL


@pytest.mark.parametrize("gamma", [0.0, 0.4])
@pytest.mark.parametrize("exits", [1, 2, 4])
def test_scalefls_loss_is_a_weighted_sum_over_exits_that_the_last_one_teaches(exits, gamma):
    rng, temperature, batch = np.random.default_rng(6), 3.0, 5
    z = rng.normal(scale=2, size=(exits, batch, CLASSES))
    y = rng.integers(CLASSES, size=batch)
    expected, at_logits = 0.0, np.zeros_like(z)
    teacher = softmax(z[-1] / temperature)
    for j in range(1, exits + 1):
        share = j / (exits * (exits + 1) / 2)
        student = softmax(z[j - 1] / temperature)
        expected += share * cross_entropy(z[j - 1], y)
        at_logits[j - 1] = share * (softmax(z[j - 1]) - one_hot(y)) / batch
        if j < exits:
            divergence = (teacher * np.log(teacher / student)).sum(axis=1).mean()
            expected += share * gamma * temperature ** 2 * divergence
            at_logits[j - 1] += share * gamma * temperature * (student - teacher) / batch
    ours = torch.from_numpy(z).requires_grad_()
    loss = baselines.exits_loss(list(ours), torch.from_numpy(y), gamma, temperature)
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    agree(ours.grad, at_logits, atol=1e-12)


def test_scalefl_averages_every_coordinate_of_every_exit_over_its_holders():
    whole = arrays(models.copy_state(width_net(1 / 16, exits=(1, 2, 3, 4))))
    levels = {0: (3 / 64, (1, 2, 3)), 1: (1 / 32, (1, 2)), 2: (1 / 64, (1,))}
    rng, counts = np.random.default_rng(9), {0: 4, 1: 7, 2: 9}
    server = baselines.scalefl_init({"whole": tensors(whole)})
    for _ in range(2):
        places = {k: windows(whole, rate, 0, exits=exits) for k, (rate, exits) in levels.items()}
        sent = {k: moved({name: whole[name][np.ix_(*sets)] for name, sets in held.items()},
                         rng, 1.0) for k, held in places.items()}
        server = baselines.scalefl_server_update(
            server, {k: WidthUpdate(tensors(y), counts[k], None) for k, y in sent.items()})
        whole = coordinate_means(whole, sent, places, counts)
        (ours,) = server["weights"].values()
        agree(ours, whole)


class TwoExits(nn.Module):
    """The linear networks as one with two exits, "plain" before "deep"."""

    def __init__(self, seed: int):
        super().__init__()
        self.first, self.last = network("plain", seed), network("deep", seed + 1)

    def exit_logits(self, x):
        return [self.first(x), self.last(x)]


@pytest.mark.parametrize("distils", [False, True])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_step_of_scalefl_trains_both_exits_and_distils_only_when_told(clip, distils):
    gamma, temperature, model = 0.8, 3.0, TwoExits(seed=99)
    received = models.copy_state(TwoExits(seed=5))
    result = baselines.scalefl_client_update(
        model, torch.optim.SGD(model.parameters(), LR), baselines.Scaled(received, distils),
        own_data(2), stream_of(2, 0), self_distillation=gamma, temperature=temperature, clip=clip,
        **ALL_AT_ONCE)
    (x, y), start, g = whole_set(own_data(2)), arrays(received), {}
    exits = {part: {name.removeprefix(part): array for name, array in start.items()
                    if name.startswith(part)} for part in ("first.", "last.")}
    z = {part: logits(weights, x) for part, weights in exits.items()}
    for part, share in {"first.": 1 / 3, "last.": 2 / 3}.items():
        at_logits = softmax(z[part]) - one_hot(y)
        if distils and part == "first.":
            at_logits += gamma * temperature * (softmax(z["first."] / temperature)
                                                - softmax(z["last."] / temperature))
        g |= {part + name: array for name, array in
              backward(exits[part], x, share * at_logits / len(y)).items()}
    assert length(g) > 0.05
    g = shortened(g, clip)
    agree(result.update.weights, {name: start[name] - LR * g[name] for name in start})
    assert result.loss == pytest.approx(cross_entropy(z["last."], y) * len(y))


def test_scalefl_sends_levels_of_the_whole_network_and_distils_after_a_quarter_of_the_rounds():
    whole = models.copy_state(models.build("resnet18-1/8-exit5", 3, CLASSES))
    server = baselines.scalefl_init({"resnet18-1/8-exit5": whole})
    level = "resnet18-1/16-exit2"
    part = models.shapes(level, 3, CLASSES)
    distils = []
    for round in range(8):
        received = baselines.scalefl_download(server, Client(0, None, level), stream_of(0, round),
                                              rounds=8)
        agree(received.weights, {name: whole[name].numpy()[
            np.ix_(*window(name, whole[name].shape, part[name].shape, 0))] for name in part})
        distils.append(received.distils)
        update = WidthUpdate(received.weights, 5, None)
        server = baselines.scalefl_server_update(server, {0: update})
    assert distils == [False] * 3 + [True] * 5


# ----------------------------------------------------------------------------------------- FedDF


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_distillation_loss_has_the_gradient_of_its_equation(temperature):
    rng, batch = np.random.default_rng(7), 6
    s, t = rng.normal(scale=2, size=(2, batch, CLASSES))
    student = torch.from_numpy(s).requires_grad_()
    loss = baselines.distillation_loss(student, torch.from_numpy(t), temperature)
    loss.backward()
    p, q = softmax(s / temperature), softmax(t / temperature)
    assert loss.item() == pytest.approx((q * np.log(q / p)).sum(axis=1).mean(), abs=1e-12)
    agree(student.grad, (p - q) / (temperature * batch), atol=1e-12)


def test_a_student_that_agrees_with_its_teacher_learns_nothing():
    student = torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(2)).requires_grad_()
    loss = baselines.distillation_loss(student, student.detach().clone())
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    agree(student.grad, np.zeros((6, CLASSES)), atol=1e-12)


class Adam:
    """The optimiser, written out; with weight decay, that of Adam and not of AdamW."""

    def __init__(self, weight_decay: float = 0.0):
        self.weight_decay, self.m, self.v, self.t = weight_decay, {}, {}, 0

    def step(self, weights: dict, g: dict, lr: float) -> dict:
        self.t, after = self.t + 1, {}
        for name, array in weights.items():
            d = g[name] + self.weight_decay * array
            self.m[name] = 0.9 * self.m.get(name, 0.0) + 0.1 * d
            self.v[name] = 0.999 * self.v.get(name, 0.0) + 0.001 * d * d
            m, v = self.m[name] / (1 - 0.9 ** self.t), self.v[name] / (1 - 0.999 ** self.t)
            after[name] = array - lr * m / (np.sqrt(v) + 1e-8)
        return after


def build(arch: str, weights: dict) -> nn.Module:
    model = network(arch)
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("contrast", [1, 200])  # with 200 the gradient is cut off
def test_feddf_distils_the_mean_logits_of_all_clients_into_every_architecture(contrast):
    archs, steps, temperature, lr = ("plain", "deep"), 4, 2.0, 1e-3
    averages = {arch: models.copy_state(network(arch, seed=10)) for arch in archs}
    sent = {k: models.copy_state(network(arch_of(k, archs), seed=k)) for k in range(4)}
    proxy = own_data(2)._replace(prepare=lambda x: contrast * (x / 255 - 0.5))
    server = baselines.feddf_distil(
        baselines.fedavg_init(averages), {k: Update(y, SIZES[k]) for k, y in sent.items()}, build,
        stream_of(0, 0), proxy=proxy, distillation_steps=steps, temperature=temperature)

    x = contrast * whole_set(proxy)[0]
    teacher = sum(logits(arrays(y), x) for y in sent.values()) / 4
    for arch in archs:
        student, optimizer = arrays(averages[arch]), Adam()
        for step in range(steps):  # a batch is all twelve proxy images, in whatever order
            p = softmax(logits(student, x) / temperature)
            g = backward(student, x, (p - softmax(teacher / temperature)) / (temperature * len(x)))
            assert (length(g) > 5) == (contrast == 200)
            student = optimizer.step(student, shortened(g, 5.0),
                                     lr * (1 + math.cos(math.pi * step / steps)) / 2)
        agree(server["weights"][arch], student)


# ---------------------------------------------------------------------------------------- FedGen


def diversity(noise, latents) -> float:
    """Over all pairs, those of a latent with itself among them."""
    count = len(noise)
    total = sum(((noise[i] - noise[j]) ** 2).mean() * np.abs(latents[i] - latents[j]).mean()
                for i in range(count) for j in range(count))
    return math.exp(-total / count ** 2)


def test_fedgens_diversity_loss_is_a_double_loop():
    rng = np.random.default_rng(8)
    noise, latents = rng.uniform(size=(7, 5)), rng.normal(size=(7, 4))
    ours = generator.latent_diversity_loss(torch.from_numpy(noise), torch.from_numpy(latents))
    assert ours.item() == pytest.approx(diversity(noise, latents), abs=1e-12)


def latents_of(weights: dict, noise, y, *, training: bool):
    """Linear, batch normalisation, ReLU, linear."""
    x = np.concatenate([noise, one_hot(y)], axis=1)
    h = x @ weights["network.0.weight"].T + weights["network.0.bias"]
    if training:
        mean, variance = h.mean(axis=0), h.var(axis=0)
    else:
        mean, variance = weights["network.1.running_mean"], weights["network.1.running_var"]
    h = (h - mean) / np.sqrt(variance + 1e-5)
    h = np.maximum(h * weights["network.1.weight"] + weights["network.1.bias"], 0)
    return h @ weights["network.3.weight"].T + weights["network.3.bias"]


def test_steps_of_fedgens_generator_descend_its_weighted_loss():
    shares = np.array([[0.25, 0.0, 1.0], [0.75, 0.0, 0.0]])  # nobody holds the class 1
    batch, diversity_weight = 8, 0.6
    net = generator.LatentGenerator(CLASSES, 4, noise_dim=5, hidden=6)
    heads = [network("plain", seed) for seed in (1, 2)]
    trained = [name for name, _ in net.named_parameters()]
    weights, optimizer = {name: arrays(net.state_dict())[name] for name in trained}, Adam(1e-2)
    teachers = [arrays(model.state_dict()) for model in heads]
    state, ours, theirs = None, torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    for steps, lr_factor in ((2, 1.0), (1, 0.5)):
        state = generator.train_latent_generator(
            net, state, [model.classifier for model in heads], torch.from_numpy(shares), ours,
            steps=steps, batch=batch, lr_factor=lr_factor, diversity_weight=diversity_weight)
        for _ in range(steps):
            y = np.array([0, 2])[torch.randint(2, (batch,), generator=theirs).numpy()]
            noise = torch.rand(batch, 5, generator=theirs).numpy()

            def objective(weights):
                latents = latents_of(weights, noise, y, training=True)
                total = diversity_weight * diversity(noise, latents)
                for teacher, share in zip(teachers, shares):
                    p = softmax(head(teacher, latents))[np.arange(batch), y]
                    total += (share[y] * -np.log(p)).mean()
                return total

            weights = optimizer.step(weights, finite_differences(objective, weights),
                                     3e-4 * lr_factor)
        after = arrays(net.state_dict())
        agree({name: after[name] for name in trained}, weights)


@pytest.mark.parametrize("round", [3, 2000])  # by round 2,000 the weights are as low as they go
def test_steps_of_a_fedgen_client_descend_its_three_terms(round):
    lr, generated, known, k = 0.05, 32, np.array([0, 2]), 2
    net = generator.initial_latent_generator(CLASSES, 4, torch.Generator().manual_seed(4))
    state, rng = models.copy_state(net), torch.Generator().manual_seed(5)
    for name in ("network.1.running_mean", "network.1.running_var"):
        state[name] = torch.rand(state[name].shape, generator=rng) + 0.5
    received = shared_weights(["deep"])["deep"]
    result = baselines.fedgen_client_update(
        *scratch("deep", lr), baselines.Generated(received, state, torch.from_numpy(known), round),
        own_data(k), stream_of(k, round), synthetic_weight=2.0, matching_weight=0.7, **TRAINING)

    alpha, beta = (max(1e-4, weight * 0.98 ** round) for weight in (2.0, 0.7))
    weights, latent_rng, entropy = arrays(received), stream_of(k, round)(data.LATENT), 0.0
    for x, y in batches_of(k, round):
        random_y = known[torch.randint(2, (generated,), generator=latent_rng).numpy()]
        all_y = np.concatenate([random_y, y])
        noise = torch.rand(len(all_y), 64, generator=latent_rng).numpy()
        latents = latents_of(arrays(state), noise, all_y, training=False)
        p, q = softmax(logits(weights, x)), softmax(head(weights, latents[generated:]))
        entropy += cross_entropy(logits(weights, x), y) * len(y)
        g = backward(weights, x, (p - one_hot(y) + beta * (p - q)) / len(y))
        wrong = softmax(head(weights, latents[:generated])) - one_hot(random_y)
        factor = generated / BATCH * alpha / generated
        g["classifier.fc.weight"] += factor * wrong.T @ latents[:generated]
        g["classifier.fc.bias"] += factor * wrong.sum(axis=0)
        weights = {name: weights[name] - lr * g[name] for name in weights}
    agree(result.update.weights, weights)
    assert result.loss == pytest.approx(entropy)
    assert result.update.class_counts.tolist() == np.bincount(whole_set(own_data(k))[1]).tolist()

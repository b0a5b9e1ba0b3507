"""FedAvg and the other baselines: identities between them, and against loops written out here."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import adam, same, sgd, stream, tiny_data, tiny_net

import baselines
import data
import models
from baselines import Client

EPOCHS = {"local_epochs": 2, "batch_size": 8}


def client(k: int = 0, arch: str = "tiny") -> Client:
    return Client(k, torch.arange(3), arch)


def received(seed: int = 5) -> dict:
    return models.copy_state(tiny_net(seed))


def test_fedavg_is_a_plain_training_loop():
    weights, own = received(), tiny_data()
    model = tiny_net(0)
    model.load_state_dict(weights)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    rng, total = stream(data.BATCHES), 0.0
    for _ in range(2):
        for rows in own.indices[torch.randperm(20, generator=rng)].split(8):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(own.images[rows] / 255 - 0.5), own.labels[rows])
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
    result = baselines.fedavg_client_update(*adam(), weights, own, stream, **EPOCHS)
    assert same(result.update.weights, models.copy_state(model))
    assert result.loss == pytest.approx(total)
    assert result.samples == 40 and result.update.num_samples == 20 and result.kept is None


@pytest.mark.parametrize("make", [adam, sgd])
def test_a_used_scratch_network_and_optimiser_are_as_good_as_new(make):
    clean = baselines.fedavg_client_update(*make(), received(), tiny_data(), stream, **EPOCHS)
    model, optimizer = make()
    for weights, own in ((received(9), tiny_data(30, 3)), (received(), tiny_data())):
        again = baselines.fedavg_client_update(model, optimizer, weights, own, stream, **EPOCHS)
    assert same(clean.update.weights, again.update.weights) and clean.loss == again.loss


def test_momentum_is_forgotten_between_clients_too():
    def with_momentum():
        model = tiny_net(99)
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    clean = baselines.fedavg_client_update(*with_momentum(), received(), tiny_data(), stream,
                                           **EPOCHS)
    model, optimizer = with_momentum()
    for _ in range(2):
        again = baselines.fedavg_client_update(model, optimizer, received(), tiny_data(), stream,
                                               **EPOCHS)
    assert same(clean.update.weights, again.update.weights)


@pytest.mark.parametrize("update, extra", [(baselines.fedavg_client_update, {}),
                                           (baselines.fedprox_client_update, {"mu": 0.1})])
def test_arguments_are_unchanged_and_nothing_is_shared_with_the_scratch_model(update, extra):
    weights, own = received(), tiny_data()
    weights_before, own_before = copy.deepcopy(weights), copy.deepcopy(own[:3])
    model, optimizer = adam()
    result = update(model, optimizer, weights, own, stream, **EPOCHS, **extra)
    sent = copy.deepcopy(result.update.weights)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    assert same(weights, weights_before) and same(result.update.weights, sent)
    assert all(torch.equal(a, b) for a, b in zip(own, own_before))


def test_without_steps_the_weights_come_back_unchanged():
    result = baselines.fedavg_client_update(*adam(), received(), tiny_data(), stream,
                                            local_epochs=0, batch_size=8)
    assert same(result.update.weights, received()) and result.samples == 0


def test_a_last_batch_of_one_image_does_not_crash_batch_normalisation():
    net = models.build("resnet10", 1, 10)
    own = data.ClientData(torch.zeros(5, 1, 32, 32, dtype=torch.uint8), torch.arange(5),
                          torch.arange(5), lambda x: x.float())
    optimizer = torch.optim.Adam(net.parameters())
    result = baselines.fedavg_client_update(net, optimizer, models.copy_state(net), own, stream,
                                            local_epochs=1, batch_size=4)
    assert result.samples == 4


def test_fedprox_with_mu_zero_is_fedavg():
    plain = baselines.fedavg_client_update(*adam(), received(), tiny_data(), stream, **EPOCHS)
    prox = baselines.fedprox_client_update(*adam(), received(), tiny_data(), stream, mu=0, **EPOCHS)
    assert same(plain.update.weights, prox.update.weights) and plain.loss == prox.loss


def test_first_step_of_fedprox_has_no_proximal_gradient():
    one_step = {"local_epochs": 1, "batch_size": 20}
    plain = baselines.fedavg_client_update(*sgd(), received(), tiny_data(), stream, **one_step)
    prox = baselines.fedprox_client_update(*sgd(), received(), tiny_data(), stream, mu=5,
                                           **one_step)
    assert same(plain.update.weights, prox.update.weights)


def test_proximal_gradient_is_that_of_the_squared_distance_over_parameters():
    model, reference = tiny_net(1), received(2)
    mu, own = 0.3, tiny_data()
    x, y = own.prepare(own.images), own.labels

    F.cross_entropy(model(x), y).backward()
    baselines.add_proximal_gradient(model, reference, mu)
    by_hand = [parameter.grad.clone() for parameter in model.parameters()]

    model.zero_grad()
    distance = sum(((parameter - reference[name]) ** 2).sum()
                   for name, parameter in model.named_parameters())
    (F.cross_entropy(model(x), y) + mu / 2 * distance).backward()
    for ours, parameter in zip(by_hand, model.parameters()):
        torch.testing.assert_close(ours, parameter.grad)


def test_a_larger_mu_keeps_the_client_nearer_to_what_it_received():
    def moved(mu):
        result = baselines.fedprox_client_update(*sgd(lr=0.02), received(), tiny_data(), stream,
                                                 mu=mu, **EPOCHS)
        return sum(((result.update.weights[name] - received()[name]) ** 2).sum().item()
                   for name, _ in tiny_net().named_parameters())

    distances = [moved(mu) for mu in (0, 1, 10, 40)]
    assert distances == sorted(distances, reverse=True) and distances[-1] < distances[0] / 3


def test_the_server_takes_over_a_single_client_and_weights_two_by_their_images():
    server = baselines.fedavg_init({"tiny": received(0)})
    one, two = baselines.Update(received(1), 30), baselines.Update(received(2), 10)
    alone = baselines.fedavg_server_update(server, {4: one})
    assert same(alone["weights"]["tiny"], one.weights)
    assert same(server["weights"]["tiny"], received(0))
    both = baselines.fedavg_server_update(server, {4: one, 7: two})["weights"]["tiny"]
    name = "classifier.1.weight"
    torch.testing.assert_close(both[name], 0.75 * one.weights[name] + 0.25 * two.weights[name])
    halves = baselines.fedavg_server_update(server, {4: one, 7: two}, uniform=True)
    torch.testing.assert_close(halves["weights"]["tiny"][name],
                               (one.weights[name] + two.weights[name]) / 2)


def test_local_sends_nothing_keeps_its_model_and_uses_it():
    server = baselines.fedavg_init({"tiny": received()})
    assert baselines.local_download(server, client(), stream) == {}
    kept = baselines.local_initial_memory(server, client())
    first = baselines.local_client_update(*adam(), {}, tiny_data(), stream, kept, **EPOCHS)
    assert first.update.weights == {} and models.num_bytes(first.update) == 0
    same_as = baselines.fedavg_client_update(*adam(), received(), tiny_data(), stream, **EPOCHS)
    assert same(first.kept, same_as.update.weights)

    second = baselines.local_client_update(*adam(), {}, tiny_data(), stream, first.kept, **EPOCHS)
    assert not same(second.kept, first.kept)
    assert baselines.local_server_update(server, {0: second.update}) is server
    assert baselines.local_deploy(server, client(3), None) == ("tiny", server["weights"]["tiny"])
    assert baselines.local_deploy(server, client(3), second.kept) == (3, second.kept)


# ------------------------------------------------------------------------------ identities: FedAvg


def resnet_states(archs=("resnet10", "resnet14", "resnet18"), seed: int = 0) -> dict:
    """Weights by architecture, shared between them, of ResNets a tenth as large: blocks alone."""
    whole = {}
    rng = torch.Generator().manual_seed(seed)
    for arch in archs:
        for name, tensor in models.shapes(arch, 1, 10).items():
            if name not in whole:
                shape = [min(size, 6) if dim < 2 else size for dim, size in enumerate(tensor.shape)]
                if models.is_parameter(name):
                    whole[name] = torch.randn(shape, generator=rng)
                else:
                    whole[name] = torch.randint(1, 9, shape, generator=rng).to(tensor.dtype)
    return {arch: {name: whole[name] for name in models.shapes(arch, 1, 10)} for arch in archs}


def uploads_of(weights: dict, archs, seed: int = 1) -> dict:
    """Client id -> an update of its architecture's weights, moved at random."""
    rng = torch.Generator().manual_seed(seed)
    return {k: baselines.Update(
        {name: tensor + (torch.randn(tensor.shape, generator=rng) if models.is_parameter(name) else 1)
         for name, tensor in weights[arch].items()}, 10 + k) for k, arch in enumerate(archs)}


ARCHS = ["resnet10", "resnet14", "resnet18"]
AGGREGATIONS = [models.layerwise_average, models.per_architecture_average]


def all_same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(same(a[arch], b[arch]) for arch in a)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_switched_off_the_server_rules_are_fedavgs(aggregation):
    server = baselines.fedavg_init(resnet_states())
    updates = uploads_of(server["weights"], ARCHS * 2)
    plain = baselines.fedavg_server_update(server, updates, aggregation=aggregation)["weights"]
    off = baselines.inco_server_update(server, updates, aggregation=aggregation, cross_layer=False)
    assert all_same(off["weights"], plain)
    on = baselines.inco_server_update(server, updates, aggregation=aggregation)
    assert not all_same(on["weights"], plain)
    equal = {k: baselines.NovaUpdate(*update, 7.0) for k, update in updates.items()}
    nova = baselines.fednova_server_update(server, equal, aggregation=aggregation)
    assert all_same(nova["weights"], plain)
    unequal = {k: baselines.NovaUpdate(*update, 7.0 + k) for k, update in updates.items()}
    nova = baselines.fednova_server_update(server, unequal, aggregation=aggregation)
    assert not all_same(nova["weights"], plain)


@pytest.mark.parametrize("update", [baselines.inco_server_update,
                                    baselines.inclusivefl_server_update])
def test_a_federation_of_resnet10_alone_has_nothing_to_transfer(update):
    server = baselines.fedavg_init(resnet_states(["resnet10"]))
    updates = uploads_of(server["weights"], ["resnet10"] * 3)
    assert all_same(update(server, updates)["weights"],
                    baselines.fedavg_server_update(server, updates)["weights"])


def test_the_first_round_of_scaffold_is_fedavgs_with_twice_the_traffic():
    server = baselines.scaffold_init({"tiny": received()})
    down = baselines.scaffold_download(server, client(), stream)
    assert models.num_bytes(down.variate) == sum(4 * p.numel() for p in tiny_net().parameters())
    kept = baselines.scaffold_initial_memory(server, client())
    ours = baselines.scaffold_client_update(*adam(), down, tiny_data(), stream, kept, **EPOCHS)
    plain = baselines.fedavg_client_update(*adam(), received(), tiny_data(), stream, **EPOCHS)
    assert same(ours.update.weights, plain.update.weights) and ours.loss == plain.loss
    again = baselines.scaffold_client_update(*adam(), down, tiny_data(), stream, ours.kept, **EPOCHS)
    assert not same(again.update.weights, plain.update.weights)
    after = baselines.scaffold_server_update(server, {0: ours.update}, num_clients=1)["weights"]
    assert all_same(after, baselines.fedavg_server_update(server, {0: plain.update})["weights"])


def test_moon_with_mu_zero_is_fedavg_and_keeps_its_model():
    previous = models.copy_state(tiny_net(8))
    ours = baselines.moon_client_update(*adam(), received(), tiny_data(), stream, previous, mu=0.0,
                                        **EPOCHS)
    plain = baselines.fedavg_client_update(*adam(), received(), tiny_data(), stream, **EPOCHS)
    assert same(ours.update.weights, plain.update.weights) and ours.loss == plain.loss
    assert same(ours.kept, ours.update.weights)
    pulled = baselines.moon_client_update(*adam(), received(), tiny_data(), stream, previous,
                                          **EPOCHS)
    assert not same(pulled.update.weights, plain.update.weights)

"""FedAvg and the other baselines: identities between them, and against loops written out here."""

import copy
import inspect
from itertools import pairwise

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
        {name: tensor + (torch.randn(tensor.shape, generator=rng)
                         if models.is_parameter(name) else 1)
         for name, tensor in weights[arch].items()}, 10 + k) for k, arch in enumerate(archs)}


def owners_of(archs) -> dict:
    return {k: client(k, arch) for k, arch in enumerate(archs)}


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
    again = baselines.scaffold_client_update(*adam(), down, tiny_data(), stream, ours.kept,
                                             **EPOCHS)
    assert not same(again.update.weights, plain.update.weights)
    after = baselines.scaffold_server_update(server, {0: ours.update}, owners={0: client()})
    plain_after = baselines.fedavg_server_update(server, {0: plain.update})
    assert all_same(after["weights"], plain_after["weights"])


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


# ---------------------------------------------------------- identities: sub-models, server training

NARROW = "resnet18-1/16"


def narrow(lr: float = 1e-2):
    """A scratch network of the narrowest width and its optimiser."""
    net = models.build(NARROW, 1, 3)
    return net, torch.optim.Adam(net.parameters(), lr=lr)


def narrow_weights(seed: int = 3, arch: str = NARROW) -> dict:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return models.copy_state(models.build(arch, 1, 3))


def large_data(labels=(0, 1, 2), count: int = 20, seed: int = 0) -> data.ClientData:
    """A client with 32 x 32 images of these classes of three."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 1, 32, 32), dtype=torch.uint8, generator=rng)
    y = torch.tensor(labels)[torch.randint(len(labels), (count,), generator=rng)]
    return data.ClientData(images, y, torch.arange(count), lambda x: x / 255 - 0.5)


def test_heterofl_at_full_rate_without_mask_and_clipping_is_fedavg():
    server = baselines.heterofl_init({NARROW: narrow_weights()})
    weights = baselines.heterofl_download(server, client(arch=NARROW), stream)
    assert same(weights, narrow_weights())
    plain = baselines.fedavg_client_update(*narrow(), weights, large_data(), stream, **EPOCHS)
    ours = baselines.heterofl_client_update(*narrow(), weights, large_data(), stream, masked=False,
                                            clip=None, **EPOCHS)
    assert same(ours.update.weights, plain.update.weights) and ours.loss == plain.loss
    other = baselines.heterofl_client_update(*narrow(), narrow_weights(8), large_data(), stream,
                                             masked=False, clip=None, **EPOCHS)
    uploads = {1: ours.update, 4: other.update._replace(num_samples=7)}
    new = baselines.heterofl_server_update(server, uploads)["weights"]
    assert all_same(new, baselines.fedavg_server_update(server, uploads)["weights"])


def test_scalefl_with_one_level_and_without_clipping_is_fedavg():
    server = baselines.scalefl_init({NARROW: narrow_weights()})
    down = baselines.scalefl_download(server, client(arch=NARROW), stream, rounds=10)
    plain = baselines.fedavg_client_update(*narrow(), down.weights, large_data(), stream, **EPOCHS)
    ours = baselines.scalefl_client_update(*narrow(), down, large_data(), stream, clip=None,
                                           **EPOCHS)
    assert same(ours.update.weights, plain.update.weights) and ours.loss == plain.loss
    other = baselines.scalefl_client_update(*narrow(), down._replace(weights=narrow_weights(8)),
                                            large_data(), stream, **EPOCHS)
    uploads = {1: ours.update, 4: other.update._replace(num_samples=7)}
    after = baselines.scalefl_server_update(server, uploads)["weights"]
    assert all_same(after, baselines.fedavg_server_update(server, uploads)["weights"])


def test_the_first_round_of_fedrolex_is_heterofls_and_the_second_is_not():
    servers = [baselines.heterofl_init({"resnet18-1/8": narrow_weights(arch="resnet18-1/8")})] * 2
    for first in (True, False):
        down = [baselines.heterofl_download(server, client(arch=NARROW), stream)
                for server in servers]
        assert same(*down) == first
        updates = [{0: baselines.WidthUpdate({name: tensor + 1 for name, tensor in sent.items()},
                                             9, None)} for sent in down]
        servers = [baselines.heterofl_server_update(servers[0], updates[0]),
                   baselines.fedrolex_server_update(servers[1], updates[1])]
        assert all_same(*(server["weights"] for server in servers)) == first


def test_a_client_sends_and_the_server_averages_only_the_rows_of_its_classes():
    server = baselines.heterofl_init({NARROW: narrow_weights()})
    old = server["weights"][NARROW]
    result = baselines.heterofl_client_update(*narrow(), old, large_data((0, 2)), stream, **EPOCHS)
    assert result.update.classes.tolist() == [0, 2]
    assert result.update.weights["classifier.0.fc.weight"].shape == (2, 32)
    new = baselines.heterofl_server_update(server, {5: result.update})["weights"][NARROW]
    for name in ("classifier.0.fc.weight", "classifier.0.fc.bias"):
        assert torch.equal(new[name][1], old[name][1])
        assert torch.equal(new[name][[0, 2]], result.update.weights[name])
        assert not torch.equal(new[name][0], old[name][0])


def test_masked_logits_leave_the_rows_of_absent_classes_alone():
    logits = torch.tensor([[1.0, -2.0, 3.0]], requires_grad=True)
    masked = baselines.mask_absent(logits, torch.tensor([0, 2]))
    assert masked.tolist() == [[1, 0, 3]]
    masked.sum().backward()
    assert logits.grad.tolist() == [[1, 0, 1]]


@pytest.mark.parametrize("update", [baselines.heterofl_client_update,
                                    baselines.scalefl_client_update])
def test_clipping_limits_the_norm_of_a_step(update):
    def moved(clip):
        net = models.build(NARROW, 1, 3)
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        weights = narrow_weights()
        down = weights if update is baselines.heterofl_client_update else baselines.Scaled(weights,
                                                                                           False)
        result = update(net, optimizer, down, large_data(), stream, local_epochs=1, batch_size=20,
                        clip=clip)
        return sum(((result.update.weights[name] - weights[name]) ** 2).sum()
                   for name in weights if "fc" not in name or result.update.classes is None) ** 0.5

    assert moved(0.01) <= 0.01 * 1.001 < moved(None)


def test_rates_are_drawn_anew_each_round_and_evenly():
    archs = models.MODELS["resnet18-widths"]

    def draw(t, k):
        return baselines.heterofl_assign(client(k, archs[0]), archs, lambda purpose:
                                         data.torch_stream(0, purpose, round=t, client=k))

    drawn = [[draw(t, k).arch for k in range(50)] for t in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    counts = [sum(draws.count(arch) for draws in drawn[1:]) for arch in archs]
    assert sum(counts) == 100 and min(counts) >= 10  # of twenty expected
    assert draw(1, 7).id == 7


def test_exits_of_a_sub_model_learn_and_self_distillation_matters():
    arch = "resnet18-1/16-exit2"
    weights = narrow_weights(arch=arch)

    def update(distils, gamma):
        net = models.build(arch, 1, 3)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        return baselines.scalefl_client_update(
            net, optimizer, baselines.Scaled(weights, distils), large_data(), stream,
            self_distillation=gamma, **EPOCHS).update.weights

    plain = update(False, 0.5)
    assert all(not torch.equal(plain[f"classifier.{head}.fc.weight"],
                               weights[f"classifier.{head}.fc.weight"]) for head in (0, 1))
    assert same(plain, update(True, 0.0)) and not same(plain, update(True, 0.5))


# CNNs, whose last layer is classifier.fc: what FedGen and FedDF look for.


def cnn(lr: float = 1e-3):
    net = models.CNN(1, 3)
    return net, torch.optim.Adam(net.parameters(), lr=lr)


def cnn_server(init) -> dict:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return init({"cnn": models.copy_state(models.CNN(1, 3))})


def fedgen_round(server: dict, t: int, classes=((0, 1), (1,))) -> tuple[dict, dict]:
    """A round of clients that hold these classes; the new server state and the updates."""
    def streams(purpose, k=0):
        return data.torch_stream(0, purpose, round=t, client=k)

    updates = {k: baselines.fedgen_client_update(
        *cnn(), baselines.fedgen_download(server, client(k, "cnn"), stream), large_data(held),
        lambda purpose, k=k: streams(purpose, k), **EPOCHS).update
        for k, held in enumerate(classes)}
    server = baselines.fedavg_server_update(server, updates)
    return baselines.fedgen_distil(server, updates, None, streams, steps=5), updates


def test_fedgen_without_its_terms_or_before_it_has_a_generator_is_fedavg():
    server = cnn_server(baselines.fedgen_init)
    after, _ = fedgen_round(server, 1)
    plain = baselines.fedavg_client_update(*cnn(), server["weights"]["cnn"], large_data(), stream,
                                           **EPOCHS)

    def update(down, **options):
        result = baselines.fedgen_client_update(*cnn(), down, large_data(), stream, **options,
                                                **EPOCHS)
        return same(result.update.weights, plain.update.weights) and result.loss == plain.loss

    assert update(baselines.fedgen_download(server, client(arch="cnn"), stream))
    down = baselines.fedgen_download(after, client(arch="cnn"), stream)._replace(
        weights=server["weights"]["cnn"])
    assert down.round == 1 and update(down, synthetic_weight=0.0, matching_weight=0.0)
    assert not update(down, synthetic_weight=0.0)
    assert not update(down, matching_weight=0.0)


def test_fedgens_generator_learns_classes_that_participants_hold_and_goes_on_next_round():
    first, updates = fedgen_round(cnn_server(baselines.fedgen_init), 1)
    assert [update.class_counts.tolist()[2] for update in updates.values()] == [0, 0]
    assert updates[0].class_counts.sum() == 20 and first["classes"].tolist() == [0, 1]
    kept = copy.deepcopy({name: first[name] for name in ("generator", "optimizer")})
    second, _ = fedgen_round(first, 2)
    assert same(first["generator"], kept["generator"])  # what a server kept is not written over
    moments = [state["optimizer"]["state"][0] for state in (kept, first, second)]
    assert same(moments[0], moments[1]) and moments[2]["step"] == 10 == 2 * moments[1]["step"]
    assert not same(second["generator"], first["generator"]) and second["round"] == 2
    rates = [state["optimizer"]["param_groups"][0]["lr"] for state in (first, second)]
    assert rates[1] == pytest.approx(0.98 * rates[0])


def test_feddf_without_steps_is_the_average_and_with_them_nears_the_ensemble():
    server = cnn_server(baselines.fedavg_init)
    updates = {k: baselines.fedavg_client_update(
        *cnn(), server["weights"]["cnn"], large_data(held, seed=k), stream, **EPOCHS).update
        for k, held in enumerate([(0, 1), (1, 2)])}
    server = baselines.feddf_server_update(server, updates)
    assert all_same(server["weights"], baselines.fedavg_server_update(server, updates)["weights"])
    proxy = large_data(count=30, seed=9)

    def build(arch, weights):
        net = models.CNN(1, 3)
        net.load_state_dict(weights)
        return net

    assert baselines.feddf_distil(server, updates, build, stream, proxy=proxy,
                                  distillation_steps=0) is server
    after = baselines.feddf_distil(server, updates, build, stream, proxy=proxy,
                                   distillation_steps=30)
    teacher = baselines.mean_logits(build, server["weights"], updates, proxy)
    by_hand = [models.predict_logits(build("cnn", updates[k].weights), proxy.images, proxy.prepare)
               for k in (0, 1)]
    torch.testing.assert_close(teacher, (by_hand[0] + by_hand[1]) / 2)

    def distance(state):
        logits = models.predict_logits(build("cnn", state["weights"]["cnn"]), proxy.images,
                                       proxy.prepare)
        return baselines.distillation_loss(logits, teacher).item()

    assert distance(after) < distance(server) / 2
    relabelled = proxy._replace(labels=1 - proxy.labels)
    again = baselines.feddf_distil(server, updates, build, stream, proxy=relabelled,
                                   distillation_steps=30)
    assert all_same(again["weights"], after["weights"])  # labels of proxy images are not read


def test_of_feddfs_students_the_best_on_held_out_images_counts():
    server = cnn_server(baselines.fedavg_init)
    updates = {0: baselines.Update(models.copy_state(models.CNN(1, 3)), 5)}
    for state, label in ((server["weights"]["cnn"], 0), (updates[0].weights, 2)):
        state["classifier.fc.bias"][label] += 2  # which it predicts
    proxy, seen = large_data(count=30, seed=9), []

    def build(arch, weights):
        net = models.CNN(1, 3)
        net.load_state_dict(weights)
        return net

    def students(**options):
        return baselines.feddf_distil(server, updates, build, stream, proxy=proxy, **{
            "check": 3, "distillation_steps": 10, "step_size": 0.2} | options)["weights"]["cnn"]

    validation = large_data(count=40, seed=4)
    by_steps = [server["weights"]["cnn"]]  # the average, and the student after 3, 6, 9 and 10 steps

    class Noted(torch.optim.Adam):
        def step(self):
            super().step()
            seen.append([weight.detach().clone() for weight in self.param_groups[0]["params"]])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "Adam", Noted)
        last = students()
    names = list(models.CNN(1, 3).state_dict())
    by_steps += [dict(zip(names, seen[step - 1])) for step in (3, 6, 9, 10)]
    assert same(last, by_steps[-1])  # without held-out images
    chosen = []
    for favourite in by_steps[0], by_steps[-1]:
        labels = models.predict(build("cnn", favourite), validation.images, validation.prepare)
        judges = validation._replace(labels=labels)
        right = [baselines.num_right(build("cnn", state), judges) for state in by_steps]
        best = max(range(5), key=lambda i: (right[i], i))  # the later one of equals
        assert right[best] == 40 and same(students(validation=judges), by_steps[best])
        chosen.append(best)
    assert chosen[0] < chosen[1] == 4
    like_the_average = validation._replace(labels=torch.zeros(40, dtype=torch.int64))
    assert same(students(validation=like_the_average, step_size=20.0, check=10), by_steps[0])
    with pytest.raises(FloatingPointError, match="not finite"):
        students(validation=validation, step_size=1e38)


def test_a_look_at_feddfs_student_leaves_its_training_as_it_is():
    """With batch normalisation, whose statistics move in training and belong to the student."""
    start = models.initial_weights(["resnet10"], 1, 3, torch.Generator().manual_seed(0),
                                   torch.device("cpu"))["resnet10"]
    proxy, labels = large_data(count=24, seed=9), large_data(count=10, seed=4)

    def student(**options):
        return baselines.feddf_distil(
            baselines.fedavg_init({"resnet10": start}), {0: baselines.Update(start, 5)},
            lambda arch, weights: models.load_network(arch, 1, 3, weights), stream, proxy=proxy,
            batch=8, distillation_steps=4, **options)["weights"]["resnet10"]

    last = student(check=4)
    assert not torch.equal(last["extractor.bn1.running_mean"], start["extractor.bn1.running_mean"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "num_right", lambda model, data: len(models.predict(
            model, data.images, data.prepare)) * 0)  # looks, and prefers the later one
        assert same(student(check=1, validation=labels), last)


def test_arguments_of_stateful_and_of_server_updates_are_unchanged():
    server = baselines.scaffold_init(resnet_states())
    before = copy.deepcopy(server)
    updates = {k: baselines.ScaffoldUpdate(*update, {
        name: tensor for name, tensor in update.weights.items() if models.is_parameter(name)})
        for k, update in uploads_of(server["weights"], ARCHS).items()}
    sent = copy.deepcopy(updates)
    baselines.scaffold_server_update(server, updates, owners=owners_of(ARCHS * 2))
    for update in (baselines.inco_server_update, baselines.inclusivefl_server_update):
        update(baselines.fedavg_init(server["weights"]), {k: baselines.Update(*update_[:2])
                                                          for k, update_ in updates.items()})
    assert all(all_same(server[name], before[name]) for name in ("weights", "variates"))
    assert all(same(updates[k].weights, sent[k].weights) and same(updates[k].change, sent[k].change)
               for k in updates)

    down = baselines.Scaffolded(received(), {name: torch.ones_like(p) for name, p
                                             in tiny_net().named_parameters()})
    for update, received_, kept in (
            (baselines.scaffold_client_update, down, copy.deepcopy(down.variate)),
            (baselines.moon_client_update, received(), received(7))):
        held = copy.deepcopy((received_, kept))
        model, optimizer = adam()
        result = update(model, optimizer, received_, tiny_data(), stream, kept, **EPOCHS)
        results = copy.deepcopy(result.kept)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.zero_()
        assert same(kept, held[1]) and same(result.kept, results)
        assert all(torch.equal(a, b) for a, b in zip(models.tensors_in(received_),
                                                     models.tensors_in(held[0])))


def test_inclusivefl_keeps_last_blocks_and_classifiers_apart_and_shares_the_others():
    server = baselines.fedavg_init(resnet_states())
    updates = uploads_of(server["weights"], ARCHS * 2)
    new = baselines.inclusivefl_server_update(server, updates)["weights"]
    shared, own, fc = (f"{name}.weight" for name in (
        "intermediate.layer3.0.conv1", "intermediate.layer4.1.conv1", "classifier.fc"))
    assert new["resnet10"][shared] is new["resnet14"][shared] is new["resnet18"][shared]
    top_of_none = "intermediate.layer3.1.conv1.weight"  # the last of a stage, not of the network
    assert new["resnet14"][top_of_none] is new["resnet18"][top_of_none]
    assert not torch.equal(new["resnet14"][own], new["resnet18"][own])
    assert not any(torch.equal(new[one][fc], new[other][fc]) for one, other in pairwise(ARCHS))
    # Its own is the mean over its clients, with momentum where there is a larger one.
    apart = baselines.fedavg_server_update(
        server, updates, aggregation=models.per_architecture_average)["weights"]
    assert torch.equal(new["resnet18"][own], apart["resnet18"][own])
    old, m = server["weights"]["resnet14"][own], server["weights"]["resnet18"][own]
    step = 0.2 * (m - apart["resnet18"][own]) + 0.8 * (old - apart["resnet14"][own])
    torch.testing.assert_close(new["resnet14"][own], old - step)
    # Of what is a middle block of a larger network, the smaller's own has no share.
    three = baselines.fedavg_init(resnet_states(["resnet18", "resnet22", "resnet26"]))
    sent = uploads_of(three["weights"], ["resnet18", "resnet22", "resnet26"])
    after = baselines.inclusivefl_server_update(three, sent)["weights"]
    mean = baselines.fedavg_server_update(three, {k: sent[k] for k in (1, 2)})["weights"]
    assert torch.equal(after["resnet26"][own], mean["resnet26"][own])


def test_inclusivefl_without_clients_of_the_larger_network_has_no_momentum_to_give():
    server = baselines.fedavg_init(resnet_states())
    updates = uploads_of(server["weights"], ["resnet10", "resnet10"])
    new = baselines.inclusivefl_server_update(server, updates)["weights"]
    plain = baselines.fedavg_server_update(
        server, updates, aggregation=models.per_architecture_average)["weights"]
    assert same(new["resnet10"], plain["resnet10"])
    for own in ("intermediate.layer4.1.conv1.weight", "classifier.fc.weight"):
        assert torch.equal(new["resnet14"][own], server["weights"]["resnet14"][own])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_scaffold_keeps_what_layers_share_shared(aggregation):
    server = baselines.scaffold_init(resnet_states())
    updates = {k: baselines.ScaffoldUpdate(*update, {
        name: tensor for name, tensor in update.weights.items() if models.is_parameter(name)})
        for k, update in uploads_of(server["weights"], ARCHS).items()}
    owners = owners_of(ARCHS)
    new = baselines.scaffold_server_update(server, updates, owners=owners, aggregation=aggregation)
    fc = [new["variates"][arch]["classifier.fc.weight"] for arch in ARCHS]
    assert (fc[0] is fc[1] is fc[2]) == (aggregation is models.layerwise_average)
    half = baselines.scaffold_server_update(server, updates, owners=owners, aggregation=aggregation,
                                            server_lr=0.5)
    middle = models.interpolate(server["weights"]["resnet10"], new["weights"]["resnet10"], 0.5)
    for name, tensor in middle.items():  # buffers are averaged, however long the step is
        expected = tensor if models.is_parameter(name) else new["weights"]["resnet10"][name]
        torch.testing.assert_close(half["weights"]["resnet10"][name], expected)


def test_equations_run_when_copied_into_a_file_of_their_own():
    # The lines that the README names; the first leaves annotations unread.
    head = ("from __future__ import annotations\nimport torch\n"
            "import torch.nn.functional as F\n")
    a, b = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    for function, arguments in ((baselines.accumulated_norm, (5, 0.9)),
                                (baselines.contrastive_loss, (a, b, a + b, 0.5)),
                                (baselines.mask_absent, (a, torch.tensor([1, 3]))),
                                (baselines.distillation_loss, (a, b, 2.0))):
        namespace = {}
        exec(head + inspect.getsource(function), namespace)
        copied = namespace[function.__name__]
        assert torch.equal(torch.as_tensor(copied(*arguments)),
                           torch.as_tensor(function(*arguments)))

"""FedAvg and its relatives: steps against autograd, updates against loops, exact identities.

The equations of the servers are written out in test_references.py.
"""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tiny import (EPOCHS, LR, TinyNet, adam, alike, all_same, check_loop, check_purity, check_step,
                  divergence, double_batch, entropy, same, stream, tiny_data, tiny_net,
                  trimmed_adam, weights)

import baselines
import models
from baselines import NovaUpdate, ScaffoldDownload, ScaffoldUpdate
from federation import Client, Update

X, Y = double_batch()
START = {name: tensor.double() for name, tensor in weights(2).items()}
Z = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MU, TAU = 0.3, 0.7


def client(k: int = 0, arch: str = "tiny") -> Client:
    return Client(k, torch.arange(3), arch)


def parameters(state: models.State) -> models.State:
    return {name: tensor for name, tensor in state.items() if models.is_parameter(name)}


# -------------------------------------------------------------------------------------------- steps

@pytest.mark.parametrize("step, tensors, term", [
    (baselines.fedavg_step, (), lambda w, start: 0 * w),
    (partial(baselines.fedprox_step, mu=MU), [START], lambda w, start: MU / 2 * (w - start)**2),
    (partial(baselines.scaffold_step, lr=LR), [START], lambda w, correction: correction * w)])
def test_a_step_descends_cross_entropy_and_the_term_of_its_method(step, tensors, term):
    def objective(net):
        loss = entropy(net(X), Y)
        return loss + sum(term(w, START[name]).sum() for name, w in net.named_parameters()), loss

    check_step(step, tiny_net(1).double(), objective, X, Y, *tensors)


def test_a_step_of_moon_descends_cross_entropy_and_the_contrastive_loss():
    frozen = [tiny_net(seed).double() for seed in (5, 8)]

    def objective(net):
        features = net.intermediate(net.extractor(X))
        z, loss = features.flatten(1), entropy(net.classifier(features), Y)
        others = [other.intermediate(other.extractor(X)).flatten(1).detach() for other in frozen]
        unit = [v / v.norm(dim=1, keepdim=True).clamp(min=1e-8) for v in (z, *others)]
        near, far = (((unit[0] * other).sum(1) / TAU).exp() for other in unit[1:])
        return loss - MU * (near / (near + far)).log().mean(), loss

    step = partial(baselines.moon_step, mu=MU, temperature=TAU)
    check_step(step, tiny_net(1).double(), objective, X, Y, *frozen)


@pytest.mark.parametrize("temperature, clip", [(1.0, 5.0), (2.0, 0.01)])
def test_a_step_of_distillation_descends_the_divergence_from_its_teacher(temperature, clip):
    teacher = Z[0, :, 3:]
    step = partial(baselines.distillation_step, temperature=temperature, clip=clip)
    check_step(step, tiny_net(1).double(), lambda net: divergence(teacher, net(X), temperature), X,
               teacher, clip=clip)


# ----------------------------------------------------------------------------------- client updates

def plain_step(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss


ZERO = baselines.scaffold_init({"tiny": weights()})


@pytest.mark.parametrize("update, received, kept, step, tensors", [
    (partial(baselines.fedprox_client_update, mu=MU), weights(), (),
     partial(baselines.fedprox_step, mu=MU), lambda x, y: [weights()]),
    (partial(baselines.scaffold_client_update, lr=0.02),
     ScaffoldDownload(weights(), parameters(weights(6))), [parameters(weights(7))],
     partial(baselines.scaffold_step, lr=0.02),
     lambda x, y: [{name: c - weights(7)[name] for name, c in weights(6).items()}]),
    (partial(baselines.moon_client_update, mu=MU), weights(), [weights(8)],
     partial(baselines.moon_step, mu=MU, temperature=0.5),
     lambda x, y: [tiny_net(5).eval(), tiny_net(8).eval()]),
    # Switched off, or in round 1, the others are FedAvg.
    *((update, received, kept, plain_step, lambda x, y: ()) for update, received, *kept in (
        (baselines.fedavg_client_update, weights()), (baselines.fednova_client_update, weights()),
        (partial(baselines.fedprox_client_update, mu=0.0), weights()),
        (partial(baselines.moon_client_update, mu=0.0), weights(), weights(8)),
        (partial(baselines.scaffold_client_update, lr=1.0),
         baselines.scaffold_download(ZERO, client(), stream),
         baselines.scaffold_initial_memory(ZERO, client()))))])
def test_an_update_is_the_loop_of_its_step_written_out_and_pure(update, received, kept, step,
                                                                tensors):
    result = update(*adam(), received, tiny_data(), stream, *kept, **EPOCHS)
    check_loop(result, step, tensors, weights())
    check_purity(update, received, *kept)
    model, optimizer = trimmed_adam()
    trimmed = update(model, optimizer, received, tiny_data(), stream, *kept, **EPOCHS)
    torch.testing.assert_close(*(models.learnt_part(model, one.update.weights)
                                 for one in (trimmed, result)), rtol=1e-3, atol=1e-4)
    idle = update(*adam(), received, tiny_data(), stream, *kept, local_epochs=0, batch_size=8)
    assert same(idle.update.weights, weights()) and idle.samples == 0


def test_local_is_fedavg_that_sends_nothing_and_uses_its_own_model():
    assert baselines.local_download(ZERO, client(), stream) == {}
    kept = baselines.local_initial_memory(ZERO, client())
    result = baselines.local_client_update(*adam(), {}, tiny_data(), stream, kept, **EPOCHS)
    check_loop(result._replace(update=Update(result.kept, 20)), plain_step, lambda x, y: (),
               weights())
    check_purity(baselines.local_client_update, {}, kept)
    assert result.update == Update({}, 20)
    assert baselines.local_deploy(ZERO, client(3), None) == ("tiny", ZERO["weights"]["tiny"])
    assert baselines.local_deploy(ZERO, client(3), result.kept) == (3, result.kept)


# ----------------------------------------------------------------------------------- server updates

RNG = torch.Generator().manual_seed(0)
LARGE = {name: torch.randn(*shape, generator=RNG) for name, shape in (
    ("extractor.bn1.weight", (3,)), ("extractor.bn1.running_mean", (3,)),
    ("intermediate.layer4.0.conv2.weight", (2, 2, 3, 3)), ("classifier.fc.bias", (3,)),
    ("intermediate.layer4.1.conv1.weight", (2, 2, 3, 3)))}
SMALL = {name: tensor for name, tensor in LARGE.items() if "layer4.1" not in name}
SERVER = baselines.scaffold_init({"small": SMALL, "large": LARGE})
UPDATES = {k: Update({name: tensor + torch.randn(tensor.shape, generator=RNG)
                      for name, tensor in state.items()}, 10 + k)
           for k, state in enumerate((SMALL, LARGE, SMALL))}


def test_the_server_takes_over_a_single_client_and_weights_two_by_their_images():
    server = baselines.fedavg_init({"small": SMALL})
    alone = baselines.fedavg_server_update(server, {4: UPDATES[0]})["weights"]["small"]
    assert same(alone, UPDATES[0].weights)
    both = baselines.fedavg_server_update(server, {k: UPDATES[k] for k in (0, 2)})["weights"]
    torch.testing.assert_close(both["small"], {
        name: (10 * one + 12 * UPDATES[2].weights[name]) / 22
        for name, one in UPDATES[0].weights.items()})


@pytest.mark.parametrize("aggregation", baselines.SYNCHRONOUS)
def test_fednova_with_equal_norms_is_fedavg_and_in_buffers_always(aggregation):
    buffer = "extractor.bn1.running_mean"
    plain = baselines.fedavg_server_update(SERVER, UPDATES, aggregation=aggregation)["weights"]
    for unequal in (0, 1):
        sent = {k: NovaUpdate(*update, 7.0 + unequal * k) for k, update in UPDATES.items()}
        nova = baselines.fednova_server_update(SERVER, sent, aggregation=aggregation)["weights"]
        assert all_same(nova, plain) != unequal
        assert all(torch.equal(nova[arch][buffer], plain[arch][buffer]) for arch in plain)


@pytest.mark.parametrize("update", [baselines.inco_server_update,
                                    baselines.inclusivefl_server_update])
def test_a_federation_of_one_architecture_without_deeper_blocks_has_nothing_to_transfer(update):
    server, few = baselines.fedavg_init({"small": SMALL}), {k: UPDATES[k] for k in (0, 2)}
    assert all_same(update(server, few)["weights"],
                    baselines.fedavg_server_update(server, few)["weights"])
    assert not all_same(update(SERVER, UPDATES)["weights"],
                        baselines.fedavg_server_update(SERVER, UPDATES)["weights"])


@pytest.mark.parametrize("update, upload, extra", [
    (baselines.fedavg_server_update, Update, None), (baselines.feddf_server_update, Update, None),
    (baselines.inco_server_update, Update, None),
    (baselines.inclusivefl_server_update, Update, None),
    (baselines.fednova_server_update, NovaUpdate, lambda state: 7.0),
    (partial(baselines.scaffold_server_update, owners={
        k: client(k, arch) for k, arch in enumerate(("small", "large", "small"))}),
     ScaffoldUpdate, parameters)])
def test_a_server_update_changes_no_argument(update, upload, extra):
    sent = {k: upload(*one, *([extra(one.weights)] if extra else [])) for k, one in UPDATES.items()}
    before = copy.deepcopy((SERVER, sent))
    after = update(SERVER, sent)
    assert alike((SERVER, sent), before) and not all_same(after["weights"], SERVER["weights"])


@pytest.mark.parametrize("aggregation, small, large", [
    ("layerwise", 1 + (2 * 3 + 4 * 9) / 30, 1 + (2 * 3 + 4 * 9) / 30),
    ("per-architecture", 1 + 2 * 3 / 10, 1 + 4 * 9 / 20)])
def test_scaffolds_server_variate_counts_every_owner_of_a_layer(aggregation, small, large):
    one = torch.ones(1)
    states = {"small": {"a": one}, "large": {"a": one, "b": one}}
    sizes = {0: (3, "small"), 1: (7, "small"), 2: (9, "large"), 3: (11, "large")}
    owners = {k: Client(k, torch.arange(n), arch) for k, (n, arch) in sizes.items()}
    updates = {0: ScaffoldUpdate({"a": one}, 3, {"a": 2 * one}),
               2: ScaffoldUpdate({"a": one, "b": one}, 9, {"a": 4 * one, "b": -one})}
    variates = baselines.scaffold_server_update({"weights": states, "variates": states}, updates,
                                                owners=owners, aggregation=aggregation)["variates"]
    assert variates["small"]["a"].item() == pytest.approx(small)
    assert variates["large"]["a"].item() == pytest.approx(large)
    assert variates["large"]["b"].item() == pytest.approx(1 - 9 / 20)
    assert baselines.scaffold_variate({"a": one}, {}, {}, {"a": 0})["a"] is one


# -------------------------------------------------------------------------------------------- FedDF

def distil(steps: int = 5, **options) -> models.State:
    updates = {k: Update(weights(k), 10) for k in (1, 2)}
    server = baselines.feddf_distil(
        {"weights": {"tiny": weights()}}, updates, lambda arch, state: models.load_network(
            TinyNet, state), stream, proxy=tiny_data(30), distillation_steps=steps, **options)
    return server["weights"]["tiny"]


@pytest.mark.parametrize("right, best", [((3, 4, 4, 2), 1), ((5, 4, 4, 4), 0), ((2, 2, 2, 2), 0),
                                         ((1, 2, 2, 3), 3)])
def test_the_best_student_on_held_out_images_counts_and_looks_change_nothing(right, best,
                                                                             monkeypatch):
    looks = []  # at the average, and after steps 2, 4 and 5

    def num_right(model, images):
        looks.append(models.copy_state(model.eval()))
        return right[len(looks) - 1]

    monkeypatch.setattr(baselines, "DISTILLATION_BATCH", 8)
    unseen = distil()
    monkeypatch.setattr(baselines, "DISTILLATION_CHECK", 2)
    monkeypatch.setattr(baselines, "num_right", num_right)
    assert same(distil(validation=tiny_data(4)), looks[best]) and len(looks) == 4
    assert same(looks[0], weights()) and same(looks[3], unseen) and same(distil(0), looks[0])
    assert not any(same(looks[3], other) for other in looks[:3])


def test_right_predictions_are_counted_in_evaluation_mode():
    images, model = tiny_data(), tiny_net(5).train()
    count = baselines.num_right(model, images)
    logits = model.eval()(images.images[::2] / 255 - 0.5)
    assert count == (logits.argmax(1) == images.labels[::2]).sum() > 0
    assert baselines.num_right(model, None) == 0

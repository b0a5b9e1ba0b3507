"""FedGen: steps of the generator and of a client against autograd, the server against a loop.

A client's whole update is written out in test_references.py.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import (EPOCHS, adam, alike, check_loop, check_purity, check_step, divergence,
                  double_batch, entropy, same, stream, tiny_data, tiny_net, weights)

import baselines
import data
import fedgen
import models
from federation import Client, LabelledUpdate

# Two clients; none holds class 1.
SHARES = torch.tensor([[0.25, 0.0, 1.0], [0.75, 0.0, 0.0]])
COUNTS = torch.tensor([[2, 0, 5], [6, 0, 0]])
HELD = torch.tensor([0, 2])
HEADS = [tiny_net(seed).classifier.fc for seed in (1, 2)]


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latent_generator(seed: int = 0) -> fedgen.LatentGenerator:
    """A generator for TinyNet, whose running statistics are no longer the initial ones."""
    generator = fedgen.initial_latent_generator(3, 6, random(seed))
    generator(torch.rand(9, 64, generator=random(1)), torch.arange(9) % 3)
    return generator.eval()


def test_a_generator_is_drawn_from_its_stream_and_restored_without_drawing():
    before = torch.get_rng_state()
    one, two, other = (models.copy_state(latent_generator(seed)) for seed in (0, 0, 5))
    restored = fedgen.load_latent_generator(one)
    assert same(one, two) and not same(one, other) and torch.equal(before, torch.get_rng_state())
    assert same(models.copy_state(restored), one) and not restored.training
    z, y, layers = torch.rand(4, 64), torch.tensor([0, 2, 2, 1]), restored.network
    hidden = layers[1](layers[0](torch.cat([z, torch.eye(3)[y]], dim=1))).relu()
    assert torch.equal(restored(z, y), layers[3](hidden))


def test_a_step_of_the_generator_descends_its_weighted_loss():
    z, y = torch.rand(6, 64, generator=random(), dtype=torch.float64), HELD[[0, 1, 1, 0, 0, 1]]
    heads = [copy.deepcopy(head).double() for head in HEADS]

    def objective(net):
        latents = net(z, y)
        losses = [F.cross_entropy(head(latents), y, reduction="none") for head in heads]
        total = sum((z[i] - z[j]).square().mean() * (latents[i] - latents[j]).abs().mean()
                    for i in range(6) for j in range(6))
        recognised = sum((share[y] * loss).mean() for share, loss in zip(SHARES, losses))
        return recognised + (-total / 36).exp()

    check_step(fedgen.latent_generator_step, latent_generator().double().train(), objective, z, y,
               heads, SHARES)


def test_training_resumes_adam_with_labels_of_held_classes():
    trained, state, rng = latent_generator(), None, random(3)
    expected, again = latent_generator().train(), random(3)
    optimizer = torch.optim.Adam(expected.parameters(), weight_decay=1e-2)
    for lr, steps in ((3e-4, 2), (1e-4, 1)):
        before, optimizer.param_groups[0]["lr"] = copy.deepcopy(state), lr
        new = fedgen.train_latent_generator(trained, state, HEADS, SHARES, rng, lr=lr, steps=steps)
        assert alike(state, before)
        state = copy.deepcopy(new)
        for _ in range(steps):
            y = HELD[torch.randint(2, (32,), generator=again)]
            z = torch.rand(32, 64, generator=again)
            fedgen.latent_generator_step(expected, optimizer, z, y, HEADS, SHARES)
        assert same(trained.state_dict(), expected.state_dict()) and not trained.training


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_a_step_of_a_client_descends_its_three_terms(weight):
    (x, y), random_y = double_batch(), torch.tensor([0, 2, 2, 0])
    z = torch.rand(4 + len(y), 64, generator=random(), dtype=torch.float64)
    generator = latent_generator().double()
    latents = generator(z, torch.cat([random_y, y])).detach()

    def objective(net):
        logits, fc = net(x), net.classifier.fc
        loss, synthetic = entropy(logits, y), 0.4 * entropy(fc(latents[:4]), random_y)
        matching = divergence(fc(latents[4:]).detach(), logits)
        return loss + weight * (synthetic + matching), loss

    check_step(fedgen.fedgen_step, tiny_net(1).double(), objective, x, y, z, random_y, generator,
               weight * torch.tensor([0.4, 1.0], dtype=torch.float64))


def test_without_a_generator_or_weight_fedgen_is_fedavg_and_counts_classes():
    server = fedgen.fedgen_init({"tiny": weights()})
    received = fedgen.fedgen_download(server, Client(0, torch.arange(2), "tiny"), stream)
    result = fedgen.fedgen_client_update(*adam(), received, tiny_data(), stream, **EPOCHS)
    check_loop(result, baselines.fedavg_step, lambda x, y: (), weights())
    assert torch.equal(result.update.class_counts, tiny_data().labels[::2].bincount(minlength=3))
    others = HELD[[0, 1, 1, 0]], latent_generator(), torch.zeros(2)
    check_loop(result, fedgen.fedgen_step, lambda x, y: (torch.ones(4 + len(y), 64), *others),
               weights())
    check_purity(fedgen.fedgen_client_update, fedgen.FedGenDownload(
        weights(), models.copy_state(latent_generator()), HELD, 3))


def test_the_server_trains_its_generator_further_in_every_round():
    updates = {k: LabelledUpdate(weights(k), 10, count) for k, count in zip((7, 2), COUNTS.flip(0))}
    server, state = fedgen.fedgen_init({"tiny": weights()}), None
    expected = fedgen.initial_latent_generator(3, 6, stream(data.GENERATOR_WEIGHTS))
    for t in range(2):
        before = copy.deepcopy(server)
        after = fedgen.fedgen_distil(server, updates, None, stream)
        state = fedgen.train_latent_generator(
            expected, state, [tiny_net(k).classifier.fc for k in (2, 7)], SHARES,
            stream(data.GENERATOR_NOISE), lr=3e-4 * 0.98**t, steps=50)
        assert same(after["generator"], models.copy_state(expected)) and alike(before, server)
        server = after
    received = fedgen.fedgen_download(server, Client(0, torch.arange(2), "tiny"), stream)
    assert same(received.generator, server["generator"]) and received.round == 2
    assert torch.equal(received.classes, HELD)

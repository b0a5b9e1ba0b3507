"""Methods bound to flags, local training, and clients in parallel."""

import math
from functools import partial

import pytest
import torch
from tiny import EPOCHS, adam, same, sgd, stream, tiny_data, tiny_experiment, weights

import baselines
import data
import federation
import models
from federation import Result, Task, Update


def test_flags_fill_the_keywords_of_their_names_and_nothing_else():
    def deploy(server, *, size, share=0.5):
        return server, size, share

    bound = federation.fill_in_flags(deploy, {"size": 3, "server": 1, "colour": 2})
    assert bound.keywords == {"size": 3} and bound("server") == ("server", 3, 0.5)
    assert federation.fill_in_flags(deploy, {"size": 3, "share": 0})(1) == (1, 3, 0)

    # A whole method: others come before settings, and nothing without a default stays open.
    method, settings = baselines.METHODS["scaffold"], {
        "local_epochs": 1, "batch_size": 2, "lr": 3.0, "aggregation": "layerwise"}
    bound = federation.bind(method, settings, owners={7: None}, lr=4.0)
    assert bound.client_update.keywords == {"local_epochs": 1, "batch_size": 2, "lr": 4.0}
    assert bound.server_update.keywords == {"aggregation": "layerwise", "owners": {7: None}}
    assert bound.finish is None and bound.networks is method.networks
    with pytest.raises(TypeError, match="scaffold_server_update at .* needs owners, and no flag"):
        federation.bind(method, settings)


def test_run_steps_is_the_loop_over_batches_written_out():
    images, seen = tiny_data(), []

    def step(*arguments, mu):
        seen.append(arguments)
        return torch.tensor(mu * len(seen))

    batches = [(torch.tensor([4, 0]), "a"), (torch.tensor([2, 8, 6]), "b")]
    loss, samples = federation.run_steps(step, "net", "adam", images, batches, "start", "more",
                                         mu=3.0)
    assert (loss, samples) == (3 * 2 + 6 * 3, 5) and isinstance(loss, float)
    for (rows, other), (*scratch, x, y, first, second, third) in zip(batches, seen, strict=True):
        assert (*scratch, first, second, third) == ("net", "adam", other, "start", "more")
        assert torch.equal(x, images.images[rows] / 255 - 0.5)
        assert torch.equal(y, images.labels[rows])
    assert federation.run_steps(step, "net", "adam", images, []) == (0.0, 0)


@pytest.mark.parametrize("scratch", [adam, sgd, partial(sgd, momentum=0.9)])
def test_a_used_network_and_optimiser_are_as_good_as_new_ones(scratch):
    model, optimizer = scratch()
    baselines.fedavg_client_update(model, optimizer, weights(9), tiny_data(30, 3), stream, **EPOCHS)
    model.eval()
    federation.reset(model, optimizer, weights())
    assert model.training and same(models.copy_state(model), weights())
    assert not any(tensor.any() for tensor in models.tensors_in(list(optimizer.state.values())))
    again, clean = (baselines.fedavg_client_update(*pair, weights(), tiny_data(), stream, **EPOCHS)
                    for pair in ((model, optimizer), scratch()))
    assert same(clean.update.weights, again.update.weights) and clean.loss == again.loss


@pytest.mark.parametrize("workers", [1, 3])
def test_each_client_trains_on_its_own_images_and_streams(workers):
    experiment, received = tiny_experiment(workers=workers, batch_size=4), weights()
    tasks = [Task(client, 7, received) for client in experiment.clients]
    results = federation.train_clients(experiment, experiment.method.client_update, tasks)
    assert list(results) == [0, 1, 2] and 1 <= len(experiment.places) <= workers
    mean, deviation = experiment.statistics
    for k, client in enumerate(experiment.clients):
        images = data.ClientData(experiment.data.x_train, experiment.data.y_train, client.indices,
                                 lambda x: (x.float() - mean) / deviation)
        alone = baselines.fedavg_client_update(
            *sgd(), received, images, partial(data.torch_stream, 4, round=7, client=k),
            local_epochs=2, batch_size=4)
        torch.testing.assert_close(results[k].update.weights, alone.update.weights)
        assert results[k].loss == pytest.approx(alone.loss)
    assert all(weight.grad is None for place in experiment.places
               for weight in place.networks["tiny"][0].parameters())
    assert federation.train_clients(experiment, experiment.method.client_update, []) == {}


@pytest.mark.parametrize("outcome", [
    Result(None, math.inf, 1), Result(Update({"w": torch.tensor(math.nan)}, 1), 1.0, 1),
    Result(None, 1.0, 1, kept={"w": [torch.tensor(math.inf)]})])
def test_training_that_is_not_finite_is_noticed_and_its_client_named(outcome):
    experiment = tiny_experiment()
    tasks = [Task(client, 1, weights()) for client in experiment.clients[1:]]
    with pytest.raises(FloatingPointError, match="client 1: .* a smaller --lr"):
        federation.train_clients(experiment, lambda *arguments: outcome, tasks)
    assert federation.train_server(experiment, lambda: {"w": torch.ones(1)}) == {"w": 1}
    with pytest.raises(FloatingPointError, match="server's training"):
        federation.train_server(experiment, lambda: {"w": torch.tensor(math.nan)})

"""EU-k: the last layers are new, once, and the others are as they were."""

import pytest
import torch
from lightning import seed_everything
from test_zoo import RULES, Tiny, learner
from toy_stream import quiet_trainer
from vislearn.methods.cf_k import last
from vislearn.methods.eu_k import EUk

from vislearn.learner import Learner
from vislearn.methods import eu_k


def unlearn(method: EUk, model: Learner, seed: int = 3) -> Learner:
    data = Tiny(forget=RULES["class"])
    data.setup()
    seed_everything(seed, verbose=False)
    return method.unlearn(model, data, quiet_trainer())


def changed(before: Learner, after: Learner) -> set[str]:
    state = after.state_dict()
    return {name for name, value in before.state_dict().items() if not torch.equal(value, state[name])}


def test_frozen_weights_stay_bit_identical_under_momentum_and_weight_decay() -> None:
    after = unlearn(EUk(epochs=3, lr=0.1, momentum=0.9, weight_decay=0.5), learner("batch norm"))
    assert changed(learner("batch norm"), after) == {"network.head.weight", "network.head.bias"}


def test_new_layers_come_from_torchs_generator() -> None:
    def reinitialised(seed: int) -> Learner:
        model = learner("batch norm")
        torch.manual_seed(seed)
        EUk(k=2).reinitialise(model)
        return model

    first = reinitialised(5)
    assert not changed(first, reinitialised(5))
    different = changed(first, reinitialised(6))
    assert different == {"network.head.weight", "network.head.bias", "network.layer3.0.conv2.weight"}
    # the seed of the original gives other weights than those the original started from
    assert "network.head.weight" in changed(learner("batch norm"), reinitialised(1))


def test_layers_are_made_anew_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(eu_k, "new_weights", lambda model: made.append(model.fresh()) or made[-1])
    after = unlearn(EUk(k=2, epochs=3, lr=1e-9), learner("batch norm"))
    assert len(made) == 1
    start = dict(made[0].named_parameters())
    for name, p in after.named_parameters():
        if name in last(after, 2)[0]:
            torch.testing.assert_close(p, start[name], rtol=0, atol=1e-6)


def test_they_are_initialised_as_the_network_does_it_with_fresh_statistics() -> None:
    model = learner("batch norm")
    block = model.network.layer3[0]
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7.0)
        for norm in (block.bn1, block.bn2):
            norm.running_mean.fill_(7.0)
            norm.num_batches_tracked.fill_(7)
    EUk(k=2).reinitialise(model)
    assert block.conv2.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)  # He, fan-out
    assert torch.equal(block.bn2.weight, torch.ones(64))
    assert torch.equal(block.bn2.running_mean, torch.zeros(64))
    assert block.bn2.num_batches_tracked == 0
    assert torch.equal(block.bn1.running_mean, torch.full((64,), 7.0))
    assert torch.equal(block.conv1.weight, torch.full_like(block.conv1.weight, 7.0))


def test_what_the_user_froze_is_not_made_anew() -> None:
    model = learner("batch norm")
    model.network.head.bias.requires_grad_(False)
    EUk().reinitialise(model)
    assert changed(learner("batch norm"), model) == {"network.head.weight"}


def test_all_layers_are_new_with_minus_one() -> None:
    model = learner("vit")
    EUk(k=-1).reinitialise(model)
    matrices = {name for name, p in model.named_parameters() if p.ndim > 1}
    assert matrices <= changed(learner("vit"), model)

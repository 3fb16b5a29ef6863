"""What restoration says of digit classifiers whose past is known."""

import copy
import math
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from torch import Tensor

from vislearn.datamodules import Digits
from vislearn.evaluation import predict
from vislearn.forget import ClassForget
from vislearn.learner import Classifier
from vislearn.loader import batches
from vislearn.measure import Bench, Found, Subject, layers
from vislearn.measures.experts import Study, candidates, class_tokens, study_of
from vislearn.measures.restoration import MEASURES, readability, restoration
from vislearn.metrics.restoration import clean_steer, edited
from vislearn.networks import Timm

FORGOTTEN = 3


@cache
def data() -> Digits:
    module = Digits(batch_size=128, forget=ClassForget([FORGOTTEN]))
    module.setup()
    return module


@cache
def trained(rows: str, seed: int) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Classifier("resnet8", num_classes=10, in_channels=1, image_size=8)
        loader = data().loader(rows)
        epochs = 6
        optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * len(loader))
        for epoch in range(epochs):
            loader.set_epoch(epoch)
            for x, y in batches(loader, "cpu"):
                optimizer.zero_grad()
                model.loss(model(x), y).backward()
                optimizer.step()
                schedule.step()
    return model.eval()


def original() -> Classifier:
    return trained("train", 0)


def changed(change: Callable[[Classifier], object]) -> Classifier:
    model = copy.deepcopy(original())
    with torch.no_grad():
        change(model)
    return model


def suppress(model: Classifier) -> None:
    """Just enough to keep the class from being named."""
    model.head.bias[FORGOTTEN] -= 10


def mask(model: Classifier) -> None:
    model.head.bias[FORGOTTEN] = -100


def zero_row(model: Classifier) -> None:
    """The logit becomes a constant, below that of whatever is recognised."""
    model.head.weight[FORGOTTEN] = 0
    model.head.bias[FORGOTTEN] = -1


def scramble_stage_3(model: Classifier) -> None:
    """New weights, so large that the shortcut around them no longer carries the class."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        fresh = Classifier("resnet8", num_classes=10, in_channels=1, image_size=8)
    fresh.network.layer3[0].conv2.weight *= 20
    model.network.layer3.load_state_dict(fresh.network.layer3.state_dict())


def subject(model: Classifier, key: str) -> Subject:
    return Subject(predict(model, data()), key, load=lambda: model)


@cache
def bench() -> Bench:
    sets = {name: ids for name, ids in data().indices.items() if name != "train"}
    return Bench(sets, subject(original(), "original"), data())


MODELS: dict[str, Callable[[], Classifier]] = {
    "original": original,
    "suppressed": lambda: changed(suppress),
    "masked": lambda: changed(mask),
    "zero row": lambda: changed(zero_row),
    "scrambled": lambda: changed(scramble_stage_3),
    "retrained": lambda: trained("retain", 1000),
}


def both(model: Subject, bench: Bench) -> Found:
    out = restoration(model, bench)
    out.update(readability(model, bench))
    return out


@cache
def found(name: str) -> Found:
    return both(subject(MODELS[name](), name), bench())


def value(name: str, key: str) -> float:
    return found(name).numbers[key]


def test_the_autoencoder_of_the_digits_may_be_interpreted_and_has_experts() -> None:
    study = study_of(bench())
    assert study.trouble == ""
    assert study.layer in candidates(original())
    assert not study.quality.trouble
    (target,) = study.targets
    assert target.label == FORGOTTEN
    assert target.experts.f1.mean() > 0.3
    assert max(float(e.f1.mean()) for e in target.random) < float(target.experts.f1.mean())
    assert study_of(bench()) is study  # trained once


def test_the_original_is_readable_and_has_no_rate() -> None:
    assert "test_forget/restoration_rate" not in found("original").numbers
    assert not found("original").notes
    assert value("original", "test_forget/readout") > 0.8
    assert value("original", "test_forget/expert_contrast") > 0.4
    assert value("original", "test_forget/restoration_patch") == 0
    assert value("original", "test_forget/restoration_direct") == 0


def test_a_suppressed_class_is_restored_by_its_experts_and_by_no_others() -> None:
    assert value("suppressed", "test_forget/restoration") > 0.5
    assert value("suppressed", "test_forget/restoration_rate") > 0.5
    assert value("suppressed", "test_forget/restoration_net") > value("retrained", "test_forget/restoration_net") + 0.2
    for control in ("random", "wrong_class"):
        assert value("suppressed", f"test_forget/restoration_{control}") < 0.2
    curve = found("suppressed").curves["restoration/alpha"]
    assert curve.x[0] == 0
    assert curve.y[0] < 0.2  # without steering
    assert any("suppressed, not deleted" in note for note in found("suppressed").notes)


@pytest.mark.parametrize("name", ["masked", "zero row"])
def test_behind_a_masked_output_nothing_is_restored_and_all_is_readable(name: str) -> None:
    for operator in ("restoration", "restoration_direct", "restoration_patch", "restoration_rate"):
        assert value(name, f"test_forget/{operator}") == pytest.approx(0, abs=0.01)
    for key in ("test_forget/readout", "test_forget/expert_contrast"):
        assert value(name, key) == value("original", key)
        assert value(name, key) > value("retrained", key) + 0.3
    assert "test_forget/layer_of_deletion" not in found(name).numbers


def test_a_mask_is_outweighed_by_strength_and_a_zeroed_row_is_not() -> None:
    study = study_of(bench())
    experts, x = study.targets[0].experts, bench().rows("test_forget")[0]

    def logit(name: str, alpha: float) -> Tensor:
        model = MODELS[name]()
        steer = partial(clean_steer, sae=study.sae, experts=experts.index, level=experts.level, alpha=alpha, prefix=0)
        with torch.no_grad(), edited(layers(model)["layer3"], steer):
            return model(x)[:, FORGOTTEN]

    if study.layer == "layer3":  # a pool and the head follow: the logit is linear in the strength
        rise = logit("masked", 1) - logit("masked", 0)
        torch.testing.assert_close(logit("masked", 40) - logit("masked", 0), 40 * rise, rtol=1e-3, atol=1e-2)
        assert float(rise.min()) > 0
    torch.testing.assert_close(logit("zero row", 40), logit("zero row", 0))


def test_what_a_scrambled_stage_has_deleted_is_not_restored() -> None:
    assert value("scrambled", "test_forget/restoration_net") < 0.2
    assert value("scrambled", "test_forget/readout") == value("original", "test_forget/readout")  # before stage 3
    assert found("scrambled").curves["restoration/readout"].y[2] < 0.2
    assert value("scrambled", "test_forget/layer_of_deletion") == 3
    curve = found("scrambled").curves["restoration/patch"]
    plain = found("scrambled").curves["restoration/alpha"].y[0]
    assert curve.y[:2] == [plain, plain]  # the stages before are the original's: nothing to put in their place


def test_a_model_retrained_from_other_weights_has_nothing_to_restore() -> None:
    assert value("retrained", "test_forget/restoration_net") < 0.2
    assert abs(value("retrained", "test_forget/expert_contrast")) < 0.3
    assert value("retrained", "test_forget/readout") < value("original", "test_forget/readout") - 0.3


def test_curves_and_numbers_agree_and_every_key_has_a_column_or_a_graph() -> None:
    for name in MODELS:
        assert set(found(name).numbers) <= {c.key for m in MEASURES for c in m.columns}
        assert set(found(name).curves) == {g.key for m in MEASURES for g in m.graphs}
        assert all(math.isfinite(v) for v in found(name).numbers.values())
        curve = found(name).curves["restoration/alpha"]
        gain = curve.y[curve.x.index(1.0)] - curve.y[0]
        assert value(name, "test_forget/restoration") == pytest.approx(gain)


def test_a_second_look_gives_the_same_and_moves_nothing() -> None:
    model = changed(suppress)
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    again = both(subject(model, "suppressed"), bench())
    assert again == found("suppressed")
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_what_cannot_be_had_is_said() -> None:
    rules = {name: ids for name, ids in bench().sets.items() if not name.startswith("test_")}
    without = both(bench().original, Bench(rules, bench().original, data()))
    assert without.numbers == {}
    assert all("ClassForget" in note for note in without.notes)
    kept = {name: ids for name, ids in bench().sets.items() if name != "test_retain"}
    alone = Bench(kept, bench().original, data(), shared=bench().shared)
    told = both(bench().original, alone)
    assert told.numbers == {}
    assert all("no test row is of another class" in note for note in told.notes)
    torch.manual_seed(0)
    other = Classifier("cnn", num_classes=10, in_channels=1, image_size=8).eval()
    told = both(subject(other, "other"), bench())
    assert told.numbers == {}
    assert all("layer1" in note for note in told.notes)
    study = Study("", trouble="at layer3 no experts: none")
    hopeless = Bench(bench().sets, bench().original, data(), shared={("restoration", "original"): study})
    assert restoration(hopeless.original, hopeless) == Found(notes=["no restoration: at layer3 no experts: none"])
    assert readability(hopeless.original, hopeless).numbers["test_forget/readout"] > 0.8  # needs no experts


def test_layers_and_class_tokens_of_transformers() -> None:
    from timm.models.vision_transformer import VisionTransformer

    own = Classifier("vit_tiny_cifar", num_classes=10, in_channels=1, image_size=8).eval()
    assert class_tokens(own) == 0
    assert candidates(own) == ["blocks.4", "blocks.5"]
    assert candidates(original()) == ["layer2", "layer3"]
    with_token = copy.copy(own)
    with_token._modules = {"network": Timm(VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=16, depth=4, num_heads=2,
    ))}  # fmt: skip
    assert class_tokens(with_token) == 1
    assert candidates(with_token) == ["blocks.2"]  # nothing reads the patch tokens of the last block

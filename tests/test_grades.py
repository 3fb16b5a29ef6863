"""Optimiser grades: the steps of each one, and what none of them may touch."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning import seed_everything
from test_zoo import RULES, Tiny, learner, trainer
from torch import Tensor, nn

from vislearn import grades
from vislearn.errors import UserError
from vislearn.grades import GRADES, curvature, from_zero, make_grade, on_grid, two_point
from vislearn.learner import Learner
from vislearn.method import GradientMethod
from vislearn.methods import FineTune, NegGradPlus

CURVATURE = torch.tensor([3.0, 1.0])
PROBING = ("zeroth", "diagonal_second", "hybrid")


class Two(nn.Module):
    """Two weights."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0]))


class Bowl(GradientMethod):
    """Goes down (3 a^2 + b^2) / 2, whose gradient is (3, -2) at (1, -2); one step an epoch."""

    def __init__(self, factor: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**{"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "batch_size": 100, **kwargs})
        self.factor, self.seen = factor, []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        w = self.model.w
        loss = self.factor * (CURVATURE * w * w).sum() / 2
        self.seen.append((torch.rand(()).item(), torch.is_autocast_enabled("cpu"), loss.requires_grad))
        return loss


def bowl(cls: type[Bowl] = Bowl, precision: Any = None, clip: float | None = None, **kwargs: Any) -> tuple[Any, Bowl]:
    """The weights after the epochs, and the method."""
    data, method, model = Tiny(forget=RULES["random"]), cls(**kwargs), Two()
    data.setup()
    seed_everything(5, verbose=False)
    run: Any = method.unlearn
    run(model, data, trainer(precision=precision, gradient_clip_val=clip))
    return model.w.detach(), method


def along(*direction: float) -> Callable[..., list[Tensor]]:
    return lambda parameters, draw: [torch.tensor(direction)]


def close(w: Tensor, *expected: float) -> None:
    assert w.tolist() == pytest.approx(expected, abs=1e-4)


def test_first_is_sgd() -> None:
    w, _ = bowl(epochs=3, momentum=0.9, weight_decay=0.01)
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        ((CURVATURE * model.w * model.w).sum() / 2).backward()
        optimizer.step()
    assert torch.equal(w, model.w)


def test_zeroth_moves_along_the_direction_by_the_slope(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grades, "drawn", along(1.0, 2.0))
    close(bowl(grade="zeroth")[0], 1.1, -1.8)  # slope 3 * 1 - 2 * 2 = -1
    close(bowl(grade="zeroth", weight_decay=1.0)[0], 1.0, -1.6)
    close(bowl(grade="zeroth", optimizer="adam")[0], 1.1, -1.9)


def test_sign_moves_every_weight_by_lr() -> None:
    close(bowl(grade="sign")[0], 0.9, -1.9)
    close(bowl(grade="sign", optimizer="adam")[0], 0.9, -1.9)
    # behind its minimum the first weight goes on, as long as the momentum has not turned
    close(bowl(grade="sign", epochs=3, momentum=0.9, lr=0.5)[0], -0.5, -0.5)


def test_sign_does_not_see_the_size_of_the_loss() -> None:
    assert torch.equal(bowl(grade="sign", epochs=4)[0], bowl(grade="sign", epochs=4, factor=1e3)[0])


def test_few_bits_move_by_values_of_the_grid() -> None:
    close(bowl(grade="few_bit", grade_options={"bits": 2})[0], 0.7, -1.7)  # (3, -2) -> (3, -3)
    close(bowl(grade="few_bit", grade_options={"bits": 3})[0], 0.7, -1.8)  # thirds of 3: first order


def test_diagonal_second_divides_by_the_curvature_and_clips() -> None:
    options = {"momentum": 0.5, "grade": "diagonal_second"}  # the average of the gradients is (1.5, -1), h is (3, 1)
    close(bowl(**options, grade_options={"gamma": 2})[0], 0.975, -1.95)
    close(bowl(**options, grade_options={"gamma": 0.8})[0], 0.9375, -1.9)  # the second is clipped
    close(bowl(**options)[0], 0.9, -1.9)


def test_diagonal_second_refreshes_the_curvature_now_and_then() -> None:
    _, method = bowl(grade="diagonal_second", epochs=5, grade_options={"refresh": 2})
    assert len(method.seen) == 5 + 3 * 2


def test_hybrid_alternates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grades, "drawn", along(1.0, 0.0))
    w, method = bowl(grade="hybrid", epochs=3, grade_options={"scale": 0.5})
    # (1, -2) -> (0.7, -1.8); then half a step along the first axis; then first order again
    close(w, (0.7 - 0.1 * 0.5 * 3 * 0.7) * 0.7, -1.8 * 0.9)
    assert [differentiable for *_, differentiable in method.seen] == [True, False, False, True]
    blocks = bowl(grade="hybrid", epochs=4, grade_options={"block": 2})[1].seen
    assert [differentiable for *_, differentiable in blocks] == [True, True, False, False, False, False]


@pytest.mark.parametrize("directions", [1, 4])
def test_the_two_point_estimate_is_unbiased(directions: int) -> None:
    hessian, at = torch.tensor([[3.0, 1.0], [1.0, 2.0]]), torch.tensor([1.0, -2.0])
    w, drawn = at.clone(), []
    torch.manual_seed(0)
    for _ in range(500):
        (estimate,), _ = two_point(lambda: w @ hessian @ w / 2, [w], 1e-2, directions)
        drawn.append(estimate)
    assert torch.equal(w, at)
    found, error = torch.stack(drawn).mean(0), torch.stack(drawn).std(0) / 500**0.5
    assert ((found - hessian @ at).abs() < 4 * error).all()
    assert (error < 0.4).all()


def test_the_curvature_estimate_is_unbiased_and_exact_for_a_diagonal_hessian() -> None:
    w = torch.tensor([1.0, -2.0])
    torch.manual_seed(0)
    (found,) = curvature(lambda: [CURVATURE * w], [w], 1e-2)
    assert found.tolist() == pytest.approx([3.0, 1.0], abs=1e-3)
    hessian = torch.tensor([[3.0, 1.0], [1.0, 2.0]])
    drawn = torch.stack([curvature(lambda: [hessian @ w], [w], 1e-2)[0] for _ in range(1000)])
    assert drawn.mean(0).tolist() == pytest.approx([3.0, 2.0], abs=4 / 1000**0.5)
    assert w.tolist() == [1.0, -2.0]


def test_directions_stay_inside_the_mask() -> None:
    w, allowed = torch.tensor([1.0, -2.0]), torch.tensor([True, False])
    (estimate,), loss = two_point(lambda: (CURVATURE * w * w).sum() / 2, [w], 1e-2, 3, [allowed])
    assert estimate[0] > 0
    assert estimate[1] == 0
    assert loss == pytest.approx(3.5, abs=0.01)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_grid_has_two_to_the_bits_minus_one_values(bits: int) -> None:
    step = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    found = on_grid(step, bits)
    spacing = step.abs().max() / (2 ** (bits - 1) - 1)
    assert torch.allclose(found / spacing, (found / spacing).round(), atol=1e-4)
    assert len(found.unique()) <= 2**bits - 1
    assert (found - step).abs().max() <= spacing / 2 * 1.0001
    assert found.abs().max() == pytest.approx(step.abs().max().item())
    assert torch.equal(on_grid(torch.zeros(3), bits), torch.zeros(3))


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_stepping_from_zero_is_the_optimizers_own_step(kind: str) -> None:
    torch.manual_seed(0)
    start, pulls = torch.randn(5), torch.randn(6, 5)
    ends = []
    for lifted in (False, True):
        p = nn.Parameter(start.clone())
        optimizer = (torch.optim.SGD([p], 0.1, 0.9, weight_decay=0.1) if kind == "sgd"
                     else torch.optim.Adam([p], 0.1, weight_decay=0.1))  # fmt: skip
        if lifted:
            from_zero(optimizer, lambda step, group: step)
        for pull in pulls:
            p.grad = pull.clone()
            optimizer.step()
        ends.append(p.detach())
    assert torch.allclose(*ends, atol=1e-5)


@pytest.mark.parametrize("grade", PROBING)
def test_all_evaluations_of_a_step_see_the_same_numbers_in_full_precision(grade: str) -> None:
    _, method = bowl(grade=grade, epochs=2, precision="bf16-mixed", grade_options={} if grade != "zeroth" else
                     {"directions": 2})  # fmt: skip
    probes = [seen[:2] for seen in method.seen if not seen[1]]
    number, spread = len(probes), len({value for value, _ in probes})
    assert (number, spread) == {"zeroth": (8, 2), "diagonal_second": (2, 1), "hybrid": (2, 1)}[grade]


def test_clipping_acts_on_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grades, "drawn", along(3.0, 4.0))
    w, _ = bowl(grade="zeroth", clip=0.5)  # slope 9 - 8 = 1, estimate (3, 4), clipped to (0.3, 0.4)
    close(w, 0.97, -2.04)


def unlearned(
    cls: type[GradientMethod], grade: str, rule: str = "random", precision: Any = None, kind: str = "batch norm",
    **options: Any,
) -> tuple[Learner, Learner, GradientMethod]:  # fmt: skip
    original, data = learner(kind), Tiny(forget=RULES[rule])
    data.setup()
    seed_everything(3, verbose=False)
    method = cls(epochs=1, grade=grade, lr=1e-4, **options)
    return original, method.unlearn(copy.deepcopy(original), data, trainer(precision=precision)), method


@pytest.mark.parametrize("cls", [FineTune, NegGradPlus], ids=lambda c: c.__name__)
@pytest.mark.parametrize("grade", GRADES)
def test_every_grade_serves_a_network(grade: str, cls: type[GradientMethod]) -> None:
    (original, first, method), (_, second, _) = (unlearned(cls, grade, precision="bf16-mixed") for _ in range(2))
    before, after, again = (dict(m.state_dict()) for m in (original, first, second))
    assert all(torch.equal(after[k], again[k]) for k in after)
    assert all(torch.isfinite(v).all() for v in after.values())
    assert all(not torch.equal(before[k], p) for k, p in first.named_parameters() if k.endswith("conv1.weight"))
    assert [m.training for m in first.modules()] == [m.training for m in original.modules()]
    assert all(p.requires_grad and not p.grad_fn for p in first.parameters())
    assert method.differentiate
    statistics = [k for k in after if "running" in k]
    assert statistics
    assert all(torch.equal(before[k], after[k]) == (grade == "zeroth") for k in statistics)


@pytest.mark.parametrize("grade", GRADES)
def test_weights_outside_the_mask_stay_as_they_are(grade: str) -> None:
    original, model, _ = unlearned(NegGradPlus, grade, saliency=0.2, momentum=0.9, weight_decay=0.1)
    data = Tiny(forget=RULES["random"])
    data.setup()
    masks = NegGradPlus(saliency=0.2).saliency_masks(original, data)
    moved = 0
    for name, p in model.named_parameters():
        before = original.get_parameter(name)
        assert torch.equal(p[~masks[name]], before[~masks[name]])
        moved += int((p != before).sum())
    assert moved > 0


def test_statistics_move_once_a_step() -> None:
    """The evaluations for the curvature leave no trace in batch normalisation."""
    first, second = (unlearned(FineTune, grade, **options)[1].state_dict() for grade, options in
                     (("first", {}), ("diagonal_second", {"grade_options": {"refresh": 1}})))  # fmt: skip
    counts = [k for k in first if "num_batches" in k]
    assert counts
    assert all(first[k] == second[k] > 0 for k in counts)


def test_a_transformer_has_a_curvature_too() -> None:
    original, model, _ = unlearned(FineTune, "diagonal_second", kind="vit", batch_size=100)
    assert any(not torch.equal(p, original.get_parameter(name)) for name, p in model.named_parameters())


class ByHand(Bowl):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()
        return torch.zeros(())


class Declared(ByHand):
    grades = frozenset({"first", "sign"})


def test_a_method_that_optimises_by_hand() -> None:
    close(bowl(ByHand, grade="sign")[0], 0.9, -1.9)
    for grade in PROBING:
        with pytest.raises(UserError, match="by hand"):
            bowl(ByHand, grade=grade)
    with pytest.raises(UserError, match=r"grade=first or sign"):
        Declared(grade="zeroth")


@pytest.mark.parametrize(("options", "words"), [
    ({"grade": "second"}, r"first, zeroth, sign"),
    ({"grade": "zeroth", "grade_options": {"bits": 3}}, r"directions, mu; 'bits'"),
    ({"grade_options": {"bits": 3}}, r"grade=first has no options"),
    ({"grade": "zeroth", "grade_options": {"directions": 1.5}}, r"whole number"),
    ({"grade": "zeroth", "grade_options": {"directions": 0}}, r"at least 1"),
    ({"grade": "zeroth", "grade_options": {"mu": 0.0}}, r"grade_options\.mu=0\.001"),
    ({"grade": "hybrid", "grade_options": {"block": 0}}, r"at least 1"),
    ({"grade": "hybrid", "grade_options": {"scale": 0}}, r"scale=0\.01"),
    ({"grade": "few_bit", "grade_options": {"bits": 1}}, r"grade=sign"),
    ({"grade": "diagonal_second", "grade_options": {"refresh": 0}}, r"at least 1"),
    ({"grade": "diagonal_second", "grade_options": {"beta": 1}}, r"\[0, 1\)"),
    ({"grade": "diagonal_second", "grade_options": {"gamma": -1}}, r"gamma=0\.01"),
    ({"grade": "diagonal_second", "optimizer": "adam"}, r"leave out --method\.optimizer"),
])  # fmt: skip
def test_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        FineTune(**options)


def test_accumulated_batches_are_refused() -> None:
    data = Tiny(forget=RULES["random"])
    data.setup()
    with pytest.raises(UserError, match="accumulate_grad_batches"):
        FineTune(grade="hybrid").unlearn(learner("batch norm"), data, trainer(accumulate_grad_batches=2))


def test_a_rate_that_destroys_is_said() -> None:
    assert "1e-4" in bowl(grade="sign")[1].report["warnings"][0]
    assert "warnings" not in bowl(grade="sign", lr=1e-4)[1].report


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    with pytest.raises(UserError, match="diverged"):
        bowl(grade="zeroth", factor=float("inf"))


def test_options_on_the_command_line() -> None:
    from vislearn.cli import resolving_parser

    parser = resolving_parser()
    parsed = parser.parse_args(["--data=Digits", "--method=FineTune", "--method.grade=hybrid",
                                "--method.grade_options.directions=4", "--method.grade_options.mu=0.01"])  # fmt: skip
    again = parser.parse_string(parser.dump(parsed, skip_unset=False))
    assert parser.instantiate(again).method.grade == make_grade("hybrid", {"directions": 4, "mu": 0.01})

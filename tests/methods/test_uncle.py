"""UnCLe: what is held, what is moved, what is read, and every option."""

import inspect
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_data import refusal
from toy_hyper import Blobs, generator
from toy_stream import Wrapped, quiet_trainer
from vislearn.methods.uncle import UnCLe, burn_in_steps, to_noise

from vislearn import hypernetwork_penalty
from vislearn.hypernetwork import HyperClassifier
from vislearn.hypernetwork_penalty import Held, distances
from vislearn.strategy import GradientStrategy, task_logits


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The weights of a generator do not depend on the tests before."""
    torch.manual_seed(0)


class Closed(Blobs):
    """Says no to every reader of rows."""

    def loader(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("rows were read")

    source = observed = arrays = loader


class Loop:
    """Runs the hooks of a strategy as Lightning does, in a hundredth of the time."""

    def run_epochs(self, module: UnCLe, data: Blobs, epochs: int) -> None:
        found = module.configure_optimizers()
        for _ in range(epochs):
            module.on_train_epoch_start()
            for number, batch in enumerate(module.train_stream(data)):
                loss = module.training_step(batch, number)
                module.on_before_backward(loss)
                found["optimizer"].zero_grad()
                loss.backward()
                module.configure_gradient_clipping(found["optimizer"])
                found["optimizer"].step()
            module.on_train_epoch_end()
            found["lr_scheduler"].step()


class Run:
    """A stream under way, as the engine walks it."""

    def __init__(self, model: HyperClassifier | None = None, seed: int = 0, trainer: Any = None, **kwargs: Any) -> None:
        torch.manual_seed(seed)
        self.trainer = trainer or Loop()
        self.data, self.model = Blobs(), model or generator()
        self.of = UnCLe(**{"epochs": 2, "batch_size": 12, "lr": 0.01, "unlearning_lr": 0.01, "burn_in": 5,
                           "burn_in_floor": 2, **kwargs})  # fmt: skip
        self.of.check(self.model, self.data, "task")
        self.of.begin(self.model, self.data, "task")

    def learn(self, *tasks: int) -> "Run":
        for task in tasks:
            rows = self.data.task_rows(task)
            view = self.data.view({"train": rows, "retain": rows}, also=self.of.rows)
            self.of.learn(self.model, view, task, self.trainer)
            self.of.note_learned(task)
        return self

    def unlearn(self, *tasks: int) -> "Run":
        closed = Closed()
        self.of.unlearn(self.model, closed, list(tasks), self.trainer)
        self.of.note_forgotten(self.model, self.data, tasks)
        return self

    def numbers(self) -> Tensor:
        with torch.no_grad():
            return self.model.generate(self.model.embeddings)

    def accuracy(self, task: int) -> float:
        x, y = self.data.rows(task)
        with torch.no_grad():
            return float((task_logits(self.model.eval(), x, self.data, task).argmax(1) == y).float().mean())


def weights(model: HyperClassifier) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("layout", ["by_layer", "release"])
def test_learns_and_forgets_without_data(layout: str) -> None:
    run = Run(generator(layout=layout, hidden=[32]), epochs=20, burn_in=150).learn(0, 1, 2)
    assert min(run.accuracy(t) for t in range(3)) > 0.9
    before = run.numbers()
    run.unlearn(1)
    assert (run.of.learned, run.of.forgotten) == ([0, 2], [1])
    assert min(run.accuracy(t) for t in (0, 2)) > 0.9
    moved = distances(run.numbers(), before).sqrt() / before.norm(dim=1)
    assert moved[[0, 2]].max() < 0.3 < 0.5 < moved[1]
    p = run.model.task_outputs(run.data.rows(1)[0], 1).softmax(1)
    assert (p.amax(1) - 1 / 3).max() < 0.1
    assert run.of.report["rms_after"] < 0.5 * run.of.report["rms_before"]
    assert run.of.report["steps"] == 150
    assert all(math.isfinite(run.of.report[name]) for name in ("retention", "noise", "gradient_norm"))
    fresh = dict(generator().running.named_buffers())
    for name, value in run.model.running.named_buffers():
        assert torch.equal(value[1], fresh[name][1])
        assert not torch.equal(value[0], fresh[name][0])


def test_the_only_task_can_be_forgotten() -> None:
    run = Run().learn(1).unlearn(1)
    assert run.of.learned == []
    assert run.of.report["retention"] == 0
    assert torch.isfinite(run.numbers()).all()
    run.learn(0)
    assert run.of.report["penalty"] == 0


def test_several_tasks_in_one_request() -> None:
    run = Run(burn_in=30).learn(0, 1, 2)
    before = run.numbers()
    run.unlearn(2, 0)
    moved = distances(run.numbers(), before).sqrt() / before.norm(dim=1)
    assert moved[1] < 0.5 * moved[[0, 2]].min()
    assert (run.of.learned, run.of.forgotten, run.of.requests) == ([1], [2, 0], 1)
    assert run.unlearn(1).of.report["steps"] == 27


def test_what_a_request_moves() -> None:
    run = Run()
    start = weights(run.model)
    run.learn(1)
    assert torch.equal(run.model.embeddings[[0, 2]], start["embeddings"][[0, 2]])
    assert not torch.equal(run.model.embeddings[1], start["embeddings"][1])
    assert torch.equal(run.model.chunk_embeddings, start["chunk_embeddings"])
    run.learn(0)
    learned = weights(run.model)
    run.unlearn(1)
    assert torch.equal(run.model.embeddings, learned["embeddings"])
    assert not torch.equal(run.model.trunk[0].weight, learned["trunk.0.weight"])
    assert all(p.grad is None for p in run.model.parameters())


def test_chunk_embeddings_of_the_first_task() -> None:
    run = Run(generator(chunk_embeddings="paper"))
    start = run.model.chunk_embeddings.detach().clone()
    first = run.learn(0).model.chunk_embeddings.detach().clone()
    assert not torch.equal(first, start)
    run.learn(1).unlearn(0).learn(2).unlearn(1).unlearn(2).learn(0)
    assert torch.equal(run.model.chunk_embeddings, first)


def test_a_task_is_learned_again() -> None:
    for relearn, kept in (("new_embedding", False), ("old_embedding", True)):
        run = Run(relearn=relearn, lr=1e-12).learn(0, 1).unlearn(0)
        before = run.model.embeddings.detach().clone()
        run.learn(0)
        assert torch.allclose(run.model.embeddings, before) == kept
        assert (run.of.learned, run.of.forgotten) == ([1, 0], [])


def test_variants_of_noise() -> None:
    """From the same weights: norm and fresh noise shrink the network, a fixed draw is approached, discard swaps e_f."""
    base = Run(burn_in=25).learn(0, 1)
    start = weights(base.model)
    ends = {}
    for noise in ("fresh", "fixed", "norm", "discard"):
        run = Run(burn_in=25, noise=noise)
        run.model.load_state_dict(start)
        run.of.learned = [0, 1]
        ends[noise] = run.unlearn(1).numbers()[1]
        if noise == "discard":
            moved = {n: v for n, v in weights(run.model).items() if not torch.equal(v, start[n])}
            assert {n for n in moved if not n.startswith("running")} == {"embeddings"}
            assert run.of.report["steps"] == 0
    size = base.numbers()[1].norm()
    assert ends["fresh"].norm() < 0.8 * size
    assert ends["norm"].norm() < size
    z = torch.randn(len(ends["fixed"]), generator=Run().of._generator("noise", 1, "cpu"))

    def near(numbers: Tensor) -> float:
        return float(torch.nn.functional.cosine_similarity(numbers, z, 0))

    assert near(ends["fixed"]) > 0.1 + near(ends["fresh"])


def test_only_the_head_is_aligned() -> None:
    run = Run(burn_in=20, aligned="head", gamma=1.0).learn(0, 1)
    before, places = run.numbers()[1].square(), run.model.head_places()
    after = run.unlearn(1).numbers()[1].square()
    rest = torch.ones(len(before), dtype=torch.bool).index_fill(0, places, False)
    assert after[places].sum() < 0.6 * before[places].sum()
    assert after[rest].sum() > 0.8 * before[rest].sum()


def test_noise_depends_on_no_other_request() -> None:
    def drawn(*requests: str) -> Tensor:
        run, out = Run(epochs=1, burn_in=1, burn_in_floor=1), []
        draw = run.of.draw
        run.of.draw = lambda *args: out.append(draw(*args)) or out[-1]  # type: ignore[method-assign]
        for request in requests:
            (run.learn if request[0] == "L" else run.unlearn)(int(request[1]))
        return out[-1]

    one = drawn("L0", "U0")
    assert torch.equal(one, drawn("L1", "L0", "U1", "U0"))
    assert not torch.equal(one, drawn("L1", "U1"))
    assert not torch.equal(one, drawn("L0", "U0", "L0", "U0"))
    assert one.std() == pytest.approx(1 / math.sqrt(10), rel=0.05)  # the mean of n = 10 draws


def test_a_state_goes_on_where_it_was() -> None:
    whole = Run().learn(0, 1).unlearn(0)
    part, state = Run(seed=5), whole.of.state()
    part.model.load_state_dict(whole.model.state_dict())
    part.of.restore(part.model, part.data, state)
    assert part.of.state() == state
    for run in (whole, part):
        torch.manual_seed(9)
        run.unlearn(1).learn(0)
    assert same(weights(whole.model), weights(part.model))


@pytest.mark.parametrize("request_", ["learn", "unlearn"])
def test_after_an_error_nothing_has_changed(request_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run().learn(0, 1)
    before, state = weights(run.model), run.of.state()
    if request_ == "unlearn":
        run.of.gamma = 1e38
        said = refusal(lambda: run.unlearn(1))
        assert "--strategy.unlearning_lr" in said
    else:
        loss = GradientStrategy.loss
        calls: list[int] = []

        def third(self: Any, x: Tensor, y: Tensor) -> Tensor:
            calls.append(1)
            return loss(self, x, y) * (math.nan if len(calls) == 3 else 1)

        monkeypatch.setattr(GradientStrategy, "loss", third)
        assert "--strategy.lr" in refusal(lambda: run.learn(2))
        assert len(calls) == 3
    assert same(before, weights(run.model))
    assert run.of.state() == state
    assert run.of.held is None


def test_requests_that_make_no_sense() -> None:
    run = Run().learn(0, 1).unlearn(1)
    before = weights(run.model)
    assert "not learned any more" in refusal(lambda: run.unlearn(0, 1))
    assert "not learned:" in refusal(lambda: run.unlearn(2))
    assert "U0,L0" in refusal(lambda: run.learn(0))
    assert "tasks are 0 to 2" in refusal(lambda: run.of.learn(run.model, run.data, 3, run.trainer))
    run.of.repeated = "skip"
    run.of.unlearn(run.model, Closed(), [1], run.trainer)
    assert run.of.report["warnings"] == ["task 1 is not learned any more: left out"]
    assert same(before, weights(run.model))
    run.of.unlearn(run.model, Closed(), [1, 0], run.trainer)
    assert not same(before, weights(run.model))


def test_forgotten_tasks_can_be_anchored() -> None:
    for anchored in (False, True):
        run = Run(anchor_unlearned=anchored).learn(0, 1).unlearn(0)
        assert run.of._held(without=[2]) == ([1, 0] if anchored else [1])
        assert run.of._held(without=[0]) == [1]


def test_the_penalty_in_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored or generated again, at once or in groups, and in the mean of random parts, it is the same."""
    torch.manual_seed(0)
    reference, model = generator().requires_grad_(False), generator()
    for name in ("embeddings", "chunk_embeddings"):
        getattr(model, name).requires_grad_(False).copy_(getattr(reference, name))
    moved = distances(model.generate(model.embeddings), reference.generate(reference.embeddings)).detach()
    tasks: list[int] = [2, 0]
    expected, gradient = float((moved[2] + moved[0]) / 2), None
    for memory, group in ((2.0, 2), (0.0, 2), (2.0, 1), (0.0, 1)):
        monkeypatch.setattr(hypernetwork_penalty, "AT_ONCE", group * model.layout.numbers)
        held = Held(reference, tasks, None, memory, None)
        assert (held.stored is None) == (memory == 0)
        value = held.penalty(model)
        assert value.item() == pytest.approx(expected, rel=1e-5)
        found = torch.autograd.grad(value, model.generator_parameters())
        gradient = gradient or found
        for mine, other in zip(found, gradient, strict=True):
            torch.testing.assert_close(mine, other)
        third = Held(reference, tasks, 3, memory, None).penalty(model)
        assert third.item() == pytest.approx(2 / 3 * expected, rel=1e-5)
    parts = [Held(reference, tasks, None, 2.0, 1).penalty(model).item() for _ in range(20)]
    assert sorted({round(p, 2) for p in parts}) == pytest.approx(sorted(moved[tasks].tolist()), abs=0.02)
    scaled = [3 / 2 * Held(reference, tasks, 3, 2.0, 1).penalty(model).item() for _ in range(20)]
    assert sorted({round(p, 2) for p in scaled}) == pytest.approx(sorted(moved[tasks].tolist()), abs=0.02)


def test_losses_by_hand() -> None:
    a, b = torch.tensor([[1.0, 2], [0, 1]]), torch.tensor([[0.0, 0], [0, 3]])
    assert distances(a, b).tolist() == [5, 4]
    assert distances(a, b, torch.tensor([[1.0, 0.5], [7, 0]])).tolist() == [3, 0]
    noise = torch.stack([b, a])
    assert to_noise(a, noise) == (5 + 0) / 2 + (4 + 0) / 2


def test_the_mean_of_draws_has_the_same_gradient_as_the_draws() -> None:
    z, a = torch.randn(10, 1, 6), torch.randn(1, 6, requires_grad=True)
    mean = z.mean(0, keepdim=True)
    each, once = to_noise(a, z), to_noise(a, mean)
    torch.testing.assert_close(each, once + (z - mean).square().sum(-1).mean())
    torch.testing.assert_close(torch.autograd.grad(each, a), torch.autograd.grad(once, a))
    of = UnCLe(n=4)
    assert float(of.distance(torch.zeros(2, 8), torch.zeros(1, 2, 8))) == 0.75 * 16


def test_lengths() -> None:
    assert [burn_in_steps(k, 10, 0.5, 2) for k in range(4)] == [10, 5, 2, 2]
    assert [burn_in_steps(k, 9, 0.5, 1, "chained") for k in range(5)] == [9, 4, 2, 1, 1]
    assert burn_in_steps(3, 100, 1.0, 1) == 100


def test_the_rate_falls_and_the_gradient_is_clipped() -> None:
    seen: list[tuple[float, float]] = []

    class Watched(UnCLe):
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            super().configure_gradient_clipping(optimizer)
            grads = [p.grad.norm() for p in self.model.generator_parameters() if p.grad is not None]
            seen.append((optimizer.param_groups[0]["lr"], float(torch.stack(grads).norm())))

    run = Run(trainer=quiet_trainer())  # Lightning's own loop
    run.of = Watched(epochs=4, batch_size=24, lr=0.01, lr_step=2, lr_factor=0.1, clip=0.01)
    run.of.begin(run.model, run.data, "task")
    run.learn(0, 1).unlearn(0)
    assert [round(rate, 6) for rate, _ in seen[:4]] == [0.01, 0.01, 0.001, 0.001]
    assert len(seen) == 4 + 8  # rows of the second task make two batches
    assert max(norm for _, norm in seen) <= 0.01 * 1.001


def test_a_task_that_was_not_learned_is_named() -> None:
    model = generator()
    for p in model.generator_parameters():
        p.data.zero_()
    assert "--strategy.lr" in Run(model, lr=1e-12).learn(1).of.report["warnings"][0]
    assert "warnings" not in Run(epochs=12).learn(1).of.report


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"n": 0}, "--strategy.n=10"), ({"gamma": -0.1}, "--strategy.gamma=0.01"),
        ({"burn_in": 0}, "--strategy.burn_in"),
        ({"beta": -1}, "--strategy.beta"), ({"beta": math.nan}, "--strategy.beta"), ({"clip": 0}, "--strategy.clip"),
        ({"unlearning_lr": 0}, "--strategy.unlearning_lr"), ({"lr": 0}, "--strategy.lr"),
        ({"lr_factor": 0}, "--strategy.lr_factor"), ({"burn_in_factor": 1.1}, "--strategy.burn_in_factor"),
        ({"burn_in_floor": 0}, "--strategy.burn_in_floor"), ({"tasks_per_step": 0}, "--strategy.tasks_per_step"),
        ({"lr_step": 0}, "--strategy.lr_step"), ({"memory": -1}, "--strategy.memory"),
        ({"noise": "pink"}, "--strategy.noise"), ({"divisor": "x"}, "--strategy.divisor"),
        ({"aligned": "x"}, "--strategy.aligned"), ({"burn_in_schedule": "x"}, "--strategy.burn_in_schedule"),
        ({"relearn": "x"}, "--strategy.relearn"), ({"repeated": "x"}, "--strategy.repeated"),
    ],
)  # fmt: skip
def test_refusals(options: dict, named: str) -> None:
    assert named in refusal(lambda: UnCLe(**options))


def test_models_and_settings_it_does_not_serve() -> None:
    data, of = Blobs(), UnCLe()
    assert "--model=HyperClassifier" in refusal(lambda: of.check(Wrapped(torch.nn.Linear(2, 2)), data, "task"))
    assert "--setting=task" in refusal(lambda: of.check(generator(), data, "class"))
    assert "--model.task_classes" in refusal(lambda: of.check(generator(task_classes=[2, 2]), data, "task"))


@pytest.mark.parametrize("cls", [UnCLe, HyperClassifier])
def test_every_argument_is_explained(cls: type) -> None:
    said = set(re.findall(r"^        (\w+): ", cls.__doc__.split("Args:")[1], re.M))
    names = {n for n, p in inspect.signature(cls).parameters.items() if p.kind is not p.VAR_KEYWORD}
    assert names == said

"""UnCLe and the penalty of its ancestor against the authors' code."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_stream import InOrder, quiet_trainer
from vislearn.methods.uncle import UnCLe, burn_in_steps, to_noise

from vislearn import networks_uncle
from vislearn.hypernetwork import HyperClassifier
from vislearn.hypernetwork_penalty import Held, distances
from vislearn.networks_uncle import BranchResNet

from .harness import Case, of_kind


class Stream(InOrder):
    """Rows of the task that is learned, as the case gives them."""

    def __init__(self, tasks: int, classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tasks = [range(classes)] * tasks

    def within(self, y: Tensor, task: int) -> Tensor:
        return y


class Recorded(UnCLe):
    """With the case's own noise, where there is any."""

    def __init__(self, noise: Tensor | None = None, **kwargs: Any) -> None:
        super().__init__(n=1, **kwargs)
        self.noises, self.entropies, self.distances = noise, [], []

    def draw(self, step: int, *args: Any) -> Tensor:
        return self.noises[step][:, None]

    def distance(self, *args: Any) -> Tensor:
        self.distances.append(super().distance(*args))
        return self.distances[-1]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        self.entropies.append(super().loss(x, y))
        return self.entropies[-1]


def generator(case: Case, state: str) -> HyperClassifier:
    h, net = case.meta["hyperparameters"], case.meta["data"]["main_network"]
    widths = [net["conv_shapes"][0][0], net["conv_shapes"][-1][0]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(networks_uncle.OWN, "case", lambda k, c, norm: BranchResNet(k, c, norm, (1, 1), widths))
        model = HyperClassifier(
            "case", [net["linear_shape"][0]] * h["n_tasks"], net["conv_shapes"][0][1], case["x"].shape[-1],
            statistics="batch", layout="release", chunks=h["n_chunks"], task_size=h["task_embedding_dim"],
            chunk_size=h["chunk_embedding_dim"], hidden=h["hidden_layers"],
        )  # fmt: skip
    weights = {"embeddings": case["task_emb"], "chunk_embeddings": case["chunk_emb"]}
    for name, value in case.under(state).items():
        stack = name.startswith("hypernet_stack.")
        ours = name.replace("hypernet_stack", "trunk") if stack else f"heads.{name.replace('_head', '')}"
        weights[ours] = value
    model.load_state_dict(weights)
    return model


def strategy(case: Case, noise: Tensor | None = None, **kwargs: Any) -> Recorded:
    h = case.meta["hyperparameters"]
    out = Recorded(noise, beta=h["beta"], gamma=h["gamma"], lr=h["learning_rate"], unlearning_lr=h["unlearning_rate"],
                   clip=h["grad_clip_norm"], divisor="total", epochs=1, burn_in=h["forget_steps"], burn_in_floor=1,
                   **kwargs)  # fmt: skip
    return out


def begun(of: Recorded, model: HyperClassifier, case: Case) -> Stream:
    x, y, h = case["train.x"], case["train.y"], case.meta["hyperparameters"]
    stream = Stream(h["n_tasks"], case["logits.0"].shape[1], batch_size=x.shape[1],
                    train=(x.flatten(0, 1), y.flatten()))  # fmt: skip
    of.begin(model, stream, "task")
    of.learned = [t for t, learned in enumerate(h["occupancy"]) if learned]
    return stream


@of_kind("uncle")
def test_generated_numbers_and_logits(case: Case) -> None:
    model = generator(case, "cur.").eval()
    forward = case.meta["expected"]["forward"]
    assert model.layout.numbers == forward["total_outputs"]
    numbers = model.generate(model.embeddings)
    heads = torch.cat([case[f"out0.{name}"].flatten() for name in ("w", "b", "nw", "nb", "dw", "db")])
    case.close("outputs", numbers[0], heads)
    for task in range(case.meta["hyperparameters"]["n_tasks"]):
        case.close("outputs", model.task_outputs(case["x"], task), case[f"logits.{task}"], f"task {task}")


@of_kind("uncle")
def test_penalty_while_learning(case: Case) -> None:
    star, model = generator(case, "star.").requires_grad_(False), generator(case, "cur.")
    h, expected = case.meta["hyperparameters"], case.meta["expected"]["learning_penalty"]
    moved = distances(model.generate(model.embeddings), star.generate(star.embeddings))
    case.close("learning_penalty", moved, expected["per_task_sq_dist"])
    tasks = [t for t, learned in enumerate(h["occupancy"]) if learned]
    case.close("learning_penalty", Held(star, tasks, None, 1.0, None).penalty(model),
               expected["cl_reg_paper_mean_over_regularised"])  # fmt: skip
    for memory in (1.0, 0.0):
        penalty = Held(star, tasks, h["n_tasks"], memory, None).penalty(model)
        case.close("learning_penalty", penalty, expected["cl_reg_official"])
        (gradient,) = torch.autograd.grad(penalty, model.trunk[0].weight)
        case.close("gradients", gradient, case["grad.cl_reg.hypernet_stack.0.weight"])


@of_kind("uncle")
def test_loss_while_forgetting(case: Case) -> None:
    star, model = generator(case, "star.").requires_grad_(False), generator(case, "cur.")
    h, expected = case.meta["hyperparameters"], case.meta["expected"]["unlearning_loss"]
    f = h["forget_task"]
    rest = [t for t, learned in enumerate(h["occupancy"]) if learned and t != f]
    kept = Held(star, rest, None, 1.0, None).penalty(model)
    noise = to_noise(model.generate(model.embeddings[f : f + 1].detach()), case["noise.single"][:, None])
    loss = kept + h["gamma"] * noise
    case.close("unlearning_loss", kept, expected["retain_reg"])
    case.close("unlearning_loss", noise, expected["noise_term"])
    case.close("unlearning_loss", loss, expected["unlearn_loss"])
    gradients = dict(zip(range(99), torch.autograd.grad(loss, model.generator_parameters()), strict=False))
    case.close("gradients", gradients[0], case["grad.unlearn.hypernet_stack.0.weight"])
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    case.close("gradients", norm, expected["unlearn_grad_norm_preclip"])


@of_kind("uncle")
def test_forgetting(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, kept, h = generator(case, "star."), [], case.meta["hyperparameters"]
    expected, f = case.meta["expected"]["forget_loop"], h["forget_task"]
    penalty = Held.penalty
    monkeypatch.setattr(Held, "penalty", lambda self, m: kept.append(penalty(self, m)) or kept[-1])
    of = strategy(case, case["noise.steps"])
    stream = begun(of, model, case)

    def square() -> Tensor:
        return model.generate(model.embeddings)[f].square().sum()

    case.close("forget_loop", square(), expected["forgot_task_output_sqnorm_before"])
    of.unlearn(model, stream, [f], quiet_trainer())
    case.close("forget_loop", square(), expected["forgot_task_output_sqnorm_after"])
    rows = torch.stack([torch.stack(kept), torch.stack(of.distances)], 1)
    case.close("forget_loop", rows, expected["retain_then_noise_before_each_step"])
    after = {name: p for name, p in generator_names(model).items() if name in case.under("after_forget.")}
    assert after
    for name, p in after.items():
        case.close("after_forget", p, case[f"after_forget.{name}"], name)


def generator_names(model: HyperClassifier) -> dict[str, Tensor]:
    """Weights of the generator by the case's names."""
    out = {f"hypernet_stack.{name}": p for name, p in model.trunk.named_parameters()}
    for head, layer in model.heads.items():
        out |= {f"{head}_head.{name}": p for name, p in layer.named_parameters()}
    return out


@of_kind("uncle")
def test_learning(case: Case) -> None:
    model, task = generator(case, "star."), case.meta["hyperparameters"]["learn_task"]
    expected, before = case.meta["expected"]["learning_steps"], model.embeddings.detach().clone()
    of = strategy(case)
    of.learn(model, begun(of, model, case), task, quiet_trainer())
    case.close("learning_steps", torch.stack(of.entropies), expected["cross_entropy"])
    case.close("learning_steps", of.report["penalty"], expected["penalty"][-1])
    case.close("after_train", model.embeddings[task], case["after_train.task_emb"])
    others = [t for t in range(len(before)) if t != task]
    assert torch.equal(model.embeddings[others], before[others])
    trunk = {name: p for name, p in generator_names(model).items() if name.startswith("hypernet_stack")}
    for name, p in trunk.items():
        case.close("after_train", p, case[f"after_train.{name}"], name)


@of_kind("uncle")
def test_lengths_of_the_burn_in(case: Case) -> None:
    expected = case.meta["expected"]["burn_in"]
    chained = expected["released_chain_int_of_0_9_times_previous"]
    closed = expected["paper_closed_form_floor_20"]
    assert [burn_in_steps(k, floor=1, schedule="chained") for k in range(len(chained))] == chained
    assert [burn_in_steps(k) for k in range(len(closed))] == closed


@of_kind("hypernetwork_regulariser")
def test_penalty_of_the_ancestor(case: Case) -> None:
    h, expected = case.meta["hyperparameters"], case.meta["expected"]
    tasks = h["regularised_tasks"]
    chunks = nn.Parameter(case["cur.chunk_emb"])
    net = case.network("cur.")
    embeddings = case["task_emb"][tasks][:, None].expand(-1, len(chunks), -1)
    inputs = torch.cat([embeddings, chunks.expand(len(tasks), *chunks.shape)], -1)
    now = net(inputs).flatten(1)[:, : expected["sizes"]["n_outputs"]]
    before = torch.stack([case[f"target.{t}"] for t in tasks])
    case.close("outputs", now, torch.stack([case[f"pred.{t}"] for t in tasks]))
    plain = distances(now, before).mean()
    case.close("values", plain, expected["plain"])
    weighted = distances(now, before, torch.stack([case[f"importance.{t}"] for t in tasks])).mean()
    case.close("values", weighted, expected["importance_weighted"])
    scaled = (torch.tensor(h["scaling"]) * distances(now, before)).mean()
    case.close("values", scaled, expected["per_task_scaling"])
    first, of_chunks = torch.autograd.grad(plain, [next(net.parameters()), chunks])
    case.close("gradients", first, case["grad.theta.0"])
    case.close("gradients", of_chunks, case["grad.chunk_emb"])

"""UnCLe: a hypernetwork learns a stream of tasks and forgets some of them without any data (Adhikari et al., 2025)."""

import hashlib
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vislearn.errors import UserError
from vislearn.hypernetwork import HyperClassifier
from vislearn.hypernetwork_penalty import Held
from vislearn.learner import Learner
from vislearn.method import frozen_copy
from vislearn.strategy import GradientStrategy, Setting
from vislearn.tasks import TaskStream
from vislearn.trainer import Trainer

Noise = Literal["fresh", "fixed", "norm", "discard"]
COLLAPSED = 0.99  # of ln k: a network of k classes whose loss ends above this share has learned nothing


class UnCLe(GradientStrategy):
    r"""Learn a task while the networks of the others are held in place; forget one by moving its network to noise.

    With the generator :math:`H(e; \phi)`, its weights :math:`\phi^*` before the request, the learned tasks :math:`R`
    and the network :math:`F(x; \theta)`, learning task k descends over :math:`\phi` and :math:`e_k` on

    .. math::
        \mathrm{CE}(F(x; H(e_k; \phi)), y) + \beta \frac{1}{K} \sum_{t \in R} \|H(e_t; \phi) - H(e_t; \phi^*)\|^2,

    and forgetting task f takes N steps, without data, over :math:`\phi` on

    .. math::
        \frac{1}{|R \setminus f|} \sum_{t \in R \setminus f} \|H(e_t; \phi) - H(e_t; \phi^*)\|^2
        + \gamma \frac{1}{n} \sum_{i=1}^n \|H(e_f; \phi) - z_i\|^2, \quad z_i \sim N(0, I).

    The noise is drawn anew in every step and has mean 0, so the network of f goes to 0 and its outputs become uniform:
    it does not become noise. Of several tasks in one request the noise terms are added, and there is one run of N
    steps. N is shorter with every request. The size of the network of f (`rms_after` in `report`) says how far it got;
    the loss does not, because n draws are never closer than their own spread.

    The networks :math:`H(e_t; \phi^*)` are generated once for a request where they fit into `memory`, and in every
    step where they do not. What is generated in a graph at once is bounded too; beyond that the backward pass generates
    it again.

    Reference:
        Adhikari, Kumaravelu, Srijith. An Unlearning Framework for Continual Learning. 2025. arXiv:2509.17530. The
        penalty: von Oswald, Henning, Grewe, Sacramento. Continual learning with hypernetworks. ICLR 2020.
        arXiv:1906.00695.

    Departures: the code divides the penalty by the number of all tasks (`divisor=total`), shortens N by int(0.9 N)
    without a floor (`burn_in_schedule=chained`, `burn_in_floor=1`), learns a task again from its old embedding
    (`relearn=old_embedding`), and loses the generator when the only learned task is forgotten: here nothing is held
    then. The mean of n draws is drawn instead of n draws; the gradient has the same law, and what the spread within
    them adds to the loss stands there with its expectation. Running statistics of batch normalisation, which the code
    does not read, are taken by a pass over the rows of a task behind its last epoch, and cleared when it is forgotten.
    After a loss that is not finite, or any other error, the model is what it was before the request.

    Args:
        beta: weight of the penalty while learning, 0 or more.
        gamma: weight of the noise while forgetting, 0 or more.
        n: draws of noise in a step, 1 or more.
        epochs: passes over the rows of a task.
        lr: learning rate of Adam while learning.
        unlearning_lr: learning rate of Adam while forgetting, above 0.
        batch_size: rows per batch; the data module's where it is None.
        lr_step: epochs after which the learning rate falls, again and again, 1 or more.
        lr_factor: factor on it, in (0, 1].
        clip: largest norm of the gradient of the generator, above 0; that of the embedding is not clipped.
        divisor: what the penalty is divided by while learning: `regularised`, the number of tasks in it, as in the
            paper; or `total`, that of all tasks of the stream, as in the code, which holds early tasks less.
        anchor_unlearned: hold the networks of forgotten tasks in place too, so that they do not come back.
        tasks_per_step: take so many of the tasks in the penalty in each step, drawn anew from torch's global generator,
            so that the time of a step does not grow with the stream; by default all.
        noise: `fresh`; `fixed`, one draw for the whole request; `norm`, the length of the network in the place of its
            distance to noise; `discard`, a new embedding and no step at all. All but the first are the paper's
            comparisons.
        aligned: `all` numbers of the network go to noise, or only those of its last layer, `head`.
        burn_in: N of the first request, 1 or more.
        burn_in_factor: factor on N with each request, in (0, 1].
        burn_in_floor: N never falls below this, 1 or more.
        burn_in_schedule: `closed`, int(burn_in factor^k) after k requests, as in the paper; `chained`, rounded down at
            every request, as in the code.
        relearn: what a forgotten task that is learned again starts from: `new_embedding` or `old_embedding`.
        repeated: what a request does about a task that is not learned: `error`, or `skip`, which leaves it out and says
            so.
        memory: GiB that the networks in the penalty may take, 0 or more.
    """

    settings: ClassVar[frozenset[str]] = frozenset({"task"})
    supports: ClassVar[type[Learner] | tuple[type[Learner], ...]] = HyperClassifier

    model: HyperClassifier  # type: ignore[assignment] # see `supports`

    def __init__(
        self,
        beta: float = 0.1,
        gamma: float = 0.01,
        n: int = 10,
        epochs: int = 10,
        lr: float = 1e-3,
        unlearning_lr: float = 1e-3,
        batch_size: int | None = 512,
        lr_step: int = 25,
        lr_factor: float = 0.5,
        clip: float = 1.0,
        divisor: Literal["regularised", "total"] = "regularised",
        anchor_unlearned: bool = False,
        tasks_per_step: int | None = None,
        noise: Noise = "fresh",
        aligned: Literal["all", "head"] = "all",
        burn_in: int = 100,
        burn_in_factor: float = 0.9,
        burn_in_floor: int = 20,
        burn_in_schedule: Literal["closed", "chained"] = "closed",
        relearn: Literal["new_embedding", "old_embedding"] = "new_embedding",
        repeated: Literal["error", "skip"] = "error",
        memory: float = 2.0,
    ) -> None:
        super().__init__(epochs=epochs, lr=lr, batch_size=batch_size, optimizer="adam")
        for name, value, theirs in (("beta", beta, 0.1), ("gamma", gamma, 0.01), ("memory", memory, 2.0)):
            if not 0 <= value < math.inf:
                raise UserError(f"{name} must be 0 or more, not {value:g}; the default is --strategy.{name}={theirs:g}")
        for name, value, theirs in (("unlearning_lr", unlearning_lr, 1e-3), ("clip", clip, 1.0)):
            if not 0 < value < math.inf:
                raise UserError(f"{name} must be above 0, not {value:g}; the paper's is --strategy.{name}={theirs:g}")
        for name, value, theirs in (("lr_factor", lr_factor, 0.5), ("burn_in_factor", burn_in_factor, 0.9)):
            if not 0 < value <= 1:
                raise UserError(f"{name} lies in (0, 1], not {value:g}; the paper's is --strategy.{name}={theirs:g}")
        for name, count, theirs in (
            ("n", n, 10), ("lr_step", lr_step, 25), ("burn_in", burn_in, 100), ("burn_in_floor", burn_in_floor, 20),
            ("tasks_per_step", tasks_per_step, 10),
        ):  # fmt: skip
            if count is not None and count < 1:
                raise UserError(f"{name} must be at least 1, not {count}; for example --strategy.{name}={theirs}")
        for name, choice, choices in (
            ("divisor", divisor, ("regularised", "total")), ("noise", noise, ("fresh", "fixed", "norm", "discard")),
            ("aligned", aligned, ("all", "head")), ("burn_in_schedule", burn_in_schedule, ("closed", "chained")),
            ("relearn", relearn, ("new_embedding", "old_embedding")), ("repeated", repeated, ("error", "skip")),
        ):  # fmt: skip
            if choice not in choices:
                raise UserError(f"{name} is one of {', '.join(choices)}, not '{choice}' (--strategy.{name})")
        self.beta, self.gamma, self.n, self.unlearning_lr, self.clip = beta, gamma, n, unlearning_lr, clip
        self.lr_step, self.lr_factor, self.divisor, self.noise = lr_step, lr_factor, divisor, noise
        self.anchor_unlearned, self.tasks_per_step, self.aligned = anchor_unlearned, tasks_per_step, aligned
        self.burn_in, self.burn_in_factor, self.burn_in_floor = burn_in, burn_in_factor, burn_in_floor
        self.burn_in_schedule, self.relearn, self.repeated, self.memory = burn_in_schedule, relearn, repeated, memory
        self.held: Held | None = None  # while a task is learned
        self.report: dict[str, Any] = {}  # of the last request
        self.seed, self.requests = 0, 0
        self.forgettings: list[int] = []

    def check(self, model: Learner, data: TaskStream, setting: Setting) -> None:
        super().check(model, data, setting)
        assert isinstance(model, HyperClassifier)
        wanted = [len(t) for t in data.tasks]
        if model.built and model.task_classes != wanted:
            raise UserError(f"the model has tasks of {model.task_classes} classes and the data of {wanted}; leave out "
                            "--model.task_classes")  # fmt: skip

    def begin(self, model: Learner, data: TaskStream, setting: Setting) -> None:
        super().begin(model, data, setting)
        self.seed, self.requests = torch.initial_seed(), 0  # requests: how often something was forgotten
        self.forgettings = [0] * len(data.tasks)  # how often each task was

    def learn(self, model: Learner, data: TaskStream, task: int, trainer: Trainer) -> Learner:
        assert isinstance(model, HyperClassifier)
        if not 0 <= task < len(model.embeddings):
            raise UserError(f"there is no task {task}: tasks are 0 to {len(model.embeddings) - 1}")
        if task in self.learned:
            raise UserError(f"task {task} is learned already; forget it before it is learned again: U{task},L{task}")
        before = frozen_copy(model)
        self.report = {}
        first = not self.learned and not self.forgotten
        model.chunk_embeddings.requires_grad_(first and model.chunk_kind == "paper")
        if task in self.forgotten and self.relearn == "new_embedding":
            model.renew(task, self._generator("embedding", task, "cpu"))
        held = self._held(without=[task])
        divisor = len(data.tasks) if self.divisor == "total" else None
        self.held = Held(before, held, divisor, self.memory, self.tasks_per_step) if held and self.beta else None
        try:
            super().learn(model, data, task, trainer)
            if any(True for _ in model.running.buffers()):
                model.settle_statistics(task, data.loader("train", train=False, batch_size=self.batch_size))
        except BaseException:
            model.load_state_dict(before.state_dict())
            raise
        finally:
            self.held = None
            model.chunk_embeddings.requires_grad_(False)
        return model

    def _held(self, without: Sequence[int]) -> list[int]:
        """The tasks whose networks are held in place."""
        tasks = [*self.learned, *(self.forgotten if self.anchor_unlearned else [])]
        return [t for t in tasks if t not in without]

    def configure_optimizers(self) -> Any:
        moving = [*self.model.generator_parameters(), self.model.embeddings]  # only e_k gets a gradient
        if self.model.chunk_embeddings.requires_grad:
            moving.append(self.model.chunk_embeddings)
        optimizer = torch.optim.Adam(moving, self.lr)
        return {"optimizer": optimizer,
                "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, self.lr_step, self.lr_factor)}  # fmt: skip

    def on_train_epoch_start(self) -> None:
        self.report.update(cross_entropy=torch.zeros(()), penalty=torch.zeros(()), steps=0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = self.loss(x, y)
        self.report["cross_entropy"] = self.report["cross_entropy"].to(loss.device) + loss.detach()
        self.report["steps"] += 1
        if self.held is None:
            return loss
        penalty = self.held.penalty(self.model)
        self.report["penalty"] = penalty.detach()
        return loss + self.beta * penalty

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        self.report["gradient_norm"] = self._clipped(self.model)

    def _clipped(self, model: HyperClassifier) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(model.generator_parameters(), self.clip)

    def on_train_epoch_end(self) -> None:
        """Numbers of the last epoch stay: mean cross-entropy, and the penalty and gradient norm of its last step."""
        for name in ("cross_entropy", "penalty", "gradient_norm"):
            self.report[name] = float(self.report[name])
        self.report["cross_entropy"] /= self.report["steps"]
        chance = math.log(len(self.data.tasks[self.task]))
        if chance > 0 and self.report["cross_entropy"] > COLLAPSED * chance:
            self.report["warnings"] = [f"task {self.task} was not learned: its cross-entropy ended at "
                                       f"{self.report['cross_entropy']:.3f}, that of a guess is {chance:.3f}; try a "
                                       f"smaller --strategy.lr than {self.lr:g}"]  # fmt: skip
        else:
            self.report.pop("warnings", None)

    def unlearn(self, model: Learner, data: TaskStream, tasks: Sequence[int], trainer: Trainer) -> Learner:
        assert isinstance(model, HyperClassifier)
        tasks = list(dict.fromkeys(tasks))
        unknown = [t for t in tasks if t not in self.learned]
        self.report = {}
        if unknown:
            said = f"task {', '.join(map(str, unknown))} is not learned" + (
                " any more" if any(t in self.forgotten for t in unknown) else ""
            )
            if self.repeated == "error":
                raise UserError(f"{said}: nothing was forgotten; leave it out, or give --strategy.repeated=skip")
            self.report["warnings"] = [f"{said}: left out"]
            tasks = [t for t in tasks if t in self.learned]
        if not tasks:
            return model
        before = frozen_copy(model)
        try:
            if self.noise == "discard":
                for task in tasks:
                    model.renew(task, self._generator("discard", task, "cpu"))
                self.report["steps"] = 0
            else:
                self._align(model, before, tasks)
        except BaseException:
            model.load_state_dict(before.state_dict())
            raise
        self.requests += 1
        return model

    def _align(self, model: HyperClassifier, before: Learner, tasks: Sequence[int]) -> None:
        """Move the networks of tasks to noise, with all others held in place."""
        device = model.embeddings.device
        e_f = model.embeddings.detach()[list(tasks)]
        held = self._held(without=tasks)
        retention = Held(before, held, None, self.memory, self.tasks_per_step) if held else None
        places = model.head_places().to(device) if self.aligned == "head" else slice(None)
        generators = [self._generator("noise", task, device) for task in tasks]
        optimizer = torch.optim.Adam(model.generator_parameters(), self.unlearning_lr)
        lengths = self.burn_in, self.burn_in_factor, self.burn_in_floor, self.burn_in_schedule
        steps = burn_in_steps(self.requests, *lengths)
        noise: Tensor | None = None
        for step in range(steps):
            numbers = model.generate(e_f)[:, places]
            if step == 0:
                self.report["rms_before"] = rms(numbers)
            if self.noise == "fresh" or (self.noise == "fixed" and noise is None):
                noise = self.draw(step, numbers, generators)
            forgetting = self.distance(numbers, noise)
            kept = retention.penalty(model) if retention else numbers.new_zeros(())
            loss = kept + self.gamma * forgetting
            if not torch.isfinite(loss):
                raise UserError(f"UnCLe diverged while it forgot task {', '.join(map(str, tasks))}: the loss is "
                                f"{loss.item()} at step {step}; the state before this request is kept; try a smaller "
                                f"--strategy.unlearning_lr than {self.unlearning_lr:g}")  # fmt: skip
            optimizer.zero_grad()
            loss.backward()
            norm = self._clipped(model)
            optimizer.step()
        model.zero_grad()
        with torch.no_grad():
            self.report.update(steps=steps, retention=kept.item(), noise=forgetting.item(), gradient_norm=norm.item(),
                               rms_after=rms(model.generate(e_f)[:, places]))  # fmt: skip

    def draw(self, step: int, numbers: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """(s, k, m) noise for the networks (k, m) of k tasks, each from its own generator of random numbers.

        Of `fresh` noise it is the mean of n draws, of `fixed` the one draw.
        """
        scale = 1 / math.sqrt(self.n) if self.noise == "fresh" else 1.0
        drawn = [torch.randn(numbers.shape[1], generator=g, device=g.device) for g in generators]
        return scale * torch.stack(drawn)[None]

    def distance(self, numbers: Tensor, noise: Tensor | None) -> Tensor:
        """What brings networks (k, m) to noise (s, k, m), or to length 0."""
        if noise is None:
            return numbers.norm(dim=1).sum()
        # the mean over n draws of |a - z|^2 is |a - their mean|^2 and their spread, which no weight changes
        spread = (1 - 1 / self.n) * numbers.numel() if self.noise == "fresh" else 0.0
        return to_noise(numbers, noise) + spread

    def _generator(self, purpose: str, task: int, device: torch.device | str) -> torch.Generator:
        """Random numbers that depend on the seed, the task, and how often it was forgotten; on no other request."""
        key = f"{self.seed} {purpose} {task} {self.forgettings[task]}"
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) >> 1
        return torch.Generator(device).manual_seed(seed)

    def note_forgotten(self, model: Learner, data: TaskStream, tasks: Sequence[int]) -> None:
        super().note_forgotten(model, data, tasks)
        assert isinstance(model, HyperClassifier)
        for task in tasks:
            model.reset_statistics(task)
            self.forgettings[task] += 1

    def state(self) -> dict[str, Any]:
        return {**super().state(), "seed": self.seed, "requests": self.requests, "forgettings": list(self.forgettings)}

    def restore(self, model: Learner, data: TaskStream, state: dict[str, Any]) -> None:
        super().restore(model, data, state)
        self.seed, self.requests, self.forgettings = state["seed"], state["requests"], list(state["forgettings"])


def to_noise(numbers: Tensor, noise: Tensor) -> Tensor:
    """Networks (k, n) and draws of noise (s, k, n) -> sum over networks of the mean squared distance to the draws."""
    return (numbers - noise).square().sum(-1).mean(0).sum()


def burn_in_steps(
    requests: int, first: int = 100, factor: float = 0.9, floor: int = 20, schedule: str = "closed"
) -> int:
    """Steps of a request to forget, after so many others."""
    if schedule == "closed":
        return max(floor, int(first * factor**requests))
    steps = first
    for _ in range(requests):
        steps = int(factor * steps)
    return max(floor, steps)


def rms(numbers: Tensor) -> float:
    """Root of the mean square."""
    return numbers.detach().square().mean().sqrt().item()

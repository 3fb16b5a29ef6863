"""A method as a function of a model and the rows of a request, for measures that send requests of their own."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from .data import ForgetDataModule, Labels, Memory
from .forget import Forget
from .learner import Learner
from .measure import Bench
from .method import UnlearningMethod
from .trainer import DEFAULTS, Trainer

Unlearn = Callable[[Learner, Tensor, Tensor], Learner]


class Last(Forget):
    """The last rows of the training split.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def indices(self, labels: Labels, candidates: Tensor) -> Tensor:
        return candidates[-self.count :]


class Request(ForgetDataModule):
    """Rows in memory, as a model sees them: those to retain, and behind them those of the request.

    Args:
        like: the data module whose classes, channels and image size these rows have.
        retain: x (n, c, h, w) normalised and y (n,).
        forget: x (m, c, h, w) normalised and y (m,), the request.
    """

    def __init__(self, like: ForgetDataModule, retain: tuple[Tensor, Tensor], forget: tuple[Tensor, Tensor]) -> None:
        batch = min(like.batch_size, len(forget[1]))
        super().__init__(batch_size=batch, val_fraction=0.0, forget=Last(len(forget[1])), augment=False)
        self.num_classes, self.channels, self.image_size = like.num_classes, like.channels, like.image_size
        self.classes = like.classes
        self.rows = {True: torch.cat([retain[0], forget[0]]), False: retain[0]}
        self.targets = {True: torch.cat([retain[1], forget[1]]).cpu(), False: retain[1].cpu()}

    def source(self, train: bool) -> Memory:
        return Memory(self.rows[train])

    def labels(self, train: bool) -> Labels:
        return Labels(self.targets[train], self.classes)


def as_function(make: Callable[[], UnlearningMethod], bench: Bench) -> Unlearn:
    """The method as a function (model, x_f, y_f) -> unlearned model.

    It retains a sample of the retain set, learns nothing of validation and test rows, and draws from `bench.seed`.

    Args:
        make: gives a new method with the settings under test.
        bench: whose retain rows stand for the retain set.
    """
    data = bench.data
    assert data is not None

    def unlearn(model: Learner, x: Tensor, y: Tensor) -> Learner:
        request = Request(data, bench.rows("retain"), (x, y))
        request.setup()
        trainer = Trainer(**DEFAULTS | {"accelerator": "cpu" if bench.device.type == "cpu" else "auto"})
        method = make()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(bench.seed)
            given = copy.deepcopy(model)
            method.prepare(given, request, lambda name, compute: compute())
            done = method.unlearn(given, request, trainer)
        return done.to(bench.device).eval()

    return unlearn

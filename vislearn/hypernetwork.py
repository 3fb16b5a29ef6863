"""One generator for the networks of many tasks: `HyperClassifier`."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from .errors import UserError
from .hypernetwork_layout import LAYOUTS, Layout, LayoutName
from .learner import Learner, Reduction, check, full
from .loader import batches
from .networks import Network, Norm
from .networks_uncle import build_target

if TYPE_CHECKING:
    from .data import ForgetDataModule

KEPT = 2**27  # generated numbers that are kept between two batches of an evaluation; 512 MiB


class HyperClassifier(Learner):
    r"""A generator :math:`H(e_t; \phi)` that writes a network for each task from the task's embedding.

    A chunk :math:`j` of the network of task :math:`t` is made from :math:`[e_t; c_j]` by a trunk of linear layers with
    ReLU and by linear heads; `vislearn.hypernetwork_layout` says which number is which parameter. `task_outputs` gives
    the logits of one task; called on images alone it runs the networks of all tasks one after the other and gives the
    classes of all of them.

    Outside of training the network of a task is generated once and kept until the generator changes, up to 512 MiB of
    networks. Batch normalisation keeps running statistics for every task; `reset_statistics` clears those of one.
    Called on images alone in training mode, all networks see all rows, and so do their statistics; norm=group has none.

    Reference:
        von Oswald, Henning, Grewe, Sacramento. Continual learning with hypernetworks. ICLR 2020. arXiv:1906.00695.
        Adhikari, Kumaravelu, Srijith. An Unlearning Framework for Continual Learning. 2025. arXiv:2509.17530.

    Departures: `layout=by_layer` and `statistics=stored` are not UnCLe's code, whose forms are `release` and `batch`.
    The generator never runs in mixed precision, because two of its outputs are subtracted from each other.

    Args:
        arch: the network of a task: `resnet6_uncle`, `resnet18_uncle` and `resnet50_uncle`, wired as in UnCLe's code,
            or any name that Classifier's `arch` takes.
        task_classes: number of classes of each task; by default the data's. The networks have as many outputs as the
            largest task needs, and the others leave the last ones unused.
        in_channels: channels of the images; by default the data's.
        image_size: pixels per side; by default the data's.
        norm: normalisation of the convolutional networks among those named: `batch`, `group`, `layer` or `none`.
        statistics: what batch normalisation reads outside of training: `stored`, running statistics of each task, or
            `batch`, those of the batch at hand, as UnCLe's code does; then outputs depend on the batch.
        layout: `by_layer` generates what is used and no more, and starts each layer in its own scale; `release` is the
            authors' layout, in which rows are mixed and of a ResNet-18 three quarters are never used.
        chunks: number of chunks, 1 or more.
        chunk_embeddings: `release` never trains the chunk embeddings; `paper` lets the first task train them, so that
            a trace of it stays when it is forgotten.
        task_size: length of a task embedding, 1 or more.
        chunk_size: length of a chunk embedding, 1 or more.
        hidden: widths of the trunk; by default 128, 256 and 512.
        **kwargs: see `Learner`.
    """

    trunk: nn.Sequential
    heads: nn.ModuleDict

    def __init__(
        self,
        arch: str = "resnet20",
        task_classes: list[int] | None = None,
        in_channels: int | None = None,
        image_size: int | None = None,
        norm: Norm = "batch",
        statistics: Literal["stored", "batch"] = "stored",
        layout: LayoutName = "by_layer",
        chunks: int = 200,
        chunk_embeddings: Literal["release", "paper"] = "release",
        task_size: int = 32,
        chunk_size: int = 32,
        hidden: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check(statistics in ("stored", "batch"),
              f"statistics is 'stored' or 'batch', not '{statistics}' (--model.statistics)")  # fmt: skip
        check(layout in LAYOUTS, f"layout is one of {', '.join(LAYOUTS)}, not '{layout}' (--model.layout)")
        check(chunk_embeddings in ("release", "paper"), f"chunk_embeddings is 'release' or 'paper', not "
              f"'{chunk_embeddings}' (--model.chunk_embeddings)")  # fmt: skip
        sizes = (("chunks", chunks, 200), ("task_size", task_size, 32), ("chunk_size", chunk_size, 32))
        for name, value, usual in sizes:
            check(value >= 1, f"{name} must be at least 1, not {value}; the paper's is --model.{name}={usual}")
        hidden = [128, 256, 512] if hidden is None else hidden
        check(bool(hidden) and min(hidden) >= 1, f"hidden holds the widths of the trunk, not {hidden}; the paper's is "
              "--model.hidden=[128,256,512]")  # fmt: skip
        check(task_classes is None or (bool(task_classes) and min(task_classes) >= 1),
              f"task_classes holds the classes of each task, not {task_classes}; two tasks of ten are "
              "--model.task_classes=[10,10]")  # fmt: skip
        self.arch, self.in_channels, self.image_size, self.norm = arch, in_channels, image_size, norm
        self.task_classes, self.statistics, self.layout_name, self.chunks = task_classes, statistics, layout, chunks
        self.chunk_kind, self.task_size, self.chunk_size, self.hidden = chunk_embeddings, task_size, chunk_size, hidden
        self._generated: OrderedDict[int, tuple[Any, Tensor]] = OrderedDict()
        if task_classes is not None and in_channels is not None and image_size is not None:
            self.construct()

    def construct(self) -> None:
        """Build the generator, all sizes being known."""
        assert self.task_classes is not None
        assert self.in_channels is not None
        assert self.image_size is not None
        network = build_target(self.arch, max(self.task_classes), self.in_channels, self.image_size, self.norm)
        largest = max((p.numel() for p in network.parameters()), default=0)
        check(self.chunks <= largest, f"chunks={self.chunks} is more than the {largest} numbers of the largest layer "
              f"of {self.arch}; give fewer, for example --model.chunks={max(1, largest // 20)}")  # fmt: skip
        if self.statistics == "batch":
            for module in network.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.track_running_stats = False
                    module.running_mean = module.running_var = module.num_batches_tracked = None
        self.layout: Layout = LAYOUTS[self.layout_name](network, self.chunks)
        head = {id(p) for p in network.head.parameters()}
        self._of_head = {name for name, p in network.named_parameters() if id(p) in head}
        tasks = len(self.task_classes)
        self.embeddings = nn.Parameter(torch.randn(tasks, self.task_size))
        self.chunk_embeddings = nn.Parameter(torch.randn(self.chunks, self.chunk_size), self.chunk_kind == "paper")
        widths = [self.task_size + self.chunk_size, *self.hidden]
        self.trunk = nn.Sequential()
        for before, width in zip(widths, self.hidden, strict=False):
            self.trunk.extend([nn.Linear(before, width), nn.ReLU()])
        self.heads = nn.ModuleDict({name: nn.Linear(widths[-1], width) for name, width in self.layout.heads.items()})
        self.layout.initialise(self.heads, self._features(self.embeddings))
        self._hold(network, tasks)
        self.hparams.update(task_classes=list(self.task_classes), in_channels=self.in_channels,
                            image_size=self.image_size)  # fmt: skip

    def _hold(self, network: Network, tasks: int) -> None:
        """Keep the network as a form to be filled, outside of the modules: it has no weights of its own."""
        running = {f"{name}.{key}" for name, module in network.named_modules() for key, _ in module.named_buffers()
                   if isinstance(module, nn.modules.batchnorm._BatchNorm)}  # fmt: skip
        lasting = network.state_dict().keys()
        self.running, self.constants = nn.Module(), nn.Module()
        self._buffers_of: list[tuple[str, bool]] = []  # name, and whether every task has its own
        for name, buffer in network.named_buffers():
            own = name in running
            value = buffer.expand(tasks, *buffer.shape).clone() if own else buffer.clone()
            (self.running if own else self.constants).register_buffer(key_of(name), value, name in lasting)
            self._buffers_of.append((name, own))
        self._form = [Form(network).to_empty(device="meta")]

    @property
    def built(self) -> bool:
        """Whether there is a generator."""
        return "trunk" in self._modules

    def fill(self, data: "ForgetDataModule") -> None:
        """Take sizes that were not given from the data, and build the generator if there is none yet."""
        if self.built:
            return
        check(data.num_classes > 0, f"{data.name} has values, not classes, as targets; use --model=Regressor")
        tasks = getattr(data, "tasks", None) or [range(data.num_classes)]
        self.task_classes = self.task_classes or [len(t) for t in tasks]
        self.in_channels = self.in_channels or data.channels
        self.image_size = self.image_size or data.image_size
        self.construct()

    def configure_model(self) -> None:
        if not self.built:
            self.fill(self.trainer.datamodule)  # type: ignore[attr-defined]

    @property
    def num_classes(self) -> int:
        """Classes of all tasks together."""
        return sum(self.task_classes or [])

    @property
    def sizes(self) -> dict[str, int]:
        """Numbers: of the generator's weights, generated for a task, and used by its network."""
        generator = sum(p.numel() for p in self.generator_parameters())
        return {"generator": generator, "generated": self.layout.numbers,
                "used": sum(shape.numel() for _, shape in self.layout.spans.values())}  # fmt: skip

    def generator_parameters(self) -> list[nn.Parameter]:
        """Weights of trunk and heads."""
        return [*self.trunk.parameters(), *self.heads.parameters()]

    def head_places(self) -> Tensor:
        """(k,) places, among the generated numbers, of the last layer of the network."""
        return self.layout.places(self._of_head)

    def generate(self, embeddings: Tensor) -> Tensor:
        """The numbers (k, n) of the networks that belong to task embeddings (k, d)."""
        with torch.autocast(embeddings.device.type, enabled=False):
            features = self._features(embeddings)
            return self.layout.flat({name: head(features) for name, head in self.heads.items()})

    def _features(self, embeddings: Tensor) -> Tensor:
        """What the trunk gives (k, C, h) for all chunks of the networks that belong to task embeddings (k, d)."""
        k, chunks = len(embeddings), self.chunk_embeddings
        pairs = [embeddings[:, None].expand(k, len(chunks), -1), chunks.expand(k, *chunks.shape)]
        return self.trunk(torch.cat(pairs, -1))

    def numbers_of(self, task: int) -> Tensor:
        """The numbers (n,) of one task's network: with a graph where gradients are wanted, else kept once made."""
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            return self.generate(self.embeddings[task : task + 1])[0]
        stamp = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in self.parameters()]
        if task in self._generated and self._generated[task][0] == stamp:
            self._generated.move_to_end(task)
            return self._generated[task][1]
        for other in [t for t, kept in self._generated.items() if kept[0] != stamp]:
            del self._generated[other]
        while self._generated and (len(self._generated) + 1) * self.layout.numbers > KEPT:
            self._generated.popitem(last=False)
        with torch.inference_mode(False), torch.no_grad():
            numbers = self.generate(self.embeddings[task : task + 1])[0]
        self._generated[task] = stamp, numbers
        return numbers

    def _run(self, x: Tensor, task: int, pooled: bool = False) -> Tensor:
        if self.statistics == "batch" and len(x) < 2:
            raise UserError("statistics=batch normalises an image by the others of its batch, and there is one alone; "
                            "give larger batches, or --model.statistics=stored")  # fmt: skip
        form = self._form[0]
        if form.training != self.training:
            form.train(self.training)
        state = {f"network.{name}": p for name, p in self.layout.parameters(self.numbers_of(task)).items()}
        for name, own in self._buffers_of:
            buffer = (self.running if own else self.constants).get_buffer(key_of(name))
            state[f"network.{name}"] = buffer[task] if own else buffer
        return functional_call(form, state, (x, pooled), strict=True)

    def task_outputs(self, x: Tensor, task: int) -> Tensor:
        """Logits (b, k) of the k classes of a task."""
        assert self.task_classes is not None
        return self._run(x, task)[:, : self.task_classes[task]]

    def forward(self, x: Tensor) -> Tensor:
        """Logits (b, c) of the classes of all tasks."""
        return torch.cat([self.task_outputs(x, task) for task in range(len(self.embeddings))], 1)

    def features(self, x: Tensor) -> Tensor:
        """The pooled penultimate features of the networks of all tasks, side by side."""
        return torch.cat([self._run(x, task, pooled=True) for task in range(len(self.embeddings))], 1)

    def loss(self, outputs: Tensor, y: Tensor, reduction: Reduction = "mean") -> Tensor:
        return F.cross_entropy(full(outputs), y, reduction=reduction)

    @torch.no_grad()
    def renew(self, task: int, generator: torch.Generator) -> None:
        """Give a task a new embedding; the generator of random numbers is one on a processor."""
        self.embeddings[task] = torch.randn(self.task_size, generator=generator).to(self.embeddings)

    @torch.no_grad()
    def reset_statistics(self, task: int) -> None:
        """Put the running statistics of a task back to those of a network that has seen nothing."""
        for name, buffer in self.running.named_buffers():
            buffer[task] = 1 if name.endswith("running_var") else 0

    @torch.no_grad()
    def settle_statistics(self, task: int, loader: Iterable[Any]) -> None:
        """Take the running statistics of a task anew, as the mean over batches; modules keep their flags.

        Those of the training lag behind: a step moves every weight of a generated network. Batches that are shorter
        than the first are left out, because each counts the same.
        """
        norms = [m for m in self._form[0].modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        before, mode = [m.momentum for m in norms], self.training
        self.reset_statistics(task)
        self.train()
        try:
            for norm in norms:
                norm.momentum = None  # each batch counts the same
            size = 0
            for x, _ in batches(loader, self.embeddings.device):
                if len(x) >= size:
                    self.task_outputs(x, task)
                    size = len(x)
        finally:
            for norm, momentum in zip(norms, before, strict=True):
                norm.momentum = momentum
            self.train(mode)

    def train(self, mode: bool = True) -> "HyperClassifier":
        self._generated.clear()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_generated": OrderedDict()}  # copies do not carry generated networks


class Form(nn.Module):
    """A network whose parameters come with every call."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, pooled: bool) -> Tensor:
        return self.network.features(x) if pooled else self.network(x)


def key_of(name: str) -> str:
    """A buffer's name without dots, which torch does not allow in the name of one."""
    return name.replace(".", "/")

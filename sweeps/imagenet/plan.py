"""What unlearning at the scale of ImageNet takes: measured in small, reckoned for the whole.

    python sweeps/imagenet/plan.py measure --images 50000 --folder /scratch/plan
    python sweeps/imagenet/plan.py reckon --gpu a100 --price 2

`measure` makes an ImageFolder of JPEGs, streams it from its files through `fit`, `unlearn` with SSD and `evaluate`, and
times how fast images are decoded and the model takes them. All verbs run for a third of the images too, so that memory
that grows with their number shows. `reckon` turns the rates into hours and money for
ImageNet-1K; what it assumes it prints.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vislearn.datamodules import ImageFolder

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
CLASSES, TEST_SHARE = 20, 0.1
PHOTO = (500, 375)  # pixels of a usual photo of ImageNet
ROWS, TRAIN, TEST, OF_CLASS, OUTPUTS = 1_281_167, 1_281_167, 50_000, 1_300, 1_000  # of ImageNet-1K
BYTES = 110_000  # of a usual file


class Streamed(ImageFolder):
    """An ImageFolder that is read from its files however small it is."""

    memory_limit = 0


# the data


def picture(number: int, size: tuple[int, int]) -> Any:
    """A picture with the smooth shapes and the noise of a photo, (w, h) pixels, the same for a number."""
    from PIL import Image

    draw = np.random.default_rng(number)
    shapes = Image.fromarray(draw.integers(0, 256, (14, 14, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    grain = draw.integers(-6, 7, (size[1], size[0], 1))
    return Image.fromarray(np.clip(np.asarray(shapes) + grain, 0, 255).astype(np.uint8))


def make(folder: Path, images: int, side: int = 224) -> None:
    """Write the images that are missing, in class folders of a training and a test split."""

    def write(number: int) -> None:
        split = "test" if number % round(1 / TEST_SHARE) == 0 else "train"
        path = folder / split / f"class{number // 10 % CLASSES:02d}" / f"{number:07d}.jpg"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(number, (side, side)).save(path.with_suffix(".part"), "JPEG", quality=90)
            os.replace(path.with_suffix(".part"), path)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(write, range(images)):
            pass


# what is measured


def decoding(folder: Path, rows: int, workers: tuple[int, ...]) -> dict[str, float]:
    """Images per second of the clock that come off the files, normalised, by number of workers; and of one core."""
    found = {}
    for count in workers:
        data = Streamed(root=folder, image_size=224, num_workers=count, val_fraction=0, batch_size=32)
        loader = data.loader(data.ids("train")[:rows], train=False)
        next(iter(loader))  # the file system's cache is warm in all of them
        start, busy = time.perf_counter(), time.process_time()
        seen = sum(len(y) for _, y in loader)
        found[f"{count} workers"] = seen / (time.perf_counter() - start)
        if not count:  # what other programs on the machine cannot spoil
            found["a core"] = seen / (time.process_time() - busy)
    return found


def photos(folder: Path, count: int = 60) -> float:
    """Photos of a usual size that one core decodes and resizes to 224 pixels, per second of its own."""
    from vislearn.sources import decode

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        picture(number, PHOTO).save(path, "JPEG", quality=90)
    start = time.process_time()
    for path in paths:
        decode(path, size=224)
    return count / (time.process_time() - start)


def model_speed(arch: str, batch: int = 32, steps: int = 4) -> dict[str, float]:
    """Images per second of one core that the model takes from memory: a training step, and a forward pass."""
    import torch

    torch.set_num_threads(1)

    from vislearn.learner import Classifier

    model = Classifier(arch, num_classes=CLASSES, in_channels=3, image_size=224)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    x, y = torch.randn(batch, 3, 224, 224), torch.arange(batch) % CLASSES

    def step() -> None:
        optimizer.zero_grad()
        model.loss(model(x), y).backward()
        optimizer.step()

    def forward() -> None:
        with torch.inference_mode():
            model.eval()(x)

    found = {}
    for name, action in (("train", step), ("forward", forward)):
        action()
        start = time.process_time()
        for _ in range(steps):
            action()
        found[name] = batch * steps / (time.process_time() - start)
    return found


def verb(folder: Path, *argv: str) -> dict[str, Any]:
    """Run a command; the seconds it takes, and the memory of its largest process in MB."""
    start = time.perf_counter()
    here = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen([sys.executable, "-m", "vislearn", *argv], cwd=folder, env=here,
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"vislearn {argv[0]} failed: {said}")
    return {"seconds": time.perf_counter() - start, "peak_mb": usage.ru_maxrss / 1024, "cpu_seconds":
            usage.ru_utime + usage.ru_stime}  # fmt: skip


def chain(folder: Path, images: int, arch: str, workers: int) -> dict[str, Any]:
    """fit (ten steps), SSD's pass, and an audit of both models from their files, over a folder of so many images."""
    root, store = folder / f"images{images}", folder / f"store{images}"
    make(root, images)
    recipe = [
        "--data=plan.Streamed", f"--data.root={root}", "--data.image_size=224", f"--data.num_workers={workers}",
        "--data.batch_size=32", "--data.forget=ClassForget", "--data.forget.classes=[3]", f"--model.arch={arch}",
        "--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.limit_train_batches=10",
    ]  # fmt: skip
    whole = [word for word in recipe if "forget" not in word]
    found = {"fit": verb(folder, "fit", *whole, f"--store={store}")}
    # by row number: with a thousand classes the importances of every class are not kept in the order by class either
    found["unlearn"] = verb(folder, "unlearn", *recipe, "--method=SSD", "--method.order=id", "--method.batch_size=32",
                            f"--store={store}")  # fmt: skip
    files = sorted(store.glob("*/model.safetensors"), key=lambda path: (path.parent / "report.json").exists())
    found["evaluate"] = verb(folder, "evaluate", *[w for w in recipe if "trainer" not in w], f"--original={files[0]}",
                             f"--unlearned={files[1]}", f"--store={store}")  # fmt: skip
    return {"images": images, **found}


def measure(folder: Path, images: int, arch: str, workers: int, json_file: Path) -> None:
    """Measure everything and keep it, each piece as soon as it is there."""
    folder = folder.resolve()
    found: dict[str, Any] = {"arch": arch, "workers": workers, "cores": os.cpu_count()}

    def keep(name: str, value: Any) -> None:
        found[name] = value
        json_file.write_text(json.dumps(found, indent=1))
        print(name, json.dumps(value))

    make(folder / f"images{images}", images)
    size = [p.stat().st_size for p in (folder / f"images{images}").rglob("*.jpg")]
    keep("file_bytes", sum(size) / len(size))
    rows = min(640, int(images * (1 - TEST_SHARE)))
    keep("decoding", decoding(folder / f"images{images}", rows, (0, 1, 2)))
    keep("photos_per_core", photos(folder / "photos"))
    keep("model", model_speed(arch))
    keep("chains", [chain(folder, n, arch, workers) for n in (images // 3, images)])


# what is reckoned


class Gpu(NamedTuple):
    """Images per second of one GPU, mixed precision, 224 pixels: (training step, forward pass) by network."""

    rates: dict[str, tuple[float, float]]
    scaling: float  # of eight GPUs over one, divided by eight
    source: str


TIMM = "timm's results/benchmark-{train,infer}-amp-nhwc-pt112-cu113-rtx3090.csv"
GPUS = {
    "rtx3090": Gpu({"resnet50": (1218, 3676), "vit_base_patch16_224": (393, 1133)}, 0.84,
                   f"{TIMM}; the scaling is that of A100s"),
    "a100": Gpu({"resnet50": (2470, 7455), "vit_base_patch16_224": (797, 2298)}, 0.84,
                "NVIDIA DeepLearningExamples, ResNet50 v1.5 for PyTorch: 2,470 images/s on one A100, 16,621 on eight; "
                "ASSUMED: the forward pass and the ViT are faster than on an RTX 3090 by the same factor"),
}  # fmt: skip


class Work(NamedTuple):
    """One job: images that take a training step and images that take a forward pass."""

    name: str
    trained: float
    forward: float = 0.0
    slower: float = 1.0  # a step against one of plain training


def works(epochs: int) -> Iterator[Work]:
    rest = TRAIN - OF_CLASS
    yield Work("audit one model (train and test rows)", 0, TRAIN + TEST)
    yield Work(f"retrain once ({epochs} epochs)", epochs * rest)
    yield Work("FineTune, 10 epochs", 10 * rest)
    yield Work("NegGradPlus, 5 epochs", 5 * 2 * rest)
    yield Work("SCRUB, 3 epochs", 3 * rest + 2 * OF_CLASS, 3 * rest + 2 * OF_CLASS)
    yield Work("SalUn, 10 epochs", 10 * TRAIN + OF_CLASS)
    yield Work("SSD, first request on an original", TRAIN + OF_CLASS, slower=2.0)
    yield Work("SSD, a further class", OF_CLASS, slower=2.0)


def reckon(args: argparse.Namespace) -> None:
    """Print hours and money, and everything they stand on."""
    found = json.loads(args.json.read_text())
    gpu = GPUS[args.gpu]
    cores = args.cores_per_gpu * args.gpus
    decoded = found["photos_per_core"] * cores * args.core_speed
    print(f"{args.gpus} x {args.gpu}, {gpu.source}")
    print(f"ASSUMED: {args.cores_per_gpu} cores per GPU, each {args.core_speed:g} times as fast as those measured; "
          f"{args.price:g} $ per GPU and hour; an importance takes twice a training step (float32)")  # fmt: skip
    print(f"measured: {found['photos_per_core']:.0f} photos of {PHOTO[0]}x{PHOTO[1]} per core and second, so "
          f"{decoded:,.0f} on {cores} cores\n")  # fmt: skip
    for arch, (train, forward) in gpu.rates.items():
        print(f"| {arch} | minutes | $ | bound by |\n|---|---|---|---|")
        for work in works(args.epochs):
            pieces = [(work.trained, train / work.slower), (work.forward, forward)]
            on_gpu = sum(n / (rate * args.gpus * gpu.scaling) for n, rate in pieces)
            # a teacher sees the images that the step has decoded
            reading = max(work.trained, work.forward) / decoded
            seconds = max(on_gpu, reading)
            bound = "decoding" if reading > on_gpu else "GPUs"
            print(f"| {work.name} | {seconds / 60:,.1f} | {seconds / 3600 * args.gpus * args.price:,.2f} | {bound} |")
        print()
    outputs = (TRAIN + TEST) * OUTPUTS * 4 / 1e9
    print(f"outputs that are stored with every model: {outputs:.1f} GB; an audit holds those of the original, the "
          "unlearned and every retrained model at once")  # fmt: skip
    for chain in found["chains"]:
        peaks = ", ".join(f"{name} {chain[name]['peak_mb']:,.0f}" for name in ("fit", "unlearn", "evaluate"))
        print(f"measured: largest process at {chain['images']:,} images, in MB: {peaks}")
    print(f"files to be read once for the fingerprint of the data: {ROWS * BYTES / 1e9:.0f} GB")
    fed = gpu.rates["resnet50"][0] * gpu.scaling / (found["photos_per_core"] * args.core_speed)
    print(f"cores that keep one GPU busy that trains a ResNet-50: {fed:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    first = verbs.add_parser("measure")
    first.add_argument("--images", type=int, default=50_000, help="JPEGs of 224 pixels, a tenth of them for testing")
    first.add_argument("--folder", type=Path, default=Path("plan"), help="where images and models go")
    first.add_argument("--arch", default="mobilenetv3_small_050", help="any name that timm knows")
    first.add_argument("--workers", type=int, default=2)
    first.add_argument("--json", type=Path, default=RESULTS)
    second = verbs.add_parser("reckon")
    second.add_argument("--gpu", choices=sorted(GPUS), default="a100")
    second.add_argument("--gpus", type=int, default=8)
    second.add_argument("--price", type=float, default=2.0, help="dollars per GPU and hour")
    second.add_argument("--cores-per-gpu", type=int, default=16)
    second.add_argument("--core-speed", type=float, default=1.0, help="against the cores that were measured")
    second.add_argument("--epochs", type=int, default=90, help="of retraining")
    second.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.verb == "measure":
        measure(args.folder, args.images, args.arch, args.workers, args.json)
    else:
        reckon(args)


if __name__ == "__main__":
    main()

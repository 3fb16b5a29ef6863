"""Somebody else's weights into a learner of ours, without running code of theirs."""

import argparse
import itertools
import pathlib
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn, get_args

import numpy as np
import torch
from torch import Tensor

from .errors import UserError
from .learner import Learner
from .networks import NORMED, OWN, Norm, build

Weights = dict[str, Tensor]

# what trainers, compilers and wrappers put in front of a parameter's name
WRAPPED = re.compile(r"^(module|model|net|network|backbone|_orig_mod|_module)\.")
# where a checkpoint keeps the weights beside the state of the optimiser and the like
CONTAINERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights", "module")
# other repositories' names for parts of the same networks
RENAMED = ((re.compile(r"^(fc|linear|classifier)\."), "head."), (re.compile(r"\.shortcut\."), ".downsample."))


def load_weights(path: Path, learner: Learner) -> None:
    """Put the weights of a file into a learner; all of them, or none and an error.

    Reads `.safetensors`, Lightning's `.ckpt`, and what `torch.save` wrote: a state dict, or a dict that holds one.
    Names are compared without the prefixes that wrappers add, and the head may be called fc, linear or classifier.

    Args:
        path: the file.
        learner: a learner of the same architecture; keeps its precision, device and memory order.

    Raises:
        UserError: for a missing or damaged file, a pickle that asks for code, another architecture or size of head.
    """
    path = Path(path)
    content = read(path)
    if next(learner.parameters(), None) is None:
        raise UserError(f"the learner has no network yet to load {path} into; give --model.num_classes")
    found = state_dict(content, path)
    target = learner.state_dict()
    weights = match(found, target)
    wrong = [k for k in target if k in weights and weights[k].shape != target[k].shape]
    # counts the batches that batch norm has seen; old files lack it, and only momentum=None reads it
    missing = [k for k in target if k not in weights and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in weights if k not in target and not k.endswith("num_batches_tracked")]
    if wrong or missing or unexpected:
        refuse(path, advice(content, found, learner, wrong), weights, learner, wrong, missing, unexpected)
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{path} holds values that are not finite ({name}): a training that diverged, or a damaged "
                            "file; take another checkpoint")  # fmt: skip
    learner.load_state_dict({k: weights.get(k, value) for k, value in target.items()})


def read(path: Path) -> Any:
    """The content of a checkpoint file: tensors and plain data, whatever the file asks for."""
    if not path.is_file():
        kind = "is a folder, not a checkpoint file" if path.is_dir() else "does not exist"
        raise UserError(
            f"{path} {kind}; give a .safetensors, .ckpt, .pt or .pth file, or the key of an artifact "
            "(`vislearn store ls`)"
        )
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path} is damaged, or no safetensors file ({brief(error)}); copy or download it again"
            ) from error
    try:
        with torch.serialization.safe_globals(harmless()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\w[\w.]*\w)", str(error))
        if asked:
            raise UserError(
                f"{path} would run code when loaded (it asks for {asked[1]}), and was not loaded; where you trust its "
                "origin, save the bare weights: torch.save(model.state_dict(), ...)"
            ) from error
        raise UserError(
            f"{path} is no checkpoint, or a pickle that cannot be read without running code, and was not loaded; save "
            "bare weights: torch.save(model.state_dict(), ...)"
        ) from error
    except Exception as error:  # a broken pickle or archive fails in any place and with any error
        if "TorchScript" in str(error):
            raise UserError(
                f"{path} is a TorchScript program, and was not loaded; save its bare weights: "
                "torch.save(torch.jit.load(...).state_dict(), ...)"
            ) from error
        raise UserError(f"{path} is damaged, or no checkpoint ({brief(error)}); copy or download it again") from error


def brief(error: Exception) -> str:
    """The first sentence of an error on one line."""
    return " ".join(str(error).split()).split(". ")[0][:150] or type(error).__name__


def harmless() -> list[Any]:
    """Types that only hold data, and that checkpoints often carry beside the weights: options, paths, numpy's."""
    multiarray = np._core.multiarray  # type: ignore[attr-defined]
    dtypes = [type(np.dtype(t)) for t in (np.float64, np.float32, np.float16, np.int64, np.int32, np.uint8, np.bool_)]
    return [
        argparse.Namespace, pathlib.PosixPath, np.ndarray, np.dtype, *dtypes,
        multiarray.scalar, multiarray._reconstruct,
        (multiarray.scalar, "numpy.core.multiarray.scalar"),  # the names before numpy 2
        (multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
    ]  # fmt: skip


def state_dict(content: Any, path: Path) -> Weights:
    """The weights in the content of a checkpoint: the mapping itself, or one inside under a usual name."""
    if isinstance(content, Mapping):
        for name in CONTAINERS:
            if isinstance(content.get(name), Mapping):
                return state_dict(content[name], path)
        tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
        if tensors:
            return tensors
        holds = f"a dict with {', '.join(map(str, list(content)[:5])) or 'nothing'}"
    else:
        holds = f"a {type(content).__name__}"
    raise UserError(
        f"no weights in {path}: it holds {holds}; save them with torch.save(model.state_dict(), ...), or under the "
        "name state_dict"
    )


def variants(weights: Weights, target: Iterable[str]) -> Iterable[Weights]:
    """The weights under every way of naming them that might be meant: wrappers taken off, the learner's own put on."""
    for rename, depth, prefix in itertools.product((False, True), range(4), sorted(prefixes(target))):
        out = {}
        for name, tensor in weights.items():
            for _ in range(depth):
                name = WRAPPED.sub("", name)
            for pattern, ours in RENAMED if rename else ():
                name = pattern.sub(ours, name)
            out[prefix + name] = tensor
        if len(out) == len(weights):  # otherwise two names have become one
            yield out


def prefixes(names: Iterable[str]) -> set[str]:
    """What all names begin with, up to any dot: network.body.x and network.body.y give network. and network.body."""
    out, prefix = {""}, ""
    for level in zip(*(n.split(".")[:-1] for n in names), strict=False):
        if len(set(level)) > 1:
            break
        prefix += f"{level[0]}."
        out.add(prefix)
    return out


def match(weights: Weights, target: Mapping[str, Tensor]) -> Weights:
    """The weights under the names by which most of them are found in the target, in equal shape if that differs."""

    def score(named: Weights) -> tuple[int, int]:
        both = named.keys() & target.keys()
        return len(both), sum(named[k].shape == target[k].shape for k in both)

    return max(variants(weights, target), key=score)


def refuse(
    path: Path,
    hint: str,
    weights: Weights,
    learner: Learner,
    wrong: list[str],
    missing: list[str],
    unexpected: list[str],
) -> NoReturn:
    """Say how the weights, already under the learner's names, and the learner differ, and what would fit."""
    target = learner.state_dict()
    if wrong and not missing and not unexpected and set(wrong) <= head_names(learner):
        theirs, ours = weights[wrong[0]].shape[0], target[wrong[0]].shape[0]
        unit = "classes" if learner.is_classifier else "outputs"
        raise UserError(
            f"{path}: the checkpoint has {theirs} {unit}, the model {ours}; give --model.num_{unit}={theirs} and data "
            "to match, or another checkpoint"
        )
    faults = []
    if missing:
        faults.append(f"{len(missing)} missing keys ({some(missing)})")
    if unexpected:
        faults.append(f"{len(unexpected)} unexpected keys ({some(unexpected)})")
    if wrong:
        first = [f"{k} {tuple(weights[k].shape)} instead of {tuple(target[k].shape)}" for k in wrong]
        faults.append(f"{len(wrong)} tensors of another shape ({some(first, 2)})")
    arch = getattr(learner, "arch", type(learner).__name__)
    raise UserError(f"{path} does not fit {arch}; {hint}; there are {', '.join(faults)}")


def some(names: list[str], count: int = 5) -> str:
    """The first few, and dots for the rest."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def head_names(learner: Learner) -> set[str]:
    """Names of the parameters of the last layer."""
    head = getattr(learner, "head", None)
    ids = {id(p) for p in head.parameters()} if isinstance(head, torch.nn.Module) else set()
    return {name for name, p in learner.named_parameters() if id(p) in ids}


def advice(content: Any, weights: Weights, learner: Learner, wrong: list[str]) -> str:
    """Which --model settings would take these weights, as far as can be told."""
    fitting = settings_that_fit(weights, getattr(learner, "image_size", None) or 32)
    differ = {k: v for k, v in fitting.items() if getattr(learner, k, None) != v}
    if differ:
        names = {"outputs": f"num_{'classes' if learner.is_classifier else 'outputs'}"}
        return "it fits " + " ".join(f"--model.{names.get(k, k)}={v}" for k, v in differ.items())
    said = named_architecture(content)
    if said and said != getattr(learner, "arch", None):
        return f"the file names its network '{said}': try --model.arch={said}"
    if any(k.endswith("pos_embed") for k in wrong):
        return "position codes of another length come from another image size: see --model.image_size"
    return f"no network of vislearn ({', '.join(OWN)}) fits it; give the timm name by --model.arch"


def named_architecture(content: Any) -> str | None:
    """The name that the file itself gives its network, among its options or beside the weights."""
    if isinstance(content, Mapping):
        for options in (content.get("hyper_parameters"), content.get("args"), content):
            options = vars(options) if isinstance(options, argparse.Namespace) else options
            for key in ("arch", "model_name", "architecture"):
                if isinstance(options, Mapping) and isinstance(options.get(key), str):
                    return options[key]
    return None


def settings_that_fit(weights: Weights, image_size: int) -> dict[str, Any]:
    """The settings of a network of ours that has just these names and shapes; empty when there is none.

    Args:
        weights: the weights.
        image_size: what the learner takes; another one is named only where these weights need it.
    """
    for arch in OWN:
        # the transformer's patches depend on the image size; the perceptron sees pixels times channels as one number
        patches = (8, 32) if image_size < 16 else (32, 8)  # of the two sizes of patches, that of these images first
        sizes = {"mlp": (1,), "vit_tiny_cifar": patches, "vit_digits": patches}.get(arch, (image_size,))
        for i, size in enumerate(sizes):
            for norm in get_args(Norm) if arch in NORMED else ("batch",):
                found = fit(weights, arch, norm, size)
                if found:
                    return {"arch": arch, "norm": norm} | ({"image_size": size} if i else {}) | found
    return {}


def fit(weights: Weights, arch: str, norm: Norm, size: int) -> dict[str, int]:
    """The number of outputs and channels with which a network of ours has these weights; empty when it has others."""

    def template(outputs: int, channels: int) -> dict[str, Tensor]:
        with torch.device("meta"):  # shapes alone: no memory, and no random numbers are drawn
            return build(arch, outputs, channels, size, norm).state_dict()

    try:
        target = template(1, 1)
    except UserError:  # not for images of this size
        return {}
    named = match(weights, target)
    if shapes(named).keys() != shapes(target).keys():
        return {}
    last = [name for name in target if name.startswith("head.") and name.endswith("weight")][-1]
    first, head = named[next(iter(target))], named[last]
    if first.ndim < 2 or head.ndim != 2:
        return {}
    if shapes(named) != shapes(template(head.shape[0], first.shape[1])):
        return {}
    return {"outputs": head.shape[0]} | ({} if arch == "mlp" else {"in_channels": first.shape[1]})


def shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shape by name, without the counters of batch norm."""
    return {k: tuple(v.shape) for k, v in weights.items() if not k.endswith("num_batches_tracked")}

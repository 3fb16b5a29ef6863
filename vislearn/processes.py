"""The processes of one run on several devices: what they say to each other.

Every process runs the same command on the same rows, and the first one alone prints and writes. With a single process
every function here gives back what it was given.
"""

import time
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, distributed, nn

T = TypeVar("T")
GRACE = 1.0  # seconds in which the first process may say what went wrong in all of them

_silent = False  # another process has said why this one fails


def connected() -> bool:
    """Whether this is one of several processes that can talk to each other."""
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """Number of this process; 0 is the first."""
    return distributed.get_rank() if connected() else 0


def world() -> int:
    """Number of processes."""
    return distributed.get_world_size() if connected() else 1


def first_process() -> bool:
    """Whether this is the only process, or the first of several, by what its surroundings say of it.

    For what only concerns the terminal: a task of a cluster may have a number and be alone. A trainer knows better.
    """
    return getattr(rank_zero_only, "rank", 0) == 0


def of_first(value: T) -> T:
    """What the first process has here; anything that can be pickled."""
    if not connected():
        return value
    box: list[Any] = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def total(value: Tensor) -> Tensor:
    """The sum over the processes; not differentiable."""
    if not connected():
        return value
    value = value.detach().clone()
    distributed.all_reduce(value)
    return value


@torch.no_grad()
def as_in_first(tensors: Iterable[Tensor]) -> None:
    """Give tensors the values that they have in the first process; one message for all of a kind."""
    if not connected():
        return
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.dtype, []).append(tensor)
    for same in kinds.values():
        flat = torch.cat([t.flatten() for t in same])
        distributed.broadcast(flat, src=0)
        for t, part in zip(same, flat.split([t.numel() for t in same]), strict=True):
            t.copy_(part.view_as(t))


def same_model(model: nn.Module) -> None:
    """Give a model the parameters and buffers that it has in the first process."""
    for tensor in (*model.parameters(), *model.buffers()):  # one after the other: a large model is not copied whole
        as_in_first([tensor.data])


def gathered(part: Tensor, rows: int, device: torch.device) -> Tensor:
    """Rows that are divided between the processes, in the order of the processes: all of them in the first.

    Args:
        part: those of this process, (b, ...); every process may also have all of them.
        rows: how many there are in all.
        device: where the processes exchange tensors.

    Returns:
        (rows, ...) on the CPU in the first process; in the others their own part.
    """
    if not connected() or len(part) == rows:
        return part
    sizes: list[int] = [0] * world()
    distributed.all_gather_object(sizes, len(part))
    if rank():
        distributed.send(part.to(device).contiguous(), dst=0)
        return part
    parts = [part.cpu()]
    for other in range(1, world()):
        received = torch.empty(sizes[other], *part.shape[1:], dtype=part.dtype, device=device)
        distributed.recv(received, src=other)
        parts.append(received.cpu())
    return torch.cat(parts)


def fail() -> None:
    """Say that this process fails. One process is to say why: the first to call this, and `silent` is for the others.

    What fails in one process fails in those that wait for it too, and mostly it fails in all of them at once. The first
    process goes first, so that one message comes from where the user looks.
    """
    global _silent
    if not connected():
        return
    if rank():
        time.sleep(GRACE)
    store, key = distributed.distributed_c10d._get_default_store(), "vislearn/failed"
    try:
        _silent = store.add(key, 1) > 1
    except RuntimeError:  # the first process keeps the count, and is gone
        _silent = True
    if not rank():  # it keeps the count until all that fail have looked at it
        deadline = time.monotonic() + 3 * GRACE
        while store.add(key, 0) < world() and time.monotonic() < deadline:
            time.sleep(GRACE / 10)
        distributed.destroy_process_group()  # so that those that wait for this one do not wait for ever


def silent() -> bool:
    """Whether another process has said why this one fails."""
    return _silent

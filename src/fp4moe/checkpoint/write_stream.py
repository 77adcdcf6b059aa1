"""The tensors of a quantised checkpoint, in the order of a plan, worked out by several threads.

Not handled here: what is in which file (write_plan.py), the files themselves
(safetensors_writer.py).
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from tqdm import tqdm

from ..borrowed import Borrowed
from ..errors import CheckpointError, must
from ..formats import FORMATS
from .files import CheckpointFiles
from .float_experts import Bias
from .header import name_keys
from .modelopt_writer import written, written_scale
from .write_plan import Shard, Step, read_bytes

__all__ = ["shard_tensors", "worker_threads"]

# Steps that may be under way; an expert's is some 20 MB.
AHEAD = 16
# Bytes read, and the keys and tensors to come.
Begun = tuple[int, Future[list[tuple[str, torch.Tensor]]]]


_thread_count = Borrowed(torch.get_num_threads, torch.set_num_threads)


@contextlib.contextmanager
def worker_threads() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch uses, each working alone: they do not wait for one another."""
    with _thread_count.borrow() as threads:
        try:
            alone = functools.partial(torch.set_num_threads, 1)
            with ThreadPoolExecutor(threads, initializer=alone) as workers:
                yield workers
        finally:
            # A thread has a number of its own, too, which it took from the process at its start.
            torch.set_num_threads(threads)


def shard_tensors(
    files: CheckpointFiles,
    shard: Shard,
    scales: Mapping[str, float],
    how: tuple[str, str],
    workers: ThreadPoolExecutor,
    bar: tqdm,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the keys and tensors of one file to be written; the bar counts bytes read.

    how: the format of the experts, and the method.

    Raises:
        CheckpointError: weights of experts hold inf or NaN.
    """
    mapped = None
    begun: deque[Begun] = deque()
    for step in shard.steps:
        # Pages of a mapped file count as memory of this process until the mapping goes.
        source = files.shard_of(_first_source(step))
        if source != mapped:
            files.close()
            mapped = source
        weights = _map(files, step)
        work = workers.submit(_quantize, step, weights, scales, how)
        begun.append((read_bytes(step, files.shapes), work))
        if len(begun) > AHEAD:
            yield from _oldest(begun, bar)
    while begun:
        yield from _oldest(begun, bar)


def _first_source(step: Step) -> str:
    if isinstance(step, str):
        return step
    return (step if isinstance(step, Bias) else step[0]).source


def _oldest(begun: deque[Begun], bar: tqdm) -> list[tuple[str, torch.Tensor]]:
    size, work = begun.popleft()
    tensors = work.result()
    bar.update(size)
    return tensors


def _map(files: CheckpointFiles, step: Step) -> list[torch.Tensor]:
    """The source's tensors of one step, mapped and not yet read."""
    if isinstance(step, str):
        return [files.tensor(step)]
    if isinstance(step, Bias):
        return [files.tensor(step.source)[step.place]]
    weights = [files.tensor(part.source)[part.place] for part in step]
    return [w.T if part.transposed else w for part, w in zip(step, weights, strict=True)]


def _quantize(
    step: Step, weights: Sequence[torch.Tensor], scales: Mapping[str, float], how: tuple[str, str]
) -> list[tuple[str, torch.Tensor]]:
    """What one step writes; the parts of experts are quantised."""
    if isinstance(step, str):
        return [(step, weights[0])]
    if isinstance(step, Bias):
        return [(step.name, weights[0].contiguous())]
    ends = torch.stack([torch.stack(torch.aminmax(weight)).float() for weight in weights])
    if not bool(torch.isfinite(ends).all()):
        must(
            f"quantize_checkpoint: {name_keys({part.source for part in step})}",
            "be finite",
            f"values from {float(ends.min())} to {float(ends.max())} in expert {step[0].expert}",
            "Download it again, or leave the layer out with layers=.",
            error=CheckpointError,
        )
    form, method = how
    shared_scale = FORMATS[form].shared_scale(ends)
    tensors = []
    for part, weight in zip(step, weights, strict=True):
        tensors += written(part.name, FORMATS[form].quantize(weight, shared_scale, method), form)
        if scales:
            tensors.append(written_scale(part.name, scales[part.name], form))
    return tensors

"""Float Hugging Face checkpoint to ModelOpt's layout in a format: file by file, resumable.

Not handled here: names (modelopt_writer.py), plans (write_plan.py), tensors (write_stream.py),
unfinished runs (partial_run.py). Experts are quantised, and Linears that are asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from ..errors import CheckpointError, check_choice, must, refuse
from ..formats import DEFAULT_FORMAT, FORMATS
from ..progress import progress_bar
from ..version import __version__
from .files import INDEX, PICKLES, CheckpointFiles
from .float_experts import Experts, Storages, find_float_experts
from .float_linears import find_linears
from .modelopt import MODELOPT_NAMES
from .modelopt_writer import exclude_modules, quantization_configs
from .mtp import decoder_layers
from .partial_run import (
    JOURNAL,
    LOCK,
    check_space,
    check_target,
    close_partial,
    fingerprint,
    locked,
    open_partial,
    was_closed,
)
from .safetensors_writer import copy_file, write_file, write_shard
from .write_plan import Calibration, Shard, input_scales, plan_shards, quantized_bytes
from .write_stream import shard_tensors, worker_threads

__all__ = ["FOR_OTHERS", "WriteReport", "write_checkpoint"]

logger = logging.getLogger("fp4moe")
CALLER = "quantize_checkpoint"
# Weights in other files, and code, which is never executed and so never handed on.
NOT_COPIED = (".py", ".safetensors", ".index.json", ".gguf", ".h5", ".msgpack", *PICKLES)
FOR_OTHERS = "for other programs: fp4moe.from_pretrained refuses these experts"
WRITTEN = ("config.json", "hf_quant_config.json", INDEX, JOURNAL, LOCK)


@dataclasses.dataclass(frozen=True)
class WriteReport:
    """What `quantize_checkpoint` did.

    Attributes:
        directory: the finished checkpoint.
        layers: names of the quantised experts modules.
        source_bytes, written_bytes: of tensors read, of weight files written.
        quantized_share: part of the source's tensor bytes that is now quantised, 0 to 1.
        resumed: weight files that an earlier run had finished.
        not_copied: files and directories of the source that have no copy.
        left_as_they_are: experts modules of multi-token prediction, copied as they are.
        not_run_here: why fp4moe itself cannot run the experts yet, so that from_pretrained refuses
            the files; programs that read ModelOpt's layout may.
        format: what the experts are now.
        linears: names of the dense Linears that are quantised, too.
    """

    directory: str
    layers: tuple[str, ...]
    source_bytes: int
    written_bytes: int
    quantized_share: float
    resumed: int
    not_copied: tuple[str, ...]
    left_as_they_are: tuple[str, ...] = ()
    not_run_here: tuple[str, ...] = ()
    format: str = DEFAULT_FORMAT
    linears: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = (
            f"{self.directory}: {len(self.layers)} experts layers"
            f"{f' and {len(self.linears)} Linears' if self.linears else ''}, "
            f"{self.quantized_share:.1%} of "
            f"the bytes, are {self.format.upper()}; {self.source_bytes / 1e9:.3g} GB became "
            f"{self.written_bytes / 1e9:.3g} GB"
        )
        if self.not_run_here:
            text += f"\n{FOR_OTHERS}: {'; '.join(self.not_run_here)}"
        if self.left_as_they_are:
            text += "\nleft as they are (multi-token prediction): "
            text += ", ".join(self.left_as_they_are)
        left = ", ".join(self.not_copied)
        return f"{text}\nnot copied (code, other weights, directories): {left}" if left else text


def write_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    format: str,
    method: str,
    layers: str | Sequence[str] | None,
    calibration: Calibration | None,
    max_shard_bytes: float,
    progress: bool,
    linears: str | Sequence[str],
    asked: Callable[[CheckpointFiles], tuple[list[str], Storages]],
) -> WriteReport:
    """Do what `fp4moe.quantize_checkpoint` says.

    Args:
        asked: why from_pretrained will refuse the experts, and how the model stacks them, see
            `find_float_experts`; asked before hours are spent on them.
        src, dst, format, method, layers, calibration, max_shard_bytes, progress, linears: as there.
    """
    patterns = _check_arguments(format, method, layers, calibration, max_shard_bytes)
    target = _target(dst)
    with CheckpointFiles.open(src, caller="quantize_checkpoint") as files:
        if files.quantization is not None:
            must(
                "quantize_checkpoint: src",
                "be a float checkpoint",
                f"quantization {str(files.quantization)[:100]}",
                "Pass the original.",
                error=CheckpointError,
            )
        not_run_here, storages = asked(files)
        found, left = find_float_experts(
            files.shapes, patterns, decoder_layers(files.config), storages, format
        )
        scales = input_scales(found, calibration, format)
        dense = find_linears(files.shapes, found, linears, format)
        if dense and calibration is not None:
            refuse(
                CALLER,
                "experts with activation ranges cannot be written beside quantised Linears",
                "those of Linears are not calibrated, and one configuration describes both",
                "Leave calibration or linears out.",
            )
        shards = plan_shards(files, [*found, *dense], scales, int(max_shard_bytes), format)
        names = set(os.listdir(files.directory))
        copied = sorted(name for name in names if _is_copied(files.directory, name))
        arguments: dict[str, Any] = {
            "format": format,
            "method": method,
            "layers": patterns,
            "linears": [part.name for layer in dense for parts in layer.first for part in parts],
            "calibration": hashlib.sha256(json.dumps(scales).encode()).hexdigest(),
            "max_shard_bytes": int(max_shard_bytes),
            "source": fingerprint(files, copied),
            "version": __version__,
        }
        known = calibration is not None
        small = _configuration(files, [*found, *dense], shards, format, calibrated=known)
        try:
            with locked(target + ".partial", target):
                finished = _write(files, target, arguments, shards, copied, small, scales, progress)
        except OSError as error:
            size = sum(shard.layout.size for shard in shards)
            refuse(
                "quantize_checkpoint",
                f"the {size} bytes of weights cannot be written to dst",
                str(error),
                "Mend that and call it again with the same arguments: it goes on.",
                error=CheckpointError,
                cause=error,
            )
        read = sum(shard.source_bytes for shard in shards)
        report = WriteReport(
            os.fspath(dst),
            tuple(layer.module for layer in found),
            read,
            sum(shard.layout.size for shard in shards),
            quantized_bytes(shards, files.shapes) / read,
            finished,
            tuple(sorted(names - {*copied, *files.shards, *WRITTEN})),
            tuple(left),
            tuple(not_run_here),
            format,
            tuple(arguments["linears"]),
        )
    if progress:
        tqdm.write(str(report))
    return report


def _check_arguments(
    format: str,
    method: str,
    layers: str | Sequence[str] | None,
    calibration: Calibration | None,
    max_shard_bytes: float,
) -> list[str] | None:
    """Check what needs no files; returns the patterns."""
    check_choice("format", format, FORMATS, caller=CALLER)
    FORMATS[format].check_method(method, caller=CALLER)
    if calibration is not None and "input_scale" not in MODELOPT_NAMES[format]:
        refuse(
            CALLER,
            f"activation ranges cannot be written for format {format}",
            "its activations are rounded with scales found while running",
            "Leave calibration out, or choose nvfp4 or fp8.",
        )
    if not 1 <= max_shard_bytes < math.inf:
        must(
            "quantize_checkpoint: max_shard_bytes",
            "be 1 or more",
            max_shard_bytes,
            "Pass bytes, such as 5e9.",
        )
    if layers is None:
        return None
    patterns = [layers] if isinstance(layers, str) else list(layers)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            must(
                "quantize_checkpoint: layers",
                "be regular expressions",
                f"{pattern!r}: {error}",
                "Escape what it means literally.",
                cause=error,
            )
    return patterns


def _target(dst: str | os.PathLike[str]) -> str:
    """The absolute path of the new directory, if that is possible there."""
    path = os.fspath(dst)
    try:
        possible = bool(path) and b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        possible = False
    if not possible:
        must(
            "quantize_checkpoint: dst",
            "be a path",
            repr(path),
            "Choose a name.",
            error=CheckpointError,
        )
    target = os.path.abspath(path)
    check_target(target)
    return target


def _is_copied(directory: str, name: str) -> bool:
    plain = not name.startswith(".") and not name.lower().endswith(NOT_COPIED)
    return plain and name not in WRITTEN and os.path.isfile(os.path.join(directory, name))


def _configuration(
    files: CheckpointFiles,
    found: list[Experts],
    shards: list[Shard],
    form: str,
    *,
    calibrated: bool,
) -> dict[str, Any]:
    """File name -> content of the JSON files, config.json last."""
    excluded = exclude_modules(files.shapes, found, decoder_layers(files.config))
    legacy, current = quantization_configs(excluded, calibrated, form)
    contents: dict[str, Any] = {"hf_quant_config.json": legacy}
    if len(shards) > 1:
        weight_map = {key: shard.layout.name for shard in shards for key in shard.layout.places}
        size = sum(shard.layout.size - len(shard.layout.header) for shard in shards)
        contents[INDEX] = {
            "metadata": {"total_size": size},
            "weight_map": dict(sorted(weight_map.items())),
        }
    return contents | {"config.json": files.config | {"quantization_config": current}}


def _write(
    files: CheckpointFiles,
    target: str,
    arguments: dict[str, Any],
    shards: list[Shard],
    copied: list[str],
    small: dict[str, Any],
    scales: Mapping[str, float],
    progress: bool,
) -> int:
    """Write all files that are not there yet; returns how many weight files were."""
    if was_closed(target, arguments):
        return len(shards)
    partial = target + ".partial"
    open_partial(partial, arguments, {*(s.layout.name for s in shards), *copied, *small})
    left = [shard for shard in shards if not shard.layout.is_finished(partial)]
    needed = sum(shard.layout.size for shard in left)
    check_space(partial, needed + sum(os.path.getsize(files.path(name)) for name in copied))
    total = sum(shard.source_bytes for shard in shards)
    bar = progress_bar(
        show=progress,
        total=total,
        initial=total - sum(shard.source_bytes for shard in left),
        desc="quantising experts",
        unit="B",
        unit_scale=True,
    )
    with bar, worker_threads() as workers:
        for shard in left:
            how = arguments["format"], arguments["method"]
            tensors = shard_tensors(files, shard, scales, how, workers, bar)
            write_shard(partial, shard.layout, tensors)
    for name in copied:
        copy_file(files.path(name), os.path.join(partial, name))
    for name, content in small.items():
        write_file(os.path.join(partial, name), json.dumps(content, indent=2).encode())
    close_partial(partial, target)
    return len(shards) - len(left)

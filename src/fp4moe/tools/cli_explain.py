"""The command `fp4moe explain MODEL`: what replace_moe, or from_pretrained, would do to its blocks.

The model is built from its configuration, in the class that from_pretrained builds; of quantised
weights the headers are read, and given their places as from_pretrained does.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import os
from collections.abc import Mapping
from typing import Any

from ..checkpoint.files import INDEX, WEIGHTS, CheckpointFiles
from ..checkpoint.header import Spec, read_json, reading_for
from ..checkpoint.naming import FLOAT, Convention
from ..checkpoint.readers import convention_of
from ..checkpoint.stored import preferred, stored_bytes
from ..errors import CheckpointError, Fp4MoeError, must, refuse
from ..formats import DEFAULT_FORMAT, FORMATS
from ..models.from_config import config_errors, model_on_meta, one_line
from ..models.replace import explain
from ..pretrained.loading import Loading
from ..pretrained.placeholder import Options
from ..report import BlockReport, ModelReport
from .help_text import add_command

__all__ = ["add_parser", "explain_source", "run"]

QUANTIZATION = "hf_quant_config.json"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of the program."""
    command = add_command(
        subparsers,
        "explain",
        "Say what fp4moe would do to each block of a model, without loading its weights.",
        "A block is replaced, replaceable, loadable (quantised on disk) or not replaceable. The\n"
        "table gives the reason, the sizes, the number format and the kernel.",
        "fp4moe explain path/to/model\nfp4moe explain path/to/model --format fp8 --json",
    )
    command.add_argument(
        "model", help="a directory with config.json, the file itself, or the name of a hub model"
    )
    command.add_argument(
        "--kernel", default="auto", help="auto, or the name of a kernel from fp4moe info"
    )
    command.add_argument(
        "--format",
        choices=FORMATS,
        default=DEFAULT_FORMAT,
        help="number format that replace_moe would quantise float weights to",
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    report = explain_source(arguments.model, arguments.kernel, arguments.format)
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else report)


def explain_source(source: str, kernel: str = "auto", format: str = DEFAULT_FORMAT) -> ModelReport:
    """Report on a directory or hub id, see `fp4moe.explain`.

    Where its weights are quantised, `checkpoint` says whether from_pretrained reads them, and the
    blocks that it packs have the status "loadable". Of a hub id, or a directory without weights,
    the configuration alone decides.

    Raises:
        UnsupportedError: transformers is not installed, or there is no such kernel.
        CheckpointError: there is no configuration that transformers can build.
    """
    if importlib.util.find_spec("transformers") is None:
        what = "no model can be built from its configuration"
        reason = "transformers is not installed"
        refuse("explain", what, reason, "Run pip install 'fp4moe[transformers]'.")
    directory = _directory(source)
    model = model_on_meta(directory, caller="explain")
    report = explain(model, kernel, format=format, only_structure=True)
    quantization = _announced(directory)
    formats: dict[str, str] = {}
    try:
        convention = convention_of(quantization)
        if convention is FLOAT:
            return report
        if any(os.path.lexists(os.path.join(directory, name)) for name in (WEIGHTS, INDEX)):
            packed = _packed(directory, model, formats)
        else:
            packed = _announced_blocks(report, convention)
    except Fp4MoeError as error:
        return _refused(report, one_line(error))
    # Where no file says which one it is.
    announced = [form for form in FORMATS if form in convention.forms]
    only = announced[0] if len(announced) == 1 else None
    blocks = tuple(_block(block, packed, formats.get(block.path, only)) for block in report.blocks)
    forms = " and ".join(sorted(form.upper() for form in convention.forms))
    count = sum(block.status == "loadable" for block in blocks)
    text = f"{forms} checkpoint of {convention.name}: from_pretrained packs {count} of its blocks"
    return dataclasses.replace(report, blocks=blocks, checkpoint=text)


def _directory(source: str) -> str:
    """Where the configuration is: a directory of the user, or of the hub's cache."""
    path = os.path.dirname(source) or "." if os.path.basename(source) == "config.json" else source
    if os.path.exists(path):
        if not os.path.isfile(os.path.join(path, "config.json")):
            rule = "be a directory with config.json or a hub id"
            advice = "Pass the directory that from_pretrained loads."
            must("explain: model", rule, source, advice, error=CheckpointError)
        return path
    from transformers.utils import cached_file

    try:
        file = cached_file(source, "config.json")
        cached_file(source, QUANTIZATION, _raise_exceptions_for_missing_entries=False)
    except config_errors() as error:
        must(
            "explain: model",
            "be a directory with config.json or a hub id",
            f"{source!r}, which is no directory here: {one_line(error).rstrip('.')}",
            "Check the path or the name.",
            error=CheckpointError,
            cause=error,
        )
    return os.path.dirname(str(file))


def _announced(directory: str) -> Mapping[str, Any] | None:
    """The quantisation that the JSON files announce, as CheckpointFiles.open reads it."""
    path = os.path.join(directory, QUANTIZATION)
    if os.path.lexists(path):
        with reading_for("explain"):
            return read_json(path)
    with reading_for("explain"):
        entry = read_json(os.path.join(directory, "config.json")).get("quantization_config")
    if entry is not None and not isinstance(entry, dict):
        rule = "be a JSON object"
        got = repr(entry)[:100]
        must("explain: quantization_config", rule, got, "Check config.json.", error=CheckpointError)
    return entry


def _packed(directory: str, model: Any, formats: dict[str, str]) -> dict[str, int]:
    """The blocks that from_pretrained packs, with the bytes of their tensors; fills formats."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    with CheckpointFiles.open(directory, caller="explain") as files:
        loading = Loading(Options(progress=False), quantize=False)
        loading.open(model, [os.path.join(directory, name) for name in files.shards], model.dtype)
        loading.make_plan(get_model_conversion_mapping(model))
        assert loading.plan is not None
        formats |= {path: plan.form for path, plan in loading.plan.experts.items()}
        return {
            path: sum(_nbytes(files.shapes[key]) for key in plan.keys)
            for path, plan in loading.plan.experts.items()
        }


def _nbytes(spec: Spec) -> int:
    return math.prod(spec[1]) * spec[0].itemsize


def _announced_blocks(report: ModelReport, convention: Convention) -> dict[str, int]:
    """The blocks that are packed if the files hold what the configuration says."""
    packed: dict[str, int] = {}
    # Which of several it is, only the files say.
    form = preferred(FORMATS, convention.forms)
    if form not in convention.forms:
        return packed
    for block in report.blocks:
        left = any(convention.ignores(f"{block.path}{end}") for end in ("", ".0.up_proj"))
        if block.status == "replaceable" and not left:
            assert block.num_experts and block.hidden_size and block.intermediate_size
            packed[block.path] = stored_bytes(block, form)
    return packed


def _block(block: BlockReport, packed: Mapping[str, int], format: str | None) -> BlockReport:
    if block.status != "replaceable":
        return block
    if block.path in packed:
        nbytes = packed[block.path]
        return dataclasses.replace(block, status="loadable", format=format, nbytes=nbytes)
    note = "its experts are not packed in this checkpoint; replace_moe can after loading"
    return dataclasses.replace(block, reasons=(*block.reasons, note))


def _refused(report: ModelReport, why: str) -> ModelReport:
    reason = "its experts are quantised, and from_pretrained refuses the checkpoint"
    blocks = tuple(
        dataclasses.replace(
            block,
            status="not replaceable",
            reasons=(reason, *block.reasons),
            format=None,
            kernel=None,
        )
        for block in report.blocks
    )
    text = f"quantised checkpoint, which from_pretrained refuses: {why}"
    return dataclasses.replace(report, blocks=blocks, checkpoint=text)

"""Rewrite the mixture-of-experts blocks of a `torch.export` program.

Before: float expert weights as parameters of the program, each block as ATen nodes.
After:  packed weights as buffers of the program, one fp4moe operator a block; float weights that
nothing else reads are gone from the state dict.
Kept: inputs, outputs, dynamic shapes, everything else in the state dict. Not handled: programs with
a backward part, preserved call signatures of the modules that are rewritten.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    TensorArgument,
)

from fp4moe.errors import UnsupportedError, must, refuse
from fp4moe.formats import DEFAULT_FORMAT
from fp4moe.kernels import DEFAULT_HIDDEN_ALIGNMENT

from .report import RewriteReport, report_no_match
from .rewrite import Rewritten, rewrite_graph
from .settings import RewriteSettings

__all__ = ["rewrite_exported"]

logger = logging.getLogger("fp4moe")
STORED = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def rewrite_exported(
    exported_program: ExportedProgram,
    *,
    kernel: str = "auto",
    verify: bool = True,
    format: str = DEFAULT_FORMAT,
    on_no_match: str = "warn",
    hidden_alignment: int = DEFAULT_HIDDEN_ALIGNMENT,
    routing: str = "given",
) -> tuple[ExportedProgram, RewriteReport]:
    """Return a program whose mixture-of-experts blocks are one operator each, and what was done.

    The result saves, loads (where fp4moe is imported), decomposes and compiles with AOTInductor
    like any program. It is for inference: the packed weights have no gradient.

    Args:
        exported_program: from torch.export.export, strict or not, decomposed or not, or loaded;
            stays as it is. Its expert weights must be real tensors.
        kernel: "auto" or a kernel's name, chosen for the device of the weights.
        verify: False leaves out the checks on large inputs and on further experts; see
            `rewrite_moe`.
        format: what the weights are quantised to, a name of `fp4moe.formats.FORMATS`.
        on_no_match: "warn", "error" or "ignore" when no block is or was fused.
        hidden_alignment: 128, 256 or 512, what the Blackwell kernel pads the hidden size to.
        routing: "given" keeps the program's own routing; "fused" lets the kernel choose the experts
            where the program's routing is a method of the kernel's; the report says where not.

    Raises:
        UnsupportedError: an unknown value; no block with on_no_match="error"; a program with a
            backward part, or that preserves the call signature of a module that is rewritten; a
            kernel asked for by name that cannot run a block.
    """
    if not isinstance(exported_program, ExportedProgram):
        must(
            "rewrite_exported: exported_program",
            "be a torch.export.ExportedProgram",
            type(exported_program).__name__,
            "Export the model first, or call rewrite_moe.",
            error=UnsupportedError,
        )
    settings = RewriteSettings(kernel, verify, hidden_alignment, routing, format)
    settings.checked(on_no_match, caller="rewrite_exported")
    if exported_program.graph_signature.backward_signature is not None:
        what = "exported_program cannot be rewritten"
        reason = "it has a backward part"
        refuse("rewrite_exported", what, reason, "Export the model without its loss.")
    gm = _copied(exported_program.graph_module)
    signature = copy.deepcopy(exported_program.graph_signature)
    state = dict(exported_program.state_dict)
    constants = dict(exported_program.constants)
    values = _values(gm, signature, {**constants, **state})
    before = [node.name for node in gm.graph.output_node().all_input_nodes]
    with torch.no_grad():
        report, done = rewrite_graph(gm, values, settings, constants=True)
    logger.info("rewrite_exported: %s", report)
    report_no_match(report, on_no_match, caller="rewrite_exported")
    if not done and not any(match.fused for match in report.routing):
        return exported_program, report
    after = [node.name for node in gm.graph.output_node().all_input_nodes]
    _lift_buffers(gm, signature, state)
    _drop_unused(gm, signature, state, done)
    renamed = {old: new for old, new in zip(before, after, strict=True) if old != new}
    for output in signature.output_specs:
        output.arg.name = renamed.get(output.arg.name, output.arg.name)
    _check_calls(gm, exported_program.module_call_graph)
    gm.graph.lint()
    gm.recompile()
    program = ExportedProgram(
        root=gm,
        graph=gm.graph,
        graph_signature=signature,
        state_dict=state,
        range_constraints=dict(exported_program.range_constraints),
        module_call_graph=exported_program.module_call_graph,
        example_inputs=exported_program.example_inputs,
        constants=constants,
        verifiers=exported_program.verifiers,
    )
    return program, report


def _copied(original: fx.GraphModule) -> fx.GraphModule:
    gm = fx.GraphModule(original, copy.deepcopy(original.graph))
    gm.meta.update(original.meta)
    for new, old in zip(gm.graph.nodes, original.graph.nodes, strict=True):
        # A copy renames what is called like a builtin, such as input; the signature keeps the name.
        new.name = old.name
    gm.recompile()
    return gm


def _values(
    gm: fx.GraphModule, signature: ExportGraphSignature, stored: dict[str, Any]
) -> list[Any]:
    """Real tensors for what the program stores and never writes, metadata for the rest."""
    written = {*signature.buffers_to_mutate.values(), *signature.parameters_to_mutate.values()}
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    return [
        stored[spec.target]
        if spec.kind in STORED and spec.target in stored and spec.target not in written
        else node.meta.get("val")
        for node, spec in zip(placeholders, signature.input_specs, strict=True)
    ]


def _lift_buffers(
    gm: fx.GraphModule, signature: ExportGraphSignature, state: dict[str, Any]
) -> None:
    """Turn the attributes that the rewrite added into buffers of the program."""
    specs = signature.input_specs
    position = next((i for i, s in enumerate(specs) if s.kind is InputKind.USER_INPUT), len(specs))
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    lifted: dict[str, fx.Node] = {}
    for node in [n for n in gm.graph.nodes if n.op == "get_attr" and n.target in gm._buffers]:
        attribute = str(node.target)
        if attribute not in lifted:
            target = _free_name(attribute, state)
            next_node = (
                placeholders[position] if position < len(placeholders) else _first_call(gm.graph)
            )
            with gm.graph.inserting_before(next_node):
                placeholder = gm.graph.placeholder(f"b_{target}")
            placeholder.target = placeholder.name
            placeholder.meta["val"] = node.meta["val"]
            argument = TensorArgument(name=placeholder.name)
            spec = InputSpec(InputKind.BUFFER, argument, target, persistent=True)
            specs.insert(position, spec)
            placeholders.insert(position, placeholder)
            position += 1
            state[target] = gm.get_buffer(attribute)
            lifted[attribute] = placeholder
        node.replace_all_uses_with(lifted[attribute])
        gm.graph.erase_node(node)
    for attribute in lifted:
        delattr(gm, attribute)


def _first_call(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.op != "placeholder")


def _free_name(name: str, taken: dict[str, Any]) -> str:
    # The counter in the name starts anew in each process; a loaded program brings its own names.
    number, free = 0, name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    return free


def _drop_unused(
    gm: fx.GraphModule,
    signature: ExportGraphSignature,
    state: dict[str, Any],
    done: list[Rewritten],
) -> None:
    """Remove float weights that were packed and that nothing reads any more."""
    packed = {node for block in done for node in block.weight_nodes}
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    kept: list[InputSpec] = []
    removed = set()
    for node, spec in zip(placeholders, signature.input_specs, strict=True):
        if node in packed and not node.users:
            gm.graph.erase_node(node)
            removed.add(spec.target)
        else:
            kept.append(spec)
    signature.input_specs[:] = kept
    for target in removed - {spec.target for spec in kept}:
        if target is not None:
            state.pop(target, None)


def _check_calls(gm: fx.GraphModule, calls: Sequence[ModuleCallEntry]) -> None:
    names = {node.name for node in gm.graph.nodes}
    for call in calls:
        # The program itself has no name; its outputs are those of the signature.
        if call.signature is None or not call.fqn:
            continue
        used = [*call.signature.inputs, *call.signature.outputs]
        gone = [a.name for a in used if not isinstance(a, ConstantArgument) and a.name not in names]
        if gone:
            reason = f"its call signature is preserved and names {', '.join(gone)}"
            advice = "Export without it in preserve_module_call_signature."
            refuse("rewrite_exported", f"{call.fqn} cannot be rewritten", reason, advice)

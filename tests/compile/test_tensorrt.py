"""Torch-TensorRT around the operator: options, lowering and partitioning.

Nothing here builds an engine. The class below runs the real torch_tensorrt, its lowering and its
partitioning, on a CPU with stand-ins for TensorRT's libraries; see tensorrt_stub.py.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import logging
import sys

import pytest
import tensorrt_stub
import torch
from moe_layers import hidden, moe_layer
from torch import nn
from torch.export import Dim, export

import fp4moe
from fp4moe.compile.backend import BackendOptions
from fp4moe.errors import UnsupportedError
from fp4moe.passes import rewrite_exported

OPERATOR = torch.ops.fp4moe.nvfp4_moe.default
BackendCompilerFailed = torch._dynamo.exc.BackendCompilerFailed
# The same torch operators, some decomposed: float32 sums in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Stack(nn.Module):
    """Linear, experts, linear, experts, linear."""

    def __init__(self, name="gemma4", layers=2):
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.moe = nn.ModuleList(moe_layer(name) for _ in range(layers))
        self.dense = nn.ModuleList(nn.Linear(64, 64) for _ in range(layers))
        self.requires_grad_(False)

    def forward(self, x):
        x = self.first(x)
        for moe, dense in zip(self.moe, self.dense, strict=True):
            x = dense(moe(x))
        return x


def replaced(model, **settings):
    return fp4moe.replace_moe(copy.deepcopy(model), progress=False, **settings)


class TestWithoutTensorRT:
    @pytest.mark.parametrize("name", ["torch_tensorrt", "tensorrt"])
    def test_backend_says_what_to_install(self, monkeypatch, name):
        monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
        with pytest.raises(
            UnsupportedError, match="torch_tensorrt cannot be imported, because"
        ) as got:
            BackendOptions.parse({"inner_backend": name})
        assert "Install the torch-tensorrt that was built for this torch" in str(got.value)

    def test_lowering_pass_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
        with pytest.raises(UnsupportedError, match=r"^lowering_pass: torch_tensorrt cannot be"):
            with fp4moe.tensorrt.lowering_pass():
                pass

    @pytest.mark.parametrize(
        "name, value", [("kernel", "cutlass"), ("on_no_match", "no"), ("routing", "fast")]
    )
    def test_values(self, name, value):
        with pytest.raises(UnsupportedError, match=f"^lowering_pass: {name} must be"):
            with fp4moe.tensorrt.lowering_pass(**{name: value}):
                pass


@pytest.fixture(scope="module")
def torch_tensorrt():
    reason = tensorrt_stub.reason_not_to_load()
    if reason:
        pytest.skip(reason)
    level = logging.root.level
    with tensorrt_stub.pretended_gpu():
        yield tensorrt_stub.load()
    logging.root.setLevel(level)


@pytest.fixture
def partitions(torch_tensorrt, monkeypatch):
    """What each partitioning counted: engines, and the nodes that stay in torch."""
    from torch_tensorrt.dynamo import _compiler

    seen = []
    monkeypatch.setattr(_compiler, "dryrun_stats_display", lambda tracker, _: seen.append(tracker))
    return seen


DRY = {"dryrun": True, "min_block_size": 1}


def compiled(model, dynamic=None, **options):
    options = {
        "inner_backend": "torch_tensorrt",
        "inner_options": DRY,
        "on_no_match": "error",
        **options,
    }
    return torch.compile(
        model, backend=fp4moe.backend, options=options, fullgraph=True, dynamic=dynamic
    )


@pytest.mark.filterwarnings("ignore")
class TestPartitioningWithTensorRTStubbed:
    @pytest.mark.parametrize("name", ["gemma4", "nemotron_h"])
    def test_one_engine_more_than_layers_of_experts(self, partitions, name):
        model = Stack(name)
        with torch.no_grad():
            actual = compiled(model)(hidden())
        torch.testing.assert_close(actual, replaced(model)(hidden()), **CLOSE)
        (tracker,) = partitions
        assert tracker.tensorrt_graph_count == 3
        assert len(tracker.to_run_in_torch) == 2
        assert all("fp4moe.nvfp4_moe" in str(node) for node in tracker.to_run_in_torch)

    def test_any_number_of_tokens(self, partitions):
        model = Stack(layers=1)
        run = compiled(model)
        x = hidden(7)
        torch._dynamo.mark_dynamic(x, 1, min=2, max=64)
        with torch.no_grad():
            for values in (x, hidden(5), hidden(33)):
                torch.testing.assert_close(run(values), replaced(model)(values), **CLOSE)
        (tracker,) = partitions
        assert tracker.tensorrt_graph_count == 2

    def test_fused_routing_saves_an_engine(self, partitions):
        # With a dynamic size the converter of gather declines, and NemotronH's router has one.
        model = Stack("nemotron_h", layers=1)
        for routing, engines, nodes in (("given", 3, 2), ("fused", 2, 1)):
            torch._dynamo.reset()
            x = hidden(7)
            torch._dynamo.mark_dynamic(x, 1, min=2, max=64)
            with torch.no_grad():
                actual = compiled(model, routing=routing)(x)
            torch.testing.assert_close(actual, replaced(model)(x), **CLOSE)
            tracker = partitions.pop()
            assert (tracker.tensorrt_graph_count, len(tracker.to_run_in_torch)) == (engines, nodes)

    def test_a_build_that_fails_raises(self, torch_tensorrt):
        # No engine can be built here, which is the failure.
        with pytest.raises(BackendCompilerFailed), torch.no_grad():
            compiled(Stack(layers=1), inner_options={"min_block_size": 1})(hidden())

    def test_unless_the_user_says_so(self, torch_tensorrt):
        model = Stack(layers=1)
        options = {"min_block_size": 1, "pass_through_build_failures": False}
        with torch.no_grad():
            actual = compiled(model, inner_options=options)(hidden())
        # What then runs in torch has the operator, because the rewrite came first.
        torch.testing.assert_close(actual, replaced(model)(hidden()), **CLOSE)

    def test_an_unknown_option(self, torch_tensorrt):
        with pytest.raises(BackendCompilerFailed, match="Did you mean dryrun") as got:
            with torch.no_grad():
                compiled(Stack(layers=1), inner_options={"dry_run": True})(hidden())
        assert isinstance(got.value.inner_exception, UnsupportedError)

    def test_a_mode_does_not_displace_the_options(self, partitions, caplog):
        options = {"inner_backend": "torch_tensorrt", "inner_options": DRY}
        backend = functools.partial(fp4moe.backend, options=options)
        with torch.no_grad(), caplog.at_level(logging.WARNING, logger="fp4moe"):
            torch.compile(Stack(layers=1), backend=backend, mode="reduce-overhead")(hidden())
        assert partitions[0].tensorrt_graph_count == 2
        assert "takes no mode" in caplog.text

    def exported(self, model, dynamic=False):
        shapes = ({1: Dim("tokens", min=2, max=64)},) if dynamic else None
        return export(model, (hidden(),), dynamic_shapes=shapes, strict=False)

    def check(self, module, model, tracker):
        torch.testing.assert_close(module(hidden()), replaced(model)(hidden()), **CLOSE)
        assert tracker.tensorrt_graph_count == 3
        names = [name for name, _ in module.named_children()]
        assert [name.rpartition("_")[0] for name in names] == [
            "_run_on_acc",
            "_run_on_gpu",
            "_run_on_acc",
            "_run_on_gpu",
            "_run_on_acc",
        ]
        for name in names:
            part = module.get_submodule(name)
            found = [node.target for node in part.graph.nodes if node.op == "call_function"]
            assert (found == [OPERATOR]) == ("gpu" in name)

    def test_a_rewritten_program(self, torch_tensorrt, partitions):
        model = Stack()
        program, _ = rewrite_exported(self.exported(model))
        module = torch_tensorrt.dynamo.compile(program, arg_inputs=(hidden(),), **DRY)
        self.check(module, model, partitions[0])

    def test_lowering_pass(self, torch_tensorrt, partitions):
        model = Stack()
        program = self.exported(model)
        with fp4moe.tensorrt.lowering_pass(on_no_match="error") as reports:
            module = torch_tensorrt.dynamo.compile(program, arg_inputs=(hidden(),), **DRY)
        assert [report.count for report in reports] == [2]
        self.check(module, model, partitions[0])

    def test_lowering_pass_takes_itself_back(self, torch_tensorrt):
        from torch_tensorrt.dynamo.lowering.passes._aten_lowering_pass import (
            ATEN_POST_LOWERING_PASSES,
        )

        before = list(ATEN_POST_LOWERING_PASSES.passes)
        with contextlib.suppress(ZeroDivisionError), fp4moe.tensorrt.lowering_pass():
            with fp4moe.tensorrt.lowering_pass():
                assert len(ATEN_POST_LOWERING_PASSES.passes) == len(before) + 2
            raise ZeroDivisionError
        assert before == ATEN_POST_LOWERING_PASSES.passes

    def test_lowering_pass_needs_stored_weights(self, torch_tensorrt, partitions):
        model = Stack(layers=1)
        # The converter of sort in 2.13 raises for the one that grouped_mm begins with.
        model.moe[0].experts.config._experts_implementation = "batched_mm"
        options = {**DRY, "pass_through_build_failures": True}
        run = torch.compile(model, backend="torch_tensorrt", options=options, fullgraph=True)
        with torch.no_grad(), fp4moe.tensorrt.lowering_pass(on_no_match="ignore") as reports:
            torch.testing.assert_close(run(hidden()), model(hidden()), **CLOSE)
        assert [report.count for report in reports] == [0]
        assert "not real tensors" in str(reports[0])
        assert "fp4moe" not in str(partitions[0].to_run_in_torch)


@pytest.mark.gpu
def test_engines_on_a_gpu():
    if importlib.util.find_spec("tensorrt_libs") is None:
        pytest.skip("needs TensorRT itself, from NVIDIA's package index")
    model = Stack().to("cuda", torch.bfloat16)
    x = hidden(dtype=torch.bfloat16).cuda()
    with torch.no_grad():
        actual = compiled(model, inner_options={"min_block_size": 1})(x)
        expected = replaced(model)(x)
    # bfloat16 has 8 bits; five layers of 64 products each round a few times.
    torch.testing.assert_close(actual, expected, rtol=5e-2, atol=5e-2)

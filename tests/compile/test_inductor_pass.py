"""The rewrite as a pass of Inductor: numbers, caches, passes before it, and what it refuses."""

from __future__ import annotations

import contextlib
import copy
import pathlib
import shutil

import pytest
import torch
from moe_layers import hidden, moe_layer
from tiny_models import Block, CapturingBackend, experts_class, routed, table_entries
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache

import fp4moe
from fp4moe.compile import inductor as inductor_pass
from fp4moe.compile.inductor import MoePass
from fp4moe.errors import UnsupportedError

OPERATOR = torch.ops.fp4moe.float_moe.default
BackendCompilerFailed = torch._dynamo.exc.BackendCompilerFailed
Gated = experts_class()
# torch 2.11 and 2.12 have no other way.
EARLY = {"pre_grad_pass_timing": "early"} if hasattr(config, "pre_grad_pass_timing") else {}

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def replaced(model, **settings):
    return fp4moe.replace_moe(copy.deepcopy(model), progress=False, **settings)


def compiled(model, options):
    return torch.compile(model, options=options, fullgraph=True)


class Noting(CustomGraphPass):
    """A pass that counts the fused operators it sees."""

    def __init__(self, name="noting"):
        self.name, self.seen = name, []

    def __call__(self, graph):
        self.seen.append(sum(node.target is OPERATOR for node in graph.nodes))

    def uuid(self):
        return self.name


@pytest.mark.slow
class TestNumbers:
    @pytest.mark.parametrize("name, routing", [("gemma4", "given"), ("nemotron_h", "fused")])
    def test_a_layer(self, name, routing):
        model = moe_layer(name)
        options = fp4moe.inductor_options(on_no_match="error", routing=routing)
        run = compiled(model, options)
        reference = replaced(model)
        with torch.no_grad():
            for tokens in (7, 9, 30):
                # Inductor fuses the norm and the router: float32 in another order.
                torch.testing.assert_close(
                    run(hidden(tokens)), reference(hidden(tokens)), rtol=1e-5, atol=1e-5
                )
        report = options["pre_grad_custom_pass"].report
        assert report.count == 1 and report.routing[0].fused == (routing == "fused")

    def test_as_a_setting_of_inductor(self):
        block = Block(Gated)
        with config.patch(fp4moe.inductor_options(on_no_match="error")), torch.no_grad():
            actual = torch.compile(block, fullgraph=True)(*routed(5))
        assert torch.equal(actual, replaced(block)(*routed(5)))

    def test_two_models_share_code_and_not_weights(self):
        blocks = [Block(Gated), Block(Gated)]
        blocks[1].experts.down_proj.mul_(-3)
        counters.clear()
        with fresh_cache(), torch.no_grad():
            for hits, block in enumerate(blocks):
                torch._dynamo.reset()
                run = compiled(block, fp4moe.inductor_options(on_no_match="error"))
                assert torch.equal(run(*routed(5)), replaced(block)(*routed(5)))
                assert counters["inductor"]["fxgraph_cache_hit"] == hits
        counters.clear()


class TestPassesBefore:
    def test_the_one_that_was_set_runs_first(self):
        noting, after = Noting(), Noting()
        with config.patch(pre_grad_custom_pass=noting):
            options = fp4moe.inductor_options(before=[after])
        # On the Dynamo graph neither has seen the operator; both ran.
        assert options["pre_grad_custom_pass"].before == (after, noting)
        with torch.no_grad():
            compiled(Block(Gated), options)(*routed(5))
        assert noting.seen == after.seen == [0]
        assert options["pre_grad_custom_pass"].report.count == 1

    def test_several_were_set(self):
        passes = [Noting("a"), Noting("b")]
        with config.patch(pre_grad_custom_pass=passes):
            assert fp4moe.inductor_options()["pre_grad_custom_pass"].before == tuple(passes)


class TestUuid:
    def test_depends_on_settings_and_passes_before(self):
        passes = [
            MoePass(),
            MoePass(kernel="reference"),
            MoePass(verify=False),
            MoePass(routing="fused"),
            MoePass(hidden_alignment=512),
            MoePass(on_no_match="error"),
            MoePass(before=[Noting()]),
            MoePass(before=[Noting("another")]),
        ]
        assert len({each.uuid() for each in passes}) == len(passes)
        assert MoePass().uuid() == MoePass().uuid()

    def test_none_behind_a_pass_without_one(self):
        assert MoePass(before=[lambda graph: None]).uuid() is None

    @pytest.mark.parametrize(
        "file", ["passes/judge/verify.py", "formats/nvfp4.py", "kernels/reference.py"]
    )
    @pytest.mark.parametrize("apart", [False, True], ids=["installed", "editable"])
    def test_depends_on_the_sources(self, apart, file, tmp_path, monkeypatch):
        package = pathlib.Path(fp4moe.__file__).parent
        assert package == inductor_pass.PACKAGE
        copied = tmp_path / "fp4moe"
        ignore = shutil.ignore_patterns("__pycache__", "passes")
        shutil.copytree(package, copied, ignore=ignore)
        passes = tmp_path / "passes" if apart else copied / "passes"
        shutil.copytree(fp4moe.passes.__path__[0], passes, ignore=ignore)
        monkeypatch.setattr(inductor_pass, "PACKAGE", copied)
        monkeypatch.setattr(inductor_pass, "passes_folder", lambda: str(passes))
        before = MoePass().uuid()
        folder = tmp_path if file.startswith("passes") and apart else copied
        with (folder / file).open("a") as source:
            source.write("\n")
        assert MoePass().uuid() != before


class TestRefused:
    @pytest.mark.parametrize(
        "name, value",
        [
            ("kernel", "cutlass"),
            ("on_no_match", "no"),
            ("routing", "fast"),
            ("hidden_alignment", 7),
        ],
    )
    def test_values(self, name, value):
        with pytest.raises(
            UnsupportedError, match=f"^inductor_options: {name} must be .*; got '?{value}"
        ):
            fp4moe.inductor_options(**{name: value})

    def test_behind_the_cache(self):
        # A torch without the setting runs the pass before its cache in any case.
        late = hasattr(config, "pre_grad_pass_timing")
        refused = pytest.raises(BackendCompilerFailed, match="pre_grad_pass_timing must be 'early'")
        with config.patch(pre_grad_custom_pass=MoePass()), torch.no_grad():
            with refused if late else contextlib.nullcontext():
                torch.compile(Block(Gated))(*routed(5))

    def test_nothing_to_match(self):
        with torch.no_grad():
            run = compiled(nn.Linear(4, 4), fp4moe.inductor_options(on_no_match="error"))
            with pytest.raises(BackendCompilerFailed, match="nothing in it looks"):
                run(torch.ones(2, 4))
            torch._dynamo.reset()
            compiled(nn.Linear(4, 4), fp4moe.inductor_options())(torch.ones(2, 4))

    def test_weights_that_are_not_known_are_packed_when_they_come(self):
        backend, block = CapturingBackend(), Block(Gated)
        with torch.no_grad():
            torch.compile(block, backend=backend)(*routed(5))
        graph = backend.graphs[0]
        # Dynamo forgets its record of the inputs once the backend returns.
        with config.patch(EARLY), torch.no_grad():
            MoePass(on_no_match="error")(graph.graph)
            assert not table_entries(block.experts.down_proj)
            (actual,) = graph(*backend.inputs[0])
            assert torch.equal(actual, replaced(block)(*routed(5)))
        assert [node.target for node in graph.graph.nodes].count(OPERATOR) == 1

    def test_weights_that_are_trained(self):
        each = MoePass()

        def run_pass_only(graph_module, example_inputs):
            with config.patch(EARLY):
                each(graph_module.graph)
            return graph_module.forward

        torch.compile(Block(Gated).requires_grad_(True), backend=run_pass_only)(*routed(5))
        assert "require gradients" in str(each.report)

    def test_a_graph_without_its_module(self):
        with config.patch(EARLY):
            with pytest.raises(UnsupportedError, match="graph must belong to a GraphModule"):
                MoePass()(torch.fx.Graph())

"""Random writers, sizes and surroundings: a rewrite computes the original's numbers or is none."""

from __future__ import annotations

import pytest
from dataflow_cases import LIMIT, OPERATOR, error_after_rewrite
from moe_writers import ACTIVATIONS, WRITERS, GroupedMM, Model, Sizes, inputs

hypothesis = pytest.importorskip("hypothesis", reason="optional package")
st = hypothesis.strategies

# What may happen between the two products; all but the first forbid a rewrite.
BETWEEN = {
    "nothing": lambda y: y,
    "clamp": lambda y: y.clamp(max=0.7),
    "scale": lambda y: y * 1.01,
    "shift": lambda y: y + 0.01,
    "square": lambda y: y * y,
}


@st.composite
def sizes(draw):
    experts = draw(st.integers(2, 5))
    return Sizes(
        experts=experts,
        top_k=draw(st.integers(1, experts)),
        # Odd sizes too: the packed weights are padded to blocks of 16.
        hidden=draw(st.integers(3, 40)),
        intermediate=draw(st.integers(3, 40)),
    )


@pytest.mark.slow
@hypothesis.seed(0)
@hypothesis.settings(max_examples=12, deadline=None, database=None)
@hypothesis.given(
    name=st.sampled_from(sorted(WRITERS)),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    gated=st.booleans(),
    between=st.sampled_from(["nothing", *BETWEEN]),
    size=sizes(),
    tokens=st.integers(1, 9),
    batched=st.booleans(),
    shared=st.booleans(),
    router=st.booleans(),
)
def test_a_rewrite_is_right_or_did_not_happen(
    name, activation, gated, between, size, tokens, batched, shared, router
):
    writer = WRITERS[name]
    change = BETWEEN[between]

    class Changed(writer):
        def __init__(self, *args):
            super().__init__(*args)
            plain = self.act
            self.act = lambda x: change(plain(x))

    if issubclass(writer, GroupedMM):
        # grouped_mm wants rows of 16 bytes.
        size = Sizes(size.experts, size.top_k, size.hidden * 8, size.intermediate * 8)
    model = Model(Changed(size, activation, gated or writer.gated_only), router, batched, shared)
    args = inputs(size, tokens, router, batched)
    report, error, graph = error_after_rewrite(model, args, "export")
    if between == "nothing":
        assert report.count == 1, str(report)
    if report.count:
        assert between == "nothing"
        assert error < LIMIT[issubclass(writer, GroupedMM)]
    else:
        assert OPERATOR not in {node.target for node in graph.graph.nodes}

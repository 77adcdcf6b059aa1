"""from_pretrained with transformers' tensor and expert parallelism, on processes with Gloo."""

from __future__ import annotations

import pytest
import ranks

pytestmark = pytest.mark.slow

START = """
    import os, sys
    import torch, transformers
    import fp4moe
    from transformers.distributed import DistributedConfig
    RANK = int(os.environ["RANK"])
    IDS = torch.arange(1, 49).reshape(4, 12)
    WAYS = {"tp": {"tp_size": 2}, "ep": {"tp_size": 2, "ep_size": 2}}
    torch.set_grad_enabled(False)

    def load(directory, way=None, **options):
        if way is not None:
            options["distributed_config"] = DistributedConfig(**WAYS[way])
        options.setdefault("dtype", torch.float32)
        return fp4moe.from_pretrained(directory, progress=False, **options)

    def logits(model, ids=IDS):
        return model(ids, use_cache=False).logits

    def experts(model):
        return [m for m in model.modules() if isinstance(m, fp4moe.FusedExperts)]

    def nbytes(model):
        return sum(m.nbytes for m in experts(model))

    def tokens(model):
        return model.generate(IDS[:, :6], max_new_tokens=5, do_sample=False)

    def close(got, expected):
        # float32 sums in another order: a few units of 2^-24 of logits below 1.
        assert float((got - expected).abs().max()) < 1e-6, float((got - expected).abs().max())
"""

EQUAL = """
    from torch._dynamo.backends.common import aot_autograd

    def one_graph(model):
        graphs = []
        def keep(module, inputs):
            graphs.append([str(node.target) for node in module.graph.nodes])
            return module.forward
        compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
        found = logits(compiled)
        assert len(graphs) == 1, len(graphs)
        torch._dynamo.reset()
        return found, graphs[0]

    for name, directory in (pair.split("=") for pair in sys.argv[1:]):
        whole = load(directory)
        expected, sequence = logits(whole), tokens(whole)
        for way in WAYS:
            model = load(directory, way)
            close(logits(model), expected)
            assert torch.equal(tokens(model), sequence)
            share = nbytes(model) / nbytes(whole)
            # Scales of which there is one an expert are held twice.
            assert 0.5 <= share < 0.503, share
            (part,) = experts(model)[0].parts
            kind = {"tp": "intermediate columns", "ep": "experts"}[way]
            assert (part.kind, part.index, part.count) == (kind, RANK, 2)
            report = str(fp4moe.explain(model))
            assert f"it holds {part}" in report and "replaced" in report, report
            if name in ("gemma4", "nemotron_h"):
                found, targets = one_graph(model)
                close(found, expected)
                operators = [t for t in targets if t.startswith("fp4moe.")]
                assert operators == ["fp4moe.nvfp4_moe.default"] * 2, operators
                behind = targets[targets.index(operators[0]) :]
                assert behind[1] == "_c10d_functional.all_reduce.default", behind[:3]
        print(name, "agrees")
"""


def test_logits_tokens_and_bytes_of_two_processes(checkpoint):
    names = ("gemma4", "qwen3_moe", "nemotron_h", "mixtral", "glm4_moe", "deepseek_v3")
    pairs = [f"{name}={checkpoint(name)}" for name in names]
    for printed in ranks.run(START + EQUAL, 2, *pairs):
        assert [name for name in names if f"{name} agrees" not in printed] == []


OTHERS = """
    whole_directory, uneven, packed, formats = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]

    # Parts of two blocks and of one, of floats that are quantised while they are read.
    whole, model = load(uneven), load(uneven, "tp")
    assert experts(model)[0].layer.intermediate_size == (32, 16)[RANK]
    close(logits(model), logits(whole))

    # The model's router in one launch.
    model = load(whole_directory, "ep", routing="fused")
    expected = logits(load(whole_directory))
    close(logits(model), expected)

    # Tokens exchanged, not outputs added up; and with gradients, which then need it.
    WAYS["exchange"] = WAYS["ep"] | {"ep_implementation": "all_to_all"}
    close(logits(load(whole_directory, "exchange")), expected)

    # Quantised Linears of attention, of which each process holds rows or columns.
    if packed != "none":
        whole = load(packed)
        kinds = set()
        for way in WAYS:
            model = load(packed, way)
            close(logits(model), logits(whole))
            linears = [m for m in model.modules() if isinstance(m, fp4moe.PackedLinear)]
            kinds |= {m.parts[0].kind for m in linears if m.parts}
        assert kinds == {"output rows", "input columns"}, kinds

    for directory in formats:
        whole = load(directory)
        for way in ("tp", "ep"):
            close(logits(load(directory, way)), logits(whole))

    # What belongs to the whole layer is refused by name, before anything changes.
    def refused(call, text):
        try:
            call()
        except fp4moe.errors.Fp4MoeError as error:
            assert text in str(error), error
        else:
            raise AssertionError(text)

    refused(lambda: model.save_pretrained(whole_directory + "_saved"), "(part ")
    assert not os.path.exists(whole_directory + "_saved")
    refused(lambda: fp4moe.calibrate(model).__enter__(), "ranges are those of all of it")
    state = model.state_dict()
    model.load_state_dict(state)
    key = next(key for key in state if key.endswith("experts._extra_state"))
    other = bytes(state[key].tolist()).replace(b"part %d of" % (RANK + 1), b"part %d of" % (2 - RANK))
    state[key] = torch.frombuffer(bytearray(other), dtype=torch.uint8)
    refused(lambda: model.load_state_dict(state), "must equal that of this layer")
    print("all agree")
"""


def test_other_forms_on_two_processes(checkpoint, tmp_path):
    packed = "none"
    try:
        import checkpoint_makers

        checkpoint_makers.save_modelopt("gemma4", tmp_path)
        packed = tmp_path
    except pytest.skip.Exception:
        pass
    uneven = checkpoint("gemma4", None, moe_intermediate_size=48)
    formats = [checkpoint("qwen3_moe", form) for form in ("fp8", "mxfp4")]
    arguments = (checkpoint("qwen3_moe"), uneven, packed, *formats)
    for printed in ranks.run(START + OTHERS, 2, *arguments):
        assert "all agree" in printed

"""FusedExperts: casts and moves, every way to save and load, and compiled graphs that see it."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

from fp4moe import FusedExperts, fused_moe
from fp4moe.errors import ShapeError, UnsupportedError
from fp4moe.testing import make_layer

L, I, H, K = 4, 32, 48, 2  # noqa: E741
KEYS = [
    "gate_up_packed",
    "gate_up_block_scale",
    "gate_up_global_scale",
    "down_packed",
    "down_block_scale",
    "down_global_scale",
    "hidden_scale",
    "intermediate_scale",
    "_extra_state",
]
BUFFERS = [f"prepared_{key}" for key in KEYS[:-1]]


def expert_weights(gated=True, activation="silu", hidden=H, **kwargs):
    return make_layer(L, hidden, I, activation, gated, **kwargs)


def routed(tokens=9, dtype=torch.float32):
    ids = torch.randint(0, L, (tokens, K))
    return torch.randn(tokens, H).to(dtype), ids, torch.rand(tokens, K).to(dtype)


class Block(nn.Module):
    """A float layer before the experts, whose keys come first, and one behind."""

    def __init__(self, weights=None):
        super().__init__()
        self.first = nn.Linear(H, H)
        self.experts = FusedExperts(expert_weights() if weights is None else weights)
        self.last = nn.Linear(H, H)

    def forward(self, x, ids, routing):
        return self.last(self.experts(self.first(x), ids, routing))


def same_bytes(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def assert_same(a: FusedExperts, b: FusedExperts) -> None:
    """Same metadata, kernel, buffers and result."""
    assert (a.metadata, a.kernel, a.requested_kernel) == (b.metadata, b.kernel, b.requested_kernel)
    mine, theirs = dict(a.named_buffers()), dict(b.named_buffers())
    assert list(mine) == list(theirs) == BUFFERS
    assert all(same_bytes(mine[name], theirs[name]) for name in mine)
    args = routed()
    assert torch.equal(a(*args), b(*args))


@pytest.mark.parametrize("kernel", ["auto", "reference", "reference_w4a4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward_is_fused_moe(kernel, dtype):
    weights = expert_weights(num_experts=L + 2, expert_offset=1)
    module = FusedExperts(weights, kernel)
    x, ids, routing = routed(dtype=dtype)
    want = fused_moe(x, weights, ids, routing, kernel=kernel)
    assert torch.equal(module(x, ids, routing), want) and want.dtype == dtype
    # The names of transformers' experts modules.
    named = {"hidden_states": x, "top_k_index": ids, "top_k_weights": routing}
    assert torch.equal(module(**named), want)
    assert module.kernel == ("reference" if kernel == "auto" else kernel)


def test_what_a_module_tells():
    weights = expert_weights(num_experts=L + 2, expert_offset=1)
    module = FusedExperts(weights)
    assert module.num_experts == L + 2
    assert module.nbytes == weights.nbytes
    assert list(module.parameters()) == []
    assert [name for name, _ in module.named_buffers()] == BUFFERS
    assert module.metadata == weights.metadata()
    logical = module.weights
    assert logical.metadata() == weights.metadata()
    tensors, mine = weights.tensors(), logical.tensors()
    assert all(same_bytes(mine[name], tensors[name]) for name in tensors)
    assert repr(module) == (
        "FusedExperts(6 experts of 48 x 32, gated silu, nvfp4, kernel=reference)"
    )
    module = FusedExperts(expert_weights(False, "relu2"), "reference_w4a4")
    assert module.extra_repr() == "4 experts of 48 x 32, relu2, nvfp4, kernel=reference_w4a4"


def test_kernels_that_are_not_there():
    with pytest.raises(UnsupportedError, match=r"^FusedExperts: kernel must be auto or one of .*x"):
        FusedExperts(expert_weights(), "x")
    with pytest.raises(UnsupportedError, match=r"^FusedExperts: kernel .* cannot run this"):
        FusedExperts(expert_weights(), "flashinfer_trtllm")


# Casts, moves, copies.

CASTS = {
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "to(cpu, float16)": lambda m: m.to("cpu", torch.float16),
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "cpu": lambda m: m.cpu(),
    "eval": lambda m: m.eval(),
    "requires_grad_": lambda m: m.requires_grad_(True),
}


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_changes_nothing(cast):
    block = Block()
    before = copy.deepcopy(block.experts)
    places = {name: b.data_ptr() for name, b in block.experts.named_buffers()}
    assert CASTS[cast](block) is block
    assert_same(block.experts, before)
    assert {name: b.data_ptr() for name, b in block.experts.named_buffers()} == places
    assert CASTS[cast](block.experts) is block.experts
    assert_same(block.experts, before)
    wanted = {"half": torch.float16, "bfloat16": torch.bfloat16, "to(bfloat16)": torch.bfloat16}
    assert block.first.weight.dtype == wanted.get(cast, block.first.weight.dtype)


def test_to_meta_and_back():
    module = FusedExperts(expert_weights())
    state = copy.deepcopy(module.state_dict())
    before = copy.deepcopy(module)
    assert module.to("meta") is module
    assert all(b.is_meta for b in module.buffers()) and module.nbytes == before.nbytes
    x, ids, routing = (t.to("meta") for t in routed())
    assert module(x, ids, routing).shape == x.shape
    module.to_empty(device="cpu")
    assert not any(b.is_meta for b in module.buffers())
    module.load_state_dict(state)
    assert_same(module, before)


def test_copies():
    module = FusedExperts(expert_weights(), "reference_w4a4").eval()
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(buffer, weights_only=False),
    ):
        assert_same(other, module)
        assert not other.training
        places = {b.data_ptr() for b in module.buffers()}
        assert places.isdisjoint(b.data_ptr() for b in other.buffers())


# state_dict.


def test_state_dict_is_logical():
    weights = expert_weights()
    module = FusedExperts(weights)
    state = module.state_dict()
    assert list(state) == KEYS
    for name, tensor in weights.tensors().items():
        assert same_bytes(state[name.replace(".", "_")], tensor)
    assert state["gate_up_block_scale"].dtype == torch.float8_e4m3fn
    assert bytes(state["_extra_state"].tolist()).decode() == (
        '{"activation": "silu", "expert_offset": 0, "format": "nvfp4", "gated": true, '
        '"hidden_size": 48, "intermediate_size": 32, "num_experts": 4}'
    )
    block = Block(weights)
    assert [k for k in block.state_dict() if k.startswith("experts.")] == [
        f"experts.{key}" for key in KEYS
    ]
    assert list(block.state_dict(prefix="model."))[2] == "model.experts.gate_up_packed"


def through_torch(state, path):
    torch.save(state, path)
    return torch.load(path, weights_only=True)


def through_safetensors(state, path):
    safetensors.torch.save_file(state, path)
    return safetensors.torch.load_file(path)


@pytest.mark.parametrize(
    "through", [lambda s, p: s, through_torch, through_safetensors], ids=["as is", "torch", "st"]
)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_state_dict_round_trips(through, nested, strict, tmp_path):
    def make():
        return Block() if nested else FusedExperts(expert_weights(activation="gelu"))

    source, target = make(), make()
    mine, theirs = (m.experts if nested else m for m in (target, source))
    assert not same_bytes(mine.gate_up_packed, theirs.gate_up_packed)
    places = {name: b.data_ptr() for name, b in mine.named_buffers()}
    state = through(source.state_dict(), tmp_path / "state")
    result = target.load_state_dict(state, strict=strict)
    assert result.missing_keys == result.unexpected_keys == []
    assert_same(mine, theirs)
    # In place: what compiled graphs and CUDA graphs hold stays valid.
    assert {name: b.data_ptr() for name, b in mine.named_buffers()} == places
    assert places["prepared_down_packed"] != theirs.prepared_down_packed.data_ptr()


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_key_is_reported_as_torch_does(key):
    source, target = Block(), Block()
    state = source.state_dict()
    del state[f"experts.{key}"]
    with pytest.raises(RuntimeError) as error:
        target.load_state_dict(state)
    assert str(error.value) == (
        "Error(s) in loading state_dict for Block:\n\t"
        f'Missing key(s) in state_dict: "experts.{key}". '
    )
    target = Block()
    kept = copy.deepcopy(target.experts)
    result = target.load_state_dict(state, strict=False)
    assert result.missing_keys == [f"experts.{key}"] and result.unexpected_keys == []
    # What is there is loaded, the rest stays.
    for name, buffer in target.experts.named_buffers():
        origin = kept if name == f"prepared_{key}" else source.experts
        assert same_bytes(buffer, origin.get_buffer(name)), name


def test_a_key_that_another_module_misses_does_not_matter():
    source, target = Block(), Block()
    state = source.state_dict()
    del state["first.weight"], state["last.bias"]
    result = target.load_state_dict(state, strict=False)
    assert result.missing_keys == ["first.weight", "last.bias"]
    assert_same(target.experts, source.experts)


def test_no_key_of_the_experts_at_all():
    target = Block()
    before = copy.deepcopy(target.experts)
    result = target.load_state_dict(nn.Linear(H, H).state_dict(prefix="first."), strict=False)
    assert result.missing_keys == [*(f"experts.{k}" for k in KEYS), "last.weight", "last.bias"]
    assert_same(target.experts, before)


def test_unexpected_keys():
    source, target = Block(), Block()
    state = source.state_dict() | {"experts.bias": torch.zeros(1)}
    with pytest.raises(
        RuntimeError, match=r'Unexpected key\(s\) in state_dict: "experts.bias"\. $'
    ):
        target.load_state_dict(state)
    result = target.load_state_dict(state, strict=False)
    assert result.unexpected_keys == ["experts.bias"] and result.missing_keys == []
    assert_same(target.experts, source.experts)


@pytest.mark.parametrize("strict", [True, False])
def test_tensors_of_another_size_or_type_are_refused(strict):
    target = Block()
    before = copy.deepcopy(target.experts)
    state = Block().state_dict()
    state["experts.down_packed"] = torch.zeros(L, H, 8, dtype=torch.uint8)
    state["experts.hidden_scale"] = torch.ones(1, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError) as error:
        target.load_state_dict(state, strict=strict)
    assert str(error.value) == (
        "Error(s) in loading state_dict for Block:\n"
        "\texperts.down_packed must be torch.uint8 [4, 48, 16]; got torch.uint8 [4, 48, 8].\n"
        "\texperts.hidden_scale must be torch.float32 [1]; got torch.bfloat16 [1]."
    )
    assert_same(target.experts, before)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "other",
    [{"activation": "gelu"}, {"num_experts": 9}, {"num_experts": 9, "expert_offset": 2}, "sizes"],
    ids=str,
)
def test_metadata_of_another_layer_is_refused(other, strict):
    if other == "sizes":  # 47 and 48 are stored alike
        weights = expert_weights(hidden=47)
    else:
        weights = expert_weights(**other)
    target = Block()
    before = copy.deepcopy(target.experts)
    with pytest.raises(ShapeError) as error:
        target.load_state_dict(Block().state_dict() | expert_state(weights), strict=strict)
    assert str(error.value) == (
        "FusedExperts.load_state_dict: metadata must equal that of this layer, "
        f"{before.metadata}; got {dict(sorted(weights.metadata().items()))}. "
        "Load into a model that was replaced in the same way."
    )
    assert_same(target.experts, before)


def expert_state(weights):
    return {f"experts.{k}": v for k, v in FusedExperts(weights).state_dict().items()}


@pytest.mark.parametrize("nested", [True, False])
def test_assign_loads_a_module_on_meta(nested):
    def make():
        return Block() if nested else FusedExperts(expert_weights())

    source, target = make(), make().to("meta")
    state = source.state_dict()
    if not nested:
        with pytest.raises(RuntimeError, match="the layer is on the meta device; pass assign=True"):
            target.load_state_dict(state)
    target.load_state_dict(state, assign=True)
    mine, theirs = (m.experts if nested else m for m in (target, source))
    assert_same(mine, theirs)
    assert mine.down_packed.data_ptr() == theirs.down_packed.data_ptr()


def test_assign_with_a_missing_key_keeps_what_is_there():
    source, target = FusedExperts(expert_weights()), FusedExperts(expert_weights())
    kept = target.down_global_scale.clone()
    state = source.state_dict()
    del state["down_global_scale"]
    result = target.load_state_dict(state, strict=False, assign=True)
    assert result.missing_keys == ["down_global_scale"]
    assert torch.equal(target.down_global_scale, kept)
    assert target.down_packed.data_ptr() == source.down_packed.data_ptr()


# Compilers.


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_graph_sees_what_is_loaded(backend, fresh_dynamo):
    block, other = Block(), Block()
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    args = routed()
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), block(*args), rtol=1e-5, atol=1e-4)
        before = compiled(*args)
        block.load_state_dict(other.state_dict())
        with torch.compiler.set_stance("fail_on_recompile"):
            after = compiled(*args)
        torch.testing.assert_close(after, other(*args), rtol=1e-5, atol=1e-4)
        assert not torch.allclose(after, before, rtol=0.1, atol=0.1)


def test_two_layers_share_one_graph(fresh_dynamo):
    """The layers of a model differ in their buffers only, and compile once."""

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=True)
    def apply(module, x, ids, routing):
        return module(x, ids, routing)

    layers = [FusedExperts(expert_weights()) for _ in range(3)]
    apply(layers[0], *routed(5))
    with torch.compiler.set_stance("fail_on_recompile"):
        for layer, tokens in zip(layers, (7, 5, 33), strict=True):
            args = routed(tokens)
            assert torch.equal(apply(layer, *args), layer(*args))


def test_export():
    block = Block()
    tokens = torch.export.Dim("tokens", min=1, max=512)
    program = torch.export.export(
        block, routed(5), dynamic_shapes=({0: tokens}, {0: tokens}, {0: tokens})
    )
    args = routed(31)
    assert torch.equal(program.module()(*args), block(*args))


# On a GPU.


@pytest.mark.gpu
def test_gpu_round_trip():
    module = FusedExperts(expert_weights(), "reference")
    before, args = copy.deepcopy(module), routed()
    module.to("cuda", torch.bfloat16)
    assert all(b.is_cuda for b in module.buffers())
    got = module(*(t.cuda() for t in args))
    torch.testing.assert_close(got.cpu(), before(*args), rtol=1e-4, atol=1e-2)
    places = {name: b.data_ptr() for name, b in module.named_buffers()}
    module.load_state_dict(before.state_dict())  # from the CPU
    assert {name: b.data_ptr() for name, b in module.named_buffers()} == places
    assert_same(module.cpu(), before)

"""ExpertWeights, the reference kernels and the operator `moe` in every number format."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from refusals import assert_refused
from safetensors.torch import load_file, save_file
from torch.library import opcheck
from transformers import Gemma4TextConfig, NemotronHConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from fp4moe import FusedExperts, fused_moe
from fp4moe.activations import get_activation
from fp4moe.arguments import MoeArguments, Settings
from fp4moe.experts import ExpertWeights
from fp4moe.formats import FORMATS
from fp4moe.fused import _prepared
from fp4moe.kernels import KERNELS
from fp4moe.reference import moe_definition
from fp4moe.testing import float_weights, make_layer, relative_error

OP = torch.ops.fp4moe.moe.default
every_format = pytest.mark.parametrize("format", FORMATS)
every_form = pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
# Gemma4's and Nemotron's intermediate sizes: 5.5 and 14.5 blocks of 128.
SIZES = (704, 1856)


@functools.cache
def layer(format, intermediate=704, gated=True, biased=True, hidden=200):
    activation = "silu" if gated else "relu2"
    generator = torch.Generator().manual_seed(0)
    sizes = {"experts": 3, "hidden_size": hidden, "intermediate_size": intermediate}
    options = {"dtype": torch.bfloat16, "generator": generator, "biased": biased}
    return make_layer(**sizes, activation=activation, gated=gated, format=format, **options)


def routed(tokens=7, experts=3, hidden=200):
    x = torch.randn(tokens, hidden)
    return x, torch.randint(0, experts, (tokens, 2)), torch.rand(tokens, 2)


def assert_same_tensors(got: ExpertWeights, want: ExpertWeights) -> None:
    assert got.metadata() == want.metadata()
    for (name, ours), (other, theirs) in zip(
        got.tensors().items(), want.tensors().items(), strict=True
    ):
        assert (name, ours.dtype, ours.shape) == (other, theirs.dtype, theirs.shape)
        pair = (t.contiguous().view(torch.uint8) for t in (ours, theirs))
        assert torch.equal(*pair), name


def bytes_of(matrix):
    return {k: t.contiguous().view(torch.uint8) for k, t in matrix.parts().items() if t.numel()}


@every_format
@every_form
@pytest.mark.parametrize("intermediate", SIZES)
def test_gate_and_up_are_quantised_each_on_its_own(format, gated, intermediate):
    """No block holds rows of both: the stored halves are those of the two matrices alone."""
    number_format, halves = FORMATS[format], ("gate", "up") if gated else ("up",)
    floats = float_weights(2, 96, intermediate, gated, dtype=torch.bfloat16)
    activation = "silu" if gated else "relu2"
    weights = ExpertWeights.quantize(**floats, activation=activation, format=format)
    assert weights.intermediate_padded == intermediate and weights.hidden_padded == 96
    for expert in range(2):
        ends = torch.stack([e for n in halves for e in floats[n][expert].float().aminmax()])
        shared = number_format.shared_scale(ends)
        alone = [number_format.quantize(floats[n][expert], shared, "max") for n in halves]
        for part in ("packed", "block_scale"):
            stored = getattr(weights.gate_up, part)[expert]
            want = torch.cat([getattr(one, part).view(torch.uint8) for one in alone])
            assert torch.equal(stored.view(torch.uint8), want)
        decoded = weights.slice_experts(expert, expert + 1).dequantize()
        for name, one in zip(halves, alone, strict=True):
            assert torch.equal(decoded[name][0], number_format.dequantize(one, torch.float32))


def test_blocks_of_gate_and_up_where_rounding_up_hides_the_halves():
    # 96 rows each: two blocks, as many as 192 rows in one matrix have. Only the halves tell.
    weights = make_layer(1, 64, 96, format="fp8_block")
    assert weights.gate_up.block_scale.shape == (1, 2, 1)
    gate, up = weights.gate_up.block_scale[0, :, 0]
    decoded = weights.dequantize()
    assert gate != up
    assert torch.equal(decoded["gate"][0], weights.gate_up.packed[0, :96].float() * gate)
    assert torch.equal(decoded["up"][0], weights.gate_up.packed[0, 96:].float() * up)


@every_format
def test_the_error_of_every_element_is_within_half_a_step(format):
    floats = float_weights(2, 200, 704, dtype=torch.bfloat16)
    weights = ExpertWeights.quantize(**floats, activation="silu", format=format)
    # Half a step: 1/16 of a value in e4m3, a sixth of the block's largest (4 to 6) in e2m1. The
    # largest codes of a power-of-two scale are all reached; e4m3 scales and a bfloat16 quotient
    # round once more, by 1/16 and 2^-9. Subnormal e4m3 codes have steps of 2^-9 of the scale.
    for name, got in weights.dequantize().items():
        want = floats[name].float()
        error, amax = (got - want).abs(), want.abs().amax((1, 2), keepdim=True)
        if "4" in format:
            columns = want.shape[2]
            size = FORMATS[format].scales.columns
            blocks = torch.nn.functional.pad(want, (0, -columns % size)).unflatten(2, (-1, size))
            largest = blocks.abs().amax(3).repeat_interleave(size, 2)[..., :columns]
            assert (error <= largest * (1 / 6 + 1 / 16 + 0.02)).all()
        else:
            assert (error <= want.abs() * (1 / 16 + 2.0**-8) + amax / 448 * 2.0**-9).all()


@pytest.mark.slow
@every_format
@every_form
def test_padding_is_exact_and_is_undone(format, gated):
    weights = layer(format, gated=gated)
    for hidden, intermediate in ((256, 768), (128, 128), (1, 896), (512, 1)):
        padded = weights.padded(hidden_multiple=hidden, intermediate_multiple=intermediate)
        assert padded.hidden_padded % hidden == padded.intermediate_padded % intermediate == 0
        shapes = FORMATS[format].shapes(
            3, (1 + gated) * padded.intermediate_padded, padded.hidden_padded, 1 + gated
        )
        for part, tensor in padded.gate_up.parts().items():
            assert (tensor.dtype, tuple(tensor.shape)) == shapes[part]
        for name, part in padded.dequantize().items():
            assert torch.equal(part, weights.dequantize()[name])
        assert_same_tensors(padded.unpadded(), weights)
        x, ids, routing = routed()
        for kernel in ("reference", "reference_w4a4"):
            got = fused_moe(x, padded, ids, routing, kernel=kernel)
            want = fused_moe(x, weights, ids, routing, kernel=kernel)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@every_format
def test_odd_sizes_are_padded_to_the_multiple(format):
    floats = float_weights(2, 40, 27, biased=True)
    weights = ExpertWeights.quantize(**floats, activation="silu", format=format)
    multiple = FORMATS[format].multiple
    want = (-(-40 // multiple) * multiple, -(-27 // multiple) * multiple)
    assert (weights.hidden_padded, weights.intermediate_padded) == want
    whole = make_layer(2, *want, format=format)
    assert set(weights.tensors()) - {"gate_up.bias", "down.bias"} == set(whole.tensors())
    for name, part in weights.dequantize().items():
        assert part.shape == floats[name].shape


@pytest.mark.slow
@every_format
@every_form
@pytest.mark.parametrize(("intermediate", "cuts"), [(704, (128, 384)), (1856, (1024, 1792))])
def test_slices_of_the_intermediate_sum_to_the_whole(format, gated, intermediate, cuts):
    weights = layer(format, intermediate, gated)
    x, ids, routing = routed()
    whole = fused_moe(x, weights, ids, routing, kernel="reference")
    ends = (0, *cuts, intermediate)
    slices = [weights.slice_intermediate(a, b) for a, b in itertools.pairwise(ends)]
    for name in ("gate", "up", "down") if gated else ("up", "down"):
        axis = 2 if name == "down" else 1
        pieces = torch.cat([piece.dequantize()[name] for piece in slices], axis)
        assert torch.equal(pieces, weights.dequantize()[name])
    summed = sum(fused_moe(x, piece, ids, routing, kernel="reference") for piece in slices)
    torch.testing.assert_close(summed, whole, rtol=1e-5, atol=1e-5)


def test_a_slice_that_cuts_a_block_is_refused():
    assert_refused(
        lambda: layer("fp8_block").slice_intermediate(0, 352),
        "slice_intermediate: start and stop must be multiples of 128 with 0 <= start < stop <= 704;"
        " got 0 and 352. Move them to a block boundary.",
    )
    for format, multiple in (("fp8", 16), ("fp8_channel", 16), ("mxfp8", 32), ("mxfp4", 32)):
        layer(format).slice_intermediate(multiple, 3 * multiple)
        with pytest.raises(ValueError, match=f"be multiples of {multiple} with"):
            layer(format).slice_intermediate(0, multiple + 8)


@every_format
def test_experts_are_sliced_moved_and_stored(format):
    weights = layer(format)
    part = weights.slice_experts(1, 3)
    assert (part.expert_offset, part.local_experts, part.num_experts) == (1, 2, 3)
    for name, tensor in part.dequantize().items():
        assert torch.equal(tensor, weights.dequantize()[name][1:3])
    assert part.gate_up.packed.data_ptr() == weights.gate_up.packed[1].data_ptr()
    assert_same_tensors(ExpertWeights.from_state_dict(weights.state_dict()), weights)
    assert_same_tensors(ExpertWeights.from_tensors(weights.tensors(), weights.metadata()), weights)
    assert_same_tensors(weights.to("cpu"), weights)
    on_meta = weights.to("meta")
    assert {t.shape for t in on_meta.tensors().values()} == {
        t.shape for t in weights.tensors().values()
    }


def test_scales_of_the_fused_rows_are_refused():
    """2 x 704 rows in one tensor have 11 blocks; one of them would hold rows of gate and of up."""
    state = layer("fp8_block").state_dict()
    state["gate_up.block_scale"] = state["gate_up.block_scale"][:, :11]
    assert_refused(
        lambda: ExpertWeights.from_state_dict(state),
        "ExpertWeights: gate_up.block_scale must be torch.float32 [3, 12, 2] on cpu; got "
        "torch.float32 [3, 11, 2] on cpu. Build it with ExpertWeights.quantize.",
    )


@every_format
def test_a_write_to_the_weights_shows_at_the_next_call(format):
    weights, (x, ids, routing) = make_layer(3, 200, 128, format=format, biased=True), routed()
    before = fused_moe(x, weights, ids, routing, kernel="reference")
    # The operator reads these very tensors: nothing has to be watched.
    assert _prepared[weights]["reference"].pairs == []
    assert torch.equal(fused_moe(x, weights, ids, routing, kernel="reference"), before)
    weights.down.packed.data.view(torch.uint8).zero_()
    after = fused_moe(x, weights, ids, routing, kernel="reference")
    bias = torch.einsum("tk,tkh->th", routing, weights.down_bias[ids])[:, :200]
    torch.testing.assert_close(after, bias)


@every_format
def test_a_module_of_each_format(format, tmp_path):
    weights, (x, ids, routing) = layer(format), routed()
    module = FusedExperts(weights, kernel="reference")
    want = module(x, ids, routing)
    assert torch.equal(want, fused_moe(x, weights, ids, routing, kernel="reference"))
    state = module.state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "experts.safetensors")
    other = FusedExperts(make_layer(3, 200, 704, format=format, biased=True), kernel="reference")
    other.to(torch.float16)
    other.load_state_dict(load_file(tmp_path / "experts.safetensors"))
    assert_same_tensors(other.weights, weights)
    assert torch.equal(other(x, ids, routing), want)


@every_format
@pytest.mark.parametrize("form", ["silu", "gelu_tanh", "relu2"])
def test_the_definition_is_what_transformers_computes_of_the_decoded_weights(format, form):
    gated = form != "relu2"
    weights = make_layer(4, 48, 80, "gelu_tanh" if gated else "relu2", gated, format=format)
    decoded = weights.dequantize()
    sizes = {"hidden_size": 48, "moe_intermediate_size": 80}
    if gated:
        name = "gelu_pytorch_tanh" if form == "gelu_tanh" else "silu"
        config = Gemma4TextConfig(**sizes, num_experts=4, hidden_activation=name)
        module = Gemma4TextExperts(config)
        first = torch.cat((decoded["gate"], decoded["up"]), 1)
        module.gate_up_proj.data = first
    else:
        config = NemotronHConfig(**sizes, n_routed_experts=4, layers_block_type=["moe"])
        module = NemotronHExperts(config)
        module.up_proj.data = decoded["up"]
    module.down_proj.data = decoded["down"]
    state = weights.state_dict()
    state["metadata"]["activation"] = form
    weights = ExpertWeights.from_state_dict(state)
    x, ids, routing = routed(33, 4, 48)
    ids = torch.rand(33, 4).argsort(1)[:, :2]
    with torch.no_grad():
        theirs = module.eval()(x, ids, routing)
    ours = fused_moe(x, weights, ids, routing, kernel="reference")
    # Both sum up to 80 float32 products in orders of their own: 80 x 2^-24 = 5e-6 at most, some
    # 80^0.5 x 2^-24 = 5e-7 on average.
    assert relative_error(ours, theirs) < 1e-6


@every_format
@every_form
def test_rounded_activations_by_hand(format, gated):
    weights, (x, ids, routing) = layer(format, gated=gated), routed()
    number_format, parts = FORMATS[format], weights.dequantize()
    x = x.bfloat16().float()
    rounded = number_format.round_activation(x, weights.hidden_scale)
    want = torch.zeros(7, 200)
    for token, slot in itertools.product(range(7), range(2)):
        e = int(ids[token, slot])
        up = rounded[token] @ parts["up"][e].T + parts["up_bias"][e]
        if gated:
            gate = rounded[token] @ parts["gate"][e].T + parts["gate_bias"][e]
            inner = gate * gate.sigmoid() * up
        else:
            inner = up.clamp(min=0) ** 2
        inner = number_format.round_intermediate(inner[None], weights.intermediate_scale[e])[0]
        y = (inner @ parts["down"][e].T + parts["down_bias"][e]).bfloat16().float()
        want[token] += routing[token, slot] * y
    got = fused_moe(x, weights, ids, routing, kernel="reference_w4a4")
    # A sum near a tie of bfloat16 or of the format may go the other way: 2^-8 of few elements.
    assert relative_error(got, want) < 2e-3


# Relative root mean square of the rounding of one tensor. A step of e4m3 is 2^-3 of the lower end
# of its binade: 2^-3 / 12^0.5 of it, half of that of the upper end. e2m1 with a fitting scale has
# steps of 0.5 to 2 for values of 1.4 to 2.7: 0.5 / 12^0.5 / 2.7 and more, below 0.5 / 12^0.5.
E4M3, E2M1 = (0.018, 0.036), (0.053, 0.144)


@every_format
@every_form
def test_accuracy(format, gated):
    """The error of the output is that of the roundings, whose squares add up."""
    experts, hidden, intermediate = 2, 320, 352
    number_format, activation = FORMATS[format], "gelu_tanh" if gated else "relu2"
    sizes = {"gate": (intermediate, hidden)} if gated else {}
    sizes |= {"up": (intermediate, hidden), "down": (hidden, intermediate)}
    floats = {name: torch.randn(experts, *size) * 0.02 for name, size in sizes.items()}
    x, ids, routing = routed(64, experts, hidden)
    exact = moe_definition(x, ids, routing, **floats, activation=activation)
    first = {n: torch.einsum("th,eih->tei", x, floats[n]) for n in floats if n != "down"}
    inner = get_activation(activation).combine(first["up"], first.get("gate"))
    # The scales that calibration would find.
    scales = {}
    if largest := number_format.activation_range:
        ends = {"hidden_scale": x, "intermediate_scale": inner}
        scales = {name: value.abs().max() / largest for name, value in ends.items()}
    weights = ExpertWeights.quantize(**floats, activation=activation, format=format, **scales)
    found = {
        kernel: relative_error(fused_moe(x, weights, ids, routing, kernel=kernel), exact)
        for kernel in ("reference", "reference_w4a4")
    }
    print(format, "gated" if gated else "plain", {k: f"{v:.2%}" for k, v in found.items()})
    of_weight = relative_error(weights.dequantize()["up"], floats["up"])
    of_input = relative_error(number_format.round_activation(x, weights.hidden_scale), x)
    least, most = E2M1 if "4" in format else E4M3
    assert least < of_weight < most
    least, most = E2M1 if format == "nvfp4" else E4M3
    assert least < of_input < most
    # gate, up and down add one each. relu2 makes 2 u d of an error d of u; for normal u the squares
    # of both, against that of the output, are 4 u^2 d^2 / u^4 = 4 / 3 of that of d against u.
    added = 3 if gated else 4 / 3 + 1
    # The slope of gelu near 0, and that its values are not evenly spread, are within this margin.
    assert found["reference"] == pytest.approx(added**0.5 * of_weight, rel=0.15)
    both = added**0.5 * (of_weight**2 + of_input**2) ** 0.5
    assert found["reference_w4a4"] == pytest.approx(both, rel=0.15)


@every_format
@pytest.mark.parametrize("kernel", ["reference", "reference_w4a4"])
@pytest.mark.parametrize("biased", [True, False], ids=["biases", "no biases"])
def test_the_operator(format, kernel, biased):
    weights, (x, ids, routing) = layer(format, biased=biased), routed()
    prepared = KERNELS[kernel].prepare(weights, hidden_alignment=256)
    operands = prepared.operands
    if not biased:
        none = torch.empty(0, dtype=torch.float32)
        operands = operands._replace(gate_up_bias=none, down_bias=none)
    settings = Settings.of_layer(prepared.layer, kernel)
    given = MoeArguments(x, ids, routing, operands, settings)
    named = {**given.operands.named(), "hidden": x, "expert_ids": ids, "routing_weights": routing}
    schema = [argument.name for argument in OP._schema.arguments]
    values = settings._asdict() | named
    args = tuple(values[name] for name in schema)
    assert torch.equal(OP(*args), fused_moe(x, weights, ids, routing, kernel=kernel))
    assert opcheck(OP, args) == dict.fromkeys(
        (
            *("test_schema", "test_autograd_registration", "test_faketensor"),
            "test_aot_dispatch_dynamic",
        ),
        "SUCCESS",
    )
    with pytest.raises(ValueError, match=r"^(nvfp4_)?moe: gate_up_packed must be"):
        wrong = dict(zip(schema, args, strict=True))
        wrong["gate_up_packed"] = wrong["gate_up_packed"][:, :-1]
        OP(*wrong.values())


@pytest.mark.gpu
@every_format
def test_gpu_has_the_same_bytes_and_the_same_layer(format):
    floats = float_weights(3, 200, 704, biased=True, dtype=torch.bfloat16)
    on_gpu = {name: w.cuda() for name, w in floats.items()}
    weights = ExpertWeights.quantize(**floats, activation="silu", format=format)
    assert_same_tensors(
        ExpertWeights.quantize(**on_gpu, activation="silu", format=format).to("cpu"), weights
    )
    moved = weights.to("cuda")
    for name, part in moved.dequantize().items():
        assert torch.equal(part.cpu(), weights.dequantize()[name])
    x, ids, routing = routed(33)
    number_format, scale = FORMATS[format], weights.hidden_scale
    rounded = number_format.round_activation(x.cuda(), scale.cuda()).cpu()
    assert torch.equal(rounded, number_format.round_activation(x, scale))
    for kernel in ("reference", "reference_w4a4"):
        want = fused_moe(x, weights, ids, routing, kernel=kernel)
        got = fused_moe(x.cuda(), moved, ids.cuda(), routing.cuda(), kernel=kernel).cpu()
        # Other orders of the sums, and what is near a tie then; TF32 is off by default.
        assert relative_error(got, want) < 5e-3

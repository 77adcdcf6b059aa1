"""calibrate: ranges against those that Hugging Face's own loop shows, and where they end up."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import logging

import pytest
import torch
from tiny_models import (
    MODELS,
    Block,
    enlarge_experts,
    experts_class,
    fingerprint,
    gemma4,
    qwen3_moe,
    routed,
)
from torch import nn
from torch.overrides import TorchFunctionMode
from trained_models import training_script

import fp4moe
from fp4moe.calibration.calibrate import scales_from_text
from fp4moe.calibration.ranges import Ranges
from fp4moe.errors import CheckpointError, ShapeError, UnsupportedError
from fp4moe.kernels import KERNELS, get_kernel
from fp4moe.testing import make_layer, relative_error

# A global scale times the largest block scale and code.
LARGEST = 448 * 6
# Both sides are float32 sums of at most 64 products, in another order.
CLOSE = {"rtol": 1e-5, "atol": 0.0}


class DownInputs(TorchFunctionMode):
    """Largest inputs of F.linear by weight, seen where transformers' eager loop calls it."""

    def __init__(self, model):
        super().__init__()
        self.largest = {}
        self.names = {}
        for name, parameter in model.named_parameters():
            for expert, weight in enumerate(parameter.detach() if parameter.ndim == 3 else ()):
                self.names[weight.data_ptr()] = (name, expert)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is nn.functional.linear and (key := self.names.get(args[1].data_ptr())):
            largest = args[0].abs().max()
            self.largest[key] = max(largest, self.largest.get(key, largest))
        return function(*args, **(kwargs or {}))


def tokens(count=40, seed=3):
    return torch.randint(1, 128, (2, count), generator=torch.Generator().manual_seed(seed))


def calibrated(model, *batches, **options):
    with fp4moe.calibrate(model, **options) as report, torch.no_grad():
        for batch in batches:
            model(batch)
    return report


def fused_modules(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, fp4moe.FusedExperts)}


@pytest.mark.parametrize("name", list(MODELS))
def test_ranges_are_those_of_the_eager_loop(name):
    model = enlarge_experts(MODELS[name]("eager"))
    batches = tokens(), tokens(seed=4)
    with DownInputs(model) as seen, torch.no_grad():
        for batch in batches:
            model(batch)
    for implementation in ("grouped_mm", "eager"):
        model.set_experts_implementation(implementation)
        report = calibrated(model, *batches)
        assert len(report.blocks) == 2 and not report.uncalibrated
        for block in report.blocks:
            path = block.path
            first = "up_proj" if name.startswith("nemotron") else "gate_up_proj"
            assert all(block.tokens), "each expert is hit, so that each range is its own"
            hidden = max(seen.largest[f"{path}.{first}", e] for e in range(8))
            inner = [seen.largest[f"{path}.down_proj", e].item() for e in range(8)]
            torch.testing.assert_close(block.hidden_range, hidden.item(), **CLOSE)
            torch.testing.assert_close(list(block.intermediate_ranges), inner, **CLOSE)
            assert block.hidden_scale == block.hidden_range / LARGEST
            assert sum(block.tokens) == sum(b.numel() for b in batches) * 2


@pytest.mark.parametrize("offset", [0, 2])
def test_ranges_of_fused_experts_are_those_of_their_own_weights(offset):
    weights = make_layer(4, 64, 48, num_experts=4 + offset, expert_offset=offset)
    module = fp4moe.FusedExperts(weights)
    x, ids = torch.randn(30, 64), torch.randint(-1, 4 + offset, (30, 2))
    with fp4moe.calibrate(module) as report:
        module(hidden_states=x, top_k_index=ids, top_k_weights=torch.rand(30, 2))
    # Every token through every expert, then a mask: another way to the same numbers.
    w = weights.dequantize()
    gate, up = (torch.einsum("th,eih->tei", x, w[part]) for part in ("gate", "up"))
    hit = (ids.unsqueeze(2) == torch.arange(offset, 4 + offset)).any(1)
    inner = torch.where(hit.unsqueeze(2), nn.functional.silu(gate) * up, 0.0).abs().amax((0, 2))
    hidden = x[hit.any(1)].abs().max()
    (block,) = report.blocks
    assert block.tokens == tuple(hit.sum(0).tolist())
    expected = torch.cat((hidden.reshape(1), inner)) / LARGEST
    actual = torch.cat(module.activation_scales())
    torch.testing.assert_close(actual, expected, **CLOSE)


def test_scales_survive_packing_saving_moving_and_casting():
    model = qwen3_moe(dtype=torch.bfloat16)
    report = calibrated(model, tokens())
    assert "activation ranges are calibrated" in str(fp4moe.explain(model))
    fp4moe.replace_moe(copy.deepcopy(model), progress=False)  # a copy has them, too
    fp4moe.replace_moe(model, kernel="reference_w4a4", progress=False)
    assert "not calibrated" not in str(fp4moe.explain(model))
    other = qwen3_moe(dtype=torch.bfloat16)
    fp4moe.replace_moe(other, kernel="reference_w4a4", progress=False)
    assert "not calibrated" in str(fp4moe.explain(other))
    other.load_state_dict(model.state_dict())
    other.to(torch.float16).to(torch.bfloat16)
    for block in report.blocks:
        scales = torch.tensor([block.hidden_scale, *block.intermediate_scale])
        for replaced in (model, other):
            module = fused_modules(replaced)[block.path]
            assert torch.equal(torch.cat(module.activation_scales()), scales)
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, other(tokens()).logits)


def test_a_registered_implementation_packs_with_the_scales(registered):
    model = qwen3_moe()
    report = calibrated(model, tokens())
    model.set_experts_implementation("fp4moe")
    with torch.no_grad():
        model(tokens())
    for block, module in zip(report.blocks, fused_modules(model).values(), strict=True):
        assert module.activation_scales()[0].item() == pytest.approx(block.hidden_scale)


@pytest.mark.parametrize("kernel", [n for n, k in KERNELS.items() if "nvfp4" in k.layouts])
def test_every_kernels_layout_takes_new_scales(kernel):
    weights = make_layer(4, 256, 128)
    scales = {"hidden_scale": torch.rand(1), "intermediate_scale": torch.rand(4)}
    layout = functools.partial(get_kernel(kernel).prepare, hidden_alignment=256)
    restore = get_kernel(kernel).restore
    # What set_activation_scales does; the module itself would want the kernel's GPU.
    again = layout(dataclasses.replace(restore(layout(weights)), **scales))
    expected = weights.tensors() | scales
    for name, tensor in restore(again).tensors().items():
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name


def test_scales_that_make_no_sense_are_refused():
    module = fused_modules(fp4moe.replace_moe(qwen3_moe(), progress=False))
    module = module["model.layers.0.mlp.experts"]
    before = torch.cat(module.activation_scales())
    for scales in ((0.0, 1.0), (1.0, float("nan")), (1.0, torch.ones(3)), (torch.ones(2), 1.0)):
        with pytest.raises(ShapeError, match=r"FusedExperts\.set_activation_scales: .*_scale must"):
            module.set_activation_scales(*scales)
    assert torch.equal(torch.cat(module.activation_scales()), before)


@pytest.mark.parametrize(("size", "outlier"), [(0.02, 4.0), (200.0, 20.0)])
def test_calibration_lowers_the_w4a4_error(size, outlier):
    # Inputs far from 1, one of whose channels is much larger than the others.
    torch.manual_seed(0)
    weights = make_layer(8, 64, 48, "gelu_tanh")
    x, ids, routing = routed(200)
    x = x * size
    x[:, 5] *= outlier
    exact = fp4moe.fused_moe(x, weights, ids, routing, kernel="reference")
    module = fp4moe.FusedExperts(weights, "reference_w4a4")
    before = relative_error(module(x, ids, routing), exact)
    with fp4moe.calibrate(module):
        module(x, ids, routing)
    after = relative_error(module(x, ids, routing), exact)
    # Two roundings to 4 bits of about 10 % each, added in quadrature, and some room.
    assert after < 0.18
    # Uncalibrated, blocks below 6 / 1024 become 0 and values above 6 * 448 are cut off.
    assert before > 1.5 * after


def test_an_expert_without_tokens_gets_the_largest_range_of_the_others(caplog):
    block = Block(experts_class())
    hidden, ids, routing = routed(40, experts=5)
    with caplog.at_level(logging.WARNING, "fp4moe"), fp4moe.calibrate(block) as report:
        assert report.blocks == ()
        block(hidden, ids, routing)
    (found,) = report.blocks
    assert found.tokens[5:] == (0, 0, 0) and 0 not in found.tokens[:5]
    assert set(found.intermediate_ranges[5:]) == {max(found.intermediate_ranges[:5])}
    assert "3 of 8 experts saw no token" in caplog.text
    assert "3 of 8" in str(report)


def test_a_block_that_never_runs_stays_uncalibrated(caplog):
    used, unused = Block(experts_class()), Block(experts_class())
    model = nn.ModuleDict({"used": used, "unused": unused})
    with caplog.at_level(logging.WARNING, "fp4moe"), fp4moe.calibrate(model) as report:
        used(*routed(40))
    assert report.uncalibrated == ("unused.experts",)
    assert "unused.experts saw no token" in caplog.text
    fp4moe.replace_moe(model, progress=False)
    assert unused.experts.activation_scales()[0] == 1 != used.experts.activation_scales()[0]


def test_transposed_experts():
    block = Block(experts_class(is_transposed=True))
    hidden, ids, routing = routed(40)
    with fp4moe.calibrate(block) as report:
        block(hidden, ids, routing)
    both = torch.einsum("th,ehr->ter", hidden, block.experts.gate_up_proj)
    inner = nn.functional.silu(both[..., :48]) * both[..., 48:]
    hit = (ids.unsqueeze(2) == torch.arange(8)).any(1).unsqueeze(2)
    expected = torch.where(hit, inner, 0.0).abs().amax((0, 2)).tolist()
    torch.testing.assert_close(list(report.blocks[0].intermediate_ranges), expected, **CLOSE)


def clamped_gate(self, gate_up):
    gate, up = gate_up[..., ::2].clamp(max=1.5), gate_up[..., 1::2].clamp(-1.5, 1.5)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


@pytest.mark.parametrize("fused", [False, True])
def test_biased_experts_with_a_clamp(fused):
    experts = experts_class(is_transposed=True, is_concatenated=False, has_bias=True)
    experts._apply_gate = clamped_gate
    block = Block(experts)
    first, bias = block.experts.gate_up_proj.mT, block.experts.gate_up_proj_bias
    if fused:
        fp4moe.replace_moe(block, kernel="reference", progress=False)
        parts = block.experts.weights.dequantize()
        first = torch.stack((parts["gate"], parts["up"]), 2).flatten(1, 2)
    hidden, ids, routing = routed(40)
    with fp4moe.calibrate(block) as report:
        block(hidden, ids, routing)
    inner = clamped_gate(None, torch.einsum("th,erh->ter", hidden, first) + bias)
    hit = (ids.unsqueeze(2) == torch.arange(8)).any(1).unsqueeze(2)
    expected = torch.where(hit, inner, 0.0).abs().amax((0, 2)).tolist()
    torch.testing.assert_close(list(report.blocks[0].intermediate_ranges), expected, **CLOSE)


class ListExpert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj = nn.Linear(64, 48, bias=False)
        self.down_proj = nn.Linear(48, 64, bias=False)

    def forward(self, x):
        return self.down_proj(torch.relu(self.up_proj(x)).square())


class ListBlock(nn.Module):
    """Softmax routing, top 2, in a loop over a ModuleList."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(64, 4, bias=False)
        self.experts = nn.ModuleList(ListExpert() for _ in range(4))

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, 64)
        weights, ids = self.gate(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            token, slot = (ids == index).nonzero(as_tuple=True)
            out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out.reshape(hidden_states.shape)


def test_a_list_of_expert_mlps():
    model = nn.Sequential(ListBlock()).requires_grad_(False)
    x = torch.randn(2, 20, 64)
    with fp4moe.calibrate(model) as report:
        model(x)
    flat, block = x.reshape(-1, 64), model[0]
    ids = block.gate(flat).topk(2).indices
    expected = []
    for index, expert in enumerate(block.experts):
        rows = flat[(ids == index).any(1)]
        expected.append((torch.relu(rows @ expert.up_proj.weight.T) ** 2).max().item())
    (found,) = report.blocks
    assert sum(found.tokens) == 80 and found.hidden_range == x.abs().max().item()
    torch.testing.assert_close(list(found.intermediate_ranges), expected, **CLOSE)
    fp4moe.replace_moe(model, progress=False)
    scales = torch.cat(model[0].experts.activation_scales())
    assert torch.equal(scales, torch.tensor([found.hidden_scale, *found.intermediate_scale]))


def test_experts_behind_fused_routers():
    given, fused = enlarge_experts(gemma4()), enlarge_experts(gemma4())
    fp4moe.replace_moe(given, progress=False)
    fp4moe.replace_moe(fused, progress=False, routing="fused")
    reports = [calibrated(model, tokens()) for model in (given, fused)]
    for one, other in zip(*(report.blocks for report in reports), strict=True):
        assert one.tokens == other.tokens
        torch.testing.assert_close(one.intermediate_ranges, other.intermediate_ranges, **CLOSE)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_model_is_calibrated_in_eager_and_sees_the_scales_without_recompiling():
    model = enlarge_experts(qwen3_moe())
    fp4moe.replace_moe(model, kernel="reference_w4a4", progress=False)
    twin, graphs = copy.deepcopy(model), []

    def backend(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        before = compiled(tokens()).logits
    reports = [calibrated(m, tokens()) for m in (compiled, twin)]
    ranges = [
        [(b.tokens, b.hidden_range, b.intermediate_ranges) for b in r.blocks] for r in reports
    ]
    assert ranges[0] == ranges[1]
    with torch.no_grad():
        after = compiled(tokens()).logits
        # The same operator on the same bytes.
        assert torch.equal(after, model(tokens()).logits)
    assert len(graphs) == 1 and not torch.equal(before, after)


@pytest.mark.parametrize("replaced", [False, True])
def test_an_exception_leaves_the_model_as_it_was(replaced):
    model = qwen3_moe()
    if replaced:
        fp4moe.replace_moe(model, progress=False)
    before = fingerprint(model)
    with pytest.raises(KeyError, match="mine"), fp4moe.calibrate(model) as report:
        model(tokens())
        raise KeyError("mine")
    assert fingerprint(model) == before and report.blocks == ()
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert "fp4moe_activation_scales" not in vars(module)


def test_what_cannot_be_calibrated_is_refused():
    model = qwen3_moe()
    for percentile in (0, -1, 100.5, float("nan")):
        with pytest.raises(ShapeError, match="percentile must be above 0 and at most 100"):
            calibrated(model, percentile=percentile)
    with pytest.raises(UnsupportedError, match="no token reached any of the 2 blocks"):
        calibrated(model)
    with pytest.raises(UnsupportedError, match="Linear cannot be calibrated"):
        calibrated(nn.Linear(2, 2))
    with pytest.raises(UnsupportedError, match="a norm behind each expert"):
        calibrated(Block(experts_class(has_post_expert_norm=True)))
    block = Block(experts_class())
    for value, message in ((float("nan"), "largest input of nan"), (0.0, "largest input of 0")):
        with pytest.raises(ShapeError, match=message), fp4moe.calibrate(block):
            block(torch.full((4, 64), value), *routed(4)[1:])
    exported = torch.export.export(block, routed(4))
    with pytest.raises(UnsupportedError, match="no token"), fp4moe.calibrate(block):
        exported.module()(*routed(4))


@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.9, 100.0])
def test_a_percentile_is_rounded_up_by_less_than_a_sixteenth(percentile):
    values = torch.randn(3, 5000) * torch.tensor([[1e-4], [1.0], [300.0]])
    values[0, :2500] = 0  # zeros do not count
    whole, parts = Ranges(3, percentile), Ranges(3, percentile)
    for row in range(3):
        whole.add(row, values[row])
        for part in values[row].flip(0).view(10, 500).to(torch.float64):
            parts.add(row, part)
    for row, found in enumerate(whole.values().tolist()):
        ordered = values[row][values[row] != 0].abs().sort().values
        exact = ordered[-(-int(len(ordered) * percentile) // 100) - 1].item()
        assert exact <= found <= min(exact * (1 + 1 / 16), ordered[-1].item())
    assert torch.equal(whole.values(), parts.values())


def test_a_percentile_leaves_outliers_out():
    model = enlarge_experts(qwen3_moe())
    largest = calibrated(model, tokens())
    fewer = calibrated(model, tokens(), percentile=99.0)
    for one, other in zip(largest.blocks, fewer.blocks, strict=True):
        # The 99th percentile of a Gaussian is 2.6 deviations; the largest of 5120 is 3.5 or more.
        assert other.hidden_range < 0.85 * one.hidden_range
        assert all(
            b <= a for a, b in zip(one.intermediate_ranges, other.intermediate_ranges, strict=True)
        )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An untrained small NemotronH as the training script writes it."""
    script, folder = training_script(), tmp_path_factory.mktemp("saved")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        script.save(script.nemotron_h(), folder)
    return folder


@pytest.mark.slow
def test_scales_from_text(saved, tmp_path):
    lines = ["import os\nprint(os)\n", "", "x" * 100, "ä" * 50]
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": line}) for line in lines) + "\n\n", "utf-8")
    scales = scales_from_text(saved, text, length=64, device="cpu", progress=False)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    batches = [torch.tensor([list(line.encode()[:64])]) for line in lines if line]
    report = calibrated(model, *batches)
    assert sum(report.blocks[0].tokens) == 4 * (len(lines[0]) + 64 + 64)
    assert scales == {b.path: (b.hidden_scale, list(b.intermediate_scale)) for b in report.blocks}
    for path, (hidden, inner) in scales_from_text(
        saved, text, format="fp8", length=64, device="cpu", progress=False
    ).items():
        assert [hidden, *inner] == pytest.approx(
            [6 * s for s in (scales[path][0], *scales[path][1])]
        )
    assert list(scales) == [f"model.layers.{i}.mixer.experts" for i in (1, 3, 5, 7)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\nnot json\n', "line 2 of"),
        ('{"text": 3}\n', "line 1 of"),
        ('["text"]\n', "line 1 of"),
        ("\n\n", "at least one text"),
        ('{"text": ""}\n', "at least one text"),
        (None, "must be a readable UTF-8 file"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused(content, message, tmp_path):
    path = tmp_path / "text.jsonl"
    if content is not None:
        path.write_text(content, "utf-8")
    with pytest.raises(CheckpointError, match=message):
        scales_from_text(tmp_path, path)


def test_a_model_that_cannot_be_read_is_refused(tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a"}\n', "utf-8")
    with pytest.raises(CheckpointError, match="the model must be one with a tokenizer"):
        scales_from_text(tmp_path, text)

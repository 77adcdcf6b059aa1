"""selftest: right kernels pass, and each broken one fails in the row that is there for it."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import re

import pytest
import torch
from selftest_kernels import SIZES, TOKENS, DownBiasUnweighted, Variant, failed, run
from torch.utils._python_dispatch import TorchDispatchMode

from fp4moe import ops
from fp4moe.errors import ShapeError, UnsupportedError
from fp4moe.kernels import KERNELS, Call, PreparedWeights
from fp4moe.kernels.reference import ReferenceKernel
from fp4moe.module import FusedExperts
from fp4moe.reference import moe_definition
from fp4moe.routing import route
from fp4moe.tools import selftest_checks
from fp4moe.tools.cli import main
from fp4moe.tools.selftest import LAYERS, default_layers, run_selftest, selftest

GATED = {"gated": {"activation": "gelu_tanh", "gated": True, **SIZES}}
UNGATED = {"not gated": {"activation": "relu2", "gated": False, **SIZES}}
SCALES = ["gate_up_global_scale", "down_global_scale", "intermediate_scale", "hidden_scale"]


ALL = {*SCALES[2:], "gate_up.global_scale", "down.global_scale", "numbers", "float16"}
ALL |= {"one expert for all", "ids without expert", "float32, strided", "gate and up exchanged"}
SAME = {"softmax_topk fused", "sigmoid_topk fused", "expert halves"}


def swapped(o):
    rows = o.gate_up_packed.shape[1] // 2
    return o._replace(
        gate_up_packed=o.gate_up_packed.roll(rows, 1),
        gate_up_block_scale=o.gate_up_block_scale.roll(rows, 1),
    )


def rows_permuted(o):
    return o._replace(down_packed=o.down_packed.roll(1, 1))


def experts_permuted(o):
    return o._replace(gate_up_packed=o.gate_up_packed.roll(1, 0))


def padded_as_one(o):
    """Gate and up of 48 rows each, with 32 rows of zeros behind both instead of 16 behind each."""

    def pad(tensor, rows, columns):
        return torch.nn.functional.pad(tensor, (0, columns, 0, rows))

    return o._replace(
        gate_up_packed=pad(o.gate_up_packed, 32, 0),
        gate_up_block_scale=pad(o.gate_up_block_scale, 32, 0),
        down_packed=pad(o.down_packed, 0, 8),
        down_block_scale=pad(o.down_block_scale, 0, 1),
    )


@pytest.mark.slow
@pytest.mark.parametrize("change", [swapped, rows_permuted, experts_permuted, padded_as_one])
def test_a_wrong_layout_fails_everywhere(change, monkeypatch):
    kernel = Variant()
    kernel.change = change
    # Experts permuted within a half are others than those permuted in the whole.
    more = {"expert halves"} if change is experts_permuted else set()
    assert failed(run(monkeypatch, kernel)) == ALL | more


@pytest.mark.slow
@pytest.mark.parametrize(
    "scale, change",
    # hidden_scale, the last, is one value: nothing is shared.
    [(scale, change) for scale in SCALES for change in ("inverted", "ignored", "shared")][:-1],
)
@pytest.mark.parametrize("layers", [GATED, UNGATED], ids=["gated", "not gated"])
def test_a_wrong_scale_fails_in_its_row(layers, scale, change, monkeypatch):
    def wrong(operands):
        old = getattr(operands, scale)
        new = {
            "inverted": 1 / old,
            "ignored": torch.ones_like(old),
            "shared": old.mean().expand_as(old).clone(),
        }[change]
        return operands._replace(**{scale: new})

    kernel = Variant()
    kernel.change = wrong
    row = scale.replace("_global", ".global")
    assert row in failed(run(monkeypatch, kernel, layers))


@pytest.mark.parametrize("name", ["gate_up_global_scale", "down_global_scale"])
def test_scales_of_neighbouring_experts_exchanged(name, monkeypatch):
    kernel = Variant()
    kernel.change = lambda o: o._replace(**{name: getattr(o, name).roll(1)})
    assert {"numbers", name.replace("_global", ".global")} <= failed(run(monkeypatch, kernel))


class OffsetIgnored(Variant):
    def run(self, call):
        layer = dataclasses.replace(call.layer, expert_offset=0)
        return super().run(call._replace(layer=layer))


class MinusOneWraps(Variant):
    def run(self, call):
        ids = torch.where(call.expert_ids == -1, call.layer.num_experts - 1, call.expert_ids)
        return super().run(call._replace(expert_ids=ids))


class EndWraps(Variant):
    def run(self, call):
        ids = torch.where(call.expert_ids == call.layer.num_experts, 0, call.expert_ids)
        return super().run(call._replace(expert_ids=ids))


class WeightsIgnored(Variant):
    def run(self, call):
        return super().run(call._replace(routing_weights=call.routing_weights * 0 + 0.5))


class TokenDropped(Variant):
    def run(self, call):
        out = super().run(call)
        out[22:23] = 0
        return out


class TokenNotANumber(Variant):
    def run(self, call):
        out = super().run(call)
        out[22:23, 5] = float("nan")
        return out


class TokenOfAnother(Variant):
    """One token of many gets the result of the first."""

    def run(self, call):
        out = super().run(call)
        out[30:31] = out[:1]
        return out


class Zeros(Variant):
    def run(self, call):
        return torch.zeros_like(super().run(call))


class StridesIgnored(Variant):
    def run(self, call):
        hidden = call.hidden
        dense = torch.empty(hidden.shape, device="meta").stride()
        return super().run(call._replace(hidden=hidden.as_strided(hidden.shape, dense)))


class AlwaysBfloat16(Variant):
    def run(self, call):
        return super().run(call._replace(hidden=call.hidden.bfloat16()))


class Routing(Variant):
    """A kernel that chooses the experts itself."""

    routes = True

    def run_from_logits(self, call):
        ids, weights = self.choose(call)
        return self.run(Call(call.hidden, ids, weights, call.operands, call.layer))

    def choose(self, call):
        return route(call.router_logits, call.routing_bias, call.routing)


class BiasInTheWeights(Routing):
    def choose(self, call):
        ids, weights = super().choose(call)
        if call.routing_bias.numel():
            weights = (torch.sigmoid(call.router_logits) + call.routing_bias).gather(1, ids)
            weights = weights / weights.sum(1, keepdim=True) * call.routing.scaling
        return ids, weights


class ScalingIgnored(Routing):
    def choose(self, call):
        return super().choose(call._replace(routing=call.routing._replace(scaling=1.0)))


class NegativeLogitsLost(Routing):
    """A kernel that starts its search for the largest logits at zero."""

    def choose(self, call):
        if call.routing.method == "softmax_topk":
            call = call._replace(router_logits=call.router_logits.relu())
        return super().choose(call)


BIASED = {"activation": "silu(alpha=1.702,beta=1,limit=1)", "gated": True, "biased": True, **SIZES}
STEP = {"activation": "silu_step(limit=1)", "gated": True, **SIZES}
SOFTCAP = {"activation": "silu_softcap(alpha=2,beta=2)", "gated": True, **SIZES}


class OtherActivation(Variant):
    def __init__(self, activation):
        super().__init__()
        self.other = activation

    def run(self, call):
        layer = dataclasses.replace(call.layer, activation=self.other)
        return super().run(call._replace(layer=layer))


def with_biases(change):
    kernel = Variant()
    kernel.change = lambda o: o._replace(**change(o)) if o.gate_up_bias is not None else o
    return kernel


@pytest.mark.parametrize(
    ("kernel", "sizes"),
    [
        (OtherActivation("silu(alpha=1.702,beta=1)"), BIASED),
        (OtherActivation("silu(alpha=1.702,limit=1)"), BIASED),
        (OtherActivation("silu(beta=1,limit=1)"), BIASED),
        (OtherActivation("silu(alpha=1.702,beta=1,limit=2)"), BIASED),
        (with_biases(lambda o: {"gate_up_bias": o.gate_up_bias * 0}), BIASED),
        (with_biases(lambda o: {"gate_up_bias": o.gate_up_bias.roll(48, 1)}), BIASED),
        (with_biases(lambda o: {"gate_up_bias": o.gate_up_bias.roll(1, 0)}), BIASED),
        (with_biases(lambda o: {"down_bias": o.down_bias * 0}), BIASED),
        (with_biases(lambda o: {"down_bias": o.down_bias.roll(1, 0)}), BIASED),
        (DownBiasUnweighted(), BIASED),
        (OtherActivation("silu(limit=1)"), STEP),
        (OtherActivation("silu"), STEP),
        (OtherActivation("silu"), SOFTCAP),
        (OtherActivation("silu_softcap(alpha=2,beta=4)"), SOFTCAP),
        (OtherActivation("silu_softcap(alpha=4,beta=2)"), SOFTCAP),
    ],
)
@pytest.mark.slow
def test_wrong_parameters_and_biases_fail_in_numbers(kernel, sizes, monkeypatch):
    report = run(monkeypatch, kernel, {"layer": sizes})
    assert {(r.check, r.tokens) for r in report.failures} >= {("numbers", 1), ("numbers", 33)}


class NotRestored(Variant):
    def restore(self, prepared):
        return super().restore(
            PreparedWeights(
                prepared.operands,
                {**prepared.kept, "logical_down_packed": prepared.kept["logical_down_packed"] ^ 16},
                prepared.layer,
            )
        )


class ScaleNotRestored(Variant):
    def restore(self, prepared):
        kept = dict(prepared.kept)
        # One unit in the last place.
        kept["logical_hidden_scale"] = torch.nextafter(
            kept["logical_hidden_scale"], torch.tensor(1.0)
        )
        return super().restore(PreparedWeights(prepared.operands, kept, prepared.layer))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel, rows",
    [
        (OffsetIgnored, {"expert halves"}),
        (MinusOneWraps, {"ids without expert", "expert halves", "one expert for all"}),
        (EndWraps, {"ids without expert"}),
        (WeightsIgnored, ALL),
        (TokenDropped, {*ALL, "finite, not zero"}),
        (TokenNotANumber, {*ALL, *SAME, "finite, not zero"}),
        (TokenOfAnother, ALL),
        (Zeros, {*ALL, "finite, not zero"}),
        (StridesIgnored, {"float32, strided"}),
        (AlwaysBfloat16, {"float16", "float32, strided"}),
        (BiasInTheWeights, {"sigmoid_topk fused"}),
        (ScalingIgnored, {"sigmoid_topk fused"}),
        (NegativeLogitsLost, {"softmax_topk fused"}),
        (Routing, set()),
        (NotRestored, {"weights restored"}),
        (ScaleNotRestored, {"weights restored"}),
        (Variant, set()),
    ],
)
def test_a_broken_kernel_fails_in_these_rows(kernel, rows, monkeypatch):
    report = run(monkeypatch, kernel())
    assert failed(report) == rows


def test_an_operator_that_forgets_the_output_scale_fails(monkeypatch):
    def forgets(logits, bias, routing, output_scale):
        return route(logits, bias, routing)

    monkeypatch.setattr(ops, "choose_experts", forgets)
    assert failed(run(monkeypatch, Variant())) == {"softmax_topk fused"}


class Bfloat16Weights(ReferenceKernel):
    """W4A16 with weights rounded to bfloat16, which is within what the definition allows."""

    def __init__(self):
        def compute(hidden, weights, ids, routing_weights):
            matrices = weights.dequantize(torch.bfloat16)
            options = {"activation": weights.activation, "expert_offset": weights.expert_offset}
            return moe_definition(hidden, ids, routing_weights, **matrices, **options)

        super().__init__("reference", compute, automatic=True)


@pytest.mark.parametrize("layers", [GATED, UNGATED], ids=["gated", "not gated"])
def test_bfloat16_weights_are_no_failure(layers, monkeypatch):
    monkeypatch.setitem(KERNELS, "reference", Bfloat16Weights())
    report = run_selftest("reference", device="cpu", layers=layers, tokens=TOKENS)
    assert report.passed, report
    (row,) = (r for r in report.rows if (r.check, r.tokens) == ("numbers", 33))
    assert 0 < row.error < row.limit / 2


def test_a_w4a16_kernel_that_uses_an_activation_scale_fails(monkeypatch):
    class Wrong(Bfloat16Weights):
        def run(self, call):
            scale = call.operands.hidden_scale.to(call.hidden.dtype)
            return super().run(call._replace(hidden=call.hidden * scale))

    monkeypatch.setitem(KERNELS, "reference", Wrong())
    report = run_selftest("reference", device="cpu", layers=GATED, tokens=(5,))
    assert {"numbers", "hidden_scale"} <= failed(report)


def test_what_a_kernel_raises_is_a_failed_row_and_the_run_goes_on(monkeypatch):
    class Raises(Variant):
        def run(self, call):
            if call.hidden.shape[0] == 7:
                raise RuntimeError("no kernel found\n  for this shape")
            return super().run(call)

    report = run(monkeypatch, Raises(), layers={**GATED, **UNGATED})
    notes = {(r.layer, r.check, r.tokens): r.note for r in report.failures}
    assert notes == {
        (layer, check, 7): "RuntimeError: no kernel found for this shape"
        for layer in ("gated", "not gated")
        for check in ("numbers", "finite, not zero")
    }


def test_no_tokens_may_not_crash(monkeypatch):
    forward = FusedExperts.forward

    def divides_by_tokens(self, hidden, ids, weights):
        tokens_per_expert = ids.numel() // len(hidden)
        return forward(self, hidden, ids, weights[:, :tokens_per_expert])

    monkeypatch.setattr(FusedExperts, "forward", divides_by_tokens)
    report = run_selftest("reference_w4a4", device="cpu", layers=GATED, tokens=TOKENS)
    (row,) = report.failures
    assert (row.check, row.tokens) == ("numbers", 0)
    assert "ZeroDivisionError" in row.note


def test_an_interrupt_ends_the_run(monkeypatch):
    class Interrupted(Variant):
        def run(self, call):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, Interrupted())


def test_a_change_that_does_not_show_is_a_failure(monkeypatch):
    monkeypatch.setitem(selftest_checks.FACTORS, "down.global_scale", (1.0, 1.01))
    (row,) = run(monkeypatch, Variant()).failures
    assert row.check == "down.global_scale"
    assert row.note == "the change does not show: no test"


def test_what_a_kernel_does_not_support_is_listed_and_no_failure(monkeypatch):
    class Picky(Variant):
        def reasons_not_to_run(self, layer, capability):
            return ["has no gate"] if layer.gated else []

        def reasons_not_to_route(self, layer, routing):
            return [f"no {routing.scaling}"] if routing.scaling != 1 else []

    report = run(monkeypatch, Picky(), layers={**GATED, **UNGATED})
    assert report.passed
    rows = [(r.layer, r.check, r.note) for r in report.rows if r.verdict == "not supported"]
    assert rows == [
        ("gated", "layer", "reference_w4a4: has no gate"),
        ("not gated", "sigmoid_topk fused", "no 2.5"),
    ]


def test_auto_is_the_preferred_kernel_of_any_layer(monkeypatch):
    class NoGate(Variant):
        def reasons_not_to_run(self, layer, capability):
            return ["has no gate"] if layer.gated else []

    kernel = NoGate()
    kernel.name, kernel.automatic = "flashinfer_trtllm", True
    monkeypatch.setitem(KERNELS, kernel.name, kernel)
    report = run_selftest(device="cpu", layers={**GATED, **UNGATED}, tokens=(2,))
    assert report.kernel == "flashinfer_trtllm"
    assert [r.layer for r in report.rows if r.verdict == "not supported"] == ["gated"]
    assert report.passed


def test_the_operators_are_what_runs():
    names = set()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.add(str(function))
            return function(*args, **(kwargs or {}))

    with Seen():
        assert run_selftest("reference", device="cpu", layers=UNGATED, tokens=(2,)).passed
    assert {"fp4moe.nvfp4_moe.default", "fp4moe.nvfp4_moe_from_logits.default"} <= names


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["reference", "reference_w4a4"])
def test_the_reference_kernels_pass(kernel):
    out = io.StringIO()
    assert selftest(kernel, device="cpu", tokens=(0, 1, 65), file=out) is True
    lines = out.getvalue().splitlines()
    assert lines[0] == "no GPU: this tests the CPU's reference kernels only"
    assert re.fullmatch(r"layer +check +tokens +error +limit +verdict +note", lines[1])
    limit = "0.05" if kernel == "reference_w4a4" else "0.018"
    pattern = rf"relu2, not gated +numbers +65 +0 +{limit} +ok +worst token 0"
    assert sum(bool(re.fullmatch(pattern, line)) for line in lines) == 1
    # CUDA graphs, layers without gate, one with exchangeable halves: of NVFP4 and the others.
    skipped = (13 + 6 + 1) + (12 + 5)
    ok = re.fullmatch(
        rf"{kernel} on cpu: (\d+) ok, 0 FAILED, 0 not supported, {skipped} skipped", lines[-1]
    )
    assert int(ok[1]) + skipped == len(lines) - 3


def test_the_report_is_plain_data_and_a_table(monkeypatch):
    report = run(monkeypatch, TokenNotANumber())
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["passed"] is False
    assert (data["kernel"], data["device"]) == ("reference_w4a4", "cpu")
    assert len(data["rows"]) == len(report.rows)
    assert str(report).splitlines()[-1] == report.summary
    assert re.search(r"gated +numbers +33 +nan +0.05 +FAILED +worst token nan\n", str(report))


def test_layers_of_a_gpu_are_the_models_and_every_form_once():
    layers = default_layers(torch.device("cuda"), ("nvfp4",))
    assert list(layers)[:2] == list(LAYERS)
    assert all(layers[name] == sizes for name, sizes in LAYERS.items())
    forms = {(s["activation"], s["gated"]) for s in layers.values()}
    assert (len(forms), len(layers)) == (15, 17)
    odd = layers["odd sizes, gated"]
    assert odd["hidden_size"] % 8 and odd["intermediate_size"] % 64


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"kernel": "fast"}, UnsupportedError, "selftest: kernel must be auto or one of .*'fast'"),
        ({"tokens": (0,)}, ShapeError, r"tokens must be numbers of 0 .* got \(0,\)"),
        ({"tokens": ()}, ShapeError, r"tokens must be numbers of 0 .* got \(\)"),
        ({"tokens": (-1, 3)}, ShapeError, r"tokens must be numbers of 0 .* got \(-1, 3\)"),
        ({"hidden_alignment": 64}, UnsupportedError, "must be one of 128, 256, 512; got 64"),
        ({"layers": {}}, UnsupportedError, "cannot run a layer on cpu, because no layers"),
        (
            {"kernel": "flashinfer_trtllm"},
            UnsupportedError,
            "cannot run .* gated: .*needs compute capability 10.0 or 10.3, got a CPU",
        ),
        (
            {"layers": {"wide": {**GATED["gated"], "top_k": 6}}},
            ShapeError,
            "top_k must not exceed num_experts = 5; got 6",
        ),
    ],
)
def test_refusals(options, error, message):
    with pytest.raises(error, match=message):
        run_selftest(**{"device": "cpu", "layers": GATED, "tokens": (1,), **options})


def test_the_command_line(monkeypatch, capsys):
    module = importlib.import_module("fp4moe.tools.selftest")
    monkeypatch.setattr(module, "default_layers", lambda device: GATED)
    arguments = ["selftest", "--device", "cpu", "--tokens", "0", "3"]
    assert main(arguments) == 0  # auto: the only kernel of a CPU
    assert re.search(r"\nreference on cpu: \d+ ok, 0 FAILED", capsys.readouterr().out)
    monkeypatch.setitem(KERNELS, "reference_w4a4", Zeros())
    assert main([*arguments, "--kernel", "reference_w4a4", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False
    assert main([*arguments, "--kernel", "flashinfer_trtllm"]) == 2
    assert "cannot run a layer on cpu" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_kernel_that_waits_for_the_host_fails_under_capture(monkeypatch):
    class Waits(Variant):
        def run(self, call):
            hidden = call.hidden * float(call.hidden.isfinite().all())
            return super().run(call._replace(hidden=hidden))

    monkeypatch.setitem(KERNELS, "reference_w4a4", Waits())
    (row,) = run_selftest("reference_w4a4", layers=GATED, tokens=TOKENS).failures
    assert row.check == "CUDA graph"


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["reference", "reference_w4a4"])
def test_the_reference_kernels_pass_on_a_gpu(kernel):
    report = run_selftest(kernel, layers={**GATED, **UNGATED}, tokens=TOKENS)
    assert report.passed, report
    assert {r.verdict for r in report.rows if r.check == "CUDA graph"} == {"ok"}

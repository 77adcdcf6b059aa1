"""explain: one row for each block, before and after replace_moe, as table and as plain data."""

# ruff: noqa: E501 (tables)

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import enlarge_experts, family, fingerprint, gemma4, nemotron_h, qwen3_moe
from torch import nn

from fp4moe.errors import UnsupportedError
from fp4moe.models.replace import explain, replace_moe
from fp4moe.module import FusedExperts
from fp4moe.report import BlockReport, ModelReport, format_bytes, format_table
from fp4moe.testing import make_layer

expecttest = pytest.importorskip("expecttest", reason="optional package")


def fused_experts(gated=True, **scales):
    return FusedExperts(make_layer(3, 40, 24, gated=gated, **scales))


def mixed_model():
    """A block that is fused, one that can be, and one that cannot."""
    model = qwen3_moe()
    last = model.model.layers[1].mlp.experts
    handle = last.register_forward_hook(lambda *args: None)
    replace_moe(model, strict=False, progress=False)
    handle.remove()
    other = family("gpt_oss")
    experts = other.model.layers[0].mlp.experts
    experts.has_post_expert_norm = True
    experts._apply_gate = lambda x: torch.tanh(x[..., ::2]) * x[..., 1::2]
    return nn.ModuleDict({"a": model.model, "b": other.model.layers[0]})


class Tables(expecttest.TestCase):
    """The tables as a reader sees them; EXPECTTEST_ACCEPT=1 writes them anew."""

    maxDiff = None

    def test_gemma4(self):
        model = gemma4(dtype=torch.bfloat16)
        self.assertExpectedInline(
            str(explain(model)),
            """\
block                   module             status       experts  top-k  H x I    padded   activation       format  kernel     bytes
model.layers.0.experts  Gemma4TextExperts  replaceable  8        2      64 x 48  64 x 48  gated gelu_tanh  nvfp4   reference  147 kB
model.layers.1.experts  Gemma4TextExperts  replaceable  8        2      64 x 48  64 x 48  gated gelu_tanh  nvfp4   reference  147 kB
Gemma4ForCausalLM: 2 blocks (2 replaceable), experts 295 kB""",
        )
        replace_moe(model, progress=False)
        self.assertExpectedInline(
            str(explain(model)),
            """\
block                   module        status    experts  top-k  H x I    padded   activation       format  kernel     bytes
model.layers.0.experts  FusedExperts  replaced  8        -      64 x 48  64 x 48  gated gelu_tanh  nvfp4   reference  41.6 kB
model.layers.1.experts  FusedExperts  replaced  8        -      64 x 48  64 x 48  gated gelu_tanh  nvfp4   reference  41.6 kB
model.layers.0.experts, model.layers.1.experts: activation ranges are not calibrated (only kernels that round activations use them)
Gemma4ForCausalLM: 2 blocks (2 replaced), experts 83.1 kB""",
        )

    def test_nemotron_h(self):
        model = nemotron_h(dtype=torch.bfloat16, latent=32)
        self.assertExpectedInline(
            str(explain(model)),
            """\
block                         module            status       experts  top-k  H x I    padded   activation  format  kernel     bytes
model.layers.1.mixer.experts  NemotronHExperts  replaceable  8        2      32 x 48  32 x 48  relu2       nvfp4   reference  49.2 kB
model.layers.3.mixer.experts  NemotronHExperts  replaceable  8        2      32 x 48  32 x 48  relu2       nvfp4   reference  49.2 kB
NemotronHForCausalLM: 2 blocks (2 replaceable), experts 98.3 kB""",
        )
        replace_moe(model, progress=False)
        self.assertExpectedInline(
            str(explain(model)),
            """\
block                         module        status    experts  top-k  H x I    padded   activation  format  kernel     bytes
model.layers.1.mixer.experts  FusedExperts  replaced  8        -      32 x 48  32 x 48  relu2       nvfp4   reference  13.9 kB
model.layers.3.mixer.experts  FusedExperts  replaced  8        -      32 x 48  32 x 48  relu2       nvfp4   reference  13.9 kB
model.layers.1.mixer.experts, model.layers.3.mixer.experts: activation ranges are not calibrated (only kernels that round activations use them)
NemotronHForCausalLM: 2 blocks (2 replaced), experts 27.8 kB""",
        )

    def test_blocks_of_all_three_kinds(self):
        self.assertExpectedInline(
            str(explain(mixed_model())),
            """\
block                   module           status           experts  top-k  H x I    padded   activation  format  kernel     bytes
a.layers.0.mlp.experts  FusedExperts     replaced         8        -      64 x 48  64 x 48  gated silu  nvfp4   reference  41.6 kB
a.layers.1.mlp.experts  Qwen3MoeExperts  replaceable      8        2      64 x 48  64 x 48  gated silu  nvfp4   reference  295 kB
b.mlp.experts           GptOssExperts    not replaceable  8        2      64 x 96  -        gated ?     -       -          598 kB
a.layers.0.mlp.experts: activation ranges are not calibrated (only kernels that round activations use them)
b.mlp.experts: it has a norm behind each expert
b.mlp.experts: its _apply_gate is not act(gate) * up with one of our activations; closest is identity, relative error 0.84 (a norm, a clamp or a variant?)
ModuleDict: 3 blocks (1 replaced, 1 replaceable, 1 not replaceable), experts 934 kB""",
        )

    def test_reasons_of_many_blocks_are_listed_once(self):
        model = family("muse_spark")
        model.layers.extend(family("muse_spark").layers)
        self.assertExpectedInline(
            str(explain(model)),
            """\
block                 module            status           experts  top-k  H x I    padded  activation  format  kernel  bytes
layers.0.mlp.experts  MuseSparkExperts  not replaceable  8        2      32 x 48  -       gated silu  -       -       147 kB
layers.1.mlp.experts  MuseSparkExperts  not replaceable  8        2      32 x 48  -       gated silu  -       -       147 kB
layers.2.mlp.experts  MuseSparkExperts  not replaceable  8        2      32 x 48  -       gated silu  -       -       147 kB
layers.3.mlp.experts  MuseSparkExperts  not replaceable  8        2      32 x 48  -       gated silu  -       -       147 kB
layers.0.mlp.experts and 3 more: it has a norm behind each expert
MuseSparkTextModel: 4 blocks (4 not replaceable), experts 590 kB""",
        )

    def test_no_block(self):
        self.assertExpectedInline(
            str(explain(nn.Linear(2, 2))),
            """\
Linear: no mixture-of-experts block""",
        )


def test_rows_before_and_after_gemma4():
    model = gemma4(dtype=torch.bfloat16)
    values = 8 * (96 * 64 + 64 * 48)
    expected = {
        "path": "model.layers.1.experts",
        "module": "Gemma4TextExperts",
        "status": "replaceable",
        "reasons": (),
        "activation": "gelu_tanh",
        "gated": True,
        "num_experts": 8,
        "top_k": 2,
        "hidden_size": 64,
        "intermediate_size": 48,
        "format": "nvfp4",
        "padded_sizes": (64, 48),
        "kernel": "reference",
        "nbytes": 2 * values,
    }
    report = explain(model)
    assert report.model == "Gemma4ForCausalLM"
    assert [b.path for b in report.blocks] == [f"model.layers.{i}.experts" for i in (0, 1)]
    assert report.blocks[1] == BlockReport(**expected)
    replace_moe(model, progress=False)
    after = explain(model).blocks[1]
    expected |= {"module": "FusedExperts", "status": "replaced", "top_k": None}
    expected |= {"nbytes": values // 2 + values // 16 + 8 * 3 * 4 + 4}
    note = "activation ranges are not calibrated (only kernels that round activations use them)"
    assert after == BlockReport(**expected | {"reasons": (note,)})


@pytest.mark.parametrize("latent", [None, 32])
def test_rows_before_and_after_nemotron_h(latent):
    model = nemotron_h(latent=latent)
    width = latent or 64
    for status, size in (("replaceable", 4 * 8 * 2 * 48 * width), ("replaced", None)):
        report = explain(model)
        assert [b.path for b in report.blocks] == [
            f"model.layers.{i}.mixer.experts" for i in (1, 3)
        ]
        for row in report.blocks:
            assert (row.status, row.activation, row.gated) == (status, "relu2", False)
            assert (row.hidden_size, row.intermediate_size) == (width, 48)
            assert row.num_experts == 8
            assert size is None or row.nbytes == size
        replace_moe(model, progress=False)


def test_explaining_changes_nothing():
    for model in (gemma4(), mixed_model(), family("gpt_oss")):
        before, state = fingerprint(model), torch.random.get_rng_state()
        assert explain(model) == explain(model)
        assert fingerprint(model) == before
        assert torch.equal(torch.random.get_rng_state(), state)


def test_statuses_are_counted_and_bytes_summed():
    report = explain(mixed_model())
    assert [b.status for b in report.blocks] == ["replaced", "replaceable", "not replaceable"]
    for status in ("replaced", "replaceable", "not replaceable"):
        assert report.count(status) == 1
    assert report.count("else") == 0
    assert report.nbytes == sum(b.nbytes for b in report.blocks)
    parameters = family("gpt_oss").model.layers[0].mlp.experts.parameters()
    assert report.blocks[2].nbytes == sum(p.nbytes for p in parameters), "biases, too"


def test_to_dict_is_plain_data_of_every_field():
    report = explain(mixed_model())
    data = report.to_dict()
    again = json.loads(json.dumps(data))
    assert again["model"] == "ModuleDict"
    assert len(again["blocks"]) == 3
    for block, row in zip(report.blocks, again["blocks"], strict=True):
        row["reasons"] = tuple(row["reasons"])
        row["padded_sizes"] = row["padded_sizes"] and tuple(row["padded_sizes"])
        assert BlockReport(**row) == block
    # A copy: changing it does not change the report.
    data["blocks"].clear()
    assert len(report.blocks) == 3


def test_padded_sizes_are_shown_before_and_after():
    config = family("mixtral").config
    config.hidden_size, config.intermediate_size = 40, 24
    model = nn.ModuleList([type(family("mixtral").model.layers[0].mlp.experts)(config)])
    enlarge_experts(model)
    for status in ("replaceable", "replaced"):
        (row,) = explain(model).blocks
        assert row.status == status
        assert (row.hidden_size, row.intermediate_size) == (40, 24)
        assert row.padded_sizes == (48, 32)
        replace_moe(model, progress=False)


def test_rows_of_fused_experts_that_nobody_replaced():
    model = nn.Sequential(fused_experts(), fused_experts(gated=False))
    rows = explain(model).blocks
    assert [r.path for r in rows] == ["0", "1"]
    assert [r.gated for r in rows] == [True, False]
    for row, part in zip(rows, model, strict=True):
        assert (row.status, row.kernel, row.nbytes) == ("replaced", "reference", part.nbytes)
        assert row.padded_sizes == (48, 32)
    assert explain(model[0]).blocks[0].path == ""
    assert explain(model[0]).count("replaced") == 1


@pytest.mark.parametrize("scales", [{"hidden_scale": 0.5}, {"intermediate_scale": 0.25}])
def test_calibrated_experts_carry_no_note(scales):
    assert explain(fused_experts()).blocks[0].reasons != ()
    assert explain(fused_experts(**scales)).blocks[0].reasons == ()


def test_the_kernel_that_is_asked_for():
    model = gemma4()
    assert {b.kernel for b in explain(model, kernel="reference_w4a4").blocks} == {"reference_w4a4"}
    report = explain(model, kernel="flashinfer_trtllm")
    for row in report.blocks:
        assert (row.status, row.kernel, row.padded_sizes) == ("not replaceable", None, None)
        assert "flashinfer_trtllm" in row.reasons[0]
    with pytest.raises(UnsupportedError, match="explain: kernel must be auto or one of "):
        explain(model, kernel="cuda")


def test_models_on_the_meta_device():
    with torch.device("meta"):
        model = gemma4()
    for row in explain(model).blocks:
        assert row.status == "not replaceable"
        assert "is on the meta device" in row.reasons[0]
        assert row.nbytes == 4 * 8 * (96 * 64 + 64 * 48)
    for row in explain(model, only_structure=True).blocks:
        assert (row.status, row.reasons, row.kernel) == ("replaceable", (), "reference")
    fused = explain(replace_moe(gemma4(), progress=False).to("meta"))
    assert [(b.status, b.nbytes) for b in fused.blocks] == [("replaced", 41572)] * 2


def test_a_model_without_blocks():
    report = explain(nn.Sequential(nn.Linear(2, 2)))
    assert report == ModelReport("Sequential", ())
    assert (report.nbytes, report.count("replaced")) == (0, 0)
    assert report.to_dict() == {"model": "Sequential", "blocks": []}


def test_bytes_are_in_decimal_units_of_three_digits():
    sizes = {0: "0 B", 999: "999 B", 1000: "1 kB", 41572: "41.6 kB", 10**6: "1 MB"}
    sizes |= {1_434_000_000: "1.43 GB", 52_000_000_000: "52 GB"}
    assert {size: format_bytes(size) for size in sizes} == sizes


def test_tables_are_aligned_without_trailing_blanks():
    assert format_table(["a", "bb"], [["ccc", "d"], ["e", ""]]) == "a    bb\nccc  d\ne"

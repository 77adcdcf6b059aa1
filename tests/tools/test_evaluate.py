"""evaluate: losses, differences and agreement against other ways to compute them."""

from __future__ import annotations

import json
import math
import pathlib
import statistics

import pytest
import torch
from tiny_models import enlarge_experts
from trained_models import training_script
from transformers import AutoModelForCausalLM

import fp4moe
from fp4moe import ExpertWeights
from fp4moe.calibration.texts import text_windows
from fp4moe.errors import CheckpointError, ShapeError, UnsupportedError
from fp4moe.formats import FORMATS
from fp4moe.tools.cli import main
from fp4moe.tools.sample_text import is_held_out, standard_library_text

LENGTH, WINDOWS = 64, 6
TEXT = "".join(f"def f_{i}(x):\n    return x ** {i} + {i * i}\n\n" for i in range(40))


@pytest.fixture(scope="module", params=["gemma4", "nemotron_h"])
def model_and_text(request, tmp_path_factory):
    """An untrained small model with experts of unit gain, and a text of more than six windows."""
    script, folder = training_script(), tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        script.save(enlarge_experts(getattr(script, request.param)()), folder)
    text = folder / "text.txt"
    text.write_text(TEXT, "utf-8")
    calibration = folder / "text.jsonl"
    calibration.write_text(json.dumps({"text": TEXT[:300]}) + "\n", "utf-8")
    return folder, text, calibration


@pytest.fixture(scope="module")
def report(model_and_text):
    folder, text, calibration = model_and_text
    return fp4moe.evaluate(
        folder,
        text=text,
        tokens=LENGTH * WINDOWS,
        length=LENGTH,
        calibrate=calibration,
        device="cpu",
        progress=False,
    )


def chosen_windows():
    """The windows that evaluate takes, from the bytes: every available // 6 th, or so."""
    data = TEXT.encode()
    available = len(data) // LENGTH
    starts = [LENGTH * (i * available // WINDOWS) for i in range(WINDOWS)]
    return torch.tensor([list(data[s : s + LENGTH]) for s in starts])


def losses(model):
    """The model's own loss of each window, and the most likely tokens."""
    found, best = [], []
    with torch.no_grad():
        for ids in chosen_windows():
            out = model(ids[None], labels=ids[None])
            found.append(out.loss.item())
            best.append(out.logits[0, :-1].argmax(-1))
    return found, torch.stack(best)


@pytest.mark.slow
def test_bf16_is_the_models_own_loss(model_and_text, report):
    model = AutoModelForCausalLM.from_pretrained(model_and_text[0], dtype=torch.bfloat16)
    found, _ = losses(model)
    row = report.row("bf16")
    # Other batches: bf16 logits of about 2^2 differ by a few 2^-7, averaged over 63 x 6 tokens.
    assert row.loss == pytest.approx(statistics.mean(found), abs=0.01)
    assert row.loss_error == pytest.approx(statistics.stdev(found) / math.sqrt(WINDOWS), rel=0.1)
    assert row.perplexity == pytest.approx(math.exp(row.loss))
    assert row.bits == pytest.approx(math.log2(row.perplexity))
    assert (row.difference, row.difference_error, row.agreement) == (0, 0, 1)
    assert (report.tokens, report.windows) == (WINDOWS * (LENGTH - 1), WINDOWS)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [None, 1])
def test_w4a16_is_the_float_model_with_dequantised_weights(seed, model_and_text, report):
    plain = AutoModelForCausalLM.from_pretrained(model_and_text[0], dtype=torch.bfloat16)
    base, base_best = losses(plain)
    generator = torch.Generator().manual_seed(seed or 0)
    for name, weight in plain.named_parameters():
        if weight.ndim != 3 or ".experts." not in name:
            continue
        if seed is not None:  # other weights of the same size must not fit
            weight.data.copy_(weight.std() * torch.randn(weight.shape, generator=generator))
            continue
        for one in weight.data:
            one.copy_(fp4moe.dequantize_nvfp4(fp4moe.quantize_nvfp4(one), one.dtype))
    found, best = losses(plain)
    row = report.row("W4A16")
    difference = statistics.mean(a - b for a, b in zip(found, base, strict=True))
    fits = abs(row.difference - difference) < 0.02
    agreement = (best == base_best).double().mean().item()
    # bf16 rounding turns few of the 378 most likely tokens.
    fits &= abs(row.agreement - agreement) < 0.06
    assert fits == (seed is None), (row, difference, agreement)


@pytest.mark.slow
def test_linears_are_quantised_too(model_and_text, report):
    folder, text, _ = model_and_text
    linears = "*.self_attn.*" if folder.name.startswith("gemma4") else "*_proj"
    sizes = {"tokens": LENGTH * WINDOWS, "length": LENGTH, "device": "cpu", "progress": False}
    found = fp4moe.evaluate(folder, text=text, linears=linears, **sizes)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    fp4moe.replace_moe(model, progress=False, linears=linears)
    own, _ = losses(model)
    # As for bfloat16 above; and it is not the model whose experts alone are quantised.
    assert found.row("W4A16").loss == pytest.approx(statistics.mean(own), abs=0.01)
    assert found.row("W4A16").loss != report.row("W4A16").loss
    assert found.row("bf16").loss == report.row("bf16").loss


@pytest.mark.slow
def test_rows_table_and_plain_data(report):
    names = ["bf16", "W4A16", "W4A4", "W4A4 calibrated"]
    assert [row.name for row in report.rows] == names
    worst = [1 - report.row(name).agreement for name in names]
    assert worst[0] == 0 < worst[1] <= worst[2] and 0 < worst[3]
    table = str(report).splitlines()
    assert [line.split("  ")[0] for line in table[1:5]] == names
    assert f"{report.row('W4A16').agreement:.2%}".replace("%", " %") in table[2]
    assert json.loads(json.dumps(report.to_dict()))["rows"][1]["name"] == "W4A16"


@pytest.mark.slow
def test_command(model_and_text, capsys):
    folder, text, _ = model_and_text
    options = ["--text", str(text), "--tokens", "128", "--length", "64", "--device", "cpu"]
    assert main(["evaluate", str(folder), *options, "--method", "mse", "--json"]) == 0
    out = capsys.readouterr()
    assert [row["name"] for row in json.loads(out.out)["rows"]] == ["bf16", "W4A16", "W4A4"]
    # A log gets no progress bars.
    assert "\r" not in out.err and "100%" not in out.err
    assert (
        main(["evaluate", str(folder), *options, "--format", "fp8_block", "mxfp8", "--json"]) == 0
    )
    rows = [(r["name"], r["format"]) for r in json.loads(capsys.readouterr().out)["rows"]]
    assert rows[1:] == [(n, f) for f in ("fp8_block", "mxfp8") for n in ("W8A16", "W8A8")]
    assert main(["evaluate", str(folder), "--text", str(folder / "none"), "--no-progress"]) == 2
    assert "text must be a readable UTF-8 file" in capsys.readouterr().err


def test_what_cannot_be_evaluated_is_refused(model_and_text, tmp_path):
    folder, text, _ = model_and_text
    with pytest.raises(ShapeError, match="evaluate: format must name a format; got none"):
        fp4moe.evaluate(folder, text=text, format=[])
    with pytest.raises(UnsupportedError, match=r"evaluate: format fp8 cannot .*'mse'"):
        fp4moe.evaluate(folder, text=text, format=["nvfp4", "fp8"], method="mse")
    for name, value in (("tokens", 0), ("length", 1), ("batch", 0)):
        with pytest.raises(ShapeError, match=f"evaluate: {name} must be at least"):
            fp4moe.evaluate(folder, text=text, **{name: value})
    with pytest.raises(UnsupportedError, match="text must have at least 4096 tokens"):
        fp4moe.evaluate(folder, text=text, length=4096, device="cpu")
    with pytest.raises(CheckpointError, match="must be one with a tokenizer"):
        fp4moe.evaluate(tmp_path, text=text)


def test_weights_that_are_missing_are_not_left_random(model_and_text, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in model_and_text[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    dropped = next(name for name in tensors if name.endswith("q_proj.weight"))
    del tensors[dropped]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"it lacks .*q_proj\.weight"):
        fp4moe.evaluate(tmp_path, text=model_and_text[1])


# Format, bits of weights, what activations are rounded to, whether their ranges are stored.
ROWS = [
    ("fp8", 8, 8, True),
    ("nvfp4", 4, 4, True),
    ("mxfp4", 4, 8, False),
    ("fp8_block", 8, 8, False),
    ("fp8_channel", 8, 8, False),
    ("mxfp8", 8, 8, False),
]


@pytest.fixture(scope="module")
def of_formats(model_and_text):
    folder, text, calibration = model_and_text
    options = {"text": text, "tokens": LENGTH * WINDOWS, "length": LENGTH, "device": "cpu"}
    formats = [format for format, *_ in ROWS]
    return fp4moe.evaluate(folder, format=formats, calibrate=calibration, progress=False, **options)


@pytest.mark.slow
def test_rows_of_several_formats(of_formats, report):
    assert {format for format, *_ in ROWS} == {*FORMATS}
    names = [("bf16", None)]
    for format, bits, activations, stored in ROWS:
        names += [(f"W{bits}A16", format), (f"W{bits}A{activations}", format)]
        names += [(f"W{bits}A{activations} calibrated", format)] * stored
    assert [(row.name, row.format) for row in of_formats.rows] == names
    table = str(of_formats).splitlines()
    column = table[0].index("format")
    found = [(line[:column].strip(), line[column:].split()[0]) for line in table[1:-1]]
    assert found == [(name, format or "-") for name, format in names]
    # The order of formats, and which were asked for beside, changes nothing.
    for name in ("W4A16", "W4A4", "W4A4 calibrated"):
        assert of_formats.row(name, "nvfp4") == report.row(name)
    assert of_formats.row("W4A16", "mxfp4") != of_formats.row("W4A16", "nvfp4")
    with pytest.raises(ShapeError, match=r"row: name must be one of bf16 .* got 'W4A16'"):
        of_formats.row("W4A16", "fp8")


@pytest.mark.slow
@pytest.mark.parametrize("format, bits", [row[:2] for row in ROWS if row[0] != "nvfp4"])
def test_a_format_is_the_float_model_with_dequantised_weights(
    format, bits, model_and_text, of_formats
):
    plain = AutoModelForCausalLM.from_pretrained(model_and_text[0], dtype=torch.bfloat16)
    base, base_best = losses(plain)
    for module in plain.modules():
        own = module._parameters
        first = next(
            (n for n in ("gate_up_proj", "up_proj") if n in own and own[n].ndim == 3), None
        )
        if first is None:
            continue
        named = {first.removesuffix("_proj"): own[first], "down": own["down_proj"]}
        held = ExpertWeights.quantize(
            **named, activation="silu" if first[0] == "g" else "relu2", format=format
        ).dequantize(torch.bfloat16)
        first_rows = [held[n] for n in ("gate", "up") if n in held]
        own[first].data.copy_(torch.cat(first_rows, 1))
        own["down_proj"].data.copy_(held["down"])
    found, best = losses(plain)
    row = of_formats.row(f"W{bits}A16", format)
    difference = statistics.mean(a - b for a, b in zip(found, base, strict=True))
    agreement = (best == base_best).double().mean().item()
    # As for NVFP4: bf16 rounding turns few of the most likely tokens.
    assert abs(row.difference - difference) < 0.02
    assert abs(row.agreement - agreement) < 0.06
    # Losses of an untrained model differ by less than their errors; its best tokens tell.
    assert format == "mxfp4" or row.agreement > of_formats.row("W4A16", "mxfp4").agreement


def test_windows_by_hand():
    ids = torch.arange(11)
    assert text_windows(ids, 3, 100, None).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert text_windows(ids, 2, 3, None).tolist() == [[0, 1], [4, 5]]
    assert text_windows(ids, 3, 6, 99).tolist() == [[99, 0, 1, 2], [99, 3, 4, 5]]


def test_standard_library_text(tmp_path):
    parts = [standard_library_text(held_out) for held_out in (False, True)]
    sizes = [sum(map(len, part)) for part in parts]
    assert 0.02 < sizes[1] / sum(sizes) < 0.2 and sizes[1] > 200_000
    assert not set(parts[0]) & set(parts[1])
    # The split is part of what the small models are: it must not change. sha256 decides.
    assert is_held_out(pathlib.PurePath("logging/handlers.py"))
    assert is_held_out(pathlib.PurePath("enum.py"))
    assert not is_held_out(pathlib.PurePath("inspect.py"))
    with pytest.raises(UnsupportedError, match="holds no Python sources"):
        standard_library_text(directory=str(tmp_path))
    for name in ("enum.py", "inspect.py", "test/enum.py", "empty.py"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("" if name == "empty.py" else f"# {name}\n")
    assert standard_library_text(True, str(tmp_path)) == [b"# enum.py\n"]
    assert standard_library_text(False, str(tmp_path)) == [b"# inspect.py\n"]

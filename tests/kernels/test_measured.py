"""The table that "auto" reads: what is shipped, what the user measured, and what follows."""

from __future__ import annotations

import json

import pytest

from fp4moe.errors import UnsupportedError
from fp4moe.kernels import measured
from fp4moe.kernels.measured import SHIPPED, choose_tiles, fastest, read
from fp4moe.kernels.triton.tiles import Config, Tile, parse_config
from fp4moe.layer import Layer

LAYER, HOPPER = Layer("silu", True, 2816, 704, 128, 8), (9, 0)
SLOT, SORTED = "slot 16,64,1,4,3 16,64,1,4,3", "sorted 16,64,1,4,3 16,64,1,4,3"
WIDE = "sorted 128,64,1,8,3 128,64,1,8,3"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a user's file, and forget it afterwards."""

    def write(**change):
        row = {
            "gpu": "a GPU",
            "capability": "9.0",
            "gated": True,
            "hidden_size": 2816,
            "intermediate_size": 704,
            "num_experts": 128,
            "top_k": 8,
            "us": {"triton": {"1": 9.0, "4": 9.0}, "humming": {"1": 8.0, "4": 10.0, "16": 1.0}},
            "tiles": {"1": SLOT, "16": SORTED, "4096": WIDE},
            "facts": {},
        }
        path = tmp_path / "measured.json"
        path.write_text(json.dumps({"measured": [row | change]}))
        monkeypatch.setenv("FP4MOE_MEASURED", str(path))
        measured.forget()
        return path

    yield write
    monkeypatch.undo()
    measured.forget()


def test_what_is_shipped_is_from_an_h200():
    layers = [layer for layer in read(SHIPPED) if layer.format == "nvfp4"]
    assert [layer.gated for layer in layers] == [True, False]
    for layer in layers:
        assert layer.gpu == "NVIDIA H200" and layer.capability == (9, 0)
        # Triton is taken: there is no load at which another kernel was faster.
        for kernel, by_tokens in layer.us.items():
            for tokens, us in by_tokens.items():
                assert layer.us["triton"][tokens] <= us, (kernel, tokens)


def test_fastest_is_the_geometric_mean_of_common_loads(write):
    # 9 x 9 = 81 against 8 x 10 = 80; T = 16 is one kernel's alone.
    write()
    assert fastest(["triton", "humming", "reference"], LAYER, HOPPER) == "humming"
    assert fastest(["triton", "reference"], LAYER, HOPPER) == "triton"
    assert fastest(["reference"], LAYER, HOPPER) == "reference"


@pytest.mark.parametrize("capability", [(10, 0), None])
def test_order_decides_where_nothing_was_measured(write, capability):
    write()
    assert fastest(["triton", "humming"], LAYER, capability) == "triton"


def test_an_unmeasured_first_stays_first(write):
    write()
    names = ["flashinfer_cutlass", "triton", "humming"]
    assert fastest(names, LAYER, HOPPER) == "flashinfer_cutlass"


def test_kernels_without_a_common_load_keep_their_order(write):
    write(us={"triton": {"1": 9.0}, "humming": {"2": 1.0}})
    assert fastest(["triton", "humming"], LAYER, HOPPER) == "triton"


@pytest.mark.parametrize(
    ("slots", "experts", "expected"),
    [
        (8, 128, SLOT),
        (48, 128, SLOT),
        # Never a program for each slot where there are many.
        (64, 4096, SORTED),
        (128, 128, SORTED),
        # 4096 tokens of 8 slots are 256 an expert; half an octave decides.
        (128 * 15, 128, SORTED),
        (128 * 17, 128, WIDE),
        (16 * 256, 16, WIDE),
    ],
)
def test_tiles_by_load(write, slots, experts, expected):
    write()
    assert choose_tiles((9, 0), True, 2816, 704, experts, slots) == parse_config(expected)


def test_tiles_of_the_nearest_layer(write):
    write()
    shipped = {layer.gated: layer for layer in read(SHIPPED) if layer.format == "nvfp4"}
    # Not gated is nearer than the user's own GPU; another GPU has the shipped tiles of that form.
    own = choose_tiles((9, 0), True, 2880, 720, 128, 8)
    other = choose_tiles((9, 0), False, 2688, 1856, 128, 6)
    assert own == parse_config(SLOT) and other == shipped[False].tiles[1]
    assert choose_tiles((8, 0), False, 2688, 1856, 128, 6) == shipped[False].tiles[1]


def test_a_config_is_written_as_it_is_read():
    config = Config("sorted", Tile(16, 32, 2, 4, 3), Tile(64, 64, 1, 8, 4, 16))
    assert str(config) == "sorted 16,32,2,4,3 64,64,1,8,4,16"
    assert parse_config(str(config)) == config


@pytest.mark.parametrize(
    "text",
    [
        "",
        "slot",
        "slot 1,2,3,4 1,2,3,4,5",
        "best " + SLOT[5:],
        SLOT + " quick",
        " " + SLOT,
        SLOT + ",16",
    ],
)
def test_no_config(text):
    with pytest.raises(ValueError, match=r"is no mode with two tiles"):
        parse_config(text)


@pytest.mark.parametrize("change", [{"tiles": {"1": "x"}}, {"us": 1}, {"capability": "ninety"}])
def test_a_broken_file_is_refused_by_name(write, change):
    path = write(**change)
    with pytest.raises(UnsupportedError) as error:
        choose_tiles((9, 0), True, 2816, 704, 128, 8)
    assert str(error.value).startswith(
        f"FP4MOE_MEASURED: the measurements in {path} cannot be read"
    )


def test_tiles_of_rounded_activations_are_their_own(write):
    write(format="fp8", w8a8_tiles={"1": WIDE})
    sizes = ((9, 0), True, 2816, 704, 128, 8)
    # Another FP8 format of the nearest layer takes them, kernel triton does not.
    for format in ("fp8", "fp8_channel"):
        assert choose_tiles(*sizes, format, w8a8=True) == parse_config(WIDE)
    assert choose_tiles(*sizes, "fp8") == parse_config(SLOT)


def test_tiles_belong_to_a_format(write):
    sizes = (HOPPER, True, 2816, 704, 128)
    plain = choose_tiles(*sizes, 128)
    # Without a table of its own a format takes NVFP4's.
    assert choose_tiles(*sizes, 128, "fp8").mode == plain.mode
    write(format="fp8")
    assert choose_tiles(*sizes, 4096 * 8, "fp8") == parse_config(WIDE)
    assert choose_tiles(*sizes, 128) == plain
    layers = [Layer("silu", True, 2816, 704, 128, 8, format=name) for name in ("fp8", "nvfp4")]
    assert [fastest(["triton", "humming"], layer, HOPPER) for layer in layers] == [
        "humming",
        "triton",
    ]

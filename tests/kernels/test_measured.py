"""The table that "auto" reads: what is shipped, what the user measured, and what follows."""

from __future__ import annotations

import json

import pytest

from fp4moe.errors import UnsupportedError
from fp4moe.formats import FORMATS
from fp4moe.kernels import measured
from fp4moe.kernels.measured import SHIPPED, choose_one_token, choose_tiles, fastest, read
from fp4moe.kernels.triton.tiles import Config, Tile, parse_config, parse_one_token
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


@pytest.mark.parametrize("gated", [True, False])
def test_one_token_has_tiles_of_its_own_where_they_were_measured(write, gated):
    shipped = {m.gated: m for m in read(SHIPPED) if m.format == "nvfp4"}[gated]
    sizes = (shipped.hidden_size, shipped.intermediate_size)
    top_k, tiles = shipped.top_k, shipped.one_token
    assert tiles is not None
    # A user's file without any does not take them away.
    write(gated=gated)
    assert choose_one_token(HOPPER, gated, *sizes, 128, top_k) == tiles
    # Fewer weights a token: the same. More: nothing was measured.
    assert choose_one_token(HOPPER, gated, sizes[0] - 64, sizes[1], 16, top_k) == tiles
    assert choose_one_token(HOPPER, gated, *sizes, 128, 1) == tiles
    assert choose_one_token(HOPPER, gated, sizes[0] + 64, sizes[1], 128, top_k) is None
    assert choose_one_token(HOPPER, gated, *sizes, 128, top_k + 1) is None
    for capability in ((8, 0), (8, 9), (10, 0), (12, 0), None):
        assert choose_one_token(capability, gated, *sizes, 128, top_k) is None
    for format in FORMATS.keys() - {"nvfp4"}:
        assert choose_one_token(HOPPER, gated, *sizes, 128, top_k, format) is None
    # Small layers whose slots or slabs are too many for a program.
    assert choose_one_token(HOPPER, gated, 64, 64, 128, 8) == tiles
    assert choose_one_token(HOPPER, gated, 64, 64, 128, 9) is None
    assert choose_one_token(HOPPER, gated, 5632, 64, 128, 8) == tiles
    assert choose_one_token(HOPPER, gated, 5633, 64, 128, 8) is None
    assert choose_one_token(HOPPER, gated, 64, 1408, 128, 8) == tiles
    assert choose_one_token(HOPPER, gated, 64, 1409, 128, 8) is None


def test_a_users_tiles_for_one_token_come_first(write):
    write(one_token="32,1,4 32,1,8")
    own = parse_one_token("32,1,4 32,1,8")
    assert choose_one_token(HOPPER, True, 2816, 704, 128, 8) == own and str(own) == "32,1,4 32,1,8"
    assert choose_one_token(HOPPER, False, 2688, 1856, 128, 6) not in (own, None)


@pytest.mark.parametrize(
    "text", ["", "16,3,4", "16,3,4 32,3", "16,3,4  32,3,8", "8,3,4 32,3,8", "16,0,4 32,3,8"]
)
def test_no_tiles_for_one_token(text):
    with pytest.raises(ValueError, match="is no pair of tiles"):
        parse_one_token(text)


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


@pytest.mark.parametrize(
    "change", [{"tiles": {"1": "x"}}, {"us": 1}, {"capability": "ninety"}, {"one_token": "16"}]
)
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

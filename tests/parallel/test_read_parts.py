"""One process reads its part of a checkpoint: the numbers of the whole layer, and little else."""

from __future__ import annotations

from unittest import mock

import checkpoint_makers as makers
import format_files
import pytest
import torch
from tiny_models import family, qwen3_moe

import fp4moe
from fp4moe.checkpoint.files import CheckpointFiles
from fp4moe.checkpoint.read import read_experts
from fp4moe.errors import CheckpointError, ShapeError
from fp4moe.part import EXPERTS, part_of_experts, part_of_intermediate
from fp4moe.pretrained import loading
from fp4moe.reference import reference

FORMATS = ("nvfp4", "fp8", "fp8_channel", "fp8_block", "mxfp8", "mxfp4")
MODELS = {"qwen3_moe": qwen3_moe, "gpt_oss": lambda *how: family("gpt_oss", *how)}


@pytest.fixture(scope="module")
def save(tmp_path_factory):
    """A function: (name, format) -> a checkpoint of experts of 192 x 160; None for bfloat16."""
    root = tmp_path_factory.mktemp("parts")

    def directory(name, form=None):
        folder = root / name
        if not folder.exists():
            with format_files.sizes(intermediate_size=160, **format_files.SIZES):
                model = MODELS[name]("eager", torch.bfloat16)
            model.config.architectures = [type(model).__name__]
            for parameter in model.parameters():
                parameter.data = torch.randn_like(parameter) * 0.1
            model.save_pretrained(folder)
        if form is None:
            return folder
        packed = root / f"{name}_{form}"
        if not packed.exists():
            fp4moe.quantize_checkpoint(folder, packed, format=form, progress=False)
        return packed

    return directory


def read_calls(directory, **options):
    """What from_pretrained hands to `read_experts`, and what comes back, for each layer."""
    calls = []

    def spy(*args, **how):
        calls.append((args, how, read_experts(*args, **how).weights))
        return mock.Mock(weights=calls[-1][2], folded=0, unseen=())

    with mock.patch.object(loading, "read_experts", spy):
        fp4moe.from_pretrained(directory, dtype=torch.float32, progress=False, **options)
    return calls


def parts(weights):
    """Two parts of each kind."""
    size, form = weights.intermediate_size, weights.format
    for index in range(2):
        yield part_of_experts(index, 2, weights.num_experts, caller="test")
        yield part_of_intermediate(index, 2, size, form, caller="test")


def same(got, expected):
    assert got.metadata() == expected.metadata()
    for name, tensor in expected.tensors().items():
        assert torch.equal(got.tensors()[name].float(), tensor.float()), name


CASES = [(form, True) for form in FORMATS] + [("nvfp4", False), ("fp8_block", False)]


@pytest.mark.parametrize(("form", "stored"), CASES)
def test_a_part_is_that_of_the_whole_layer(form, stored, save):
    directory = save("qwen3_moe", form if stored else None)
    (args, how, whole), _ = read_calls(directory, **({} if stored else {"format": form}))
    for part in parts(whole):
        found = read_experts(*args, **{**how, "part": part}).weights
        same(found, part.cut(whole))
        assert abs(found.nbytes / whole.nbytes - part.size / part.total) < 0.02


@pytest.mark.parametrize("stored", [True, False])
def test_the_outputs_of_biased_parts_sum_to_the_whole(stored, save):
    directory = save("gpt_oss", "nvfp4" if stored else None)
    (args, how, whole), _ = read_calls(directory)
    hidden = torch.randn(20, whole.hidden_size)
    ids = torch.rand(20, whole.num_experts).argsort(1)[:, :2]
    weights = torch.rand(20, 2)
    expected = reference(hidden, whole, ids, weights)
    for kind in range(2):
        found = [
            read_experts(*args, **{**how, "part": part}).weights
            for part in list(parts(whole))[kind::2]
        ]
        got = sum(reference(hidden, one, ids, weights) for one in found)
        # Two float32 sums instead of one.
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(reference(hidden, found[0], ids, weights), expected, atol=1e-2)


def test_what_another_process_holds_is_not_read(save, tmp_path):
    """Its block scales are NaN in the file: reading them would be an error."""
    directory = save("qwen3_moe", "nvfp4")
    (args, how, whole), _ = read_calls(directory)
    plan = args[2]
    for number, part in enumerate(parts(whole)):
        damaged = tmp_path / f"damaged{number}"
        makers.rewrite(directory, damaged, lambda tensors, part=part: damage(tensors, plan, part))
        with CheckpointFiles.open(damaged) as files:
            found = read_experts(files, *args[1:], **{**how, "part": part}).weights
            same(found, part.cut(whole))
            other = list(parts(whole))[(number + 2) % 4]
            with pytest.raises(CheckpointError, match="block scales that are numbers"):
                read_experts(files, *args[1:], **{**how, "part": other})


def damage(tensors, plan, part):
    """Make the block scales of all other parts NaN."""
    for (expert, name), matrix in plan.matrices.items():
        scale = tensors[matrix.keys["block_scale"]].view(torch.uint8)
        keep = torch.zeros_like(scale, dtype=torch.bool)
        if part.kind == EXPERTS:
            keep[:] = expert in range(part.start, part.stop)
        elif name == "down_proj":
            keep[:, part.start // 16 : part.stop // 16] = True
        else:
            keep[part.start : part.stop] = True
        scale[~keep] = 0x7F


def test_sizes_that_do_not_divide_are_named():
    with pytest.raises(ShapeError, match="must divide the 8 experts of a layer; got 3"):
        part_of_experts(0, 3, 8, caller="from_pretrained")
    with pytest.raises(ShapeError, match="be at most 3, its blocks of 16 in nvfp4; got 4"):
        part_of_intermediate(0, 4, 48, "nvfp4", caller="from_pretrained")
    ends = [part_of_intermediate(i, 8, 704, "nvfp4", caller="test") for i in range(8)]
    assert [part.size for part in ends] == [96] * 4 + [80] * 4
    assert [part.start for part in ends[1:]] == [part.stop for part in ends[:-1]]
    assert str(ends[1]) == "intermediate columns 96 to 191 of 704 (part 2 of 8)"

"""The code and commands of the README and of every page work as they stand; the examples run."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import types

import pytest
import torch
import torch._inductor
from doc_blocks import HUB_MODEL, PAGES, README, ROOT, blocks, commands, run_page
from tiny_models import gemma4

import fp4moe
from fp4moe.activations import ACTIVATIONS
from fp4moe.checkpoint import readers
from fp4moe.formats import FORMATS
from fp4moe.kernels import KERNELS
from fp4moe.kernels.reference import ReferenceKernel
from fp4moe.testing import relative_error

LLM_COMPRESSOR = ROOT / "tests" / "data" / "llm_compressor"


@pytest.fixture(scope="module")
def small_gemma4(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma4")
    gemma4(dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def paths(small_gemma4, tmp_path):
    """What stands for the models of a page."""
    return {
        HUB_MODEL: small_gemma4,
        "path/to/fp8": LLM_COMPRESSOR / "qwen3_moe_FP8",
        "path/to/fp8_channel": LLM_COMPRESSOR / "qwen3_moe_FP8_DYNAMIC",
        "path/to/saved": tmp_path / "saved",
        "path/to/acme": tmp_path / "acme",
    }


@pytest.fixture
def registries(monkeypatch):
    """Whatever a page adds is gone after it."""
    peft = pytest.importorskip("peft", reason="optional package")
    tuners, kind = peft.PEFT_TYPE_TO_TUNER_MAPPING, peft.PeftType.LORA
    monkeypatch.setitem(tuners, kind, tuners[kind])
    monkeypatch.setattr(readers, "READERS", list(readers.READERS))
    before = [(r, dict(r)) for r in (ACTIVATIONS, FORMATS, KERNELS, ReferenceKernel.layouts)]
    yield
    for registry, entries in before:
        registry.clear()
        registry.update(entries)


with_code = [
    page for page in (README, *PAGES) if any(not b.not_run for b in blocks(page, "python"))
]


# Compiling ahead of time takes half a minute with optimisation.
@pytest.mark.slow
@pytest.mark.parametrize("page", with_code, ids=lambda page: page.stem)
@torch._inductor.config.patch("aot_inductor.compile_wrapper_opt_level", "O0")
def test_code_of_a_page_runs(page, paths, registries, fresh_dynamo, capsys):
    names = run_page(page, paths)
    out = capsys.readouterr().out
    if page == README:
        assert "2 replaced" in out
    if page.stem == "extending":
        check_cubic_layer(names)
    if page.stem == "graph-pass":
        # The block compiled ahead of time and a single call have the same weights.
        weights = fp4moe.ExpertWeights.quantize(
            **{name: names[name] for name in ("gate", "up", "down")}, activation="silu"
        )
        inputs = (names[name] for name in ("expert_ids", "routing_weights"))
        one_call = fp4moe.fused_moe(names["hidden"], weights, *inputs)
        # Float32 sums of 128 terms in another order.
        torch.testing.assert_close(names["out"], one_call, rtol=1e-5, atol=1e-4)


def check_cubic_layer(names):
    """The page's own activation, against its formula in float64."""
    parts = {name: part.double() for name, part in names["cubic"].dequantize().items()}
    out = torch.zeros_like(names["hidden"], dtype=torch.float64)
    for token, (experts, weights) in enumerate(
        zip(names["expert_ids"].tolist(), names["routing_weights"].double(), strict=True)
    ):
        for expert, weight in zip(experts, weights, strict=True):
            x = names["hidden"][token].double()
            gate, up = parts["gate"][expert] @ x, parts["up"][expert] @ x
            inner = gate.clamp(max=0.5) ** 3 * up.clamp(-0.5, 0.5)
            out[token] += weight * (parts["down"][expert] @ inner)
    # Three float32 sums of at most 64 products, against float64; the cube triples the first.
    assert relative_error(names["cubic_out"].double(), out) < 5 * 64 * 2**-24


def test_what_is_not_run_has_a_reason_and_is_run_elsewhere():
    skipped = [block for page in (README, *PAGES) for block in blocks(page) if block.not_run]
    for block, word in zip(skipped, ("autotune", "DistributedConfig("), strict=True):
        assert word in block.code
        (elsewhere,) = re.findall(r"tests/\S+\.py", block.not_run)
        assert word in (ROOT / elsewhere).read_text("utf-8")


def check_command(command: str) -> None:
    """Raise unless a reader can type it: a target, a file, or arguments that fp4moe parses."""
    from fp4moe.tools.cli import make_parser

    makefile = (ROOT / "Makefile").read_text()
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), command
    elif words[:2] == ["pip", "install"]:
        extra = re.search(r"\[(\w+)\]", command)
        assert "-c constraints.txt" in command, command
        assert not extra or f"\n{extra[1]} = [" in (ROOT / "pyproject.toml").read_text(), command
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file(), command
    elif words[0] == "fp4moe":
        parser, _ = make_parser()
        parser.parse_args(words[1:])
    else:
        assert command == "python3 -m venv .venv && . .venv/bin/activate", command


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_commands_of_a_page_can_be_typed(page):
    for command in commands(page):
        check_command(command)


@pytest.mark.parametrize(
    "command", ["make nothing", "python no_file.py", "fp4moe quantise a b", "pip install fp4moe"]
)
def test_a_command_that_cannot_be_typed_is_noticed(command, capsys):
    with pytest.raises((AssertionError, SystemExit)):
        check_command(command)


def test_ci_runs_the_commands_of_the_readme():
    ci = (ROOT / ".ci" / "run").read_text()
    assert all(f"make {target}\n" in ci for target in ("demo", "bench", "docs", "test"))


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = README.read_text("utf-8")
    assert len(text.splitlines()) <= 140
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    assert len(links) > 10
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_the_demo_runs_every_example():
    recipe = (ROOT / "Makefile").read_text().split("\ndemo:")[1].split("\n\n")[0]
    run = set(re.findall(r"examples/(\w+\.py)", recipe))
    assert run == {f.name for f in (ROOT / "examples").glob("*.py")} - {"one_layer.py"}


def test_the_reference_has_every_public_name():
    page = (ROOT / "docs" / "reference.md").read_text("utf-8")
    for name in fp4moe.__all__:
        if isinstance(getattr(fp4moe, name), types.FunctionType | type):
            assert f"heading: fp4moe.{name}\n" in page, name


def test_every_refusal_is_in_the_list_with_its_cure():
    path = ROOT / "docs" / "scripts" / "refusals.py"
    spec = importlib.util.spec_from_file_location("refusals", path)
    refusals = importlib.util.module_from_spec(spec)
    sys.modules["refusals"] = refusals
    spec.loader.exec_module(refusals)
    found = refusals.collect()
    # Three messages as a user meets them: by a constant, by a variable, through a helper.
    says = {(r.function, r.cure) for r in found}
    assert ("fused_moe", "Use ExpertWeights.quantize.") in says
    assert ("replace_moe", "Pass strict=False to leave these as they are.") in says
    assert ("from_pretrained", "Check hf_quant_config.json.") in says
    # As many as there are calls, apart from those inside the helpers that hand arguments on.
    sources = "".join(
        f.read_text("utf-8") for folder in refusals.SOURCES for f in folder.rglob("*.py")
    )
    calls = len(re.findall(r"^\s+(?:raise )?(?:must|refuse|check_choice)\(", sources, re.MULTILINE))
    assert len(found) > 0.9 * calls > 200
    without = [r for r in found if r.cure in ("", "…", "….") and r.function]
    assert without == []


@pytest.mark.slow
def test_what_the_examples_do_works_on_small_models():
    folders = [str(ROOT / name) for name in ("examples", "tests/support")]
    code = f"import sys\nsys.path += {folders}\nimport one_layer, tiny_models as models\n"
    code += "one_layer.VOCABULARY = 100\nfor build in (models.gemma4, models.nemotron_h):\n"
    code += "    one_layer.run(build())\n    print('done')\n"
    # In a process of its own, as it makes transformers quiet.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "[transformers]" not in done.stderr and "\r" not in done.stderr, done.stderr
    *outs, end = re.split("^done\n", done.stdout, flags=re.MULTILINE)
    assert len(outs) == 2 and not end
    for out in outs:
        # In float32 no near tie flips: compiled and replaced models generate the same tokens.
        compiled, replaced = re.findall(
            r"^tokens, (?:compiled|replace).*: +(\[.*\])$", out, re.MULTILINE
        )
        assert compiled == replaced
        assert re.search(r"fp4moe.backend, grouped_mm +1 / 0", out)
        assert re.search(r"replace_moe +1 / 0", out)
        assert re.search(r"Hugging Face, eager +(\d\d|[2-9]) / ", out)
        assert "times smaller" in out


@pytest.mark.parametrize("name", ["gemma4_compile", "nemotron_h_compile"])
def test_the_examples_have_the_real_widths(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.delitem(sys.modules, name, raising=False)
    module = __import__(name)
    seen = []
    monkeypatch.setattr(module, "run", seen.append)
    with torch.device("meta"):
        module.main()
    (block,) = fp4moe.explain(seen[0], only_structure=True).blocks
    sizes = (block.num_experts, block.top_k, block.hidden_size, block.intermediate_size)
    assert (sizes, block.activation) in [
        ((128, 8, 2816, 704), "gelu_tanh"),
        ((128, 6, 2688, 1856), "relu2"),
    ]
    assert block.status == "replaceable" and block.nbytes > 1.4e9


@pytest.mark.slow
def test_the_example_of_fine_tuning_learns():
    pytest.importorskip("peft", reason="optional package")
    script = [sys.executable, str(ROOT / "examples" / "lora_finetune.py"), "--steps", "12"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pattern = r"held-out loss: ([\d.]+) before, ([\d.]+) after"
    before, after = map(float, re.search(pattern, done.stdout).groups())
    # Twelve steps take a tenth off; eighty a fifth.
    assert after < 0.95 * before
    assert f"adapter loaded again: {after:.3f}" in done.stdout
    assert "12/12" in done.stderr and "loss=" in done.stderr


@pytest.mark.slow
def test_the_tables_and_pictures_are_those_of_the_measurements(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables

    results = ROOT / "benchmarks" / "results"
    measured = json.loads((results / "h200.json").read_text())
    skewed = json.loads((results / "h200_skewed.json").read_text())
    text = (results / "h200_kernels.md").read_text()
    page = (ROOT / "docs" / "performance.md").read_text("utf-8")
    for shape in tables.TITLES:
        assert tables.table(measured, shape) in text
        assert tables.table(skewed, shape) in text
        assert tables.table(measured, shape, short=True) in page
    whole = json.loads((results / "h200_generate.json").read_text())["rows"]
    for model in tables.MODELS:
        assert tables.whole_models(whole, model) in page
        for value in ("decode_ms", "prefill_ms"):
            assert tables.whole_models(whole, model, value) in text
    by_format = json.loads((results / "h200_formats.json").read_text())
    assert all(tables.by_format(by_format, shape) in page for shape in tables.TITLES)
    assert tables.gains(whole) in README.read_text("utf-8")
    script = [sys.executable, str(ROOT / "benchmarks" / "plots.py"), "--out", str(tmp_path)]
    subprocess.run(script, check=True, capture_output=True)
    for made in tmp_path.iterdir():
        # Places of text hang on the version of matplotlib; what is drawn does not.
        committed = (ROOT / "docs" / "images" / made.name).read_text()
        for mark in ('<g id="line2d', '<g id="patch'):
            assert made.read_text().count(mark) == committed.count(mark) > 10, made.name

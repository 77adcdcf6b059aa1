"""The README's code and commands work as they stand, and the examples run."""

from __future__ import annotations

import json
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import torch
import torch._inductor
from tiny_models import gemma4

import fp4moe

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = "\n".join(blocks("bash")).splitlines()
    return [line.partition("#")[0].strip() for line in lines if line.partition("#")[0].strip()]


# Compiling ahead of time takes half a minute with optimisation.
@pytest.mark.slow
@torch._inductor.config.patch("aot_inductor.compile_wrapper_opt_level", "O0")
def test_readme_code_runs(tmp_path, fresh_dynamo, capsys):
    gemma4(dtype=torch.bfloat16).save_pretrained(tmp_path)
    names: dict = {"__name__": "readme"}
    for code in blocks("python"):
        if "autotune" in code:
            continue  # Blackwell's: tests/kernels/flashinfer/with_library/test_models.py runs it
        code = code.replace("google/gemma-4-26B-A4B-it", str(tmp_path))
        assert str(tmp_path) in code or "from_pretrained" not in code
        exec(compile(code, "README.md", "exec"), names)
    assert "2 replaced" in capsys.readouterr().out
    # The block compiled ahead of time and the single call before it have the same weights.
    one_call = fp4moe.fused_moe(
        *(names[n] for n in ("hidden", "weights", "expert_ids", "routing_weights"))
    )
    # Float32 sums of 128 terms in another order.
    torch.testing.assert_close(names["out"], one_call, rtol=1e-5, atol=1e-4)


def test_every_command_of_the_readme_is_run_somewhere():
    makefile = (ROOT / "Makefile").read_text()
    ci = (ROOT / ".ci" / "run").read_text()
    for command in commands():
        words = shlex.split(command)
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), command
        elif words[:2] == ["pip", "install"]:
            assert "install" in makefile and "." in words[-1], command
        elif words[0] == "python":
            # Examples run below, benchmarks by `make bench`.
            assert (ROOT / words[1]).is_file(), command
        else:
            # tests/tools/test_cli.py, test_selftest.py, test_bench.py,
            # test_checkpoint_writer.py and test_evaluate.py run these.
            known = ("info", "explain", "selftest", "bench", "quantize", "evaluate")
            assert words[0] == "fp4moe" and words[1] in known, command
    assert "make test" in ci and "make demo" in ci and "make bench" in ci


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
def test_the_tables_are_those_of_the_measurements(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import tables

    results = ROOT / "benchmarks" / "results"
    measured = json.loads((results / "h200.json").read_text())
    skewed = json.loads((results / "h200_skewed.json").read_text())
    text = (results / "h200_kernels.md").read_text()
    for shape in tables.TITLES:
        assert tables.table(measured, shape) in text
        assert tables.table(skewed, shape) in text
        assert tables.table(measured, shape, short=True) in README
    whole = json.loads((results / "h200_generate.json").read_text())["rows"]
    for model in tables.MODELS:
        assert tables.whole_models(whole, model) in README
        for value in ("decode_ms", "prefill_ms"):
            assert tables.whole_models(whole, model, value) in text
    tables.plot(measured, tmp_path / "h200.svg")
    assert (tmp_path / "h200.svg").read_text().count('<g id="line2d') > 20

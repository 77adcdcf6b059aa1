"""Progress bars: on a terminal, and nothing in a log."""

from __future__ import annotations

import ast
import io
import json
import pathlib
import subprocess
import sys

import pytest
import torch
from huggingface_hub import utils as hub
from tiny_models import enlarge_experts, gemma4, qwen3_moe
from trained_models import training_script
from transformers.utils import logging

import fp4moe
from fp4moe.progress import progress_bar, transformers_bars

ROOT = pathlib.Path(__file__).resolve().parents[1]
BUILDS = {"qwen3_moe": qwen3_moe, "gemma4": gemma4}


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Float checkpoints, one with a tokenizer, and a text to calibrate on."""
    root = tmp_path_factory.mktemp("progress")
    for name, build in BUILDS.items():
        model = build("eager", torch.bfloat16)
        model.config.architectures = [type(model).__name__]
        model.save_pretrained(root / name)
    script = training_script()
    script.save(enlarge_experts(script.gemma4()), root / "with tokenizer")
    (root / "text.jsonl").write_text(json.dumps({"text": "def f(x): return x"}) + "\n")
    (root / "text.txt").write_text("def f(x): return x\n" * 40)
    return root


def replace(folder, name, target, **options):
    fp4moe.replace_moe(BUILDS[name](), **options)


def load(folder, name, target, **options):
    fp4moe.from_pretrained(folder / name, dtype=torch.bfloat16, **options)


def quantize(folder, name, target, **options):
    fp4moe.quantize_checkpoint(folder / name, target, **options)


def evaluate(folder, name, target, **options):
    sizes = {"tokens": 32, "length": 16, "device": "cpu"}
    texts = {"text": folder / "text.txt", "calibrate": folder / "text.jsonl"}
    fp4moe.evaluate(folder / "with tokenizer", **texts, **sizes, **options)


WANTED = {
    replace: ["checking experts", "packing experts: 100%", "2/2"],
    load: ["packing experts: 100%", "2/2"],
    quantize: ["quantising experts: 100%"],
    evaluate: ["calibrating: 100%", "bf16: 100%", "2/2"],
}
CASES = [(call, name) for call in WANTED for name in BUILDS if (call, name) != (evaluate, "gemma4")]


@pytest.mark.slow
@pytest.mark.parametrize(("call", "name"), CASES, ids=lambda x: getattr(x, "__name__", x))
@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "log"])
def test_bars_are_for_terminals(call, name, terminal, folder, tmp_path, monkeypatch):
    from transformers.utils import logging

    logging.disable_progress_bar()  # transformers' own
    monkeypatch.setattr(sys, "stderr", Stream(terminal))
    try:
        call(folder, name, tmp_path / "out")
        shown = sys.stderr.getvalue()
        sys.stderr.truncate(0)
        call(folder, name, tmp_path / "again", progress=False)
        assert sys.stderr.getvalue() == ""
    finally:
        logging.enable_progress_bar()
    if terminal:
        assert all(text in shown for text in WANTED[call]), shown
    else:
        assert "\r" not in shown and "%" not in shown, shown


@pytest.mark.slow
def test_a_process_whose_stderr_is_a_file():
    code = "import fp4moe, tiny_models; fp4moe.replace_moe(tiny_models.qwen3_moe())"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT / "tests/support",
        capture_output=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_every_bar_is_made_in_one_place():
    for file in [*(ROOT / "src").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]:
        calls = [n.func for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)]
        made = [f for f in calls if isinstance(f, ast.Name) and f.id in ("tqdm", "trange")]
        assert not made or file.name == "progress.py", file


def test_what_is_gone_through_is_the_same():
    assert list(progress_bar(range(3), show=False)) == [0, 1, 2]
    with progress_bar(show=False, total=2) as bar:
        bar.update(2)


def test_bars_of_transformers_are_hidden_for_a_while(monkeypatch):
    for hub_hidden in (False, True):
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        (hub.disable_progress_bars if hub_hidden else hub.enable_progress_bars)()
        with transformers_bars(), transformers_bars():
            assert not logging.is_progress_bar_enabled() and hub.are_progress_bars_disabled()
        assert logging.is_progress_bar_enabled()
        assert hub.are_progress_bars_disabled() == hub_hidden
    hub.enable_progress_bars()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with transformers_bars():
        assert logging.is_progress_bar_enabled()

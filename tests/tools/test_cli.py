"""`fp4moe info` and `fp4moe explain`, as a user types them."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys

import pytest
from tiny_models import gemma4, nemotron_h

import fp4moe
from fp4moe.tools.cli import LAYERS, main, make_parser


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "fp4moe", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_info_as_a_module():
    result = run("info")
    assert result.returncode == 0
    assert f"fp4moe             {fp4moe.__version__}" in result.stdout
    for layer in LAYERS:
        assert f"Kernels for a layer of {layer}:" in result.stdout
    assert re.search(r"^reference +yes$", result.stdout, re.MULTILINE)


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"fp4moe {fp4moe.__version__}\n"


@pytest.mark.parametrize("build, blocks", [(gemma4, 2), (nemotron_h, 2)])
def test_explain_from_a_configuration(build, blocks, tmp_path, capsys):
    model = build()
    model.config.save_pretrained(tmp_path)
    assert main(["explain", str(tmp_path), "--json"]) == 0
    from_config = json.loads(capsys.readouterr().out)
    assert from_config == json.loads(json.dumps(fp4moe.explain(model).to_dict()))
    assert [b["status"] for b in from_config["blocks"]] == ["replaceable"] * blocks
    assert main(["explain", str(tmp_path / "config.json")]) == 0
    assert f"{blocks} replaceable" in capsys.readouterr().out


def test_explain_says_what_is_wrong(tmp_path, capsys):
    assert main(["explain", str(tmp_path)]) == 2
    assert "model must be a directory with config.json" in capsys.readouterr().err
    gemma4().config.save_pretrained(tmp_path)
    assert main(["explain", str(tmp_path), "--kernel", "fast"]) == 2
    assert "kernel must be auto or one of" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    assert main(["explain", str(tmp_path)]) == 2
    assert "must have a configuration that transformers can build" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{not json")
    assert main(["explain", str(tmp_path)]) == 2
    assert "must have a configuration that transformers can build" in capsys.readouterr().err


def test_an_unknown_command_lists_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        main(["fly"])
    assert "info" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(make_parser()[1].choices))
def test_the_help_of_a_command_is_complete(name):
    command = make_parser()[1].choices[name]
    # Whole sentences first; each option with its meaning, each default, an example that parses.
    assert all(part.endswith(".") for part in command.description.split("\n\n"))
    text = " ".join(command.format_help().split())
    for action in command._actions:
        assert action.help, f"{name} {action.dest}"
        if action.default not in (None, False, [], "", argparse.SUPPRESS):
            shown = " ".join(str(action.default).strip("[]()").replace(",", "").split())
            assert f"default: {shown.replace(chr(39), '')}" in text, f"{name} {action.dest}"
    examples = [line.split() for line in command.epilog.splitlines()[1:]]
    assert examples
    for program, *arguments in examples:
        assert program == "fp4moe" and make_parser()[0].parse_args(arguments).command == name

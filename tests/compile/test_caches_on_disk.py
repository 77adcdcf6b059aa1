"""Inductor's caches on disk serve a second process, AOTAutograd's and the graph's, by both ways."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys, torch, fp4moe
from fp4moe.testing import relative_error
sys.path.insert(0, sys.argv[1])
from moe_layers import hidden, moe_layer
from torch._dynamo.utils import counters
layer, found = moe_layer("gemma4"), {}
want = fp4moe.replace_moe(moe_layer("gemma4"), progress=False)(hidden())
ways = {"backend": {"backend": fp4moe.backend}, "pass": {"options": fp4moe.inductor_options()}}
for way, how in ways.items():
    torch.compiler.reset()
    counters.clear()
    with torch.no_grad():
        out = torch.compile(layer, **how, fullgraph=True)(hidden())
    found[way] = {name: counters[part][name] for part, name in
                  (("aot_autograd", "autograd_cache_hit"), ("inductor", "fxgraph_cache_hit"))}
    found[way]["error"] = relative_error(out, want)
print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_second_process_hits(tmp_path):
    settings = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    support = str(pathlib.Path(__file__).parents[1] / "support")
    runs = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, support],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    for way in ("backend", "pass"):
        first, second = (run[way] for run in runs)
        assert first["autograd_cache_hit"] == 0
        assert second["autograd_cache_hit"] == 1
        # Float32 sums in another order, see test_backend.py.
        assert max(first["error"], second["error"]) < 5e-6

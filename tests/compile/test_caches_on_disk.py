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
sys.path.insert(0, sys.argv[2])
from moe_layers import hidden, moe_layer
from torch._dynamo.utils import counters
how = {"backend": {"backend": fp4moe.backend}, "pass": {"options": fp4moe.inductor_options()}}
layer = moe_layer("gemma4")
with torch.no_grad():
    out = torch.compile(layer, **how[sys.argv[1]], fullgraph=True)(hidden())
    want = fp4moe.replace_moe(layer, progress=False)(hidden())
hits = {name: counters[part][name] for part, name in
        (("aot_autograd", "autograd_cache_hit"), ("inductor", "fxgraph_cache_hit"))}
print(json.dumps({**hits, "error": relative_error(out, want)}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["backend", "pass"])
def test_a_second_process_hits(way, tmp_path):
    settings = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    found = []
    for _ in range(2):
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                PROGRAM,
                way,
                str(pathlib.Path(__file__).parents[1] / "support"),
            ],
            env={**os.environ, **settings},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    first, second = found
    assert first["autograd_cache_hit"] == 0
    assert second["autograd_cache_hit"] == 1
    # Float32 sums in another order, see test_backend.py.
    assert max(first["error"], second["error"]) < 5e-6

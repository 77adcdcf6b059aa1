#!/usr/bin/env bash
# Everything that wants a GPU, in one call: tests, examples, benchmarks. Installs nothing.
# Usage: benchmarks/gpu_check.sh OUTPUT_FOLDER [extra PYTHONPATH]
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=$1
layout=$(mktemp -d)
# As the wheel lays it out, so that fp4moe.passes imports without an installation.
cp -R src/fp4moe "$layout/fp4moe"
cp -R passes "$layout/fp4moe/passes"
export PYTHONPATH="$layout:${2:-}" PYTHONUNBUFFERED=1
{
    python3 -m fp4moe info
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
    date -u +%F
} >"$out/info.txt" 2>&1
for example in gemma4_compile nemotron_h_compile; do
    python3 "examples/$example.py" >"$out/$example.txt" 2>&1
    echo "$example: exit $?"
done
python3 -m pytest -q -p no:cacheprovider -p no:benchmark --ignore tests/test_packaging.py ${GPU_PYTEST:-} tests \
    >"$out/pytest.txt" 2>&1
echo "pytest: exit $?"
tail -n 40 "$out/pytest.txt"
python3 benchmarks/bench_dispatch.py >"$out/bench_dispatch.txt" 2>&1
echo "bench_dispatch: exit $?"

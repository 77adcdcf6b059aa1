#!/usr/bin/env bash
# Everything that wants a GPU: tests, examples, layers, whole models. Installs nothing.
# Usage: benchmarks/gpu_check.sh OUTPUT_FOLDER [PART...], PYTHONPATH for packages that are missing.
# Parts: tests examples selftest dispatch layers skewed sanitize gemma4 nemotron; default all.
# The last two take a minute for each setting and batch; with several GPUs start them side by side.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=$1
shift
parts=${*:-tests examples selftest dispatch layers skewed sanitize gemma4 nemotron}
layout=$(mktemp -d)
# As the wheel lays it out, so that fp4moe.passes imports without an installation.
cp -R src/fp4moe "$layout/fp4moe"
cp -R passes "$layout/fp4moe/passes"
export PYTHONPATH="$layout:${PYTHONPATH:-}" PYTHONUNBUFFERED=1

step() { # name, command...
    local name=$1
    shift
    "$@" >"$out/$name.txt" 2>&1
    echo "$name: exit $?"
    tail -n 5 "$out/$name.txt"
}

{
    python3 -m fp4moe info
    nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
    date -u +%F
} >"$out/info.txt" 2>&1
for part in $parts; do
    case $part in
    tests) step tests python3 -m pytest -q -p no:cacheprovider -p no:benchmark -m gpu tests ;;
    examples)
        step gemma4_compile python3 examples/gemma4_compile.py
        step nemotron_h_compile python3 examples/nemotron_h_compile.py
        ;;
    selftest) step selftest python3 -m fp4moe selftest ;;
    dispatch) step dispatch python3 benchmarks/bench_dispatch.py ;;
    layers) step layers python3 -m fp4moe bench --json "$out/layers.json" ;;
    skewed) step skewed python3 -m fp4moe bench --routing skewed --no-peers --json "$out/skewed.json" ;;
    sanitize) step sanitize compute-sanitizer --tool memcheck python3 benchmarks/every_tile.py ;;
    gemma4 | nemotron)
        # Nemotron's prefill asks for 32 GiB at once.
        step "$part" env PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python3 benchmarks/generate.py --model "$part" --json "$out/$part.json"
        ;;
    *) echo "$part: no such part" ;;
    esac
done

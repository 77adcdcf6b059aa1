"""Digests of every kernel's output, to compare two versions of the package on one machine.

    PYTHONPATH=old python benchmarks/same_bits.py --json old.json
    PYTHONPATH=new python benchmarks/same_bits.py --json new.json --compare old.json

Only names that every version has are used. Weights are quantised on the device, from one seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys

import torch

import fp4moe

# activation, gated, num_experts, top_k, hidden, intermediate
LAYERS = {
    "gemma4": ("gelu_tanh", True, 128, 8, 2816, 704),
    "nano": ("relu2", False, 128, 6, 2688, 1856),
    "silu": ("silu", True, 16, 4, 512, 320),
    "gelu": ("gelu", True, 16, 4, 400, 208),
    "relu": ("relu", False, 16, 4, 512, 320),
    "identity": ("identity", False, 8, 2, 336, 192),
}
KERNELS = ("triton", "humming", "reference", "reference_w4a4")
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def layer(name: str, device: str) -> fp4moe.ExpertWeights:
    """Return quantised random experts."""
    activation, gated, experts, _, hidden, intermediate = LAYERS[name]
    torch.manual_seed(len(name))
    made = {"up": torch.empty(experts, intermediate, hidden, dtype=torch.bfloat16, device=device)}
    if gated:
        made["gate"] = torch.empty_like(made["up"])
    made["down"] = made["up"].new_empty(experts, hidden, intermediate)
    for tensor in made.values():
        tensor.normal_(std=0.02)
    return fp4moe.ExpertWeights.quantize(**made, activation=activation)


def digests(device: str, layers: list[str], kernels: list[str]) -> dict[str, str]:
    """Return a digest for each kernel, layer, dtype and number of tokens that runs here."""
    found = {}
    for name in layers:
        _, _, experts, top_k, hidden, _ = LAYERS[name]
        weights = layer(name, device)
        for kernel in kernels:
            for dtype in DTYPES:
                for tokens in TOKENS[: 3 if device == "cpu" else None]:
                    if kernel.startswith("reference") and tokens * experts > 16384:
                        continue
                    torch.manual_seed(tokens)
                    x = torch.randn(tokens, hidden, device=device).to(dtype)
                    ids = torch.rand(tokens, experts, device=device).topk(top_k).indices
                    routing = torch.rand(tokens, top_k, device=device)
                    key = f"{kernel} {name} {str(dtype)[6:]} {tokens}"
                    try:
                        y = fp4moe.fused_moe(x, weights, ids, routing, kernel=kernel)
                    except fp4moe.errors.UnsupportedError as refused:
                        found[key] = f"refused: {type(refused).__name__}"
                        continue
                    bits = y.contiguous().view(torch.uint8).cpu().numpy().tobytes()
                    found[key] = hashlib.sha256(bits).hexdigest()
    return found


def main() -> None:
    """Write the digests; with --compare, exit 1 where one differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", required=True, help="file to write")
    parser.add_argument("--compare", help="file of another version")
    parser.add_argument("--kernel", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--layer", nargs="+", choices=LAYERS, default=list(LAYERS))
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = digests(device, args.layer, args.kernel)
    with open(args.json, "w") as file:
        json.dump(found, file, indent=1)
    ran = sum(not value.startswith("refused") for value in found.values())
    print(f"{ran} outputs, {len(found) - ran} refused")
    if args.compare:
        with open(args.compare) as file:
            other = json.load(file)
        differ = [key for key in found if found[key] != other.get(key)]
        print(f"{len(found) - len(differ)} equal, {len(differ)} differ")
        sys.exit("\n".join(differ) if differ else 0)


if __name__ == "__main__":
    main()

"""An interpreter of the decoders' straight-line PTX, for tests without a GPU."""

from __future__ import annotations

import torch


def run_ptx(program, inputs, dtype):
    """Interpret the decoder's straight-line PTX on tensors of 32-bit values held in int64."""
    registers = dict(inputs)

    def value(name):
        if name.startswith("0f"):
            return int(name[2:], 16)
        return int(name, 0) if name[0].isdigit() else registers[name]

    def halves(word):
        word = torch.as_tensor(word)
        both = torch.stack((word & 0xFFFF, word >> 16), -1)
        return torch.where(both > 0x7FFF, both - 0x10000, both).to(torch.int16).view(dtype)

    def joined(pair):
        bits = pair.contiguous().view(torch.int16).long() & 0xFFFF
        return bits[..., 0] | bits[..., 1] << 16

    def funnel(high, low, shift):
        return ((torch.as_tensor(high) << 32 | low) >> shift) & 0xFFFFFFFF

    # The exact product, rounded once; adding -0 changes nothing.
    def product(a, b, *minus_zero):
        assert minus_zero in ((), (0x80008000,))
        return joined((halves(a).float() * halves(b).float()).to(dtype))

    def single(word):
        return torch.as_tensor(word).to(torch.int32).view(torch.float32)

    def single_product(a, b):
        return (single(a) * single(b)).view(torch.int32).long() & 0xFFFFFFFF

    def two_bytes(word, zero, selector):
        assert (zero, selector) == (0, 0x4140)
        return word & 0xFF | (word >> 8 & 0xFF) << 16

    operations = {
        "prmt.b32": two_bytes,
        "and.b32": lambda a, b: a & b,
        "shr.b32": lambda a, b: a >> b,
        "mul.f32": single_product,
        "cvt.rn.f16x2.f32": lambda a, b: joined(torch.stack((single(b), single(a)), -1).to(dtype)),
        "shl.b32": lambda a, b: (a << b) & 0xFFFFFFFF,
        "shf.l.wrap.b32": lambda low, high, by: funnel(high, low, 32 - by),
        "shf.r.wrap.b32": lambda low, high, by: funnel(high, low, by),
        "lop3.b32": lambda a, b, c, table: {0xE4: a & c | b & ~c, 0xEC: a & c | b}[table],
        "fma.rn.bf16x2": product,
        "mul.f16x2": product,
    }
    for line in program.split("\n")[3:-1]:
        name, _, rest = line.rstrip(";").partition(" ")
        if name != "mov.b32":
            out, *names = rest.split(", ")
            registers[out] = operations[name](*map(value, names))
        elif rest.startswith("{"):
            low, high, word = rest.replace("{", "").replace("}", "").split(", ")
            registers[low], registers[high] = value(word) & 0xFFFF, value(word) >> 16
        elif rest.endswith("}"):
            out, low, high = rest.replace("{", "").replace("}", "").split(", ")
            registers[out] = value(low) | value(high) << 16
        else:
            out, word = rest.split(", ")
            registers[out] = value(word)
    return torch.stack([halves(registers[f"${i}"])[..., 0] for i in range(16)], -1)

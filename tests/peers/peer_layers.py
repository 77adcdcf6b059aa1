"""The layers that are handed to both sides: NVFP4 checkpoint tensors, and our weights of them."""

from __future__ import annotations

import dataclasses

import torch

from fp4moe import ExpertWeights

__all__ = ["Case", "Checkpoint", "checkpoint", "cutlass_cases", "parameter_cases"]
__all__ += ["sglang_cases", "vllm_cases"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer of one rank.

    Attributes:
        hidden, intermediate: the sizes of this rank's checkpoint tensors.
        activation: our name or text.
        experts: those of this rank; rank: which of the `ranks` expert-parallel ranks it is.
    """

    name: str
    hidden: int
    intermediate: int
    activation: str = "silu"
    experts: int = 2
    rank: int = 0
    ranks: int = 1
    top_k: int = 2

    @property
    def gated(self) -> bool:
        """relu2 stands alone in every model that has it, the others have a gate."""
        return self.activation != "relu2"

    @property
    def num_experts(self) -> int:
        return self.experts * self.ranks

    def __str__(self) -> str:
        return self.name


GEMMA4 = [
    Case("Gemma4", 2816, 704, "gelu_tanh"),
    Case("Gemma4 TP2", 2816, 352, "gelu_tanh"),
    Case("Gemma4 TP4", 2816, 176, "gelu_tanh"),
]
QWEN3 = [Case("Qwen3", 2048, 768), Case("Qwen3 TP4", 2048, 192)]
NANO = [
    Case("Nemotron Nano", 2688, 1856, "relu2"),
    Case("Nemotron Nano TP2", 2688, 928, "relu2"),
    Case("Nemotron Nano TP4", 2688, 464, "relu2"),
    Case("latent", 1024, 2688, "relu2"),
]
EXPERT_PARALLEL = [
    Case(f"EP {activation} rank {rank}", 512, 192, activation, 3, rank, 4)
    for activation in ("silu", "gelu_tanh", "relu2")
    for rank in (0, 1, 3)
]
SMALL = [
    Case("one expert", 256, 128, experts=1, top_k=1),
    Case("one expert, no gate", 256, 128, "relu2", experts=1, top_k=1),
    Case("16000 x 64", 16000, 64),
    Case("384 x 16", 384, 16),
    Case("640 x 80, no gate", 640, 80, "relu2"),
]
# No multiples of 128.
ODD = [
    Case("2880", 2880, 2880),
    Case("160 x 96", 160, 96),
    Case("144 x 48", 144, 48),
    Case("144 x 48, tanh", 144, 48, "gelu_tanh"),
    Case("272 x 48, no gate", 272, 48, "relu2"),
]
# MiniMax-M3 is gpt-oss' form without biases; vLLM hands none over for NVFP4.
OPENAI = "silu(alpha=1.702,beta=1,limit=7)"
parameter_cases = [
    Case("MiniMax-M3", 1536, 768, OPENAI),
    Case("EP openai rank 1", 512, 192, OPENAI, 3, 1, 4),
    Case("DeepSeek-V4", 1024, 512, "silu(limit=10)"),
]
vllm_cases = [*GEMMA4, *QWEN3, *NANO, *EXPERT_PARALLEL, *SMALL, *ODD]
sglang_cases = [*GEMMA4, *QWEN3, *NANO, *EXPERT_PARALLEL, *SMALL]
# Neither pads a gated layer here, and the Gemma4 of both needs another activation than ours.
cutlass_cases = [*QWEN3, *NANO, *SMALL[:2]]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A layer as ModelOpt writes it, stacked over experts; gate is None without one.

    Attributes:
        packed, block_scale: by projection, uint8 [L, N, K/2] and float8_e4m3fn [L, N, K/16].
        global_scale: by projection, float32 [L], `weight_scale_2`.
        hidden_scale, intermediate_scale: the `input_scale` of gate and up, and of down.
    """

    case: Case
    packed: dict[str, torch.Tensor]
    block_scale: dict[str, torch.Tensor]
    global_scale: dict[str, torch.Tensor]
    hidden_scale: float
    intermediate_scale: float

    @property
    def tokens(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return hidden [5, H] bfloat16, global ids int32 and float32 weights [5, K]."""
        case = self.case
        generator = torch.Generator().manual_seed(1)
        hidden = torch.randn(5, case.hidden, generator=generator).bfloat16()
        scores = torch.rand(5, case.num_experts, generator=generator)
        weights, ids = scores.topk(case.top_k, dim=-1)
        return hidden, ids.int(), weights

    def ours(self) -> ExpertWeights:
        """Return the layer as fp4moe holds it; gate and up must have equal global scales."""
        case = self.case
        first = ["gate", "up"] if case.gated else ["up"]
        scales = [self.global_scale[name] for name in first]
        assert all(torch.equal(scale, scales[0]) for scale in scales)
        tensors = {
            "gate_up.packed": torch.cat([self.packed[name] for name in first], 1),
            "gate_up.block_scale": torch.cat([self.block_scale[name] for name in first], 1),
            "gate_up.global_scale": scales[0].clone(),
            "down.packed": self.packed["down"].clone(),
            "down.block_scale": self.block_scale["down"].clone(),
            "down.global_scale": self.global_scale["down"].clone(),
            "hidden_scale": torch.tensor([self.hidden_scale]),
            "intermediate_scale": torch.full((case.experts,), self.intermediate_scale),
        }
        sizes = {"hidden_size": case.hidden, "intermediate_size": case.intermediate}
        place = {"num_experts": case.num_experts, "expert_offset": case.rank * case.experts}
        form = {"activation": case.activation, "gated": case.gated}
        return ExpertWeights.from_tensors(tensors, sizes | place | form)


def checkpoint(case: Case) -> Checkpoint:
    """Return a random layer: every byte of the packed values and any positive block scale."""
    generator = torch.Generator().manual_seed(len(case.name) + case.hidden + case.rank)
    shapes = {
        "up": (case.experts, case.intermediate, case.hidden),
        "down": (case.experts, case.hidden, case.intermediate),
    }
    if case.gated:
        shapes["gate"] = shapes["up"]

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)

    def floats() -> torch.Tensor:
        return (torch.rand(case.experts, generator=generator) + 0.5) / 1000

    packed, block_scale, global_scale = {}, {}, {}
    for name, (experts, rows, columns) in shapes.items():
        packed[name] = integers(0, 256, experts, rows, columns // 2)
        # Bytes up to 0x7e are finite and not negative.
        scale = integers(1, 0x7F, experts, rows, columns // 16)
        block_scale[name] = scale.view(torch.float8_e4m3fn)
        global_scale[name] = floats()
    if case.gated:
        global_scale["gate"] = global_scale["up"].clone()
    return Checkpoint(case, packed, block_scale, global_scale, 0.0123, 0.0456)

"""routing="fused" for a model whose experts were loaded packed: there is no float block to watch.

The same plan as replace_moe's (routers.py), made with the fused experts standing for the
float ones: what it watches is the router and who gets its choice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ..checkpoint.plan import ExpertsPlan
from ..errors import UnsupportedError
from ..module import FusedExperts
from ..routed import RoutedExperts
from .block import Candidate
from .experts_module import STAMPS
from .routers import plan_fused_routing

__all__ = ["fuse_routing"]


def fuse_routing(model: nn.Module, experts: Mapping[str, ExpertsPlan], options: Any) -> None:
    """Put RoutedExperts in the place of every FusedExperts of `experts`, in place.

    Those of kernel "reference" hold the weights in checkpoint order: they are laid out once, here.

    Raises:
        UnsupportedError: a router is not one that a kernel can stand for; lists the reasons.
    """
    candidates = []
    for path, plan in experts.items():
        module = model.get_submodule(path)
        facts = plan.facts
        candidates.append(
            Candidate(
                path=path,
                module=module,
                parameters={},
                num_experts=facts.num_experts,
                top_k=facts.top_k,
            )
        )
    with _stamped(model, candidates):
        plans, refused = plan_fused_routing(model, candidates)
    if refused:
        listed = " ".join(f"{path}: {'; '.join(why)}." for path, why in refused.items())
        raise UnsupportedError(
            "from_pretrained: routing='fused' must find routers that a kernel can stand for; got "
            f"{len(refused)} others. {listed} Pass routing='given'."
        )
    for path, routing in plans.items():
        fused = model.get_submodule(path)
        assert isinstance(fused, FusedExperts)
        routed = RoutedExperts(
            fused.weights,
            routing.routing,
            options.kernel,
            hidden_alignment=options.hidden_alignment,
            output_scale=routing.output_scale,
        )
        model.set_submodule(routing.path, routing.router)
        model.set_submodule(path, routed.eval())


@contextlib.contextmanager
def _stamped(model: Any, candidates: list[Candidate]) -> Iterator[None]:
    """Let fused experts pass for the modules whose places they took while a plan is made."""
    text = model.config.get_text_config()
    stamps = {**dict.fromkeys(STAMPS, False), "config": text}
    for candidate in candidates:
        vars(candidate.module).update(stamps)
    try:
        yield
    finally:
        for candidate in candidates:
            for name in stamps:
                del vars(candidate.module)[name]

"""How transformers (5.23 on) splits a model over processes, and where packed experts stand in it.

Its plans say which modules are split, by name; its hooks on a module's forward bring the tokens and
add up the outputs. Packed experts hold their part in plain buffers and get the same hook: nothing
of the exchange is done here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from ..formats import FORMATS
from ..parallel import GATHER
from ..part import COLUMNS, ROWS, Part, part_of_experts, part_of_intermediate

__all__ = ["FIRST", "Sharding", "is_supported"]

# From here on transformers adds up the shards of modules that hold buffers only, too.
FIRST = (5, 23)
# Styles of an experts module, and those that its weights may then have.
STYLES = {
    "moe_tp_experts": {"packed_colwise", "packed_rowwise", "colwise", "rowwise"},
    "ep_dispatch_experts": {"grouped_gemm"},
}


# Styles of a quantised Linear that hold a part of its rows, a part of its columns, or all of it.
LINEARS = {"colwise": ROWS, "rowwise": COLUMNS}
WHOLE = ("mla_kv_a_proj", "replicated_with_grad_allreduce")


def is_supported(version: str) -> bool:
    """Whether this version of transformers is FIRST or newer."""
    return tuple(int(part) for part in version.split(".")[:2]) >= FIRST


@dataclasses.dataclass
class Sharding:
    """The split of one model.

    Attributes:
        model: of transformers; its meshes are there once it was distributed.
        config: its DistributedConfig.
        tp, ep: the plans that are in force: pattern of a name -> style.
    """

    model: Any
    config: Any
    tp: dict[str, str]
    ep: dict[str, str]

    @classmethod
    def of(cls, model: Any) -> Sharding | None:
        """Return how a model is split, or will be; None for a model that one process holds."""
        config = getattr(getattr(model, "config", None), "distributed_config", None)
        # A dictionary is what an earlier run left in config.json.
        if config is None or isinstance(config, dict):
            return None
        import transformers

        if not is_supported(transformers.__version__):
            return None
        tp = _plan(model, config, "tp") if config.tp_size > 1 else {}
        ep = _plan(model, config, "ep") if config.ep_size > 1 else {}
        if "ep_dispatch_experts" not in ep.values():
            ep = {}
        return cls(model, config, tp, ep) if tp or ep else None

    @property
    def is_done(self) -> bool:
        """Whether the model is split, and not only to be."""
        return getattr(self.model, "_mesh_manager", None) is not None

    def style(self, path: str) -> str | None:
        """The style of the module at a path; None where every process holds all of it."""
        return self._style(path, self.ep) or self._style(path, self.tp)

    def _style(self, path: str, plan: dict[str, str]) -> str | None:
        from transformers.distributed.parallel_utils import _get_parameter_plan

        return _get_parameter_plan(path, plan, is_weight=False)

    def reasons(self, path: str, names: list[str]) -> list[str]:
        """Return why the experts at a path cannot be split so; names: of their weights."""
        style = self.style(path)
        styles = {name: self.style(f"{path}.{name}") for name in names}
        if style is None:
            split = {name: found for name, found in styles.items() if found is not None}
            return [f"the plan splits its weights {split}, not the module"] if split else []
        if style not in STYLES:
            return [f"the plan gives it the style {style!r}, not one of {', '.join(STYLES)}"]
        odd = {name: found for name, found in styles.items() if found not in STYLES[style]}
        if odd:
            return [f"the plan gives the module the style {style!r} and its weights {odd}"]
        if style == "ep_dispatch_experts" and self.config.ep_implementation == "deepgemm_megamoe":
            return ["ep_implementation 'deepgemm_megamoe' runs experts of its own"]
        return []

    def count(self, path: str) -> int:
        """Number of processes that share the experts at a path."""
        if self.style(path) is None:
            return 1
        return self.config.ep_size if self._axis(path) == "ep" else self.config.tp_size

    def part(
        self, path: str, facts: Any, format: str, *, caller: str, index: int | None = None
    ) -> Part | None:
        """Return this process's part of the experts at a path, None where it holds all.

        Args:
            facts: has num_experts and intermediate_size, of the whole layer.
            index: that of another process; which one this is, is known once the model is split.

        Raises:
            ShapeError: the sizes do not divide.
        """
        if self.style(path) is None:
            return None
        if index is None:
            index = self.mesh_of(path).get_local_rank()
        if self.splits_experts(path):
            return part_of_experts(index, self.config.ep_size, facts.num_experts, caller=caller)
        sizes = self.config.tp_size, facts.intermediate_size
        return part_of_intermediate(index, *sizes, format, caller=caller)

    def parts(self, path: str, facts: Any, format: str, *, caller: str) -> list[Part | None]:
        """Return the parts of all processes."""
        how: dict[str, Any] = {"caller": caller}
        return [self.part(path, facts, format, index=i, **how) for i in range(self.count(path))]

    def hands_local_ids(self, path: str) -> bool:
        """Whether the experts at a path are called with ids of their part, from 0 on."""
        return self.splits_experts(path) and self.config.ep_implementation != GATHER

    def splits_experts(self, path: str) -> bool:
        """Whether whole experts are dealt out, not their intermediate columns."""
        return self.style(path) == "ep_dispatch_experts"

    def mesh_of(self, path: str) -> Any:
        """The mesh of the processes that share the module at a path."""
        return self._mesh(self._axis(path))

    def linear_part(
        self, path: str, facts: Any, format: str, index: int | None = None
    ) -> tuple[Part | None, str]:
        """Return this process's part of a quantised Linear, or why it cannot be split.

        Args: facts: has out_features and in_features. index: as for `part`.
        """
        style = self.style(path)
        if style is None or style in WHOLE:
            return None, ""
        kind = LINEARS.get(style)
        if kind is None:
            known = ", ".join((*LINEARS, *WHOLE))
            return None, f"the plan gives it the style {style!r}, not one of {known}"
        total = facts.out_features if kind == ROWS else facts.in_features
        count = self.count(path)
        grids = [grid for grid in (FORMATS[format].codes, FORMATS[format].scales) if grid]
        block = max((grid.rows if kind == ROWS else grid.columns) or 1 for grid in grids)
        if total % (count * block):
            blocks = f" in blocks of {block}" if block > 1 else ""
            return None, f"its {total} {kind} do not divide by {count} processes{blocks}"
        if index is None:
            index = self.mesh_of(path).get_local_rank()
        size = total // count
        return Part(kind, index, count, index * size, (index + 1) * size, total), ""

    def install(self, path: str, module: nn.Module) -> None:
        """Put transformers' hook on the packed module at a path, which holds its part."""
        from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

        style: Any = self.style(path)
        if style is None:
            return
        layer, mesh = ALL_PARALLEL_STYLES[style], self.mesh_of(path)
        owner: Any = module
        if style == "ep_dispatch_experts":
            how = {"tp_mesh": self._mesh("tp"), "ep_implementation": self.config.ep_implementation}
            layer.install_forward(module, mesh, **how)
        else:
            # What transformers itself tells Linears that are split and no nn.Linear.
            owner._hf_quantized_needs_local_tp = True
            if style == "mla_kv_a_proj":
                owner.config = self.model.config.get_text_config()
            layer.install_forward(module, mesh)
        owner._is_hooked = True

    def _axis(self, path: str) -> str:
        """The mesh axis over which the module at a path is split."""
        return "ep" if self._style(path, self.ep) else "tp"

    def forget(self, path: str, names: list[str]) -> None:
        """Drop the rules of weights that are no parameters any more, unless others have them."""
        from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

        left = {replace_layer_number_by_wildcard(name) for name, _ in self.model.named_parameters()}
        for name in names:
            rule = replace_layer_number_by_wildcard(f"{path}.{name}")
            if rule not in left:
                self.model.tp_plan.pop(rule, None)
                self.model.ep_plan.pop(rule, None)

    def _mesh(self, name: str) -> Any:
        return self.model._mesh_manager.get_mesh(name)


def _plan(model: Any, config: Any, kind: str) -> dict[str, str]:
    """The plan of the model with what the configuration says instead, as transformers has it."""
    own, given = getattr(model, f"{kind}_plan") or {}, getattr(config, f"{kind}_plan")
    if not isinstance(given, dict):
        return dict(own)
    return {} if kind == "tp" and not given else {**own, **given}

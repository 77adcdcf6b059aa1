"""One run of from_pretrained: plan from the headers, placeholders, packed modules in their places.

transformers builds the model on the meta device, renames keys, loads what is not quantised, ties,
places and dispatches as ever. Between its steps (pretrained/quantizer.py calls) this gives every
key its place (checkpoint/plan.py), puts placeholders for experts and quantised Linears, and fills
them from the files before the model is handed out.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from ..checkpoint.files import CheckpointFiles
from ..checkpoint.naming import Convention, fail, name_keys
from ..checkpoint.plan import ModelFacts, Plan, inside, make_plan
from ..checkpoint.plan_checks import ExpertsFacts, LinearFacts
from ..checkpoint.read import read_experts, read_linear
from ..checkpoint.readers import convention_of
from ..checkpoint.stored import stored_bytes
from ..checks import HIDDEN_DTYPES
from ..errors import CheckpointError, UnsupportedError, must, refuse
from ..linear import PackedLinear
from ..models.experts_module import is_stacked_experts
from ..models.routers import fuse_router
from ..models.routing_plan import plan_fused_routing
from ..models.sharding import Sharding
from ..module import FusedExperts
from ..parallel import check_alike, check_all_succeed
from ..progress import progress_bar
from .key_names import KeyNames, may_skip, optional_names
from .parallelism import fingerprint, is_shared
from .placeholder import Options, Placeholder
from .probe_experts import describe_on_meta
from .split_plan import check_linears, experts_part, experts_reasons

__all__ = ["Loading"]

logger = logging.getLogger("fp4moe")


class Loading:
    """One run of from_pretrained, from the model on meta to the one that is handed out."""

    def __init__(self, options: Options, quantize: bool):
        self.options, self.quantize = options, quantize
        self.model: Any = None
        self.files: CheckpointFiles | None = None
        self.plan: Plan | None = None
        self.sharding: Sharding | None = None
        # Whether several processes load the model, split or not.
        self.shared = False
        self.shapes: dict[str, tuple[int, ...]] = {}
        # Linears whose class computes something else: they get their weights decoded.
        self.own_forward: dict[str, nn.Linear] = {}
        self.dtype = torch.float32

    def open(self, model: Any, checkpoint_files: list[str] | None, dtype: torch.dtype) -> None:
        """Open the directory that transformers loads from."""
        self.model, self.dtype = model, dtype
        if dtype not in HIDDEN_DTYPES:
            must(
                "from_pretrained: dtype",
                "be bfloat16, float16 or float32",
                f"{str(dtype).removeprefix('torch.')}, as asked for or as config.json says",
                "Pass dtype=torch.bfloat16.",
                error=UnsupportedError,
            )
        if not checkpoint_files or not all(f.endswith(".safetensors") for f in checkpoint_files):
            given = [os.path.basename(f) for f in checkpoint_files or ()]
            fail("be of safetensors files", given, "Convert it with save_pretrained")
        directories = {os.path.dirname(file) for file in checkpoint_files}
        if len(directories) > 1:
            fail("lie in one directory", sorted(directories), "Copy its files together")
        directory = directories.pop()
        files, self.options.files = self.options.files, None
        if files is None or not os.path.samefile(files.directory, directory):
            files = CheckpointFiles.open(directory)
        self.files = files
        names = {os.path.basename(file) for file in checkpoint_files}
        if names != set(self.files.shards):
            got = f"{sorted(names)} against {sorted(self.files.shards)}"
            fail("have one set of weight files", got, "Remove what is stale; do not pass variant")
        self.sharding = Sharding.of(model)
        self.shared = is_shared(getattr(model.config, "distributed_config", None))
        if self.shared:
            options = self.options
            words = options.kernel, options.hidden_alignment, options.routing, options.format
            check_alike(
                fingerprint(self.files, *words, dtype),
                "from_pretrained: the checkpoint, and the options of loading it,",
                "Give every process the same files and arguments.",
            )

    def make_plan(self, conversions: list[Any]) -> None:
        """Plan from transformers' renamings, and put the placeholders."""
        assert self.files is not None
        model = self.model
        experts: dict[str, ExpertsFacts] = {}
        refused: dict[str, list[str]] = {}
        for path, module in model.named_modules():
            if is_stacked_experts(module):
                facts, reasons = describe_on_meta(path, module, model.config)
                if facts is None:
                    refused[path] = reasons
                else:
                    experts[path] = facts
        convention = convention_of(self.files.quantization)
        names = KeyNames(model, conversions, {*experts, *refused}, convention)
        plain = {name: (t.dtype, tuple(t.shape)) for name, t in model.state_dict().items()}
        self.shapes = {name: shape for name, (_, shape) in plain.items()}
        described = ModelFacts(
            experts={
                path: dataclasses.replace(facts, format=self.options.format)
                for path, facts in experts.items()
            },
            linears={
                path: LinearFacts(m.out_features, m.in_features, m.bias is not None)
                for path, m in model.named_modules()
                if isinstance(m, nn.Linear)
            },
            plain=plain,
            optional=optional_names(model),
            name=names.name,
            merged=names.merged,
            further=names.further,
            may_skip=may_skip(model),
            quantize=self.quantize,
        )
        if refused:
            self._refuse(refused, names)
        plan = self.plan = make_plan(self.files.shapes, convention, described)
        for path, found in plan.experts.items():
            module = model.get_submodule(path)
            held = [name for name, _ in module.named_parameters()]
            if reasons := experts_reasons(self.sharding, path, held, found, self.options):
                refused[path] = reasons
        if refused:
            self._refuse(refused, names)
        self._check_ties(plan)
        self._note(plan, convention)
        for path in (*plan.experts, *plan.linears):
            module = model.get_submodule(path)
            if path in plan.linears and type(module).forward is not nn.Linear.forward:
                # DeepSeek-V4's output projection multiplies group by group.
                self.own_forward[path] = module
        if self.sharding is not None:
            check_linears(self.sharding, plan.linears, self.own_forward)
        for path in (*plan.experts, *plan.linears):
            module = model.get_submodule(path)
            model.set_submodule(path, self._placeholder(path))
            if self.sharding is not None:
                self.sharding.forget(path, [name for name, _ in module.named_parameters()])

    def _placeholder(self, path: str) -> Placeholder:
        assert self.plan is not None
        if not self.shared:
            return Placeholder(self._packed_bytes(path))
        # Nothing counts bytes here, and a parameter would be split.
        if path in self.plan.linears:
            facts = self.plan.linears[path].facts
            return Placeholder(0, out_features=facts.out_features, in_features=facts.in_features)
        count = self.plan.experts[path].facts.num_experts
        sharers = 1 if self.sharding is None else self.sharding.count(path)
        return Placeholder(0, num_experts=count // sharers)

    def _packed_bytes(self, path: str) -> int:
        """What the module at a path will take, without a kernel's padding."""
        assert self.files is not None and self.plan is not None
        if path in self.plan.linears:
            keys = list(self.plan.linears[path].matrix.keys.values())
        elif self.plan.experts[path].form == "float":
            facts = self.plan.experts[path].facts
            return stored_bytes(facts, facts.format, facts.biased)
        else:
            keys = self.plan.experts[path].keys
        specs = [self.files.shapes[key] for key in keys]
        return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in specs)

    def _refuse(self, refused: dict[str, list[str]], names: KeyNames) -> None:
        """Refuse experts of another form if they would have to be packed."""
        assert self.files is not None
        scales = [key for key in self.files.shapes if "scale" in key.rpartition(".")[2]]
        packed = {inside(names.name(key), refused) for key in scales}
        wanted = [path for path in refused if self.quantize or path in packed]
        if wanted:
            listed = ". ".join(f"{path}: {'; '.join(refused[path])}" for path in wanted[:10])
            refuse(
                "from_pretrained",
                f"{len(wanted)} experts cannot be packed",
                listed,
                "Load a float checkpoint with transformers.",
            )

    def _check_ties(self, plan: Plan) -> None:
        ties = dict(getattr(self.model, "all_tied_weights_keys", None) or {})
        tied = {name.rpartition(".")[0] for pair in ties.items() for name in pair}
        if clash := [path for path in plan.linears if path in tied]:
            rule = "leave tied weights unquantised"
            fail(rule, f"quantised {name_keys(clash)}", "Set tie_word_embeddings to false")

    def _note(self, plan: Plan, convention: Convention) -> None:
        """Say what is not loaded, and where tensors and configuration disagree."""
        if plan.skipped:
            logger.info(
                "from_pretrained: not loaded, as the model has no use for them: %s",
                name_keys(plan.skipped),
            )
        modules = {key.rpartition(".")[0] for key in plan.packed_keys}
        odd = [module for module in modules if convention.ignores(module)]
        if odd:
            logger.warning(
                "from_pretrained: the configuration excludes modules whose tensors are quantised; "
                "the tensors count: %s",
                name_keys(odd),
            )

    def fill(self, loading_info: Any) -> None:
        """Check what transformers has loaded, then put the packed modules into their places.

        Processes that share the model succeed together, or all raise.
        """
        if not self.shared:
            self._fill(loading_info)
            return
        try:
            self._fill(loading_info)
        except Exception as error:
            check_all_succeed("from_pretrained", error)
            raise
        check_all_succeed("from_pretrained", None)

    def _fill(self, loading_info: Any) -> None:
        assert self.files is not None and self.plan is not None
        plan, model = self.plan, self.model
        # Those are ours; transformers would report them as unexpected.
        loading_info.unexpected_keys.clear()
        lost = {key for key in loading_info.missing_keys if key in plan.plain}
        lost |= {entry[0] for entry in loading_info.mismatched_keys}
        lost |= set(loading_info.conversion_errors)
        if lost:
            got = f"failures for {name_keys(lost)}: {loading_info.conversion_errors or ''}"
            fail("load as transformers expects", got, "Use a checkpoint of this very model")
        self._check_values()
        folded = 0
        unseen: dict[str, Collection[int]] = {}
        show = self.options.progress and bool(plan.experts)
        for path, experts in progress_bar(plan.experts.items(), show=show, desc="packing experts"):
            device = model.get_submodule(path).place.device
            part = experts_part(self.sharding, path, experts)
            how: dict[str, Any] = {"device": device, "dtype": self.dtype, "part": part}
            found = read_experts(self.files, path, experts, plan.convention, **how)
            folded += found.folded
            if found.unseen:
                unseen[path] = found.unseen
            # Mapped pages count as memory of the process.
            self.files.close()
            weights = found.weights
            if self.sharding is not None and self.sharding.hands_local_ids(path):
                count = weights.local_experts
                weights = dataclasses.replace(weights, num_experts=count, expert_offset=0)
            fused = FusedExperts(
                weights,
                self.options.kernel,
                hidden_alignment=self.options.hidden_alignment,
                top_k=experts.facts.top_k,
                routing=self.options.routing,
            )
            # Where factors moved from up to down, an adapter of up would miss them.
            fused.float_layout = None if found.folded else experts.facts.layout
            model.set_submodule(path, fused.eval())
            if self.sharding is not None and part is not None:
                fused.parts = (part,)
                self.sharding.install(path, fused)
        for path, linear in plan.linears.items():
            device = model.get_submodule(path).place.device
            part = None
            if self.sharding is not None:
                part, _ = self.sharding.linear_part(path, linear.facts, linear.form)
            how = {"device": device, "dtype": self.dtype, "part": part}
            packed = read_linear(self.files, linear, plan.convention, **how)
            packed.parts = () if part is None else (part,)
            module = self._decoded(path, packed).eval()
            model.set_submodule(path, module)
            if self.sharding is not None:
                self.sharding.install(path, module)
        self.files.close()
        if folded:
            logger.info(
                "from_pretrained: gate and up of %d experts have different global scales; the "
                "quotient was moved from up into down, which changes no product of the two",
                folded,
            )
        if unseen:
            logger.warning(
                "from_pretrained: calibration has no activation range for %d experts, which get "
                "the largest of the others, 1 if there is none (kernels with 16-bit activations "
                "use no range): %s",
                sum(map(len, unseen.values())),
                "; ".join(f"{path}: {', '.join(map(str, ids))}" for path, ids in unseen.items()),
            )

    def _decoded(self, path: str, packed: PackedLinear) -> nn.Module:
        """The module for a Linear of the file: packed, or of its own class with a float weight."""
        own = self.own_forward.get(path)
        if own is None:
            return packed
        own.weight = nn.Parameter(packed.dequantized(self.dtype), requires_grad=False)
        if packed.bias is not None:
            own.bias = nn.Parameter(packed.bias, requires_grad=False)
        return own

    def _check_values(self) -> None:
        """Look at all that transformers has loaded: 5.17 does not compare shapes here."""
        assert self.plan is not None
        wrong, bad = [], []
        for name in self.plan.plain:
            tensor = self.model.get_parameter_or_buffer(name)
            if tensor.is_meta or tuple(tensor.shape) != self.shapes[name]:
                wrong.append(name)
                continue
            # One process's part of it: asking for all of it would be an exchange.
            here = getattr(tensor.detach(), "_local_tensor", tensor.detach())
            if here.is_floating_point() and not bool(torch.isfinite(here).all()):
                bad.append(name)
        if wrong:
            got = f"others for {name_keys(wrong)}"
            fail("load with the shapes of the model", got, "Use a checkpoint of this very model")
        if bad:
            fail("hold finite numbers", f"inf or NaN in {name_keys(bad)}", "Download it again")

    def finish(self) -> None:
        """Refuse what is not where the operator can use it; fuse the routers if asked."""
        model = self.model
        for path, module in model.named_modules():
            if isinstance(module, Placeholder):
                refuse(
                    "from_pretrained",
                    f"{path} cannot be loaded",
                    "this version of transformers skips the step which fills it",
                    "Use transformers 5.17 to 5.24.",
                    error=CheckpointError,
                )
            hook = getattr(module, "_hf_hook", None)
            hooks = getattr(hook, "hooks", (hook,))
            if self._ours(path) and any(getattr(h, "offload", False) for h in hooks):
                refuse(
                    "from_pretrained",
                    f"{path} cannot be offloaded",
                    "packed experts and quantised Linears stay on a device",
                    "Pass a device_map whose devices hold them.",
                )
        if self.options.routing == "fused":
            self._fuse_routers()

    def _fuse_routers(self) -> None:
        assert self.plan is not None
        experts = {path: found.facts.num_experts for path, found in self.plan.experts.items()}
        plans, refused = plan_fused_routing(self.model, experts)
        if refused:
            listed = ". ".join(f"{path}: {'; '.join(why)}" for path, why in refused.items())
            refuse(
                "from_pretrained",
                f"the routing of {len(refused)} blocks cannot be fused",
                listed,
                "Pass routing='given'.",
            )
        for plan in plans.values():
            fuse_router(self.model.get_submodule(plan.path), plan.routing)

    def _ours(self, path: str) -> bool:
        assert self.plan is not None
        return path in self.plan.experts or path in self.plan.linears

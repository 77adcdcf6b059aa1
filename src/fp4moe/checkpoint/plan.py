"""Which tensors of a checkpoint become which module of a model; fails closed, reads headers only.

Every key is given to exactly one place and every place gets all its keys, each of the right dtype
and shape, or a CheckpointError lists what is wrong. Not handled here: values (read.py), how keys
are renamed (the caller passes that), building the model.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping

from ..formats import FORMATS
from .header import Spec
from .naming import FLOAT, FLOATS, FORMS, Convention, Matrix, fail, form_words, name_keys
from .plan_checks import (
    ExpertsFacts,
    LinearFacts,
    Problems,
    check_biases,
    check_experts,
    check_linear,
)
from .rename_hint import rename_hint
from .stored import form_of, forms_of, preferred

__all__ = [
    "ExpertsFacts",
    "ExpertsPlan",
    "LinearFacts",
    "LinearPlan",
    "Plan",
    "inside",
    "make_plan",
]

# On disk some families number the projections.
PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
# Some tools put the expert's number behind the projection.
TAIL = re.compile(
    r"(?:([0-9]{1,9})\.)?(gate_up_proj|gate_proj|up_proj|down_proj|w13|w1|w2|w3)"
    r"(?:\.([0-9]{1,9}))?(?:[._]([^0-9].*))?"
)
# Stacks of one projection of all experts under names of their own, such as Step's `moe.up_proj`.
STACK = re.compile(r".*\.(gate_proj|up_proj|down_proj)\.weight")
# Of a quantised KV cache or attention: here both stay in the model's dtype.
UNUSED = re.compile(
    r".*\.(?:[kqv]_(?:proj\.)?(?:[kqv]_)?(?:scale|zero_point)|[kv]_proj\.[kv]_bias"
    r"|kv_(?:scale|zero_point)|output_scale|prob_scale)"
)


@dataclasses.dataclass
class ExpertsPlan:
    """The matrices of one experts module by (expert or None for a stack, projection).

    biases: their keys likewise.
    """

    facts: ExpertsFacts
    form: str
    matrices: dict[tuple[int | None, str], Matrix]
    biases: dict[tuple[int | None, str], str] = dataclasses.field(default_factory=dict)

    @property
    def keys(self) -> list[str]:
        """Every key of the module."""
        matrices = [key for matrix in self.matrices.values() for key in matrix.keys.values()]
        return [*matrices, *self.biases.values()]


@dataclasses.dataclass
class LinearPlan:
    """The keys of one quantised Linear."""

    facts: LinearFacts
    form: str
    matrix: Matrix


@dataclasses.dataclass
class Plan:
    """experts and linears by module path; plain: name in the model -> its keys.

    skipped are keys without a place that are no error.
    """

    convention: Convention
    experts: dict[str, ExpertsPlan] = dataclasses.field(default_factory=dict)
    linears: dict[str, LinearPlan] = dataclasses.field(default_factory=dict)
    plain: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    skipped: list[str] = dataclasses.field(default_factory=list)

    @property
    def packed_keys(self) -> set[str]:
        """The keys that no one else may load."""
        found = {key for plan in self.experts.values() for key in plan.keys}
        return found | {k for plan in self.linears.values() for k in plan.matrix.keys.values()}


@dataclasses.dataclass
class ModelFacts:
    """What a plan needs to know of the model.

    Attributes:
        experts, linears: by module path.
        plain: name -> (dtype, shape) of every parameter and buffer that is saved, experts too.
        optional: names of `plain` that need not be in the checkpoint, such as tied ones.
        name: key -> its name in the model, without merging.
        merged: key -> (name in the model, whether several keys make one tensor).
        further: key -> names of other tensors that it is cut into.
        may_skip: whether a key without a place is no error.
        quantize: whether float experts are packed; otherwise they are plain.
    """

    experts: Mapping[str, ExpertsFacts]
    linears: Mapping[str, LinearFacts]
    plain: Mapping[str, Spec]
    optional: Collection[str]
    name: Callable[[str], str]
    merged: Callable[[str], tuple[str, bool]]
    further: Callable[[str], list[str]]
    may_skip: Callable[[str], bool]
    quantize: bool


def make_plan(shapes: Mapping[str, Spec], convention: Convention, model: ModelFacts) -> Plan:
    """Give every key its place.

    Args:
        shapes: key -> (dtype, shape), from the headers.
        convention: how the checkpoint names quantised tensors.
        model: what the model expects.

    Raises:
        CheckpointError: a tensor is missing, unexpected, there twice, or of a wrong dtype, shape
            or form; names the first ten keys of each kind and their count.
    """
    problems = Problems()
    if convention is FLOAT:
        _refuse_unannounced(shapes, model)
    experts: dict[str, dict[tuple[int | None, str], Matrix]] = {path: {} for path in model.experts}
    biases: dict[str, dict[tuple[int | None, str], str]] = {path: {} for path in model.experts}
    linears: dict[str, Matrix] = {}
    rest: list[str] = []
    for key in shapes:
        name = model.name(key)
        path = inside(name, model.experts)
        if path is not None:
            entry = _parse(name[len(path) + 1 :], convention)
            if entry is None:
                # A float experts module may have other tensors that only its class knows.
                rest.append(key)
                continue
            which, leaf = entry
            if leaf != "bias":
                _add(experts[path].setdefault(which, Matrix()), leaf, key, convention, problems)
                continue
            if which in biases[path]:
                problems.duplicated |= {biases[path][which], key}
            biases[path][which] = key
            continue
        if (stack := _stack_elsewhere(key, shapes, model)) is not None:
            path, projection = stack
            whole_stack = experts[path].setdefault((None, projection), Matrix())
            _add(whole_stack, "weight", key, convention, problems)
            continue
        module, _, leaf = name.rpartition(".")
        if module in model.linears and leaf in convention.parts:
            _add(linears.setdefault(module, Matrix()), leaf, key, convention, problems)
        else:
            rest.append(key)
    plan = Plan(convention)
    for path, facts in model.experts.items():
        found = experts[path]
        form = _experts_form(path, found, shapes, convention, problems)
        whole = ExpertsPlan(facts, form or "", found, biases[path])
        if form == "float" and not model.quantize:
            if found:
                check_experts(path, facts, form, found, convention, shapes, problems)
            rest += whole.keys
            continue
        if form is None:
            continue
        if form != "float" and form not in FORMATS:
            problems.unread.setdefault(form, set()).add(path)
            continue
        check_experts(path, facts, form, found, convention, shapes, problems)
        check_biases(path, facts, biases[path], shapes, problems)
        plan.experts[path] = whole
    for path, matrix in linears.items():
        kind = form_of(matrix, shapes, convention.forms)
        if kind == "float" and set(matrix.keys) == {"packed"}:
            rest += matrix.keys.values()
            continue
        kind = kind or preferred(FORMATS, convention.forms)
        if kind not in FORMATS:
            problems.unread.setdefault(kind, set()).add(path)
            continue
        facts_of = model.linears[path]
        check_linear(path, facts_of, kind, matrix, convention, shapes, problems)
        plan.linears[path] = LinearPlan(facts_of, kind, matrix)
    _place_rest(rest, shapes, model, plan, problems)
    problems.hint = rename_hint(problems.unexpected, problems.missing, model.name)
    problems.check()
    return plan


def inside(name: str, paths: Collection[str]) -> str | None:
    """Return the module of `paths` that a name lies in."""
    end = name.find(".")
    while end >= 0:
        if name[:end] in paths:
            return name[:end]
        end = name.find(".", end + 1)
    return None


def _parse(tail: str, convention: Convention) -> tuple[tuple[int | None, str], str] | None:
    """Read `7.up_proj.weight_scale`, `gate_up_proj`, `down_proj_weight_scale_2` and the like.

    Returns (expert, projection), and the name of the part on disk.
    """
    match = TAIL.fullmatch(tail)
    if match is None:
        return None
    before, projection, behind, leaf = match.groups()
    number = before or behind
    if (leaf is None and number is not None) or (before and behind):
        return None
    leaf = leaf or "weight"
    if leaf not in convention.parts and number is None and leaf != "bias":
        leaf = f"weight_{leaf}"
    if leaf not in (*convention.parts, "bias"):
        return None
    expert = None if number is None else int(number)
    return (expert, PROJECTIONS.get(projection, projection)), leaf


def _stack_elsewhere(
    key: str, shapes: Mapping[str, Spec], model: ModelFacts
) -> tuple[str, str] | None:
    """The module and projection of a stack that transformers merges into a module's weights."""
    match = STACK.fullmatch(key)
    if match is None or len(shapes[key][1]) != 3:
        return None
    name, merged = model.merged(key)
    path = inside(name, model.experts) if merged else None
    return None if path is None else (path, match[1])


def _add(matrix: Matrix, leaf: str, key: str, convention: Convention, problems: Problems) -> None:
    # A stack's codes may have no name of their own behind that of the projection.
    part = convention.parts.get(leaf, "packed")
    if part in matrix.keys:
        problems.duplicated |= {matrix.keys[part], key}
    matrix.keys[part], matrix.leaves[part] = key, convention.aliases.get(leaf, leaf)


def _experts_form(
    path: str,
    found: Mapping[tuple[int | None, str], Matrix],
    shapes: Mapping[str, Spec],
    convention: Convention,
    problems: Problems,
) -> str | None:
    """Packed where any part of the module says so: a lost scale must not make it float.

    None, and a problem, where its matrices are of several formats.
    """
    whole = {which: forms_of(matrix, shapes) for which, matrix in found.items()}
    whole = {which: forms for which, forms in whole.items() if forms}
    if whole:
        if common := set.intersection(*map(set, whole.values())):
            return preferred((form for form in FORMS if form in common), convention.forms)
        kinds: dict[str, set[str]] = {}
        for (_, projection), forms in whole.items():
            kinds.setdefault(preferred(forms, convention.forms), set()).add(projection)
        found_kinds = " and ".join(
            f"{', '.join(sorted(projections))} of {form_words(form)}"
            for form, projections in sorted(kinds.items())
        )
        problems.refused[path] = (
            f"all matrices of a layer must be of one format, and the file has {found_kinds}"
        )
        return None
    present = {form_of(matrix, shapes, convention.forms) for matrix in found.values()}
    scaled = any(set(matrix.keys) - {"packed"} for matrix in found.values())
    others = sorted(form for form in present if form is not None and form != "float")
    known = [form for form in FORMS if form in others]
    if others:
        return (known or others)[0]
    return preferred(FORMATS, convention.forms) if scaled else "float"


def _refuse_unannounced(shapes: Mapping[str, Spec], model: ModelFacts) -> None:
    """Refuse quantised weights without a configuration: what their bytes mean is unknown."""
    found: dict[str, set[str]] = {}
    for key, (dtype, _) in shapes.items():
        if dtype in FLOATS:
            continue
        name = model.name(key)
        module, _, leaf = name.rpartition(".")
        path = inside(name, model.experts)
        if path is None and module in model.linears and leaf.startswith("weight"):
            path = module
        own = name in model.plain and model.plain[name][0] == dtype
        if path is not None and not own:
            found.setdefault(str(dtype).removeprefix("torch."), set()).add(path)
    if found:
        got = ", ".join(f"{dtype} in {name_keys(paths)}" for dtype, paths in sorted(found.items()))
        fix = (
            "Put the hf_quant_config.json of the original beside config.json, or its "
            "quantization_config into config.json or the text_config there"
        )
        rule = "announce the quantisation of its weights in a configuration"
        fail(rule, f"no announcement and {got}", fix)


def _place_rest(
    rest: list[str], shapes: Mapping[str, Spec], model: ModelFacts, plan: Plan, problems: Problems
) -> None:
    """Give plain tensors their names; find those that are missing, twice there or without place."""
    packed = {*plan.experts, *plan.linears}
    replaced = {name for name in model.plain if inside(name, packed)}
    for key in rest:
        name, merged = model.merged(key)
        bias = name.endswith(".bias") and name[: -len(".bias")] in plan.linears
        if name in model.plain and (name not in replaced or bias):
            others = plan.plain.setdefault(name, [])
            others.append(key)
            if merged:
                for part in model.further(key):
                    plan.plain.setdefault(part, []).append(key)
                continue
            if len(others) > 1:
                problems.duplicated |= set(others)
            dtype, shape = shapes[key]
            expected = model.plain[name]
            fits = dtype in FLOATS if expected[0].is_floating_point else dtype == expected[0]
            if shape != expected[1] or not fits:
                problems.wrong[key] = f"is {_words(shapes[key])}, must be {_words(expected)}"
        elif _unused(key, shapes) or model.may_skip(key) or model.may_skip(name):
            plan.skipped.append(key)
        else:
            problems.unexpected.add(key)
    for path, linear in plan.linears.items():
        bias_keys = plan.plain.pop(f"{path}.bias", None)
        if bias_keys:
            linear.matrix.keys["bias"] = bias_keys[0]
        elif linear.facts.bias:
            problems.missing.add(f"{path}.bias")
    needed = set(model.plain) - replaced - set(model.optional)
    problems.missing |= needed - set(plan.plain)


def _unused(key: str, shapes: Mapping[str, Spec]) -> bool:
    """Whether a tool writes the key for purposes that do not exist here."""
    # compressed-tensors' size of the weight that is packed beside it.
    shape = key.endswith(".weight_shape") and f"{key.removesuffix('shape')}packed" in shapes
    return shape or UNUSED.fullmatch(key) is not None


def _words(spec: Spec) -> str:
    return f"{str(spec[0]).removeprefix('torch.')} {list(spec[1])}"

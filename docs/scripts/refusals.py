"""Every refusal of the package with its cure, read off the sources.

    python docs/scripts/refusals.py

prints Markdown. `must`, `refuse` and `check_choice` of fp4moe.errors are the only ways to raise, so
the calls of these, and of the functions that hand their arguments on, are the whole list.
"""

from __future__ import annotations

import ast
import pathlib
import re
from collections.abc import Mapping
from typing import NamedTuple

__all__ = ["Refusal", "collect", "document"]

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = (ROOT / "src" / "fp4moe", ROOT / "passes")
SIGNATURES = {
    "must": ("argument", "rule", "got", "advice"),
    "refuse": ("function", "what", "reason", "advice"),
    "check_choice": ("name", "value", "known", "caller"),
}
UNKNOWN = "…"
TEXTS = (ast.Constant, ast.JoinedStr, ast.IfExp, ast.Name, ast.BinOp)
Names = Mapping[str, ast.expr]


class Refusal(NamedTuple):
    """One place that raises.

    Attributes:
        function: what the user called; "" where several functions share the check.
        says: the message without the function and the advice, values as <name>.
        cure: the advice.
        where: file and line.
    """

    function: str
    says: str
    cure: str
    where: str


class Scope(NamedTuple):
    """Names that stand for expressions, innermost first."""

    assigned: list[Names]

    def find(self, name: str) -> ast.expr | None:
        return next((names[name] for names in self.assigned if name in names), None)


class Module:
    """One file: its calls and assignments, and the functions around them."""

    def __init__(self, file: pathlib.Path):
        self.file = file
        self.tree = ast.parse(file.read_text("utf-8"))
        self.nodes = list(ast.walk(self.tree))
        parents = {child: node for node in self.nodes for child in ast.iter_child_nodes(node)}
        self.around: dict[ast.AST, list[ast.FunctionDef]] = {}
        for node in self.nodes:  # Parents come first.
            parent = parents.get(node)
            outer = self.around.get(parent, [])
            own = isinstance(parent, ast.FunctionDef)
            self.around[node] = [parent, *outer] if own else outer
        self.assigned: dict[ast.FunctionDef | None, list[ast.Assign]] = {}
        for node in self.nodes:
            if isinstance(node, ast.Assign):
                function = next(iter(self.around[node]), None)
                self.assigned.setdefault(function, []).append(node)

    def names(self, function: ast.FunctionDef | None, line: int | None = None) -> Names:
        """Return what names stand for in a function, or in the module: before a line, the last."""
        found: dict[str, ast.expr] = {}
        for node in sorted(self.assigned.get(function, ()), key=lambda node: node.lineno):
            if line is not None and node.lineno > line:
                break
            for target in node.targets:
                if isinstance(target, ast.Name):
                    found[target.id] = node.value
                elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = zip(target.elts, node.value.elts, strict=False)
                    found |= {t.id: v for t, v in pairs if isinstance(t, ast.Name)}
        return found


def _text(node: ast.expr | None, scope: Scope, depth: int = 0) -> str:
    """Return an expression as a reader of the message sees it."""
    if node is None or depth > 6:
        return UNKNOWN
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value, scope, depth) for value in node.values)
    if isinstance(node, ast.FormattedValue):
        inner = node.value
        if isinstance(inner, ast.Name):
            value = scope.find(inner.id)
            if isinstance(value, TEXTS):
                return _text(value, scope, depth + 1)
        return _placeholder(inner)
    if isinstance(node, ast.IfExp):
        both = (_text(node.body, scope, depth + 1), _text(node.orelse, scope, depth + 1))
        return " / ".join(dict.fromkeys(text for text in both if text))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, scope, depth + 1) + _text(node.right, scope, depth + 1)
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("strip"):
        return _text(node.func.value, scope, depth + 1)
    if isinstance(node, ast.Name):
        value = scope.find(node.id)
        return _text(value, scope, depth + 1) if isinstance(value, TEXTS) else _placeholder(node)
    return _placeholder(node)


def _placeholder(node: ast.expr) -> str:
    names = [n.attr if isinstance(n, ast.Attribute) else n.id for n in ast.walk(node)
             if isinstance(n, ast.Attribute | ast.Name)]  # fmt: skip
    if "__name__" in names:
        return "<class>"
    plain = isinstance(node, ast.Attribute | ast.Name)
    return f"<{names[0]}>" if plain and names else UNKNOWN


class Wrapper(NamedTuple):
    """A function whose arguments are handed on to must or refuse."""

    parameters: tuple[str, ...]
    kind: str
    arguments: Mapping[str, ast.expr]
    module: Names


def _bound(call: ast.Call, parameters: tuple[str, ...]) -> dict[str, ast.expr]:
    bound = dict(zip(parameters, call.args, strict=False))
    return bound | {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}


def _raising(node: ast.AST, wrappers: Mapping[str, Wrapper]) -> str | None:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        name = node.func.id
        return name if name in SIGNATURES or name in wrappers else None
    return None


def _wrappers(modules: list[Module]) -> dict[tuple[str, str], Wrapper]:
    """Return the functions that only raise what they are told, by module and name."""
    found = {}
    for module in modules:
        calls = [node for node in module.nodes if _raising(node, {})]
        for function in (n for n in module.nodes if isinstance(n, ast.FunctionDef)):
            if not (isinstance(function.returns, ast.Name) and function.returns.id == "NoReturn"):
                continue
            own = [call for call in calls if function in module.around[call]]
            if len(own) != 1:
                continue
            (call,), local = own, module.names(function)
            parameters = tuple(a.arg for a in (*function.args.args, *function.args.kwonlyargs))
            kind = call.func.id
            arguments = {
                key: local.get(value.id, value) if isinstance(value, ast.Name) else value
                for key, value in _bound(call, SIGNATURES[kind]).items()
            }
            wrapper = Wrapper(parameters, kind, arguments, module.names(None))
            found[module.file.stem, function.name] = wrapper
    return found


def _visible(module: Module, wrappers: Mapping[tuple[str, str], Wrapper]) -> dict[str, Wrapper]:
    """Return the wrappers that a file defines or imports."""
    found = {name: w for (file, name), w in wrappers.items() if file == module.file.stem}
    for node in module.nodes:
        if isinstance(node, ast.ImportFrom):
            source = (node.module or "").rpartition(".")[2]
            names = [(source, alias.name) for alias in node.names]
            found |= {name: wrappers[source, name] for source, name in names
                      if (source, name) in wrappers}  # fmt: skip
    return found


def _message(kind: str, arguments: Names, scope: Scope) -> tuple[str, str, str]:
    parts = {name: _text(arguments.get(name), scope) for name in SIGNATURES[kind]}
    if kind == "check_choice":
        says = f"{parts['name']} must be one of the known names."
        return parts["caller"], says, "Pass one of the names that the message lists."
    if kind == "must":
        function, _, argument = parts["argument"].partition(": ")
        return function, f"{argument} must {parts['rule']}".strip() + ".", parts["advice"]
    return parts["function"], f"{parts['what']}, because {parts['reason']}.", parts["advice"]


def collect() -> list[Refusal]:
    """Return every refusal, in the order of files and lines."""
    files = sorted(f for folder in SOURCES for f in folder.rglob("*.py") if f.name != "errors.py")
    modules = [Module(file) for file in files]
    everywhere = _wrappers(modules)
    constants = {
        name: value for m in modules for name, value in m.names(None).items() if name.isupper()
    }
    found = []
    for module in modules:
        wrappers, own = _visible(module, everywhere), module.names(None)
        for node in module.nodes:
            name, around = _raising(node, wrappers), module.around[node]
            if name is None or any(function.name in wrappers for function in around):
                continue
            local = [module.names(function, node.lineno) for function in around]
            local += [_defaults(function) for function in around]
            if name in wrappers:
                kind, arguments = wrappers[name].kind, wrappers[name].arguments
                given = _bound(node, wrappers[name].parameters)
                # A caller's variable of the same name is looked up among the caller's own.
                local.insert(0, {k: v for k, v in given.items() if ast.unparse(v) != k})
                local.append(wrappers[name].module)
            else:
                kind, arguments = name, _bound(node, SIGNATURES[name])
            scope = Scope([*local, own, constants])
            where = f"{module.file.relative_to(ROOT)}:{node.lineno}"
            found.append(Refusal(*map(_tidy, _message(kind, arguments, scope)), where))
    return found


def _defaults(function: ast.FunctionDef) -> dict[str, ast.expr]:
    pairs = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    return {argument.arg: value for argument, value in pairs if value is not None}


def _tidy(text: str) -> str:
    return re.sub(r"(?<!\.)\.\.$", ".", " ".join(text.split()))


def document() -> str:
    """Return Markdown: a table for each function."""
    groups: dict[str, dict[tuple[str, str], None]] = {}
    for refusal in collect():
        name = refusal.function if re.fullmatch(r"[\w.-]+", refusal.function) else ""
        groups.setdefault(name, {})[refusal.says, refusal.cure] = None
    shared = groups.pop("", {})
    lines = []
    for name, rows in [*sorted(groups.items(), key=lambda g: g[0].lower()), ("", shared)]:
        lines += [f"### {f'`{name}`' if name else 'Shared by several functions'}", ""]
        lines += ["| The message says | What to do |", "|---|---|"]
        lines += [f"| {_cell(says)} | {_cell(cure)} |" for says, cure in rows]
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    for plain, escaped in (("|", r"\|"), ("<", "&lt;"), ("*", r"\*"), ("_", r"\_"), ("[", r"\[")):
        text = text.replace(plain, escaped)
    return text


if __name__ == "__main__":
    print(document())

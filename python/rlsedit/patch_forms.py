"""How a function of another code base solves, read from its source: casts, moves and names of parts left out."""

from __future__ import annotations

import ast
import textwrap

__all__ = ["solve_form", "solves", "updates"]

_MOVES = frozenset({"cuda", "cpu", "to", "float", "double", "detach", "contiguous"})
_KEPT = frozenset({"P", "cache_c"})


def solves(source: str) -> set[str]:
    """The calls of `torch.linalg.solve` in a function, each as a text that `solve_form` gives too.

    Local names that stand for a part of the system (a slice of P or of the cache, a sum, a product) are written out,
    terms of a sum are sorted, P[i, :, :] becomes P[i], and the arguments of `torch.eye` are left out.
    """
    tree = _plain(source)
    parts = _parts(tree)
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.linalg.solve":
            found.add(f"solve({', '.join(_text(arg, parts) for arg in node.args)})")
    return found


def solve_form(system: str, right: str) -> str:
    """The text that `solves` gives for `torch.linalg.solve(system, right)`, with EYE for the identity."""
    return f"solve({_text(_expression(system), {})}, {_text(_expression(right), {})})"


def updates(source: str, marks: tuple[str, ...]) -> set[str]:
    """The assignments of sums and products whose text contains one of the marks."""
    found = set()
    for node in ast.walk(_plain(source)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.BinOp):
            text = ast.unparse(node)
            if any(mark in text for mark in marks):
                found.add(text)
    return found


def _plain(source: str) -> ast.AST:
    tree: ast.AST = _Plain().visit(ast.parse(textwrap.dedent(source)))
    return tree


def _expression(text: str) -> ast.expr:
    plain: ast.expr = _Plain().visit(ast.parse(text, mode="eval").body)
    return plain


class _Plain(ast.NodeTransformer):
    """Leaves out what changes device or dtype only, the arguments of `torch.eye`, and full slices behind an index."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr in _MOVES:
            return node.func.value
        if ast.unparse(node.func) == "torch.eye":
            return ast.Name("EYE", ast.Load())
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.generic_visit(node)
        index = node.slice
        if isinstance(index, ast.Tuple) and index.elts and all(map(_is_full, index.elts[1:])):
            return ast.Subscript(node.value, index.elts[0], node.ctx)
        return node


def _is_full(node: ast.expr) -> bool:
    return isinstance(node, ast.Slice) and node.lower is node.upper is node.step is None


def _parts(tree: ast.AST) -> dict[str, ast.expr]:
    """Names that are given one value, and one that can be part of a system."""
    stored: dict[str, int] = {}
    values: dict[str, ast.expr] = {}
    unchanged: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if isinstance(node.value, ast.Name) and node.value.id == name:
                unchanged.add(id(node.targets[0]))  # x = x.float()
            else:
                values[name] = node.value
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            stored[node.arg] = stored.get(node.arg, 0) + 1
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and id(node) not in unchanged:
            stored[node.id] = stored.get(node.id, 0) + 1
    return {name: value for name, value in values.items() if stored[name] == 1 and _is_part(value)}


def _is_part(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, (ast.MatMult, ast.Add, ast.Mult)) and _is_part(node.left) and _is_part(node.right)
    if isinstance(node, ast.Subscript):
        return isinstance(node.value, ast.Name) and node.value.id in _KEPT
    if isinstance(node, ast.Attribute):
        return isinstance(node.value, ast.Name)
    return isinstance(node, (ast.Name, ast.Constant))


def _text(node: ast.expr, parts: dict[str, ast.expr]) -> str:
    node, parts = _written_out(node, parts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return "(" + " + ".join(sorted(_terms(node, parts))) + ")"
    if isinstance(node, ast.BinOp):
        sign = {ast.MatMult: "@", ast.Mult: "*"}.get(type(node.op), type(node.op).__name__)
        return f"{_text(node.left, parts)} {sign} {_text(node.right, parts)}"
    if isinstance(node, ast.Attribute):
        return f"{_text(node.value, parts)}.{node.attr}"
    return ast.unparse(node)


def _terms(node: ast.expr, parts: dict[str, ast.expr]) -> list[str]:
    node, parts = _written_out(node, parts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _terms(node.left, parts) + _terms(node.right, parts)
    return [_text(node, parts)]


def _written_out(node: ast.expr, parts: dict[str, ast.expr]) -> tuple[ast.expr, dict[str, ast.expr]]:
    while isinstance(node, ast.Name) and node.id in parts:
        name = node.id
        node, parts = parts[name], {key: value for key, value in parts.items() if key != name}
    return node, parts

"""All schemas of the package, first and in one place.

The contract exists without a compiled library: the public namespace and the private ones of native
libraries are defined from this table.
"""

NAMESPACE = "rlsedit_kernels"

SCHEMAS: dict[str, str] = {
    "gain_products": "(Tensor C, Tensor K) -> (Tensor, Tensor)",
    "key_products": "(Tensor A, Tensor K) -> Tensor",
    "cholesky": "(Tensor A) -> (Tensor, Tensor)",
    "gain_solve": "(Tensor Y, Tensor G, float noise) -> (Tensor, Tensor, Tensor)",
    "downdate_": "(Tensor(a!) C, Tensor Z, float alpha=-1.0) -> ()",
    "downdate_gain_products_": "(Tensor(a!) C, Tensor Z, Tensor K, float alpha=-1.0) -> (Tensor, Tensor)",
    "rls_update_": "(Tensor(a!) C, Tensor K, float noise=1.0, float forget=1.0) -> (Tensor, Tensor)",
    "weight_update_": "(Tensor(a!) W, Tensor K, Tensor V, Tensor gain) -> Tensor",
    "qr_append_": "(Tensor(a!) R, Tensor K) -> ()",
    "qr_append_rhs_": "(Tensor(a!) R, Tensor(b!) B, Tensor K, Tensor V) -> ()",
    "qr_gain": "(Tensor R, Tensor K) -> Tensor",
}


SHAPES: dict[str, str] = {
    "gain_products": "dd ud",
    "key_products": "dn ud",
    "cholesky": "uu",
    "gain_solve": "du uu",
    "downdate_": "dd dw",
    "downdate_gain_products_": "dd dw ud",
    "rls_update_": "dd ud",
    "weight_update_": "dv ud uv du",
    "qr_append_": "dd ud",
    "qr_append_rhs_": "dd dv ud uv",
    "qr_gain": "dd ud",
}
"""The last two dimensions of every tensor argument, a letter for each size; those before them are the same for all."""


def is_in_place(op: str) -> bool:
    """Whether `op` writes to one of its arguments."""
    return written(op) > 0


def written(op: str) -> int:
    """How many arguments `op` writes to; they come first."""
    return SCHEMAS[op].count("!")

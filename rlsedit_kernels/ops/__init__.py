"""The ops with checks and docstrings; `torch.ops.rlsedit_kernels.<name>` are the same without the checks.

What holds for all of them, on every back end and through either door:

Writing. An op whose name ends in an underscore writes to its first argument (`qr_append_rhs_`: its first two) as
torch's in-place ops do: the version counter moves, so that autograd notices; a leaf that requires a gradient is
refused unless grad mode is off, and an inference tensor outside of inference mode, before anything is written. The
native CPU kernels take all memory of a call, of every matrix of a batch, before they write: MemoryError means that
nothing has changed.

Gradients. There are none: the recursion is a closed form, call it under `torch.no_grad()`. Where one would be needed
NotImplementedError says so. An op that returns new tensors raises at backward; one that writes raises at once, as
every op does for a tangent of forward-mode AD and under `torch.func.grad`, `vjp`, `jvp` and what is made of them.
Leading dimensions stand for `vmap`, which torch refuses for ops that write.

Dtype. An op works in the dtype of its tensors; autocast has no part in it.

torch.compile. No op breaks a graph. A float argument (noise, forget, alpha) is a constant of the compiled code, as of
other ops of torch: every new value compiles once more, up to `torch._dynamo.config.recompile_limit`.

Numbers. noise and alpha must be finite in the dtype of the tensors. Without the checks, noise that overflows it is a
factor that failed: info = 1, gain and Z NaN, C untouched.
"""

from rlsedit_kernels.ops.cholesky import cholesky
from rlsedit_kernels.ops.downdate_ import downdate_
from rlsedit_kernels.ops.downdate_gain_products_ import downdate_gain_products_
from rlsedit_kernels.ops.gain_products import gain_products
from rlsedit_kernels.ops.gain_solve import gain_solve
from rlsedit_kernels.ops.key_products import key_products
from rlsedit_kernels.ops.qr_append_ import qr_append_
from rlsedit_kernels.ops.qr_append_rhs_ import qr_append_rhs_
from rlsedit_kernels.ops.qr_gain import qr_gain
from rlsedit_kernels.ops.rls_update_ import rls_update_
from rlsedit_kernels.ops.schemas import SCHEMAS
from rlsedit_kernels.ops.weight_update_ import weight_update_

__all__ = [
    "SCHEMAS",
    "cholesky",
    "downdate_",
    "downdate_gain_products_",
    "gain_products",
    "gain_solve",
    "key_products",
    "qr_append_",
    "qr_append_rhs_",
    "qr_gain",
    "rls_update_",
    "weight_update_",
]

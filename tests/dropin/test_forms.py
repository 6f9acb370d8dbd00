"""Which solves of other code bases are read as the same equation, and which are not."""

from __future__ import annotations

import pytest

from rlsedit import patch_forms

ALPHAEDIT = patch_forms.solve_form(
    "P[i] @ (layer_ks @ layer_ks.T + cache_c[i]) + hparams.L2 * EYE", "P[i] @ layer_ks @ resid.T"
)
MEMIT = patch_forms.solve_form("hparams.mom2_update_weight * cov + layer_ks @ layer_ks.T", "layer_ks")


def body(*lines: str) -> str:
    return "def function(hparams, P, cache_c, cov):\n" + "".join(f"    {line}\n" for line in lines)


SYSTEM = "P[i, :, :].cuda() @ (layer_ks @ layer_ks.T + cache_c[i, :, :].cuda())"
RIDGE = "hparams.L2 * torch.eye(len(layer_ks), dtype=torch.float, device='cuda')"


@pytest.mark.parametrize(
    "lines",
    [
        [f"x = torch.linalg.solve({SYSTEM} + {RIDGE}, P[i, :, :].cuda() @ layer_ks @ resid.T)"],
        [f"x = torch.linalg.solve({RIDGE} + {SYSTEM}, P[i].cuda() @ layer_ks.to(d) @ resid.T.to(d))"],
        [
            "proj = P[i, :, :].to(device).float()",
            "layer_ks = layer_ks.to(device).float()",
            "cache = cache_c[i, :, :].to(device).float()",
            "x = torch.linalg.solve(proj @ (layer_ks @ layer_ks.T + cache) + hparams.L2 * torch.eye(3), "
            "proj @ layer_ks @ resid.T)",
        ],
        [
            "p, unused = 1, 2",
            "c = cache_c[i, :, :].cuda().to(zs.device)",
            "ii = torch.eye(layer_ks.shape[0], device='cuda').to(zs.device)",
            "q = P[i, :, :]",
            "total = c + layer_ks @ layer_ks.T",
            "left = q @ total + hparams.L2 * ii",
            "right = q @ layer_ks @ resid.T",
            "x = torch.linalg.solve(left, right)",
        ],
        [
            f"x = torch.linalg.solve({SYSTEM} + {RIDGE}, P[i, :, :].cuda() @ layer_ks @ resid.T)",
            f"y = torch.linalg.solve({SYSTEM} + {RIDGE}, P[i, :, :].cpu() @ layer_ks @ resid.T)",
        ],
    ],
)
def test_one_equation_in_other_words(lines: list[str]) -> None:
    assert patch_forms.solves(body(*lines)) == {ALPHAEDIT}


def test_a_system_with_a_name_is_written_out() -> None:
    lines = [
        "cov_mat = hparams.mom2_update_weight * cov.double() + (layer_ks @ layer_ks.T)",
        "adj_k = torch.linalg.solve(cov_mat, layer_ks)",
    ]
    assert patch_forms.solves(body(*lines)) == {MEMIT}


@pytest.mark.parametrize(
    "lines",
    [
        [f"x = torch.linalg.solve({SYSTEM} + 2 * {RIDGE}, P[i] @ layer_ks @ resid.T)"],
        [f"x = torch.linalg.solve({SYSTEM} + {RIDGE}, layer_ks @ resid.T)"],
        [f"x = torch.linalg.solve(P[i] @ (layer_ks @ layer_ks.T) + {RIDGE}, P[i] @ layer_ks @ resid.T)"],
        [
            f"x = torch.linalg.solve(P[i] @ (3 * layer_ks @ layer_ks.T + cache_c[i]) + {RIDGE}, "
            "P[i] @ layer_ks @ resid.T)"
        ],
        [f"x = torch.linalg.solve(P[j] @ (layer_ks @ layer_ks.T + cache_c[i]) + {RIDGE}, P[i] @ layer_ks @ resid.T)"],
        ["cov += cache", "x = torch.linalg.solve(hparams.mom2_update_weight * cov + K @ K.T, K)"],
        ["P = P @ P", f"x = torch.linalg.solve({SYSTEM}, P[i] @ layer_ks @ resid.T)"],
        ["a = b @ c", "b = a @ c", "x = torch.linalg.solve(a, b)"],
        ["c = cache_c[i]", "c = c + c", f"x = torch.linalg.solve(P[i] @ (layer_ks @ layer_ks.T + c) + {RIDGE}, P[i])"],
    ],
)
def test_another_equation_is_another_text(lines: list[str]) -> None:
    assert patch_forms.solves(body(*lines)).isdisjoint({ALPHAEDIT, MEMIT})

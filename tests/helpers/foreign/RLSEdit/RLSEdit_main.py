"""The calling convention of RLSEdit's reference code around its recursion (arXiv 2601.15686, sec. 4.4)."""

import torch
from toy import compute_ks, residuals


def _robust_spd_inverse(matrix, layer_idx, base_eps=1e-6, max_tries=5):
    return torch.cholesky_inverse(torch.linalg.cholesky(0.5 * (matrix + matrix.T)))


def apply_RLSEdit_to_model(model, tok, requests, hparams, cache_template=None, cache_c=None):
    if cache_c is None:
        C_list = []
        for layer in hparams.layers:
            M0 = hparams.lambda_reg**2 * torch.eye(len(model.moments[layer]))
            M0 = M0 + hparams.mu_reg**2 * hparams.mom2_update_weight * model.moments[layer]
            C_list.append(_robust_spd_inverse(M0, layer_idx=layer))
        C = torch.stack(C_list, dim=0)
    else:
        C = cache_c.clone()
    for i, layer in enumerate(hparams.layers):
        K_t = compute_ks(model, requests, layer).T
        resid_y = residuals(model, requests).T / (len(hparams.layers) - i)
        C_prev = C[i].to(device=K_t.device, dtype=K_t.dtype)
        F_t = C_prev @ K_t
        S_t = torch.eye(K_t.size(1), dtype=K_t.dtype) + K_t.T @ F_t
        R_small = torch.linalg.cholesky(S_t, upper=True)
        G_t = torch.linalg.solve_triangular(R_small, F_t, upper=True, left=False)
        C_t = C_prev - G_t @ G_t.T
        W_prev = model.weights[layer].T
        C[i] = C_t.detach().to("cpu")
        W_t = W_prev + C_t @ K_t @ resid_y
        model.weights[layer] = W_t.detach().T.clone()
    return model, C

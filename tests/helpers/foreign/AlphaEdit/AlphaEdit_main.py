"""AlphaEdit's calling convention around eq. 14 of Fang et al. 2025."""

import torch
from toy import compute_ks, residuals


def apply_AlphaEdit_to_model(model, tok, requests, hparams, cache_template=None, cache_c=None, P=None):
    for i, layer in enumerate(hparams.layers):
        layer_ks = compute_ks(model, requests, layer).T
        resid = residuals(model, requests) / (len(hparams.layers) - i)
        upd_matrix = torch.linalg.solve(
            P[i, :, :].cpu() @ (layer_ks @ layer_ks.T + cache_c[i, :, :].cpu())
            + hparams.L2 * torch.eye(layer_ks.shape[0], dtype=torch.float),
            P[i, :, :].cpu() @ layer_ks @ resid.T,
        )
        with torch.no_grad():
            model.weights[layer] += upd_matrix.T
    for i, layer in enumerate(hparams.layers):
        layer_ks = compute_ks(model, requests, layer).T
        cache_c[i, :, :] += layer_ks.cpu() @ layer_ks.cpu().T
    return model, cache_c

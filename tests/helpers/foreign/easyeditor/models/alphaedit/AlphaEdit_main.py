"""EasyEdit's calling convention around AlphaEdit: P and cache_c are globals of the module.

Where hparams.P_loc is no file P is made anew in every call, as in the released code.
"""

import os

import torch
from toy import compute_ks, projectors, residuals

P_loaded = False
cache_c_new = False


def apply_AlphaEdit_to_model(model, tok, requests, hparams, copy=False, reset_cache=False, **kwargs):
    global P, P_loaded, cache_c, cache_c_new
    if reset_cache:
        cache_c_new = False
    if not os.path.exists(hparams.P_loc):
        P, P_loaded = projectors(model, hparams.nullspace_threshold), True
    elif not P_loaded:
        P, P_loaded = torch.load(hparams.P_loc), True
    if not cache_c_new:
        cache_c = torch.zeros(len(hparams.layers), *model.moments[0].shape)
        cache_c_new = True
    for layer, upd_matrix in execute_AlphaEdit(model, tok, requests, hparams).items():
        model.weights[layer] += upd_matrix.T
    return model, {}


def execute_AlphaEdit(model, tok, requests, hparams, cache_template=None):
    deltas, before = {}, [weight.clone() for weight in model.weights]
    for i, layer in enumerate(hparams.layers):
        layer_ks = compute_ks(model, requests, layer).T
        resid = residuals(model, requests) / (len(hparams.layers) - i)
        proj = P[i, :, :].to("cpu").float()
        cache = cache_c[i, :, :].to("cpu").float()
        upd_matrix = torch.linalg.solve(
            proj @ (layer_ks @ layer_ks.T + cache) + hparams.L2 * torch.eye(layer_ks.shape[0], dtype=proj.dtype),
            proj @ layer_ks @ resid.T,
        )
        model.weights[layer] = model.weights[layer] + upd_matrix.T.detach()
        deltas[layer] = upd_matrix.detach().cpu()
    for i, layer in enumerate(hparams.layers):
        layer_ks = compute_ks(model, requests, layer).T
        cache_c[i, :, :] += layer_ks.cpu() @ layer_ks.cpu().T
    model.weights[:] = before
    return deltas

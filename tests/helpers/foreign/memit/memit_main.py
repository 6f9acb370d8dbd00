"""MEMIT's calling convention around eq. 14 of Meng et al. 2023."""

import torch
from toy import compute_ks, residuals


def apply_memit_to_model(model, tok, requests, hparams, copy=False, return_orig_weights=False, cache_template=None):
    before = [weight.clone() for weight in model.weights]
    for layer, (adj_k, resid) in execute_memit(model, tok, requests, hparams).items():
        model.weights[layer] += (resid @ adj_k.T).float()
    return model, before


def execute_memit(model, tok, requests, hparams, cache_template=None):
    deltas, before = {}, [weight.clone() for weight in model.weights]
    for i, layer in enumerate(hparams.layers):
        layer_ks, targets = compute_ks(model, requests, layer).T.double(), residuals(model, requests).double()
        cov = get_cov(model, tok, f"layer.{layer}")
        adj_k = torch.linalg.solve(hparams.mom2_update_weight * cov.double() + layer_ks @ layer_ks.T, layer_ks)
        resid = targets / (len(hparams.layers) - i)
        model.weights[layer] = before[layer] + (resid @ adj_k.T).float().detach()
        deltas[layer] = (adj_k.detach().cpu(), resid.detach().cpu())
        cov.cpu()
    model.weights[:] = before
    return deltas


def get_cov(model, tok, layer_name, inv=False, force_recompute=False):
    moment = model.moments[int(layer_name.rpartition(".")[2])].clone()
    return torch.inverse(moment) if inv else moment

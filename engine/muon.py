"""Muon, an optimiser for matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""

import collections
import math

import torch
import torch.nn as nn


class Muon(torch.optim.Optimizer):
    """Steps along the orthogonalised momentum, scaled to the RMS of AdamW's steps.

    It computes the same as torch.optim.Muon, which multiplies in bf16 on any hardware. Where bf16
    is emulated, such a step takes 27 times as long as in fp32. Here `dtype` chooses."""

    def __init__(self, params, weight_decay, dtype):
        super().__init__(params, dict(lr=0.0, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = collections.defaultdict(list)  # matrices of a shape are multiplied at once
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, matrices in by_shape.items():
                updates = torch.stack([self.momentum(p) for p in matrices])  # (K, n, m)
                updates = orthogonal(updates, self.dtype)
                scale = 0.2 * math.sqrt(max(shape))
                for p, update in zip(matrices, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-scale * group["lr"])

    def momentum(self, p):
        """Nesterov's: the gradient, moved towards its running mean."""
        if p not in self.state:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        mean = self.state[p]["momentum_buffer"]
        mean.lerp_(p.grad, 0.05)
        return p.grad.lerp(mean, 0.95)


def orthogonal(x, dtype):
    """For each matrix of x (K, n, m) roughly the nearest orthogonal one, by five steps of Newton
    and Schulz. Muon's coefficients raise small singular values fast, to at most 1.2. Those of wide
    or tall gaussian matrices end above 0.68. Square ones have values near 0, which stay behind: the
    smallest of a 768 x 768 one ends near 0.01."""
    is_tall = x.shape[1] > x.shape[2]
    y = x.mT if is_tall else x
    y = y.to(dtype)
    y = y / y.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = y @ y.mT  # (K, n, n)
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        y = torch.baddbmm(y, polynomial, y, beta=3.4445)
    return y.mT if is_tall else y


def make_optimizers(model, block_type, cfg, dtype):
    """The optimisers of a model: AdamW, with weight decay on matrices only, and with cfg.muon Muon
    for the linear layers of all blocks (modules of block_type), but not for their adaLN."""
    for_muon = []
    if cfg.muon:
        for block in model.modules():
            if isinstance(block, block_type):
                for layer in block.modules():
                    if isinstance(layer, nn.Linear) and layer is not block.adaln:
                        for_muon.append(layer.weight)
    matrices = []
    vectors = []
    in_muon = {id(p) for p in for_muon}
    for p in model.parameters():
        if id(p) in in_muon:
            continue
        if p.dim() < 2:
            vectors.append(p)
        else:
            matrices.append(p)
    groups = [dict(params=matrices), dict(params=vectors, weight_decay=0)]
    is_fused = matrices[0].device.type != "mps"
    adamw = torch.optim.AdamW(
        groups, betas=(0.9, 0.98), weight_decay=cfg.weight_decay, fused=is_fused
    )
    if cfg.muon:
        return [adamw, Muon(for_muon, cfg.weight_decay, dtype)]
    return [adamw]

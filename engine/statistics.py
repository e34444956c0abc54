"""Statistics of training data."""

import torch
from tqdm import tqdm

from textldm import TARGET, teacher_features


@torch.no_grad()
def feature_statistics(teacher, batches):
    """Mean and standard deviation (E_teacher,) of the teacher's features of counted tokens."""
    features = []
    for batch in tqdm(batches, desc="features of the teacher", delay=2, leave=False):
        features.append(teacher_features(teacher, batch.tokens)[batch.counted])
    features = torch.cat(features).float()  # (tokens, E_teacher)
    return features.mean(0), features.std(0).clamp(min=1e-6)


@torch.no_grad()
def mean_latents(vae, batches):
    """E[z_0 | token] (V, C): the mean latent of each token over its places in batches. Each token
    is also encoded once alone, so that rare tokens have a mean.

    Also returns the share of the latents' variance that the token does not explain."""
    V = vae.config.vocab_size
    alone = torch.arange(V, device=vae.z_mean.device)[:, None]  # (V, 1)
    total = vae.latents(alone, torch.full_like(alone, TARGET))[:, 0]  # (V, C)
    tokens = []
    latents = []
    for batch in tqdm(batches, desc="latents of tokens", delay=2, leave=False):
        z = vae.latents(batch.tokens, batch.segment)  # (B, N, C)
        tokens.append(batch.tokens[batch.counted])
        latents.append(z[batch.counted])
    tokens = torch.cat(tokens)  # (tokens,)
    z = torch.cat(latents)  # (tokens, C)
    total = total.index_add(0, tokens, z)
    count = 1 + tokens.bincount(minlength=V)  # (V,)
    mean = total / count[:, None]
    unexplained = (z - mean[tokens]).square().sum() / (z - z.mean(0)).square().sum()
    return mean, unexplained.item()

"""TextLDM in one file: a VAE, a Diffusion Transformer and flow matching, for text.

An unofficial, educational implementation of [TextLDM]. It needs torch alone.
It writes all tokens of a continuation at once. A VAE gives each token a latent, a vector of C
numbers. A Diffusion Transformer (DiT) makes the latents of the continuation from noise, in some
steps. The VAE's decoder turns them into tokens.

    stage 1   tokens --encoder--> posterior --sample--> z --decoder--> tokens     TextVAE
                 the encoder is aligned with features of a frozen GPT (REPA)      its `alignment`
    stage 2   [clean latents of the context ; noisy latents of the target]
                  --DiT--> velocity (the paper), or p(token) (ours)               TextDiT
    sampling  prompt --encoder--> latents of the context
              noise --Euler steps--> latents of the target --decoder--> tokens    continue_texts

Rows     A row is a context, then the target that continues it. `segment` tells which is which.
         A text ends in an end-of-text token. The rest of the row, the tail, repeats this token.
Shapes   B rows in a batch     N tokens in a row       V tokens in the vocabulary
         E width of a network  H attention heads       D width of a head, E / H
         C channels of a latent    T target tokens in the whole batch
Time     t = 1 is noise (eps) and t = 0 is data. The path between them is straight:
         z_t = (1 - t) z_0 + t eps. Its velocity is dz_t/dt = eps - z_0.
Latents  TextVAE computes with raw ones. Its method `latents` returns, and `to_tokens` takes,
         standardised ones: active channels have mean 0 and std 1. All other code sees only those.
Recipe   Defaults are the paper's where it states a value; depth and width are our choice. The
         scripts run smaller networks with the departures in OURS: docs/deviations.md has a table.
Tags     `unspecified:` the paper is silent. `deviation:` a departure that no option undoes.

[TextLDM] Jiang et al. 2026, arXiv 2605.07748    [VAE]  Kingma, Welling 2013, arXiv 1312.6114
[GPT2]    Radford et al. 2019                    [DiT]  Peebles, Xie 2022, arXiv 2212.09748
[RoPE]    Su et al. 2021, arXiv 2104.09864       [REPA] Yu et al. 2024, arXiv 2410.06940
[FM]      Lipman et al. 2022, arXiv 2210.02747   [SD3]  Esser et al. 2024, arXiv 2403.03206
[CFG]     Ho, Salimans 2022, arXiv 2207.12598    [AB]   Chen et al. 2022, arXiv 2208.04202
[CDCD]   Dieleman et al. 2022, arXiv 2211.15089  [ELF]  Hu et al. 2026, arXiv 2605.10938
[VA-VAE] Yao et al. 2025, arXiv 2501.01423       [Muon] Jordan et al. 2024, kellerjordan.github.io
"""

import math
import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

# Our departures from the paper, which --recipe=paper leaves out. docs/deviations.md measures them.
OURS = dict(
    adaln=True,  # the DiT is told the time, and need not infer it from the noise
    # REPA aligns the latents, as in [VA-VAE]: the DiT sees these. A weight of 1 aligned too little.
    repa_latents=True,
    repa=4.0,
    predict_tokens=True,  # the DiT predicts the token; the velocity follows from it, as in [CDCD]
    self_condition=True,  # it is told its estimate of the previous step: tokens can agree [AB]
    # The DiT's blocks are initialised from the VAE decoder's, which read clean latents already.
    # The gates of adaLN still start at 0, so these blocks come in as gates open.
    from_decoder=True,
    # Training and sampling spend more of their times near noise, where tokens are decided.
    t_mean=0.8,
    t_std=1.0,
    muon=True,  # [Muon] trains the matrices of blocks: the loss falls faster than with AdamW
)

CONTEXT, TARGET, PADDING = 0, 1, 2  # values of `segment`; only sampling needs padding
# unspecified: the weight of a token of the tail in the losses. (The first end-of-text is no tail.)
# With 1 tails would outnumber the text. The low weight makes P(end of text) too low, and
# docs/deviations.md says by how much.
TAIL_WEIGHT = 0.1


class Batch(NamedTuple):
    """Rows of training data. Losses are means over tokens, weighted by `weight`."""
    tokens: torch.Tensor  # (B, N)
    segment: torch.Tensor  # (B, N): CONTEXT or TARGET
    weight: torch.Tensor  # (B, N): TAIL_WEIGHT in the tail, else 1 (in a variant also 0)
    targets: torch.Tensor  # (T,): indices of targets among the B * N tokens

    @property
    def counted(self):
        return self.weight == 1  # (B, N): False in the tail; reports are means over counted tokens

    def at_targets(self, x):
        """x (B, N, ...) -> its targets (T, ...)"""
        return x.flatten(0, 1).index_select(0, self.targets)


def make_batch(tokens, segment, weight):
    """A Batch of CPU tensors (B, N). (On a GPU nonzero() would make the CPU wait.)"""
    targets = (segment.flatten() == TARGET).nonzero()[:, 0]
    return Batch(tokens, segment, weight, targets)


def option(default, help, low=None, high=None):
    """A field of a config. The scripts make a command-line option of it."""
    return field(default=default, metadata=dict(help=help, low=low, high=high))


# ---- 1. Blocks: the pre-norm Transformer, shared by all networks ---------------------------------

@dataclass
class TransformerConfig:
    n_layer: int = option(12, "blocks", 1, 999)
    n_head: int = option(12, "heads", 1)  # H
    n_embd: int = option(768, "width", 1)  # E
    block_size: int = option(1024, "longest row in tokens", 2, 2**16)
    vocab_size: int = 50257  # V; set from the corpus

    def __post_init__(self):
        if self.n_embd % (2 * self.n_head):  # rotary: D must be even
            raise ValueError(f"n_embd={self.n_embd} is not a multiple of 2 * n_head={self.n_head}")

    @property
    def end_of_text(self):
        return self.vocab_size - 1  # by convention the last token


def rotary(position, D):
    """Rotary positions [RoPE]: cosines and sines (N, D/2) of angles that grow with `position`."""
    frequency = 10000 ** (-torch.arange(0, D, 2, device=position.device) / D)  # (D/2,)
    angle = position[:, None] * frequency  # (N, D/2)
    return angle.cos(), angle.sin()


def rotate(x, turn):
    """Turns pairs (i, i + D/2) of the D numbers of x (..., N, D) by the angles of `rotary`. So the
    product of a query and a key sees the difference of their positions."""
    cos, sin = turn
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def heads(self, x, turn=None):
        """x (B, N, E) -> queries, keys and values (B, H, N, D), turned if they have positions."""
        B, N, E = x.shape
        qkv = self.c_attn(x).view(B, N, 3, self.n_head, E // self.n_head)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, H, N, D)
        q, k, v = qkv
        if turn is not None:
            q, k = rotate(qkv[:2], turn)
            v = v.contiguous()  # a view would keep the old q and k in memory
        return q, k, v

    def attend(self, q, k, v, mask=None, causal=False):
        """-> (B, N, E). mask (B or 1, 1, N or 1, N): True where a query may see a key."""
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.c_proj(y.transpose(1, 2).flatten(2))

    def forward(self, x, mask=None, turn=None, causal=False):
        return self.attend(*self.heads(x, turn), mask, causal)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). With `adaln`, an embedding of the time shifts,
    scales and gates both branches (adaLN-zero, section 3.2 of [DiT])."""

    def __init__(self, config, adaln=False):
        super().__init__()
        E = config.n_embd
        self.ln_1 = nn.LayerNorm(E)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(E)
        self.mlp = MLP(config)
        self.adaln = nn.Linear(E, 6 * E) if adaln else None

    def forward(self, x, mask=None, turn=None, causal=False, time_emb=None):
        """x (B, N, E) -> (B, N, E). time_emb (B, 1, E) is for adaln."""
        if self.adaln is None:
            x = x + self.attn(self.ln_1(x), mask, turn, causal)
            return x + self.mlp(self.ln_2(x))
        modulation = self.adaln(time_emb).chunk(6, dim=-1)  # (B, 1, E) each
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation
        y = self.ln_1(x) * (1 + scale_1) + shift_1
        x = x + gate_1 * self.attn(y, mask, turn, causal)
        y = self.ln_2(x) * (1 + scale_2) + shift_2
        return x + gate_2 * self.mlp(y)


class Transformer(nn.Module):
    """Blocks with rotary positions, and a last norm: encoder, decoder, core of the DiT. So
    unlike [DiT]'s the DiT's norms have weights, and the last one is not told the time."""

    def __init__(self, config, adaln=False):
        super().__init__()
        self.D = config.n_embd // config.n_head
        self.h = nn.ModuleList(Block(config, adaln) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)

    def forward(self, x, mask=None, time_emb=None):
        position = torch.arange(x.shape[1], device=x.device)  # (N,)
        turn = rotary(position, self.D)
        for block in self.h:
            x = block(x, mask, turn, time_emb=time_emb)
        return self.ln_f(x)


def init_weights(model):
    """GPT-2's initialisation: std 0.02, biases zero. Matrices that write into the residual stream
    are scaled down, so that its variance does not grow with depth. adaLN begins at zero."""
    residual_std = 0.02 / math.sqrt(2 * model.config.n_layer)
    for name, p in model.named_parameters():
        if name.endswith("bias") or ".adaln." in name:
            nn.init.zeros_(p)
        elif name.endswith("c_proj.weight"):
            nn.init.normal_(p, std=residual_std)
        elif p.dim() >= 2:
            nn.init.normal_(p, std=0.02)


def weighted_mean(x, weight):
    return (x * weight).sum() / weight.sum().clamp(min=1e-9)


# ---- 2. GPT: the frozen teacher of REPA, and the autoregressive baseline -------------------------

class GPT(nn.Module):
    """GPT-2 [GPT2]: learned positions, tanh GELU, tied embeddings. Hugging Face's names."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        for block in self.h:
            block.mlp.gelu = nn.GELU("tanh")  # as in GPT-2; on CPUs the exact GELU is faster
        init_weights(self)

    def hidden_states(self, tokens, layer):
        """tokens (B, N) -> (B, N, E) after `layer` blocks, before the final norm."""
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.h[:layer]:
            x = block(x, causal=True)
        return x

    def forward(self, tokens, next_tokens=None, weight=None):
        """tokens (B, N) -> logits of each next token (B, N, V). With next_tokens and weight (B, N)
        their mean loss instead."""
        x = self.ln_f(self.hidden_states(tokens, self.config.n_layer))
        if next_tokens is None:
            return F.linear(x, self.wte.weight)
        return cross_entropy(x, self.wte, next_tokens, weight)[0]


@torch.no_grad()
def teacher_features(teacher, tokens):
    """What REPA aligns to: the teacher's third-to-last layer (section 3.1 of [TextLDM]), as
    (B, N, E_teacher) for tokens (B, N). N is below the teacher's block_size.
    unspecified: the teacher reads an end-of-text token first, because a causal model's state at the
    first position is larger than others (of GPT-2 by far). It reads whole rows, so a target's
    features know the context."""
    tokens = F.pad(tokens, (1, 0), value=teacher.config.end_of_text)
    third_to_last = max(teacher.config.n_layer - 2, 1)
    return teacher.hidden_states(tokens, third_to_last)[:, 1:]


# ---- 3. The VAE: tokens to latents and back, aligned to the teacher by REPA ----------------------

def same_segment(segment):
    """The VAE's mask (B, 1, N, N): a token sees its own segment. Otherwise the encoder, which reads
    both ways, would leak the target into the context's latents (section 3.2 of [TextLDM]). One pass
    with this mask equals two separate ones, because rotary attention sees distances only."""
    return (segment[:, :, None] == segment[:, None, :])[:, None]


@dataclass
class VAEConfig(TransformerConfig):
    n_layer: int = option(9, "blocks of the encoder, and of the decoder", 1, 999)
    channels: int = option(64, "channels of a latent", 1)  # C
    beta: float = option(1e-3, "weight of the KL divergence", 0)
    beta_warmup: int = option(10_000, "steps until beta is reached", 0)
    repa: float = option(1.0, "weight of the alignment", 0)  # lambda
    repa_latents: bool = option(False, "REPA aligns latents, not features")
    teacher_embd: int = 0  # E_teacher; 0: no teacher


class TextVAE(nn.Module):
    """Stage 1 (section 3.1 of [TextLDM]). A bidirectional encoder gives each token a diagonal
    Gaussian. A decoder, whose only input is the latents, gives all tokens back at once."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        E, C = config.n_embd, config.channels
        self.wte = nn.Embedding(config.vocab_size, E)
        self.encoder = Transformer(config)
        self.to_posterior = nn.Linear(E, 2 * C)
        self.from_latent = nn.Linear(C, E)
        self.decoder = Transformer(config)
        self.to_logits = nn.Linear(E, config.vocab_size, bias=False)
        if config.teacher_embd:
            width = C if config.repa_latents else E  # of the student
            self.to_teacher = nn.Linear(width, config.teacher_embd)
        init_weights(self)
        # Statistics of training data: z's by `standardise`, the teacher's by train_vae.py.
        # unspecified: the scale of latents. It should be 1, the scale of noise. The KL alone pulls
        # it there, slowly and not exactly. So it is measured, and divided by.
        self.register_buffer("z_mean", torch.zeros(C))
        self.register_buffer("z_std", torch.ones(C))
        self.register_buffer("teacher_mean", torch.zeros(config.teacher_embd))
        self.register_buffer("teacher_std", torch.ones(config.teacher_embd))

    def mask(self, segment):
        return same_segment(segment)

    def posterior(self, tokens, segment):
        """tokens, segment (B, N) -> mu, logvar (B, N, C) and the encoder's features h (B, N, E)."""
        h = self.encoder(self.wte(tokens), self.mask(segment))  # (B, N, E)
        mu, logvar = self.to_posterior(h).float().chunk(2, dim=-1)  # (B, N, C) each
        return mu, logvar.clamp(-20, 10), h

    def decode(self, z, segment):
        """Raw latents z (B, N, C) -> what `to_logits` reads of all tokens at once (B, N, E)."""
        x = self.from_latent(z).float()  # autocast gives bf16; the residual stream is fp32
        return self.decoder(x, self.mask(segment))

    def alignment(self, mu, h, features):
        """REPA [REPA]: the cosine (B, N) between the projected student and the teacher's features
        (B, N, E_teacher). The paper's student is h (B, N, E). `to_posterior` may discard what is
        aligned there. Our student is mu (B, N, C), which the DiT will see.
        deviation: the features are standardised. In GPT-2 a few huge, nearly constant dimensions
        give any two tokens a cosine near 2/3. (In the small GPT of the scripts: below 0.1.)"""
        student = self.to_teacher(mu if self.config.repa_latents else h).float()
        teacher = (features.float() - self.teacher_mean) / self.teacher_std
        return F.cosine_similarity(student, teacher.detach(), dim=-1)

    def forward(self, batch, features=None, beta=0.0, generator=None):
        """L = CE + beta KL + lambda L_REPA, where L_REPA = -mean cosine (Eq. 1-3 of [TextLDM]).
        Returns scalars: `loss` (by weight), and its terms (over counted tokens). Without `features`
        nothing is aligned. Without a generator z is the posterior mean."""
        tokens, segment = batch.tokens, batch.segment
        mu, logvar, h = self.posterior(tokens, segment)
        z = mu  # (B, N, C)
        if generator is not None:
            noise = torch.randn(mu.shape, generator=generator, device=mu.device)
            z = mu + (0.5 * logvar).exp() * noise
        x = self.decode(z, segment)  # (B, N, E)
        mean_ce, ce = cross_entropy(x, self.to_logits, tokens, batch.weight)  # (), (B, N)
        # KL(N(mu, exp(logvar)) || N(0, 1)), summed over channels (appendix B of [VAE])
        kl = mu.square() + logvar.exp() - 1 - logvar  # (B, N, C)
        kl = 0.5 * kl.sum(-1)  # (B, N)
        cos = torch.zeros_like(ce)  # (B, N)
        if features is not None:
            cos = self.alignment(mu, h, features)
        report = dict(ce=ce, kl=kl.detach(), cos=cos.detach())
        report = {k: weighted_mean(x, batch.counted) for k, x in report.items()}
        rest = beta * kl - self.config.repa * cos  # (B, N)
        report["loss"] = mean_ce + weighted_mean(rest, batch.weight)
        return report

    @torch.no_grad()
    def standardise(self, batches):
        """Measures mean and std of each channel over counted tokens of batches. Returns the number
        of active channels: their mu has a variance above 0.01. The others carry nothing. They are
        centred, but not rescaled: the DiT would have to learn what means nothing."""
        found = [self.posterior(b.tokens, b.segment)[0][b.counted] for b in batches]
        mu = torch.cat(found).cpu().double()  # (tokens, C)
        is_active = mu.var(0) > 0.01  # (C,)
        self.z_mean.copy_(mu.mean(0))
        self.z_std.copy_(torch.where(is_active, mu.std(0), 1.0))
        return int(is_active.sum())

    def latents(self, tokens, segment):
        """tokens (B, N) -> standardised latents z_0 (B, N, C). unspecified: these are posterior
        means, for targets too: what a draw adds to its mean is noise that no DiT can predict."""
        mu, _, _ = self.posterior(tokens, segment)
        return (mu - self.z_mean) / self.z_std

    def to_tokens(self, z, segment):
        """Standardised latents z (B, N, C) -> the likeliest tokens (B, N)."""
        x = self.decode(z * self.z_std + self.z_mean, segment)  # (B, N, E)
        return by_chunks(lambda x: self.to_logits(x).argmax(-1), x)


# ---- 4. The DiT: reads noisy latents of the target and clean ones of the context -----------------

@dataclass
class DiTConfig(TransformerConfig):
    n_layer: int = option(16, "blocks", 1, 999)
    channels: int = 0  # C; set from the VAE
    context_drop: float = option(0.1, "share of rows without context", 0, 1)
    t_mean: float = option(0.0, "mean of logit(t)", -9, 9)
    t_std: float = option(1.5, "std of logit(t)", 1e-3, 9)
    adaln: bool = option(False, "tell it the time")
    predict_tokens: bool = option(False, "predict p(token), not v")
    self_condition: bool = option(False, "tell it its previous estimate")


class TextDiT(nn.Module):
    """Stage 2 (section 3.2 of [TextLDM]): context and target in one sequence, where every token
    sees every token. The paper's DiT infers the time from the noise. With `adaln` it is told."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        E, C, V = config.n_embd, config.channels, config.vocab_size
        self.from_latent = nn.Linear(C, E)
        if config.self_condition:
            self.from_guess = nn.Linear(C, E, bias=False)
        self.segment_emb = nn.Embedding(2, E)  # of CONTEXT and of TARGET
        if config.adaln:
            layers = nn.Linear(E, E), nn.SiLU(), nn.Linear(E, E), nn.SiLU()
            self.time_mlp = nn.Sequential(*layers)
        self.transformer = Transformer(config, config.adaln)
        self.to_output = nn.Linear(E, V if config.predict_tokens else C)
        if config.predict_tokens:
            # (V, C): the expectation E[z_0 | token], in training data. train_dit.py measures it.
            self.register_buffer("latent_of", torch.zeros(V, C))
        init_weights(self)
        nn.init.zeros_(self.to_output.weight)  # v is 0, p(token) uniform

    def times(self, u):
        """Probabilities u in [0, 1] -> quantiles of a logit-normal distribution (3.1 of [SD3]).
        Training draws u at random. The sampler takes equal steps in u, so its steps are small where
        the network was trained most (section 3.2 of [TextLDM]). u = 0 and 1 give t = 0 and 1."""
        normal = 2**0.5 * torch.erfinv(2 * u - 1)
        return torch.sigmoid(self.config.t_mean + self.config.t_std * normal)

    def time_embedding(self, t):
        """t (B,) -> (B, 1, E): sinusoids as in [DiT], of 1000 t; those of t would hardly change."""
        half = self.config.n_embd // 2
        frequency = 10000 ** (-torch.arange(half, device=t.device) / half)  # (E/2,)
        angle = 1000 * t[:, None, None] * frequency  # (B, 1, E/2)
        return self.time_mlp(torch.cat((angle.cos(), angle.sin()), dim=-1))

    def forward(self, x, segment, t, guess=None, mask=None, places=None):
        """x (B, N, C): noisy latents of the target at times t (B,); clean ones of the context, or
        zeros if the context is dropped. segment (B, N) tells them apart. guess (B, N, C): a former
        estimate of the targets' z_0; None is as zeros. mask (B, 1, 1, N) is False at padding.
        Returns what `to_output` reads, (B, N, E), or with places (T,), indices among the B * N
        tokens, only theirs: (T, E). `loss` and `estimate` take it."""
        is_target = segment == TARGET  # (B, N); padding is masked
        h = self.from_latent(x) + self.segment_emb(is_target.long())  # (B, N, E)
        if self.config.self_condition and guess is not None:
            h = h + self.from_guess(guess * is_target[..., None])
        time_emb = self.time_embedding(t) if self.config.adaln else None
        h = self.transformer(h, mask, time_emb)
        return h if places is None else h.flatten(0, 1).index_select(0, places)

    def loss(self, h, tokens, z_0, eps, weight):
        """The mean loss by weight, and the loss of each target (T,), which has no gradient. All
        arguments are of targets: h (T, E), z_0 and eps (T, C), tokens and weight (T,)."""
        if self.config.predict_tokens:  # ours: p(token | z_t, context), in nats; see `estimate`
            return cross_entropy(h, self.to_output, tokens, weight)
        v = self.to_output(h).float()  # (T, C): the paper's objective (Eq. 5)
        losses = (v - (eps - z_0)).square().mean(-1)  # (T,)
        return weighted_mean(losses, weight), losses.detach()

    def estimate(self, h, z_t, t, temperature=1.0):
        """The clean latents E[z_0 | z_t] (..., C), given h (..., E) at z_t (..., C). t broadcasts
        with z_t. A temperature below 1 prefers likely tokens; a velocity ignores it."""
        if not self.config.predict_tokens:
            return z_t - t * self.to_output(h).float()  # z_t - t v, as z_t = z_0 + t v
        # E[z_0 | z_t] is the sum over tokens of p(token | z_t) E[z_0 | token, z_t]. We take
        # E[z_0 | token] for the last factor, as [CDCD] takes embeddings ("score interpolation").
        # So without guidance a sample ends in the convex hull of these V vectors.
        scale = 1 / max(temperature, 1e-4)
        bias = scale * self.to_output.bias

        def mixture(h):
            logits = F.linear(scale * h, self.to_output.weight, bias).float()  # (chunk, V)
            # in fp32, because guidance takes differences of estimates
            with torch.autocast(h.device.type, enabled=False):
                return logits.softmax(-1) @ self.latent_of

        return by_chunks(mixture, h)


# ---- 5. Flow matching [FM]: the loss, and the sampler --------------------------------------------

def denoising_loss(dit, batch, z_0, t, eps, n_guess=0):
    """Noises the targets of a batch, and measures how well the DiT recovers them.
    z_0 (B, N, C): clean latents, zeros for a dropped context. t (B,): times. eps (B, N, C): noise.
    Returns the mean loss, and of the targets each loss (T,), h (T, E), z_t (T, C) and t (T, 1).
    Self-conditioning [AB]: the first n_guess rows are told what a first pass estimates. The others
    are told zeros, as in the first step of the sampler."""
    B, N, C = z_0.shape
    t_of = t[:, None, None].expand(B, N, 1)
    z_t = (1 - t_of) * z_0 + t_of * eps  # (B, N, C)
    is_target = (batch.segment == TARGET)[..., None]  # (B, N, 1)
    x = torch.where(is_target, z_t, z_0)  # (B, N, C): the context stays clean
    guess = torch.zeros_like(x)  # (B, N, C)
    if dit.config.self_condition and n_guess:
        first = slice(n_guess)
        with torch.no_grad():
            h = dit(x[first], batch.segment[first], t[first])
            guess[first] = dit.estimate(h, z_t[first], t_of[first])
    h = dit(x, batch.segment, t, guess, places=batch.targets)  # (T, E)
    of_rows = batch.tokens, batch.weight, z_0, eps, z_t, t_of
    tokens, weight, z_0, eps, z_t, t_of = map(batch.at_targets, of_rows)
    return *dit.loss(h, tokens, z_0, eps, weight), h, z_t, t_of


def flow_loss(dit, batch, z_0, generator):
    """The loss of stage 2, a scalar: a weighted mean over the targets of a batch with latents z_0
    (B, N, C). Draws the noise, a time for each row, and which rows lose their context."""
    B = len(z_0)
    u = torch.rand(2, B, generator=generator, device=z_0.device)
    eps = torch.randn(z_0.shape, generator=generator, device=z_0.device)  # (B, N, C)
    t = dit.times(u[0])  # (B,)
    is_hidden = (u[1] < dit.config.context_drop)[:, None] & (batch.segment == CONTEXT)  # (B, N)
    z_0 = z_0.masked_fill(is_hidden[..., None], 0)
    n_guess = (B + generator.initial_seed() % 2) // 2  # half, at random if B is odd
    return denoising_loss(dit, batch, z_0, t, eps, n_guess)[0]


@dataclass(frozen=True)
class Sampling:
    """Options of the sampler. The defaults are the paper's (section 4.1 of [TextLDM])."""
    steps: int = 50  # Euler steps
    cfg_scale: float = 7.0  # guidance scale w; 1: no guidance
    temperature: float = 1.0  # of p(token); the paper has none
    seed: int = 0  # of the noise; or a list of them, one for each row


def guided_estimate(dit, z, t, guess, segment, sampling):
    """Classifier-free guidance [CFG]: e_u + w (e_c - e_u), where e_c (B, N, C) is the estimate of
    z_0 with context and e_u the one without, for rows z (B, N, C) at a scalar time t. (The w of
    [CFG] is one less.) The velocity is affine in the estimate, so this guides it.
    Ours: if the DiT predicts tokens, e_u gets zeros for its guess [ELF], so that w also amplifies
    what the guess adds, even in a row without a prompt. Otherwise both get the guess, because
    estimates that nothing bounds would run away."""
    w = sampling.cfg_scale
    is_guided = w != 1
    if is_guided:  # the second copy of the rows has no context
        is_target = (segment == TARGET)[..., None]
        z = torch.cat((z, torch.where(is_target, z, 0.0)))  # (2 B, N, C)
        guess_u = torch.zeros_like(guess) if dit.config.predict_tokens else guess
        guess = torch.cat((guess, guess_u))
        segment = segment.repeat(2, 1)
    mask = (segment != PADDING)[:, None, None]
    h = dit(z, segment, t.expand(len(z)), guess, mask)
    estimate = dit.estimate(h, z, t, sampling.temperature)
    if not is_guided:
        return estimate
    e_c, e_u = estimate.chunk(2)  # (B, N, C) each
    return e_u + w * (e_c - e_u)


def denoise(dit, z, segment, sampling, callback=None):
    """Euler's method from t = 1 to t = 0. z (B, N, C) holds the latents of the context and noise
    for the target. Returns z with the latents of the target.
    A step is z + (t_next - t) v, written so that t_next = 0 gives the guess exactly. The estimate
    is the next step's guess. (In training a guess is not guided, and is of the same t.)
    callback(t_next, guess) gets it, and the time that the step reaches."""
    u = torch.linspace(1, 0, sampling.steps + 1)
    times = dit.times(u).to(z.device)  # (steps + 1,)
    is_target = (segment == TARGET)[..., None]
    guess = torch.zeros_like(z)
    for t, t_next in zip(times[:-1], times[1:]):
        guess = guided_estimate(dit, z, t, guess, segment, sampling)
        if callback is not None:
            callback(t_next, guess)
        eps = (z - (1 - t) * guess) / t  # the noise in z, if `guess` is its z_0
        z_next = (1 - t_next) * guess + t_next * eps
        z = torch.where(is_target, z_next, z)  # the context stays as it is
    return z


def rows_of(prompts, length, block_size, end_of_text):
    """tokens and segment (B, N): each row is a prompt (a list of ids, maybe empty), then room for
    `length` tokens (0: up to block_size). Padding evens their lengths."""
    P = torch.tensor([[len(prompt)] for prompt in prompts])  # (B, 1)
    end = P + length if length else torch.full_like(P, block_size)
    place = torch.arange(int(end.max()))  # (N,)
    segment = torch.where(place < P, CONTEXT, torch.where(place < end, TARGET, PADDING))
    tokens = torch.full_like(segment, end_of_text)
    tokens[segment == CONTEXT] = torch.tensor(sum(prompts, []), dtype=torch.long)
    return tokens, segment


def texts_of(tokens, segment, end_of_text):
    """The targets of tokens (B, N), as lists of ids, up to and including the first end-of-text."""
    texts = []
    for row, kind in zip(tokens, segment):
        text = row[kind == TARGET].tolist()
        if end_of_text in text:
            text = text[: text.index(end_of_text) + 1]
        texts.append(text)
    return texts


def row_seeds(prompts, seed):
    """A seed for each row: a hash of `seed`, its prompt, and how many equal prompts stand before
    it. So other prompts do not change a text. `seed` may be a list, with one for each row."""
    if not isinstance(seed, int):
        return list(seed)
    seeds = []
    before = Counter()
    for prompt in prompts:
        prompt = tuple(prompt)
        key = repr((seed, prompt, before[prompt]))
        before[prompt] += 1
        seeds.append(zlib.crc32(key.encode()))
    return seeds


def row_generators(prompts, seed):
    """A CPU generator for each row, so neither the device nor other rows change its noise."""
    return [torch.Generator().manual_seed(s) for s in row_seeds(prompts, seed)]


def noisy_rows(vae, dit, prompts, length, generators):
    """What the sampler starts from: z (B, N, C), the latents of the prompts and noise for what
    follows them, and the segment (B, N)."""
    config, device = dit.config, dit.from_latent.weight.device
    rows = rows_of(prompts, length, config.block_size, config.end_of_text)
    tokens, segment = (x.to(device) for x in rows)  # (B, N) each
    is_target = segment == TARGET
    eps = []
    for n, generator in zip(is_target.sum(1), generators, strict=True):
        eps.append(torch.randn(int(n), config.channels, generator=generator))
    z = vae.latents(tokens, segment)  # (B, N, C)
    z[is_target] = torch.cat(eps).to(z)
    return z, segment


@torch.no_grad()
def continue_texts(vae, dit, prompts, length=0, sampling=Sampling(), callback=None):
    """Continues each prompt (a list of ids, maybe empty) by up to `length` tokens; if it is 0, to
    the end of a row of block_size, in which the prompt must leave room. Returns lists of ids, with
    the end-of-text token where a text ended.
    callback(t, texts) sees what the estimate of each step decodes to; see `denoise`."""
    generators = row_generators(prompts, sampling.seed)
    z, segment = noisy_rows(vae, dit, prompts, length, generators)  # (B, N, C), (B, N)

    def decode(z):
        return texts_of(vae.to_tokens(z, segment), segment, dit.config.end_of_text)

    def show(t, guess):
        callback(float(t), decode(guess))

    z = denoise(dit, z, segment, sampling, show if callback else None)
    return decode(z)


# ---- 6. Logits of a chunk of tokens at a time ----------------------------------------------------

def chunk_of(h):
    """How many tokens get their logits at once. A GPU's memory cannot hold those of all, and a
    CPU's cache holds these."""
    return 64 if h.device.type == "cpu" else 1024


def by_chunks(f, h):
    """f(h) for h (..., E), where f makes logits on its way."""
    y = torch.cat([f(x) for x in h.flatten(0, -2).split(chunk_of(h))])
    return y.view(*h.shape[:-1], *y.shape[1:])


def cross_entropy(h, layer, tokens, weight):
    """h (..., E), a layer to logits or an embedding, tokens and weight (...) -> the mean loss by
    weight, in nats, and the loss of each token (...), which has no gradient."""
    matrix = layer.weight  # (V, E)
    bias = getattr(layer, "bias", None)  # (V,)
    if bias is None:
        bias = matrix.new_zeros(len(matrix))
    more = -len(matrix) % 64  # a GPU is slow at odd sizes, as GPT-2's 50,257
    matrix = F.pad(matrix, (0, 0, 0, more))
    bias = F.pad(bias, (0, more), value=-torch.inf)  # p is 0 there
    share = weight.float() / weight.sum().clamp(min=1e-9)
    flat = h.flatten(0, -2), matrix, bias, tokens.flatten(), share.flatten()
    # Inside of its forward gradients are off, so it cannot ask whether they are wanted.
    loss, losses = CrossEntropy.apply(*flat, torch.is_grad_enabled())
    return loss, losses.view(tokens.shape)


class CrossEntropy(torch.autograd.Function):
    """h (T, E), matrix (V, E), bias (V,), tokens and weight (T,) -> the weighted sum of the
    cross-entropies of tokens with logits h matrix^T + bias, and each of them (T,). Autograd would
    keep all logits (T, V) for the backward pass. Here a chunk's logits give its gradients at once
    and are dropped. The backward pass scales these."""

    @staticmethod
    def forward(ctx, h, matrix, bias, tokens, weight, has_gradient):
        chunk = chunk_of(h)
        losses = []
        d_h, d_matrix, d_bias = (torch.zeros_like(x).float() for x in (h, matrix, bias))
        dtype = F.linear(h[:1], matrix).dtype  # of products: autocast's, where it is on
        h, matrix = h.to(dtype), matrix.to(dtype)
        parts = zip(*(x.split(chunk) for x in (h, tokens[:, None], weight[:, None], d_h)))
        for x, token, w, d_x in parts:
            logits = F.linear(x, matrix, bias).float()  # (chunk, V)
            logits -= logits.amax(-1, keepdim=True)
            at_token = logits.gather(-1, token)
            p = logits.exp_()
            total = p.sum(-1, keepdim=True)
            losses.append(total.log() - at_token)
            if has_gradient:  # that of the logits is w (p / total - 1 at the token)
                p.mul_(w / total).scatter_add_(-1, token, -w)
                d_bias += p.sum(0)
                p = p.to(dtype)
                d_x += p @ matrix
                d_matrix += p.T @ x
        losses = torch.cat(losses)[:, 0]
        ctx.save_for_backward(d_h, d_matrix, d_bias)
        ctx.mark_non_differentiable(losses)
        return (losses * weight).sum(), losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss, _):
        return *(d_loss * x for x in ctx.saved_tensors), None, None, None

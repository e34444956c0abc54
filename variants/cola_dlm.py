"""Cola DLM: text in blocks, one after another (Guo et al. 2026, arXiv 2605.06548).

    python variants/cola_dlm.py vae --out=out/blocks --teacher=out/gpt.pt  # after baselines/gpt.py
    python variants/cola_dlm.py dit --out=out/blocks --latent_block=4
    python sample.py --out=out/blocks --prompt="greek" --length=1000

What it changes of TextLDM:
    - A row is one text, cut in blocks of b tokens. Each block is a target. Its context is all that
      stands before it.
    - The VAE is causal: the latents of a beginning do not depend on what is written later.
    - The DiT takes a row twice, clean and noisy. A mask lets each noisy block see the clean blocks
      before it. Each noisy block has a time of its own.
    - The sampler writes block after block, keeps keys and values of what is written, and need not
      end.

Shapes are those of textldm.py. M is the number of blocks of a row.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from engine.checkpoint import build, load_checkpoint
from engine.config import DIT_PRESETS, TrainConfig, UserError, command_line
from engine.corpus import Corpus
from engine.evaluation import Evaluation, rows_with_other_contexts
from engine.terminal import pick_device, run_script
from engine.train import Stage, train
from textldm import (
    CONTEXT,
    OURS,
    TAIL_WEIGHT,
    TARGET,
    DiTConfig,
    Sampling,
    TextDiT,
    TextVAE,
    VAEConfig,
    denoise,
    make_batch,
    option,
    rotary,
    row_generators,
    same_segment,
    texts_of,
)
from train_dit import DiTStage, fit, make_dit
from train_vae import train_vae, weight_of

# ---- The rows and the VAE ------------------------------------------------------------------------


class BlockCorpus(Corpus):
    """A corpus whose rows are one text each, all of it target. Only the beginning of a text follows
    nothing. So the first tokens of a row from the middle of a text, which may be in its first
    block, have weight 0."""

    latent_block = 1

    def batch(self, rng, B, N):
        """A Batch of B rows of N tokens."""
        tokens = np.full((B, N), self.eot)
        weight = np.full((B, N), TAIL_WEIGHT, dtype=np.float32)
        for i in range(B):
            row, begins_text = self.stretch(rng, N)
            tokens[i, : len(row)] = row
            weight[i, : len(row)] = 1
            if not begins_text:
                weight[i, : self.latent_block] = 0
        segment = np.full((B, N), TARGET)
        return make_batch(*map(torch.from_numpy, (tokens, segment, weight)))


class CausalVAE(TextVAE):
    """A TextVAE in which a token's latent, and what is read from a latent, depend on nothing
    later."""

    def mask(self, segment):
        return same_segment(segment).tril()


# ---- The DiT -------------------------------------------------------------------------------------


@dataclass
class ColaConfig(DiTConfig):
    latent_block: int = option(4, "b, tokens in a block", 1, 2**15)


def who_sees_whom(segment, block):
    """The mask (N, N), query by key, for the segment and the block of each token, (N,) each. A
    token sees the clean tokens of earlier blocks. In its own block, clean sees clean and noisy sees
    noisy. So no noisy block sees the clean tokens that it is to become.

        block        0 1 2   0 1 2
        clean    0   x . .   . . .
                 1   x x .   . . .
                 2   x x x   . . .
        noisy    0   . . .   x . .
                 1   x . .   . x .
                 2   x x .   . . x
    """
    is_earlier = block[:, None] > block  # is the key's block earlier than the query's?
    is_same = block[:, None] == block
    is_clean = segment == CONTEXT
    is_alike = segment[:, None] == segment
    return is_earlier & is_clean | is_same & is_alike


class History:
    """Keys and values (B, H, N_past, D) of the last `window` tokens, for each layer."""

    def __init__(self, n_layer, window):
        self.window = window
        self.layers = [None] * n_layer


class Layout(NamedTuple):
    """Where the tokens of a pass stand, and whom they see."""

    turn: tuple  # textldm.rotary of the positions
    mask: torch.Tensor  # (N, N), or (B, 1, N, N_past + N) with a history
    time_index: torch.Tensor  # (N,): which of the times t (B, M) a token has
    history: History = None  # of earlier tokens
    is_kept: bool = False  # whether the tokens of this pass go into the history


class ColaDiT(TextDiT):
    """A TextDiT whose tokens have times of their own, and which can read a history."""

    def forward(self, x, segment, t, guess, layout, places=None):
        """As TextDiT.forward, but for t (B, M) and the layout."""
        B, M = t.shape
        is_target = segment == TARGET  # (B, N)
        h = self.from_latent(x) + self.segment_emb(is_target.long())  # (B, N, E)
        if self.config.self_condition and guess is not None:
            h = h + self.from_guess(guess * is_target[..., None])
        time_emb = None
        if self.config.adaln:
            time_emb = self.time_embedding(t.flatten()).view(B, M, -1)  # (B, M, E)
        for i, block in enumerate(self.transformer.h):
            h = self.through_block(i, block, h, time_emb, layout)
        h = self.transformer.ln_f(h)
        return h if places is None else h.flatten(0, 1).index_select(0, places)

    def turn(self, position):
        return rotary(position, self.transformer.D)

    def through_block(self, i, block, x, time_emb, layout):
        """textldm.Block.forward, with a time for each token."""
        if time_emb is None:
            x = x + self.attend(i, block.attn, block.ln_1(x), layout)
            return x + block.mlp(block.ln_2(x))
        six = block.adaln(time_emb)[:, layout.time_index].chunk(6, dim=-1)
        shift_1, scale_1, gate_1 = six[:3]  # (B, N, E) each
        shift_2, scale_2, gate_2 = six[3:]
        y = block.ln_1(x) * (1 + scale_1) + shift_1
        x = x + gate_1 * self.attend(i, block.attn, y, layout)
        y = block.ln_2(x) * (1 + scale_2) + shift_2
        return x + gate_2 * block.mlp(y)

    def attend(self, i, attn, x, layout):
        """textldm.Attention.forward, with the history of layer i."""
        q, k, v = attn.heads(x, layout.turn)  # (B, H, N, D) each
        history = layout.history
        if history is not None and history.layers[i] is not None:
            past_k, past_v = history.layers[i]
            k = torch.cat((past_k, k), dim=2)  # (B, H, N_past + N, D)
            v = torch.cat((past_v, v), dim=2)
        if layout.is_kept:
            history.layers[i] = (k[:, :, -history.window :], v[:, :, -history.window :])
        return attn.attend(q, k, v, layout.mask)


# ---- The loss ------------------------------------------------------------------------------------


class Noise(NamedTuple):
    """What is drawn for a batch of rows in blocks."""

    block: torch.Tensor  # (N,): the block of each token
    t: torch.Tensor  # (B, M): the time of each block
    eps: torch.Tensor  # (B, N, C)


def block_denoising_loss(dit, batch, z_0, context, noise, n_guess=0):
    """textldm.denoising_loss for rows in blocks. z_0 (B, N, C) are clean latents. context (B, N, C)
    are those that later blocks see: z_0, or zeros in rows where they are dropped."""
    B, N, C = z_0.shape
    targets = batch.targets  # (T,) = (B N,), as all tokens are
    t_of = noise.t[:, noise.block][..., None]  # (B, N, 1)
    z_t = (1 - t_of) * z_0 + t_of * noise.eps  # (B, N, C)

    # A row is taken twice, [clean ; noisy].
    x = torch.cat((context, z_t), dim=1)  # (B, 2 N, C)
    side = torch.arange(2, device=x.device).repeat_interleave(N)  # (2 N,): CONTEXT is 0, TARGET 1
    block = noise.block.repeat(2)  # (2 N,)
    segment = side.expand(B, -1)  # (B, 2 N)
    t = F.pad(noise.t, (1, 0))  # (B, 1 + M): clean tokens are at t = 0
    layout = Layout(
        turn=dit.turn(torch.arange(N, device=x.device).repeat(2)),
        mask=who_sees_whom(side, block),
        time_index=torch.where(side == TARGET, 1 + block, 0),
    )
    places = targets + (targets // N + 1) * N  # (T,): all noisy tokens, in the flattened rows

    guess = torch.zeros_like(x)  # (B, 2 N, C)
    if dit.config.self_condition and n_guess:
        n = n_guess
        with torch.no_grad():
            first = places[: n * N]
            h = dit(x[:n], segment[:n], t[:n], None, layout, places=first).view(n, N, -1)
            guess[:n, N:] = dit.estimate(h, z_t[:n], t_of[:n])
    h = dit(x, segment, t, guess, layout, places=places)  # (T, E)
    of_rows = batch.tokens, batch.weight, z_0, noise.eps, z_t, t_of
    tokens, weight, z_0, eps, z_t, t_of = map(batch.at_targets, of_rows)
    return *dit.loss(h, tokens, z_0, eps, weight), h, z_t, t_of


def block_flow_loss(dit, batch, z_0, generator):
    """textldm.flow_loss for rows in blocks. The first block is cut short at random: in sampling,
    blocks are counted from the end of a prompt."""
    B, N, C = z_0.shape
    b, device = dit.config.latent_block, z_0.device
    M = (N + b - 2) // b + 1
    offset = torch.randint(b, (1,), generator=generator, device=device)
    block = (torch.arange(N, device=device) + offset) // b  # (N,)
    u = torch.rand(M + 1, B, generator=generator, device=device)
    eps = torch.randn(z_0.shape, generator=generator, device=device)  # (B, N, C)
    t = dit.times(u[:-1].T)  # (B, M)
    is_dropped = u[-1] < dit.config.context_drop  # (B,)
    context = z_0.masked_fill(is_dropped[:, None, None], 0)
    noise = Noise(block, t, eps)
    n_guess = (B + generator.initial_seed() % 2) // 2
    return block_denoising_loss(dit, batch, z_0, context, noise, n_guess)[0]


# ---- The sampler ---------------------------------------------------------------------------------


class AtPlace:
    """A DiT at one place of a text, as textldm.denoise calls it. The context is in the history, so
    to textldm.guided_estimate it is a row without a prompt."""

    def __init__(self, dit, layout):
        self.dit, self.layout, self.config = dit, layout, dit.config
        self.times, self.estimate, self.to_output = dit.times, dit.estimate, dit.to_output

    def __call__(self, x, segment, t, guess, mask):
        return self.dit(x, segment, t[:, None], guess, self.layout)


class Texts:
    """Texts that grow by a block at a time.

    The VAE encodes the last tokens, the DiT takes the new ones into its history, and a block is
    denoised and decoded. The history is of `window` tokens, so texts of any length take the same
    memory.

    unspecified: the oldest keys know of tokens that have left the window, which no row of training
    has. After an end-of-text token the next block begins another document, with nothing before
    it."""

    def __init__(self, vae, dit, prompts, sampling):
        self.vae, self.dit, self.sampling = vae, dit, sampling
        self.b = dit.config.latent_block
        self.window = dit.config.block_size - self.b
        self.history = History(dit.config.n_layer, self.window)
        self.is_guided = sampling.cfg_scale != 1
        device = dit.from_latent.weight.device
        P = min(self.window, max(len(prompt) for prompt in prompts))
        tokens = torch.full((len(prompts), P), dit.config.end_of_text)
        begin = torch.zeros(len(prompts), 1, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            n = min(len(prompt), P)
            tokens[i, P - n :] = torch.tensor(prompt[len(prompt) - n :], dtype=torch.long)
            begin[i] = P - n
        self.tokens = tokens.to(device)  # (B, L): the last ones
        self.begin = begin.to(device)  # (B, 1): where the document of a row begins
        self.end = P  # the position where the next block begins
        self.new = P  # the number of tokens that are not in the history
        self.generators = row_generators(prompts, sampling.seed)

    def look_back(self):
        """Takes the new tokens into the history. Returns the latents (B, L, C) of the last tokens,
        and which of these belong to the document that a row is in (B, L)."""
        L = self.tokens.shape[1]
        position = torch.arange(self.end - L, self.end, device=self.tokens.device)  # (L,)
        # The document of a row is one segment to the VAE, and what was before it is another.
        in_document = position >= self.begin  # (B, L)
        clean = self.vae.latents(self.tokens, in_document)  # (B, L, C)
        if self.new:
            self.read(clean, position, in_document)
        return clean, in_document

    def next_block(self):
        """Writes a block. Returns its tokens (B, b)."""
        clean, in_document = self.look_back()
        at_place, z = self.noise(in_document)  # (B, b, C)
        z = denoise(at_place, z, torch.full(z.shape[:2], TARGET, device=z.device), self.sampling)

        # The decoder reads the new latents behind those of the window.
        clean = clean[:, -self.window :]
        in_document = F.pad(in_document[:, -self.window :], (0, self.b), value=True)
        decoded = self.vae.to_tokens(torch.cat((clean, z), dim=1), in_document)
        written = decoded[:, -self.b :]  # (B, b)

        self.tokens = torch.cat((self.tokens[:, -self.window :], written), dim=1)
        self.end += self.b
        self.new = self.b
        goes_on = (written != self.dit.config.end_of_text).all(dim=1, keepdim=True)  # (B, 1)
        self.begin = self.begin.where(goes_on, self.end)
        return written

    def read(self, clean, position, in_document):
        """Takes the new clean latents into the history. For guidance rows B to 2 B of the history
        are of zeros: a text without its context."""
        new, device = self.new, clean.device
        x = torch.cat((clean, torch.zeros_like(clean))) if self.is_guided else clean
        x = x[:, -new:]  # (B or 2 B, new, C)
        segment = torch.full_like(position, CONTEXT)
        mask = who_sees_whom(segment, (position - self.end) // self.b)  # (L, L)
        mask = (mask & same_segment(in_document))[:, :, -new:]  # (B, 1, new, L)
        layout = Layout(
            turn=self.dit.turn(position[-new:]),
            mask=self.for_guidance(mask),
            time_index=torch.zeros(new, dtype=torch.long, device=device),
            history=self.history,
            is_kept=True,
        )
        segment = torch.full(x.shape[:2], CONTEXT, device=device)
        t = x.new_zeros(len(x), 1)  # clean
        nothing = position[:0]  # no output is asked for
        self.dit(x, segment, t, None, layout, places=nothing)

    def noise(self, in_document):
        """The DiT at the place of the next block, and noise (B, b, C) for it."""
        b, C, device = self.b, self.dit.config.channels, in_document.device
        z = torch.stack([torch.randn(b, C, generator=g) for g in self.generators]).to(device)
        in_document = F.pad(in_document[:, -self.window :], (0, b), value=True)
        mask = same_segment(in_document)[:, :, -b:]  # (B, 1, b, window + b)
        layout = Layout(
            turn=self.dit.turn(torch.arange(self.end, self.end + b, device=device)),
            mask=self.for_guidance(mask),
            time_index=torch.zeros(b, dtype=torch.long, device=device),
            history=self.history,
        )
        return AtPlace(self.dit, layout), z

    def for_guidance(self, mask):
        return mask.repeat(2, 1, 1, 1) if self.is_guided else mask


@torch.no_grad()
def continue_in_blocks(vae, dit, prompts, length=0, sampling=Sampling(), callback=None):
    """Continues each prompt (a list of ids) by exactly `length` tokens, through one document after
    another. With length 0 a text ends at its end-of-text token, or at the end of a row of
    block_size.

    callback(t, texts) sees after each block what is written, for good. Returns lists of ids."""
    end_of_text, block_size = dit.config.end_of_text, dit.config.block_size
    texts = [[] for _ in prompts]
    rooms = [length or block_size - len(prompt) for prompt in prompts]

    def is_done(i):
        has_ended = not length and end_of_text in texts[i]
        return has_ended or len(texts[i]) >= rooms[i]

    growing = Texts(vae, dit, prompts, sampling)
    while not all(is_done(i) for i in range(len(prompts))):
        written = growing.next_block()  # (B, b)
        blocks = texts_of(written, torch.full_like(written, TARGET), end_of_text)
        for i, block in enumerate(blocks):
            if not is_done(i):
                texts[i] += block[: rooms[i] - len(texts[i])]
        if callback is not None:
            callback(0.0, texts)
    return texts


def first_block(vae, dit, prompts, sampling):
    """The DiT at the place of the first block after each prompt, noise (B, b, C) for it, and its
    segment (B, b)."""
    texts = Texts(vae, dit, prompts, sampling)
    _, in_document = texts.look_back()
    at_place, z = texts.noise(in_document)
    return at_place, z, torch.full(z.shape[:2], TARGET, device=z.device)


# ---- Training ------------------------------------------------------------------------------------


class BlockEvaluation(Evaluation):
    """An Evaluation of a ColaDiT."""

    def __init__(self, batch, channels, corpus):
        super().__init__(batch, channels, corpus)
        lengths = (batch.weight != TAIL_WEIGHT).sum(1).tolist()
        self.cuts = [length // 2 for length in lengths]
        needed = [length - 1 for length in lengths]  # all of a text is context somewhere
        self.others = rows_with_other_contexts(needed, lengths)

    def denoiser(self, vae, dit):
        batch = self.batch
        B, N = batch.tokens.shape
        block = torch.arange(N, device=self.eps.device) // dit.config.latent_block  # (N,)
        M = int(block[-1]) + 1
        z_0 = vae.latents(batch.tokens, batch.segment)  # (B, N, C)
        z_other = vae.latents(batch.tokens[self.others], batch.segment)  # (B, N, C)

        def denoise_at(t, is_shuffled):
            context = z_other if is_shuffled else z_0
            noise = Noise(block, t.expand(B, M), self.eps)
            return block_denoising_loss(dit, batch, z_0, context, noise, n_guess=B)

        return denoise_at

    def write(self, vae, dit, prompts, sampling):
        return continue_in_blocks(vae, dit, prompts, 0, sampling)


def train_dit():
    """As train_dit.py, with rows of one text in blocks."""
    config, cfg, options = command_line(
        __doc__, ColaConfig, TrainConfig, DiTStage, presets=DIT_PRESETS, recipe=OURS
    )
    corpus = BlockCorpus(cfg.data, "train", config.block_size)
    val = BlockCorpus(cfg.data, "val", config.block_size)
    if cfg.recompute:
        raise UserError("--recompute is for TextLDM and LDLM; lower --batch_size instead")
    device, _ = pick_device(cfg.device, corpus.N)
    path = options.vae or f"{cfg.out}/vae.pt"
    remedy = "python variants/cola_dlm.py vae makes one"
    state = load_checkpoint(path, "causal_vae", remedy, corpus.tokenizer)
    vae = build(CausalVAE, VAEConfig, state).to(device).requires_grad_(False)
    fit(config, vae, (corpus, val))
    if 2 * config.latent_block > config.block_size:
        raise UserError(
            f"--latent_block={config.latent_block} is more than half of a row of "
            f"{config.block_size} tokens; lower it"
        )
    corpus.latent_block = val.latent_block = config.latent_block
    torch.manual_seed(cfg.seed)
    dit = make_dit(ColaDiT, config, vae, corpus, options)
    table = BlockEvaluation(val.fixed_batches(1, device)[0], config.channels, corpus)

    def loss_of(net, batch, generator, step):
        z_0 = vae.latents(batch.tokens, batch.segment)
        return dict(loss=block_flow_loss(net, batch, z_0, generator))

    identity = dict(kind="cola_dlm", vae=vae.z_mean.tolist())
    stage = Stage("dit", cfg, corpus, dit, identity, has_average=True)
    train(stage, loss_of, weight_of, lambda average: table(vae, average))


def main():
    stages = dict(dit=train_dit)
    stages["vae"] = lambda: train_vae(__doc__, BlockCorpus, CausalVAE, "causal_vae")
    if sys.argv[1:] in (["--help"], ["-h"]):
        print(__doc__ + "\nOptions: cola_dlm.py vae --help, cola_dlm.py dit --help")
        return
    if len(sys.argv) < 2 or sys.argv[1] not in stages:
        raise UserError("name the stage: python variants/cola_dlm.py vae, or dit (then --help)")
    stages[sys.argv.pop(1)]()


if __name__ == "__main__":
    run_script(main)

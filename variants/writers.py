"""Writes with a checkpoint of any kind, which names its kind itself."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Callable

import torch

from baselines.gpt import generate
from baselines.masked import MaskedLM, unmask
from engine.checkpoint import GPT2_NAMES, as_gpt_state, build, load_checkpoint, load_gpt_state
from engine.corpus import load_encoding
from engine.lines import fit
from engine.script import UserError
from textldm import (
    GPT,
    DiTConfig,
    Sampling,
    TextDiT,
    TextVAE,
    TransformerConfig,
    VAEConfig,
    continue_texts,
)
from variants.cola_dlm import CausalVAE, ColaConfig, ColaDiT, continue_in_blocks
from variants.ldlm import LDLM, LDLMConfig

KINDS = ("dit", "cola_dlm", "ldlm", "gpt", "masked")


@dataclass
class Writer:
    """A model that continues prompts."""

    kind: str
    write: Callable  # write(prompts, length, sampling, callback=None) -> lists of ids
    tokenizer: dict
    block_size: int  # a prompt and its continuation have at most so many tokens
    block: int = 0  # tokens in a block, of a kind that writes on and on; else 0
    has_temperature: bool = True
    has_steps: bool = True  # whether it denoises in steps, which a callback may see

    @cached_property
    def encoding(self):
        return load_encoding(self.tokenizer)

    def encode(self, prompts, length=0):
        """Strings as lists of ids. Each leaves room for `length` more tokens, or for an eighth of a
        row where length is 0: the beginning of a longer one is cut off, with a warning. Raises
        UserError if no row has that room."""
        ids = [self.encoding.encode_ordinary(prompt) for prompt in prompts]
        return fit(ids, self.block or length, self.block_size)

    def decode(self, ids):
        """ids as a string, without the end-of-text token at its end. Others become line ends."""
        text = self.encoding.decode(ids).removesuffix("<|endoftext|>")
        return text.replace("<|endoftext|>", "\n")

    def text(self, prompt, sampling=Sampling(), length=0):
        """Continues a string, by at most `length` tokens (0: to the end of a row). Returns what
        follows it. In fp32; where sample.py uses bf16, it may choose other words."""
        with torch.no_grad():
            (ids,) = self.write(self.encode([prompt], length), length, sampling)
        return self.decode(ids)


def load_writer(path, vae_path="", device="cpu"):
    """The Writer of the checkpoint at path. vae_path: the checkpoint of the VAE, for the kinds that
    have one. Raises UserError."""
    if path in GPT2_NAMES or Path(path).is_dir():  # in Hugging Face's layout
        return gpt_writer(load_gpt_state(path), device)
    state = load_checkpoint(path, KINDS, "the training scripts make one")
    kind = state.get("kind", "gpt")
    if kind == "gpt":
        return gpt_writer(as_gpt_state(state, path), device)
    if kind == "masked":
        return masked_writer(state, device)
    if kind == "ldlm":
        ldlm = build(LDLM, LDLMConfig, state).to(device)
        return diffusion_writer(kind, ldlm, ldlm.dit, state["tokenizer"])
    if kind == "cola_dlm":
        vae = load_vae(vae_path, path, state, CausalVAE).to(device)
        dit = build(ColaDiT, ColaConfig, state).to(device)
    else:
        vae = load_vae(vae_path, path, state, TextVAE).to(device)
        dit = build(TextDiT, DiTConfig, state).to(device)
    return diffusion_writer(kind, vae, dit, state["tokenizer"])


def load_vae(vae_path, path, state, vae_type):
    """The VAE on whose latents the DiT of a checkpoint was trained."""
    if vae_type is CausalVAE:
        kind, remedy = "causal_vae", "python variants/cola_dlm.py vae makes one"
    else:
        kind, remedy = "vae", "python train_vae.py makes one"
    vae_state = load_checkpoint(vae_path, kind, remedy, state["tokenizer"])
    vae = build(vae_type, VAEConfig, vae_state)
    if state.get("vae") != vae.z_mean.tolist():
        raise UserError(
            f"{path} was trained on the latents of another VAE than {vae_path}; "
            "name that one (sample.py --vae)"
        )
    return vae


def diffusion_writer(kind, vae, dit, tokenizer):
    def write(prompts, length, sampling, callback=None):
        if kind == "cola_dlm":
            return continue_in_blocks(vae, dit, prompts, length, sampling, callback)
        return continue_texts(vae, dit, prompts, length, sampling, callback)

    config = dit.config
    block = config.latent_block if kind == "cola_dlm" else 0
    return Writer(kind, write, tokenizer, config.block_size, block, config.predict_tokens)


def gpt_writer(state, device):
    gpt = build(GPT, TransformerConfig, state).to(device)

    def write(prompts, length, sampling, callback=None):
        return generate(gpt, prompts, length, sampling.temperature, seed=sampling.seed)

    # It reads an end-of-text token first.
    block_size = gpt.config.block_size - 1
    return Writer("gpt", write, state["tokenizer"], block_size, has_steps=False)


def masked_writer(state, device):
    model = build(MaskedLM, TransformerConfig, state).to(device)

    def write(prompts, length, sampling, callback=None):
        return unmask(model, prompts, length, sampling)

    return Writer("masked", write, state["tokenizer"], model.config.block_size, has_steps=False)

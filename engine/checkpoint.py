"""Files that are whole: checkpoints of ours, and GPTs in Hugging Face's layout."""

import json
import os
import zipfile
from pathlib import Path

import torch

from engine.config import make_config
from engine.corpus import BROKEN
from engine.script import UserError

# What load_gpt_state downloads.
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def temporary_path(path):
    """The path of the file that is to replace path. If path is a link, it stays one."""
    return Path(f"{os.path.realpath(path)}.tmp")


def write_whole(path, content):
    """Writes a text, or a dict as a checkpoint, to a file beside path and renames it. Whatever
    happens, path is whole: with this content or with what it had. A link stays, and the file that
    it leads to is written. What is no file (a device, a pipe) is written to. Raises UserError."""
    is_file = Path(path).is_file() or not Path(path).exists()
    beside = temporary_path(path) if is_file else Path(path)
    try:
        with open(beside, "wb") as f:
            if isinstance(content, str):
                f.write(content.encode("utf-8", "replace"))
            else:
                torch.save(content, f)
            if is_file:
                f.flush()
                os.fsync(f.fileno())
        if is_file:
            os.replace(beside, os.path.realpath(path))
    except (OSError, RuntimeError) as e:
        text = f"cannot write {path} ({str(e)[:80]})"
        if is_file:
            beside.unlink(missing_ok=True)
            text += "; what was there is as it was"
        raise UserError(text) from None


def read_tensors(path):
    """The dict in a .pt, .bin or .safetensors file. Nothing in the file is run. Raises ValueError
    and others if it is damaged."""
    if str(path).endswith(".safetensors"):
        import safetensors.torch

        return safetensors.torch.load_file(path)
    if zipfile.is_zipfile(path):
        # torch writes checksums, and does not look at them. A compressed file may claim any size.
        with zipfile.ZipFile(path) as file:
            is_compressed = any(info.compress_type for info in file.infolist())
            if is_compressed or file.testzip():
                raise ValueError("damaged")
    return dict(torch.load(path, map_location="cpu", weights_only=True))


def load_checkpoint(path, kind, remedy, tokenizer=None):
    """The dict of a checkpoint of this kind, or of one of these kinds (a str, or a tuple of them),
    and of this tokenizer, where one is given. A state dict of Hugging Face's has no kind; it is
    taken for a gpt.

    Raises UserError, which says the remedy: what makes such a file."""
    if not Path(path).is_file():
        raise UserError(f"{path} is missing; {remedy}")
    try:
        state = read_tensors(path)
    except ImportError:
        raise UserError(f"{path} needs one more package: pip install safetensors") from None
    except Exception as e:  # what a damaged file makes torch.load raise has no common class
        raise UserError(
            f"{path} is no whole checkpoint ({type(e).__name__}); make or fetch it again"
        ) from None
    found = state.get("kind", "gpt")
    kinds = (kind,) if isinstance(kind, str) else kind
    if found not in kinds:
        raise UserError(f"{path} holds a {found}, where a {' or '.join(kinds)} is needed; {remedy}")
    if tokenizer not in (None, state.get("tokenizer")):
        raise UserError(f"{path} was trained with another vocabulary; {remedy}, for this data")
    return state


def build(model_type, config_type, state):
    """The model of a checkpoint, on the CPU, in fp32. Raises UserError if it does not fit the
    code."""
    try:
        config = make_config(config_type, state["config"])
        with torch.device("meta"):  # takes no memory for what a config claims
            model = model_type(config)
        model.load_state_dict(state["model"], assign=True)  # the tensors that the file has
        return model.float()
    except (UserError, *BROKEN) as e:
        reason = f"{type(e).__name__}: {str(e)[:40]!r}"
        raise UserError(
            f"the {state.get('kind')} does not fit this code ({reason}); train it again"
        ) from None


def load_teacher_state(source, corpus):
    """As load_gpt_state. Raises UserError if the GPT has other tokens than the corpus."""
    state = load_gpt_state(source)
    if state["tokenizer"] != corpus.tokenizer:
        raise UserError(
            f"the teacher {source} and {corpus.path.parent} have different tokenizers; "
            "train one on this data with baselines/gpt.py (or train the VAE with --teacher=none)"
        )
    return state


def load_gpt_state(source):
    """A GPT as a checkpoint of ours, with kind, config, model and tokenizer. Raises UserError.

    source: gpt2, gpt2-medium, gpt2-large or gpt2-xl (downloaded into torch.hub's cache); a file or
    folder in Hugging Face's layout; or a checkpoint of baselines/gpt.py."""
    path = Path(source)
    if source in GPT2_NAMES:
        path = download_gpt2(source)
    elif path.is_dir():
        path = path / "model.safetensors"
        if not path.exists():
            path = path.with_name("pytorch_model.bin")
    return as_gpt_state(load_checkpoint(path, "gpt", "python baselines/gpt.py makes one"), path)


def as_gpt_state(state, path):
    """A loaded checkpoint of a GPT, or a state dict of Hugging Face's, as a checkpoint of ours."""
    if "kind" in state:
        return state
    try:
        return from_hugging_face(state, Path(path).with_name("config.json"))
    except BROKEN as e:
        reason = f"{type(e).__name__}: {str(e)[:60]}"
        raise UserError(f"{path} is no GPT-2 in Hugging Face's layout ({reason})") from None


def download_gpt2(name):
    path = Path(torch.hub.get_dir(), "checkpoints", f"{name}.bin")
    path.parent.mkdir(parents=True, exist_ok=True)
    url = f"https://huggingface.co/openai-community/{name}/resolve/main/pytorch_model.bin"
    try:
        if not path.exists():
            torch.hub.download_url_to_file(url, str(path))
    except OSError as e:
        raise UserError(f"cannot download {name} ({e}); name a local folder instead") from None
    return path


def from_hugging_face(tensors, config_path):
    """Hugging Face's GPT-2 as a checkpoint of ours. Their files hold causal masks among the
    weights, and the matrices of what once were convolutions are (in, out)."""
    model = {}
    for name, tensor in tensors.items():
        if name.endswith((".attn.bias", ".masked_bias", "lm_head.weight")):
            continue
        if ".c_" in name and tensor.dim() == 2:
            tensor = tensor.T
        model[name.removeprefix("transformer.")] = tensor
    V, E = model["wte.weight"].shape
    n_head = len(model["ln_f.weight"]) // 64
    if config_path.exists():
        n_head = json.loads(config_path.read_text())["n_head"]
    layers = {name.split(".")[1] for name in model if name.startswith("h.")}
    config = dict(
        n_layer=len(layers),
        n_head=n_head,
        n_embd=E,
        block_size=len(model["wpe.weight"]),
        vocab_size=V,
    )
    tokenizer = dict(encoding="gpt2", vocab_size=V, eot=V - 1)
    return dict(kind="gpt", config=config, model=model, tokenizer=tokenizer)


def copy_blocks(source, target):
    """Copies the parameters of a list of blocks to those of another, which may be longer: of two to
    four as 1, 1, 2, 2. Parameters that only the target has stay as they are."""
    for i, block in enumerate(target):
        original = source[i * len(source) // len(target)]
        block.load_state_dict(original.state_dict(), strict=False)

"""Files that are whole: checkpoints of ours, and GPTs in Hugging Face's layout."""

import hashlib
import json
import os
import zipfile
from pathlib import Path

import torch

from engine.config import UserError, make_config
from engine.corpus import BROKEN, GPT2

# What load_gpt_state downloads, and the layers and widths of these.
GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
GPT2_SIZES = ((12, 768), (24, 1024), (36, 1280), (48, 1600))
# The SHA-256 of its tokens, in their order, a line each.
GPT2_TOKENS = "e35a33a0b2250c932ffdafc4c3a3552aef0cc7af7a11e9ebfddf1d2a6517371f"
FEW_ROWS = 1024  # that pad a vocabulary, or that a user added
FETCH = "name a folder with the files of a GPT-2 in Hugging Face's layout"


def temporary_path(path):
    """The path of the file that is to replace path. If path is a link, it stays one."""
    return Path(f"{os.path.realpath(path)}.tmp")


def write_whole(path, content):
    """Writes a text, or a dict as a checkpoint, to a file beside path and renames it. Whatever
    happens, path is whole: with this content or with what it had. A link stays, and the file that
    it leads to is written. Raises UserError."""
    if Path(path).exists() and not Path(path).is_file():
        raise UserError(f"cannot write {path}: it is no file; give the name of a file")
    beside = temporary_path(path)
    try:
        with open(beside, "wb") as f:
            if isinstance(content, str):
                f.write(content.encode("utf-8", "replace"))
            else:
                torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, os.path.realpath(path))
    except (OSError, RuntimeError) as e:
        beside.unlink(missing_ok=True)
        reason = str(e)[:80]
        raise UserError(f"cannot write {path} ({reason}); what was there is as it was") from None


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
        remedy = "name another model" if "source" in state else "train it again"
        what = state.get("source", f"the {state.get('kind')}")
        raise UserError(f"{what} does not fit this code ({reason}); {remedy}") from None


def load_teacher_state(source, corpus):
    """As load_gpt_state. Raises UserError if the GPT has other tokens than the corpus."""
    state = load_gpt_state(source)
    if state["tokenizer"] != corpus.tokenizer:
        remedy = "train one on it with baselines/gpt.py, or train the VAE with --teacher=none"
        if "source" in state:
            remedy = "prepare the data with --encoding=gpt2, or " + remedy
        raise UserError(
            f"the teacher {source} and {corpus.path.parent} have different tokenizers; {remedy}"
        )
    return state


def load_gpt_state(source):
    """A GPT as a checkpoint of ours, with kind, config, model and tokenizer. Raises UserError.

    source: gpt2, gpt2-medium, gpt2-large or gpt2-xl (downloaded into torch.hub's cache); a file or
    folder in Hugging Face's layout; or a checkpoint of baselines/gpt.py."""
    path = Path(source)
    if source in GPT2_NAMES:
        path = download_gpt2(source)
    if path.is_dir():
        return as_gpt_state(read_folder(path), path / "config.json")
    return as_gpt_state(load_checkpoint(path, "gpt", "python baselines/gpt.py makes one"), path)


def read_folder(folder):
    """All tensors of a folder in Hugging Face's layout, whose weights may lie in several files."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        path, index = folder / name, folder / f"{name}.index.json"
        if path.is_file():
            return load_checkpoint(path, "gpt", FETCH)
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
                tensors = {}
                for shard in shards:
                    tensors |= load_checkpoint(folder / Path(shard).name, "gpt", FETCH)
                return tensors
            except BROKEN as e:
                raise UserError(f"{index} names no shards ({type(e).__name__}); {FETCH}") from None
    raise UserError(
        f"{folder} has no model.safetensors, no pytorch_model.bin and no index of their shards; "
        f"{FETCH}"
    )


def as_gpt_state(state, path):
    """A loaded checkpoint of a GPT, or a state dict of Hugging Face's, as a checkpoint of ours.
    path: its file, or a file beside it."""
    if "kind" in state:
        return state
    try:
        return from_hugging_face(state, Path(path).parent)
    except BROKEN as e:
        reason = f"{type(e).__name__}: {str(e)[:60]}"
        raise UserError(
            f"{path} is no GPT-2 in Hugging Face's layout ({reason}); name another model"
        ) from None


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


def from_hugging_face(tensors, folder):
    """Hugging Face's GPT-2 as a checkpoint of ours. Their files hold causal masks among the
    weights, and the matrices of what once were convolutions are (in, out). Raises UserError where
    the files beside it say that it computes something else, or has other tokens."""
    model = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and tensor.dim() < 4:
            raise UserError(f"{folder}: {name} is of {tensor.dtype}; a GPT-2 in floats is needed")
        if name.endswith((".attn.bias", ".masked_bias", "lm_head.weight")):
            continue
        if ".c_" in name and tensor.dim() == 2:
            tensor = tensor.T
        model[name.removeprefix("transformer.")] = tensor
    V, E = model["wte.weight"].shape
    config = dict(
        n_layer=len({name.split(".")[1] for name in model if name.startswith("h.")}),
        n_head=E // 64,
        n_embd=E,
        block_size=len(model["wpe.weight"]),
        vocab_size=V,
    )
    path = folder / "config.json"
    if path.exists():
        check_config(path, config, tensors)
    elif (config["n_layer"], E) not in GPT2_SIZES:
        raise UserError(
            f"{folder} has no config.json, and its GPT has {config['n_layer']} layers of width "
            f"{E}, which is no size of GPT-2's; put its config.json beside it"
        )
    check_vocabulary(folder, V)
    if V > GPT2["vocab_size"]:
        print(f"{folder}: rows of the vocabulary after {GPT2['vocab_size']} are cut off (of {V})")
        V = config["vocab_size"] = GPT2["vocab_size"]
        model["wte.weight"] = model["wte.weight"][:V]
    return dict(kind="gpt", config=config, model=model, tokenizer=GPT2, source=str(folder))


def check_config(path, config, tensors):
    """Takes the number of heads from a config.json. Raises UserError where another entry of it
    changes what is computed, or does not fit the tensors."""
    found = json.loads(path.read_text())
    config["n_head"] = found["n_head"]
    tanh_gelus = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
    wanted = dict(
        model_type=("gpt2",),
        activation_function=tanh_gelus,
        layer_norm_epsilon=(1e-5,),
        scale_attn_weights=(True,),
        scale_attn_by_inverse_layer_idx=(False,),
        add_cross_attention=(False,),
        n_inner=(None, 4 * config["n_embd"]),
        n_layer=(config["n_layer"],),
        n_embd=(config["n_embd"],),
        n_positions=(config["block_size"],),
        vocab_size=(config["vocab_size"],),
    )
    for key, values in wanted.items():
        if key in found and found[key] not in values:
            raise UserError(
                f"{path}: {key} is {found[key]!r}, where our GPT computes with {values[0]!r}; "
                "name another model"
            )
    if not found.get("tie_word_embeddings", True):
        wte = tensors.get("transformer.wte.weight", tensors.get("wte.weight"))
        head = tensors.get("lm_head.weight")
        if head is None or not torch.equal(head, wte):
            raise UserError(
                f"{path}: tie_word_embeddings is false, where our GPT reads and writes with one "
                "embedding; name another model"
            )


def check_vocabulary(folder, V):
    """Raises UserError if a model in Hugging Face's layout has other tokens than GPT-2's: by the
    files of its tokenizer, where there are some, and by its number of rows V."""
    size = GPT2["vocab_size"]
    is_gpt2 = 0 <= V - size <= FEW_ROWS
    for name in ("vocab.json", "tokenizer.json"):
        if (folder / name).exists():
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            ids = content.get("model", {}).get("vocab", content)
            tokens = [token for token in sorted(ids, key=ids.get) if ids[token] < size]
            digest = hashlib.sha256("\n".join(tokens).encode()).hexdigest()
            is_gpt2 = is_gpt2 and digest == GPT2_TOKENS
    if not is_gpt2:
        raise UserError(
            f"{folder} has another vocabulary than GPT-2's ({V} rows); name a model with GPT-2's, "
            "or train one on your data with baselines/gpt.py"
        )


def copy_blocks(source, target):
    """Copies the parameters of a list of blocks to those of another, which may be longer: of two to
    four as 1, 1, 2, 2. Parameters that only the target has stay as they are."""
    for i, block in enumerate(target):
        original = source[i * len(source) // len(target)]
        block.load_state_dict(original.state_dict(), strict=False)

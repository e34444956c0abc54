"""What every script has: errors that a user can mend, a device, and a lock on the folder that it
writes."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from engine.config import UserError

# File descriptors of locked folders, by their paths.
LOCKS = {}
# What torch says of memory, on each kind of device.
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def pick_device(name, longest_row=64):
    """A torch.device for --device=name, and the autocast to compute in. Raises UserError."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun gives each process one GPU
    elif name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as e:
        reason = repr(str(e)[:80])
        raise UserError(f"--device={name} is not available here ({reason})") from None
    if device.type == "cuda":
        # cuDNN's attention plans each new shape for up to half a second, and texts have many; with
        # a mask its gradients can be NaN (torch's issue 196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
    if device.type == "cpu":
        # The switch is of CPUs too. Theirs takes twice as long as plain attention on short rows,
        # and a third as long on long ones.
        torch.backends.cuda.enable_flash_sdp(longest_row > 128)
    is_bf16 = pick_dtype(device) == torch.bfloat16
    return device, torch.autocast(device.type, torch.bfloat16, enabled=is_bf16)


def pick_dtype(device):
    """What networks and optimisers multiply in: bf16 where the hardware has it, else fp32. Emulated
    bf16 is slower than fp32 by far."""
    has_bf16 = False
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # ATEN_CPU_CAPABILITY=avx2 keeps torch from AVX-512, to measure what other CPUs do.
        uses_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
        has_bf16 = uses_avx512 and torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def lock(folder):
    """Keeps other processes out of a folder, until this script or its process ends. Raises
    UserError if another process holds it."""
    try:
        import fcntl
    except ImportError:
        return  # Windows
    path = Path(folder).resolve()
    if path in LOCKS:
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"another process writes to {folder}; wait until it ends, or give another --out"
        ) from None
    except OSError:
        pass  # some network drives have no locks
    LOCKS[path] = descriptor


def unlock_all():
    while LOCKS:
        _, descriptor = LOCKS.popitem()
        os.close(descriptor)


def mendable(error):
    """The sentence of an error that a user can mend, or None."""
    text = str(error)
    first = (text.strip() or type(error).__name__).split("\n")[0][:120]
    if isinstance(error, (UserError, OSError)):
        return text
    is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if is_memory or any(words in text for words in OUT_OF_MEMORY):
        return f"out of memory ({first}); the table in the README says what helps"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"--compile does not work here ({first}); leave it out"
    return None


def run_script(main):
    """Runs a script's main. What the user can mend becomes one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a sign that the terminal lacks is no error
    code = 0
    try:
        main()
    except KeyboardInterrupt:
        code = fail("stopped")
    except SystemExit as e:
        code = e.code
    except BrokenPipeError:  # whoever closed the pipe knows
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 2
    except Exception as e:
        sentence = mendable(e)
        if sentence is None:
            raise
        code = fail(sentence)
    finally:
        unlock_all()
    if dist.is_initialized():
        dist.destroy_process_group()
    if code:
        sys.exit(code)


def fail(sentence):
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    return 2

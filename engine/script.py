"""What every script has: errors that a user can mend, output that cannot end a run, and a lock on
the folder that it writes."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

# File descriptors of locked folders, by their paths.
LOCKS = {}
# What torch says of memory, on each kind of device.
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


class UserError(Exception):
    """Something that the user can mend. Scripts print its one sentence and exit with code 2."""


def open_null():
    return open(os.devnull, "w", encoding="utf-8", errors="replace")


class Output:
    """A text stream that does not fail, in the place of sys.stdout or sys.stderr.

    What its encoding does not have is shown as a question mark. After the stream has failed (a
    closed pipe, a full disk), everything is dropped: no text is worth a run."""

    def __init__(self, stream):
        if stream is None:  # closed by the shell
            stream = open_null()
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
        except (OSError, ValueError) as e:
            self.drop(e)
        return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except (OSError, ValueError) as e:
            self.drop(e)

    def drop(self, error):
        null = open_null()
        try:
            # What is in its buffer goes there too, when Python ends.
            os.dup2(null.fileno(), self.stream.fileno())
        except (OSError, ValueError):
            pass  # it has no file descriptor, or a closed one
        self.stream = null
        if not isinstance(error, (BrokenPipeError, ValueError)):  # whoever closed it knows
            print(f"warning: output is lost ({error})", file=sys.stderr)


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
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Output, streams)
    code = 0
    message = ""
    try:
        main()
    except KeyboardInterrupt:
        code, message = 2, "error: stopped\n"
    except SystemExit as e:
        code = e.code
    except Exception as e:
        sentence = mendable(e)
        if sentence is None:
            raise
        code, message = 2, f"error: {sentence}\n"
    finally:
        unlock_all()
        sys.stdout.flush()
        sys.stderr.write(message)  # after the progress bars have ended
        sys.stderr.flush()
        sys.stdout, sys.stderr = streams
    if dist.is_initialized():
        dist.destroy_process_group()
    if code:
        sys.exit(code)

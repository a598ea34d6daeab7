"""Reads damaged files in large numbers, as the programs read them: `python tests/fuzz.py KIND FIRST LAST`.

Each case takes intact files of a kind, damages one (`damage.py`), and reads all. It must end in one of two ways:

- refused: a `UserError`, or a reason for which a file, clip or row is left out, of one line, that names the file;
- read, and the result is what such files give: its shapes and dtypes are right, its numbers finite and in their range.

Anything else is a failure: another exception, a crash, a wrong result, more than `SECONDS` of computing, more than
`BYTES` of memory.
Damage that makes a file another good one (other pixels, other weights) is read, and rightly so.
"""

import contextlib
import dataclasses
import pathlib
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator

import damage
import fuzz_media
import fuzz_runs
import fuzz_texts
import fuzz_weights

from osv_jax.errors import UserError

SECONDS = 20
BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of files.

    Attributes:
        make: writes the intact ones into a folder.
        use: reads them, given the folder and the name of the one that is damaged; gives reasons for what it left out.
    """

    make: Callable[[pathlib.Path], None]
    use: Callable[[pathlib.Path, str], Iterator[str]]


KINDS = {
    "videos": Kind(fuzz_media.make_videos, fuzz_media.use_videos),
    "images": Kind(fuzz_media.make_images, fuzz_media.use_image),
    "archives": Kind(fuzz_media.make_archives, fuzz_media.use_archives),
    "checkpoints": Kind(fuzz_weights.make_checkpoints, fuzz_weights.use_checkpoints),
    "loras": Kind(fuzz_weights.make_loras, fuzz_weights.use_lora),
    "texts": Kind(fuzz_texts.make_texts, fuzz_texts.use_texts),
    "configs": Kind(fuzz_weights.make_configs, fuzz_weights.use_config),
    "pickles": Kind(fuzz_weights.make_pickles, fuzz_weights.use_pickle),
    "datasets": Kind(fuzz_runs.make_datasets, fuzz_runs.use_dataset),
    "features": Kind(fuzz_runs.make_features, fuzz_runs.use_features),
    "workdirs": Kind(fuzz_runs.make_workdirs, fuzz_runs.use_workdir),
}


def run(name: str, intact: pathlib.Path, seed: int) -> str | None:
    """One case: why it failed, or None.

    Args:
        name: one of `KINDS`.
        intact: a folder with what `make` wrote; it stays as it is.
    """
    files = sorted(file.relative_to(intact).as_posix() for file in intact.rglob("*") if file.is_file())
    chosen = files[seed % len(files)]
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder, name)
        shutil.copytree(intact, copy)
        data = (copy / chosen).read_bytes()
        (copy / chosen).write_bytes(damage.damage(chosen, data, seed) if data else b"x")
        _forget_peak()
        before = _peak()
        try:
            with _using_no_more_than(SECONDS):
                for reason in KINDS[name].use(copy, chosen):
                    _check_sentence(reason)
        except UserError as error:
            failure = _unclear(str(error), copy, chosen)
        except BaseException:
            failure = traceback.format_exc()
        else:
            failure = None
        if failure is None and _peak() - before > BYTES:
            failure = f"{(_peak() - before) / 2**30:.1f} GiB of memory"
        return failure and f"{name} {seed} ({chosen}): {failure}"


class _TooLong(BaseException):
    """Not to be taken for what a damaged file raises."""


def _unclear(message: str, folder: pathlib.Path, file: str) -> str | None:
    """What is wrong with the message about a file, or None."""
    first, *listed = message.split("\n")
    if not first.strip() or any(not line.startswith("  ") for line in listed):
        return f"lines: {message!r}"
    parts = pathlib.PurePath(file).parts
    named = {str(folder), parts[-1], *("/".join(parts[-2:]) for _ in parts[1:])}
    if not any(name in message for name in named):
        return f"names no file: {message!r}"
    return None if len(first) < 1000 else f"long: {message!r}"


def _check_sentence(reason: str) -> None:
    assert isinstance(reason, str) and reason.strip() and "\n" not in reason, f"not one line: {reason!r}"


# Linux's own record of a process's memory; other systems' counts what came before as well.
_RECORD = pathlib.Path("/proc/self")


def _forget_peak() -> None:
    """What was used before is not a file's."""
    with contextlib.suppress(OSError):
        (_RECORD / "clear_refs").write_text("5")


def _peak() -> int:
    """The most bytes of memory since the last `_forget_peak`."""
    with contextlib.suppress(OSError):
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", (_RECORD / "status").read_text())[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextlib.contextmanager
def _using_no_more_than(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _TooLong(f"{seconds} s")

    # Of computing: the machine may be busy with other things.
    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def main(name: str, first: int, last: int) -> int:
    """Cases `first` to `last` - 1; their numbers go to stderr before each, so that a crash tells which it was."""
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        intact = pathlib.Path(folder)
        KINDS[name].make(intact)
        for seed in range(first, last):
            print(f"{name} {seed}", file=sys.stderr, flush=True)
            failure = run(name, intact, seed)
            if failure:
                failures += 1
                print(failure, flush=True)
    print(f"{last - first} cases of {name}, {failures} failed")
    return failures


if __name__ == "__main__":
    import conftest  # noqa: F401  (checked signatures, as in all tests)

    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])) > 0)

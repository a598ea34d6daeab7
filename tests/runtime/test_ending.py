"""How programs end: what they say, their exit statuses, and Ctrl-C while they are busy."""

import errno
import os
import signal
import subprocess
import sys

import pytest
from bucket import BucketFileSystem, stand_in
from interrupts import Program

from osv_jax.errors import Stopped, UserError
from osv_jax.runtime import ending, paths


def raising(error):
    def main():
        raise error

    return main


def raised_from(error, cause):
    error.__cause__ = cause
    return error


FORBIDDEN = OSError("Forbidden: https://storage.googleapis.com/upload/b/o\nmay not storage.objects.create (403)")
HttpError = type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("No such thing."), 2, "error: No such thing.\n"),
        (Stopped("SIGTERM: step 3 is saved.", signal.SIGTERM), 143, "SIGTERM: step 3 is saved.\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/a/b/.x.tmp"), 2, "error: There is no room left in /a/b: "),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), 2, "error: There is no room left: "),
        # TensorStore's, ArrayRecord's and safetensors' are no OSError.
        (ValueError("RESOURCE_EXHAUSTED: Failed writing: No space left on device [os_error_code='28']"), 2, "no room"),
        (raised_from(RuntimeError("The checkpoint failed"), FULL), 2, "no room"),
        (ExceptionGroup("threads", [ValueError("x"), FULL]), 2, "no room"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), 2, "/a/b cannot be read or written (Permission"),
        (
            IsADirectoryError(errno.EISDIR, "Is a directory", "/a/clips.json"),
            2,
            "/a/clips.json cannot be read or written",
        ),
        (
            FORBIDDEN,
            2,
            "A bucket cannot be read or written (Forbidden: https://storage.googleapis.com/upload/b/o): check",
        ),
        (raised_from(RuntimeError("The checkpoint failed"), FORBIDDEN), 2, "A bucket cannot be read or written (Forb"),
        (HttpError("Invalid Credentials, 401"), 2, "A bucket cannot be read or written (Invalid Credentials, 401): "),
        (HttpError(), 2, "A bucket cannot be read or written (HttpError): "),
        # TensorStore's.
        (ValueError('PERMISSION_DENIED: Error writing "x" [http_response_code=403]'), 2, "(PERMISSION_DENIED: Error"),
    ],
)
def test_programs_end_with_a_line_and_a_status(error, status, line, capsys):
    assert ending.exit_status(raising(error)) == status
    written = capsys.readouterr().err
    assert line in written and written.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        ValueError("what is Forbidden: in the middle"),
        FileNotFoundError("x"),
        raised_from(ValueError("x"), PermissionError(13, "x")),
    ],
)
def test_bugs_keep_their_traceback(error):
    with pytest.raises(type(error)):
        ending.exit_status(raising(error))


def test_a_bucket_that_refuses_in_the_middle_is_one_line(monkeypatch, capsys):
    class Forbidding(BucketFileSystem):
        def _open(self, path, mode="rb", **options):
            if mode == "wb" and path.endswith("second.txt"):
                raise FORBIDDEN
            return super()._open(path, mode, **options)

    stand_in(monkeypatch, Forbidding)

    def main():
        for name in ("first.txt", "second.txt"):
            paths.write_text(paths.as_path("gs://bucket") / name, "text")

    assert ending.exit_status(main) == 2
    written = capsys.readouterr().err
    assert written.startswith("error: A bucket cannot be read or written (Forbidden: ") and written.count("\n") == 1
    assert (paths.as_path("gs://bucket") / "first.txt").read_text() == "text"


def test_success_is_no_exit(capsys):
    ending.run(lambda: None)
    with pytest.raises(SystemExit) as end:
        ending.run(raising(UserError("x")))
    assert end.value.code == 2


# In C for a minute, where signals are not looked for; it handles the first one itself, as training does.
BUSY = """
import hashlib, signal
from osv_jax.runtime import ending
def main():
    signal.signal(signal.SIGINT, lambda *_: None)
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)
ending.run(main)
"""


SLEEPING = """
import multiprocessing, time
from osv_jax.runtime import ending
def main():
    left = multiprocessing.get_context("spawn").Semaphore()  # As while decoding processes are started.
    print("ready", flush=True)
    time.sleep(60)
ending.run(main)
"""


def test_an_interrupt_ends_with_one_line():
    with Program([sys.executable, "-c", SLEEPING], dict(os.environ)) as program:
        program.wait_for("ready")
        program.press()
        assert program.ended() == 130
        assert program.printed["stderr"] == "Ended by Ctrl-C.\n"


def test_a_second_interrupt_ends_what_is_busy_in_c():
    with Program([sys.executable, "-c", BUSY], dict(os.environ)) as program:
        program.wait_for("ready")
        program.press()
        with pytest.raises(subprocess.TimeoutExpired):
            program.ended(0.3)
        program.press()
        assert program.ended(10) == 130
        assert program.printed["stderr"] == ""

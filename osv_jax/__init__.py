"""One-step image-to-video distillation (OSV) in JAX and Flax."""

import signal
import sys

__version__ = "0.1.0"

# `python -m osv_jax.NAME` imports for seconds before it runs: Ctrl-C ends it by then, too, without a traceback.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

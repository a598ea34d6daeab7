"""One-step image-to-video distillation (OSV) in JAX and Flax."""

import os
import signal
import sys

__version__ = "0.1.0"

# Programs (`python -m osv_jax.NAME`, `osv-NAME`) import for seconds before they run: Ctrl-C ends them by then, too,
# without a traceback.
_is_program = sys.argv[0] == "-m" or os.path.basename(sys.argv[0]).startswith("osv-")
if _is_program and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

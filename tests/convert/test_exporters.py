"""What a run trained, exported and loaded by PEFT and diffusers, is the student."""

import json
import pathlib
import re

import exported_runs
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_pipeline
from conftest import relative_error
from exported_runs import SCALE, SHAPES, python_lines
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image
from safetensors.numpy import load_file
from tool import convert
from torch_forward import run_flax, run_torch

from osv_jax.convert import exporters
from osv_jax.convert.architectures import ARCHITECTURES
from osv_jax.convert.lora_files import ranks, read_lora
from osv_jax.convert.single_file import write_single_file
from osv_jax.convert.weights import load_config, load_params
from osv_jax.errors import UserError
from osv_jax.models.lora import merge_lora, scale_lora, truncate_lora
from osv_jax.models.svd_unet import UNetConfig
from osv_jax.runtime import checkpoint

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return exported_runs.make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(autouse=True)
def at_home(home, monkeypatch):
    monkeypatch.chdir(home)


@pytest.fixture(scope="module")
def base(home):
    return jax.tree.map(np.asarray, load_params(home / "weights" / "svd", "unet"))


@pytest.fixture(scope="module")
def state(home):
    """The student of the run's last checkpoint, whole, as nested dicts."""
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        state = checkpointer.restore(home / "runs" / "stage2" / "checkpoints" / "3" / "state")
    return jax.tree.map(np.asarray, state["players"]["student"])


@pytest.fixture(scope="module")
def tuned_run(home, state):
    return exported_runs.make_tuned_run(home, state)


def export(source, output, kind, *options):
    return convert(["export-lora", str(source), str(output), f"--format={kind}", *options])


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["peft", "diffusers", "unet"])
@pytest.mark.parametrize("part", ["params", "ema"])
def test_the_lines_on_the_card_load_the_student(home, base, state, kind, part, capsys, monkeypatch):
    assert export("runs/stage2", kind, kind, "--overwrite", *["--ema"] * (part == "ema")) == 0
    assert "the EMA of step" in capsys.readouterr().out or part == "params"
    loaded = {}
    unet_lines, _ = python_lines(pathlib.Path(kind, "README.md"))
    exec(unet_lines, loaded)
    student = run_flax({"params": base, "lora": scale_lora(state[part]["lora"], SCALE)})
    assert relative_error(run_torch(loaded["unet"]), student) <= 1e-4
    assert relative_error(run_flax({"params": base}), student) > 1e-2


def test_every_kind_of_module_matters(base, state):
    """Without this the comparison with PyTorch would say nothing about the modules whose LoRA does nothing."""
    lora = flatten_dict(scale_lora(state["params"]["lora"], SCALE))
    whole = run_flax({"params": base, "lora": unflatten_dict(lora)})
    assert {SHAPES[(*path, "kernel")].ndim for path in ranks(unflatten_dict(lora))} == {2, 4, 5}
    kinds = {path[-2] for path in lora}
    assert kinds >= {"to_q", "to_v", "proj", "net_2", "proj_in", "conv", "conv1", "conv_shortcut", "time_emb_proj"}
    for kind in kinds:
        without = {path: 0 * leaf if path[-2] == kind else leaf for path, leaf in lora.items()}
        difference = relative_error(run_flax({"params": base, "lora": unflatten_dict(without)}), whole)
        assert difference > 1e-3, (kind, difference)


@pytest.mark.integration
def test_the_documented_lines_make_a_video(home):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8)).save("cat.png")
    lines = {}
    exec(python_lines(ROOT / "docs" / "sampling.md")[0], lines)
    # The size that the run was trained at.
    assert lines["frames"].shape == (3, 16, 24, 3) and lines["frames"].std() > 1
    assert pathlib.Path("cat.mp4").stat().st_size > 500


def test_student_and_ema_differ(base, state):
    student, ema = (run_flax({"params": base, "lora": state[part]["lora"]}) for part in ("params", "ema"))
    assert relative_error(ema, student) > 1e-3


def test_import_after_export_is_bit_identical(home, state, capsys):
    expected = flatten_dict(scale_lora(state["params"]["lora"], SCALE))
    export("runs/stage2", "round/peft", "peft", "--overwrite")
    export("runs/stage2", "round/diffusers", "diffusers", "--overwrite")
    sources = ["round/peft", "round/diffusers", "round/diffusers/pytorch_lora_weights.safetensors", "round/imported"]
    assert convert(["import-lora", "round/diffusers", "round/imported", "--weights=weights/svd"]) == 0
    assert f"{len(expected) // 2} modules of rank 2, alpha = rank." in capsys.readouterr().out
    for source in sources:
        read = read_lora(source, SHAPES)
        actual = flatten_dict(read.lora)
        assert read.dropped == [] and actual.keys() == expected.keys()
        for path, leaf in expected.items():
            np.testing.assert_array_equal(actual[path], leaf)
            assert actual[path].dtype == leaf.dtype


def test_a_smaller_rank_is_exported_and_what_it_loses_is_said(home, state, capsys):
    assert export("runs/stage2", "round/small", "peft", "--rank=1", "--overwrite") == 0
    smaller, error = truncate_lora(scale_lora(state["params"]["lora"], SCALE), 1)
    assert 0.01 < error < 1
    told = capsys.readouterr().out
    assert f"Of rank 2, 1 are left, which changes its products by {100 * error:.2g} %." in told
    actual = flatten_dict(read_lora("round/small", SHAPES).lora)
    for path, leaf in flatten_dict(smaller).items():
        np.testing.assert_array_equal(actual[path], leaf)


def test_tuned_layers_are_in_the_merged_unet_and_their_absence_elsewhere_is_said(base, tuned_run, capsys):
    workdir, student = tuned_run
    assert export(workdir, "exported/tuned", "unet", "--dtype=float32") == 0
    from diffusers import UNetSpatioTemporalConditionModel

    unet = UNetSpatioTemporalConditionModel.from_pretrained("exported/tuned")
    expected = run_flax(student.variables(base, SCALE))
    assert relative_error(run_torch(unet), expected) <= 1e-4
    assert relative_error(run_flax({"params": base, "lora": scale_lora(student.lora, SCALE)}), expected) > 1e-2
    capsys.readouterr()
    for kind in ("peft", "diffusers"):
        assert export(workdir, f"exported/tuned_{kind}", kind) == 0
        told = capsys.readouterr().out
        size = sum(leaf.size for leaf in jax.tree.leaves(student.tuned))
        assert "only the LoRA part" in told and f"{size:,} base parameters" in told and "--format=unet" in told
        assert told.split(". ", 1)[1].strip() in pathlib.Path(f"exported/tuned_{kind}", "README.md").read_text()


def test_what_was_tuned_becomes_a_lora_of_the_rank_that_is_asked_for(base, tuned_run, capsys):
    """By singular values: of full rank all but what is no kernel, of rank 3 the best there is."""
    workdir, student = tuned_run
    whole = student.variables(base, SCALE)
    merged, plain = (flatten_dict(tree) for tree in (merge_lora(whole["params"], whole["lora"]), base))
    changes = {path: merged[path] - leaf for path, leaf in plain.items() if np.any(merged[path] != leaf)}
    squares = {path: np.square(change, dtype=np.float64).sum() for path, change in changes.items()}
    errors = []
    for rank in (64, 3):
        assert export(workdir, "exported/closest", "peft", f"--rank={rank}", "--overwrite") == 0
        read = read_lora("exported/closest", SHAPES).lora
        assert set(ranks(read).values()) == {rank}
        products, lost = flatten_dict(merge_lora(jax.tree.map(np.zeros_like, base), read)), 0.0
        for path, change in changes.items():
            if path[-1] != "kernel":
                lost += squares[path]
                continue
            values = np.linalg.svd(change.reshape(-1, change.shape[-1]).astype(np.float64), compute_uv=False)
            best = np.square(values[rank:]).sum()
            left = np.square(products[path] - change, dtype=np.float64).sum()
            assert left <= best + 1e-6 * squares[path], path
            lost += left
        errors.append(np.sqrt(lost / sum(squares.values())))
        assert f"of which it lacks {100 * errors[-1]:.2g} %" in capsys.readouterr().out
    of_no_kernels = sum(square for path, square in squares.items() if path[-1] != "kernel")
    assert errors[0] == pytest.approx(np.sqrt(of_no_kernels / sum(squares.values())), rel=1e-3)
    assert errors[1] > 1.2 * errors[0]


@pytest.mark.integration
def test_the_card_says_where_the_weights_come_from_and_makes_a_video(home, tuned_run):
    """The lines of the sampler are run as they stand, and the folder is all that a hub needs."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)).save("cat.png")
    assert export("runs/stage2", "carded", "unet", "--ema") == 0
    files = {file.name for file in pathlib.Path("carded").iterdir()}
    weights = {"config.json", "diffusion_pytorch_model.safetensors"}
    assert files == {"README.md", "training_config.json", "time_travel_scheduler.py", *weights}
    card = pathlib.Path("carded/README.md").read_text()
    config = json.loads(pathlib.Path("runs/stage2/config.json").read_text())
    assert card.startswith("---\nlicense: other\n") and "pipeline_tag: image-to-video" in card
    for fact in (
        "# carded",
        "the EMA of its student after 3 steps",
        "`stage1`",
        config["weights"],
        "rank 2, alpha 6",
    ):
        assert fact in card, fact
    assert json.loads(pathlib.Path("carded/training_config.json").read_text()) == config
    unet_lines, sampler_lines = python_lines(pathlib.Path("carded/README.md"))
    loaded = {}
    exec(unet_lines, loaded)
    exec(sampler_lines, loaded)
    with Image.open("cat.gif") as made:
        assert made.size == (24, 16) and made.n_frames == 3


@pytest.mark.parametrize("kind", ["kohya", "comfyui"])
def test_a_lora_for_other_programs_is_the_students(state, kind, capsys):
    expected = flatten_dict(scale_lora(state["params"]["lora"], SCALE))
    assert export("runs/stage2", f"exported/{kind}", kind, "--overwrite") == 0
    (file,) = pathlib.Path("exported", kind).glob("*.safetensors")
    assert file.stem == kind and f"`{file.name}`" in (file.parent / "README.md").read_text()
    actual = flatten_dict(read_lora(file, SHAPES).lora)
    assert actual.keys() == expected.keys()
    assert all(np.array_equal(actual[path], leaf) for path, leaf in expected.items())
    names = {
        "kohya": "lora_unet_down_blocks_0_attentions_0_temporal_transformer_blocks_0_attn1_to_out_0",
        "comfyui": "lora_unet_input_blocks_1_1_time_stack_0_attn1_to_out_0",
    }
    tensors = load_file(file)
    assert f"{names[kind]}.lora_down.weight" in tensors and tensors[f"{names[kind]}.alpha"] == 2
    assert len(tensors) == 3 * len(expected) // 2


def test_a_single_file_holds_the_student_and_comes_back(home, base, state, tmp_path, capsys):
    """As does the teacher's with the LoRA for ComfyUI on it; and VAE and image encoder are what they were."""
    assert export("runs/stage2", "student", "single-file") == 0
    assert "unet, vae, image_encoder in one file" in capsys.readouterr().out
    assert convert(["svd", "student/student.safetensors", str(tmp_path / "back"), "--dtype=float32"]) == 0
    merged = merge_lora(base, scale_lora(state["params"]["lora"], SCALE))
    for component, expected in (("unet", merged), *((name, None) for name in ("vae", "image_encoder"))):
        assert load_config(tmp_path / "back", component) == load_config("weights/svd", component)
        expected = flatten_dict(expected or load_params("weights/svd", component))
        found = flatten_dict(load_params(tmp_path / "back", component))
        assert found.keys() == expected.keys()
        for path, leaf in expected.items():
            np.testing.assert_array_equal(found[path], leaf)

    export("runs/stage2", "exported/comfyui", "comfyui", "--overwrite")
    student, prefix = load_file("student/student.safetensors"), "model.diffusion_model."
    unet = {name.removeprefix(prefix): x for name, x in student.items() if name.startswith(prefix)}
    networks = {"unet": (load_config("weights/svd", "unet"), base)}
    write_single_file(tmp_path / "teacher.safetensors", networks, "float32")
    teacher = {name.removeprefix(prefix): x for name, x in load_file(tmp_path / "teacher.safetensors").items()}
    patched = exported_runs.comfyui_patched(teacher, load_file("exported/comfyui/comfyui.safetensors"))
    assert patched.keys() == unet.keys()
    for name, tensor in unet.items():
        assert relative_error(patched[name], tensor) <= 1e-5, name


def test_the_merged_unet_is_the_base_where_nothing_was_trained(base, state, tmp_path):
    lora = scale_lora(state["params"]["lora"], SCALE)
    exporters.export_unet(tiny_pipeline.UNET, merge_lora(base, lora), tmp_path / "unet", "bfloat16")
    description = json.loads((tmp_path / "unet" / "config.json").read_text())
    assert ARCHITECTURES["unet"].from_json(description) == tiny_pipeline.UNET
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.bfloat16"}
    kernel = np.asarray(base["conv_in"]["kernel"].astype(jnp.bfloat16), np.float32)
    np.testing.assert_array_equal(tensors["conv_in.weight"].float().permute(2, 3, 1, 0), kernel)


def test_the_released_configuration_is_written_as_diffusers_writes_it(tmp_path):
    exporters.export_unet(UNetConfig(num_frames=25), {"x": {"bias": np.zeros(3, np.float32)}}, tmp_path / "unet")
    description = json.loads((tmp_path / "unet" / "config.json").read_text())
    # From the unet/config.json of stable-video-diffusion-img2vid-xt.
    assert description["down_block_types"] == ["CrossAttnDownBlockSpatioTemporal"] * 3 + ["DownBlockSpatioTemporal"]
    assert description["up_block_types"] == ["UpBlockSpatioTemporal"] + ["CrossAttnUpBlockSpatioTemporal"] * 3
    assert description["projection_class_embeddings_input_dim"] == 768
    assert ARCHITECTURES["unet"].from_json(description) == UNetConfig(num_frames=25)


def test_peft_targets_are_named_one_by_one(state):
    export("runs/stage2", "exported/named", "peft", "--overwrite")
    config = json.loads(pathlib.Path("exported/named/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 2
    assert len(config["target_modules"]) == len(ranks(state["params"]["lora"]))
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v" in config["target_modules"]
    assert not any(re.search(r"attn2\.to_[qk]$", name) for name in config["target_modules"])


def test_whoever_may_read_the_folder_may_read_the_files(state):
    export("runs/stage2", "exported/open", "peft", "--overwrite")
    folder = pathlib.Path("exported/open")
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {folder.stat().st_mode & 0o666}


def test_a_float16_overflow_is_refused(tmp_path):
    params = {"x": {"kernel": np.full((2, 3), 1e5, np.float32)}}
    with pytest.raises(UserError, match=r"x\.weight has values beyond float16"):
        exporters.export_unet(tiny_pipeline.UNET, params, tmp_path / "unet", "float16")
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_not_finite_are_refused(home, tmp_path, monkeypatch, capsys):
    """Of what is merged, and already of the run's checkpoint, whatever is to be made of it."""
    params = {"x": {"kernel": np.array([[0.0, np.inf]], np.float32)}}
    with pytest.raises(UserError, match=r"x\.weight has values that are NaN or infinite"):
        exporters.export_unet(tiny_pipeline.UNET, params, tmp_path / "unet")
    student = {"lora": {"conv_in": {"a": np.ones((8, 2)), "b": np.full((2, 4), np.nan)}}, "tuned": {}}
    monkeypatch.setattr("osv_jax.inference.trained._read", lambda *_: student)
    for arguments in (["export-lora", "--format=peft"], ["export-lora", "--format=unet"], ["merge"]):
        assert convert([*arguments, "runs/stage2", str(tmp_path / "out")]) == 2
        told = capsys.readouterr().err
        assert "runs/stage2 has values that are NaN or infinite, first in lora/conv_in/b: it is damaged" in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["runs/stage2", "svd", "--format=peft"], ["svd exists", "--overwrite"]),
        (["runs/stage2", "svd/model_index.json/x", "--format=peft"], ["cannot be written"]),
        (["weights", "out", "--format=peft"], ["weights has no config.json", "--workdir"]),
        (["nowhere", "out", "--format=peft", "--rank=0"], ["--rank=0 must be a whole number of at least 1"]),
        (["runs/stage2", "out", "--format=peft", "--rank=3"], ["--rank=3 must lie in 1 .. 2"]),
        (["runs/stage2", "out", "--format=unet", "--rank=1"], ["--rank is of a LoRA", "--format=unet"]),
        (["runs/stage2", "out", "--format=single-file", "--rank=1"], ["--rank is of a LoRA", "--format=single-file"]),
        (["runs/homeless", "out", "--format=comfyui"], ["--weights"]),
        (["runs/empty", "out", "--format=peft"], ["runs/empty has no checkpoint"]),
        (["runs/broken", "out", "--format=peft"], ["runs/broken/checkpoints/3 is damaged"]),
        (["runs/garbled", "out", "--format=peft"], ["config.json is damaged"]),
        (["runs/rankless", "out", "--format=peft"], ["runs/rankless/config.json: lora.rank=0 must be a whole number"]),
        (["runs/stage2", "out", "--format=unet", "--weights=nowhere"], ["osv_jax.convert_weights svd"]),
        (["runs/homeless", "out", "--format=unet"], ["--weights"]),
        (["runs/stage2", "out", "--format=unet", "--weights=weights/other"], ["runs/stage2 does not fit", "sizes"]),
    ],
)
def test_bad_requests_are_one_line(home, state, arguments, words, capsys):
    config = json.loads(pathlib.Path("runs/stage2/config.json").read_text())
    for name, content in (
        ("empty", config),
        ("broken", config),
        ("homeless", config | {"weights": ""}),
        ("garbled", {}),
        ("rankless", config | {"lora": config["lora"] | {"rank": 0}}),
    ):
        checkpoint.write_config(pathlib.Path("runs", name), content)
    pathlib.Path("runs/broken/checkpoints/3/state").mkdir(parents=True, exist_ok=True)
    if not pathlib.Path("runs/homeless/checkpoints").exists():
        pathlib.Path("runs/homeless/checkpoints").symlink_to(home / "runs" / "stage2" / "checkpoints")
    if "--weights=weights/other" in arguments:
        exported_runs.save_other_weights(pathlib.Path("weights/other"))
    assert convert(["export-lora", *arguments]) == 2
    told = capsys.readouterr()
    assert all(word in told.err for word in words), told.err
    assert told.err.count("\n") == 1 and told.out == ""
    assert not pathlib.Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["export-lora", "runs/stage2", "runs/stage2", "--format=peft"], "runs/stage2 is its source"),
        (["export-lora", "runs/stage2", "runs/link", "--format=peft"], "runs/link is its source"),
        (["export-lora", "runs/stage2", "runs/stage2/checkpoints", "--format=peft"], "lies in runs/stage2"),
        (["export-lora", "runs/stage2", "runs", "--format=diffusers"], "runs holds runs/stage2"),
        (["export-lora", "runs/stage2", "weights/svd/unet", "--format=unet"], "weights/svd/unet lies in /"),
        (["merge", "runs/stage2", "weights"], "weights holds /"),
        (["merge", "runs/stage2", "weights/svd", "--weights=weights/svd"], "weights/svd is its source"),
        (["merge", "runs/stage2", "runs/stage2"], "is its source"),
        (["pack", "weights/svd", "weights/svd"], "is its source"),
        (["import-lora", "runs/stage2", "runs/stage2"], "is its source"),
        (["import-lora", "nowhere", "weights/svd", "--weights=weights/svd"], "is its source"),
        (["svd", "svd", "svd"], "svd/unet is its source"),
        (["svd", "svd", "svd", "--components", "vae"], "svd/vae is its source"),
        (["dinov2", "svd/dinov2", "svd"], "svd/dinov2 is its source"),
        (["export-lora", "runs/stage2", "svd/model_index.json", "--format=peft"], "is a file"),
        (["pack", "weights/svd", "svd/model_index.json/x"], "svd/model_index.json cannot be written to"),
        (["svd", "svd", "svd/model_index.json"], "svd/model_index.json cannot be written to"),
        (["merge", "runs/stage2", 300 * "x"], "(File name too long)"),
    ],
)
def test_no_command_overwrites_what_it_reads(home, arguments, words, capsys):
    if not (home / "runs" / "link").is_symlink():
        (home / "runs" / "link").symlink_to("stage2")
    before = sorted(home.rglob("*"))
    assert convert([*arguments, "--overwrite"]) == 2
    told = capsys.readouterr()
    assert words in told.err and told.err.count("\n") == 1, told.err
    assert sorted(home.rglob("*")) == before

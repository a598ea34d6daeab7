"""The training program's stage 2: started from stage 1, over two resolutions, stopped and resumed."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import micro_stage1
import micro_stage2
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import Stopped, quick_jit, stop
from flax.traverse_util import flatten_dict
from toy_unet import toy_training
from workdirs import assert_same, metrics_of, state_of

from osv_jax import train
from osv_jax.errors import UserError
from osv_jax.models import groups
from osv_jax.runtime import checkpoint
from osv_jax.training import loop, origins, setup

STEPS, SWITCH = 4, 2


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with toy_training() as mesh:
        yield mesh


@pytest.fixture(scope="module")
def stage1(one_device, tmp_path_factory):
    """The workdir of stage 1 as after two steps, in which everything has moved."""
    workdir = tmp_path_factory.mktemp("stage1") / "run"
    config = with_whole_lora(micro_stage1.get_config())
    config.num_steps = 2
    _, state = untrained(config, one_device)
    rng = np.random.default_rng(0)
    moved = lambda tree: jax.tree.map(lambda x: x + 0.02 * rng.standard_normal(x.shape, np.float32), tree)  # noqa: E731
    players = {
        name: player.replace(params=moved(player.params), stats=moved(player.stats), ema=moved(player.ema))
        for name, player in state.players.items()
    }
    checkpoint.write_config(workdir, config.to_dict())
    with checkpoint.open_checkpoints(workdir, 1) as checkpoints:
        checkpoint.save(checkpoints, 2, state.replace(step=jnp.int32(2), players=players), {})
    return workdir


def untrained(config, one):
    """The objective of a run of `config`, and the state that begins with the teacher."""
    made = setup.networks_of(config)
    objective = setup.objective_of(config, made)
    with jax.set_mesh(one):
        frozen = setup.load_frozen(config, made, one)
        return objective, quick_jit(setup.make_init(objective))(jax.random.key(0), frozen)


def with_whole_lora(config):
    """LoRA on all of the toy's parts, which are few."""
    config.lora.targets = "all"
    return config


def stage2_config(origin, **changes):
    config = with_whole_lora(micro_stage2.get_config())
    config.init_from = str(origin)
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def straight(stage1, tmp_path_factory):
    """A run of stage 2 that nothing stopped."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    train.train(stage2_config(stage1, num_steps=STEPS), workdir)
    return workdir


# Before, at and after the change of resolution.
@pytest.mark.integration
@pytest.mark.parametrize("stop", [SWITCH - 1, SWITCH, SWITCH + 1])
def test_a_stopped_run_continues_bit_for_bit(straight, stage1, stop, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    # What a run that is killed leaves: later metrics may be there, later checkpoints are not.
    for step in range(stop + 1, STEPS + 1):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    capsys.readouterr()
    train.train(stage2_config(stage1, num_steps=STEPS, checkpoint_every=STEPS), workdir)
    output = capsys.readouterr().out
    assert f"Resuming from step {stop}." in output and "Starting from" not in output
    assert ("Compiling the step for 16 x 24" in output) == (stop < SWITCH)
    assert "Compiling the step for 24 x 16" in output
    assert_same(state_of(workdir, STEPS), state_of(straight, STEPS))
    assert metrics_of(workdir) == metrics_of(straight)
    assert sorted(metrics_of(workdir)) == list(range(1, STEPS + 1))


@pytest.mark.integration
def test_state_carries_over_to_the_second_resolution(straight):
    before, after = state_of(straight, SWITCH), state_of(straight, SWITCH + 1)
    assert after["step"] == SWITCH + 1
    # Adam's moments too are continued, not begun again.
    leaves = jax.tree.leaves_with_path(after)
    counts = [int(leaf) for path, leaf in leaves if "count" in jax.tree_util.keystr(path[-1:])]
    assert len(counts) == 2 and set(counts) == {SWITCH + 1}
    old, new = (flatten_dict(state["players"]["student"]["params"]) for state in (before, after))
    assert {path[0] for path in new} == {"lora", "tuned"}
    # A step of Adam moves nothing by more than its learning rate, within a factor.
    assert 0 < max(np.abs(new[path] - old[path]).max() for path in new) < 0.02


@pytest.mark.integration
def test_nothing_is_compiled_after_the_first_step(stage1, tmp_path, monkeypatch):
    compiled, at_steps = [], []
    compile_step = loop.compile_step

    def counted(*arguments):
        names, step = compile_step(*arguments)

        def run(*arguments):
            at_steps.append(len(compiled))
            return step(*arguments)

        return names, run

    def record(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    monkeypatch.setattr(loop, "compile_step", counted)
    jax.monitoring.register_event_duration_secs_listener(record)
    try:
        changes = {"data.resolutions": ((0, 16, 24),), "num_steps": 5, "checkpoint_every": 5}
        train.train(stage2_config(stage1, **changes), tmp_path / "run")
    finally:
        jax.monitoring.unregister_event_duration_listener(record)
    assert compiled and at_steps == [at_steps[0]] * 5


@pytest.mark.integration
def test_a_value_that_is_not_finite_stops_the_run(tmp_path):
    workdir = tmp_path / "run"
    config = with_whole_lora(micro_stage1.get_config())
    config.num_steps = 2
    train.train(config, workdir)
    state = state_of(workdir, 2)
    bias = state["players"]["disc"]["params"]["upsampler"]["bias"]
    state["players"]["disc"]["params"]["upsampler"]["bias"] = np.full_like(bias, np.inf)
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        checkpointer.save((workdir / "checkpoints" / "2" / "state").absolute(), state, force=True)
    config.num_steps = 20
    with pytest.raises(UserError, match=r"^Step 3: .*loss_disc is nan.* checkpoint of step 2 is intact"):
        train.train(config, workdir)
    assert [file.name for file in (workdir / "checkpoints").iterdir()] == ["2"]


def first_state(config, one):
    """The state that a run of `config` begins with, and one that begins with the teacher."""
    objective, fresh = untrained(config, one)
    with jax.set_mesh(one):
        origin = pathlib.Path(config.init_from)
        origins.check_origin(origin, config)
        return origins.start_from(origin, fresh, objective), fresh


def test_stage_2_begins_with_stage_1s_student_and_discriminator(stage1, one_device):
    start, fresh = first_state(stage2_config(stage1), one_device)
    trained = state_of(stage1, 2)["players"]
    student, disc = start.players["student"], start.players["disc"]
    assert_same(student.params.lora, trained["student"]["params"]["lora"])
    assert_same((disc.params, disc.stats), (trained["disc"]["params"], trained["disc"]["stats"]))
    assert_same(student.ema.lora, trained["student"]["params"]["lora"])
    assert any(np.any(leaf) for path, leaf in flatten_dict(student.params.lora).items() if path[-1] == "b")
    # Stage 1 did not train these: they begin with the base, and the optimizers from nothing.
    assert_same((student.params.tuned, student.ema.tuned), (fresh.players["student"].params.tuned,) * 2)
    assert start.step == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((student.opt_state, disc.opt_state)))


@pytest.mark.integration
def test_a_run_says_where_it_starts_and_what_it_trains(stage1, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "run_phase", stop)
    config = stage2_config(stage1)
    lowest = config.solver_steps + 1
    config.level_weights = ((lowest, 1.0),)
    with pytest.raises(Stopped):
        train.train(config, tmp_path / "run")
    output = capsys.readouterr().out
    assert f"  warning   config.level_weights=(({lowest}, 1.0),) leaves out the highest" in output
    assert f"Starting from step 2 of {stage1}." in output
    rows = {line.split()[0]: line.split() for line in output.splitlines() if line.split()[2::2] == ["M", "M"]}
    assert list(rows) == ["lora", *groups.GROUPS]
    trained = {name for name, row in rows.items() if float(row[3]) > 0}
    assert trained == {"lora", "temporal_transformer"}
    assert "16 x 24 to step 2, 24 x 16 to step 4" in output


def refused(config, workdir) -> str:
    with pytest.raises(UserError) as error:
        train.train(config, workdir)
    assert not list(workdir.glob("checkpoints/*"))
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora.rank": 8}, ["config.lora is", "'rank': 8", "'rank': 4"]),
        ({"lora.targets": "attention"}, ["config.lora is", "attention"]),
        (
            {"random_networks.dinov2.num_hidden_layers": 2, "discriminator_blocks": (1,)},
            ["config.discriminator_blocks is [1]", "has [0]"],
        ),
        ({"random_networks.unet.layers_per_block": 2}, ["config.random_networks is"]),
        # No shape tells of these.
        ({"discriminator_read": "sum"}, ["config.discriminator_read is sum", "has patches"]),
        ({"boundary": "exact"}, ["config.boundary is exact", "has svd"]),
    ],
)
def test_a_run_that_does_not_fit_is_refused(stage1, changes, words, tmp_path):
    sentence = refused(stage2_config(stage1, **changes), tmp_path / "run")
    assert all(word in sentence for word in [*words, str(stage1), "must be the same"]), sentence


@pytest.mark.integration
def test_groups_that_the_other_run_trained_must_not_be_dropped(straight, tmp_path):
    sentence = refused(stage2_config(straight, trainable=("lora",)), tmp_path / "run")
    assert f"The run in {straight} trained the groups temporal_transformer" in sentence
    assert "config.trainable" in sentence


def test_a_folder_that_is_no_workdir_is_refused(tmp_path):
    (tmp_path / "other").mkdir()
    for origin in (tmp_path / "other", tmp_path / "missing"):
        sentence = refused(stage2_config(origin), tmp_path / "run")
        assert f"config.init_from={origin} is not the workdir of a run" in sentence and "stage 1" in sentence


def test_a_run_without_a_checkpoint_is_refused(stage1, tmp_path):
    origin = tmp_path / "origin"
    (origin / "checkpoints").mkdir(parents=True)
    shutil.copy(stage1 / "config.json", origin)
    assert f"config.init_from={origin} has no checkpoint yet" in refused(stage2_config(origin), tmp_path / "run")


def test_a_checkpoint_of_other_shapes_is_refused(stage1, tmp_path):
    """As a config.json that was edited, or exchanged, would have it."""
    origin = tmp_path / "origin"
    shutil.copytree(stage1, origin)
    before = json.loads((origin / "config.json").read_text())
    before["lora"] |= {"rank": 2, "alpha": 2.0}
    (origin / "config.json").write_text(json.dumps(before))
    sentence = refused(stage2_config(origin, **{"lora.rank": 2, "lora.alpha": 2.0}), tmp_path / "run")
    assert f"The checkpoint of step 2 in {origin} does not fit this run" in sentence
    assert "players/student/params/lora" in sentence and "use the configuration it was trained with" in sentence


def test_a_checkpoint_that_is_not_finite_is_refused(stage1, tmp_path, monkeypatch):
    restore = origins.checkpoint.restore_parts

    def damaged(*arguments):
        parts = restore(*arguments)
        parts["players"]["disc"]["params"]["upsampler"]["bias"] *= np.inf
        return parts

    monkeypatch.setattr(origins.checkpoint, "restore_parts", damaged)
    sentence = refused(stage2_config(stage1), tmp_path / "run")
    assert (
        f"The checkpoint of step 2 in {stage1} has values that are NaN or infinite, first in disc/params/" in sentence
    )


def test_a_damaged_checkpoint_of_stage_1_is_named(stage1, tmp_path):
    origin = tmp_path / "origin"
    shutil.copytree(stage1, origin)
    shutil.rmtree(origin / "checkpoints" / "2" / "state")
    sentence = refused(stage2_config(origin), tmp_path / "run")
    assert f"The checkpoint {origin / 'checkpoints' / '2'} is damaged" in sentence

"""A checkpoint that is cut off while it is written in the background is not one; that before it is whole."""

import json
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from osv_jax.runtime import checkpoint

POSITION = {"position": 8, "seed": 0, "index_hash": "abc"}
# Saves step 1 whole, begins to save step 2, and is killed as soon as files of it have appeared.
_SAVE_AND_DIE = """
import json, os, pathlib, signal, sys
import jax.numpy as jnp
from osv_jax.runtime import checkpoint

workdir = pathlib.Path(sys.argv[1])
checkpoints = checkpoint.open_checkpoints(workdir, 2)
checkpoint.save(checkpoints, 1, {"x": jnp.full((48, 2**20), 1.0)}, json.loads(sys.argv[2]))
checkpoints.wait_until_finished()
checkpoint.save(checkpoints, 2, {"x": jnp.full((48, 2**20), 2.0)}, {"step": 2})
print("returned", flush=True)
while not any(path.is_file() for path in (workdir / "checkpoints").glob("2*/**/*")):
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_in_the_middle_of_an_asynchronous_save(tmp_path):
    root = pathlib.Path(checkpoint.__file__).parents[2]
    child = subprocess.run(
        [sys.executable, "-c", _SAVE_AND_DIE, str(tmp_path), json.dumps(POSITION)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert child.stdout == "returned\n"  # so the save was in the background
    left = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert any(name.startswith("2.") for name in left), left  # and not finished
    assert checkpoint.latest_step(tmp_path) == 1

    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {"x": jax.ShapeDtypeStruct((48, 2**20), jnp.float32, sharding=device)}
    with checkpoint.open_checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoint.restore_data(checkpoints, 1) == POSITION
        assert np.all(np.asarray(checkpoint.restore_state(checkpoints, 1, like)["x"]) == 1)
        # What was cut off is gone, and its place is free.
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
        checkpoint.save(checkpoints, 2, {"x": jnp.zeros(3)}, {"step": 2})
    assert checkpoint.latest_step(tmp_path) == 2


def test_only_large_arrays_are_written_in_slices(tmp_path, monkeypatch):
    """What all devices hold; cutting thousands of small ones would stop the run for long."""
    cut = []
    slice_in_dim = jax.lax.slice_in_dim
    monkeypatch.setattr(
        jax.lax, "slice_in_dim", lambda x, *args, **kw: cut.append(x.shape) or slice_in_dim(x, *args, **kw)
    )
    monkeypatch.setattr(checkpoint, "_MIN_SLICE_BYTES", 4 * 128)
    everywhere = jax.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P())
    state = {"small": jnp.ones(8 * 127), "large": jnp.arange(8 * 128.0)}
    state = jax.device_put(state, everywhere)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), state)
    with checkpoint.open_checkpoints(tmp_path, 2) as checkpoints:
        checkpoint.save(checkpoints, 1, state, {"step": 1})
        checkpoints.wait_until_finished()
        restored = checkpoint.restore_state(checkpoints, 1, like)
    assert set(cut) == {state["large"].shape}
    assert jax.tree.all(jax.tree.map(np.array_equal, restored, state))

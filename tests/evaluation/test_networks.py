"""I3D and VideoMAE as makers of features: devices, batches, fingerprints, damage."""

import jax
import numpy as np
import pytest
from conftest import relative_error
from tiny_networks import CONFIGS, NUM_FRAMES, random_weights, save

from osv_jax.errors import UserError
from osv_jax.evaluation.networks import NETWORKS, FeatureNetwork, load_network
from osv_jax.models.i3d import I3D
from osv_jax.models.videomae import VideoMAE

BATCH = 8


def make(name, params):
    return FeatureNetwork(name, CONFIGS[name], params, NUM_FRAMES, BATCH)


@pytest.mark.integration
@pytest.mark.parametrize("name", NETWORKS)
def test_eight_devices_and_a_batch_that_is_not_full_change_nothing(name, rng):
    params = random_weights(name)
    eight = make(name, params)
    clips = rng.uniform(0, 255, (3, NUM_FRAMES, eight.side, eight.side, 3)).astype(np.float32)
    scaled = {"i3d": clips / 127.5 - 1, "videomae": clips / 255}[name]
    network = {"i3d": I3D, "videomae": VideoMAE}[name](CONFIGS[name])
    alone = jax.device_put(({"params": params}, scaled), jax.devices()[0])
    assert relative_error(eight(clips), jax.jit(network.apply)(*alone)) <= 1e-5


def test_fingerprints_are_of_the_values_and_survive_saving(tmp_path):
    params = random_weights("videomae")
    stored = load_network(str(save(tmp_path, "videomae")), "videomae", NUM_FRAMES, BATCH)
    assert stored.fingerprint == make("videomae", params).fingerprint
    params["fc_norm"]["bias"][0] += 1
    assert stored.fingerprint != make("videomae", params).fingerprint


def test_weights_that_are_not_finite_are_blamed():
    params = random_weights("videomae")
    params["fc_norm"]["bias"][0] = np.nan
    with pytest.raises(UserError, match=r"weights are damaged: videomae/fc_norm/bias has values that are NaN"):
        make("videomae", params)(np.zeros((1, NUM_FRAMES, 28, 28, 3), np.float32))


@pytest.mark.parametrize(
    ("name", "num_frames", "batch_size", "message"),
    [
        ("i3d", 9, BATCH, "9 frames are too few for I3D, which halves them three times: use 10"),
        ("videomae", 12, BATCH, "This VideoMAE takes clips of 10 frames, not of 12"),
        ("videomae", 10, 12, "--batch_size=12 does not split over 8 devices"),
    ],
)
def test_what_no_network_takes_is_refused(name, num_frames, batch_size, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_network(str(save(tmp_path, name)), name, num_frames, batch_size)

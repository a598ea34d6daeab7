"""A whole step with the signatures of the networks checked, too: run by `test_typing`, for it makes tracing slow."""

import conftest

conftest.check_signatures("osv_jax.models")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import jaxtyping  # noqa: E402
import micro_stage1  # noqa: E402
import pytest  # noqa: E402
import tiny  # noqa: E402

from osv_jax.models.layers import Dense, timestep_embedding  # noqa: E402
from osv_jax.planning import compiling  # noqa: E402
from osv_jax.training import setup  # noqa: E402
from osv_jax.training.config import phases_of  # noqa: E402


def main() -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match="timesteps"):
        timestep_embedding(jnp.ones((2, 2)), 8)
    with pytest.raises(jaxtyping.TypeCheckError, match="timesteps"):
        timestep_embedding(jnp.arange(4), 8)
    # Inside jit, and in modules.
    with pytest.raises(jaxtyping.TypeCheckError, match="'x'"):
        jax.eval_shape(Dense(3).init, jax.random.key(0), jnp.ones((2, 3), jnp.int32))

    config = micro_stage1.get_config()
    config.lora.targets, config.trainable = "all", ("lora", "temporal_transformer")
    networks = setup.networks_of(config)
    (phase,) = phases_of(config)
    compiling.trace(config, setup.objective_of(config, networks), phase, tiny.one_device_mesh())
    frozen = setup.frozen_shapes(config, networks)
    latents = jax.ShapeDtypeStruct((1, 3, 8, 12, 4), jnp.float32)
    assert jax.eval_shape(networks.codec.decode_video, frozen["vae"], latents).shape == (1, 3, 16, 24, 3)


if __name__ == "__main__":
    main()

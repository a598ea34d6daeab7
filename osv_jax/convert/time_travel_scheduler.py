"""OSV's samplers as a scheduler of diffusers: one-step students without JAX.

This file needs PyTorch and diffusers, and nothing else: exports have a copy of it beside their weights.

    pipe.scheduler = TimeTravelScheduler()
    frames = pipe(image, num_inference_steps=1, max_guidance_scale=1.0).frames[0]

is the Time Travel Sampler (OSV Eq. 13) with k = 1, two evaluations of the UNet; one step of
`TimeTravelScheduler(sampler="consistency")` is a single evaluation. Students are never
guided: `max_guidance_scale=1.0` turns SVD's guidance off.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

SAMPLERS = ("tts", "consistency")
BOUNDARIES = ("svd", "exact")


class TimeTravelScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """What `StableVideoDiffusionPipeline` asks of a scheduler; `num_inference_steps` is k.

    Args:
        sampler: "tts", 2 k evaluations; or "consistency", k evaluations with fresh noise between them.
        boundary: the student's `config.boundary`, "svd" or "exact".
        num_levels: N, the student's `config.num_levels`.
        sigma_min, sigma_max, rho: of the Karras noise levels t_1 < ... < t_N.

    Raises:
        ValueError: an unknown sampler or boundary.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        *,  # diffusers forgets what is given without a name when a configuration is saved.
        sampler: str = "tts",
        boundary: str = "svd",
        num_levels: int = 100,
        sigma_min: float = 0.002,
        sigma_max: float = 700.0,
        rho: float = 7.0,
    ):
        for name, value, allowed in (("sampler", sampler, SAMPLERS), ("boundary", boundary, BOUNDARIES)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {value!r}.")
        # The pipeline takes so many timesteps for each of its inference steps.
        self.order = 2 if sampler == "tts" else 1
        self.set_timesteps(1)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Chooses the noise levels of k steps.

        Raises:
            ValueError: more steps than there are noise levels.
        """
        visited = self._even_levels(num_inference_steps)
        if self.config.sampler == "tts":
            # t^k_k, t^{k+1}_k, t^k_{k-1}, ...; the highest of the finer levels is not used.
            visited = np.stack([visited, self._even_levels(num_inference_steps + 1)[1:]], axis=1).reshape(-1)
        self.num_inference_steps = num_inference_steps
        self.sigmas = torch.tensor([*visited, 0.0], dtype=torch.float32, device=device)
        # c_noise, what the UNet is told.
        self.timesteps = self.sigmas[:-1].log() / 4
        self.init_noise_sigma = float(visited[0])
        self._done = 0
        self._noise = None

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """c_in x."""
        return sample / (self.sigmas[self._done] ** 2 + 1).sqrt().to(sample.dtype)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """From x at one noise level to the next, after the last to the clean latents; called in order.

        Args:
            model_output: the UNet's F.
            timestep: not looked at.
            sample: x.
            generator: of "consistency"'s fresh noise.
        """
        x, prediction = sample.float(), model_output.float()
        sigma, following = self.sigmas[self._done], self.sigmas[self._done + 1]
        if self._done == 0:
            self._noise = x / sigma
        shifted = sigma - self.config.sigma_min if self.config.boundary == "exact" else sigma
        clean = x / (shifted**2 + 1) - prediction * shifted / (sigma**2 + 1).sqrt()
        result = clean
        if following > 0 and self.config.sampler == "tts":
            result = clean + following * (self._noise + (x - clean) / sigma) / 2
        elif following > 0:
            result = clean + following * randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        self._done += 1
        result = result.to(sample.dtype)
        return SchedulerOutput(result) if return_dict else (result,)

    def _even_levels(self, steps: int) -> np.ndarray:
        """Every N/k-th of the N noise levels, highest first."""
        levels, config = self.config.num_levels, self.config
        if not 1 <= steps <= levels:
            raise ValueError(f"There are {levels} noise levels, too few or too many for {steps} steps.")
        ramp = np.linspace(config.sigma_min ** (1 / config.rho), config.sigma_max ** (1 / config.rho), levels)
        indices = (2 * np.arange(1, steps + 1) * levels + steps) // (2 * steps)
        return (ramp**config.rho)[indices - 1][::-1]

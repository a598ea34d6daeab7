"""The training steps that `beside_pytorch` times: OSV's two stages, and what their discriminator costs alone.

The reference is what public PyTorch trainers of this family do: a student with PEFT's LoRA, an EMA as a second network,
a teacher as a third, autocast, and a backward pass through the student for its own loss alone.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax.traverse_util import flatten_dict
from pytorch_discriminator import Discriminator
from pytorch_pairs import RANK, Bench, Pair, numpy, weights

from osv_jax.convert import naming
from osv_jax.diffusion.conditioning import Conditioning
from osv_jax.diffusion.edm import sigma_grid
from osv_jax.models import groups
from osv_jax.models.discriminator import discriminate, init_discriminator
from osv_jax.objectives.batches import Batch
from osv_jax.objectives.networks import build_networks
from osv_jax.objectives.options import LoRAOptions
from osv_jax.objectives.osv import OSVOptions
from osv_jax.objectives.osv_stage1 import Stage1
from osv_jax.objectives.osv_stage2 import Stage2, Stage2Options
from osv_jax.objectives.players import Student, TrainState, start

HUBER_C = 1e-3


class Steps(Bench):
    """Also the pairs of whole training steps, on a batch of one clip of latents."""

    def networks(self) -> Any:
        size = self.size
        configs = {"unet": size.unet, "vae": size.vae, "image_encoder": size.image_encoder, "dinov2": size.dinov2}
        options: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.dtype}
        return build_networks(configs, discriminator_blocks=size.discriminator_blocks, **options)

    def disc_variables(self, networks: Any) -> dict[str, Any]:
        return init_discriminator(networks.discriminator, jax.random.key(1), self.size.dinov2.hidden_size)

    def torch_discriminator(self, variables: Any, dinov2: Any) -> Any:
        disc = Discriminator(
            variables, self.torch_dinov2(dinov2), self.size.discriminator_blocks, self.size.dinov2.hidden_size
        )
        return torch.nn.Module.to(disc, self.device)

    def discriminator(self) -> Pair:
        """Upsampling, DINOv2 and all heads, and the gradient of the mean logit with respect to the latents."""
        networks = self.networks()
        variables, dinov2 = self.disc_variables(networks), weights("dinov2", self.size.dinov2)
        latents = self.normal(*self.size.latents, self.size.vae.latent_channels)

        def mean_logit(latents: Any, variables: Any, dinov2: Any) -> Any:
            logits, _ = discriminate(networks.discriminator, networks.dinov2, variables, dinov2, latents, False)
            return jnp.concatenate([*logits.values()], axis=1).mean()

        disc = self.torch_discriminator(variables, dinov2)
        x = torch.tensor(latents, device=self.device).movedim(-1, 2).contiguous().requires_grad_()

        def theirs() -> torch.Tensor:
            with torch.enable_grad(), self.autocast():
                return torch.autograd.grad(disc(x).mean(), x)[0]

        arguments = (jnp.asarray(latents), variables, self.on_device(dinov2))
        return Pair(jax.jit(jax.grad(mean_logit)), arguments, theirs, lambda y: numpy(y.movedim(2, -1)))

    def stage1_step(self) -> Pair:
        """Both players' updates of stage 1, LoRA on attention."""
        options = OSVOptions(lora=LoRAOptions(RANK, RANK), discriminator_blocks=self.size.discriminator_blocks)
        return self.step(Stage1(self.networks(), options))

    def stage2_step(self) -> Pair:
        """Five guided steps of the teacher and both players' updates: LoRA and the temporal transformers."""
        trainable = ("lora", "temporal_transformer")
        options = Stage2Options(
            lora=LoRAOptions(RANK, RANK), trainable=trainable, discriminator_blocks=self.size.discriminator_blocks
        )
        return self.step(Stage2(self.networks(), options))

    def step(self, objective: Any) -> Pair:
        """A step; what is compared are the first moments of Adam, a tenth of the gradients, of every part."""
        size, options = self.size, objective.options
        frozen = {name: weights(name, getattr(size, name)) for name in ("unet", "dinov2")}
        student = Student(
            lora=self.student_lora(frozen["unet"]), tuned=groups.select(frozen["unet"], options.trainable)
        )
        variables = self.disc_variables(objective.networks)
        tree = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (student, variables))
        players = {
            "student": start(tree[0], objective.optimizers["student"], ema=True),
            "disc": start(tree[1]["params"], objective.optimizers["disc"], tree[1]["spectral"]),
        }
        latents = self.normal(*size.latents, size.vae.latent_channels)
        embedding, first = (
            self.normal(1, size.unet.cross_attention_dim),
            self.normal(*latents.shape[:1], *latents.shape[2:]),
        )
        cond = Conditioning(*map(jnp.asarray, (embedding, first, np.array([[6, 127, 0.02]], np.float32))))
        batch, key = Batch(latents=jnp.asarray(latents), cond=cond), jax.random.key(2)
        draws = jax.tree.map(np.asarray, jax.jit(objective.draw)(key, batch))

        def read(result: Any) -> dict[str, np.ndarray]:
            mu = {name: optax.tree.get(player.opt_state, "mu") for name, player in result[0].players.items()}
            parts = {"lora": mu["student"].lora, "tuned": mu["student"].tuned, "disc": mu["disc"]}
            return {name: in_order(flatten_dict(part)) for name, part in parts.items() if flatten_dict(part)}

        reference = TorchStep(self, options, student, variables, frozen, batch, draws)
        arguments = (TrainState(step=jnp.zeros((), jnp.int32), players=players), self.on_device(frozen), batch, key)
        return Pair(jax.jit(objective.step), arguments, reference.run, reference.moments, read=read)


class TorchStep:
    """The reference's step: it goes on from where the last one ended, always on the same clip and random numbers."""

    def __init__(
        self, bench: Steps, options: Any, student: Student, variables: Any, frozen: Any, batch: Batch, draws: Any
    ) -> None:
        self.autocast, self.options, self.num_frames = bench.autocast, options, bench.size.num_frames
        self.student, self.lora = bench.torch_student(frozen["unet"], student.lora)
        self.tuned = {path: self.base_parameter(path) for path in flatten_dict(student.tuned)}
        for parameter in self.tuned.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_()
        self.ema, self.teacher = copy.deepcopy(self.student).requires_grad_(False), bench.torch_unet(frozen["unet"])
        self.disc = bench.torch_discriminator(variables, frozen["dinov2"])
        self.disc_paths = {naming.torch_name(path): path for path in flatten_dict(variables["params"])}
        learning = [*self.lora.values(), *self.tuned.values()]
        rates = options.optimizer
        self.optimizers = {
            "student": torch.optim.Adam(learning, rates.learning_rate, (rates.b1, rates.b2)),
            "disc": torch.optim.Adam(self.disc.parameters(), rates.disc_learning_rate, (rates.b1, rates.b2)),
        }
        named, learns = dict(self.ema.named_parameters()), {id(parameter) for parameter in learning}
        self.averages = [
            (named[name], parameter) for name, parameter in self.student.named_parameters() if id(parameter) in learns
        ]
        grid = np.asarray(sigma_grid(options.num_levels), np.float32)
        on_device = lambda x: torch.tensor(np.asarray(x), device=bench.device)  # noqa: E731
        self.latents, self.noise = (on_device(x).movedim(-1, 2) for x in (batch.latents, draws["noise"]))
        self.cond = [on_device(leaf) for leaf in (batch.cond.image_embedding, batch.cond.image_latents)]
        self.cond[1] = self.cond[1].movedim(-1, 1)
        self.ids = on_device(batch.cond.added_time_ids)
        steps = getattr(options, "solver_steps", 0)
        # From t_{n + m} down to t_n.
        levels = [on_device(grid[draws["index"] + step]) for step in range(steps, -1, -1)]
        self.solver = list(itertools.pairwise(levels))
        self.sigma = levels[0]
        self.compiled = torch.compile(self.student) if bench.compile_reference else self.student

    def base_parameter(self, path: tuple[str, ...]) -> torch.nn.Parameter:
        """The UNet's own parameter at our path; PEFT has put some of its layers into others."""
        module, _, leaf = naming.torch_name(path).rpartition(".")
        layer = self.student.base_model.model.get_submodule(module)
        return getattr(getattr(layer, "base_layer", layer), leaf)

    def denoise(self, model: Any, x: torch.Tensor, sigma: torch.Tensor, guided: bool = False) -> torch.Tensor:
        """x_0 from x at sigma; guided by 1 to 3 from the first to the last frame, both conditions in one batch."""
        embedding, image, ids, s = *self.cond, self.ids, sigma[:, None, None, None, None]
        sample, time = x / (s**2 + 1).sqrt(), sigma.log() / 4
        if guided:
            embedding, image = (torch.cat([torch.zeros_like(value), value]) for value in (embedding, image))
            sample, time, ids = (torch.cat([value, value]) for value in (sample, time, ids))
        sample = torch.cat([sample, image[:, None].expand(-1, self.num_frames, -1, -1, -1)], dim=2)
        with self.autocast():
            v = model(sample, time, embedding[:, None], ids).sample.float()
        if guided:
            weight = torch.linspace(1, 3, self.num_frames, device=x.device)[:, None, None, None]
            unconditional, conditional = v.chunk(2)
            v = unconditional + weight * (conditional - unconditional)
        return x / (s**2 + 1) - s / (s**2 + 1).sqrt() * v

    def example(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:
        """The student input, the target, and the weight of the distance to it."""
        start = x = self.latents + self.sigma[:, None, None, None, None] * self.noise
        if not self.solver:
            return start, self.latents, 1.0
        for sigma, lower in self.solver:
            change = (lower - sigma)[:, None, None, None, None]
            x = x + change * (x - self.denoise(self.teacher, x, sigma, guided=True)) / sigma[:, None, None, None, None]
        lowest = self.solver[-1][1]
        return start, self.denoise(self.ema, x, lowest), (1 / (self.sigma - lowest)) ** self.options.weight_exponent

    def run(self) -> TorchStep:
        with torch.no_grad():
            x, target, weight = self.example()
        with torch.enable_grad():
            fake = self.denoise(self.compiled, x, self.sigma)
            with self.autocast():
                real_logits, fake_logits = self.disc(torch.cat([target, fake.detach()]), update=True).chunk(2)
            hinge = (1 - real_logits).relu().mean() + (1 + fake_logits).relu().mean()
            self.descend("disc", hinge, list(self.disc.parameters()))
            with self.autocast():
                adversarial = (1 - self.disc(fake)).relu().mean()
            distance = ((fake - target).square() + HUBER_C**2).sqrt() - HUBER_C
            loss = self.options.adversarial_weight * adversarial + (weight * distance.mean((1, 2, 3, 4))).mean()
            self.descend("student", loss, [*self.lora.values(), *self.tuned.values()])
        with torch.no_grad():
            for average, parameter in self.averages:
                average.lerp_(parameter, 1 - self.options.ema_decay)
        return self

    def descend(self, player: str, loss: torch.Tensor, parameters: list[torch.nn.Parameter]) -> None:
        """One step of a player's Adam; no other's gradient is computed."""
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        self.optimizers[player].step()

    def moments(self, _: Any) -> dict[str, np.ndarray]:
        """Adam's first moments, in our layout and order."""

        def of(player: str, parameters: dict[Any, torch.Tensor], to_flax: Callable[..., np.ndarray]) -> np.ndarray:
            state = self.optimizers[player].state
            return in_order({path: to_flax(path, numpy(state[x]["exp_avg"])) for path, x in parameters.items()})

        disc = {self.disc_paths[name]: parameter for name, parameter in self.disc.named_parameters()}
        parts = {
            "lora": of("student", self.lora, lambda path, x: x.T),
            "disc": of("disc", disc, naming.to_flax),
        }
        return parts | ({"tuned": of("student", self.tuned, naming.to_flax)} if self.tuned else {})


def in_order(values: dict[Any, Any]) -> np.ndarray:
    """Arrays by path as one vector, in the order of their paths."""
    return np.concatenate([np.asarray(values[path], np.float32).ravel() for path in sorted(values)])

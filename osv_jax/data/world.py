"""A small world that is drawn and not filmed: textured sprites over textured ground, moving light, a moving camera.

It has no end, needs no file and nobody's licence. A clip is a function of its `Address`, in two independent parts: what
its first frame shows (`Look`), and what happens from then on (`Events`), of which the first frame therefore tells
nothing. The numbers of one split never give a clip of the other.

Lengths are in heights of the frame, x to the right and y downwards from its centre; times in seconds. Imports no JAX:
the workers of osv_jax.prepare draw.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import Float, UInt8

# Changes whenever the same address gives another clip.
VERSION = 1
SPLITS = ("train", "test")
# What names it where a folder of videos can be named.
NAME = "world"

COLOURS = {
    "red": (0.90, 0.20, 0.18),
    "orange": (0.93, 0.55, 0.15),
    "yellow": (0.92, 0.88, 0.30),
    "green": (0.22, 0.70, 0.28),
    "turquoise": (0.25, 0.80, 0.78),
    "blue": (0.22, 0.38, 0.93),
    "purple": (0.65, 0.28, 0.82),
    "grey": (0.72, 0.72, 0.72),
}
SHAPES = ("disc", "square", "triangle", "ring", "cross", "flower")
TEXTURES = ("striped", "checked", "dotted", "wavy")
DIRECTIONS = (
    "to the right",
    "down and to the right",
    "down",
    "down and to the left",
    "to the left",
    "up and to the left",
    "up",
    "up and to the right",
)
# The second shade of a texture, as a part of the first, which captions name.
_DARKER = 0.45
# How much brighter it is on the light's side [1/height], and how long the light takes to change [s].
_LIGHT_SLOPE = 0.18
_LIGHT_SECONDS = 0.7
# The part of the light that a shadow takes, and how far it falls.
_SHADOW = 0.45
_SHADOW_LENGTH = 0.06


@dataclasses.dataclass(frozen=True)
class Address:
    """Which clip: `split` is one of `SPLITS`, `seed` and `number` are from 0 to 2^32 - 1."""

    seed: int
    split: str
    number: int

    @property
    def name(self) -> str:
        return f"{NAME}-{VERSION}/{self.split}/{self.seed}/{self.number:08d}"


@dataclasses.dataclass(frozen=True)
class Surface:
    """A texture of two shades of a colour: its period [heights], its angle, and where it begins [radians]."""

    texture: str
    colour: str
    period: float
    angle: float
    phase: float


@dataclasses.dataclass(frozen=True)
class Sprite:
    """A thing: its half width, the place of its centre in the first frame (x in widths), and its angle there."""

    shape: str
    surface: Surface
    radius: float
    x: float
    y: float
    angle: float


@dataclasses.dataclass(frozen=True)
class Look:
    """What the first frame shows; sprites from back to front, the light's strength and where it comes from."""

    ground: Surface
    sprites: tuple[Sprite, ...]
    light: float
    light_angle: float


@dataclasses.dataclass(frozen=True)
class Events:
    """What happens.

    Attributes:
        velocities: of the sprites in the picture [heights/s].
        spins: of the sprites, clockwise [1/s].
        pan: velocity of the camera over the ground [heights/s].
        zoom: by which everything grows, e-fold [1/s].
        brightening: the part of its strength that the light gains in the end.
        light_turn: of the light's direction, clockwise [1/s].
    """

    velocities: tuple[tuple[float, float], ...]
    spins: tuple[float, ...]
    pan: tuple[float, float]
    zoom: float
    brightening: float
    light_turn: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """A clip before it is drawn."""

    look: Look
    events: Events

    @property
    def caption(self) -> str:
        """What happens, in words."""
        events = self.events
        things = [
            f"{_article(sprite.surface.colour)} {sprite.surface.texture} {sprite.shape} moves {direction(*velocity)}"
            + (f", turning {'clockwise' if spin > 0 else 'anticlockwise'}" if spin else "")
            for sprite, velocity, spin in zip(self.look.sprites, events.velocities, events.spins, strict=True)
        ]
        things.append(f"over {self.look.ground.colour} {self.look.ground.texture} ground")
        camera = [f"pans {direction(*events.pan)}"] if any(events.pan) else []
        camera += [f"moves {'closer' if events.zoom > 0 else 'away'}"] if events.zoom else []
        parts = ["; ".join(things), f"the camera {' and '.join(camera) or 'stands still'}"]
        if events.brightening:
            parts.append(f"it gets {'brighter' if events.brightening > 0 else 'darker'}")
        return ". ".join(part[0].upper() + part[1:] for part in parts) + "."


def direction(x: float, y: float) -> str:
    """The nearest of `DIRECTIONS`."""
    return DIRECTIONS[round(math.atan2(y, x) / (math.pi / 4)) % 8]


def _article(colour: str) -> str:
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour}"


def scene(address: Address) -> Scene:
    """What is at an address."""
    numbers = (address.seed, SPLITS.index(address.split), address.number)
    look = _look(np.random.default_rng([*numbers, 0]))
    return Scene(look, _events(np.random.default_rng([*numbers, 1]), len(look.sprites)))


def _look(rng: np.random.Generator) -> Look:
    count = int(rng.integers(2, 5))
    colours = [str(colour) for colour in rng.choice(list(COLOURS), count + 1, replace=False)]
    sprites = tuple(
        Sprite(
            shape=str(rng.choice(SHAPES)),
            surface=_surface(rng, colour, 0.13, 0.2),
            radius=rng.uniform(0.13, 0.26),
            x=rng.uniform(-0.28, 0.28),
            y=rng.uniform(-0.28, 0.28),
            angle=rng.uniform(0, 2 * math.pi),
        )
        for colour in colours[1:]
    )
    return Look(_surface(rng, colours[0], 0.3, 0.6), sprites, rng.uniform(0.65, 0.72), rng.uniform(0, 2 * math.pi))


def _surface(rng: np.random.Generator, colour: str, shortest: float, longest: float) -> Surface:
    period, angle, phase = rng.uniform(shortest, longest), rng.uniform(0, math.pi), rng.uniform(0, 2 * math.pi)
    return Surface(str(rng.choice(TEXTURES)), colour, period, angle, phase)


def _events(rng: np.random.Generator, num_sprites: int) -> Events:
    return Events(
        velocities=tuple(_velocity(rng, 0.15, 0.45) for _ in range(num_sprites)),
        spins=tuple(_sometimes(rng, 0.5, 0.5, 2.0) for _ in range(num_sprites)),
        pan=_velocity(rng, 0.1, 0.35) if rng.random() < 0.7 else (0.0, 0.0),
        zoom=_sometimes(rng, 0.4, 0.1, 0.3),
        brightening=_sometimes(rng, 0.6, 0.15, 0.3),
        light_turn=_sometimes(rng, 0.5, 0.5, 1.5),
    )


def _velocity(rng: np.random.Generator, slowest: float, fastest: float) -> tuple[float, float]:
    speed, angle = rng.uniform(slowest, fastest), rng.uniform(0, 2 * math.pi)
    return speed * math.cos(angle), speed * math.sin(angle)


def _sometimes(rng: np.random.Generator, probability: float, least: float, most: float) -> float:
    """A number of either sign, or 0."""
    sign, size, happens = rng.choice((-1.0, 1.0)), rng.uniform(least, most), rng.random() < probability
    return float(sign * size) if happens else 0.0


def draw(scene: Scene, num_frames: int, fps: float, height: int, width: int) -> UInt8[np.ndarray, "f h w 3"]:
    """The frames of a scene; the same scene at any size and rate [frames/s]."""
    y, x = (((np.arange(n) + 0.5 - n / 2) / height).astype(np.float32) for n in (height, width))
    clip = np.empty((num_frames, height, width, 3), np.uint8)
    for number, frame in enumerate(clip):
        picture = _frame(scene, number / fps, x[None, :], y[:, None], width / height, 1 / height)
        frame[:] = np.clip(255 * picture + 0.5, 0, 255)
    return clip


def _frame(
    scene: Scene,
    seconds: float,
    x: Float[np.ndarray, "1 w"],
    y: Float[np.ndarray, "h 1"],
    aspect: float,
    pixel: float,
) -> Float[np.ndarray, "h w 3"]:
    look, events = scene.look, scene.events
    scale = math.exp(events.zoom * seconds)
    angle = look.light_angle + events.light_turn * seconds
    towards = (math.cos(angle), math.sin(angle))
    pan_x, pan_y = (velocity * seconds for velocity in events.pan)
    picture = _colours(look.ground, x / scale + pan_x, y / scale + pan_y)
    for sprite, velocity, spin in zip(look.sprites, events.velocities, events.spins, strict=True):
        place = (sprite.x * aspect + velocity[0] * seconds, sprite.y + velocity[1] * seconds)
        radius, turned = sprite.radius * scale, sprite.angle + spin * seconds
        shadow_x, shadow_y = (p - _SHADOW_LENGTH * scale * t for p, t in zip(place, towards, strict=True))
        shadow, *_ = _inside(sprite.shape, shadow_x, shadow_y, radius, turned, x, y, pixel)
        mask, u, v = _inside(sprite.shape, place[0], place[1], radius, turned, x, y, pixel)
        picture *= (1 - _SHADOW * shadow)[..., None]
        picture += mask[..., None] * (_colours(sprite.surface, u * sprite.radius, v * sprite.radius) - picture)
    light = look.light * (1 + events.brightening * (1 - math.exp(-seconds / _LIGHT_SECONDS)))
    return picture * (light * (1 + _LIGHT_SLOPE * (towards[0] * x + towards[1] * y)))[..., None]


def _inside(
    shape: str,
    place_x: float,
    place_y: float,
    radius: float,
    angle: float,
    x: Float[np.ndarray, "1 w"],
    y: Float[np.ndarray, "h 1"],
    pixel: float,
) -> tuple[Float[np.ndarray, "h w"], Float[np.ndarray, "h w"], Float[np.ndarray, "h w"]]:
    """How much of each pixel a shape covers, about; and the coordinates in which its radius is 1."""
    right, down = (x - place_x) / radius, (y - place_y) / radius
    cos, sin = math.cos(angle), math.sin(angle)
    u, v = cos * right + sin * down, cos * down - sin * right
    edge = _distance(shape, u, v) * (radius / pixel)
    return np.clip(0.5 - edge, 0, 1), u, v


def _distance(shape: str, u: Float[np.ndarray, "h w"], v: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """To the edge of a shape of radius 1, negative inside."""
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.8
    if shape == "triangle":
        return np.maximum(0.866 * np.abs(u) + 0.5 * v, -v) - 0.5
    if shape == "cross":
        far, near = np.maximum(np.abs(u), np.abs(v)), np.minimum(np.abs(u), np.abs(v))
        return np.maximum(far - 0.95, near - 0.33)
    r = np.sqrt(u * u + v * v)
    if shape == "ring":
        return np.abs(r - 0.7) - 0.28
    if shape == "flower":
        return r - 0.75 - 0.22 * np.cos(5 * np.arctan2(v, u))
    return r - 0.95


def _colours(surface: Surface, x: Float[np.ndarray, "..."], y: Float[np.ndarray, "..."]) -> Float[np.ndarray, "h w 3"]:
    """The surface's colour at places on it [heights]."""
    wave = 2 * math.pi / surface.period
    cos, sin = wave * math.cos(surface.angle), wave * math.sin(surface.angle)
    along, across = cos * x + sin * y + surface.phase, cos * y - sin * x
    if surface.texture == "striped":
        pattern = np.sin(along)
    elif surface.texture == "checked":
        pattern = 1.5 * np.sin(along) * np.sin(across)
    elif surface.texture == "dotted":
        pattern = 0.8 * (np.cos(along) + np.cos(across)) - 0.3
    else:
        pattern = np.sin(along + 1.5 * np.sin(across))
    # From the darker to the lighter shade, with soft edges.
    shade = _DARKER + (1 - _DARKER) * np.clip(0.5 + pattern, 0, 1)
    return shade[..., None] * np.array(COLOURS[surface.colour], np.float32)

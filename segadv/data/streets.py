"""Procedurally generated street scenes, written as PNG files in the layout and naming of Cityscapes.

A scene is a small world in metres (a curved street between houses and parks, with cars, people, poles,
signs and trees) seen through a pinhole camera: everything is drawn from far to near as flat polygons, once
in colour and once as label ids, at twice the final resolution. Texture, lighting, haze, shadows, blur and
sensor noise differ from scene to scene, so that no class is told by its colour alone.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..checks import at_least
from ..progress import progress_bar
from ..writing import atomic_write, is_leftover, write_text
from .files import require_pillow
from .sampler import seeded

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["generate_streets"]

_VERSION = 2  # of the scenes: another number means other bytes for the same arguments
_MANIFEST = "streets.json"
_CITIES = {
    "train": ("arbeiterstadt", "birkenfurt", "eschenhagen", "kieselbruck", "lindenau", "moorwerder"),
    "val": ("nebelheim", "tannroda", "weidenhof"),
}
_FRAME = 19  # Cityscapes labels the 20th frame of each snippet

# label ids of the official table
_EGO, _OUT_OF_ROI, _STATIC = 1, 3, 4
_ROAD, _SIDEWALK, _BUILDING, _WALL = 7, 8, 11, 12
_POLE, _LIGHT, _SIGN, _VEGETATION, _TERRAIN, _SKY = 17, 19, 20, 21, 22, 23
_PERSON, _CAR = 24, 26

_FAR = 90.0  # metres: where the street ends
_NEAR = 2.0  # metres: where things are cut off

# relative strength of the pixel-fine, the small-scale and the large-scale texture
_TEXTURE: dict[int, tuple[float, float, float]] = {
    _ROAD: (0.035, 0.02, 0.05),
    _SIDEWALK: (0.02, 0.05, 0.05),
    _BUILDING: (0.02, 0.035, 0.06),
    _WALL: (0.06, 0.06, 0.06),
    _VEGETATION: (0.12, 0.16, 0.10),
    _TERRAIN: (0.09, 0.07, 0.08),
    _PERSON: (0.03, 0.08, 0.0),
    _CAR: (0.0, 0.03, 0.05),
    _STATIC: (0.03, 0.05, 0.05),
    _EGO: (0.0, 0.0, 0.04),
}

Color = tuple[float, float, float]
Point = tuple[float, float, float]
Span = tuple[float, float]  # from, to

_FACADES: tuple[Color, ...] = (
    (0.72, 0.66, 0.55), (0.60, 0.40, 0.33), (0.55, 0.55, 0.56), (0.78, 0.75, 0.70), (0.70, 0.58, 0.42),
    (0.48, 0.36, 0.31), (0.62, 0.66, 0.68), (0.45, 0.47, 0.45), (0.66, 0.50, 0.46), (0.52, 0.56, 0.47),
)  # fmt: skip
_PAINTS: tuple[Color, ...] = (
    (0.80, 0.80, 0.80), (0.58, 0.60, 0.62), (0.15, 0.15, 0.17), (0.34, 0.35, 0.37), (0.55, 0.12, 0.11),
    (0.14, 0.22, 0.42), (0.68, 0.62, 0.50), (0.20, 0.34, 0.26), (0.42, 0.30, 0.22), (0.30, 0.42, 0.55),
)  # fmt: skip
_CLOTHES: tuple[Color, ...] = (
    (0.13, 0.13, 0.16), (0.20, 0.24, 0.36), (0.45, 0.16, 0.16), (0.60, 0.57, 0.50), (0.30, 0.30, 0.31),
    (0.25, 0.34, 0.24), (0.75, 0.72, 0.68), (0.62, 0.45, 0.16), (0.35, 0.20, 0.36), (0.18, 0.40, 0.46),
)  # fmt: skip
_SKINS: tuple[Color, ...] = ((0.85, 0.66, 0.54), (0.72, 0.52, 0.40), (0.48, 0.33, 0.25), (0.90, 0.72, 0.62))
_ROOFS: tuple[Color, ...] = ((0.46, 0.25, 0.19), (0.30, 0.29, 0.30), (0.38, 0.28, 0.23), (0.24, 0.25, 0.28))


def _mix(a: Sequence[float], b: Sequence[float], share: float) -> Color:
    return (a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share, a[2] + (b[2] - a[2]) * share)


def _scaled(color: Color, factor: float) -> Color:
    return (color[0] * factor, color[1] * factor, color[2] * factor)


def _array(values: npt.ArrayLike) -> npt.NDArray[np.float32]:
    return np.asarray(values, np.float32)


def _image(pixels: npt.NDArray[np.floating[Any]]) -> Image.Image:
    """The RGB image of float values in [0, 1], [H, W, 3]."""
    from PIL import Image

    return Image.fromarray((pixels * 255).clip(0, 255).astype(np.uint8))


def _halved(color: Image.Image, label: Image.Image) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Both at half the resolution: values in [0, 1], [H, W, 3], and ids.

    A pixel's label is that of the point about which its colour is a mean: else one would be shifted against the other.
    """
    from PIL import ImageFilter

    mean = ImageFilter.Kernel((3, 3), (1, 2, 1, 2, 4, 2, 1, 2, 1))
    pixels = np.divide(np.asarray(color.filter(mean))[1::2, 1::2], 255, dtype=np.float32)
    return pixels, np.asarray(label)[1::2, 1::2].copy()


class _Scene:
    """One scene. Coordinates in metres: x right of the street's centre line, y up, z away from the camera."""

    def __init__(self, generator: np.random.Generator, height: int, width: int) -> None:
        from PIL import Image, ImageDraw

        self.generator = generator
        self.height, self.width = 2 * height, 2 * width
        uniform = self.uniform
        # camera
        self.focal = uniform(0.72, 0.85) * self.width
        self.horizon = uniform(0.40, 0.50) * self.height
        self.vanishing = uniform(0.36, 0.64) * self.width
        self.camera_height = uniform(1.45, 1.9)
        self.bend = uniform(-1.0, 1.0) * 0.0017
        # street
        self.road = uniform(3.6, 5.4)  # half of its width
        self.edge = self.road + uniform(2.8, 4.8)  # outer edge of the pavement
        self.offset = -uniform(0.3, 0.55) * self.road  # of the centre line; we drive on the right
        # weather
        self.overcast = uniform(0.0, 1.0) < 0.4
        self.warmth = uniform(-0.05, 0.16)
        self.sun_side = 1.0 if uniform(0.0, 1.0) < 0.5 else -1.0
        self.shadow_length = uniform(0.35, 1.3)  # per metre of height
        self.shadow = 1.0 - (uniform(0.05, 0.15) if self.overcast else uniform(0.3, 0.5))
        haze = uniform(0.68, 0.88)
        self.haze = (haze + self.warmth * 0.5, haze, haze - self.warmth * 0.6)
        self.visibility = uniform(60.0, 260.0)
        self.zenith = (
            _mix((0.62, 0.65, 0.69), (0.78, 0.79, 0.80), uniform(0.0, 1.0))
            if self.overcast
            else _mix((0.30, 0.48, 0.74), (0.55, 0.68, 0.84), uniform(0.0, 1.0))
        )
        # canvas
        self.color = Image.new("RGB", (self.width, self.height))
        self.label = Image.new("L", (self.width, self.height), _SKY)
        self.shade = Image.new("L", (self.width, self.height))
        self.draw_color = ImageDraw.Draw(self.color)
        self.draw_label = ImageDraw.Draw(self.label)
        self.draw_shade = ImageDraw.Draw(self.shade)
        self.things: list[tuple[float, Callable[[], None]]] = []  # (distance, how to draw it)
        # what stands along each side of the street: z0, z1, height
        self.skyline: dict[float, list[tuple[float, float, float]]] = {-1.0: [], 1.0: []}

    # random numbers

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.generator.random()

    def chance(self, probability: float) -> bool:
        return self.generator.random() < probability

    def pick(self, colors: Sequence[Color]) -> Color:
        """One of the colours, slightly changed."""
        color = _scaled(colors[int(self.generator.random() * len(colors))], self.uniform(0.85, 1.15))
        return _mix(color, (self.uniform(0, 1), self.uniform(0, 1), self.uniform(0, 1)), 0.05)

    # geometry and drawing

    def project(self, x: float, y: float, z: float) -> tuple[float, float]:
        scale = self.focal / z
        return (
            self.vanishing + scale * (x + self.offset + self.bend * z * z),
            self.horizon + scale * (self.camera_height - y),
        )

    def lit(self, color: Color, z: float, light: float = 1.0) -> tuple[int, int, int]:
        """The colour as seen at distance z: lit, then hazy."""
        share = 1.0 - math.exp(-z / self.visibility)
        red, green, blue = _mix(_scaled(color, light), self.haze, share)
        return (
            max(0, min(255, int(255 * red))),
            max(0, min(255, int(255 * green))),
            max(0, min(255, int(255 * blue))),
        )

    def polygon(self, points: Iterable[Point], color: Color, label: int, light: float = 1.0) -> None:
        points = list(points)
        distance = sum(z for _, _, z in points) / len(points)
        corners = [self.project(*point) for point in points]
        self.draw_color.polygon(corners, fill=self.lit(color, distance, light))
        self.draw_label.polygon(corners, fill=label)

    def side(self, x: float, y: Span, z: Span, color: Color, label: int, light: float = 1.0) -> None:
        """A rectangle along the street."""
        self.polygon(((x, y[0], z[0]), (x, y[1], z[0]), (x, y[1], z[1]), (x, y[0], z[1])), color, label, light)

    def front(self, x: Span, y: Span, z: float, color: Color, label: int, light: float = 1.0) -> None:
        """A rectangle that faces the camera."""
        left, top = self.project(x[0], y[1], z)
        right, bottom = self.project(x[1], y[0], z)
        self.draw_color.rectangle((left, top, right, bottom), fill=self.lit(color, z, light))
        self.draw_label.rectangle((left, top, right, bottom), fill=label)

    def ellipse(self, center: Point, radii: tuple[float, float], color: Color, label: int) -> None:
        """An ellipse that faces the camera."""
        u, v = self.project(*center)
        scale = self.focal / center[2]
        box = (u - scale * radii[0], v - scale * radii[1], u + scale * radii[0], v + scale * radii[1])
        self.draw_color.ellipse(box, fill=self.lit(color, center[2]))
        self.draw_label.ellipse(box, fill=label)

    def visible_side(self, x0: float, x1: float, z0: float, z1: float) -> float | None:
        """Which side of a box the camera sees: its x."""
        if self.project(x0, 0, z1)[0] < self.project(x0, 0, z0)[0]:
            return x0
        if self.project(x1, 0, z1)[0] > self.project(x1, 0, z0)[0]:
            return x1
        return None

    def facing(self, outward: float) -> float:
        """Light on a wall whose normal points to `outward` (-1 left, 1 right)."""
        if self.overcast:
            return 0.92
        return 1.06 if outward == self.sun_side else 0.70

    def add(self, z: float, draw: Callable[..., None], *arguments: Any) -> None:
        self.things.append((z, partial(draw, *arguments)))

    def cast_shadow(self, x0: float, x1: float, z0: float, z1: float, height: float) -> None:
        """Marks the ground in the shade of a box: under it fully, beside it as the sun stands."""
        reach = -self.sun_side * self.shadow_length * height
        low, high = min(x0, x0 + reach), max(x1, x1 + reach)
        z0 = max(z0, _NEAR)
        if not self.overcast:
            self._shade(low, high, z0, z1 + 0.3 * abs(reach), int(255 * (1.0 - self.shadow)))
        self._shade(x0 - 0.1, x1 + 0.1, z0 - 0.15, z1, 130)

    def _shade(self, x0: float, x1: float, z0: float, z1: float, strength: int) -> None:
        corners = ((x0, 0.0, z0), (x1, 0.0, z0), (x1, 0.0, z1), (x0, 0.0, z1))
        self.draw_shade.polygon([self.project(*corner) for corner in corners], fill=strength)

    # the sides of the street

    def lay_out_sides(self) -> None:
        for side in (-1.0, 1.0):
            z = _FAR
            built = self.uniform(0.35, 0.85)
            while z > _NEAR:
                start = max(z - self.uniform(9.0, 20.0), _NEAR)
                if self.chance(built):
                    self.add_house(side, start, z)
                else:
                    self.add_park(side, start, z)
                z = start

    def add_house(self, side: float, z0: float, z1: float) -> None:
        height = self.uniform(5.5, 17.0)
        self.skyline[side].append((z0, z1, height))
        color, roof, frame = self.pick(_FACADES), self.pick(_ROOFS), self.pick(_FACADES)
        shop = self.pick(_CLOTHES) if self.chance(0.5) else color
        glass = _mix((0.16, 0.18, 0.21), self.zenith, self.uniform(0.0, 0.45))
        x = side * (self.edge + (self.uniform(0.0, 1.5) if self.chance(0.3) else 0.0))
        light = self.facing(-side)
        bays = max(2, round((z1 - z0) / self.uniform(2.4, 3.6)))
        span = (z1 - z0) / bays
        floors = max(2, round(height / 3.2))
        storey = height / floors
        top = height + (4.5 if self.chance(0.6) else 0.0)
        ridge, back = x + 4.5 * side, x + 9.0 * side

        def draw_roof() -> None:
            slope = ((x, height, z0), (x, height, z1), (ridge, top, z1), (ridge, top, z0))
            self.polygon(slope, roof, _BUILDING)

        def draw_gable() -> None:
            outline = ((x, 0.0, z0), (x, height, z0), (ridge, top, z0), (back, height, z0), (back, 0.0, z0))
            self.polygon(outline, color, _BUILDING, 0.8)

        def draw_bay(near: float, far: float, door: bool) -> None:
            # a trifle longer than the bay, so that no gap shows between two of them
            self.side(x, (0.0, height), (near, far + 0.2), color, _BUILDING, light)
            self.side(x, (0.0, storey), (near, far + 0.2), shop, _BUILDING, light)
            if span * self.focal * abs(x) / (near * far) < 3.0:
                return  # narrower than a pixel and a half: no windows to see
            left, right = near + 0.22 * span, far - 0.22 * span
            for floor in range(floors):
                low, high = (floor + 0.28) * storey, (floor + 0.82) * storey
                if floor == 0 and door:
                    low, high = 0.0, 0.75 * storey
                pane = _scaled(glass, self.uniform(0.75, 1.25))
                if self.chance(0.12):  # lit inside
                    pane = _mix(pane, (0.85, 0.75, 0.50), 0.6)
                if near < 30.0:
                    outer = (low - 0.15, high + 0.15)
                    self.side(x, outer, (left - 0.12, right + 0.12), frame, _BUILDING, light)
                self.side(x, (low, high), (left, right), pane, _BUILDING, light)

        if top > height:
            self.things.append((z1, draw_roof))
        for bay in range(bays):
            near = z0 + bay * span
            self.add(near + span, draw_bay, near, near + span, bay == bays // 2)
        self.things.append((z0, draw_gable))

    def add_park(self, side: float, z0: float, z1: float) -> None:
        self.skyline[side].append((z0, z1, 0.0))
        x = side * self.edge
        kind = self.generator.random()
        if kind < 0.65:
            self.add(z1, self.draw_wall, x, side, z0, z1, self.uniform(1.8, 3.2))
        elif kind < 0.85:
            self.add(z1, self.draw_hedge, x, side, z0, z1, self.uniform(0.8, 1.6))
        z = z1 - 1.0
        while z > max(z0, 5.0):
            self.add_tree(x + side * self.uniform(2.5, 7.0), z)
            z -= self.uniform(2.5, 6.0)

    def draw_wall(self, x: float, side: float, z0: float, z1: float, height: float) -> None:
        color, light = self.pick(_FACADES), self.facing(-side)
        self.side(x, (0.0, height), (z0, z1), color, _WALL, light)
        self.side(x, (height - 0.18, height), (z0, z1), _scaled(color, 1.2), _WALL, light)
        for course in range(1, int(height / 0.4)):
            y = (0.4 * course - 0.03, 0.4 * course + 0.03)
            self.side(x, y, (z0, min(z1, 25.0)), _scaled(color, 0.82), _WALL, light)

    def draw_hedge(self, x: float, side: float, z0: float, z1: float, height: float) -> None:
        color, back = self.leaf(), x + side
        self.side(x, (0.0, height), (z0, z1), color, _VEGETATION, self.facing(-side))
        top = ((x, height, z0), (x, height, z1), (back, height, z1), (back, height, z0))
        self.polygon(top, _scaled(color, 1.25), _VEGETATION)

    # trees

    def leaf(self) -> Color:
        return _mix((0.20, 0.30, 0.14), (0.42, 0.43, 0.20), self.uniform(0.0, 1.0))

    def add_tree(self, x: float, z: float) -> None:
        height = self.uniform(4.5, 9.0)
        self.cast_shadow(x - 0.2, x + 0.2, z - 0.2, z + 0.2, 0.4 * height)
        self.add(z, self.draw_tree, x, z, height, self.uniform(1.2, 2.3))

    def draw_tree(self, x: float, z: float, height: float, radius: float) -> None:
        bark, leaf = self.pick(((0.28, 0.22, 0.17), (0.36, 0.33, 0.30))), self.leaf()
        trunk = self.uniform(0.12, 0.2)
        self.front((x - trunk, x + trunk), (0.0, 0.6 * height), z, bark, _VEGETATION)
        blobs = 26 if z < 30.0 else 12
        self.ellipse((x, 0.68 * height, z), (0.75 * radius, 0.25 * height), _scaled(leaf, 0.7), _VEGETATION)
        for angle, distance, size, tone in self.generator.random((blobs, 4)).tolist():
            across = math.sqrt(distance) * math.cos(2 * math.pi * angle)
            up = math.sqrt(distance) * math.sin(2 * math.pi * angle)
            sunny = 0.0 if self.overcast else 0.15 * self.sun_side * across
            brightness = 0.65 + 0.4 * tone + 0.18 * up + sunny
            center = (x + radius * across, height * (0.68 + 0.32 * up), z)
            reach = radius * (0.28 + 0.22 * size)
            self.ellipse(center, (reach, 0.85 * reach), _scaled(leaf, brightness), _VEGETATION)

    # what stands on the pavement

    def lay_out_pavement(self) -> None:
        for side in (-1.0, 1.0):
            kerb = side * (self.road + 0.45)
            z = self.uniform(5.5, 11.0)
            lamps = self.chance(0.7)
            while z < 32.0:
                kind = self.generator.random()
                if lamps and kind < 0.4:
                    self.add_pole(kerb, z, self.uniform(5.5, 8.0))
                    self.add(z, self.draw_lamp, kerb, side, z)
                elif kind < 0.62:
                    self.add_sign(kerb + side * 0.3, max(z, 7.0))
                elif kind < 0.72:
                    self.add_tree(kerb + side * 0.4, max(z, 9.0))
                elif kind < 0.78:
                    self.add(z, self.draw_bin, kerb + side * 0.9, z)
                z += self.uniform(4.5, 9.0)
        if self.chance(0.5):
            z = self.uniform(8.0, 20.0)
            for side in (-1.0, 1.0):
                self.add_traffic_light(side * (self.road + 0.4), z)
        for _ in range(int(self.uniform(3.0, 10.0))):
            side = 1.0 if self.chance(0.5) else -1.0
            x = side * self.uniform(self.road + 0.5, self.edge - 0.3)
            self.add_person(x, 5.5 + 16.0 * self.uniform(0.0, 1.0) ** 2)
        if self.chance(0.4):  # crossing the road
            self.add_person(self.uniform(-self.road, self.road), self.uniform(6.0, 16.0))

    def add_pole(self, x: float, z: float, height: float) -> None:
        self.cast_shadow(x - 0.1, x + 0.1, z - 0.1, z + 0.1, height)
        self.add(z, self.draw_pole, x, z, height, self.pole_color())

    def pole_color(self) -> Color:
        return self.pick(((0.50, 0.52, 0.53), (0.30, 0.32, 0.32), (0.62, 0.62, 0.60), (0.22, 0.28, 0.25)))

    def draw_pole(self, x: float, z: float, height: float, color: Color) -> None:
        radius = max(0.15, 0.009 * z)  # no thinner than a few pixels far away
        self.front((x - radius, x + radius), (0.0, height), z, color, _POLE)
        self.front((x, x + radius), (0.0, height), z, color, _POLE, 0.7)
        self.front((x - 1.5 * radius, x + 1.5 * radius), (0.0, 0.9), z, color, _POLE, 0.85)

    def draw_lamp(self, x: float, side: float, z: float) -> None:
        height = self.uniform(5.2, 6.2)
        end = x - side * 1.6
        arm = (height, height + 0.18)
        self.front((min(x, end), max(x, end)), arm, z, (0.35, 0.36, 0.37), _POLE)
        self.front((end - 0.35, end + 0.35), (height - 0.12, height + 0.12), z, (0.72, 0.72, 0.70), _POLE)

    def draw_bin(self, x: float, z: float) -> None:
        color = self.pick(_PAINTS)
        self.front((x - 0.35, x + 0.35), (0.0, 1.1), z, color, _STATIC)
        self.front((x - 0.4, x + 0.4), (1.0, 1.2), z, _scaled(color, 0.7), _STATIC)

    def add_sign(self, x: float, z: float) -> None:
        height = self.uniform(2.5, 3.4)
        self.add_pole(x, z, height)
        self.add(z - 0.05, self.draw_sign, x, z, height)

    def draw_sign(self, x: float, z: float, height: float) -> None:
        red, blue = (0.70, 0.10, 0.10), (0.10, 0.25, 0.58)
        white, yellow = (0.86, 0.86, 0.84), (0.85, 0.68, 0.12)
        radius = self.uniform(0.38, 0.52) + 0.008 * z
        kind = int(self.generator.random() * 5)
        if kind == 0:  # prohibition
            self.ellipse((x, height, z), (radius, radius), red, _SIGN)
            self.ellipse((x, height, z), (0.7 * radius, 0.7 * radius), white, _SIGN)
        elif kind == 1:  # mandatory
            self.ellipse((x, height, z), (radius, radius), blue, _SIGN)
            bar = (height - 0.5 * radius, height + 0.5 * radius)
            self.front((x - 0.12, x + 0.12), bar, z, white, _SIGN)
        elif kind == 2:  # warning
            for r, color in ((1.15 * radius, red), (0.7 * radius, white)):
                base = height - 0.6 * r
                self.polygon(((x - r, base, z), (x + r, base, z), (x, height + r, z)), color, _SIGN)
        elif kind == 3:  # priority
            for r, color in ((1.2 * radius, white), (0.8 * radius, yellow)):
                diamond = ((x - r, height, z), (x, height + r, z), (x + r, height, z), (x, height - r, z))
                self.polygon(diamond, color, _SIGN)
        else:  # parking, or a street's name
            wide = radius * self.uniform(0.8, 1.7)
            plate = (height - radius, height + radius)
            self.front((x - wide, x + wide), plate, z, self.pick((blue, white, yellow)), _SIGN)
            text = (height - 0.12, height + 0.3 * radius)
            self.front((x - 0.6 * wide, x + 0.6 * wide), text, z, white, _SIGN, 0.9)

    def add_traffic_light(self, x: float, z: float) -> None:
        self.add_pole(x, z, 3.4)
        self.add(z - 0.05, self.draw_traffic_light, x, z)

    def draw_traffic_light(self, x: float, z: float) -> None:
        half, low, high = 0.34, 2.3, 4.2
        self.front((x - half, x + half), (low, high), z, (0.09, 0.10, 0.10), _LIGHT)
        burning = int(self.generator.random() * 3)
        for lamp, color in enumerate(((0.15, 0.85, 0.45), (0.95, 0.70, 0.10), (0.95, 0.15, 0.10))):
            y = low + (high - low) * (lamp + 0.5) / 3
            self.ellipse((x, y, z), (0.22, 0.25), color if lamp == burning else _scaled(color, 0.22), _LIGHT)

    def add_person(self, x: float, z: float) -> None:
        self.cast_shadow(x - 0.25, x + 0.25, z - 0.15, z + 0.15, 1.7)
        self.add(z, self.draw_person, x, z)

    def draw_person(self, x: float, z: float) -> None:
        size = self.uniform(1.6, 1.95)
        top, trousers, skin = self.pick(_CLOTHES), self.pick(_CLOTHES), self.pick(_SKINS)
        hair = self.pick(((0.12, 0.09, 0.07), (0.35, 0.24, 0.14)))
        broad, stride = self.uniform(0.25, 0.33), self.uniform(0.04, 0.26)
        swing = self.uniform(-0.12, 0.12)

        def limb(start: tuple[float, float], end: tuple[float, float], wide: float, color: Color) -> None:
            """A tapering strip; points are metres across and shares of the body's height."""
            (x0, y0), (x1, y1), narrow = start, end, 0.8 * wide
            outline = ((x0 - wide, y0), (x0 + wide, y0), (x1 + narrow, y1), (x1 - narrow, y1))
            self.polygon([(x + across, up * size, z) for across, up in outline], color, _PERSON)

        for foot, light in ((-stride, 0.8), (stride, 1.0)):
            limb((0.0, 0.52), (foot, 0.0), 0.12, _scaled(trousers, light))
        for shoulder in (-broad, broad):
            limb((shoulder, 0.82), (1.2 * shoulder + swing, 0.47), 0.07, _scaled(top, 0.85))
        limb((0.0, 0.83), (0.0, 0.46), broad, top)
        if self.chance(0.3):  # a bag
            limb((broad + 0.1, 0.6), (broad + 0.1, 0.42), 0.1, self.pick(_PAINTS))
        self.ellipse((x, 0.93 * size, z), (0.13, 0.15), hair, _PERSON)
        self.ellipse((x, 0.915 * size, z), (0.11, 0.13), skin, _PERSON)

    # vehicles

    def lay_out_vehicles(self) -> None:
        for side in (-1.0, 1.0):
            parking = self.uniform(0.0, 0.85) if self.chance(0.75) else 0.0
            z = self.uniform(3.5, 9.0)
            while z < 60.0:
                if self.chance(parking):
                    self.add_car(side * (self.road - 1.05), z, away=side > 0)
                z += self.uniform(5.3, 7.5)
        if self.chance(0.65):
            self.add_car(0.42 * self.road, self.uniform(11.0, 40.0), away=True)
        if self.chance(0.6):
            self.add_car(-0.40 * self.road, self.uniform(10.0, 45.0), away=False)

    def add_car(self, x: float, z: float, *, away: bool) -> None:
        length, height = self.uniform(3.8, 4.7), self.uniform(1.4, 1.9)
        self.cast_shadow(x - 0.9, x + 0.9, z, z + length, height)
        self.add(z, self.draw_car, x, z, length, height, away)

    def draw_car(self, x: float, z: float, length: float, height: float, away: bool) -> None:
        paint = self.pick(_PAINTS)
        x0, x1 = x - 0.9, x + 0.9
        belt = 0.62 * height
        glass = _mix((0.08, 0.10, 0.12), self.zenith, self.uniform(0.1, 0.5))
        tyre = (0.06, 0.06, 0.07)
        hood = 0.26 if self.chance(0.7) else 0.08  # share of the length in front of the windscreen
        # where the cabin begins and ends, from the end of the car that faces us
        near, far = (0.06, 1.0 - hood) if away else (hood, 0.94)

        side = self.visible_side(x0, x1, z, z + length)
        if side is not None:
            light = 0.9 * self.facing(-1.0 if side == x0 else 1.0)

            def profile(color: Color, *outline: tuple[float, float]) -> None:
                """Points are shares of the length and metres of height."""
                self.polygon([(side, y, z + length * along) for along, y in outline], color, _CAR, light)

            sill, low, upper = 0.28, belt - 0.1, height - 0.1
            profile(paint, (0, sill), (0, low), (near, belt), (far, belt), (1, low), (1, sill))
            profile(paint, (near, belt), (near + 0.1, height), (far - 0.12, height), (far, belt))
            profile(glass, (near + 0.05, belt), (near + 0.12, upper), (far - 0.14, upper), (far - 0.05, belt))
            pillar = (near + far) / 2
            profile(paint, (pillar, belt), (pillar, upper), (pillar + 0.02, upper), (pillar + 0.02, belt))
            circle = [(math.cos(step * math.pi / 4), math.sin(step * math.pi / 4)) for step in range(8)]
            for wheel in (0.19, 0.8):
                for radius, color in ((0.33, tyre), (0.19, (0.42, 0.43, 0.44))):
                    profile(color, *((wheel + radius / length * a, 0.33 + radius * b) for a, b in circle))

        light = 0.85 if self.overcast else 0.8
        for left in (x0 + 0.02, x1 - 0.24):
            self.front((left, left + 0.22), (0.0, 0.35), z + 0.1, tyre, _CAR)
        self.front((x0, x1), (0.28, belt - 0.08), z, paint, _CAR, light)

        def across(color: Color, light: float, low: Point, high: Point) -> None:
            """A strip over the car's width between two edges: distance from the car's side, height, depth."""
            (in0, y0, z0), (in1, y1, z1) = low, high
            outline = ((x0 + in0, y0, z0), (x0 + in1, y1, z1), (x1 - in1, y1, z1), (x1 - in0, y0, z0))
            self.polygon(outline, color, _CAR, light)

        step, top = z + near * length, z + (near + 0.1) * length
        across(paint, 1.1 * light, (0.0, belt - 0.08, z), (0.0, belt, step))  # bonnet, or boot
        across(paint, light, (0.0, belt, step), (0.14, height, top))
        across(glass, 1.0, (0.1, belt + 0.03, step), (0.22, height - 0.1, top))
        self.front((x0, x1), (0.28, 0.48), z, _mix(paint, (0.1, 0.1, 0.1), 0.7), _CAR)  # bumper
        lamp = (0.62, 0.07, 0.06) if away else (0.88, 0.88, 0.82)
        for left in (x0 + 0.03, x1 - 0.36):
            self.front((left, left + 0.33), (belt - 0.32, belt - 0.12), z, lamp, _CAR)
        self.front((x - 0.26, x + 0.26), (0.5, 0.62), z, (0.82, 0.82, 0.78), _CAR)  # plate

    # ground, sky, picture

    def draw_background(self) -> None:
        from PIL import Image, ImageFilter

        first = int(self.horizon) + 1
        self.color.paste(self.sky(first // 2 + 1).resize((self.width, 2 * (first // 2 + 1))))
        rows = np.arange(first, self.height, dtype=np.float32)[:, None] + 0.5
        columns = np.arange(self.width, dtype=np.float32) + 0.5

        # each row has one distance z, each pixel its x
        z = (self.focal * self.camera_height / (rows - self.horizon)).clip(0.5 * _NEAR, 4 * _FAR)
        x = (columns - self.vanishing) * (z / self.focal) - self.offset - self.bend * z * z
        away = np.abs(x)
        asphalt = self.pick(((0.36, 0.36, 0.37), (0.44, 0.43, 0.42), (0.30, 0.30, 0.32)))
        paving = self.pick(((0.47, 0.46, 0.44), (0.42, 0.42, 0.43), (0.52, 0.48, 0.44)))
        grass = _mix((0.28, 0.36, 0.16), (0.45, 0.42, 0.24), self.uniform(0.0, 1.0))
        markings = _mix(asphalt, (0.85, 0.85, 0.83), self.uniform(0.35, 0.9))
        kerb = _scaled(paving, 1.18)
        colors = _array((asphalt, paving, grass, markings, kerb))
        kind = np.full(x.shape, 2, np.uint8)
        kind[away < self.edge] = 1
        if self.chance(0.4):
            kind[away < self.road + self.uniform(1.3, 2.0)] = 2  # a green strip along the kerb
        kind[away < self.road + 0.22] = 4
        road = away < self.road
        kind[road] = 0
        phase = self.uniform(0.0, 6.0)
        line = (away < 0.09) & (((z + phase) % 6.0) < 3.0) if self.chance(0.6) else away < 0.09
        if self.chance(0.5):
            line |= np.abs(away - (self.road - 0.25)) < 0.07
        if self.chance(0.35):  # zebra crossing
            start = self.uniform(6.0, 18.0)
            line |= (z > start) & (z < start + 3.0) & (away < self.road - 0.3) & (x - np.floor(x) < 0.5)
        kind[line & road] = 3
        ids = np.array((_ROAD, _SIDEWALK, _TERRAIN, _ROAD, _SIDEWALK), np.uint8)
        self.label.paste(Image.fromarray(ids.take(kind)), (0, first))

        # worn asphalt and paving stones, fixed to the ground
        grain = self.generator.standard_normal((128, 128), np.float32) * 0.045
        patches = self.noise(128, 128, 12) * 0.05
        fine = ((z * 5).astype(np.intp) & 127) * 128 + ((x * 14).astype(np.intp) & 127)
        coarse = ((z * 1.5).astype(np.intp) & 127) * 128 + ((x * 4).astype(np.intp) & 127)
        shade = 1 + grain.take(fine) + patches.take(coarse)
        stone = self.uniform(0.45, 0.9)
        across = x * (1 / stone)
        joints = ((across - np.floor(across) < 0.07) | (z % stone < 0.08)) & (kind == 1) & (z < 25.0)
        shade -= np.float32(0.16) * joints
        if not self.overcast:
            shade *= self.building_shadow(x, z[:, 0])
        transmission = np.exp(-z / self.visibility)[..., None]
        ground = colors.take(kind, axis=0)
        ground *= shade[..., None] * transmission
        ground += _array(self.haze) * (1 - transmission)
        self.color.paste(_image(ground), (0, first))
        self.color.paste(0, mask=self.shade.filter(ImageFilter.BoxBlur(self.height / 200)))
        self.draw_horizon()

    def sky(self, height: int) -> Image.Image:
        """Gradient and clouds at half the canvas' resolution."""
        width = self.width // 2
        cloud = self.noise(height, width, self.height // 10)
        cloud = cloud + 0.5 * self.noise(height, width, self.height // 24)
        share = (np.arange(height, dtype=np.float32)[:, None, None] / height) ** 1.5
        sky = _array(self.zenith) * (1 - share) + _array(self.haze) * share
        density = (0.8 * (cloud + self.uniform(-0.6, 1.2))).clip(0.0, 1.0)[..., None]
        white = _array(_mix(self.haze, (0.95, 0.95, 0.95), 0.6))
        return _image(sky + (white - sky) * (density * np.float32(0.35 if self.overcast else 0.8)))

    def building_shadow(self, x: npt.NDArray[np.float32], z: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Brightness of the ground beside the houses that stand between it and the sun."""
        height = np.zeros_like(z)
        for z0, z1, lot in self.skyline[self.sun_side]:
            height[(z >= z0 - 2.0) & (z < z1 - 2.0)] = lot
        edge = self.edge - height * self.shadow_length
        return np.where(self.sun_side * x > edge[:, None], np.float32(self.shadow), np.float32(1.0))

    def draw_horizon(self) -> None:
        """Trees and houses where the street ends."""
        left = 0.0
        while left < self.width:
            right = left + self.uniform(0.03, 0.12) * self.width
            house = self.chance(0.5)
            top = self.horizon - self.uniform(0.02, 0.12) * self.height
            color = self.lit(self.pick(_FACADES) if house else self.leaf(), _FAR, 0.9)
            if house:
                box = (left, top, right, self.horizon + 2)
                self.draw_color.rectangle(box, fill=color)
                self.draw_label.rectangle(box, fill=_BUILDING)
            else:
                drop = 2 * self.horizon - top
                box = (left - 0.03 * self.width, top, right + 0.03 * self.width, drop)
                self.draw_color.pieslice(box, 180, 360, fill=color)
                self.draw_label.pieslice(box, 180, 360, fill=_VEGETATION)
            left = right

    def noise(self, height: int, width: int, cell: int) -> npt.NDArray[np.float32]:
        """Smooth noise [height, width], variance 1 at its nodes, with features of about `cell` pixels."""
        from PIL import Image

        cell = max(cell, 1)
        nodes = self.generator.standard_normal((height // cell + 2, width // cell + 2), np.float32)
        if cell == 1:
            return nodes[:height, :width]
        rows, columns = height / cell, width / cell
        resized = Image.fromarray(nodes).resize(
            (width, height), Image.Resampling.BICUBIC, (0.5, 0.5, columns + 0.5, rows + 0.5)
        )
        return np.asarray(resized)

    def render(self) -> tuple[Image.Image, Image.Image]:
        """The finished picture (RGB) and its label ids (L)."""
        self.lay_out_sides()
        self.lay_out_pavement()
        self.lay_out_vehicles()
        self.draw_background()
        for _, draw in sorted(self.things, key=lambda thing: -thing[0]):
            draw()
        return self.develop()

    def develop(self) -> tuple[Image.Image, Image.Image]:
        """Halves the resolution and adds what the camera adds."""
        from PIL import Image, ImageFilter

        height, width = self.height // 2, self.width // 2
        pixels, label = _halved(self.color, self.label)
        scale = height / 160

        amplitudes = np.zeros((256, 3), np.float32)
        for label_id, strength in _TEXTURE.items():
            amplitudes[label_id] = strength
        texture = np.ones((height, width), np.float32)
        for octave, cell in enumerate((1.0, 3.0 * scale, 14.0 * scale)):
            texture += amplitudes[label, octave] * self.noise(height, width, round(cell))
        pixels *= texture[..., None]

        # the bonnet of our own car, and the borders that rectification leaves unlabelled
        top = height - height // 9
        columns = (np.arange(width, dtype=np.float32) / width - self.uniform(0.45, 0.55)) * 2
        depth = np.arange(top - height, 0, dtype=np.float32)[:, None] / height + 0.09
        bonnet = depth > 0.09 - self.uniform(0.045, 0.09) * (1.0 - 0.55 * columns**2)
        paint = _array(self.pick(_PAINTS)) * 0.7 + _array(self.zenith) * 0.25
        reflection = np.broadcast_to(0.3 + 5 * depth.clip(0.0), bonnet.shape)[bonnet]
        pixels[top:][bonnet] = paint * reflection[:, None]
        label[top:][bonnet] = _EGO
        border = max(2, round(height / 64))
        for strip in (np.s_[:border], np.s_[-border:], np.s_[:, :border], np.s_[:, -border:]):
            label[strip] = _OUT_OF_ROI

        # light and lens
        rows = np.arange(height, dtype=np.float32)[:, None] / height - 0.5
        vignette = 1 - np.float32(self.uniform(0.0, 0.5)) * (rows**2 + 0.25 * columns**2)
        gain = self.uniform(0.8, 1.2)
        pixels *= _array((1 + self.warmth, 1.0, 1 - self.warmth)) * np.float32(gain)
        grey = ((pixels[..., 0] + pixels[..., 1] + pixels[..., 2]) * np.float32(1 / 3))[..., None]
        pixels -= grey
        pixels *= np.float32(self.uniform(0.6, 1.15))
        pixels += grey
        pixels *= vignette[..., None]
        contrast = self.uniform(0.85, 1.25)
        curve = [round(255 * (value / 255) ** contrast) for value in range(256)]
        blur = ImageFilter.GaussianBlur(self.uniform(0.0, 0.7) * scale)
        image = _image(pixels).filter(blur).point(curve * 3)
        grain = self.generator.standard_normal((height, width, 3), np.float32)
        grain *= self.uniform(0.006, 0.02)
        grain += np.asarray(image, np.float32) * np.float32(1 / 255)
        return _image(grain), Image.fromarray(label)


# files


def _scene_id(split: str, index: int) -> tuple[str, str]:
    """City and name of a scene: they depend on its index alone, so that more images only add files."""
    cities = _CITIES[split]
    sequence, city = divmod(index, len(cities))
    return cities[city], f"{cities[city]}_{sequence:06d}_{_FRAME:06d}"


def _image_path(root: Path, split: str, index: int) -> Path:
    city, identity = _scene_id(split, index)
    return root / "leftImg8bit" / split / city / f"{identity}_leftImg8bit.png"


def _label_path(root: Path, split: str, index: int) -> Path:
    city, identity = _scene_id(split, index)
    return root / "gtFine" / split / city / f"{identity}_gtFine_labelIds.png"


def _origin(split: str, index: int, size: tuple[int, int], seed: int) -> str:
    """Stands in every file and says which scene it shows, so that no other file is taken for it."""
    return f"segadv streets {_VERSION}: seed {seed}, {split} {index}, {size[0]} x {size[1]}"


def _write_png(path: Path, image: Image.Image, origin: str) -> None:
    from PIL.PngImagePlugin import PngInfo

    comment = PngInfo()
    comment.add_text("Comment", origin)
    with atomic_write(path) as temporary:
        image.save(temporary, "PNG", compress_level=3, pnginfo=comment)


def _is_ours(path: Path, origin: str) -> bool:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.info.get("Comment") == origin
    except (OSError, ValueError):
        return False


def _is_cut_short(path: Path) -> bool:
    """Whether the end of a PNG file is missing."""
    return not path.read_bytes()[-12:].endswith(b"IEND\xaeB`\x82")


def _draw_scene(size: tuple[int, int], seed: int, split: str, index: int) -> tuple[Image.Image, Image.Image]:
    return _Scene(seeded(seed, list(_CITIES).index(split), index), *size).render()


def _check_manifest(root: Path, arguments: dict[str, Any]) -> None:
    path = root / _MANIFEST
    if not path.exists():
        return
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise FileExistsError(f"{path} exists and was not written by this generator: {error}") from error
    if found != arguments:
        raise FileExistsError(
            f"root {str(root)!r} holds street scenes of other arguments and is left as it is: found {found}, "
            f"asked for {arguments}; choose another folder or delete this one"
        )


def _foreign_file(root: Path, expected: set[Path]) -> Path | None:
    for layer in ("leftImg8bit", "gtFine"):
        for folder, _, names in os.walk(root / layer):
            for name in names:
                path = Path(folder, name)
                if path not in expected and not is_leftover(path):
                    return path
    return None


def generate_streets(
    root: str | os.PathLike[str],
    *,
    train: int = 200,
    val: int = 48,
    size: tuple[int, int] = (160, 320),
    seed: int = 0,
) -> Path:
    """Writes street scenes as PNG files in the layout of Cityscapes; `Cityscapes(root, "train")` reads them.

    ``leftImg8bit/<split>/<city>/<id>_leftImg8bit.png`` (RGB) and
    ``gtFine/<split>/<city>/<id>_gtFine_labelIds.png`` (label ids of the official table; border and bonnet are
    unlabelled), with <id> = <city>_<sequence>_<frame>, and last the manifest ``streets.json``.

    A scene depends on (seed, split, index, size) alone: the same bytes in any order and for any number of
    images. A complete tree of the same arguments is used as it is, an interrupted one is completed, and
    nothing is ever overwritten.

    Args:
        root: folder, made where it is missing.
        train, val: number of images of each split.
        size: (height, width) in pixels, each at least 64.
        seed: non-negative.

    Returns:
        root, as a Path.

    Raises:
        FileExistsError: root holds scenes of other arguments, or other files where the scenes belong.
        ValueError: an argument out of range.
        ImportError: Pillow is missing.
    """
    require_pillow()
    at_least(0, train=train, val=val, seed=seed)
    height, width = size
    if min(height, width) < 64:
        raise ValueError(f"size must be (height, width) with both at least 64, got {size}")
    root = Path(root)
    arguments = {
        "generator": "segadv streets",
        "version": _VERSION,
        "train": train,
        "val": val,
        "size": [height, width],
        "seed": seed,
    }
    _check_manifest(root, arguments)
    scenes = [("train", index) for index in range(train)] + [("val", index) for index in range(val)]
    paths = {scene: (_image_path(root, *scene), _label_path(root, *scene)) for scene in scenes}
    foreign = _foreign_file(root, {path for pair in paths.values() for path in pair})
    if foreign is not None:
        raise FileExistsError(f"root {str(root)!r} holds files that do not belong to these scenes, such as {foreign}")

    missing = []
    for scene, pair in paths.items():
        present = [path for path in pair if path.exists()]
        for path in present:
            if not _is_ours(path, _origin(*scene, (height, width), seed)):
                raise FileExistsError(f"{path} exists and is not the scene asked for; it is left as it is")
            if _is_cut_short(path):
                raise FileExistsError(f"{path} is cut short; delete it, and the same call draws it again")
        if len(present) < 2:
            missing.append(scene)
    with progress_bar("street scenes", total=len(missing), unit="image", show=sys.stderr.isatty()) as bar:
        for scene in missing:
            for path, picture in zip(paths[scene], _draw_scene((height, width), seed, *scene), strict=True):
                if not path.exists():
                    _write_png(path, picture, _origin(*scene, (height, width), seed))
            bar.update()
    if missing or not (root / _MANIFEST).exists():
        write_text(root / _MANIFEST, json.dumps(arguments, indent=2) + "\n")
    return root

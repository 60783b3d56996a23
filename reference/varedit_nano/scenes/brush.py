"""A thin layer over skia: shaded, outlined shapes in the units of the scene."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import skia

from varedit_nano.scenes.palette import BLACK, Rgb, darker, lighter
from varedit_nano.scenes.scene import Look

Point = tuple[float, float]


class Brush:
    """A brush on a canvas. Nested `placed` blocks give each thing its own coordinates."""

    def __init__(self, canvas: skia.Canvas, look: Look) -> None:
        self._canvas = canvas
        self._look = look
        self._scale = 1.0

    @contextmanager
    def placed(self, x: float, y: float, scale: float, stretch: float = 1.0) -> Iterator[None]:
        """Move the origin to (x, y) and set the unit of length to `scale`, in x times `stretch`."""
        outer = self._scale
        self._canvas.save()
        self._canvas.translate(x, y)
        self._canvas.scale(scale * stretch, scale)
        self._scale = outer * scale
        try:
            yield
        finally:
            self._canvas.restore()
            self._scale = outer

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: Rgb) -> None:
        self._solid(skia.Path.Oval(skia.Rect(x - rx, y - ry, x + rx, y + ry)), colour)

    def box(
        self,
        left: float,
        top: float,
        right: float,
        bottom: float,
        colour: Rgb,
        radius: float = 0.0,
    ) -> None:
        rect = skia.Rect(left, top, right, bottom)
        self._solid(skia.Path.RRect(rect, radius, radius), colour)

    def polygon(self, points: Sequence[Point], colour: Rgb) -> None:
        self._solid(skia.Path.Polygon([skia.Point(*point) for point in points], True), colour)

    def blob(self, points: Sequence[Point], colour: Rgb) -> None:
        """Draw a closed smooth shape that the points pull outwards."""
        self._solid(_smooth(points), colour)

    def limb(self, points: Sequence[Point], width: float, colour: Rgb) -> None:
        """Draw a thick, outlined curve with round ends from the first point to the last."""
        path = _curve(points)
        if self._look.outline:
            edge = width + 2 * self._look.outline / self._scale
            self._canvas.drawPath(path, _stroke(darker(colour, 0.55), edge))
        self._canvas.drawPath(path, _stroke(colour, width))

    def dot(self, x: float, y: float, rx: float, ry: float, colour: Rgb, alpha: float = 1) -> None:
        """Draw a flat ellipse without outline, for details."""
        self._canvas.drawOval(skia.Rect(x - rx, y - ry, x + rx, y + ry), _flat(colour, alpha))

    def patch(self, points: Sequence[Point], colour: Rgb, alpha: float = 1) -> None:
        """Draw a flat polygon without outline, for details."""
        path = skia.Path.Polygon([skia.Point(*point) for point in points], True)
        self._canvas.drawPath(path, _flat(colour, alpha))

    def line(self, points: Sequence[Point], width: float, colour: Rgb) -> None:
        """Draw a curve with round ends and without outline, for details."""
        self._canvas.drawPath(_curve(points), _stroke(colour, width))

    def gradient(
        self, left: float, top: float, right: float, bottom: float, upper: Rgb, lower: Rgb
    ) -> None:
        """Fill a rectangle with a gradient from one colour at the top to another at the bottom."""
        ends = [skia.Point(0, top), skia.Point(0, bottom)]
        shader = skia.GradientShader.MakeLinear(ends, [_argb(upper), _argb(lower)])
        rect = skia.Rect(left, top, right, bottom)
        self._canvas.drawRect(rect, skia.Paint(Shader=shader, Dither=False))

    def glow(self, x: float, y: float, rx: float, ry: float, colour: Rgb, alpha: float) -> None:
        """Draw an ellipse that fades out towards its edge: a shadow, a halo, a faint texture."""
        self._canvas.save()
        self._canvas.translate(x, y)
        self._canvas.scale(rx, ry)
        shader = skia.GradientShader.MakeRadial(
            skia.Point(0, 0),
            1,
            [_argb(colour, alpha), _argb(colour, 0.7 * alpha), _argb(colour, 0)],
        )
        self._canvas.drawCircle(0, 0, 1, skia.Paint(AntiAlias=True, Shader=shader))
        self._canvas.restore()

    def shadow(self, width: float) -> None:
        """Draw the ground shadow of a thing that stands at the origin."""
        self.glow(-0.15 * width * self._look.light, 0, width, 0.22 * width, BLACK, 0.42)

    def _solid(self, path: skia.Path, colour: Rgb) -> None:
        self._canvas.drawPath(path, self._shaded(path.getBounds(), colour))
        if self._look.outline:
            width = self._look.outline / self._scale
            self._canvas.drawPath(path, _stroke(darker(colour, 0.55), width))

    def _shaded(self, bounds: skia.Rect, colour: Rgb) -> skia.Paint:
        middle, lean = bounds.centerX(), 0.4 * self._look.light * bounds.width()
        ends = [skia.Point(middle + lean, bounds.top()), skia.Point(middle - lean, bounds.bottom())]
        tones = [
            _argb(lighter(colour, 0.32 * self._look.shade)),
            _argb(colour),
            _argb(darker(colour, 0.28 * self._look.shade)),
        ]
        return skia.Paint(AntiAlias=True, Shader=skia.GradientShader.MakeLinear(ends, tones))


def _argb(colour: Rgb, alpha: float = 1.0) -> int:
    red, green, blue = colour
    return (
        int(255 * alpha + 0.5) << 24
        | int(255 * red + 0.5) << 16
        | int(255 * green + 0.5) << 8
        | int(255 * blue + 0.5)
    )


def _flat(colour: Rgb, alpha: float = 1.0) -> skia.Paint:
    return skia.Paint(AntiAlias=True, Color=_argb(colour, alpha))


def _stroke(colour: Rgb, width: float) -> skia.Paint:
    return skia.Paint(
        AntiAlias=True,
        Color=_argb(colour),
        Style=skia.Paint.kStroke_Style,
        StrokeWidth=width,
        StrokeCap=skia.Paint.kRound_Cap,
        StrokeJoin=skia.Paint.kRound_Join,
    )


def _curve(points: Sequence[Point]) -> skia.Path:
    """Return a straight line for two points, or for three a quadratic curve bent by the middle."""
    path = skia.Path()
    path.moveTo(*points[0])
    if len(points) == 3:
        path.quadTo(*points[1], *points[2])
    else:
        for point in points[1:]:
            path.lineTo(*point)
    return path


def _smooth(points: Sequence[Point]) -> skia.Path:
    """Return a closed curve: quadratic pieces between the middles of the polygon's sides."""
    path = skia.Path()
    (x0, y0), (x1, y1) = points[-1], points[0]
    path.moveTo((x0 + x1) / 2, (y0 + y1) / 2)
    for (x, y), (nx, ny) in zip(points, [*points[1:], points[0]], strict=True):
        path.quadTo(x, y, (x + nx) / 2, (y + ny) / 2)
    path.close()
    return path

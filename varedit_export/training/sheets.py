"""Contact sheets: many pictures with captions in one."""

from collections.abc import Sequence
from textwrap import wrap

import numpy as np
from PIL import Image, ImageDraw

GAP, LINE = 4, 12


def contact_sheet(
    rows: Sequence[Sequence[np.ndarray]], captions: Sequence[str] = (), columns: int = 1
) -> Image.Image:
    """Draw rows of pictures uint8 [H, W, 3] with captions above; `columns` rows share a line."""
    height, width = rows[0][0].shape[:2]
    row_width = len(rows[0]) * (width + GAP) + GAP
    letters = row_width // 7
    texts = [wrap(caption, letters)[:2] for caption in captions] or [[] for _ in rows]
    caption_height = LINE * max(len(text) for text in texts)
    row_height = height + caption_height + GAP
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * row_width, lines * row_height + GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (row, text) in enumerate(zip(rows, texts, strict=True)):
        line, column = divmod(index, columns)
        x, y = column * row_width + GAP, line * row_height + GAP
        pen.multiline_text((x, y - 2), "\n".join(text), fill="black", spacing=1)
        for place, picture in enumerate(row):
            sheet.paste(Image.fromarray(picture), (x + place * (width + GAP), y + caption_height))
    return sheet

"""Pictures side by side, with captions and a detail of each below it."""

from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

COLUMNS = 3
WIDTH, MARGIN, LINE = 450, 12, 26  # in pixels: width of a panel, distance of panels, height of a line of text


class Panel(NamedTuple):
    """A picture and its caption."""

    caption: str
    image: Image.Image


class Block(NamedTuple):
    """Pictures of one size below a title.

    box: the detail that is shown enlarged: left, top, right, bottom, relative to the sides.
    """

    title: str
    panels: list[Panel]
    box: tuple[float, float, float, float]


def draw(blocks: list[Block]) -> Image.Image:
    """Returns all blocks below each other."""
    sheets = [_draw_block(block) for block in blocks]
    page = Image.new("RGB", (sheets[0].width, sum(sheet.height for sheet in sheets)), "white")
    top = 0
    for sheet in sheets:
        page.paste(sheet, (0, top))
        top += sheet.height
    return page


def _draw_block(block: Block) -> Image.Image:
    first = block.panels[0].image
    height = round(WIDTH * first.height / first.width)
    cell = WIDTH + MARGIN, LINE + 2 * height + 2 * MARGIN
    rows, above = -(-len(block.panels) // COLUMNS), LINE + 2 * MARGIN
    sheet = Image.new("RGB", (COLUMNS * cell[0] + MARGIN, above + rows * cell[1]), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=19)
    pen.text((MARGIN, MARGIN), block.title, "black", ImageFont.load_default(size=23))
    x0, y0, x1, y1 = (round(part * side) for part, side in zip(block.box, first.size * 2, strict=True))
    frame = [n * WIDTH / first.width for n in (x0, y0, x1, y1)]
    for i, (caption, image) in enumerate(block.panels):
        left, top = MARGIN + i % COLUMNS * cell[0], above + i // COLUMNS * cell[1]
        pen.text((left, top), caption, "black", font)
        sheet.paste(image.resize((WIDTH, height), Image.Resampling.LANCZOS), (left, top + LINE))
        detail = image.resize((WIDTH, height), Image.Resampling.NEAREST, (x0, y0, x1, y1))
        sheet.paste(detail, (left, top + LINE + height + 4))
        corners = [left + frame[0], top + LINE + frame[1], left + frame[2], top + LINE + frame[3]]
        pen.rectangle(corners, outline="yellow", width=2)
    return sheet

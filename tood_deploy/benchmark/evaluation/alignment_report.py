"""The part of an evaluation's report on task alignment: a table, and maps of chosen images.

An `Alignment` in; a section, a table and plain values out. Knows no network.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray

from tood_deploy.benchmark.html_report import Card, Section, Table, gallery, image, paragraph
from tood_deploy.data.images import read_image

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tood_deploy.benchmark.evaluation.alignment import Alignment, AlignmentMaps, Places
    from tood_deploy.data.coco import Annotations

SIDE_PX = 640  # the longer side of a drawn image
COLOURS, OPACITY = "viridis", 0.8
TRUTH, SUREST, TIGHTEST = (0, 215, 255), (60, 60, 255), (90, 220, 60)  # BGR: yellow, red, green
LEAD = (
    "Whether the boxes that the network is surest of are those that fit best. Of every image: its "
    "objects (yellow), the box of the location that is surest of each (red, a cross) and the box "
    "that fits it best (green, a diamond), before suppression; then, for every location, the score "
    "of its object's class, the overlap (IoU) of its box with the object, and the product of the "
    "two. Dark is 0, yellow is 1. A location's object is the one that its box overlaps most; where "
    "it overlaps none, the score is its highest. Of the levels the one with the highest product is "
    "shown. The nearer cross and diamond are, the better the two tasks are aligned."
)
NOTE = (
    "True positives match an object at an overlap of 0.50; their rank correlation is Spearman's, "
    "of score and overlap. The last two columns are means over objects, before suppression: the "
    "rank correlation of the 50 predictions that are surest of an object, and the overlap of the "
    "10 surest (PCC and IoU of the TOOD paper). A dash: fewer than three pairs."
)


def alignment_table(alignment: Alignment) -> Table:
    """Return a row a class, and one for all together."""
    rows = [
        (
            name,
            row.true_positives,
            row.correlation,
            row.objects,
            row.surest_correlation,
            row.tight_iou,
        )
        for name, row in (*alignment.classes.items(), ("all together", alignment.together))
    ]
    headers = ("class", "true positives", "rank correlation", "objects", "of the 50 surest")
    return Table((*headers, "IoU of the 10 surest"), rows, NOTE)


def alignment_values(alignment: Alignment, truth: Annotations) -> dict[str, Any]:
    """Return all numbers, and the file names of the images that are drawn, as plain values."""
    names = [truth.images[maps.image_id].file_name for maps in alignment.drawn]
    classes = {name: asdict(row) for name, row in alignment.classes.items()}
    return {"classes": classes, "together": asdict(alignment.together), "images": names}


def alignment_section(
    alignment: Alignment, truth: Annotations, files: Mapping[int, Path]
) -> Section:
    """Return the section of the page.

    Args:
        alignment: of the network.
        truth: the annotations.
        files: images by image id.
    """
    body = alignment_table(alignment).html()
    for maps in alignment.drawn:
        name = truth.images[maps.image_id].file_name
        body += paragraph(name) + gallery(_cards(maps, name, read_image(files[maps.image_id])))
    return Section("Task alignment", body, LEAD)


def _cards(maps: AlignmentMaps, name: str, image_bgr: NDArray[np.uint8]) -> list[Card]:
    return [
        Card(title, image(drawn, f"{name}: {title}"))
        for title, drawn in draw_alignment(maps, image_bgr).items()
    ]


def draw_alignment(
    maps: AlignmentMaps, image_bgr: NDArray[np.uint8]
) -> dict[str, NDArray[np.uint8]]:
    """Return the image with its boxes, and the three maps on it, by title.

    Args:
        maps: of the image.
        image_bgr: (H, W, 3) uint8.
    """
    scale = SIDE_PX / max(image_bgr.shape[:2])
    enlarged = np.asarray(cv2.resize(image_bgr, None, fx=scale, fy=scale), np.uint8)
    boxes = enlarged.copy()
    draw_outlines(boxes, maps.objects * scale, TRUTH)
    draw_outlines(boxes, maps.tightest.boxes * scale, TIGHTEST)
    draw_outlines(boxes, maps.surest.boxes * scale, SUREST)
    panels = {"objects and boxes": boxes}
    shown = {
        "score": maps.scores,
        "overlap (IoU)": maps.overlaps,
        "score x overlap": maps.scores * maps.overlaps,
    }
    panels |= {title: overlay(values, enlarged) for title, values in shown.items()}
    for panel in panels.values():
        draw_marks(panel, maps.tightest, scale, cv2.MARKER_DIAMOND, TIGHTEST)
        draw_marks(panel, maps.surest, scale, cv2.MARKER_TILTED_CROSS, SUREST)
    return panels


def overlay(values: NDArray[np.float32], image_bgr: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a map as colours on the grey image.

    Args:
        values: (h, w) from 0 to 1, of the whole image in any size.
        image_bgr: (H, W, 3) uint8.
    """
    height, width = image_bgr.shape[:2]
    fitted = cv2.resize(values, (width, height), interpolation=cv2.INTER_LINEAR)
    colours = mpl.colormaps[COLOURS](fitted.clip(0, 1))[..., 2::-1] * 255
    grey = cv2.cvtColor(image_bgr, cv2.COLOR_BGR2GRAY)[..., None]
    return np.ascontiguousarray((OPACITY * colours + (1 - OPACITY) * grey).astype(np.uint8))


def draw_outlines(
    image_bgr: NDArray[np.uint8], boxes: NDArray[np.float32], colour: tuple[int, int, int]
) -> None:
    """Draw boxes (N, 4) xyxy into the image; those that are not numbers are left out."""
    for x1, y1, x2, y2 in np.rint(boxes[np.isfinite(boxes).all(1)]).astype(int).tolist():
        cv2.rectangle(image_bgr, (x1, y1), (x2, y2), colour, 2)


def draw_marks(
    image_bgr: NDArray[np.uint8],
    places: Places,
    scale: float,
    marker: int,
    colour: tuple[int, int, int],
) -> None:
    """Draw a mark at every place, with a dark rim.

    Args:
        image_bgr: (H, W, 3) uint8, drawn into.
        places: in pixels of the unscaled image.
        scale: from there to pixels of this one.
        marker: OpenCV's.
        colour: BGR.
    """
    centres = places.centres[np.isfinite(places.centres).all(1)] * scale
    for width, shade in ((4, (0, 0, 0)), (2, colour)):
        for x, y in np.rint(centres).astype(int).tolist():
            cv2.drawMarker(image_bgr, (x, y), shade, marker, 12, width)

import numpy as np
import pytest
from numpy.typing import NDArray

from tood_deploy.draw import (
    _label_places,
    class_colour,
    draw_boxes,
    line_width,
    text_colour,
    text_size,
)

GREY = 128


def grey(height: int, width: int) -> NDArray[np.uint8]:
    return np.full((height, width, 3), GREY, np.uint8)


def draw(
    image: NDArray[np.uint8],
    boxes: list[list[float]],
    labels: list[str],
    class_ids: list[int] | None = None,
) -> NDArray[np.uint8]:
    ids = np.array(class_ids or [0] * len(boxes), np.int32)
    return draw_boxes(image, np.array(boxes, np.float32).reshape(-1, 4), ids, labels)


def changed(drawn: NDArray[np.uint8]) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero((drawn != GREY).any(axis=2))
    return int(columns.min()), int(rows.min()), int(columns.max()), int(rows.max())


def test_the_image_itself_stays_as_it_was() -> None:
    image = grey(100, 100)
    drawn = draw(image, [[10, 30, 60, 80]], ["cat"])
    assert (image == GREY).all()
    assert (drawn != GREY).any()


def test_no_boxes_draw_nothing() -> None:
    assert (draw(grey(20, 30), [], []) == GREY).all()


def test_the_line_lies_on_the_box() -> None:
    drawn = draw(grey(200, 200), [[50, 80, 150, 160]], [""])
    colour = class_colour(0)
    for row, column in ((120, 50), (120, 150), (160, 100)):
        assert tuple(drawn[row, column]) == colour
    assert tuple(drawn[120, 100]) == (GREY, GREY, GREY)


@pytest.mark.parametrize("box", [[-50, -50, 40, 40], [160, 100, 400, 300], [-1e9, -1e9, 1e9, 1e9]])
def test_a_box_partly_outside_is_cut_off(box: list[float]) -> None:
    drawn = draw(grey(150, 200), [box], ["person 0.99"])
    assert drawn.shape == (150, 200, 3)
    assert (drawn != GREY).any()


@pytest.mark.parametrize("box", [[-50, -50, -10, -10], [300, 20, 350, 60], [20, 200, 60, 260]])
def test_a_box_wholly_outside_is_not_drawn(box: list[float]) -> None:
    assert (draw(grey(150, 200), [box], ["person"]) == GREY).all()


@pytest.mark.parametrize(
    "box", [[0, 0, 20, 20], [185, 0, 199, 20], [0, 130, 20, 149], [185, 130, 199, 149]]
)
def test_the_label_stays_within_the_image(box: list[float]) -> None:
    drawn = draw(grey(150, 200), [box], ["person 0.99"])
    colour = class_colour(0)
    filled = int((drawn == colour).all(axis=2).sum())
    whole = draw(grey(150, 200), [[60, 60, 80, 80]], ["person 0.99"])
    assert filled == pytest.approx(int((whole == colour).all(axis=2).sum()), rel=0.1)


def test_a_label_longer_than_the_image_shrinks() -> None:
    drawn = draw(grey(60, 60), [[10, 20, 50, 50]], ["a very long class name 0.99"])
    left, _, right, _ = changed(drawn)
    assert (left, right) == (0, 59)


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 2)])
def test_images_of_a_pixel_are_drawn_on(size: tuple[int, int]) -> None:
    assert draw(grey(*size), [[0, 0, size[1], size[0]]], ["cat 0.50"]).shape == (*size, 3)


def slow_places(
    boxes: list[list[int]], labels_hw: list[tuple[int, int]], image_hw: tuple[int, int]
) -> list[tuple[int, int]]:
    """Place after place, overlap after overlap."""
    taken: list[tuple[int, int, int, int]] = []
    for (x1, y1, x2, y2), (height, width) in zip(boxes, labels_hw, strict=True):
        best: tuple[int, tuple[int, int]] | None = None
        for x, y in (
            (x1, y1 - height),
            (x1, y2),
            (x1, y1),
            (x2 - width, y1 - height),
            (x2 - width, y2),
            (x1, y2 - height),
        ):
            left, top = max(0, min(x, image_hw[1] - width)), max(0, min(y, image_hw[0] - height))
            hidden = 0
            for a, b, c, d in taken:
                hidden += max(0, min(left + width, c) - max(left, a)) * max(
                    0, min(top + height, d) - max(top, b)
                )
            if best is None or hidden < best[0]:
                best = hidden, (left, top)
        assert best is not None
        taken.append((*best[1], best[1][0] + width, best[1][1] + height))
    return [(left, top) for left, top, _, _ in taken]


@pytest.mark.parametrize("seed", range(20))
def test_label_places_equal_the_slow_way(seed: int) -> None:
    random = np.random.default_rng(seed)
    height, width = (int(side) for side in random.integers(1, 200, 2))
    corners = random.integers(-20, 220, (seed, 4))
    boxes = [
        [*map(int, np.minimum(box[:2], box[2:])), *map(int, np.maximum(box[:2], box[2:]))]
        for box in corners
    ]
    labels_hw = [(int(rows), int(columns)) for rows, columns in random.integers(1, 60, (seed, 2))]
    assert _label_places(boxes, labels_hw, (height, width)) == slow_places(
        boxes, labels_hw, (height, width)
    )


def test_labels_of_neighbours_do_not_hide_each_other() -> None:
    colours = [class_colour(number) for number in range(3)]
    drawn = draw(
        grey(300, 300),
        [[100, 100, 200, 200], [102, 102, 202, 202], [104, 104, 204, 204]],
        ["one 0.9", "two 0.8", "six 0.7"],
        [0, 1, 2],
    )
    areas = [int((drawn == colour).all(axis=2).sum()) for colour in colours]
    alone = [
        int(
            (draw(grey(300, 300), [[100, 100, 200, 200]], ["one 0.9"], [i]) == colours[i])
            .all(axis=2)
            .sum()
        )
        for i in range(3)
    ]
    for area, whole in zip(areas, alone, strict=True):
        assert area > 0.6 * whole


def test_colours_are_fixed_and_distinct() -> None:
    colours = np.array([class_colour(number) for number in range(80)], float)
    distances = np.abs(colours[:, None] - colours[None]).sum(axis=2)
    assert class_colour(7) == class_colour(7)
    assert distances[~np.eye(80, dtype=bool)].min() > 10
    assert all(
        np.abs(np.subtract(class_colour(i), class_colour(i + 1))).sum() > 150 for i in range(79)
    )


@pytest.mark.parametrize("class_id", range(80))
def test_text_can_be_read_on_its_colour(class_id: int) -> None:
    background = class_colour(class_id)
    luminance = [
        np.dot(colour, (0.114, 0.587, 0.299)) for colour in (background, text_colour(background))
    ]
    assert abs(luminance[0] - luminance[1]) > 90


def test_line_and_text_grow_with_the_image() -> None:
    sizes = [(150, 200), (480, 640), (1080, 1920), (3000, 4000)]
    assert [line_width(size) for size in sizes] == sorted({line_width(size) for size in sizes})
    texts = [text_size(size) for size in sizes]
    assert texts == sorted(texts)
    assert texts[0] >= 10
    assert 40 <= texts[-1] <= 80


def test_letters_of_other_scripts_are_drawn() -> None:
    japanese, question = (
        draw(grey(100, 200), [[10, 40, 100, 90]], [label]) for label in ("日本", "??")
    )
    assert (japanese != question).any()


@pytest.mark.parametrize("label", ["a\nb", "\x1b[31m", "caf\udce9", "\u202eabc", "", "x" * 500])
def test_any_label_is_drawn(label: str) -> None:
    drawn = draw(grey(100, 200), [[10, 40, 100, 90]], [label])
    assert drawn.shape == (100, 200, 3)
    assert (drawn != draw(grey(100, 200), [[10, 40, 100, 90]], ["?"])).any()

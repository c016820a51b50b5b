"""`POST /detect/NAME`: encoded images in, their objects as JSON or drawn on the image out.

Knows forms, the query and the types of answers; the batcher does the rest.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence

import cv2
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import Response

from tood_deploy.detections import Detections
from tood_deploy.distributions import COUNTED_CONF
from tood_deploy.errors import ToodError
from tood_deploy.inference.slicing import Slicing
from tood_deploy.serve.http import HttpError, check_query, json_response, number_from, record_of
from tood_deploy.serve.models import DecodedImage, ServedModel, ServeLimits, Wanted
from tood_deploy.serve.state import ServerState, read_request_body, reserve_places, run_images

JPEG, JSON = "image/jpeg", "application/json"
ACCEPTED = {JSON: JSON, "application/*": JSON, "*/*": JSON, JPEG: JPEG, "image/*": JPEG}


async def detect(state: ServerState, request: Request) -> Response:
    """Find objects in encoded images."""
    check_query(request, ("conf", "iou", "only", "slice"))
    model, record = state.model(request), record_of(request)
    drawn = _media_type(request) == JPEG
    wanted = _wanted(request, model, drawn=drawn)
    body = await read_request_body(state, request, model)
    files = await _files_of(request, body, state.limits)
    if drawn and len(files) != 1:
        raise HttpError(406, f"{len(files)} images; a drawn one is sent for one: ask for JSON")
    record.images = len(files)
    images = await _decode(state, model, files, wanted)
    parts = [model.pending(image, wanted) for image in images]
    flat = await run_images(state, request, model, [one for own in parts for one in own])
    rows = iter(flat)
    detections = [
        model.to_detections(image, [next(rows) for _ in own], wanted)
        for image, own in zip(images, parts, strict=True)
    ]
    if wanted.conf <= COUNTED_CONF and wanted.class_scores is None and wanted.slicing is None:
        for image, own in zip(images, detections, strict=True):
            state.metrics.count_image(model.name, image.size_hw, own)
    if drawn:
        return Response(await state.in_worker(_drawn, images[0], detections[0]), media_type=JPEG)
    return json_response(
        {
            "model": model.name,
            "images": [
                _image_json(image, own) for image, own in zip(images, detections, strict=True)
            ],
            "ms": round(record.elapsed_s() * 1000, 2),
        }
    )


def _wanted(request: Request, model: ServedModel, *, drawn: bool) -> Wanted:
    """Return what the query of a request wants to know."""
    query = request.query_params
    only = [name.strip() for name in query["only"].split(",")] if "only" in query else None
    slicing = None
    if "slice" in query:
        sides = query["slice"].lower().split("x")
        try:
            numbers = [int(side) for side in sides if len(side) < 8]
            slicing = Slicing(numbers if len(numbers) > 1 else numbers[0])
        except (ValueError, IndexError, ToodError) as error:
            raise HttpError(
                400, f"slice is {query['slice'][:40]!r}; expected pixels, such as 640 or 640x960"
            ) from error
    iou = number_from(request, "iou", model.detector.iou)
    return model.wanted(query.get("conf"), iou, only, slicing, drawn=drawn)


async def _decode(
    state: ServerState, model: ServedModel, files: Sequence[tuple[str, bytes]], wanted: Wanted
) -> list[DecodedImage]:
    """Decode the images of a request, and take places in the queue for all of their parts."""
    reserve_places(state, model, len(files))
    reserved, started_s = len(files), time.perf_counter()
    try:
        calls = [state.in_worker(model.decode, data, name, wanted) for name, data in files]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        images = [outcome for outcome in outcomes if isinstance(outcome, DecodedImage)]
        parts = sum(len(image.parts) for image in images)
        if parts > reserved:
            reserve_places(state, model, parts - reserved, parts)
    except BaseException:
        model.batcher.release(reserved)
        raise
    state.metrics.observe_stage(model.name, "decode", time.perf_counter() - started_s)
    return images


async def _files_of(request: Request, body: bytes, limits: ServeLimits) -> list[tuple[str, bytes]]:
    """Return names and bytes of the images in a request."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/"):
        return [("", body)]
    parser = MultiPartParser(
        Headers(raw=request.headers.raw), _once(body), max_files=limits.queue, max_fields=0
    )
    parser.spool_max_size = limits.max_body + 1  # nothing goes to the disk
    try:
        form = await parser.parse()
        files = [
            (value.filename or key, await value.read())
            for key, value in form.multi_items()
            if isinstance(value, UploadFile)
        ]
    except (MultiPartException, LookupError, ValueError) as error:
        reason = getattr(error, "message", "") or "it is not multipart/form-data"
        raise HttpError(400, f"the form cannot be read: {reason}; send files alone") from error
    finally:
        for file in parser._files_to_close_on_error:  # of a form that is cut, too
            file.close()
    if not files:
        raise HttpError(400, "no image in the form; expected at least one file")
    return files


async def _once(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body
    yield b""


def _media_type(request: Request) -> str:
    """Return the wanted type of the answer, JSON where the client does not say."""
    weights: dict[str, float] = {}
    for part in request.headers.get("accept", "*/*").split(","):
        name, _, parameters = part.strip().lower().partition(";")
        quality = parameters.strip().removeprefix("q=") if "q=" in parameters else "1"
        try:
            weights[name.strip()] = float(quality)
        except ValueError:
            weights[name.strip()] = 0.0
    known = {name: weight for name, weight in weights.items() if name in ACCEPTED and weight > 0}
    if not known:
        raise HttpError(406, f"answers are {JSON} or {JPEG}; send one of them as Accept")
    return ACCEPTED[max(known, key=known.__getitem__)]


def _drawn(image: DecodedImage, detections: Detections) -> bytes:
    assert image.image_bgr is not None
    _, jpeg = cv2.imencode(".jpg", detections.plot(image.image_bgr))
    return jpeg.tobytes()


def _image_json(image: DecodedImage, detections: Detections) -> Mapping[str, object]:
    rows = zip(
        detections.names(),
        detections.class_ids.tolist(),
        detections.scores.tolist(),
        detections.boxes.tolist(),
        strict=True,
    )
    return {
        "name": image.name,
        "width": image.size_hw[1],
        "height": image.size_hw[0],
        "detections": [
            {"class": name, "class_id": number, "score": score, "box": box}
            for name, number, score, box in rows
        ],
    }

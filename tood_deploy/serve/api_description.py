"""The OpenAPI description of the server: what `/docs` shows, and what fuzzing is steered by.

Names of models and limits come in, a JSON document goes out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tood_deploy import __version__
from tood_deploy.graph_io import INPUTS, OUTPUTS
from tood_deploy.serve.models import ServeLimits
from tood_deploy.serve.protocol import VERSION, input_tensors

JsonObject = dict[str, Any]
ERROR = {"$ref": "#/components/schemas/Error"}
BINARY = {"type": "string", "format": "binary"}
REASONS = {
    400: "The request is not as described.",
    401: "The bearer token is missing or wrong.",
    404: "No such model, or no such path.",
    406: "Neither JSON nor a drawn image is accepted.",
    408: "The body did not arrive in time.",
    413: "The body, the image or the number of images is too large.",
    415: "The content encoding is not known.",
    500: "The network gave no answer.",
    503: "The queue is full or the model is being opened; Retry-After says when to come again.",
    504: "No answer in time.",
}


def describe_api(names: Sequence[str], limits: ServeLimits) -> JsonObject:
    """Return the OpenAPI document.

    Args:
        names: of the models that are served.
        limits: of a request.
    """
    name = _path_parameter("name", "The name of a model.", names)
    version = _path_parameter("version", "The version of a model.", [VERSION])
    paths: dict[str, JsonObject] = {
        "/detect/{name}": {"post": _detect(name, limits)},
        "/metrics": {"get": _plain("Metrics for Prometheus.", "text/plain")},
        "/v2": {"get": _json("What the server is.")},
        "/v2/health/live": {"get": _json("Whether the process answers.")},
        "/v2/health/ready": {"get": _json("Whether every model is ready.", errors=[503])},
        "/v2/repository/index": {"post": _json("The models and their states.")},
    }
    for prefix, parameters in (
        ("/v2/models/{name}", [name]),
        ("/v2/models/{name}/versions/{version}", [name, version]),
    ):
        paths |= {
            prefix: {"get": _json("A model's tensors.", parameters, [404, 503])},
            f"{prefix}/ready": {"get": _json("Whether a model is ready.", parameters, [404, 503])},
            f"{prefix}/config": {
                "get": _json("A model's image size and classes.", parameters, [404, 503])
            },
            f"{prefix}/infer": {"post": _infer(parameters)},
        }
    return {
        "openapi": "3.0.3",
        "info": {
            "title": "tood-serve",
            "version": __version__,
            "description": "Finds objects in images. /detect takes encoded images; /v2 is the Open "
            "Inference Protocol (KServe v2) with padded tensors.",
        },
        "paths": paths,
        "components": {"schemas": _schemas()},
    }


def _path_parameter(name: str, description: str, values: Sequence[str]) -> JsonObject:
    return {
        "name": name,
        "in": "path",
        "required": True,
        "description": description,
        "schema": {"type": "string", "enum": [*values]},
    }


def _responses(success: JsonObject, errors: Sequence[int]) -> JsonObject:
    return {
        "200": {"description": "Done.", **success},
        **{
            str(status): {
                "description": REASONS[status],
                "content": {"application/json": {"schema": ERROR}},
            }
            for status in sorted({*errors, 401})
        },
    }


def _plain(summary: str, media_type: str) -> JsonObject:
    content = {"content": {media_type: {"schema": {"type": "string"}}}}
    return {"summary": summary, "responses": _responses(content, [])}


def _json(
    summary: str, parameters: Sequence[JsonObject] = (), errors: Sequence[int] = ()
) -> JsonObject:
    content = {"content": {"application/json": {"schema": {}}}}
    return {
        "summary": summary,
        "parameters": [*parameters],
        "responses": _responses(content, errors),
    }


def _detect(name: JsonObject, limits: ServeLimits) -> JsonObject:
    share = {"type": "number", "minimum": 0, "maximum": 1}
    text = {"type": "string"}
    query = [
        {"name": parameter, "in": "query", "description": description, "schema": schema}
        for parameter, description, schema in (
            (
                "conf",
                "The score that a detection must exceed, such as 0.3 or 0.3,person=0.5.",
                text,
            ),
            ("iou", "The overlap above which the weaker of two boxes of a class goes.", share),
            ("only", "Names of the classes to detect, separated by commas.", text),
            ("slice", "Search in windows of so many pixels, such as 640 or 640x960.", text),
        )
    ]
    files = {"type": "array", "items": BINARY}
    form = {"type": "object", "properties": {"image": files}, "required": ["image"]}
    answer = {
        "application/json": {"schema": {"$ref": "#/components/schemas/Detections"}},
        "image/jpeg": {"schema": BINARY},
    }
    return {
        "summary": "Find objects in encoded images.",
        "description": f"JPEG, PNG, WebP, TIFF and others, of up to {limits.max_pixels} pixels: "
        f"one as the body, or up to {limits.queue} as files of a form. With Accept: image/jpeg the "
        "answer to one image is that image with the boxes drawn on it.",
        "parameters": [name, *query],
        "requestBody": {
            "required": True,
            "content": {
                "image/*": {"schema": BINARY},
                "application/octet-stream": {"schema": BINARY},
                "multipart/form-data": {"schema": form},
            },
        },
        "responses": _responses({"content": answer}, [400, 404, 406, 408, 413, 415, 500, 503, 504]),
    }


def _infer(parameters: Sequence[JsonObject]) -> JsonObject:
    request = {"schema": {"$ref": "#/components/schemas/InferRequest"}}
    answer = {
        "application/json": {"schema": {"$ref": "#/components/schemas/InferResponse"}},
        "application/octet-stream": {"schema": BINARY},
    }
    return {
        "summary": "Run a model on padded tensors.",
        "description": "With Inference-Header-Content-Length the tensors follow the JSON in "
        "binary, as the protocol's extension says.",
        "parameters": [*parameters],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": request,
                "application/octet-stream": {"schema": BINARY},
            },
        },
        "responses": _responses({"content": answer}, [400, 404, 408, 413, 415, 500, 503, 504]),
    }


def _object(properties: Mapping[str, object], *required: str) -> JsonObject:
    return {"type": "object", "properties": dict(properties), "required": [*required]}


def _schemas() -> JsonObject:
    error = _object({"error": {"type": "string"}}, "error")
    return {"Error": error} | _detection_schemas() | _tensor_schemas()


def _detection_schemas() -> JsonObject:
    number, whole, text = {"type": "number"}, {"type": "integer"}, {"type": "string"}
    box = {"type": "array", "items": number, "minItems": 4, "maxItems": 4}
    detection = _object(
        {"class": text, "class_id": whole, "score": number, "box": box},
        "class",
        "class_id",
        "score",
        "box",
    )
    image = _object(
        {
            "name": text,
            "width": whole,
            "height": whole,
            "detections": {"type": "array", "items": detection},
        },
        "name",
        "width",
        "height",
        "detections",
    )
    images = {"type": "array", "items": image}
    answer = _object({"model": text, "images": images, "ms": number}, "model", "images")
    return {"Detections": answer}


def _tensor_schemas() -> JsonObject:
    number, text = {"type": "number"}, {"type": "string"}
    shape = {"type": "array", "items": {"type": "integer", "minimum": 1}}
    data = {"type": "array", "items": number}
    tensor = {"name": text, "datatype": text, "shape": shape, "data": data}
    kinds = sorted({one.datatype for one in input_tensors()})
    given = tensor | {
        "name": {"type": "string", "enum": [*INPUTS]},
        "datatype": {"type": "string", "enum": kinds},
    }
    wanted = _object({"name": {"type": "string", "enum": [*OUTPUTS]}}, "name")
    return {
        "InferRequest": _object(
            {
                "id": text,
                "inputs": {
                    "type": "array",
                    "items": _object(given, "name", "datatype", "shape"),
                    "minItems": len(INPUTS),
                    "maxItems": len(INPUTS),
                },
                "outputs": {"type": "array", "items": wanted},
            },
            "inputs",
        ),
        "InferResponse": _object(
            {
                "model_name": text,
                "model_version": text,
                "id": text,
                "outputs": {"type": "array", "items": _object(tensor, "name", "datatype", "shape")},
            },
            "model_name",
            "outputs",
        ),
    }

"""Find objects by ONNX Runtime and OpenCV alone, as docs/onnx-contract.md says; no package of ours.

python examples/python_onnxruntime.py model.onnx street.jpg 0.3
"""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import onnxruntime

model, image_name, conf = sys.argv[1:]
preset = json.loads(Path(model).with_suffix(".json").read_text(encoding="utf-8"))["preset"]
short, long = preset["imgsz"]
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])

image_bgr = cv2.imread(image_name)  # (h, w, 3) uint8
if image_bgr is None:
    sys.exit(f"{image_name}: cannot be read; expected an image")
h, w = image_bgr.shape[:2]
scale = min(short / min(h, w), long / max(h, w))
rows, columns = (max(1, int(side * scale + 0.5)) for side in (h, w))
resized = cv2.resize(image_bgr, (columns, rows), interpolation=cv2.INTER_LINEAR)
images = np.zeros((1, -(-rows // 32) * 32, -(-columns // 32) * 32, 3), np.uint8)
images[0, :rows, :columns] = resized[..., ::-1]  # RGB, padded at the right and bottom

inputs = {
    "images": images,
    "valid_hw": np.array([[rows, columns]], np.int32),
    "score_threshold": np.array(conf, np.float32),
    "iou_threshold": np.array(preset["iou_threshold"], np.float32),
}
num_dets, boxes, scores, labels = session.run(["num_dets", "boxes", "scores", "labels"], inputs)

count = int(num_dets[0])
back = np.array([w / columns, h / rows, w / columns, h / rows], np.float32)
for i in range(count):
    name, box = preset["class_names"][labels[0, i]], boxes[0, i] * back
    print(f"{name} {scores[0, i]:.2f} at {box.tolist()}")

// The ONNX contract (docs/onnx-contract.md) in the browser: manifest, resizing and padding, the graph, boxes back in the image.

import {resizeAndPad} from "./resize.js";

const LIBRARY = new URL("node_modules/onnxruntime-web/dist/", import.meta.url).href;

/**
 * Load ONNX Runtime: with WebGPU where the browser and the machine have it, else WebAssembly alone.
 *
 * @param {string | null} wished "webgpu" or "wasm"; the best that there is where null.
 * @returns {Promise<{ort: object, name: string}>} the library, and which of the two it is.
 */
export async function loadRuntime(wished) {
  const adapter = wished === "wasm" ? null : await navigator.gpu?.requestAdapter();
  if (wished === "webgpu" && !adapter) throw new Error("this browser has no WebGPU on this machine; open the page without ?runtime=webgpu");
  const name = adapter ? "webgpu" : "wasm";
  const ort = await import(`${LIBRARY}ort.${name}.min.mjs`);
  ort.env.wasm.wasmPaths = LIBRARY; // nothing comes from elsewhere
  return {ort, name};
}

/** One opened model. */
export class Detector {
  /**
   * @param {object} ort ONNX Runtime, from `loadRuntime`.
   * @param {object} session of the model.
   * @param {object} preset of the manifest.
   */
  constructor(ort, session, preset) {
    Object.assign(this, {ort, session, preset, classNames: preset.class_names});
  }

  /**
   * Open a model.
   *
   * @param {{ort: object, name: string}} runtime from `loadRuntime`.
   * @param {ArrayBuffer} model the bytes of model.onnx.
   * @param {object} manifest what model.json holds.
   */
  static async open({ort, name}, model, manifest) {
    if (!manifest?.preset?.class_names) throw new Error("the .json file is not the manifest of a model; give the one that lies beside the .onnx file");
    if (manifest.precision === "bf16") throw new Error("the model is in bf16, which ONNX Runtime does not compute in browsers; export it in fp32 or int8");
    const session = await ort.InferenceSession.create(new Uint8Array(model), {executionProviders: name === "webgpu" ? ["webgpu", "wasm"] : ["wasm"]});
    return new Detector(ort, session, manifest.preset);
  }

  /**
   * Find the objects of one image.
   *
   * @param {ImageData} image its pixels, upright.
   * @param {number} conf score that a detection must exceed, 0 to 1.
   * @param {number} iou overlap above which the lower-scored of two boxes of one class goes; the model's own where not given.
   * @returns {Promise<object[]>} box (x1, y1, x2, y2 in pixels of the image), score, class_id and class_name, best first.
   */
  async detect(image, conf, iou = this.preset.iou_threshold) {
    const {resized, padded} = networkSize(image, this.preset);
    const pixels = resizeAndPad(image.data, image, resized, padded);
    const {Tensor} = this.ort;
    const outputs = await this.session.run({
      images: new Tensor("uint8", pixels, [1, padded.height, padded.width, 3]),
      valid_hw: new Tensor("int32", Int32Array.of(resized.height, resized.width), [1, 2]),
      score_threshold: new Tensor("float32", Float32Array.of(conf), []),
      iou_threshold: new Tensor("float32", Float32Array.of(iou), []),
    });
    // The two directions have their own factor, as rounding made them.
    const scales = [resized.width / image.width, resized.height / image.height];
    const {boxes, scores, labels} = outputs;
    return Array.from({length: outputs.num_dets.data[0]}, (_, i) => ({
      box: [0, 1, 2, 3].map((side) => boxes.data[4 * i + side] / scales[side % 2]),
      score: scores.data[i],
      class_id: labels.data[i],
      class_name: this.classNames[labels.data[i]],
    }));
  }
}

/**
 * Return what size an image is resized to, and what that is padded to.
 *
 * @param {{width: number, height: number}} image
 * @param {object} preset of the manifest.
 */
export function networkSize(image, preset) {
  const divisor = preset.pad_divisor ?? 32;
  let resized = fitSize(image, preset);
  const padded = preset.canvas_hw
    ? {height: preset.canvas_hw[0], width: preset.canvas_hw[1]}
    : {height: Math.ceil(resized.height / divisor) * divisor, width: Math.ceil(resized.width / divisor) * divisor};
  if (resized.height > padded.height || resized.width > padded.width) resized = shrinkTo(image, resized, preset, padded);
  return {resized, padded};
}

function roundHalfUp(side) {
  return Math.max(1, Math.floor(side + 0.5));
}

function fitSize(image, preset) {
  let [first, second] = preset.imgsz; // short and long side; rows and columns where images are stretched
  const stretch = preset.resize === "stretch";
  if (preset.scale_factor) {
    first = Math.floor(image.height * preset.scale_factor[0] + 0.5);
    second = Math.floor(image.width * preset.scale_factor[1] + 0.5);
    if (!stretch) [first, second] = [Math.min(first, second), Math.max(first, second)];
  }
  if (stretch) return {height: Math.max(1, first), width: Math.max(1, second)};
  const scale = Math.min(first / Math.min(image.height, image.width), second / Math.max(image.height, image.width));
  return {height: roundHalfUp(image.height * scale), width: roundHalfUp(image.width * scale)};
}

// An image that a fixed canvas has no room for is made smaller.
function shrinkTo(image, resized, preset, padded) {
  if (preset.resize === "stretch") {
    return {height: Math.min(resized.height, padded.height), width: Math.min(resized.width, padded.width)};
  }
  const room = Math.min(padded.height / image.height, padded.width / image.width);
  const sides = [image.height, image.width].map((side) => Math.max(1, Math.floor(side * room)));
  return fitSize(image, {imgsz: [Math.min(...sides), Math.max(...sides)]});
}

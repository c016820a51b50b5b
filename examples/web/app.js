// The page: files in, boxes and a table out. All that concerns the network is in detector.js.

import {Detector, loadRuntime} from "./detector.js";

const LOWEST_CONF = 0.05; // what the graph is run with; the slider leaves out of its result, which gives the same as a run of its own
const element = (id) => document.getElementById(id);
const model = {onnx: null, json: null, detector: null};
let runtime = null;
let results = []; // of all images since they were chosen: name, image, detections above LOWEST_CONF

function say(text, isError = false) {
  element("status").textContent = text;
  element("status").classList.toggle("error", isError);
}

// One thing at a time, in order; what fails is shown, and the next one goes on.
let work = Promise.resolve();
function enqueue(step) {
  work = work.then(step).catch((error) => say(error.message ?? String(error), true));
}

async function openModel(files) {
  for (const file of files) {
    if (file.name.endsWith(".onnx")) model.onnx = file;
    if (file.name.endsWith(".json")) model.json = file;
  }
  if (!model.onnx || !model.json) return say(`Now the ${model.onnx ? ".json" : ".onnx"} file of the model, too.`);
  say(`Opening ${model.onnx.name} ...`);
  runtime ??= await loadRuntime(new URLSearchParams(location.search).get("runtime"));
  model.detector = null;
  const manifest = await readJson(model.json);
  model.detector = await Detector.open(runtime, await model.onnx.arrayBuffer(), manifest);
  say(`${model.onnx.name} is open (${runtime.name}). Choose images.`);
}

async function readJson(file) {
  try {
    return JSON.parse(await file.text());
  } catch {
    throw new Error(`${file.name}: not a JSON file; give the manifest that lies beside the .onnx file`);
  }
}

async function detectAll(files) {
  if (!model.detector) throw new Error("Choose a model first: model.onnx and model.json.");
  results = [];
  for (const file of files) {
    say(`${file.name} ...`);
    const image = await decode(file);
    const start = performance.now();
    const detections = await model.detector.detect(image, LOWEST_CONF);
    const milliseconds = performance.now() - start;
    results.push({name: file.name, image, detections});
    show();
    say(`${file.name}: ${milliseconds.toFixed(0)} ms (${runtime.name}), image ${results.length} of ${files.length}`);
  }
}

// Pixels as they are in the file, as OpenCV reads them: upright, but in no other colours.
async function decode(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, {imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none"});
  } catch {
    throw new Error(`${file.name}: this browser cannot read it as an image`);
  }
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d", {willReadFrequently: true});
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height);
}

function show() {
  const conf = Number(element("conf").value);
  element("conf-value").textContent = conf.toFixed(2);
  const above = results.map((result) => ({...result, detections: result.detections.filter(({score}) => score > conf)}));
  element("lines").textContent = above.map(lineOf).join("\n");
  const last = above.at(-1);
  if (!last) return;
  draw(last);
  element("objects").replaceChildren(...last.detections.map(rowOf));
  element("objects").closest("table").hidden = false;
}

// As a line of `tood-infer --jsonl`.
function lineOf({name, image, detections}) {
  return JSON.stringify({source: name, index: 0, timestamp_s: null, height: image.height, width: image.width, detections});
}

function rowOf({class_name, score, box}) {
  const row = document.createElement("tr");
  for (const text of [class_name, score.toFixed(2), box.map((side) => side.toFixed(1)).join(", ")]) row.insertCell().textContent = text;
  return row;
}

function draw({name, image, detections}) {
  const canvas = element("canvas");
  [canvas.width, canvas.height] = [image.width, image.height];
  canvas.ariaLabel = `${name}: ${detections.length} objects, listed in the table below`;
  const context = canvas.getContext("2d"), size = Math.max(11, Math.round((image.width + image.height) / 130));
  context.putImageData(image, 0, 0);
  context.font = `${size}px system-ui, sans-serif`;
  context.lineWidth = Math.max(1, size / 7);
  context.textBaseline = "bottom";
  for (const {box: [x1, y1, x2, y2], class_id, class_name, score} of detections.toReversed()) { // the best come last, on top
    context.strokeStyle = context.fillStyle = `hsl(${(class_id * 222.5) % 360} 85% 60%)`;
    context.strokeRect(x1, y1, x2 - x1, y2 - y1);
    const label = `${class_name} ${score.toFixed(2)}`, bottom = Math.max(size * 1.2, y1);
    context.fillRect(x1, bottom - size * 1.2, context.measureText(label).width + 6, size * 1.2);
    context.fillStyle = "black";
    context.fillText(label, x1 + 3, bottom);
  }
}

function take(files) {
  const ofModel = [...files].filter(({name}) => /\.(onnx|json)$/.test(name));
  const images = [...files].filter((file) => !ofModel.includes(file));
  if (ofModel.length) enqueue(() => openModel(ofModel));
  if (images.length) enqueue(() => detectAll(images));
}

for (const id of ["model", "images"]) element(id).addEventListener("change", ({target}) => take(target.files));
element("conf").addEventListener("input", show);
addEventListener("paste", ({clipboardData}) => take(clipboardData.files));
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
addEventListener("dragleave", ({relatedTarget}) => relatedTarget ?? document.body.classList.remove("dragging"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  take(event.dataTransfer.files);
});

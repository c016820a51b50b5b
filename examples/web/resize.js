// Bilinear resizing of 8-bit images, to the bit as OpenCV's cv::resize does it with INTER_LINEAR: the networks were evaluated
// with that, and another resizer (a canvas has one, too) changes scores.

const WEIGHT = 2048; // weights are whole numbers of this part

/**
 * Resize RGBA pixels into the upper left corner of a larger RGB image, zeros elsewhere.
 *
 * @param {Uint8ClampedArray} rgba (height, width, 4), as ImageData has it; alpha is left out.
 * @param {{width: number, height: number}} size of these pixels.
 * @param {{width: number, height: number}} resized what the image becomes.
 * @param {{width: number, height: number}} padded size of the result, no smaller than `resized`.
 * @returns {Uint8Array} (padded.height, padded.width, 3).
 */
export function resizeAndPad(rgba, size, resized, padded) {
  const rgb = new Uint8Array(padded.width * padded.height * 3);
  if (size.width === 2 * resized.width && size.height === 2 * resized.height) {
    halve(rgba, size, resized, padded, rgb); // OpenCV's own exception
    return rgb;
  }
  const columns = taps(size.width, resized.width, true);
  const rows = taps(size.height, resized.height, false);
  let above = null, below = null, aboveRow = -1, belowRow = -1;
  for (let y = 0; y < resized.height; ++y) {
    if (rows.first[y] === belowRow) [above, aboveRow, below, belowRow] = [below, belowRow, above, aboveRow];
    if (rows.first[y] !== aboveRow) {
      above = resizeRow(rgba, rows.first[y] * size.width * 4, columns, above);
      aboveRow = rows.first[y];
    }
    if (rows.second[y] !== belowRow) {
      below = resizeRow(rgba, rows.second[y] * size.width * 4, columns, below);
      belowRow = rows.second[y];
    }
    const weightAbove = rows.firstWeight[y], weightBelow = rows.secondWeight[y], start = y * padded.width * 3;
    for (let i = 0; i < above.length; ++i) {
      rgb[start + i] = (((weightAbove * (above[i] >> 4)) >> 16) + ((weightBelow * (below[i] >> 4)) >> 16) + 2) >> 2;
    }
  }
  return rgb;
}

// The two source pixels of every result pixel along one axis, and their weights.
function taps(sourceLength, length, keepInside) {
  const first = new Int32Array(length), second = new Int32Array(length);
  const firstWeight = new Int32Array(length), secondWeight = new Int32Array(length);
  const scale = 1 / (length / sourceLength); // rounded as OpenCV rounds it
  for (let i = 0; i < length; ++i) {
    const position = Math.fround((i + 0.5) * scale - 0.5);
    let whole = Math.floor(position), part = Math.fround(position - whole);
    if (keepInside && whole < 0) [whole, part] = [0, 0];
    if (keepInside && whole >= sourceLength - 1) [whole, part] = [sourceLength - 1, 0];
    first[i] = Math.min(Math.max(whole, 0), sourceLength - 1);
    second[i] = Math.min(Math.max(whole + 1, 0), sourceLength - 1);
    firstWeight[i] = roundHalfEven(Math.fround(1 - part) * WEIGHT);
    secondWeight[i] = roundHalfEven(part * WEIGHT);
  }
  return {first, second, firstWeight, secondWeight};
}

function roundHalfEven(value) {
  const up = Math.floor(value + 0.5);
  return up - value === 0.5 && up % 2 !== 0 ? up - 1 : up;
}

function resizeRow(rgba, start, columns, row) {
  const sums = row ?? new Int32Array(columns.first.length * 3);
  for (let x = 0, i = 0; x < columns.first.length; ++x) {
    const left = start + columns.first[x] * 4, right = start + columns.second[x] * 4;
    const leftWeight = columns.firstWeight[x], rightWeight = columns.secondWeight[x];
    for (let channel = 0; channel < 3; ++channel, ++i) {
      sums[i] = rgba[left + channel] * leftWeight + rgba[right + channel] * rightWeight;
    }
  }
  return sums;
}

function halve(rgba, size, resized, padded, rgb) {
  for (let y = 0; y < resized.height; ++y) {
    for (let x = 0; x < resized.width; ++x) {
      const above = (2 * y * size.width + 2 * x) * 4, below = above + size.width * 4;
      for (let channel = 0; channel < 3; ++channel) {
        const sum = rgba[above + channel] + rgba[above + 4 + channel] + rgba[below + channel] + rgba[below + 4 + channel];
        rgb[(y * padded.width + x) * 3 + channel] = (sum + 2) >> 2;
      }
    }
  }
}

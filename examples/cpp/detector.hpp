// What every client of an artefact does around the network: read the manifest, bring an image to the network's size, and map
// boxes back. It follows docs/onnx-contract.md and knows no runtime.
#pragma once

#include <cstdint>
#include <functional>
#include <opencv2/core.hpp>
#include <optional>
#include <string>
#include <vector>

// How an image is brought to the size of the network's input; fields of the manifest's preset.
struct Sizing {
  cv::Size2d target;                       // "fit": width is the long side, height the short one; "stretch": columns, rows
  bool stretch = false;                    // whether the aspect is not kept
  std::optional<cv::Size2d> scale_factor;  // of columns and rows, in place of `target`
  int divisor = 32;                        // columns and rows are padded to a multiple of it
  std::optional<cv::Size> canvas;          // or every image is padded to this
};

struct Manifest {
  Sizing sizing;
  std::vector<std::string> class_names;
  float iou_threshold = 0.6F;
  bool bf16 = false;  // whether what is not 8-bit is in bfloat16
};

// The network's input for one image.
struct Prepared {
  cv::Mat images;    // (rows, columns) of 3 x uint8, RGB, padded at the right and at the bottom
  cv::Size resized;  // columns and rows of `images` that hold real pixels
  cv::Size image;    // columns and rows of the image
};

// The network's output for one image, best first; it lies in the runtime until the next image.
struct Outputs {
  std::int32_t count;         // of rows; -1: not known
  const float* boxes;         // x1, y1, x2, y2 of the first row, of the second, ... in pixels of `Prepared::images`
  const float* scores;        // 0 to 1
  const std::int32_t* labels;  // positions in `Manifest::class_names`
};

struct Detection {
  cv::Vec4f box;  // x1, y1, x2, y2 in pixels of the image, not clipped to it
  float score;
  std::size_t class_id;
};

// One opened network: takes one image, a score that detections must exceed, and the overlap above which the weaker of two goes.
// The graph itself takes batches of images of one padded size.
using Network = std::function<Outputs(const Prepared& prepared, float conf, float iou)>;

// Open a network on the CPU; both throw std::exception. CMakeLists.txt says which of them are built in.
Network open_openvino(const std::string& model_path, const Manifest& manifest);
Network open_onnxruntime(const std::string& model_path, const Manifest& manifest);

// Read `model.json`, which lies beside `model.onnx` or `model.xml`; throws std::runtime_error.
Manifest read_manifest(const std::string& model_path);

// Resize and pad an image, (rows, columns) of 3 x uint8 BGR as cv::imread gives it.
Prepared prepare(const cv::Mat& image_bgr, const Sizing& sizing);

// Return the detections with boxes in pixels of the image.
std::vector<Detection> detections_from(const Outputs& outputs, const Prepared& prepared);

#include "detector.hpp"

#include <algorithm>
#include <array>
#include <fstream>
#include <nlohmann/json.hpp>
#include <opencv2/imgproc.hpp>
#include <stdexcept>

namespace {

int round_half_up(double side) { return std::max(1, static_cast<int>(side + 0.5)); }

int next_multiple(int side, int divisor) { return (side + divisor - 1) / divisor * divisor; }

cv::Size fit_size(cv::Size image, const Sizing& sizing) {
  cv::Size2d target = sizing.target;
  if (sizing.scale_factor) {
    const int columns = static_cast<int>(image.width * sizing.scale_factor->width + 0.5);
    const int rows = static_cast<int>(image.height * sizing.scale_factor->height + 0.5);
    target = sizing.stretch ? cv::Size2d(columns, rows) : cv::Size2d(std::max(columns, rows), std::min(columns, rows));
  }
  if (sizing.stretch) return {round_half_up(target.width), round_half_up(target.height)};
  const double scale = std::min(target.height / std::min(image.width, image.height),  // short side
                                target.width / std::max(image.width, image.height));  // long side
  return {round_half_up(image.width * scale), round_half_up(image.height * scale)};
}

// An image that a fixed canvas has no room for is made smaller.
cv::Size shrink_to(cv::Size image, cv::Size resized, const Sizing& sizing, cv::Size canvas) {
  if (resized.width <= canvas.width && resized.height <= canvas.height) return resized;
  if (sizing.stretch) return {std::min(resized.width, canvas.width), std::min(resized.height, canvas.height)};
  const double room = std::min(static_cast<double>(canvas.height) / image.height, static_cast<double>(canvas.width) / image.width);
  const int columns = std::max(1, static_cast<int>(image.width * room)), rows = std::max(1, static_cast<int>(image.height * room));
  Sizing smaller;
  smaller.target = {static_cast<double>(std::max(columns, rows)), static_cast<double>(std::min(columns, rows))};
  return fit_size(image, smaller);
}

}  // namespace

Manifest read_manifest(const std::string& model_path) {
  const std::string path = model_path.substr(0, model_path.rfind('.')) + ".json";
  std::ifstream file(path);
  if (!file) throw std::runtime_error(path + ": cannot be read; it is the manifest, which lies beside the model: copy both");
  try {
    const auto manifest = nlohmann::json::parse(file);
    const auto& preset = manifest.at("preset");
    Manifest read;
    read.class_names = preset.at("class_names").get<std::vector<std::string>>();
    read.iou_threshold = preset.at("iou_threshold");
    read.bf16 = manifest.at("precision") == "bf16" || manifest.at("options").value("rest", "fp32") == "bf16";
    const auto imgsz = preset.at("imgsz").get<std::array<double, 2>>();  // short and long side, or rows and columns
    read.sizing.target = {imgsz[1], imgsz[0]};
    read.sizing.stretch = preset.value("resize", "fit") == "stretch";
    read.sizing.divisor = preset.value("pad_divisor", 32);
    if (preset.contains("scale_factor") && !preset["scale_factor"].is_null())
      read.sizing.scale_factor = cv::Size2d(preset["scale_factor"][1], preset["scale_factor"][0]);
    if (preset.contains("canvas_hw") && !preset["canvas_hw"].is_null())
      read.sizing.canvas = cv::Size(preset["canvas_hw"][1], preset["canvas_hw"][0]);
    return read;
  } catch (const nlohmann::json::exception& error) {
    throw std::runtime_error(path + ": not a manifest of tood-export (" + error.what() + "); export the model again");
  }
}

Prepared prepare(const cv::Mat& image_bgr, const Sizing& sizing) {
  Prepared prepared;
  prepared.image = image_bgr.size();
  prepared.resized = fit_size(prepared.image, sizing);
  const cv::Size padded = sizing.canvas.value_or(cv::Size(next_multiple(prepared.resized.width, sizing.divisor),
                                                          next_multiple(prepared.resized.height, sizing.divisor)));
  prepared.resized = shrink_to(prepared.image, prepared.resized, sizing, padded);
  cv::Mat resized;
  cv::resize(image_bgr, resized, prepared.resized, 0, 0, cv::INTER_LINEAR);
  prepared.images = cv::Mat::zeros(padded, CV_8UC3);
  cv::cvtColor(resized, prepared.images(cv::Rect(cv::Point(0, 0), prepared.resized)), cv::COLOR_BGR2RGB);
  return prepared;
}

std::vector<Detection> detections_from(const Outputs& outputs, const Prepared& prepared) {
  if (outputs.count < 0)
    throw std::runtime_error("num_dets is -1: this file suppresses in a fixed number of rounds, which were too few for the image");
  // The two directions have their own factor, as rounding made them.
  const auto scale_x = static_cast<float>(static_cast<double>(prepared.resized.width) / prepared.image.width);
  const auto scale_y = static_cast<float>(static_cast<double>(prepared.resized.height) / prepared.image.height);
  std::vector<Detection> detections;
  for (std::int32_t i = 0; i < outputs.count; ++i) {
    const float* box = outputs.boxes.data() + 4 * static_cast<std::size_t>(i);
    detections.push_back({{box[0] / scale_x, box[1] / scale_y, box[2] / scale_x, box[3] / scale_y},
                          outputs.scores[static_cast<std::size_t>(i)],
                          outputs.labels[static_cast<std::size_t>(i)]});
  }
  return detections;
}

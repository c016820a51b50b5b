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

// The largest size of the image's aspect whose short side and long side fit the target.
cv::Size fit(cv::Size image, cv::Size2d target) {
  const double scale = std::min(target.height / std::min(image.width, image.height),
                                target.width / std::max(image.width, image.height));
  return {round_half_up(image.width * scale), round_half_up(image.height * scale)};
}

cv::Size resized_size(cv::Size image, const Sizing& sizing) {
  cv::Size2d target = sizing.target;
  if (sizing.scale_factor) {
    const int columns = static_cast<int>(image.width * sizing.scale_factor->width + 0.5);
    const int rows = static_cast<int>(image.height * sizing.scale_factor->height + 0.5);
    target = sizing.stretch ? cv::Size2d(columns, rows) : cv::Size2d(std::max(columns, rows), std::min(columns, rows));
  }
  return sizing.stretch ? cv::Size(round_half_up(target.width), round_half_up(target.height)) : fit(image, target);
}

// An image that a fixed canvas has no room for is made smaller.
cv::Size shrink_to(cv::Size image, cv::Size resized, bool stretch, cv::Size canvas) {
  if (resized.width <= canvas.width && resized.height <= canvas.height) return resized;
  if (stretch) return {std::min(resized.width, canvas.width), std::min(resized.height, canvas.height)};
  const double room = std::min(static_cast<double>(canvas.height) / image.height, static_cast<double>(canvas.width) / image.width);
  const int columns = std::max(1, static_cast<int>(image.width * room)), rows = std::max(1, static_cast<int>(image.height * room));
  return fit(image, cv::Size2d(std::max(columns, rows), std::min(columns, rows)));
}

// Two numbers of the manifest, rows before columns, as OpenCV orders them; nothing where there are none.
std::optional<cv::Size2d> optional_size(const nlohmann::json& preset, const char* name) {
  if (!preset.contains(name) || preset[name].is_null()) return std::nullopt;
  const auto values = preset[name].get<std::array<double, 2>>();
  return cv::Size2d(values[1], values[0]);
}

}  // namespace

Manifest read_manifest(const std::string& model_path) {
  const std::string path = model_path.substr(0, model_path.rfind('.')) + ".json";
  std::ifstream file(path);
  if (!file) throw std::runtime_error(path + ": cannot be read; it is the manifest, which lies beside the model: copy both");
  try {
    const auto manifest = nlohmann::json::parse(file);
    const auto& preset = manifest.at("preset");
    preset.at("imgsz");  // short and long side, or rows and columns: the one size that is always there
    return {{*optional_size(preset, "imgsz"), preset.value("resize", "fit") == "stretch", optional_size(preset, "scale_factor"),
             preset.value("pad_divisor", 32), optional_size(preset, "canvas_hw")},
            preset.at("class_names").get<std::vector<std::string>>(),
            preset.at("iou_threshold").get<float>(),
            manifest.at("precision") == "bf16" || manifest.at("options").value("rest", "fp32") == "bf16"};
  } catch (const nlohmann::json::exception& error) {
    throw std::runtime_error(path + ": not a manifest of tood-export (" + error.what() + "); export the model again");
  }
}

Prepared prepare(const cv::Mat& image_bgr, const Sizing& sizing) {
  cv::Size resized = resized_size(image_bgr.size(), sizing);
  const cv::Size padded = sizing.canvas.value_or(
      cv::Size(next_multiple(resized.width, sizing.divisor), next_multiple(resized.height, sizing.divisor)));
  resized = shrink_to(image_bgr.size(), resized, sizing.stretch, padded);
  Prepared prepared{cv::Mat::zeros(padded, CV_8UC3), resized, image_bgr.size()};
  cv::Mat pixels;
  cv::resize(image_bgr, pixels, resized, 0, 0, cv::INTER_LINEAR);
  cv::cvtColor(pixels, prepared.images(cv::Rect({0, 0}, resized)), cv::COLOR_BGR2RGB);
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
    const float* box = outputs.boxes + 4 * i;
    detections.push_back({{box[0] / scale_x, box[1] / scale_y, box[2] / scale_x, box[3] / scale_y},
                          outputs.scores[i], static_cast<std::size_t>(outputs.labels[i])});
  }
  return detections;
}

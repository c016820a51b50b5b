// tood MODEL IMAGE... [--conf S] [--iou O] [--runtime openvino|onnxruntime] [--draw FOLDER]
//
// Prints the lines of `tood-infer --jsonl -`: one JSON object an image. Exit codes: 0 done, 1 some images could not be read,
// 2 wrong use or a model that does not open.
#include <CLI/CLI.hpp>
#include <cmath>
#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>
#include <opencv2/core/utils/logger.hpp>
#include <opencv2/imgcodecs.hpp>
#include <opencv2/imgproc.hpp>
#include <stdexcept>

#include "detector.hpp"

namespace {

struct Arguments {
  std::string model;
  std::vector<std::string> images;
  float conf = 0.3F;
  std::optional<float> iou;  // the manifest's where not given
  std::string runtime;       // the first that this program was built with where not given
  std::string draw;          // folder for images with the boxes drawn on them
};

void add_options(CLI::App& app, Arguments& arguments) {
  const CLI::Validator share(  // CLI::Range lets through what is no number
      [](const std::string& text) { return std::stod(text) >= 0 && std::stod(text) <= 1 ? "" : text + " is not from 0 to 1"; }, "0..1");
  app.add_option("model", arguments.model, "artefact of tood-export, .onnx or .xml")->required();
  app.add_option("images", arguments.images, "image files")->required();
  app.add_option("--conf", arguments.conf, "score that a detection must exceed")->check(CLI::Number)->check(share);
  app.add_option("--iou", arguments.iou, "overlap above which the weaker of two boxes of a class goes")->check(CLI::Number)->check(share);
  app.add_option("--runtime", arguments.runtime, "openvino or onnxruntime");
  app.add_option("--draw", arguments.draw, "folder for images with the boxes drawn on them");
}

Network open_network(const Arguments& arguments, const Manifest& manifest) {
#ifdef WITH_OPENVINO
  if (arguments.runtime.empty() || arguments.runtime == "openvino") return open_openvino(arguments.model, manifest);
#endif
#ifdef WITH_ONNXRUNTIME
  if (arguments.runtime.empty() || arguments.runtime == "onnxruntime") return open_onnxruntime(arguments.model, manifest);
#endif
  throw std::invalid_argument("--runtime " + arguments.runtime + ": this program was built without it");
}

nlohmann::ordered_json line_of(const std::string& name, cv::Size size, const std::vector<Detection>& detections, const Manifest& manifest) {
  auto rows = nlohmann::ordered_json::array();
  for (const auto& [box, score, id] : detections)
    rows.push_back({{"box", {box[0], box[1], box[2], box[3]}}, {"score", score}, {"class_id", id},
                    {"class_name", manifest.class_names.at(id)}});
  return {{"source", name}, {"index", 0}, {"timestamp_s", nullptr}, {"height", size.height}, {"width", size.width}, {"detections", rows}};
}

void draw(cv::Mat& image_bgr, const std::vector<Detection>& detections, const Manifest& manifest) {
  const int thickness = std::max(1, (image_bgr.rows + image_bgr.cols) / 800);
  for (auto detection = detections.rbegin(); detection != detections.rend(); ++detection) {  // the best come last, on top
    const auto& [box, score, id] = *detection;
    const auto hue = static_cast<double>(id);
    const cv::Scalar colour(std::fmod(hue * 90, 256), 255 - std::fmod(hue * 60, 200), std::fmod(hue * 150, 256));
    const cv::Point corner(cvRound(box[0]), cvRound(box[1]));
    cv::rectangle(image_bgr, corner, cv::Point(cvRound(box[2]), cvRound(box[3])), colour, thickness);
    const std::string label = manifest.class_names.at(id) + cv::format(" %.2f", score);
    cv::putText(image_bgr, label, corner + cv::Point(2, 14 * thickness), cv::FONT_HERSHEY_SIMPLEX, 0.45 * thickness, colour,
                thickness, cv::LINE_AA);
  }
}

// Print and draw what is in an image; return whether it could be read.
bool detect(const std::string& name, const Network& network, const Manifest& manifest, const Arguments& arguments) {
  cv::Mat image_bgr = cv::imread(name, cv::IMREAD_COLOR);
  if (image_bgr.empty()) {
    std::cerr << "warning: " << name << ": cannot be read; expected an image\n";
    return false;
  }
  const Prepared prepared = prepare(image_bgr, manifest.sizing);
  const Outputs outputs = network(prepared, arguments.conf, arguments.iou.value_or(manifest.iou_threshold));
  const std::vector<Detection> detections = detections_from(outputs, prepared);
  std::cout << line_of(name, image_bgr.size(), detections, manifest).dump() << std::endl;
  if (arguments.draw.empty()) return true;
  draw(image_bgr, detections, manifest);
  const auto path = std::filesystem::path(arguments.draw) / std::filesystem::path(name).filename();
  if (!cv::imwrite(path.string(), image_bgr)) throw std::runtime_error(path.string() + ": cannot be written");
  return true;
}

}  // namespace

int main(int count, char** words) {
  cv::utils::logging::setLogLevel(cv::utils::logging::LOG_LEVEL_SILENT);  // what cannot be read is said once, above
  CLI::App app("Detect objects in images by an artefact of tood-export.");
  Arguments arguments;
  try {
    add_options(app, arguments);
    app.parse(count, words);
    if (!arguments.draw.empty()) std::filesystem::create_directories(arguments.draw);
    const Manifest manifest = read_manifest(arguments.model);
    const Network network = open_network(arguments, manifest);
    bool all_read = true;
    for (const std::string& name : arguments.images) all_read = detect(name, network, manifest, arguments) && all_read;
    return all_read ? 0 : 1;
  } catch (const CLI::CallForHelp& help) {
    return app.exit(help);
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 2;
  }
}

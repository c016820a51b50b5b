// tood MODEL IMAGE... [--conf S] [--iou O] [--runtime openvino|onnxruntime] [--draw FOLDER]
//
// Prints the lines of `tood-infer --jsonl -`: one JSON object an image. Exit codes: 0 done, 1 some images could not be read,
// 2 wrong use or a model that does not open.
#include <filesystem>
#include <iostream>
#include <nlohmann/json.hpp>
#include <opencv2/imgcodecs.hpp>
#include <opencv2/core/utils/logger.hpp>
#include <opencv2/imgproc.hpp>
#include <stdexcept>

#include "runtimes.hpp"

namespace {

struct Arguments {
  std::string model;
  std::vector<std::string> images;
  float conf = 0.3F;
  std::optional<float> iou;  // the manifest's where not given
  std::string runtime;       // the first that this program was built with where not given
  std::string draw;          // folder for images with the boxes drawn on them
};

float threshold_from(const std::string& option, const std::string& text) {
  std::size_t end = 0;
  float value = -1;
  try {
    value = std::stof(text, &end);
  } catch (const std::logic_error&) {  // no number, or one that no float holds
  }
  if (end != text.size() || !(value >= 0 && value <= 1))
    throw std::invalid_argument(option + " is " + text + "; expected a number from 0 to 1");
  return value;
}

Arguments parse(const std::vector<std::string>& words) {
  Arguments arguments;
  std::vector<std::string> names;
  for (std::size_t i = 0; i < words.size(); ++i) {
    const std::string& word = words[i];
    if (word.rfind("--", 0) != 0) {
      names.push_back(word);
      continue;
    }
    if (i + 1 == words.size()) throw std::invalid_argument(word + ": unknown, or its value is missing");
    const std::string& value = words[++i];
    if (word == "--conf") arguments.conf = threshold_from(word, value);
    else if (word == "--iou") arguments.iou = threshold_from(word, value);
    else if (word == "--runtime") arguments.runtime = value;
    else if (word == "--draw") arguments.draw = value;
    else throw std::invalid_argument(word + ": no such option; there are --conf, --iou, --runtime and --draw");
  }
  if (names.size() < 2) throw std::invalid_argument("usage: tood MODEL IMAGE... [--conf S] [--iou O] [--runtime openvino|onnxruntime] [--draw FOLDER]");
  arguments.model = names[0];
  arguments.images.assign(names.begin() + 1, names.end());
  return arguments;
}

std::unique_ptr<Runtime> open_runtime(const Arguments& arguments, const Manifest& manifest) {
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
  for (const Detection& detection : detections)
    rows.push_back({{"box", {detection.box[0], detection.box[1], detection.box[2], detection.box[3]}},
                    {"score", detection.score},
                    {"class_id", detection.class_id},
                    {"class_name", manifest.class_names.at(static_cast<std::size_t>(detection.class_id))}});
  return {{"source", name}, {"index", 0}, {"timestamp_s", nullptr}, {"height", size.height}, {"width", size.width}, {"detections", rows}};
}

void draw(cv::Mat& image_bgr, const std::vector<Detection>& detections, const Manifest& manifest) {
  const int thickness = std::max(1, (image_bgr.rows + image_bgr.cols) / 800), font = cv::FONT_HERSHEY_SIMPLEX;
  const double size = 0.45 * thickness;
  for (auto detection = detections.rbegin(); detection != detections.rend(); ++detection) {  // the best come last, on top
    const cv::Vec4f& box = detection->box;
    const int id = detection->class_id;
    const cv::Scalar colour(id * 90 % 256, 255 - id * 60 % 200, id * 150 % 256), black(0, 0, 0);
    cv::rectangle(image_bgr, cv::Point(cvRound(box[0]), cvRound(box[1])), cv::Point(cvRound(box[2]), cvRound(box[3])), colour, thickness);
    const std::string label = manifest.class_names.at(static_cast<std::size_t>(id)) + cv::format(" %.2f", detection->score);
    const cv::Size text = cv::getTextSize(label, font, size, thickness, nullptr);
    const cv::Point start(std::max(0, cvRound(box[0])), std::max(text.height + 2, cvRound(box[1]) - 3));
    cv::rectangle(image_bgr, start + cv::Point(0, 3), start + cv::Point(text.width, -text.height - 2), colour, cv::FILLED);
    cv::putText(image_bgr, label, start, font, size, black, thickness, cv::LINE_AA);
  }
}

bool detect(const std::string& name, Runtime& runtime, const Manifest& manifest, const Arguments& arguments) {
  cv::Mat image_bgr = cv::imread(name, cv::IMREAD_COLOR);
  if (image_bgr.empty()) {
    std::cerr << "warning: " << name << ": cannot be read; expected an image\n";
    return false;
  }
  const Prepared prepared = prepare(image_bgr, manifest.sizing);
  const Outputs outputs = runtime.infer(prepared, arguments.conf, arguments.iou.value_or(manifest.iou_threshold));
  const std::vector<Detection> detections = detections_from(outputs, prepared);
  std::cout << line_of(name, image_bgr.size(), detections, manifest).dump() << std::endl;
  if (!arguments.draw.empty()) {
    draw(image_bgr, detections, manifest);
    const auto path = std::filesystem::path(arguments.draw) / std::filesystem::path(name).filename();
    if (!cv::imwrite(path.string(), image_bgr)) throw std::runtime_error(path.string() + ": cannot be written");
  }
  return true;
}

}  // namespace

int main(int count, char** words) {
  cv::utils::logging::setLogLevel(cv::utils::logging::LOG_LEVEL_SILENT);  // what cannot be read is said once, below
  try {
    const Arguments arguments = parse({words + 1, words + count});
    if (!arguments.draw.empty()) std::filesystem::create_directories(arguments.draw);
    const Manifest manifest = read_manifest(arguments.model);
    const auto runtime = open_runtime(arguments, manifest);
    bool all_read = true;
    for (const std::string& name : arguments.images) all_read = detect(name, *runtime, manifest, arguments) && all_read;
    return all_read ? 0 : 1;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 2;
  }
}

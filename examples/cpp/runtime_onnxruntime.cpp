// ONNX Runtime on the CPU: takes model.onnx.
#include "runtimes.hpp"

#include <algorithm>
#include <array>
#include <onnxruntime_cxx_api.h>
#include <stdexcept>

namespace {

const std::array<const char*, 4> kInputs = {"images", "valid_hw", "score_threshold", "iou_threshold"};
const std::array<const char*, 4> kOutputs = {"num_dets", "boxes", "scores", "labels"};

template <typename T>
Ort::Value tensor_of(T* data, std::size_t count, const std::vector<std::int64_t>& shape) {
  static const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  return Ort::Value::CreateTensor<T>(memory, data, count, shape.data(), shape.size());
}

template <typename T>
std::vector<T> first_values(const Ort::Value& value, std::size_t count) {
  return {value.GetTensorData<T>(), value.GetTensorData<T>() + count};
}

class OnnxRuntime : public Runtime {
 public:
  explicit OnnxRuntime(const std::string& model_path)
      : env_(ORT_LOGGING_LEVEL_ERROR), session_(env_, model_path.c_str(), Ort::SessionOptions()) {}

  Outputs infer(const Prepared& prepared, float conf, float iou) override {
    const cv::Mat& images = prepared.images;
    std::int32_t valid_hw[] = {prepared.resized.height, prepared.resized.width};
    std::array<Ort::Value, 4> inputs = {tensor_of(images.data, images.total() * 3, {1, images.rows, images.cols, 3}),
                                        tensor_of(valid_hw, 2, {1, 2}), tensor_of(&conf, 1, {}), tensor_of(&iou, 1, {})};
    const auto values =
        session_.Run(Ort::RunOptions(), kInputs.data(), inputs.data(), inputs.size(), kOutputs.data(), kOutputs.size());
    Outputs outputs;
    outputs.count = values[0].GetTensorData<std::int32_t>()[0];
    const auto count = static_cast<std::size_t>(std::max(outputs.count, 0));
    outputs.boxes = first_values<float>(values[1], 4 * count);
    outputs.scores = first_values<float>(values[2], count);
    outputs.labels = first_values<std::int32_t>(values[3], count);
    return outputs;
  }

 private:
  Ort::Env env_;
  Ort::Session session_;
};

}  // namespace

std::unique_ptr<Runtime> open_onnxruntime(const std::string& model_path, const Manifest& manifest) {
  if (manifest.bf16) throw std::runtime_error(model_path + ": is in bf16, which ONNX Runtime does not compute on CPUs; use OpenVINO");
  return std::make_unique<OnnxRuntime>(model_path);
}

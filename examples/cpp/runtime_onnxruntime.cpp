// ONNX Runtime on the CPU: takes model.onnx.
#include <onnxruntime_cxx_api.h>

#include <stdexcept>

#include "detector.hpp"

template <typename T>
static Ort::Value tensor_of(T* data, std::size_t count, const std::vector<std::int64_t>& shape) {
  static const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  return Ort::Value::CreateTensor<T>(memory, data, count, shape.data(), shape.size());
}

struct Session {
  explicit Session(const std::string& model_path) : session(env, model_path.c_str(), Ort::SessionOptions()) {}

  Ort::Env env{ORT_LOGGING_LEVEL_ERROR};
  Ort::Session session;
  std::vector<Ort::Value> outputs;  // of the last image
};

Network open_onnxruntime(const std::string& model_path, const Manifest& manifest) {
  if (manifest.bf16) throw std::runtime_error(model_path + ": is in bf16, which ONNX Runtime does not compute on CPUs; use OpenVINO");
  return [opened = std::make_shared<Session>(model_path)](const Prepared& prepared, float conf, float iou) -> Outputs {
    static const char* const input_names[] = {"images", "valid_hw", "score_threshold", "iou_threshold"};
    static const char* const output_names[] = {"num_dets", "boxes", "scores", "labels"};
    const cv::Mat& images = prepared.images;
    std::int32_t valid_hw[] = {prepared.resized.height, prepared.resized.width};
    const Ort::Value inputs[] = {tensor_of(images.data, images.total() * 3, {1, images.rows, images.cols, 3}),
                                 tensor_of(valid_hw, 2, {1, 2}), tensor_of(&conf, 1, {}), tensor_of(&iou, 1, {})};
    auto& outputs = opened->outputs = opened->session.Run(Ort::RunOptions(), input_names, inputs, 4, output_names, 4);
    return {outputs[0].GetTensorData<std::int32_t>()[0], outputs[1].GetTensorData<float>(), outputs[2].GetTensorData<float>(),
            outputs[3].GetTensorData<std::int32_t>()};
  };
}

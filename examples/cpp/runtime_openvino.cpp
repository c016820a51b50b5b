// OpenVINO on the CPU: takes model.onnx as it is, or the model.xml of `tood-export --to openvino`.
#include "runtimes.hpp"

#include <algorithm>
#include <openvino/openvino.hpp>

namespace {

template <typename T>
std::vector<T> first_values(const ov::Tensor& tensor, std::size_t count) {
  return {tensor.data<const T>(), tensor.data<const T>() + count};
}

class OpenVinoRuntime : public Runtime {
 public:
  OpenVinoRuntime(const std::string& model_path, bool bf16) {
    // By itself the CPU plugin computes in bfloat16 where the CPU has instructions for it, whatever the model is in.
    const auto precision = ov::hint::inference_precision(bf16 ? ov::element::bf16 : ov::element::f32);
    request_ = core_.compile_model(model_path, "CPU", precision).create_infer_request();
  }

  Outputs infer(const Prepared& prepared, float conf, float iou) override {
    const auto rows = static_cast<std::size_t>(prepared.images.rows), columns = static_cast<std::size_t>(prepared.images.cols);
    std::int32_t valid_hw[] = {prepared.resized.height, prepared.resized.width};
    request_.set_tensor("images", ov::Tensor(ov::element::u8, {1, rows, columns, 3}, prepared.images.data));
    request_.set_tensor("valid_hw", ov::Tensor(ov::element::i32, {1, 2}, valid_hw));
    request_.set_tensor("score_threshold", ov::Tensor(ov::element::f32, {}, &conf));
    request_.set_tensor("iou_threshold", ov::Tensor(ov::element::f32, {}, &iou));
    request_.infer();
    Outputs outputs;
    outputs.count = request_.get_tensor("num_dets").data<const std::int32_t>()[0];
    const auto count = static_cast<std::size_t>(std::max(outputs.count, 0));
    outputs.boxes = first_values<float>(request_.get_tensor("boxes"), 4 * count);
    outputs.scores = first_values<float>(request_.get_tensor("scores"), count);
    outputs.labels = first_values<std::int32_t>(request_.get_tensor("labels"), count);
    return outputs;
  }

 private:
  ov::Core core_;
  ov::InferRequest request_;
};

}  // namespace

std::unique_ptr<Runtime> open_openvino(const std::string& model_path, const Manifest& manifest) {
  return std::make_unique<OpenVinoRuntime>(model_path, manifest.bf16);
}

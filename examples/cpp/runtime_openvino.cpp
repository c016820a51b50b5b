// OpenVINO on the CPU: takes model.onnx as it is, or the model.xml of `tood-export --to openvino`.
#include <openvino/openvino.hpp>

#include "detector.hpp"

Network open_openvino(const std::string& model_path, const Manifest& manifest) {
  // By itself the CPU plugin computes in bfloat16 where the CPU has instructions for it, whatever the model is in.
  const auto precision = ov::hint::inference_precision(manifest.bf16 ? ov::element::bf16 : ov::element::f32);
  ov::Core core;
  return [core, request = core.compile_model(model_path, "CPU", precision).create_infer_request()](
             const Prepared& prepared, float conf, float iou) mutable -> Outputs {
    const auto rows = static_cast<std::size_t>(prepared.images.rows), columns = static_cast<std::size_t>(prepared.images.cols);
    std::int32_t valid_hw[] = {prepared.resized.height, prepared.resized.width};
    request.set_tensor("images", ov::Tensor(ov::element::u8, {1, rows, columns, 3}, prepared.images.data));
    request.set_tensor("valid_hw", ov::Tensor(ov::element::i32, {1, 2}, valid_hw));
    request.set_tensor("score_threshold", ov::Tensor(ov::element::f32, {}, &conf));
    request.set_tensor("iou_threshold", ov::Tensor(ov::element::f32, {}, &iou));
    request.infer();
    return {request.get_tensor("num_dets").data<const std::int32_t>()[0], request.get_tensor("boxes").data<const float>(),
            request.get_tensor("scores").data<const float>(), request.get_tensor("labels").data<const std::int32_t>()};
  };
}

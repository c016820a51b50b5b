// What this program can be built with; CMakeLists.txt says which of them it has found. Both throw std::exception.
#pragma once

#include <memory>
#include <string>

#include "detector.hpp"

std::unique_ptr<Runtime> open_openvino(const std::string& model_path, const Manifest& manifest);
std::unique_ptr<Runtime> open_onnxruntime(const std::string& model_path, const Manifest& manifest);

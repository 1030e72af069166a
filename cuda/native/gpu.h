// What bindings add for a GPU: the current device during a call, and an error that says what is missing without one.
#pragma once
#include <cuda_runtime_api.h>

#include <vector>

#include "dlpack.h"

namespace native {

constexpr int device_type = 2;
constexpr const char* device_name = "cuda";

// Raises std::runtime_error where there is no driver or no GPU.
inline void require_device() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) return;
  throw std::runtime_error(std::string("no GPU can be used here: ") +
                           (error == cudaSuccess ? "the driver sees none" : cudaGetErrorString(error)) +
                           ". Expected an NVIDIA GPU and its driver; without them cuda._simt runs the same kernels");
}

// While this lives the arrays' GPU is the current one.
class Running {
 public:
  explicit Running(const std::vector<const View*>& arrays) {
    if (cudaGetDevice(&before_) != cudaSuccess) before_ = 0;
    for (const View* array : arrays)
      if (array && array->device != before_) {
        cudaSetDevice(array->device);
        break;
      }
  }
  ~Running() { cudaSetDevice(before_); }
  Running(const Running&) = delete;
  Running& operator=(const Running&) = delete;

 private:
  int before_ = 0;
};

inline void bind_device(py::module_&) {}

}  // namespace native

// nvcc's side of simt.cuh: a launch with a cluster shape, dynamic shared memory as a struct, tensor maps by the driver.
// Nothing links against libcuda: its one function that is needed comes through the runtime, when it is first called.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "types.h"

#define SIMT_SITE  // the caller's file and line: only the CPU model keeps them
#define SIMT_SITE_ONLY

namespace simt {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

struct Launch {
  dim3 grid, block;
  size_t shared_bytes = 0;
  unsigned cluster = 1;      // blocks of a cluster, along x
  bool co_resident = false;  // blocks wait for each other: the grid must fit on the GPU at once
  void* stream = nullptr;
  bool overlap = false;  // may start while the grid before it ends: the kernel calls griddepcontrol_wait before it
                         // touches global memory
};

// The block's dynamic shared memory, as one struct.
template <class T>
__device__ __forceinline__ T& dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char simt_shared_memory[];
  return *reinterpret_cast<T*>(simt_shared_memory);
}

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "current device");
  return device;
}

// How many multiprocessors the current device has. Asked once a device: the runtime takes a microsecond to answer.
inline int multiprocessors() {
  constexpr int devices = 64;
  static std::atomic<int> known[devices];
  const int device = current_device();
  int count = device < devices ? known[device].load(std::memory_order_relaxed) : 0;
  if (count == 0) {
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "multiprocessor count");
    if (device < devices) known[device].store(count, std::memory_order_relaxed);
  }
  return count;
}

// Lets blocks of the kernel have so much dynamic shared memory. Said once a device and kernel.
inline void allow_shared_memory(const void* kernel, size_t bytes) {
  static std::mutex lock;
  static std::map<std::pair<int, const void*>, size_t> allowed;
  const std::lock_guard<std::mutex> guard(lock);
  size_t& most = allowed[{current_device(), kernel}];
  if (bytes <= most) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)),
        "shared memory of a block");
  most = bytes;
}

// Starts the grid on the stream and returns. Raises std::runtime_error with CUDA's reason when it cannot start.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Launch& shape, Arguments&&... arguments) {
  if (shape.shared_bytes > 48 * 1024) allow_shared_memory(reinterpret_cast<const void*>(kernel), shape.shared_bytes);
  cudaLaunchAttribute attributes[3];
  unsigned count = 0;
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = shape.cluster;
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (shape.co_resident) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  }
  if (shape.overlap) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(shape.stream);
  config.attrs = attributes;
  config.numAttrs = count;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), "kernel launch");
}

inline CUtensorMap tensor_map(const void* base, DataType type, const TensorShape& shape, Swizzle swizzle,
                              L2Promotion promotion = L2Promotion::b128) {
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    check(error, "the driver's cuTensorMapEncodeTiled");
    if (!function || result != cudaDriverEntryPointSuccess)
      throw std::runtime_error("the driver has no cuTensorMapEncodeTiled (result " + std::to_string(int(result)) +
                               "): expected a driver of CUDA 12.0 or newer");
    return reinterpret_cast<Encode>(function);
  }();
  CUtensorMap map;
  cuuint64_t size[5], stride[4];
  for (int i = 0; i < shape.rank; ++i) size[i] = shape.size[i];
  for (int i = 0; i + 1 < shape.rank; ++i) stride[i] = shape.stride[i];
  const CUresult result = encode(&map, CUtensorMapDataType(type), cuuint32_t(shape.rank), const_cast<void*>(base), size,
                                 stride, shape.box, shape.step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 CUtensorMapSwizzle(swizzle), CUtensorMapL2promotion(promotion),
                                 CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled refused the tensor, error " + std::to_string(int(result)));
  return map;
}

}  // namespace simt

// Arrays from Python without the headers of torch or numpy: the part of the DLPack 1.0 ABI that bindings need.
// An Array is borrowed: it keeps the memory alive and never writes to the capsule. Refused: what is not float32, float16
// or bfloat16 (numpy has none: there uint16 holds the bits), is elsewhere than on the module's device, or misaligned.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "simt/types.h"

namespace native {

namespace py = pybind11;

namespace dlpack {  // https://dmlc.github.io/dlpack/latest/c_api.html

struct Device {
  int32_t type, id;  // type 1: CPU, 2: CUDA
};
struct Type {
  uint8_t code, bits;  // code 1: unsigned, 2: float, 4: bfloat
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t rank;
  Type type;
  int64_t *shape, *strides;  // strides in elements; null: contiguous
  uint64_t byte_offset;
};
struct Managed {  // capsule "dltensor"
  Tensor tensor;
  void* context;
  void (*deleter)(Managed*);
};
struct Versioned {  // capsule "dltensor_versioned"
  uint32_t major, minor;
  void* context;
  void (*deleter)(Versioned*);
  uint64_t flags;  // bit 0: read-only
  Tensor tensor;
};

// A tensor's capsule. -1 is CUDA's way of asking for no synchronisation: the kernel runs on the caller's stream.
inline py::object capsule_of(const py::object& object, int device_type) {
  py::dict keywords;
  if (device_type == 2) keywords["stream"] = -1;
  const py::object make = object.attr("__dlpack__");
  try {
    py::dict versioned(**keywords, py::arg("max_version") = py::make_tuple(1, 0));
    return make(**versioned);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;
    return make(**keywords);  // an older producer knows no versions
  }
}

}  // namespace dlpack

struct Array {
  std::string name;
  char* data = nullptr;
  simt::DataType type = simt::DataType::f32;
  int device = 0, rank = 0;
  int64_t size[3] = {}, stride[3] = {};  // in elements
  py::object capsule;

  [[noreturn]] void refuse(const std::string& why) const { throw std::invalid_argument(name + ": " + why); }

  Array(const char* name, const py::object& object, int device_type, bool written) : name(name) {
    if (!py::hasattr(object, "__dlpack__"))
      refuse("expected a torch tensor or a numpy array, got " + std::string(py::str(py::type::of(object))));
    try {
      capsule = dlpack::capsule_of(object, device_type);
    } catch (py::error_already_set& error) {
      if (!error.matches(PyExc_BufferError) && !error.matches(PyExc_TypeError)) throw;
      refuse("cannot be read: " + std::string(error.what()));
    }
    dlpack::Tensor tensor;
    if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
      const auto* managed = static_cast<dlpack::Versioned*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
      if (managed->major != 1) refuse("has DLPack version " + std::to_string(managed->major) + ": expected 1");
      if (written && managed->flags & 1) refuse("is read-only: expected memory that can be written");
      tensor = managed->tensor;
    } else if (PyCapsule_IsValid(capsule.ptr(), "dltensor")) {
      tensor = static_cast<dlpack::Managed*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"))->tensor;
    } else {
      refuse("its __dlpack__ gave no DLPack capsule");
    }
    take(tensor, device_type);
  }

  int64_t bytes() const {  // from the first to the last element
    int64_t last = 0;
    for (int i = 0; i < rank; ++i) {
      if (size[i] == 0) return 0;
      last += (size[i] - 1) * stride[i];
    }
    return (last + 1) * simt::size_of(type);
  }

  std::string shape() const { return tuple(size); }
  std::string strides() const { return tuple(stride); }

 private:
  void take(const dlpack::Tensor& tensor, int device_type) {
    const bool host = tensor.device.type == 1 || tensor.device.type == 3;  // 3: page-locked
    if (device_type == 1 ? !host : tensor.device.type != device_type)
      refuse(device_type == 1 ? "is not in the CPU's memory: this module is the CPU model, call .cpu()"
                              : "is not on a CUDA device: this module runs on GPUs, call .cuda()");
    const int code = tensor.type.code, bits = tensor.type.bits;
    if (tensor.type.lanes == 1 && code == 2 && bits == 32) type = simt::DataType::f32;
    else if (tensor.type.lanes == 1 && code == 2 && bits == 16) type = simt::DataType::f16;
    else if (tensor.type.lanes == 1 && (code == 4 || code == 1) && bits == 16) type = simt::DataType::bf16;
    else refuse("expected float32, float16 or bfloat16 (numpy: its bits as uint16), got another type of " +
                std::to_string(bits) + " bits");
    if (tensor.rank > 3) refuse("expected at most 3 dimensions, got " + std::to_string(tensor.rank));
    device = tensor.device.id;
    rank = tensor.rank;
    int64_t next = 1;
    for (int i = rank - 1; i >= 0; --i) {
      size[i] = tensor.shape[i];
      stride[i] = tensor.strides ? tensor.strides[i] : next;
      next *= size[i];
    }
    data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    if (reinterpret_cast<uintptr_t>(data) % simt::size_of(type))
      refuse("is misaligned: expected an address that is a multiple of " + std::to_string(simt::size_of(type)) +
             ", copy it");
  }

  std::string tuple(const int64_t* values) const {
    std::string text = "(";
    for (int i = 0; i < rank; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
    return text + (rank == 1 ? ",)" : ")");
  }
};

}  // namespace native

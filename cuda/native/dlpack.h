// Arrays from Python without the headers of torch or numpy: the part of the DLPack 1.0 ABI that bindings need.
// An Array is borrowed: it keeps the memory alive and never writes to the capsule. Refused: what is not float32, float16
// or bfloat16 (numpy has none: there uint16 holds the bits), is elsewhere than on the module's device, or misaligned.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "native/view.h"

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

struct Array : View {
  py::object capsule;

  // `integers`: int32, int64 and bytes are welcome too.
  Array(const char* name, const py::object& object, int device_type, bool written, bool integers = false) {
    this->name = name;
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
      read_only = managed->flags & 1;
      if (written) expect_writable();
      tensor = managed->tensor;
    } else if (PyCapsule_IsValid(capsule.ptr(), "dltensor")) {
      tensor = static_cast<dlpack::Managed*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"))->tensor;
    } else {
      refuse("its __dlpack__ gave no DLPack capsule");
    }
    take(tensor, device_type, integers);
  }

 private:
  void take(const dlpack::Tensor& tensor, int device_type, bool integers) {
    const bool host = tensor.device.type == 1 || tensor.device.type == 3;  // 3: page-locked
    if (device_type == 1 ? !host : tensor.device.type != device_type)
      refuse(device_type == 1 ? "is not in the CPU's memory: this module is the CPU model, call .cpu()"
                              : "is not on a CUDA device: this module runs on GPUs, call .cuda()");
    const int code = tensor.type.code, bits = tensor.type.bits;
    const bool whole = integers && tensor.type.lanes == 1;
    if (tensor.type.lanes == 1 && code == 2 && bits == 32) type = DataType::f32;
    else if (tensor.type.lanes == 1 && code == 2 && bits == 16) type = DataType::f16;
    else if (tensor.type.lanes == 1 && (code == 4 || code == 1) && bits == 16) type = DataType::bf16;
    else if (whole && code == 0 && bits == 32) type = DataType::i32;
    else if (whole && code == 0 && bits == 64) type = DataType::i64;
    else if (whole && (code == 1 || code == 6) && bits == 8) type = DataType::u8;
    else refuse("expected float32, float16 or bfloat16 (numpy: its bits as uint16), got another type of " +
                std::to_string(bits) + " bits");
    const int most = integers ? most_dimensions : 3;
    if (tensor.rank > most)
      refuse("expected at most " + std::to_string(most) + " dimensions, got " + std::to_string(tensor.rank));
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
};

}  // namespace native

// An array as kernels' launchers see it: where it lies, its type, its shape. No Python in here; dlpack.h fills it.
// Checks raise std::invalid_argument with the array's name, which becomes a ValueError.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "simt/types.h"

namespace native {

using simt::DataType;

inline const char* name_of(DataType type) {
  switch (type) {
    case DataType::f32: return "float32";
    case DataType::bf16: return "bfloat16";
    case DataType::f16: return "float16";
    case DataType::i32: return "int32";
    case DataType::i64: return "int64";
    case DataType::u8: return "uint8";
    default: return "another type";
  }
}

struct View {
  static constexpr int most_dimensions = 4;
  std::string name;
  char* data = nullptr;
  DataType type = DataType::f32;
  int device = 0, rank = 0;
  int64_t size[most_dimensions] = {}, stride[most_dimensions] = {};  // in elements
  bool read_only = false;

  [[noreturn]] void refuse(const std::string& why) const { throw std::invalid_argument(name + ": " + why); }

  template <class T>
  T* as() const { return reinterpret_cast<T*>(data); }

  int64_t elements() const {
    int64_t count = 1;
    for (int i = 0; i < rank; ++i) count *= size[i];
    return count;
  }
  int64_t bytes() const {  // from the first to the last element
    int64_t last = 0;
    for (int i = 0; i < rank; ++i) {
      if (size[i] == 0) return 0;
      last += (size[i] - 1) * stride[i];
    }
    return (last + 1) * simt::size_of(type);
  }
  bool contiguous() const {
    int64_t next = 1;
    for (int i = rank - 1; i >= 0; --i) {
      if (size[i] != 1 && stride[i] != next) return false;
      next *= size[i];
    }
    return true;
  }

  std::string shape() const { return tuple(size); }
  std::string strides() const { return tuple(stride); }

  // ---- checks; each returns the view, so that they can be chained ----
  const View& expect_type(std::initializer_list<DataType> allowed) const {
    std::string all;
    for (const DataType one : allowed) {
      if (type == one) return *this;
      all += std::string(all.empty() ? "" : ", ") + name_of(one);
    }
    refuse(std::string("is ") + name_of(type) + ": expected " + all);
  }
  const View& expect_shape(std::initializer_list<int64_t> wanted) const {
    bool same = int(wanted.size()) == rank;
    std::string text = "(";
    int i = 0;
    for (const int64_t one : wanted) {
      same = same && i < rank && size[i] == one;
      text += (i++ ? ", " : "") + std::to_string(one);
    }
    if (!same) refuse("shape " + shape() + ": expected " + text + (wanted.size() == 1 ? ",)" : ")"));
    return *this;
  }
  const View& expect_rank(int wanted) const {
    if (rank != wanted) refuse("shape " + shape() + ": expected " + std::to_string(wanted) + " dimensions");
    return *this;
  }
  const View& expect_contiguous() const {
    if (!contiguous()) refuse("shape " + shape() + " with strides " + strides() + ": expected a contiguous array");
    return *this;
  }
  const View& expect_writable() const {
    if (read_only) refuse("is read-only: expected memory that can be written");
    return *this;
  }
  const View& expect_aligned(int bytes) const {
    if (reinterpret_cast<uintptr_t>(data) % bytes)
      refuse("starts " + std::to_string(reinterpret_cast<uintptr_t>(data) % bytes) + " bytes past a multiple of " +
             std::to_string(bytes) + ": copy it");
    return *this;
  }

 private:
  std::string tuple(const int64_t* values) const {
    std::string text = "(";
    for (int i = 0; i < rank; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
    return text + (rank == 1 ? ",)" : ")");
  }
};

}  // namespace native

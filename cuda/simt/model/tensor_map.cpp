// simt::tensor_map: what cuTensorMapEncodeTiled checks, with the value and what was expected; the map is the
// description itself. Refuses, too, what the driver takes but the model does not do: a box narrower than its swizzle.
#include "state.h"

namespace simt {

namespace {

[[noreturn]] void refuse(const std::string& what, uint64_t value, const std::string& expected) {
  throw Error("tensor map: " + what + " is " + std::to_string(value) + ", expected " + expected);
}

std::string of_dimension(const char* what, int dimension) {
  return std::string(what) + "[" + std::to_string(dimension) + "]";
}

void check_type(DataType type) {
  const int number = int(type);
  if (number < int(DataType::u8) || number > int(DataType::bf16))
    refuse("the data type", uint64_t(number), "one of DataType");
}

void check_dimensions(const TensorShape& shape) {
  if (shape.rank < 1 || shape.rank > 5) refuse("the rank", uint64_t(shape.rank), "1 to 5");
  for (int d = 0; d < shape.rank; ++d) {
    if (!shape.size[d] || shape.size[d] > 1ull << 32) refuse(of_dimension("size", d), shape.size[d], "1 to 2^32");
    if (!shape.box[d] || shape.box[d] > 256) refuse(of_dimension("box", d), shape.box[d], "1 to 256");
    if (!shape.step[d] || shape.step[d] > 8) refuse(of_dimension("step", d), shape.step[d], "1 to 8");
  }
  if (shape.step[0] != 1)
    refuse("step[0]", shape.step[0], "1: the hardware ignores any other in the innermost dimension");
}

void check_strides(const TensorShape& shape) {
  for (int d = 0; d + 1 < shape.rank; ++d) {
    if (shape.stride[d] % 16) refuse(of_dimension("stride", d), shape.stride[d], "a multiple of 16 bytes");
    if (shape.stride[d] >= 1ull << 40) refuse(of_dimension("stride", d), shape.stride[d], "less than 2^40 bytes");
  }
}

void check_inner_box(const TensorShape& shape, int element, Swizzle swizzle) {
  const uint64_t inner = uint64_t(shape.box[0]) * uint64_t(element);
  if (inner % 16) refuse("the inner extent of the box in bytes", inner, "a multiple of 16");
  if (swizzle == Swizzle::none) return;
  const uint64_t span = 16ull << int(swizzle);  // 32, 64 or 128
  if (int(swizzle) < 0 || swizzle > Swizzle::b128) refuse("the swizzle", uint64_t(int(swizzle)), "one of Swizzle");
  if (inner > span)
    refuse("the inner extent of the box in bytes", inner, "at most the " + std::to_string(span) + " of the swizzle");
  if (inner < span)
    refuse("the inner extent of the box in bytes", inner,
           "the " + std::to_string(span) + " of the swizzle: rows narrower than that are not modelled");
}

}  // namespace

TensorMap tensor_map(const void* base, DataType type, const TensorShape& shape, Swizzle swizzle, L2Promotion) {
  check_type(type);
  if (reinterpret_cast<uintptr_t>(base) % 16)
    refuse("the address modulo 16", reinterpret_cast<uintptr_t>(base) % 16, "0: tensors are 16-byte aligned");
  check_dimensions(shape);
  check_strides(shape);
  check_inner_box(shape, size_of(type), swizzle);
  TensorMap map;
  map.base = static_cast<char*>(const_cast<void*>(base));
  map.type = type;
  map.shape = shape;
  map.swizzle = swizzle;
  return map;
}

}  // namespace simt

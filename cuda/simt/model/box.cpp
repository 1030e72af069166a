// The global side of a TMA or bulk copy: walks the box of a tensor map in one to five dimensions and moves its rows.
// What lies outside the tensor reads as zero and is not written. Reductions are atomic, as on the hardware.
#include <algorithm>
#include <cstring>

#include "../cpu/half.h"
#include "state.h"

namespace simt::model {

namespace {

uint32_t steps(const TensorShape& shape, int dimension) {  // elements that one instruction moves along a dimension
  return (shape.box[dimension] + shape.step[dimension] - 1) / shape.step[dimension];
}

// visit(offset of the row in the box, global address of its first byte inside, where that is in the row, bytes inside)
template <class Visit>
void each_row(const CopyOperation& op, Visit visit) {
  if (!op.tensor) return visit(size_t(0), op.global, size_t(0), size_t(op.bytes));
  const TensorShape& shape = op.map.shape;
  const int64_t element = size_of(op.map.type), x = op.at.at[0];
  const int64_t first = std::max<int64_t>(0, -x), end = std::min<int64_t>(shape.box[0], int64_t(shape.size[0]) - x);
  const size_t row_bytes = size_t(shape.box[0]) * size_t(element);
  uint32_t index[5] = {}, count[5] = {1, 1, 1, 1, 1};
  for (int d = 1; d < shape.rank; ++d) count[d] = steps(shape, d);
  const size_t rows = op.bytes / row_bytes;
  for (size_t row = 0; row < rows; ++row) {
    bool inside = end > first;
    int64_t address = (x + first) * element;
    for (int d = 1; d < shape.rank; ++d) {
      const int64_t at = int64_t(op.at.at[d]) + int64_t(index[d]) * shape.step[d];
      inside = inside && at >= 0 && at < int64_t(shape.size[d]);
      address += at * int64_t(shape.stride[d - 1]);
    }
    if (inside) visit(row * row_bytes, op.map.base + address, size_t(first * element), size_t((end - first) * element));
    for (int d = 1; d < shape.rank && ++index[d] == count[d]; ++d) index[d] = 0;
  }
}

// ---- reductions ---------------------------------------------------------------------------------------------------

template <class Bits, class Combine>
void reduce_elements(char* global, const char* data, size_t bytes, Combine combine) {
  for (size_t i = 0; i < bytes; i += sizeof(Bits)) {
    auto* target = reinterpret_cast<Bits*>(global + i);
    Bits operand;
    memcpy(&operand, data + i, sizeof operand);
    Bits old = __atomic_load_n(target, __ATOMIC_RELAXED);
    bool done = false;
    while (!done)
      done = __atomic_compare_exchange_n(target, &old, combine(old, operand), true, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  }
}

template <class Bits, class T>
void add_as(char* global, const char* data, size_t bytes) {
  reduce_elements<Bits>(global, data, bytes, [](Bits old, Bits operand) {
    T x, y;
    memcpy(&x, &old, sizeof x);
    memcpy(&y, &operand, sizeof y);
    const T result = x + y;
    Bits bits;
    memcpy(&bits, &result, sizeof bits);
    return bits;
  });
}

void reduce_add(DataType type, char* global, const char* data, size_t bytes) {
  switch (type) {
    case DataType::u32: case DataType::i32: return add_as<uint32_t, uint32_t>(global, data, bytes);
    case DataType::u64: case DataType::i64: return add_as<uint64_t, uint64_t>(global, data, bytes);
    case DataType::f32: return add_as<uint32_t, float>(global, data, bytes);
    case DataType::f64: return add_as<uint64_t, double>(global, data, bytes);
    case DataType::f16:
      return reduce_elements<uint16_t>(global, data, bytes, [](uint16_t x, uint16_t y) {
        return f16_bits(f16_value(x) + f16_value(y));
      });
    case DataType::bf16:
      return reduce_elements<uint16_t>(global, data, bytes, [](uint16_t x, uint16_t y) {
        return bf16_bits(bf16_value(x) + bf16_value(y));
      });
    default: break;  // refused when the operation was issued
  }
}

}  // namespace

std::vector<std::pair<uint32_t, uint32_t>> inside_tensor(const CopyOperation& op) {
  std::vector<std::pair<uint32_t, uint32_t>> inside;
  each_row(op, [&](size_t row, const char*, size_t first, size_t bytes) {
    const uint32_t low = uint32_t(row + first), high = low + uint32_t(bytes);
    if (!inside.empty() && inside.back().second == low) inside.back().second = high;
    else inside.push_back({low, high});
  });
  return inside;
}

uint32_t box_bytes(const TensorMap& map) {
  uint32_t bytes = uint32_t(map.shape.box[0]) * uint32_t(size_of(map.type));
  for (int d = 1; d < map.shape.rank; ++d) bytes *= steps(map.shape, d);
  return bytes;
}

void read_global(CopyOperation& op, char* box) {
  if (op.tensor) memset(box, 0, op.bytes);
  each_row(op, [&](size_t row, const char* global, size_t first, size_t bytes) {
    check::async_access(op.snapshot, global, bytes, false, nullptr, op.site);
    memcpy(box + row + first, global, bytes);
  });
}

void write_global(CopyOperation& op, const char* box) {
  each_row(op, [&](size_t row, char* global, size_t first, size_t bytes) {
    check::async_access(op.written, global, bytes, true, nullptr, op.site, op.reduction != Reduction::none);
    if (op.reduction == Reduction::none)
      memcpy(global, box + row + first, bytes);
    else
      reduce_add(op.type, global, box + row + first, bytes);
  });
}

}  // namespace simt::model

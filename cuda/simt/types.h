// Words that both compilers share: how a grid is launched and how TMA is told about a tensor.
#pragma once
#include <cstddef>
#include <cstdint>

namespace simt {

// Element types TMA can move. The numbers are those of CUtensorMapDataType.
enum class DataType : int { u8 = 0, u16 = 1, u32 = 2, i32 = 3, u64 = 4, i64 = 5, f16 = 6, f32 = 7, f64 = 8, bf16 = 9 };

// How TMA permutes 16-byte chunks in shared memory. The numbers are those of CUtensorMapSwizzle.
enum class Swizzle : int { none = 0, b32 = 1, b64 = 2, b128 = 3 };

// How much a TMA load brings into L2. The numbers are those of CUtensorMapL2promotion.
enum class L2Promotion : int { none = 0, b64 = 1, b128 = 2, b256 = 3 };

constexpr int size_of(DataType type) {
  switch (type) {
    case DataType::u8: return 1;
    case DataType::u16: case DataType::f16: case DataType::bf16: return 2;
    case DataType::u32: case DataType::i32: case DataType::f32: return 4;
    default: return 8;
  }
}

// A tensor as TMA sees it, innermost dimension first. `stride` is in bytes, of dimensions 1 and up; `box` is what one
// instruction moves, in elements.
struct TensorShape {
  int rank;
  uint64_t size[5];
  uint64_t stride[4];
  uint32_t box[5];
  uint32_t step[5] = {1, 1, 1, 1, 1};  // element strides
};

}  // namespace simt

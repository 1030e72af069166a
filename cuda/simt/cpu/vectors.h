// CUDA's vector types for g++. The 8- and 16-byte ones copy as one access, as the hardware's do, so that the checked
// build sees (and counts) one access of that width.
#pragma once
#include <cstdint>
#include <cstring>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt::vectors {
typedef uint32_t One __attribute__((may_alias));
typedef uint32_t Two __attribute__((vector_size(8), may_alias));
typedef uint32_t Four __attribute__((vector_size(16), may_alias));
}  // namespace simt::vectors

#define SIMT_VECTOR(NAME, TYPE, WHOLE, ...)                                                  \
  struct alignas(sizeof(simt::vectors::WHOLE)) NAME {                                        \
    TYPE __VA_ARGS__;                                                                        \
    NAME() = default;                                                                        \
    NAME(const NAME& other) { *this = other; }                                               \
    NAME& operator=(const NAME& other) {                                                     \
      *reinterpret_cast<simt::vectors::WHOLE*>(this) =                                       \
          *reinterpret_cast<const simt::vectors::WHOLE*>(&other);                            \
      return *this;                                                                          \
    }
#define SIMT_VECTOR2(NAME, TYPE, MAKE)                                                       \
  SIMT_VECTOR(NAME, TYPE, Two, x, y)                                                         \
    NAME(TYPE x, TYPE y) : x(x), y(y) {}                                                     \
  };                                                                                         \
  inline NAME MAKE(TYPE x, TYPE y) { return {x, y}; }
#define SIMT_VECTOR4(NAME, TYPE, MAKE)                                                       \
  SIMT_VECTOR(NAME, TYPE, Four, x, y, z, w)                                                  \
    NAME(TYPE x, TYPE y, TYPE z, TYPE w) : x(x), y(y), z(z), w(w) {}                         \
  };                                                                                         \
  inline NAME MAKE(TYPE x, TYPE y, TYPE z, TYPE w) { return {x, y, z, w}; }

SIMT_VECTOR2(float2, float, make_float2)
SIMT_VECTOR2(int2, int, make_int2)
SIMT_VECTOR2(uint2, unsigned, make_uint2)
SIMT_VECTOR4(float4, float, make_float4)
SIMT_VECTOR4(int4, int, make_int4)
SIMT_VECTOR4(uint4, unsigned, make_uint4)
#undef SIMT_VECTOR
#undef SIMT_VECTOR2
#undef SIMT_VECTOR4

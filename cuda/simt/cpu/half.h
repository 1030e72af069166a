// __nv_bfloat16 and __half for g++: storage, conversion (round to nearest even, as the hardware) and the pair types.
#pragma once
#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace simt {

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline uint16_t bf16_bits(float value) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // NaN
  return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
inline float bf16_value(uint16_t bits) { return float_of_bits(uint32_t(bits) << 16); }

inline uint16_t f16_bits(float value) {
  const uint32_t bits = bits_of_float(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;                    // NaN
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // rounds to 65536 or more: infinity
  if (magnitude < 0x38800000u) {                                 // below 2^-14: subnormal, a multiple of 2^-24
    const float scaled = float_of_bits(magnitude) * 16777216.f;  // exact: a power of two
    uint32_t whole = uint32_t(scaled);
    const float rest = scaled - float(whole);
    whole += rest > 0.5f || (rest == 0.5f && (whole & 1));
    return uint16_t(sign | whole);
  }
  return uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13));
}
inline float f16_value(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 0x3ffu;
  if (exponent == 31) return float_of_bits(sign | 0x7f800000u | fraction << 13);
  if (exponent == 0) {
    const float magnitude = float(fraction) * (1.f / 16777216.f);
    return sign ? -magnitude : magnitude;
  }
  return float_of_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

}  // namespace simt

struct alignas(2) __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float value) : bits(simt::bf16_bits(value)) {}
  operator float() const { return simt::bf16_value(bits); }
};
struct alignas(2) __half {
  uint16_t bits;
  __half() = default;
  __half(float value) : bits(simt::f16_bits(value)) {}
  operator float() const { return simt::f16_value(bits); }
};
// Pairs copy as one access of 4 bytes: see vectors.h.
#define SIMT_PAIR(NAME, ELEMENT)                                                                           \
  struct alignas(4) NAME {                                                                                 \
    ELEMENT x, y;                                                                                          \
    NAME() = default;                                                                                      \
    NAME(ELEMENT x, ELEMENT y) : x(x), y(y) {}                                                             \
    NAME(const NAME& other) { *this = other; }                                                             \
    NAME& operator=(const NAME& other) {                                                                   \
      *reinterpret_cast<simt::vectors::One*>(this) = *reinterpret_cast<const simt::vectors::One*>(&other); \
      return *this;                                                                                        \
    }                                                                                                      \
  };
SIMT_PAIR(__nv_bfloat162, __nv_bfloat16)
SIMT_PAIR(__half2, __half)
#undef SIMT_PAIR

inline __nv_bfloat16 __float2bfloat16(float value) { return value; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return value; }
inline float __bfloat162float(__nv_bfloat16 value) { return value; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 pair) { return {pair.x, pair.y}; }
inline __half __float2half(float value) { return value; }
inline __half __float2half_rn(float value) { return value; }
inline float __half2float(__half value) { return value; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline float2 __half22float2(__half2 pair) { return {pair.x, pair.y}; }

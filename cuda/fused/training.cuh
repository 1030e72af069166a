// What the operations of a training step share: 16 bytes as floats and back, how far it is to the next multiple of 16
// bytes, and a sum over a block that always adds in the same order.
#pragma once
#include <type_traits>

#include "simt/ptx.cuh"

namespace fused::training {

template <class T>
constexpr int width = 16 / int(sizeof(T));  // elements in 16 bytes

// The words by value: through a reference into memory they would be four loads.
template <class T>
PTX_INLINE void unpack(uint4 words, float (&x)[width<T>]) {
  const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      x[i] = __uint_as_float(word[i]);
    } else if constexpr (std::is_same_v<T, __half>) {
      const float2 both = __half22float2(reinterpret_cast<const __half2&>(word[i]));
      x[2 * i] = both.x, x[2 * i + 1] = both.y;
    } else {  // a bfloat16 is the upper half of a float
      x[2 * i] = __uint_as_float(word[i] << 16), x[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    }
  }
}

template <class T>
PTX_INLINE uint4 pack(const float (&x)[width<T>]) {
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) word[i] = __float_as_uint(x[i]);
    else if constexpr (std::is_same_v<T, __half>) word[i] = ptx::pack_f16(x[2 * i], x[2 * i + 1]);
    else word[i] = ptx::pack_bf16(x[2 * i], x[2 * i + 1]);
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}

// How many elements lie before the first multiple of 16 bytes.
template <class T>
PTX_INLINE int before_16(const T* pointer) {
  return int((0 - reinterpret_cast<uintptr_t>(pointer)) % 16) / int(sizeof(T));
}

PTX_INLINE float warp_sum(float x) {
#pragma unroll
  for (int bits = 16; bits; bits /= 2) x += __shfl_xor_sync(0xffffffff, x, bits);
  return x;
}

// The sum over the block, in every thread. `each` has room for a float of each warp; nobody may write there afterwards
// but after another barrier.
PTX_INLINE float block_sum(float x, float* each) {
  const float mine = warp_sum(x);
  if (threadIdx.x % 32 == 0) each[threadIdx.x / 32] = mine;
  __syncthreads();
  float sum = 0.f;
  for (int warp = 0; warp < int(blockDim.x) / 32; ++warp) sum += each[warp];
  return sum;
}

}  // namespace fused::training

// Many tensors in one launch: a table of addresses and sizes on the device, and a list of chunks of them, one a block.
// A launch for each tensor would cost more than the memory traffic of most of them.
//
// The tables are made by cuda/optim.py, which knows the tensors. A chunk's number says nothing about the schedule, so
// what is summed chunk by chunk always adds in the same order.
#pragma once
#include "fused/training.cuh"
#include "native/operation.h"

namespace fused::training {

constexpr int chunk_elements = 8192, chunk_threads = 256;

struct Chunk {
  int32_t tensor, number;  // elements from number * chunk_elements on
};

// Types in a table. Few branches, the same in all threads of a block: a kernel for each mixture would not be faster.
enum Type : int64_t { type_f32 = 0, type_bf16 = 1, type_f16 = 2 };
constexpr int size_of(int64_t type) { return type == type_f32 ? 4 : 2; }

// Whether four elements can be read at once: 16 bytes of float32, 8 of the others.
PTX_INLINE bool in_fours(int64_t address, int64_t type) { return address % (4 * size_of(type)) == 0; }

PTX_INLINE float load_one(int64_t address, int64_t type, int64_t i) {
  if (type == type_f32) return reinterpret_cast<const float*>(address)[i];
  if (type == type_bf16) return float(reinterpret_cast<const __nv_bfloat16*>(address)[i]);
  return float(reinterpret_cast<const __half*>(address)[i]);
}

PTX_INLINE void load_four(int64_t address, int64_t type, int64_t i, float (&x)[4]) {
  if (type == type_f32) {
    unpack<float>(ptx::load_v4(reinterpret_cast<const void*>(address + 4 * i)), x);
    return;
  }
  const uint2 words = *reinterpret_cast<const uint2*>(address + 2 * i);
  float both[8];
  if (type == type_bf16) unpack<__nv_bfloat16>(make_uint4(words.x, words.y, 0, 0), both);
  else unpack<__half>(make_uint4(words.x, words.y, 0, 0), both);
#pragma unroll
  for (int j = 0; j < 4; ++j) x[j] = both[j];
}

PTX_INLINE void store_one(int64_t address, int64_t type, int64_t i, float x) {
  if (type == type_f32) reinterpret_cast<float*>(address)[i] = x;
  else if (type == type_bf16) reinterpret_cast<__nv_bfloat16*>(address)[i] = __nv_bfloat16(x);
  else reinterpret_cast<__half*>(address)[i] = __half(x);
}

PTX_INLINE void store_four(int64_t address, int64_t type, int64_t i, const float (&x)[4]) {
  if (type == type_f32) ptx::store_v4(reinterpret_cast<void*>(address + 4 * i), pack<float>(x));
  else if (type == type_bf16)
    *reinterpret_cast<uint2*>(address + 2 * i) = make_uint2(ptx::pack_bf16(x[0], x[1]), ptx::pack_bf16(x[2], x[3]));
  else *reinterpret_cast<uint2*>(address + 2 * i) = make_uint2(ptx::pack_f16(x[0], x[1]), ptx::pack_f16(x[2], x[3]));
}

// A thread's part of a chunk of a tensor of `count` elements: four(i) for elements i .. i + 3, one(i) for those that
// are left, or for all if the tensor's addresses do not allow fours.
template <class Four, class One>
PTX_INLINE void for_chunk(int number, int64_t count, bool fours, Four four, One one) {
  const int64_t first = int64_t(number) * chunk_elements, last = min(count, first + chunk_elements);
  const int64_t whole = fours ? first + (last - first) / 4 * 4 : first;
#pragma unroll 1
  for (int64_t i = first + 4 * threadIdx.x; i < whole; i += 4 * chunk_threads) four(i);
#pragma unroll 1
  for (int64_t i = whole + threadIdx.x; i < last; i += chunk_threads) one(i);
}

// The table, of `columns` numbers a tensor, and the chunks; checked as far as can be without reading them.
struct Tables {
  const int64_t* tensors;
  const Chunk* chunks;
  unsigned count;  // of chunks

  static Tables of(const native::Arguments& given, int64_t columns) {
    const native::View &tensors = given.array("tensors").expect_rank(2), &chunks = given.array("chunks").expect_rank(2);
    tensors.expect_type({native::DataType::i64}).expect_shape({tensors.size[0], columns}).expect_contiguous();
    chunks.expect_type({native::DataType::i32}).expect_shape({chunks.size[0], 2}).expect_contiguous().expect_aligned(8);
    if (chunks.size[0] < 1 || chunks.size[0] > 0x7fffffff)
      chunks.refuse("shape " + chunks.shape() + ": expected at least one chunk");
    return {tensors.as<int64_t>(), chunks.as<Chunk>(), unsigned(chunks.size[0])};
  }
};

}  // namespace fused::training

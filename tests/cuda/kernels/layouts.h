// One small kernel for each instruction whose layout matters: raw bytes of memory in, raw bytes or registers out, so
// that a test sees where everything lies. No CUDA types: callers need no nvcc. Pointers are to the device's memory (for
// the CPU model: any); each function returns when its kernel has been started. Sizes are the caller's to get right.
#pragma once
#include <cstdint>

#include "simt/types.h"

namespace layouts {

constexpr int image_bytes = 64 * 1024;  // what a block can show of its shared memory
constexpr int most_steps = 8;           // of wgmma, 16 values of k each

// One TMA instruction: the box of `tensor` at `coordinates`, at `offset` in shared memory.
struct Box {
  void* tensor;
  simt::DataType type;
  simt::TensorShape shape;
  simt::Swizzle swizzle;
  int coordinates[5];
  int offset;
  uint32_t bytes;  // that the instruction moves, those outside of the tensor included
};

// `image` becomes shared memory (`bytes` of it), the box is loaded over it, and `image` becomes what lies there then.
void tma_load(const Box&, void* image, int bytes);
// The box goes from shared memory, filled from `image`, to the tensor, or is added to what is there.
void tma_store(const Box&, const void* image, int bytes, bool add);
// The same load in a cluster: block `source` issues it for the blocks of `mask`. images: one after the other, by block.
void tma_multicast(const Box&, void* images, int bytes, int blocks, int source, int mask);
// A ring of blocks: each writes 32 values, 100 * its rank + lane, to the next block's shared memory and arrives there.
// received[rank][lane] is what came; before that, tested[rank] = {a fresh barrier's answer to parity 0, to parity 1}.
void cluster_ring(uint32_t* received, uint32_t* tested, int blocks);

// Lane i gives the address at offsets[i]; registers[lane][matrix].
void ldmatrix(const void* image, int bytes, const uint32_t* offsets, int matrices, bool transpose, uint32_t* registers);
void stmatrix(void* image, int bytes, const uint32_t* offsets, int matrices, bool transpose, const uint32_t* registers);
// d = a b + c, all as registers: a[lane][4], b[lane][2], c and d[lane][4].
void mma_m16n8k16(bool f16, const uint32_t* a, const uint32_t* b, const float* c, float* d);

// An operand of wgmma in shared memory.
struct Operand {
  int offset, leading, stride;  // of the descriptor, in bytes; `offset` from the image's beginning
  bool mn_major;
  int step[most_steps];  // added to the descriptor's address for each 16 values of k
};
struct Product {
  int n;  // 8, 24, 64, 128 or 256
  bool f16;  // with n = 64 only; else bf16
  simt::Swizzle swizzle;
  int steps;
  bool accumulate;  // onto what d holds
};
// d[thread][n / 2], read first. descriptors: address of the image in shared memory, descriptor of a, of b (first step).
void wgmma_shared(const Product&, const Operand& a, const Operand& b, const void* image, int bytes, float* d,
                  uint64_t* descriptors);
// The same with A from registers: a[step][thread][4].
void wgmma_registers(const Product&, const uint32_t* a, const Operand& b, const void* image, int bytes, float* d);

}  // namespace layouts

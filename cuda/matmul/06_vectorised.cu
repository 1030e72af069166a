// Step 06: four elements an instruction. Global memory is read and written by float4; A lies transposed in shared
// memory, so that a thread's 8 elements of A and of B are two 16-byte loads each: 4 loads for 64 FMAs, not up to 16.
//
// Banks: a 16-byte load is served for 8 threads at a time, whose addresses must fall on all 32 banks. So a thread's
// 8 x 8 elements become 2 x 2 blocks of 4 x 4, half a tile apart, and 8 neighbours read 8 neighbouring float4. And the
// threads of a warp that transposes write to k and k + 4 of 16 lines, which an XOR of the line spreads over the banks.
// Limit: the block either loads or computes, never both; only other blocks of the SM hide the wait.
// Refuses: anything but f32.
#include "matmul/launch.cuh"

namespace matmul {
namespace {

constexpr int tile = 128, tile_k = 8, thread_tile = 8, half = tile / 2;
constexpr int threads_across = tile / thread_tile, threads = threads_across * threads_across;

struct alignas(16) Shared {
  float a[tile_k][tile];  // k, swizzled row
  float b[tile_k][tile];  // k, swizzled column
};

// Where `line` lies in the row of `k`. Groups of 16 lines change places in the rows k = 4..7; a float4 stays whole.
__device__ __forceinline__ int swizzled(int line, int k) { return line ^ k / 4 * 16; }

// Four neighbours in memory from (line, k) on, zero outside of the matrix.
template <bool along_k>
__device__ __forceinline__ float4 load_quad(const Operand<float, along_k>& operand, int line, int k) {
  const int down = along_k ? 0 : 1, along = along_k ? 1 : 0;
  if (operand.aligned && operand.inside(line + 3 * down, k + 3 * along))
    return *reinterpret_cast<const float4*>(operand.address(line, k));
  float quad[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) quad[i] = operand.at(line + i * down, k + i * along);
  return make_float4(quad[0], quad[1], quad[2], quad[3]);
}

// The quad of a slice that this thread copies: four k of a line where neighbours lie along k, else four lines of a k.
static_assert(tile * tile_k == 4 * threads, "one quad of each operand a thread");
template <bool along_k>
__device__ __forceinline__ int quad_line() {
  return along_k ? threadIdx.x / (tile_k / 4) : threadIdx.x % (tile / 4) * 4;
}
template <bool along_k>
__device__ __forceinline__ int quad_k() {
  return along_k ? threadIdx.x % (tile_k / 4) * 4 : threadIdx.x / (tile / 4);
}

template <bool along_k>
__device__ __forceinline__ void store_quad(float (&to)[tile_k][tile], float4 quad) {
  const int k = quad_k<along_k>(), line = swizzled(quad_line<along_k>(), k);
  if (along_k) {
    to[k][line] = quad.x;
    to[k + 1][line] = quad.y;
    to[k + 2][line] = quad.z;
    to[k + 3][line] = quad.w;
  } else {
    *reinterpret_cast<float4*>(&to[k][line]) = quad;
  }
}

template <bool a_along_k, bool b_along_k>
__global__ void __launch_bounds__(threads, 2)
    vectorised(Operand<float, a_along_k> a, Operand<float, b_along_k> b, Epilogue<float, float> epilogue) {
  auto& shared = simt::dynamic_shared<Shared>();
  const Tile corner = tile_of_block<tile, tile>(epilogue.m, epilogue.n);
  const int row = threadIdx.x / threads_across * 4, column = threadIdx.x % threads_across * 4;

  float sum[thread_tile][thread_tile] = {};
  for (int slice = 0; slice < a.depth; slice += tile_k) {
    const float4 a_quad = load_quad(a, corner.row + quad_line<a_along_k>(), slice + quad_k<a_along_k>());
    const float4 b_quad = load_quad(b, corner.column + quad_line<b_along_k>(), slice + quad_k<b_along_k>());
    store_quad<a_along_k>(shared.a, a_quad);
    store_quad<b_along_k>(shared.b, b_quad);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < tile_k; ++k) {
      const float* const a_line = &shared.a[k][swizzled(row, k)];
      const float* const b_line = &shared.b[k][swizzled(column, k)];
      const float4 a0 = *reinterpret_cast<const float4*>(a_line), a1 = *reinterpret_cast<const float4*>(a_line + half);
      const float4 b0 = *reinterpret_cast<const float4*>(b_line), b1 = *reinterpret_cast<const float4*>(b_line + half);
      const float a_part[thread_tile] = {a0.x, a0.y, a0.z, a0.w, a1.x, a1.y, a1.z, a1.w};
      const float b_part[thread_tile] = {b0.x, b0.y, b0.z, b0.w, b1.x, b1.y, b1.z, b1.w};
#pragma unroll
      for (int i = 0; i < thread_tile; ++i)
#pragma unroll
        for (int j = 0; j < thread_tile; ++j) sum[i][j] += a_part[i] * b_part[j];
    }
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < thread_tile; ++i)
#pragma unroll
    for (int j = 0; j < thread_tile; j += 4) {
      const float quad[4] = {sum[i][j], sum[i][j + 1], sum[i][j + 2], sum[i][j + 3]};
      epilogue.store_run(blockIdx.z, corner.row + row + i / 4 * half + i % 4, corner.column + column + j / 4 * half,
                         quad);
    }
}

}  // namespace

void vectorised_06(const Problem& problem) {
  require_f32(problem, "vectorised_06");
  require_pairs_for_swiglu(problem, "vectorised_06");
  for_layout<float, Epilogue<float, float>>(problem, [](auto a, auto b, auto epilogue, const Problem& part) {
    simt::launch(vectorised<a.along_k, b.along_k>, grid_of_tiles(part, tile, tile, threads, sizeof(Shared)), a, b,
                 epilogue);
  });
}

}  // namespace matmul

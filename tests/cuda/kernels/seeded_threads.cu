// Mistakes of ordinary kernels: barriers, bounds, shuffles, atomics, cp.async.
#include "seeded.h"

namespace seeded {

// ---- a tiled matrix product in static shared memory -------------------------------------------------------------------
namespace {
enum TiledBug { tiled_none, no_barrier_after_load, no_barrier_before_refill, no_bounds_check, divergent_barrier };

__global__ void tiled_kernel(const float* a, const float* b, float* c, int m, int n, int k, int bug) {
  constexpr int tile = 16;
  __shared__ float a_tile[tile][tile], b_tile[tile][tile];
  const int x = threadIdx.x, y = threadIdx.y, row = blockIdx.y * tile + y, column = blockIdx.x * tile + x;
  const bool unchecked = bug == no_bounds_check;
  float sum = 0;
  for (int k0 = 0; k0 < k; k0 += tile) {
    a_tile[y][x] = unchecked || (row < m && k0 + x < k) ? a[row * k + k0 + x] : 0.f;
    b_tile[y][x] = unchecked || (k0 + y < k && column < n) ? b[(k0 + y) * n + column] : 0.f;
    if (bug != no_barrier_after_load && !(bug == divergent_barrier && y == 3)) __syncthreads();
    for (int i = 0; i < tile; ++i) sum += a_tile[y][i] * b_tile[i][x];
    if (bug != no_barrier_before_refill) __syncthreads();
  }
  if (unchecked || (row < m && column < n)) c[row * n + column] = sum;
}

double run_tiled(int bug) {
  const int m = 40, n = 24, k = 33;
  auto a = integers<float>(m * k, 1), b = integers<float>(k * n, 2);
  auto c = unwritten<float>(m * n);
  Buffers buffers;
  simt::launch(tiled_kernel, {dim3(2, 3), dim3(16, 16)}, buffers.add(a, "a"), buffers.add(b, "b"), buffers.add(c, "c"), m,
               n, k, bug);
  return product_error(a, b, c, m, n, k, true);
}
}  // namespace

const Kernel& tiled() {
  static const Kernel kernel{
      "tiled", {"none", "no_barrier_after_load", "no_barrier_before_refill", "no_bounds_check", "divergent_barrier"}, run_tiled};
  return kernel;
}

// ---- a sum over all blocks -------------------------------------------------------------------------------------------
namespace {
enum ReduceBug {
  reduce_none, no_barrier, half_a_warp, unwritten_partials, no_atomic, no_fence_of_last_block, no_threadfence, fence_before_barrier
};

__device__ float warp_sum(float value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_down_sync(~0u, value, distance);
  return value;
}

struct Partials {
  float partial[32];
  bool last;
};

// The last block to finish adds up what all have stored: the pattern of CUDA's threadFenceReduction sample.
__global__ void reduce_kernel(const float* x, float* sums, unsigned* finished, float* total, float* plain, int n, int bug) {
  Partials& s = simt::dynamic_shared<Partials>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float value = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) value += x[i];
  if (bug == half_a_warp && lane >= 16) return;
  value = warp_sum(value);
  if (lane == 0) s.partial[warp] = value;
  if (bug != no_barrier) __syncthreads();
  if (warp == 0) {
    value = bug == unwritten_partials || lane < int(blockDim.x) / 32 ? s.partial[lane] : 0.f;
    value = warp_sum(value);
    if (lane == 0) {
      if (bug == no_atomic) plain[0] += value;
      sums[blockIdx.x] = value;
      if (bug != no_threadfence) __threadfence();
      if (bug != fence_before_barrier)
        s.last = bug == no_fence_of_last_block ? blockIdx.x == gridDim.x - 1 : atomicAdd(finished, 1u) == gridDim.x - 1;
    }
  }
  __syncthreads();
  if (bug == fence_before_barrier) {  // legal: another thread counts, after the barrier
    if (threadIdx.x == 64) s.last = atomicAdd(finished, 1u) == gridDim.x - 1;
    __syncthreads();
  }
  if (!s.last) return;
  float sum = 0;
  for (int i = threadIdx.x; i < int(gridDim.x); i += blockDim.x) sum += sums[i];
  if (threadIdx.x < 32) sum = warp_sum(sum);
  if (threadIdx.x == 0) total[0] = sum;
}

double run_reduce(int bug) {
  auto x = integers<float>(5000, 3);
  auto sums = unwritten<float>(7), total = unwritten<float>(1);
  std::vector<float> plain(1, 0.f);
  std::vector<unsigned> finished(1, 0u);
  Buffers buffers;
  simt::launch(reduce_kernel, {dim3(7), dim3(128), sizeof(Partials)}, buffers.add(x, "x"), buffers.add(sums, "sums"),
               buffers.add(finished, "finished"), buffers.add(total, "total"), buffers.add(plain, "plain"), 5000, bug);
  double sum = 0;
  for (float value : x) sum += value;
  return larger(0, std::fabs(total[0] - sum));
}
}  // namespace

const Kernel& reduce() {
  static const Kernel kernel{
      "reduce",
      {"none", "no_barrier", "half_a_warp", "unwritten_partials", "no_atomic", "no_fence_of_last_block", "no_threadfence",
       "fence_before_barrier"},
      run_reduce};
  return kernel;
}

// ---- one block hands numbers to another through a flag ---------------------------------------------------------------
namespace {
enum HandoffBug { handoff_none, no_release, no_acquire, volatile_flag };

__global__ void handoff_kernel(float* data, uint32_t* flag, float* out, int bug) {
  volatile uint32_t* const plain = flag;
  if (blockIdx.x == 0) {
    data[threadIdx.x] = float(threadIdx.x);
    if (bug == volatile_flag) __threadfence();  // legal: with a fence, a volatile flag will do
    __syncthreads();
    if (threadIdx.x == 0) {
      if (bug == no_release || bug == volatile_flag) *plain = 1;
      else ptx::store_release(flag, 1);
    }
  } else {
    if (threadIdx.x == 0) {
      if (bug == volatile_flag) while (*plain == 0) __nanosleep(20);
      else if (bug == no_acquire) ptx::store_release(flag + 1, 1);
      else while (ptx::load_acquire(flag) == 0) {}
    }
    __syncthreads();
    out[threadIdx.x] = data[threadIdx.x];
  }
}

double run_handoff(int bug) {
  auto data = unwritten<float>(64), out = unwritten<float>(64);
  std::vector<uint32_t> flag(2, 0u);
  Buffers buffers;
  simt::launch(handoff_kernel, {dim3(2), dim3(64), 0, 1, true}, buffers.add(data, "data"), buffers.add(flag, "flag"),
               buffers.add(out, "out"), bug);
  double worst = 0;
  for (int i = 0; i < 64; ++i) worst = larger(worst, std::fabs(out[i] - float(i)));
  return worst;
}
}  // namespace

const Kernel& handoff() {
  static const Kernel kernel{"handoff", {"none", "no_release", "no_acquire", "volatile_flag"}, run_handoff};
  return kernel;
}

// ---- Ampere's pipeline: cp.async into two buffers, ldmatrix, mma.sync -----------------------------------------------
namespace {
enum AmpereBug { ampere_none, no_copy_wait, no_barrier_before_copy, misaligned_row, divergent_warp, misaligned_copy };

struct Ampere {
  static constexpr int tile = 32, depth = 32, row = depth + 8;
  alignas(16) bf16 a[2][tile][row], b[2][tile][row];
};

__global__ void ampere_kernel(const bf16* a, const bf16* b, float* c, int n, int k, int bug) {
  Ampere& s = simt::dynamic_shared<Ampere>();
  constexpr int tile = Ampere::tile, depth = Ampere::depth;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, m0 = blockIdx.y * tile, n0 = blockIdx.x * tile;
  const int row0 = warp / 2 * 16, column0 = warp % 2 * 16;
  float sum[2][4] = {};
  auto load = [&](int buffer, int k0) {
    for (int i = threadIdx.x; i < tile * depth / 8; i += 128) {
      const int row = i / (depth / 8), column = i % (depth / 8) * 8;
      ptx::cp_async<16>(&s.a[buffer][row][column] + (bug == misaligned_copy), &a[(m0 + row) * k + k0 + column]);
      ptx::cp_async<16>(&s.b[buffer][row][column], &b[(n0 + row) * k + k0 + column]);
    }
    ptx::cp_async_commit_group();
  };
  load(0, 0);
  for (int k0 = 0, buffer = 0; k0 < k; k0 += depth, buffer ^= 1) {
    if (k0 + depth < k)
      load(buffer ^ 1, k0 + depth);
    else
      ptx::cp_async_commit_group();
    if (bug != no_copy_wait) ptx::cp_async_wait_group<1>();
    __syncthreads();
    for (int step = 0; step < depth; step += 16) {
      uint32_t a_fragment[4], b_fragment[4];
      ptx::ldmatrix_x4(a_fragment, &s.a[buffer][row0 + lane % 16][step + lane / 16 * 8] + (bug == misaligned_row ? 4 : 0));
      if (bug == divergent_warp && lane == 7) continue;
      ptx::ldmatrix_x4(b_fragment, &s.b[buffer][column0 + lane % 8 + lane / 16 * 8][step + lane / 8 % 2 * 8]);
      for (int j = 0; j < 2; ++j) {
        const uint32_t b_half[2] = {b_fragment[2 * j], b_fragment[2 * j + 1]};
        ptx::mma_m16n8k16<bf16>(sum[j], a_fragment, b_half, sum[j]);
      }
    }
    if (bug != no_barrier_before_copy) __syncthreads();
  }
  for (int j = 0; j < 2; ++j)
    for (int i = 0; i < 4; ++i)
      c[(m0 + row0 + lane / 4 + 8 * (i / 2)) * n + n0 + column0 + 8 * j + 2 * (lane % 4) + i % 2] = sum[j][i];
}

double run_ampere(int bug) {
  const int m = 64, n = 32, k = 128;
  auto a = integers<bf16>(m * k, 4), b = integers<bf16>(n * k, 5);
  auto c = unwritten<float>(m * n);
  Buffers buffers;
  simt::launch(ampere_kernel, {dim3(n / 32, m / 32), dim3(128), sizeof(Ampere)}, buffers.add(a, "a"), buffers.add(b, "b"),
               buffers.add(c, "c"), n, k, bug);
  return product_error(a, b, c, m, n, k, false);
}
}  // namespace

const Kernel& ampere() {
  static const Kernel kernel{"ampere",
                             {"none", "no_copy_wait", "no_barrier_before_copy", "misaligned_row", "divergent_warp", "misaligned_copy"},
                             run_ampere};
  return kernel;
}

}  // namespace seeded

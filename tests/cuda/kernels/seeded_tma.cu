// Mistakes around TMA: waits, fences, transaction counts, groups that belong to another thread, tensor maps.
#include "seeded.h"

namespace seeded {

// ---- out = 2 in: TMA in, ordinary arithmetic in shared memory, TMA out ---------------------------------------------------
namespace {
enum ScaleBug {
  scale_none, no_fence, no_barrier_before_store, no_store_wait, no_load_wait, tx_too_small, tx_too_large, no_init,
  wrong_parity, misaligned_tile, over_its_barrier, load_while_storing, barrier_overwritten, wait_in_another_thread,
  map_not_aligned, no_init_fence
};

struct Scale {
  alignas(1024) bf16 tile[64 * 64];
  alignas(8) uint64_t full;
};

__global__ void scale_kernel(const __grid_constant__ CUtensorMap in, const __grid_constant__ CUtensorMap out, int bug) {
  Scale& s = simt::dynamic_shared<Scale>();
  const int x = blockIdx.x * 64, y = blockIdx.y * 64;
  if (threadIdx.x == 0 && bug != no_init) {
    ptx::mbarrier_init(&s.full, 1);
    if (bug != no_init_fence) ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const uint32_t bytes = sizeof s.tile;
    ptx::mbarrier_arrive_expect_tx(&s.full, bug == tx_too_small ? bytes / 2 : bug == tx_too_large ? 2 * bytes : bytes);
    bf16* tile = bug == misaligned_tile ? s.tile + 8 : bug == over_its_barrier ? s.tile + 64 * 8 : s.tile;
    const CUtensorMap* map = &in;
    if (bug == map_not_aligned) map = reinterpret_cast<const CUtensorMap*>(reinterpret_cast<const char*>(map) + 8);
    ptx::tma_load(tile, map, &s.full, x, y);
    if (bug == load_while_storing) ptx::tma_load(tile, &in, &s.full, x, y);
    if (bug == barrier_overwritten) s.full = 0;
  }
  if (bug != no_load_wait) ptx::mbarrier_wait(&s.full, bug == wrong_parity);
  for (int i = threadIdx.x; i < 64 * 64; i += 128) s.tile[i] = __float2bfloat16(2.f * __bfloat162float(s.tile[i]));
  if (bug != no_fence) ptx::fence_proxy_async();
  if (bug != no_barrier_before_store) __syncthreads();
  if (threadIdx.x == 0) {
    ptx::tma_store(&out, s.tile, x, y);
    ptx::bulk_commit_group();
    if (bug != no_store_wait && bug != wait_in_another_thread) ptx::bulk_wait_group_read<0>();
  }
  if (bug == wait_in_another_thread && threadIdx.x == 1) ptx::bulk_wait_group_read<0>();
}

double run_scale(int bug) {
  const int rows = 100, columns = 136;  // neither is a multiple of the box
  auto in = integers<bf16>(rows * columns, 6);
  auto out = unwritten<bf16>(rows * columns);
  Buffers buffers;
  const simt::TensorShape shape{2, {columns, rows}, {columns * 2}, {64, 64}};
  const CUtensorMap in_map = simt::tensor_map(buffers.add(in, "in"), simt::DataType::bf16, shape, simt::Swizzle::b128);
  const CUtensorMap out_map = simt::tensor_map(buffers.add(out, "out"), simt::DataType::bf16, shape, simt::Swizzle::b128);
  simt::launch(scale_kernel, {dim3(3, 2), dim3(128), sizeof(Scale)}, in_map, out_map, bug);
  double worst = 0;
  for (size_t i = 0; i < in.size(); ++i) worst = larger(worst, std::fabs(float(out[i]) - 2 * float(in[i])));
  return worst;
}
}  // namespace

const Kernel& scale() {
  static const Kernel kernel{"scale",
                             {"none", "no_fence", "no_barrier_before_store", "no_store_wait", "no_load_wait", "tx_too_small",
                              "tx_too_large", "no_init", "wrong_parity", "misaligned_tile", "over_its_barrier",
                              "load_while_storing", "barrier_overwritten", "wait_in_another_thread", "map_not_aligned",
                              "no_init_fence"},
                             run_scale};
  return kernel;
}

// ---- an epilogue that stages tiles through one buffer: stmatrix, TMA store, and again ------------------------------------
namespace {
enum StagingBug {
  staging_none, no_read_wait, no_barrier_after_wait, no_fence_after_stmatrix, no_wait_at_exit, fence_by_issuer, over_the_edge
};

struct Staging {
  alignas(1024) bf16 tile[64 * 64];
};

__global__ void staging_kernel(const __grid_constant__ CUtensorMap out, int tiles, int bug) {
  Staging& s = simt::dynamic_shared<Staging>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int tile = 0; tile < tiles; ++tile) {
    if (threadIdx.x == 0 && tile && bug != no_read_wait) ptx::bulk_wait_group_read<0>();
    if (bug != no_barrier_after_wait) __syncthreads();
    const bool outside = bug == over_the_edge && tile == 0 && warp < 2;  // legal: nobody reads what is not stored
    for (int j = 0; j < 8 && !outside; ++j) {  // this warp's 16 rows, eight columns at a time
      const float value = float(tile * 8 + j);
      const uint32_t pair[2] = {ptx::pack_bf16(value, value), ptx::pack_bf16(value, value)};
      const int row = warp * 16 + lane % 16;
      ptx::stmatrix_x2(&s.tile[row * 64 + (j ^ row % 8) * 8], pair);
    }
    if (bug != no_fence_after_stmatrix && bug != fence_by_issuer) ptx::fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
      if (bug == fence_by_issuer) ptx::fence_proxy_async();  // legal: a fence anywhere between the write and the store
      ptx::tma_store(&out, s.tile, 0, tile * 64 - (bug == over_the_edge ? 32 : 0));
      ptx::bulk_commit_group();
    }
  }
  if (threadIdx.x == 0 && bug != no_wait_at_exit) ptx::bulk_wait_group<0>();
}

double run_staging(int bug) {
  const int tiles = 4, above = bug == over_the_edge ? 32 : 0, rows = tiles * 64 - above;  // the box starts above row 0
  auto out = unwritten<bf16>(rows * 64);
  Buffers buffers;
  const simt::TensorShape shape{2, {64, uint64_t(rows)}, {128}, {64, 64}};
  const CUtensorMap map = simt::tensor_map(buffers.add(out, "out"), simt::DataType::bf16, shape, simt::Swizzle::b128);
  simt::launch(staging_kernel, {dim3(1), dim3(128), sizeof(Staging)}, map, tiles, bug);
  double worst = 0;
  for (int i = 0; i < rows * 64; ++i)
    worst = larger(worst, std::fabs(float(out[i]) - float((i + above * 64) / 4096 * 8 + i % 64 / 8)));
  return worst;
}
}  // namespace

const Kernel& staging() {
  static const Kernel kernel{
      "staging", {"none", "no_read_wait", "no_barrier_after_wait", "no_fence_after_stmatrix", "no_wait_at_exit", "fence_by_issuer",
                  "over_the_edge"},
      run_staging};
  return kernel;
}

}  // namespace seeded

// Mistakes of a Hopper matrix product: a TMA producer feeds a ring of stages to two wgmma warpgroups; and of the same
// in a cluster of two blocks, which share their tile of B by multicast.
#include "seeded.h"

namespace seeded {

namespace {
enum HopperBug {
  hopper_none, no_full_wait, full_parity, no_empty_arrive, empty_parity, no_empty_wait, swizzle, tx_short, tx_long,
  early_release, no_wgmma_wait, no_init_barrier, no_wgmma_fence, store_out_of_bounds, descriptor_stride, double_release,
  divergent_operands, touch_accumulator, no_register_release, operand_past_the_end, a_registers_changed,
  accumulator_touched_after_fence, wgmma_chain
};

constexpr int tile = 128, depth = 64, stages = 3, consumers = 2;

struct Ring {
  alignas(1024) bf16 a[stages][tile * depth];
  alignas(1024) bf16 b[stages][tile * depth];
  alignas(8) uint64_t full[stages], empty[stages];
};

__global__ void __launch_bounds__(384)
    hopper_kernel(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map, float* c, int n,
                  int k, int bug) {
  Ring& s = simt::dynamic_shared<Ring>();
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128, m0 = blockIdx.y * tile, n0 = blockIdx.x * tile;
  const int steps = k / depth;
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) {
      ptx::mbarrier_init(&s.full[i], 1);
      ptx::mbarrier_init(&s.empty[i], consumers);
    }
    ptx::fence_mbarrier_init();
  }
  if (bug != no_init_barrier) __syncthreads();

  if (group == 0) {  // producer
    if (bug != no_register_release) ptx::setmaxnreg_dec<40>();
    if (thread == 0) {
      for (int i = 0; i < steps; ++i) {
        const int stage = i % stages;
        const uint32_t round = i / stages & 1, bytes = 2 * tile * depth * sizeof(bf16);
        // A fresh mbarrier lets a wait for parity 1 through: the first round finds every stage free.
        if (bug != no_empty_wait) ptx::mbarrier_wait(&s.empty[stage], bug == empty_parity ? round : round ^ 1);
        ptx::mbarrier_arrive_expect_tx(&s.full[stage], bug == tx_short ? bytes / 2 : bug == tx_long ? bytes * 2 : bytes);
        ptx::tma_load(s.a[stage], &a_map, &s.full[stage], i * depth, m0);
        ptx::tma_load(s.b[stage], &b_map, &s.full[stage], i * depth, n0);
      }
    }
    return;
  }

  ptx::setmaxnreg_inc<232>();
  const int consumer = group - 1;
  float sum[tile / 2];
  for (float& x : sum) x = 0;
  for (int i = 0; i < steps; ++i) {
    const int stage = i % stages;
    const uint32_t round = i / stages & 1;
    if (bug != no_full_wait) ptx::mbarrier_wait(&s.full[stage], bug == full_parity ? round ^ 1 : round);
    if (bug != no_wgmma_fence && !(bug == wgmma_chain && i)) ptx::wgmma_fence();
    if (bug == accumulator_touched_after_fence) sum[thread % 8] += 0.f;
    for (int inner = 0; inner < depth; inner += 16) {
      auto descriptor = [&](const bf16* at, int stride = 1024) {
        return ptx::matrix_descriptor(at, simt::Swizzle::b128, 16, stride);
      };
      const uint64_t a = descriptor(&s.a[stage][consumer * 64 * depth + inner]);
      uint64_t b = descriptor(&s.b[stage][inner], bug == descriptor_stride ? 512 : 1024);
      if (bug == divergent_operands && thread >= 64) b = descriptor(&s.b[stage][(inner + 16) % depth]);
      if (bug == operand_past_the_end) b = descriptor(&s.b[stage][inner], 16384);
      if (bug == a_registers_changed) {
        uint32_t registers[4] = {};
        ptx::wgmma_fence();
        ptx::wgmma<tile, bf16>(sum, registers, b, true);
        registers[0] = 1;
        asm volatile("" ::"r"(registers[0]), "m"(registers));  // or the compiler would drop the write
      }
      ptx::wgmma<tile, bf16>(sum, a, b, true);
    }
    ptx::wgmma_commit_group();
    if (bug == touch_accumulator) sum[thread % 8] += 1.f;
    if (bug == early_release && thread == 0) ptx::mbarrier_arrive(&s.empty[stage]);
    if (bug == wgmma_chain) {  // legal: accumulators that only wgmma touches need no further fence
      ptx::wgmma_wait_group<1>();
      if (i && thread == 0) ptx::mbarrier_arrive(&s.empty[(i - 1) % stages]);
      continue;
    }
    if (bug != no_wgmma_wait) ptx::wgmma_wait_group<0>();
    if (bug != early_release && bug != no_empty_arrive && thread == 0) ptx::mbarrier_arrive(&s.empty[stage]);
    if (bug == double_release && thread == 0) ptx::mbarrier_arrive(&s.empty[stage]);
  }
  if (bug == wgmma_chain) ptx::wgmma_wait_group<0>();
  const int row0 = m0 + consumer * 64 + thread / 32 * 16 + thread % 32 / 4 + (bug == store_out_of_bounds ? 16 : 0);
  for (int i = 0; i < tile / 2; ++i)
    c[(row0 + 8 * (i / 2 % 2)) * n + n0 + 8 * (i / 4) + 2 * (thread % 4) + i % 2] = sum[i];
}

double run_hopper(int bug) {
  const int m = 128, n = 128, k = 320;
  auto a = integers<bf16>(m * k, 7), b = integers<bf16>(n * k, 8);
  auto c = unwritten<float>(m * n);
  Buffers buffers;
  auto map = [&](std::vector<bf16>& matrix, const char* name, int rows, simt::Swizzle mode) {
    const simt::TensorShape shape{2, {uint64_t(k), uint64_t(rows)}, {uint64_t(k) * 2}, {depth, tile}};
    return simt::tensor_map(buffers.add(matrix, name), simt::DataType::bf16, shape, mode);
  };
  const CUtensorMap a_map = map(a, "a", m, bug == swizzle ? simt::Swizzle::none : simt::Swizzle::b128);
  const CUtensorMap b_map = map(b, "b", n, simt::Swizzle::b128);
  simt::launch(hopper_kernel, {dim3(n / tile, m / tile), dim3(384), sizeof(Ring)}, a_map, b_map, buffers.add(c, "c"), n, k, bug);
  return product_error(a, b, c, m, n, k, false);
}
}  // namespace

const Kernel& hopper() {
  static const Kernel kernel{"hopper",
                             {"none", "no_full_wait", "full_parity", "no_empty_arrive", "empty_parity", "no_empty_wait",
                              "swizzle", "tx_short", "tx_long", "early_release", "no_wgmma_wait", "no_init_barrier",
                              "no_wgmma_fence", "store_out_of_bounds", "descriptor_stride", "double_release",
                              "divergent_operands", "touch_accumulator", "no_register_release", "operand_past_the_end",
                              "a_registers_changed", "accumulator_touched_after_fence", "wgmma_chain"},
                             run_hopper};
  return kernel;
}

// ---- a cluster of two: each block loads half of the tile of B and multicasts it ----------------------------------------
namespace {
enum ClusterBug {
  cluster_none, no_cluster_sync_after_init, exit_early, wrong_empty_count, peer_not_waited_for, own_release_only,
  remote_read_race, half_of_the_bytes, relaxed_cluster_arrive, relaxed_init, relaxed_without_fence, remote_before_start,
  empty_multicast, arrive_and_exit
};

struct Shared {
  alignas(1024) bf16 a[2][64 * 64];
  alignas(1024) bf16 b[2][64 * 64];
  alignas(8) uint64_t full[2], empty[2];
  float first[4];
};

__global__ void __launch_bounds__(256)
    cluster_kernel(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap b_map, float* c,
                   float* exchanged, int n, int k, int bug) {
  Shared& s = simt::dynamic_shared<Shared>();
  const uint32_t rank = ptx::cluster_rank();
  const int steps = k / 64, thread = threadIdx.x % 128;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      ptx::mbarrier_init(&s.full[i], 1);
      ptx::mbarrier_init(&s.empty[i], bug == wrong_empty_count ? 1 : 2);  // one consumer in each of the two blocks
    }
    if (bug != relaxed_without_fence) ptx::fence_mbarrier_init();
  }
  if (bug == remote_before_start && threadIdx.x < 4) *ptx::map_shared_rank(&s.first[threadIdx.x], rank ^ 1) = 0;
  if (bug == no_cluster_sync_after_init) {
    __syncthreads();
  } else if (bug == relaxed_init || bug == relaxed_without_fence) {  // legal where the mbarriers have their fence
    ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();
  } else {
    ptx::cluster_sync();
  }

  if (threadIdx.x == 128) {  // producer
    for (int i = 0; i < steps; ++i) {
      const int stage = i % 2;
      if (bug != peer_not_waited_for) ptx::mbarrier_wait_cluster(&s.empty[stage], (i / 2 & 1) ^ 1);
      ptx::mbarrier_arrive_expect_tx(&s.full[stage], (bug == half_of_the_bytes ? 1 : 2) * 64 * 64 * sizeof(bf16));
      ptx::tma_load(s.a[stage], &a_map, &s.full[stage], i * 64, blockIdx.x * 64);
      ptx::tma_load_multicast(s.b[stage] + rank * 32 * 64, &b_map, &s.full[stage], bug == empty_multicast ? 0 : 3, i * 64,
                              int(rank) * 32);
    }
  }
  if (threadIdx.x < 128) {  // consumer
    float sum[32];
    for (int i = 0; i < steps; ++i) {
      const int stage = i % 2;
      ptx::mbarrier_wait(&s.full[stage], i / 2 & 1);
      ptx::wgmma_fence();
      for (int inner = 0; inner < 64; inner += 16)
        ptx::wgmma<64, bf16>(sum, ptx::matrix_descriptor(s.a[stage] + inner, simt::Swizzle::b128, 16, 1024),
                             ptx::matrix_descriptor(s.b[stage] + inner, simt::Swizzle::b128, 16, 1024), i || inner);
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<0>();
      if (thread < 2 && (bug != own_release_only || uint32_t(thread) == rank))
        ptx::mbarrier_arrive_remote(&s.empty[stage], uint32_t(thread));  // the stage is free in both blocks
    }
    for (int i = 0; i < 32; ++i)
      c[(blockIdx.x * 64 + thread / 32 * 16 + thread % 32 / 4 + 8 * (i / 2 % 2)) * n + 8 * (i / 4) + 2 * (thread % 4) + i % 2] = sum[i];
    if (thread < 4) s.first[thread] = float(rank * 4 + uint32_t(thread));
  }
  if (bug == exit_early) return;
  if (bug == relaxed_cluster_arrive) {
    ptx::cluster_arrive_relaxed();
    ptx::cluster_wait();
  } else if (bug != remote_read_race) {
    ptx::cluster_sync();
  }
  if (threadIdx.x < 4) exchanged[blockIdx.x * 4 + threadIdx.x] = *ptx::map_shared_rank(&s.first[threadIdx.x], rank ^ 1);
  if (bug == arrive_and_exit && threadIdx.x >= 32) return ptx::cluster_arrive();  // legal: the first warp waits for all
  ptx::cluster_sync();  // a block's shared memory must live as long as its peer reads it
}

double run_cluster(int bug) {
  const int m = 128, n = 64, k = 320;
  auto a = integers<bf16>(m * k, 9), b = integers<bf16>(n * k, 10);
  auto c = unwritten<float>(m * n), exchanged = unwritten<float>(8);
  Buffers buffers;
  auto map = [&](std::vector<bf16>& matrix, const char* name, int rows, uint32_t box) {
    const simt::TensorShape shape{2, {uint64_t(k), uint64_t(rows)}, {uint64_t(k) * 2}, {64, box}};
    return simt::tensor_map(buffers.add(matrix, name), simt::DataType::bf16, shape, simt::Swizzle::b128);
  };
  const CUtensorMap a_map = map(a, "a", m, 64), b_map = map(b, "b", n, 32);
  simt::launch(cluster_kernel, {dim3(2), dim3(256), sizeof(Shared), 2}, a_map, b_map, buffers.add(c, "c"),
               buffers.add(exchanged, "exchanged"), n, k, bug);
  double worst = product_error(a, b, c, m, n, k, false);
  if (bug != exit_early)
    for (int i = 0; i < 8; ++i) worst = larger(worst, std::fabs(exchanged[i] - float((i + 4) % 8)));
  return worst;
}
}  // namespace

const Kernel& cluster() {
  static const Kernel kernel{"cluster",
                             {"none", "no_cluster_sync_after_init", "exit_early", "wrong_empty_count", "peer_not_waited_for",
                              "own_release_only", "remote_read_race", "half_of_the_bytes", "relaxed_cluster_arrive",
                              "relaxed_init", "relaxed_without_fence", "remote_before_start", "empty_multicast",
                              "arrive_and_exit"},
                             run_cluster};
  return kernel;
}

}  // namespace seeded

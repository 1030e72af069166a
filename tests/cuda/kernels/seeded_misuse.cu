// One-line mistakes, each in a kernel of its own: what a wrapper's arguments may not be, and waits nobody ends.
#include "seeded.h"

namespace seeded {

namespace {
enum Misuse {
  misuse_none, barrier_count_differs, barrier_count_odd, missing_at_barrier, spin_on_memory, spin_on_atomic,
  poll_forever, registers_missing, registers_decreased_by_inc, cluster_wait_without_arrive, wgmma_at_exit, unwritten_shared,
  past_shared_memory, bulk_size, lanes_in_different_operations, static_pointer, rank_too_large, misaligned_atomic,
  divergent_aligned, registers_by_one_warp, barrier_between_warps_missing, shared_memory_too_small, clock_wait,
  mixed_barrier_zero, partial_warp, misaligned_pair
};

struct Bytes {
  alignas(1024) bf16 tile[64 * 64];
  alignas(8) uint64_t barrier;
  float values[32];
};

__global__ void __launch_bounds__(256) misuse_kernel(float* out, int* flag, int bug) {
  Bytes& s = simt::dynamic_shared<Bytes>();
  const int thread = threadIdx.x;
  if (thread == 0) {
    ptx::mbarrier_init(&s.barrier, 1);
    ptx::fence_mbarrier_init();
  }
  if (thread < 32 && bug != unwritten_shared) s.values[thread] = float(thread);
  __syncthreads();
  switch (bug) {
    case barrier_count_differs: ptx::named_barrier_sync(1, thread < 128 ? 256 : 128); break;
    case barrier_count_odd: ptx::named_barrier_sync(1, 100); break;
    case missing_at_barrier: if (thread < 96) ptx::named_barrier_sync(1, 128); break;
    case spin_on_memory: while (*reinterpret_cast<volatile int*>(flag) == 0) {} break;
    case spin_on_atomic: while (atomicAdd(flag, 0) == 0) {} break;
    case poll_forever: while (!ptx::mbarrier_try_wait(&s.barrier, 0)) {} break;
    case registers_missing: if (thread < 128) ptx::setmaxnreg_inc<256>(); break;
    case registers_decreased_by_inc: ptx::setmaxnreg_inc<24>(); break;
    case cluster_wait_without_arrive: ptx::cluster_wait(); break;
    case wgmma_at_exit: case barrier_between_warps_missing:
      if (thread < 128) {
        float sum[32];
        for (int i = thread; i < 64 * 64; i += 128) s.tile[i] = bf16(1.f);
        ptx::fence_proxy_async();
        if (bug != barrier_between_warps_missing) ptx::named_barrier_sync(1, 128);
        ptx::wgmma_fence();
        const uint64_t descriptor = ptx::matrix_descriptor(s.tile, simt::Swizzle::b128, 16, 1024);
        ptx::wgmma<64, bf16>(sum, descriptor, descriptor, false);
        ptx::wgmma_commit_group();
        if (bug != wgmma_at_exit) ptx::wgmma_wait_group<0>();
      }
      break;
    case past_shared_memory: if (thread == 0) reinterpret_cast<float*>(&s)[(sizeof(Bytes) + 1024) / 4] = 1.f; break;
    case bulk_size: if (thread == 0) ptx::bulk_load(s.tile, out, 24, &s.barrier); break;
    case lanes_in_different_operations:
      if (thread % 2) __syncwarp(); else out[thread % 32] = __shfl_sync(~0u, 1.f, 0);
      break;
    case static_pointer: {
      static float elsewhere[32];
      ptx::bulk_load(elsewhere, out, 64, &s.barrier);
      break;
    }
    case rank_too_large: ptx::mbarrier_arrive_remote(&s.barrier, 1); break;
    case divergent_aligned:
      if (thread % 2)
        __syncthreads();
      else
        __syncthreads();
      break;
    case registers_by_one_warp: if (thread < 32) ptx::setmaxnreg_dec<64>(); break;
    // Legal:
    case clock_wait: {
      const long long start = clock64();
      while (clock64() - start < 1000000) __nanosleep(20);
      break;
    }
    case mixed_barrier_zero:
      if (thread < 128)
        __syncthreads();
      else
        ptx::named_barrier_sync(0, 256);
      break;
    case partial_warp:  // a block of 48: barriers count whole warps, votes only the lanes there are
      ptx::named_barrier_sync(1, 64);
      if (!__all_sync(~0u, true)) s.values[0] = -1;
      __syncthreads();
      break;
    case misaligned_atomic: atomicAdd(reinterpret_cast<int*>(reinterpret_cast<char*>(flag) + 1), 1); break;
    case misaligned_pair:
      if (thread == 0) *reinterpret_cast<float2*>(s.values + 1) = make_float2(s.values[1], s.values[2]);
      __syncthreads();
      break;
    default: break;
  }
  if (thread < 32) out[thread] = s.values[thread];
}

double run_misuse(int bug) {
  auto out = unwritten<float>(32);
  std::vector<int> flag(2, 0);
  Buffers buffers;
  simt::launch(misuse_kernel, {dim3(1), dim3(bug == partial_warp ? 48 : 256), sizeof(Bytes) - (bug == shared_memory_too_small ? 64 : 0)},
               buffers.add(out, "out"), buffers.add(flag, "flag"), bug);
  double worst = 0;
  for (int i = 0; i < 32; ++i) worst = larger(worst, std::fabs(out[i] - float(i)));
  return worst;
}
}  // namespace

const Kernel& misuse() {
  static const Kernel kernel{
      "misuse",
      {"none", "barrier_count_differs", "barrier_count_odd", "missing_at_barrier", "spin_on_memory",
       "spin_on_atomic", "poll_forever", "registers_missing", "registers_decreased_by_inc", "cluster_wait_without_arrive",
       "wgmma_at_exit", "unwritten_shared", "past_shared_memory", "bulk_size",
       "lanes_in_different_operations", "static_pointer", "rank_too_large", "misaligned_atomic",
       "divergent_aligned", "registers_by_one_warp", "barrier_between_warps_missing", "shared_memory_too_small",
       "clock_wait", "mixed_barrier_zero", "partial_warp", "misaligned_pair"},
      run_misuse};
  return kernel;
}

}  // namespace seeded

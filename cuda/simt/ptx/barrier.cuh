// Barriers and fences: bar.sync, barrier.cluster, mbarrier, fence.proxy.async.
#pragma once
#include "core.cuh"

namespace ptx {

// ---- named barriers: 16 a block, 0 is __syncthreads. `threads` counts those that sync and those that only arrive ----
PTX_INLINE void named_barrier_sync(int id, int threads SIMT_SITE) {
  PTX(asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"),
      simt::model::barrier_sync(id, threads, site));
}
PTX_INLINE void named_barrier_arrive(int id, int threads SIMT_SITE) {
  PTX(asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"),
      simt::model::barrier_arrive(id, threads, site));
}

// ---- cluster barrier: every thread of every block of the cluster ----
PTX_INLINE void cluster_arrive(SIMT_SITE_ONLY) {
  PTX(asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"), simt::model::cluster_arrive(true, site));
}
// The same where nothing written before has to be seen after it (barriers have their own fence): no trip to L2.
PTX_INLINE void cluster_arrive_relaxed(SIMT_SITE_ONLY) {
  PTX(asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"), simt::model::cluster_arrive(false, site));
}
PTX_INLINE void cluster_wait(SIMT_SITE_ONLY) {
  PTX(asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"), simt::model::cluster_wait(site));
}
PTX_INLINE void cluster_sync(SIMT_SITE_ONLY) {
  PTX(cluster_arrive(), cluster_arrive(site));
  PTX(cluster_wait(), cluster_wait(site));
}

// ---- mbarrier: a phase completes when `count` arrivals have come and all announced bytes have landed ----
PTX_INLINE void mbarrier_init(uint64_t* barrier, uint32_t count SIMT_SITE) {
  PTX(asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory"),
      simt::model::mbarrier_init(barrier, count, site));
}
PTX_INLINE void mbarrier_inval(uint64_t* barrier SIMT_SITE) {
  PTX(asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory"),
      simt::model::mbarrier_inval(barrier, site));
}
PTX_INLINE void mbarrier_arrive(uint64_t* barrier SIMT_SITE) {
  PTX(asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory"),
      simt::model::mbarrier_arrive(barrier, 0, site));
}
// Arrives, and announces that `bytes` will be written by TMA in this phase.
PTX_INLINE void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes SIMT_SITE) {
  PTX(asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                   "r"(bytes)
                   : "memory"),
      simt::model::mbarrier_arrive(barrier, bytes, site));
}
PTX_INLINE void mbarrier_expect_tx(uint64_t* barrier, uint32_t bytes SIMT_SITE) {
  PTX(asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                   : "memory"),
      simt::model::mbarrier_expect_transaction(barrier, bytes, site));
}
// Arrives on the barrier at the same offset in another block of the cluster. With PTX's default semantics, .release at
// the scope of the block: what a consumer has read may be overwritten. At .cluster scope it would take a trip to L2.
PTX_INLINE void mbarrier_arrive_remote(uint64_t* barrier, uint32_t rank SIMT_SITE) {
  PTX(asm volatile("{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
                   "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(barrier)),
                   "r"(rank)
                   : "memory"),
      simt::model::mbarrier_arrive_remote(barrier, rank, site));
}
// True if the phase of this parity has completed. A fresh barrier is in phase 0: parity 1 counts as completed.
PTX_INLINE bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity SIMT_SITE) {
  uint32_t done;
  PTX(asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n"
                   "selp.u32 %0, 1, 0, p;\n}"
                   : "=r"(done)
                   : "r"(shared_address(barrier)), "r"(parity)
                   : "memory"),
      done = simt::model::mbarrier_test(barrier, parity, site));
  return done;
}
// Returns once the phase of this parity has completed.
PTX_INLINE void mbarrier_wait(uint64_t* barrier, uint32_t parity SIMT_SITE) {
  PTX(asm volatile("{\n.reg .pred p;\nWAIT:\nmbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%0], %1;\n"
                   "@p bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(shared_address(barrier)),
                   "r"(parity)
                   : "memory"),
      simt::model::mbarrier_wait(barrier, parity, site));
}
// The same where the arrivals come from other blocks of the cluster.
PTX_INLINE void mbarrier_wait_cluster(uint64_t* barrier, uint32_t parity SIMT_SITE) {
  PTX(asm volatile("{\n.reg .pred p;\nWAIT:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n"
                   "@p bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(shared_address(barrier)),
                   "r"(parity)
                   : "memory"),
      simt::model::mbarrier_wait(barrier, parity, site));
}

// ---- fences ----
// Makes mbarrier.init visible to the cluster and to TMA; a barrier among the threads comes after it.
PTX_INLINE void fence_mbarrier_init(SIMT_SITE_ONLY) {
  PTX(asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"), simt::model::fence_mbarrier_init(site));
}
// Between ordinary writes to shared memory and their use by TMA or wgmma (the async proxy).
PTX_INLINE void fence_proxy_async(SIMT_SITE_ONLY) {
  PTX(asm volatile("fence.proxy.async.shared::cta;" ::: "memory"), simt::model::fence_proxy_async(site));
}
// The same between ordinary writes to global memory and TMA. The model does nothing here: whether it is needed and
// present is not checked.
PTX_INLINE void fence_proxy_async_global() { PTX(asm volatile("fence.proxy.async.global;" ::: "memory"), (void)0); }

}  // namespace ptx

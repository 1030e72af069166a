// The checked build's hooks (check*.cpp): happens-before by vector clocks, bounds, uninitialised reads, proxies, counters.
// In the fast build every hook is an empty inline function and the clocks are empty structs.
//
// Threads release into a SyncClock when they arrive somewhere and acquire from it when they go on. An asynchronous
// operation carries a Snapshot: what its issuer knew. What it reads and writes is checked when it happens.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "../cpu/model.h"

namespace simt::model {
struct Thread;
struct Cta;
struct Gang;
}  // namespace simt::model

namespace simt::model::check {

// Who accesses memory on a thread's behalf; tma_write: the second half of a store, to global memory.
enum class Agent { tma, tma_write, wgmma, cp_async };

#if defined(SIMT_CHECKED)
struct Clock;  // check_clocks.h
using SyncClock = std::shared_ptr<Clock>;
struct Snapshot {
  std::shared_ptr<Clock> clock;
  uint32_t agent = 0, tick = 0;
  std::shared_ptr<Clock> warp[4];  // of a wgmma
};

void begin_gang(Gang& gang);
void end_gang(Gang& gang);
void begin_grid(const void* kernel, const void* argument);

void release(SyncClock& clock, Thread& thread);        // what the thread has done happens before ...
void acquire(const SyncClock& clock, Thread& thread);  // ... what this one does next
void release_passed(SyncClock& clock, Thread& thread);  // only its reads do: a relaxed arrival
void everyone();                                       // a barrier of all living threads of the gang

void mbarrier_init(uint64_t* barrier, Thread& thread, Site site);
void fence_mbarrier_init(Thread& thread);
void mbarrier_use(uint64_t* barrier, Thread& thread, Site site);  // it must know of the mbarrier.init
void mbarrier_arrive(uint64_t* barrier, Thread& thread, Site site);
void mbarrier_arrive(uint64_t* barrier, const Snapshot& by, Site issued);
void mbarrier_phase_done(uint64_t* barrier);
void mbarrier_acquire(uint64_t* barrier, Thread& thread, Site site);

void issue(Snapshot& snapshot, Thread& thread, Agent agent);  // takes, or (wgmma: 128 threads) joins, the issuer's clock
Snapshot of_warp(const Snapshot& snapshot, unsigned warp);    // of a wgmma: what this warp of the four knew at issue,
Snapshot of_each_warp(const Snapshot& snapshot);              // and what all four did
// The operation reads or writes memory; `shared` says in whose shared memory the pointer lies (null: global memory).
// `atomic`: as a reduction does.
void async_access(Snapshot& snapshot, const void* pointer, size_t bytes, bool write, Cta* shared, Site issued,
                  bool atomic = false);
void acquire(const Snapshot& snapshot, Thread& thread);       // the thread has waited for the operation
void in_flight(Thread& thread, const void* registers, size_t bytes, bool written, Site issued);  // wgmma owns registers
void landed(Thread& thread);                                  // all of the thread's wgmma registers are its own again
void fence_registers(Thread& thread);  // wgmma.fence; from here on ...
void touch_registers(Thread& thread, const void* registers, size_t bytes, Site site);       // (by the model) ...
void registers_fenced(Thread& thread, const void* registers, size_t bytes, Site site);      // ... untouched, or fail
void fence_proxy(Thread& thread);
void fence_memory(Thread& thread);
void atomic(const void* pointer, size_t bytes, Thread& thread, Site site);  // acquires; releases what is fenced
void load_acquire(const void* pointer, size_t bytes, Thread& thread, Site site);
void store_release(const void* pointer, size_t bytes, Thread& thread, Site site);
void touch(const void* pointer, size_t bytes, bool write, Thread& thread, Site site);

// Counters, when Options.counters: what happened at a line of a kernel.
enum class Count { tma_bytes, tma_operations, wgmma, mma, barrier_waits, mbarrier_waits, atomics, cp_async_bytes };
void count(Count what, uint64_t number, Site site);
#else
struct SyncClock {};
struct Snapshot {};
inline void begin_gang(Gang&) {}
inline void end_gang(Gang&) {}
inline void begin_grid(const void*, const void*) {}
inline void release(SyncClock&, Thread&) {}
inline void acquire(const SyncClock&, Thread&) {}
inline void release_passed(SyncClock&, Thread&) {}
inline void everyone() {}
inline void mbarrier_init(uint64_t*, Thread&, Site) {}
inline void fence_mbarrier_init(Thread&) {}
inline void mbarrier_use(uint64_t*, Thread&, Site) {}
inline void mbarrier_arrive(uint64_t*, Thread&, Site) {}
inline void mbarrier_arrive(uint64_t*, const Snapshot&, Site) {}
inline void mbarrier_phase_done(uint64_t*) {}
inline void mbarrier_acquire(uint64_t*, Thread&, Site) {}
inline void issue(Snapshot&, Thread&, Agent) {}
inline void async_access(Snapshot&, const void*, size_t, bool, Cta*, Site, bool = false) {}
inline void acquire(const Snapshot&, Thread&) {}
inline void in_flight(Thread&, const void*, size_t, bool, Site) {}
inline void landed(Thread&) {}
inline void fence_registers(Thread&) {}
inline void touch_registers(Thread&, const void*, size_t, Site) {}
inline void registers_fenced(Thread&, const void*, size_t, Site) {}
inline void fence_proxy(Thread&) {}
inline void fence_memory(Thread&) {}
inline void atomic(const void*, size_t, Thread&, Site) {}
inline void load_acquire(const void*, size_t, Thread&, Site) {}
inline void store_release(const void*, size_t, Thread&, Site) {}
inline void touch(const void*, size_t, bool, Thread&, Site) {}
enum class Count { tma_bytes, tma_operations, wgmma, mma, barrier_waits, mbarrier_waits, atomics, cp_async_bytes };
inline void count(Count, uint64_t, Site) {}
#endif

}  // namespace simt::model::check

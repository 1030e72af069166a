// The CPU model as kernels see it: what cpu/dialect.h and ptx.cuh call. The implementation is in ../model/.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../types.h"
#include "vectors.h"

#define SIMT_MODEL_CODE __attribute__((no_sanitize("thread")))  // the model's own accesses are not the kernel's

namespace simt {

// Where in the kernel the model was called: a default argument, so it is evaluated at the call.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};
#define SIMT_SITE_ONLY ::simt::Site site = ::simt::Site::here()
#define SIMT_SITE , SIMT_SITE_ONLY

// A mistake in a kernel that the model found; the text is the report. The model is ready for the next launch.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Which runnable thread goes next. All are legal; each brings other mistakes to light. `priority` gives warps random
// ranks, so that one runs as far ahead as its waits allow: what a missing wait needs to be seen.
enum class Order { fifo, reverse, random, priority };
// When TMA, cp.async and wgmma really happen: at once, as late as is legal, or at random.
enum class Async { eager, lazy, random };

struct Options {
  int workers = 0;          // OS threads that run blocks; 0: all cores. The checked build uses one
  Order order = Order::fifo;
  Async async = Async::lazy;
  uint64_t seed = 1;
  int multiprocessors = 4;  // what simt::multiprocessors() answers: the size of a persistent grid
  double timeout_s = 120;   // a launch that takes longer without progress is given up
  bool trace = false;       // record what the threads do, see trace.h; blocks then run one after the other
  bool counters = false;    // checked build: count requests, sectors, bank conflicts, waits per source line
};
Options& options();  // of the launches that follow, in this OS thread

// The memory kernels may touch, by name. The checked build reports an access anywhere else.
void register_buffer(const void* pointer, size_t bytes, const char* name);
void unregister_buffers();

// What the 128 opaque bytes of a CUtensorMap say.
struct TensorMap {
  alignas(64) char* base;
  DataType type;
  TensorShape shape;
  Swizzle swizzle;
};
// Raises Error for what cuTensorMapEncodeTiled refuses: alignments, box sizes, a box wider than the swizzle.
TensorMap tensor_map(const void* base, DataType type, const TensorShape& shape, Swizzle swizzle,
                     L2Promotion promotion = L2Promotion::b128);

namespace model {

struct ThreadContext {
  uint3 thread_index, block_index;
  dim3 block_size, grid_size;
  unsigned linear;        // in its block
  unsigned cluster_rank;  // of its block in its cluster
  unsigned cluster_size;
  int inside = 0;  // depth of calls into the model: the watchdog may not interrupt there
};
extern __thread ThreadContext* current;

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster, bool co_resident, void (*entry)(void*),
              void* argument, const void* kernel);
void* shared_memory(size_t bytes, Site);  // of the block, which must have so many

// ---- barriers, warps, scheduling ----
void barrier_sync(int id, int threads, Site);  // threads 0: all of the block that have not exited
void barrier_arrive(int id, int threads, Site);
void cluster_arrive(bool release, Site);  // else: nothing that was written has to be seen
void cluster_wait(Site);
enum class WarpOp : int { syncwarp, shuffle, vote, elect, mma, ldmatrix, stmatrix, setmaxnreg };
// The lanes named in `mask` meet; the last to come runs `operate` on everybody's payload. Only
// syncwarp orders memory.
void warp_collective(unsigned mask, WarpOp kind, void* payload, void (*operate)(void** payloads, unsigned mask), Site);
bool elect(unsigned mask, Site);
void set_registers(int registers, bool increase, Site);
void poll(Site);      // called by what a kernel may spin on (atomics, try_wait, nanosleep): lets others run
void progressed();    // something changed that a spinning thread may wait for
uint64_t clock();     // grows with every step of the scheduler
[[noreturn]] void trap(Site);

// ---- shared memory addresses: 8 bits of cluster rank, 24 bits of offset ----
uint32_t shared_address(const void* pointer, Site);
void* map_rank(void* pointer, uint32_t rank, Site);

// ---- mbarrier ----
void mbarrier_init(uint64_t* barrier, uint32_t count, Site);
void mbarrier_inval(uint64_t* barrier, Site);
void mbarrier_arrive(uint64_t* barrier, uint32_t transaction_bytes, Site);
void mbarrier_arrive_remote(uint64_t* barrier, uint32_t rank, Site);
void mbarrier_expect_transaction(uint64_t* barrier, uint32_t bytes, Site);
bool mbarrier_test(uint64_t* barrier, uint32_t parity, Site);  // polls
void mbarrier_wait(uint64_t* barrier, uint32_t parity, Site);
void fence_mbarrier_init(Site);
void fence_proxy_async(Site);
void fence_memory(Site);  // __threadfence and its like

// ---- TMA and bulk copies ----
struct Coordinates {
  int rank;
  int at[5];
};
enum class Reduction : int { none, add };
constexpr uint32_t no_multicast = ~0u;  // a load into the block's own memory; else: bits are ranks in the cluster
void tma_load(void* destination, const TensorMap* map, uint64_t* barrier, Coordinates, uint32_t multicast_mask, Site);
void tma_store(const TensorMap* map, const void* source, Coordinates, Reduction, Site);
void tma_prefetch(const TensorMap* map, Coordinates, Site);
void bulk_load(void* destination, const void* source, uint32_t bytes, uint64_t* barrier, Site);
void bulk_store(void* destination, const void* source, uint32_t bytes, Reduction, DataType, Site);
void bulk_commit_group(Site);
void bulk_wait_group(int pending, bool read_only, Site);

// ---- cp.async ----
void cp_async(void* destination, const void* source, int bytes, int source_bytes, Site);  // the rest is zeros
void cp_async_commit_group(Site);
void cp_async_wait_group(int pending, Site);
void cp_async_mbarrier_arrive(uint64_t* barrier, Site);  // .noinc

// ---- warp-wide matrix instructions. Elements are 16 bits wide: bf16 or f16 ----
void ldmatrix(uint32_t* registers, int matrices, bool transpose, const void* row, Site);
void stmatrix(void* row, int matrices, bool transpose, const uint32_t* registers, Site);
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, const float* c, DataType type, Site);

// ---- wgmma ----
struct Wgmma {
  int n;                  // of m64nNk16
  DataType type;          // bf16 or f16
  uint64_t a, b;          // matrix descriptors; a is unused when A comes from registers
  const uint32_t* a_registers;  // 4, or null
  bool a_mn_major, b_mn_major;
  bool scale_d;           // false: d = a b, true: d += a b
};
void wgmma(float* d, const Wgmma& operands, Site);
void wgmma_fence(Site);
void wgmma_commit_group(Site);
void wgmma_wait_group(int pending, Site);

// ---- global memory that other blocks write meanwhile ----
uint32_t load_acquire(const uint32_t* pointer, Site);
void store_release(uint32_t* pointer, uint32_t value, Site);

// ---- what the checked build is told by ptx wrappers (no-ops otherwise) ----
void touch(const void* pointer, size_t bytes, bool write, Site);  // a generic-proxy access by the running thread

}  // namespace model
}  // namespace simt

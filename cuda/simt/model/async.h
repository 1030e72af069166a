// State and entry points of what happens behind the threads' backs: TMA and bulk copies (tma.cpp, box.cpp), cp.async
// (cp_async.cpp), wgmma (wgmma.cpp). The scheduler knows these only by the last group of functions; async.cpp has them.
#pragma once
#include <cstdint>
#include <deque>
#include <string>
#include <utility>
#include <vector>

#include "../cpu/model.h"
#include "check.h"

namespace simt::model {

struct Thread;
struct Cta;
struct Gang;

struct CpAsync {
  char* destination;
  const char* source;
  int bytes, source_bytes;
  bool landed;
  Site site;
  check::Snapshot snapshot;
};

struct StoreDone {  // a TMA or bulk store that has happened before its issuer waited for it
  uint64_t number;
  const char* name;
  Site site;
  check::Snapshot read, written;
};

struct ThreadAsync {
  uint64_t wgmma_issued = 0, wgmma_waited = 0;
  std::vector<uint64_t> wgmma_groups;  // ends of its committed groups
  bool wgmma_fenced = false;  // has passed a wgmma.fence
  std::vector<uint64_t> bulk_groups;
  uint64_t bulk_issued = 0;
  std::vector<StoreDone> stores_done;  // of the checked build: what a wait will let the thread know
  std::deque<CpAsync> copies;  // cp.async from number `copies_done` on: not yet waited for
  check::Snapshot retired;     // the last of those before, if an mbarrier has waited for it
  std::vector<uint64_t> copy_groups;
  uint64_t copies_done = 0;
};

// cp.async.mbarrier.arrive: the barrier's arrival comes when the thread's copies before `end` have landed.
struct CpArrival {
  Thread* thread;
  uint64_t end;
  uint64_t* barrier;
  Site site;
  check::Snapshot snapshot;
};

// One TMA or bulk operation in flight.
struct CopyOperation {
  enum class Kind { load, store } kind;
  bool tensor;  // else: `bytes` contiguous bytes at `global`
  TensorMap map;
  Coordinates at;
  char* global;
  Reduction reduction;
  DataType type;
  Cta* block;       // that issued it
  uint32_t offset;  // in shared memory: of this block, or for a load of every block of `targets`
  uint32_t bytes;
  std::vector<Cta*> targets;
  uint32_t barrier_offset;
  Thread* issuer;
  uint64_t number;  // among the issuer's stores
  bool read = false;  // a store whose shared memory has been read, into `data`
  std::vector<char> data;
  Site site;
  check::Snapshot snapshot;  // of a load, or of a store's reading
  check::Snapshot written;   // of a store's writing
};

// A matrix of wgmma in shared memory, as its descriptor says: `extent` along M or N, 16 along K, 16-bit elements.
// Eight neighbours along the major direction are a chunk of 16 bytes; there are 2 * extent of them.
struct MatrixOperand {
  uint32_t start = 0, leading = 0, stride = 0;  // bytes; `start` is a shared-memory address
  Swizzle swizzle = Swizzle::none;
  bool mn_major = false;
  int extent = 0;                // 0: not in shared memory
  uint32_t low = 0, high = 0;    // its lowest byte, and the one after its last: offsets in the block's shared memory
};

struct WgmmaOperation {
  Wgmma operands;
  Site site;
  int issued = 0, waited = 0;  // threads that have reached it, and that have waited for it
  MatrixOperand a, b;
  float* d[128];
  uint32_t a_registers[128][4];
  const uint32_t* a_place[128];  // where a thread has them
  check::Snapshot snapshot;
};

struct Warpgroup {
  std::deque<WgmmaOperation> operations;     // until all threads have waited for them
  uint64_t first = 0, done = 0, wanted = 0;  // numbers: of operations[0]; executed; waited for
};

struct WrittenByTma {  // how the bytes are laid out
  uint32_t offset, bytes;
  Swizzle swizzle;
  Site site;
};

struct CtaAsync {
  std::vector<Warpgroup> warpgroups;
  std::vector<WrittenByTma> layout;
};

struct GangAsync {
  std::vector<CopyOperation> copies;
  std::vector<CpArrival> arrivals;
};

// ---- shared memory as asynchronous operations see it ----
// The 16-byte chunk that the hardware uses for this one: bits 4.. of the address ^= bits 7.., as many as the mode has.
inline uint32_t swizzled(uint32_t address, Swizzle mode) {
  const uint32_t mask = mode == Swizzle::b128 ? 7 : mode == Swizzle::b64 ? 3 : mode == Swizzle::b32 ? 1 : 0;
  return address ^ (address >> 7 & mask) << 4;
}
inline bool overlap(uint32_t low, uint32_t high, uint32_t other_low, uint32_t other_high) {
  return low < other_high && other_low < high;
}
std::string shared_name(uint32_t offset);  // "smem+0x400"
std::string swizzle_name(Swizzle mode);    // "128-byte swizzle"
// The offset of `bytes` bytes of the running thread's shared memory; what: "TMA load". Fails for any other memory.
uint32_t shared_range(const std::string& what, const void* pointer, uint64_t bytes, uint32_t alignment, Site site);
// Is it shared memory of the running block, dynamic or a static __shared__ (which is thread_local)?
bool is_shared(const void* pointer, size_t bytes);
bool happens_at_once();  // by Options.async: should an operation issued now happen now?

// ---- box.cpp: the global side of a copy; `box` holds its bytes in order, without swizzle ----
uint32_t box_bytes(const TensorMap& map);
void read_global(CopyOperation& op, char* box);
void write_global(CopyOperation& op, const char* box);
std::vector<std::pair<uint32_t, uint32_t>> inside_tensor(const CopyOperation& op);  // bytes of the box: low, high

// ---- tma.cpp ----
void copy_complete(Gang& gang, size_t index);        // of gang.async.copies

// ---- in_flight.cpp ----
const char* copy_name(const CopyOperation& op);      // "TMA load"
std::string copy_in_words(const CopyOperation& op);  // "the TMA load issued at f.cu:48 by thread 0 (warp 0) of ..."
const CopyOperation* load_in_flight(const Cta& block, uint32_t low, uint32_t high);  // into these bytes; null if none
// Fails if the running thread may not yet overwrite these bytes: another copy, or a wgmma, has not finished with them.
void check_overwrite(const std::string& what, const Cta& block, uint32_t offset, uint32_t bytes, Site site);

// ---- wgmma_operand.cpp ----
MatrixOperand matrix_operand(uint64_t descriptor, bool mn_major, int extent, const char* name, const Cta& block,
                             Site site);
bool touches(const MatrixOperand& operand, uint32_t low, uint32_t high);  // exactly, not only its outer bounds
// As 16 rows (k) of `extent` floats, 256 apart, from the async view of shared memory.
void read_operand(const MatrixOperand& operand, const Cta& block, DataType type, float* tile);
// Contiguous bytes, low and high, of the rows (along M or N) from `first` on; these are multiples of 8.
std::vector<std::pair<uint32_t, uint32_t>> ranges(const MatrixOperand& operand, int first, int rows);

// ---- wgmma.cpp ----
bool wgmma_ready(const Warpgroup& group);  // someone waits, and all 128 threads have issued what is waited for
void wgmma_execute(Cta& block, Warpgroup& group, uint64_t target);

// ---- cp_async.cpp ----
void cp_arrival_complete(Gang& gang, size_t index);  // of gang.async.arrivals

// ---- async.cpp: what the scheduler calls ----
void async_reset(Gang& gang);                  // before the threads start
bool async_pending(const Gang& gang);          // is anything delayed?
bool async_progress(Gang& gang);               // completes one delayed operation, or says that there is none
std::string async_leftover(const Cta& block);  // what a block that ends has not waited for; empty if all is well
void async_exit(Cta& block);                   // the block's last thread has exited, and there is no leftover
void async_written_by_threads(Cta& block, uint32_t low, uint32_t high);  // these bytes of shared memory, and fenced
std::string wgmma_wait_text(const Thread& thread);  // for the deadlock report

}  // namespace simt::model

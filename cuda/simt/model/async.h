// State and entry points of what happens behind the threads' backs: TMA, bulk copies, cp.async, wgmma (tma.cpp,
// cp_async.cpp, wgmma.cpp). The scheduler knows these only by the functions below.
#pragma once
#include <cstdint>
#include <deque>
#include <string>
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
  Site site;
};

struct ThreadAsync {
  uint64_t wgmma_issued = 0;
  std::vector<uint64_t> wgmma_groups;  // ends of its committed groups
  bool wgmma_fenced = false;
  std::vector<uint64_t> bulk_groups;
  uint64_t bulk_issued = 0;
  std::vector<CpAsync> copies;  // cp.async not yet done
  std::vector<uint64_t> copy_groups;
  uint64_t copies_done = 0;
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
  uint32_t offset;  // in shared memory: of this block, and of every block of `targets`
  uint32_t bytes;
  std::vector<Cta*> targets;
  uint32_t barrier_offset;
  Thread* issuer;
  uint64_t number;  // among the issuer's bulk operations
  bool read = false;  // a store whose shared memory has been read, into `data`
  std::vector<char> data;
  Site site;
  check::Snapshot snapshot;
};

struct WgmmaOperation {
  Wgmma operands;
  Site site;
  int issued = 0;  // threads that have reached it
  float* d[128];
  uint32_t a[128][4];
  check::Snapshot snapshot;
};

struct Warpgroup {
  std::deque<WgmmaOperation> operations;
  uint64_t first = 0, done = 0, wanted = 0;  // numbers: of operations[0]; executed; waited for
};

struct WrittenByTma {  // how the bytes are laid out
  uint32_t offset, bytes;
  Swizzle swizzle;
};

struct CtaAsync {
  std::vector<Warpgroup> warpgroups;
  std::vector<WrittenByTma> layout;
};

struct GangAsync {
  std::vector<CopyOperation> copies;
};

void async_reset(Gang& gang);                  // before the threads start
bool async_pending(const Gang& gang);          // is anything delayed?
bool async_progress(Gang& gang);               // completes one delayed operation, or says that there is none
std::string async_leftover(const Cta& block);  // what a block that ends has not waited for; empty if all is well
void async_exit(Cta& block);                   // the block's last thread has exited: its reads of shared memory must be over
std::string wgmma_wait_text(const Thread& thread);  // for the deadlock report

}  // namespace simt::model

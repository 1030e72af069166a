// Shadow memory: for every 8 bytes of shared or global memory, who has accessed them lately, and which are written.
// An access that conflicts with one that is not in its past is a data race. Six accesses are kept for each 8 bytes;
// what a later one makes redundant is dropped, and when they do not suffice, a random read: then a race can be missed.
#pragma once
#include <cstddef>
#include <cstdint>

#include "check_clocks.h"
#include "check_regions.h"

namespace simt::model::check {

struct Access {
  const char* pointer;
  size_t bytes;
  bool write;
  bool atomic = false;     // a read-modify-write
  bool is_volatile = false;
  bool async = false;      // by the async proxy: TMA, wgmma
  uint32_t who = 0, tick = 0;
  uint16_t place = 0;
  const Clock* clock = nullptr;  // what the accessor knows

  bool reads() const { return !write || atomic; }
  bool reduces() const { return async && atomic; }  // by TMA
  bool strong() const { return atomic || is_volatile; }  // not a race with its like
};

// One access kept. `time`: how many asynchronous operations had been issued.
struct Slot {
  uint32_t gang, tick, who, time;
  uint16_t place;
  uint8_t mask, flags;
};
enum SlotFlags : uint8_t { slot_write = 1, slot_async = 2, slot_strong = 4 };

constexpr int slots_of_cell = 6;
struct Cell {
  uint32_t epoch = 0;  // what is older is void: a gang's number for shared memory, a grid's for global memory
  uint8_t count = 0, written = 0;
  Slot slots[slots_of_cell];
};

// Checks and records. Raises Error with the report.
void check_shared(const Access& access, Cta& block, size_t offset);
void check_static_shared(const Access& access, size_t offset);
void check_global(const Access& access);

void begin_shadow();          // a gang: shared memory is unwritten
void begin_global_shadow();   // a grid: what was before is in its past
void forget_global_shadow();  // gives the memory back

// ---- check_race.cpp: the texts ----
[[noreturn]] void report_race(const Access& access, const char* at, const Slot& other, bool in_shared);
[[noreturn]] void report_proxy(const Access& access, const char* at, const Slot& other);
[[noreturn]] void report_turn(const Access& access, const char* at, const Slot& other);
[[noreturn]] void report_unwritten(const Access& access, const char* at, const Cta* block, size_t offset);
[[noreturn]] void report(const Access& access, const std::string& message);

}  // namespace simt::model::check

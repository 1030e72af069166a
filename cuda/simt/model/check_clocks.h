// Vector clocks: what has happened before what. Every thread of a gang and every asynchronous agent counts its own
// ticks; a Clock says up to which tick of each agent its holder's past reaches. Threads that know the same share one
// vector, so meeting at a barrier costs each of them a pointer, not a vector.
//
// Agents of a gang of n threads: [0, n) the threads, then `lanes` for TMA operations (round robin, so that those in
// flight together have different ones; who knows an operation knows all before it in its lane, so what stores write has
// the last lanes to itself: or to have waited for some later load would do), then one per warpgroup, then one per thread for its cp.async.
#pragma once
#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "check.h"

namespace simt::model::check {

using Ticks = std::vector<uint32_t>;   // by agent; missing entries are 0
using Known = std::shared_ptr<Ticks>;  // changed in place by a sole owner only; null: nothing is known
struct Earlier {
  uint32_t gang;
  Known known, passed;
};
using Foreign = std::shared_ptr<const std::vector<Earlier>>;  // of gangs that ran before, ascending

constexpr uint32_t nobody = ~0u;

inline uint32_t tick_of(const Known& known, uint32_t agent) {
  return known && agent < known->size() ? (*known)[agent] : 0;
}

struct Clock {
  Known known;
  Known fenced;     // what was known at a fence.proxy.async in the past
  Known visible;    // what was known at a __threadfence in the past: an atomic releases no more
  Known passed;     // what has run, though it need not be visible: reads and atomics are over
  Foreign foreign;  // through atomics
  // The holder's own entries, newer than those in the vectors.
  uint32_t self = nobody, tick = 0, fenced_tick = 0, visible_tick = 0;
  uint32_t time = 0, issuer = nobody;                 // of a snapshot: operations issued before it; by which thread
  Known last_known, last_fenced, last_visible, last_passed;  // of a sum: what was added last
  uint64_t serial = 0;                                // of a sum: which one it is

  uint32_t knows(uint32_t agent) const { return agent == self ? tick : tick_of(known, agent); }
  uint32_t knows_fenced(uint32_t agent) const { return agent == self ? fenced_tick : tick_of(fenced, agent); }
  uint32_t knows_passed(uint32_t agent) const { return std::max(knows(agent), tick_of(passed, agent)); }
};

struct ThreadClock {
  Clock clock;
  uint64_t released_serial = 0;  // the sum it was added to last, with these:
  Known released_known, released_fenced;
};

struct MbarrierClock {
  Clock arriving, done;  // the arrivals of this phase; those of all completed ones
  uint32_t initialiser = nobody, tick = 0;
  uint32_t fence_tick = 0;  // of the initialiser's fence.mbarrier_init; 0: there was none
  Site site{"?", 0};  // of its mbarrier.init
};

struct ReductionId {  // by TMA: atomic additions, in no order unless turns give them one
  uint32_t gang, agent, tick;
  bool operator<(const ReductionId& other) const {
    return std::tie(gang, agent, tick) < std::tie(other.gang, other.agent, other.tick);
  }
};

struct AddressClock {  // of an address that atomics or volatile accesses use
  uint32_t gang = 0;
  Clock sum;
};

constexpr unsigned lanes = 64, write_lanes = 16;

struct Clocks {
  uint32_t gang = 0;  // number of the gang, never used twice; 0 before the first
  unsigned threads = 0, warpgroups_of_block = 0, block_threads = 1, blocks = 0;
  std::vector<ThreadClock> thread;
  Ticks agent_tick;   // of the agents that are not threads
  unsigned next_lane = 0, next_write_lane = 0;
  uint32_t time = 0;  // asynchronous operations issued so far
  std::unordered_map<const void*, MbarrierClock> mbarriers;
  std::unordered_map<const void*, AddressClock> shared_addresses, global_addresses;
  std::map<ReductionId, std::shared_ptr<const Clock>> reductions;  // of the grid: what their issuers knew

  bool is_thread(uint32_t agent) const { return agent < threads; }
  Agent kind(uint32_t agent) const {
    if (agent < threads + lanes) return Agent::tma;
    return agent < threads + lanes + blocks * warpgroups_of_block ? Agent::wgmma : Agent::cp_async;
  }
};
extern Clocks clocks;  // the checked build runs on one OS thread

Clock& clock_of(const Thread& thread);
// A holder learns what others know; the result is shared with those that knew, and learn, the same.
void join(Known& into, const Known& from);
void join(Foreign& into, const Foreign& from);
void learn(Known& into, uint32_t agent, uint32_t tick);
void learn(Clock& clock, const Clock& sum);
// A sum grows in place. `last`: what was added to it before.
void add(Known& sum, Known& last, const Known& from);
void add(Clock& sum, const Clock& from);
void add_entry(Known& sum, uint32_t agent, uint32_t tick);

// ---- check_sync.cpp ----
void forget_addresses();  // a new grid: what its predecessors released is in the past of all
// Did the second's issuer have the turn of the first's, of another cluster, who passed it on after issuing the first?
bool turn_was_passed(const ReductionId& first, const ReductionId& second);
// An atomic at `pointer`; or a volatile access of which `writes` says whether it is a store.
void synchronise(const void* pointer, bool in_shared, Thread& thread);
void volatile_access(const void* pointer, bool in_shared, bool writes, Thread& thread);
void release_at(const void* pointer, bool in_shared, Thread& thread);  // of all it knows: st.release
// `passed`: has it only to be over, not to be visible?
bool knows_foreign(const Foreign& foreign, uint32_t gang, uint32_t agent, uint32_t tick, bool passed);

}  // namespace simt::model::check

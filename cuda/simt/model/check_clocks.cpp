// Joining clocks, and the hooks by which barriers, mbarriers, fences, atomics and asynchronous operations do it.
#if defined(SIMT_CHECKED)
#include "check_clocks.h"

#include "check_places.h"
#include "state.h"

namespace simt::model::check {

Clocks clocks;

namespace {

uint64_t serials = 0;

// The last joins: threads that move together ask for the same one again and again.
struct Join {
  Known a, b, result;
} last_joins[4];
unsigned next_join = 0;
struct Entry {
  Known a, result;
  uint32_t agent = 0, tick = 0;
} last_entry;

// A vector that may be changed.
Ticks& own(Known& known, size_t size) {
  if (!known) known = std::make_shared<Ticks>();
  else if (known.use_count() > 1) known = std::make_shared<Ticks>(*known);
  if (known->size() < size) known->resize(size);
  return *known;
}

bool covers(const Ticks& big, const Ticks& small) {
  for (size_t i = 0; i < small.size(); ++i)
    if (small[i] > (i < big.size() ? big[i] : 0)) return false;
  return true;
}

void maximum(Ticks& into, const Ticks& from) {
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

// A holder learns; the result is shared with others that knew and learn the same.
void join(Known& into, const Known& from) {
  if (!from || into == from) return;
  if (!into) {
    into = from;
    return;
  }
  for (const Join& j : last_joins)
    if (j.a == into && j.b == from) {
      into = j.result;
      return;
    }
  Known result;
  if (covers(*from, *into)) result = from;
  else if (covers(*into, *from)) result = into;
  else {
    result = std::make_shared<Ticks>(*into);
    if (result->size() < from->size()) result->resize(from->size());
    maximum(*result, *from);
  }
  last_joins[next_join++ % 4] = {into, from, result};
  into = result;
}

void learn(Known& into, uint32_t agent, uint32_t tick) {
  if (tick_of(into, agent) >= tick) return;
  if (last_entry.result && last_entry.a == into && last_entry.agent == agent && last_entry.tick == tick) {
    into = last_entry.result;
    return;
  }
  Known before = into;
  own(into, agent + 1)[agent] = tick;
  last_entry = {before, into, agent, tick};
}

// A sum grows in place.
void add(Known& sum, Known& last, const Known& from) {
  if (!from || from == last || from == sum) return;
  last = from;
  if (!sum) {
    sum = from;
    return;
  }
  if (sum.use_count() > 1 && covers(*sum, *from)) return;
  maximum(own(sum, from->size()), *from);
}

void add_entry(Known& sum, uint32_t agent, uint32_t tick) {
  if (tick > tick_of(sum, agent)) own(sum, agent + 1)[agent] = tick;
}

void join(Foreign& into, const Foreign& from) {
  if (!from || into == from) return;
  if (!into) {
    into = from;
    return;
  }
  auto both = std::make_shared<std::vector<Earlier>>();
  both->reserve(std::max(into->size(), from->size()));
  auto a = into->begin(), b = from->begin();
  while (a != into->end() || b != from->end()) {
    if (b == from->end() || (a != into->end() && a->gang < b->gang)) both->push_back(*a++);
    else if (a == into->end() || b->gang < a->gang) both->push_back(*b++);
    else {
      both->push_back(*a++);
      join(both->back().known, (b++)->known);
    }
  }
  into = both;
}

void add(Clock& sum, const Clock& from) {
  if (!sum.serial) sum.serial = ++serials;
  add(sum.known, sum.last_known, from.known);
  add(sum.fenced, sum.last_fenced, from.fenced);
  if (from.self != nobody) {
    add_entry(sum.known, from.self, from.tick);
    add_entry(sum.fenced, from.self, from.fenced_tick);
  }
  join(sum.foreign, from.foreign);
}

void learn(Clock& clock, const Clock& sum) {
  join(clock.known, sum.known);
  join(clock.fenced, sum.fenced);
  join(clock.foreign, sum.foreign);
}

ThreadClock& of(const Thread& thread) { return clocks.thread[thread.index]; }

}  // namespace

Clock& clock_of(const Thread& thread) { return of(thread).clock; }

// ---- barriers ----
void release(SyncClock& sum, Thread& thread) {
  if (!sum) sum = std::make_shared<Clock>();
  ThreadClock& mine = of(thread);
  add(*sum, mine.clock);
  mine.released_serial = sum->serial;
  mine.released_known = mine.clock.known;
  mine.released_fenced = mine.clock.fenced;
  ++mine.clock.tick;
}

void acquire(const SyncClock& sum, Thread& thread) {
  if (!sum) return;
  ThreadClock& mine = of(thread);
  Clock& clock = mine.clock;
  if (mine.released_serial == sum->serial && mine.released_known == clock.known &&
      mine.released_fenced == clock.fenced) {  // all it knows is in the sum
    clock.known = sum->known;
    clock.fenced = sum->fenced;
    join(clock.foreign, sum->foreign);
  } else {
    learn(clock, *sum);
  }
}

void everyone(Gang&) {
  Clock all;
  for (ThreadClock& thread : clocks.thread) add(all, thread.clock);
  for (ThreadClock& thread : clocks.thread) {
    thread.clock.known = all.known;
    thread.clock.fenced = all.fenced;
    thread.clock.foreign = all.foreign;
    ++thread.clock.tick;
  }
}

// ---- mbarriers ----
namespace {

// Whoever uses an mbarrier must know that it was initialised, whether or not that came first this time.
std::string not_initialised(const uint64_t* barrier, const MbarrierClock& mbarrier, const Clock& user) {
  if (mbarrier.initialiser == nobody || user.knows(mbarrier.initialiser) >= mbarrier.tick) return "";
  return "mbarrier " + where(barrier) + " is used without a barrier after its mbarrier.init by " +
         describe(worker->gang.threads[mbarrier.initialiser]) + " at " + line_text(place_of(mbarrier.site));
}

}  // namespace

void mbarrier_init(uint64_t* barrier, Thread& thread, Site site) {
  MbarrierClock& mbarrier = clocks.mbarriers[barrier] = {};
  mbarrier.initialiser = thread.index;
  mbarrier.tick = clock_of(thread).tick;
  mbarrier.site = site;
}

void mbarrier_arrive(uint64_t* barrier, Thread& thread, Site site) {
  Clock& clock = clock_of(thread);
  MbarrierClock& mbarrier = clocks.mbarriers[barrier];
  const std::string mistake = not_initialised(barrier, mbarrier, clock);
  if (!mistake.empty()) fail(mistake, site);
  add(mbarrier.arriving, clock);
  ++clock.tick;
}

void mbarrier_arrive(uint64_t* barrier, const Snapshot& by, Site issued) {
  MbarrierClock& mbarrier = clocks.mbarriers[barrier];
  const std::string mistake = not_initialised(barrier, mbarrier, *by.clock);
  if (!mistake.empty()) fail_issued(mistake, issued, *worker->gang.threads[by.clock->issuer].cta);
  Clock& sum = mbarrier.arriving;
  add(sum, *by.clock);
  add_entry(sum.known, by.agent, by.tick);
}

void mbarrier_phase_done(uint64_t* barrier) {
  MbarrierClock& mbarrier = clocks.mbarriers[barrier];
  add(mbarrier.done, mbarrier.arriving);
  mbarrier.arriving = {};
}

void mbarrier_acquire(uint64_t* barrier, Thread& thread, Site site) {
  MbarrierClock& mbarrier = clocks.mbarriers[barrier];
  const std::string mistake = not_initialised(barrier, mbarrier, clock_of(thread));
  if (!mistake.empty()) fail(mistake, site);
  learn(clock_of(thread), mbarrier.done);
}

// ---- asynchronous operations ----
void issue(Snapshot& snapshot, Thread& thread, Agent agent) {
  Clock& clock = clock_of(thread);
  if (!snapshot.clock) {
    snapshot.clock = std::make_shared<Clock>();
    if (agent != Agent::wgmma) *snapshot.clock = clock;
    snapshot.clock->time = ++clocks.time;
    snapshot.clock->issuer = thread.index;
    const unsigned warpgroups = clocks.threads + lanes;
    const unsigned block = thread.index / clocks.block_threads;
    if (agent == Agent::tma) snapshot.agent = clocks.threads + clocks.next_lane++ % lanes;
    if (agent == Agent::wgmma)
      snapshot.agent = warpgroups + block * clocks.warpgroups_of_block + thread.linear / 128;
    if (agent == Agent::cp_async)
      snapshot.agent = warpgroups + clocks.blocks * clocks.warpgroups_of_block + thread.index;
    const size_t counter = snapshot.agent - clocks.threads;
    if (clocks.agent_tick.size() <= counter) clocks.agent_tick.resize(counter + 1);
    snapshot.tick = ++clocks.agent_tick[counter];
  }
  if (agent == Agent::wgmma) add(*snapshot.clock, clock);
  ++clock.tick;
}

void acquire(const Snapshot& snapshot, Thread& thread) {
  if (snapshot.clock) learn(clock_of(thread).known, snapshot.agent, snapshot.tick);
}

// ---- fences ----
void fence_proxy(Thread& thread) {
  Clock& clock = clock_of(thread);
  clock.fenced = clock.known;
  clock.fenced_tick = clock.tick++;
}

void fence_memory(Thread& thread, bool) { of(thread).fenced_memory = true; }

// ---- atomics: acquire and release at their address, across gangs ----
namespace {

Clock& sum_at(const void* pointer, bool in_shared) {
  AddressClock& here = (in_shared ? clocks.shared_addresses : clocks.global_addresses)[pointer];
  if (here.gang != clocks.gang) {
    if (here.sum.known) {  // what an earlier gang released
      auto foreign = std::make_shared<std::vector<Earlier>>();
      if (here.sum.foreign) *foreign = *here.sum.foreign;
      foreign->push_back({here.gang, here.sum.known});
      Clock fresh;
      fresh.foreign = foreign;
      here.sum = fresh;
    }
    here.gang = clocks.gang;
  }
  return here.sum;
}

}  // namespace

void synchronise(const void* pointer, bool in_shared, Thread& thread) {
  Clock &sum = sum_at(pointer, in_shared), &mine = clock_of(thread);
  learn(mine, sum);
  add(sum, mine);
  ++mine.tick;
}

// A volatile load acquires; a volatile store releases if the thread has ever passed a __threadfence: lenient.
void volatile_access(const void* pointer, bool in_shared, bool writes, Thread& thread) {
  Clock &sum = sum_at(pointer, in_shared), &mine = clock_of(thread);
  if (!writes) return learn(mine, sum);
  if (!of(thread).fenced_memory) return;
  add(sum, mine);
  ++mine.tick;
}

bool knows_foreign(const Foreign& foreign, uint32_t gang, uint32_t agent, uint32_t tick) {
  if (!foreign) return false;
  auto here = std::lower_bound(foreign->begin(), foreign->end(), gang,
                               [](const Earlier& earlier, uint32_t gang) { return earlier.gang < gang; });
  return here != foreign->end() && here->gang == gang && tick_of(here->known, agent) >= tick;
}

void forget_addresses() { clocks.global_addresses.clear(); }

}  // namespace simt::model::check
#endif
